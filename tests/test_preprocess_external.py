"""What is grouped and sorted on disk says nothing on stdout, where results go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from escm2rec.errors import RunError
from escm2rec.preprocess import external

CODE = """
import sys
from pathlib import Path
from escm2rec.preprocess import external
with external.database(Path(sys.argv[1]), 1 << 28) as connection:
    print(connection.execute("SELECT current_setting('enable_progress_bar')").fetchall())
"""


def test_a_long_query_draws_no_bar_among_the_results(tmp_path: Path) -> None:
    """duckdb draws one on stdout where the main module has no file, as in a worker process of `python -m escm2rec`."""
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[(False,)]\n"


def test_memory_that_does_not_do_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "LEAST_BYTES", 1 << 20)
    told = r"^cannot sort with 2MiB: Out of Memory Error: [^\n]*(\n[^\n]*)*\nhint: pass a larger --memory-gib$"
    with pytest.raises(RunError, match=told), external.database(tmp_path, 2 << 20) as connection:
        connection.execute("SELECT list(range) FROM range(10000000)").fetchall()

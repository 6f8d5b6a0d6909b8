"""`make demo`, at a small size: its table holds what its reports hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
IMPRESSIONS = 20_000
TIMEOUT_S = 400  # more than twenty starts of Python, on machines that have other work


def test_the_demo_ends_with_the_models_beside_the_truth(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "apps/demo.py", "--out", str(out), "--impressions", str(IMPRESSIONS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if re.match(r"(truth|ESMM|ESCM2-\w+) ", line)}
    assert list(rows) == ["truth", "ESMM", "ESCM2-IPS", "ESCM2-DR"]
    for name, kind in {"ESMM": "esmm", "ESCM2-IPS": "escm2-ips", "ESCM2-DR": "escm2-dr"}.items():
        report = json.loads((out / f"run-{kind}" / "report.json").read_text())
        entire, unclicked = report["cvr_entire"], report["cvr_unclicked"]
        expected = [f"{entire['mean_predicted']:.4f}", f"{entire['bias_ratio']:.3f}", f"{unclicked['mean_predicted']:.4f}"]
        expected += [f"{unclicked['bias_ratio']:.3f}", f"{unclicked['rmse']:.4f}", f"{unclicked['kl']:.5f}"]
        assert rows[name] == [*expected, f"{report['ctr']['auc']:.4f}", f"{report['ctcvr']['auc']:.4f}"]
        assert rows["truth"] == [f"{entire['mean_truth']:.4f}", f"{unclicked['mean_truth']:.4f}"]
    parts = [pq.read_metadata(path).num_rows for path in (out / "predictions").glob("*.parquet")]
    assert sum(parts) == IMPRESSIONS
    assert str(out / "predictions") in done.stdout
    assert str(out / "run-esmm" / "report.html") in done.stdout


def test_a_failing_verb_ends_the_demo(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.txt").write_text("not the demo's")
    command = [sys.executable, "apps/demo.py", "--out", str(tmp_path), "--impressions", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 2
    assert "error: will not overwrite" in done.stderr
    assert done.stdout == ""

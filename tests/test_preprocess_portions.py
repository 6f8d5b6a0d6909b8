"""How an input is cut: alike on any workers, into shares that are about equal."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from escm2rec.config import TableSource
from escm2rec.preprocess import portions
from escm2rec.preprocess.files import raw_files
from escm2rec.preprocess.portions import other_ranges, portion_bytes, portions_of, text_cuts

TABLE = TableSource(kind="table", files="*")


def _tables(folder: Path, rows: list[int]) -> list[portions.Range]:
    for number, count in enumerate(rows):
        pq.write_table(
            pa.table({"id": range(count)}), folder / f"{number}.parquet", row_group_size=100, compression="none", use_dictionary=False
        )
    files = raw_files(TABLE, folder)
    return [each for file in files for each in other_ranges(TABLE, file, portion_bytes(files))]


def test_a_small_input_of_several_files_is_cut_into_equal_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was three files and one, of four: one of two processes read for three quarters of the time alone."""
    monkeypatch.setattr(portions, "LEAST_BYTES", 100)
    ranges = _tables(tmp_path, [2_000] * 4)
    held = [sum(each.rows for each in portion) for portion in portions_of(ranges, portion_bytes(raw_files(TABLE, tmp_path)))]
    assert sum(held) == 8_000
    assert 8 <= len(held) <= 12
    assert max(held) <= 1_100


def test_what_is_very_small_is_one_portion_and_what_is_large_is_in_portions_of_64_mb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = _tables(tmp_path, [1_000] * 4)
    files = raw_files(TABLE, tmp_path)
    assert len(portions_of(ranges, portion_bytes(files))) == 1
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    for most in (size, size // 8, size // 20):
        monkeypatch.setattr(portions, "LEAST_BYTES", 1)
        monkeypatch.setattr(portions, "PORTION_BYTES", most)
        assert portion_bytes(files) == min(most, size // 8)


def test_texts_are_cut_at_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("".join(f"{line}\n" for line in range(1_000)))
    cuts = text_cuts(path, 100)
    assert len(cuts) > 20
    text = path.read_bytes()
    assert b"".join(text[start:stop] for start, stop in cuts) == text
    assert all(text[start:stop].endswith(b"\n") for start, stop in cuts)

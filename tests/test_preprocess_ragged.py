"""Rows gathered from ragged columns, and batches read in place."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from escm2rec.preprocess import ragged
from escm2rec.preprocess.ragged import gather, held_in, offsets_of
from escm2rec.preprocess.spill import MappedBatch, write_batch


@pytest.mark.parametrize("small_bytes", [0, 1 << 31], ids=["64-bit offsets", "32-bit offsets"])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=30), wanted=st.lists(st.integers(0, 29), max_size=60), wide=st.booleans())
def test_gathered_rows_are_those_of_a_loop(
    small_bytes: int, lengths: list[int], wanted: list[int], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows of many, and many of a few, go different ways."""
    monkeypatch.setattr(ragged, "SMALL_BYTES", small_bytes)
    offsets = offsets_of(np.array(lengths))
    values = np.arange(offsets[-1], dtype=np.int64 if wide else np.float32)
    rows = np.array([row % len(lengths) for row in wanted], np.int64)
    taken, places = gather(values, offsets, rows)
    assert taken.dtype == values.dtype
    assert taken.tolist() == [value for row in rows for value in values[offsets[row] : offsets[row + 1]]]
    assert places.tolist() == [0, *np.cumsum([lengths[row] for row in rows])]


@settings(deadline=None)
@given(values=st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=40), start=st.integers(0, 20), count=st.integers(0, 40))
def test_held_places_are_those_of_arrow(values: list[int | None], start: int, count: int) -> None:
    for kind in (pa.int64(), pa.string()):
        array = pa.array([value if value is None else str(value) for value in values], pa.string()).cast(kind).slice(start, count)
        assert held_in(array).tolist() == array.is_valid().to_pylist()
    assert held_in(pa.nulls(3)).tolist() == [False] * 3


def test_a_batch_in_place_holds_no_file_open_and_its_copies_stay(tmp_path: Path) -> None:
    """A job of a terabyte has many thousands of them."""
    columns = {"n": pa.array(range(1000)), "t": pa.array([[f"w{number}"] * (number % 3) for number in range(1000)])}
    write_batch(tmp_path / "a.arrow", pa.RecordBatch.from_pydict(columns))
    before = len(os.listdir("/proc/self/fd"))
    mapped = [MappedBatch(tmp_path / "a.arrow") for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    first = mapped[0].copy(10, 20)
    again = mapped[0].copy(10, 20)  # after what was mapped is given back
    expected = {name: column[10:20].to_pylist() for name, column in columns.items()}
    assert [{name: column.to_pylist() for name, column in each.items()} for each in (first, again)] == [expected] * 2

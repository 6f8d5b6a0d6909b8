"""Lists as cells of bytes come back as they were, and what is no such cell is told."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from escm2rec.cells import from_cells, to_cells, with_lists
from escm2rec.errors import DataError

LISTS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4), max_size=8)


def cells_of(lists: list[list[Any]], kind: Any = np.int32) -> pa.Array:
    flat = np.array([value for each in lists for value in each], kind)
    return to_cells(flat, np.concatenate(([0], np.cumsum([len(each) for each in lists]))).astype(np.int64))


@given(LISTS, st.integers(0, 8), st.integers(0, 8))
def test_lists_come_back_from_any_slice(lists: list[list[int]], start: int, count: int) -> None:
    values, offsets = from_cells(cells_of(lists).slice(start, count), pa.int32())
    expected = lists[start : start + count]
    assert [values.to_pylist()[low:high] for low, high in pairwise(offsets)] == expected
    assert offsets[0] == 0


def test_a_cell_is_its_values_in_little_endian() -> None:
    assert cells_of([[1, -2], [], [258]]).to_pylist() == [b"\x01\0\0\0\xfe\xff\xff\xff", b"", b"\x02\x01\0\0"]
    assert cells_of([[1.0]], np.float32).to_pylist() == [b"\0\0\x80?"]


def test_more_than_arrow_can_address_is_refused() -> None:
    with pytest.raises(DataError, match=r"the lists of a feature have 536,870,912 values of 4 bytes in one row group, which is more"):
        to_cells(np.zeros(1, np.int32), np.array([0, 2**29]))


def test_values_are_not_copied() -> None:
    values = np.arange(6, dtype=np.int32)
    cells = to_cells(values, np.array([0, 2, 6]))
    back = from_cells(cells.slice(1), pa.int32())[0].to_numpy()
    assert back.tolist() == [2, 3, 4, 5]
    assert np.shares_memory(back, values)


@pytest.mark.parametrize(
    ("cells", "fault", "row"),
    [
        ([b"", None, b""], "a list is missing", 1),
        ([b"\0\0\0\0", b"", b"\0\0\0\0\0\0\0"], "a list of 7 bytes is no whole number of values", 2),
        ([b"\0\0", b"\0\0"], "a list of 2 bytes is no whole number of values", 0),
    ],
)
def test_what_is_no_list_is_told_with_its_row(cells: list[bytes | None], fault: str, row: int) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        from_cells(pa.array(cells, pa.binary()), pa.int32())
    assert caught.value.args == (fault, row)


def test_a_table_for_people_has_lists() -> None:
    table = pa.table(
        {
            "tags": cells_of([[1], [2, 3]]),
            "tags.weight": cells_of([[0.5], [1.0, 2.0]], np.float32),
            "kept.token": pa.array([b"abcd", b"e"]),
            "click": pa.array([1, 0], pa.uint8()),
        }
    )
    assert with_lists(table).to_pylist() == [
        {"tags": [1], "tags.weight": [0.5], "kept.token": b"abcd", "click": 1},
        {"tags": [2, 3], "tags.weight": [1.0, 2.0], "kept.token": b"e", "click": 0},
    ]
    assert with_lists(table.slice(0, 0)).column_names == table.column_names

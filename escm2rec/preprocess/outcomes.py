"""What came of each impression of an event log: one byte a row, in a file for each file of impressions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from escm2rec.config import EventsSource
from escm2rec.preprocess.rejections import DIFFERING, EVENT_KEY, EVENT_TIME, OPEN_WINDOW, REPEATED, BadRows, values_at
from escm2rec.preprocess.table_columns import TableColumn

Codes = npt.NDArray[np.uint8]

CLICK, CONVERSION = 1, 2  # bits of a row that is used
NO_KEY, NO_TIME, REPEATED_EQUAL, REPEATED_DIFFERING, OPEN = 4, 5, 6, 7, 8


def read_outcomes(path: Path) -> Codes:
    """The codes of one file of impressions, mapped."""
    return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)


def labels_of(codes: Codes, columns: Callable[[str], TableColumn], source: EventsSource, bad: BadRows) -> dict[str, Any]:
    """Click and conversion of the rows of a block; those that the join leaves out are marked with their reason."""
    key, time = (columns(name) for name in impression_columns(source))
    for code, reason, column in (
        (NO_KEY, EVENT_KEY, key),
        (NO_TIME, EVENT_TIME, time),
        (REPEATED_EQUAL, REPEATED, key),
        (REPEATED_DIFFERING, DIFFERING, key),
        (OPEN, OPEN_WINDOW, time),
    ):
        bad.mark(codes == code, reason, column.name, values_at(column.array))
    return {"click": codes & CLICK, "conversion": (codes & CONVERSION) // CONVERSION}


def impression_columns(source: EventsSource) -> tuple[str, str]:
    """The names of the key and the time column of the impressions."""
    key, time = source.column("key", "impressions"), source.column("time", "impressions")
    assert key is not None
    assert time is not None
    return key, time

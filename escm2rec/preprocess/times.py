"""Times of any column, as microseconds since 1970 began in UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from escm2rec.config import TimeUnit
from escm2rec.preprocess.digits import parse_decimals
from escm2rec.preprocess.ragged import Bools, Int64s
from escm2rec.preprocess.texts import without_other_text

MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
DAY = 86_400_000_000
FARTHEST = int((datetime(2200, 1, 1) - datetime(1970, 1, 1)) / timedelta(microseconds=1))
"""No log holds a time farther from 1970: its numbers count something smaller than was said."""
EXPECTED = "a time from 1740 to 2200"
TEXT_TIMES = (
    "write times as timestamps, or as ISO text such as 2026-01-31, 2026-01-31 18:30 or 2026-01-31T18:30:00+01:00 (UTC where none is said); "
    "other text becomes timestamps by polars' str.to_datetime('%d/%m/%Y %H:%M') or pandas' to_datetime(texts, format=...)"
)
"""What to do about text that is no time."""

# ISO text to one form, which chrono parses: a date alone, a blank before the time, no seconds, Z, no zone.
_ISO = (
    (r"^(\d{4}-\d\d-\d\d)$", "${1}T00:00"),
    (r"^(\d{4}-\d\d-\d\d)[ t]", "${1}T"),
    (r"T(\d\d:\d\d)($|[Zz+-])", "T${1}:00${2}"),
    (r"[Zz]$", "+00:00"),
    (r"(T[0-9:.]+)$", "${1}+00:00"),
)
_ISO_FORMAT = "%Y-%m-%dT%H:%M:%S%.f%z"


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether a column holds numbers."""
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind))


def microseconds(array: pa.Array, unit: TimeUnit) -> tuple[Int64s, Bools]:
    """The time of each row, and whether it has one: not null, readable, and not farther from 1970 than 2200.

    Takes timestamps (UTC where they have no zone) and dates; numbers, which count `unit`s; and text, either numbers or ISO dates and
    times (UTC unless they say otherwise). TypeError for a column of another type.
    """
    kind = array.type
    held: Bools = array.is_valid().to_numpy(zero_copy_only=False)
    if pt.is_null(kind):
        return np.zeros(len(array), dtype=np.int64), held
    if pt.is_timestamp(kind):
        whole = pc.fill_null(array.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
        times, near = _scaled(whole // 1000, 1) if kind.unit == "ns" else _scaled(whole, MICROSECONDS[kind.unit])
    elif pt.is_date(kind):
        days = pc.fill_null(array.cast(pa.date32()).cast(pa.int32()), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        times, near = _scaled(days, DAY)
    elif is_number(kind):
        numbers = array if pt.is_integer(kind) else array.cast(pa.float64())
        zero = pa.scalar(0).cast(numbers.type)
        times, near = _scaled(pc.fill_null(numbers, zero).to_numpy(zero_copy_only=False), MICROSECONDS[unit])
    elif is_text(kind):
        times, near = _of_text(without_other_text(array.cast(pa.large_string())), unit)
    else:
        raise TypeError(f"expected numbers, timestamps, dates or ISO text, found type {kind}")
    return times, held & near


def _scaled(numbers: Any, scale: int) -> tuple[Int64s, Bools]:
    """Numbers times `scale`, and which of them are near enough."""
    limit = FARTHEST // scale
    near: Bools = (numbers <= limit) & (numbers >= -limit)  # false for NaN
    held = np.where(near, numbers, 0)
    times = np.rint(held.astype(np.float64) * scale) if held.dtype.kind == "f" else held.astype(np.int64) * scale
    return times.astype(np.int64), near


def _of_text(texts: pa.Array, unit: TimeUnit) -> tuple[Int64s, Bools]:
    numbers = parse_decimals(texts)
    times, near = _scaled(numbers, MICROSECONDS[unit])
    if not np.isnan(numbers).any():
        return times, near
    series = pl.Series(pl.from_arrow(texts))
    for pattern, form in _ISO:
        series = series.str.replace(pattern, form)
    parsed = series.str.to_datetime(_ISO_FORMAT, time_unit="us", strict=False)
    iso, is_iso = _scaled(parsed.to_physical().fill_null(FARTHEST + 1).to_numpy(), 1)
    return np.where(is_iso, iso, times), near | is_iso


def iso_text(time: int) -> str:
    """Microseconds since 1970 as ISO text."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time)).isoformat().replace("+00:00", "Z")

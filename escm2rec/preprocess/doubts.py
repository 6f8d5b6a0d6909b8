"""What is not wrong by itself and yet mostly a slip, of the config or of an export: told once a data set is made."""

from __future__ import annotations

from collections.abc import Iterator

from escm2rec.config import SPLITS, ColumnSplit
from escm2rec.preprocess.splits import AnySplit, Seen


def share(part: int, whole: int, what: str) -> str:
    """A part as people read it."""
    return f"{part:,} of {whole:,} {what} ({part / whole:.1%})"


def of_rows_without_split(split: AnySplit, seen: Seen, left_out: int, rows: int) -> Iterator[str]:
    """On the rows that belong to no split, of all rows that can be used."""
    if not left_out:
        return
    values = ", ".join(f"{value} ({place})" if place else value for value, place in seen.strays.items())
    told = f"data.split gives no split to {share(left_out, rows, 'rows')}, which are left out: {values}"
    if isinstance(split, ColumnSplit):
        unseen = [f"{value!r} of data.split.{name}" for name in SPLITS for value in getattr(split, name) if value not in seen.named]
        told += f"; no row has {', '.join(unseen)}" if unseen else ""
    yield told

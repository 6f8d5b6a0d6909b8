"""What a person is told of a job: how many rows there may be, and in the end a table by file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from escm2rec.scoring.inputs import LogFile

LOOKED_AT = 64  # files, whose footers say how many rows they have
SHOWN = 20
WIDTH = 120
Record = dict[str, Any]


def estimated_rows(files: Sequence[LogFile]) -> int | None:
    """Of Parquet files: the rows of a few, by which those of all are estimated; None where there are others."""
    sample = files[:: max(1, len(files) // LOOKED_AT)][:LOOKED_AT]
    try:
        rows = [pq.read_metadata(file.raw.path).num_rows for file in sample if file.raw is not None and file.raw.path.suffix != ".csv"]
    except (OSError, pa.ArrowInvalid):  # who reads it says so
        return None
    return round(sum(rows) / len(rows) * len(files)) if len(rows) == len(sample) else None


def tell_files(records: Sequence[Record]) -> None:
    """A table by file, on stderr: those that failed, then the slowest, in their order."""
    ranked = sorted(range(len(records)), key=lambda number: ("error" not in records[number], -records[number].get("seconds", 0)))
    table = Table("file", title="scored", title_justify="left", box=SIMPLE)
    for name in ("rows", "left out", "parts", "rows/s"):
        table.add_column(name, justify="right")
    table.add_column("")
    for number in sorted(ranked[:SHOWN]):
        record = records[number]
        left_out = sum(int(each["rows"]) for each in record.get("rejected", {}).values())
        rate = f"{record['rows'] / max(record['seconds'], 1e-3):,.0f}" if "seconds" in record else ""
        table.add_row(record["input"], f"{record['rows']:,}", f"{left_out:,}", f"{len(record['parts'])}", rate, record.get("error", ""))
    if (more := len(records) - SHOWN) > 0:
        table.caption = f"and {more:,} files more, in the manifest"
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = max([WIDTH, *(len(record["input"]) + len(record.get("error", "")) + WIDTH // 2 for record in records[:SHOWN])])
    console.print(table)

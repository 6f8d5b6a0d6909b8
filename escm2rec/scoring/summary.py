"""What a person is told of a job: how many rows there may be, and in the end a table by file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from escm2rec.scoring.inputs import LogFile

LOOKED_AT = 64  # files, whose footers say how many rows they have
SHOWN = 20
WIDTH = 200
Record = dict[str, Any]


def estimated_rows(files: Sequence[LogFile]) -> int | None:
    """Of Parquet files: the rows of a few, by which those of all are estimated; None where there are others."""
    sample = [file for file in files[:: max(1, len(files) // LOOKED_AT)][:LOOKED_AT] if file.fault is None]
    if any(file.raw is None or file.raw.path.suffix == ".csv" for file in sample):
        return None
    rows = [found for file in sample if file.raw is not None and (found := _rows_of(file.raw.path)) is not None]
    return round(sum(rows) / len(rows) * len(files)) if rows else None


def _rows_of(path: Path) -> int | None:
    """By its footer; None of what is no Parquet: who reads it says so."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowInvalid):
        return None


def tell_files(records: Sequence[Record]) -> None:
    """A table by file, on stderr, in their order; of many those that failed and the slowest."""
    ranked = sorted(range(len(records)), key=lambda number: ("error" not in records[number], -records[number].get("seconds", 0)))
    names = [record["input"] for record in records]
    folders = [os.path.dirname(name) for name in names]
    common = f"{os.path.commonpath(folders)}/" if len(names) > 1 and all(map(os.path.isabs, names)) else ""
    table = Table("file", title=Text(f"scored in {common}" if common else "scored"), title_justify="left", box=SIMPLE)
    for name in ("rows", "left out", "parts", "rows/s"):
        table.add_column(name, justify="right")
    table.add_column("")
    for number in sorted(ranked[:SHOWN]):
        record = records[number]
        left_out = sum(int(each["rows"]) for each in record.get("rejected", {}).values())
        rate = f"{record['rows'] / max(record['seconds'], 1e-3):,.0f}" if "seconds" in record else ""
        name = record["input"].removeprefix(common)
        error = " ".join(record.get("error", "").replace(record["input"], name).split())
        counts = (f"{record['rows']:,}", f"{left_out:,}", f"{len(record['parts'])}", rate)
        table.add_row(*map(Text, (name, *counts, "".join(filter(str.isprintable, error)))))  # no markup, whatever they hold
    if (more := len(records) - SHOWN) > 0:
        table.caption = f"those that failed, then the slowest; {more:,} files more in the manifest"
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)

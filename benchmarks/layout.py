"""Parquet layouts of encoded columns: time to write and to read a value, and bytes. Prints one JSON object.

    python -m benchmarks.layout

Columns of simulated impressions as preprocess writes them (`benchmarks/table.py`): `single` is ids and numbers, `lists` four histories and
their weights. Layouts differ in one thing from the first, that of `write.layout_of`: codec, dictionaries, bytes apart or not, lists
as Parquet lists (their elements never null), rows a group. One thread; best processor time of `--repeats`, in turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import facts
from benchmarks.table import config_of, write_table
from escm2rec.cells import CELLS, with_lists
from escm2rec.config import DataConfig
from escm2rec.preprocess import preprocess
from escm2rec.preprocess.write import layout_of

ROWS_PER_GROUP = 32_768
CHANGES: dict[str, dict[str, Any]] = {
    "as written": {},
    "no codec": {"compression": "none"},
    "snappy": {"compression": "snappy"},
    "zstd": {"compression": "zstd"},
    "dictionaries": {"use_dictionary": True, "use_byte_stream_split": False},
    "bytes together": {"use_byte_stream_split": False},
    "groups of 8,192": {"rows": 8_192},
    "groups of 131,072": {"rows": 131_072},
}


def columns_of(folder: Path, impressions: int) -> dict[str, pa.Table]:
    """Encoded columns of a training split."""
    write_table(folder / "table", impressions, impressions // 5, "lists")
    preprocess(DataConfig.model_validate(config_of("lists")["data"]), folder / "table", folder / "out")
    table = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "out" / "train").iterdir())]).combine_chunks()
    lists = [field.name for field in table.schema if field.type == CELLS]
    return {"single": table.drop_columns(lists), "lists": table.select([name for name in lists if name.startswith("history")])}


def values_in(table: pa.Table) -> int:
    """Numbers, and ids and weights in lists."""
    return sum(column.nbytes // 4 if column.type == CELLS else len(column) for column in table.columns)


def least(action: Callable[[], Any], repeats: int) -> float:
    """Least processor time of so many runs."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return min(times)


def measure(table: pa.Table, values: int, path: Path, repeats: int, rows: int = ROWS_PER_GROUP, **changes: Any) -> dict[str, float]:
    """ns a value to write and to read, and bytes a value."""
    layout = {**layout_of(table.schema), **changes}
    written = least(lambda: pq.write_table(table, path, row_group_size=rows, **layout), repeats)
    groups = range(pq.read_metadata(path).num_row_groups)

    def read() -> None:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for group in groups:
                file.read_row_group(group, use_threads=False)

    read_back = least(read, repeats)
    found = {"write_ns": written / values * 1e9, "read_ns": read_back / values * 1e9, "bytes": path.stat().st_size / values}
    return {name: round(number, 2) for name, number in found.items()}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--impressions", type=int, default=300_000)
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()
    shapes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for shape, table in columns_of(Path(temporary), arguments.impressions).items():
            path, values = Path(temporary) / "layout.parquet", values_in(table)
            shapes[shape] = {name: measure(table, values, path, arguments.repeats, **change) for name, change in CHANGES.items()}
            if shape == "lists":
                fields = [
                    pa.field(name, pa.list_(pa.field("element", kind.value_type, nullable=False)), nullable=False)
                    for name, kind in zip(table.column_names, with_lists(table).schema.types, strict=True)
                ]
                as_lists = with_lists(table).cast(pa.schema(fields))
                shapes[shape]["parquet lists"] = measure(as_lists, values, path, arguments.repeats)
    print(json.dumps({"machine": facts(), "rows_per_group": ROWS_PER_GROUP, "shapes": shapes}, indent=1))


if __name__ == "__main__":
    main()

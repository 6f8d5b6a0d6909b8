"""The shapes of the benchmarks' data.

The reference: 20 tables of 1M rows, 14 single and 6 list features, 29 ids a row, no numeric features. DLRM's: 26 single features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from escm2rec.cells import to_cells
from escm2rec.config import TableSource
from escm2rec.folder import new_folder, sha256_of, write_manifest
from escm2rec.preprocess.write import layout_of
from escm2rec.schema import Feature, Schema

TABLE_ROWS = 1_000_000
NUM_SINGLE, NUM_LISTS, LIST_LENGTH = 14, 6, 2.5  # 14 + 6 x 2.5 = 29 ids a row


def reference_schema(num_single: int = NUM_SINGLE, num_lists: int = NUM_LISTS) -> Schema:
    """Schema of the reference data set, or of one with other numbers of features."""
    single = [Feature(name=f"single_{i}", kind="categorical", column=f"single_{i}", **_encoding()) for i in range(num_single)]
    lists = [Feature(name=f"list_{i}", kind="list", column=f"list_{i}", **_encoding()) for i in range(num_lists)]
    return Schema(source=TableSource(kind="table"), features=(*single, *lists))


def write_reference_data(
    out: Path, rows: int, rows_per_file: int = 524_288, rows_per_group: int = 32_768, schema: Schema | None = None
) -> None:
    """Write an encoded data set of the reference shape (or another) with Zipf-like ids, CTR 4% and CVR 5%, in split train."""
    schema = schema or reference_schema()
    with new_folder(out, "data set", overwrite=True) as folder:
        (folder / "train").mkdir()
        files = []
        for number, start in enumerate(range(0, rows, rows_per_file)):
            name = f"train/part-{number:05d}.parquet"
            table = _impressions(schema, min(rows_per_file, rows - start), np.random.default_rng(number))
            pq.write_table(table, folder / name, row_group_size=rows_per_group, **layout_of(table.schema))
            clicks, conversions = int(np.sum(table["click"])), int(np.sum(table["conversion"]))
            entry = {"path": name, "rows": table.num_rows, "clicks": clicks, "conversions": conversions}
            files.append({**entry, "sha256": sha256_of(folder / name)})
        totals = {key: sum(int(str(file[key])) for file in files) for key in ("rows", "clicks", "conversions")}
        schema.save(folder / "schema.json")
        splits = {"train": {**totals, "files": files}}
        (folder / "vocabulary").mkdir()
        write_manifest(folder, "data set", {"schema_hash": schema.hash(), "splits": splits, "negative_keep_rate": 1.0, "rejected": {}})


def _encoding() -> dict[str, object]:
    return {"value_type": "int64", "encoding": "hash", "num_embeddings": TABLE_ROWS}


def _impressions(schema: Schema, rows: int, rng: np.random.Generator) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for feature in schema.features:
        if feature.kind == "categorical":
            columns[feature.name] = pa.array(_ids(rows, rng))
        else:
            lengths = rng.poisson(LIST_LENGTH, rows)
            offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
            columns[feature.name] = to_cells(_ids(int(offsets[-1]), rng), offsets)
    click = (rng.random(rows) < 0.04).astype(np.uint8)
    columns["click"] = pa.array(click)
    columns["conversion"] = pa.array(click * (rng.random(rows) < 0.05).astype(np.uint8))
    # As preprocess writes them: ids of categorical features may be null, everything else says that it never is.
    fields = [pa.field(name, column.type, nullable=name.startswith("single_")) for name, column in columns.items()]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def _ids(count: int, rng: np.random.Generator) -> NDArray[np.int32]:
    # Log-uniform over the table: as heavy-tailed as Zipf with exponent 1.
    ids: NDArray[np.int32] = (np.exp(rng.random(count) * np.log(TABLE_ROWS)) - 1).astype(np.int32)
    return ids

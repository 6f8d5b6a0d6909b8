"""What is written of each row, and the Parquet parts that it is written to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from escm2rec.errors import ConfigError, did_you_mean
from escm2rec.evaluation.metrics import ctcvr_logits
from escm2rec.schema import Schema
from escm2rec.scoring.options import Layout

PROBABILITIES = ("p_ctr", "p_cvr", "p_ctcvr")
PREDICTIONS = (*PROBABILITIES, "ctr_logit", "cvr_logit", "ctcvr_logit", "propensity")
RANK = "rank"  # the column of a row's place among its user's
Record = dict[str, Any]


@dataclass(frozen=True)
class OutputColumn:
    """A column of the predictions: under `name` what `source` is, a prediction, or a column of the input."""

    name: str
    source: str

    @property
    def is_prediction(self) -> bool:
        """Whether the model makes it."""
        return self.source in PREDICTIONS


def output_columns(
    schema: Schema, keep: Sequence[str] | None, columns: Sequence[str] | None, by: str | None = None
) -> tuple[OutputColumn, ...]:
    """What to write, in order: `columns`, each `SOURCE` or `NAME=SOURCE`; or `by`, those to `keep` (the schema's, when None) and
    PROBABILITIES.

    ConfigError where two have one name, and where no prediction is among them.
    """
    if keep is not None and columns is not None:
        raise ConfigError("--keep and --columns both say what to write", "name all columns in --columns, or leave it out")
    kept = dict.fromkeys([*([by] if by is not None else []), *(schema.keep if keep is None else keep)])
    asked = columns if columns is not None else [*kept, *PROBABILITIES]
    found = []
    for each in asked:
        name, renamed, source = each.partition("=")
        found.append(OutputColumn(name.strip(), (source if renamed else name).strip()))
    for place, column in enumerate(found):
        if not column.name or not column.source:
            raise ConfigError(f"--columns: {asked[place]!r} is neither COLUMN nor NAME=COLUMN", "such as user_id,ctr=p_ctr")
        if column.name in [before.name for before in found[:place]]:
            hint = "leave one out, or give it another name: --columns NAME=COLUMN"
            raise ConfigError(f"two columns are to be written as {column.name!r}", hint)
    if not any(column.is_prediction for column in found):
        near = next((said for column in found if (said := did_you_mean(column.source, PREDICTIONS))), "")
        raise ConfigError(f"--columns {','.join(asked)} names no prediction{near}", f"these there are: {', '.join(PREDICTIONS)}")
    return tuple(found)


def kept_columns(columns: Sequence[OutputColumn]) -> tuple[str, ...]:
    """Columns of the input that are written, each once."""
    return tuple(dict.fromkeys(column.source for column in columns if not column.is_prediction))


def predictions(ctr: Tensor, cvr: Tensor, propensity: Callable[[], Tensor]) -> dict[str, Callable[[], Any]]:
    """How each of PREDICTIONS is made of logits, as floats [B].

    Probabilities in float64 by torch: a twentieth of the time of numpy's, and products of them are not below what float32 tells apart.
    """
    p_ctr, p_cvr = cache(lambda: torch.sigmoid(ctr.double())), cache(lambda: torch.sigmoid(cvr.double()))
    return {
        "p_ctr": lambda: p_ctr().numpy(),
        "p_cvr": lambda: p_cvr().numpy(),
        "p_ctcvr": lambda: (p_ctr() * p_cvr()).numpy(),
        "ctr_logit": lambda: ctr.numpy(),
        "cvr_logit": lambda: cvr.numpy(),
        "ctcvr_logit": lambda: ctcvr_logits(ctr.numpy(), cvr.numpy()),
        "propensity": lambda: propensity().numpy(),
    }


def output_table(columns: Sequence[OutputColumn], kept: Mapping[str, pa.ChunkedArray], made: Mapping[str, Callable[[], Any]]) -> pa.Table:
    """The rows as they are written."""

    def column(each: OutputColumn) -> Any:
        return pa.array(np.asarray(made[each.source](), np.float32)) if each.is_prediction else kept[each.source]

    return pa.table({each.name: column(each) for each in columns})


class PartWriter:
    """Writes the part of one input, a file or several. Nothing has its name before `finish`."""

    def __init__(self, folder: Path, number: int, layout: Layout) -> None:
        self._folder, self._number, self._layout = folder, number, layout
        self._waiting: list[pa.Table] = []
        self._rows_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._parts: list[Record] = []

    def write(self, table: pa.Table) -> None:
        """Write rows, as soon as there is a row group of them."""
        while len(table):
            room = self._layout.row_group_rows - self._rows_waiting
            if self._layout.rows_per_file is not None:
                written = self._parts[-1]["rows"] if self._writer is not None else 0
                room = min(room, self._layout.rows_per_file - written - self._rows_waiting)
            self._waiting.append(table.slice(0, room))
            self._rows_waiting += min(room, len(table))
            if len(table) < room:
                return
            self._flush()
            table = table.slice(room)

    def _flush(self) -> None:
        """Write what waits as a row group; of a file that has all its rows that was the last."""
        if not self._rows_waiting:
            return
        group = pa.concat_tables(self._waiting)
        if self._writer is None:
            name = part_name(self._number, len(self._parts) if self._layout.rows_per_file is not None else None)
            self._parts.append({"path": name, "rows": 0})
            self._writer = pq.ParquetWriter(_partial(self._folder / name), group.schema, **_parquet_options(group.schema, self._layout))
        self._writer.write_table(group, row_group_size=len(group))
        self._parts[-1]["rows"] += len(group)
        self._waiting, self._rows_waiting = [], 0
        if self._parts[-1]["rows"] == self._layout.rows_per_file:
            self.close()

    def close(self) -> None:
        """Close the file that is being written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def finish(self) -> list[Record]:
        """Give the files their names: `path` and `rows` of each; none of an input without rows."""
        self._flush()
        self.close()
        for part in self._parts:
            os.replace(_partial(self._folder / part["path"]), self._folder / part["path"])
        return self._parts


def part_name(number: int, piece: int | None) -> str:
    """Of the input of a number, from 0, and of which of its files."""
    return f"part-{number:05d}.parquet" if piece is None else f"part-{number:05d}-{piece:05d}.parquet"


def files_of(folder: Path, number: int) -> list[Path]:
    """What an input of a number has in a folder, whole or not."""
    stem = f"part-{number:05d}"
    return [path for name in (f"{stem}.", f"{stem}-") for dot in ("", ".") for path in folder.glob(f"{dot}{name}*")]


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _parquet_options(schema: pa.Schema, layout: Layout) -> Record:
    """Predictions hardly repeat: a dictionary of them would be tried and dropped, and their bytes compress better apart."""
    floats = [field.name for field in schema if field.type == pa.float32()]
    others = [leaf for field in schema if field.type != pa.float32() for leaf in _leaves(field)]
    return {"compression": layout.compression, "use_dictionary": others or False, "use_byte_stream_split": floats or False}


def _leaves(field: pa.Field, before: str = "") -> list[str]:
    """The columns that Parquet makes of a field, by the names that it gives them."""
    name, kind = before + field.name, field.type
    if pa.types.is_struct(kind):
        return [leaf for place in range(kind.num_fields) for leaf in _leaves(kind.field(place), f"{name}.")]
    if pa.types.is_map(kind):
        return [f"{name}.key_value.key", *_leaves(pa.field("value", kind.item_type), f"{name}.key_value.")]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _leaves(pa.field("element", kind.value_type), f"{name}.list.")
    return [name]

"""A trained model as files: its tables one that processes map, its dense part another.

    tables.bin          the rows of all tables, float32, one table after the other
    TABLE.values.npy    of a managed table: the values that have a row, in order; and their rows
    TABLE.rows.npy
    dense.pt            the parameters of the head

Pages of a mapped file that nobody writes are the machine's once, whoever maps it: so tables take their memory once, and a process that
has more tables than memory still runs, from its disk.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from escm2rec.schema import Feature, Schema
from escm2rec.sharding.managed import FREE
from escm2rec.training.build import build_model
from escm2rec.training.managed_rows import OF_VALUES, stored_name
from escm2rec.training.run import Run
from escm2rec.training.stored import StoredTensors

TABLES, DENSE = "tables.bin", "dense.pt"
HEAD = "model.model.head."  # what the names of the head's parameters begin with in a checkpoint
CHUNK_BYTES = 64 << 20


def write_model(run: Run, folder: Path) -> None:
    """Write the model of a run into an empty folder; memory does not grow with its tables. DataError where its checkpoint cannot be read,
    OSError where the disk is full."""
    stored = StoredTensors(run.checkpoint)
    tables = MappedTables(run, folder / TABLES, new=True)
    for feature in run.schema.tables:
        weights = tables.rows(feature)
        ending = f".embedding_bags.{feature.name}.weight"
        name = next(name for name in stored.shapes if name.startswith("model.") and name.endswith(ending))
        for part in stored.parts(name):
            _copy(part.values, weights, part.offsets)
        if feature.is_managed:
            weights[-1] = 0  # of values without a row; training makes it so before each look-up
            _write_managed(stored, feature, folder)
    calibration = "model.loss.calibration"
    fit = stored.whole(calibration) if calibration in stored.shapes else None
    torch.save({"head": _head_of(run, stored), "calibration": fit}, folder / DENSE)


def _copy(part: Any, weights: Any, offsets: tuple[int, ...]) -> None:
    first, left = offsets if len(offsets) == 2 else (offsets[0], 0)
    step = max(1, CHUNK_BYTES // max(1, part.shape[1] * 4))
    for start in range(0, len(part), step):
        rows = part[start : start + step]
        weights[first + start : first + start + len(rows), left : left + rows.shape[1]] = rows


def _write_managed(stored: StoredTensors, feature: Feature, folder: Path) -> None:
    parts = zip(*(stored.parts(stored_name(stored, feature.name, name)) for name in OF_VALUES[:2]), strict=True)
    values, rows = (np.concatenate(each) for each in zip(*((values.values, rows.values) for values, rows in parts), strict=True))
    taken = values != FREE
    order = np.argsort(values[taken], kind="stable")
    np.save(folder / f"{feature.name}.values.npy", values[taken][order])
    np.save(folder / f"{feature.name}.rows.npy", rows[taken][order])


def _head_of(run: Run, stored: StoredTensors) -> dict[str, Tensor]:
    """The parameters of the head, averaged over steps where the config asks for that."""
    names = [name for name in stored.shapes if name.startswith(HEAD)]
    averaged = run.config.training.ema_decay is not None
    source = "optimizer.state.dense.{}.ema" if averaged else "model.{}"
    return {name.removeprefix(HEAD): stored.whole(source.format(name.removeprefix("model."))) for name in names}


def trained_head(run: Run, folder: Path, propensity: bool = False) -> nn.Module:
    """The head that `write_model` wrote, without the towers that no prediction is of."""
    training = run.config.training
    head = build_model(run.schema, run.config.model, run.config.objective, run.rates, training.seed, training.in_bfloat16).head
    head.load_state_dict(torch.load(folder / DENSE, weights_only=True)["head"])
    for task in ("imputation", "counterfactual", *(() if propensity else ("propensity",))):
        setattr(head, task, None)
    return head.eval().requires_grad_(False)


def managed_rows(schema: Schema, folder: Path) -> dict[str, list[Any]]:
    """Of each managed table that `write_model` wrote: the values that have a row, in order, and their rows."""
    return {
        feature.name: [np.load(folder / f"{feature.name}.{what}.npy", mmap_mode="r") for what in ("values", "rows")]
        for feature in schema.tables
        if feature.is_managed
    }


def mapped_tables(run: Run, folder: Path) -> Tensor:
    """All tables that `write_model` wrote as one, [rows, D], one after the other."""
    rows, dim = sum(feature.num_embeddings for feature in run.schema.tables), run.config.model.embedding_dim
    return torch.from_file(str(folder / TABLES), shared=False, size=rows * dim).view(rows, dim)


class MappedTables:
    """The tables of `tables.bin`."""

    def __init__(self, run: Run, path: Path, new: bool = False) -> None:
        """Make a `new` file, of zeros, or map one that is there, to be read alone."""
        self._dim = run.config.model.embedding_dim
        self._tables = {feature.name: feature for feature in run.schema.tables}
        sizes = [each.num_embeddings * self._dim * 4 for each in run.schema.tables]
        self._places = dict(zip(self._tables, accumulate([0, *sizes]), strict=False))
        if new:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, sum(sizes)))  # a page without a place on the disk would end the process
        self._path = path
        # Private pages are the machine's until they are written, which nothing does.
        self._weights = torch.from_file(str(path), shared=False, size=sum(sizes), dtype=torch.uint8)
        self.kernel = cache(self._kernel)

    def rows(self, feature: Feature) -> Any:
        """The rows of a table, to be written."""
        return np.memmap(self._path, np.float32, "r+", self._places[feature.name], (feature.num_embeddings, self._dim))

    def _kernel(self, features: tuple[str, ...]) -> IntNBitTableBatchedEmbeddingBagsCodegen:
        """Looks up and adds the rows of these features."""
        kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(name, self._tables[name].num_embeddings, self._dim, SparseType.FP32, EmbeddingLocation.HOST) for name in features],
            device="cpu",
            output_dtype=SparseType.FP32,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,  # ids are checked where they are read
        )
        kernel.weights_physical_offsets = [self._places[name] for name in features]
        kernel.initialize_logical_weights_placements_and_offsets()
        kernel.weights_host, kernel.weight_initialized = self._weights, True
        return kernel

"""A trained model for any number of processes: its tables are one file that all of them map, its dense part is a copy each.

    tables.bin          the rows of all tables, float32, as FBGEMM's inference kernels lay them out
    TABLE.values.npy    of a managed table: the values that have a row, in order; and their rows
    TABLE.rows.npy
    dense.pt            the parameters of the head
    lookups/            of all vocabularies (`preprocess.raw.write_lookups`)

Pages of a mapped file that nobody writes are the machine's once, whoever maps it: so tables take their memory once, and a process that
has more tables than memory still runs, from its disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from escm2rec.disk import telling_of_disk
from escm2rec.folder import TAKEN_UP
from escm2rec.models.predictions import Predictions
from escm2rec.objectives.objective import Stage
from escm2rec.preprocess.raw import write_lookups
from escm2rec.reader.batch import Batch, tables_by_batch
from escm2rec.reader.columns import Columns, Slice, assemble
from escm2rec.schema import Feature, Schema
from escm2rec.scoring.repeats import Repeats, SharedInputs, Split
from escm2rec.sharding.managed import FREE
from escm2rec.training.build import build_model, build_objective
from escm2rec.training.managed_rows import OF_VALUES, stored_name
from escm2rec.training.run import Run
from escm2rec.training.stored import StoredTensors

TABLES, DENSE, LOOKUPS = "tables.bin", "dense.pt", "lookups"
HEAD = "model.model.head."  # what the names of the head's parameters begin with in a checkpoint
CHUNK_BYTES = 64 << 20
ALIGNMENT = 128  # of a table in the file, in bytes: no cache line has rows of two


def write_model(run: Run, folder: Path) -> None:
    """Write the model of a run into an empty folder; memory does not grow with its tables. DataError where its checkpoint cannot be read,
    RunError where the disk is full."""
    with telling_of_disk(folder, TAKEN_UP):
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
        write_lookups(run.schema, run.path / "vocabulary", folder / LOOKUPS)


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


class MappedTables:
    """The tables of `tables.bin`."""

    def __init__(self, run: Run, path: Path, new: bool = False) -> None:
        """Make a `new` file, of zeros, or map one that is there, to be read alone."""
        self._dim = run.config.model.embedding_dim
        self._tables = {feature.name: feature for feature in run.schema.tables}
        sizes = [-(-each.num_embeddings * self._dim * 4 // ALIGNMENT) * ALIGNMENT for each in run.schema.tables]
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


class SharedModel:
    """A model that `write_model` wrote, on cores. A call needs no other process."""

    def __init__(self, run: Run, folder: Path, propensity: bool = False) -> None:
        """With `propensity` it predicts that of a tower of its own too, where there is one."""
        self._tables, self._dim = MappedTables(run, folder / TABLES), run.config.model.embedding_dim
        training = run.config.training
        head = build_model(run.schema, run.config.model, run.config.objective, run.rates, training.seed, training.in_bfloat16).head
        dense = torch.load(folder / DENSE, weights_only=True)
        head.load_state_dict(dense["head"])
        self._calibration: Tensor | None = dense["calibration"]
        # A cross-fitted q is of the training rows alone: other rows are weighed by the CTR tower's.
        self._objective = replace(build_objective(run.config.objective, run.rates.ctr), given=False)
        for task in ("imputation", "counterfactual", *(() if propensity else ("propensity",))):  # towers that no prediction is of
            setattr(head, task, None)
        self._head = head.eval().requires_grad_(False)
        self._managed = {
            feature.name: [np.load(folder / f"{feature.name}.{what}.npy", mmap_mode="r") for what in ("values", "rows")]
            for feature in run.schema.tables
            if feature.is_managed
        }
        self._schema = run.schema
        self._splits: dict[tuple[str, ...], Split] = {}
        self._last_row = {feature.name: feature.num_embeddings - 1 for feature in run.schema.tables}

    @torch.inference_mode()
    def __call__(self, columns: Columns, start: int, stop: int) -> Predictions:
        """Logits of rows [start, stop) of a block."""
        batch = assemble([Slice(columns, start, stop)], self._schema)
        predictions: Predictions = self._head(self.inputs(batch, self._schema))
        return predictions

    @torch.inference_mode()
    def of_repeats(self, repeats: Repeats, start: int, stop: int) -> Predictions:
        """The same, of a block whose rows repeat: but for rounding, the same logits."""
        once, each, of_row = repeats.slices(start, stop)
        names = tuple(feature.name for feature in repeats.once_schema.features)
        split = self._splits.setdefault(names, Split(self._schema, repeats.once_schema, self._dim))
        schemas = ((once, repeats.once_schema), (each, repeats.each_schema))
        of_groups, of_rows = (self.inputs(assemble([part], schema), schema) for part, schema in schemas)
        predictions: Predictions = self._head(SharedInputs(of_groups, of_rows, of_row, split))
        return predictions

    def propensity(self, predictions: Predictions) -> Tensor:
        """q, [B], as the run's last steps weighed by it: of its own tower, calibrated and floored as the run's config says."""
        return self._objective.propensity(predictions, Stage("cvr", calibration=self._calibration))

    def inputs(self, batch: Batch, schema: Schema) -> Tensor:
        """What the head reads: [B, K], pooled embeddings and then numeric features, in the order of the schema.

        The schema may be a part of the model's; what is `models.embeddings` in training, in one look-up for all tables of a kind.
        """
        kinds = tables_by_batch(schema.tables)
        batches = (batch.features, batch.weighted_features, self._with_rows(batch.managed_features))
        pooled: dict[str, tuple[Tensor, int]] = {}
        for features, ids in zip(kinds, batches, strict=True):
            if ids is not None:
                found = self._pooled(features, ids)
                pooled |= {feature.name: (found, place) for place, feature in enumerate(features)}
        pieces: list[tuple[Tensor, int, int]] = []  # neighbours in both orders are one
        for feature in schema.tables:
            found, place = pooled[feature.name]
            first = pieces.pop()[1] if pieces and pieces[-1][0] is found and pieces[-1][2] == place else place
            pieces.append((found, first, place + 1))
        parts = [found[:, first * self._dim : end * self._dim] for found, first, end in pieces]
        parts += [batch.numeric] if schema.numeric or not parts else []
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _pooled(self, features: Sequence[Feature], ids: KeyedJaggedTensor) -> Tensor:
        kernel = self._tables.kernel(tuple(feature.name for feature in features))
        found: Tensor = kernel(ids.values(), ids.offsets(), ids.weights_or_none())
        for place, feature in enumerate(features):
            if feature.is_list and feature.pooling == "mean":
                lengths = ids.lengths().view(len(features), -1, 1)[place].clamp(min=1)
                found[:, place * self._dim : (place + 1) * self._dim].div_(lengths)
        return found

    def _with_rows(self, ids: KeyedJaggedTensor | None) -> KeyedJaggedTensor | None:
        """Rows for the hashes of managed tables; the last of a table, which is 0, for those that have none."""
        if ids is None:
            return None
        hashes, ends = ids.values().numpy(), ids.offset_per_key()
        rows = np.empty_like(hashes)
        for place, name in enumerate(ids.keys()):
            values, of_values = self._managed[name]
            sought, part = hashes[ends[place] : ends[place + 1]], slice(ends[place], ends[place + 1])
            if not len(values):
                rows[part] = self._last_row[name]
                continue
            places = np.minimum(np.searchsorted(values, sought), len(values) - 1)
            rows[part] = np.where(values[places] == sought, of_values[places], self._last_row[name])
        return KeyedJaggedTensor(ids.keys(), torch.from_numpy(rows), lengths=ids.lengths(), offsets=ids.offsets(), stride=ids.stride())

"""A trained model for any number of processes: all of them map its tables, and have a copy of its dense part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.objective import Stage
from escm2rec.reader.batch import Batch, tables_by_batch
from escm2rec.reader.columns import Columns, Slice, assemble
from escm2rec.schema import Feature, Schema
from escm2rec.scoring.repeats import Repeats, SharedInputs, Split
from escm2rec.serving.mapped import DENSE, TABLES, MappedTables, managed_rows, trained_head
from escm2rec.training.build import build_objective
from escm2rec.training.run import Run


class SharedModel:
    """A model that `write_model` wrote, on cores. A call needs no other process."""

    def __init__(self, run: Run, folder: Path, propensity: bool = False) -> None:
        """With `propensity` it predicts that of a tower of its own too, where there is one."""
        self._tables, self._dim = MappedTables(run, folder / TABLES), run.config.model.embedding_dim
        self._calibration: Tensor | None = torch.load(folder / DENSE, weights_only=True)["calibration"]
        # A cross-fitted q is of the training rows alone: other rows are weighed by the CTR tower's.
        self._objective = replace(build_objective(run.config.objective, run.rates.ctr), given=False)
        self._head = trained_head(run, folder, propensity)
        self._managed = managed_rows(run.schema, folder)
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

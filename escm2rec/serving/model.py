"""What is exported: ids and numbers of a batch in, probabilities out. It knows neither files nor TorchRec."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from escm2rec.reader.columns import Columns
from escm2rec.schema import MANAGED_IDS, Feature, Schema
from escm2rec.serving.weights import Weights, look_up

OUTPUTS = ("p_ctr", "p_cvr", "p_ctcvr", "ctr_logit", "cvr_logit")
Inputs = tuple[Tensor, ...]
BAD_LENGTHS = "lengths: one is below 0, or they do not add up to the number of values (and of weights)"
BAD_VALUES = "values: one is below 0, or is no id of its feature (manifest.json says how many it has)"


class ServedModel(nn.Module):
    """A trained model of F tables and M numeric features, for batches of any number B >= 0 of impressions.

    What may be wrong in ids is looked at, with RuntimeError: a bad id would read a row of another table.
    """

    tables: Tensor
    first_row: Tensor
    num_ids: Tensor
    is_mean: Tensor

    def __init__(self, schema: Schema, tables: Tensor, weights: Weights, dim: int, head: nn.Module, managed: dict[str, Any]) -> None:
        """`tables`: those of the schema, one after the other, as `weights.pack` made them. `managed`: of each managed table its values that
        have a row, in order, and their rows."""
        super().__init__()
        self._weights, self._dim, self._num_features = weights, dim, len(schema.tables)
        self.register_buffer("tables", tables)
        self.register_buffer("first_row", torch.tensor([0, *accumulate(each.num_embeddings for each in schema.tables)])[:-1])
        self.register_buffer("num_ids", torch.tensor([each.num_ids for each in schema.tables], dtype=torch.int64))
        means = [each.is_list and each.pooling == "mean" for each in schema.tables]
        self._has_means = any(means)
        self.register_buffer("is_mean", torch.tensor(means).view(-1, 1))
        self._managed = [(place, each.num_embeddings - 1) for place, each in enumerate(schema.tables) if each.is_managed]
        for place, last in self._managed:
            values, rows = managed[schema.tables[place].name]
            # One more, which no value is: a look for any finds a place.
            self.register_buffer(f"values_{place}", torch.from_numpy(np.append(values, MANAGED_IDS)))
            self.register_buffer(f"rows_{place}", torch.from_numpy(np.append(rows, last)))
        self.head = head

    def forward(self, values: Tensor, lengths: Tensor, numeric: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
        """
        values   int64 [N]: ids of the first feature for all impressions, then those of the second, and so on
        lengths  int64 [F, B]: how many ids of each feature each impression has
        numeric  float32 [B, M]
        weights  float32 [N], where the model has weighted lists: of their ids; 1 of others

        -> p_ctr, p_cvr, p_ctcvr, ctr_logit, cvr_logit: float32 [B] each
        """
        # One impression more, of nothing: compiled code may take neither a batch of none nor of one.
        lengths, numeric = functional.pad(lengths, (0, 1)), functional.pad(numeric, (0, 0, 0, 1))
        predictions = self.head(torch.cat([self._pooled(values, lengths, weights), numeric], dim=1))
        ctr, cvr = predictions.ctr_logit.float()[:-1], predictions.cvr_logit.float()[:-1]
        p_ctr, p_cvr = torch.sigmoid(ctr), torch.sigmoid(cvr)
        return p_ctr, p_cvr, p_ctr * p_cvr, ctr, cvr

    def _pooled(self, values: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        """[F, B] lengths -> [B, F D]."""
        fits = (lengths >= 0).all().logical_and(lengths.sum() == values.shape[0])
        _check(fits if weights is None else fits.logical_and(lengths.sum() == weights.shape[0]), BAD_LENGTHS)
        feature = torch.repeat_interleave(lengths.sum(dim=1), output_size=values.shape[0])
        _check((values >= 0).logical_and(values < self.num_ids.index_select(0, feature)).all(), BAD_VALUES)
        rows = self._rows(values, feature) + self.first_row.index_select(0, feature)
        ends = functional.pad(lengths.flatten().cumsum(0), (1, 0))
        pooled = look_up(self.tables, self._weights, rows, ends, weights).view(self._num_features, lengths.shape[1], self._dim)
        if self._has_means:
            pooled = pooled / torch.where(self.is_mean, lengths.clamp(min=1), 1).unsqueeze(-1)
        return pooled.transpose(0, 1).flatten(1)

    def _rows(self, values: Tensor, feature: Tensor) -> Tensor:
        """Rows within their tables: of a managed one that which its value has, or else the last, which is 0."""
        rows = values
        for place, last in self._managed:
            known = getattr(self, f"values_{place}")
            found = torch.searchsorted(known, values).clamp(max=known.shape[0] - 1)
            of_value = torch.where(known.index_select(0, found) == values, getattr(self, f"rows_{place}").index_select(0, found), last)
            rows = torch.where(feature == place, of_value, rows)
        return rows


def _check(fine: Tensor, message: str) -> None:
    """RuntimeError unless it is; in what is traced too."""
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        _check_traced(fine, message)
    else:
        torch.ops.aten._assert_async.msg(fine, message)


def _check_scripted(fine: Tensor, message: str) -> Tensor:
    if not bool(fine):
        raise RuntimeError(message)
    return fine


_check_traced: Any = torch.jit.script_if_tracing(_check_scripted)  # type: ignore[no-untyped-call]  # a trace alone would drop it


def model_inputs(columns: Columns, start: int, stop: int, schema: Schema) -> Inputs:
    """What a ServedModel of this schema takes of rows [start, stop) of a block."""
    lengths = torch.empty((len(schema.tables), stop - start), dtype=torch.int64)
    values, weights = [], []
    for feature, of_feature in zip(schema.tables, lengths.numpy(), strict=True):
        column, low, high = columns.jagged[feature.name], start, stop
        if column.offsets is None:
            of_feature[:] = 1
        else:
            cuts = column.offsets[start : stop + 1]
            np.subtract(cuts[1:], cuts[:-1], out=of_feature, casting="unsafe")
            low, high = int(cuts[0]), int(cuts[-1])
        values.append(column.values[low:high])
        weights.append(column.weights[low:high] if column.weights is not None else np.ones(high - low, np.float32))
    numeric = torch.empty((stop - start, len(schema.numeric)))
    numeric.numpy()[:] = columns.numeric[start:stop]
    return (_joined(values, torch.int64), lengths, numeric, *([_joined(weights, torch.float32)] if is_weighted(schema) else []))


def example_inputs(schema: Schema) -> Inputs:
    """A batch to trace a model by: several impressions, and another number of ids, so that no size is taken for another or for 0 or 1."""
    lengths = torch.ones((len(schema.tables), 5), dtype=torch.int64)
    lengths[0, 0] = 2
    ids = int(lengths.sum())
    weights = (torch.ones(ids),) if is_weighted(schema) else ()
    return (torch.zeros(ids, dtype=torch.int64), lengths, torch.zeros((5, len(schema.numeric))), *weights)


def _joined(parts: list[Any], dtype: torch.dtype) -> Tensor:
    """As torch lays tensors out, empty ones too: numpy's have strides of 0, which compiled code refuses."""
    out = torch.empty(sum(len(part) for part in parts), dtype=dtype)
    np.concatenate(parts, out=out.numpy())
    return out


def is_weighted(schema: Schema) -> bool:
    """Whether its model takes weights of ids."""
    return any(feature.kind == "weighted_list" for feature in schema.tables)


def describe_inputs(schema: Schema) -> list[dict[str, Any]]:
    """Of each input, in order: name, type, shape, and what it holds."""
    told: list[dict[str, Any]] = [
        {"name": "values", "type": "int64", "shape": ["ids"], "features": [_of_table(feature) for feature in schema.tables]},
        {"name": "lengths", "type": "int64", "shape": [len(schema.tables), "batch"], "features": [each.name for each in schema.tables]},
        {"name": "numeric", "type": "float32", "shape": ["batch", len(schema.numeric)], "features": [each.name for each in schema.numeric]},
    ]
    weighted = [feature.name for feature in schema.tables if feature.kind == "weighted_list"]
    return told + ([{"name": "weights", "type": "float32", "shape": ["ids"], "features": weighted, "of_others": 1}] if weighted else [])


def _of_table(feature: Feature) -> dict[str, Any]:
    return {"name": feature.name, "ids": feature.num_ids, "encoding": feature.encoding, "list": feature.is_list}

"""Whether the propensity is one worth weighting by: the weights 1 / q of a split, and the balance of its features before and after them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from escm2rec.evaluation.balance import BALANCED, WEIGHT_TOLERANCE, held_values, number_differences, value_differences
from escm2rec.objectives.propensity import PropensitySums, propensity_report, propensity_sums
from escm2rec.reader.batch import Batch
from escm2rec.schema import Schema
from escm2rec.sharding.runtime import Runtime

# A vocabulary's first rows are its most frequent values, so what shares a count with them in a folded table is rare.
FOLDED_ROWS = 16_384
NORMAL_QUANTILE = 1.96
"""97.5% quantile of the standard normal distribution: half a 95% interval, in standard errors."""


class PropensityDiagnostics:
    """Adds up batches of labelled impressions, on each rank its own; `reduce` adds the ranks.

    Memory does not grow with the impressions, and little with the tables: of one with more than `FOLDED_ROWS` rows, row modulo
    that is counted. `sums` is [3, K], all covariates side by side (w itself among them), weighted by w, by w o, and by w o / q.
    """

    def __init__(self, schema: Schema, floor: float) -> None:
        self._floor = floor
        self._tables = {feature.name: min(feature.num_embeddings, FOLDED_ROWS) for feature in schema.tables}
        self._numeric = [feature.name for feature in schema.numeric]
        sizes = [1, 1, *[len(self._numeric)] * 3, *(rows + 1 for rows in self._tables.values())]
        self.sums = np.zeros((3, sum(sizes)))
        # Views: what is added to them is added to `sums`.
        views = np.split(self.sums, np.cumsum(sizes)[:-1], axis=1)
        self._totals, self._row_weights, self._numbers, self._squares, self._numbers_held, *held = views
        self._held = dict(zip(self._tables, held, strict=True))
        none = torch.zeros(0)
        self._weights = propensity_sums(none, none, none, floor)

    def add(self, batch: Batch, q: Tensor) -> None:
        """Take the real rows of a batch on the CPU, with their propensities as weights [num_rows]."""
        rows = batch.num_rows
        click, weight = batch.click[:rows], batch.weight[:rows]
        self._weights = self._weights.merge(propensity_sums(q, click, weight, self._floor))
        w, o = weight.double().numpy(), (click > 0).double().numpy()
        weights = np.stack([w, w * o, w * o / q.double().numpy()])
        self._totals += weights.sum(axis=1, keepdims=True)
        self._row_weights += weights @ w[:, None]
        numbers = batch.numeric[:rows].double().numpy()
        self._numbers += weights @ numbers
        self._squares += weights @ numbers**2
        self._numbers_held += weights @ (numbers != 0)
        for keyed in (batch.features, batch.weighted_features):
            for name, column in keyed.to_dict().items() if keyed is not None else ():
                impressions, values = held_values(column.values().numpy(), column.lengths()[:rows].numpy(), self._tables[name])
                held = self._held[name]
                held[0] += np.bincount(values, w[impressions], minlength=held.shape[1])
                clicked = np.flatnonzero(o[impressions])  # few, so the other two sums cost little
                for sums, each in zip(held[1:], weights[1:], strict=True):
                    sums += np.bincount(values[clicked], each[impressions[clicked]], minlength=held.shape[1])

    def reduce(self, runtime: Runtime) -> None:
        """Add the sums of all ranks, on all ranks; called by all alike."""
        sums = torch.from_numpy(self.sums).to(runtime.device)
        added, largest = (each.to(runtime.device) for each in self._weights)
        dist.all_reduce(sums, group=runtime.group)
        dist.all_reduce(added, group=runtime.group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=runtime.group)
        self.sums[:] = sums.cpu().numpy()
        self._weights = PropensitySums(added.cpu(), largest.cpu())

    def report(self) -> dict[str, Any]:
        """`weights`: the floor and a `PropensityReport`, the mean weight with its 95% interval, and whether it is far from 1: the interval
        lies wholly further than `WEIGHT_TOLERANCE` from it. `balance`: every feature's d before and after, worst after weighting first.

        Without a click there is no interval and no balance to tell.
        """
        weights = propensity_report(self._weights)
        interval = self._mean_weight_interval(weights.mean_weight) if weights.num_clicked and weights.mean_weight is not None else None
        off = interval is not None and (interval[1] < 1 - WEIGHT_TOLERANCE or interval[0] > 1 + WEIGHT_TOLERANCE)
        said = {"mean_weight_interval": interval, "mean_weight_off": off, "floor_binds_for_most": weights.floor_binds_for_most}
        found: dict[str, Any] = {"weights": {"floor": self._floor, **weights._asdict(), **said}}
        return found | ({"balance": self._balance()} if weights.num_clicked else {})

    def _mean_weight_interval(self, mean: float) -> list[float]:
        """Of m = sum W / sum w, W = w o / q: m -+ 1.96 sqrt(sum (W - m w)^2) / sum w, impressions independent and q known."""
        squares = float(self._weights.added[4]) - 2 * mean * self._row_weights[2, 0] + mean**2 * self._row_weights[0, 0]
        half = NORMAL_QUANTILE * float(np.sqrt(max(squares, 0.0)) / self._totals[0, 0])
        return [mean - half, mean + half]

    def _balance(self) -> dict[str, Any]:
        totals = self._totals
        numbers = number_differences(self._numbers, self._squares, self._numbers_held, totals)
        differences = {name: numbers[:, index] for index, name in enumerate(self._numeric)}
        differences |= {name: value_differences(held, totals) for name, held in self._held.items()}
        rows = sorted(((name, float(before), float(after)) for name, (before, after) in differences.items()), key=lambda row: -row[2])
        before, after = np.array(list(differences.values())).T
        return {
            "largest_before": float(before.max()),
            "largest_after": float(after.max()),
            "unbalanced_before": int((before >= BALANCED).sum()),
            "unbalanced_after": int((after >= BALANCED).sum()),
            "features": [dict(zip(("feature", "before", "after"), row, strict=True)) for row in rows],
        }

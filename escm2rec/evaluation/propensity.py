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

    Memory does not grow with the impressions, and little with the tables: of one with more than `FOLDED_ROWS` rows, row modulo that is
    counted, and of a managed one, hash modulo that. `sums` is [3, K], all covariates side by side, weighted by w, by w o, and by w o / q;
    its second column holds what the mean weight is expected to be, sum w p_hat / q, and the variance of its sum,
    sum w^2 p_hat (1 - p_hat) / q^2.
    """

    def __init__(self, schema: Schema, floor: float) -> None:
        self._floor = floor
        self._tables = {feature.name: min(feature.num_embeddings, FOLDED_ROWS) for feature in schema.tables}
        self._numeric = [feature.name for feature in schema.numeric]
        sizes = [1, 1, *[len(self._numeric)] * 3, *(rows + 1 for rows in self._tables.values())]
        self.sums = np.zeros((3, sum(sizes)))
        # Views: what is added to them is added to `sums`.
        views = np.split(self.sums, np.cumsum(sizes)[:-1], axis=1)
        self._totals, self._expected, self._numbers, self._squares, self._numbers_held, *held = views
        self._held = dict(zip(self._tables, held, strict=True))
        none = torch.zeros(0)
        self._weights = propensity_sums(none, none, none, floor)

    def add(self, batch: Batch, q: Tensor, p_hat: Tensor) -> None:
        """Take the real rows of a batch on the CPU, with their propensities as weights [num_rows], and those before the floor."""
        rows = batch.num_rows
        click, weight = batch.click[:rows], batch.weight[:rows]
        self._weights = self._weights.merge(propensity_sums(q, click, weight, self._floor))
        w, o = weight.double().numpy(), (click > 0).double().numpy()
        inverse, p = w / q.double().numpy(), p_hat.double().numpy()
        weights = np.stack([w, w * o, o * inverse])
        self._totals += weights.sum(axis=1, keepdims=True)
        self._expected[:2, 0] += [inverse @ p, inverse**2 @ (p * (1 - p))]
        numbers = batch.numeric[:rows].double().numpy()
        self._numbers += weights @ numbers
        self._squares += weights @ numbers**2
        self._numbers_held += weights @ (numbers != 0)
        for keyed in (batch.features, batch.weighted_features, batch.managed_features):
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
        """`weights`: the floor and a `PropensityReport`; what the mean weight is expected to be if clicks are as likely as p_hat says, 1
        where the floor never binds, with the 95% interval of chance around it; and whether it is off: outside of that, and further than
        `WEIGHT_TOLERANCE` of it away. `balance`: every feature's d before and after, worst after weighting first.

        Without a row nothing is expected, without a click there is no balance to tell.
        """
        weights = propensity_report(self._weights)
        expected, half = self._expected_mean_weight() if weights.mean_weight is not None else (None, 0.0)
        said: dict[str, Any] = {"mean_weight_expected": expected, "mean_weight_interval": None, "mean_weight_off": False}
        if expected is not None and weights.mean_weight is not None:
            distance = abs(weights.mean_weight - expected)
            said["mean_weight_interval"] = [expected - half, expected + half]
            said["mean_weight_off"] = distance > max(half, WEIGHT_TOLERANCE * expected)
        said["floor_binds_for_most"] = weights.floor_binds_for_most
        found: dict[str, Any] = {"weights": {"floor": self._floor, **weights._asdict(), **said}}
        return found | ({"balance": self._balance()} if weights.num_clicked else {})

    def _expected_mean_weight(self) -> tuple[float, float]:
        """Mean and half a 95% interval of sum w (o / q) / sum w over clicks drawn with p_hat, impressions independent.

        From all impressions, not from the clicks that came: the few that weigh most are missing from just the logs whose mean is low.
        """
        total, mean, variance = float(self._totals[0, 0]), float(self._expected[0, 0]), float(self._expected[1, 0])
        return mean / total, NORMAL_QUANTILE * variance**0.5 / total

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

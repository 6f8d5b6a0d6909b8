"""A batch of impressions on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from escm2rec.schema import Feature


def tables_by_batch(tables: Sequence[Feature]) -> tuple[list[Feature], list[Feature], list[Feature]]:
    """The table features of a schema whose ids are a batch's `features`, `weighted_features` and `managed_features`."""
    weighted = [feature for feature in tables if feature.kind == "weighted_list"]
    managed = [feature for feature in tables if feature.is_managed]
    return [feature for feature in tables if feature not in weighted and feature not in managed], weighted, managed


@dataclass
class Batch(Pipelineable):
    """B impressions.

    `features` and `weighted_features` hold rows of tables, keyed by feature name, one bag an impression (None when the schema has no such
    feature), and `managed_features` hashes that training gives rows to; `numeric` is float32 [B, number of numeric features]; labels and
    weights are float32 [B]. The first `num_rows` impressions are real, the rest is padding of weight 0. `propensity_logit` is there when a
    reader was given some (`training/cross_fit.py`).
    """

    features: KeyedJaggedTensor | None
    weighted_features: KeyedJaggedTensor | None
    numeric: Tensor
    click: Tensor
    conversion: Tensor
    weight: Tensor
    num_rows: int
    propensity_logit: Tensor | None = None
    managed_features: KeyedJaggedTensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(
            None if self.features is None else self.features.to(device, non_blocking=non_blocking),
            None if self.weighted_features is None else self.weighted_features.to(device, non_blocking=non_blocking),
            self.numeric.to(device, non_blocking=non_blocking),
            self.click.to(device, non_blocking=non_blocking),
            self.conversion.to(device, non_blocking=non_blocking),
            self.weight.to(device, non_blocking=non_blocking),
            self.num_rows,
            None if self.propensity_logit is None else self.propensity_logit.to(device, non_blocking=non_blocking),
            None if self.managed_features is None else self.managed_features.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` still uses this batch (GPU)."""
        ids = (self.features, self.weighted_features, self.managed_features)
        for part in (*ids, self.numeric, self.click, self.conversion, self.weight, self.propensity_logit):
            if part is not None:
                part.record_stream(stream)

    def __len__(self) -> int:
        return self.click.shape[0]

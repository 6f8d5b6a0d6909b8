"""The one place where losses per impression become a number, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class LossTerm(NamedTuple):
    """One term of the objective: a function of sums over all impressions of all ranks.

    columns  [B, K], what is summed, each weighted by the impression weight w; the last is the normalizer and has no gradient
    value    the term, a scalar, of the K global sums
    scale    lambda, without gradient
    """

    columns: Tensor
    value: Callable[[Tensor], Tensor]
    scale: float | Tensor = 1.0

    @property
    def losses(self) -> Tensor:
        """The first column, [B]: of a mean, each impression's part."""
        return self.columns[:, 0]

    @property
    def normalizer(self) -> Tensor:
        """The last column, [B]: w for N, w o for N_c."""
        return self.columns[:, -1]


def mean_of(losses: Tensor, normalizer: Tensor) -> LossTerm:
    """sum(losses) / sum(normalizer), of [B] each."""
    return LossTerm(torch.stack([losses, normalizer], dim=1), lambda sums: divide(sums[0], sums[1]))


def squared_mean_of(values: Tensor, normalizer: Tensor) -> LossTerm:
    """|| sum(values) / sum(normalizer) ||^2, of values [B, K] and normalizer [B]."""
    return LossTerm(torch.cat([values, normalizer.unsqueeze(1)], dim=1), lambda sums: (divide(sums[:-1], sums[-1]) ** 2).sum())


def local_sums(terms: Mapping[str, LossTerm]) -> Tensor:
    """This rank's sums of all columns of all terms, in the order of `terms`, [sum of K]: to be added over ranks, then to `reduce_terms`."""
    return torch.cat([term.columns.detach().sum(dim=0) for term in terms.values()])


def reduce_terms(terms: Mapping[str, LossTerm], sums: Tensor, world_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to call backward on, and each term's global, unscaled value (detached).

    loss = sum_k scale_k f_k(S_k), with f_k the term and S_k the sums over all ranks. By the chain rule a rank's part of the
    gradient is scale_k (df_k / dS_k) . dS_k(rank), where df_k / dS_k is a number that all ranks share. The optimizers average
    gradients over ranks, so each rank's is taken times world_size: of a mean it is world_size sum(losses) / denominator, of a
    squared mean world_size 2 S S(rank). The loss that is returned has the global value on every rank.

    `sums` are `local_sums` added over all ranks. Where a denominator is 0 (no click anywhere) the term is exactly 0, with finite
    gradients.
    """
    sizes = [term.columns.shape[1] for term in terms.values()]
    with torch.enable_grad():
        leaf = sums.detach().requires_grad_()
        values = {name: term.value(part) for (name, term), part in zip(terms.items(), torch.split(leaf, sizes), strict=True)}
        (slopes,) = torch.autograd.grad(torch.stack(list(values.values())).sum(), leaf)
    found = {name: value.detach() for name, value in values.items()}
    scaled = torch.cat([term.scale * slope for term, slope in zip(terms.values(), torch.split(slopes, sizes), strict=True)])
    own = world_size * (scaled * torch.cat([term.columns.sum(dim=0) for term in terms.values()])).sum()
    loss = own - own.detach()
    for name, term in terms.items():
        loss = loss + term.scale * found[name]
    return loss, found


def divide(total: Tensor, denominator: Tensor) -> Tensor:
    """total / denominator, and exactly 0 with finite gradients where the denominator is 0."""
    none = denominator <= 0
    # What is masked is differentiated too, so it must not divide by 0.
    return (total / denominator.masked_fill(none, 1)).masked_fill(none, 0)

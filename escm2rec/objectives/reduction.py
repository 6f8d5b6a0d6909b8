"""The one place where losses per impression become a number, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class LossTerm(NamedTuple):
    """One term of the objective.

    losses      [B], masked and weighted by the impression weight w
    normalizer  [B], without gradient; its sum over all ranks is the denominator (w for N, w o for N_c)
    scale       lambda
    """

    losses: Tensor
    normalizer: Tensor
    scale: float


def local_denominators(terms: Mapping[str, LossTerm]) -> Tensor:
    """This rank's sum of each normalizer, [len(terms)] in the order of `terms`: to be added over ranks, then to `reduce_terms`."""
    return torch.stack([term.normalizer.sum() for term in terms.values()])


def reduce_terms(terms: Mapping[str, LossTerm], denominators: Tensor, world_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to call backward on, and each term's share of the global, unscaled loss.

    loss = sum_k scale_k world_size sum(losses_k) / denominators_k, a scalar with gradient: DDP and TorchRec average
    gradients over ranks, so world_size makes the average the gradient of the global loss. The shares sum(losses_k) /
    denominators_k are detached scalars whose sum over ranks is the global loss. `denominators` are those of all ranks
    together, in the order of `terms`; where one is 0 (no click anywhere) its term is exactly 0, with finite gradients.
    """
    shares = {
        name: _divide(term.losses.sum(), denominator)
        for (name, term), denominator in zip(terms.items(), denominators.unbind(), strict=True)
    }
    scaled = [terms[name].scale * world_size * share for name, share in shares.items()]
    return torch.stack(scaled).sum(), {name: share.detach() for name, share in shares.items()}


def _divide(total: Tensor, denominator: Tensor) -> Tensor:
    denominator = denominator.to(total.dtype)
    some = denominator > 0
    # The unused branch of a `where` is differentiated too, so it must not divide by 0.
    return torch.where(some, total / torch.where(some, denominator, 1), 0)

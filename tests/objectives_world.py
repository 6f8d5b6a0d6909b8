"""What the tests of objectives share: objectives with named settings, and small batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.imputation import Imputation
from escm2rec.objectives.objective import Kind, Objective, Phase
from escm2rec.objectives.reduction import local_denominators, reduce_terms

KINDS: tuple[Kind, ...] = ("esmm", "naive", "naive+ctcvr", "escm2-ips", "escm2-dr")
torch.set_num_threads(1)


def make_objective(kind: Kind, **settings: Any) -> Objective:
    """An objective with plain settings, each of which, those of the imputation included, can be given by name."""
    imputation: dict[str, Any] = {
        "predicts": "error",
        "weighting": "dr-jl",
        "mse_mixture": 0.5,
        "loss": "squared",
        "normalise": False,
        "clip_pseudo_labels": False,
        "alternate": True,
        "cvr_steps": 1,
    }
    own: dict[str, Any] = {
        "lambda_c": 0.5,
        "lambda_g": 1.0,
        "lambda_imp": 1.0,
        "detach_ctr": kind != "esmm",
        "floor": 0.0,
        "base_ctr": 0.1,
    }
    for name, value in settings.items():
        (imputation if name in imputation else own)[name] = value
    return Objective(kind=kind, imputation=Imputation(**imputation), **own)


class Batch(NamedTuple):
    """Predictions that require gradients, and labels."""

    predictions: Predictions
    click: Tensor
    conversion: Tensor
    weight: Tensor

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """CTR, CVR and imputation logit."""
        imputation_logit = self.predictions.imputation_logit
        assert imputation_logit is not None
        return self.predictions.ctr_logit, self.predictions.cvr_logit, imputation_logit

    def rows(self, index: Tensor) -> Batch:
        """Some rows, in a given order, as leaves of their own."""
        a, z, h = (logit.detach()[index].requires_grad_() for logit in self.logits())
        return Batch(Predictions(a, z, h), self.click[index], self.conversion[index], self.weight[index])

    def with_labels(self, click: Tensor | None = None, conversion: Tensor | None = None, weight: Tensor | None = None) -> Batch:
        """The same predictions, as new leaves, under other labels."""
        fresh = self.rows(torch.arange(len(self.click)))
        return fresh._replace(
            click=fresh.click if click is None else click,
            conversion=fresh.conversion if conversion is None else conversion,
            weight=fresh.weight if weight is None else weight,
        )


def make_batch(rows: int = 12, seed: int = 0) -> Batch:
    """A random float64 batch in which rows 0 and 1 are a click with and one without a conversion, row 2 is unclicked."""
    generator = torch.Generator().manual_seed(seed)
    a, z, h = (2 * torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(3))
    click = (torch.rand(rows, generator=generator) < 0.5).double()
    conversion = click * (torch.rand(rows, generator=generator) < 0.5).double()
    click[:3] = torch.tensor([1.0, 1.0, 0.0])[:rows]
    conversion[:3] = torch.tensor([1.0, 0.0, 0.0])[:rows]
    weight = 0.5 + torch.rand(rows, generator=generator, dtype=torch.float64)
    return Batch(Predictions(a.requires_grad_(), z.requires_grad_(), h.requires_grad_()), click, conversion, weight)


class Step(NamedTuple):
    """What one step computes: the loss, each term's share, and the gradients of the three logits."""

    loss: Tensor
    shares: dict[str, Tensor]
    ctr_grad: Tensor | None
    cvr_grad: Tensor | None
    imputation_grad: Tensor | None


def take_step(objective: Objective, batch: Batch, phase: Phase = "cvr", warm_up: bool = False, only: str | None = None) -> Step:
    """The whole objective, or one term of it unscaled, on one rank, and its gradients (None where the loss does not reach)."""
    terms = objective.terms(batch.predictions, batch.click, batch.conversion, batch.weight, phase, warm_up)
    if only is not None:
        terms = {only: terms[only]._replace(scale=1.0)}
    loss, shares = reduce_terms(terms, local_denominators(terms), world_size=1)
    grads = torch.autograd.grad(loss, batch.logits(), allow_unused=True)
    return Step(loss.detach(), shares, *grads)


def close(seen: Tensor | None, expected: Tensor, tolerance: float = 1e-12) -> bool:
    """Whether two tensors agree to an absolute and relative tolerance."""
    assert seen is not None
    return torch.allclose(seen, expected, rtol=tolerance, atol=tolerance)

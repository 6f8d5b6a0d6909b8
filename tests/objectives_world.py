"""What the tests of objectives share: objectives with named settings, and small batches."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from escm2rec.config import ObjectiveKind
from escm2rec.models.predictions import Predictions
from escm2rec.objectives.estimator import Settings, estimator_of
from escm2rec.objectives.imputation import Imputation
from escm2rec.objectives.objective import Objective, Phase, Stage
from escm2rec.objectives.reduction import local_sums, reduce_terms
from escm2rec.objectives.weights import Constant

KINDS: tuple[str, ...] = get_args(ObjectiveKind)
WITH_CVR = tuple(kind for kind in KINDS if estimator_of(kind).cvr is not None)
IMPUTING = tuple(kind for kind in KINDS if "imputation" in estimator_of(kind).towers)
IMPUTING_ERRORS = tuple(kind for kind in IMPUTING if not estimator_of(kind).labels_only)
WEIGHING_CLICKS = ("multi-ipw", "multi-dr", "escm2-ips", "escm2-snips", "escm2-dr", "stable-dr", "dcmt", "two-space")
torch.set_num_threads(1)


def make_objective(kind: str, **settings: Any) -> Objective:
    """An objective with plain settings, each of which, those of the imputation included, can be given by name."""
    imputation: dict[str, Any] = {
        "predicts": "label" if estimator_of(kind).labels_only else "error",
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
        "lambda_balance": 0.0,
        "detach_ctr": kind != "esmm",
        "floor": 0.0,
        "base_ctr": 0.1,
    }
    further: dict[str, Any] = {"beta": 1.0, "consistency": 1e-3, "stability": 1.0}
    for name, value in settings.items():
        next(group for group in (imputation, further, own) if name in group)[name] = value
    for name in ("lambda_c", "lambda_g"):
        own[name] = own[name] if not isinstance(own[name], float) else Constant(own[name])
    return Objective(kind=kind, settings=Settings(imputation=Imputation(**imputation), **further), **own)


def whole_phase(kind: str) -> Phase:
    """The phase that holds every term of an objective."""
    return "joint" if "imputation" in estimator_of(kind).towers else "cvr"


class Batch(NamedTuple):
    """Predictions that require gradients, and labels."""

    predictions: Predictions
    click: Tensor
    conversion: Tensor
    weight: Tensor

    def logits(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """CTR, CVR, imputation, counterfactual and propensity logit."""
        logits = tuple(logit for logit in self.predictions[:5] if logit is not None)
        assert len(logits) == 5
        return logits

    def rows(self, index: Tensor) -> Batch:
        """Some rows, in a given order, as leaves of their own."""
        leaves = [logit.detach()[index].requires_grad_() for logit in self.logits()]
        assert self.predictions.inputs is not None
        predictions = Predictions(*leaves)._replace(inputs=self.predictions.inputs[index])
        return Batch(predictions, self.click[index], self.conversion[index], self.weight[index])

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
    logits = [2 * torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(5)]
    inputs = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    click = (torch.rand(rows, generator=generator) < 0.5).double()
    conversion = click * (torch.rand(rows, generator=generator) < 0.5).double()
    click[:3] = torch.tensor([1.0, 1.0, 0.0])[:rows]
    conversion[:3] = torch.tensor([1.0, 0.0, 0.0])[:rows]
    weight = 0.5 + torch.rand(rows, generator=generator, dtype=torch.float64)
    return Batch(Predictions(*(logit.requires_grad_() for logit in logits))._replace(inputs=inputs), click, conversion, weight)


class Parts(NamedTuple):
    """A CVR loss written out, as sum(numerators) / sum(denominators), [B] each, with what it is made of."""

    numerators: Tensor
    denominators: Tensor
    delta: Tensor
    q: Tensor


def cvr_parts(kind: str, batch: Batch, predicts: str = "error", own_q: Tensor | None = None) -> Parts:
    """The CVR loss of a kind, floor 0, beta 1 and lambda 1e-3, by the formulas of docs/method.md and nothing of the package.

    `own_q` replaces q; an objective that imputes labels only ignores `predicts`.
    """
    a, z, h, star, own = batch.logits()
    o, r, w = batch.click, batch.conversion, batch.weight
    q = torch.sigmoid(own if kind == "stable-dr" else a).detach() if own_q is None else own_q

    def cross_entropy(label: Tensor) -> Tensor:
        return -label * torch.log(torch.sigmoid(z)) - (1 - label) * torch.log(torch.sigmoid(-z))

    m = torch.sigmoid(h).detach()
    delta = cross_entropy(o * r)
    imputed = cross_entropy(m) if predicts == "label" else torch.log1p(h.exp()).detach()
    ips = o * delta / q
    apart = (1 - torch.sigmoid(z) - torch.sigmoid(star)).abs()
    losses: dict[str, tuple[Tensor, Tensor]] = {
        "naive": (o * delta, o),
        "direct": (cross_entropy(m), torch.ones_like(o)),
        "multi-ipw": (ips, torch.ones_like(o)),
        "multi-dr": (imputed + o * (delta - imputed) / q, torch.ones_like(o)),
        "escm2-snips": (ips, o / q),
        "dcmt": (ips - (1 - o) * torch.log(torch.sigmoid(star)) / (1 - q) + 1e-3 * apart, torch.ones_like(o)),
        "two-space": (ips + (1 - o) / (1 - q) * cross_entropy(m), torch.ones_like(o)),
    }
    same = {"naive+ctcvr": "naive", "escm2-ips": "multi-ipw", "escm2-dr": "multi-dr", "stable-dr": "escm2-snips"}
    numerators, denominators = losses[same.get(kind, kind)]
    return Parts(w * numerators, w * denominators, delta, q)


class Step(NamedTuple):
    """What one step computes: the loss, each term unscaled, and the gradients of the logits."""

    loss: Tensor
    values: dict[str, Tensor]
    ctr_grad: Tensor | None
    cvr_grad: Tensor | None
    imputation_grad: Tensor | None
    counterfactual_grad: Tensor | None
    propensity_grad: Tensor | None


def take_step(objective: Objective, batch: Batch, phase: Phase = "cvr", warm_up: bool = False, only: str | None = None) -> Step:
    """The whole objective, or one term of it unscaled, on one rank, and its gradients (None where the loss does not reach)."""
    terms = objective.terms(batch.predictions, batch.click, batch.conversion, batch.weight, Stage(phase, warm_up))
    if only is not None:
        terms = {only: terms[only]._replace(scale=1.0)}
    loss, values = reduce_terms(terms, local_sums(terms), world_size=1)
    grads = torch.autograd.grad(loss, batch.logits(), allow_unused=True)
    return Step(loss.detach(), values, *grads)


def close(seen: Tensor | None, expected: Tensor, tolerance: float = 1e-12) -> bool:
    """Whether two tensors agree to an absolute and relative tolerance."""
    assert seen is not None
    return torch.allclose(seen, expected, rtol=tolerance, atol=tolerance)

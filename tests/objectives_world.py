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

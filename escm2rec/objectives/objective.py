"""L = L_CTR + lambda_c L_CVR + lambda_g L_CTCVR, with the imputation loss beside it (docs/method.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.bce import bce_losses, full_precision, softplus
from escm2rec.objectives.ctcvr import ctcvr_losses
from escm2rec.objectives.cvr import dr_losses, ips_losses, naive_losses, pseudo_labels
from escm2rec.objectives.imputation import Imputation, imputation_losses, imputation_weights
from escm2rec.objectives.propensity import propensity
from escm2rec.objectives.reduction import LossTerm

Kind = Literal["esmm", "naive", "naive+ctcvr", "escm2-ips", "escm2-dr"]
Phase = Literal["cvr", "imputation", "joint"]


class _Rows(NamedTuple):
    """A batch in full precision, [B] each; `conversion` is 0 where there is no click, whatever was recorded."""

    ctr_logit: Tensor
    cvr_logit: Tensor
    click: Tensor
    conversion: Tensor
    weight: Tensor
    q: Tensor


@dataclass(frozen=True)
class Objective:
    """Turns predictions and labels into loss terms per impression.

    kind        which CVR loss: none (esmm), naive (without L_CTCVR), naive+ctcvr, escm2-ips, escm2-dr
    lambda_*    weights of the CVR, CTCVR and imputation loss; that of L_CTR is 1
    detach_ctr  keep L_CTCVR from training the CTR head, so that p_hat stays a propensity
    floor       least propensity, absolute
    base_ctr    the training set's click rate: q in warm-up
    imputation  settings of the imputation tower; read by escm2-dr only
    """

    kind: Kind
    lambda_c: float
    lambda_g: float
    lambda_imp: float
    detach_ctr: bool
    floor: float
    base_ctr: float
    imputation: Imputation

    @property
    def needs_imputation(self) -> bool:
        """Whether predictions must hold an imputation logit."""
        return self.kind == "escm2-dr"

    def phase(self, step: int) -> Phase:
        """What step 0, 1, ... updates: `cvr_steps` CVR steps to one imputation step, or both in each step.

        A function of the step alone, so a resumed run goes on in the right phase. Always "cvr" without imputation.
        """
        if not self.needs_imputation:
            return "cvr"
        if not self.imputation.alternate:
            return "joint"
        cvr_steps = self.imputation.cvr_steps
        return "imputation" if step % (cvr_steps + 1) == cvr_steps else "cvr"

    def propensity(self, ctr_logit: Tensor, warm_up: bool) -> Tensor:
        """q, [B], without gradient: the base CTR in warm-up, max(p_hat, floor) after it."""
        return propensity(ctr_logit, self.floor, constant=self.base_ctr if warm_up else None)

    def terms(
        self, predictions: Predictions, click: Tensor, conversion: Tensor, weight: Tensor, phase: Phase, warm_up: bool
    ) -> dict[str, LossTerm]:
        """The terms of one step, among "ctr", "cvr", "ctcvr" and "imputation", always in that order.

        click, conversion and weight are [B] of any dtype; conversions of unclicked impressions are never read.
        "cvr" is L with delta_hat (or m) held; "imputation" the imputation loss alone, which only the imputation logit
        feels; "joint" both, with the same stop-gradients.
        """
        rows = self._rows(predictions, click, conversion, weight, warm_up)
        terms: dict[str, LossTerm] = {}
        if phase != "imputation":
            terms["ctr"] = LossTerm(rows.weight * bce_losses(rows.ctr_logit, rows.click), rows.weight, 1.0)
            if self.kind != "esmm":
                terms["cvr"] = self._cvr_term(rows, predictions.imputation_logit)
            if self.kind != "naive":
                terms["ctcvr"] = self._ctcvr_term(rows)
        if self.needs_imputation and phase != "cvr":
            terms["imputation"] = self._imputation_term(rows, _imputation_logit(predictions.imputation_logit))
        if not terms:
            raise ValueError(f"objective {self.kind} has no imputation phase")
        return terms

    def pseudo_labels(self, predictions: Predictions, click: Tensor, conversion: Tensor, warm_up: bool) -> Tensor:
        """The labels [B] that the CVR tower learns under escm2-dr with `label`, before any clipping: for `pseudo_label_counts`."""
        rows = self._rows(predictions, click, conversion, torch.ones_like(predictions.ctr_logit), warm_up)
        m = torch.sigmoid(_imputation_logit(predictions.imputation_logit).detach())
        return pseudo_labels(m, rows.conversion, rows.click, rows.q, clip=False)

    def _rows(self, predictions: Predictions, click: Tensor, conversion: Tensor, weight: Tensor, warm_up: bool) -> _Rows:
        ctr_logit, cvr_logit = full_precision(predictions.ctr_logit), full_precision(predictions.cvr_logit)
        dtype = ctr_logit.dtype
        clicked = click > 0
        # `where`, not a product: an unclicked row's conversion may be NaN.
        r = torch.where(clicked, conversion.to(dtype), 0)
        return _Rows(ctr_logit, cvr_logit, clicked.to(dtype), r, weight.to(dtype), self.propensity(ctr_logit, warm_up))

    def _cvr_term(self, rows: _Rows, imputation_logit: Tensor | None) -> LossTerm:
        delta = bce_losses(rows.cvr_logit, rows.conversion)
        if self.kind == "escm2-ips":
            return LossTerm(rows.weight * ips_losses(delta, rows.click, rows.q), rows.weight, self.lambda_c)
        if self.kind == "escm2-dr":
            losses = self._dr_losses(rows, delta, _imputation_logit(imputation_logit).detach())
            return LossTerm(rows.weight * losses, rows.weight, self.lambda_c)
        return LossTerm(rows.weight * naive_losses(delta, rows.click), rows.weight * rows.click, self.lambda_c)

    def _dr_losses(self, rows: _Rows, delta: Tensor, held: Tensor) -> Tensor:
        if self.imputation.predicts == "error":
            return dr_losses(delta, softplus(held), rows.click, rows.q)
        labels = pseudo_labels(torch.sigmoid(held), rows.conversion, rows.click, rows.q, self.imputation.clip_pseudo_labels)
        return bce_losses(rows.cvr_logit, labels)

    def _ctcvr_term(self, rows: _Rows) -> LossTerm:
        ctr_logit = rows.ctr_logit.detach() if self.detach_ctr else rows.ctr_logit
        losses = ctcvr_losses(ctr_logit, rows.cvr_logit, rows.conversion)
        return LossTerm(rows.weight * losses, rows.weight, self.lambda_g)

    def _imputation_term(self, rows: _Rows, imputation_logit: Tensor) -> LossTerm:
        settings = self.imputation
        v = imputation_weights(rows.q, settings.weighting, settings.mse_mixture)
        losses = imputation_losses(imputation_logit, rows.cvr_logit, rows.conversion, settings.predicts, settings.loss)
        weights = rows.weight * rows.click * v
        return LossTerm(weights * losses, weights if settings.normalise else rows.weight, self.lambda_imp)


def _imputation_logit(logit: Tensor | None) -> Tensor:
    if logit is None:
        raise ValueError("escm2-dr needs predictions with an imputation logit: build the head with imputation=True")
    return full_precision(logit)

"""L = L_CTR + lambda_c L_CVR + lambda_g L_CTCVR, with the losses of further towers beside it (docs/method.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.balance import balance_term
from escm2rec.objectives.bce import bce_losses, full_precision
from escm2rec.objectives.ctcvr import ctcvr_losses
from escm2rec.objectives.estimator import Estimator, FurtherTower, Settings, estimator_of
from escm2rec.objectives.estimators.escm2_dr import pseudo_labels
from escm2rec.objectives.imputation import imputation_losses, imputation_weights
from escm2rec.objectives.propensity import LEAST_PROPENSITY, propensity
from escm2rec.objectives.reduction import LossTerm, mean_of
from escm2rec.objectives.rows import Rows, required
from escm2rec.objectives.weights import TermWeight

Phase = Literal["cvr", "imputation", "propensity", "joint", "calibration"]
TERMS = ("ctr", "cvr", "ctcvr", "imputation", "propensity", "stability", "balance")


class Stage(NamedTuple):
    """Where training stands.

    phase        what the step updates; "calibration" is a step without terms, on rows that train nothing
    warm_up      whether q is still the base CTR
    progress     share of all steps that is done
    calibration  (slope, shift), [2]: q is of slope a + shift; None leaves it as it is
    """

    phase: Phase
    warm_up: bool = False
    progress: float = 0.0
    calibration: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """Turns predictions and labels into loss terms per impression.

    kind            its name, that of a file in `estimators/`
    lambda_*        weights of the CVR, CTCVR and imputation loss; that of L_CTR is 1
    lambda_balance  weight of the balancing term, which with a propensity tower of its own is there when it is above 0
    detach_ctr      keep L_CTCVR from training the CTR head, so that p_hat stays a propensity; None: where q weighs rows
    floor           least propensity, absolute
    base_ctr        the training set's click rate: q in warm-up
    settings        what estimators can be told
    given           q is of a `propensity_logit` that predictions bring from elsewhere: of no tower of this model
    """

    kind: str
    lambda_c: TermWeight
    lambda_g: TermWeight
    lambda_imp: float
    lambda_balance: float
    detach_ctr: bool | None
    floor: float
    base_ctr: float
    settings: Settings
    given: bool = False

    @property
    def estimator(self) -> Estimator:
        """What sets it apart."""
        return estimator_of(self.kind)

    @property
    def towers(self) -> frozenset[FurtherTower]:
        """The towers that predictions must come from, beside CTR and CVR."""
        own: frozenset[FurtherTower] = frozenset({"propensity"}) if self.lambda_balance > 0 else frozenset()
        return self.estimator.towers | own

    @property
    def counts_pseudo_labels(self) -> bool:
        """Whether the CVR tower learns labels that may leave [0, 1]."""
        return self.estimator.pseudo_labels and self.settings.imputation.predicts == "label"

    @property
    def alternates(self) -> bool:
        """Whether some steps hold a part of the model."""
        return "imputation" in self.towers and self.settings.imputation.alternate

    def phase(self, step: int) -> Phase:
        """What step 0, 1, ... updates: `cvr_steps` CVR steps, one of imputation, for stable-dr one of its propensity; or all in each.

        A function of the step alone, so a resumed run goes on in the right phase. Always "cvr" without imputation.
        """
        if "imputation" not in self.towers:
            return "cvr"
        if not self.alternates:
            return "joint"
        held: tuple[Phase, ...] = ("imputation", "propensity") if self.estimator.propensity_terms else ("imputation",)
        cvr_steps = self.settings.imputation.cvr_steps
        place = step % (cvr_steps + len(held))
        return "cvr" if place < cvr_steps else held[place - cvr_steps]

    def propensity(self, predictions: Predictions, stage: Stage) -> Tensor:
        """q, [B], without gradient: see `propensity`."""
        constant = self.base_ctr if stage.warm_up and not self.given else None  # a given q has been learned already
        return propensity(self.propensity_logit(predictions), self.floor, constant, stage.calibration)

    def propensity_logit(self, predictions: Predictions) -> Tensor:
        """What q is made of, [B]: a given logit, that of the propensity tower if there is one, or that of the CTR tower."""
        apart = self.given or "propensity" in self.towers
        return required(predictions.propensity_logit, "propensity") if apart else predictions.ctr_logit

    def terms(self, predictions: Predictions, click: Tensor, conversion: Tensor, weight: Tensor, stage: Stage) -> dict[str, LossTerm]:
        """The terms of one step, those of `TERMS` that it has, in that order.

        click, conversion and weight are [B] of any dtype; conversions of unclicked impressions are never read.
        Phase "cvr" is L with delta_hat (or m) held; "imputation" the imputation loss alone, which only the imputation logit
        feels; "propensity" the same for a propensity tower; "joint" all, with the same stop-gradients. A propensity tower that
        is not part of a cycle learns in "cvr".
        """
        rows = self._rows(predictions, click, conversion, weight, stage)
        everything = stage.phase == "joint"
        terms: dict[str, LossTerm] = {}
        if everything or stage.phase == "cvr":
            terms |= self._main_terms(rows, stage.progress)
        if (everything or stage.phase == "imputation") and "imputation" in self.towers:
            terms["imputation"] = self._imputation_term(rows)
        own_phase: Phase = "propensity" if self.estimator.propensity_terms else "cvr"
        if (everything or stage.phase == own_phase) and "propensity" in self.towers:
            terms |= self._propensity_terms(rows)
        if not terms:
            raise ValueError(f"objective {self.kind} has no {stage.phase} phase")
        return terms

    def pseudo_labels(self, predictions: Predictions, click: Tensor, conversion: Tensor, stage: Stage) -> Tensor:
        """The labels [B] that the CVR tower learns from imputed ones, before any clipping: for `pseudo_label_counts`."""
        rows = self._rows(predictions, click, conversion, torch.ones_like(predictions.ctr_logit), stage)
        m = torch.sigmoid(required(rows.imputation_logit, "imputation").detach())
        return pseudo_labels(m, rows.conversion, rows.click, rows.q, clip=False)

    def _rows(self, predictions: Predictions, click: Tensor, conversion: Tensor, weight: Tensor, stage: Stage) -> Rows:
        ctr_logit, cvr_logit = full_precision(predictions.ctr_logit), full_precision(predictions.cvr_logit)
        dtype = ctr_logit.dtype
        clicked = click > 0
        imputation, counterfactual, own = (
            None if logit is None else full_precision(logit)
            for logit in (predictions.imputation_logit, predictions.counterfactual_logit, predictions.propensity_logit)
        )
        return Rows(
            ctr_logit,
            cvr_logit,
            clicked.to(dtype),
            # A mask, not a product: an unclicked row's conversion may be NaN.
            conversion.to(dtype).masked_fill(~clicked, 0),
            weight.to(dtype),
            self.propensity(predictions, stage),
            max(self.floor, LEAST_PROPENSITY),
            imputation,
            counterfactual,
            own,
            None if predictions.inputs is None else predictions.inputs.detach(),
        )

    def _main_terms(self, rows: Rows, progress: float) -> dict[str, LossTerm]:
        estimator = self.estimator
        terms = {"ctr": mean_of(rows.weight * bce_losses(rows.ctr_logit, rows.click), rows.weight)}
        if estimator.cvr is not None:
            terms["cvr"] = estimator.cvr(rows, self.settings)._replace(scale=self.lambda_c.at(progress))
        if estimator.ctcvr:
            detach = estimator.weighs if self.detach_ctr is None else self.detach_ctr
            losses = ctcvr_losses(rows.ctr_logit.detach() if detach else rows.ctr_logit, rows.cvr_logit, rows.conversion)
            terms["ctcvr"] = mean_of(rows.weight * losses, rows.weight)._replace(scale=self.lambda_g.at(progress))
        return terms

    def _imputation_term(self, rows: Rows) -> LossTerm:
        settings = self.settings.imputation
        v = imputation_weights(rows.q, settings.weighting, settings.mse_mixture)
        h = required(rows.imputation_logit, "imputation")
        losses = imputation_losses(h, rows.cvr_logit, rows.conversion, settings.predicts, settings.loss)
        weights = rows.weight * rows.click * v
        return mean_of(weights * losses, weights if settings.normalise else rows.weight)._replace(scale=self.lambda_imp)

    def _propensity_terms(self, rows: Rows) -> dict[str, LossTerm]:
        losses = bce_losses(required(rows.propensity_logit, "propensity"), rows.click)
        terms = {"propensity": mean_of(rows.weight * losses, rows.weight)}
        if self.estimator.propensity_terms is not None:
            terms |= self.estimator.propensity_terms(rows, self.settings)
        if self.lambda_balance > 0:
            terms["balance"] = balance_term(rows)._replace(scale=self.lambda_balance)
        return terms

"""What a study compares: objectives of the config under a name, and references that no log could train.

DR with imputed errors is not here: those have no gradient in the CVR tower, which then learns exactly as under IPS (`escm2-ips` for
`escm2-dr`, `multi-ipw` for `multi-dr`; a test holds them against each other).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from escm2rec.config import ObjectiveConfig

Reference = Literal["true propensity", "all conversions"]


class Candidate(NamedTuple):
    """One row of the study.

    settings   a section `objective` of the config; lambda_c is 1 where it is not said
    reference  what it is given that a log does not hold: the true propensity as q, or the conversion of every impression
    """

    settings: dict[str, Any]
    reference: Reference | None = None

    @property
    def objective(self) -> ObjectiveConfig:
        """The section, with every default filled in."""
        return ObjectiveConfig.model_validate({"lambda_c": 1.0, **self.settings})


INCUMBENT = "naive"
"""What a cautious chooser keeps unless another errs less beyond a standard error."""

CANDIDATES: dict[str, Candidate] = {
    "esmm": Candidate({"kind": "esmm"}),
    "naive": Candidate({"kind": "naive"}),
    "naive+ctcvr": Candidate({"kind": "naive+ctcvr"}),
    "direct": Candidate({"kind": "direct"}),
    "multi-ipw": Candidate({"kind": "multi-ipw"}),
    "multi-dr": Candidate({"kind": "multi-dr"}),
    "escm2-ips": Candidate({"kind": "escm2-ips"}),
    "escm2-snips": Candidate({"kind": "escm2-snips"}),
    "escm2-dr": Candidate({"kind": "escm2-dr"}),
    "escm2-dr alternating": Candidate({"kind": "escm2-dr", "imputation": {"alternate": True}}),
    "escm2-dr 3:1": Candidate({"kind": "escm2-dr", "imputation": {"alternate": True, "cvr_steps": 3}}),
    "escm2-dr mrdr": Candidate({"kind": "escm2-dr", "imputation": {"weighting": "mrdr", "normalise": True}}),
    "escm2-dr mrdr squared": Candidate({"kind": "escm2-dr", "imputation": {"loss": "squared", "weighting": "mrdr", "normalise": True}}),
    "escm2-dr dr-bias": Candidate({"kind": "escm2-dr", "imputation": {"weighting": "dr-bias", "normalise": True}}),
    "escm2-dr dr-mse": Candidate({"kind": "escm2-dr", "imputation": {"weighting": "dr-mse", "normalise": True}}),
    "escm2-dr clipped": Candidate({"kind": "escm2-dr", "imputation": {"clip_pseudo_labels": True}}),
    "stable-dr": Candidate({"kind": "stable-dr"}),
    "stable-dr error": Candidate({"kind": "stable-dr", "imputation": {"predicts": "error"}}),
    "stable-dr alternating": Candidate({"kind": "stable-dr", "imputation": {"alternate": True}}),
    "dcmt": Candidate({"kind": "dcmt"}),
    "two-space": Candidate({"kind": "two-space"}),
    "escm2-ips balanced": Candidate({"kind": "escm2-ips", "propensity": {"balance": 1.0}}),
    "esmm lambda_g 5": Candidate({"kind": "esmm", "lambda_g": 5.0}),
    "esmm detached": Candidate({"kind": "esmm", "ctcvr_detach_ctr": True}),
    "naive+ctcvr lambda_c 5": Candidate({"kind": "naive+ctcvr", "lambda_c": 5.0}),
    "naive+ctcvr detached": Candidate({"kind": "naive+ctcvr", "ctcvr_detach_ctr": True}),
    "escm2-ips lambda_c 5": Candidate({"kind": "escm2-ips", "lambda_c": 5.0}),
    "escm2-ips floor 0.5": Candidate({"kind": "escm2-ips", "propensity": {"floor": 0.5}}),
    "escm2-ips true q": Candidate({"kind": "escm2-ips", "propensity": {"floor": 0.0}}, "true propensity"),
    "escm2-dr true q": Candidate({"kind": "escm2-dr", "propensity": {"floor": 0.0}}, "true propensity"),
    "oracle": Candidate({"kind": "naive"}, "all conversions"),
}

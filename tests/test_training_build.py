"""From config to objective: defaults that follow from the kind, and parts that do not go together."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from escm2rec.config import ObjectiveConfig, ObjectiveKind
from escm2rec.errors import ConfigError
from escm2rec.objectives.estimator import estimator_of
from escm2rec.objectives.weights import Constant, Learned, Ramp
from escm2rec.training.build import build_objective

KINDS = get_args(ObjectiveKind)


def objective(**settings: Any) -> Any:
    return build_objective(ObjectiveConfig.model_validate(settings), base_ctr=0.04)


def test_every_kind_of_the_config_has_a_file() -> None:
    assert len(KINDS) == 12
    for kind in KINDS:
        built = objective(kind=kind)
        assert built.estimator is estimator_of(kind)
        assert built.towers == estimator_of(kind).towers


def test_labels_are_imputed_where_errors_would_teach_nothing() -> None:
    predicts = {kind: objective(kind=kind).settings.imputation.predicts for kind in KINDS}
    assert {kind for kind, what in predicts.items() if what == "label"} == {"direct", "two-space"}
    assert objective(kind="multi-dr", imputation={"predicts": "label"}).settings.imputation.predicts == "label"


def test_floor_is_relative_to_the_base_rate_unless_absolute() -> None:
    assert objective().floor == pytest.approx(0.004)
    assert objective(propensity={"floor_kind": "absolute"}).floor == pytest.approx(0.1)


def test_weights_of_terms_are_constant_scheduled_or_learned() -> None:
    assert objective(lambda_c=0.3).lambda_c == Constant(0.3)
    ramp = objective(lambda_c={"start": 0.0, "end": 1.0, "until": 0.5}).lambda_c
    assert ramp == Ramp(0.0, 1.0, 0.5)
    assert [ramp.at(progress) for progress in (0.0, 0.25, 0.5, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    assert objective(kind="escm2-ips", lambda_g="learned").lambda_g == Learned()


# Of each: the objective, and what is wrong with it.
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "errors where labels are needed": (
        {"kind": "direct", "imputation": {"predicts": "error"}},
        "objective.imputation.predicts: error teaches the CVR tower of direct nothing",
    ),
    "BCE of errors": ({"imputation": {"loss": "bce"}}, "objective.imputation.loss: bce needs predicts: label"),
    "clipping of errors": (
        {"imputation": {"clip_pseudo_labels": True}},
        "objective.imputation.clip_pseudo_labels: true needs predicts: label",
    ),
    "learned weight of an unbounded loss": (
        {"lambda_c": "learned", "imputation": {"predicts": "label"}},
        "objective.lambda_c: learned does not go with the pseudo-labels of escm2-dr, whose loss has no lower bound",
    ),
    "balance of no weights": (
        {"kind": "naive+ctcvr", "propensity": {"balance": 1.0}},
        r"objective.propensity.balance has no effect on naive\+ctcvr, which weighs nothing by q",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_parts_that_do_not_go_together_are_told(misfit: str) -> None:
    settings, message = MISFITS[misfit]
    with pytest.raises(ConfigError, match=message):
        objective(**settings)


def test_a_learned_weight_goes_with_pseudo_labels_that_are_clipped() -> None:
    assert objective(lambda_c="learned", imputation={"predicts": "label", "clip_pseudo_labels": True}).lambda_c == Learned()


def test_balance_brings_a_propensity_tower() -> None:
    assert objective(kind="escm2-ips", propensity={"balance": 0.1}).towers == {"propensity"}

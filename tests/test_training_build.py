"""From config to objective and model: defaults of each kind, parts that do not go together, any backbone under any objective."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from escm2rec.config import ObjectiveConfig, ObjectiveKind
from escm2rec.errors import ConfigError
from escm2rec.models.head import Escm2Head
from escm2rec.objectives.estimator import estimator_of
from escm2rec.objectives.objective import Stage
from escm2rec.objectives.reduction import local_sums, reduce_terms
from escm2rec.objectives.weights import Constant, Learned, Ramp
from escm2rec.training.build import BaseRates, build_model, build_objective
from tests.encoded import config, schema

KINDS = get_args(ObjectiveKind)


def objective(**settings: Any) -> Any:
    return build_objective(ObjectiveConfig.model_validate(settings), base_ctr=0.04)


def test_every_kind_of_the_config_has_a_file() -> None:
    assert len(KINDS) == 12
    for kind in KINDS:
        built = objective(kind=kind)
        assert built.estimator is estimator_of(kind)
        assert built.towers == estimator_of(kind).towers


def test_labels_are_imputed_unless_errors_are_asked_for() -> None:
    """Errors teach the CVR tower what IPS does, so they are no default; each has the loss that is not blind where it predicts nothing."""
    default, errors = (objective(kind="multi-dr", imputation=section).settings.imputation for section in ({}, {"predicts": "error"}))
    assert (default.predicts, default.loss) == ("label", "bce")
    assert (errors.predicts, errors.loss) == ("error", "squared")
    assert objective(imputation={"loss": "squared"}).settings.imputation.loss == "squared"


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
    "BCE of errors": ({"imputation": {"predicts": "error", "loss": "bce"}}, "objective.imputation.loss: bce needs predicts: label"),
    "clipping of errors": (
        {"imputation": {"predicts": "error", "clip_pseudo_labels": True}},
        "objective.imputation.clip_pseudo_labels: true needs predicts: label",
    ),
    "learned weight of an unbounded loss": (
        {"lambda_c": "learned"},
        "objective.lambda_c: learned does not go with the pseudo-labels of escm2-dr, whose loss has no lower bound",
    ),
    "learned weight of no CVR loss": (
        {"kind": "esmm", "lambda_c": "learned"},
        "objective.lambda_c: learned has nothing to learn from, esmm has no such term",
    ),
    "learned weight of no CTCVR loss": (
        {"kind": "naive", "lambda_g": "learned"},
        "objective.lambda_g: learned has nothing to learn from, naive has no such term",
    ),
    "cross-fitting of no weights": (
        {"kind": "esmm", "propensity": {"cross_fit": True}},
        "objective.propensity.cross_fit has no effect on esmm, which weighs nothing by q",
    ),
    "cross-fitting beside a propensity tower": (
        {"kind": "stable-dr", "propensity": {"cross_fit": True}},
        "objective.propensity.cross_fit gives q from two models, and stable-dr has a propensity tower of its own",
    ),
    "cross-fitting and calibration": (
        {"kind": "escm2-ips", "propensity": {"cross_fit": True, "calibration": "platt"}},
        "objective.propensity.cross_fit gives q from two models, which calibration does not reach",
    ),
    "calibration of a tower that is held to something": (
        {"kind": "stable-dr", "propensity": {"calibration": "platt"}},
        "objective.propensity.calibration would undo what the propensity tower of stable-dr is held to",
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
    assert objective(lambda_c="learned", imputation={"clip_pseudo_labels": True}).lambda_c == Learned()


def test_balance_brings_a_propensity_tower() -> None:
    assert objective(kind="escm2-ips", propensity={"balance": 0.1}).towers == {"propensity"}


BACKBONES = {
    "shared_bottom": "{kind: shared_bottom, hidden: [8]}",
    "mmoe": "{kind: mmoe, experts: 2, hidden: [8]}",
    "ple": "{kind: ple, hidden: [8]}",
    "dcn_v2": "{kind: dcn_v2, hidden: [8]}",
    "dcn_v2_mixture": "{kind: dcn_v2, rank: 4, experts: 2, hidden: [8]}",
}
NUM_STEPS = 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_trains_with_any_objective(backbone: str, kind: ObjectiveKind) -> None:
    chosen = config(f"objective.kind={kind}", f"model.backbone={BACKBONES[backbone]}")
    objective = build_objective(chosen.objective, base_ctr=0.3)
    head = build_model(schema(), chosen.model, chosen.objective, BaseRates(0.3, 0.5), seed=0).head
    assert isinstance(head, Escm2Head)
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    inputs = torch.randn(256, head.num_inputs, generator=torch.Generator().manual_seed(1))
    click = (inputs[:, 0] > 0.5).float()
    conversion = click * (inputs[:, 1] > 0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.0)
    shares: dict[str, list[float]] = {}
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        terms = objective.terms(head(inputs), click, conversion, torch.ones(256), Stage(objective.phase(step)))
        loss, parts = reduce_terms(terms, local_sums(terms), world_size=1)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for name, share in parts.items():
            shares.setdefault(name, []).append(float(share))
    assert shares["ctr"][-1] < 0.8 * shares["ctr"][0]
    assert all(torch.isfinite(torch.tensor(values)).all() for values in shares.values())
    still = [name for name, parameter in head.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []

"""Settings that were written and would do nothing: refused before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from pydantic import BaseModel

from escm2rec.config import Config, ObjectiveConfig, ObjectiveKind
from escm2rec.errors import ConfigError
from escm2rec.objectives.estimator import Estimator, estimator_of

READ_BY: dict[str, tuple[Callable[[Estimator], bool], str]] = {
    "lambda_c": (lambda each: each.cvr is not None, "no CVR loss"),
    "lambda_g": (lambda each: each.ctcvr, "no L_CTCVR"),
    "ctcvr_detach_ctr": (lambda each: each.ctcvr, "no L_CTCVR"),
    "lambda_imp": (lambda each: "imputation" in each.towers, "no imputation tower"),
    "imputation": (lambda each: "imputation" in each.towers, "no imputation tower"),
    "imputation.clip_pseudo_labels": (lambda each: each.pseudo_labels, "no pseudo-labels"),
    "propensity.warmup_fraction": (lambda each: each.weighs, "no weights by q"),
    "two_space_beta": (lambda each: "beta" in each.reads, "no such number"),
    "dcmt_consistency": (lambda each: "consistency" in each.reads, "no such number"),
    "stability": (lambda each: "stability" in each.reads, "no such number"),
}
"""Of a key of the section `objective`, or a section in it: the kinds that read it, and what the others have not.

Where q weighs nothing, floor and calibration still make the propensity that `evaluate` reports; `build_objective` refuses the rest.
"""
NEEDS: dict[str, tuple[Callable[[ObjectiveConfig], bool], str]] = {
    "imputation.cvr_steps": (lambda section: section.imputation.alternate, "imputation.alternate: true"),
    "imputation.mse_mixture": (lambda section: section.imputation.weighting == "dr-mse", "imputation.weighting: dr-mse"),
    "propensity.warmup_fraction": (lambda section: not section.propensity.cross_fit, "propensity.cross_fit: false"),
    "propensity.calibration_every_steps": (lambda section: section.propensity.calibration != "none", "propensity.calibration"),
}
"""Of a key that acts beside another alone: whether that is there, and what it is."""


def refuse_idle(config: Config) -> None:
    """ConfigError with every setting of `objective` and `choice` that was written and has no effect.

    For what a person writes. A default is never refused; the library's own sections, and those of a run that goes on, need no check.
    """
    sections = {"objective": config.objective}
    sections |= {f"choice.objectives.{number}": section for number, section in enumerate(config.choice.objectives)}
    found = [f"{where}.{told}" for where, section in sections.items() for told in _idle(section)]
    if not config.choice.objectives and "objectives" not in config.choice.model_fields_set:  # written empty, it is turned off
        found += [f"choice.{key}: nothing is chosen, choice.objectives is empty" for key in _written(config.choice)]
    places = list(sections)
    for number, place in enumerate(places):
        same = next((other for other in places[:number] if _resolved(sections[other]) == _resolved(sections[place])), None)
        if same is not None:
            found.append(f"{place}: the same as {same}, which is trained already")
    if found:
        what = "a setting has" if len(found) == 1 else f"{len(found)} settings have"
        raise ConfigError(
            f"{what} no effect:\n" + "\n".join(f"  {line}" for line in found), "leave out what has no effect, or choose what reads it"
        )


def _resolved(section: ObjectiveConfig) -> ObjectiveConfig:
    """The section with what its kind makes of the values that were left open, so that equal ones train alike."""
    detach = estimator_of(section.kind).weighs if section.ctcvr_detach_ctr is None else section.ctcvr_detach_ctr
    loss = section.imputation.loss or section.imputation.default_loss
    return section.model_copy(update={"ctcvr_detach_ctr": detach, "imputation": section.imputation.model_copy(update={"loss": loss})})


def _idle(section: ObjectiveConfig) -> Iterator[str]:
    """The keys of a section `objective` that were written and have no effect, each with the reason."""
    estimator = estimator_of(section.kind)
    inner = ("propensity", "imputation")
    keys = [key for key in _written(section) if key not in inner]
    keys += [f"{name}.{key}" for name in inner for key in _written(getattr(section, name))]
    for key in keys:
        reads, lacks = READ_BY.get(key) or READ_BY.get(key.split(".")[0]) or (lambda _: True, "")
        there, needed = NEEDS.get(key, (lambda _: True, ""))
        if not reads(estimator):
            kinds = [kind for kind in get_args(ObjectiveKind) if reads(estimator_of(kind))]
            yield f"{key}: {section.kind} has {lacks}; read by {', '.join(kinds)}"
        elif not there(section):
            yield f"{key}: acts only with {needed}"


def _written(section: BaseModel) -> list[str]:
    """The keys that were written, those without a value aside.

    Where all were, as in a config that `config check` printed or a run stored, those that differ from their default.
    """
    fields = type(section).model_fields
    printed = section.model_fields_set == fields.keys()
    values = {name: getattr(section, name) for name in fields if name in section.model_fields_set}
    return [name for name, value in values.items() if value is not None and not (printed and value == fields[name].default)]

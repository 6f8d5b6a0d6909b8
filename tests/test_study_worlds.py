"""The worlds: rates, selection, what features show, hidden scores, dropped negatives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from escm2rec.study.presets import BASE, WORLDS
from escm2rec.study.worlds import Floats, World, _mean_over_hidden, draw, drop_negatives, wrong_shift

ROWS = 50_000
BY_NAME = {world.name: world for world in WORLDS}


def logit(rate: Floats) -> Floats:
    return np.log(rate) - np.log1p(-rate)


def explained(y: Floats, x: Floats) -> float:
    """R squared of a linear fit."""
    x = np.column_stack([np.ones(len(x)), x])
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(1 - left.var() / y.var())


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_rates_hit_ctr_and_cvr(world: World) -> None:
    sample = draw(world, ROWS, (5,))
    assert sample.propensity.mean() == pytest.approx(world.ctr, rel=0.03)
    assert sample.cvr.mean() == pytest.approx(world.cvr, rel=0.03)
    for rate, happened in ((sample.propensity, sample.click), (sample.cvr, sample.conversion)):
        assert abs(happened.mean() - rate.mean()) < 4 * np.sqrt(rate.mean() / ROWS)
    assert sample.ids.shape == (ROWS, 2 if world.users else 0)
    assert sample.numeric.shape == (ROWS, 0 if world.users else 8)


@pytest.mark.parametrize("selection", [0.8, 0.4, 0.0, -0.8])
def test_selection_is_the_covariance_of_click_and_conversion(selection: float) -> None:
    sample = draw(replace(BASE, selection=selection), ROWS, (5,))
    assert np.corrcoef(logit(sample.propensity), logit(sample.cvr))[0, 1] == pytest.approx(0.8 * selection, abs=0.02)
    covariance = np.cov(sample.propensity, sample.cvr)[0, 1]
    assert abs(covariance) < 2e-4 if selection == 0 else covariance * selection > 5e-4
    assert logit(sample.propensity).std() == pytest.approx(BASE.click_std, rel=0.03)
    assert logit(sample.cvr).std() == pytest.approx(BASE.convert_std, rel=0.03)


def test_what_is_clicked_at_random_selects_nothing() -> None:
    sample = draw(BY_NAME["clicks at random"], ROWS, (5,))
    assert sample.propensity.std() < 1e-12
    assert sample.click[sample.cvr > np.median(sample.cvr)].mean() == pytest.approx(0.1, abs=0.008)


@pytest.mark.parametrize(("interactions", "shown"), [(True, 0.36), (False, 1.0)])
def test_a_linear_fit_sees_no_interactions(interactions: bool, shown: float) -> None:
    sample = draw(replace(BASE, interactions=interactions), ROWS, (5,))
    # logit p is 0.8 f + 0.6 l: of its variance 0.64 is f's, made of pairs, or not.
    assert explained(logit(sample.propensity), sample.numeric.astype(float)) == pytest.approx(shown, abs=0.01)


def test_the_hidden_score_is_averaged_over() -> None:
    world = BY_NAME["hidden"]
    hidden = world.hidden * np.random.default_rng(1).standard_normal(400_000)
    for at in (-4.0, -1.0, 0.5, 3.0):
        sampled = 1 / (1 + np.exp(-at - hidden))
        exact = float(_mean_over_hidden(world, np.array([at]))[0])
        assert abs(exact - sampled.mean()) < 4 * sampled.std() / np.sqrt(len(hidden))
    # It draws click and conversion together, though what features show of them is unrelated.
    sample = draw(world, ROWS, (5,))
    clicked = sample.click > 0
    assert abs(np.corrcoef(sample.propensity, sample.cvr)[0, 1]) < 0.03
    assert sample.conversion[clicked].mean() > sample.cvr[clicked].mean() + 5 * np.sqrt(0.1 / clicked.sum())


def test_dropped_negatives_weigh_what_the_log_did() -> None:
    sample = draw(BASE, ROWS, (5,))
    kept = drop_negatives(sample, 0.1, (5, 1))
    assert len(kept) < 0.25 * ROWS
    assert kept.click.sum() == sample.click.sum()
    assert set(kept.weight[kept.click > 0]) == {1.0}
    assert set(kept.weight[kept.click == 0]) == {10.0}
    negatives = ROWS - sample.click.sum()
    assert abs(kept.weight.sum() - ROWS) < 4 * np.sqrt(negatives * 0.1 * 0.9) / 0.1
    assert drop_negatives(sample, 1.0, (5, 1)) is sample


@pytest.mark.parametrize("name", ["selection +0.8", "ids small"])
def test_a_seed_is_a_draw(name: str) -> None:
    one, two, other = (draw(BY_NAME[name], 1_000, seed) for seed in ((3, 0), (3, 0), (3, 1)))
    for field in one.__dataclass_fields__:
        assert np.array_equal(getattr(one, field), getattr(two, field))
    assert not np.array_equal(one.propensity, other.propensity)
    assert not np.array_equal(one.click, other.click)


@pytest.mark.parametrize("slope", [0.5, 1.5])
def test_a_wrong_propensity_keeps_its_mean(slope: float) -> None:
    world = replace(BASE, slope=slope)
    wrong = 1 / (1 + np.exp(-slope * logit(draw(world, ROWS, (5,)).propensity) - wrong_shift(world)))
    assert wrong.mean() == pytest.approx(world.ctr, rel=0.03)
    assert abs(wrong_shift(world)) > 0.3
    assert wrong_shift(BASE) == 0

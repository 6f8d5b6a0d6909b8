"""The world: items, users, and what makes an impression clicked and converted.

Every effect is a function of the features that are logged (ids carry latent effects of their own), so nothing is confounded.
Two utilities are built alike and independently, the appeal A and the worth W:

    effect(x) = user + profile + item + category + shop + brand + intentions + scene + profile 122 x category
                + crosses . log(1 + count) + user factor . item factor

W is then made uncorrelated with A, and both have mean 0 and variance 1 over impressions. With s = `selection`:

    logit p(x)   = a + CLICK_STD A(x)
    logit eta(x) = b + CONVERT_STD (s A(x) + sqrt(1 - s^2) W(x))

so s is exactly the correlation of the two logits. a is solved so that mean p = `ctr`, b so that sum p eta / sum p = `cvr`,
by bisection on a fixed sample of the world.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from escm2rec.config import SimulationConfig
from escm2rec.simulate.population import (
    CROSSES,
    PROFILE_SIZES,
    SCENES,
    TASTE_IN_LOG,
    Fields,
    Floats,
    Ints,
    Items,
    Users,
    make_items,
    make_users,
)

# Chosen: the best possible ranking of clicks then has an AUC of about .75, and CVR varies somewhat more than CTR.
CLICK_STD, CONVERT_STD = 1.0, 1.2
SAMPLE_ROWS = 500_000
FACTORS = 8
SCENE_SHARES = (0.6, 0.37, 0.03)
SEGMENT = "122"
# Standard deviations of the parts of a utility, before it is scaled to variance 1. Chosen: no part decides by itself.
USER, PROFILE, ITEM, CATEGORY, SHOP, BRAND, INTENTIONS, SCENE, SEGMENT_CATEGORY, FACTOR = (
    0.35,
    0.12,
    0.4,
    0.35,
    0.3,
    0.2,
    0.3,
    0.2,
    0.2,
    0.6,
)
CROSS = (0.2, 0.15, 0.15, 0.2)


@dataclass(frozen=True)
class Rows:
    """Features of B impressions: user, item, scene, and what the user's history says of the item (0: never seen)."""

    user: Ints
    item: Ints
    scene: Ints
    counts: dict[str, Ints]  # by cross field; 853 is the sum over the item's intentions
    intention_offsets: Ints  # [B + 1], into the two below: the item's intentions that the history holds
    intentions: Ints
    intention_counts: Ints


@dataclass(frozen=True)
class Utility:
    """A utility as tables of effects."""

    user: Floats
    item: Floats
    scene: Floats
    segment: Floats  # [values of profile 122 and a last row of 0 for missing, categories]
    cross: Floats  # [4]
    user_factors: Floats  # [U, FACTORS]
    item_factors: Floats  # [I, FACTORS]

    def of(self, rows: Rows, segment: Ints, category: Ints) -> Floats:
        """The utility of each row [B], not scaled yet."""
        total = self.user[rows.user] + self.item[rows.item] + self.scene[rows.scene] + self.segment[segment, category]
        for weight, counts in zip(self.cross, rows.counts.values(), strict=True):
            total += weight * np.log1p(counts)
        total += np.einsum("bk,bk->b", self.user_factors[rows.user], self.item_factors[rows.item])
        return total


@dataclass(frozen=True)
class Link:
    """utility -> logit: intercept and slopes on the raw appeal and the raw worth."""

    intercept: float
    appeal: float
    worth: float


@dataclass(frozen=True)
class World:
    """All that impressions are drawn from. Memory is proportional to users and items."""

    config: SimulationConfig
    seed: int
    fields: Fields
    items: Items
    users: Users
    appeal: Utility
    worth: Utility
    click: Link
    conversion: Link

    def rows(self, user: Ints, item: Ints, scene: Ints) -> Rows:
        """Add the crosses to users, items and scenes."""
        return _rows(self.items, self.users, user, item, scene)

    def truth(self, rows: Rows) -> tuple[Floats, Floats]:
        """Propensity p(x) and CVR eta(x) of each row."""
        appeal, worth = _utilities(self.items, self.users, self.appeal, self.worth, rows)
        p, eta = (sigmoid(link.intercept + link.appeal * appeal + link.worth * worth) for link in (self.click, self.conversion))
        return p, eta


def make_world(config: SimulationConfig, seed: int) -> World:
    """The world of a seed. It does not depend on how many impressions are drawn from it."""
    rng = generator(seed, 0, 0)
    fields = Fields.of(config)
    items = make_items(rng, fields)
    users = make_users(rng, fields, items)
    appeal, worth = (_utility(rng, fields, items, users) for _ in range(2))
    sample = _rows(items, users, *exposures(generator(seed, 0, 1), items, users, SAMPLE_ROWS))
    click, conversion = _solve(config, *_utilities(items, users, appeal, worth, sample))
    return World(config, seed, fields, items, users, appeal, worth, click, conversion)


def generator(seed: int, *stream: int) -> np.random.Generator:
    """A generator for one stream of a seed, independent of all others."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)))


def exposures(rng: np.random.Generator, items: Items, users: Users, count: int) -> tuple[Ints, Ints, Ints]:
    """Draw `count` (user, item, scene): users by activity; items by popularity, half of them in a category of the user's history."""
    user = users.pick(rng.random(count))
    num_events = np.diff(users.events.offsets)[user]
    tasteful = (rng.random(count) < TASTE_IN_LOG) & (num_events > 0)
    place = users.events.offsets[user] + (rng.random(count) * num_events).astype(np.int64)
    category = np.full(count, -1)
    category[tasteful] = items.category[users.events.values[place[tasteful]]]
    item = items.pick(rng.random(count), category)
    scene = np.searchsorted(np.cumsum(SCENE_SHARES[:-1]), rng.random(count), side="right")
    return user, item, scene


def sigmoid(logit: Floats) -> Floats:
    """1 / (1 + exp(-logit))."""
    with np.errstate(over="ignore"):  # exp(-logit) may be infinite: then the result is 0, as it should be
        return 1.0 / (1.0 + np.exp(-logit))


def _rows(items: Items, users: Users, user: Ints, item: Ints, scene: Ints) -> Rows:
    of_item = {"206": items.category, "207": items.shop, "216": items.brand}
    single = [(cross, history, of_item[field]) for cross, (history, field) in CROSSES.items() if field in of_item]
    counts = {cross: users.histories[history].lookup(user, value[item]) for cross, history, value in single}
    offsets, places = items.intentions.take(item)
    intentions = items.intentions.values[places]
    row = np.repeat(np.arange(len(user)), np.diff(offsets))
    seen = users.histories[CROSSES["853"][0]].lookup(user[row], intentions)
    counts["853"] = np.bincount(row, weights=seen, minlength=len(user)).astype(np.int64)
    hit = seen > 0
    hit_offsets = np.concatenate([[0], np.cumsum(hit)])[offsets]
    return Rows(user, item, scene, counts, hit_offsets, intentions[hit], seen[hit])


def _utilities(items: Items, users: Users, appeal: Utility, worth: Utility, rows: Rows) -> tuple[Floats, Floats]:
    segment, category = users.profile[SEGMENT][rows.user], items.category[rows.item]  # -1, missing, is the last row of the table
    return appeal.of(rows, segment, category), worth.of(rows, segment, category)


def _utility(rng: np.random.Generator, fields: Fields, items: Items, users: Users) -> Utility:
    """Draw the effects of every value of every field. A missing value has effect 0."""

    def effects(field: str, std: float) -> Floats:
        return np.append(rng.normal(0.0, std, fields.sizes[field]), 0.0)

    user = effects("101", USER)[:-1] + sum(effects(field, PROFILE)[users.profile[field]] for field in PROFILE_SIZES)
    item = effects("205", ITEM)[:-1] + effects("206", CATEGORY)[items.category] + effects("207", SHOP)[items.shop]
    item += effects("216", BRAND)[items.brand]
    num_intentions = np.diff(items.intentions.offsets)
    summed = np.add.reduceat(effects("210", INTENTIONS)[items.intentions.values], items.intentions.offsets[:-1])
    item += summed / np.sqrt(num_intentions)
    categories = fields.sizes["206"]
    segment = rng.normal(0.0, SEGMENT_CATEGORY, (fields.sizes[SEGMENT] + 1, categories))
    segment[-1] = 0.0
    category_factors = rng.normal(0.0, 1.0, (categories, FACTORS))
    item_factors = np.sqrt(0.5) * (category_factors[items.category] + rng.normal(0.0, 1.0, (len(item), FACTORS)))
    return Utility(
        user=user,
        item=item,
        scene=rng.normal(0.0, SCENE, SCENES),
        segment=segment,
        cross=np.array(CROSS) * np.abs(rng.normal(1.0, 0.5, len(CROSS))),
        user_factors=rng.normal(0.0, FACTOR / np.sqrt(FACTORS), (len(user), FACTORS)),
        item_factors=item_factors,
    )


def _solve(config: SimulationConfig, appeal: Floats, worth: Floats) -> tuple[Link, Link]:
    """The two links, from the raw utilities of a sample of impressions."""
    selection, rest = config.selection, np.sqrt(1.0 - config.selection**2)
    appeal_std = float(appeal.std())
    slope = float(np.cov(appeal, worth)[0, 1] / appeal.var(ddof=1))
    worth_std = float((worth - slope * appeal).std())  # the worth that is uncorrelated with the appeal is worth - slope appeal
    click = CLICK_STD / appeal_std * appeal
    on_worth = CONVERT_STD * rest / worth_std
    on_appeal = CONVERT_STD * selection / appeal_std - on_worth * slope
    a = _bisect(lambda a: float(sigmoid(a + click).mean()), config.ctr)
    p = sigmoid(a + click)
    convert = on_appeal * appeal + on_worth * worth
    b = _bisect(lambda b: float((p * sigmoid(b + convert)).sum() / p.sum()), config.cvr)
    return Link(a, CLICK_STD / appeal_std, 0.0), Link(b, float(on_appeal), float(on_worth))


def _bisect(rate: Callable[[float], float], target: float) -> float:
    """The intercept at which a rising rate meets its target."""
    low, high = -60.0, 60.0
    for _ in range(32):  # to 3e-8
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) < target else (low, middle)
    return (low + high) / 2

"""Who is in the world and what is in it: items, users, and the users' histories, under the fields of Ali-CCP.

Inside the world every value is a number from 0 within its field; `Fields.ids` turns it into the global feature id that logs hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from escm2rec.config import SimulationConfig

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Values of each profile field: what AITM's public code (KDD 2021) found in Ali-CCP, less its row for unknown values.
PROFILE_SIZES = {"121": 97, "122": 13, "124": 2, "125": 7, "126": 3, "127": 3, "128": 2, "129": 4}
SCENES = 3  # the same source
# Each cross field: what a history field says of an item field (data README). The two and the cross have the same values.
CROSSES = {"508": ("109_14", "206"), "509": ("110_14", "207"), "702": ("127_14", "216"), "853": ("150_14", "210")}

BRAND_MISSING = 0.27  # Ali-CCP's share of rows (data README)
# The rest is chosen so that sizes look like Ali-CCP's: many short histories, some long, rows that mostly fit the user's taste.
PROFILE_MISSING = 0.05
NO_HISTORY = 0.04
MEDIAN_EVENTS, EVENTS_LOG_STD, MAX_EVENTS = 8.0, 0.9, 200
FAVOURITES = 5
TASTE_IN_HISTORY = 0.7
TASTE_IN_LOG = 0.5


@dataclass(frozen=True)
class Fields:
    """How many values each field has, and the range of global feature ids that each owns."""

    sizes: dict[str, int]

    @classmethod
    def of(cls, config: SimulationConfig) -> Fields:
        """Sizes for so many users and items, in the order in which ids are handed out."""
        item = {"206": config.items // 100, "207": config.items // 10, "210": config.items // 25, "216": config.items // 20}
        item = {field: max(2, size) for field, size in item.items()}
        history = {history: item[counted] for history, counted in CROSSES.values()}
        cross = {field: item[counted] for field, (_, counted) in CROSSES.items()}
        return cls({"101": config.users, **history, **PROFILE_SIZES, "205": config.items, **item, "301": SCENES, **cross})

    @cached_property
    def starts(self) -> dict[str, int]:
        """The first global id of each field. Ids begin at 1."""
        ends = np.cumsum([1, *self.sizes.values()])
        return {field: int(start) for field, start in zip(self.sizes, ends[:-1], strict=True)}

    def ids(self, field: str, values: Ints) -> Ints:
        """Global feature ids of values of a field; below 0 stays below 0 (missing)."""
        return np.where(values < 0, -1, values + self.starts[field])


@dataclass(frozen=True)
class Lists:
    """One list of values for each of N owners: `values[offsets[i]:offsets[i + 1]]`."""

    offsets: Ints  # [N + 1]
    values: Ints

    def take(self, owners: Ints) -> tuple[Ints, Ints]:
        """The lists of `owners` end to end: the offsets of the new lists, and the positions of their values in `values`."""
        lengths = np.diff(self.offsets)[owners]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return offsets, np.arange(offsets[-1]) + np.repeat(self.offsets[owners] - offsets[:-1], lengths)


@dataclass(frozen=True)
class History(Lists):
    """What each user saw before the log, each value once, with how often."""

    counts: Ints
    size: int  # values of the field

    @classmethod
    def count(cls, users: Ints, values: Ints, num_users: int, size: int) -> History:
        """Count (user, value) pairs; a value below 0 is missing."""
        known = values >= 0
        keys, counts = np.unique(users[known] * size + values[known], return_counts=True)
        offsets = np.searchsorted(keys, np.arange(num_users + 1) * size)
        return cls(offsets=offsets, values=keys % size, counts=counts, size=size)

    @cached_property
    def keys(self) -> Ints:
        """user * size + value, ascending."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets)) * self.size + self.values

    def lookup(self, users: Ints, values: Ints) -> Ints:
        """How often each user saw each value; 0 for never, and for a missing value."""
        if not len(self.keys):
            return np.zeros(len(users), np.int64)
        wanted = users * self.size + values
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where((values >= 0) & (self.keys[places] == wanted), self.counts[places], 0)


@dataclass(frozen=True)
class Items:
    """Items with their category, shop, brand and intentions, heavy-tailed in popularity."""

    category: Ints
    shop: Ints
    brand: Ints  # -1: none
    intentions: Lists
    by_category: Ints  # items, those of one category together
    cumulative: Floats  # popularity summed along by_category, from 0 [I + 1]
    first: Ints  # where each category starts in by_category [C + 1]

    def pick(self, uniform: Floats, category: Ints) -> Ints:
        """The item at each `uniform` in [0, 1) by popularity, within a category, or among all where the category is -1."""
        low = np.where(category < 0, 0, self.first[category])
        high = np.where(category < 0, len(self.by_category), self.first[category + 1])
        target = self.cumulative[low] + uniform * (self.cumulative[high] - self.cumulative[low])
        place = np.searchsorted(self.cumulative, target, side="right") - 1
        return self.by_category[np.clip(place, low, high - 1)]


@dataclass(frozen=True)
class Users:
    """Users with their profile and history, heavy-tailed in activity."""

    activity: Floats  # cumulative share of impressions [U]
    profile: dict[str, Ints]  # -1: missing
    events: Lists  # the items each saw before the log
    histories: dict[str, History]

    def pick(self, uniform: Floats) -> Ints:
        """The user at each `uniform` in [0, 1) by activity."""
        return np.minimum(np.searchsorted(self.activity, uniform, side="right"), len(self.activity) - 1)


def make_items(rng: np.random.Generator, fields: Fields) -> Items:
    """Draw the items. Shops, brands and intentions are near others of the same category, as in a catalogue."""
    count, categories = fields.sizes["205"], fields.sizes["206"]
    share = np.cumsum(_zipf(categories, 0.8, 2.0))
    category = np.minimum(np.searchsorted(share, rng.random(count), side="right"), categories - 1)
    rank = rng.permutation(count)
    brand = _near(rng, category, categories, fields.sizes["216"])
    with_none = np.floor((rank + 1) * BRAND_MISSING) > np.floor(rank * BRAND_MISSING)  # spread evenly over popularity
    num_intentions = 1 + np.minimum(rng.poisson(3.0, count), 11)
    item = np.repeat(np.arange(count), num_intentions)
    intention = _near(rng, category[item], categories, fields.sizes["210"])
    intentions = History.count(item, intention, count, fields.sizes["210"])  # each once
    by_category = np.argsort(category, kind="stable")
    popularity = _zipf(count, 1.0, 10.0)[rank][by_category]
    return Items(
        category=category,
        shop=_near(rng, category, categories, fields.sizes["207"]),
        brand=np.where(with_none, -1, brand),
        intentions=Lists(intentions.offsets, intentions.values),
        by_category=by_category,
        cumulative=np.concatenate([[0.0], np.cumsum(popularity)]),
        first=np.searchsorted(category[by_category], np.arange(categories + 1)),
    )


def make_users(rng: np.random.Generator, fields: Fields, items: Items) -> Users:
    """Draw the users. A history is a count of the items a user saw, most of them from a few favourite categories."""
    count = fields.sizes["101"]
    profile = {}
    for field, size in PROFILE_SIZES.items():
        values = rng.choice(size, size=count, p=rng.permutation(_zipf(size, 0.7, 1.0)))
        profile[field] = np.where(rng.random(count) < PROFILE_MISSING, -1, values)
    num_events = np.clip(np.round(rng.lognormal(np.log(MEDIAN_EVENTS), EVENTS_LOG_STD, count)), 1, MAX_EVENTS).astype(np.int64)
    num_events[rng.random(count) < NO_HISTORY] = 0
    user = np.repeat(np.arange(count), num_events)
    favourites = items.category[items.pick(rng.random(count * FAVOURITES), np.full(count * FAVOURITES, -1))].reshape(count, FAVOURITES)
    favourite = favourites[user, (FAVOURITES * rng.random(len(user)) ** 2).astype(np.int64)]  # the first ones more often
    event = items.pick(rng.random(len(user)), np.where(rng.random(len(user)) < TASTE_IN_HISTORY, favourite, -1))
    owners, places = items.intentions.take(event)
    sizes = fields.sizes
    histories = {
        "109_14": History.count(user, items.category[event], count, sizes["206"]),
        "110_14": History.count(user, items.shop[event], count, sizes["207"]),
        "127_14": History.count(user, items.brand[event], count, sizes["216"]),
        "150_14": History.count(np.repeat(user, np.diff(owners)), items.intentions.values[places], count, sizes["210"]),
    }
    activity = np.cumsum(rng.permutation(_zipf(count, 0.8, 20.0)))
    events = Lists(np.concatenate([[0], np.cumsum(num_events)]), event)
    return Users(activity=activity, profile=profile, events=events, histories=histories)


def _zipf(count: int, exponent: float, shift: float) -> Floats:
    """Shares proportional to (rank + shift)^-exponent (Zipf-Mandelbrot)."""
    weights = np.power(np.arange(count, dtype=np.float64) + shift, -exponent)
    shares: Floats = weights / weights.sum()
    return shares


def _near(rng: np.random.Generator, category: Ints, categories: int, size: int) -> Ints:
    """A value out of `size` for each category: each category has its own stretch of values, and the stretches overlap."""
    reach = rng.exponential(2.0 * max(1.0, size / categories), len(category)).astype(np.int64)
    return (category * size // categories + reach) % size

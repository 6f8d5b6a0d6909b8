"""Which option of each table to try: the cheapest in time, with a price on memory where it is short, and none longer than a target.

The slowest rank takes at least the mean over ranks, so options are chosen by their time summed over all shards. Two things keep a plan
from that mean. A shard longer than it: options with one are left out, for targets from the mean upwards. Memory: each byte gets a price,
the same for all tables (a Lagrange multiplier), the lowest at which the choice fits all ranks together. Then options of tables on the
slowest rank are exchanged, one at a time, while that helps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.planner.types import Enumerator, PartitionByType, Proposer, ShardingOption, Topology
from torchrec.distributed.types import ShardingType

from escm2rec.planning.bound import fits_somewhere, lower_bound, shares
from escm2rec.planning.options import Floats, Options, perf_of, rooms_of

TARGETS = 8  # between the bound and the best so far
FILLS = ((1.0, 1.0), (0.98, 0.5), (0.95, 0.3), (0.9, 0.2), (0.8, 0.1), (0.6, 0.05))
"""What a choice may take of all memory, and each of its shards of a rank's: what does not fit needs more air, or smaller pieces."""
EXCHANGES = 16, 3_000  # proposals of exchanged options: at the least, and over the number of tables
TRIES = 4  # exchanges that may fail, one after another
BETTER = 1e-6

Choice = list[int]
Places = list[tuple[NDArray[np.int64], Floats]]
"""Of each table the ranks of its shards, and their times."""


class Pricing(Proposer):
    """Proposals from the cheapest to those that fit, and exchanges from there; without chance."""

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Begin a search."""
        self.options = Options.of(search_space)
        self.rooms: Floats | None = None
        self.group = 1
        self.best: tuple[float, Choice, Places] | None = None
        self._tried: set[tuple[int, ...]] = set()
        self._search = self._proposals()
        self._next: Choice | None = next(self._search)

    def propose(self) -> list[ShardingOption] | None:
        """The options to try next, one a table; None when the search is over."""
        return None if self._next is None else [self.options.options[index] for index in self._next]

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Take the answer to what was proposed."""
        assert storage_constraint is not None
        assert self._next is not None
        if self.rooms is None:
            self.rooms, self.group = rooms_of(storage_constraint), storage_constraint.intra_group_size
        if partitionable and plan is not None and perf_rating is not None and perf_rating < self.rating * (1 - BETTER):
            self.best = (perf_rating, self._next, [_places(option) for option in plan])
        try:
            self._next = self._search.send(partitionable)
        except StopIteration:
            self._next = None

    @property
    def rating(self) -> float:
        """Of the best so far, ms of its slowest rank; infinite before one fits."""
        return float("inf") if self.best is None else self.best[0]

    def _proposals(self) -> Generator[Choice, bool, None]:
        options, everything = self.options, np.ones(len(self.options.total), np.bool_)
        first = options.cheapest(options.total, everything)
        assert first is not None  # every table has an option
        yield from self._offer(first)
        assert self.rooms is not None
        fill = yield from self._fill(fits_somewhere(options, self.rooms), 0)
        lowest = lower_bound(options, self.rooms)
        for at in range(TARGETS):
            highest = min(self.rating, float(options.longest.max()))
            if not 0 < lowest < highest * (1 - BETTER):
                break
            target = lowest * (highest / lowest) ** (at / TARGETS) * (1 + BETTER)
            allowed = fits_somewhere(options, self.rooms) & (options.longest <= target)
            fill = yield from self._fill(allowed, fill)
        yield from self._exchanges()

    def _offer(self, choice: Choice) -> Generator[Choice, bool, bool]:
        self._tried.add(tuple(choice))
        fits = yield choice
        return fits

    def _fill(self, allowed: NDArray[np.bool_], start: int) -> Generator[Choice, bool, int]:
        """Offer choices that leave ever more memory free, until one fits: which of FILLS did."""
        assert self.rooms is not None
        for fill in range(start, len(FILLS)):
            filled, piece = FILLS[fill]
            choice = cheapest_within(self.options, allowed & self._in_pieces(allowed, piece), self.rooms * filled)
            if choice is None:
                break
            if tuple(choice) in self._tried:
                continue
            if (yield from self._offer(choice)):
                return fill
        return start

    def _in_pieces(self, allowed: NDArray[np.bool_], piece: float) -> NDArray[np.bool_]:
        """Options of no shard that takes more of a rank; of a table without such an option, those in the smallest pieces."""
        assert self.rooms is not None
        taken = (self.options.largest / np.maximum(self.rooms.max(axis=0), 1)).max(axis=1)
        smallest = np.full(self.options.num_tables, np.inf)
        np.minimum.at(smallest, self.options.table[allowed], taken[allowed])
        return np.asarray(taken <= np.maximum(piece, smallest[self.options.table]))

    def _exchanges(self) -> Generator[Choice, bool, None]:
        left = max(EXCHANGES[0], EXCHANGES[1] // self.options.num_tables)
        while left > 0 and self.best is not None:
            before = self.rating
            for _, choice in zip(range(min(TRIES, left)), self._exchanged(*self.best), strict=False):
                left -= 1
                yield from self._offer(choice)
                if self.rating < before:
                    break
            if self.rating == before:
                return

    def _exchanged(self, rating: float, choice: Choice, places: Places) -> Iterator[Choice]:
        """The best choice with one other option of a table on the slowest rank, those first that promise most."""
        assert self.rooms is not None
        options, allowed = self.options, fits_somewhere(self.options, self.rooms)
        load = np.zeros(len(self.rooms))
        for ranks, perfs in places:
            np.add.at(load, ranks, perfs)
        slowest = int(load.argmax())
        promises = []
        for table, (ranks, perfs) in enumerate(places):
            if slowest not in ranks:
                continue
            rest = load.copy()
            np.subtract.at(rest, ranks, perfs)
            for other in np.flatnonzero((options.table == table) & allowed).tolist():
                if other != choice[table]:
                    promises.append((_end(rest, options.options[other], self.group), table, other))
        for end, table, other in sorted(promises):
            changed = [*choice[:table], other, *choice[table + 1 :]]
            if end < rating * (1 - BETTER) and tuple(changed) not in self._tried:
                yield changed


def cheapest_within(options: Options, allowed: NDArray[np.bool_], rooms: Floats) -> Choice | None:
    """Of each table the allowed option that costs least, at the lowest price of memory at which all together fit `rooms`, [ranks, 3].

    None when that is not found: a table has no allowed option, or no price is high enough.
    """
    share = shares(options, rooms)
    taken = share * np.ones(3)
    weights = np.ones(3)
    choice = options.cheapest(options.total, allowed)
    if choice is None or (taken[choice].sum(axis=0) <= 1).all():
        return choice
    scale = max(float(options.total[choice].sum()), 1e-9)
    for _ in range(6):
        found = _at_lowest_price(options, allowed, share, weights, scale)
        if isinstance(found, list):
            return found
        weights = np.where(found > 1, weights * 4, weights)  # one kind of memory is short, not the other
    return None


def _at_lowest_price(options: Options, allowed: NDArray[np.bool_], share: Floats, weights: Floats, scale: float) -> Choice | Floats:
    """The choice; or, where no price is high enough, what the choice at the highest takes of each kind of memory."""

    def at(price: float) -> tuple[Choice, Floats]:
        choice = options.cheapest(options.total + price * (share @ weights), allowed)
        assert choice is not None
        return choice, share[choice].sum(axis=0)

    low, high = 1e-6 * scale, 1e6 * scale
    best, taken = at(high)
    if not (taken <= 1).all():
        return taken
    for _ in range(24):
        middle = float(np.sqrt(low * high))
        choice, taken = at(middle)
        if (taken <= 1).all():
            best, high = choice, middle
        else:
            low = middle
    return best


def _places(option: ShardingOption) -> tuple[NDArray[np.int64], Floats]:
    ranks = [shard.rank for shard in option.shards]
    return np.array(ranks, np.int64), np.array([perf_of(shard) for shard in option.shards])


def _end(load: Floats, option: ShardingOption, group: int) -> float:
    """When the slowest rank would end with this option on top of `load`, were there room everywhere."""
    perfs = np.sort(np.array([perf_of(shard) for shard in option.shards]))[::-1]
    if option.partition_by == PartitionByType.UNIFORM.value:
        return float((load + perfs).max()) if len(perfs) == len(load) else float("inf")
    if option.partition_by == PartitionByType.DEVICE.value:
        return _spread(load, perfs)
    hosts = load.reshape(-1, group)
    size = group if option.sharding_type != ShardingType.TABLE_COLUMN_WISE.value else len(perfs)
    ends = []
    for first in range(0, len(perfs), size):
        part = perfs[first : first + size]
        ends += sorted(_spread(host, part) for host in hosts)[:1]
    return max(float(load.max()), *ends)


def _spread(load: Floats, perfs: Floats) -> float:
    """The same of shards that may lie on any rank: the longest on the least loaded, and so round."""
    order = np.sort(load)
    ends = [order[i % len(order)] + perf for i, perf in enumerate(perfs)]
    return max(float(load.max()), *(float(end) for end in ends))

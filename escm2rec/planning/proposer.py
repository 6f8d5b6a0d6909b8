"""Which option of each table to try: the cheapest in time, with a price on memory where it is short, and none longer than a target.

The slowest rank takes at least the mean over ranks, so options are chosen by their time summed over all shards. Two things keep a plan
from that mean. A shard longer than it: options with one are left out, for targets from the mean upwards. Memory: each byte gets a price,
the same for all tables (a Lagrange multiplier), the lowest at which the choice fits all ranks together. Then options of tables on the
slowest rank are exchanged, one at a time, while that helps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import chain, combinations, islice

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Topology

from escm2rec.planning.bound import fits_somewhere, lower_bound, shares
from escm2rec.planning.options import Floats, Options, perf_of, rooms_of
from escm2rec.planning.placement import Placer, Ranks

TARGETS = 8  # between the bound and the best so far
PIECES = tuple(0.5**power for power in range(1, 7))
"""How long a shard may be, of the bound, and how large, of a rank's memory, so that what is left to balance is small."""
LENGTHS = 0.2, 0.5, 1.0  # how much of an option's cost is its longest shard, as if all ranks took as long
GREEDY = (
    30,
    300,
    30_000,
)  # proposals of TorchRec's greedy proposer, where nothing else fits: at the least, at the most, over the number of tables
FILLS = ((1.0, 1.0), (0.98, 0.5), (0.95, 0.3), (0.9, 0.2), (0.8, 0.1), (0.6, 0.05))
"""What a choice may take of all memory, and each of its shards of a rank's: what does not fit needs more air, or smaller pieces."""
EXCHANGES = 100, 30_000  # exchanged options that are placed: at the least, and over the number of tables
OTHERS = 6  # options of a table that are tried, where there are more than FEW_TABLES
FEW_TABLES = 12
BETTER, HELPS = 1e-6, 1e-3

Choice = list[int]


class Pricing(Proposer):
    """Proposals from the cheapest to those that fit, and exchanges from there; without chance."""

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Begin a search."""
        self.options = Options.of(search_space)
        self.rooms: Floats | None = None
        self.best: tuple[float, Choice, Ranks] | None = None
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
            self.rooms = rooms_of(storage_constraint)
            self.placer = Placer(self.rooms, storage_constraint.intra_group_size)
        if partitionable and plan is not None and perf_rating is not None and perf_rating < self.rating * (1 - BETTER):
            self.best = perf_rating, self._next, Ranks.of(plan, self.rooms)
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
        for piece in PIECES:
            shorter = self._shorter(piece * lowest)
            yield from self._fill(shorter, 0)
            yield from self._fill(shorter & self._in_pieces(shorter, piece), 0)
        for kind in dict.fromkeys(option.sharding_type for option in options.options):
            yield from self._fill(self._of_type(kind), 0)
        for weight in LENGTHS:
            cost = (1 - weight) * options.total + weight * len(self.rooms) * options.longest
            fill = yield from self._fill(fits_somewhere(options, self.rooms), fill, cost)
        if self.best is None:
            yield from self._greedily()
        yield from self._exchanges()

    def _offer(self, choice: Choice) -> Generator[Choice, bool, bool]:
        self._tried.add(tuple(choice))
        fits = yield choice
        return fits

    def _fill(self, allowed: NDArray[np.bool_], start: int, cost: Floats | None = None) -> Generator[Choice, bool, int]:
        """Offer choices that leave ever more memory free, until one fits: which of FILLS did. `cost` is of `cheapest_within`."""
        assert self.rooms is not None
        for fill in range(start, len(FILLS)):
            filled, piece = FILLS[fill]
            choice = cheapest_within(self.options, allowed & self._in_pieces(allowed, piece), self.rooms * filled, cost)
            if choice is None:
                break
            if tuple(choice) in self._tried:
                continue
            if (yield from self._offer(choice)):
                return fill
        return start

    def _shorter(self, longest: float) -> NDArray[np.bool_]:
        """Options of no shard that takes longer; of a table without such an option, those of the shortest shards."""
        assert self.rooms is not None
        allowed = fits_somewhere(self.options, self.rooms)
        shortest = np.full(self.options.num_tables, np.inf)
        np.minimum.at(shortest, self.options.table[allowed], self.options.longest[allowed])
        return np.asarray(allowed & (self.options.longest <= np.maximum(longest, shortest[self.options.table])))

    def _of_type(self, kind: str) -> NDArray[np.bool_]:
        """Options of a sharding type; of a table that has none of it, all."""
        assert self.rooms is not None
        fits = fits_somewhere(self.options, self.rooms)
        of_type = fits & np.array([option.sharding_type == kind for option in self.options.options])
        has = np.zeros(self.options.num_tables, np.bool_)
        has[self.options.table[of_type]] = True
        return np.asarray(of_type | (fits & ~has[self.options.table]))

    def _in_pieces(self, allowed: NDArray[np.bool_], piece: float) -> NDArray[np.bool_]:
        """Options of no shard that takes more of a rank; of a table without such an option, those in the smallest pieces."""
        assert self.rooms is not None
        taken = (self.options.largest / np.maximum(self.rooms.max(axis=0), 1)).max(axis=1)
        smallest = np.full(self.options.num_tables, np.inf)
        np.minimum.at(smallest, self.options.table[allowed], taken[allowed])
        return np.asarray(taken <= np.maximum(piece, smallest[self.options.table]))

    def _greedily(self) -> Generator[Choice, bool, None]:
        """Where nothing has fitted: what TorchRec's greedy proposer walks through, up to the first that does."""
        greedy, number = GreedyProposer(), {id(option): index for index, option in enumerate(self.options.options)}
        greedy.load(self.options.options)
        for _ in range(min(GREEDY[1], max(GREEDY[0], GREEDY[2] // self.options.num_tables))):
            proposal = greedy.propose()
            if proposal is None or self.best is not None:
                return
            choice = sorted((number[id(option)] for option in proposal), key=lambda index: int(self.options.table[index]))
            if not (yield from self._offer(choice)):
                greedy.feedback(partitionable=False, plan=proposal)

    def _exchanges(self) -> Generator[Choice, bool, None]:
        """From the best choice on, one exchange after another that makes the slowest rank faster; what comes of it is offered."""
        if self.best is None:
            return
        rating, choice, ranks = self.best
        left = max(EXCHANGES[0], EXCHANGES[1] // self.options.num_tables)
        while (found := self._exchange(rating, choice, ranks, left)) is not None:
            ranks, choice, tried = found
            rating, left = ranks.worst, left - tried
        if choice != self.best[1]:
            yield from self._offer(choice)

    def _exchange(self, rating: float, choice: Choice, ranks: Ranks, most: int) -> tuple[Ranks, Choice, int] | None:
        """The first of `most` exchanges that helps, and how many were tried."""
        for tried, changed in enumerate(islice(self._exchanged(choice, self._slowest_first(choice, ranks)), most), 1):
            placed = self.placer.place([self.options.options[index] for index in changed], thorough=False)
            if placed is not None and placed.worst < rating * (1 - HELPS):
                return placed, changed, tried
        return None

    def _slowest_first(self, choice: Choice, ranks: Ranks) -> list[int]:
        """Tables, those first that take longest on the slowest rank."""
        slowest, where = int(ranks.load.argmax()), {id(shard): rank for shard, rank in ranks.places()}
        there = [sum(perf_of(shard) for shard in self.options.options[index].shards if where[id(shard)] == slowest) for index in choice]
        return sorted(range(len(choice)), key=lambda table: -there[table])

    def _exchanged(self, choice: Choice, tables: list[int]) -> Iterator[Choice]:
        """The choice with one other option of a table, the options that take least time first; of few tables also with two."""
        changes = [(table, other) for table in tables for other in self._others(table) if other != choice[table]]
        pairs = combinations(changes, 2) if len(tables) <= FEW_TABLES else []
        for changed in chain(((change,) for change in changes), pairs):
            if len({table for table, _ in changed}) == len(changed):
                other = choice.copy()
                for table, option in changed:
                    other[table] = option
                yield other

    def _others(self, table: int) -> list[int]:
        assert self.rooms is not None
        found = np.flatnonzero((self.options.table == table) & fits_somewhere(self.options, self.rooms))
        most = len(found) if self.options.num_tables <= FEW_TABLES else OTHERS
        cheapest: list[int] = found[np.argsort(self.options.total[found], kind="stable")][:most].tolist()
        return cheapest


def cheapest_within(options: Options, allowed: NDArray[np.bool_], rooms: Floats, cost: Floats | None = None) -> Choice | None:
    """Of each table the allowed option of the least `cost` (the time of all its shards, where it is None), at the lowest price of memory at
    which all together fit `rooms`, [ranks, 3].

    None when that is not found: a table has no allowed option, or no price is high enough.
    """
    share = shares(options, rooms)
    taken = share * np.ones(3)
    weights = np.ones(3)
    cost = options.total if cost is None else cost
    choice = options.cheapest(cost, allowed)
    if choice is None or (taken[choice].sum(axis=0) <= 1).all():
        return choice
    scale = max(float(cost[choice].sum()), 1e-9)
    for _ in range(6):
        found = _at_lowest_price(options, allowed, share, weights, scale, cost)
        if isinstance(found, list):
            return found
        weights = np.where(found > 1, weights * 4, weights)  # one kind of memory is short, not the other
    return None


def _at_lowest_price(
    options: Options, allowed: NDArray[np.bool_], share: Floats, weights: Floats, scale: float, cost: Floats
) -> Choice | Floats:
    """The choice; or, where no price is high enough, what the choice at the highest takes of each kind of memory."""

    def at(price: float) -> tuple[Choice, Floats]:
        choice = options.cheapest(cost + price * (share @ weights), allowed)
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

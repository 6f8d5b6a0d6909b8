"""Where shards lie: the slowest rank as fast as can be, none above its memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.planner.types import PartitionByType, Shard, ShardingOption
from torchrec.distributed.types import ShardingType

from escm2rec.planning.options import Floats, perf_of, storage_of

SWAP_RANKS = 16  # of the least loaded: with which the slowest rank tries to swap shards
SWAPS = 400  # at the most
BALANCED = 1e-3  # above the mean: good enough
LIMITS = 8  # that are tried between the mean and what is reached


@dataclass(frozen=True)
class Unit:
    """Shards that are placed together: one; those of a table on hosts (`groups` of them, a host each); or one on every rank."""

    shards: list[Shard]
    perfs: Floats
    storages: Floats  # [shards, 3]
    groups: int = 0
    alike: bool = False  # one shard on each rank of the host, in order
    everywhere: bool = False

    @property
    def perf(self) -> float:
        return float(self.perfs.max())


class Placer:
    """Places options on ranks that have `rooms`, [ranks, 3] bytes, in hosts of `group` ranks."""

    def __init__(self, rooms: Floats, group: int) -> None:
        self.rooms, self.group = rooms, group
        self._units: dict[int, tuple[ShardingOption, list[Unit]]] = {}

    def place(self, options: Sequence[ShardingOption], thorough: bool = True) -> Ranks | None:
        """The best that is found; None where nothing fits.

        Longest first, to the least loaded rank with room; where memory is short, largest first. Then moves and swaps away from the slowest
        rank. `thorough` also fills ranks one by one up to a limit, and looks for the lowest limit that holds all (MULTIFIT, Coffman and
        others 1978).
        """
        units = [unit for option in options for unit in self.units(option)]
        best: Ranks | None = None
        for by_memory in (False, True):
            placed = self._greedily(units, by_memory)
            if placed is not None and (best is None or placed.worst < best.worst):
                best = placed
            if best is not None and (best.is_balanced or not thorough):
                break
        if best is None or best.is_balanced or not thorough:
            return best
        low, high = float(best.load.mean()), best.worst
        for _ in range(LIMITS):
            limit = (low + high) / 2
            placed = self._greedily(units, by_memory=False, limit=limit)
            if placed is None:
                low = limit
                continue
            high = min(limit, placed.worst)
            if placed.worst < best.worst:
                best = placed
        return best

    def _greedily(self, units: Sequence[Unit], by_memory: bool, limit: float = float("inf")) -> Ranks | None:
        ranks = Ranks(self.rooms, self.group)
        if not ranks.place(_sorted(units, self.rooms, by_memory), limit):
            return None
        ranks.improve()
        return ranks

    def units(self, option: ShardingOption) -> list[Unit]:
        """What is to be placed of an option."""
        if id(option) not in self._units:
            self._units[id(option)] = option, _units(option, self.group)  # the option is kept, so that its id stays its own
        return self._units[id(option)][1]


class Ranks:
    """What each rank has got so far."""

    def __init__(self, rooms: Floats, group: int) -> None:
        self.load = np.zeros(len(rooms))
        self.room = rooms.copy()
        self.group = group
        # Where loads are equal, hosts take turns: a host's memory is shared by its ranks.
        self.turns = np.argsort(np.arange(len(rooms)) % group, kind="stable")
        self.assigned: list[tuple[Shard, int]] = []
        self.movable: list[tuple[Shard, float, Floats, int]] = []

    @property
    def worst(self) -> float:
        """Ms of the slowest."""
        return float(self.load.max())

    def place(self, units: Sequence[Unit], limit: float) -> bool:
        """Each unit where it ends first; single shards, with a limit, on the first rank that stays below it; whether all fit."""
        return all(self._place_unit(unit, limit) for unit in units)

    def _place_unit(self, unit: Unit, limit: float) -> bool:
        if unit.everywhere:
            if len(unit.shards) != len(self.load) or not (self.room >= unit.storages).all():
                return False
            self._take_all(unit.shards, np.arange(len(self.load)), unit.perfs, unit.storages)
            return True
        return self._place_one(unit, limit) if unit.groups == 0 else self._place_on_hosts(unit)

    def _place_one(self, unit: Unit, limit: float) -> bool:
        rank = self._least_loaded(unit.storages[0], self.turns) if limit == float("inf") else self._first(unit, limit)
        if rank is None:
            return False
        self.load[rank] += unit.perfs[0]
        self.room[rank] -= unit.storages[0]
        self.movable.append((unit.shards[0], float(unit.perfs[0]), unit.storages[0], rank))
        return True

    def _place_on_hosts(self, unit: Unit) -> bool:
        size = len(unit.shards) // unit.groups
        taken: set[int] = set()
        for first in range(0, len(unit.shards), size):
            part = slice(first, first + size)
            hosts = self._hosts_by_end(unit.perfs[part], taken)
            placed = next((host for host in hosts if self._place_in(host, unit, part)), None)
            if placed is None:
                return False
            taken.add(placed)
        return True

    def _hosts_by_end(self, perfs: Floats, taken: set[int]) -> list[int]:
        """Hosts, those first that would be done first; those that have a part of the table come last."""
        loads = self.load.reshape(-1, self.group)
        ends = (loads + perfs.mean()).max(axis=1)
        return sorted(range(len(loads)), key=lambda host: (host in taken, ends[host], loads[host].sum()))

    def _place_in(self, host: int, unit: Unit, part: slice) -> bool:
        ranks = np.arange(host * self.group, (host + 1) * self.group)
        shards, perfs, storages = unit.shards[part], unit.perfs[part], unit.storages[part]
        if unit.alike:
            if not (self.room[ranks] >= storages).all():
                return False
            self._take_all(shards, ranks, perfs, storages)
            return True
        load, room, chosen = self.load.copy(), self.room.copy(), []
        for shard, perf, storage in zip(shards, perfs, storages, strict=True):
            rank = self._least_loaded(storage, ranks)
            if rank is None:
                self.load, self.room = load, room
                return False
            self.load[rank] += perf
            self.room[rank] -= storage
            chosen.append((shard, rank))
        self.assigned += chosen
        return True

    def _least_loaded(self, storage: Floats, ranks: NDArray[np.int64]) -> int | None:
        fits = (self.room[ranks] >= storage).all(axis=1)
        if not fits.any():
            return None
        return int(ranks[np.argmin(np.where(fits, self.load[ranks], np.inf))])

    def _first(self, unit: Unit, limit: float) -> int | None:
        fits = (self.room >= unit.storages[0]).all(axis=1) & (self.load + unit.perfs[0] <= limit)
        return int(fits.argmax()) if fits.any() else None

    def _take_all(self, shards: list[Shard], ranks: NDArray[np.int64], perfs: Floats, storages: Floats) -> None:
        self.load[ranks] += perfs
        self.room[ranks] -= storages
        self.assigned += zip(shards, ranks.tolist(), strict=True)

    @property
    def is_balanced(self) -> bool:
        """Whether no other places could make the slowest rank much faster."""
        return bool(self.load.max() <= self.load.mean() * (1 + BALANCED))

    def improve(self) -> None:
        """Move a shard of the slowest rank, or swap it, as long as that makes the slower of the two ranks faster."""
        if not self.movable:
            return
        perfs = np.array([perf for _, perf, _, _ in self.movable])
        storages = np.array([storage for _, _, storage, _ in self.movable])
        where = np.array([rank for *_, rank in self.movable])
        for _ in range(SWAPS):
            if self.is_balanced or not self._step(perfs, storages, where):
                break
        self.movable = [(shard, perf, storage, rank) for (shard, perf, storage, _), rank in zip(self.movable, where.tolist(), strict=True)]

    def _step(self, perfs: Floats, storages: Floats, where: NDArray[np.int64]) -> bool:
        slowest = int(self.load.argmax())
        mine = np.flatnonzero(where == slowest)
        if not len(mine):
            return False
        others = np.argsort(self.load, kind="stable")[:SWAP_RANKS]
        others = others[others != slowest]
        theirs = np.flatnonzero(np.isin(where, others))
        # Against no shard (a move), one column a rank; then against each shard of theirs.
        back_perf = np.concatenate((np.zeros(len(others)), perfs[theirs]))
        back_storage = np.concatenate((np.zeros((len(others), 3)), storages[theirs]))
        rank = np.concatenate((others, where[theirs]))
        given = perfs[mine][:, None] - back_perf
        ends = np.maximum(self.load[slowest] - given, self.load[rank] + given)
        moved = storages[mine][:, None] - back_storage
        fits = (moved <= self.room[rank]).all(axis=2) & (-moved <= self.room[slowest]).all(axis=2)
        ends = np.where(fits, ends, np.inf)
        shard, partner = np.unravel_index(ends.argmin(), ends.shape)
        if not ends[shard, partner] < self.load[slowest] * (1 - 1e-9):
            return False
        to = int(rank[partner])
        self.load[[slowest, to]] += np.array([-1, 1]) * given[shard, partner]
        self.room[slowest] += moved[shard, partner]
        self.room[to] -= moved[shard, partner]
        where[mine[shard]] = to
        if partner >= len(others):
            where[theirs[partner - len(others)]] = slowest
        return True

    def places(self) -> Iterator[tuple[Shard, int]]:
        """All shards, each with its rank."""
        yield from self.assigned
        yield from ((shard, rank) for shard, _, _, rank in self.movable)

    def write(self) -> None:
        """Give the shards their ranks."""
        for shard, rank in self.places():
            shard.rank = rank

    @classmethod
    def of(cls, plan: Sequence[ShardingOption], rooms: Floats) -> Ranks:
        """What the shards of a plan say of where they are."""
        ranks = cls(rooms, 1)
        for option in plan:
            where = np.array([shard.rank for shard in option.shards])
            np.add.at(ranks.load, where, _perfs(option.shards))
            np.subtract.at(ranks.room, where, _storages(option.shards))
            ranks.assigned += zip(option.shards, where.tolist(), strict=True)
        return ranks


def _units(option: ShardingOption, group: int) -> list[Unit]:
    perfs, storages = _perfs(option.shards), _storages(option.shards)
    if option.partition_by == PartitionByType.UNIFORM.value:
        return [Unit(option.shards, perfs, storages, everywhere=True)]
    if option.partition_by == PartitionByType.DEVICE.value:
        return [Unit([shard], perfs[i : i + 1], storages[i : i + 1]) for i, shard in enumerate(option.shards)]
    by_rows = option.sharding_type != ShardingType.TABLE_COLUMN_WISE.value
    return [Unit(option.shards, perfs, storages, len(option.shards) // group if by_rows else 1, by_rows)]


def _sorted(units: Sequence[Unit], rooms: Floats, by_memory: bool) -> list[Unit]:
    """Those on every rank first, then those on hosts, which need room on many; then the longest first, or the largest."""
    whole = np.maximum(rooms.max(axis=0), 1)
    return sorted(
        units,
        key=lambda unit: (not unit.everywhere, unit.groups == 0, -float((unit.storages / whole).max()) if by_memory else -unit.perf),
    )


def _perfs(shards: Sequence[Shard]) -> Floats:
    return np.array([perf_of(shard) for shard in shards])


def _storages(shards: Sequence[Shard]) -> Floats:
    return np.array([storage_of(shard) for shard in shards], np.float64)

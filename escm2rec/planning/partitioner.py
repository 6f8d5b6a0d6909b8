"""Ranks for the shards of a proposal: the slowest rank as fast as can be, none above its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.planner.types import (
    PartitionByType,
    Partitioner,
    PlannerError,
    PlannerErrorType,
    Shard,
    ShardingOption,
    Topology,
)
from torchrec.distributed.types import ShardingType

from escm2rec.planning.options import Floats, perf_of, rooms_of, storage_of

SWAP_RANKS = 16  # of the least loaded: with which the slowest rank tries to swap shards
SWAPS = 400  # at the most
BALANCED = 1e-3  # above the mean: good enough


@dataclass(frozen=True)
class _Unit:
    """Shards that are placed together: one, or those of a table that must share a host (`groups` of them, a host each)."""

    shards: list[Shard]
    perfs: Floats
    storages: Floats  # [shards, 3]
    groups: int = 0
    alike: bool = False  # one shard on each rank of the host, in order

    @property
    def perf(self) -> float:
        return float(self.perfs.max())


class Partitioning(Partitioner):
    """Longest first to the least loaded rank with room; then moves and swaps away from the slowest rank.

    Tried by time and, where memory is short, by memory; the faster of the two is taken. PlannerError where neither fits.
    """

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Set `rank` of all shards of the proposal, which is returned; `storage_constraint` stays as it is."""
        best: _Ranks | None = None
        uniform, units = _units(proposal, storage_constraint.intra_group_size)
        rooms = rooms_of(storage_constraint)
        for by_memory in (False, True):
            ranks = _Ranks(rooms, storage_constraint.intra_group_size)
            if not ranks.place_everywhere(uniform):
                raise _does_not_fit("the shards that every rank has one of")
            if ranks.place(_sorted(units, rooms, by_memory)):
                ranks.improve()
                if best is None or ranks.load.max() < best.load.max():
                    best = ranks
                if not by_memory and best.is_balanced:
                    break
        if best is None:
            raise _does_not_fit("the shards")
        best.write()
        return proposal


class _Ranks:
    """What each rank has got so far."""

    def __init__(self, rooms: Floats, group: int) -> None:
        self.load = np.zeros(len(rooms))
        self.room = rooms.copy()
        self.group = group
        # Where loads are equal, hosts take turns: a host's memory is shared by its ranks.
        self.turns = np.argsort(np.arange(len(rooms)) % group, kind="stable")
        self.assigned: list[tuple[Shard, int]] = []
        self.movable: list[tuple[Shard, float, Floats, int]] = []

    def place_everywhere(self, options: Sequence[ShardingOption]) -> bool:
        """Shard i of each option to rank i; whether all fit."""
        for option in options:
            if len(option.shards) != len(self.load):
                return False
            self._take_all(option.shards, np.arange(len(self.load)), _perfs(option.shards), _storages(option.shards))
        return bool((self.room >= 0).all())

    def place(self, units: Sequence[_Unit]) -> bool:
        """Each unit where it ends first; whether all fit."""
        return all(self._place_one(unit) if unit.groups == 0 else self._place_on_hosts(unit) for unit in units)

    def _place_one(self, unit: _Unit) -> bool:
        rank = self._least_loaded(unit.storages[0], self.turns)
        if rank is None:
            return False
        self.load[rank] += unit.perfs[0]
        self.room[rank] -= unit.storages[0]
        self.movable.append((unit.shards[0], float(unit.perfs[0]), unit.storages[0], rank))
        return True

    def _place_on_hosts(self, unit: _Unit) -> bool:
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

    def _place_in(self, host: int, unit: _Unit, part: slice) -> bool:
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

    def write(self) -> None:
        """Give the shards their ranks."""
        for shard, rank in self.assigned:
            shard.rank = rank
        for shard, _, _, rank in self.movable:
            shard.rank = rank


def _units(proposal: Sequence[ShardingOption], group: int) -> tuple[list[ShardingOption], list[_Unit]]:
    """Options that every rank has a shard of, and what is to be placed."""
    uniform: list[ShardingOption] = []
    units: list[_Unit] = []
    for option in proposal:
        if option.partition_by == PartitionByType.UNIFORM.value:
            uniform.append(option)
            continue
        perfs, storages = _perfs(option.shards), _storages(option.shards)
        if option.partition_by == PartitionByType.DEVICE.value:
            units += [_Unit([shard], perfs[i : i + 1], storages[i : i + 1]) for i, shard in enumerate(option.shards)]
        else:
            by_rows = option.sharding_type != ShardingType.TABLE_COLUMN_WISE.value
            units.append(_Unit(option.shards, perfs, storages, len(option.shards) // group if by_rows else 1, by_rows))
    return uniform, units


def _sorted(units: list[_Unit], rooms: Floats, by_memory: bool) -> list[_Unit]:
    """Those on hosts first, which need room on many ranks; then the longest first, or the largest."""
    whole = np.maximum(rooms.max(axis=0), 1)
    return sorted(units, key=lambda unit: (unit.groups == 0, -float((unit.storages / whole).max()) if by_memory else -unit.perf))


def _perfs(shards: Sequence[Shard]) -> Floats:
    return np.array([perf_of(shard) for shard in shards])


def _storages(shards: Sequence[Shard]) -> Floats:
    return np.array([storage_of(shard) for shard in shards], np.float64)


def _does_not_fit(what: str) -> PlannerError:
    return PlannerError(f"{what} do not fit the ranks", PlannerErrorType.PARTITION)

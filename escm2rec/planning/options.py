"""The options of a search space as numbers, for a search that looks at all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption, Storage, Topology

Floats = NDArray[np.float64]


def perf_of(shard: Shard) -> float:
    """Estimated time of a shard, ms a step."""
    assert isinstance(shard.perf, Perf)
    return float(shard.perf.total)


def storage_of(shard: Shard) -> tuple[int, int, int]:
    """What a shard takes, bytes: of the device, of the host, of a disk."""
    assert isinstance(shard.storage, Storage)
    return shard.storage.hbm, shard.storage.ddr, shard.storage.ssd


def rooms_of(topology: Topology) -> Floats:
    """What each rank has for tables, bytes: [ranks, 3], as `storage_of`."""
    return np.array([(device.storage.hbm, device.storage.ddr, device.storage.ssd) for device in topology.devices], np.float64)


@dataclass(frozen=True)
class Options:
    """All options of a search space, side by side, and which table each is of."""

    options: list[ShardingOption]
    table: NDArray[np.int64]  # [options], counted from 0
    num_tables: int
    total: Floats  # [options] ms over all shards
    longest: Floats  # [options] ms of the slowest shard
    bytes: Floats  # [options, 3] over all shards
    largest: Floats  # [options, 3] of one shard, at the most

    @classmethod
    def of(cls, search_space: Sequence[ShardingOption]) -> Options:
        """Those of a priced search space."""
        tables: dict[str, int] = {}
        number = [tables.setdefault(option.fqn, len(tables)) for option in search_space]
        total, longest, taken, largest = [], [], [], []
        for option in search_space:
            perfs, storages = _distinct(option)
            total.append(sum(perf * count for perf, count in perfs.items()))
            longest.append(max(perfs))
            taken.append([sum(each[kind] * count for each, count in storages.items()) for kind in range(3)])
            largest.append([max(each[kind] for each in storages) for kind in range(3)])
        return cls(
            list(search_space),
            np.array(number, np.int64),
            len(tables),
            np.array(total),
            np.array(longest),
            np.array(taken, np.float64),
            np.array(largest, np.float64),
        )

    def cheapest(self, cost: Floats, allowed: NDArray[np.bool_]) -> list[int] | None:
        """Of each table the allowed option of the least cost, the one with the shorter shards where two cost the same; None where a
        table has none that is allowed."""
        order = np.lexsort((self.longest, cost, ~allowed, self.table))
        first = order[np.concatenate(([True], np.diff(self.table[order]) > 0))]
        return first.tolist() if allowed[first].all() else None


def _distinct(option: ShardingOption) -> tuple[dict[float, int], dict[tuple[int, int, int], int]]:
    """Prices of the shards, each with how many have it."""
    counts: dict[tuple[int, int], tuple[Shard, int]] = {}
    for shard in option.shards:  # those of one size share their price
        key = (id(shard.perf), id(shard.storage))
        counts[key] = (shard, counts[key][1] + 1 if key in counts else 1)
    perfs: dict[float, int] = {}
    storages: dict[tuple[int, int, int], int] = {}
    for shard, count in counts.values():
        perfs[perf_of(shard)] = perfs.get(perf_of(shard), 0) + count
        storages[storage_of(shard)] = storages.get(storage_of(shard), 0) + count
    return perfs, storages

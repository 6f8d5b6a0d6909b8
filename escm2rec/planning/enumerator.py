"""TorchRec's ways to shard each table, priced once a size of shard.

TorchRec's enumerator prices every shard of every option by itself, though all shards of an option have one of two or three sizes, and
copies the whole search space by `copy.deepcopy`: 132 s for 1,000 tables on 128 ranks. Here shards of one size share one price, which is
TorchRec's own, and a copy of a shard shares what nobody changes.

TorchRec takes the rows of a table to be looked up alike. Where it is known that they are not, a block of rows is priced by the ids that
it is asked for: as TorchRec prices a block of a table whose lists are longer or shorter by that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Self, cast

import numpy as np
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardEstimator, ShardingOption, Storage

from escm2rec.planning.popularity import Popularity, shares_of_rows
from escm2rec.sharding.planner import ALL_TYPES

BY_ROWS = ("row_wise", "table_row_wise", "grid_shard")
LEAST_FACTOR = 1e-3


class PricedShard(Shard):
    """A shard whose size, offset, storage and perf are never changed in place, so that copies share them.

    Its hash is that of its identity: the planner asks for hashes to know a proposal again, and a proposal is of the same shards.
    """

    __hash__ = object.__hash__

    def copy(self) -> PricedShard:
        """The same place and price, another rank."""
        return PricedShard(self.size, self.offset, self.storage, self.perf, self.rank)


class Shards(list[Shard]):
    """The shards of one option; a deep copy has copies of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(cast(PricedShard, shard).copy() for shard in self)


class Enumerator(EmbeddingEnumerator):
    """`EmbeddingEnumerator`, with the same options, sizes and prices, in an order that is the same in every process.

    TorchRec's is that of a set of texts. Of options that cost the same a search takes the first: here those that bind fewer ranks.
    """

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], sharder_key: str = "") -> list[str]:
        found = super()._filter_sharding_types(name, allowed_sharding_types, sharder_key)
        return sorted(found, key=ALL_TYPES.index)

    def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], sharding_type: str) -> list[str]:
        return sorted(super()._filter_compute_kernels(name, allowed_compute_kernels, sharding_type))

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
        estimators: list[ShardEstimator],
        popularity: Mapping[str, Popularity] | None = None,
    ) -> None:
        """`popularity` is of the tables whose rows are not looked up alike, by name."""
        super().__init__(topology, batch_size, constraints, estimators)
        self._popularity = popularity or {}

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Price all shards in place, those of one size and popularity alike."""
        parts = [self._parts(option) for option in sharding_options]
        super().populate_estimates([part for _, by_factor in parts for part in by_factor.values()])
        for option, (factors, by_factor) in zip(sharding_options, parts, strict=True):
            priced = {(factor, *shard.size): shard for factor, part in by_factor.items() for shard in part.shards}
            option.shards = Shards(_like(shard, priced[factor, *shard.size]) for shard, factor in zip(option.shards, factors, strict=True))
            option.is_weighted = next(iter(by_factor.values())).is_weighted
            if option.sharding_type == "data_parallel":
                _count_gradients(option)

    def _parts(self, option: ShardingOption) -> tuple[list[float], dict[float, ShardingOption]]:
        """Of each shard by what its ids are more than an equal part of all, and options to price, one a factor, with a shard a size."""
        popularity = self._popularity.get(option.name, ())
        factors = [1.0] * len(option.shards)
        if popularity and option.sharding_type in BY_ROWS:
            blocks = len(option.shards) // len({shard.offset[1] for shard in option.shards})
            factors = [_rounded(blocks * share_of(popularity, shard)) for shard in option.shards]
        parts = {}
        for factor in dict.fromkeys(factors):
            part = parts[factor] = copy.copy(option)
            part.input_lengths = [length * factor for length in option.input_lengths]
            part.shards = _one_a_size(shard for shard, its in zip(option.shards, factors, strict=True) if its == factor)
        return factors, parts


def share_of(popularity: Popularity, shard: Shard) -> float:
    """Of the table's lookups, those of a shard's rows."""
    first, rows = shard.offset[0], shard.size[0]
    return float(shares_of_rows(popularity, np.array([first, first + rows]))[0])


def _rounded(factor: float) -> float:
    """To three digits, so that fewer are priced; an estimate of no ids at all would divide by them."""
    return max(LEAST_FACTOR, float(f"{factor:.3g}"))


def _count_gradients(option: ShardingOption) -> None:
    """Those of a table that every rank holds are as large as it, and so is the buffer that sums them; TorchRec counts neither."""
    gradients = 2 * option.tensor.numel() * option.tensor.element_size()
    first = option.shards[0].storage
    assert first is not None
    on_device = first.hbm > 0
    whole = first + Storage(hbm=gradients if on_device else 0, ddr=0 if on_device else gradients)
    for shard in option.shards:
        shard.storage = whole


def _one_a_size(shards: Iterable[Shard]) -> list[Shard]:
    return list({tuple(shard.size): Shard(size=shard.size, offset=shard.offset) for shard in shards}.values())


def _like(shard: Shard, priced: Shard) -> PricedShard:
    return PricedShard(shard.size, shard.offset, priced.storage, priced.perf, shard.rank)

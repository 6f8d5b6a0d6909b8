"""TorchRec's ways to shard each table, priced once a size of shard.

TorchRec's enumerator prices every shard of every option by itself, though all shards of an option have one of two or three sizes, and
copies the whole search space by `copy.deepcopy`: 132 s for 1,000 tables on 128 ranks. Here shards of one size share one price, which is
TorchRec's own, and a copy of a shard shares what nobody changes.

TorchRec takes the rows of a table to be looked up alike. Where it is known that they are not, a block of rows is priced by the ids that
it is asked for: its lookups and the ids that it gets are more or fewer by that; what it pools and sends back is as much as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Self, cast

import numpy as np
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, Perf, Shard, ShardEstimator, ShardingOption, Storage

from escm2rec.planning.options import storage_of
from escm2rec.planning.popularity import Lookups, Popularity, shares_of_rows
from escm2rec.sharding.planner import ALL_TYPES

BY_ROWS = ("row_wise", "table_row_wise", "grid_shard")


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

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], sharder_key: str = "") -> list[str]:
        found = super()._filter_sharding_types(name, allowed_sharding_types, sharder_key)
        return sorted(found, key=ALL_TYPES.index)

    def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], sharding_type: str) -> list[str]:
        return sorted(super()._filter_compute_kernels(name, allowed_compute_kernels, sharding_type))

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Price all shards in place, those of one size and popularity alike."""
        parts = [self._parts(option) for option in sharding_options]
        super().populate_estimates([part for of_option in parts for part in of_option])
        for option, of_option in zip(sharding_options, parts, strict=True):
            priced = [{tuple(shard.size): shard for shard in part.shards} for part in of_option]
            option.is_weighted = of_option[0].is_weighted
            if len(priced) == 1:
                option.shards = Shards(_like(shard, priced[0][tuple(shard.size)]) for shard in option.shards)
            else:
                self._price_blocks(option, priced)
            if option.sharding_type == "data_parallel":
                _count_gradients(option)

    def _parts(self, option: ShardingOption) -> list[ShardingOption]:
        """What to price of an option, a shard a size: itself; where blocks of rows differ in ids, also with an id an impression more.

        TorchRec counts as many outputs as ids where there are fewer of these than impressions, so that the two of which the difference is
        taken have lists of one id and more.
        """
        lengths = [option.input_lengths]
        if self._popularity.get(option.name) and option.sharding_type in BY_ROWS:
            lengths += [[max(1.0, length) + more for length in option.input_lengths] for more in (0.0, 1.0)]
        parts = []
        for each in lengths:
            part = copy.copy(option)
            part.input_lengths, part.shards = each, _one_a_size(option.shards)
            parts.append(part)
        return parts

    def _price_blocks(self, option: ShardingOption, priced: list[dict[tuple[int, ...], Shard]]) -> None:
        """By the ids that each block of rows is asked for: all that depends on them does so linearly, and what is sent back does not."""
        popularity, (length, *_) = self._popularity[option.name], option.input_lengths
        blocks = len(option.shards) // len({shard.offset[1] for shard in option.shards})
        misses = _misses(option, popularity)
        shards: dict[tuple[int, ...], PricedShard] = {}
        for shard in option.shards:
            block = (*shard.size, shard.offset[0])
            if block not in shards:
                own, one, two = (each[tuple(shard.size)] for each in priced)
                more = length * (blocks * share_of(popularity, shard) - 1)  # ids an impression, than an equal part of all
                perf = _moved(own.perf, one.perf, two.perf, more)
                perf.prefetch_compute *= blocks * misses(shard)
                shards[block] = PricedShard(shard.size, shard.offset, _moved_bytes(own, one, two, more), perf)
        option.shards = Shards(_like(shard, shards[(*shard.size, shard.offset[0])]) for shard in option.shards)


def share_of(popularity: Popularity, shard: Shard) -> float:
    """Of the table's lookups, those of a shard's rows."""
    first, rows = shard.offset[0], shard.size[0]
    return float(shares_of_rows(popularity, np.array([first, first + rows]))[0])


def _misses(option: ShardingOption, popularity: Popularity) -> Callable[[Shard], float]:
    """Of the misses of the table's cache, as TorchRec has them, those that a block has, each of which has a cache of its own."""
    cache = option.cache_params
    if cache is None or not isinstance(cache.stats, Lookups) or option.compute_kernel != "fused_uvm_caching":
        return lambda shard: 0.0
    whole = cache.stats.expected_lookups * cache.stats.expected_miss_rate(cache.load_factor or 0.0)

    def of_block(shard: Shard) -> float:
        assert isinstance(cache.stats, Lookups)
        block = cache.stats.of_rows(shard.offset[0], shard.offset[0] + shard.size[0])
        return 0.0 if block is None or not whole else block.expected_lookups * block.expected_miss_rate(cache.load_factor or 0.0) / whole

    return of_block


def _moved(own: Perf, one: Perf, two: Perf, more: float) -> Perf:
    """A price at so many more ids an impression, by what one more costs."""

    def at(name: str) -> float:
        before, after = float(getattr(one, name)), float(getattr(two, name))
        return max(0.0, float(getattr(own, name)) + more * (after - before))

    return Perf(**{each.name: at(each.name) for each in fields(Perf)})


def _moved_bytes(own: Shard, one: Shard, two: Shard, more: float) -> Storage:
    """The same of bytes."""
    kinds = zip(*(storage_of(each) for each in (own, one, two)), strict=True)
    hbm, ddr, ssd = (max(0, round(at + more * (after - before))) for at, before, after in kinds)
    return Storage(hbm=hbm, ddr=ddr, ssd=ssd)


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

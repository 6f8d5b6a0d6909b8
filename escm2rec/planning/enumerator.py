"""TorchRec's ways to shard each table, priced once a size of shard.

TorchRec's enumerator prices every shard of every option by itself, though all shards of an option have one of two or three sizes, and
copies the whole search space by `copy.deepcopy`: 132 s for 1,000 tables on 128 ranks. Here shards of one size share one price, which is
TorchRec's own, and a copy of a shard shares what nobody changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, cast

from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import Shard, ShardingOption, Storage

from escm2rec.sharding.planner import ALL_TYPES


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

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Price all shards in place, those of one size and option alike."""
        every = [option.shards for option in sharding_options]
        for option in sharding_options:
            option.shards = _one_a_size(option.shards)
        super().populate_estimates(sharding_options)
        for option, shards in zip(sharding_options, every, strict=True):
            priced = {tuple(shard.size): shard for shard in option.shards}
            option.shards = Shards(_like(shard, priced[tuple(shard.size)]) for shard in shards)
            if option.sharding_type == "data_parallel":
                _count_gradients(option)


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

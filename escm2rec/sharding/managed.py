"""Tables whose rows are given to values in training: TorchRec's managed collisions, on cores and GPUs, with rows that begin by their value.

A value comes as its hash, in [0, 2^62) (`schema.MANAGED_IDS`). Hashes are cut into as many equal ranges as there are ranks, and each rank
has its share of the rows for its own range. In a step that trains, each value of the global batch that has no row takes a free one of its
rank's; where none is free, that of the value that was met the longest ago, but not in this step. The last row of each rank's is for the
values that have none: new ones where nothing trains, and those of a step that meets more values than there are rows. It is always 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import LRU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from escm2rec.schema import MANAGED_IDS
from escm2rec.sharding.initialise import CHUNK_ROWS, initial_rows

FREE = torch.iinfo(torch.int64).max
"""Stands for the value of a row that no value has."""


class ValueRows(MCHManagedCollisionModule):
    """Which value has which row of this rank's, in the order of the values, and in which step it was met last.

    `_mch_sorted_raw_ids` are the values, `FREE` where there is none; `_mch_remapped_ids_mapping` their rows of the whole table;
    `_mch_last_access_iter` the steps, of which `_current_iter_tensor` counts those that gave rows. The last is for values without one.
    """

    gives = True
    """Whether the next step gives rows, if it is one of a model that trains."""

    @torch.no_grad()
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Give rows to the values of a step that trains; of more than can be had, to the most frequent.

        Cost: a sort of the step's values and a look-up of each; where any is new, some passes over all rows. TorchRec's way, which chooses
        the same values, sorts all rows twice in each step.
        """
        if not (self.gives and self.training):
            return features
        (feature,) = features.values()
        values, counts = torch.unique(feature.values(), return_counts=True)
        self._current_iter_tensor += 1
        known, places = self._match_indices(self._mch_sorted_raw_ids, values)
        self._mch_last_access_iter[places] = self._current_iter_tensor
        new = values[~known]
        if len(new):
            places = self._to_give(len(new))
            frequent = torch.argsort(counts[~known], descending=True, stable=True)[: len(places)]
            self._evicted, self._evicted_emb_indices = True, self._mch_remapped_ids_mapping[places]
            self.given = torch.sort(new[frequent]).values  # the values that these rows have now
            self._replace(places, self.given)
        return features

    def num_taken(self) -> Tensor:
        """How many rows values have, []."""
        return torch.searchsorted(self._mch_sorted_raw_ids, self._delimiter)[0]

    def _to_give(self, count: int) -> Tensor:
        """Places of as many rows, or fewer: free ones, or those whose values were met the longest ago, but not in this step."""
        room, taken = self._zch_size - 1, int(self.num_taken())
        if taken + count <= room:
            return torch.arange(taken, taken + count, device=self.device)
        met = self._mch_last_access_iter[:room]
        count = min(count, int((met < self._current_iter_tensor).sum()))
        order = met * self._zch_size - torch.arange(room, device=self.device)  # no two alike: of free ones, the last
        return torch.topk(order, count, largest=False).indices

    def _replace(self, places: Tensor, new: Tensor) -> None:
        """Put new values, in order, in place of others; values stay in order, and rows with their places."""
        stays = torch.ones(self._zch_size, dtype=torch.bool, device=self.device)
        stays[places] = False
        at = torch.searchsorted(self._mch_sorted_raw_ids[stays], new) + torch.arange(len(new), device=self.device)
        is_new = torch.zeros_like(stays)
        is_new[at] = True
        begins = {"_mch_sorted_raw_ids": new, "_mch_remapped_ids_mapping": self._evicted_emb_indices}
        for name, value in (begins | {"_mch_last_access_iter": self._current_iter_tensor.expand(len(new))}).items():
            buffer = getattr(self, name)
            kept = buffer[stays]
            buffer.masked_scatter_(~is_new, kept)
            buffer[at] = value


class ShardedManagedTables(ShardedManagedCollisionEmbeddingBagCollection):
    """Managed tables over the ranks. `begin` says how a row begins; TorchRec's way leaves that to chance, and to GPUs."""

    begin: tuple[int, float]  # seed and standard deviation, as `initialise_tables` has them

    def values(self) -> Iterator[tuple[str, ValueRows]]:
        """Of each table, which value has which row of this rank's."""
        yield from self._managed_collision_collection._managed_collision_modules.items()

    def weight(self, table: str) -> Tensor:
        """This rank's rows of a table, where they lie."""
        kernel, number = self._table_to_tbe_and_index[table]
        weights: Tensor = kernel.split_embedding_weights()[int(number)]
        return weights

    @torch.no_grad()
    def _evict(self, evictions_per_table: Mapping[str, Tensor | None]) -> None:
        """Called before each look-up: new values begin, and the row of those without one is 0, whatever gradients it had."""
        for table, values in self.values():
            rows, weights = evictions_per_table[table], self.weight(table)
            for start in range(0, 0 if rows is None else len(rows), CHUNK_ROWS):
                assert rows is not None
                self._begin_rows(table, rows[start : start + CHUNK_ROWS], values.given[start : start + CHUNK_ROWS])
            weights[-1] = 0

    def _begin_rows(self, table: str, rows: Tensor, values: Tensor) -> None:
        kernel, number = self._table_to_tbe_and_index[table]
        weights, (seed, std) = self.weight(table), self.begin
        weights[rows] = initial_rows(values, table, seed, std, weights.shape[1]).to(weights.dtype)
        states = kernel.split_optimizer_states()  # a list a table; of SGD, which has none, not even that
        for state in states[int(number)] if states else ():
            state[rows] = 0


class ManagedSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """Shards managed tables by rows, as one sharder of usual tables would."""

    def __init__(self, tables: EmbeddingBagCollectionSharder) -> None:
        super().__init__(tables)

    def shard(
        self,
        module: ManagedCollisionEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedTables:
        """The tables, sharded."""
        assert device is not None
        return ShardedManagedTables(module, params, self._e_sharder, self._mc_sharder, env, device)


def managed_tables(configs: Sequence[EmbeddingBagConfig], device: torch.device) -> ManagedCollisionEmbeddingBagCollection:
    """Managed tables before they are sharded."""

    def rows_of(config: EmbeddingBagConfig) -> ValueRows:
        # 0 buckets, which any number of ranks divides, as the planner asks; sharded, there is one a rank.
        return ValueRows(config.num_embeddings, device, LRU_EvictionPolicy(), 1, MANAGED_IDS, name=config.name, buckets=0)

    rows: dict[str, Any] = {config.name: rows_of(config) for config in configs}
    return ManagedCollisionEmbeddingBagCollection(
        EmbeddingBagCollection(tables=list(configs), device=device), ManagedCollisionCollection(rows, configs)
    )


def managed_in(model: nn.Module) -> set[str]:
    """The names of the managed tables of a model that is not sharded."""
    collections = (module for module in model.modules() if isinstance(module, ManagedCollisionEmbeddingBagCollection))
    return {config.name for module in collections for config in module._managed_collision_collection.embedding_configs()}


def sharded_managed(model: nn.Module) -> list[ShardedManagedTables]:
    """The collections of managed tables of a sharded model."""
    return [module for module in model.modules() if isinstance(module, ShardedManagedTables)]

"""What a table's optimizer holds for a row, under a plan that splits the table's columns otherwise than the checkpoint did.

Row-wise Adagrad and Adam keep one number a row, which TorchRec makes one a row and column shard: of a table of R rows in n column shards,
[n R], shard after shard in the order of their columns, whatever the plan does with the rows. A shard's number becomes the mean, over its
columns, of what the checkpoint holds for them:

    new_k = sum_j |columns of k and of j| / |columns of k| * old_j

So n shards of one width that become one take their plain mean, and a shard that is split is copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from escm2rec.sharding.shards import held, table_of

Columns = list[tuple[int, int]]  # of each column shard, in order: first column, number of columns


class Part(NamedTuple):
    """What a shard of this plan takes from one column shard of the checkpoint."""

    shard: Tensor  # [r], state of some rows
    share: float  # of the shard's columns, those that the other covers
    start: int  # of these rows in the checkpoint's state
    read: Tensor  # [r], what the checkpoint holds there


class Parts(list[Part]):
    """Stands for a table's state where `dcp.load` asks what to read."""

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([part.start]), part.read.shape) for part in self]


class ColumnConversion(DefaultLoadPlanner):
    """Reads a checkpoint as `dcp.load` does by itself, but for states a row of tables whose columns it splits otherwise.

    `tables` names those tables, on every rank, once a model and its optimizer were loaded; `finish` then puts their state in place. Memory:
    one float a row that the rank holds, for each column shard of the checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[str] = []
        self._parts: dict[str, Parts] = {}

    def create_local_plan(self) -> LoadPlan:
        """What this rank holds, as it is asked for.

        The default takes a checkpoint for one of torch 2.3 where it has what this rank has not, and then asks for the state of tables
        that step by SGD, which is empty.
        """
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take the parts to be read in place of the states that they make."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        for name, weight in state_dict.get("model", {}).items() if "optimizer" in state_dict else ():
            saved = metadata.state_dict_metadata.get(f"model.{name}")
            if ".embedding_bags." not in name or not isinstance(saved, TensorStorageMetadata) or saved.size != weight.size():
                continue  # no table, or another model's: that is told where its weights are read
            before = _columns((chunk.offsets, chunk.sizes) for chunk in saved.chunks)
            shards = weight.metadata().shards_metadata if isinstance(weight, ShardedTensor) else []
            now = _columns((shard.shard_offsets, shard.shard_sizes) for shard in shards) or [(0, weight.size(1))]
            if before == now:
                continue
            states = f"optimizer.state.tables.{name}."  # by the names of `combined_optimizer` and TorchRec
            keys = [key for key, known in metadata.state_dict_metadata.items() if key.startswith(states) and _is_of_rows(known)]
            if keys:
                self.tables.append(table_of(name))
            for key in keys:
                if key in self.state_dict:  # this rank holds some of it
                    self._parts[key] = self.state_dict[key] = _parts(self.state_dict[key], weight.size(0), before, now)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where to read into."""
        if index.fqn in self._parts:
            assert index.index is not None
            return self._parts[index.fqn][index.index].read
        return super().lookup_tensor(index)

    def finish(self) -> None:
        """Make the states of what was read."""
        for parts in self._parts.values():
            for part in parts:
                part.shard.zero_()
            for part in parts:
                part.shard.add_(part.read, alpha=part.share)


def _is_of_rows(saved: Any) -> bool:
    return isinstance(saved, TensorStorageMetadata) and len(saved.size) == 1


def _columns(shards: Iterable[tuple[Any, Any]]) -> Columns:
    return sorted({(offsets[1], sizes[1]) for offsets, sizes in shards})


def _parts(state: Tensor | ShardedTensor, num_rows: int, before: Columns, now: Columns) -> Parts:
    parts = Parts()
    for tensor, offsets in held(state):
        if not len(tensor):
            continue
        place, row = divmod(offsets[0], num_rows)
        for number, share in _shares(now[place], before).items():
            parts.append(Part(tensor, share, number * num_rows + row, torch.empty_like(tensor)))
    return parts


def _shares(columns: tuple[int, int], before: Columns) -> dict[int, float]:
    """Which of the column shards of before cover some columns of a new one, and what share of them."""
    first, width = columns
    covered = [min(first + width, start + size) - max(first, start) for start, size in before]
    return {number: each / width for number, each in enumerate(covered) if each > 0}

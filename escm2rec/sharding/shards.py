"""What a rank holds of a table, split or whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor


class Held(NamedTuple):
    """A part of a tensor that this rank holds, and where it begins there."""

    tensor: Tensor
    offsets: tuple[int, ...]


def held(value: Tensor | ShardedTensor) -> Iterator[Held]:
    """The parts that this rank holds of a table, or of what its optimizer keeps: its shards, or all where every rank holds all."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield Held(shard.tensor, tuple(shard.metadata.shard_offsets))
    else:
        yield Held(value, (0,) * value.ndim)


def table_of(name: str) -> str:
    """The table of a parameter, by the name that TorchRec gives it."""
    return name.split(".embedding_bags.")[1].removesuffix(".weight")


def is_managed(name: str) -> bool:
    """Whether a parameter of such a name is of a managed table (`sharding/managed.py`)."""
    return "._embedding_module.embedding_bags." in name

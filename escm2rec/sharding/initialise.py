"""Initial embeddings that depend on (seed, table, row, column) alone, never on the plan or the number of ranks.

Of a managed table it is the value that counts, not its row: those begin when they are given to one, and are 0 until then.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from escm2rec.sharding.shards import held, is_managed, table_of

CHUNK_ROWS = 65_536


@torch.no_grad()
def initialise_tables(model: nn.Module, seed: int, std: float) -> None:
    """Fill every table of a sharded (or unsharded) model: uniform with mean 0 and standard deviation `std`."""
    for name, value in model.state_dict().items():
        if ".embedding_bags." not in name:
            continue
        for part, (row, column) in held(value):
            if is_managed(name):
                part.zero_()
            else:
                _fill(part, table_of(name), row, column, seed, std, int(value.size()[1]))


def _fill(shard: Tensor, table: str, first_row: int, first_column: int, seed: int, std: float, dim: int) -> None:
    for start in range(0, shard.shape[0], CHUNK_ROWS):  # chunks stay in the cache
        stop = min(start + CHUNK_ROWS, shard.shape[0])
        rows = torch.arange(first_row + start, first_row + stop, device=shard.device)
        shard[start:stop] = initial_rows(rows, table, seed, std, dim, first_column, shard.shape[1])


def initial_rows(
    rows: Tensor, table: str, seed: int, std: float, dim: int, first_column: int = 0, num_columns: int | None = None
) -> Tensor:
    """[len(rows), num_columns] of these rows of a table of `dim` columns, or of these values of a managed one."""
    key = _mix(torch.tensor([zlib.crc32(table.encode()) + (seed << 32)], dtype=torch.int64, device=rows.device))
    columns = torch.arange(first_column, first_column + (dim if num_columns is None else num_columns), device=rows.device)
    bits = _mix(key + rows[:, None] * dim + columns)
    unit = ((bits >> 40) & 0xFFFFFF).to(torch.float32) / 2**24  # 24 bits fill a float32's mantissa: [0, 1)
    return (unit - 0.5) * (std * 12**0.5)


def _mix(value: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) on int64, whose products wrap as uint64's do."""
    value = value * -7046029254386353131
    value = (value ^ _shift(value, 30)) * -4658895280553007687
    value = (value ^ _shift(value, 27)) * -7723592293110705685
    return value ^ _shift(value, 31)


def _shift(value: Tensor, by: int) -> Tensor:
    return (value >> by) & ((1 << (64 - by)) - 1)

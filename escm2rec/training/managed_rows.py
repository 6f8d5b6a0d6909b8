"""The rows of managed tables, taken from a checkpoint that dealt them out otherwise: to other ranks, or in a table of another size.

Each rank looks for the values of its range, and reads their rows. Where they are more than its rows, those met the longest ago are left
out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from escm2rec.schema import MANAGED_IDS
from escm2rec.sharding.initialise import CHUNK_ROWS
from escm2rec.sharding.managed import FREE, ShardedManagedTables, ValueRows
from escm2rec.sharding.shards import held
from escm2rec.training.stored import StoredTensors

Int64s = npt.NDArray[np.int64]
MODULES = "._managed_collision_modules."  # in the names of what is known of the rows of managed tables
VALUES = "_mch_sorted_raw_ids"
OF_VALUES = (VALUES, "_mch_remapped_ids_mapping", "_mch_last_access_iter")


def dealt_alike(stored: StoredTensors, table: str, rows: ValueRows) -> bool:
    """Whether a checkpoint is of as many ranks, so that their rows of a table can be read as they are.

    Parts alone do not tell: the last of 16 rows on three ranks is that of 16 on four, of other values.
    """
    return len(list(stored.parts(stored_name(stored, table, VALUES)))) == int(rows.buckets())


@torch.no_grad()
def take_rows(stored: StoredTensors, tables: ShardedManagedTables, table: str, rows: ValueRows, states: dict[str, Any]) -> tuple[int, int]:
    """Fill this rank's rows of a table, and the states of its optimizer by the names of `combined_optimizer`, from a checkpoint.

    How many values have a row now, and how many of its range had one and have none.
    """
    values, places, met = _of_range(stored, table, tables._env.rank, tables._env.world_size)
    room = rows.output_size() - 1
    taken = np.lexsort((values, -met))[:room]
    taken = taken[np.argsort(values[taken])]
    first = rows._output_global_offset
    for name, kept, rest in zip(OF_VALUES, (values[taken], np.arange(first, first + len(taken)), met[taken]), (FREE, None, 0), strict=True):
        buffer: Tensor = getattr(rows, name)
        buffer.copy_(torch.arange(first, first + len(buffer)) if rest is None else torch.full((len(buffer),), rest))
        buffer[: len(taken)] = torch.from_numpy(np.asarray(kept, np.int64))
    rows._current_iter_tensor.copy_(stored.whole(stored_name(stored, table, "_current_iter_tensor")))
    weight, weight_name = tables.weight(table), _weightstored_name(stored, table)
    _copy(weight, places[taken], stored, weight_name)
    for kind, state in states.items():
        ((tensor, _),) = held(state)
        _copy(tensor, places[taken], stored, f"optimizer.state.tables.{weight_name.removeprefix('model.')}.{kind}")
    return len(taken), len(values) - len(taken)


def _of_range(stored: StoredTensors, table: str, rank: int, ranks: int) -> list[Int64s]:
    """The values of a rank's range, the rows that they have in the checkpoint, and the steps in which they were met last.

    Each part has its values in order, those of free rows last, so that no more is read than this.
    """
    per_rank = -(-MANAGED_IDS // ranks)
    found = []
    for parts in zip(*(stored.parts(stored_name(stored, table, name)) for name in OF_VALUES), strict=True):
        low, high = np.searchsorted(parts[0].values, [rank * per_rank, (rank + 1) * per_rank])
        found.append([part.values[low:high] for part in parts])
    return [np.concatenate(each) for each in zip(*found, strict=True)]


def _copy(target: Tensor, places: Int64s, stored: StoredTensors, name: str) -> None:
    """The first rows of `target` from these of a stored tensor; the others are 0."""
    target.zero_()
    for part in stored.parts(name):
        start = part.offsets[0]
        rows = np.flatnonzero((places >= start) & (places < start + len(part.values)))
        rows = rows[np.argsort(places[rows])]  # a file is read from its beginning to its end
        for piece in (rows[low : low + CHUNK_ROWS] for low in range(0, len(rows), CHUNK_ROWS)):
            target[torch.from_numpy(piece).to(target.device)] = torch.from_numpy(part.values[places[piece] - start]).to(target.device)


def stored_name(stored: StoredTensors, table: str, buffer: str) -> str:
    """What a checkpoint calls what is known of the rows of a managed table."""
    return next(name for name in stored.shapes if name.endswith(f"{MODULES}{table}.{buffer}"))


def _weightstored_name(stored: StoredTensors, table: str) -> str:
    end = f"._embedding_module.embedding_bags.{table}.weight"
    return next(name for name in stored.shapes if name.startswith("model.") and name.endswith(end))

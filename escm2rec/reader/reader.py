"""Batches of a data set's split: the same global batches on any number of ranks, read ahead by a background thread.

An epoch has one global order, a sequence of all rows. The row groups are permuted by (seed, epoch), the rows within each group too; what
results is cut into L lanes of equal length, and place p of the sequence is row p // L of lane p % L, so that a batch mixes rows from L
places of the data set. A global batch is a stretch of the sequence, which makes a row number the only state that there is: an epoch goes
on from any row, on any number of ranks, in batches of any size. Each row comes exactly once, and all ranks have equally many steps. With
a number of ranks W that divides L, a rank takes every W-th lane, so it decodes 1/W of the data set and nothing that another decodes.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, tee
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from escm2rec.config import Split
from escm2rec.parallel import ordered_map
from escm2rec.paths import not_read, open_parquet
from escm2rec.reader.batch import Batch
from escm2rec.reader.columns import Columns, Slice, assemble, decode, encoded_columns
from escm2rec.reader.dataset import Dataset, RowGroup

T = TypeVar("T")
EXIT_S = 5.0  # how long the end of a program waits for its reader
# How much lower than the step's the priority of a reader on cores is. The step's threads take all of them there and wait for the slowest,
# which a reader that takes its core holds up; of lower priority it reads where the step leaves a core alone: 3% of a step's time (DR,
# 20 tables, 8,192 rows, two cores). The queue runs empty only when the step leaves none, and then the step waits, which frees all.
NICENESS = 10


Piece = tuple[int, int, int]
"""Rows [start, stop) of a row group, which comes first: by its place in the epoch's order."""


class Reader:
    """Reads one rank's share of a split.

    `num_steps` batches an epoch on every rank; `global_batch_size` is the most impressions of a step over all ranks (the last batch is
    not shorter: all share what is missing, so sizes differ by one at most). With `shuffle` false, the groups come in the order of the
    files, lane by lane within a batch. `decode_threads` above 1 decode row groups ahead, with the same result. Memory: a decoded row group
    a lane of this rank, and `decode_threads` + 1 more when there are several.
    `propensity_logits` is a .npy file of float32, one a row of the split, which batches then hold.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        lanes: int = 8,
        shuffle: bool = True,
        prefetch: int = 4,
        decode_threads: int = 1,
        pin_memory: bool = False,
        extra_columns: tuple[str, ...] = (),
        propensity_logits: Path | None = None,
    ) -> None:
        self.schema = dataset.schema
        dataset.split_counts(split)
        self.groups = dataset.row_groups(split)
        self.num_rows = sum(group.num_rows for group in self.groups)
        self.num_steps = -(-self.num_rows // global_batch_size)
        self._global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._seed, self._lanes, self._shuffle = seed, lanes, shuffle
        self._prefetch, self._decode_threads, self._pin_memory = prefetch, decode_threads, pin_memory
        # Of the whole split, row by row; mapped, so that a group costs its own rows alone.
        self._propensity_logits = None if propensity_logits is None else np.load(propensity_logits, mmap_mode="r")
        self._columns = [*encoded_columns(dataset.schema, labels=True), *extra_columns]

    def row_at(self, step: int, start_row: int = 0) -> int:
        """Where in the epoch's order the global batch of a step begins, the steps being counted from `start_row`.

        Larger batches come first, so the rows that are left after any step are divided as they would be from there.
        """
        rows = self.num_rows - start_row
        size, larger = divmod(rows, max(1, -(-rows // self._global_batch_size)))
        return start_row + step * size + min(step, larger)

    def epoch(self, epoch: int, start_row: int = 0) -> Iterator[Batch]:
        """Batches of one epoch, read ahead, of all rows but the first `start_row` of its order."""
        return (batch for batch, _ in self.read_ahead(epoch, start_row))

    def read_ahead(self, epoch: int, start_row: int = 0) -> Iterator[tuple[Batch, pa.Table]]:
        """`batches`, made by a background thread."""
        return read_ahead(self.batches(epoch, start_row), self._prefetch, 0 if self._pin_memory else NICENESS)

    def batches(self, epoch: int, start_row: int = 0) -> Iterator[tuple[Batch, pa.Table]]:
        """Batches with their extra columns, row by row alike, read in the caller's thread."""
        order = self._order(epoch)
        shares, ahead = tee(self._shares([0, *accumulate(group.num_rows for group in order)], start_row))
        tasks = (partial(self._decode, order[index], epoch) for index in _to_decode(ahead))
        decoded = (task() for task in tasks) if self._decode_threads == 1 else ordered_map(tasks, self._decode_threads)
        window: dict[int, Columns] = {}
        for pieces, padded_rows in shares:
            needed = _groups(pieces)
            for index in window.keys() - needed:
                del window[index]
            for index in needed:
                if index not in window:
                    window[index] = next(decoded)
            slices = [Slice(window[index], start, stop) for index, start, stop in pieces]
            yield assemble(slices, self.schema, padded_rows, self._pin_memory), _extra(slices)

    def places(self, step: int) -> NDArray[np.int64]:
        """Where in the split the rows of this rank's batch of a step stand; of a reader that does not shuffle."""
        assert not self._shuffle
        ends = np.cumsum([group.num_rows for group in self.groups])
        ranges, _ = self._share(self.row_at(step), self.row_at(step + 1))
        order = np.concatenate([np.arange(start, stop) for start, stop in ranges] or [np.zeros(0, np.int64)])
        index = np.searchsorted(ends, order, side="right")
        first = np.array([group.start for group in self.groups]) - ends + np.array([group.num_rows for group in self.groups])
        return np.asarray(order + first[index], np.int64)

    def _order(self, epoch: int) -> list[RowGroup]:
        if not self._shuffle:
            return self.groups
        permutation = np.random.default_rng([self._seed, epoch]).permutation(len(self.groups))
        return [self.groups[index] for index in permutation]

    def _shares(self, starts: list[int], start_row: int) -> Iterator[tuple[list[Piece], int]]:
        """This rank's pieces of every batch, and the size that all ranks pad to; `starts` are of the groups in the epoch's order."""
        step, begin = 0, start_row
        while begin < self.num_rows:
            step += 1
            end = self.row_at(step, start_row)
            ranges, padded_rows = self._share(begin, end)
            yield [piece for start, stop in ranges for piece in _pieces(starts, start, stop)], padded_rows
            begin = end

    def _share(self, begin: int, end: int) -> tuple[list[tuple[int, int]], int]:
        """This rank's rows of the global batch at places [begin, end), as ranges of the permuted rows, and the size that all pad to."""
        lanes = self._lanes
        ranges = []
        for lane in range(lanes):
            first = lane * (self.num_rows // lanes) + min(lane, self.num_rows % lanes)
            ranges.append((first - (lane - begin) // lanes, first - (lane - end) // lanes))
        padded_rows = -(-(end - begin) // self._world_size)
        if lanes % self._world_size == 0:
            return [(start, stop) for start, stop in ranges[self._rank :: self._world_size] if start < stop], padded_rows
        return _between(ranges, *((end - begin) * rank // self._world_size for rank in (self._rank, self._rank + 1))), padded_rows

    def _decode(self, group: RowGroup, epoch: int) -> Columns:
        try:
            with open_parquet(group.path) as file:
                table = file.read_row_group(group.index, columns=self._columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise not_read(f"{group.path}, row group {group.index}", error) from error
        order = None
        if self._shuffle:
            # By its number, so that two lanes that share a group permute it alike.
            order = np.random.default_rng([self._seed, epoch, group.number]).permutation(group.num_rows)
        columns = decode(table, self.schema, labels=True, where=str(group.path), order=order, first_row=group.first_row)
        if self._propensity_logits is not None:
            logits = np.array(self._propensity_logits[group.start : group.start + group.num_rows])
            columns.labels["propensity_logit"] = logits if order is None else logits[order]
        return columns


def read_ahead(items: Iterator[T], depth: int, niceness: int = 0) -> Iterator[T]:
    """The same items, made by a background thread at most `depth` ahead; its exception is raised here.

    On Linux the thread, and those that it starts, have a priority lower by `niceness` than the caller's.

    At exit the thread is stopped and waited for, EXIT_S at most: one that Python drops there, in the middle of Arrow's code, aborts the
    process.
    """
    done = object()
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            if sys.platform == "linux":  # where threads have a priority each
                thread_id = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread_id, os.getpriority(os.PRIO_PROCESS, thread_id) + niceness)
            for item in items:
                if not put(item):
                    return
            put(done)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)
        finally:
            atexit.unregister(end)

    def end() -> None:
        stop.set()
        thread.join(EXIT_S)

    thread = threading.Thread(target=produce, name="escm2rec-reader", daemon=True)
    atexit.register(end)
    thread.start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]
    finally:
        stop.set()


def _groups(pieces: list[Piece]) -> dict[int, None]:
    """The groups of the pieces, each once, in order."""
    return dict.fromkeys(index for index, _, _ in pieces)


def _to_decode(shares: Iterator[tuple[list[Piece], int]]) -> Iterator[int]:
    """The groups in the order in which they are needed; again when one comes back after a batch without it."""
    held: dict[int, None] = {}
    for pieces, _ in shares:
        needed = _groups(pieces)
        yield from (index for index in needed if index not in held)
        held = needed


def _pieces(starts: list[int], start: int, stop: int) -> Iterator[Piece]:
    """Rows [start, stop) of all groups, cut at the ends of groups."""
    for index in range(bisect_right(starts, start) - 1, bisect_left(starts, stop)):
        yield index, max(start, starts[index]) - starts[index], min(stop, starts[index + 1]) - starts[index]


def _between(ranges: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """What the ranges, one after another, hold at places [first, last)."""
    parts, seen = [], 0
    for start, stop in ranges:
        low, high = max(first, seen), min(last, seen + stop - start)
        if low < high:
            parts.append((start + low - seen, start + high - seen))
        seen += stop - start
    return parts


def _extra(slices: list[Slice]) -> pa.Table:
    return pa.concat_tables([part.columns.extra.slice(part.start, part.stop - part.start) for part in slices]) if slices else pa.table({})

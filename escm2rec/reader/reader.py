"""Batches of a data set's split: the same global batches on any number of ranks, read ahead by a background thread.

An epoch has one global order of the rows: the row groups permuted by (seed, epoch), the rows within each group permuted too. The order is
cut into `lanes` of equal length, and step s of S takes the s-th of S equal parts of every lane, so that a batch mixes rows from all over
the data set. Each row comes exactly once, all ranks have S steps, and neither depends on the number of ranks. A rank takes a contiguous
share of each global batch, so with W dividing the lanes it decodes 1/W of the data set and nothing twice.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from escm2rec.config import Split
from escm2rec.errors import DataError
from escm2rec.reader.batch import Batch
from escm2rec.reader.columns import Columns, Slice, assemble, decode, encoded_columns
from escm2rec.reader.dataset import Dataset, RowGroup

T = TypeVar("T")


class Reader:
    """Reads one rank's share of a split.

    `num_steps` batches an epoch on every rank; `global_batch_size` is the number of impressions of a step over all ranks (the last batch
    is not shorter: all share what is missing). With `shuffle` false, rows come lane by lane in the order of the files.
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
        pin_memory: bool = False,
        extra_columns: tuple[str, ...] = (),
        propensity_logits: Path | None = None,
    ) -> None:
        self.schema = dataset.schema
        dataset.split_counts(split)
        self.groups = dataset.row_groups(split)
        self.num_rows = sum(group.num_rows for group in self.groups)
        self.num_steps = -(-self.num_rows // global_batch_size)
        self._rank, self._world_size = rank, world_size
        self._seed, self._lanes, self._shuffle = seed, lanes, shuffle
        self._prefetch, self._pin_memory = prefetch, pin_memory
        # Of the whole split, row by row; mapped, so that a group costs its own rows alone.
        self._propensity_logits = None if propensity_logits is None else np.load(propensity_logits, mmap_mode="r")
        self._columns = [*encoded_columns(dataset.schema, labels=True), *extra_columns]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from `start_step` on, read ahead."""
        return (batch for batch, _ in self.read_ahead(epoch, start_step))

    def read_ahead(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, pa.Table]]:
        """`batches`, made by a background thread."""
        batches = self.batches(epoch, start_step)
        return read_ahead(((batch.pin_memory(), extra) for batch, extra in batches) if self._pin_memory else batches, self._prefetch)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, pa.Table]]:
        """Batches with their extra columns, row by row alike, read in the caller's thread."""
        order = self._order(epoch)
        starts = [0, *accumulate(group.num_rows for group in order)]
        window: dict[int, Columns] = {}
        for step in range(start_step, self.num_steps):
            parts, padded_rows = self._parts(step)
            needed = {index for start, stop in parts for index in range(_group_at(starts, start), _group_at(starts, stop - 1) + 1)}
            for index in [index for index in window if index not in needed]:
                del window[index]
            slices: list[Slice] = []
            for start, stop in parts:
                for index in range(_group_at(starts, start), _group_at(starts, stop - 1) + 1):
                    if index not in window:
                        window[index] = self._decode(order[index], epoch)
                    low, high = max(start, starts[index]) - starts[index], min(stop, starts[index + 1]) - starts[index]
                    slices.append(Slice(window[index], low, high))
            yield assemble(slices, self.schema, padded_rows), _extra(slices)

    def places(self, step: int) -> NDArray[np.int64]:
        """Where in the split the rows of this rank's batch of a step stand; of a reader that does not shuffle."""
        assert not self._shuffle
        ends = np.cumsum([group.num_rows for group in self.groups])
        order = np.concatenate([np.arange(start, stop) for start, stop in self._parts(step)[0]] or [np.zeros(0, np.int64)])
        index = np.searchsorted(ends, order, side="right")
        first = np.array([group.start for group in self.groups]) - ends + np.array([group.num_rows for group in self.groups])
        return np.asarray(order + first[index], np.int64)

    def _order(self, epoch: int) -> list[RowGroup]:
        if not self._shuffle:
            return self.groups
        permutation = np.random.default_rng([self._seed, epoch]).permutation(len(self.groups))
        return [self.groups[index] for index in permutation]

    def _parts(self, step: int) -> tuple[list[tuple[int, int]], int]:
        """This rank's share of a step, as ranges of places in the epoch's order, and the size that all ranks pad their share to."""
        ranges = []
        for lane in range(self._lanes):
            low, high = self.num_rows * lane // self._lanes, self.num_rows * (lane + 1) // self._lanes
            # Lanes are out of phase, so that what rounding takes from one it gives to another: batches are of one size, give or take one.
            phase = self.num_steps * lane // self._lanes
            cuts = [((high - low) * place + phase) // self.num_steps for place in (step, step + 1)]
            ranges.append((low + cuts[0], low + cuts[1]))
        total = sum(stop - start for start, stop in ranges)
        first, last = total * self._rank // self._world_size, total * (self._rank + 1) // self._world_size
        parts, seen = [], 0
        for start, stop in ranges:
            low, high = max(first, seen), min(last, seen + stop - start)
            if low < high:
                parts.append((start + low - seen, start + high - seen))
            seen += stop - start
        return parts, -(-total // self._world_size)

    def _decode(self, group: RowGroup, epoch: int) -> Columns:
        where = f"{group.path}, row group {group.index}"
        try:
            with pq.ParquetFile(group.path, memory_map=True) as file:
                table = file.read_row_group(group.index, columns=self._columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{where} cannot be read: {error}", "the data set is damaged: preprocess again") from error
        order = None
        if self._shuffle:
            # By its number, so that two lanes that share a group permute it alike.
            order = pa.array(np.random.default_rng([self._seed, epoch, group.number]).permutation(group.num_rows))
        columns = decode(table, self.schema, labels=True, where=where, order=order)
        if self._propensity_logits is not None:
            logits = np.array(self._propensity_logits[group.start : group.start + group.num_rows])
            columns.labels["propensity_logit"] = logits if order is None else logits[order.to_numpy()]
        return columns


def read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made by a background thread at most `depth` ahead; its exception is raised here."""
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
            for item in items:
                if not put(item):
                    return
            put(done)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, name="escm2rec-reader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]
    finally:
        stop.set()


def _group_at(starts: list[int], place: int) -> int:
    return bisect_right(starts, place) - 1


def _extra(slices: list[Slice]) -> pa.Table:
    return pa.concat_tables([part.columns.extra.slice(part.start, part.stop - part.start) for part in slices]) if slices else pa.table({})

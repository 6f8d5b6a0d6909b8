"""The common records of an Ali-CCP shard: read once, kept on disk as columns, and found by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from escm2rec.preprocess.aliccp_columns import AliccpColumns, SideColumns, common_keys
from escm2rec.preprocess.aliccp_text import Lines, TextBlock, text_blocks
from escm2rec.preprocess.block import RawColumn
from escm2rec.preprocess.parallel import ordered_map
from escm2rec.preprocess.ragged import Int64s
from escm2rec.preprocess.rejections import DUPLICATE_COMMON, FIRST_OFFENDERS, Rejected, Rejection
from escm2rec.preprocess.spilled import SpilledColumn

BLOCK_BYTES = 4 << 20  # a compromise of cache, cost a block, and memory: docs/decisions/0001
HEADER = 2  # common_feature_index, feature_num


@dataclass(frozen=True)
class CommonRecords:
    """Records by position; `features` and `extras` are memory-mapped raw columns."""

    keys: Int64s  # sorted
    positions: Int64s  # of the record of each key
    features: dict[str, RawColumn]
    extras: dict[str, Int64s]
    count: int

    def find(self, keys: Int64s) -> Int64s:
        """Position of each key's record, -1 when there is none. Runs of equal keys, as in grouped skeletons, are looked up once."""
        if not len(keys) or not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int64)
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        wanted = keys[begins]
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        found = np.where(self.keys[places] == wanted, self.positions[places], -1)
        return np.repeat(found, np.diff(np.append(begins, len(keys))))


@dataclass(frozen=True)
class _CommonBlock:
    keys: Int64s
    lines: Int64s
    spans: Int64s  # [records, 2]: start and end of each line in the file
    columns: SideColumns
    rejections: list[Rejection]


def read_common(path: Path, columns: AliccpColumns, folder: Path, rejected: Rejected, workers: int) -> CommonRecords:
    """Read a common file into columns under `folder`. Memory grows by 40 bytes a record and 8 a column, not with their features."""
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        names = [("feature", feature.name) for feature in columns.request.features] + [("extra", name) for name in columns.extra_fields]
        files = {key: stack.enter_context(closing(SpilledColumn(folder / "-".join(key)))) for key in names}
        return _read_common(path, columns, files, rejected, workers)


def _read_common(
    path: Path, columns: AliccpColumns, files: dict[tuple[str, str], SpilledColumn], rejected: Rejected, workers: int
) -> CommonRecords:
    keys, lines, spans = [], [], []
    tasks: Iterator[Callable[[], _CommonBlock]] = (_task(block, columns) for block in text_blocks(path, BLOCK_BYTES))
    for block in ordered_map(tasks, workers):
        rejected.add(block.rejections)
        keys.append(block.keys)
        lines.append(block.lines)
        spans.append(block.spans)
        for (kind, name), file in files.items():
            file.append(block.columns.features[name] if kind == "feature" else block.columns.extras[name])
    all_keys = np.concatenate(keys)
    order = np.argsort(all_keys, kind="stable")
    ordered = all_keys[order]
    again = np.concatenate([[False], ordered[1:] == ordered[:-1]])
    if again.any():
        _check_duplicates(path, order, again, np.concatenate(lines), np.concatenate(spans), rejected)
    return CommonRecords(
        ordered[~again],
        order[~again],
        {name: file.finish() for (kind, name), file in files.items() if kind == "feature"},
        {name: file.finish() for (kind, name), file in files.items() if kind == "extra"},
        len(all_keys),
    )


def _task(block: TextBlock, columns: AliccpColumns) -> Callable[[], _CommonBlock]:
    return lambda: _parse(block, columns)


def _parse(block: TextBlock, columns: AliccpColumns) -> _CommonBlock:
    lines = Lines(block, HEADER)
    keys = common_keys(lines, 0)
    side = columns.read(lines)
    good = lines.bad.good
    spans = lines.byte_spans(block.first_byte)
    numbers = lines.bad.lines
    if len(good) < lines.count:
        side = side.take(good)
        keys, numbers, spans = keys[good], numbers[good], spans[good]
    return _CommonBlock(keys, numbers, spans, side, lines.bad.found)


def _check_duplicates(path: Path, order: Int64s, again: Any, lines: Int64s, spans: Int64s, rejected: Rejected) -> None:
    """Equal repeats are harmless; the first of differing ones stays, the others are rejected. Compares the text, on disk."""
    heads = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    differing: list[tuple[int, str]] = []
    with path.open("rb") as file:

        def text(record: int) -> bytes:
            start, end = spans[record].tolist()
            file.seek(start)
            return file.read(end - start)

        for place in np.flatnonzero(again):
            record, head = int(order[place]), int(order[heads[place]])
            if text(record) != text(head):
                differing.append((int(lines[record]), f"the index of row {lines[head]} with other features"))
    if differing:
        differing.sort()
        first = differing[:FIRST_OFFENDERS]
        rows, seen = [row for row, _ in first], [text for _, text in first]
        rejected.add([Rejection(DUPLICATE_COMMON, str(path), "common_feature_index", len(differing), rows, seen)])

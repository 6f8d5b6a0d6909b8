"""Raw logs to a data set: two passes, one to count and one to encode and write."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from escm2rec.config import SPLITS, DataConfig, Split
from escm2rec.errors import DataError
from escm2rec.folder import new_folder, refuse_existing, refuse_overlap, write_manifest
from escm2rec.preprocess.block import RawBlock, Request
from escm2rec.preprocess.encoder import EncodedCommon, Encoder
from escm2rec.preprocess.events import join_events
from escm2rec.preprocess.files import RawFile, raw_files
from escm2rec.preprocess.fit import draft, fit
from escm2rec.preprocess.labels import apply_click_rule
from escm2rec.preprocess.negatives import keep_negatives
from escm2rec.preprocess.parallel import default_workers, ordered_map
from escm2rec.preprocess.parts import SplitWriter
from escm2rec.preprocess.ragged import Int64s
from escm2rec.preprocess.rejections import NO_SPLIT, Rejected, Rejection
from escm2rec.preprocess.shares import Shares
from escm2rec.preprocess.sources import Opener, OpenFile, common_of
from escm2rec.preprocess.splits import TRAIN, file_may_train, split_column, split_numbers
from escm2rec.progress import Progress

DEFAULT_MEMORY_GIB = 4.0
WORKSPACE = "work"  # inside the unfinished folder, removed before it is complete


def preprocess(
    config: DataConfig, input: Path, out: Path, overwrite: bool = False, memory_gib: float = DEFAULT_MEMORY_GIB
) -> dict[str, Any]:
    """Make a data set folder `out` from the raw logs at `input` (a folder, or one file), and return what is in it.

    The folder holds `schema.json`, `manifest.json`, `vocabulary/<feature>.parquet` (value, count, row) and the Parquet parts of `train/`,
    `validation/` and `test/`; it is complete or absent. Everything that is fitted is fitted on the training split. What is counted,
    sorted and looked up takes `memory_gib` at most, beside some 300 MB, and lies on disk beyond; Ali-CCP's common records take 40 bytes
    each, and 8 a list feature, of the largest file. The same input and config give the same bytes, with any memory.

    With `negative_keep_rate` below 1 every split has weights: those of `keep_negatives` in training; validation and test stay whole, so
    that what is measured there is of impressions as they come, without the variance of weights, and can be ranked.

    Returns out, schema_hash, rows, clicks and conversions by split, rejected rows by reason, negatives left out, what the join of an event
    log counted, and seconds.
    Raises DataError for bad input, ConfigError when `out` exists and may not be overwritten.
    """
    began = time.monotonic()
    refuse_existing(out, "data set", overwrite)
    refuse_overlap(out, [input])
    files = raw_files(config.source, input)
    with new_folder(out, "data set", overwrite) as folder:
        manifest = _Job(config, files, folder, round(memory_gib * 2**30)).run()
        manifest["seconds"] = round(time.monotonic() - began, 2)
        write_manifest(folder, "data set", manifest)
    return {
        "out": str(out),
        "schema_hash": manifest["schema_hash"],
        "splits": {
            split: {name: counts[name] for name in ("rows", "clicks", "conversions")} for split, counts in manifest["splits"].items()
        },
        "rejected": {reason: entry["rows"] for reason, entry in manifest["rejected"].items()},
        "conversion_without_click": manifest["conversion_without_click"]["rows"],
        "negatives_left_out": manifest["negatives_left_out"],
        **({"events": manifest["events"]} if "events" in manifest else {}),
        "seconds": manifest["seconds"],
    }


@dataclass(frozen=True)
class _Piece:
    """Encoded rows of one split, ready to be written."""

    split: Split
    table: pa.Table
    held: dict[str, Int64s]


@dataclass(frozen=True)
class _EncodedBlock:
    pieces: list[_Piece]
    rejections: list[Rejection]
    refusals: list[Rejection]
    without_click: Rejection | None
    no_split: Rejection | None
    negatives_left_out: int


class _Job:
    """One run of preprocess into an unfinished folder."""

    def __init__(self, config: DataConfig, files: list[RawFile], folder: Path, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._config, self._files, self._folder = config, files, folder
        self._workers = default_workers()
        self._rejected = Rejected(config.bad_rows == "refuse")
        self._without_click = self._negatives_left_out = 0
        self._workspace = folder / WORKSPACE
        column = split_column(config.split)
        extras = dict.fromkeys([*config.keep, *([column] if column is not None else [])])
        request = Request(tuple(draft(feature) for feature in config.features), tuple(extras))
        self._opener = Opener(config.source, request, self._workspace, self._rejected, self._workers)

    def run(self) -> dict[str, Any]:
        """Fit, encode and write; the content of the manifest."""
        counts = self._workspace / "counts"
        counts.mkdir(parents=True)
        self._files, self._events = join_events(self._config.source, self._files, self._workspace, self._memory_bytes, self._rejected)
        vocabulary = self._folder / "vocabulary"
        opened: dict[RawFile, OpenFile] = {}

        def training_file(file: RawFile) -> OpenFile:
            opened[file] = self._opener.open(file)
            return opened[file]

        training = [file for file in self._files if file_may_train(self._config.split, file)]
        schema = fit(self._config, (training_file(file) for file in training), vocabulary, counts, self._memory_bytes, self._workers)
        schema.save(self._folder / "schema.json")
        encoder = Encoder(schema, vocabulary, self._workspace / "vocabulary", self._memory_bytes // 2)
        shares = Shares(schema)
        config = self._config
        writers = {split: SplitWriter(self._folder / split, config.rows_per_file, config.rows_per_group) for split in SPLITS}
        with Progress("encode", None) as progress:
            for file in self._files:
                self._encode(opened.pop(file) if file in opened else self._opener.open(file), encoder, shares, writers, progress)
        splits = {split: writer.close() for split, writer in writers.items()}
        shutil.rmtree(self._workspace)
        if not splits["train"]["rows"]:
            raise DataError("no row belongs to the training split", "check data.split and data.conversion_without_click")
        return self._manifest(schema.hash(), splits, shares)

    def _encode(self, opened: OpenFile, encoder: Encoder, shares: Shares, writers: dict[Split, SplitWriter], progress: Progress) -> None:
        raw = common_of(opened)
        folder = self._workspace / f"{opened.file.name}.encoded"
        common = encoder.common(raw, folder) if raw is not None else None
        for block in ordered_map((self._task(task, encoder, common) for task in opened.tasks()), self._workers):
            self._rejected.add(block.rejections, block.refusals)
            if block.without_click is not None:
                self._without_click += block.without_click.count
                if self._config.conversion_without_click == "drop":
                    self._rejected.count(block.without_click)
            if block.no_split is not None:
                self._rejected.count(block.no_split)
            self._negatives_left_out += block.negatives_left_out
            for piece in block.pieces:
                writers[piece.split].add(piece.table)
                shares.add(piece.split, len(piece.table), piece.held)
                progress.add(len(piece.table), opened.file.name)
        if raw is not None:  # the maps stay valid until they are let go of
            shutil.rmtree(folder)
            shutil.rmtree(self._opener.folder(opened.file))

    def _task(self, task: Callable[[], RawBlock], encoder: Encoder, common: EncodedCommon | None) -> Callable[[], _EncodedBlock]:
        return lambda: self._encode_block(task(), encoder, common)

    def _encode_block(self, block: RawBlock, encoder: Encoder, common: EncodedCommon | None) -> _EncodedBlock:
        rejections = block.rejections
        block, without_click, refusals = apply_click_rule(block, self._config.conversion_without_click)
        numbers = split_numbers(self._config.split, block)
        rate = self._config.negative_keep_rate
        pieces, left_out = [], 0
        for number, split in enumerate(SPLITS):
            mine = block.take(np.flatnonzero(numbers == number))
            if rate < 1:
                before, mine = len(mine), keep_negatives(mine, rate if number == TRAIN else 1.0)
                left_out += before - len(mine)
            pieces += [_Piece(split, table, held) for table, held in encoder.tables(mine, common, self._config.rows_per_group)]
        no_split = self._no_split(block, np.flatnonzero(numbers < 0))
        return _EncodedBlock(pieces, rejections, refusals, without_click, no_split, left_out)

    def _no_split(self, block: RawBlock, rows: Int64s) -> Rejection | None:
        if not len(rows):
            return None
        column = split_column(self._config.split)
        lines = block.lines[rows[:5]].tolist()
        seen = (
            [str(value) for value in block.extras[column].take(pa.array(rows[:5])).to_pylist()]
            if column
            else [block.file.name] * len(lines)
        )
        return Rejection(NO_SPLIT, str(block.file.path), column or "", len(rows), lines, seen)

    def _manifest(self, schema_hash: str, splits: dict[Split, dict[str, Any]], shares: Shares) -> dict[str, Any]:
        inputs = dict.fromkeys(path for file in self._files for path in file.all_paths)
        return {
            "schema_hash": schema_hash,
            "splits": splits,
            "negative_keep_rate": self._config.negative_keep_rate,
            "negatives_left_out": self._negatives_left_out,
            "input": [{"path": str(path), "bytes": path.stat().st_size} for path in inputs],
            "rejected": self._rejected.reasons,
            "conversion_without_click": {"rule": self._config.conversion_without_click, "rows": self._without_click},
            "features": shares.by_feature(),
            **({} if self._events is None else {"events": self._events}),
        }

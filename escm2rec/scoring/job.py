"""The scoring of one file, wherever it is done: in this process, on a rank, by a process of a pool, on a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from escm2rec.config import KEPT_PREFIX
from escm2rec.disk import telling_of_disk
from escm2rec.errors import DataError, RunError
from escm2rec.folder import TAKEN_UP
from escm2rec.models.predictions import Predictions
from escm2rec.parallel import default_workers
from escm2rec.preprocess.ragged import Int64s
from escm2rec.preprocess.raw import EncodedBlock, RawEncoder
from escm2rec.preprocess.rejections import Rejected
from escm2rec.preprocess.where import Where
from escm2rec.reader.columns import Columns, decode
from escm2rec.reader.reader import read_ahead
from escm2rec.scoring.coverage import held_in_columns
from escm2rec.scoring.inputs import LogFile, encoded_blocks, file_here
from escm2rec.scoring.model import SharedModel
from escm2rec.scoring.options import Layout
from escm2rec.scoring.output import OutputColumn, PartWriter, files_of, kept_columns, output_table, predictions
from escm2rec.scoring.parts import BEST, inputs_of, tell_rows, write_record
from escm2rec.scoring.repeats import Repeats, find_repeats
from escm2rec.scoring.served import ServedScorer
from escm2rec.scoring.top import BY, SCORE, BestRows, Top, check_key
from escm2rec.serving.artifact import Artifact
from escm2rec.sharding.runtime import quiet_libraries
from escm2rec.training.run import Run

MODEL = "model"  # in the unfinished folder: what all processes map
LOOKUPS = "lookups"  # in it, of all vocabularies
BLOCK_ROWS = 65_536
BATCH_ROWS = 4_096
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What the scoring of every file knows. `folder` is the unfinished predictions; files of the same `identity` make the same parts."""

    identity: str
    trained: Run | Artifact
    folder: Path
    columns: tuple[OutputColumn, ...]
    layout: Layout
    where: Where | None
    top: Top | None
    counts_bad_rows: bool
    skips_failed: bool
    finds_repeats: bool

    @property
    def parts(self) -> Path:
        """Where the parts of files go: there they stay, unless the best of all are looked for."""
        return self.folder if self.top is None else self.folder / BEST


class Model(Protocol):
    """Predicts rows of a block."""

    def __call__(self, columns: Columns, start: int, stop: int) -> Predictions:
        """Logits of rows [start, stop)."""

    def propensity(self, predictions: Predictions) -> Tensor:
        """q of such logits."""


class FileScorer:
    """Scores one file after the other."""

    def __init__(self, job: Job, model: Model, batch_rows: int = BATCH_ROWS, workers: int | None = None) -> None:
        """`workers` threads read and encode ahead, by default one a processor; one is the caller's own."""
        self._job, self._model, self._batch_rows = job, model, batch_rows
        self._kept = kept_columns(job.columns)
        self._read = self._kept if job.top is None else tuple(dict.fromkeys([*self._kept, job.top.by]))
        self._workers = workers or default_workers()
        lookups = job.folder / MODEL / LOOKUPS
        self._encoder = RawEncoder(job.trained.schema, lookups, self._read, BLOCK_ROWS, where=job.where, workers=self._workers)

    def score(self, number: int, file: LogFile) -> Record:
        """Write the part of a file and then its record, which is returned.

        A file that cannot be scored raises DataError; where the job skips such files, its record says why. RunError when the disk is full.
        """
        try:
            with telling_of_disk(self._job.folder, TAKEN_UP):
                record = self._score(number, file)
        except DataError as error:
            for part in files_of(self._job.parts, number):
                part.unlink()
            if not self._job.skips_failed:
                raise
            record = {"input": file.name, "rows": 0, "parts": [], "error": error.message, "hint": error.hint}
        write_record(self._job.folder, number, record)
        return record

    def _score(self, number: int, file: LogFile) -> Record:
        began, before = time.perf_counter(), _states(file)
        writer = PartWriter(self._job.parts, number, self._job.layout)
        rejected = Rejected(refuse=not self._job.counts_bad_rows)
        best = BestRows(self._job.top, BY, writer) if self._job.top is not None else None
        held: dict[str, Int64s] = {}
        rows = 0
        with file_here(self._job.trained.schema, file) as raw:
            try:
                blocks = self._blocks(file, raw.path, raw, rejected)
                for block in blocks if self._workers == 1 else read_ahead(blocks, 2):
                    table, counts = self._score_block(block)
                    (best or writer).write(table)
                    rows += len(block.table)
                    held = {name: held.get(name, 0) + count for name, count in counts.items()}
                    tell_rows(self._job.folder, number, rows + rejected.rows)
                if best is not None:
                    best.flush()
                inputs = inputs_of(file, before, raw.all_paths)
                parts = writer.finish()
            finally:
                writer.close()
        told = {"rows": rows, "parts": parts, "rejected": rejected.reasons, "inputs": inputs}
        counted = {name: count.tolist() for name, count in held.items()}
        return {"input": file.name, **told, "held": counted, "seconds": round(time.perf_counter() - began, 3)}

    def _blocks(self, file: LogFile, path: Path, raw: Any, rejected: Rejected) -> Iterator[EncodedBlock]:
        if file.encoded:
            return encoded_blocks(path, self._job.trained.schema, self._read, BLOCK_ROWS, self._job.where, rejected)
        return self._encoder.blocks(raw, rejected)

    def _score_block(self, block: EncodedBlock) -> tuple[pa.Table, dict[str, Int64s]]:
        """The rows as they are written, and what their features hold."""
        schema = self._job.trained.schema
        columns = decode(block.table, schema, labels=False, where=str(block.file))
        logits = self._logits(columns)
        ctr, cvr = logits.ctr_logit, logits.cvr_logit
        if not (np.isfinite(ctr.numpy()).all() and np.isfinite(cvr.numpy()).all()):
            raise RunError(f"{block.file}: the model of {self._job.trained.path} gives predictions that are no numbers", "train it again")
        made = predictions(ctr, cvr, lambda: self._model.propensity(logits))
        kept = {name: block.table.column(KEPT_PREFIX + name) for name in self._read}
        table = output_table(self._job.columns, kept, made)
        if (top := self._job.top) is not None:
            if (wrong := check_key(kept[top.by], top.by)) is not None:
                raise DataError(f"{block.file}: {wrong}", "choose another column")
            table = table.append_column(SCORE, pa.array(np.asarray(made[top.score](), np.float32)))
            table = table.append_column(BY, kept[top.by])
        return table, block.held or held_in_columns(columns, schema)

    def _logits(self, columns: Columns) -> Predictions:
        model = self._model
        repeats = find_repeats(columns, self._job.trained.schema) if self._job.finds_repeats and isinstance(model, SharedModel) else None
        starts = range(0, columns.num_rows, self._batch_rows)
        found = [_rows(model, columns, repeats, start, min(start + self._batch_rows, columns.num_rows)) for start in starts]
        own = [each.propensity_logit for each in found if each.propensity_logit is not None]
        return Predictions(
            torch.cat([each.ctr_logit for each in found]),
            torch.cat([each.cvr_logit for each in found]),
            propensity_logit=torch.cat(own) if own else None,
        )


def _rows(model: Model, columns: Columns, repeats: Repeats | None, start: int, stop: int) -> Predictions:
    if repeats is None:
        return model(columns, start, stop)
    assert isinstance(model, SharedModel)
    return model.of_repeats(repeats, start, stop)


def _states(file: LogFile) -> list[Record]:
    try:
        return file.states()
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error.strerror or error}", "check that it is there, and who may read it") from error


_scorer: tuple[str, FileScorer] | None = None  # of this process, for the job of this identity and folder


def score_one(job: Job, item: tuple[int, LogFile]) -> Record:
    """Score one file in a process of a pool or of a cluster, which maps the tables once; for Engine.map."""
    global _scorer
    name = f"{job.identity} {job.folder}"
    if _scorer is None or _scorer[0] != name:
        torch.set_num_threads(1)
        quiet_libraries()
        _scorer = (name, FileScorer(job, shared_model(job), workers=1))
    return _scorer[1].score(*item)


def shared_model(job: Job) -> SharedModel | ServedScorer:
    """The model of a job: of a run its tables are mapped, an artifact is loaded whole."""
    if isinstance(job.trained, Artifact):
        return ServedScorer(replace(job.trained, path=job.folder / MODEL))
    wants = any(column.source == "propensity" for column in job.columns) or (job.top is not None and job.top.score == "propensity")
    return SharedModel(job.trained, job.folder / MODEL, wants)

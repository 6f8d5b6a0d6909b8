"""The `score` verb: raw rows in, predictions out, in the order of the input."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from escm2rec.config import KEPT_PREFIX
from escm2rec.disk import telling_of_disk
from escm2rec.doctor import require_matching_packages
from escm2rec.errors import ConfigError, RunError
from escm2rec.evaluation.metrics import ctcvr_logits, sigmoid
from escm2rec.folder import TAKEN_UP, refuse_existing, refuse_overlap, resumable_folder, write_manifest
from escm2rec.models.predictions import Predictions
from escm2rec.paths import DataPath
from escm2rec.preprocess import EncodedBlock, RawFile, encode_raw, raw_files
from escm2rec.progress import Progress
from escm2rec.reader.columns import Slice, assemble, decode
from escm2rec.reader.reader import read_ahead
from escm2rec.scoring.parts import finish, finish_part, forget, job_identity, part_name, states_of, take_up
from escm2rec.sharding.runtime import Runtime, distributed_runtime, on_main
from escm2rec.training.fetched import run_here
from escm2rec.training.run import Run
from escm2rec.training.trained import TrainedModel

PREDICTION_COLUMNS = ("p_ctr", "p_cvr", "p_ctcvr")
BLOCK_ROWS = 65_536


def score(run: DataPath, inputs: Sequence[Path], out: Path, keep: Sequence[str] | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Score raw rows with a run into Parquet parts, one an input file, rows in the order of the input; called by all ranks alike.

    Rows pass through the run's own schema and vocabulary; labels are neither needed nor read. A part holds the columns `keep` (those the
    schema keeps, when None) and `p_ctr`, `p_cvr`, `p_ctcvr` (float32); an input without rows has none, and the
    manifest says so. Ranks take files in turn; one without a file left serves the others with its tables.

    A part is whole or absent. The same call goes on where a killed or failed one stopped: parts that are done are not made again, nor their
    inputs read, unless these changed. DataError where an input changes while it is scored.
    """
    require_matching_packages()
    started = time.perf_counter()
    with ExitStack() as stack:
        runtime = stack.enter_context(distributed_runtime())
        on_main(runtime, lambda: _refuse(run, inputs, out, overwrite))
        here = stack.enter_context(run_here(run, runtime))
        opened, files = on_main(runtime, lambda: _open(here, inputs))
        kept = tuple(opened.schema.keep if keep is None else keep)
        _check_names(kept)
        model = TrainedModel(opened, runtime)
        scorer = _Scorer(opened, model, runtime, kept)
        identity = on_main(runtime, lambda: job_identity(opened, files, kept, scorer.batch_rows))
        place = resumable_folder(out, "predictions", overwrite, identity, keeps=True) if runtime.is_main else nullcontext(out)
        with place as opened_folder:
            folder = on_main(runtime, lambda: opened_folder)
            todo = on_main(runtime, lambda: take_up(folder, files))
            scorer.score(folder, [(number, files[number]) for number in todo])
            dist.barrier(group=runtime.group)  # all ranks have written their records
            parts = on_main(runtime, lambda: finish(folder, len(files)))
            content = {"run": str(run), "schema_hash": opened.schema.hash(), "columns": [*kept, *PREDICTION_COLUMNS], "files": parts}
            rows = sum(int(part["rows"]) for part in parts)
            summary = {"rows": rows, "seconds": round(time.perf_counter() - started, 3)}
            on_main(runtime, lambda: _complete(folder, {**content, **summary, "made_from": identity}))
        num_parts = sum(part["path"] is not None for part in parts)
        told = {"parts": num_parts, "parts_done_before": len(files) - len(todo), **summary}
        return {"predictions": str(out), **told, "columns": content["columns"]}


def _complete(folder: Path, manifest: dict[str, Any]) -> None:
    write_manifest(folder, "predictions", manifest)
    forget(folder)


class _Scorer:
    """One rank's scoring."""

    def __init__(self, run: Run, model: TrainedModel, runtime: Runtime, kept: tuple[str, ...]) -> None:
        self.run, self.model, self.runtime, self.kept = run, model, runtime, kept
        self.batch_rows = max(1, run.config.training.global_batch_size // runtime.world_size)

    def score(self, folder: Path, files: Sequence[tuple[int, RawFile]]) -> None:
        """Score this rank's files, of which each has its number: every `world_size`-th. All ranks make the same number of calls to the
        model. RunError when the disk is full, of any rank: rank 0 alone is in `resumable_folder`."""
        mine = files[self.runtime.rank :: self.runtime.world_size]
        name = "score" if self.runtime.world_size == 1 else f"score (rank 0 of {self.runtime.world_size})"
        with Progress(name, None, self.runtime.is_main) as progress, telling_of_disk(folder, TAKEN_UP):
            for done, (number, file) in enumerate(mine):
                for rows in self._score_file(folder, number, file):
                    progress.add(rows, f"file {done + 1} of {len(mine)}")
            self._serve_others()

    def _score_file(self, folder: Path, number: int, file: RawFile) -> Iterator[int]:
        """Write one file's part, and then its record; yield the rows of each block."""
        path, before = folder / part_name(number), states_of(file)
        partial = path.with_name(f".{path.name}.partial")
        writer: pq.ParquetWriter | None = None
        rows = 0
        blocks = encode_raw(self.run.schema, self.run.path / "vocabulary", [file], self.kept, block_rows=BLOCK_ROWS)
        try:
            for block in read_ahead(blocks, 2):
                table = self._score_block(block)
                writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd")
                writer.write_table(table)
                rows += table.num_rows
                yield table.num_rows
        finally:
            if writer is not None:
                writer.close()
        if writer is not None:
            os.replace(partial, path)
        finish_part(folder, number, file, before, None if writer is None else path.name, rows)

    def _score_block(self, block: EncodedBlock) -> pa.Table:
        columns = decode(block.table, self.run.schema, labels=False, where=str(block.file))
        logits: list[Predictions] = []
        for start in range(0, columns.num_rows, self.batch_rows):
            part = Slice(columns, start, min(start + self.batch_rows, columns.num_rows))
            logits.append(self._forward([part]))
        ctr = np.concatenate([each.ctr_logit.numpy() for each in logits])
        cvr = np.concatenate([each.cvr_logit.numpy() for each in logits])
        if not (np.isfinite(ctr).all() and np.isfinite(cvr).all()):
            raise RunError(f"{block.file}: the model of {self.run.path} gives predictions that are no numbers", "train it again")
        scores = dict(zip(PREDICTION_COLUMNS, (sigmoid(ctr), sigmoid(cvr), sigmoid(ctcvr_logits(ctr, cvr))), strict=True))
        kept = {name: block.table.column(KEPT_PREFIX + name) for name in self.kept}
        return pa.table({**kept, **{name: values.astype(np.float32) for name, values in scores.items()}})

    def _forward(self, slices: Sequence[Slice]) -> Predictions:
        """The model on rows of this rank; an empty call of all ranks ends it.

        Of several ranks all pad to a whole batch: a prediction is then the same bits whatever the other ranks have.
        """
        self._have_rows(True)
        rows = sum(part.stop - part.start for part in slices)
        return self.model(assemble(slices, self.run.schema, padded_rows=self.batch_rows if self.runtime.world_size > 1 else rows))

    def _serve_others(self) -> None:
        """Take part in the other ranks' calls until nobody has rows left."""
        while self._have_rows(False):
            self.model(assemble([], self.run.schema, padded_rows=self.batch_rows))

    def _have_rows(self, has: bool) -> bool:
        """Whether any rank has."""
        told = torch.tensor([has], dtype=torch.int64, device=self.runtime.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.runtime.group)
        return bool(told)


def _refuse(run: DataPath, inputs: Sequence[Path], out: Path, overwrite: bool) -> None:
    refuse_existing(out, "predictions", overwrite)
    refuse_overlap(out, [run, *inputs])


def _open(run: Path, inputs: Sequence[Path]) -> tuple[Run, list[RawFile]]:
    opened = Run.open(run)
    files = [file for path in inputs for file in raw_files(opened.schema.source, path, labels=False)]
    return opened, files


def _check_names(kept: Sequence[str]) -> None:
    taken = sorted(set(kept) & set(PREDICTION_COLUMNS))
    if taken:
        raise ConfigError(f"cannot keep column {taken[0]!r}: predictions are written under that name", "leave it out of --keep")

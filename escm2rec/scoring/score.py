"""The `score` verb: candidate logs in, predictions out, in the order of the input."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from escm2rec.doctor import require_matching_packages
from escm2rec.engine import local_engine, ray_engine
from escm2rec.errors import ConfigError, DataError
from escm2rec.folder import refuse_existing, refuse_overlap, resumable_folder, write_manifest
from escm2rec.models.predictions import Predictions
from escm2rec.parallel import default_workers
from escm2rec.paths import DataPath
from escm2rec.preprocess.raw import write_lookups
from escm2rec.preprocess.rejections import NOT_WANTED, Rejected
from escm2rec.preprocess.where import Where
from escm2rec.progress import Progress
from escm2rec.reader.columns import Columns, Slice, assemble
from escm2rec.scoring import coverage
from escm2rec.scoring.inputs import LogFile, log_files
from escm2rec.scoring.job import BATCH_ROWS, LOOKUPS, MODEL, FileScorer, Job, Record, score_one, shared_model
from escm2rec.scoring.options import Options
from escm2rec.scoring.output import RANK, output_columns
from escm2rec.scoring.parts import BEST, claimed, forget, is_empty, link, records_of, rows_told, states_of, take_back, take_up
from escm2rec.scoring.summary import estimated_rows, tell_files
from escm2rec.scoring.top import BY, Top, write_best
from escm2rec.serving.artifact import Artifact, artifact_here
from escm2rec.serving.mapped import write_model
from escm2rec.sharding.runtime import Runtime, distributed_runtime, on_main
from escm2rec.training.fetched import run_here
from escm2rec.training.run import Run
from escm2rec.training.trained import TrainedModel
from escm2rec.workers import SMALL_BYTES

POLL_S = 0.5
FEW = 64  # files, whose sizes are asked for before processes are started for them
ROOM = 0.8  # of the machine's memory that tables may take, for each machine to have them whole

logger = logging.getLogger(__name__)


def score(
    run: DataPath | None,
    inputs: Sequence[str | Path],
    out: Path,
    options: Options | None = None,
    overwrite: bool = False,
    model: DataPath | None = None,
) -> Record:
    """Score logs with a run, or with the `model` that `export` made of one, into Parquet parts, one an input file, rows in the order of the
    input; called by all ranks alike.

    Rows pass through the run's own schema and vocabulary, or are encoded already; labels are neither needed nor read. Files are scored by
    processes of this machine, by the ranks of torchrun, or on a Ray cluster; none waits for another.

    A part is whole or absent. The same call goes on where a killed or failed one stopped: parts that are done are not made again, nor their
    inputs read, unless these changed. DataError where an input changes while it is scored, and for a file that cannot be scored, unless
    such files are skipped; then the result's `failed` counts them, and the same call tries them again.
    """
    require_matching_packages()
    started = time.perf_counter()
    options = options or Options()
    with ExitStack() as stack:
        runtime = stack.enter_context(distributed_runtime())
        place = on_main(runtime, lambda: _one_of(run, model))
        on_main(runtime, lambda: _refuse_options(options, runtime, out, inputs, model is not None))
        here = stack.enter_context((run_here if model is None else artifact_here)(place, runtime))
        opened, files = on_main(runtime, lambda: _open(here, model is not None, [str(each) for each in inputs], options.on_error == "skip"))
        job, shared = on_main(runtime, lambda: _job(opened, files, options, runtime, out))
        replaces = on_main(runtime, lambda: _refuse(place, files, out, overwrite, job.identity))
        with _place(job, out, replaces) if runtime.is_main else nullcontext(out):
            todo = on_main(runtime, lambda: take_up(job.folder, files, [job.folder, job.parts]))
            on_main(runtime, lambda: _prepare(job, shared, todo))
            with _progress(job, [files[number] for number in todo], runtime):
                _score(job, shared, [(number, files[number]) for number in todo], options, runtime)
            dist.barrier(group=runtime.group)  # all ranks have written their records
            records, result = on_main(runtime, lambda: _finish(job, place, len(files), len(files) - len(todo), options, started, out))
        if runtime.is_main:
            tell_files(records)
        return result


@contextmanager
def _place(job: Job, out: Path, replaces: bool) -> Iterator[Path]:
    """The unfinished folder; one in which nothing was done goes with the error that ended it."""
    with resumable_folder(out, "predictions", replaces, job.identity, keeps=True) as folder:
        try:
            yield folder
        except (ConfigError, DataError):
            if is_empty(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _one_of(run: DataPath | None, model: DataPath | None) -> DataPath:
    place = run if model is None else model
    if place is None or (run is not None and model is not None):
        raise ConfigError("give either --run or --model", "--run takes what train made, --model what export made of it")
    return place


def _refuse_options(options: Options, runtime: Runtime, out: Path, inputs: Sequence[str | Path], of_artifact: bool) -> None:
    launched = "WORLD_SIZE" in os.environ
    if re.match(r"\w+:/", str(out)):
        raise ConfigError(f"--out {out}: predictions are written to a local folder", "copy them to the store once they are whole")
    if not all(str(each) for each in inputs):
        raise ConfigError("--input names nothing", "give a file, a folder, a pattern or a URL")
    inside = next((each for each in map(Path, inputs) if each.is_dir() and out.resolve().is_relative_to(each.resolve())), None)
    if inside is not None:
        raise ConfigError(
            f"the output folder {out} lies in the input {inside}: its parts would be inputs the next time", "choose another --out"
        )
    if options.ray_address is not None and launched:
        raise ConfigError("--engine ray and torchrun both start processes", "leave one of them out")
    if options.processes is not None and (launched or options.ray_address is not None):
        raise ConfigError(
            "--processes is of this machine alone", "torchrun's --nproc-per-node, or the Ray cluster, says how many there are"
        )
    if of_artifact and options.tables is not None:
        raise ConfigError("--tables is of runs: a model that was exported is loaded whole", "leave it out, or score with --run")
    named = [each.partition("=")[2 if "=" in each else 0].strip() for each in options.columns or ()]
    if of_artifact and "propensity" in (options.score, *named):
        raise ConfigError("a model that was exported has no propensity: it is of training", "leave it out, or score with --run")
    if options.tables == "sharded" and (options.ray_address is not None or (options.processes or 1) > 1):
        hint = "leave out --engine ray and --processes, and start ranks by torchrun"
        raise ConfigError("--tables sharded is of ranks that call each other", hint)
    if options.tables == "shared" and runtime.device.type == "cuda":
        raise ConfigError(
            "--tables shared is for cores, and this rank has a GPU", "leave it out, or hide the GPUs: CUDA_VISIBLE_DEVICES=''"
        )


def _open(place: Path, of_artifact: bool, inputs: Sequence[str], skips: bool) -> tuple[Run | Artifact, list[LogFile]]:
    opened = Artifact.open(place) if of_artifact else Run.open(place)
    coverage.trained_on(opened.path)  # one that cannot be read is told now
    return opened, log_files(opened.schema, inputs, skips)


def _job(trained: Run | Artifact, files: Sequence[LogFile], options: Options, runtime: Runtime, out: Path) -> tuple[Job, bool]:
    """The job, and whether its tables are shared. A job of another identity begins anew.

    The run is by what its manifest says, not by its path, which of one on a store is another each time. Inputs are by their paths; whether
    one changed, records say.
    """
    columns = output_columns(trained.schema, options.keep, options.columns, options.by)
    where = None if options.where is None else Where.parse(options.where)
    top = Top.of(options.top_k, options.by, options.score, columns)
    shared = isinstance(trained, Artifact) or _shares_tables(trained, options, runtime)
    batch_rows = BATCH_ROWS if isinstance(trained, Artifact) or shared else _sharded_batch(trained, runtime)
    content = [[asdict(column) for column in columns], options.where, top and asdict(top), options.bad_rows, asdict(options.layout)]
    made_from = [trained.manifest, trained.schema.hash(), [file.path for file in files], content, batch_rows, shared, options.finds_repeats]
    identity = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = out.absolute().with_name(f".{out.name}.partial")
    counts, skips = options.bad_rows == "count", options.on_error == "skip"
    return Job(identity, trained, folder, columns, options.layout, where, top, counts, skips, options.finds_repeats), shared


def _shares_tables(run: Run, options: Options, runtime: Runtime) -> bool:
    """Whether every machine has all tables once, or each rank a share."""
    table_bytes = sum(feature.num_embeddings * run.config.model.embedding_dim * 4 for feature in run.schema.tables)
    fits = table_bytes <= ROOM * runtime.memory_bytes() * runtime.local_world_size
    return options.tables == "shared" or (options.tables is None and runtime.device.type == "cpu" and (fits or runtime.world_size == 1))


def _sharded_batch(run: Run, runtime: Runtime) -> int:
    return max(1, run.config.training.global_batch_size // runtime.world_size)


def _refuse(trained: DataPath, files: Sequence[LogFile], out: Path, overwrite: bool, identity: str) -> bool:
    """Whether what is at `out` may be replaced: when asked for, or when it lacks files of this very job."""
    replaces = overwrite or take_back(out, identity)
    refuse_existing(out, "predictions", replaces)
    refuse_overlap(out, [trained, *(path for file in files if file.raw is not None for path in file.raw.all_paths)])
    return replaces


def _prepare(job: Job, shared: bool, todo: Sequence[int]) -> None:
    """Write what all processes map, unless it is there from before."""
    place = job.folder / MODEL
    if not todo:
        return
    if not place.exists():
        partial = job.folder / f".{MODEL}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if shared and isinstance(job.trained, Run):
            write_model(job.trained, partial)
        write_lookups(job.trained.schema, job.trained.path / "vocabulary", partial / LOOKUPS)
        os.replace(partial, place)
    if isinstance(job.trained, Artifact):  # each time: a job may go on elsewhere, or after the file has changed
        job.trained.check()
        (place / job.trained.file.name).unlink(missing_ok=True)
        link(job.trained.file, place / job.trained.file.name)


def _score(job: Job, shared: bool, todo: Sequence[tuple[int, LogFile]], options: Options, runtime: Runtime) -> None:
    """Score the files that are left, wherever that is done."""
    if not todo:
        return
    workers = max(1, default_workers() // runtime.local_world_size)
    if not shared:
        assert isinstance(job.trained, Run)
        model = _ShardedModel(job.trained, runtime)
        _score_here(FileScorer(job, model, model.batch_rows, workers), job, todo)
        model.serve_others()
        return
    if options.ray_address is not None:
        with ray_engine(options.ray_address) as engine:
            _drain(engine.map(partial(score_one, job), todo))
        return
    processes = _processes(job, options, [file for _, file in todo]) if "WORLD_SIZE" not in os.environ else 1
    if processes > 1:
        with local_engine(processes) as engine:
            _drain(engine.map(partial(score_one, job), todo))
    else:
        _score_here(FileScorer(job, shared_model(job), workers=workers), job, todo)


def _drain(records: Iterator[Record]) -> None:
    for _ in records:
        pass


def _score_here(scorer: FileScorer, job: Job, todo: Sequence[tuple[int, LogFile]]) -> None:
    """Score the files that no other rank takes."""
    files = dict(todo)
    for number in claimed(job.folder, list(files)):
        scorer.score(number, files[number])


def _processes(job: Job, options: Options, files: Sequence[LogFile]) -> int:
    if options.processes is not None:
        return min(options.processes, len(files))
    if isinstance(job.trained, Artifact):
        return 1  # each has the tables once more, and one runs on all cores
    few = len(files) <= FEW
    small = few and sum(state["bytes"] for file in files for state in states_of(file)) < SMALL_BYTES
    return 1 if small else min(default_workers(), len(files))


@contextmanager
def _progress(job: Job, files: Sequence[LogFile], runtime: Runtime) -> Iterator[None]:
    """Show on rank 0 what all processes have scored."""
    if not runtime.is_main or not files:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        seen = 0
        while not done.wait(POLL_S):
            try:
                rows = rows_told(job.folder)
            except OSError:  # the folder is gone: who writes there says so
                return
            progress.add(rows - seen)
            seen = rows

    with Progress("score", estimated_rows(files)) as progress:
        thread = threading.Thread(target=watch, name="escm2rec-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _ShardedModel:
    """A model whose tables are the ranks' together: all make the same number of calls."""

    def __init__(self, run: Run, runtime: Runtime) -> None:
        self._model, self._runtime, self._schema = TrainedModel(run, runtime), runtime, run.schema
        self.batch_rows = _sharded_batch(run, runtime)

    def __call__(self, columns: Columns, start: int, stop: int) -> Predictions:
        """Logits of rows of this rank. Several ranks all pad to a whole batch: a prediction is the same bits whatever others have."""
        self._have_rows(True)
        padded = self.batch_rows if self._runtime.world_size > 1 else stop - start
        return self._model(assemble([Slice(columns, start, stop)], self._schema, padded_rows=padded))

    def propensity(self, predictions: Predictions) -> Tensor:
        """q of such logits."""
        return self._model.propensity(predictions)

    def serve_others(self) -> None:
        """Take part in the other ranks' calls until nobody has rows left."""
        while self._have_rows(False):
            self._model(assemble([], self._schema, padded_rows=self.batch_rows))

    def _have_rows(self, has: bool) -> bool:
        """Whether any rank has."""
        told = torch.tensor([has], dtype=torch.int64, device=self._runtime.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._runtime.group)
        return bool(told)


def _finish(
    job: Job, place: DataPath, num_files: int, done_before: int, options: Options, started: float, out: Path
) -> tuple[list[Record], Record]:
    """Find the best of all and write the manifest; the records of the files, and the result."""
    records = records_of(job.folder, num_files)
    names = [column.name for column in job.columns]
    scored = sum(int(record["rows"]) for record in records)
    if job.top is not None:
        records = write_best(job.folder, records, job.top, BY, names, job.layout)
    rejected = Rejected(refuse=False)
    held: dict[str, list[int]] = {}
    for record in records:
        rejected.merge(record.get("rejected", {}))
        for name, counts in record.get("held", {}).items():
            held[name] = [a + b for a, b in zip(held.get(name, [0, 0, 0]), counts, strict=True)]
    failed = sum("error" in record for record in records)
    trained = coverage.trained_on(job.trained.path)
    rows = sum(int(part["rows"]) for record in records for part in record["parts"])
    not_selected = rejected.reasons.pop(NOT_WANTED.name, {"rows": 0})["rows"]
    summary = {"rows": rows, "rows_scored": scored, "not_selected": not_selected, "rejected": rejected.rows, "failed": failed}
    content = {
        "model" if isinstance(job.trained, Artifact) else "run": str(place),
        "schema_hash": job.trained.schema.hash(),
        "columns": [*names, *([RANK] if job.top is not None else [])],
        "where": options.where,
        "top": job.top and asdict(job.top),
        **summary,
        "rejected_by_reason": rejected.reasons,
        "features": coverage.compare(job.trained.schema, scored, held, trained, options.warn_gap),
        "files": [record if failed else {key: each for key, each in record.items() if key not in ("held", BEST)} for record in records],
        "made_from": job.identity,
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_manifest(job.folder, "predictions", content)
    forget(job.folder, [MODEL] if failed else [MODEL, BEST])
    parts = sum(len(record["parts"]) for record in records)
    told = {"files": num_files, "files_done_before": done_before, "parts": parts, **summary, "seconds": content["seconds"]}
    return records, {"predictions": str(out), **told, "columns": content["columns"]}

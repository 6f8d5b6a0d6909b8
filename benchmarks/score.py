"""Scoring from Parquet to Parquet against the bare forward, on as many processes, one thread each, which share one copy of the tables.

    python -m benchmarks.score

The reference shape: 20 tables of 1M x 16, 29 ids a row, three towers 320-128-64-1, of which scoring needs two. The same rows as encoded
columns, as raw ids that are dense whole numbers, and as raw ids that are any whole numbers of 63 bits; each in files of 1M rows.

bare: the model on batches that lie in memory. Rounds take all in turn, every other one backwards; a ratio is of the rows/s of one round.
`core_us` is processor time a row by stage, of one process that does one stage after another. `same` is the largest difference of what is
written for raw rows and encoded ones.

repeats: encoded rows of which 50 after each other share half of the features, as those of one user; one_by_one: the same, each row for
itself. pandas: a loop as a user would write it, over the raw files (fewer rows), with embedding bags of torch on all cores. ray_data:
`map_batches` of Ray Data over the encoded files, with the same model, mapped, in as many actors, after they have started.

memory: what the command takes for 1 M and for 50 M raw rows (files that are linked), two processes together; with --memory nothing else is
measured. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from benchmarks.machine import facts, run_and_watch
from benchmarks.reference import LIST_LENGTH, NUM_LISTS, NUM_SINGLE, TABLE_ROWS
from escm2rec.cells import to_cells
from escm2rec.config import TableSource, parse_config
from escm2rec.engine import Engine, local_engine
from escm2rec.folder import new_folder, sha256_of, write_manifest
from escm2rec.preprocess.files import PART_MARK
from escm2rec.preprocess.raw import write_lookups
from escm2rec.preprocess.rejections import Rejected
from escm2rec.preprocess.write import layout_of
from escm2rec.reader.columns import Slice, assemble, decode
from escm2rec.schema import Feature, Schema
from escm2rec.scoring import job as job_module
from escm2rec.scoring.inputs import log_files
from escm2rec.scoring.job import BATCH_ROWS, BLOCK_ROWS, LOOKUPS, MODEL, Job, score_one
from escm2rec.scoring.model import SharedModel
from escm2rec.scoring.options import Layout
from escm2rec.scoring.output import PartWriter, output_columns, output_table, predictions
from escm2rec.scoring.parts import take_up
from escm2rec.serving.mapped import write_model
from escm2rec.training.run import Run
from escm2rec.training.train import train
from escm2rec.workers import ready_workers

INPUTS = ("encoded", "raw", "raw_sparse")
FILE_ROWS = 1_000_000
PANDAS_ROWS = 131_072
PER_USER = 50
RAY_PASSES = 5
BARE_BATCHES = 12
TRAIN_ROWS = 65_536


def schema_of(vocabularies: Path) -> Schema:
    """All features have a vocabulary, whose row r (from 1) has the value of `values_of`."""
    known = {"value_type": "int64", "encoding": "vocabulary", "num_embeddings": TABLE_ROWS, "oov_rows": 1}
    names = [(f"single_{i}", "categorical") for i in range(NUM_SINGLE)] + [(f"list_{i}", "list") for i in range(NUM_LISTS)]
    features = []
    for name, kind in names:
        sha = sha256_of(vocabularies / f"{name}.parquet")
        features.append(Feature(name=name, kind=kind, column=name, vocabulary_sha256=sha, **known))
    return Schema(source=TableSource(kind="table"), features=tuple(features), keep=("row",))


def values_of(sparse: bool) -> Any:
    """The value of each table row: a whole number below 1M, or of 63 bits."""
    rng = np.random.default_rng(9)
    return rng.integers(0, 1 << 62, TABLE_ROWS) if sparse else rng.permutation(TABLE_ROWS)


def encoded_rows(schema: Schema, rows: int, first: int, seed: int) -> pa.Table:
    """Rows as preprocess writes them, ids as heavy-tailed as Zipf's with exponent 1."""
    rng = np.random.default_rng(seed)
    columns: dict[str, pa.Array] = {}

    def ids(count: int) -> Any:
        return np.exp(rng.random(count) * np.log(TABLE_ROWS - 1)).astype(np.int32)

    for feature in schema.features:
        if feature.kind == "categorical":
            columns[feature.name] = pa.array(ids(rows))
        else:
            offsets = np.concatenate(([0], np.cumsum(rng.poisson(LIST_LENGTH, rows))))
            columns[feature.name] = to_cells(ids(int(offsets[-1])), offsets)
    columns["kept.row"] = pa.array(np.arange(first, first + rows))
    fields = [pa.field(name, column.type, name.startswith("single_")) for name, column in columns.items()]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def raw_rows(schema: Schema, encoded: pa.Table, values: Any) -> pa.Table:
    """The same rows with the values that these ids stand for."""
    columns: dict[str, Any] = {"row": encoded["kept.row"]}
    decoded = decode(encoded, schema, labels=False, where="here")
    for feature in schema.features:
        column = decoded.jagged[feature.name]
        raw = pa.array(values[column.values])
        columns[feature.name] = raw if column.offsets is None else pa.ListArray.from_arrays(pa.array(column.offsets), raw)
    return pa.table(columns)


def write_inputs(root: Path, files: int, sparse: bool) -> Run:
    """A trained run, whose vocabularies are dense or sparse, and the files to score as they are for it."""
    name = "raw_sparse" if sparse else "raw"
    values = values_of(sparse)
    with new_folder(root / f"data-{name}", "data set", overwrite=True) as folder:
        (folder / "train").mkdir()
        (folder / "vocabulary").mkdir()
        table = {"value": values[1:], "count": np.full(TABLE_ROWS - 1, 5), "row": np.arange(1, TABLE_ROWS, dtype=np.int32)}
        for feature in [f"single_{i}" for i in range(NUM_SINGLE)] + [f"list_{i}" for i in range(NUM_LISTS)]:
            pq.write_table(pa.table(table), folder / "vocabulary" / f"{feature}.parquet")
        schema = schema_of(folder / "vocabulary")
        rng = np.random.default_rng(0)
        rows = encoded_rows(schema, TRAIN_ROWS, 0, 0)
        click = (rng.random(TRAIN_ROWS) < 0.04).astype(np.uint8)
        conversion = (click & (rng.random(TRAIN_ROWS) < 0.2)).astype(np.uint8)
        rows = rows.append_column("click", pa.array(click)).append_column("conversion", pa.array(conversion))
        pq.write_table(rows, folder / "train" / "part-00000.parquet", **layout_of(rows.schema))
        counts = {"rows": TRAIN_ROWS, "clicks": int(click.sum()), "conversions": int(conversion.sum())}
        schema.save(folder / "schema.json")
        splits = {"train": {**counts, "files": [{**counts, "path": "train/part-00000.parquet"}]}}
        write_manifest(folder, "data set", {"schema_hash": schema.hash(), "splits": splits, "negative_keep_rate": 1.0, "rejected": {}})
    train(config_of(schema), root / f"data-{name}", root / f"run-{name}", overwrite=True)
    for kind in [name] if sparse else ["encoded", name]:
        (root / kind).mkdir(exist_ok=True)
        for number in range(files):
            encoded = encoded_rows(schema, FILE_ROWS, number * FILE_ROWS, 100 + number)
            if kind == "encoded":
                encoded = encoded.replace_schema_metadata(PART_MARK)
                pq.write_table(encoded, root / kind / f"{number:05d}.parquet", row_group_size=32_768, **layout_of(encoded.schema))
            else:
                pq.write_table(raw_rows(schema, encoded, values), root / kind / f"{number:05d}.parquet", row_group_size=131_072)
    return Run.open(root / f"run-{name}")


def config_of(schema: Schema) -> Any:
    features = [{"name": feature.name, "kind": feature.kind} for feature in schema.features]
    return parse_config(
        {
            "data": {"source": {"kind": "table"}, "split": {"by": "hash", "train": 1.0}, "features": features, "keep": ["row"]},
            "model": {"embedding_dim": 16, "tower_hidden": [128, 64]},
            "objective": {"kind": "escm2-dr"},
            "training": {"epochs": 1, "global_batch_size": 8_192},
        }
    )


def job_of(run: Run, folder: Path, files: Sequence[Any], model_of: Path | None = None) -> Job:
    """A job in an unfinished folder, ready to be scored; its model is that of another job, if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = output_columns(run.schema, None, None)
    job = Job(str(folder), run, folder, columns, Layout(), None, None, False, False, True)
    take_up(folder, files, [folder])
    if model_of is not None:
        (folder / MODEL).symlink_to(model_of / MODEL)
    if not (folder / MODEL).exists():
        (folder / MODEL).mkdir()
        write_model(run, folder / MODEL)
        write_lookups(run.schema, run.path / "vocabulary", folder / MODEL / LOOKUPS)
    return job


def bare(job: Job, path: Path, batches: int) -> float:
    """Seconds of the forward on batches in memory, in a process of the pool that holds the model."""
    assert job_module._scorer is not None
    model = job_module._scorer[1]._model
    assert isinstance(model, SharedModel)
    held = _batches(job.trained.schema, path)
    with torch.inference_mode():
        for batch in held:
            model._head(model.inputs(batch, job.trained.schema))
        began = time.perf_counter()
        for number in range(batches):
            model._head(model.inputs(held[number % len(held)], job.trained.schema))
    return time.perf_counter() - began


def _batches(schema: Schema, path: Path) -> list[Any]:
    with pq.ParquetFile(path) as file:
        table = pa.Table.from_batches([next(iter(file.iter_batches(BATCH_ROWS * BARE_BATCHES)))])
    columns = decode(table, schema, labels=False, where=str(path))
    starts = range(0, BATCH_ROWS * BARE_BATCHES, BATCH_ROWS)
    return [assemble([Slice(columns, start, start + BATCH_ROWS)], schema) for start in starts]


def stages(job: Job, path: Path, encoded: bool) -> dict[str, float]:
    """Processor time a row by stage, µs, in this process on one thread: the stages of `FileScorer`, one after the other."""
    scorer = job_module.FileScorer(job, job_module.shared_model(job), workers=1)
    schema, spent = job.trained.schema, dict.fromkeys(("read", "encode", "decode", "forward", "write"), 0.0)
    writer, rows = PartWriter(job.folder, 99_999, job.layout), 0
    (file,) = log_files(schema, [str(path)])
    assert file.raw is not None
    blocks = iter(_clocked(spent, scorer._blocks(file, path, file.raw, Rejected(refuse=True))))
    with _reading(spent, path, schema, encoded):
        pass
    for block in blocks:
        with _clock(spent, "decode"):
            columns = decode(block.table, schema, labels=False, where="here")
        with _clock(spent, "forward"):
            logits = scorer._logits(columns)
        with _clock(spent, "write"):
            made = predictions(logits.ctr_logit, logits.cvr_logit, partial(scorer._model.propensity, logits))
            writer.write(output_table(job.columns, {"row": block.table.column("kept.row")}, made))
        rows += len(block.table)
    with _clock(spent, "write"):
        writer.finish()
    spent["encode"] -= spent["read"]
    return {name: round(seconds / rows * 1e6, 3) for name, seconds in spent.items()}


@contextmanager
def _clock(spent: dict[str, float], name: str) -> Iterator[None]:
    began = time.process_time()
    yield
    spent[name] += time.process_time() - began


def _clocked(spent: dict[str, float], blocks: Iterator[Any]) -> Iterator[Any]:
    while True:
        with _clock(spent, "encode"):
            block = next(blocks, None)
        if block is None:
            return
        yield block


@contextmanager
def _reading(spent: dict[str, float], path: Path, schema: Schema, encoded: bool) -> Iterator[None]:
    """The reading alone, once more."""
    names = [feature.name for feature in schema.features] + (["kept.row"] if encoded else ["row"])
    with _clock(spent, "read"), pq.ParquetFile(path) as file:
        for _ in file.iter_batches(BLOCK_ROWS, columns=names, use_threads=False):
            pass
    yield


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write_repeats(root: Path, schema: Schema, files: int) -> None:
    """Encoded rows of which PER_USER after each other share every second feature."""
    (root / "repeats").mkdir(exist_ok=True)
    of_user = pa.array(np.arange(FILE_ROWS) // PER_USER)
    for number in range(files):
        table = pq.read_table(root / "encoded" / f"{number:05d}.parquet")
        for feature in schema.features[::2]:
            place = table.schema.get_field_index(feature.name)
            table = table.set_column(place, table.schema.field(place), table[feature.name].combine_chunks().take(of_user))
        table = table.replace_schema_metadata(PART_MARK)
        pq.write_table(table, root / "repeats" / f"{number:05d}.parquet", row_group_size=32_768, **layout_of(table.schema))


def pandas_rate(run: Run, path: Path, values: Any, out: Path) -> float:
    """Rows/s of a loop over a table, as a user would write it: ids by a Series, bags and layers of torch."""
    import pandas as pd

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ids = pd.Series(np.arange(1, TABLE_ROWS), index=values[1:])
    bags = {each.name: nn.EmbeddingBag(TABLE_ROWS, 16, mode="mean") for each in run.schema.features}
    towers = [nn.Sequential(nn.Linear(320, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)) for _ in range(3)]
    frame = pd.read_parquet(path).iloc[:PANDAS_ROWS]
    began = time.perf_counter()
    scores = []
    for start in range(0, len(frame), BATCH_ROWS):
        batch, pooled = frame.iloc[start : start + BATCH_ROWS], []
        for feature in run.schema.features:
            cells = batch[feature.name]
            flat = cells.explode().dropna() if feature.is_list else cells
            lengths = cells.str.len().to_numpy() if feature.is_list else np.ones(len(cells), np.int64)
            rows = flat.map(ids).fillna(0).to_numpy(np.int64)
            offsets = np.concatenate(([0], np.cumsum(lengths)[:-1]))
            with torch.no_grad():
                pooled.append(bags[feature.name](torch.from_numpy(rows), torch.from_numpy(offsets)))
        with torch.no_grad():
            inputs = torch.cat(pooled, dim=1)
            scores.append(torch.sigmoid(torch.cat([tower(inputs) for tower in towers[:2]], dim=1)).numpy())
    found = np.concatenate(scores)
    frame.assign(p_ctr=found[:, 0], p_cvr=found[:, 1], p_ctcvr=found.prod(axis=1))[["row", "p_ctr", "p_cvr", "p_ctcvr"]].to_parquet(out)
    return len(frame) / (time.perf_counter() - began)


class RayScorer:
    """An actor of Ray Data that predicts encoded rows with the mapped model."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        self._job, self._scorer = job, job_module.FileScorer(job, job_module.shared_model(job), workers=1)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predictions of a batch."""
        columns = decode(table.combine_chunks(), self._job.trained.schema, labels=False, where="ray")
        logits = self._scorer._logits(columns)
        made = predictions(logits.ctr_logit, logits.cvr_logit, partial(self._scorer._model.propensity, logits))
        return output_table(self._job.columns, {"row": table.column("kept.row")}, made)


def ray_data_rate(job: Job, folder: Path, files: int, processes: int, out: Path) -> float:
    """Rows/s of `map_batches`: of RAY_PASSES over the files and of one, so that what it takes to start is in neither."""
    import ray
    import ray.data

    ray.init(num_cpus=2 * processes, log_to_driver=False)  # its readers wait for a processor that actors hold
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:

        def seconds(times: int) -> float:
            paths = [str(folder / f"{number:05d}.parquet") for number in range(files)] * times

            def work() -> None:
                rows = ray.data.read_parquet(paths, override_num_blocks=len(paths))
                made = rows.map_batches(
                    RayScorer,
                    fn_constructor_args=(job,),
                    batch_size=BLOCK_ROWS,
                    batch_format="pyarrow",
                    concurrency=processes,
                    num_cpus=1,
                )
                made.write_parquet(str(out / str(times)))

            return timed(work)

        once = seconds(1)
        return (RAY_PASSES - 1) * files * FILE_ROWS / (seconds(RAY_PASSES) - once)
    finally:
        ray.shutdown()


def memory(run: Run, raw: Path, root: Path) -> dict[str, dict[str, float]]:
    """Most memory of the command, MB, on two processes: two files of half a million raw rows, and 50 of a million."""
    half = root / "half.parquet"
    pq.write_table(pq.read_table(raw).slice(0, FILE_ROWS // 2), half)
    found = {}
    for source, files in ((half, 2), (raw, 50)):
        logs, out = root / f"links-{files}", root / f"memory-{files}"
        logs.mkdir()
        for number in range(files):
            os.link(source, logs / f"{number:05d}.parquet")
        began = time.perf_counter()
        command = [sys.executable, "-m", "escm2rec", "score", "--run", str(run.path), "--input", str(logs), "--processes", "2"]
        said, peak = run_and_watch([*command, "--out", str(out)])
        rows = json.loads(said)["rows"]
        found[f"{rows:,} rows"] = {**peak, "rows_per_s_with_start": round(rows / (time.perf_counter() - began))}
    return found


def main() -> None:
    """Write the data, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=4, help="of 1M rows each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="without pandas, Ray Data and memory")
    parser.add_argument("--memory", action="store_true", help="memory alone")
    asked = parser.parse_args()
    if asked.files < asked.processes:
        parser.error("--files: at least one a process")
    ready_workers("escm2rec.scoring.job")
    with tempfile.TemporaryDirectory(prefix="escm2rec-bench-") as name:
        root = Path(name)
        if asked.memory:
            told = {"memory_mb": memory(write_inputs(root, 1, sparse=False), root / "raw" / "00000.parquet", root)}
        else:
            told = measured(root, asked.files, asked.rounds, asked.processes, asked.alone)
    print(json.dumps({**facts(), **told}, indent=1))


def measured(root: Path, files: int, rounds: int, processes: int, alone: bool) -> dict[str, Any]:
    """All figures."""
    runs = {"raw": write_inputs(root, files, sparse=False), "raw_sparse": write_inputs(root, files, sparse=True)}
    write_repeats(root, runs["raw"].schema, files)
    kinds = [*INPUTS, "repeats", "one_by_one"]
    folders = {kind: root / ("repeats" if kind == "one_by_one" else kind) for kind in kinds}
    logs = {kind: log_files(runs["raw"].schema, [str(folders[kind] / f"{n:05d}.parquet") for n in range(files)]) for kind in kinds}
    own = ("raw", "raw_sparse")
    jobs = {kind: job_of(runs[kind], root / f"out-{kind}", logs[kind]) for kind in own}
    jobs |= {kind: job_of(runs["raw"], root / f"out-{kind}", logs[kind], root / "out-raw") for kind in kinds if kind not in own}
    jobs["one_by_one"] = replace(jobs["one_by_one"], finds_repeats=False)
    with local_engine(processes) as engine:
        found = [measure(engine, jobs, logs, root, processes, number) for number in range(rounds)]
    spent = {kind: stages(jobs[kind], root / kind / "00000.parquet", kind == "encoded") for kind in INPUTS}
    told: dict[str, Any] = {
        "rows": files * FILE_ROWS,
        "processes": processes,
        "rows_per_s": {kind: round(statistics.median(each[kind] for each in found)) for kind in found[0]},
        "of_bare": {kind: _ratio(found, kind, "bare") for kind in INPUTS},
        "repeats_over_one_by_one": _ratio(found, "repeats", "one_by_one"),
        "core_us": spent,
        "same": _difference(root, "encoded", "raw"),
        "same_repeats": _difference(root, "repeats", "one_by_one"),
    }
    if alone:
        return told
    rates = [pandas_rate(runs["raw"], root / "raw" / "00000.parquet", values_of(sparse=False), root / "pandas.parquet") for _ in range(3)]
    with contextlib.redirect_stdout(sys.stderr):  # its own words
        by_ray = [ray_data_rate(jobs["encoded"], root / "encoded", files, processes, root / f"ray-{n}") for n in range(3)]
    told["pandas"] = {"rows_per_s": [round(rate) for rate in rates], "raw_over_it": _over(found, "raw", rates)}
    told["ray_data"] = {"rows_per_s": [round(rate) for rate in by_ray], "encoded_over_it": _over(found, "encoded", by_ray)}
    told["memory_mb"] = memory(runs["raw"], root / "raw" / "00000.parquet", root)
    return told


def _ratio(rounds: Sequence[dict[str, float]], kind: str, other: str) -> dict[str, Any]:
    ratios = [each[kind] / each[other] for each in rounds]
    return {"median": round(statistics.median(ratios), 3), "rounds": [round(each, 3) for each in ratios]}


def _over(rounds: Sequence[dict[str, float]], kind: str, rates: Sequence[float]) -> float:
    return round(statistics.median(each[kind] for each in rounds) / statistics.median(rates), 2)


def _difference(root: Path, one: str, other: str) -> float:
    frames = [pl.read_parquet(root / f"out-{kind}" / "part-0000[0-9].parquet") for kind in (one, other)]
    columns = ("p_ctr", "p_cvr", "p_ctcvr")
    return max(float(np.abs(frames[0][name].to_numpy() - frames[1][name].to_numpy()).max()) for name in columns)


def measure(engine: Engine, jobs: dict[str, Job], files: dict[str, list[Any]], root: Path, processes: int, number: int) -> dict[str, float]:
    """Rows/s of one round, the bare forward's and those of each input, in turn."""
    rows = len(files["raw"]) * FILE_ROWS
    found: dict[str, float] = {}

    def bare_rate() -> None:
        _warm(engine, jobs["encoded"], files["encoded"], processes)
        batches = rows // processes // BATCH_ROWS
        seconds = list(engine.map(partial(bare, jobs["encoded"], batches=batches), [root / "encoded" / "00000.parquet"] * processes))
        found["bare"] = processes * batches * BATCH_ROWS / max(seconds)

    def rate(kind: str) -> None:
        _warm(engine, jobs[kind], files[kind], processes)
        found[kind] = rows / timed(lambda: list(engine.map(partial(score_one, jobs[kind]), list(enumerate(files[kind])))))

    turns: list[Callable[[], None]] = [bare_rate, *(partial(rate, kind) for kind in jobs)]
    for turn in turns if number % 2 == 0 else reversed(turns):
        turn()
    print(json.dumps({name: round(value) for name, value in found.items()}), file=sys.stderr, flush=True)
    return found


def _warm(engine: Engine, job: Job, files: Sequence[Any], processes: int) -> None:
    """Let every process hold the job's model, and the pages of its tables."""
    list(engine.map(partial(score_one, replace(job)), list(enumerate(files))[:processes]))


if __name__ == "__main__":
    main()

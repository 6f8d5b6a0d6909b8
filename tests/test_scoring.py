"""Scoring raw rows on real ranks: every row once, in the order of the input, as training would have encoded it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.machine import facts
from escm2rec.config import load_config
from escm2rec.errors import ConfigError, DataError, RunError
from escm2rec.evaluation.evaluate import evaluate
from escm2rec.paths import data_path
from escm2rec.preprocess import RawFile, preprocess
from escm2rec.preprocess.raw import RawEncoder
from escm2rec.scoring.inputs import LogFile
from escm2rec.scoring.job import FileScorer
from escm2rec.scoring.options import Options
from escm2rec.scoring.score import score
from tests.preprocess_logs import read_split
from tests.ranks import run_ranks
from tests.raw_tables import raw_table, write_config
from tests.s3_server import s3_server

KILLS = int(os.environ.get("ESCM2REC_SCORE_KILLS", "1"))  # `make prove`: 30
KILLS_PROOF = os.environ.get("ESCM2REC_SCORE_KILLS_PROOF")  # where to write what was shown
COPIES = 12  # of each candidate file, for a job that is killed
TRAIN_ROWS = 4_000
CANDIDATES = {"a.parquet": 1_500, "b.parquet": 0, "c.parquet": 701, "d.parquet": 64}
NUM_CANDIDATES = sum(CANDIDATES.values())
TABLES = ("shared", "sharded")
READ_BLOCKS = RawEncoder.blocks
Predictions = dict[tuple[str, int], tuple[Any, Path]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and candidate files without labels whose users and shops are partly unknown to it."""
    root = tmp_path_factory.mktemp("scoring")
    (root / "logs").mkdir()
    (root / "candidates").mkdir()
    pq.write_table(raw_table(TRAIN_ROWS, 0, labels=True), root / "logs" / "train.parquet")
    for seed, (name, rows) in enumerate(CANDIDATES.items(), start=1):
        pq.write_table(raw_table(rows, seed, users=300), root / "candidates" / name)
    preprocess(load_config(write_config(root / "config.yaml")).data, root / "logs", root / "data")
    sharding = "training.sharding={user: row_wise, tags: data_parallel}"
    call = {"config_file": str(root / "config.yaml"), "data": str(root / "data"), "out": str(root / "run"), "overrides": [sharding]}
    (result,) = run_ranks(1, [("tests.training_calls:train_file", call)], root / "train")
    assert result["steps"] > 20
    return root


def score_call(folder: Path, path: Path, out: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """A call for `run_ranks` that scores `path` into the folder `out`."""
    return "tests.training_calls:score_run", {"run": str(folder / "run"), "inputs": [str(path)], "out": str(folder / out), **options}


@pytest.fixture(scope="module")
def predictions(folder: Path) -> dict[tuple[str, int], tuple[Any, Path]]:
    """Results and folders of scoring the candidates, by tables and ranks."""
    found: dict[tuple[str, int], Any] = {}
    for ranks in (1, 2, 3):
        calls = [score_call(folder, folder / "candidates", f"{how}-{ranks}", tables=how) for how in TABLES]
        found |= dict(zip([(how, ranks) for how in TABLES], run_ranks(ranks, calls, folder / f"ranks-{ranks}"), strict=True))
    return {(how, ranks): (result, folder / f"{how}-{ranks}") for (how, ranks), result in found.items()}


@pytest.fixture(scope="module")
def others(folder: Path) -> Any:
    """Other files scored on one rank: the training log, users unseen in training, chosen columns; and the test split, and it evaluated."""
    one = pq.read_table(folder / "candidates" / "d.parquet").slice(0, 1)
    users = pa.array([10**12, -5, None], pa.int64())
    pq.write_table(pa.concat_tables([one] * 3).set_column(1, "user", users).combine_chunks(), folder / "unseen.parquet")
    calls = [
        score_call(folder, folder / "logs", "train-log"),
        score_call(folder, folder / "unseen.parquet", "unseen"),
        score_call(folder, folder / "candidates" / "d.parquet", "kept", keep=["tags", "user"]),
        score_call(folder, folder / "data" / "test", "test-split"),
        ("tests.training_calls:evaluate_run", {"run": str(folder / "run"), "data": str(folder / "data")}),
    ]
    return run_ranks(1, calls, folder / "others")


def parts(out: Path) -> list[pl.DataFrame]:
    manifest = json.loads((out / "manifest.json").read_text())
    assert [Path(file["input"]).name for file in manifest["files"]] == list(CANDIDATES)
    assert [file["rows"] for file in manifest["files"]] == list(CANDIDATES.values())
    return [pl.read_parquet(out / part["path"]) for file in manifest["files"] for part in file["parts"]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("how", TABLES)
def test_every_row_is_scored_once_in_the_order_of_the_input(predictions: Predictions, folder: Path, how: str, ranks: int) -> None:
    result, out = predictions[how, ranks]
    assert (result["rows"], result["parts"]) == (NUM_CANDIDATES, 3)
    found = parts(out)
    inputs = [name for name, rows in CANDIDATES.items() if rows]
    for name, part in zip(inputs, found, strict=True):
        assert part.columns == ["row", "p_ctr", "p_cvr", "p_ctcvr"]
        assert part["row"].to_list() == pq.read_table(folder / "candidates" / name)["row"].to_pylist()


def test_a_run_on_a_store_scores_and_is_measured_as_in_its_folder(
    predictions: Predictions, folder: Path, others: Any, tmp_path: Path
) -> None:
    """What its model needs is fetched for the ranks of a machine, and gone when they end; the report goes to the run."""
    fetched = set(Path(tempfile.gettempdir()).glob("escm2rec-run-*"))
    with s3_server("runs"):
        store = fsspec.filesystem("s3")
        store.put(str(folder / "run"), "runs/run", recursive=True)
        store.rm("runs/run/report.json")  # of the folder
        store.pipe("runs/run/metrics.jsonl", b"not fetched")
        calls: list[tuple[str, dict[str, Any]]] = [
            (
                "tests.training_calls:score_run",
                {"run": "s3://runs/run", "inputs": [str(folder / "candidates")], "out": str(tmp_path / "out")},
            ),
            ("tests.training_calls:evaluate_run", {"run": "s3://runs/run", "data": str(folder / "data")}),
        ]
        scored, measured = run_ranks(2, calls, tmp_path / "ranks")
        report = json.loads(store.cat_file("runs/run/report.json"))
        assert store.exists("runs/run/report.html")
        with pytest.raises(ConfigError, match=r"^s3://runs/run/report\.json exists\nhint"):
            evaluate(data_path("s3://runs/run"), folder / "data")
        with pytest.raises(DataError, match=r"^no run at s3://runs/ru\nhint: did you mean s3://runs/run\?$"):
            score(data_path("s3://runs/ru"), [folder / "candidates"], tmp_path / "none")
        store.rm("runs/run/manifest.json")
        with pytest.raises(DataError, match=r"^the run at s3://runs/run is incomplete: it has no manifest\.json\nhint"):
            score(data_path("s3://runs/run"), [folder / "candidates"], tmp_path / "none")
    assert set(Path(tempfile.gettempdir()).glob("escm2rec-run-*")) == fetched
    for found, want in zip(parts(tmp_path / "out"), parts(predictions["shared", 2][1]), strict=True):
        assert found.equals(want)
    assert scored["rows"] == NUM_CANDIDATES
    manifest, of_folder = (json.loads((out / "manifest.json").read_text()) for out in (tmp_path / "out", predictions["shared", 2][1]))
    assert manifest["run"] == report["run"]["run"] == "s3://runs/run"
    assert manifest["made_from"] == of_folder["made_from"], "a job is taken up, wherever its run lies"
    assert measured["report"] == "s3://runs/run/report.html"
    assert measured["metrics"] == pytest.approx(others[-1]["metrics"], rel=1e-4, abs=1e-5)


def test_any_number_of_ranks_and_either_way_to_hold_tables_scores_the_same(predictions: Predictions) -> None:
    expected = pl.concat(parts(predictions["sharded", 1][1]))
    assert len(predictions) == 6
    for how, ranks in predictions:
        found = pl.concat(parts(predictions[how, ranks][1]))
        for name in ("p_ctr", "p_cvr", "p_ctcvr"):
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_are_the_same_bytes_whoever_scores_them(predictions: Predictions, ranks: int) -> None:
    assert bytes_of(predictions["shared", ranks][1]) == bytes_of(predictions["shared", 1][1])


def test_predictions_are_probabilities_that_multiply(predictions: Predictions) -> None:
    found = pl.concat(parts(predictions["shared", 1][1]))
    assert found.select(pl.col("p_ctr", "p_cvr", "p_ctcvr").is_between(0, 1).all()).row(0) == (True, True, True)
    np.testing.assert_allclose(found["p_ctcvr"], found["p_ctr"] * found["p_cvr"], rtol=1e-5)
    assert found["p_ctr"].std() > 0.01  # type: ignore[operator]
    assert found.schema["p_ctr"] == pl.Float32


def test_raw_rows_are_scored_as_evaluation_scores_encoded_ones(folder: Path, others: Any) -> None:
    """The training log scored raw, against evaluation of the encoded test split, which has the mean; and the split itself scored."""
    predicted = pl.read_parquet(folder / "train-log" / "part-00000.parquet")
    by_row = dict(zip(predicted["row"], predicted["p_ctr"], strict=True))
    tested = [row["kept.row"] for row in read_split(folder / "data", "test")]
    assert len(tested) > 300
    assert np.mean([by_row[row] for row in tested]) == pytest.approx(others[-1]["metrics"]["ctr_mean_predicted"], rel=1e-6)
    encoded = pl.read_parquet(folder / "test-split" / "part-00000.parquet")
    assert encoded["row"].to_list() == tested
    assert encoded["p_ctr"].to_list() == pytest.approx([by_row[row] for row in tested], rel=1e-6)


@pytest.mark.usefixtures("others")
def test_values_unseen_in_training_get_the_unknown_row(folder: Path) -> None:
    p = pl.read_parquet(folder / "unseen" / "part-00000.parquet")["p_ctr"].to_list()
    assert p[0] == pytest.approx(p[1], rel=1e-6), "both are unknown"
    assert p[2] != pytest.approx(p[0], rel=1e-4), "a missing user is no user"


@pytest.mark.usefixtures("others")
def test_keep_chooses_the_columns(folder: Path) -> None:
    part = pq.read_table(folder / "kept" / "part-00000.parquet")
    raw = pq.read_table(folder / "candidates" / "d.parquet")
    assert part.column_names == ["tags", "user", "p_ctr", "p_cvr", "p_ctcvr"]
    assert part["tags"].to_pylist() == raw["tags"].to_pylist()
    assert part["user"].to_pylist() == raw["user"].to_pylist()


def test_wrong_arguments_and_inputs_are_refused(folder: Path, predictions: Predictions) -> None:
    text, renamed, typed = folder / "text.parquet", folder / "renamed.parquet", folder / "typed.parquet"
    text.write_text("no table")
    raw = pq.read_table(folder / "candidates" / "d.parquet")
    pq.write_table(raw.rename_columns(["row", "usr", *raw.column_names[2:]]), renamed)
    pq.write_table(raw.set_column(1, "user", pa.array(["x"] * len(raw))), typed)
    run = str(folder / "run")
    wrong: dict[str, dict[str, Any]] = {
        f"the output folder {predictions['shared', 1][1]} exists": {
            "run": run,
            "inputs": [str(folder / "candidates")],
            "out": str(predictions["shared", 1][1]),
        },
        f"no raw logs at {folder / 'absent'}": {"run": run, "inputs": [str(folder / "absent")]},
        f"no run at {folder / 'absent'}": {"run": str(folder / "absent"), "inputs": [str(folder / "candidates")]},
        f"{folder / 'data'} is no run": {"run": str(folder / "data"), "inputs": [str(folder / "candidates")]},
        f"{text} is not a Parquet file": {"run": run, "inputs": [str(text)]},
        f"no file matches '{folder}/*.absent'": {"run": run, "inputs": [f"{folder}/*.absent"]},
        f"{folder / 'candidates' / 'd.parquet'} is among the inputs twice": {
            "run": run,
            "inputs": [str(folder / "candidates"), f"{folder}/candidates/d*"],
        },
        f"{folder / 'data'} is a data set": {"run": run, "inputs": [str(folder / "data")]},
        f"{renamed} has no column 'user'": {"run": run, "inputs": [str(renamed)]},
        "column 'user' holds string values, it was trained on int64": {"run": run, "inputs": [str(typed)]},
        "has no column 'rwo'": {"run": run, "inputs": [str(folder / "candidates")], "keep": ["rwo"]},
        "two columns are to be written as 'p_ctr'": {"run": run, "inputs": [str(folder / "candidates")], "keep": ["p_ctr"]},
    }
    calls = [("tests.training_calls:score_run", {"out": str(folder / f"wrong-{n}"), **each}) for n, each in enumerate(wrong.values())]
    found = run_ranks(1, calls, folder / "wrong")
    assert len(found) == len(wrong)
    for message, result in zip(wrong, found, strict=True):
        assert message in result["message"]
    assert not list(folder.glob("wrong-*")), "nothing half-written looks whole"


def test_a_full_disk_is_told_of_any_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`resumable_folder`, which tells of rank 0, is not there on the others."""

    def full(self: Any, number: int, file: Any) -> Any:
        raise OSError(errno.ENOSPC, "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device")

    monkeypatch.setattr(FileScorer, "_score", full)
    scorer = object.__new__(FileScorer)
    scorer._job = SimpleNamespace(folder=tmp_path, parts=tmp_path, skips_failed=True)  # type: ignore[assignment]
    hint = "make room there, then run the same command again: it goes on"
    told = rf"^cannot write {tmp_path}: No space left on device; .* are free there\nhint: {hint}"
    with pytest.raises(RunError, match=told):
        scorer.score(0, LogFile("a"))


# --- a job that ends early ----------------------------------------------------------------------


class Reads:
    """Notes which files are read, and does `after` each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: Callable[[Path], None] = lambda path: None) -> None:
        self.names: list[str] = []
        self._after = after

        def read(encoder: RawEncoder, file: RawFile, rejected: Any) -> Iterator[Any]:
            self.names.append(file.name)
            yield from READ_BLOCKS(encoder, file, rejected)
            self._after(file.path)

        monkeypatch.setattr(RawEncoder, "blocks", read)


@pytest.fixture
def candidates(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "candidates", tmp_path / "in")
    return tmp_path / "in"


class StoppedError(Exception):
    """What ends a job."""


def stop(path: Path) -> None:
    if path.name == "c.parquet":
        raise StoppedError


def bytes_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*")}


def test_the_same_command_again_scores_what_is_missing(
    folder: Path, candidates: Path, predictions: Predictions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done is not read again, but where it changed; the parts are those of an undisturbed job."""
    run, out = folder / "run", tmp_path / "out"
    reads = Reads(monkeypatch, stop)
    with pytest.raises(StoppedError):
        score(run, [candidates], out)
    assert reads.names == ["a.parquet", "b.parquet", "c.parquet"]
    assert not out.exists(), "nothing half-written looks whole"
    (candidates / "b.parquet").touch()
    again = Reads(monkeypatch)
    result = score(run, [candidates], out)
    assert again.names == ["b.parquet", "c.parquet", "d.parquet"]
    assert (result["rows"], result["parts"], result["files_done_before"]) == (NUM_CANDIDATES, 3, 1)
    assert bytes_of(out) == bytes_of(predictions["shared", 1][1])
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "part-00000.parquet",
        "part-00002.parquet",
        "part-00003.parquet",
    ]
    for told, name in zip(json.loads((out / "manifest.json").read_text())["files"], CANDIDATES, strict=True):
        (state,) = told["inputs"]
        assert (state["path"], state["bytes"]) == (str(candidates / name), (candidates / name).stat().st_size)
        assert state["sha256"] == hashlib.sha256((candidates / name).read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=f"the output folder {out} exists"):
        score(run, [candidates], out)


def test_a_bad_file_does_not_undo_the_others(folder: Path, candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (candidates / "c.parquet").read_bytes()
    (candidates / "c.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"c\.parquet"):
        score(folder / "run", [candidates], tmp_path / "out")
    (candidates / "c.parquet").write_bytes(good)
    reads = Reads(monkeypatch)
    assert score(folder / "run", [candidates], tmp_path / "out")["rows"] == NUM_CANDIDATES
    assert reads.names == ["c.parquet", "d.parquet"]


def test_another_job_begins_anew(folder: Path, candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other columns, so that parts that are done would not do."""
    Reads(monkeypatch, stop)
    with pytest.raises(StoppedError):
        score(folder / "run", [candidates], tmp_path / "out")
    result = score(folder / "run", [candidates / "a.parquet"], tmp_path / "out", Options(keep=["user"]))
    assert (result["files_done_before"], result["columns"][0]) == (0, "user")
    assert len(bytes_of(tmp_path / "out")) == 1


def test_an_input_that_changes_while_it_is_scored_is_noticed(
    folder: Path, candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Reads(monkeypatch, lambda path: os.utime(path, (1, 1)) if path.name == "d.parquet" else None)
    with pytest.raises(DataError, match=r"d\.parquet changed while it was scored\nhint: run the same command again when"):
        score(folder / "run", [candidates], tmp_path / "out")
    assert score(folder / "run", [candidates], tmp_path / "out")["files_done_before"] == 3


@pytest.mark.timeout(180 + 60 * KILLS)
def test_a_job_killed_at_any_moment_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """By kill -9, once it has written something; the same command, killed again or not, ends with the parts of an undisturbed one."""
    for number in range(COPIES):
        for name in CANDIDATES:
            (tmp_path / "in").mkdir(exist_ok=True)
            os.link(folder / "candidates" / name, tmp_path / "in" / f"{number}-{name}")
    score(folder / "run", [tmp_path / "in"], tmp_path / "undisturbed")
    expected, jobs = bytes_of(tmp_path / "undisturbed"), 0
    draw, out = np.random.default_rng(KILLS), tmp_path / "out"
    lived: list[float] = []
    command = [sys.executable, "-W", "ignore", "-m", "escm2rec", "score", "--run", str(folder / "run"), "--out", str(out)]
    command += ["--input", str(tmp_path / "in")]
    while len(lived) < KILLS:
        shutil.rmtree(out, ignore_errors=True)
        while not out.exists():
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            began = time.monotonic()
            try:
                if len(lived) < KILLS and len(lived) % 3 < 2:  # a third of all is killed wherever it is, the start included
                    wait_until_it_writes(process, tmp_path / ".out.partial")
                    time.sleep(draw.uniform(0, 0.6))
                elif len(lived) < KILLS:
                    time.sleep(draw.uniform(0, 8))
                if len(lived) < KILLS and process.poll() is None:
                    process.kill()
                    lived.append(round(time.monotonic() - began, 2))
                _, said = process.communicate(timeout=120)
            finally:
                process.kill()
            assert process.returncode in (0, -signal.SIGKILL), said
        jobs += 1
        assert bytes_of(out) == expected
        assert len(expected) == COPIES * (len(CANDIDATES) - 1), "one input has no rows"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "undisturbed"]
    if KILLS_PROOF is not None:
        found = {"machine": facts(), "kills": len(lived), "seconds_lived": lived, "jobs": jobs, "parts_compared": jobs * len(expected)}
        Path(KILLS_PROOF).write_text(json.dumps(found, indent=1) + "\n")


def wait_until_it_writes(process: subprocess.Popen[str], partial: Path) -> None:
    before, deadline = _newest(partial), time.monotonic() + 90
    while process.poll() is None and _newest(partial) == before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _newest(folder: Path) -> float:
    times = [0.0]
    for place, _, names in os.walk(folder):  # which leaves out what goes meanwhile
        for name in (".", *names):
            with suppress(FileNotFoundError):
                times.append((Path(place) / name).stat().st_mtime)
    return max(times)

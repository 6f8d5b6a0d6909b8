"""A run that is kept on a store: copied, fetched where the run is gone, and never another's."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from escm2rec.errors import ConfigError, DataError, RunError
from escm2rec.paths import store_path
from escm2rec.training import owner
from escm2rec.training.owner import FILE
from escm2rec.training.run import REPORTS
from escm2rec.training.train import train
from tests.encoded import config, write_dataset
from tests.ranks import run_ranks
from tests.s3_server import s3_server

BATCH = ["training.global_batch_size=128", "training.keep_checkpoints=2"]
SETTINGS = [*BATCH, "training.checkpoint_every_steps=2"]  # steps 2, 4, 6, and 8, the last
MANY = ["training.keep_checkpoints=9", *SETTINGS[:1], *SETTINGS[2:]]
TIMES = ("rows_per_s",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("copies") / "data", {"train": 8 * 128 - 5, "validation": 200})


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody disturbed, on one rank, with every checkpoint; copied nowhere."""
    run = tmp_path_factory.mktemp("copies") / "run"
    train(config(*MANY), data, run)
    return run


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """The copy of that training as it is when the machine is lost in step 7."""
    copy = shutil.copytree(plain, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-8")
    return copy


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("kept"):
        yield "s3://kept"


def _records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _written(run: Path) -> Any:
    """Checksums of what its last checkpoint holds; its index names the place it was written at."""
    files = json.loads((run / "checkpoints" / "step-8" / "manifest.json").read_text())["files"]
    return {name: told for name, told in files.items() if name != ".metadata"}


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name.startswith("escm2rec") and each.levelno == logging.WARNING]


def _steps(copy: Path) -> list[str]:
    return sorted(path.parent.name for path in copy.glob("checkpoints/*/manifest.json"))


def test_two_ranks_keep_a_run_on_s3_and_go_on_from_it_bit_for_bit(data: Path, bucket: str, tmp_path: Path) -> None:
    """The bucket itself is written to: what is removed there is not the bucket."""
    every = {"data": str(data), "overrides": SETTINGS}
    failing = {"copy_to": f"{bucket}/failing", "name": "step-4/__1_0.distcp", "of_rank": 1}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("train_run", {**every, "out": str(tmp_path / "run"), "copy_to": bucket}),
        ("keep", {"source": str(tmp_path / "run"), "to": str(tmp_path / "kept")}),
        ("lose", {"run": str(tmp_path / "run"), "copy": bucket, "step": 8}),
        ("train_run", {**every, "out": str(tmp_path / "elsewhere"), "copy_to": bucket, "resume": True}),
        ("train_run", {**every, "out": str(tmp_path / "new"), "copy_to": bucket, "overwrite": True}),
        ("train_on_failing_store", {**every, "out": str(tmp_path / "failing"), **failing}),
    ]
    results = run_ranks(2, [(f"tests.training_calls:{name}", call) for name, call in calls], tmp_path / "ranks")
    assert [result and result.get("steps") for result in results] == [8, None, None, 8, 8, 8], results
    assert results[0]["copy"] == bucket
    kept, elsewhere = tmp_path / "kept", tmp_path / "elsewhere"
    assert _records(elsewhere) == _records(kept)
    assert _written(elsewhere) == _written(kept)
    said = (tmp_path / "ranks" / "stderr").read_text()
    index = Path("checkpoints", "step-6", ".metadata")
    assert (elsewhere / index).read_bytes() == (kept / index).read_bytes(), "fetched, not made again: it names where it was written"
    failed = f"{bucket}/failing lacks step-4 of {tmp_path}/failing: cannot write {bucket}/failing/checkpoints/step-4/__1_0.distcp: Conn"
    assert said.count(failed) == said.count("is tried again after the next checkpoint") == 2, "by rank 0 alone, of steps 4 and 6"
    for run, place in (("new", bucket), ("failing", f"{bucket}/failing")):
        there = store_path(place)
        held = {name for name in there.sizes() if not name.startswith("failing")}
        assert held == set(_files(tmp_path / run)), place
        assert there.fs.cat_file(f"{there.path}/metrics.jsonl") == (tmp_path / run / "metrics.jsonl").read_bytes()


def test_a_training_that_is_killed_before_a_manifest_goes_on_elsewhere(
    data: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(config(*SETTINGS).model_dump_json())
    copy, killed = tmp_path / "copy", tmp_path / "killed"
    options = ["--config", str(tmp_path / "config.json"), "--data", str(data), "--out", str(killed), "--copy-to", copy.as_uri()]
    command = [sys.executable, "-m", "tests.killed_copy", "checkpoints/step-6/manifest.json", *options]
    assert subprocess.run(command, timeout=120, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert _steps(copy) == ["step-2", "step-4"]
    assert (copy / "checkpoints" / "step-6" / "__0_0.distcp").is_file()
    shutil.rmtree(killed)
    monkeypatch.setattr(owner, "_launch", lambda: ("elsewhere", time.time()))  # this process began before that one
    with caplog.at_level(logging.INFO):
        train(config(*SETTINGS), data, tmp_path / "elsewhere", resume=True, copy_to=copy.as_uri())
    assert f"fetched step 4 of {copy.as_uri()} to {tmp_path}/elsewhere" in caplog.messages
    assert _records(tmp_path / "elsewhere") == _records(plain)
    assert _written(tmp_path / "elsewhere") == _written(plain)
    assert _files(copy) == _files(tmp_path / "elsewhere")
    assert _steps(copy) == ["step-6", "step-8"]


def test_a_store_that_fails_is_told_and_training_goes_on(
    data: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put = LocalFileSystem.put_file

    def gone(self: LocalFileSystem, source: str, to: str, **_: Any) -> None:
        if not to.endswith(FILE) and not (tmp_path / "run" / "checkpoints" / "step-2").exists():
            raise TimeoutError("no answer")
        put(self, source, to)

    copy, run = tmp_path / "copy", tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "put_file", gone)
        with pytest.raises(
            RunError, match=rf"^the run is whole, its copy is not: {copy.as_uri()} lacks step-8, step-6 of {run}: .*no answer"
        ) as failed:
            train(config(*SETTINGS), data, run, copy_to=copy.as_uri())
    assert failed.value.hint == "mend the store; the same command with --resume then copies what is missing"
    told = _warnings(caplog)
    assert [message.partition(" of ")[0] for message in told] == [
        f"{copy.as_uri()} lacks {steps}" for steps in ("step-6", "step-8, step-6")
    ]
    assert _steps(copy) == ["step-2", "step-4"]
    result = train(config(*SETTINGS), data, run, resume=True, copy_to=copy.as_uri())
    assert result["copy"] == copy.as_uri()
    assert _files(copy) == _files(run)
    assert _records(run) == _records(plain)


def test_the_newer_of_run_and_copy_goes_on(data: Path, plain: Path, copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def resumed(run: Path) -> list[str]:
        with caplog.at_level(logging.INFO):
            caplog.clear()
            train(config(*MANY), data, run, resume=True, copy_to=str(copy))
        assert _records(run) == _records(plain)
        return [message for message in caplog.messages if message.startswith(("fetched", "trains"))]

    older = shutil.copytree(copy, tmp_path / "older")
    shutil.rmtree(older / "checkpoints" / "step-6")
    damaged = shutil.copytree(copy, tmp_path / "damaged")
    for file in damaged.glob("checkpoints/*/__0_0.distcp"):
        file.write_bytes(b"")
    before = shutil.copytree(copy, tmp_path / "before")
    for run in (older, damaged):
        assert resumed(run) == [f"fetched step 6 of {copy.as_uri()} to {run}", "trains steps 7 to 8 on 1 rank(s), cpu"]
        assert _files(copy).keys() - _files(run).keys() == {
            f"checkpoints/step-{step}/{name}" for step in (2, 4) for name in _files(plain / "checkpoints" / "step-2")
        }, "older ones stay"
        shutil.rmtree(copy)
        shutil.copytree(before, copy)
    shutil.rmtree(copy / "checkpoints" / "step-6")
    newer = shutil.copytree(before, tmp_path / "newer")
    assert resumed(newer) == ["trains steps 7 to 8 on 1 rank(s), cpu"]
    assert _files(copy) == _files(newer)


def test_a_report_that_is_on_the_store_alone_stays_as_long_as_its_model(data: Path, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    settings = ["training.epochs=1", "training.global_batch_size=512"]
    train(config(*settings), data, run, copy_to=str(copy))
    for name in REPORTS:
        (copy / name).write_text("of `evaluate --run URL`")
    train(config(*settings), data, run, resume=True, copy_to=str(copy))
    assert all((copy / name).exists() for name in REPORTS), "nothing was trained"
    train(config("training.epochs=2", *settings[1:]), data, run, resume=True, copy_to=str(copy))
    assert not any((copy / name).exists() for name in REPORTS), "of another model"


def test_a_damaged_copy_is_passed_over(data: Path, plain: Path, copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = copy / "checkpoints" / "step-6" / "__0_0.distcp"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (copy / "checkpoints" / "step-4" / "__0_0.distcp").unlink()
    train(config(*MANY), data, tmp_path / "run", resume=True, copy_to=str(copy))
    told = [message.partition(" and is passed over: ") for message in _warnings(caplog)]
    assert [before for before, _, _ in told] == [f"step {step} of {copy.as_uri()} cannot be fetched," for step in (6, 4)]
    assert [why for _, _, why in told] == [
        "__0_0.distcp does not hold what was written (SHA-256)",
        "__0_0.distcp cannot be read: No such file or directory",
    ]
    assert _records(tmp_path / "run") == _records(plain)
    assert _files(copy) == _files(tmp_path / "run") | {name: content for name, content in _files(copy).items() if "step-2/" in name}
    for file in copy.glob("checkpoints/*/__0_0.distcp"):
        file.unlink()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(
        DataError, match=f"^no checkpoint of {copy.as_uri()} can be fetched\nhint: mend the store, or train again, with --ov"
    ):
        train(config(*MANY), data, tmp_path / "run", resume=True, copy_to=str(copy))
    assert not list(tmp_path.glob("*run*"))


def test_another_run_is_not_replaced(data: Path, plain: Path, copy: Path, tmp_path: Path) -> None:
    before, url = _files(copy), copy.as_uri()
    other_rows = write_dataset(tmp_path / "other", {"train": 8 * 128, "validation": 200})
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    warm = shutil.copytree(plain, tmp_path / "warm")
    (warm / "warm_start.json").write_text(json.dumps({"run": str(plain)}))
    halves = tmp_path / "halves"  # of a cross-fitted propensity, and no checkpoint yet
    (halves / "propensity").mkdir(parents=True)
    for name in ("config.json", "schema.json"):
        shutil.copy(plain / name, halves / name)
    (halves / "config.json").write_text(config(*MANY, "training.seed=1").model_dump_json())
    run = tmp_path / "run"
    resume, overwrite = {"resume": True}, {"overwrite": True}
    cases: list[tuple[str, list[str], Path, Path, str | Path, dict[str, Any]]] = [
        (rf"{url} holds a run\nhint: --resume goes on with the run, --overwrite drops it", MANY, data, run, url, {}),
        (rf"{plain.as_uri()} holds a run\nhint: choose another --copy-to, or pass --overwrite", MANY, data, run, plain, {}),
        (rf"{url} was trained with another config: training.seed differ\(s\)", [*MANY, "training.seed=1"], data, run, url, resume),
        (rf"{url} was trained on other rows than the training split holds now", MANY, other_rows, run, url, resume),
        (rf"--warm-start {plain}: {url} began without one", MANY, data, run, url, {**resume, "warm_start": plain}),
        (rf"{url} is the copy of another run than {warm}: they did not begin with the same", MANY, data, warm, url, resume),
        (rf"will not write to {notes.as_uri()}: it holds something, and no run", MANY, data, run, notes, overwrite),
        (rf"will not write to {notes.as_uri()}: it holds something, and no run", MANY, data, run, notes, resume),
        (rf"{halves} was trained with another config: training.seed differ\(s\)", MANY, data, halves, url, resume),
        (rf"--copy-to {plain} is or holds {plain}, which the training reads", MANY, data, run, plain, {**overwrite, "warm_start": plain}),
        (rf"--copy-to {run}/copy is, holds or lies in the run folder {run}", MANY, data, run, run / "copy", {}),
        (rf"--copy-to {tmp_path} is, holds or lies in the run folder {run}", MANY, data, run, tmp_path, {}),
        ("--copy-to is of one training, and choice.objectives asks for", [*MANY, "choice.objectives=[{kind: naive}]"], data, run, url, {}),
        ("cannot open nosuch://b/r: Protocol not known: nosuch", MANY, data, run, "nosuch://b/r", {}),
    ]
    for told, settings, rows, out, place, more in cases:
        with pytest.raises((ConfigError, DataError), match=f"^{told}"):
            train(config(*settings), rows, out, copy_to=str(place), **more)
    assert _files(copy) == before
    assert _files(notes) == {"notes.txt": b"mine"}
    assert (halves / "propensity").is_dir()
    assert not run.exists()


def test_a_copy_that_a_later_start_took_is_not_written(
    data: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The later start has another run folder: that of this one does not say so."""
    held: dict[str, bytes] = {}
    put = LocalFileSystem.put_file

    def put_beside_another(self: LocalFileSystem, source: str, to: str, **_: Any) -> None:
        put(self, source, to)
        if to.endswith("step-8/__0_0.distcp"):
            (copy / FILE).write_text(json.dumps({"run": "elsewhere", "token": "later", "launch": "elsewhere", "began": 2e10}))
            held.update(_files(copy))

    monkeypatch.setattr(LocalFileSystem, "put_file", put_beside_another)
    taken = rf"^{copy.as_uri()} was taken over by a later start of this training"
    with pytest.raises(RunError, match=taken):
        train(config(*MANY), data, tmp_path / "run", resume=True, copy_to=str(copy))
    with pytest.raises(RunError, match=taken):  # its ranks are started again
        train(config(*MANY), data, tmp_path / "run", resume=True, copy_to=str(copy))
    assert _files(copy) == held
    assert _steps(copy) == ["step-2", "step-4", "step-6"]


def test_the_best_checkpoint_and_a_propensity_come_along(data: Path, tmp_path: Path) -> None:
    best = ["training.evaluate_every_steps=2", "training.keep_best=ctcvr_auc", "training.keep_checkpoints=1"]
    settings = [BATCH[0], *best, "objective.propensity.cross_fit=true", "training.epochs=2"]
    run, copy = tmp_path / "run", tmp_path / "copy"
    first = train(config(*settings), data, run, copy_to=str(copy))
    held = _files(run)
    assert first["checkpoint"] != "checkpoints/step-16", "the best is not the newest"
    assert _steps(copy) == sorted([first["checkpoint"].partition("/")[2], "step-16"])
    shutil.rmtree(run)
    assert train(config(*settings), data, run, resume=True, copy_to=str(copy)) == first
    fetched = _files(run)
    assert fetched.pop(FILE) != held[FILE]
    assert fetched == {name: content for name, content in held.items() if not name.endswith(FILE)}

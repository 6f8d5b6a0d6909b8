"""What goes wrong between a store and the ranks that read a run from it. `test_scoring.py` has what goes right, on two ranks."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from escm2rec.errors import DataError, Escm2Error, RunError
from escm2rec.evaluation.evaluate import evaluate
from escm2rec.paths import RemotePath, data_path
from escm2rec.sharding.runtime import distributed_runtime
from escm2rec.training.fetched import run_here
from escm2rec.training.train import train
from escm2rec.training.trained import TrainedModel
from tests.encoded import config, write_dataset
from tests.small_disks import small_disk

URL = "memory:///runs/run"
CHECKPOINT = "/runs/run/checkpoints/step-2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and a run of it."""
    data = write_dataset(tmp_path_factory.mktemp("fetched") / "data", {"train": 500, "validation": 100, "test": 200})
    train(config("training.global_batch_size=250", "training.epochs=1"), data, data.parent / "run")
    return data, data.parent / "run"


@pytest.fixture
def store(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store that holds the run, and a folder of temporary files that is empty."""
    store = fsspec.filesystem("memory")
    store.put(str(trained[1]), "/runs/run", recursive=True)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield store
    store.rm("/runs", recursive=True)
    assert not list((tmp_path / "temporary").iterdir())


def flip(store: Any, name: str) -> None:
    content = bytearray(store.cat_file(f"{CHECKPOINT}/{name}"))
    content[-1] ^= 1
    store.pipe(f"{CHECKPOINT}/{name}", bytes(content))


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a damaged checkpoint": (lambda store: flip(store, "__0_0.distcp"), rf"^checkpoint {URL}/checkpoints/step-2 is damaged: "),
    "a config that is none": (lambda store: store.pipe("/runs/run/config.json", b"{"), rf"^{URL} has no readable config\.json"),
    "a checkpoint that is missing": (lambda store: store.rm(CHECKPOINT, recursive=True), rf"{URL}/checkpoints/step-2"),
    "a name that leads elsewhere": (
        lambda store: store.store.update({"/runs/run/vocabulary/../../escaped": store.store["/runs/run/config.json"]}),
        rf"^{URL}/vocabulary/\.\./\.\./escaped would be fetched to a place outside of ",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_run_names_its_place_on_the_store(trained: tuple[Path, Path], store: Any, what: str) -> None:
    spoil, told = WRONG[what]
    spoil(store)
    with pytest.raises(Escm2Error, match=told) as error:
        evaluate(data_path(URL), trained[0])
    assert tempfile.gettempdir() not in str(error.value) or "outside of" in told
    assert not store.exists("/runs/run/report.json")


def test_a_store_that_may_not_be_written_is_told_before_all_is_measured(
    trained: tuple[Path, Path], store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: RemotePath, _: Path) -> None:
        raise DataError(f"cannot write {self}: PermissionError: denied")

    monkeypatch.setattr(RemotePath, "put", denied)
    monkeypatch.setattr(TrainedModel, "__call__", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(DataError, match=rf"^cannot write {URL}/\.report\.tried: PermissionError"):
        evaluate(data_path(URL), trained[0])


def test_a_report_on_a_store_is_whole_when_it_is_there(trained: tuple[Path, Path], store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put = RemotePath.put

    def fails(self: RemotePath, source: Path) -> None:
        if self.name == "report.html":
            raise DataError(f"cannot write {self}: gone")
        put(self, source)

    with monkeypatch.context() as patched:
        patched.setattr(RemotePath, "put", fails)
        with pytest.raises(DataError, match=r"report\.html: gone"):
            evaluate(data_path(URL), trained[0])
    assert not store.exists("/runs/run/report.json")
    assert evaluate(data_path(URL), trained[0])["report"] == f"{URL}/report.html"
    assert store.exists("/runs/run/report.json")
    assert not store.exists("/runs/run/.report.tried")


def test_a_rank_that_is_told_to_end_takes_what_it_fetched_with_it(store: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Path] = []

    def told_to_end() -> None:
        with distributed_runtime() as runtime, run_here(data_path(URL), runtime) as folder:
            assert (folder / "manifest.json").exists()
            seen.append(folder)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        told_to_end()
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert [folder.parent for folder in seen] == [Path(tempfile.gettempdir())]
    assert not seen[0].exists()


def test_a_full_disk_is_told_as_one(trained: tuple[Path, Path], store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "small", "64k") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(RunError, match=rf"^cannot write {disk}/?.*: No space left on device") as error:
            evaluate(data_path(URL), trained[0])
        assert "set TMPDIR to a folder of another disk" in error.value.hint
        assert not list(disk.iterdir())


def test_no_place_for_temporary_files_is_told_on_every_rank(
    trained: tuple[Path, Path], store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(RunError, match=r"^rank 0 failed: FileNotFoundError: "):
        evaluate(data_path(URL), trained[0])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

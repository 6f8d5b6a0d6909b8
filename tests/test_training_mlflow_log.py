"""What MLflow is told of a training, read back by its own client from a local store; and a server that does not answer."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from escm2rec.errors import ConfigError, RunError, StopError
from escm2rec.sharding.runtime import Runtime
from escm2rec.training import mlflow_log
from escm2rec.training.mlflow_log import MlflowLog, load_mlflow, parameters
from escm2rec.training.owner import Owner
from escm2rec.training.train import train
from tests.encoded import config, write_dataset
from tests.training_calls import in_step, train_until_told

pytest.importorskip("mlflow")

NUM_STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": NUM_STEPS * 256 - 37, "validation": 600})


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """Of an empty run folder."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    (tmp_path / "run").mkdir()
    yield Owner.take(tmp_path / "run", Runtime(0, 1, 1, torch.device("cpu"), dist.group.WORLD))
    dist.destroy_process_group()


def settings(uri: Path | str, *more: str) -> list[str]:
    return [f"training.mlflow={uri}", "training.evaluate_every_steps=4", *more]


def runs_at(store: Path, experiment: str = "escm2rec") -> list[Any]:
    """The runs of an experiment, the first one first."""
    client = load_mlflow().MlflowClient(str(store))
    runs: list[Any] = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"])
    return runs


def records_at(store: Path, run: Any) -> list[dict[str, Any]]:
    """What MLflow holds of a run, as records; each number of each step must be there once."""
    client, found = load_mlflow().MlflowClient(str(store)), dict[int, dict[str, Any]]()
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            record = found.setdefault(metric.step, {"step": metric.step})
            assert name not in record, (name, metric.step)
            record[name] = metric.value
    return [found[step] for step in sorted(found)]


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "rows_per_s"} for record in records]


def test_mlflow_holds_what_metrics_jsonl_holds(data: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "run"
    asked = config(*settings(store, "training.mlflow_experiment=shoes"))
    train(asked, data, out)
    (run,) = runs_at(store, "shoes")
    assert (run.info.run_name, run.info.status, run.data.tags["folder"]) == ("run", "FINISHED", str(out))
    records = records_of(out)
    assert records_at(store, run) == records
    assert [record["step"] for record in records if "validation_ctr_auc" in record] == [4, 8, 10]
    assert run.data.params == {name: value[:6000] for name, value in parameters(asked).items()}
    assert run.data.params["training.seed"] == "0"
    assert run.data.params["training.ema_decay"] == "null"
    assert run.data.params["objective.kind"] == "escm2-dr"
    assert json.loads(run.data.params["training.sharding"]) == {}
    assert json.loads((out / "mlflow.json").read_text())["run"] == run.info.run_id


def test_a_training_goes_on_in_its_run(data: Path, tmp_path: Path) -> None:
    """Told to end, resumed, cut off after steps that its last checkpoint has not, resumed again; and at last told to another store."""
    store, out = tmp_path / "store", tmp_path / "run"
    overrides = settings(store, "training.checkpoint_every_steps=8")
    with pytest.raises(StopError, match="stopped by SIGTERM"):
        train_until_told(str(data), str(out), overrides, at_step=3, of_rank=0)
    (stopped,) = runs_at(store)
    assert stopped.info.status == "KILLED"
    assert [record["step"] for record in records_at(store, stopped)] == [1, 2, 3, 4, 5]
    train(config(*overrides), data, out, resume=True)
    for left in ("manifest.json", "checkpoints/step-10/manifest.json"):
        (out / left).unlink()
    train(config(*overrides), data, out, resume=True)
    (run,) = runs_at(store)
    assert (run.info.run_id, run.info.status) == (stopped.info.run_id, "FINISHED")
    assert without_speed(records_at(store, run)) == without_speed(records_of(out))

    (out / "manifest.json").unlink()
    train(config(*settings(tmp_path / "other", "training.log_every_steps=3")), data, out, resume=True)
    (other,) = runs_at(tmp_path / "other")
    assert other.info.run_id != run.info.run_id
    assert records_at(tmp_path / "other", other) == records_of(out)


def test_a_training_that_fails_is_told_as_failed(data: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise RunError("a disk is gone")

    with pytest.raises(RunError, match="a disk is gone"), in_step(5, 0, fail):
        train(config(*settings(tmp_path / "store")), data, tmp_path / "run")
    (run,) = runs_at(tmp_path / "store")
    assert run.info.status == "FAILED"
    assert records_at(tmp_path / "store", run) == records_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("listens", "error"), [(False, "MlflowException: API request to "), (True, "TimeoutError: no answer within 2 s of the end;")]
)
def test_a_server_that_does_not_answer_costs_a_warning(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, listens: bool, error: str
) -> None:
    """One whose port is closed, and one that takes the request and says nothing; the end waits as long as it may."""
    monkeypatch.setattr(mlflow_log, "END_S", 2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    with socket.create_server(("127.0.0.1", 0)) as server, caplog.at_level(logging.WARNING):
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        began = time.perf_counter()
        result = train(config(*settings(uri)), data, tmp_path / "run")
        spent = time.perf_counter() - began
    assert result["steps"] == NUM_STEPS
    assert spent < 30
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"MLflow at {uri} takes no records: {error}")
    assert said.endswith("and sends what it lacks with the next record, or with --resume; metrics.jsonl has all of them")


def test_what_a_store_did_not_take_is_sent_again(owner: Owner, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = tmp_path / "store"
    store.write_text("in the way")
    with caplog.at_level(logging.INFO), MlflowLog(owner, config(*settings(store))) as log:
        log.write({"step": 1, "epoch": 0, "rows": 9})
        log.write({"step": 2, "epoch": 0, "rows": 8})
        wait_for(lambda: bool(caplog.records))
        store.unlink()
        log.write({"step": 3, "epoch": 0, "rows": 7})
    (run,) = runs_at(store)
    assert run.info.status == "FINISHED"
    assert [record["rows"] for record in records_at(store, run)] == [9, 8, 7]
    gone, again = [record.getMessage() for record in caplog.records]
    assert gone.startswith(f"MLflow at {store} takes no records: ")
    assert again == f"MLflow at {store} takes records again, and has those that it lacked"


def test_a_finished_run_tells_what_a_store_lacks(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away at the end; it has all and is told nothing; it lost the run."""
    monkeypatch.setattr(mlflow_log, "END_S", 1)
    store, out = tmp_path / "store", tmp_path / "run"
    store.write_text("in the way")
    train(config(*settings(store)), data, out)
    wait_for(lambda: not any(thread.name == "escm2rec-mlflow" for thread in threading.enumerate()))
    store.unlink()
    monkeypatch.setattr(mlflow_log, "END_S", 20)
    ended = []
    for _ in range(2):
        assert train(config(*settings(store)), data, out, resume=True)["steps"] == NUM_STEPS
        (run,) = runs_at(store)
        assert run.info.status == "FINISHED"
        assert records_at(store, run) == records_of(out)
        ended.append((run.info.run_id, run.info.end_time))
    assert ended[0] == ended[1]
    shutil.rmtree(store / run.info.experiment_id / run.info.run_id)
    train(config(*settings(store)), data, out, resume=True)
    (again,) = runs_at(store)
    assert again.info.run_id != ended[0][0]
    assert (again.info.status, records_at(store, again)) == ("FINISHED", records_of(out))
    assert json.loads((out / "mlflow.json").read_text())["run"] == again.info.run_id


def test_a_start_that_lost_its_run_tells_nothing_more(owner: Owner, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with MlflowLog(owner, config(*settings(store))) as log:
        log.write({"step": 1, "epoch": 0})
        wait_for(lambda: (tmp_path / "run" / "mlflow.json").exists() and bool(records_at(store, runs_at(store)[0])))
        assert dist.group.WORLD is not None
        Owner.take(tmp_path / "run", Runtime(0, 1, 1, torch.device("cpu"), dist.group.WORLD))
        log.write({"step": 2, "epoch": 0})
    (run,) = runs_at(store)
    assert run.info.status == "RUNNING"
    assert records_at(store, run) == [{"step": 1, "epoch": 0}]


def test_without_the_package_it_is_refused_at_the_start(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"training.mlflow needs the package mlflow-skinny, or mlflow\nhint: pip install 'escm2rec\[mlf"):
        train(config(*settings(tmp_path / "store")), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def wait_for(happened: Any) -> None:
    until = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < until, "it did not happen within 20 s"
        time.sleep(0.05)

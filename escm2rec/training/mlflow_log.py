"""What MLflow is told of a training: its config, each record with its step, and how it ended."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, NamedTuple, Self

from escm2rec.config import Config, Section
from escm2rec.errors import ConfigError, RunError, StopError
from escm2rec.folder import write_json
from escm2rec.training.owner import Owner
from escm2rec.training.run import read_records

FILE = "mlflow.json"  # which run of MLflow a run folder is
EXPERIMENT = "escm2rec"
LONGEST = 6_000  # characters of a parameter that MLflow takes
END_S = 10  # how long the end of a training waits for a server
AGAIN_S = 1  # between two tries meanwhile
ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # where a folder is asked for by its name
    "MLFLOW_DISABLE_TELEMETRY": "true",  # told is the server that is named, nobody else
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what was not taken is sent with the next record
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is the result's
}
"""Settings of MLflow, where the environment has no others."""

logger = logging.getLogger(__name__)


def load_mlflow() -> Any:
    """The package; ConfigError where there is none. It takes seconds the first time."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        raise ConfigError("training.mlflow needs the package mlflow-skinny, or mlflow", "pip install 'escm2rec[mlflow]'") from error
    return mlflow


class Told(NamedTuple):
    """A record, and when it was made, in milliseconds since 1970."""

    at: int
    record: dict[str, Any]


class MlflowLog:
    """Tells MLflow of a training by a thread, for which nothing waits but the end of the training, and that `END_S` seconds at most.

    A server that does not answer costs a warning. What it was not told is kept, and sent with the next record that it takes; what it lacks
    of the records of earlier starts too. Used as a context: it ends as FINISHED, as KILLED when it was asked to end, else as FAILED.
    """

    def __init__(self, owner: Owner, config: Config) -> None:
        self._owner, self._config, self._mlflow = owner, config, load_mlflow()
        self._told: SimpleQueue[Told | str] = SimpleQueue()
        for record in read_records(Path(owner.run)):
            self.write(record)
        self._is_out = False
        self._thread = Thread(target=self._tell_all, name="escm2rec-mlflow", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Have one record told, some time later."""
        self._told.put(Told(_now(), record))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        failed = "KILLED" if isinstance(error, StopError | KeyboardInterrupt) else "FAILED"
        self._told.put("FINISHED" if error is None else failed)
        self._thread.join(END_S)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"no answer within {END_S} s of the end"))

    def _tell_all(self) -> None:
        waiting: list[Told] = []
        status, ends, run = "", float("inf"), None
        while time.monotonic() < ends:
            if status:
                time.sleep(AGAIN_S)
            else:
                status = self._take(waiting)
                ends = time.monotonic() + END_S if status else ends
            try:
                self._owner.check()
                run = run or MlflowRun(self._mlflow, Path(self._owner.run), self._config)
                run.tell(waiting, status)
            except RunError:  # the run is another start's by now: so is what MLflow is told of it
                return
            except Exception as error:  # whatever a server or its client raises: the training goes on
                run = None  # and what was taken is asked for, before more is sent
                self._warn(error)
                continue
            self._is_well()
            waiting.clear()
            if status:
                return

    def _take(self, waiting: list[Told]) -> str:
        """Wait for what is to be told, and add the records of it; how the training ended, empty when it has not."""
        while True:
            told = self._told.get()
            if isinstance(told, str):
                return told
            waiting.append(told)
            if self._told.empty():
                return ""

    def _warn(self, error: Exception) -> None:
        if not self._is_out:
            self._is_out = True
            logger.warning(
                "MLflow at %s takes no records: %s: %s; training goes on, and sends what it lacks with the next record, or with --resume; "
                "metrics.jsonl has all of them",
                self._config.training.mlflow,
                type(error).__name__,
                (str(error).splitlines() or [""])[0],
            )

    def _is_well(self) -> None:
        if self._is_out:
            self._is_out = False
            logger.info("MLflow at %s takes records again, and has those that it lacked", self._config.training.mlflow)


class MlflowRun:
    """The run of MLflow that a run folder is: the one that an earlier start made, at the same place, or a new one with the config."""

    def __init__(self, mlflow: Any, folder: Path, config: Config) -> None:
        self._mlflow, self._client = mlflow, mlflow.MlflowClient(config.training.mlflow)
        self._id = self._found(folder, config)
        there = self._client.get_run(self._id)
        self._status = there.info.status
        given = there.data.params
        missing = [mlflow.entities.Param(name, value[:LONGEST]) for name, value in parameters(config).items() if name not in given]
        self._client.log_batch(self._id, params=missing)
        self._steps = {metric.step for metric in self._client.get_metric_history(self._id, "epoch")}

    def _found(self, folder: Path, config: Config) -> str:
        experiment = config.training.mlflow_experiment or EXPERIMENT
        place = {"uri": config.training.mlflow, "experiment": experiment}
        kept: dict[str, str] = json.loads((folder / FILE).read_text(encoding="utf-8")) if (folder / FILE).is_file() else {}
        if place.items() <= kept.items() and self._is_there(kept["run"]):
            return kept["run"]
        known = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if known is None else known.experiment_id
        made: str = self._client.create_run(number, run_name=folder.name, tags={"folder": str(folder.resolve())}).info.run_id
        write_json(folder / FILE, {**place, "run": made})
        return made

    def _is_there(self, run: str) -> bool:
        try:
            self._client.get_run(run)
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False  # removed, or with a machine that had the folder
        return True

    def tell(self, waiting: list[Told], status: str) -> None:
        """Send the records of steps that it has none of, and the status, where it is another."""
        new = [told for told in waiting if told.record["step"] not in self._steps]
        if new and self._status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")
            self._status = "RUNNING"
        # Its epoch is the last that is sent of a record: where that is there, all of it is.
        numbers = [(name, value, told) for told in new for name, value in reversed(told.record.items()) if name != "step"]
        metrics = [self._mlflow.entities.Metric(name, value, told.at, told.record["step"]) for name, value, told in numbers]
        self._client.log_batch(self._id, metrics=metrics)
        self._steps.update(told.record["step"] for told in new)
        if status and status != self._status:
            self._client.set_terminated(self._id, status)


def parameters(section: Section, prefix: str = "") -> dict[str, str]:
    """The config, flat (`training.seed`): texts as they are, everything else as JSON, a list or a mapping as one."""
    dumped, found = section.model_dump(mode="json"), dict[str, str]()
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= parameters(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, str) else json.dumps(dumped[name])
    return found


def _now() -> int:
    return time.time_ns() // 1_000_000

"""The `pipeline` verb: preprocess, train, evaluate and score, one job after the other, on any TorchX scheduler."""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import json
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from escm2rec.config import Config, Split
from escm2rec.disk import telling_of_disk
from escm2rec.errors import ConfigError, Escm2Error, InstallationError, RunError, did_you_mean
from escm2rec.folder import MANIFEST, refuse_overlap, write_json

if TYPE_CHECKING:
    from torchx.runner import Runner
    from torchx.schedulers.api import Stream
    from torchx.specs import AppDryRunInfo

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
COMPONENTS = CHECKOUT / "torchx_components" / "escm2rec.py"
IN_A_FOLDER = ("local_cwd", "slurm")  # schedulers whose image is a folder: this checkout
STATE = "pipeline.json"
CONFIG = "config.json"  # the settings, as the jobs read them
ERROR = re.compile(r"\berror(?: \(rank \d+\))?: ")  # as the command tells one
GRACE_S = 60.0  # how long a job that ended may take to be in the queue again
LOST_RANK = "another rank ended first"
APPEARS_S = 20.0
TOLD_LINES = 200  # of the end of a job's logs, in which its error is looked for


@dataclass(frozen=True)
class Stage:
    """One job: a verb, the arguments of its component, the file that is there when it is done, and the one of what it is made from."""

    verb: str
    arguments: dict[str, str]
    done: Path
    source: Path | None = None

    def is_complete(self) -> bool:
        """Whether its output is whole, and not older than what it is made from. ConfigError of such a training, which would begin anew."""
        if not self.done.is_file():
            return False
        if self.source is None or self.done.stat().st_mtime_ns >= self.source.stat().st_mtime_ns:
            return True
        if self.verb == "train":
            raise ConfigError(
                f"{self.source.parent} was made again after {self.done.parent} was trained", f"remove {self.done.parent}, and train anew"
            )
        return False


def pipeline(
    config: Path,
    input: Path,
    out: Path,
    scheduler: str,
    *,
    candidates: Path | None = None,
    split: Split = "test",
    overrides: Sequence[str] = (),
    scheduler_args: str = "",
    job: Sequence[str] = (),
    dryrun: bool = False,
    wait_s: float = 2.0,
) -> dict[str, Any]:
    """Raw logs to `out`/data, `out`/run with its report, and `out`/predictions of `candidates` if there are any, each by a job of its own.

    Waits for every job and hands on what it logs. A stage whose output is whole is passed over, so the same call goes on where one
    stopped; a job of an earlier call that still runs is waited for. `job` holds `name=value` arguments of the components, for every one
    that has them; `scheduler_args` are TorchX's, as k=v,k=v. With `dryrun` nothing is submitted, and the requests are printed.
    ConfigError when `out` was begun with other settings; RunError, with the job's own error, when a stage fails.
    """
    from escm2rec.config import load_config

    settings = load_config(config, overrides)
    # Not resolved: behind a link a file may lie elsewhere for the jobs' machines.
    paths = {"input": input.absolute(), **({"candidates": candidates.absolute()} if candidates is not None else {})}
    for name, path in paths.items():
        if not path.exists():
            raise ConfigError(f"{path} does not exist", f"give --{name} as the jobs see it")
        if "," in str(path):
            raise ConfigError(f"--{name} {path} holds a comma, which parts the arguments of a component", "rename it")
    out = out.absolute()
    refuse_overlap(out, [config, *paths.values()])
    stages = _stages(out, paths["input"], paths.get("candidates"), split)
    arguments = _job_arguments(scheduler, job, [stage.verb for stage in stages])
    with _runner(scheduler) as runner, _own_programs():
        cfg = _scheduler_config(runner, scheduler, scheduler_args)

        def requests(folder: Path) -> list[AppDryRunInfo[Any]]:
            with contextlib.chdir(folder):
                return [_request(runner, stage, arguments[stage.verb], scheduler, cfg) for stage in stages]

        asked = requests(CHECKOUT)  # tells what is wrong before anything is written
        if dryrun:
            for stage, request in zip(stages, asked, strict=True):
                print(f"=== {stage.verb}\n{request}", file=sys.stderr)
            return {"dryrun": [stage.verb for stage in stages]}
        _ask_seldom(runner, scheduler, wait_s)
        with telling_of_disk(out, "run the same command again"), _State.open(out, settings, paths, split) as state:
            folder = _jobs_folder(out)
            with contextlib.chdir(folder):
                grace_s = 0.0 if scheduler == "local_cwd" else GRACE_S
                return _Run(runner, stages, requests(folder), state, wait_s, grace_s).run()


def _jobs_folder(out: Path) -> Path:
    """Where jobs are submitted, and Slurm leaves their logs; components look there for apps/."""
    folder = out / "jobs"
    folder.mkdir(exist_ok=True)
    if not (folder / "apps").exists():
        (folder / "apps").unlink(missing_ok=True)  # a link to a checkout that is gone
        (folder / "apps").symlink_to(CHECKOUT / "apps")
    return folder


@contextlib.contextmanager
def _own_programs() -> Iterator[None]:
    """With the `python` and `torchrun` of this environment first on the path, which jobs of this machine and of Slurm inherit."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _stages(out: Path, input: Path, candidates: Path | None, split: Split) -> list[Stage]:
    data, run, predictions, config = (str(out / name) for name in ("data", "run", "predictions", CONFIG))
    stages = [
        Stage("preprocess", {"config": config, "input": str(input), "out": data}, out / "data" / MANIFEST),
        Stage("train", {"config": config, "data": data, "out": run, "resume": "True"}, out / "run" / MANIFEST, out / "data" / MANIFEST),
        Stage(
            "evaluate", {"run": run, "data": data, "split": split, "overwrite": "True"}, out / "run" / "report.html", out / "run" / MANIFEST
        ),
    ]
    if candidates is not None:
        scores = {"run": run, "input": str(candidates), "out": predictions, "overwrite": "True"}
        stages.append(Stage("score", scores, out / "predictions" / MANIFEST, out / "run" / MANIFEST))
    return stages


def _job_arguments(scheduler: str, job: Sequence[str], verbs: Sequence[str]) -> dict[str, dict[str, str]]:
    """What `job` gives to the component of each verb, by those that have an argument of that name."""
    given = dict(_pair(text) for text in job)
    if scheduler in IN_A_FOLDER:
        given.setdefault("image", str(CHECKOUT))
    known = {verb: inspect.signature(getattr(_components(), verb)).parameters for verb in verbs}
    own = {"config", "input", "data", "out", "run", "set", "split", "resume", "overwrite"}
    for name in given:
        names = sorted({each for parameters in known.values() for each in parameters} - own)
        if name not in names:
            raise ConfigError(f"--job {name}: no component has such an argument{did_you_mean(name, names)}", f"one of {', '.join(names)}")
    return {verb: {name: value for name, value in given.items() if name in parameters} for verb, parameters in known.items()}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--job {text!r} is no NAME=VALUE", "such as --job j=2x8")
    return name, value


def _components() -> Any:
    """The components, as a module: they are part of the checkout, not of the wheel."""
    if not COMPONENTS.is_file():
        raise InstallationError(f"there are no components at {COMPONENTS}", "pipeline runs from a checkout: pip install -e CHECKOUT")
    spec = util.spec_from_file_location("escm2rec_components", COMPONENTS)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise InstallationError(f"torchx is not installed ({error})", "pip install -r requirements/common.txt") from error
    return module


def _runner(scheduler: str) -> contextlib.AbstractContextManager[Runner]:
    from torchx.runner import get_runner
    from torchx.schedulers import get_scheduler_factories

    known = sorted(get_scheduler_factories())
    if scheduler not in known:
        raise ConfigError(f"TorchX has no scheduler {scheduler!r}{did_you_mean(scheduler, known)}", f"one of {', '.join(known)}")
    runner: contextlib.AbstractContextManager[Runner] = get_runner()
    return runner


def _scheduler_config(runner: Runner, scheduler: str, text: str) -> Any:
    """TorchX's own reading of k=v,k=v passes over a name that it does not know."""
    options = runner.scheduler_run_opts(scheduler)
    known = sorted(name for name, _ in options)
    for name in re.findall(r"(?:^|[,;])\s*([^=,;]+)=", text):
        if name not in known:
            raise ConfigError(
                f"--scheduler-args {name}: {scheduler} takes no such argument{did_you_mean(name, known)}", f"one of {', '.join(known)}"
            )
    return options.cfg_from_str(text)


def _ask_seldom(runner: Runner, scheduler: str, every_s: float) -> None:
    """Let a job's state be asked for every so many seconds: TorchX's log readers ask ten times a second each, by a process of `sacct`."""
    backend = runner._scheduler(scheduler)
    ask, known, lock = backend.describe, dict[str, tuple[float, Any]](), threading.Lock()

    def describe(app_id: str) -> Any:
        with lock:
            if app_id not in known or time.monotonic() - known[app_id][0] > every_s:
                known[app_id] = time.monotonic(), ask(app_id)
            return known[app_id][1]

    backend.describe = describe


def _request(runner: Runner, stage: Stage, job: dict[str, str], scheduler: str, cfg: Any) -> AppDryRunInfo[Any]:
    arguments = [text for name, value in {**job, **stage.arguments}.items() for text in (f"--{name}", value)]
    try:
        return runner.dryrun_component(f"{COMPONENTS}:{stage.verb}", arguments, scheduler, cfg)
    except (Exception, SystemExit) as error:  # whatever a scheduler's own code raises; SystemExit of TorchX's argparse, which says why
        raise ConfigError(
            f"{scheduler} takes no request for {stage.verb}: {type(error).__name__}: {error}", "look at --scheduler-args and --job"
        ) from error


@dataclass
class _State:
    """What `out` was begun with, and the job of the stage that was submitted last."""

    file: Path
    held: dict[str, Any]

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, config: Config, paths: Mapping[str, Path], split: Split) -> Iterator[_State]:
        """That of `out`, new or found, which no other pipeline works on meanwhile."""
        if not (out / STATE).is_file() and out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"{out} holds files, and no {STATE}: it is of no pipeline", "give another --out")
        out.mkdir(parents=True, exist_ok=True)
        with (out / STATE).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another pipeline works on {out}", "wait for it, or give another --out") from None
            yield cls._found(out, config, paths, split)

    @classmethod
    def _found(cls, out: Path, config: Config, paths: Mapping[str, Path], split: Split) -> _State:
        settings = json.loads(json.dumps(config.model_dump(mode="json")))
        begun = {**{name: str(path) for name, path in paths.items()}, "split": split, "settings": settings}
        file = out / STATE
        text = file.read_text(encoding="utf-8")
        state = cls(file, json.loads(text) if text else {"begun": begun})
        held = {**begun, **state.held["begun"]}  # candidates may come later
        for name in begun:
            if held[name] != begun[name]:
                what = "another config" if name == "settings" else f"--{name} {held[name]}, not {begun[name]}"
                raise ConfigError(f"{out} was begun with {what}", "give another --out, or remove it to begin anew")
        state.held["begun"] = held
        state._write()
        write_json(out / CONFIG, settings)  # what the jobs read: a file that is edited meanwhile is not read again
        return state

    def _write(self) -> None:
        # In place, because the lock is of this file, not of its name.
        self.file.write_text(json.dumps(self.held, indent=1), encoding="utf-8")

    def keep(self, verb: str, handle: str | None) -> None:
        """Remember a job that was submitted; None when it has ended."""
        self.held["job"] = None if handle is None else {"stage": verb, "handle": handle}
        self._write()

    def running(self, verb: str) -> str | None:
        """The job of a stage that an earlier call did not see end."""
        job = self.held.get("job")
        return str(job["handle"]) if job is not None and job["stage"] == verb else None


class _Run:
    """The stages, one after the other."""

    def __init__(
        self, runner: Runner, stages: Sequence[Stage], requests: Sequence[AppDryRunInfo[Any]], state: _State, wait_s: float, grace_s: float
    ) -> None:
        self._runner, self._stages, self._requests, self._state, self._wait_s = runner, stages, requests, state, wait_s
        self._grace_s = grace_s
        self._told: dict[str, dict[str, Any]] = {stage.verb: {"state": "waits"} for stage in stages}

    def run(self) -> dict[str, Any]:
        """Do what is not done; shows the state of all stages at the end, whatever the end is."""
        try:
            for stage, request in zip(self._stages, self._requests, strict=True):
                told = self._told[stage.verb]
                if stage.is_complete():
                    told["state"] = "was done"
                    continue
                began = time.monotonic()
                told["state"] = "failed"
                self._do(stage, request, told)
                told |= {"state": "done", "seconds": round(time.monotonic() - began, 1)}
        finally:
            self._show()
        return {"out": str(self._state.file.parent), "stages": self._told}

    def _do(self, stage: Stage, request: AppDryRunInfo[Any], told: dict[str, Any]) -> None:
        from torchx.schedulers.api import Stream
        from torchx.schedulers.local_scheduler import SignalException

        handle = self._running(stage) or self._submitted(stage, request)
        told["job"] = handle
        ends: deque[str] = deque(maxlen=TOLD_LINES)
        over = threading.Event()
        # Slurm keeps the two streams apart, and the others have but one; torchrun writes to the one, a verb alone to the other.
        streams = [Stream.STDERR, Stream.STDOUT] if handle.startswith("slurm:") else [None]
        followers = [self._follow(handle, *each, stream, ends, over) for each in _replicas(request) for stream in streams]
        try:
            status = self._ended(handle)
        except (KeyboardInterrupt, SignalException) as signal:  # the second is what TorchX's local scheduler makes of both signals
            logger.warning("ending the job of %s (%s)", stage.verb, handle)
            self._runner.cancel(handle)
            raise KeyboardInterrupt from signal
        except Exception as error:  # whatever a scheduler's own code raises
            hint = "the same command waits for it again; of Slurm, TorchX asks sacct, which needs accounting"
            raise RunError(f"{stage.verb}: {handle} cannot be watched: {type(error).__name__}: {error}", hint) from error
        finally:
            over.set()
        for follower in followers:
            follower.join(timeout=10 * self._wait_s)
        self._state.keep(stage.verb, None)
        if status is None or status.state.name != "SUCCEEDED":
            raise _failure(
                stage, handle, "is not known to the scheduler any more" if status is None else f"ended as {status.state.name}", ends
            )
        if not _comes(stage.done):
            raise RunError(
                f"{stage.verb}: {handle} succeeded, and {stage.done} is not there",
                "do the jobs see --out under the same path as this machine? it must lie where both do",
            )

    def _ended(self, handle: str) -> Any:
        """How a job ended. One that its scheduler puts back into the queue looks as if it had, for some seconds (Slurm: NODE_FAIL)."""
        while True:
            status = self._runner.wait(handle, self._wait_s)
            if status is None or status.state.name == "SUCCEEDED":
                return status
            deadline = time.monotonic() + self._grace_s
            while time.monotonic() < deadline:
                time.sleep(self._wait_s)
                again = self._runner.status(handle)
                if again is not None and not again.is_terminal():
                    logger.info("%s ended as %s, and is to run again", handle, status.state.name)
                    break
            else:
                return status

    def _running(self, stage: Stage) -> str | None:
        """The job of an earlier call, if it still runs."""
        handle = self._state.running(stage.verb)
        if handle is None:
            return None
        try:
            status = self._runner.status(handle)
        except Exception as error:  # whatever a scheduler's own code raises; submitted again, the job would run twice
            hint = f"ask the scheduler; if the job is gone, take it out of {self._state.file}"
            raise RunError(f"{stage.verb}: nobody says whether {handle} still runs: {type(error).__name__}: {error}", hint) from error
        if status is None or status.is_terminal():
            return None
        logger.info("%s: waiting for %s, which still runs", stage.verb, handle)
        return handle

    def _submitted(self, stage: Stage, request: AppDryRunInfo[Any]) -> str:
        try:
            handle = str(self._runner.schedule(request))
        except Exception as error:  # whatever a scheduler's own code raises
            raise RunError(f"{stage.verb} could not be submitted: {type(error).__name__}: {error}", "is the scheduler there?") from error
        logger.info("%s: submitted as %s", stage.verb, handle)
        self._state.keep(stage.verb, handle)
        return handle

    def _follow(
        self, handle: str, role: str, replica: int, stream: Stream | None, ends: deque[str], over: threading.Event
    ) -> threading.Thread:
        def follow() -> None:
            told, last = 0, False
            while not last:
                last = over.is_set()
                # Schedulers without logs, jobs that have left none yet, and a scheduler that does not know its newest job yet.
                with contextlib.suppress(Exception):
                    lines = self._runner.log_lines(handle, role, replica, should_tail=True, streams=stream)
                    for number, line in enumerate(lines):
                        if number >= told:
                            told = number + 1
                            ends.append(line.rstrip("\n"))
                            print(f"{role}/{replica} {line.rstrip()}", file=sys.stderr, flush=True)
                    return
                over.wait(self._wait_s)

        thread = threading.Thread(target=follow, name=f"escm2rec-logs-{role}-{replica}", daemon=True)
        thread.start()
        return thread

    def _show(self) -> None:
        table = Table("stage", "state", "seconds", "output")
        for stage in self._stages:
            told = self._told[stage.verb]
            table.add_row(
                stage.verb,
                told["state"],
                str(told.get("seconds", "")),
                str(stage.done.parent if told["state"] in ("done", "was done") else ""),
            )
        Console(stderr=True).print(table)


def _comes(file: Path) -> bool:
    """Whether a file is there, or appears soon: network file systems hold for some seconds that it is not."""
    deadline = time.monotonic() + APPEARS_S
    while not (found := file.is_file()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _replicas(request: AppDryRunInfo[Any]) -> Iterator[tuple[str, int]]:
    # Not by asking the scheduler, which may not know yet what it was just given.
    for role in request._app.roles if request._app is not None else []:
        yield from ((role.name, replica) for replica in range(role.num_replicas))


def _failure(stage: Stage, handle: str, how: str, ends: Sequence[str]) -> Escm2Error:
    """What a job said last of why it ended: its `error:` and `hint:`, or its last line."""
    lines = [line for line in list(ends) if line.strip() and LOST_RANK not in line]  # a copy: a reader may still add to it
    found = next((place for place, line in enumerate(lines) if ERROR.search(line)), None)
    error, hint = lines[-1] if lines else "it left no logs", ""
    if found is not None:
        error = ERROR.split(lines[found], maxsplit=1)[-1].strip()
        hint = next((line.partition("hint: ")[2].strip() for line in lines[found:] if "hint: " in line), "")
    return RunError(f"{stage.verb}: {handle} {how}: {error}", f"{hint + '; ' if hint else ''}then the same command goes on at {stage.verb}")

"""Where the tasks of preprocess and score run: in this process, on local processes, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from escm2rec.errors import ConfigError, Escm2Error, RunError
from escm2rec.heap import share_one_heap
from escm2rec.orphans import end_with_parent
from escm2rec.parallel import default_workers
from escm2rec.workers import ONE_THREAD, starting_workers

Item = TypeVar("Item")
Result = TypeVar("Result")
ANSWER_S = 5
KILLED = (
    "a worker process was killed, perhaps for its memory",
    "the same command goes on where it stopped; if memory ran out give preprocess a smaller --memory-gib, score fewer --processes",
)
ENDED = (
    "a worker process ended before its work was done",
    "call preprocess() or score() under `if __name__ == '__main__':`, because every worker runs the program's file once more; if it does "
    "already, memory may have run out: pass a smaller memory_gib, or fewer processes, the same call goes on where it stopped",
)
"""What is said of the command's workers, and of those of another program."""


class Engine(Protocol):
    """Runs functions that may be sent to another process. What they leave behind is files; `workers` run at a time."""

    workers: int

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Results in the order of the items; the first error in that order is raised."""


class HereEngine:
    """Everything in this process: for small jobs, which would wait for processes to start."""

    workers = 1

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See Engine."""
        return map(function, items)


class LocalEngine:
    """A pool of processes, each with one thread."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int, forked: bool) -> None:
        """Workers that are not `forked` run the file of the program that calls once more."""
        self._pool, self.workers, self._forked = pool, workers, forked

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See Engine. RunError when a process was killed."""
        running: list[Future[Result]] = []
        try:
            running += [self._pool.submit(function, item) for item in items]
            for future in running:
                yield future.result()
        except (BrokenProcessPool, EOFError) as error:  # EOFError of one that was killed while it started
            raise RunError(*(KILLED if self._forked else ENDED)) from error
        finally:
            for future in running:
                future.cancel()


class RayEngine:
    """Tasks of one processor each on a Ray cluster; a task whose worker or node is lost runs again elsewhere."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See Engine."""
        remote = self._ray.remote(num_cpus=1, max_retries=-1)(_told)
        running = deque(remote.remote(function, item) for item in items)
        try:
            while running:
                result, error = self._ray.get(running.popleft())
                if error is not None:
                    raise error
                yield result
        finally:
            for reference in running:
                self._ray.cancel(reference)


def _told(function: Callable[[Item], Result], item: Item) -> tuple[Result | None, Escm2Error | OSError | None]:
    """The result, or the error as a value: Ray would wrap one that is raised."""
    share_one_heap()
    try:
        return function(item), None
    except (Escm2Error, OSError) as error:
        return None, error


@contextmanager
def local_engine(workers: int | None = None) -> Iterator[Engine]:
    """So many processes; by default as many as processors that this one may use, at most 8."""
    workers = workers or default_workers()
    with starting_workers() as context:
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            yield LocalEngine(pool, workers, context.get_start_method() == "forkserver")
        except BaseException:  # nobody waits for what the others still do, and one whose start was cut short waits for ever
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says what Ctrl-C means
    share_one_heap()
    end_with_parent()


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(f"no Ray cluster answers at {address!r}: {error}", "start one with `ray start --head`, and pass its address")


def _refuse_silent(address: str) -> None:
    """ConfigError when nobody listens at HOST:PORT: Ray itself tries for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), ANSWER_S).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from error


@contextmanager
def ray_engine(address: str) -> Iterator[Engine]:
    """A cluster that runs already. Its nodes need escm2rec, the input and the output folder at the same paths."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs the package ray", "pip install 'escm2rec[ray]'") from error
    _refuse_silent(address)
    try:
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": ONE_THREAD})
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield RayEngine(ray)
    finally:
        ray.shutdown()

"""Tasks on threads, results in order. numpy, Arrow and polars release the interpreter lock in their loops."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
MAX_WORKERS = 8  # each holds a block


def default_workers() -> int:
    """As many threads as processors that this process may use, at most 8."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MAX_WORKERS)


def ordered_map(tasks: Iterable[Callable[[], Result]], workers: int) -> Iterator[Result]:
    """Results of the tasks in their order. At most `workers` + 1 are under way or wait to be taken, so memory stays bounded.

    One worker is the caller's own thread: two that take turns take longer than one.
    """
    if workers == 1:
        yield from (task() for task in tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

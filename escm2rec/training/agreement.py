"""What one rank wishes, such as to stop, known to all ranks after the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist


class Agreement:
    """Tells wishes from rank to rank, a step late and so without waiting, by a few bytes on a group of its own."""

    def __init__(self, wishes: int) -> None:
        self._group = dist.new_group(backend="gloo")
        self._told = torch.zeros(wishes, dtype=torch.int32)
        self._telling: dist.Work | None = None

    def exchange(self, *wishes: bool) -> list[bool]:
        """Which wishes any rank had at the call before; called by all ranks alike."""
        if self._telling is not None:
            self._telling.wait()
        agreed = [bool(told) for told in self._told.tolist()]
        self._told = torch.tensor(wishes, dtype=torch.int32)
        self._telling = dist.all_reduce(self._told, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        """Drop its group; the last wishes are heard by nobody."""
        if self._telling is not None:
            self._telling.wait()
        dist.destroy_process_group(self._group)


class Clock:
    """Says when so many minutes have gone by since it last said so; None: never."""

    def __init__(self, minutes: float | None) -> None:
        self._minutes, self._since = minutes, time.monotonic()

    def is_due(self) -> bool:
        """Whether they have."""
        now = time.monotonic()
        if self._minutes is None or now - self._since < 60 * self._minutes:
            return False
        self._since = now
        return True


class StopRequest:
    """Whether this process was asked to end (SIGTERM)."""

    asked = False


@contextmanager
def heeding_sigterm() -> Iterator[StopRequest]:
    """Note a SIGTERM instead of ending by it. Where signals are not this thread's, they stay as they are."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)

"""How far a verb has come, for people, on stderr: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 20.0

logger = logging.getLogger(__name__)


class Progress:
    """Rows (or another `unit`) done of `total` (None when nobody knows), how many a second and the time left; silent unless `active`."""

    def __init__(self, name: str, total: int | None, active: bool = True, unit: str = "rows") -> None:
        self._name, self._total, self._active, self._unit = name, total, active, unit
        self._rows = 0
        self._began = self._told = time.monotonic()
        self._bar: RichProgress | None = None
        if active and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[said]}"))
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, said="")

    def add(self, rows: int, note: str = "") -> None:
        """So many more rows are done; `note` is shown beside them."""
        self._rows += rows
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._rows, said=self._said(now, note))
        elif self._active and now - self._told >= LINE_EVERY_S:
            self._told = now
            logger.info("%s: %s", self._name, self._said(now, note))

    def _said(self, now: float, note: str) -> str:
        seconds = max(now - self._began, 1e-9)
        of = f" of {self._total:,}" if self._total is not None else ""
        left = ""
        if self._bar is None and self._total is not None and self._rows:
            left = f", {seconds * (self._total - self._rows) / self._rows:,.0f} s left"
        rate = self._rows / seconds
        pace = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        return f"{self._rows:,}{of} {self._unit}, {pace} {self._unit}/s{left}" + (f", {note}" if note else "")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

"""A progress bar on stderr, for people: none when stderr is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows steps done of `total`, rows/s and the time left; silent unless `active` and stderr is a terminal."""

    def __init__(self, name: str, total: int | None, active: bool) -> None:
        self._bar: RichProgress | None = None
        if active and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, note="")

    def update(self, done: int, record: dict[str, Any]) -> None:
        """Show where we are, with rows/s and losses of a record of metrics."""
        if self._bar is not None:
            losses = " ".join(f"{name}={value:.4f}" for name, value in record.items() if name.startswith("loss_"))
            self._bar.update(self._task, completed=done, note=f"{record.get('rows_per_s', 0):,.0f} rows/s {losses}")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

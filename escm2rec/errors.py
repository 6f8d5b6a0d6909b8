"""Every error that escm2rec raises for a person.

Escm2Error                  what happened, and a hint: what to do next
|-- ConfigError             a config, an argument or an option is wrong          exit 2
|-- DataError               input data or a folder on disk is wrong              exit 2
|   `-- PartialError        some of the input is wrong, and the rest was done    exit 2
|-- InstallationError     installed packages do not fit each other             exit 2
|-- RunError                a run that was rightly set up failed                 exit 1
`-- StopError               a run was asked to end and can go on                 exit 75
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class Escm2Error(Exception):
    """Carries `message` (what, where, seen, expected) and `hint` (the next step, may be empty).

    `told_by_rank_0` is true of rank 0's error where it is raised on the other ranks: they need not say it again.
    """

    exit_code = 1
    told_by_rank_0 = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[Escm2Error], tuple[str, str]]:
        # Errors travel between ranks: the default would rebuild them from the joined text.
        return type(self), (self.message, self.hint)


class ConfigError(Escm2Error):
    """A config, an argument or an option is wrong."""

    exit_code = 2


class DataError(Escm2Error):
    """Input data or a folder on disk is not what it should be."""

    exit_code = 2


class PartialError(DataError):
    """Some of the input is not what it should be, and the rest was done: `result` says of it."""

    def __init__(self, message: str, hint: str, result: dict[str, Any]) -> None:
        super().__init__(message, hint)
        self.result = result


class InstallationError(Escm2Error):
    """Installed packages are missing or do not fit each other."""

    exit_code = 2


class RunError(Escm2Error):
    """A run that was rightly set up failed."""

    exit_code = 1


class StopError(Escm2Error):
    """A run was asked to end, did so in order, and can go on. The code is sysexits.h's for "try again later"."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: what it may have been meant for, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""

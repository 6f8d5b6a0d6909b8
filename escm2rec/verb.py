"""What all verbs of the command line share."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from escm2rec.errors import ConfigError
from escm2rec.lineage import tell_trackers

Result = dict[str, Any]
P = ParamSpec("P")

ConfigFile = Annotated[Path, typer.Option("--config", help="YAML config file.", show_default=False)]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a config key, as a.b=value; may be repeated.", metavar="KEY=VALUE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
DataFolder = Annotated[  # text, because a Path would make s3:/ of s3://
    str, typer.Option("--data", help="Data set folder, as preprocess writes it, or its fsspec URL (s3://...).", show_default=False)
]
RunFolder = Annotated[str, typer.Option("--run", help="Run folder, as train writes it, or its fsspec URL (s3://...).", show_default=False)]


def verb(function: Callable[P, Result]) -> Callable[P, Result]:
    """Keep stdout for the result: what a library prints while the verb works goes to stderr. TorchX's trackers are told of the result."""

    @functools.wraps(function)
    def work(*args: P.args, **kwargs: P.kwargs) -> Result:
        with contextlib.redirect_stdout(sys.stderr):
            result = function(*args, **kwargs)
            if rank() == 0:
                tell_trackers(function.__name__, kwargs, result)
            return result

    return work


def rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK") or 0)


def names(values: Sequence[str]) -> list[str]:
    """Names of a repeated option whose values may be comma lists; ConfigError where it was given and names nothing."""
    found = [name.strip() for value in values for name in value.split(",") if name.strip()]
    if values and not found:
        raise ConfigError(f"an option that takes names was given none: {list(values)}", "leave it out to take the default")
    return found

"""What TorchX's trackers are told of a job: what it read, what it made, and its figures.

A job that TorchX launched knows its trackers by the environment (`[torchx:tracker]` of `.torchxconfig`). Sources are paths, and so are
artifacts: what one job made is what the next one read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRACKERS = "TORCHX_TRACKERS"
MAKES = {
    "simulate": "logs",
    "preprocess": "data set",
    "train": "run",
    "evaluate": "report",
    "score": "predictions",
    "export": "artifact",
    "study": "study",
}
READS = {"input": "logs", "data": "data set", "run": "run", "warm_start": "run", "model": "artifact"}

logger = logging.getLogger(__name__)


def tell_trackers(verb: str, options: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Tell the job's trackers, if it has any, what `verb` was given and what came of it; one that fails costs a warning, not the job."""
    if verb not in MAKES or not os.environ.get(TRACKERS):
        return
    try:
        from torchx.tracker.api import AppRun

        job = AppRun.run_from_env()
        for option, what in READS.items():
            given = options.get(option)
            for path in given if isinstance(given, list) else [given] if given is not None else []:
                job.add_source(_full(path), what)
        job.add_artifact(MAKES[verb], _full(result["report"] if verb == "evaluate" else options["out"]), dict(_figures(result)))
        job.add_metadata(verb=verb, **_figures(result))
    except Exception as error:  # whatever a tracker raises: the output is whole by now
        logger.warning("trackers (%s) were not told of this job: %s: %s", os.environ[TRACKERS], type(error).__name__, error)


def _full(path: str | Path) -> str:
    return str(path) if "://" in str(path) else str(Path(path).absolute())


def _figures(result: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers and texts of a result, flat: `metrics.ctr_auc`."""
    figures: dict[str, Any] = {}
    for name, value in result.items():
        if isinstance(value, Mapping):
            figures |= _figures(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            figures[f"{prefix}{name}"] = value
    return figures

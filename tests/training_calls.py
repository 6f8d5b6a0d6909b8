"""What the ranks of the tests do, with arguments that fit into JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from escm2rec.config import load_config
from escm2rec.evaluation.evaluate import evaluate
from escm2rec.scoring.score import score
from escm2rec.training.train import train
from tests.encoded import config


def train_run(data: str, out: str, overrides: list[str], resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train with the tests' config."""
    return train(config(*overrides), Path(data), Path(out), resume, overwrite)


def train_file(config_file: str, data: str, out: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train with a config file."""
    return train(load_config(config_file, overrides or []), Path(data), Path(out))


def evaluate_run(run: str, data: str, split: str = "test", by: list[str] | None = None) -> dict[str, Any]:
    """Evaluate a run."""
    return evaluate(Path(run), Path(data), split, by or [], overwrite=True)  # type: ignore[arg-type]


def score_run(run: str, inputs: list[str], out: str, keep: list[str] | None = None) -> dict[str, Any]:
    """Score raw files with a run."""
    return score(Path(run), [Path(path) for path in inputs], Path(out), keep)

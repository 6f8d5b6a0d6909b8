"""Impression logs whose propensity and CVR are known, in the formats of real logs.

`world.py` says what the world is, `log.py` draws impressions from it, `aliccp.py` and `table.py` write them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from escm2rec.config import SimulationConfig
from escm2rec.errors import ConfigError
from escm2rec.folder import new_folder, sha256_of, write_manifest
from escm2rec.progress import Progress
from escm2rec.simulate.aliccp import AliccpWriter
from escm2rec.simulate.log import Impressions, shard
from escm2rec.simulate.table import TableWriter
from escm2rec.simulate.world import make_world

__all__ = ["LogFormat", "simulate"]

LogFormat = Literal["aliccp", "parquet"]
SHARD_ROWS = 1_000_000


def simulate(
    out: Path, impressions: int, seed: int, config: SimulationConfig, format: LogFormat = "aliccp", overwrite: bool = False
) -> dict[str, Any]:
    """Write a log of so many impressions into the folder `out` and return what is in it.

    aliccp: `sample_skeleton_NNNNN.csv`, `common_features_NNNNN.csv` and `truth_NNNNN.parquet` (sample_id, true_propensity, true_cvr, row by
    row beside the skeleton). parquet: `part-NNNNN.parquet`. A shard holds at most 1,000,000 impressions, those of one user together.

    The same seed and config give the same bytes, the same impressions in both formats, and in a longer log the same ones first. Memory
    holds the world (users and items) and one shard's draws, never the whole log.

    Returns out, format, impressions, clicks, conversions, ctr, cvr (of the clicked), mean_true_propensity, mean_true_cvr (all impressions),
    mean_true_cvr_clicked, mean_true_cvr_unclicked, files and seconds; a mean over nothing is None.
    Raises ConfigError for a bad argument, or when `out` exists and may not be overwritten.
    """
    _check(impressions, seed, format)
    began = time.monotonic()
    totals, rows = _Totals(), dict[str, int]()
    with new_folder(out, "raw logs", overwrite) as folder, Progress("simulate", impressions) as progress:
        world = make_world(config, seed)
        writer = AliccpWriter(world) if format == "aliccp" else TableWriter(world)
        for number, start in enumerate(range(0, impressions, SHARD_ROWS)):
            stop = min(start + SHARD_ROWS, impressions)
            rows |= writer.write(folder, number, totals.over(shard(world, start, stop), progress))
        files = [{"name": name, "rows": count, "sha256": sha256_of(folder / name)} for name, count in rows.items()]
        content = {"format": format, "seed": seed, "config": config.model_dump(), **totals.summary(), "files": files}
        write_manifest(folder, "raw logs", content)
    return {"out": str(out), "format": format, **totals.summary(), "files": list(rows), "seconds": round(time.monotonic() - began, 2)}


@dataclass
class _Totals:
    """Sums over the impressions that pass by: counts, and sums of p and eta."""

    impressions: int = 0
    clicks: int = 0
    conversions: int = 0
    propensity: float = 0.0
    cvr: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})  # by click

    def over(self, slices: Iterable[Impressions], progress: Progress) -> Iterator[Impressions]:
        """Pass the slices on, add them up and tell how far it is."""
        for part in slices:
            self.impressions += len(part.click)
            self.clicks += int(np.count_nonzero(part.click))
            self.conversions += int(np.count_nonzero(part.conversion))
            self.propensity += float(part.propensity.sum())
            for clicked in (False, True):
                self.cvr[clicked] += float(part.cvr[part.click == clicked].sum())
            yield part
            progress.add(len(part.click))

    def summary(self) -> dict[str, Any]:
        """Counts and means, as the result and the manifest hold them."""
        unclicked = self.impressions - self.clicks
        return {
            "impressions": self.impressions,
            "clicks": self.clicks,
            "conversions": self.conversions,
            "ctr": self.clicks / self.impressions,
            "cvr": self.conversions / self.clicks if self.clicks else None,
            "mean_true_propensity": self.propensity / self.impressions,
            "mean_true_cvr": sum(self.cvr.values()) / self.impressions,
            "mean_true_cvr_clicked": self.cvr[True] / self.clicks if self.clicks else None,
            "mean_true_cvr_unclicked": self.cvr[False] / unclicked if unclicked else None,
        }


def _check(impressions: int, seed: int, format: str) -> None:
    """ConfigError for an argument that cannot be."""
    if impressions < 1:
        raise ConfigError(f"impressions must be at least 1, is {impressions}", "give the number of impressions to draw, such as 500000")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, is {seed}", "choose another seed")
    if format not in get_args(LogFormat):
        raise ConfigError(f"unknown format {format!r}", f"choose one of: {', '.join(get_args(LogFormat))}")

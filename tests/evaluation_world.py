"""A small simulated log with predictions, for the tests of evaluation."""

from typing import Any

import numpy as np
import polars as pl

from escm2rec.evaluation import metrics


def simulated(rows: int = 4000, seed: int = 0, truth: bool = True) -> pl.DataFrame:
    """Impressions whose predictions are off by noise; click 30%, conversion 30%."""
    random = np.random.default_rng(seed)
    signal = random.normal(size=rows)
    propensity, cvr = metrics.sigmoid(signal - 1), metrics.sigmoid(signal / 2 + random.normal(size=rows) / 2 - 1)
    click = random.random(rows) < propensity
    conversion = click & (random.random(rows) < cvr)
    columns: dict[str, Any] = {
        "click": click.astype(np.uint8),
        "conversion": conversion.astype(np.uint8),
        "ctr_logit": (signal - 1 + random.normal(size=rows) / 4).astype(np.float32),
        "cvr_logit": (signal / 2 - 1).astype(np.float32),
        "kept.user": random.integers(0, 200, rows),
        "kept.scene": np.array(["feed", "search"])[random.integers(0, 2, rows)],
    }
    known = {"true_propensity": propensity.astype(np.float32), "true_cvr": cvr.astype(np.float32)} if truth else {}
    return pl.DataFrame({**columns, **known})

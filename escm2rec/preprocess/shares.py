"""What encoded columns hold: shares of missing and out-of-vocabulary values, and list lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from escm2rec.config import SPLITS, Split
from escm2rec.preprocess.ragged import Int64s, Ragged
from escm2rec.schema import Feature, Schema


def held(feature: Feature, column: Any) -> Int64s:
    """Of an encoded column: rows without a value, values, and values out of vocabulary."""
    if isinstance(column, Ragged):
        return _row(np.count_nonzero(column.lengths == 0), len(column.values), np.count_nonzero(column.values < feature.oov_rows))
    if not feature.is_table:
        missing = np.count_nonzero(np.isnan(column))
        return _row(missing, len(column) - missing, 0)
    missing = np.count_nonzero(column < 0)
    return _row(missing, len(column) - missing, np.count_nonzero(column < feature.oov_rows) - missing)


def _row(missing: Any, values: Any, shared: Any) -> Int64s:
    return np.array([missing, values, shared], dtype=np.int64)


class Shares:
    """Adds up what `held` counts, by split and feature."""

    def __init__(self, schema: Schema) -> None:
        self._features = schema.features
        self._rows = dict.fromkeys(SPLITS, 0)
        self._sums = {split: {feature.name: _row(0, 0, 0) for feature in schema.features} for split in SPLITS}

    def add(self, split: Split, rows: int, counts: dict[str, Int64s]) -> None:
        """Add rows of a split."""
        self._rows[split] += rows
        for name, count in counts.items():
            self._sums[split][name] += count

    def by_feature(self) -> dict[str, Any]:
        """For the manifest: pooling_factor (values a training row), and by split the shares missing (of rows) and oov (of values)."""
        return {feature.name: self._feature(feature) for feature in self._features}

    def _feature(self, feature: Feature) -> dict[str, Any]:
        missing, oov = {}, {}
        for split in SPLITS:
            without, values, shared = self._sums[split][feature.name].tolist()
            missing[split] = without / self._rows[split] if self._rows[split] else None
            oov[split] = shared / values if values else None
        factor = self._sums["train"][feature.name][1] / max(self._rows["train"], 1)
        return {"pooling_factor": float(factor), "missing": missing, **({"oov": oov} if feature.encoding == "vocabulary" else {})}

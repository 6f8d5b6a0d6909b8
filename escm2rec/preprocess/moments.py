"""Mean and deviation of numbers that come in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from escm2rec.preprocess.ragged import Float64s


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of a numeric feature, merged as by Chan et al. (1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, numbers: Any, times: Any) -> Moments:
        """Moments of the numbers that are there, each counting `times`."""
        held = ~np.isnan(numbers)
        numbers, times = numbers[held], times[held].astype(np.float64)
        count = float(times.sum())
        if not count:
            return cls()
        mean = float((numbers * times).sum() / count)
        return cls(count, mean, float((times * (numbers - mean) ** 2).sum()))

    @classmethod
    def of_column(cls, column: Float64s, log1p: bool, times: Any = None) -> Moments:
        """Moments of a raw column, or of log(1 + x) of it."""
        return cls.of(np.log1p(column) if log1p else column, np.ones(len(column)) if times is None else times)

    def add(self, other: Moments) -> None:
        """Merge the moments of other numbers."""
        if not other.count:
            return
        count, delta = self.count + other.count, other.mean - self.mean
        self.squares += other.squares + delta**2 * self.count * other.count / count
        self.mean += delta * other.count / count
        self.count = count

    @property
    def std(self) -> float:
        """Population standard deviation; 1 when all numbers are equal, or there are none."""
        std = float(np.sqrt(self.squares / self.count)) if self.count else 0.0
        return std if std > 1e-12 * max(1.0, abs(self.mean)) else 1.0

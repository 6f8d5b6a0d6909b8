"""Which steps of a training train, and which calibrate the propensity."""

from __future__ import annotations

from typing import NamedTuple


class Calendar(NamedTuple):
    """Which steps train and which calibrate: one of calibration after every `every` of training, never the last (None: none)."""

    training: int
    every: int | None

    @property
    def total(self) -> int:
        """All steps, of both kinds."""
        return self.training + ((self.training - 1) // self.every if self.every is not None else 0)

    @property
    def never_calibrates(self) -> bool:
        """Whether calibration is asked for and its first step never comes."""
        return self.every is not None and self.total == self.training

    def calibrates(self, step: int) -> bool:
        """Whether step 0, 1, ... is one of calibration."""
        return self.every is not None and step % (self.every + 1) == self.every

    def trained(self, step: int) -> int:
        """How many of the steps before this one train."""
        return step - (step // (self.every + 1) if self.every is not None else 0)

"""The weight of a loss term: constant, scheduled over training, or learned."""

from __future__ import annotations

from typing import NamedTuple


class Constant(NamedTuple):
    """The same in every step."""

    value: float

    def at(self, progress: float) -> float:
        """The weight when this share of all steps is done."""
        return self.value


class Ramp(NamedTuple):
    """From `start` in a straight line to `end`, which is reached when the share `until` of all steps is done."""

    start: float
    end: float
    until: float

    def at(self, progress: float) -> float:
        """The weight when this share of all steps is done."""
        return self.start + (self.end - self.start) * min(progress / self.until, 1.0)


class Learned(NamedTuple):
    """exp(-s) with s learned, from s = 0: homoscedastic uncertainty (Kendall et al., CVPR 2018).

    The objective holds exp(-s) f + s / 2 for the term f, least where exp(-s) = 1 / (2 f): a term weighs the inverse of what it comes to.
    A batch whose f is below 0 counts as 0 for s, which it would drive down ever faster.
    """

    def at(self, progress: float) -> float:
        """The weight before anything is learned."""
        return 1.0


TermWeight = Constant | Ramp | Learned

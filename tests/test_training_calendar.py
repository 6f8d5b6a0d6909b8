"""The calendar of steps: which train, which calibrate."""

from __future__ import annotations

import pytest

from escm2rec.training.calendar import Calendar


@pytest.mark.parametrize(("training", "every", "calibrating"), [(10, 5, [5]), (11, 5, [5, 11]), (5, 5, []), (3, 20, []), (4, None, [])])
def test_a_step_of_calibration_follows_every_so_many_never_last(training: int, every: int | None, calibrating: list[int]) -> None:
    calendar = Calendar(training, every)
    assert [step for step in range(calendar.total) if calendar.calibrates(step)] == calibrating
    assert calendar.trained(calendar.total) == training
    assert calendar.never_calibrates == (every is not None and not calibrating), "what `train` warns of"

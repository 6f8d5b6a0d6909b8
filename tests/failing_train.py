"""`escm2rec train` on a rank that fails while it does a step, once: `python -m tests.failing_train HOW RANK STEP ...`, under torchrun."""

from __future__ import annotations

import os
import signal
import sys

from escm2rec.cli import main
from escm2rec.training.metrics import TrainingMetrics
from escm2rec.training.step import StepOutput

if __name__ == "__main__":
    how, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    add = TrainingMetrics.add
    done = 0

    def add_or_fail(self: TrainingMetrics, output: StepOutput) -> None:
        """Not after a restart."""
        global done
        done += 1
        if done == step and int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no room for the batch")
        add(self, output)

    TrainingMetrics.add = add_or_fail  # type: ignore[method-assign]
    main(["train", *sys.argv[4:]])

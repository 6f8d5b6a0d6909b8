"""`escm2rec train` that writes down which rows it trains: `python -m tests.recording_train FOLDER PAUSE_S ...`, under torchrun.

A file for each start and rank: on its first line when it began and the step it goes on from, then one line a step, on disk before the loss
of that step is made. A row is known by its numbers, which are of no other row.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from escm2rec.cli import main
from escm2rec.models.predictions import Predictions
from escm2rec.reader.batch import Batch
from escm2rec.training.owner import Owner
from escm2rec.training.step import Loss, StepOutput
from escm2rec.training.trainer import Trainer

ORPHAN_PAUSE_S = 2.0  # orphans live until their successor is there, and would else have ended the training by then


def record(folder: Path, pause_s: float) -> None:
    """Let trainings of this process write down their rows, and wait so long in each step."""
    train, forward, parent = Trainer.train, Loss.forward, os.getppid()
    training: tuple[Trainer, TextIO] | None = None

    def recorded_train(self: Trainer, owner: Owner, profiles: bool = False) -> dict[str, Any]:
        nonlocal training
        with (folder / f"{owner.token}-{self.runtime.rank}").open("w", encoding="utf-8") as file:
            print(json.dumps([time.time(), self.step]), file=file, flush=True)
            training = self, file
            return train(self, owner, profiles)

    def recorded_forward(self: Loss, predictions: Predictions, batch: Batch) -> tuple[Tensor, StepOutput]:
        assert training is not None
        trainer, file = training
        rows = batch.numeric[: batch.num_rows].contiguous().numpy().tobytes().hex()
        print(json.dumps([trainer.step + 1, rows]), file=file, flush=True)
        time.sleep(pause_s if os.getppid() == parent else ORPHAN_PAUSE_S)
        return forward(self, predictions, batch)

    Trainer.train = recorded_train  # type: ignore[method-assign]
    Loss.forward = recorded_forward  # type: ignore[method-assign]


if __name__ == "__main__":
    record(Path(sys.argv[1]), float(sys.argv[2]))
    main(["train", *sys.argv[3:]])

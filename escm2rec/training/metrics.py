"""What training says of itself: one record every few steps, to `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor

from escm2rec.evaluation import metrics
from escm2rec.objectives.imputation import outside
from escm2rec.objectives.propensity import PropensityReport, PropensitySums, propensity_report
from escm2rec.sharding.managed import ValueRows
from escm2rec.sharding.runtime import Runtime
from escm2rec.training.lifetime import Lifetime
from escm2rec.training.mlflow_log import MlflowLog
from escm2rec.training.owner import Owner
from escm2rec.training.step import StepOutput

logger = logging.getLogger(__name__)

WINDOW_ROWS = 131_072  # AUC and calibration are of at most so many of the latest impressions: sorting them takes 20 ms


class TrainingMetrics:
    """Collects steps and turns them into records over the steps since the last one; all ranks call it alike.

    `weighs` says whether the objective weighs impressions by the propensity. If so, a floor that binds for most is told once, by rank 0.
    `lifetime` is what an earlier start of the training had of it; `managed` are the managed tables, alike on all ranks.
    """

    def __init__(
        self,
        runtime: Runtime,
        weighs: bool,
        lifetime: list[list[float]] | None = None,
        managed: Mapping[str, ValueRows] | None = None,
    ) -> None:
        self._runtime = runtime
        self._managed = managed or {}
        self._lifetime = Lifetime(runtime, lifetime)
        self._may_warn = weighs and runtime.is_main
        self._may_warn_of_negative = runtime.is_main
        self._rows_by_rank = WINDOW_ROWS // runtime.world_size
        self._thread = ThreadPoolExecutor(1, "escm2rec-metrics")
        self._losses: dict[str, list[Tensor]]
        self._rows: deque[Tensor]  # [5, rows of a step]: CTR and CVR logit, click, conversion, weight
        self._propensity: PropensitySums | None
        self._pseudo_labels: Tensor | None
        self._term_weights: dict[str, Tensor]
        self._restart()

    def add(self, output: StepOutput) -> None:
        """Take one step's output."""
        for name, value in output.losses.items():
            self._losses.setdefault(name, []).append(value)
        rows = output.rows()
        self._lifetime.add(rows)
        self._rows.append(rows)
        self._num_rows += output.num_rows
        while sum(part.shape[1] for part in self._rows) - self._rows[0].shape[1] >= self._rows_by_rank:
            self._rows.popleft()
        assert output.propensity is not None, "a step that trains has one"
        self._propensity = output.propensity if self._propensity is None else self._propensity.merge(output.propensity)
        self.steps += 1
        self._term_weights = output.term_weights
        if output.pseudo_labels is not None:
            self._pseudo_labels = output.pseudo_labels if self._pseudo_labels is None else self._pseudo_labels + output.pseudo_labels

    def record(self, step: int, epoch: int, more: Mapping[str, float] | None = None) -> Future[dict[str, Any]]:
        """The record of the steps since the last one (on rank 0; hardly one elsewhere) and of `more`, and a new start.

        It comes later: AUCs take as long as many steps of a GPU, and nothing waits for them. Without a step since, it is of `more` alone.
        """
        if not self.steps:
            return self._thread.submit(_completed, {"step": step, "epoch": epoch, "rows": 0, **(more or {})}, None)
        losses = {f"loss_{name}": float(torch.stack(values).double().mean()) for name, values in self._losses.items()}
        report, pseudo_labels, num_rows, managed = self._reduced()
        self._warn_of_floor(report, step)
        self._warn_of_negative(losses.get("loss_cvr", 0.0), step)
        propensity = {f"propensity_{name}": float(value) for name, value in report._asdict().items() if value is not None}
        rows = self._gathered_rows()
        seconds = time.perf_counter() - self._since
        record: dict[str, Any] = {"step": step, "epoch": epoch, "rows": num_rows, "rows_per_s": round(num_rows / seconds, 1)} | dict(
            more or {}
        )
        if self._runtime.is_main:
            record |= losses | propensity | self._lifetime.figures() | managed
            record |= {f"lambda_{name}": float(weight) for name, weight in self._term_weights.items()}
            if pseudo_labels is not None:
                record["pseudo_labels_outside"], record["pseudo_labels_excess"] = pseudo_labels
                record["least_loss_cvr"] = min((float(value) for value in self._losses.get("cvr", [])), default=0.0)
        self._restart()
        return self._thread.submit(_completed, record, rows if self._runtime.is_main else None)

    @property
    def lifetime(self) -> list[list[float]]:
        """For a checkpoint: what each rank has added up, when the last record was made."""
        table: list[list[float]] = self._lifetime.table.tolist()
        return table

    def close(self) -> None:
        """When the last record is made."""
        self._thread.shutdown()

    def _warn_of_floor(self, report: PropensityReport, step: int) -> None:
        if self._may_warn and report.floor_binds_for_most:
            self._may_warn = False
            logger.warning(
                "up to step %d the floor of the propensity bound for %.0f%% of the clicked impressions: they all weigh the same, and "
                "selection stays uncorrected among them; lower objective.propensity.floor, or make it relative (floor_kind)",
                step,
                100 * (report.floor_share or 0.0),
            )

    def _warn_of_negative(self, mean: float, step: int) -> None:
        if self._may_warn_of_negative and mean < 0:
            self._may_warn_of_negative = False
            logger.warning(
                "up to step %d the mean CVR loss was %.3g, and it has no lower bound: where rows can be learned by heart, as in several "
                "epochs over sparse ids, logits of clicked impressions grow without end; raise objective.propensity.floor, train for fewer "
                "epochs, or set objective.imputation.clip_pseudo_labels: true",
                step,
                mean,
            )

    def _restart(self) -> None:
        self._losses = {}
        self._rows = deque()
        self._num_rows = 0
        self.steps = 0  # since the last record
        self._propensity = None
        self._pseudo_labels = None
        self._term_weights = {}
        self._since = time.perf_counter()

    def _reduced(self) -> tuple[PropensityReport, tuple[float, float] | None, int, dict[str, int]]:
        assert self._propensity is not None
        added, largest = self._propensity.added.clone(), self._propensity.largest.clone()
        counts = torch.zeros(4, dtype=torch.float64, device=self._runtime.device)
        counts[0] = self._num_rows
        if self._pseudo_labels is not None:
            counts[1:] = self._pseudo_labels.double()
        managed = [rows.num_taken().double().view(1) for rows in self._managed.values()]
        counts = torch.cat([counts, *managed, self._lifetime.placed()])
        dist.all_reduce(added, group=self._runtime.group)
        dist.all_reduce(counts, group=self._runtime.group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._runtime.group)
        report = propensity_report(PropensitySums(added, largest))
        self._lifetime.share(counts[4 + len(managed) :])
        taken = {f"managed_{name}": int(count) for name, count in zip(self._managed, counts[4:], strict=False)}
        return report, outside(counts[1:4]) if self._pseudo_labels is not None else None, int(counts[0]), taken

    def _gathered_rows(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        mine = torch.cat(list(self._rows), dim=1).cpu().numpy()
        gathered: list[Any] | None = [None] * self._runtime.world_size if self._runtime.is_main else None
        dist.gather_object(mine, gathered, dst=0, group=self._runtime.group)
        return np.concatenate(gathered, axis=1) if gathered is not None else mine


def _completed(record: dict[str, Any], rows: np.ndarray[tuple[int, int], np.dtype[np.float32]] | None) -> dict[str, Any]:
    if rows is not None:
        record |= quality(rows)
    return {name: value for name, value in record.items() if not (isinstance(value, float) and not math.isfinite(value))}


def quality(rows: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> dict[str, float]:
    """AUC, log loss and calibration of each task, by population, of rows as `StepOutput.rows` gives them; NaN where there is none."""
    ctr_logit, cvr_logit, click, conversion, weight = rows
    clicked = click > 0
    tasks: dict[str, tuple[ArrayLike, ArrayLike, ArrayLike]] = {
        "ctr": (ctr_logit, click, weight),
        "cvr_clicked": (cvr_logit[clicked], conversion[clicked], weight[clicked]),
        "ctcvr": (metrics.ctcvr_logits(ctr_logit, cvr_logit), click * conversion, weight),
    }
    found: dict[str, float] = {"window_rows": len(click), "window_clicks": int(clicked.sum())}
    for task, (logits, labels, weights) in tasks.items():
        found[f"{task}_auc"] = metrics.auc(logits, labels, weights)
        found[f"{task}_log_loss"] = metrics.log_loss(logits, labels, weights)
        found[f"{task}_calibration"] = metrics.calibration(logits, labels, weights)
    return found


class MetricsLog:
    """Appends records to `metrics.jsonl` and TensorBoard events, and has MLflow told, if it is to be; does nothing off rank 0."""

    def __init__(self, owner: Owner, runtime: Runtime, first_step: int, mlflow: MlflowLog | None = None) -> None:
        self._active, self._owner, self._mlflow, run = runtime.is_main, owner, mlflow, Path(owner.run)
        if self._active:
            from torch.utils.tensorboard import SummaryWriter

            self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")
            self._events = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record, at once on disk. RunError when the run has another owner by now."""
        if not self._active:
            return
        self._owner.check()
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name not in ("step", "epoch"):
                self._events.add_scalar(name, value, record["step"])
        if self._mlflow is not None:
            self._mlflow.write(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            self._file.close()
            self._events.close()

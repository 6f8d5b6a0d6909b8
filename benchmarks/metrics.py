"""What a step's metrics cost: TorchRec's RecMetrics beside those of `train`, of the same three tasks in batches of 8,192, on one core.

    python -m benchmarks.metrics

`step_us`: what each step pays (the median of 200). `record_ms`: what the step pays that makes a record; `beside_ms`: what a thread does
for it meanwhile. Windows are of 131,072 impressions in both. Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.metrics.metric_module import RecMetricModule, generate_metric_module
from torchrec.metrics.metrics_config import MetricsConfig, RecComputeMode, RecMetricDef, RecMetricEnum, RecTaskInfo

from benchmarks.machine import facts
from escm2rec.objectives.propensity import propensity_sums
from escm2rec.sharding.runtime import Runtime, distributed_runtime
from escm2rec.training.metrics import WINDOW_ROWS, TrainingMetrics
from escm2rec.training.step import StepOutput

BATCH, STEPS = 8_192, 200
TASKS = [
    RecTaskInfo(name=name, label_name=f"{name}-label", prediction_name=f"{name}-prediction", weight_name=f"{name}-weight")
    for name in ("ctr", "cvr", "ctcvr")
]


def rec_metrics(names: list[RecMetricEnum], runtime: Runtime) -> RecMetricModule:
    """TorchRec's module of these metrics, all tasks computed at once."""
    wanted = {name: RecMetricDef(rec_tasks=TASKS, window_size=WINDOW_ROWS) for name in names}
    config = MetricsConfig(
        rec_tasks=TASKS,
        rec_metrics=wanted,
        throughput_metric=None,
        state_metrics=[],
        rec_compute_mode=RecComputeMode.FUSED_TASKS_COMPUTATION,
    )
    return generate_metric_module(RecMetricModule, config, BATCH, 1, 0, {}, runtime.device, process_group=runtime.group)


def micros(step: Callable[[], object]) -> float:
    """Median time of a step, in microseconds, after ten that warm up."""
    spent = []
    for _ in range(10 + STEPS):
        began = time.perf_counter()
        step()
        spent.append(time.perf_counter() - began)
    return round(1e6 * statistics.median(spent[10:]), 1)


def millis(step: Callable[[], object]) -> float:
    """Time of one call, in milliseconds."""
    began = time.perf_counter()
    step()
    return round(1e3 * (time.perf_counter() - began), 1)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ctr, cvr = torch.randn(BATCH) - 3, torch.randn(BATCH) - 2
    click = (torch.rand(BATCH) < 0.1).float()
    conversion, weight = click * (torch.rand(BATCH) < 0.2).float(), torch.ones(BATCH)
    p_ctr, p_cvr = torch.sigmoid(ctr), torch.sigmoid(cvr)
    of_tasks = {"ctr": (p_ctr, click, weight), "cvr": (p_cvr, conversion, click), "ctcvr": (p_ctr * p_cvr, conversion, weight)}
    batch: dict[str, Tensor] = {}
    for task, tensors in of_tasks.items():
        batch |= dict(zip((f"{task}-prediction", f"{task}-label", f"{task}-weight"), tensors, strict=True))
    found: dict[str, Any] = {"machine": facts(), "batch": BATCH, "window_rows": WINDOW_ROWS}
    with distributed_runtime() as runtime:
        enum = RecMetricEnum
        for name, metrics in (
            ("ne_calibration", [enum.NE, enum.CALIBRATION]),
            ("ne_calibration_auc", [enum.NE, enum.CALIBRATION, enum.AUC]),
        ):
            module = rec_metrics(metrics, runtime)
            found[f"rec_metrics_{name}"] = {"step_us": micros(lambda: module.update(batch)), "record_ms": millis(module.compute)}  # noqa: B023
        ours = TrainingMetrics(runtime, weighs=False)
        sums = propensity_sums(p_ctr, click, weight, 0.01)
        output = StepOutput({"ctr": torch.tensor(0.1)}, {}, ctr, cvr, click, conversion, weight, BATCH, sums, None)
        step_us = micros(lambda: ours.add(output))
        began = time.perf_counter()
        coming = ours.record(1, 0)
        record_ms = round(1e3 * (time.perf_counter() - began), 1)
        found["train"] = {"step_us": step_us, "record_ms": record_ms, "beside_ms": millis(coming.result)}
        dist.barrier()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

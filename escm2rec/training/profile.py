"""Where the time of a step goes: a trace of some steps of each rank, and a table of their parts."""

from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
import statistics
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from escm2rec.folder import write_json
from escm2rec.sharding.runtime import Runtime

logger = logging.getLogger(__name__)

FOLDER = "profile"
WARM_UP, RECORDED = 10, 20  # steps; of a training with fewer than twice the first, half are warm-up
PARTS = ("read", "copy", "sparse", "dense", "backward", "optimizer", "wait", "other")
STEP = "ProfilerStep#"
# By the name of a range; the innermost that has a part decides. Most are TorchRec's (distributed/train_pipeline, embeddingbag.py; managed
# tables are looked up in a range of mc_embedding_modules.py).
PART_OF = {
    r"## next_batch": "read",
    r"## (inplace_)?copy_batch_to_gpu|## wait_for_batch": "copy",
    r"## (start|wait)_sparse_data_dist|## \w+ wait\(\)|\[\w+\]_\[|## compute:mcc": "sparse",
    r"## forward": "dense",
    r"## backward": "backward",
    r"## optimizer|## zero_grad": "optimizer",
    r"c10d::|cuda\w*Synchronize": "wait",
}
# Ranges of Python code that waits for a collective, unless an operator runs in them.
WAITING = r"## \w+ wait\(\)|(All2All|ReduceScatter|AllGather)\w*$|## (backward|optimizer)"
ON_THREAD = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")


class Profile:
    """Records some steps of a training, after others that warm it up, into `RUN/profile/`; all ranks call it alike.

    Used as a context, in which `step` tells each step that is done. `trace-rank-R.json.gz` are Chrome traces; `profile.json`, and a table
    that rank 0 tells, have milliseconds a step, of the thread that trains:

    Then training rests for some seconds. One that ends before, by SIGTERM or an early stop, leaves no profile.

    read       waiting for the reader's next batch
    copy       that batch to the device
    sparse     ids to the ranks of their tables, look-ups, and what they pool back
    dense      towers and loss, forward
    backward   the backward pass; tables are stepped in it, but those of data_parallel
    optimizer  gradients of those and dense ones summed over the ranks, their steps, gradients cleared
    wait       for other ranks, or for the GPU
    other      metrics, logs, checkpoints, and what is between

    On a GPU these are of the processor that queues its work; the trace, and `kernels` in `profile.json`, have what the GPU does.
    """

    def __init__(self, run: Path, runtime: Runtime, steps_left: int, rows_a_step: float) -> None:
        self._folder, self._runtime, self._rows_a_step = run / FOLDER, runtime, rows_a_step
        self._warm_up = min(WARM_UP, steps_left // 2)
        self._recorded = min(RECORDED, steps_left - self._warm_up)
        self._ends: list[float] = []  # of the steps
        ready = min(1, self._warm_up)  # the last step of the warm-up: the profiler is made ready beside it
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if runtime.device.type == "cuda" else [])],
            schedule=schedule(wait=self._warm_up - ready, warmup=ready, active=self._recorded, repeat=1),
            on_trace_ready=self._write,
        )

    def step(self) -> None:
        """One more step is done. After the last that is recorded everything is written."""
        self._ends.append(time.perf_counter())
        self._profiler.step()

    def __enter__(self) -> Self:
        if self._runtime.is_main:  # before the first step, at whose end no rank is without the others
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()
        self._profiler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._profiler.stop()

    def _write(self, profiler: profile) -> None:
        if len(self._ends) < self._warm_up + self._recorded:
            return  # the training ends before
        path = self._folder / f"trace-rank-{self._runtime.rank}.json.gz"
        plain = path.with_suffix("")
        profiler.export_chrome_trace(str(plain))
        text = plain.read_bytes()
        path.write_bytes(gzip.compress(text, compresslevel=1))  # torch's own .json.gz takes the slowest level, while all ranks wait
        plain.unlink()
        mine = parts_of(json.loads(text)["traceEvents"])
        ranks: list[dict[str, float]] = [{}] * self._runtime.world_size
        dist.all_gather_object(ranks, mine, group=self._runtime.group)
        if self._runtime.is_main:
            found = summary_of(ranks) | {"steps": self._recorded, "unprofiled_ms": self._unprofiled_ms()}
            found["rows_per_s"] = round(self._rows_a_step / found["ms_a_step"]["total"]["median"] * 1e3, 1)
            write_json(self._folder / "profile.json", found)
            logger.info("%s", table_of(found))

    def _unprofiled_ms(self) -> float | None:
        """Median of the steps of the warm-up, but for the first and the last."""
        ends = self._ends[: max(0, self._warm_up - 1)]
        took = [after - before for before, after in pairwise(ends)]
        return round(1e3 * statistics.median(took), 3) if took else None


class _Range(NamedTuple):
    """A range that is open: when it ends, the part of its time, and whether its own time may be one of waiting."""

    end: float
    part: str
    waits: bool


def parts_of(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a step of each of `PARTS`, which add up to `total`, from the events of a Chrome trace; `kernels` of a GPU's.

    Each moment of the thread that trains belongs to the innermost range that has a part. Where such a range waits (`WAITING`) and no
    operator runs in it, it is of `wait` as far as one of gloo's collectives is under way.
    """
    told = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in told if event["name"].startswith(STEP) and event["cat"] == "user_annotation"]
    mine = [event for event in told if event["tid"] == steps[0]["tid"] and event["cat"] in ON_THREAD]
    flights = _merged((event["ts"], event["ts"] + event["dur"]) for event in told if event["name"].startswith("gloo:"))
    spent, open_ranges, now = dict.fromkeys(PARTS, 0.0), list[_Range](), 0.0

    def spend(until: float) -> None:
        nonlocal now
        innermost = open_ranges[-1]
        waited = sum(max(0.0, min(until, end) - max(now, start)) for start, end in flights) if innermost.waits else 0.0
        spent["wait"] += waited
        spent[innermost.part] += until - now - waited
        now = until

    for event in sorted(mine, key=lambda event: (event["ts"], -event["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        while open_ranges and open_ranges[-1].end <= start:
            spend(open_ranges[-1].end)
            open_ranges.pop()
        if open_ranges:
            spend(start)
            open_ranges.append(_Range(min(end, open_ranges[-1].end), *_read(event["name"], open_ranges[-1].part)))
        elif event["name"].startswith(STEP):
            now = start
            open_ranges.append(_Range(end, "other", False))
    while open_ranges:
        spend(open_ranges[-1].end)
        open_ranges.pop()
    spent["total"] = sum(event["dur"] for event in steps)
    spent["kernels"] = sum(event["dur"] for event in told if event.get("cat") == "kernel")
    return {part: microseconds / 1e3 / len(steps) for part, microseconds in spent.items()}


def _read(name: str, within: str) -> tuple[str, bool]:
    """The part of a range, `within` if it has none of its own, and whether it waits."""
    part = next((part for pattern, part in PART_OF.items() if re.match(pattern, name)), within)
    return part, re.match(WAITING, name) is not None


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times without overlap."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def summary_of(ranks: list[dict[str, float]]) -> dict[str, Any]:
    """Median, least and most over the ranks of what `parts_of` says of each, and whose the most is.

    The parts of a rank add up to its total; medians of more than two ranks do so nearly.
    """
    summary = {}
    for part in ranks[0]:
        values = [rank[part] for rank in ranks]
        most = max(values)
        found = {"median": statistics.median(values), "least": min(values), "most": most}
        summary[part] = {name: round(value, 3) for name, value in found.items()} | {"most_rank": values.index(most)}
    return {"world_size": len(ranks), "ms_a_step": summary}


def table_of(found: dict[str, Any]) -> str:
    """What `profile.json` holds, for people."""
    unprofiled = f", {found['unprofiled_ms']:.2f} ms a step before it was profiled" if found["unprofiled_ms"] is not None else ""
    lines = [
        f"milliseconds a step, of {found['steps']} steps on {found['world_size']} rank(s), {found['rows_per_s']:,.0f} rows/s{unprofiled}",
        f"  {'':<10}{'median':>9}{'share':>7}{'least':>9}{'most':>9}  of rank",
    ]
    total = found["ms_a_step"]["total"]["median"]
    for part in (*PARTS, "total"):
        of = found["ms_a_step"][part]
        share = f"{of['median'] / total:>7.0%}"
        lines.append(f"  {part:<10}{of['median']:>9.2f}{share}{of['least']:>9.2f}{of['most']:>9.2f}  {of['most_rank']}")
    return "\n".join(lines)

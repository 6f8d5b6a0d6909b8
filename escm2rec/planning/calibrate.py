"""The hardware entry of the ranks that there are, by micro-benchmarks of what the estimate counts: lookups, exchanges, whole tables."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, OptimType, SplitTableBatchedEmbeddingBagsCodegen
from torchrec.distributed.planner.constants import FULL_BLOCK_EMB_DIM, HALF_BLOCK_PENALTY, QUARTER_BLOCK_PENALTY

from escm2rec.config import TrainingConfig
from escm2rec.errors import ConfigError
from escm2rec.planning.hardware import Hardware
from escm2rec.planning.text import print_hardware
from escm2rec.sharding.runtime import Runtime, distributed_runtime, on_main
from escm2rec.training.whole_tables import WholeTables

LOOKUPS = ((16, 4), (64, 1), (64, 16), (128, 4), (256, 2))
"""Dimensions, and ids an impression."""
ROWS, BATCH_SIZE = 500_000, 4_096
MESSAGE_BYTES = 2**18, 2**20, 2**22, 2**23, 2**24  # of a rank
WHOLE_TABLES = (1_000, 64), (10_000, 128), (100_000, 128), (200_000, 128)
"""Rows and dimensions."""
REPEATS = 9


def calibrate(name: str, out: Path, overwrite: bool) -> dict[str, Any]:
    """Measure on all ranks at once, and write `name: {...}` to `out`, a file for --hardware; the entry, by rank 0.

    Called on every rank there is, started by torchrun; alone, collectives are not measured and stay what they cost nothing to say. What is
    not measured is said in the entry's `sources`.
    """
    with distributed_runtime() as runtime:
        on_main(runtime, lambda: _refuse(out, overwrite))
        bytes_per_ms, multiplier = _lookups(runtime)
        entry = _entry(runtime, bytes_per_ms, multiplier, _all_to_all(runtime), *_whole_tables(runtime))
        if runtime.is_main:
            tree = {name: entry.model_dump(mode="json")}
            out.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
            print_hardware(tree)
    return {"hardware": str(out), "name": name, **entry.model_dump(mode="json")}


def _refuse(out: Path, overwrite: bool) -> None:
    if out.exists() and not (overwrite and out.is_file()):
        raise ConfigError(f"--out {out} exists", "add --overwrite to replace a file, or choose another")
    if not out.parent.is_dir():
        raise ConfigError(f"no folder {out.parent} for the entry", "make it first, or choose another place")


def _entry(
    runtime: Runtime, bytes_per_ms: float, multiplier: float, all_to_all: float | None, stepped: float, summed: float | None
) -> Hardware:
    is_gpu, local = runtime.device.type == "cuda", runtime.local_world_size
    nodes = runtime.world_size // local
    memory = runtime.memory_bytes() / 2**30
    lookups = bytes_per_ms / 1e6
    exchanged = lookups if all_to_all is None else all_to_all / 1e6
    # TorchRec prices an all-reduce at the rate between nodes times the ranks of one, on one node too.
    between = exchanged if nodes > 1 or summed is None else summed / 1e6 / local
    return Hardware(
        device="cuda" if is_gpu else "cpu",
        memory_gib=round(memory, 2) if is_gpu else 0,
        memory_gb_per_s=round(lookups, 3) if is_gpu else 0,
        host_memory_gib=round(_host_gib(), 2) if is_gpu else round(memory * local, 2),
        host_memory_gb_per_s=round(lookups * (1 if is_gpu else local), 3),
        intra_node_gb_per_s=round(exchanged, 4),
        inter_node_gb_per_s=round(between, 4),
        whole_tables_gb_per_s=round(stepped / 1e6, 4),
        backward_multiplier=round(multiplier, 3),
        sources=_sources(nodes, local, is_gpu),
    )


def _sources(nodes: int, local: int, is_gpu: bool) -> tuple[str, ...]:
    """What was measured, and what was not."""
    measured = "lookups, tables that every rank holds" + (", all-to-all, all-reduce" if nodes * local > 1 else "")
    assumed = ["host_link_gb_per_s is not measured: 32 is PCIe Gen4 x16"]
    if is_gpu:
        assumed.append("host_memory_gb_per_s is not measured: it is the GPU's own rate")
    if nodes * local == 1:
        assumed.append("intra_node_gb_per_s and inter_node_gb_per_s are not measured: of one rank there are none; they are that of lookups")
    if nodes == 1 and local > 1:
        assumed.append("inter_node_gb_per_s is of one node: what TorchRec prices an all-reduce by; give another for more nodes")
    elif local > 1:
        assumed.append("intra_node_gb_per_s is that of all nodes together, as inter_node_gb_per_s")
    return f"measured on {nodes} node(s) of {local} rank(s), {time.strftime('%Y-%m-%d')}: {measured}", *assumed


def _host_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _lookups(runtime: Runtime) -> tuple[float, float]:
    """Bytes a millisecond of a rank's lookups while all ranks look up, as TorchRec counts the bytes; backward over forward time."""
    rates, ratios = [], []
    for dimension, ids in LOOKUPS:
        forward, backward = _lookup_ms(runtime, dimension, ids)
        # TorchRec's sum for a table that lies whole on a rank: ids, rows and outputs, by how full the kernel's blocks are.
        moved = BATCH_SIZE * (ids * 8 + ids * max(dimension, 32) * 4 + dimension * 4)
        rates.append(moved * _penalty(dimension) / forward)
        ratios.append(backward / forward)
    every: list[tuple[float, float]] = [(0.0, 0.0)] * runtime.world_size
    dist.all_gather_object(every, (statistics.median(rates), statistics.median(ratios)), group=runtime.group)
    return statistics.median(rate for rate, _ in every), statistics.median(ratio for _, ratio in every)


def _penalty(dimension: int) -> float:
    """Of kernels whose blocks a row does not fill, as TorchRec counts it."""
    if dimension >= FULL_BLOCK_EMB_DIM:
        return 1.0
    return float(HALF_BLOCK_PENALTY if dimension >= 64 else QUARTER_BLOCK_PENALTY)


def _lookup_ms(runtime: Runtime, dimension: int, ids: int) -> tuple[float, float]:
    is_gpu = runtime.device.type == "cuda"
    place = EmbeddingLocation.DEVICE if is_gpu else EmbeddingLocation.HOST
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, dimension, place, ComputeDevice.CUDA if is_gpu else ComputeDevice.CPU)],
        optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=1e-3,
        device=runtime.device,
    )
    generator = torch.Generator().manual_seed(runtime.rank)
    values = torch.randint(ROWS, (BATCH_SIZE * ids,), generator=generator).to(runtime.device)
    offsets = torch.arange(0, BATCH_SIZE * ids + 1, ids, device=runtime.device)
    gradient = torch.randn(BATCH_SIZE, dimension, generator=generator).to(runtime.device)
    pooled = table(values, offsets)
    forward, backward = [], []
    for _ in range(REPEATS):
        dist.barrier(group=runtime.group)
        forward.append(_ms(runtime, partial(table, values, offsets)))
        pooled = table(values, offsets)
        dist.barrier(group=runtime.group)
        backward.append(_ms(runtime, partial(pooled.backward, gradient)))
    return statistics.median(forward), statistics.median(backward)


def _ms(runtime: Runtime, work: Callable[[], object]) -> float:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def _all_to_all(runtime: Runtime) -> float | None:
    """Bytes of a rank that are exchanged in a millisecond; None of one rank alone."""
    if runtime.world_size == 1:
        return None
    rates = []
    for size in MESSAGE_BYTES:
        buffer = torch.ones(size // 4 // runtime.world_size * runtime.world_size, device=runtime.device)
        received = torch.empty_like(buffer)
        exchange = partial(dist.all_to_all_single, received, buffer, group=runtime.group)
        rates.append(buffer.numel() * 4 / _slowest_ms(runtime, exchange))
    return statistics.median(rates)


def _whole_tables(runtime: Runtime) -> tuple[float, float | None]:
    """Of tables that every rank holds, bytes that a millisecond of a training step clears and steps, and bytes that are summed in one
    over the ranks; None of one rank alone."""
    stepped, summed = [], []
    for rows, dimension in WHOLE_TABLES:
        table = torch.nn.Parameter(torch.zeros(rows, dimension, device=runtime.device))
        optimizer = WholeTables({"whole.embedding_bags.table.weight": table}, TrainingConfig(), runtime.group)

        def step(table: torch.nn.Parameter = table, optimizer: WholeTables = optimizer) -> None:
            table.grad = torch.zeros_like(table)
            optimizer.step()

        whole, size = _slowest_ms(runtime, step), table.numel() * 4
        if runtime.world_size == 1:
            stepped.append(size / whole)
            continue
        reduced = _slowest_ms(runtime, partial(dist.all_reduce, table.detach().reshape(-1), group=runtime.group))
        summed.append(size / reduced)
        stepped.append(size / max(whole - reduced, whole / 20))
    return statistics.median(stepped), statistics.median(summed) if summed else None


def _slowest_ms(runtime: Runtime, work: Callable[[], object]) -> float:
    """The median time of what all ranks do at once, of the slowest rank."""
    work()
    times = []
    for _ in range(REPEATS):
        dist.barrier(group=runtime.group)
        times.append(_ms(runtime, work))
    slowest = torch.tensor(statistics.median(times), device=runtime.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=runtime.group)
    return float(slowest)

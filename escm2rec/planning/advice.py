"""Where no plan fits: by how much, because of which tables, and what would make one fit, each change tried."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from escm2rec.errors import RunError
from escm2rec.planning.options import Floats, Options
from escm2rec.planning.planner import KERNELS, Planned, Request, find_plan
from escm2rec.planning.record import Record, record_of
from escm2rec.planning.tables import Table

logger = logging.getLogger(__name__)
LARGEST = 3  # tables that are named
IN_INT8 = "not tried: weights in int8, which TorchRec counts as float16"
GIB = 2**30


@dataclass(frozen=True)
class Tried:
    """A change, what it still lacks, and the plan that it allows; None where it is not enough."""

    change: str
    lack: str
    record: Record | None = None

    def __str__(self) -> str:
        if self.record is None:
            return f"not enough: {self.change} ({self.lack})"
        estimate = self.record["estimate"]
        return f"fits: {self.change} ({estimate['step_ms']:.2f} ms a step, fullest rank {100 * estimate['fullest_share']:.0f}%)"


def does_not_fit(planned: Planned) -> RunError:
    """The error of a plan that was not found."""
    request = planned.request
    if request.planner != "priced":
        ours = _try("planner priced", replace(request, planner="priced"))
        if ours.record is not None:
            return RunError(
                f"planner {request.planner} found no plan for {request.cluster.name}, though there are some: its search is at fault",
                f"choose another planner; {ours}",
            )
    logger.info("no plan fits; trying what could help")
    tried = [_try(change, changed) for change, changed in changes(request)]
    enough = [each for each in tried if each.record is not None]
    hint = "\n".join(f"  {each}" for each in [*enough, *(each for each in tried if each.record is None), IN_INT8])
    return RunError(shortfall(planned), f"each of these was tried alone:\n{hint}")


def changes(request: Request) -> Iterator[tuple[str, Request]]:
    """Changes of a request that take less memory or give more, the least painful first."""
    tables, cluster = list(request.tables), request.cluster
    if request.optimizer not in ("rowwise_adagrad", "sgd"):
        yield f"rowwise_adagrad instead of {request.optimizer}", replace(request, optimizer="rowwise_adagrad")
    allowed = set(KERNELS[cluster.hardware.device])
    if request.kernels is not None and not allowed <= set(request.kernels):
        yield "any kernel, those in the host's memory too", replace(request, kernels=None)
    if request.allowed:
        yield "any sharding type for every table", replace(request, allowed={})
    if any(table.dtype == "fp32" for table in tables):
        halved = [table.model_copy(update={"dtype": "bf16"}) if table.dtype == "fp32" else table for table in tables]
        yield "weights in bf16", replace(request, tables=halved)
    if all(table.dimension % 8 == 0 for table in tables):
        yield (
            "half the dimension",
            replace(request, tables=[table.model_copy(update={"dimension": table.dimension // 2}) for table in tables]),
        )
    largest = max(tables, key=lambda table: table.weight_bytes)
    yield f"hashing the largest table, {largest.name}, to a quarter of its rows", replace(request, tables=_hashed(tables, {largest.name}))
    top = {table.name for table in sorted(tables, key=lambda table: -table.weight_bytes)[: max(1, len(tables) // 10)]}
    if len(top) > 1:
        yield f"hashing the {len(top)} largest tables to a quarter of their rows", replace(request, tables=_hashed(tables, top))
    if request.batch_size > 1:
        yield "half the batch", replace(request, batch_size=request.batch_size // 2)
    for factor in (2, 4):
        yield f"{factor} times the nodes", replace(request, cluster=replace(cluster, nodes=factor * cluster.nodes))


def _hashed(tables: list[Table], names: set[str]) -> list[Table]:
    """With fewer rows, of which is not known how often they are looked up."""
    fewer = {table.name: {"rows": max(1, table.rows // 4), "popularity": ()} for table in tables}
    return [table.model_copy(update=fewer[table.name]) if table.name in names else table for table in tables]


def _try(change: str, request: Request) -> Tried:
    planned = find_plan(request)
    return Tried(change, _lack(planned)) if planned.chosen is None else Tried(change, "", record_of(planned))


def _lack(planned: Planned) -> str:
    """What is still missing, in short."""
    where, need, room = _needs(planned)
    return (
        f"still {(need - room) / GIB:,.1f} GiB{where} short" if need > room else "nothing is short, but no way was found to cut the tables"
    )


def _needs(planned: Planned) -> tuple[str, float, float]:
    """Of the memory that is shortest: its name, the bytes that tables take of it at the least, and those that all ranks have."""
    request, rooms, options = planned.request, np.maximum(planned.rooms[:, :2], 0).sum(axis=0), Options.of(planned.search_space)
    places = [("", options.bytes[:, :2].sum(axis=1), float(rooms.sum()))]
    if request.cluster.hardware.device == "cuda":
        places += [(" of the GPUs' memory", options.bytes[:, 0], rooms[0]), (" of the hosts' memory", options.bytes[:, 1], rooms[1])]
    needs = [(where, _least(options, taken), room) for where, taken, room in places]
    return max((each for each in needs if each[1] > each[2]), key=lambda each: each[1] - each[2], default=needs[0])


def shortfall(planned: Planned) -> str:
    """Why a search found no plan: by how much memory is short, and because of which tables."""
    request = planned.request
    where, need, room = _needs(planned)
    large = sorted(request.tables, key=lambda table: -table.weight_bytes)[:LARGEST]
    named = ", ".join(f"{table.name} ({table.weight_bytes / GIB:,.1f} GiB)" for table in large)
    found = "no plan fits" if request.planner == "priced" else f"planner {request.planner} found no plan for"
    said = f"{found} {request.cluster.name}: with their optimizer and outputs tables take {need / GIB:,.1f} GiB{where} at the least, "
    if need > room:
        return f"{said}{(need - room) / GIB:,.1f} GiB more than all ranks have for them; the largest weights are {named}"
    cut = "but no way was found to cut them so that each rank's share fits"
    return f"{said}and all ranks have {room / GIB:,.1f} GiB, {cut}; the largest weights are {named}"


def _least(options: Options, taken: Floats) -> float:
    """What all tables take where each has the option that takes least."""
    least = np.full(options.num_tables, np.inf)
    np.minimum.at(least, options.table, taken)
    return float(least.sum())

"""Many plans side by side: over clusters, batch sizes, dimensions, sharding types and planners."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from escm2rec.errors import ConfigError, did_you_mean
from escm2rec.folder import new_folder, write_json, write_manifest
from escm2rec.planning.advice import shortfall
from escm2rec.planning.cluster import Cluster
from escm2rec.planning.planner import PlannerName, Request, check_planner, find_plan
from escm2rec.planning.record import Record, cost_of, rate_of, record_of

logger = logging.getLogger(__name__)


def variants(
    request: Request,
    clusters: Mapping[str, Cluster],
    batch_sizes: Sequence[int],
    dimensions: Sequence[int],
    types: Sequence[Sequence[str]],
    planners: Sequence[PlannerName],
) -> Iterator[tuple[str, Request]]:
    """All combinations, each with a name of what varies; an empty list leaves what the request has.

    Clusters are by what they are called, which tells apart those that differ in what is overridden. Batch sizes are of a rank, as
    everywhere in a request.
    """
    axes: list[list[tuple[str, dict[str, Any]]]] = [
        [(text, _on(request, cluster)) for text, cluster in clusters.items()],
        [(f"batch {size}", {"batch_size": size}) for size in batch_sizes],
        [(f"dimension {dimension}", {"tables": _of_dimension(request, dimension)}) for dimension in dimensions],
        [("+".join(each), {"allowed": {**request.allowed, "*": list(each)}}) for each in types],
        [(planner, {"planner": planner}) for planner in planners],
    ]
    varied = [axis for axis in axes if axis]
    for combination in product(*varied):
        changed = {key: value for _, changes in combination for key, value in changes.items()}
        name = ", ".join(text for axis, (text, _) in zip(varied, combination, strict=True) if len(axis) > 1)
        yield name or request.cluster.name, replace(request, **changed)


def sweep(named: Sequence[tuple[str, Request]], prices: Mapping[str, float]) -> tuple[list[Record], list[Record]]:
    """The plans, each with its name, and a row of each for a table; one that does not fit has a row without a plan."""
    plans, rows = [], []
    for _, request in named:
        check_planner(request.planner, request.cluster)  # before the first search
    for number, (name, request) in enumerate(named, 1):
        planned = find_plan(request)
        row: Record = {"name": name, "ranks": request.cluster.world_size, "batch_size": request.batch_size, "planner": request.planner}
        if planned.chosen is None:
            logger.info("%d of %d, %s: %s", number, len(named), name, shortfall(planned))
            rows.append({**row, "fits": False, "why": shortfall(planned)})
            continue
        record = {"name": name, **record_of(planned)}
        plans.append(record)
        rows.append({**row, "fits": True, "plan": plan_file(len(plans)), **summary(record, prices)})
        logger.info("%d of %d, %s: %.3f ms a step", number, len(named), name, record["estimate"]["step_ms"])
    return plans, rows


def plan_file(number: int) -> str:
    """Where the folder of a sweep has its plan of a number, from 1."""
    return f"plans/{number:03}.json"


def write_sweep(plans: Sequence[Record], rows: Sequence[Record], out: Path, prices: Mapping[str, float], overwrite: bool) -> None:
    """Write `out/sweep.json`, `out/sweep.html` and each plan as `out/plans/NUMBER.json`; ConfigError where `out` may not be replaced."""
    from escm2rec.planning.html import write_plans

    with new_folder(out, "sweep", overwrite) as folder:
        (folder / "plans").mkdir()
        for number, plan in enumerate(plans, 1):
            write_json(folder / plan_file(number), plan)
        write_json(folder / "sweep.json", list(rows))
        if plans:
            left_out = {row["name"]: row["why"] for row in rows if not row["fits"]}
            write_plans(plans, folder / "sweep.html", prices, left_out)
        write_manifest(folder, "sweep", {"plans": len(plans)})


def summary(record: Record, prices: Mapping[str, float]) -> Record:
    """What plans are compared by; cost in the unit of the prices, of the tables' part of the steps alone."""
    estimate = record["estimate"]
    keys = ("step_ms", "mean_ms", "bound_ms", "imbalance", "limited_by", "fullest_share")
    told = {"cluster": Cluster.from_json(record["cluster"]).name, "ranks": record["world_size"], "batch_size": record["batch_size"]}
    return {
        **told,
        "impressions_per_s": rate_of(record),
        **{key: estimate[key] for key in keys},
        "cost_per_million_rows": cost_of(record, prices),
        "seconds": record["seconds"],
    }


def compare(records: Sequence[Record], names: Sequence[str], prices: Mapping[str, float]) -> Record:
    """Plans side by side, and the tables that they shard otherwise."""
    rows = [{"name": name, **summary(record, prices)} for name, record in zip(names, records, strict=True)]
    tables = sorted({table for record in records for table in record["tables"]})
    moved = {}
    for table in tables:
        told = [_told(record["tables"].get(table)) for record in records]
        if any(each != told[0] for each in told):
            moved[table] = dict(zip(names, told, strict=True))
    fastest = min(rows, key=lambda row: float(row["step_ms"]))
    return {"plans": rows, "fastest": fastest["name"], "tables_alike": len(tables) - len(moved), "tables_otherwise": moved}


def parse_prices(texts: Sequence[str], hardware: Collection[str]) -> dict[str, float]:
    """Prices of a rank an hour, as NAME=NUMBER; ConfigError where one is none, or not of the `hardware` that is planned for."""
    prices = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            prices[name] = float(value)
        except ValueError:
            prices[name] = -1.0
        if not name or not prices[name] >= 0 or prices[name] == float("inf"):
            raise ConfigError(f"--price {text!r} is no price", "write HARDWARE=NUMBER, such as h100-80gb=2.5, per rank and hour")
        if name not in hardware:
            raise ConfigError(
                f"--price {text!r}: no plan is for {name!r}{did_you_mean(name, hardware)}", f"they are for {', '.join(sorted(hardware))}"
            )
    return prices


def _on(request: Request, cluster: Cluster) -> dict[str, Any]:
    """What a request becomes on a cluster: a config's batch is of all ranks together."""
    whole = request.global_batch_size
    return {"cluster": cluster} if whole is None else {"cluster": cluster, "batch_size": max(1, whole // cluster.world_size)}


def _of_dimension(request: Request, dimension: int) -> list[Any]:
    if dimension < 4 or dimension % 4:
        raise ConfigError(f"--dimension {dimension} is none that tables can have", "give a multiple of 4")
    return [table.model_copy(update={"dimension": dimension}) for table in request.tables]


def _told(table: Record | None) -> Record | None:
    if table is None:
        return None
    ranks = sorted(set(table["ranks"]))
    return {"sharding_type": table["sharding_type"], "compute_kernel": table["compute_kernel"], "ranks": ranks, "ms": table["ms"]}

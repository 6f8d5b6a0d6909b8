"""Why a table is sharded as it is: its other options, each with the plan that it would lead to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torchrec.distributed.planner.types import PlannerError, ShardingOption

from escm2rec.errors import ConfigError, did_you_mean
from escm2rec.planning.enumerator import BY_ROWS, share_of
from escm2rec.planning.options import perf_of, storage_of
from escm2rec.planning.partitioner import Partitioning
from escm2rec.planning.planner import Request, search_space
from escm2rec.planning.popularity import Popularity
from escm2rec.planning.record import TIMES, Record, request_of

SHOWN = ("sharding_type", "compute_kernel", "total_ms", "longest_ms", "step_ms", "why")
LEFT_OUT = ("shards", "popularity")  # long lists
SAME = 1e-3  # of a step: what lies closer is called the same


def explain(record: Record, table: str) -> Record:
    """The options of a table of a plan: what each costs alone, and the step where all other tables keep theirs.

    ConfigError where the plan has no such table.
    """
    if table not in record["tables"]:
        raise ConfigError(f"the plan has no table {table!r}{did_you_mean(table, sorted(record['tables']))}", "give one of its tables")
    request, own = request_of(record), record["tables"][table]
    space = search_space(request)
    (of,) = (each for each in request.tables if each.name == table)
    alternatives = [
        _alternative(option, of.popularity) | {"step_ms": _step_with(option, record, space, request)}
        for option in space
        if option.name == table
    ]
    step_ms = record["estimate"]["step_ms"]
    for each in alternatives:
        each["chosen"] = (each["sharding_type"], each["compute_kernel"]) == (own["sharding_type"], own["compute_kernel"])
        each["why"] = _why(each, step_ms)
    alternatives.sort(key=lambda each: (not each["chosen"], float("inf") if each["step_ms"] is None else each["step_ms"], each["total_ms"]))
    return {
        "table": table,
        **{key: value for key, value in own.items() if key not in LEFT_OUT},
        "step_ms": step_ms,
        "options": alternatives,
    }


def _alternative(option: ShardingOption, popularity: Popularity) -> Record:
    by_rows = option.sharding_type in BY_ROWS
    parts = {part: sum(float(getattr(shard.perf, name)) for shard in option.shards) for part, name in TIMES.items()}
    return {
        "sharding_type": option.sharding_type,
        "compute_kernel": option.compute_kernel,
        "shards": len(option.shards),
        "total_ms": sum(parts.values()),
        "longest_ms": max(perf_of(shard) for shard in option.shards),
        "ms": parts,
        "most_lookups": max(share_of(popularity, shard) for shard in option.shards) if by_rows and popularity else None,
        "largest_bytes": max(storage_of(shard)[0] for shard in option.shards),
        "largest_host_bytes": max(storage_of(shard)[1] for shard in option.shards),
    }


def _step_with(option: ShardingOption, record: Record, space: Sequence[ShardingOption], request: Request) -> float | None:
    """The slowest rank where this table has the option and all others keep theirs, placed anew; None where that does not fit."""
    chosen = {name: (table["sharding_type"], table["compute_kernel"]) for name, table in record["tables"].items()}
    chosen[option.name] = (option.sharding_type, option.compute_kernel)
    proposal = [each for each in space if chosen[each.name] == (each.sharding_type, each.compute_kernel)]
    try:
        Partitioning().partition(proposal, request.reservation.taken_from(request.cluster.topology()))
    except PlannerError:
        return None
    load = np.zeros(request.cluster.world_size)
    for each in proposal:
        np.add.at(load, [shard.rank for shard in each.shards], [perf_of(shard) for shard in each.shards])
    return float(load.max())


def _why(option: Record, step_ms: float) -> str:
    if option["step_ms"] is None:
        return "does not fit beside the other tables"
    change = option["step_ms"] / step_ms - 1 if step_ms else 0.0
    if option["chosen"]:
        return "chosen"
    if abs(change) <= SAME:
        return "the step would be as long"
    largest = max(option["ms"], key=option["ms"].get)
    share = option["most_lookups"]
    lookups = "" if share is None else f", and one of its {option['shards']} shards has {100 * share:.0f}% of its lookups"
    step = f"the step would be {100 * abs(change):.1f}% {'longer' if change > 0 else 'shorter'}"
    return f"{step}; most of the table's time is {largest}{lookups}"


def options_text(explained: Record) -> str:
    """The options as lines for a person."""
    rows = [list(SHOWN), *([_cell(option[key]) for key in SHOWN] for option in explained["options"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(SHOWN))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

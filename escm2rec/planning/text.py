"""The tables of `escm2rec plan`, for people, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from escm2rec.planning.record import Record

WIDTH = 150  # where no terminal says
TABLES_SHOWN = 40
RANKS_SHOWN = 32
RATES = ("host_memory_gib", "host_memory_gb_per_s", "host_link_gb_per_s", "intra_node_gb_per_s", "inter_node_gb_per_s")
GIB = 2**30


def print_plan(record: Record) -> None:
    """Print the tables that take longest, the ranks, and what limits."""
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDTH)
    tables = sorted(record["tables"].items(), key=lambda item: -float(item[1]["ms"]))
    console.print(_tables(tables[:TABLES_SHOWN]))
    if len(tables) > TABLES_SHOWN:
        console.print(f"{len(tables) - TABLES_SHOWN} more tables take less time each.", markup=False, highlight=False)
    console.print(_ranks(record))
    for line in said(record):
        console.print(line, markup=False, highlight=False)


def said(record: Record) -> list[str]:
    """What limits a plan, in words."""
    estimate = record["estimate"]
    above = estimate["step_ms"] / estimate["bound_ms"] - 1 if estimate["bound_ms"] else 0.0
    longer, limit = 100 * (estimate["imbalance"] - 1), estimate["limited_by"].replace("_", " ")
    return [
        f"The slowest rank, {estimate['worst_rank']}, takes {estimate['step_ms']:.3f} ms a step, {longer:.1f}% more than the mean; most of "
        f"it is {limit}.",
        f"No plan of the types and kernels allowed takes less than {estimate['bound_ms']:.3f} ms: this one is {100 * above:.1f}% above. "
        "(It may be less than any plan takes; column shards are 128 wide or wider.)",
        f"The fullest rank, {estimate['fullest_rank']}, has {100 * estimate['fullest_share']:.0f}% of its memory taken.",
    ]


def print_comparison(rows: Sequence[Record]) -> None:
    """Print plans, a line each."""
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDTH)
    priced = any(row.get("cost_per_million_rows") is not None for row in rows)
    numbers = [
        "ranks",
        "batch",
        "million impr.\na second",
        "ms a step",
        "mean",
        "bound",
        "imbalance",
        "fullest",
        *(["cost of a million\nimpressions"] if priced else []),
        "planned in s",
    ]
    named = all(row["cluster"] in row["name"] for row in rows if row.get("fits", True))
    table = _table("Plans", ["plan"] if named else ["plan", "cluster"], numbers, ["limited by"])
    for row in rows:
        if not row.get("fits", True):
            table.add_row(escape(row["name"]), "does not fit", *[""] * (len(numbers) + 1 - named))
            continue
        rate = row["impressions_per_s"]
        ms = [str(row["ranks"]), f"{row['batch_size']:,}", "–" if rate is None else f"{rate / 1e6:,.4g}"]
        ms += [f"{row[name]:.3f}" for name in ("step_ms", "mean_ms", "bound_ms", "imbalance")]
        cost = row["cost_per_million_rows"]
        costs = ["–" if cost is None else f"{cost:.3g}"] if priced else []
        limit = row["limited_by"].replace("_", " ")
        plan = [escape(row["name"]), *([] if named else [escape(row["cluster"])])]
        table.add_row(*plan, *ms, f"{100 * row['fullest_share']:.0f}%", *costs, f"{row['seconds']:.1f}", limit)
    console.print(table)


def print_otherwise(otherwise: Mapping[str, Mapping[str, Record | None]]) -> None:
    """Print the tables that plans shard otherwise, by what it costs."""
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDTH)
    tables, rest = ways(otherwise)
    if not tables:
        console.print(rest, markup=False, highlight=False)
        return
    tables = tables[:TABLES_SHOWN]
    shown = _table("Tables that are sharded otherwise", ["table", *next(iter(otherwise.values()))], [])
    for name, plans in tables:
        shown.add_row(escape(name), *("is not there" if each is None else how(each) for each in plans.values()))
    console.print(shown)
    console.print(f"{rest} All are on stdout.", markup=False, highlight=False)


def ways(otherwise: Mapping[str, Mapping[str, Record | None]]) -> tuple[list[tuple[str, Mapping[str, Record | None]]], str]:
    """Tables of another type or kernel in some plan, or in some plan alone, by what they cost; and what is to be said of all others."""
    kinds = {
        name: {each and (each["sharding_type"], each["compute_kernel"]) for each in plans.values()} for name, plans in otherwise.items()
    }
    tables = [item for item in otherwise.items() if len(kinds[item[0]]) > 1]
    tables.sort(key=lambda item: -max(float(each["ms"]) for each in item[1].values() if each))
    elsewhere = len(otherwise) - len(tables)
    said = "All others are sharded alike" if tables else "All tables are sharded alike"
    return tables, f"{said}; {elsewhere:,} of them lie on other ranks or cost otherwise." if elsewhere else f"{said}."


def how(told: Record) -> str:
    """How a table is sharded, and what that costs."""
    ranks = ranges(told["ranks"])
    return f"{told['sharding_type']}, {told['compute_kernel']}, rank{'' if ranks.isdigit() else 's'} {ranks}: {told['ms']:.3f} ms"


def print_hardware(entries: Mapping[str, Record]) -> None:
    """Print hardware, a line each."""
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDTH)
    memory = ["memory\nGiB", "memory\nGB/s", "host\nGiB", "host\nGB/s"]
    numbers = [*memory, "host link\nGB/s", "in a node\nGB/s", "between\nGB/s", "price\nan hour"]
    table = _table("Hardware, of a rank; the host is of a node", ["name", "device"], numbers)
    for name, entry in entries.items():
        own = [entry["memory_gib"], entry["memory_gb_per_s"]] if entry["device"] == "cuda" else [None, None]
        rates = [entry[each] for each in RATES] + [entry["price_per_hour"]]
        table.add_row(escape(name), entry["device"], *("–" if each is None else f"{each:,.4g}" for each in own + rates))
    console.print(table)
    for name, entry in entries.items():
        if len(entries) == 1:
            for source in entry["sources"]:
                console.print(f"{name}: {source}", markup=False, highlight=False)


def _tables(tables: Sequence[tuple[str, Record]]) -> Table:
    shown = _table("Tables", ["table", "sharding type", "kernel", "ranks"], ["rows", "dimension", "pooling", "GiB", "ms,\nall ranks"])
    for name, table in tables:
        gib = (table["bytes"] + table["host_bytes"]) / GIB
        numbers = [f"{table['rows']:,}", str(table["dimension"]), f"{table['pooling_factor']:.4g}", f"{gib:,.3f}", f"{table['ms']:.3f}"]
        shown.add_row(escape(name), table["sharding_type"], table["compute_kernel"], ranges(table["ranks"]), *numbers)
    return shown


def _ranks(record: Record) -> Table:
    shown = _table("Ranks", ["rank"], ["ms", "lookup", "forward\ncomm.", "backward", "backward\ncomm.", "device GiB", "host GiB", "taken"])
    ranks = record["ranks"]
    capacity, device = record["estimate"]["capacity_bytes"], record["cluster"]["device"]
    if len(ranks) > RANKS_SHOWN:
        ranks = sorted(ranks, key=lambda rank: -sum(rank["ms"].values()))[:RANKS_SHOWN]
        shown.title = f"Ranks, the {RANKS_SHOWN} slowest of {record['world_size']}"
    for rank in ranks:
        ms, own, host = rank["ms"], sum(rank["bytes"].values()), sum(rank["host_bytes"].values())
        parts = [f"{ms[part]:.3f}" for part in ("lookup", "forward_communication", "backward", "backward_communication")]
        taken = (host if device == "cpu" else own) / capacity
        shown.add_row(
            str(rank["rank"]), f"{sum(ms.values()):.3f}", *parts, f"{own / GIB:,.2f}", f"{host / GIB:,.2f}", f"{100 * taken:.0f}%"
        )
    return shown


def ranges(ranks: Sequence[int]) -> str:
    """`0-7, 9`; of many pieces the first, and how many ranks there are."""
    pieces: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if pieces and rank == pieces[-1][1] + 1:
            pieces[-1][1] = rank
        else:
            pieces.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in pieces]
    return ", ".join(texts) if len(texts) <= 4 else f"{', '.join(texts[:3])}, … ({len(set(ranks))} ranks)"


def _table(title: str, text: list[str], numbers: list[str], after: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in text:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    for name in after:
        table.add_column(name)
    return table

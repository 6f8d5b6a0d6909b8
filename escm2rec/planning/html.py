"""`plan.html`: what lies where under one sharding plan or under several, what takes the time, and what the words mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from escm2rec.evaluation.html import aligned, facts, note, number, table, write_page
from escm2rec.planning.cluster import Cluster
from escm2rec.planning.record import MEMORY, TIMES, Record, cost_of, rate_of, request_of, state_share
from escm2rec.planning.sweep import compare
from escm2rec.planning.text import how, ranges, ways
from escm2rec.sharding.planner import ALL_TYPES

MAX_RANKS_SHOWN = 32
"""Ranks of a chart; of more, half as many from either end."""
MAX_TABLES_SHOWN = 60
"""Tables in a list on the page; plan.json holds all."""
MAX_PLANS_SHOWN = 4
"""Plans beside each other whose tables are compared; of more plan.json has all."""
SMALLEST_SHOWN = 0.003
"""Of the axis: what is smaller is merged into one block."""
MAX_BLOCKS = 6000
"""Of all memory maps on the page, by which it stays below 3 MB; a rank has some more than LEAST_BLOCKS whatever their number."""
LEAST_BLOCKS = 8
IN_HOST = ("fused_uvm", "fused_uvm_caching")
"""Kernels whose tables lie in the host's memory."""
BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
WIDTH, RIGHT, HEAD, ROW, HEIGHT = 1112, 118, 36, 22, 17
"""Of a chart: its width, the margin right of its bars, that above them, from one bar to the next, and of a bar; pixels."""
LETTER = 6.4
"""Pixels of a letter, somewhat more than most have."""
LONGEST_NAME = 44
"""Letters of a bar's name that are shown."""
FILLS = {
    "table_wise": "#9cc3ec",
    "column_wise": "#f4c182",
    "table_column_wise": "#eaa59b",
    "row_wise": "#a3d39c",
    "table_row_wise": "#c8b5e8",
    "grid_shard": "#efadd0",
    "data_parallel": "#8ed2d2",
    "smaller": "#d3dae3",
    "cache": "url(#cache)",
    "activations": "url(#activations)",
    "dense": "#8b95a3",
    "batches": "url(#batches)",
    "reserved": "#eceff3",
    "lookup": "#9cc3ec",
    "forward_communication": "#f4c182",
    "backward": "#4f86c6",
    "backward_communication": "#d98a3d",
    "prefetch": "#a3d39c",
}
HATCHES = {"cache": ("#dbe6f3", "#5d86b5", 45), "activations": ("#eef0f3", "#6d7785", 45), "batches": ("#eef0f3", "#6d7785", 135)}
"""Ground, lines and angle."""
STYLE = """<style>
.chart { min-width: 760px; width: 100%; display: block; margin: 8px 0; font-size: 11px; }
.chart text { fill: var(--ink); pointer-events: none; } .chart .axis { fill: var(--soft); }
.chart rect { stroke: #fff; stroke-width: 0.6; shape-rendering: geometricPrecision; }
.chart line { stroke: var(--line); } .chart .limit { stroke: #b3261e; stroke-width: 1.4; }
.chart .over { paint-order: stroke; stroke: #fff; stroke-width: 2.5px; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; max-width: none; font-size: 13px; margin: 6px 0; }
.legend svg { vertical-align: -2px; margin-right: 6px; }
th.text { overflow-wrap: anywhere; } .tables .text:not(:first-child) { min-width: 0; white-space: nowrap; }
details { border-top: 1px solid var(--line); } details > summary { padding: 10px 0; }
"""
SHARDING = {
    "table_wise": "the whole table on one rank",
    "column_wise": "cut by columns, the shards on any ranks",
    "table_column_wise": "cut by columns, the shards on ranks of one node",
    "row_wise": "cut by rows over all ranks",
    "table_row_wise": "cut by rows over the ranks of one node",
    "grid_shard": "cut by columns over nodes, and by rows over the ranks of each",
    "data_parallel": "a whole copy on every rank, whose gradients are added up",
}
KERNELS = {
    "fused": "weights in the memory of the rank's own device, updated in the backward pass",
    "fused_uvm": "weights in the host's memory, read over the host link",
    "fused_uvm_caching": "weights in the host's memory, and the rows in use in a cache on the device",
    "dense": "weights in the memory of the rank's own device, their gradients dense",
}
WORDS = {
    "Plan": "Which ranks hold which part of each table, and by which kernel it is looked up.",
    "Ms": "Estimated by TorchRec's cost model from sizes and rates of memory and network; nothing was run. It is the tables' part of a "
    "step alone: dense layers and the reading of batches are not in it.",
    "Slowest rank, mean": "A step takes as long as its slowest rank. The mean is what each would take were all alike; imbalance is the "
    "slowest over the mean.",
    "Bound": "What no plan can beat under the same estimates, in the memory that there is. It may lie below what any plan reaches.",
    "Parts of a step": "Lookup reads and adds up rows; forward communication sends what was looked up to the ranks whose impressions "
    "asked; backward communication brings gradients back, and backward updates the rows; prefetch fills the caches of tables in the host's "
    "memory. A plan is limited by the part that takes longest on its slowest rank.",
    "Parts of memory": "A table's block is its weights and its optimizer's state. Cache: rows of tables in the host's memory. Activations: "
    "ids, and what is looked up and sent. Dense: what is no table. Batches: those read ahead. Reserved: what is left free of a GPU.",
}
COST = (
    "Price of a rank and hour times the ranks and the hours of a step, over the impressions of a step, times a million; in the unit of the "
    "price. It is of the tables' part of the step alone, as if nothing else took time."
)
ADAGRAD = (
    "It keeps one state for each row of each column shard. Where a table's columns are split, each shard of a row has a state and so a "
    "step size of its own: such a table learns a little otherwise than a whole one. The estimate of memory counts a row's state once."
)


POPULARITY = (
    "Of some tables it is known which share of the lookups their first rows have. A block of rows is then priced by the ids that it is "
    "asked for, so that the ranks of one table may take unequal times."
)


@dataclass(frozen=True)
class Block:
    """A piece of a bar."""

    says: str
    size: float
    kind: str  # of FILLS
    label: str = ""


@dataclass(frozen=True)
class Bar:
    """A row of a chart: blocks side by side, and a mark of its own on the axis."""

    name: str
    blocks: Sequence[Block]
    total: str
    mark: float | None = None


def write_plans(
    records: Sequence[Record], path: Path, prices: Mapping[str, float] | None = None, left_out: Mapping[str, str] | None = None
) -> None:
    """Write the page of a plan, or of several and how they compare; whole or absent.

    Records are of `record_of`; a "name" in one is what the page calls it. `prices` are of a rank and hour by hardware, for clusters that
    have none of their own. `left_out` are those that do not fit, and why.
    """
    prices = prices or {}
    if len(records) == 1:
        (record,) = records
        title = f"Sharding plan for {Cluster.from_json(record['cluster']).name}"
        head = f'<header><h1>{escape(title)}</h1><p class="soft">{_contents(record)}</p>{_facts(record, prices)}</header>'
        sections = [head, _details(record, "h2", 1)]
    else:
        title = "Sharding plans"
        sections = [f'<header><h1>{title}</h1><p class="soft">{len(records)} plans</p></header>', _comparison(records, prices)]
        sections.append("<h2>Each plan</h2>" + "".join(_unfolding(record, prices, len(records)) for record in records))
    if left_out:
        reasons = "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in left_out.items())
        sections.append(f"<h2>What does not fit</h2><ul>{reasons}</ul>")
    write_page(path, title, [_style(), *sections, _words(records, prices)])


def _style() -> str:
    fills = "".join(f".{kind} {{ fill: {fill}; }}\n" for kind, fill in FILLS.items())
    hatches = "".join(
        f'<pattern id="{name}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate({angle})">'
        f'<path d="M0 0h5v5h-5z" fill="{ground}"/><path d="M0 0v5" stroke="{lines}" stroke-width="2"/></pattern>'
        for name, (ground, lines, angle) in HATCHES.items()
    )
    return f'{STYLE}{fills}</style><svg width="0" height="0" style="position: absolute"><defs>{hatches}</defs></svg>'


def _name(record: Record) -> str:
    cluster = Cluster.from_json(record["cluster"]).name
    return str(record.get("name") or f"{cluster}, batch {record['batch_size']:,}, {record['planner']}")


def _contents(record: Record) -> str:
    size = _size(sum(sum(rank["bytes"][part] + rank["host_bytes"][part] for part in ("weights", "optimizer")) for rank in record["ranks"]))
    return f"{len(record['tables']):,} tables · {size} with their optimizer, copies included"


def _facts(record: Record, prices: Mapping[str, float]) -> str:
    estimate, cost = record["estimate"], cost_of(record, prices)
    step, bound = estimate["step_ms"], estimate["bound_ms"]
    fullest, capacity = _percent(estimate["fullest_share"]), _size(estimate["capacity_bytes"])
    told = {
        "cluster": Cluster.from_json(record["cluster"]).name,
        "ranks": record["world_size"],
        "batch a rank": record["batch_size"],
        "optimizer": record["optimizer"],
        "planner": record["planner"],
        "slowest rank": f"rank {estimate['worst_rank']}, {number(step, 3)} ms a step",
        "limited by": _spaced(estimate["limited_by"]),
        "above the lower bound": f"{_percent(step / bound - 1)} (bound {number(bound, 3)} ms)" if bound else "–",
        "imbalance": number(estimate["imbalance"], 3),
        "fullest rank": f"rank {estimate['fullest_rank']}, {fullest} of {capacity}",
        "planning time": f"{number(float(record['seconds']), 3)} s",
    }
    if cost is not None:
        told["cost of a million impressions, tables alone"] = number(cost, 3)
    return facts(told)


def _comparison(records: Sequence[Record], prices: Mapping[str, float]) -> str:
    estimates = [record["estimate"] for record in records]
    heads = [
        "Plan",
        "Ranks",
        "Batch\na rank",
        "Million\nimpr. a s",
        "Slowest\nrank, ms",
        "Mean,\nms",
        "Bound,\nms",
        "Imbalance",
        "Limited by",
        "Fullest\nrank",
    ]
    columns = [aligned([record[name] for record in records]) for name in ("world_size", "batch_size")]
    columns += [aligned([None if (rate := rate_of(record)) is None else rate / 1e6 for record in records])]
    columns += [aligned([each[name] for each in estimates]) for name in ("step_ms", "mean_ms", "bound_ms", "imbalance")]
    columns += [[_spaced(each["limited_by"]) for each in estimates], [_percent(each["fullest_share"]) for each in estimates]]
    costs = [cost_of(record, prices) for record in records]
    said = (
        "Estimates of TorchRec's cost model for the tables' part of a step alone: dense layers and the reading of batches are not in them."
    )
    if any(cost is not None for cost in costs):
        heads.append("Cost of a million\nimpressions")
        columns.append(aligned(costs))
        said += " The cost is of that part too, in the unit of the price of a rank and hour."
    bars = []
    for record, each in zip(records, estimates, strict=True):
        blocks = _time_blocks(record["ranks"][each["worst_rank"]]["ms"])
        bars.append(Bar(_name(record), blocks, f"{number(each['step_ms'], 3)} ms", each["bound_ms"]))
    drawn = _chart(bars, max(each["step_ms"] for each in estimates), 1.0, "ms", {})
    body = table(heads, [escape(_name(record)) for record in records], columns, texts=(0, heads.index("Limited by")))
    caption = "The slowest rank of each plan. The line across a bar is the lower bound of that plan's tables, cluster and batch."
    time = f"<h3>What takes the time</h3>{note(caption)}{_legend(list(TIMES))}{drawn}"
    return f"<h2>Comparison</h2>{body}{note(said)}{time}{_otherwise(records, prices) if len(records) <= MAX_PLANS_SHOWN else ''}"


def _otherwise(records: Sequence[Record], prices: Mapping[str, float]) -> str:
    """The tables that plans shard otherwise, by what they cost."""
    names = [_name(record) for record in records]
    plans = [f"{number}. {name}" for number, name in enumerate(names, 1)]  # two may be called alike
    moved = compare(records, plans, prices)["tables_otherwise"]
    found, rest = ways(moved)
    shown = [name for name, _ in found[:MAX_TABLES_SHOWN]]
    if not shown:
        return note(rest)
    columns = [["–" if (told := moved[name][plan]) is None else how(told) for name in shown] for plan in plans]
    said = f"The {len(shown)} that take longest of {len(found):,}. " if len(shown) < len(found) else ""
    said += f"Each with its sharding type, kernel, ranks, and ms summed over them. {rest}"
    body = table(["Table", *names], [escape(name) for name in shown], columns, texts=range(len(records) + 1))
    return f"<h3>Tables that are sharded otherwise</h3>{note(said)}{body}"


def _unfolding(record: Record, prices: Mapping[str, float], plans: int) -> str:
    estimate = record["estimate"]
    said = f"{number(estimate['step_ms'], 3)} ms a step, fullest rank {_percent(estimate['fullest_share'])}"
    summary = f"<b>{escape(_name(record))}</b>: {said}"
    return f"<details><summary>{summary}</summary>{_facts(record, prices)}{_details(record, 'h3', plans)}</details>"


def _details(record: Record, heading: str, plans: int) -> str:
    return "".join((_memory(record, heading, plans), _time(record, heading), _tables(record, heading)))


def _memory(record: Record, heading: str, plans: int) -> str:
    """A map of the devices' memory, and of the host's where a rank takes of it."""
    cluster, maps = Cluster.from_json(record["cluster"]), []
    if cluster.hardware.device == "cuda":
        maps.append(f"<{heading}>Memory of the ranks</{heading}>{_map(record, 'bytes', cluster.device_bytes, plans)}")
    if any(any(rank["host_bytes"].values()) for rank in record["ranks"]):
        name = "The ranks' shares of the host's memory"
        maps.append(f"<{heading}>{name}</{heading}>{_map(record, 'host_bytes', cluster.host_bytes, plans)}")
    return "".join(maps)


def _map(record: Record, place: str, capacity: int, plans: int) -> str:
    taken = [sum(rank[place].values()) for rank in record["ranks"]]
    most, least = _ends(taken)
    ranks = [*most, *least]
    whole = max(taken) > 0.1 * capacity  # else little would be seen
    end = max(capacity, *taken) if whole else max(taken)
    room = max(LEAST_BLOCKS, MAX_BLOCKS // (plans * len(ranks)))
    bars: list[Bar | str] = []
    kinds: set[str] = set()
    for rank, of_tables in zip(ranks, _table_blocks(record, place, ranks), strict=True):
        rest = [Block(f"{part}, {_size(size)}", size, part, part) for part in MEMORY[2:] if (size := record["ranks"][rank][place][part])]
        blocks = _merged(of_tables, SMALLEST_SHOWN * end, room) + rest
        kinds |= {block.kind for block in blocks}
        bars.append(Bar(f"rank {rank}", blocks, f"{_size(taken[rank])}, {_percent(taken[rank] / capacity)}"))
    if least:
        bars.insert(len(most), _between(record, "fullest", "emptiest"))
    unit, name = next(each for each in UNITS if end >= each[0])
    said = "A block is what a rank holds of a table, weights and optimizer; hold the pointer over it for its name, type, kernel and size. "
    said += f"Of a rank, blocks below {SMALLEST_SHOWN:.1%} of {'the capacity' if whole else 'the fullest'} are drawn as one"
    said += f", as are all after the {room} largest." if room * SMALLEST_SHOWN < 1 else "."
    said += "" if whole else f" The axis ends at the fullest rank: the capacity is {_size(capacity)}."
    drawn = _chart(bars, end, unit, name, {f"capacity {_size(capacity)}": capacity} if whole else {})
    return f"{note(said)}{_legend([kind for kind in FILLS if kind in kinds])}{drawn}"


def _table_blocks(record: Record, place: str, ranks: Sequence[int]) -> list[list[Block]]:
    """Of each of the ranks what it holds of the tables in a place, by sharding type, the largest first."""
    on_device = record["cluster"]["device"] == "cuda"
    found: dict[int, list[Block]] = {rank: [] for rank in ranks}
    for of in request_of(record).tables:
        told = record["tables"][of.name]
        in_host = not on_device or told["compute_kernel"] in IN_HOST
        if in_host != (place == "host_bytes"):
            continue
        sizes: dict[int, int] = {}
        for shard in told["shards"]:
            if shard["rank"] in found:
                rows, columns = shard["size"]
                weights = rows * columns * of.row_bytes // of.dimension
                size = weights + math.ceil(weights * state_share(record["optimizer"], of.dimension))
                sizes[shard["rank"]] = sizes.get(shard["rank"], 0) + size
        kind = told["sharding_type"]
        for rank, size in sizes.items():
            found[rank].append(Block(f"{of.name}, {kind}, {told['compute_kernel']}, {_size(size)}", size, kind, of.name))
    return [sorted(blocks, key=lambda block: (ALL_TYPES.index(block.kind), -block.size, block.label)) for blocks in found.values()]


def _merged(blocks: list[Block], least: float, room: int) -> list[Block]:
    """Those of `least` at the least, no more than `room`, in their order; the others as one at the end."""
    largest = sorted(blocks, key=lambda block: -block.size)[:room]
    kept = {id(block) for block in largest if block.size >= least}
    others = [block for block in blocks if id(block) not in kept]
    if len(others) < 2:
        return blocks
    size = sum(block.size for block in others)
    name = f"{len(others)} smaller"
    return [*(block for block in blocks if id(block) in kept), Block(f"{name}, {_size(size)}", size, "smaller", name)]


def _time(record: Record, heading: str) -> str:
    ms, estimate = [sum(rank["ms"].values()) for rank in record["ranks"]], record["estimate"]
    most, least = _ends(ms)
    bars: list[Bar | str] = [
        Bar(f"rank {rank}", _time_blocks(record["ranks"][rank]["ms"]), f"{number(ms[rank], 3)} ms") for rank in (*most, *least)
    ]
    if least:
        bars.insert(len(most), _between(record, "slowest", "fastest"))
    lines = {f"{name} {number(estimate[f'{name}_ms'], 3)} ms": estimate[f"{name}_ms"] for name in ("mean", "bound")}
    parts = [part for part in TIMES if any(rank["ms"][part] for rank in record["ranks"])]
    drawn = _chart(bars, max(ms), 1.0, "ms", lines)
    said = note("Estimated, of a step; no plan of these tables on this cluster, by the types and kernels allowed, can end below the bound.")
    return f"<{heading}>Time by rank</{heading}>{said}{_legend(parts)}{drawn}"


def _time_blocks(ms: Mapping[str, float]) -> list[Block]:
    return [Block(f"{_spaced(part)}, {number(ms[part], 3)} ms", ms[part], part) for part in TIMES if ms[part]]


def _ends(values: Sequence[float]) -> tuple[list[int], list[int]]:
    """Ranks in their order; of more than a chart shows those with most and those with least, by falling value."""
    if len(values) <= MAX_RANKS_SHOWN:
        return list(range(len(values))), []
    order = sorted(range(len(values)), key=lambda rank: -values[rank])
    half = MAX_RANKS_SHOWN // 2
    return order[:half], order[-half:]


def _between(record: Record, above: str, below: str) -> str:
    half = MAX_RANKS_SHOWN // 2
    return f"Above the {half} {above} of {record['world_size']:,} ranks, below the {half} {below}; the others are in plan.json."


def _tables(record: Record, heading: str) -> str:
    weights = {each.name: each.weight_bytes for each in request_of(record).tables}
    names = sorted(record["tables"], key=lambda name: -record["tables"][name]["ms"])
    shown, whole = names[:MAX_TABLES_SHOWN], sum(each["ms"] for each in record["tables"].values())
    told = [record["tables"][name] for name in shown]
    heads = ["Table", "Rows", "Dim.", "Pooling\nfactor", "Type", "Sharding", "Kernel", "Ranks", "Weights,\nGiB", "Ms, all\nranks", "Share"]
    columns = [aligned([each[name] for each in told]) for name in ("rows", "dimension")]
    columns += [aligned([each["pooling_factor"] for each in told])]
    columns += [[each[name] for each in told] for name in ("dtype", "sharding_type", "compute_kernel")]
    columns += [[ranges(each["ranks"]) for each in told], [f"{weights[name] / 2**30:,.3f}" for name in shown]]
    columns += [aligned([each["ms"] for each in told]), [_percent(each["ms"] / whole) if whole else "–" for each in told]]
    left = [record["tables"][name]["ms"] for name in names[MAX_TABLES_SHOWN:]]
    of_left = f"{_percent(sum(left) / whole) if whole else '–'} of all ms"
    said = f"The {len(shown)} that take longest; {len(left):,} more, with {of_left}, are in plan.json." if left else ""
    body = table(heads, [escape(name) for name in shown], columns, texts=(0, 4, 5, 6, 7))
    return f'<{heading}>Tables</{heading}>{note(said)}<div class="tables">{body}</div>'


def _chart(bars: Sequence[Bar | str], end: float, unit: float, unit_name: str, lines: Mapping[str, float]) -> str:
    """Bars from 0 to `end`, texts between them, and lines across all; the axis counts in `unit`s."""
    end = end or 1.0
    longest = max(len(bar.name) for bar in bars if isinstance(bar, Bar))
    left = 12 + int(LETTER * min(LONGEST_NAME, max(longest, len(unit_name))))
    scale, bottom = (WIDTH - left - RIGHT) / end, HEAD + ROW * len(bars)
    under: list[str] = []
    over = [f'<text class="axis" x="{left - 8}" y="28" text-anchor="end">{unit_name}</text>']
    for tick in _ticks(end / unit):
        x = f"{left + tick * unit * scale:.2f}"
        under.append(f'<line x1="{x}" x2="{x}" y1="{HEAD - 4}" y2="{bottom}"/>')
        over.append(f'<text class="axis over" x="{x}" y="28" text-anchor="middle">{tick:,.6g}</text>')
    for index, bar in enumerate(bars):
        y = HEAD + ROW * index
        if isinstance(bar, str):
            over.append(f'<text class="axis over" x="{left}" y="{y + 13}">{escape(bar)}</text>')
        else:
            under += _blocks(bar, y, left, scale)
            name, after = escape(_shortened(bar.name, LONGEST_NAME)), left + sum(block.size for block in bar.blocks) * scale + 6
            over.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{name}</text>')
            over.append(f'<text class="over" x="{after:.2f}" y="{y + 13}">{escape(bar.total)}</text>')
    for index, (name, value) in enumerate(sorted(lines.items(), key=lambda each: each[1])):
        at, (anchor, beside) = left + value * scale, ("end", -4) if index < len(lines) - 1 else ("start", 4)
        under.append(f'<line class="limit" x1="{at:.2f}" x2="{at:.2f}" y1="2" y2="{bottom}"/>')
        over.append(f'<text x="{at + beside:.2f}" y="11" text-anchor="{anchor}">{escape(name)}</text>')
    drawn = "".join((*under, *over))
    return f'<div class="wide"><svg class="chart" viewBox="0 0 {WIDTH} {bottom + 4}">{drawn}</svg></div>'


def _blocks(bar: Bar, y: int, left: int, scale: float) -> list[str]:
    """A bar's blocks with what they say, and its mark."""
    parts, x = [], float(left)
    for block in bar.blocks:
        width = block.size * scale
        box = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{HEIGHT}"'
        parts.append(f'<rect class="{block.kind}" {box}><title>{escape(block.says)}</title></rect>')
        room = int((width - 6) / LETTER)
        if block.label and room >= min(5, len(block.label)):
            kind = ' class="over"' if block.kind in HATCHES else ""
            parts.append(f'<text{kind} x="{x + 3:.2f}" y="{y + 12.5}">{escape(_shortened(block.label, room))}</text>')
        x += width
    if bar.mark is not None:
        mark = left + bar.mark * scale
        parts.append(f'<line class="limit" x1="{mark:.2f}" x2="{mark:.2f}" y1="{y - 2}" y2="{y + HEIGHT + 2}"/>')
    return parts


def _ticks(end: float) -> list[float]:
    """0 and round numbers up to `end`, eight at the most."""
    power = 10.0 ** math.floor(math.log10(end / 7))
    step = next(power * times for times in (1, 2, 5, 10, 20) if end / (power * times) <= 7)
    return [step * index for index in range(int(end / step + 1e-9) + 1)]


def _legend(kinds: Sequence[str]) -> str:
    keys = "".join(
        f'<span><svg width="13" height="13"><rect class="{kind}" width="13" height="13"/></svg>{_spaced(kind)}</span>' for kind in kinds
    )
    return f'<p class="legend">{keys}</p>'


def _words(records: Sequence[Record], prices: Mapping[str, float]) -> str:
    told = [each for record in records for each in record["tables"].values()]
    types, kernels = ({each[name] for each in told} for name in ("sharding_type", "compute_kernel"))
    words = dict(WORDS)
    words["Sharding types"] = _explained(SHARDING, types)
    words["Kernels"] = _explained(KERNELS, kernels)
    if any(each.get("popularity") for each in told):
        words["Popularity"] = POPULARITY
    if any(cost_of(record, prices) is not None for record in records):
        words["Cost"] = COST
    if any(record["optimizer"] == "rowwise_adagrad" and any(map(_has_column_shards, record["tables"].values())) for record in records):
        words["Row-wise Adagrad"] = ADAGRAD
    entries = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in words.items())
    return f'<h2>What the words mean</h2><dl class="words">{entries}</dl>'


def _explained(words: Mapping[str, str], used: set[str]) -> str:
    return ". ".join(f"<b>{name}</b>: {text}" for name, text in words.items() if name in used) + "."


def _has_column_shards(told: Record) -> bool:
    return told["sharding_type"] in BY_COLUMNS and len({shard["offset"][1] for shard in told["shards"]}) > 1


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(1, room - 1)]}…"


def _spaced(name: str) -> str:
    """Of a part of a step, as a reader writes it; sharding types stay as TorchRec writes them."""
    return name.replace("_", " ") if name in TIMES else name


def _size(size: float) -> str:
    unit, name = next((each for each in UNITS if size >= each[0]), UNITS[-1])
    return f"{number(size / unit, 3) if unit > 1 else f'{size:.0f}'} {name}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"

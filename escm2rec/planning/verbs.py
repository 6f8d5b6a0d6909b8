"""`escm2rec plan` and what goes with it. A verb imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from escm2rec.errors import ConfigError, RunError
from escm2rec.verb import Overrides, Overwrite, Result, names, verb

if TYPE_CHECKING:
    from escm2rec.planning.planner import Request

plan_app = typer.Typer(help="Plan where tables lie, on a cluster that need not be there.", rich_markup_mode=None)

BATCH_SIZE = 4_096
Planner = Literal["priced", "torchrec", "greedy", "uniform", "grid", "dynamic"]
Optimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "rowwise_adam"]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML config file, with --data.", show_default=False)]
DataOption = Annotated[str | None, typer.Option("--data", help="Its data set: tables and what was measured of them.", show_default=False)]
TablesOption = Annotated[
    Path | None, typer.Option("--tables", help="YAML list of tables instead, of a model that is not built yet.", show_default=False)
]
Clusters = Annotated[
    list[str], typer.Option("--cluster", help="NODESxRANKS:HARDWARE, such as 2x8:h100-80gb[,NAME=NUMBER].", show_default=False)
]
BatchOption = Annotated[
    list[int],
    typer.Option("--batch-size", min=1, help="Impressions a rank and step.", show_default="the config's by ranks, 4096 with --tables"),
]
Planners = Annotated[
    list[str], typer.Option("--planner", help=f"{', '.join(get_args(Planner))}; may be repeated.", show_default="priced, which is ours")
]
OptimizerOption = Annotated[
    Optimizer | None, typer.Option("--optimizer", help="Of the tables, with --tables.", show_default="rowwise_adagrad")
]
Types = Annotated[
    list[str],
    typer.Option("--types", help="Sharding types allowed, as TYPE,TYPE or TABLE=TYPE,TYPE.", show_default="all but grid_shard"),
]
Kernels = Annotated[list[str], typer.Option("--kernels", help="Kernels allowed: fused, fused_uvm, fused_uvm_caching, dense.")]
HardwareFile = Annotated[Path | None, typer.Option("--hardware", help="YAML file with hardware of your own.", show_default=False)]
Prices = Annotated[list[str], typer.Option("--price", help="Per rank and hour, as HARDWARE=NUMBER; may be repeated.", show_default=False)]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Folder for plan.json and plan.html.", show_default=False)]


@plan_app.callback(invoke_without_command=True)
def _plan(
    context: typer.Context,
    config: ConfigOption = None,
    data: DataOption = None,
    tables: TablesOption = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="NODESxRANKS:HARDWARE, such as 2x8:h100-80gb[,NAME=NUMBER].", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Impressions a rank and step.", show_default="the config's by ranks, 4096 with --tables"),
    ] = None,
    planner: Annotated[Planner, typer.Option("--planner", help="Ours, TorchRec's default, or one of its proposers.")] = "priced",
    optimizer: OptimizerOption = None,
    types: Types = [],  # noqa: B006
    kernels: Kernels = [],  # noqa: B006
    hardware: HardwareFile = None,
    overrides: Overrides = [],  # noqa: B006
    out: OutFolder = None,
    overwrite: Overwrite = False,
) -> Result | None:
    """Plan where the tables of a model lie: neither the cluster nor a GPU is needed.

    Tables of a config and its data set, or of a list. plan.json is what train --plan follows.
    """
    if context.invoked_subcommand is not None:
        return None
    if cluster is None:
        raise ConfigError("escm2rec plan needs --cluster", "such as --cluster 1x8:h100-80gb; escm2rec plan hardware lists what there is")

    @verb
    def plan() -> Result:
        from dataclasses import replace

        from escm2rec.folder import refuse_existing
        from escm2rec.planning.plan import make_plan, write_plan
        from escm2rec.planning.text import print_plan

        if out is not None:
            refuse_existing(out, "plan", overwrite)  # before a search of half a minute

        request = replace(_request(config, data, tables, cluster, hardware, overrides, optimizer, types, kernels), planner=planner)
        record = make_plan(request if batch_size is None else replace(request, batch_size=batch_size))
        if out is not None:
            write_plan(record, out, overwrite)
        print_plan(record)
        told = {name: record[name] for name in ("world_size", "batch_size", "planner", "estimate", "seconds")}
        return {"plan": None if out is None else str(out / "plan.json"), **told, "tables": _short(record["tables"])}

    return plan()


def _short(tables: Result) -> Result:
    """What is told of tables on stdout: where they lie, the shards left out."""
    return {
        name: {key: table[key] for key in ("sharding_type", "compute_kernel", "ranks", "ms", "bytes")} for name, table in tables.items()
    }


@plan_app.command("compare")
@verb
def plan_compare(
    plans: Annotated[list[Path], typer.Argument(help="Plans, each a plan.json or its folder.", show_default=False)],
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page to this file.", show_default=False)] = None,
    price: Prices = [],  # noqa: B006
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page at --html.")] = False,
) -> Result:
    """Compare plans: time, balance, memory, cost, and the tables that they shard otherwise."""
    from escm2rec.planning.record import read_plan
    from escm2rec.planning.sweep import compare, parse_prices
    from escm2rec.planning.text import print_comparison, print_otherwise

    if len(plans) < 2:
        raise ConfigError(f"there is nothing to compare {plans[0]} with", "give two plans or more")
    records = [read_plan(path) for path in plans]
    prices = parse_prices(price, {record["cluster"]["hardware"] for record in records})
    named = [str(path) for path in plans]
    result = compare(records, named, prices)
    if html is not None:
        _write_page([{"name": name, **record} for name, record in zip(named, records, strict=True)], html, prices, overwrite)
    print_comparison(result["plans"])
    print_otherwise(result["tables_otherwise"])
    return result


@plan_app.command("sweep")
@verb
def plan_sweep(
    out: Annotated[Path, typer.Option("--out", help="Folder for sweep.json, sweep.html and the plans.", show_default=False)],
    cluster: Clusters,
    config: ConfigOption = None,
    data: DataOption = None,
    tables: TablesOption = None,
    batch_size: BatchOption = [],  # noqa: B006
    dimension: Annotated[list[int], typer.Option("--dimension", help="Of all tables; may be repeated.", show_default="the tables'")] = [],  # noqa: B006
    planner: Planners = [],  # noqa: B006
    optimizer: OptimizerOption = None,
    types: Annotated[
        list[str], typer.Option("--types", help="Sharding types allowed, as TYPE,TYPE; may be repeated.", show_default="all but grid_shard")
    ] = [],  # noqa: B006
    kernels: Kernels = [],  # noqa: B006
    hardware: HardwareFile = None,
    overrides: Overrides = [],  # noqa: B006
    price: Prices = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> Result:
    """Plan for all combinations of what is given more than once: clusters, batch sizes, dimensions, sharding types, planners."""
    from escm2rec.folder import refuse_existing
    from escm2rec.planning.cluster import parse_cluster
    from escm2rec.planning.sweep import parse_prices, sweep, variants, write_sweep
    from escm2rec.planning.text import print_comparison

    refuse_existing(out, "sweep", overwrite)
    request = _request(config, data, tables, cluster[0], hardware, overrides, optimizer, [], kernels)
    clusters = {each: parse_cluster(each, hardware) for each in cluster}
    for each in clusters.values():
        allowed_kernels(kernels, each.hardware.device)
    prices = parse_prices(price, {each.hardware_name for each in clusters.values()})
    kinds = [_types_of_all(each) for each in types]
    plans, rows = sweep(list(variants(request, clusters, batch_size, dimension, kinds, _planners(planner))), prices)
    write_sweep(plans, rows, out, prices, overwrite)
    print_comparison(rows)
    for row in rows:
        if not row["fits"]:
            print(f"{row['name']}: {row['why']}", file=sys.stderr)
    if not plans:
        raise RunError(f"none of {len(rows)} plans fits", "escm2rec plan with one of these clusters says what would help")
    return {"sweep": str(out), "plans": rows}


@plan_app.command("explain")
@verb
def plan_explain(
    table: Annotated[str, typer.Argument(help="A table of the plan.", show_default=False)],
    plan: Annotated[Path, typer.Option("--plan", help="A plan.json or its folder.", show_default=False)],
) -> Result:
    """Say what else a table of a plan could have been, and why the chosen way won."""
    from escm2rec.planning.explain import explain, options_text
    from escm2rec.planning.record import read_plan

    result = explain(read_plan(plan), table)
    print(options_text(result), file=sys.stderr)
    return result


@plan_app.command("calibrate")
@verb
def plan_calibrate(
    out: Annotated[Path, typer.Option("--out", help="File for the entry, which --hardware reads.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="Of the entry.")] = "this-machine",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
) -> Result:
    """Measure the hardware that is here: lookups and collectives, on every rank that torchrun starts."""
    from escm2rec.planning.calibrate import calibrate

    return calibrate(name, out, overwrite)


@plan_app.command("hardware")
@verb
def plan_hardware(hardware: HardwareFile = None) -> Result:
    """List the hardware that clusters can be made of, with the sources of its figures."""
    from escm2rec.planning.hardware import hardware_table
    from escm2rec.planning.text import print_hardware

    entries = {name: entry.model_dump(mode="json") for name, entry in sorted(hardware_table(hardware).items())}
    print_hardware(entries)
    return entries


def _request(
    config: Path | None,
    data: str | None,
    tables: Path | None,
    cluster: str,
    hardware: Path | None,
    overrides: list[str],
    optimizer: Optimizer | None,
    types: list[str],
    kernels: list[str],
) -> Request:
    """What is asked for, of a config and its data set or of a list of tables."""
    from dataclasses import replace

    from escm2rec.planning.cluster import parse_cluster
    from escm2rec.planning.planner import Request
    from escm2rec.planning.tables import read_tables

    if (tables is None) == (config is None) or (config is None) != (data is None):
        raise ConfigError("give either --config and --data, or --tables", "tables come from a data set, or from a list of them")
    place = parse_cluster(cluster, hardware)
    if config is not None:
        if optimizer is not None:
            raise ConfigError("--optimizer is of --tables", "a config has its own: add --set training.sparse_optimizer=...")
        from escm2rec.config import load_config
        from escm2rec.paths import data_path
        from escm2rec.planning.model import request_of_config
        from escm2rec.reader.dataset import Dataset

        assert data is not None
        request = request_of_config(load_config(config, overrides), Dataset.open(data_path(data)), place)
    else:
        assert tables is not None
        if overrides:
            raise ConfigError("--set is of a config", "leave it out with --tables")
        request = Request(read_tables(tables), place, BATCH_SIZE, optimizer or "rowwise_adagrad")
    allowed = dict(request.allowed) | allowed_types(types, {table.name for table in request.tables})
    return replace(request, allowed=allowed, kernels=allowed_kernels(kernels, place.hardware.device))


def _planners(texts: list[str]) -> list[Planner]:
    for text in texts:
        if text not in get_args(Planner):
            raise ConfigError(f"--planner {text!r} is no planner", f"they are {', '.join(get_args(Planner))}")
    return cast(list[Planner], texts)


def allowed_types(texts: list[str], tables: set[str] | None = None) -> dict[str, list[str]]:
    """Sharding types by table, '*' for those that are not named; ConfigError where a type or a table is none."""
    from escm2rec.errors import did_you_mean
    from escm2rec.sharding.planner import ALL_TYPES

    allowed = {}
    for text in texts:
        table, separator, kinds = text.rpartition("=")
        if separator and tables is not None and table not in tables:
            raise ConfigError(
                f"--types {text!r}: there is no table {table!r}{did_you_mean(table, sorted(tables))}", "name one of the tables"
            )
        for kind in (found := names([kinds])):
            if kind not in ALL_TYPES:
                raise ConfigError(
                    f"--types {text!r}: {kind!r} is no sharding type{did_you_mean(kind, ALL_TYPES)}", f"they are {', '.join(ALL_TYPES)}"
                )
        if (table or "*") in allowed:
            raise ConfigError(f"--types {text!r}: {table or 'all tables'} had types before", "give the types of a table once, as TYPE,TYPE")
        allowed[table or "*"] = found
    return allowed


def _types_of_all(text: str) -> list[str]:
    """One --types of a sweep."""
    if "=" in text:
        raise ConfigError(f"--types {text!r}: a sweep's are of all tables", "write TYPE,TYPE; escm2rec plan takes TABLE=TYPE,TYPE")
    return allowed_types([text])["*"]


def allowed_kernels(texts: list[str], device: str) -> list[str] | None:
    """Kernels, None for all of the device; ConfigError where one is none of it."""
    from escm2rec.planning.planner import KERNELS

    kernels = names(texts)
    for kernel in kernels:
        if kernel not in KERNELS[device]:
            raise ConfigError(f"--kernels: {kernel!r} is no kernel of device {device}", f"they are {', '.join(KERNELS[device])}")
    return kernels or None


def _write_page(records: list[Result], path: Path, prices: dict[str, float], overwrite: bool) -> None:
    from escm2rec.evaluation.html import is_page
    from escm2rec.planning.html import write_plans

    if path.exists() and not (overwrite and path.is_file()):
        raise ConfigError(f"--html {path} exists", "add --overwrite to replace it, or choose another file")
    if path.exists() and not is_page(path):
        raise ConfigError(f"will not overwrite {path}: it is no page that escm2rec made", "choose another, or remove it by hand")
    if not path.parent.is_dir():
        raise ConfigError(f"no folder {path.parent} for the page", "make it first, or choose another place")
    write_plans(records, path, prices)

"""The command `escm2rec`: one verb each for what the library does.

A verb imports what it needs when it runs, so `--help` loads neither torch nor polars. stdout carries one JSON object, the
result, from rank 0; everything else goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from escm2rec import __version__
from escm2rec.errors import ConfigError, Escm2Error, PartialError
from escm2rec.planning.verbs import plan_app
from escm2rec.verb import ConfigFile, DataFolder, Overrides, Overwrite, Result, RunFolder, names, rank, verb

EXIT_UNEXPECTED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
DEBUG_FLAG = "--debug"
LOST_RANK = re.compile("Connection closed by peer|gloo/transport.*Connection reset by peer")  # gloo's words on the ranks that are left
SLOW_RANK = re.compile("Timed out waiting [0-9]+ms for (send|recv) operation|Application timeout caused pair closure")  # of one that hangs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
config_app = typer.Typer(help="Look at a config before it is used.", rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(plan_app, name="plan")


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(DEBUG_FLAG, help="Show tracebacks and debug logs; may stand before or after the command.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Unbiased click and conversion models (ESCM2) on TorchRec's sharded embeddings."""


@app.command()
@verb
def simulate(
    out: Annotated[Path, typer.Option("--out", help="Folder for the simulated logs.", show_default=False)],
    impressions: Annotated[int, typer.Option("--impressions", min=1, help="How many impressions to draw.", show_default=False)],
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same logs.")] = 0,
    format: Annotated[Literal["aliccp", "parquet"], typer.Option("--format", help="Ali-CCP's raw text, or one Parquet table.")] = "aliccp",
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML config whose section `simulation` is used.", show_default="built-in rates")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    overwrite: Overwrite = False,
) -> Result:
    """Draw impression logs whose truth is known.

    Each impression comes with its click propensity and its conversion rate.
    """
    from escm2rec.config import load_simulation
    from escm2rec.simulate import simulate

    return simulate(out, impressions, seed, load_simulation(config, overrides), format, overwrite)


@app.command()
@verb
def preprocess(
    config: ConfigFile,
    input: Annotated[
        Path,
        typer.Option("--input", help="Folder with the raw logs, or one file: then data.source.files is not looked at.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the data set.", show_default=False)],
    memory_gib: Annotated[
        float, typer.Option("--memory-gib", min=0.5, help="What counts, sorts and lookups may take, beside 300 MB.")
    ] = 4.0,
    engine: Annotated[Literal["local", "ray"], typer.Option("--engine", help="Processes of this machine, or a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option("--address", help="Address of the Ray cluster; auto finds one of this machine.")] = None,
    overrides: Overrides = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> Result:
    """Turn raw logs into a data set.

    It holds encoded splits, vocabularies, a schema and a manifest. A job that was killed is taken up by the same command.
    """
    from escm2rec.heap import share_one_heap
    from escm2rec.workers import is_small, ready_workers

    share_one_heap()
    if engine == "local" and not is_small([input]):
        ready_workers("escm2rec.preprocess")  # while this process reads the config and imports
    from escm2rec.config import load_config
    from escm2rec.preprocess import preprocess

    if address is not None and engine == "local":
        raise ConfigError("--address is of a Ray cluster", "add --engine ray, or leave it out")
    ray_address = (address or "auto") if engine == "ray" else None
    return preprocess(load_config(config, overrides).data, input, out, overwrite, memory_gib, ray_address)


@app.command()
@verb
def train(
    config: ConfigFile,
    data: DataFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder for the run: config, plan, metrics, checkpoints.", show_default=False)],
    overrides: Overrides = [],  # noqa: B006
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Shard as this plan of escm2rec plan says, its file or folder.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint in --out, if any.")] = False,
    overwrite: Overwrite = False,
    profile: Annotated[bool, typer.Option("--profile", help="Trace some steps: --out/profile tells where their time goes.")] = False,
    warm_start: Annotated[
        Path | None, typer.Option("--warm-start", help="Begin with what this finished run learned.", metavar="RUN", show_default=False)
    ] = None,
    copy_to: Annotated[
        str | None,
        typer.Option(
            "--copy-to", help="Keep the run at this fsspec URL too; --resume may fetch it from there.", metavar="URL", show_default=False
        ),
    ] = None,
) -> Result:
    """Train a model on a data set.

    Started by torchrun or TorchX, on every rank there is.
    """
    _require_matching_packages()
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other", "--resume goes on with the run in --out, --overwrite drops it")
    from escm2rec.config import load_config
    from escm2rec.paths import data_path
    from escm2rec.training.train import train

    if plan is not None:
        overrides = [*overrides, f"training.plan={json.dumps(str(plan.resolve()))}"]
    return train(load_config(config, overrides), data_path(data), out, resume, overwrite, profile, warm_start, copy_to)


@app.command()
@verb
def evaluate(
    run: RunFolder,
    data: DataFolder,
    split: Annotated[Literal["train", "validation", "test"], typer.Option("--split", help="Which split to measure.")] = "test",
    by: Annotated[list[str], typer.Option("--by", help="Also report by this column; repeat it, or give a comma list.")] = [],  # noqa: B006
    user: Annotated[
        str | None,
        typer.Option(
            "--user", help="Column of the user, to measure the ranking within each.", show_default="user for rating matrices, else none"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run's report.")] = False,
) -> Result:
    """Measure a trained model on a split.

    Writes the report of the run.
    """
    _require_matching_packages()
    from escm2rec.evaluation.evaluate import evaluate
    from escm2rec.paths import data_path

    return evaluate(data_path(run), data_path(data), split, names(by), user, overwrite)


@app.command()
@verb
def score(
    input: Annotated[
        list[str],
        typer.Option(
            "--input", help="Logs, or a split of a data set: a file, a folder, a pattern or a URL; may be repeated.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the predictions.", show_default=False)],
    run: Annotated[str | None, typer.Option("--run", help="Run folder, as train writes it, or its fsspec URL.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Instead of --run: a folder that export wrote, or its fsspec URL.", show_default=False),
    ] = None,
    keep: Annotated[
        list[str], typer.Option("--keep", help="Column to keep; repeat it, or give a comma list. [default: those the schema keeps]")
    ] = [],  # noqa: B006
    columns: Annotated[
        list[str],
        typer.Option(
            "--columns",
            help="All columns to write, in order, COLUMN or NAME=COLUMN: those of the input, and p_ctr, p_cvr, p_ctcvr, ctr_logit, "
            "cvr_logit, ctcvr_logit, propensity. [default: what --keep says, p_ctr, p_cvr, p_ctcvr]",
        ),
    ] = [],  # noqa: B006
    where: Annotated[str | None, typer.Option("--where", help='Score only rows of this SQL condition, as "price > 5".')] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Write only so many rows of each --by, the best of all.")] = None,
    by: Annotated[str | None, typer.Option("--by", help="Column of the user, with --top-k.")] = None,
    rank_by: Annotated[str | None, typer.Option("--score", help="Prediction to rank by, with --top-k. [default: p_ctcvr]")] = None,
    bad_rows: Annotated[
        Literal["refuse", "count"], typer.Option("--bad-rows", help="Fail at a row that cannot be read, or leave it out and count it.")
    ] = "refuse",
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option("--on-error", help="At a file that cannot be scored: stop, or score the others, then exit with 2."),
    ] = "stop",
    row_group_rows: Annotated[int, typer.Option("--row-group-rows", min=1, help="Rows of a row group of the predictions.")] = 131_072,
    compression: Annotated[
        Literal["zstd", "snappy", "lz4", "gzip", "none"], typer.Option("--compression", help="Of the predictions.")
    ] = "zstd",
    rows_per_file: Annotated[int | None, typer.Option("--rows-per-file", min=1, help="Several parts for an input with more rows.")] = None,
    tables: Annotated[
        Literal["shared", "sharded"] | None,
        typer.Option("--tables", help="One copy a machine, or a share a rank. [default: sharded on GPUs, or where they need it]"),
    ] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="Of this machine. [default: one a processor]")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option("--engine", help="Processes of this machine, or a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option("--address", help="Address of the Ray cluster; auto finds one of this machine.")] = None,
    warn_gap: Annotated[
        float, typer.Option("--warn-gap", min=0, max=1, help="Warn where a share of missing or unknown values differs more from training.")
    ] = 0.1,
    overwrite: Overwrite = False,
) -> Result:
    """Score candidate logs with a trained model.

    Writes p_ctr, p_cvr and p_ctcvr of each row, in the order of the input. The same command goes on where one stopped.
    """
    from escm2rec.workers import is_small, ready_workers

    if engine == "local" and "WORLD_SIZE" not in os.environ and (processes or 2) > 1 and not is_small(Path(each) for each in input):
        ready_workers("escm2rec.scoring.job")  # while this process imports the same
    _require_matching_packages()
    from escm2rec.paths import data_path
    from escm2rec.scoring.options import Layout, Options
    from escm2rec.scoring.score import score

    if address is not None and engine == "local":
        raise ConfigError("--address is of a Ray cluster", "add --engine ray, or leave it out")
    options = Options(
        keep=names(keep) or None,
        columns=names(columns) or None,
        where=where,
        top_k=top_k,
        by=by,
        score=rank_by,
        bad_rows=bad_rows,
        on_error=on_error,
        layout=Layout(row_group_rows, compression, rows_per_file),
        tables=tables,
        processes=processes,
        ray_address=(address or "auto") if engine == "ray" else None,
        warn_gap=warn_gap,
    )
    trained, exported = (None if place is None else data_path(place) for place in (run, model))
    result = score(trained, input, out, options, overwrite, exported)
    if result.get("failed"):
        raise PartialError(
            f"{result['failed']} of {result['files']} files could not be scored; {out / 'manifest.json'} says why",
            "mend them and run the same command again: it scores them alone (with other options --overwrite scores all anew)",
            result,
        )
    return result


@app.command()
@verb
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder for the model, its schema, vocabularies and manifest.", show_default=False)],
    format: Annotated[
        Literal["torch-export", "aoti", "torchscript"],
        typer.Option("--format", help="torch.export's archive, one compiled for this machine (needs g++), or TorchScript's."),
    ] = "torch-export",
    weights: Annotated[Literal["fp32", "bf16", "int8", "int4"], typer.Option("--weights", help="How rows of tables are stored.")] = "fp32",
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Data set on which its quality is measured. [default: the one that the run was trained on]", show_default=False
        ),
    ] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option("--split", help="Which split of it.")] = "test",
    rows: Annotated[int, typer.Option("--rows", min=1, help="At most so many rows of it, the first.")] = 100_000,
    overwrite: Overwrite = False,
) -> Result:
    """Write a trained model as one folder that serves elsewhere.

    By torch alone; score --model takes it too. Its manifest says what it takes, and what it loses beside the run's.
    """
    _require_matching_packages()
    from escm2rec.paths import data_path
    from escm2rec.serving.export import export

    return export(data_path(run), out, format, weights, None if data is None else data_path(data), split, rows, overwrite)


@app.command()
@verb
def pipeline(
    config: ConfigFile,
    input: Annotated[Path, typer.Option("--input", help="Raw logs, as of preprocess.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder for data, run and predictions, which the jobs see too.", show_default=False)],
    scheduler: Annotated[str, typer.Option("--scheduler", help="A scheduler of TorchX: local_cwd, slurm, kubernetes, ...")] = "local_cwd",
    candidates: Annotated[Path | None, typer.Option("--candidates", help="Raw logs to score; nothing is scored without.")] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option("--split", help="Which split to measure.")] = "test",
    scheduler_args: Annotated[str, typer.Option("--scheduler-args", help="The scheduler's own arguments.", metavar="K=V,K=V")] = "",
    job: Annotated[
        list[str],
        typer.Option("--job", help="An argument of the components, such as j=2x8 or max_retries=3; may be repeated.", metavar="NAME=VALUE"),
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    dryrun: Annotated[bool, typer.Option("--dryrun", help="Print every request; submit nothing.")] = False,
) -> Result:
    """Raw logs to predictions, by jobs of a scheduler.

    preprocess, train, evaluate and score, one after the other. The same command goes on where one stopped.
    """
    from escm2rec.pipeline import pipeline

    return pipeline(
        config,
        input,
        out,
        scheduler,
        candidates=candidates,
        split=split,
        overrides=overrides,
        scheduler_args=scheduler_args,
        job=job,
        dryrun=dryrun,
    )


@app.command()
@verb
def study(
    out: Annotated[Path, typer.Option("--out", help="Folder for the study.", show_default=False)],
    preset: Annotated[Literal["quick", "full"], typer.Option("--preset", help="2 worlds in minutes, or 20 in an hour or two.")] = "quick",
    objectives: Annotated[
        list[str], typer.Option("--objectives", help="What to compare; repeat it, or give a comma list. [default: the preset's]")
    ] = [],  # noqa: B006
    worlds: Annotated[
        list[str], typer.Option("--worlds", help="Where; repeat it, or give a comma list. [default: all of the preset]")
    ] = [],  # noqa: B006
    seeds: Annotated[int | None, typer.Option("--seeds", min=2, help="Seeds a world.", show_default="the preset's")] = None,
    ratings: Annotated[
        Path | None,
        typer.Option("--ratings", help="Run the semi-synthetic protocol on this file of user, item, rating instead.", show_default=False),
    ] = None,
    draws: Annotated[int | None, typer.Option("--draws", min=3, help="Draws of labels, with --ratings.", show_default="20")] = None,
    overwrite: Overwrite = False,
) -> Result:
    """Compare objectives where the truth is known.

    In simulated worlds, or on a completed matrix of ratings.
    """
    if ratings is not None:
        if objectives or worlds or seeds is not None or preset != "quick":
            raise ConfigError("--ratings goes with --draws alone", "leave --preset, --objectives, --worlds and --seeds out")
        from escm2rec.study.ratings import ratings_study

        return ratings_study(ratings, out, 20 if draws is None else draws, overwrite=overwrite)
    if draws is not None:
        raise ConfigError("--draws is of labels drawn on --ratings", "leave it out; --seeds says how often a world is drawn")
    from escm2rec.study.study import study

    return study(out, preset, names(objectives), names(worlds), seeds, overwrite)


@app.command()
@verb
def inspect(
    data: Annotated[str, typer.Argument(help="Data set folder, as preprocess writes it, or its fsspec URL.", show_default=False)],
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="How many of the most frequent values to tell, of each feature.")] = 10,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with plots to this file.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page at --html.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Also compare every file with its size and checksum.")] = False,
) -> Result:
    """Say what a data set holds.

    Label rates of the splits; coverage, table sizes, list lengths and frequent values of the features.
    """
    from escm2rec.inspection.inspect import inspect
    from escm2rec.paths import data_path

    return inspect(data_path(data), top, html, overwrite, verify)


@app.command()
@verb
def doctor() -> Result:
    """Check that torch, torchrec and fbgemm fit each other."""
    from escm2rec.doctor import check_installation

    return check_installation()


@config_app.command("schema")
@verb
def config_schema() -> Result:
    """Print the JSON Schema of the config, for editors."""
    from escm2rec.config import config_json_schema

    return config_json_schema()


@config_app.command("check")
@verb
def config_check(
    config: Annotated[Path, typer.Argument(help="YAML config file.", show_default=False)],
    overrides: Overrides = [],  # noqa: B006
) -> Result:
    """Check a config and print it complete, every default filled in."""
    from escm2rec.config import load_config
    from escm2rec.training.build import build_objective
    from escm2rec.training.choice import check_choice
    from escm2rec.training.idle import refuse_idle

    checked = load_config(config, overrides)
    refuse_idle(checked)
    build_objective(checked.objective, base_ctr=0.5)
    check_choice(checked)
    return checked.model_dump(mode="json")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, by default `sys.argv`'s, and leave with its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG_FLAG in args
    args = [arg for arg in args if arg != DEBUG_FLAG]
    if args == ["--version"]:
        _tell(f"escm2rec {__version__}")
        sys.exit(0)
    _configure_logging(debug)
    try:
        result = app(args, prog_name="escm2rec", standalone_mode=False)
        if isinstance(result, int):  # not a result: typer's exit code after --help or an interrupt
            sys.exit(result)
        if rank() == 0:
            _tell(_to_json(result))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if isinstance(error, PartialError) and rank() == 0:
            _tell(_to_json(error.result))
        sys.exit(_report_error(error, debug))
    sys.exit(0)


def _tell(text: str) -> None:
    """Print to stdout; a reader that has gone, like `head` when it has its lines, is no failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


def _report_error(error: Exception, debug: bool) -> int:
    """Say on stderr what happened and what to do next; the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, Escm2Error) and error.told_by_rank_0:
        return error.exit_code
    if LOST_RANK.search(str(error)):
        message, hint, code = "another rank ended first", "its error is the one to mend", EXIT_UNEXPECTED
    elif SLOW_RANK.search(str(error)):
        message, code = f"another rank did not answer in time: {error}", EXIT_UNEXPECTED
        hint = "it hangs: look at its log, at the disk of its --out and its --data, and at the store of --copy-to"
    elif isinstance(error, Escm2Error):
        message, hint, code = error.message, error.hint, error.exit_code
    elif hasattr(error, "format_message"):  # typer's and click's usage errors
        command = getattr(getattr(error, "ctx", None), "command_path", "escm2rec")
        message, hint, code = error.format_message(), f"{command} --help shows what it takes", EXIT_USAGE
    else:
        message = f"{type(error).__name__}: {error}"
        hint, code = "" if debug else f"run the same command with {DEBUG_FLAG} to see where it happened", EXIT_UNEXPECTED
    mine = rank()
    print(f"error: {message}" if mine == 0 else f"error (rank {mine}): {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


def _configure_logging(debug: bool) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    talk = logging.DEBUG if debug else logging.INFO
    logging.getLogger("escm2rec").setLevel(talk if rank() == 0 else logging.ERROR)


def _to_json(result: Result) -> str:
    # JSON has no NaN and no infinity: they become null.
    return json.dumps(json.loads(json.dumps(result, default=os.fspath), parse_constant=lambda _: None), indent=2)


def _require_matching_packages() -> None:
    from escm2rec.doctor import require_matching_packages

    require_matching_packages()

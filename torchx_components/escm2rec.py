"""One TorchX component a verb: `torchx run -s SCHEDULER torchx_components/escm2rec.py:VERB --OPTION ...`.

A component takes its verb's options under the same names and starts `apps/VERB.py` in the image's working directory. What
differs is what TorchX can pass: a list is a comma list, a flag takes a value (`--overwrite True`), and `--set` takes its
overrides in one go (`--set training.epochs=2,model.tower_hidden=[8,4]`).

`--` ends torchrun's own options before the program: its parser would take `--run` for an abbreviation of its `--run-path`.

`Optional[...]` and `List[...]` are what torchx 0.7 reads, and `dist.ddp` is what both it and the nightly have (there with a
notice of deprecation). The file must not import torch or escm2rec.
"""

import re
from typing import Dict, List, Optional, Union

import torchx
import torchx.specs as specs
from torchx.components import dist


def simulate(
    out: str,
    impressions: int,
    seed: int = 0,
    format: str = "aliccp",
    config: Optional[str] = None,
    set: Optional[str] = None,
    overwrite: bool = False,
    image: str = torchx.IMAGE,
    name: str = "simulate",
    h: Optional[str] = None,
    cpu: int = 2,
    memory_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Draw impression logs whose truth is known, in one process.

    Args:
        out: folder for the simulated logs
        impressions: how many impressions to draw
        seed: the same seed gives the same logs
        format: aliccp (raw text) or parquet
        config: YAML config whose section simulation is used
        set: config overrides, as a.b=value,c.d=value
        overwrite: replace what is at out
        image: container image, or the directory to run in on schedulers without containers
        name: name of the job
        h: named resource of the host; takes precedence over cpu and memory_mb
        cpu: CPU cores
        memory_mb: memory in MB
        env: environment variables, as A=1,B=2
        max_retries: how often the scheduler may start it again
        mounts: mounts of a container, as type=bind,src=/from,dst=/to[,readonly]
    """
    arguments = _options(
        out=out, impressions=impressions, seed=seed, format=format, config=config, set=_overrides(set), overwrite=overwrite
    )
    resource = specs.resource(cpu=cpu, memMB=memory_mb, h=h)
    return _single_process("simulate", arguments, image, name, resource, env, max_retries, mounts)


def preprocess(
    config: str,
    input: str,
    out: str,
    memory_gib: float = 4.0,
    engine: Optional[str] = None,
    address: Optional[str] = None,
    set: Optional[str] = None,
    overwrite: bool = False,
    image: str = torchx.IMAGE,
    name: str = "preprocess",
    h: Optional[str] = None,
    cpu: int = 2,
    memory_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Turn raw logs into a data set, by a process a core of one host or on a Ray cluster.

    Args:
        config: YAML config file
        input: folder with the raw logs
        out: folder for the data set
        memory_gib: what counts, sorts and lookups may take, beside 300 MB
        engine: local (processes of this host, the default), or ray
        address: address of the Ray cluster
        set: config overrides, as a.b=value,c.d=value
        overwrite: replace what is at out
        image: container image, or the directory to run in on schedulers without containers
        name: name of the job
        h: named resource of the host; takes precedence over cpu and memory_mb
        cpu: CPU cores
        memory_mb: memory in MB
        env: environment variables, as A=1,B=2
        max_retries: how often the scheduler may start it again
        mounts: mounts of a container, as type=bind,src=/from,dst=/to[,readonly]
    """
    where = {"engine": engine, "address": address}
    arguments = _options(config=config, input=input, out=out, memory_gib=memory_gib, **where, set=_overrides(set), overwrite=overwrite)
    resource = specs.resource(cpu=cpu, memMB=memory_mb, h=h)
    return _single_process("preprocess", arguments, image, name, resource, env, max_retries, mounts)


def study(
    out: str,
    preset: str = "quick",
    objectives: Optional[List[str]] = None,
    worlds: Optional[List[str]] = None,
    seeds: Optional[int] = None,
    ratings: Optional[str] = None,
    draws: Optional[int] = None,
    overwrite: bool = False,
    image: str = torchx.IMAGE,
    name: str = "study",
    h: Optional[str] = None,
    cpu: int = 2,
    memory_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Compare objectives where the truth is known, in one process a core of one host.

    Args:
        out: folder for the study
        preset: quick (2 worlds) or full (20)
        objectives: what to compare; by default what the preset has
        worlds: where; by default all of the preset
        seeds: seeds a world; by default the preset's
        ratings: run the semi-synthetic protocol on this file of user, item, rating instead
        draws: draws of labels, with ratings
        overwrite: replace what is at out
        image: container image, or the directory to run in on schedulers without containers
        name: name of the job
        h: named resource of the host; takes precedence over cpu and memory_mb
        cpu: CPU cores
        memory_mb: memory in MB
        env: environment variables, as A=1,B=2
        max_retries: how often the scheduler may start it again
        mounts: mounts of a container, as type=bind,src=/from,dst=/to[,readonly]
    """
    arguments = _options(
        out=out, preset=preset, objectives=objectives, worlds=worlds, seeds=seeds, ratings=ratings, draws=draws, overwrite=overwrite
    )
    resource = specs.resource(cpu=cpu, memMB=memory_mb, h=h)
    return _single_process("study", arguments, image, name, resource, env, max_retries, mounts)


def train(
    config: str,
    data: str,
    out: str,
    set: Optional[str] = None,
    resume: bool = False,
    overwrite: bool = False,
    profile: bool = False,
    warm_start: Optional[str] = None,
    copy_to: Optional[str] = None,
    plan: Optional[str] = None,
    j: str = "1x2",
    image: str = torchx.IMAGE,
    name: str = "train",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Train a model on a data set, one rank a process.

    Args:
        config: YAML config file
        data: data set folder, as preprocess writes it
        out: folder for the run
        set: config overrides, as a.b=value,c.d=value
        resume: go on from the newest complete checkpoint in out, if any
        overwrite: replace what is at out
        profile: trace some steps: out/profile tells where their time goes
        warm_start: a finished run, whose weights it begins with
        copy_to: fsspec URL where the run is kept too; with resume it may be fetched from there
        plan: a plan of escm2rec plan that the tables are sharded by, its file or folder
        j: {nodes}x{processes per node}; with GPUs, one process each
        image: container image, or the directory to run in on schedulers without containers
        name: name of the job
        h: named resource of a node; takes precedence over cpu, gpu and memory_mb
        cpu: CPU cores of a node
        gpu: GPUs of a node
        memory_mb: memory of a node in MB
        env: environment variables, as A=1,B=2
        max_retries: how often the scheduler may start it again, and torchrun the ranks of which one failed
        rdzv_port: port on the first node where the ranks meet; several nodes only
        mounts: mounts of a container, as type=bind,src=/from,dst=/to[,readonly]
    """
    given = {"resume": resume, "overwrite": overwrite, "profile": profile, "warm_start": warm_start, "copy_to": copy_to, "plan": plan}
    arguments = _options(config=config, data=data, out=out, set=_overrides(set), **given)
    return _distributed("train", arguments, image, name, h, cpu, gpu, memory_mb, j, env, max_retries, rdzv_port, mounts)


def evaluate(
    run: str,
    data: str,
    split: str = "test",
    by: Optional[List[str]] = None,
    user: Optional[str] = None,
    overwrite: bool = False,
    j: str = "1x2",
    image: str = torchx.IMAGE,
    name: str = "evaluate",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Measure a trained model on a split, one rank a process.

    Args:
        run: run folder, as train writes it
        data: data set folder, as preprocess writes it
        split: train, validation or test
        by: columns to report by
        user: column of the user, to measure the ranking within each
        overwrite: replace the run's report
        j: {nodes}x{processes per node}; with GPUs, one process each
        image: container image, or the directory to run in on schedulers without containers
        name: name of the job
        h: named resource of a node; takes precedence over cpu, gpu and memory_mb
        cpu: CPU cores of a node
        gpu: GPUs of a node
        memory_mb: memory of a node in MB
        env: environment variables, as A=1,B=2
        max_retries: how often the scheduler may start it again, and torchrun the ranks of which one failed
        rdzv_port: port on the first node where the ranks meet; several nodes only
        mounts: mounts of a container, as type=bind,src=/from,dst=/to[,readonly]
    """
    arguments = _options(run=run, data=data, split=split, by=by, user=user, overwrite=overwrite)
    return _distributed("evaluate", arguments, image, name, h, cpu, gpu, memory_mb, j, env, max_retries, rdzv_port, mounts)


def score(
    input: List[str],
    out: str,
    run: Optional[str] = None,
    model: Optional[str] = None,
    keep: Optional[List[str]] = None,
    columns: Optional[List[str]] = None,
    where: Optional[str] = None,
    top_k: Optional[int] = None,
    by: Optional[str] = None,
    score: Optional[str] = None,
    bad_rows: Optional[str] = None,
    on_error: Optional[str] = None,
    row_group_rows: Optional[int] = None,
    compression: Optional[str] = None,
    rows_per_file: Optional[int] = None,
    tables: Optional[str] = None,
    processes: Optional[int] = None,
    engine: Optional[str] = None,
    address: Optional[str] = None,
    warn_gap: Optional[float] = None,
    overwrite: bool = False,
    j: str = "1x2",
    image: str = torchx.IMAGE,
    name: str = "score",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Score candidate logs with a trained model, one rank a process; with processes, or on Ray, by one process that starts the others.

    Args:
        input: logs, or splits of data sets: files, folders, patterns or URLs
        out: folder for the predictions
        run: run folder, as train writes it
        model: instead of run, a folder that export wrote
        keep: columns to keep; by default those the schema keeps
        columns: all columns to write, as COLUMN or NAME=COLUMN, instead of keep
        where: score only rows of this SQL condition
        top_k: write only so many rows of each value of by
        by: column of the user, with top_k
        score: prediction to rank by, with top_k
        bad_rows: refuse (the default), or count rows that cannot be read
        on_error: stop (the default) at a file that cannot be scored, or skip such files
        row_group_rows: rows of a row group of the predictions
        compression: zstd (the default), snappy, lz4, gzip or none
        rows_per_file: several parts for an input with more rows
        tables: shared (one copy a machine) or sharded (a share a rank)
        processes: of one host, instead of ranks
        engine: local (the default), or ray
        address: address of the Ray cluster
        warn_gap: warn where a share of missing or unknown values differs more from training
        overwrite: replace what is at out
        j: {nodes}x{processes per node}; with GPUs, one process each
        image: container image, or the directory to run in on schedulers without containers
        name: name of the job
        h: named resource of a node; takes precedence over cpu, gpu and memory_mb
        cpu: CPU cores of a node
        gpu: GPUs of a node
        memory_mb: memory of a node in MB
        env: environment variables, as A=1,B=2
        max_retries: how often the scheduler may start it again, and torchrun the ranks of which one failed
        rdzv_port: port on the first node where the ranks meet; several nodes only
        mounts: mounts of a container, as type=bind,src=/from,dst=/to[,readonly]
    """
    arguments = _options(
        run=run,
        model=model,
        input=input,
        out=out,
        keep=keep,
        columns=columns,
        where=where,
        top_k=top_k,
        by=by,
        score=score,
        bad_rows=bad_rows,
        on_error=on_error,
        row_group_rows=row_group_rows,
        compression=compression,
        rows_per_file=rows_per_file,
        tables=tables,
        processes=processes,
        engine=engine,
        address=address,
        warn_gap=warn_gap,
        overwrite=overwrite,
    )
    if processes is not None or engine == "ray":
        resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memory_mb, h=h)
        return _single_process("score", arguments, image, name, resource, env, max_retries, mounts)
    return _distributed("score", arguments, image, name, h, cpu, gpu, memory_mb, j, env, max_retries, rdzv_port, mounts)


def export(
    run: str,
    out: str,
    format: str = "torch-export",
    weights: str = "fp32",
    data: Optional[str] = None,
    split: str = "test",
    rows: int = 100_000,
    overwrite: bool = False,
    image: str = torchx.IMAGE,
    name: str = "export",
    h: Optional[str] = None,
    cpu: int = 2,
    memory_mb: int = 8192,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Write a trained model as one folder that serves elsewhere.

    Args:
        run: run folder, as train writes it
        out: folder for the model, its schema, vocabularies and manifest
        format: torch-export, aoti (compiled for the machine that runs this) or torchscript
        weights: fp32, bf16, int8 or int4: how rows of tables are stored
        data: data set on which its quality is measured; by default the one that the run was trained on
        split: which split of it
        rows: at most so many rows of it
        overwrite: replace what is at out
        image: container image, or the directory to run in on schedulers without containers
        name: name of the job
        h: named resource of a node; takes precedence over cpu and memory_mb
        cpu: CPU cores of a node
        memory_mb: memory of a node in MB
        env: environment variables, as A=1,B=2
        max_retries: how often the scheduler may start it again
        mounts: mounts of a container, as type=bind,src=/from,dst=/to[,readonly]
    """
    arguments = _options(run=run, out=out, format=format, weights=weights, data=data, split=split, rows=rows, overwrite=overwrite)
    resource = specs.resource(cpu=cpu, gpu=0, memMB=memory_mb, h=h)
    return _single_process("export", arguments, image, name, resource, env, max_retries, mounts)


def _single_process(
    verb: str,
    arguments: List[str],
    image: str,
    name: str,
    resource: specs.Resource,
    env: Optional[Dict[str, str]],
    max_retries: int,
    mounts: Optional[List[str]],
) -> specs.AppDef:
    role = specs.Role(
        name=verb,
        image=image,
        entrypoint="python",
        args=[f"apps/{verb}.py", *arguments],
        env=env or {},
        resource=resource,
        max_retries=max_retries,
        mounts=specs.parse_mounts(mounts or []),
    )
    return specs.AppDef(name=name, roles=[role])


def _distributed(
    verb: str,
    arguments: List[str],
    image: str,
    name: str,
    h: Optional[str],
    cpu: int,
    gpu: int,
    memory_mb: int,
    j: str,
    env: Optional[Dict[str, str]],
    max_retries: int,
    rdzv_port: int,
    mounts: Optional[List[str]],
) -> specs.AppDef:
    script = f"apps/{verb}.py"
    # torchrun would give ranks that it starts again the store of the first ones, whose addresses they then find there and wait for.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **(env or {})}
    job = dist.ddp(
        *arguments,
        script=script,
        image=image,
        name=name,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memory_mb,
        j=j,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
    )
    for role in job.roles:
        role.args = [text.replace(f" {script}", f" --max-restarts {max_retries} -- {script}", 1) for text in role.args]
    return job


def _options(**values: Union[bool, int, float, str, List[str], None]) -> List[str]:
    """The verb's command line: nothing for None and False, a bare flag for True, a list's option repeated, - for _ in a name."""
    arguments: List[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if value is True:
            arguments.append(f"--{option}")
        elif value is not None and value is not False:
            for item in value if isinstance(value, list) else [value]:
                arguments += [f"--{option}", str(item)]
    return arguments


def _overrides(text: Optional[str]) -> List[str]:
    """`a.b=1,c=[2,3]` as `a.b=1` and `c=[2,3]`: a comma ends an override only where another `key=` follows."""
    return re.split(r",\s*(?=[A-Za-z_][\w.]*=)", text) if text else []

"""What a finished run learned, as the beginning of another training: embedding rows by what they stand for, weights by name.

Tables: features are the same by name, and their rows by what they stand for (`row_matches.py`). A matched row begins as the source's row,
bit for bit, with the state that Adagrad, row-wise or not, held for it: without that, its first steps, each as large as the learning rate,
would undo what the row knows. A new row keeps its seeded initial values and a state of 0, as in any training. Where columns were split,
row-wise Adagrad held several states a row; their mean is taken. Adam's moments begin anew, and so does the state of another optimizer.

Everything dense, and what the loss holds: taken by name where the shape is equal; its moving average, where the source kept one. Where
inputs came, went or moved, the columns of those that both have are taken, and the others keep their initial values. AdamW's moments begin
anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from escm2rec.config import Config
from escm2rec.disk import telling_of_disk
from escm2rec.errors import DataError
from escm2rec.folder import write_json
from escm2rec.schema import Feature, Schema
from escm2rec.sharding.initialise import CHUNK_ROWS
from escm2rec.sharding.managed import ShardedManagedTables, sharded_managed
from escm2rec.sharding.runtime import Runtime, on_main
from escm2rec.sharding.shards import held, table_of
from escm2rec.training.build import BaseRates, build_model
from escm2rec.training.checkpoint import damage
from escm2rec.training.managed_rows import MODULES, take_rows
from escm2rec.training.row_matches import read_matches, why_not, write_matches
from escm2rec.training.run import WARM_START, Run
from escm2rec.training.stored import StoredTensors

TABLES = ".embedding_bags."
KEEPS_STATE = ("rowwise_adagrad", "adagrad", "sgd")  # sgd has none
TOLD_SHIFT = 0.1  # of a deviation: numbers that moved by more are warned of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Begins:
    """A training that begins, and what it begins with; `model` and `optimizer` are the state of its parts, written to in place."""

    source: Run
    stored: StoredTensors
    config: Config
    schema: Schema
    out: Path
    runtime: Runtime
    model: dict[str, Any]
    optimizer: dict[str, Any]
    managed: list[ShardedManagedTables]


def take_from(
    source: Run, config: Config, schema: Schema, out: Path, module: DistributedModelParallel, optimizer: CombinedOptimizer, runtime: Runtime
) -> None:
    """Give a new training of `config` what `source` learned, in place; called by all ranks alike, before the first step.

    Each rank reads the rows it holds, of any plan on any number of ranks. `out/warm_start.json` says what was taken and what was not, with
    the reason; `out/warm_start/FEATURE.parquet` which row came from which, of each table that was taken. DataError where the source is
    damaged.
    """
    if (said := damage(source.checkpoint, runtime)) is not None:
        raise DataError(f"checkpoint {source.checkpoint} is damaged: {said}", "start from another run, or leave --warm-start out")
    stored = StoredTensors(source.checkpoint)
    model, states = module.state_dict(), optimizer.state_dict()["state"]
    begins = _Begins(source, stored, config, schema, out, runtime, model, states, sharded_managed(module))
    with telling_of_disk(out, "start again"):
        told = {"tables": _take_tables(begins), "table_states": _states_told(begins), "dense": _take_dense(begins)}
        told["numbers"] = _numbers(source.schema, schema)
        if runtime.is_main:
            write_json(out / WARM_START, source.identity | told)
            log_taken(source, told)


def _take_tables(begins: _Begins) -> dict[str, Any]:
    """Copy the matched rows of every table; what is told of each feature, those the source alone has among them."""
    before = {feature.name: feature for feature in begins.source.schema.tables}
    dims = begins.source.config.model.embedding_dim, begins.config.model.embedding_dim
    told = {}
    for now in begins.schema.tables:
        was, matched = before.get(now.name), 0
        reason = why_not(was, now)
        if reason is None and dims[0] != dims[1]:
            reason = f"embedding_dim was {dims[0]}, is {dims[1]}"
        if was is not None and reason is None:
            matched = _take_table(begins, was, now)
            if now.encoding == "vocabulary" and was.oov_rows != now.oov_rows:
                reason = f"oov_rows was {was.oov_rows}, is {now.oov_rows}: those rows are new"
        told[now.name] = _counts(was, now, matched, reason)
    gone = before.keys() - {feature.name for feature in begins.schema.tables}
    return told | {name: _counts(before[name], None, 0, "the data set has no such table") for name in sorted(gone)}


def _take_table(begins: _Begins, was: Feature, now: Feature) -> int:
    """Copy the matched rows of one table, and their state; how many there are, on all ranks."""
    if now.is_managed:
        return _take_managed(begins, now.name)
    path = begins.out / "warm_start" / f"{now.name}.parquet"

    def write() -> int:
        path.parent.mkdir(exist_ok=True)
        return write_matches(was, begins.source.path / "vocabulary", now, begins.out / "vocabulary", path)

    matched = on_main(begins.runtime, write)
    name = next(name for name in begins.model if TABLES in name and table_of(name) == now.name)
    old = next(name for name in begins.stored.shapes if name.startswith("model.") and TABLES in name and table_of(name) == now.name)
    _take_rows(begins.model[name], now, path, begins.stored, old, was)
    if _states_told(begins)["taken"] == "yes":
        for kind, state in begins.optimizer.get(f"tables.{name}", {}).items():
            _take_rows(state, now, path, begins.stored, f"optimizer.state.tables.{old.removeprefix('model.')}.{kind}", was)
    return matched


def _take_managed(begins: _Begins, table: str) -> int:
    """Copy the rows of the values of a managed table, and their state; how many there are, on all ranks."""
    name = next(name for name in begins.model if TABLES in name and table_of(name) == table)
    states = begins.optimizer.get(f"tables.{name}", {}) if _states_told(begins)["taken"] == "yes" else {}
    ((tables, rows),) = ((tables, rows) for tables in begins.managed for each, rows in tables.values() if each == table)
    taken = torch.tensor(take_rows(begins.stored, tables, table, rows, states)[0], device=begins.runtime.device)
    dist.all_reduce(taken, group=begins.runtime.group)
    return int(taken)


def _states_told(begins: _Begins) -> dict[str, str]:
    """Whether what steps the tables goes on with the state of their rows."""
    was, now = begins.source.config.training.sparse_optimizer, begins.config.training.sparse_optimizer
    if was != now:
        return {"taken": "no", "reason": f"sparse_optimizer was {was}, is {now}"}
    return {"taken": "yes"} if now in KEEPS_STATE else {"taken": "no", "reason": f"{now} begins anew, as AdamW does"}


def _counts(was: Feature | None, now: Feature | None, matched: int, reason: str | None) -> dict[str, Any]:
    rows, old = (0 if feature is None or not feature.is_table else feature.num_embeddings for feature in (now, was))
    told = {"rows": rows, "matched": matched, "new": rows - matched, "left": old - matched}
    return told if reason is None else {**told, "reason": reason}


@torch.no_grad()
def _take_rows(target: Tensor | ShardedTensor, now: Feature, path: Path, stored: StoredTensors, name: str, was: Feature) -> None:
    """Copy the matched rows that this rank holds of a table, [rows, dim], or of an optimizer's state, [rows x column shards]."""
    share = was.num_embeddings / stored.shapes[name][0]  # of each of several states of a row in their mean
    for tensor, offsets in held(target):
        first, column = _place(offsets, now)
        values = tensor if tensor.ndim == 2 else tensor.unsqueeze(1)
        from_rows = read_matches(path, first, len(values))
        for part in stored.parts(name):
            old_first, old_column = _place(part.offsets, was)
            old = part.values if part.values.ndim == 2 else part.values[:, None]
            low, high = max(column, old_column), min(column + values.shape[1], old_column + old.shape[1])
            rows = np.flatnonzero((from_rows >= old_first) & (from_rows < old_first + len(old))) if low < high else np.zeros(0, np.int64)
            rows = rows[np.argsort(from_rows[rows])]  # a file is read from its beginning to its end
            for piece in (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)):
                taken = torch.from_numpy(old[from_rows[piece] - old_first, low - old_column : high - old_column]).to(values.device)
                to, columns = torch.from_numpy(piece).to(values.device), slice(low - column, high - column)
                values[to, columns] = taken if share == 1 else values[to, columns] + taken * share


def _place(offsets: Any, feature: Feature) -> tuple[int, int]:
    """First row and column of a part of a table; of a state, which has the rows once for each column shard, the first row and 0."""
    return int(offsets[0]) % feature.num_embeddings, int(offsets[1]) if len(offsets) == 2 else 0


@torch.no_grad()
def _take_dense(begins: _Begins) -> dict[str, Any]:
    """Copy what is not in tables, into its moving average too; what is told of each entry, those the source alone has among them."""
    inputs = _Inputs(begins.source, begins.config, begins.schema)
    told = {}
    for name, value in begins.model.items():
        if not _is_dense(name):
            continue
        told[name] = _take_one(begins, name, value, inputs)
        average = begins.optimizer.get(f"dense.{name}", {}).get("ema")
        if average is not None:
            average.copy_(value)
    held = (name.removeprefix("model.") for name in begins.stored.shapes if name.startswith("model.") and _is_dense(name))
    return told | {name: {"taken": "no", "reason": "the model has no such weights"} for name in sorted(set(held) - told.keys())}


def _is_dense(name: str) -> bool:
    """Whether an entry of a model is neither a table nor says which value has which row of one."""
    return TABLES not in name and MODULES not in name


def _take_one(begins: _Begins, name: str, value: Tensor, inputs: _Inputs) -> dict[str, Any]:
    shapes = begins.stored.shapes
    average = f"optimizer.state.dense.{name}.ema"
    stored = average if average in shapes else f"model.{name}"  # a run that keeps averages predicts with them
    axes = inputs.axes.get(name, ())
    shape = tuple(inputs.before if axis in axes else size for axis, size in enumerate(value.shape))
    reason = _other_meaning(name, begins.source.config, begins.config)
    if reason is None and stored not in shapes:
        reason = "the source has no such weights"
    if reason is None and shapes[stored] != shape:
        reason = f"its shape was {list(shapes[stored])}, is {list(value.shape)}"
    if reason is not None:
        return {"taken": "no", "reason": reason}
    places = [inputs.places if axis in axes else np.tile(np.arange(size), (2, 1)) for axis, size in enumerate(shape)]
    to, of = ([torch.from_numpy(place[side].copy()) for place in places] for side in (0, 1))
    value[_grid([each.to(value.device) for each in to])] = begins.stored.whole(stored)[_grid(of)].to(value.device)
    return {"taken": "in part", "reason": inputs.changed} if axes and inputs.changed else {"taken": "yes"}


def _grid(places: list[Tensor]) -> tuple[Tensor, ...]:
    """The index of all combinations of places, one tensor an axis."""
    return tuple(place.view([-1 if axis == own else 1 for axis in range(len(places))]) for own, place in enumerate(places))


def _other_meaning(name: str, was: Config, now: Config) -> str | None:
    """Why weights of the same name and shape would not mean the same; None where they do."""
    kinds = was.model.backbone.kind, now.model.backbone.kind
    if name.startswith("model.head.") and kinds[0] != kinds[1]:
        return f"the backbone was {kinds[0]}, is {kinds[1]}"
    predicts = was.objective.imputation.predicts, now.objective.imputation.predicts
    if name.startswith("model.head.imputation.") and predicts[0] != predicts[1]:
        return f"imputation.predicts was {predicts[0]}, is {predicts[1]}"
    if name.startswith("loss.") and was.objective.kind != now.objective.kind:
        return f"the objective was {was.objective.kind}, is {now.objective.kind}"
    return None


class _Inputs:
    """Which axes of which weights are of the inputs, and which place there is which of the source's.

    before   how many inputs the source has
    axes     by name: an axis is one of inputs where the same model with one number more has one more there
    places   [2, inputs that both have], int64: their places now and before
    changed  what inputs came or went, for the report; None where none did
    """

    def __init__(self, source: Run, config: Config, schema: Schema) -> None:
        old = _inputs_of(source.schema, source.config.model.embedding_dim)
        new = _inputs_of(schema, config.model.embedding_dim)
        self.before = sum(width for _, width in old.values())
        both = [name for name, (_, width) in new.items() if name in old and old[name][1] == width]
        pairs = [np.stack([np.arange(new[name][1]) + start[name][0] for start in (new, old)]) for name in both]
        self.places = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
        came, went = ([name for name in names if name not in both] for names in (new, old))
        told = [f"{what} {', '.join(names)}" for what, names in (("not of", came), ("without", went)) if names]
        self.changed = f"inputs {'; '.join(told)}" if told else None
        more = schema.model_copy(update={"features": (*schema.features, Feature(name="one more", kind="numeric", column="one more"))})
        one, another = (_shapes(each, config) for each in (schema, more))
        self.axes = {name: tuple(axis for axis, size in enumerate(shape) if another[name][axis] != size) for name, shape in one.items()}


def _inputs_of(schema: Schema, dim: int) -> dict[str, tuple[int, int]]:
    """First place and width of each feature among the concatenated inputs, in their order (`ConcatenatedInputs`)."""
    widths = [(feature.name, dim) for feature in schema.tables] + [(feature.name, 1) for feature in schema.numeric]
    starts = np.cumsum([0, *(width for _, width in widths)]).tolist()
    return {name: (start, width) for (name, width), start in zip(widths, starts, strict=False)}


def _shapes(schema: Schema, config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build_model(schema, config.model, config.objective, BaseRates(0.5, 0.5), seed=0)
    return {f"model.{name}": tuple(value.shape) for name, value in model.named_parameters() if TABLES not in name}


def _numbers(before: Schema, now: Schema) -> dict[str, Any]:
    """What is otherwise with numbers that both have, before and now. One that moved far is warned of, since its weights do not know."""
    told: dict[str, Any] = {}
    far = []
    for was, feature in ((was, feature) for was in before.numeric for feature in now.numeric if was.name == feature.name):
        differ = [name for name in ("mean", "std", "log1p", "clip") if getattr(was, name) != getattr(feature, name)]
        if not differ:
            continue
        told[feature.name] = {name: [getattr(was, name), getattr(feature, name)] for name in differ}
        shift = max(abs(feature.mean - was.mean), abs(feature.std - was.std)) / was.std
        if shift > TOLD_SHIFT or was.log1p != feature.log1p:
            far.append(
                f"{feature.name} ({', '.join(f'{name} {_short(a)}, is {_short(b)}' for name, (a, b) in told[feature.name].items())})"
            )
    if far:
        logger.warning("numbers that are standardised otherwise than the source learned them: %s", "; ".join(far))
    return told


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def log_taken(source: Run, told: dict[str, Any]) -> None:
    """Say what was taken of a source, a line a table, and a line for each weight that was not taken whole."""
    lines = [f"warm start from {source.path}, {source.checkpoint.name}"]
    width = max((len(name) for name in told["tables"]), default=0)
    lines.append(f"  {'table':{width}}  {'rows':>13}  {'matched':>13}  {'new':>13}  {'left':>13}")
    for name, each in told["tables"].items():
        numbers = "  ".join(f"{each[key]:13,}" for key in ("rows", "matched", "new", "left"))
        lines.append(f"  {name:{width}}  {numbers}  {each.get('reason', '')}".rstrip())
    if told["table_states"]["taken"] == "no":
        lines.append(f"  state of the tables' rows: not taken, {told['table_states']['reason']}")
    dense = told["dense"]
    taken = {how: [name for name, each in dense.items() if each["taken"] == how] for how in ("yes", "in part", "no")}
    lines.append(f"  dense: {len(taken['yes'])} taken, {len(taken['in part'])} in part, {len(taken['no'])} not")
    lines += [f"    {name}: {dense[name]['reason']}" for how in ("in part", "no") for name in taken[how]]
    logger.info("%s", "\n".join(lines))

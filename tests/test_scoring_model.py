"""The model whose tables are mapped, against the sharded one: every backbone and kind of table, and rows that share their user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor, nn

from escm2rec.config import load_config
from escm2rec.preprocess import preprocess
from escm2rec.reader.columns import decode
from escm2rec.reader.dataset import Dataset
from escm2rec.scoring.job import BATCH_ROWS
from escm2rec.scoring.model import SharedModel
from escm2rec.scoring.options import Options
from escm2rec.scoring.repeats import LEAST_SAME, SharedInputs, Split, find_repeats
from escm2rec.scoring.score import score
from escm2rec.training.train import train
from tests.encoded import write_dataset
from tests.raw_tables import CONFIG, raw_table

USERS, PER_USER = 90, 40
MODELS = {
    "averaged": ["training.ema_decay=0.9"],
    "linear": ["model.tower_hidden=[]"],
    "mmoe": ["model.backbone={kind: mmoe, experts: 3, hidden: [12]}"],
    "deep": ["model.backbone={kind: shared_bottom, hidden: [12]}"],
    "ple": ["model.backbone={kind: ple, hidden: [12]}"],
    "dcn": ["model.backbone={kind: dcn_v2, hidden: [12]}"],
    "half": ["training.precision=bfloat16"],
    "stable": ["objective={kind: stable-dr}"],
    "ips": ["objective={kind: escm2-ips, propensity: {calibration: platt}}"],
}
LOGITS = ["ctr_logit", "cvr_logit", "propensity"]
FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical", "managed_size": 400},
    {"name": "shop", "kind": "categorical", "min_count": 2},
    {"name": "tags", "kind": "list", "managed_size": 70, "pooling": "sum"},
    {"name": "history", "kind": "weighted_list", "weights_column": "history_weight", "hash_size": 40},
    {"name": "price", "kind": "numeric", "log1p": True},
    {"name": "age", "kind": "numeric"},
]


def candidates(users: int, per_user: int, seed: int) -> pa.Table:
    """For each of the users so many rows, which differ in shop, tags and price."""
    once, each = raw_table(users, seed), raw_table(users * per_user, seed + 1)
    of_user = once.take(pa.array(np.repeat(np.arange(users), per_user)))
    for name in ("user", "history", "history_weight"):
        each = each.set_column(each.schema.get_field_index(name), name, of_user[name])
    ages = np.random.default_rng(seed).normal(40, 10, users)
    return each.append_column("age", pa.array(np.repeat(ages, per_user)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "logs").mkdir()
    logs = raw_table(2_000, 0, labels=True)
    logs = logs.append_column("age", pa.array(np.random.default_rng(0).normal(40, 10, len(logs))))
    pq.write_table(logs, root / "logs" / "train.parquet")
    pq.write_table(candidates(USERS, PER_USER, 5), root / "candidates.parquet")
    split = {"by": "hash", "train": 0.8, "validation": 0.2}
    config = {**CONFIG, "data": {**CONFIG["data"], "features": FEATURES, "split": split}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    preprocess(load_config(root / "config.yaml").data, root / "logs", root / "data")
    return root


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, folder: Path) -> Path:
    out = folder / str(request.param)
    train(load_config(folder / "config.yaml", ["training.epochs=1", *MODELS[request.param]]), folder / "data", out)
    return out


def scored(run: Path, inputs: Path, out: Path, **options: Any) -> pl.DataFrame:
    score(run, [inputs], out, Options(columns=["row", *LOGITS], **options))
    return pl.concat([pl.read_parquet(path) for path in sorted(out.glob("part-*"))])


def test_mapped_tables_predict_as_sharded_ones_and_repeats_change_nothing(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = folder / "candidates.parquet"
    sharded = scored(run, inputs, tmp_path / "sharded", tables="sharded")
    assert sharded.height == USERS * PER_USER < BATCH_ROWS
    called: list[int] = []
    of_repeats = SharedModel.of_repeats

    def counted(self: SharedModel, *args: Any) -> Any:
        called.append(1)
        return of_repeats(self, *args)

    monkeypatch.setattr(SharedModel, "of_repeats", counted)
    wholes: list[int] = []
    whole = SharedInputs.whole

    def noted(self: SharedInputs) -> Tensor:
        wholes.append(1)
        return whole(self)

    monkeypatch.setattr(SharedInputs, "whole", noted)
    rtol, atol = (1e-2, 1e-2) if run.name == "half" else (1e-6, 2e-6)
    for repeats in (False, True):
        found = scored(run, inputs, tmp_path / f"shared-{repeats}", finds_repeats=repeats)
        assert found["row"].equals(sharded["row"])
        for name in LOGITS:
            np.testing.assert_allclose(found[name], sharded[name], rtol=rtol, atol=atol, err_msg=f"{name}, {repeats}")
        assert len(called) == repeats
    assert sharded["ctr_logit"].std() > 0.01  # type: ignore[operator]
    assert bool(wholes) == (run.name in ("dcn", "linear")), "others compute their first layers in parts"


# --- which rows share what -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, Any]:
    dataset = Dataset.open(write_dataset(tmp_path_factory.mktemp("encoded") / "data", {"train": 300}))
    return pq.read_table(dataset.path / "train"), dataset.schema


@pytest.mark.parametrize("per_user", [2, 7, 50])
def test_groups_are_the_runs_of_rows_that_share_the_features_that_seldom_change(encoded: tuple[pa.Table, Any], per_user: int) -> None:
    table, schema = encoded
    users = 40
    shared = {"user", "history", "history.weight", "scene", "age"}
    once = table.slice(0, users).take(pa.array(np.repeat(np.arange(users), per_user)))
    each = table.take(pa.array(np.arange(users * per_user) % 300))
    mixed = pa.table({name: (once if name in shared else each)[name] for name in table.column_names}).combine_chunks()
    repeats = find_repeats(decode(mixed, schema, labels=False, where="here"), schema)
    if 1 - 1 / per_user < LEAST_SAME:
        assert repeats is None
        return
    assert repeats is not None
    assert {feature.name for feature in repeats.once_schema.features} == shared - {"history.weight"}
    starts = np.arange(0, users * per_user + 1, per_user)
    assert repeats.starts.tolist() == starts.tolist()
    seen = 0
    for start in range(0, users * per_user, 33):  # any cut of the rows
        stop = min(start + 33, users * per_user)
        once_part, each_part, of_row = repeats.slices(start, stop)
        assert (each_part.start, each_part.stop) == (start, stop)
        assert (of_row + once_part.start).tolist() == (np.arange(start, stop) // per_user).tolist()
        assert once_part.stop - once_part.start == int(of_row.max()) + 1
        seen += stop - start
    assert seen == users * per_user


def test_rows_that_do_not_repeat_have_no_groups(encoded: tuple[pa.Table, Any]) -> None:
    table, schema = encoded
    assert find_repeats(decode(table, schema, labels=False, where="here"), schema) is None
    assert find_repeats(decode(table.slice(0, 1), schema, labels=False, where="here"), schema) is None


def test_a_value_that_changes_ends_a_group_whatever_the_kind(encoded: tuple[pa.Table, Any]) -> None:
    """Also one whose list is as long as before, and one of which a weight alone is another."""
    table, schema = encoded
    row = next(row for row, cell in enumerate(table["history"].to_pylist()) if len(cell) >= 8)
    same = table.take(pa.array([row] * 40)).combine_chunks()
    changes: dict[str, Callable[[Any], Any]] = {
        "user": lambda cell: (cell + 1) % 300,
        "history": lambda cell: bytes([(cell[0] + 1) % 80, *cell[1:]]),
        "history.weight": lambda cell: cell[:-1] + bytes([cell[-1] ^ 1]),
        "age": lambda cell: cell + 1,
    }
    for name, change in changes.items():
        values = same[name].to_pylist()
        values[17:] = [change(values[17])] * 23
        place = same.schema.get_field_index(name)
        changed = same.set_column(place, same.schema.field(place), pa.array(values, same.schema.field(place).type))
        repeats = find_repeats(decode(changed, schema, labels=False, where="here"), schema)
        assert repeats is not None
        assert repeats.starts.tolist() == [0, 17, 40], name


def test_shared_inputs_are_their_whole_to_any_function(encoded: tuple[pa.Table, Any]) -> None:
    _, schema = encoded
    once = schema.model_copy(update={"features": tuple(each for each in schema.features if each.name in ("tags", "age"))})
    split = Split(schema, once, dim=4)
    own, shared, of_row = torch.randn(6, 4 * 3 + 1), torch.randn(2, 4 + 1), torch.tensor([0, 0, 0, 1, 1, 1])
    inputs: Any = SharedInputs(shared, own, of_row, split)
    whole: Tensor = inputs.whole()
    assert whole.shape == (6, 4 * 4 + 2)
    assert torch.equal(whole[:, 4:8], shared[of_row, :4]), "tags are second"
    assert torch.equal(whole[:, 17], shared[of_row, 4]), "age is last"
    assert torch.equal(torch.cat([inputs, inputs], dim=1), torch.cat([whole, whole], dim=1))
    assert torch.equal(inputs.detach(), whole)
    layer = nn.Linear(18, 3)
    assert not torch.equal(layer(inputs), torch.zeros(6, 3))
    torch.testing.assert_close(layer(inputs), layer(whole))
    assert json.dumps(list(split._weights)) == json.dumps([id(layer.weight)]), "it was computed in parts"

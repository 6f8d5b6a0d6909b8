"""Managed tables: values take rows when training meets them, on real ranks, through resumption, warm starts, evaluation and scoring."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor
from torchrec.modules.mc_modules import LRU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from escm2rec.config import load_config, parse_config
from escm2rec.errors import ConfigError, DataError, RunError
from escm2rec.inspection.inspect import inspect
from escm2rec.models.embeddings import PooledEmbeddings
from escm2rec.planning.cluster import parse_cluster
from escm2rec.planning.model import request_of_config
from escm2rec.planning.plan import make_plan
from escm2rec.preprocess import preprocess
from escm2rec.preprocess.stable_hash import hash64
from escm2rec.reader.batch import Batch
from escm2rec.reader.columns import decode
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import MANAGED_IDS, Feature, Schema
from escm2rec.sharding.followed import follow
from escm2rec.sharding.initialise import initial_rows
from escm2rec.sharding.managed import FREE, ValueRows, sharded_managed
from escm2rec.sharding.model import shard_model
from escm2rec.sharding.planner import plan_tables
from escm2rec.sharding.runtime import Runtime, distributed_runtime
from escm2rec.training.managed_rows import dealt_alike
from escm2rec.training.stored import StoredPart, StoredTensors
from tests.ranks import run_ranks
from tests.raw_tables import raw_table

USERS, TAGS = 200, 30
MANAGED = {"user": 400, "tags": 70}
FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical", "managed_size": MANAGED["user"]},
    {"name": "shop", "kind": "categorical"},
    {"name": "tags", "kind": "list", "managed_size": MANAGED["tags"]},
    {"name": "history", "kind": "weighted_list", "weights_column": "history_weight", "hash_size": 40},
    {"name": "price", "kind": "numeric", "log1p": True},
]
STEPS, CALIBRATED_STEPS = 12, 17
Call = tuple[str, dict[str, Any]]


def _config(features: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "data": {
            "source": {"kind": "table"},
            "features": features,
            "split": {"by": "hash", "train": 0.8, "validation": 0.1, "test": 0.1},
            "rows_per_group": 256,
            "keep": ["row"],
        },
        "model": {"embedding_dim": 8, "tower_hidden": [16]},
        "training": {"global_batch_size": 128, "dense_learning_rate": 0.01, "log_every_steps": 1, "learning_rate_decay": "none"},
    }


def _without(managed: dict[str, int | None]) -> list[dict[str, Any]]:
    """The features with other sizes of the managed ones; None for a vocabulary of all values."""
    changed = [{**each, **({"managed_size": managed[each["name"]]} if each["name"] in managed else {})} for each in FEATURES]
    return [{key: value for key, value in each.items() if value is not None} for each in changed]


def _make(folder: Path, name: str, features: list[dict[str, Any]], table: pa.Table) -> None:
    """`NAME.yaml` and the data set `NAME`."""
    raw = folder / f"{name}-raw"
    raw.mkdir()
    pq.write_table(table, raw / "rows.parquet")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(_config(features)))
    preprocess(parse_config(_config(features)).data, raw, folder / name)


def _train(folder: Path, name: str, out: str, *overrides: str, what: str = "train_file", **arguments: Any) -> Call:
    given = {"config_file": str(folder / f"{name}.yaml"), "data": str(folder / name), "out": str(folder / out)}
    return f"tests.training_calls:{what}", {**given, "overrides": list(overrides), **arguments}


def _ids(values: list[int]) -> list[int]:
    """What stands for whole numbers in a data set."""
    found: list[int] = (hash64(np.array(values, np.int64)) >> np.uint64(2)).astype(np.int64).tolist()
    return found


def _losses(run: Path) -> list[list[float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[value for name, value in record.items() if name.startswith("loss_")] for record in records]


def _last(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEPS}"


def _taken(run: Path) -> list[list[int]]:
    """How many rows values have, as each record says."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[record[f"managed_{table}"] for table in MANAGED] for record in records]


def _parts(stored: StoredTensors, end: str) -> list[StoredPart]:
    (name,) = (name for name in stored.shapes if name.endswith(end))
    return list(stored.parts(name))


def _rows(checkpoint: Path, table: str) -> dict[int, tuple[list[float], float]]:
    """Weights and state of the row of each value that has one."""
    stored = StoredTensors(checkpoint)

    def whole(end: str) -> Any:
        (name,) = (name for name in stored.shapes if name.endswith(end))
        found: Any = np.concatenate([np.array(part.values) for part in stored.parts(name)])
        return found

    values, places = (whole(f"_modules.{table}.{name}") for name in ("_mch_sorted_raw_ids", "_mch_remapped_ids_mapping"))
    (weights,) = (name for name in stored.shapes if name.startswith("model.") and name.endswith(f".embedding_bags.{table}.weight"))
    states = whole(f"{table}.momentum1")
    rows = whole(weights)
    assert len(np.unique(places)) == len(places) == len(rows)
    taken = values != FREE
    return {int(value): (rows[place].tolist(), float(states[place])) for value, place in zip(values[taken], places[taken], strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and runs of every test that only looks at them."""
    folder = tmp_path_factory.mktemp("managed")
    log = raw_table(1900, 1, users=USERS, labels=True)
    _make(folder, "log", FEATURES, log)
    _make(folder, "fitted", _without({"user": None, "tags": None}), log)
    _make(folder, "full", _without({"user": 60}), log)  # a step of 128 meets some 90 users
    _make(folder, "few", _without({"tags": 16}), log)
    small = {"training.checkpoint_every_steps": 5, "training.keep_checkpoints": 9}
    every = [f"{name}={value}" for name, value in small.items()]
    zero = "model.embedding_init_std=1e-30"
    resumed: dict[str, Any] = {"what": "train_until_told_file", "at_step": 4, "of_rank": 0}
    on = {
        1: [_train(folder, "log", "one", *every), _train(folder, "log", "zero", zero), _train(folder, "fitted", "fitted-run", zero)],
        2: [
            _train(folder, "log", "two", *every),
            _train(folder, "log", "again", *every, **resumed),
            _train(folder, "log", "again", *every, resume=True),
            _train(folder, "full", "full-run", *every),
            _train(folder, "full", "full-again", *every, **resumed),
            _train(folder, "full", "full-again", *every, resume=True),
            _train(folder, "log", "measured", *every, "training.evaluate_every_steps=2"),
            _train(folder, "log", "calibrated", "objective.propensity={calibration: platt, calibration_every_steps: 2}"),
        ],
        3: [_train(folder, "log", "three", *every), _train(folder, "few", "few-run")],
    }
    for ranks, calls in on.items():
        for result in run_ranks(ranks, calls, folder / f"ranks-{ranks}"):
            assert result.get("steps") in (STEPS, CALIBRATED_STEPS) or "stopped by SIGTERM after step 6" in result["message"], result
    return folder


def test_a_data_set_holds_hashes(folder: Path) -> None:
    """The top 62 bits of the documented hash, null where there is no value, end to end in lists; nothing is fitted."""
    table = pq.read_table(folder / "log" / "train")
    raw = {row["row"]: row for row in pq.read_table(folder / "log-raw").to_pylist()}
    schema = json.loads((folder / "log" / "schema.json").read_text())["features"]
    assert [(each["name"], each["encoding"], each["num_embeddings"]) for each in schema][:3:2] == [
        (name, "managed", size) for name, size in MANAGED.items()
    ]
    assert not (folder / "log" / "vocabulary" / "user.parquet").exists()
    seen = 0
    for row in table.to_pylist():
        user, tags = (raw[row["kept.row"]][name] for name in ("user", "tags"))
        assert row["user"] == (None if user is None else _ids([user])[0])
        assert np.frombuffer(row["tags"], np.int64).tolist() == _ids(tags)
        seen += 1
    assert seen > 1400


@pytest.mark.parametrize("ranks", ["two", "three"])
def test_any_number_of_ranks_takes_the_same_steps(folder: Path, ranks: str) -> None:
    one, other = _losses(folder / "one"), _losses(folder / ranks)
    assert len(one) == len(other) == STEPS
    assert np.abs(np.array(one) - np.array(other)).max() < 1e-5
    for table, size in (("user", USERS), ("tags", TAGS)):
        rows = [_rows(folder / run / "checkpoints" / f"step-{STEPS}", table) for run in ("one", ranks)]
        assert rows[0].keys() == rows[1].keys()
        assert 0.9 * size < len(rows[0]) <= size
        for value, (weights, state) in rows[0].items():
            assert rows[1][value][0] == pytest.approx(weights, abs=1e-5)
            assert rows[1][value][1] == pytest.approx(state, rel=1e-3)


def test_a_plan_made_before_is_followed(folder: Path, tmp_path: Path) -> None:
    """Managed tables by rows, whatever types are allowed: the steps are those of the run that planned for itself."""
    config, data = load_config(folder / "log.yaml"), Dataset.open(folder / "log")
    record = make_plan(request_of_config(config, data, parse_cluster("1x2:cpu-epyc-7763")))
    assert {name: record["tables"][name]["sharding_type"] for name in MANAGED} == dict.fromkeys(MANAGED, "row_wise")
    (tmp_path / "plan.json").write_text(json.dumps(record))
    out = str(tmp_path / "followed")
    run_ranks(2, [_train(folder, "log", out, f"training.plan={tmp_path / 'plan.json'}")], tmp_path / "ranks")
    planned = json.loads((tmp_path / "followed" / "plan.json").read_text())["tables"]
    assert {name: told["shards"] for name, told in planned.items() if told["sharding_type"] != "data_parallel"} == {
        name: told["shards"] for name, told in record["tables"].items() if told["sharding_type"] != "data_parallel"
    }
    assert np.allclose(_losses(tmp_path / "followed"), _losses(folder / "one"), atol=1e-5)
    moved = {**record["tables"]["user"], "sharding_type": "column_wise"}
    (tmp_path / "plan.json").write_text(json.dumps({**record, "tables": {**record["tables"], "user": moved}}))
    model = torch.nn.Module()
    model.embeddings = PooledEmbeddings(data.schema.tables, config.model.embedding_dim, torch.device("meta"))
    with pytest.raises(ConfigError, match="it is column_wise, and managed tables are always row_wise"):
        follow(tmp_path, model, 2, 2, "cpu")


def test_it_learns_what_a_vocabulary_of_all_values_learns(folder: Path) -> None:
    """Where all rows begin alike, which row a value has makes no difference: an independent way to the same numbers."""
    managed, fitted = _losses(folder / "zero"), _losses(folder / "fitted-run")
    assert np.abs(np.array(managed) - np.array(fitted)).max() < 1e-5
    assert np.ptp(np.array(fitted)[:, 0]) > 0.01, "it does learn"


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(folder: Path) -> None:
    """Also of a table that is full, whose rows go from value to value in every step."""
    for undisturbed, resumed in (("two", "again"), ("full-run", "full-again")):
        assert _losses(folder / resumed) == _losses(folder / undisturbed)
        for table in MANAGED:
            rows = [_rows(folder / run / "checkpoints" / f"step-{STEPS}", table) for run in (undisturbed, resumed)]
            assert rows[0] == rows[1]
    assert _taken(folder / "full-run")[-1][0] == 58, "all but one of each rank"


def test_measuring_and_calibrating_give_no_rows(folder: Path) -> None:
    """The validation split has values that training has not met yet, and is looked at between its steps."""
    assert _taken(folder / "calibrated") == _taken(folder / "two")
    assert _losses(folder / "measured") == _losses(folder / "two")
    assert _taken(folder / "measured") == _taken(folder / "two")


def test_records_say_how_many_rows_values_have(folder: Path) -> None:
    taken = _taken(folder / "one")
    assert taken == _taken(folder / "two") == _taken(folder / "three")
    assert sorted(taken) == taken, "none is given up"
    checkpoint = folder / "one" / "checkpoints" / f"step-{STEPS}"
    assert taken[-1] == [len(_rows(checkpoint, table)) for table in MANAGED]
    assert taken[0][0] < 128 < taken[-1][0]


def test_inspect_tells_of_a_managed_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = inspect(folder / "log", html=tmp_path / "page.html")["features"]
    assert {name: (told[name]["encoding"], told[name]["table_rows"]) for name in MANAGED} == {
        name: ("managed", size) for name, size in MANAGED.items()
    }
    assert 0.9 < told["user"]["coverage"]["train"] < 1
    assert told["tags"]["lengths"]["train"]["max"] == 3
    assert not {"values", "oov", "top"} & told["user"].keys()
    page = (tmp_path / "page.html").read_text()
    assert "categorical, managed" in page
    assert "list, managed" in page


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            pa.array([5] * 30 + [1 << 62] + [5] * 9, pa.int64()),
            f"row 30, column user: id {1 << 62} is out of range, hashes of values are below",
        ),
        (pa.array([5] * 30 + [-3] + [5] * 9, pa.int64()), "row 30, column user: id -3 is out of range"),
        (pa.array([5] * 40, pa.int32()), "column user: it is of type int32, expected int64"),
        (pa.array([5] * 40, pa.int64()), None),
    ],
)
def test_what_are_no_hashes_is_refused(folder: Path, ids: pa.Array, message: str | None) -> None:
    schema = Schema.load(folder / "log" / "schema.json")
    table = pq.read_table(folder / "log" / "train").slice(0, 40)
    table = table.set_column(table.column_names.index("user"), "user", ids)
    if message is None:
        assert decode(table, schema, labels=True, where="here").num_rows == 40
        return
    with pytest.raises(DataError, match=re.escape(message)):
        decode(table, schema, labels=True, where="here")


def test_a_run_goes_on_and_is_evaluated_and_scored_on_other_ranks(folder: Path) -> None:
    """From the checkpoint of two ranks, on one and on three: each value keeps its row, and what is predicted is the same."""
    found: dict[int, list[Any]] = {}
    for ranks in (1, 2, 3):
        name = f"on-{ranks}"
        shutil.copytree(folder / "two", folder / name)
        for step in (10, STEPS):
            shutil.rmtree(folder / name / "checkpoints" / f"step-{step}")
        (folder / name / "manifest.json").unlink()
        run = {"run": str(folder / "two"), "data": str(folder / "log")}
        score = {"run": str(folder / "two"), "inputs": [str(folder / "log-raw" / "rows.parquet")], "out": str(folder / f"scores-{ranks}")}
        calls = [
            _train(folder, "log", name, "training.checkpoint_every_steps=5", resume=True),
            ("tests.training_calls:evaluate_run", {**run, "split": "test"}),
            ("tests.training_calls:score_run", {**score, "keep": ["row"]}),
        ]
        trained, evaluated, scored = run_ranks(ranks, calls, folder / f"ranks-on-{ranks}")
        assert trained["steps"] == STEPS
        assert scored["rows"] == 1900
        assert np.abs(np.array(_losses(folder / name)) - np.array(_losses(folder / "two"))).max() < 1e-5
        (part,) = (folder / f"scores-{ranks}").rglob("*.parquet")
        scores = pq.read_table(part).sort_by("row")
        found[ranks] = [evaluated["metrics"], np.stack([scores[name] for name in ("p_ctr", "p_cvr", "p_ctcvr")])]
    for ranks in (1, 3):
        assert found[ranks][0] == pytest.approx(found[2][0], rel=1e-4, abs=1e-5)
        assert np.abs(found[ranks][1] - found[2][1]).max() < 1e-6


def test_a_full_table_predicts_alike_on_other_ranks(folder: Path) -> None:
    """Its steps met more values than there are rows: what they had in place of rows had gradients, on each rank others."""
    found = []
    (learned,) = (np.abs([part.values[-1] for part in _parts(StoredTensors(_last(folder / "few-run")), ".tags.weight")]).max(axis=1),)
    assert (learned > 0).all()
    for ranks in (1, 2):
        out = folder / f"scores-few-{ranks}"
        score = {"run": str(folder / "few-run"), "inputs": [str(folder / "log-raw" / "rows.parquet")], "out": str(out), "keep": ["row"]}
        run_ranks(ranks, [("tests.training_calls:score_run", score)], folder / f"ranks-few-{ranks}")
        (part,) = out.rglob("*.parquet")
        scores = pq.read_table(part).sort_by("row")
        found.append(np.stack([scores[name] for name in ("p_ctr", "p_cvr", "p_ctcvr")]))
    assert np.abs(found[0] - found[1]).max() < 1e-6


def test_a_warm_start_takes_the_rows_of_values(folder: Path) -> None:
    """Into tables of other sizes and on other ranks, bit for bit; a value that has none begins as any new one."""
    _make(folder, "grown", _without({"user": 900, "tags": 20}), raw_table(900, 2, users=2 * USERS, labels=True))
    begin = _train(folder, "grown", "begun", what="begin", warm_start=str(folder / "two"))
    alike = _train(folder, "log", "alike", what="begin", warm_start=str(folder / "two"))
    later = _train(folder, "grown", "later", warm_start=str(folder / "two"))
    few = _train(folder, "few", "few-begun", what="begin", warm_start=str(folder / "few-run"))
    for ranks, calls in ((1, [begin, alike, few]), (3, [later])):
        run_ranks(ranks, calls, folder / f"ranks-warm-{ranks}")
    source = {table: _rows(folder / "two" / "checkpoints" / f"step-{STEPS}", table) for table in MANAGED}
    begun = {table: _rows(folder / "begun" / "beginning", table) for table in MANAGED}
    assert begun["user"] == source["user"]
    assert len(begun["tags"]) == 19 < len(source["tags"]), "as many as fit, beside the row of values without one"
    assert begun["tags"].items() <= {value: row for value, row in source["tags"].items()}.items()
    assert {table: _rows(folder / "alike" / "beginning", table) for table in MANAGED} == source, "of equal sizes too"
    assert not [name for name in json.loads((folder / "alike" / "warm_start.json").read_text())["dense"] if "managed" in name]
    (count,) = _parts(StoredTensors(folder / "few-begun" / "beginning"), "modules.tags._current_iter_tensor")
    assert count.values == [STEPS], "what is met next is met after what was"
    for run in ("begun", "later"):
        told = json.loads((folder / run / "warm_start.json").read_text())["tables"]
        assert told["user"] == {
            "rows": 900,
            "matched": len(source["user"]),
            "new": 900 - len(source["user"]),
            "left": 400 - len(source["user"]),
        }
    assert len(_rows(folder / "later" / "checkpoints" / "step-6", "user")) > len(source["user"])


def test_ranks_without_room_lose_the_values_met_the_longest_ago(folder: Path, tmp_path: Path) -> None:
    """One rank had room for all; each of three has for its range of the hashes, and users fall into those unevenly."""
    _make(tmp_path, "tight", _without({"user": USERS + 1, "tags": None}), raw_table(1900, 1, users=USERS, labels=True))
    every = "training.checkpoint_every_steps=6"
    stop = _train(tmp_path, "tight", "run", every, what="train_until_told_file", at_step=4, of_rank=0)
    run_ranks(1, [stop], tmp_path / "first")
    before = _rows(tmp_path / "run" / "checkpoints" / "step-6", "user")
    run_ranks(3, [_train(tmp_path, "tight", "run", every, resume=True)], tmp_path / "then")
    said = (tmp_path / "then" / "stderr").read_text()
    ranges = np.bincount(np.array(list(before)) // -(-(1 << 62) // 3), minlength=3)
    lost = int(np.maximum(ranges - 66, 0).sum())
    assert lost > 0
    counted = re.findall(r"managed table 'user': (\d+) values that have a row in \S+step-6 find none", said)
    assert sum(map(int, counted)) == lost, said


def test_rows_that_lie_alike_on_other_ranks_are_of_other_values(folder: Path) -> None:
    """The last of 16 rows on three ranks is that of 16 on four."""
    stored = StoredTensors(folder / "few-run" / "checkpoints" / f"step-{STEPS}")
    every = ValueRows(16, torch.device("cpu"), LRU_EvictionPolicy(), 1, MANAGED_IDS)
    three, four = (every.rebuild_with_output_id_range((12, 16), starts) for starts in ([0, 6, 12, 16], [0, 4, 8, 12, 16]))
    assert dealt_alike(stored, "tags", three)
    assert not dealt_alike(stored, "tags", four)


# --- one collection, step by step -----------------------------------------------------------------

DIM, ROWS, META = 4, 6, torch.device("meta")
FEATURE = Feature(name="user", kind="list", column="user", value_type="int64", encoding="managed", num_embeddings=ROWS)


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = PooledEmbeddings([FEATURE], DIM, META)

    def forward(self, batch: Batch) -> Tensor:
        pooled: Tensor = self.embeddings(batch)[0].to_dict()["user"]
        return pooled


def _batch(values: list[list[int]]) -> Batch:
    flat, lengths = torch.tensor(list(chain.from_iterable(values)), dtype=torch.int64), torch.tensor([len(each) for each in values])
    keyed = KeyedJaggedTensor(["user"], flat, lengths=lengths)
    none = torch.zeros(len(values))
    return Batch(None, None, torch.zeros(len(values), 0), none, none, none, len(values), managed_features=keyed)


class _World:
    """One rank's collection of one table of `ROWS` rows."""

    def __init__(self, runtime: Runtime, optimizer: str = "adagrad") -> None:
        settings = {"seed": 3, "init_std": 0.1, "optimizer": optimizer, "learning_rate": 0.5, "local_batch_size": 4, "forced": {}}
        self.model = shard_model(_Model(), ["user"], runtime, **settings, in_bfloat16=False).module  # type: ignore[arg-type]
        (self.tables,), self.device = sharded_managed(self.model), runtime.device
        ((_, self.rows),) = self.tables.values()

    def step(self, *values: list[int]) -> Tensor:
        """A step that trains, towards larger numbers; what it looked up before."""
        found: Tensor = self.model(_batch(list(values)).to(self.device))
        torch.autograd.backward(found.sum())
        return found.detach().clone().cpu()

    def look(self, *values: list[int]) -> Tensor:
        """The same where nothing trains."""
        self.model.eval()
        with torch.no_grad():
            found: Tensor = self.model(_batch(list(values)).to(self.device))
        self.model.train()
        return found.clone().cpu()

    def begins(self, *values: int) -> Tensor:
        return initial_rows(torch.tensor(values), "user", 3, 0.1, DIM)

    def held(self) -> set[int]:
        return {int(value) for value in self.rows._mch_sorted_raw_ids if value != FREE}


@pytest.mark.parametrize(("ranks", "message"), [(4, "leave rank 3 0"), (6, "leave rank 0 1, and it needs 2"), (3, None)])
def test_a_rank_without_a_row_for_values_is_refused(ranks: int, message: str | None) -> None:
    plan = partial(plan_tables, _Model(), ["user"], {}, ranks, ranks, "cpu", 1 << 30, 4)
    if message is None:
        plan()
        return
    with pytest.raises(ConfigError, match=rf"the 6 rows \(managed_size\) of table 'user', cut over {ranks} ranks, {message}"):
        plan()


def test_a_plan_has_room_for_the_values_of_the_rows() -> None:
    """Of 10 M rows of 16 bytes on two ranks, 24 bytes a row more."""
    model = torch.nn.ModuleDict({"embeddings": PooledEmbeddings([FEATURE.model_copy(update={"num_embeddings": 10**7})], DIM, META)})
    plan_tables(model, ["user"], {}, 2, 2, "cpu", 220_000_000, 4)
    with pytest.raises(RunError, match="no sharding plan fits 2"):
        plan_tables(model, ["user"], {}, 2, 2, "cpu", 180_000_000, 4)


@pytest.fixture
def world() -> Iterator[_World]:
    with distributed_runtime() as runtime:
        yield _World(runtime)


def test_rows_begin_by_their_value_and_go_to_the_values_met_last(world: _World) -> None:
    assert torch.equal(world.look([11], [12]), torch.zeros(2, DIM)), "nothing where nothing trains: no row is given"
    assert world.held() == set()
    first = world.step([11], [12, 13], [])
    assert torch.equal(first[0], world.begins(11)[0])
    assert torch.allclose(first[1], world.begins(12, 13).sum(dim=0))
    assert torch.equal(first[2], torch.zeros(DIM))
    assert world.held() == {11, 12, 13}
    assert not torch.equal(world.look([11])[0], world.begins(11)[0]), "it was stepped"
    assert torch.equal(world.look([14])[0], torch.zeros(DIM)), "what training never met"
    world.step([14], [15], [12])
    assert world.held() == {11, 12, 13, 14, 15}, "five and the row of the rest"
    learned = world.look([12], [14], [15])
    assert torch.equal(world.step([16], [17])[0], world.begins(16)[0]), "a row that was another's begins anew"
    assert world.held() == {12, 14, 15, 16, 17}, "11 and 13 were met the longest ago"
    assert torch.equal(world.look([12], [14], [15]), learned)
    assert torch.equal(world.look([11])[0], torch.zeros(DIM))
    assert torch.equal(world.step([11])[0], world.begins(11)[0]), "and nothing of what it was is left"
    (state,) = world.tables._table_to_tbe_and_index["user"][0].split_optimizer_states()[0]
    place = torch.searchsorted(world.rows._mch_sorted_raw_ids, torch.tensor(11, device=world.device))
    assert torch.equal(state[world.rows._mch_remapped_ids_mapping[place]].cpu(), torch.ones(DIM)), "the square of its one gradient"


def test_a_step_with_more_values_than_rows_gives_what_it_has(world: _World) -> None:
    found = world.step([1], [2], [3], [4], [5], [6], [7], [7])
    held = world.held()
    assert len(held) == ROWS - 1
    assert 7 in held, "the most frequent first"
    for place, value in enumerate([1, 2, 3, 4, 5, 6, 7, 7]):
        want = world.begins(value)[0] if value in held else torch.zeros(DIM)
        assert torch.equal(found[place], want), value


def test_a_larger_step_than_the_first_gives_rows_too(world: _World) -> None:
    """TorchRec's own buffer has room for a quarter more values than the first step had."""
    world.step([1])
    world.step([2], [3], [4], [5])
    assert world.held() == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_rows_begin_anew_whatever_steps_them(optimizer: str) -> None:
    with distributed_runtime() as runtime:
        world = _World(runtime, optimizer)
        for value in (*range(2 * ROWS), 0):
            assert torch.equal(world.step([value])[0], world.begins(value)[0])


def test_steps_that_calibrate_give_no_rows(world: _World) -> None:
    world.rows.gives = False
    assert torch.equal(world.step([1]), torch.zeros(1, DIM))
    assert world.held() == set()


@pytest.mark.parametrize("rows", [4, 13, 70])
def test_values_are_chosen_by_the_rule_of_torchrec(rows: int) -> None:
    """Its own module, given the same steps, keeps the same values at every step, met in the same."""
    cpu, draws = torch.device("cpu"), torch.Generator().manual_seed(rows)
    ours, theirs = (kind(rows, cpu, LRU_EvictionPolicy(), 1, 1 << 62, buckets=1) for kind in (ValueRows, MCHManagedCollisionModule))
    given_up = 0
    for _ in range(60):
        values = (60 * torch.rand(20, generator=draws) ** 2).long() + 100
        before = set(ours._mch_sorted_raw_ids.tolist())
        found = [each({"table": JaggedTensor(values, lengths=torch.ones(20, dtype=torch.int32))})["table"] for each in (ours, theirs)]
        assert torch.equal(ours._mch_sorted_raw_ids, theirs._mch_sorted_raw_ids)
        taken = int(ours.num_taken())
        assert torch.equal(ours._mch_last_access_iter[:taken], theirs._mch_last_access_iter[:taken])
        assert torch.equal(*(each.values() == rows - 1 for each in found)), "the same have none"
        given_up += len(before - set(ours._mch_sorted_raw_ids.tolist()) - {FREE})
        for each in (ours, theirs):
            each.evict()
    assert given_up > 60 if rows < 60 else given_up == 0

"""The config: checked whole, every problem with its place and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from escm2rec.config import Config, load_config, load_simulation, parse_config
from escm2rec.errors import ConfigError

ROOT = Path(__file__).parents[1]


def tree(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "source": {"kind": "table"},
        "features": [{"name": "user", "kind": "categorical"}, {"name": "price", "kind": "numeric"}],
        "split": {"by": "hash", "train": 0.9, "test": 0.1},
    }
    return {"data": {**data, **changes.pop("data", {})}, **changes}


WINDOWS = {"key": "id", "time": "ts", "click_window_s": 1, "conversion_window_s": 1}

# Of each: what is changed, and the line that says what is wrong with it.
PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"training": {"epoch": 2}}, "training.epoch: unknown key; did you mean 'epochs'?"),
    "unknown section": ({"trainig": {}}, "trainig: unknown key; did you mean 'training'?"),
    "unknown key without a like": ({"zzzzzz": 1}, "zzzzzz: unknown key"),
    "wrong type": (
        {"training": {"epochs": "many"}},
        'training.epochs: Input should be a valid integer, unable to parse string as an integer (got "many")',
    ),
    "out of range": ({"objective": {"lambda_c": -1}}, "objective.lambda_c: Input should be greater than or equal to 0 (got -1)"),
    "unknown objective": (
        {"objective": {"kind": "escm3"}},
        "objective.kind: unknown kind 'escm3'; did you mean 'esmm'? known: esmm, naive, naive+ctcvr, direct, multi-ipw, multi-dr, ",
    ),
    "a ramp that ends never": (
        {"objective": {"lambda_c": {"start": 0, "end": 1, "until": 2}}},
        "objective.lambda_c.until: Input should be less than or equal to 1 (got 2)",
    ),
    "a weight of another kind": (
        {"objective": {"lambda_g": "adaptive"}},
        'objective.lambda_g: takes a number, a ramp {start: 0, end: 1, until: 0.5}, or learned (got "adaptive")',
    ),
    "no negative kept": ({"data": {"negative_keep_rate": 0}}, "data.negative_keep_rate: Input should be greater than 0 (got 0)"),
    "more negatives than there are": (
        {"data": {"negative_keep_rate": 10}},
        "data.negative_keep_rate: Input should be less than or equal to 1 (got 10)",
    ),
    "missing": ({"data": {"features": [{"name": "user"}]}}, "data.features.0.kind: required, missing"),
    "reserved name": ({"data": {"features": [{"name": "click", "kind": "numeric"}]}}, "data.features.0: 'click' is a reserved column"),
    "twice the same name": (
        {"data": {"features": [{"name": "a", "kind": "numeric"}] * 2}},
        "data: feature names must be unique, found twice: a",
    ),
    "no table": (
        {"data": {"features": [{"name": "a", "kind": "numeric"}]}},
        "config: data.features: at least one must have a table, all are of kind numeric",
    ),
    "a table's key on a number": (
        {"data": {"features": [{"name": "a", "kind": "numeric", "min_count": 3}]}},
        "data.features.0: min_count has no effect on kind numeric",
    ),
    "log1p of ids": (
        {"data": {"features": [{"name": "a", "kind": "list", "log1p": True}]}},
        "data.features.0: log1p is for kind numeric only",
    ),
    "boundaries out of order": (
        {"data": {"split": {"by": "time", "column": "ts", "validation_from": "2026-01-03", "test_from": "2026-01-02"}}},
        "data.split: validation_from must be before test_from, 2026-01-03 is not before 2026-01-02",
    ),
    "a boundary in text, one in numbers": (
        {"data": {"split": {"by": "time", "column": "ts", "validation_from": 3, "test_from": "2026-01-02"}}},
        "data.split: validation_from and test_from are both ISO text, or both numbers",
    ),
    "a boundary that is no time": (
        {"data": {"split": {"by": "time", "column": "ts", "test_from": "last week"}}},
        'data.split.test_from: takes an ISO date or time, such as 2026-01-31 or 2026-01-31T12:00:00+01:00, or a number (got "last week")',
    ),
    "a boundary that is a list": (
        {"data": {"split": {"by": "time", "column": "ts", "test_from": [1]}}},
        "data.split.test_from: takes an ISO date or time, such as 2026-01-31, or a number (got [1])",
    ),
    "a window of nothing": (
        {"data": {"source": {"kind": "events", **WINDOWS, "click_window_s": 0}}},
        "data.source.click_window_s: Input should be greater than 0 (got 0)",
    ),
    "a key that is no name": (
        {"data": {"source": {"kind": "events", **WINDOWS, "key": 3}}},
        "data.source.key: takes a column name, or one a table: {impressions: a, clicks: b, conversions: c} (got 3)",
    ),
    "a time for two tables": (
        {"data": {"source": {"kind": "events", **WINDOWS, "time": {"impressions": "a", "clicks": "b"}}}},
        "data.source.time.conversions: required, missing",
    ),
    "conversions that find no impression": (
        {"data": {"source": {"kind": "events", **WINDOWS, "key": {"impressions": "a", "clicks": "b", "conversions": None}}}},
        "data.source: conversions without a key (key.conversions: null) need an attribution_key, such as [user_id, item_id]",
    ),
    "an attribution column twice": (
        {"data": {"source": {"kind": "events", **WINDOWS, "attribution_key": ["user", "user"]}}},
        "data.source: attribution_key names a column twice: user",
    ),
    "hash and vocabulary": (
        {"data": {"features": [{"name": "a", "kind": "list", "hash_size": 9, "min_count": 2}]}},
        "data.features.0: hash_size excludes min_count and max_size",
    ),
    "managed and vocabulary": (
        {"data": {"features": [{"name": "a", "kind": "list", "managed_size": 9, "min_count": 2}]}},
        "data.features.0: managed_size excludes min_count: its rows are given away in training, without a vocabulary",
    ),
    "managed and hash": (
        {"data": {"features": [{"name": "a", "kind": "list", "managed_size": 9, "hash_size": 9}]}},
        "data.features.0: managed_size excludes hash_size",
    ),
    "managed with weights": (
        {"data": {"features": [{"name": "a", "kind": "weighted_list", "weights_column": "w", "managed_size": 9}]}},
        "data.features.0: managed_size is for kind categorical and list only",
    ),
    "managed number": (
        {"data": {"features": [{"name": "a", "kind": "numeric", "buckets": 9, "managed_size": 9}]}},
        "data.features.0: managed_size has no effect on kind numeric, which has no vocabulary",
    ),
    "managed table by columns": (
        {
            "data": {"features": [{"name": "a", "kind": "list", "managed_size": 9}]},
            "training": {"sharding": {"*": "row_wise", "a": "column_wise"}},
        },
        "config: training.sharding: column_wise does not go with the managed table 'a', which is always row_wise: leave it out",
    ),
    "weights of a list": (
        {"data": {"features": [{"name": "a", "kind": "list", "weights_column": "w"}]}},
        "data.features.0: weights_column is for kind weighted_list only",
    ),
    "weights column of aliccp": (
        {"data": {"source": {"kind": "aliccp"}, "features": [{"name": "a", "kind": "weighted_list", "weights_column": "w"}]}},
        "data: feature 'a': weights_column is for table sources; aliccp columns bring their own values",
    ),
    "a matrix split by hash": (
        {"data": {"source": {"kind": "matrix"}, "keep": ["user"]}},
        "data: a matrix source brings its own test set: split: { by: file, train: train.ascii, test: test.ascii }, with validation_share",
    ),
    "a matrix without its user": (
        {"data": {"source": {"kind": "matrix"}, "split": {"by": "file", "train": "train.ascii", "test": "test.ascii"}}},
        "data: a matrix source needs user under keep: its test ratings are ranked by user",
    ),
    "one name for two matrices": (
        {"data": {"source": {"kind": "matrix", "train": "a/ratings", "test": "b/ratings"}}},
        "data.source: train and test are both named 'ratings': splits go by name, give them two",
    ),
    "two kinds of validation": (
        {"data": {"split": {"by": "file", "train": "a*", "validation": "b*", "validation_share": 0.1}}},
        "data.split: validation and validation_share exclude each other",
    ),
    "two stars": (
        {"data": {"source": {"kind": "aliccp", "skeleton": "*_*.csv"}}},
        "data.source: skeleton pattern '*_*.csv' must hold exactly one *",
    ),
    "a feature that is the label": (
        {"data": {"features": [{"name": "a", "kind": "categorical", "column": "conversion"}]}},
        "data: feature 'a' reads column 'conversion', which is data.source.conversion: a model would learn from what is to be predicted",
    ),
    "a label in a cross": (
        {"data": {"source": {"kind": "table", "click": "c"}, "features": [{"name": "a", "kind": "categorical", "cross": ["b", "c"]}]}},
        "data: feature 'a' reads column 'c', which is data.source.click",
    ),
    "the known truth as a number": (
        {
            "data": {
                "source": {"kind": "table", "true_propensity": "p", "true_cvr": "r"},
                "features": [{"name": "a", "kind": "numeric", "column": "r"}],
            }
        },
        "data: feature 'a' reads column 'r', which is data.source.true_cvr",
    ),
    "the weight of rows as weights": (
        {
            "data": {
                "source": {"kind": "events", **WINDOWS, "weight": "w"},
                "features": [{"name": "a", "kind": "weighted_list", "weights_column": "w"}],
            }
        },
        "data: feature 'a' reads column 'w', which is data.source.weight",
    ),
    "half a truth": (
        {"data": {"source": {"kind": "table", "true_cvr": "r"}}},
        "data.source: true_propensity and true_cvr go together: name both, or none",
    ),
    "a value in two splits": (
        {"data": {"split": {"by": "column", "column": "s", "train": ["a", "b"], "test": ["b"]}}},
        "data.split: a value belongs to one split, found twice: b",
    ),
    "an experiment of nothing": (
        {"training": {"mlflow_experiment": "shoes"}},
        "training: mlflow_experiment needs mlflow, the tracking URI: nothing is logged there without it",
    ),
    "a password in an address": (
        {"training": {"mlflow": "https://me:secret@host:5000"}},
        "training: mlflow holds a user or password, and would be kept in RUN/config.json: give them by the environment",
    ),
    "best of nothing": (
        {"training": {"keep_best": "ctr_auc"}},
        "training: keep_best needs evaluate_every_steps: nothing is measured without it",
    ),
    "stopping by nothing": (
        {"training": {"evaluate_every_steps": 10, "early_stopping": 2}},
        "training: early_stopping needs keep_best, which says what better is",
    ),
    "measured amid a step": (
        {"training": {"evaluate_every_steps": 10, "gradient_accumulation_steps": 4}},
        "training: evaluate_every_steps (10) must be a multiple of gradient_accumulation_steps (4): between two",
    ),
    "infinite": ({"training": {"dense_learning_rate": float("inf")}}, "training.dense_learning_rate: Input should be a finite number"),
    "no width": ({"model": {"tower_hidden": [8, 0]}}, "model.tower_hidden.1: Input should be greater than or equal to 1 (got 0)"),
    "unknown backbone": (
        {"model": {"backbone": {"kind": "mmeo"}}},
        "model.backbone.kind: unknown kind 'mmeo'; did you mean 'mmoe'? known: shared_bottom, mmoe, ple, dcn_v2",
    ),
    "unknown source": (
        {"data": {"source": {"kind": "jsonl"}}},
        "data.source.kind: unknown kind 'jsonl'; known: aliccp, table, matrix",
    ),
    "unknown split": (
        {"data": {"split": {"by": "hsah"}}},
        "data.split.by: unknown value 'hsah'; did you mean 'hash'? known: file, column, hash",
    ),
    "split of a kind": ({"data": {"split": {"kind": "hash"}}}, "data.split.by: required, missing"),
    "unknown word": (
        {"objective": {"propensity": {"calibration": False}}},  # what YAML reads for `off`
        "objective.propensity.calibration: unknown value False; known: none, temperature, platt",
    ),
    "no level": (
        {"model": {"backbone": {"kind": "ple", "levels": 0}}},
        "model.backbone.levels: Input should be greater than or equal to 1 (got 0)",
    ),
    "another backbone's key": (
        {"model": {"backbone": {"kind": "ple", "experts": 4}}},
        "model.backbone.experts: unknown key; did you mean 'task_experts'?",
    ),
    "experts without layers": (
        {"model": {"backbone": {"kind": "ple", "hidden": []}}},
        "model.backbone.hidden: List should have at least 1 item",
    ),
    "no cross layer": (
        {"model": {"backbone": {"kind": "dcn_v2", "cross_layers": 0}}},
        "model.backbone.cross_layers: Input should be greater than or equal to 1 (got 0)",
    ),
    "experts of full rank": (
        {"model": {"backbone": {"kind": "dcn_v2", "experts": 2}}},
        "model.backbone: experts: 2 needs a rank, for example rank: 32, or experts: 1",
    ),
    "beyond int32": (
        {"data": {"features": [{"name": "a", "kind": "list", "hash_size": 2**31}]}},
        "data.features.0.hash_size: Input should be less than or equal to 2147483647",
    ),
    "shares": ({"data": {"split": {"by": "hash", "train": 0.5}}}, "data.split: train + validation + test must be 1, is 0.5"),
    "sharding of no table": (
        {"training": {"sharding": {"usr": "row_wise"}}},
        "config: training.sharding names no table 'usr'; did you mean 'user'?",
    ),
    "whole tables by adam": (
        {"training": {"sharding": {"*": "data_parallel"}, "sparse_optimizer": "adam"}},
        "training: sharding: data_parallel does not go with sparse_optimizer: adam, which moves the rows that a batch looked up",
    ),
    "sharding of a number": ({"training": {"sharding": {"price": "row_wise"}}}, "config: training.sharding names no table 'price'"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_problem_is_told_with_its_place(case: str) -> None:
    change, line = PROBLEMS[case]
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**change), where="c.yaml")
    heading, *lines = caught.value.message.splitlines()
    assert heading == "c.yaml has 1 problem(s):"
    assert lines[0].startswith(f"  {line}")
    assert caught.value.hint == "escm2rec config schema prints every key and what it takes"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(training={"epochs": 0, "sed": 1}, model={"embedding_dim": 3}))
    assert caught.value.message.splitlines()[0] == "config has 3 problem(s):"
    assert len(caught.value.message.splitlines()) == 4


FILES: dict[str, tuple[str | bytes | None, str]] = {
    "absent": (None, "no config file at"),
    "no YAML": ("data: [", "is not valid YAML"),
    "a date that is none": ("data: {split: {test_from: 2026-02-30}}", "is not valid YAML: day .*\nhint: .*, and dates"),
    "a list": ("- data", "must hold a mapping with the key 'data', found list"),
    "no text": (b"\xff\xfe\xff", "cannot read config"),
    "an object": ("data: !!python/object/apply:os.getcwd []", "is not valid YAML"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, case: str) -> None:
    content, message = FILES[case]
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_overrides_are_yaml() -> None:
    overrides = ["training.epochs=3", "model.tower_hidden=[8, 4]", "training.sharding={'*': row_wise}", "objective.ctcvr_detach_ctr=null"]
    config = parse_config(tree(), overrides)
    assert (config.training.epochs, config.model.tower_hidden, config.training.sharding) == (3, [8, 4], {"*": "row_wise"})
    assert config.objective.ctcvr_detach_ctr is None


OVERRIDES = {
    "training.epochs": "--set takes a.b=value, got 'training.epochs'",
    "=3": "--set takes a.b=value, got '=3'",
    "data.features.0.kind=list": "'features' is not a section|'0' is not a section",
    "training.epochs=[": r"--set training\.epochs: '\[' is not valid YAML",
    "data.split.test_from=2026-13-01": r"'2026-13-01' is no date: month must be in 1\.\.12\nhint: give one that exists",
    "training.epoch=3": r"training\.epoch: unknown key; did you mean 'epochs'",
}


@pytest.mark.parametrize("kind", ["shared_bottom", "mmoe", "ple", "dcn_v2"])
def test_every_backbone_has_defaults(kind: str) -> None:
    config = parse_config(tree(model={"backbone": {"kind": kind}}))
    assert config.model.backbone.kind == kind
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_is_told(override: str) -> None:
    with pytest.raises(ConfigError, match=OVERRIDES[override]):
        parse_config(tree(), [override])


def test_what_an_override_brought_is_told_as_set() -> None:
    """Not blamed on the file, nor the other way round."""
    wrong = {"model": {"backbone": {"kind": "mmeo"}}}
    cases: list[tuple[dict[str, Any], list[str], list[str]]] = [
        ({}, ["training.epoch=3"], ["--set has 1 problem(s):", "  --set training.epoch: unknown key"]),
        ({}, ["model.backbone={kind: ple, levels: 0}"], ["--set has 1 problem(s):", "  --set model.backbone.levels: Input should be"]),
        (wrong, ["training.epochs=3"], ["c.yaml with its --set has 1 problem(s):", "  model.backbone.kind: unknown kind"]),
        (
            wrong,
            ["training.epochs=0"],
            ["c.yaml with its --set has 2 problem(s):", "  model.backbone.kind: unknown kind", "  --set training.epochs: Input should be"],
        ),
        ({}, ["objctive.kind=esmm"], ["--set has 1 problem(s):", "  --set objctive: unknown key; did you mean 'objective'?"]),
        (
            {},
            ["objective=esmm"],
            ["--set has 1 problem(s):", '  --set objective: takes a section of keys, such as {kind: esmm}, got "esmm"'],
        ),
        (
            {},
            ["model.backbone=mmoe"],
            ["--set has 1 problem(s):", '  --set model.backbone: takes a section of keys, such as {kind: mmoe}, got "mmoe"'],
        ),
        ({}, ["objective=banana"], ["--set has 1 problem(s):", "  --set objective: takes a section of keys with kind: esmm, naive, "]),
        (
            {},
            ["data.split=hash"],
            ["--set has 1 problem(s):", '  --set data.split: takes a section of keys, such as {by: hash}, got "hash"'],
        ),
        (
            {},
            ["choice.objectives=[escm2-ip]"],
            ["--set has 1 problem(s):", "  --set choice.objectives.0: takes a section of keys, such as {kind: escm2-ips}, got"],
        ),
        ({}, ["data.features=user"], ["--set has 1 problem(s):", '  --set data.features: takes a list, such as [user], got "user"']),
        (
            {},
            ["objective.imputation.predicts=null"],
            ["--set has 1 problem(s):", "  --set objective.imputation.predicts: unknown value null; known: "],
        ),
        ({}, ["training=[3]"], ["--set has 1 problem(s):", "  --set training: takes a section of keys, got [3]"]),
        ({}, ["data.split.train=0.5"], ["c.yaml with its --set has 1 problem(s):", "  data.split: train + validation + test must be 1"]),
    ]
    for changes, overrides, expected in cases:
        with pytest.raises(ConfigError) as caught:
            parse_config(tree(**changes), overrides, where="c.yaml")
        lines = caught.value.message.splitlines()
        assert len(lines) == len(expected)
        assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


def test_a_complete_config_reads_back_as_itself() -> None:
    config = parse_config(tree(objective={"kind": "escm2-ips"}, model={"backbone": {"kind": "mmoe"}}))
    assert parse_config(config.model_dump(mode="json")) == config


def test_simulate_needs_no_config() -> None:
    assert load_simulation(None, ["simulation.ctr=0.2"]).ctr == 0.2
    assert (load_simulation(None).ctr, load_simulation(None).cvr) == (0.04, 0.005)
    with pytest.raises(ConfigError, match=r"--set training\.\.\. has no effect on simulate without --config"):
        load_simulation(None, ["training.epochs=3"])
    with pytest.raises(ConfigError, match=r"simulation\.ctr: Input should be less than 1"):
        load_simulation(None, ["simulation.ctr=2"])


def test_every_config_in_data_is_valid() -> None:
    files = sorted((ROOT / "data").glob("*.yaml"))
    assert [file.stem for file in files] == ["aliccp", "aliexpress", "coat", "demo", "events", "hillstrom", "simulated"]
    for file in files:
        assert len(load_config(file).data.features) > 3


def test_every_field_is_described() -> None:
    schema = Config.model_json_schema()
    sections = {"Config": schema, **schema["$defs"]}
    fields = [(name, field, spec) for name, section in sections.items() for field, spec in section.get("properties", {}).items()]
    assert len(fields) > 60
    assert [
        f"{name}.{field}" for name, field, spec in fields if not {"description", "$ref"} & spec.keys() and field not in ("kind", "by")
    ] == []

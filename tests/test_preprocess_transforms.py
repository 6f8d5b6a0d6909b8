"""Clipped numbers, quantile buckets, crosses and cut lists: against plain Python, fitted on training rows, the same in score."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from escm2rec.cells import with_lists
from escm2rec.config import DataConfig, FeatureConfig, parse_config
from escm2rec.errors import ConfigError, DataError
from escm2rec.inspection.inspect import inspect
from escm2rec.models.embeddings import PooledEmbeddings
from escm2rec.preprocess import encode_raw, pipeline, portions, preprocess, raw_files, read, value_counts
from escm2rec.preprocess.buckets import Buckets, count_numbers, fit_boundaries, keys_of, numbers_of
from escm2rec.preprocess.ragged import Ragged, offsets_of
from escm2rec.preprocess.stable_hash import cross_hash
from escm2rec.preprocess.value_counts import ValueCounter
from escm2rec.reader.columns import Slice, assemble, decode
from escm2rec.schema import Schema
from escm2rec.training.build import BaseRates, build_model
from tests.preprocess_logs import aliccp_config, common_line, key, made, skeleton_line, table_config, values_of, write_aliccp, write_parquet

MEMORY = 1 << 30
NUMBERS = st.lists(st.floats(-1e30, 1e30, width=64) | st.integers(-3, 3).map(float) | st.just(-0.0) | st.just(math.nan), max_size=40)
BY_FILE = {"by": "file", "train": "*train*", "test": "*test*"}
ROOT = Path(__file__).parents[1]


def quantile_boundaries(numbers: list[float], buckets: int) -> list[float]:
    """The same by sorting everything."""
    held = sorted(number for number in numbers if not math.isnan(number))
    found = {held[-(-k * len(held) // buckets) - 1] for k in range(1, buckets)} if held else set()
    return sorted(each for each in found if each < held[-1])


@settings(max_examples=150, deadline=None)
@given(numbers=NUMBERS)
def test_keys_have_the_order_of_numbers(numbers: list[float]) -> None:
    floats = np.array([number for number in numbers if not math.isnan(number)])
    keys = keys_of(floats)
    assert np.array_equal(numbers_of(keys), floats)
    assert np.array_equal(floats[:, None] < floats, keys[:, None] < keys)


@settings(max_examples=80, deadline=None)
@given(blocks=st.lists(NUMBERS, min_size=1, max_size=4), buckets=st.integers(2, 12), in_memory=st.booleans())
def test_boundaries_are_the_quantiles(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[list[float]], buckets: int, in_memory: bool
) -> None:
    """Also when they come from disk, one row of counts a table."""
    counter = ValueCounter("n", tmp_path_factory.mktemp("counts"))
    with pytest.MonkeyPatch.context() as patch:
        if not in_memory:
            patch.setattr(value_counts, "IN_MEMORY_ROWS", 0)
            patch.setattr(value_counts, "TABLE_ROWS", 1)
        for block in blocks:
            counter.add(count_numbers(np.array(block)))
            if not in_memory and any(not math.isnan(number) for number in block):
                counter.spill()
        found = fit_boundaries(counter, buckets, MEMORY)
    numbers = [number for block in blocks for number in block]
    assert found == quantile_boundaries(numbers, buckets)
    rows = Buckets(found).rows(np.array(numbers))
    assert rows.tolist() == [-1 if math.isnan(number) else sum(each < number for each in found) for number in numbers]
    if any(not math.isnan(number) for number in numbers):
        assert set(rows[rows >= 0].tolist()) == set(range(len(found) + 1)), "no bucket is empty in training"


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6),
    most=st.integers(1, 4),
    keeps=st.sampled_from(["first", "last"]),
    text=st.booleans(),
)
def test_lists_are_cut_as_slices_are(rows: list[list[int]], most: int, keeps: Any, text: bool) -> None:
    flat = [value for row in rows for value in row]
    values = pa.array([str(value) for value in flat], pa.large_string()) if text else np.array(flat, np.int64)
    weights = np.arange(len(flat)) / 2
    cut = Ragged(values, offsets_of(np.array([len(row) for row in rows], np.int64)), weights).cut(most, keeps)
    expected = [row[:most] if keeps == "first" else row[-most:] for row in rows]
    assert [int(value) for value in cut.values.tolist()] == [value for row in expected for value in row]
    assert cut.lengths.tolist() == [len(row) for row in expected]
    assert cut.weights is not None
    assert [flat[int(2 * weight)] for weight in cut.weights] == [value for row in expected for value in row]


# --- whole data sets ----------------------------------------------------------------------------

TRANSFORMED: list[dict[str, Any]] = [
    {"name": "price", "kind": "numeric", "clip": [0, 50], "log1p": True},
    {"name": "price_bucket", "kind": "numeric", "column": "price", "buckets": 7},
    {"name": "both", "kind": "categorical", "cross": ["user", "shop"], "min_count": 2},
    {"name": "three", "kind": "categorical", "cross": ["shop", "user", "day"], "hash_size": 50},
    {"name": "early", "kind": "list", "column": "tags", "max_length": 2},
    {"name": "late", "kind": "list", "column": "tags", "max_length": 2, "max_length_keeps": "last"},
]
WEIGHTED = {"name": "seen", "kind": "weighted_list", "column": "history", "max_length": 3, "max_length_keeps": "last"}


def rows_of(count: int, seed: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    lists = [[int(value) for value in rng.integers(0, 30, length)] for length in rng.integers(0, 6, count)]
    return {
        "user": [None if rng.random() < 0.1 else int(user) for user in rng.integers(0, 9, count)],
        "shop": [None if rng.random() < 0.1 else f"s{shop}" for shop in rng.integers(0, 9, count)],
        "day": [int(day) for day in rng.integers(0, 3, count)],
        "price": [None if rng.random() < 0.1 else float(price) for price in np.round(rng.normal(20, 40, count), 2)],
        "tags": lists,
        "history": [[{"value": value, "weight": value / 2} for value in row] for row in lists],
    }


def write_tables(folder: Path, csv: bool) -> Path:
    folder.mkdir(parents=True)
    for seed, name in enumerate(("train_1", "train_2", "test")):
        columns: dict[str, Any] = {**rows_of(300, seed), "click": [0, 1] * 150, "conversion": [0] * 300}
        if not csv:
            pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=40)
            continue
        columns["history"] = ["|".join(f"{pair['value']}:{pair['weight']}" for pair in row) for row in columns["history"]]
        columns["tags"] = ["|".join(map(str, row)) for row in columns["tags"]]
        pa_csv.write_csv(pa.table(columns), folder / f"{name}.csv", pa_csv.WriteOptions(quoting_style="none"))
    return folder


def write_two_sides(folder: Path) -> Path:
    """Ali-CCP logs whose list field is on both sides, whose crosses take one field from each."""
    for part in ("train", "test"):
        rng = np.random.default_rng(part == "test")
        common = [
            common_line(
                key(user), [("101", user % 7, 1.0), *(("150", int(value), value / 4) for value in rng.integers(0, 20, rng.integers(0, 5)))]
            )
            for user in range(40)
        ]
        skeleton = []
        for row in range(400):
            fields: list[tuple[str, int | str, float | str]] = [("508", 1, round(float(rng.normal(5, 9)), 3))] if rng.random() < 0.9 else []
            fields += [("205", int(rng.integers(0, 12)), 1.0)] if rng.random() < 0.9 else []
            fields += [("150", int(value), value / 4) for value in rng.integers(0, 20, rng.integers(0, 4))]
            skeleton.append(skeleton_line(row, row % 2, 0, key(int(rng.integers(0, 40))), fields))
        write_aliccp(folder, "".join(skeleton), "".join(common), part)
    return folder


TWO_SIDES: list[dict[str, Any]] = [
    {"name": "item_user", "kind": "categorical", "cross": ["205", "101"]},
    {"name": "item_user_hashed", "kind": "categorical", "cross": ["205", "101"], "hash_size": 31},
    {"name": "match", "kind": "numeric", "column": "508", "clip": [0, None], "log1p": True},
    {"name": "match_bucket", "kind": "numeric", "column": "508", "buckets": 5},
    {"name": "first", "kind": "list", "column": "150", "max_length": 3},
    {"name": "last", "kind": "weighted_list", "column": "150", "max_length": 3, "max_length_keeps": "last"},
]
KINDS = ("parquet", "csv", "aliccp")


def case(kind: str, folder: Path) -> tuple[DataConfig, Path]:
    """A config of all transforms, and logs for it."""
    if kind == "aliccp":
        return aliccp_config(features=TWO_SIDES, keep=["sample_id"]), write_two_sides(folder / "logs")
    files = {"files": f"*.{kind}"}
    return table_config([*TRANSFORMED, WEIGHTED], source=files, split=BY_FILE), write_tables(folder / "logs", kind == "csv")


def split_table(out: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((out / split).glob("*.parquet"))])


def as_rows(table: pa.Table, names: list[str]) -> list[str]:
    return sorted(map(repr, table.select(names).to_pylist()))


@pytest.mark.parametrize("kind", KINDS)
def test_score_encodes_what_preprocess_did(tmp_path: Path, kind: str) -> None:
    config, logs = case(kind, tmp_path)
    out, _ = made(config, logs, tmp_path / "out")
    schema = Schema.load(out / "schema.json")
    for split in ("train", "test"):
        files = [file for file in raw_files(config.source, logs) if split in file.name]
        blocks = list(encode_raw(schema, out / "vocabulary", files, schema.keep, block_rows=70, labels=True))
        scored = pa.concat_tables([block.table for block in blocks])
        expected = split_table(out, split)
        assert scored.schema == expected.schema
        assert as_rows(scored, expected.column_names) == as_rows(expected, expected.column_names)


@pytest.mark.parametrize("kind", KINDS)
def test_any_portions_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of other portions, means may differ in their last digit, and nothing else; spills, as memory has them, change nothing."""
    config, logs = case(kind, tmp_path)
    one, _ = made(config, logs, tmp_path / "one")
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert len(names) >= 6
    monkeypatch.setattr(read, "SPILL_BYTES", 3_000)
    monkeypatch.setattr(pipeline, "BUCKET_ROWS", 100)
    spilled, _ = made(config, logs, tmp_path / "spilled")
    for name in names:
        assert (one / name).read_bytes() == (spilled / name).read_bytes(), name
    monkeypatch.setattr(portions, "PORTION_BYTES", 5_000)
    many, _ = made(config, logs, tmp_path / "many")
    for name in names:
        assert (one / name).read_bytes() == (many / name).read_bytes() or name.name == "schema.json", name
    for left, right in zip(*(Schema.load(out / "schema.json").features for out in (one, many)), strict=True):
        told = [feature.model_dump(exclude={"mean", "std"}) for feature in (left, right)]
        assert told[0] == told[1]
        assert (left.mean, left.std) == pytest.approx((right.mean, right.std), rel=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_other_values_in_test_do_not_change_what_is_fitted(tmp_path: Path, kind: str) -> None:
    config, logs = case(kind, tmp_path)
    before, _ = made(config, logs, tmp_path / "before")
    for path in logs.glob("*test*"):
        if kind == "parquet":
            write_parquet(path, {name: values for name, values in {**rows_of(50, 9), "price": [1e6] * 50}.items()})
        else:
            text = path.read_text()
            path.write_text(text.replace("s1", "s77") if kind == "csv" else re.sub("508\x021\x03[^\x01\n]*", "508\x021\x0399", text))
    after, _ = made(config, logs, tmp_path / "after")
    assert (before / "schema.json").read_bytes() == (after / "schema.json").read_bytes()


def test_encoded_columns_are_those_of_plain_python(tmp_path: Path) -> None:
    columns = rows_of(400, 3)
    source = write_parquet(tmp_path / "train.parquet", {**columns, "row": list(range(400))})
    out, _ = made(table_config([*TRANSFORMED, WEIGHTED], keep=["row"]), source, tmp_path / "out")
    schema = Schema.load(out / "schema.json")
    features = {feature.name: feature for feature in schema.features}
    rows = with_lists(split_table(out, "train")).sort_by("kept.row").to_pylist()

    prices = columns["price"]
    logs = [None if price is None else math.log1p(min(max(price, 0), 50)) for price in prices]
    held = np.array([log for log in logs if log is not None])
    assert [row["price"] for row in rows] == pytest.approx(
        [0 if log is None else (log - held.mean()) / held.std() for log in logs], abs=1e-5
    )

    boundaries = quantile_boundaries([price for price in prices if price is not None], 7)
    assert list(features["price_bucket"].boundaries or ()) == boundaries
    assert features["price_bucket"].num_embeddings == len(boundaries) + 1 == 7
    assert [row["price_bucket"] for row in rows] == [
        None if price is None else sum(each < price for each in boundaries) for price in prices
    ]

    pairs = [None if None in pair else pair for pair in zip(columns["user"], columns["shop"], strict=True)]
    hashes = values_of(out, "both")
    assert all(count >= 2 for count in pq.read_table(out / "vocabulary" / "both.parquet")["count"].to_pylist())
    for pair, row in zip(pairs, rows, strict=True):
        if pair is None:
            assert row["both"] is None
        elif pairs.count(pair) < 2:
            assert row["both"] == 0
        else:
            parts = [pa.array([pair[0]]), pa.array([pair[1]])]
            assert hashes[row["both"]] == int(cross_hash(parts).view(np.int64)[0])
    triples = list(zip(columns["shop"], columns["user"], columns["day"], strict=True))
    assert [row["three"] is None for row in rows] == [None in triple for triple in triples]

    known = values_of(out, "late")
    assert [[known[value] for value in row["late"]] for row in rows] == [row[-2:] for row in columns["tags"]]
    kept = {value for row in columns["tags"] for value in row[-2:]}
    assert set(known.values()) == kept, "what is counted is what is kept"
    assert [row["seen.weight"] for row in rows] == [[value / 2 for value in row[-3:]] for row in columns["tags"]]


def test_sides_of_an_impression_are_cut_and_crossed_as_one(tmp_path: Path) -> None:
    shared = [("101", 4, 1.0), ("150", 5, 1.0), ("150", 6, 1.0), ("150", 7, 1.0), ("150", 8, 1.0)]
    own = [("205", 9, 1.0), ("150", 1, 1.0), ("150", 2, 1.0)]
    common = common_line(key(1), shared)
    lines = skeleton_line(1, 0, 0, key(1), own) + skeleton_line(2, 1, 0, key(1), [])
    logs = write_aliccp(tmp_path / "logs", lines, common)
    features = [each for each in TWO_SIDES if "508" not in str(each)]
    out, _ = made(aliccp_config(features=features, keep=["sample_id"]), logs, tmp_path / "out")
    rows = with_lists(split_table(out, "train")).sort_by("kept.sample_id").to_pylist()
    first, last = values_of(out, "first"), values_of(out, "last")
    assert [[first[value] for value in row["first"]] for row in rows] == [[1, 2, 5], [5, 6, 7]]
    assert [[last[value] for value in row["last"]] for row in rows] == [[6, 7, 8], [6, 7, 8]]
    both = int(cross_hash([pa.array([9]), pa.array([4])]).view(np.int64)[0])
    assert [row["item_user"] for row in rows] == [1, None]
    assert values_of(out, "item_user") == {1: both}


def test_a_part_of_a_cross_on_both_sides_is_a_bad_row(tmp_path: Path) -> None:
    line = skeleton_line(1, 0, 0, key(1), [("205", 9, 1.0), ("101", 3, 1.0)])
    logs = write_aliccp(tmp_path / "logs", line, common_line(key(1), [("101", 4, 1.0)]))
    with pytest.raises(DataError, match=r"row 1, column 101: several values: .*one here and one in the common record"):
        preprocess(aliccp_config(features=TWO_SIDES[:1]), logs, tmp_path / "out")


def test_a_cross_is_the_same_of_numbers_and_of_their_texts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"user": [1, 2], "shop": [7, None]})
    write_parquet(tmp_path / "b.parquet", {"user": ["1", "2"], "shop": ["7", "8"]})
    out, _ = made(table_config([{"name": "x", "kind": "categorical", "cross": ["user", "shop"]}]), tmp_path, tmp_path / "out")
    assert pq.read_table(out / "vocabulary" / "x.parquet")["count"].to_pylist() == [2, 1]


def test_columns_that_cannot_be_crossed_are_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"user": [1.5], "shop": [7]})
    with pytest.raises(DataError, match=r"feature 'x' crosses column 'user': expected whole numbers or strings, found type double"):
        preprocess(table_config([{"name": "x", "kind": "categorical", "cross": ["user", "shop"]}]), source, tmp_path / "out")
    with pytest.raises(DataError, match=r"has no column 'shops' \(feature 'x'\)\nhint: did you mean 'shop'"):
        preprocess(table_config([{"name": "x", "kind": "categorical", "cross": ["user", "shops"]}]), source, tmp_path / "out")


@pytest.mark.parametrize("csv", [False, True])
def test_numbers_that_log1p_cannot_take_are_clipped_or_refused(tmp_path: Path, csv: bool) -> None:
    table = pa.table({"n": [-5.0, 1.0], "click": [0, 1], "conversion": [0, 0]})
    path = tmp_path / ("a.csv" if csv else "a.parquet")
    (pa_csv.write_csv if csv else pq.write_table)(table, path)
    source = {"files": path.name}
    out, _ = made(table_config([{"name": "n", "kind": "numeric", "log1p": True, "clip": [0, None]}], source=source), path, tmp_path / "out")
    feature = Schema.load(out / "schema.json").features[0]
    assert feature.clip == (0, None)
    assert feature.mean == pytest.approx(math.log(2) / 2)
    with pytest.raises(DataError, match="above -1 with log1p"):
        preprocess(table_config([{"name": "n", "kind": "numeric", "log1p": True, "clip": [None, 9]}], source=source), path, tmp_path / "no")


def test_a_schema_without_transforms_is_written_as_it_was() -> None:
    plain = Schema.model_validate(
        {"source": {"kind": "table"}, "features": [{"name": "n", "kind": "numeric", "column": "n"}]},
    )
    assert not {"cross", "max_length", "max_length_keeps", "clip", "boundaries"} & set(plain.model_dump()["features"][0])
    assert plain.hash() == "f4ae86549e0c892fdc7848abe8d0fff0813d3dc953e9c625ebf98fe683f7b213"


# --- config -------------------------------------------------------------------------------------

# Of each: the feature, and what is wrong with it.
MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "list", "clip": [0, 1]}, "clip is for kind numeric only"),
    ({"kind": "categorical", "buckets": 3}, "buckets is for kind numeric only"),
    ({"kind": "numeric", "clip": [1, 1]}, "clip: the least number must be below the greatest, got 1 and 1"),
    ({"kind": "numeric", "clip": [None, None]}, r"clip: \[null, null\] has no effect"),
    ({"kind": "numeric", "clip": [-1, 5], "log1p": True}, "clip: log1p takes numbers above -1, got the bound -1"),
    ({"kind": "numeric", "clip": [None, -2], "log1p": True}, "clip: log1p takes numbers above -1, got the bound -2"),
    ({"kind": "numeric", "buckets": 3, "log1p": True}, "log1p has no effect on buckets"),
    ({"kind": "numeric", "buckets": 3, "min_count": 2}, "min_count has no effect on kind numeric, which has no vocabulary"),
    ({"kind": "numeric", "buckets": 1}, "greater than or equal to 2"),
    ({"kind": "numeric", "buckets": 1001}, "less than or equal to 1000"),
    ({"kind": "numeric", "clip": [0, math.inf]}, "finite number"),
    ({"kind": "list", "cross": ["a", "b"]}, "cross is for kind categorical only"),
    ({"kind": "categorical", "cross": ["a"]}, "at least 2 items"),
    ({"kind": "categorical", "cross": ["a", "b", "c", "d"]}, "at most 3 items"),
    ({"kind": "categorical", "cross": ["a", "b", "a"]}, "cross names different columns, found twice: a"),
    ({"kind": "categorical", "cross": ["a", "b"], "column": "c"}, "column 'c' is not read beside cross: leave it out"),
    ({"kind": "categorical", "max_length": 3}, "max_length is for kind list and weighted_list only"),
    ({"kind": "list", "max_length_keeps": "last"}, "max_length_keeps has no effect without max_length"),
]


@pytest.mark.parametrize(("settings", "problem"), MISFITS)
def test_settings_without_effect_are_refused(settings: dict[str, Any], problem: str) -> None:
    data = {"source": {"kind": "table"}, "features": [{"name": "f", **settings}], "split": {"by": "hash", "train": 1.0}}
    with pytest.raises(ConfigError, match=problem):
        parse_config({"data": data})


def test_a_cross_names_its_column_and_can_be_stored() -> None:
    feature = FeatureConfig.model_validate({"name": "f", "kind": "categorical", "cross": ["a", "b"]})
    assert feature.column == "a x b"
    assert FeatureConfig.model_validate(feature.model_dump(mode="json")) == feature


def test_buckets_alone_are_a_table() -> None:
    data = {"source": {"kind": "table"}, "split": {"by": "hash", "train": 1.0}}
    parse_config({"data": {**data, "features": [{"name": "f", "kind": "numeric", "buckets": 4}]}})
    with pytest.raises(ConfigError, match="at least one must have a table"):
        parse_config({"data": {**data, "features": [{"name": "f", "kind": "numeric"}]}})


# --- what comes after ---------------------------------------------------------------------------


def test_a_model_learns_from_buckets_and_crosses(tmp_path: Path) -> None:
    config, logs = case("parquet", tmp_path)
    out, _ = made(config, logs, tmp_path / "out")
    schema = Schema.load(out / "schema.json")
    table = split_table(out, "train")
    columns = decode(table, schema, labels=True, where="train")
    assert [feature.name for feature in schema.numeric] == ["price"]
    batch = assemble([Slice(columns, 0, len(table))], schema)
    whole = parse_config({"data": config.model_dump(mode="json"), "model": {"embedding_dim": 4, "tower_hidden": [8]}})
    model = build_model(schema, whole.model, whole.objective, BaseRates(0.5, 0.1), seed=0)
    model.embeddings = PooledEmbeddings(schema.tables, 4, torch.device("cpu"))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch).ctr_logit, batch.click)
    loss.backward()  # type: ignore[no-untyped-call]
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    for feature in ("price_bucket", "both", "three"):
        assert any(f".{feature}." in name for name in moved), feature


def test_inspection_tells_them(tmp_path: Path) -> None:
    config, logs = case("parquet", tmp_path)
    out, _ = made(config, logs, tmp_path / "out")
    record = inspect(out, html=tmp_path / "page.html")["features"]
    bucket = record["price_bucket"]
    boundaries = Schema.load(out / "schema.json").features[1].boundaries or ()
    assert (bucket["kind"], bucket["encoding"], bucket["table_rows"]) == ("numeric", "buckets", 7)
    ranges = {entry["value"] for entry in bucket["top"]}
    assert {f"<= {boundaries[0]:g}", f"> {boundaries[-1]:g}"} <= ranges
    rows = split_table(out, "train")["price_bucket"].drop_null().to_numpy()
    assert sum(entry["count"] for entry in bucket["top"]) == len(rows)
    assert (record["both"]["cross"], record["early"]["max_length"], record["price"]["clip"]) == (["user", "shop"], 2, [0, 50])
    assert record["early"]["lengths"]["train"]["max"] == 2
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for said in ("numeric, in buckets", "categorical, crossed, hashed", "hash "):
        assert said in page


def test_the_examples_of_the_documents_are_configs() -> None:
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.S | re.M)
    assert len(blocks) >= 4
    features = [feature for block in blocks for feature in yaml.safe_load(block)]
    data = {"source": {"kind": "table"}, "features": features, "split": {"by": "hash", "train": 1.0}}
    assert len(parse_config({"data": data}).data.features) == len(features)

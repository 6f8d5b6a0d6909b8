"""Random data sets, written raw in each format, preprocessed and read by the reader, are the same data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from escm2rec.config import DataConfig
from escm2rec.preprocess import preprocess
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from tests.preprocess_logs import common_line, key, skeleton_line, values_of, write_aliccp

BATCH = 4
USERS = 3

# A data set: its features by name (kind, and whether values are text), and its rows: values by feature, labels, weight, number of the row.
# A missing number or category is None, a missing list is empty.
Schema = dict[str, tuple[str, bool]]
Rows = list[dict[str, Any]]
Write = Callable[[Path, Schema, Rows], DataConfig]

texts = st.text(st.characters(codec="utf-8", exclude_characters="|:\r\n\0"), min_size=1, max_size=4)
integers = st.integers(0, 4) | st.integers(0, 2**63 - 1)
weights = st.floats(-8, 8, width=32)
numbers = st.none() | st.integers(-1000, 1000).map(lambda number: number / 8)


def cell(kind: str, text: bool) -> st.SearchStrategy[Any]:
    """Values of one feature."""
    value = texts if text else integers
    if kind == "numeric":
        return numbers
    if kind == "categorical":
        return st.none() | value
    return st.lists(value if kind == "list" else st.tuples(value, weights), max_size=3)


@st.composite
def data_sets(draw: st.DrawFn, text: bool = True) -> tuple[Schema, Rows]:
    """Up to five features of any kind, up to nine rows."""
    kinds = draw(st.lists(st.sampled_from(["categorical", "list", "weighted_list", "numeric"]), min_size=1, max_size=5))
    schema = {f"f{number}": (kind, text and draw(st.booleans())) for number, kind in enumerate(kinds)}
    row = {name: cell(*each) for name, each in schema.items()}
    labels = st.sampled_from([(0, 0), (1, 0), (1, 1)])
    rows = draw(st.lists(st.fixed_dictionaries({**row, "labels": labels, "weight": st.integers(1, 64)}), min_size=1, max_size=9))
    return schema, [{**each, "row": number} for number, each in enumerate(rows)]


def config_of(schema: Schema, source: dict[str, Any], row: str = "row") -> DataConfig:
    """A config that reads all of it; `row` is the column that tells rows apart."""
    features: list[dict[str, Any]] = [{"name": name, "kind": kind} for name, (kind, _) in schema.items()]
    for feature in features:
        if feature["kind"] == "weighted_list" and source.get("files") == "*.parquet":
            feature["weights_column"] = f"{feature['name']}w"
    split = {"by": "file", "train": "*"}
    return DataConfig.model_validate({"source": source, "features": features, "keep": [row], "split": split})


def as_parquet(folder: Path, schema: Schema, rows: Rows) -> DataConfig:
    """One table; weights lie beside their values."""
    columns: dict[str, pa.Array] = {
        "click": pa.array([each["labels"][0] for each in rows]),
        "conversion": pa.array([each["labels"][1] for each in rows]),
        "weight": pa.array([each["weight"] / 8 for each in rows]),
        "row": pa.array([str(each["row"]) for each in rows]),
    }
    for name, (kind, text) in schema.items():
        value, cells = pa.string() if text else pa.int64(), [each[name] for each in rows]
        if kind == "weighted_list":
            columns[name] = pa.array([[pair[0] for pair in each] for each in cells], pa.list_(value))
            columns[f"{name}w"] = pa.array([[pair[1] for pair in each] for each in cells], pa.list_(pa.float32()))
        else:
            columns[name] = pa.array(cells, {"numeric": pa.float64(), "categorical": value, "list": pa.list_(value)}[kind])
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return config_of(schema, {"kind": "table", "files": "*.parquet", "weight": "weight"})


def as_csv(folder: Path, schema: Schema, rows: Rows) -> DataConfig:
    """One table of quoted cells."""

    def written(kind: str, value: Any) -> str:
        if kind == "weighted_list":
            value = "|".join(f"{item}:{weight!r}" for item, weight in value)
        elif kind == "list":
            value = "|".join(map(str, value))
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"' if text else ""

    lines = [",".join([*schema, "click", "conversion", "weight", "row"])]
    for each in rows:
        cells = [written(kind, each[name]) for name, (kind, _) in schema.items()]
        lines.append(",".join([*cells, *map(str, each["labels"]), str(each["weight"] / 8), str(each["row"])]))
    (folder / "a.csv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return config_of(schema, {"kind": "table", "files": "*.csv", "weight": "weight"})


def as_aliccp(folder: Path, schema: Schema, rows: Rows) -> DataConfig:
    """A skeleton and common records: of the first row of each of some users, every other feature lies in the record."""

    def listed(names: list[str], each: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        found: list[tuple[str, Any, Any]] = []
        for name in names:
            kind, value = schema[name][0], each[name]
            if kind == "weighted_list":
                found += [(name, item, repr(weight)) for item, weight in value]
            elif kind == "list":
                found += [(name, item, 1.0) for item in value]
            elif value is not None:
                found.append((name, 0, value) if kind == "numeric" else (name, value, 1.0))
        return found

    shared = [name for number, name in enumerate(schema) if number % 2]
    own = [name for name in schema if name not in shared]
    for each in rows:
        each.update({name: rows[each["row"] % USERS][name] for name in shared})
    records = [common_line(key(user), listed(shared, each)) for user, each in enumerate(rows[:USERS])]
    impressions = [
        skeleton_line(each["row"], each["labels"][0], each["labels"][1], key(each["row"] % USERS), listed(own, each)) for each in rows
    ]
    write_aliccp(folder, "".join(impressions), "".join(reversed(records)))
    return config_of(schema, {"kind": "aliccp"}, "sample_id")


@pytest.mark.parametrize("write", [as_parquet, as_csv, as_aliccp])
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, write: Write) -> None:
    seen = 0

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data_sets(text=write is not as_aliccp))
    def check(data: tuple[Schema, Rows]) -> None:
        nonlocal seen
        schema, rows = data
        folder = tmp_path_factory.mktemp("round")
        (folder / "logs").mkdir()
        config = write(folder / "logs", schema, rows)
        preprocess(config, folder / "logs", folder / "data")
        back = read_back(folder / "data", config.keep[0])
        assert sorted(back) == [each["row"] for each in rows]
        for each in rows:
            assert_same(schema, each, back[each["row"]], as_text=write is as_csv, weighted=write is not as_aliccp)
            seen += 1

    check()
    assert seen > 20


def read_back(data: Path, row: str) -> dict[int, dict[str, Any]]:
    """Rows by their number, through the reader: values by the vocabulary, numbers by mean and std."""
    dataset = Dataset.open(data)
    values = {feature.name: values_of(data, feature.name) for feature in dataset.schema.tables}
    found: dict[int, dict[str, Any]] = {}
    for batch, extra in Reader(dataset, "train", BATCH, shuffle=False, extra_columns=(f"kept.{row}",)).batches(0):
        places = [int(place) for place in extra[f"kept.{row}"].to_pylist()]
        held: list[dict[str, Any]] = [{} for _ in places]
        for keyed in (batch.features, batch.weighted_features):
            for name, jagged in ({} if keyed is None else keyed.to_dict()).items():
                ends = np.cumsum(jagged.lengths().tolist())
                rows = [values[name][each] for each in jagged.values().tolist()]
                pairs = rows if keyed is batch.features else list(zip(rows, jagged.weights().tolist(), strict=True))
                for number, each in enumerate(held):
                    each[name] = pairs[0 if not number else ends[number - 1] : ends[number]]
        for number, each in enumerate(held):
            for place, feature in enumerate(dataset.schema.numeric):
                each[feature.name] = float(batch.numeric[number, place]) * feature.std + feature.mean
            each["means"] = {feature.name: feature.mean for feature in dataset.schema.numeric}
            each["labels"], each["weight"] = (int(batch.click[number]), int(batch.conversion[number])), float(batch.weight[number])
        assert not set(places) & set(found)
        found |= dict(zip(places, held, strict=True))
    return found


def assert_same(schema: Schema, raw: dict[str, Any], back: dict[str, Any], as_text: bool, weighted: bool) -> None:
    """One row; `as_text`: ids became text."""
    assert back["labels"] == raw["labels"]
    assert back["weight"] == (raw["weight"] / 8 if weighted else 1)
    for name, (kind, _) in schema.items():
        if kind == "numeric":
            expected = back["means"][name] if raw[name] is None else raw[name]  # a missing number is the mean
            assert back[name] == pytest.approx(expected, abs=1e-3)
            continue
        value = raw[name] if kind != "categorical" else [] if raw[name] is None else [raw[name]]
        if as_text:
            value = [(str(each[0]), each[1]) if kind == "weighted_list" else str(each) for each in value]
        assert back[name] == value

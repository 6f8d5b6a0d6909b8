import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from escm2rec.config import SimulationConfig
from escm2rec.errors import ConfigError, DataError
from escm2rec.preprocess import aliccp, preprocess, records
from escm2rec.preprocess.stable_hash import hash64
from escm2rec.schema import Schema
from escm2rec.simulate import simulate
from tests.preprocess_logs import (
    ALICCP_FEATURES,
    SMALL_RECORDS,
    aliccp_config,
    common_line,
    key,
    made,
    read_split,
    skeleton_line,
    small_aliccp,
    values_of,
    write_aliccp,
)

GOOD = skeleton_line(1, 0, 0, key(1), [("205", 1, 1.0)])
COMMON = common_line(key(1), [("101", 11, 1.0)])


def test_every_feature_of_both_sides_arrives(tmp_path: Path) -> None:
    config = aliccp_config(keep=["sample_id", "common_feature_index", "101"])
    out, result = made(config, small_aliccp(tmp_path / "logs"), tmp_path / "out")
    rows = read_split(out, common_features_train=SMALL_RECORDS)
    names = {feature: values_of(out, feature) | {None: None} for feature in ("user", "shops", "item", "words")}
    assert [names["user"][row["user"]] for row in rows] == [11, 11, 12, None, 11]
    assert [names["item"][row["item"]] for row in rows] == [21, 22, None, None, 21]
    assert [[names["words"][word] for word in row["words"]] for row in rows] == [[5, 6], [], [5, 5], [], []]
    first = [7, 8, 7]
    assert [[names["shops"][shop] for shop in row["shops"]] for row in rows] == [first, first, [], [9], first]
    weights = np.array([0.69315, 1.5, 2.25], dtype=np.float32).tolist()
    assert [row["shops.weight"] for row in rows] == [weights, weights, [], [3.0], weights]
    np.testing.assert_allclose([row["match"] for row in rows], [-1, 0, 1, 0, 0])  # mean 1, std 0.5 of 0.5 and 1.5
    assert [(row["click"], row["conversion"]) for row in rows] == [(1, 1), (0, 0), (1, 0), (0, 0), (0, 0)]
    assert [row["kept.sample_id"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["kept.common_feature_index"] for row in rows] == [key(1), key(1), key(2), key(3), key(1)]
    assert [row["kept.101"] for row in rows] == [11, 11, 12, None, 11]
    assert result["splits"]["train"] == {"rows": 5, "clicks": 2, "conversions": 1}


def test_managed_features_of_both_sides_are_hashes(tmp_path: Path) -> None:
    managed = [{**each, "managed_size": 9} if each["name"] in ("user", "item", "words") else each for each in ALICCP_FEATURES]
    logs = small_aliccp(tmp_path / "logs")
    out, _ = made(aliccp_config(features=managed), logs, tmp_path / "out")
    rows = read_split(out, common_features_train=SMALL_RECORDS)

    def hashes(values: Sequence[int | None]) -> list[int | None]:
        return [None if value is None else int(hash64(np.array([value]))[0] >> np.uint64(2)) for value in values]

    assert [row["user"] for row in rows] == hashes([11, 11, 12, None, 11])
    assert [row["item"] for row in rows] == hashes([21, 22, None, None, 21])
    assert [row["words"] for row in rows] == [hashes(words) for words in ([5, 6], [], [5, 5], [], [])]
    fields = pq.read_schema(out / "train" / "part-00000.parquet")
    assert [fields.field(name).type for name in ("user", "item", "words")] == [pa.int64(), pa.int64(), pa.binary()]
    assert not any((out / "vocabulary" / f"{name}.parquet").exists() for name in ("user", "item", "words"))


def test_vocabulary_counts_are_by_impression(tmp_path: Path) -> None:
    out, _ = made(aliccp_config(), small_aliccp(tmp_path / "logs"), tmp_path / "out")
    shops = pl.read_parquet(out / "vocabulary" / "shops.parquet")
    assert shops.rows() == [(7, 6, 1), (8, 3, 2), (9, 1, 3)]  # user 1 has three impressions and holds shop 7 twice


def test_columns_have_the_types_of_the_schema(tmp_path: Path) -> None:
    out, _ = made(aliccp_config(), small_aliccp(tmp_path / "logs"), tmp_path / "out")
    fields = {field.name: (field.type, field.nullable) for field in pq.read_schema(out / "train" / "part-00000.parquet")}
    assert fields == {
        "user": (pa.int32(), True),
        "shops": (pa.binary(), False),
        "shops.weight": (pa.binary(), False),
        "item": (pa.int32(), True),
        "words": (pa.binary(), False),
        "match": (pa.float32(), False),
        "click": (pa.uint8(), False),
        "conversion": (pa.uint8(), False),
    }
    assert [feature.num_embeddings for feature in Schema.load(out / "schema.json").features] == [3, 4, 3, 3, 0]


def many_lines(users: int, rows: int) -> tuple[list[str], list[str]]:
    """Lines of grouped impressions."""
    generator = np.random.default_rng(0)
    picks = generator.integers(0, 40, (users, 6)).tolist()
    records = [
        common_line(key(user), [("101", user, 1.0), *(("110_14", shop, shop / 8) for shop in picks[user][: user % 7])])
        for user in range(users)
    ]
    impressions = [
        skeleton_line(row, int(row % 5 == 0), 0, key(row * users // rows), [("205", row % 30, 1.0), ("210", row % 7, 1.0), ("508", 1, 0.5)])
        for row in range(rows)
    ]
    return impressions, records


def test_ungrouped_skeletons_and_small_blocks_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impressions, commons = many_lines(50, 400)
    config = aliccp_config(keep=["sample_id"])
    grouped, _ = made(config, write_aliccp(tmp_path / "a", "".join(impressions), "".join(commons)), tmp_path / "grouped")
    monkeypatch.setattr(aliccp, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(records, "BLOCK_BYTES", 300)
    order = np.random.default_rng(1).permutation(400)
    shuffled = [impressions[row] for row in order]
    ungrouped, _ = made(config, write_aliccp(tmp_path / "b", "".join(shuffled), "".join(reversed(commons))), tmp_path / "ungrouped")
    of_grouped, expected = (sorted(read_split(out), key=lambda row: row["kept.sample_id"]) for out in (ungrouped, grouped))
    assert of_grouped == expected
    assert len(expected) == 400
    assert (ungrouped / "schema.json").read_bytes() == (grouped / "schema.json").read_bytes()


def test_a_field_on_both_sides_is_joined_row_by_row(tmp_path: Path) -> None:
    skeleton = skeleton_line(1, 0, 0, key(1), [("110_14", 3, 0.5)]) + skeleton_line(2, 0, 0, key(1), [])
    common_text = common_line(key(1), [("110_14", 4, 0.25), ("508", 1, 2.0)])
    out, _ = made(aliccp_config(), write_aliccp(tmp_path / "logs", skeleton, common_text), tmp_path / "out")
    names = values_of(out, "shops")
    rows = read_split(out)
    assert [[names[shop] for shop in row["shops"]] for row in rows] == [[3, 4], [4]]
    assert [row["shops.weight"] for row in rows] == [[0.5, 0.25], [0.25]]


def refusal(tmp_path: Path, skeleton: str, records: str = COMMON, **changes: Any) -> tuple[str, dict[str, Any]]:
    """The error when refusing, and the rejected rows when counting (with two good impressions around)."""
    logs = write_aliccp(tmp_path / "logs", skeleton, records)
    with pytest.raises(DataError) as error:
        preprocess(aliccp_config(**changes), logs, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    result = preprocess(aliccp_config(bad_rows="count", **changes), logs, tmp_path / "counted")
    return str(error.value), result["rejected"]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (skeleton_line(2, 2, 0, key(1), []), "label", "row 2, column click: label: expected 0 or 1, found '2'"),
        (skeleton_line(2, 1, "", key(1), []), "label", "row 2, column buy: label: expected 0 or 1, found ''"),
        (skeleton_line(2, 0, 0, key(9), []), "missing common record", f"row 2, column common_feature_index: .*found '{key(9)}'"),
        (skeleton_line(2, 0, 0, "XYZ", []), "common_feature_index", "row 2, column common_feature_index: .*16 hex.*found 'XYZ'"),
        (skeleton_line(2, 0, 0, key(1), [], num=4), "feature_num", "row 2, column feature_num: .*found 4 before a list of 0"),
        (skeleton_line("x", 0, 0, key(1), []), "id", "row 2, column sample_id: .*found 'x'"),
        (skeleton_line(2, 0, 0, key(1), [("205", 2**63, 1.0)]), "id", "row 2, column 205: .*found '9223372036854775808'"),
        (skeleton_line(2, 0, 0, key(1), [("508", 2, "nan")]), "number", "row 2, column 508: .*found 'nan'"),
        (skeleton_line(2, 0, 0, key(1), [("205", 2, 1.0)] * 2), "several values", "column 205: .*2 values\nhint: .*kind: list"),
        (skeleton_line(2, 0, 0, key(1), [("101", 2, 1.0)]), "several values", "column 101: .*one here and one in the common"),
    ],
)
def test_a_bad_impression_is_refused_or_counted(tmp_path: Path, line: str, reason: str, message: str) -> None:
    text, rejected = refusal(tmp_path, GOOD + line + GOOD, keep=["sample_id"])
    assert "sample_skeleton_train.csv: " in text
    assert re.search(message, text), text
    assert rejected == {reason: 1}


def test_a_truncated_last_line_is_refused_or_counted(tmp_path: Path) -> None:
    text, rejected = refusal(tmp_path, GOOD + GOOD[:-3])
    assert "row 2: truncated line: expected a line that ends with a newline" in text
    assert rejected == {"truncated line": 1}


def test_an_index_with_two_records_is_refused_or_the_first_one_counts(tmp_path: Path) -> None:
    other = common_line(key(1), [("101", 12, 1.0)])
    text, rejected = refusal(tmp_path, GOOD, COMMON + common_line(key(2), []) + COMMON + other)
    assert "common_features_train.csv: row 4, column common_feature_index: duplicate common record" in text
    assert "the index of row 1 with other features" in text
    assert rejected == {"duplicate common record": 1}
    assert values_of(tmp_path / "counted", "user") == {1: 11}


def test_impressions_of_a_bad_common_record_have_none(tmp_path: Path) -> None:
    skeleton = GOOD + skeleton_line(2, 0, 0, key(2), [("205", 2, 1.0)])
    text, rejected = refusal(tmp_path, skeleton, COMMON + common_line(key(2), [("101", 1, 1.0)], num=3))
    assert "common_features_train.csv: row 2, column feature_num" in text
    assert rejected == {"feature_num": 1, "missing common record": 1}
    assert values_of(tmp_path / "counted", "item") == {1: 1}  # the item of the lost row is not counted


def test_first_offenders_are_in_the_manifest(tmp_path: Path) -> None:
    logs = write_aliccp(tmp_path / "logs", GOOD + "bad\n" * 7 + GOOD, COMMON)
    preprocess(aliccp_config(bad_rows="count"), logs, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    entry = manifest["rejected"]["malformed line"]
    assert entry["rows"] == 7
    assert [each["row"] for each in entry["first"]] == [2, 3, 4, 5, 6]
    assert entry["first"][0] == {"file": str(logs / "sample_skeleton_train.csv"), "row": 2, "column": "", "value": "'bad'"}


def test_a_missing_common_file_is_named(tmp_path: Path) -> None:
    logs = small_aliccp(tmp_path / "logs")
    (logs / "common_features_train.csv").rename(logs / "elsewhere.csv")
    with pytest.raises(DataError, match=r"sample_skeleton_train\.csv has no common file: .*common_features_train\.csv is missing"):
        preprocess(aliccp_config(), logs, tmp_path / "out")


def test_a_field_id_that_is_none_is_refused(tmp_path: Path) -> None:
    features = [{"name": "user", "kind": "categorical", "column": "much_too_long"}]
    with pytest.raises(ConfigError, match="'much_too_long' is no Ali-CCP field id"):
        preprocess(aliccp_config(features=features), small_aliccp(tmp_path / "logs"), tmp_path / "out")


def write_truth(logs: Path, samples: list[int], propensity: float = 0.25) -> None:
    columns = {"sample_id": samples, "true_propensity": [propensity] * len(samples), "true_cvr": [0.5] * len(samples)}
    pq.write_table(pa.table(columns), logs / "truth_train.parquet")


def test_truth_goes_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliccp, "BLOCK_BYTES", 60)
    logs = small_aliccp(tmp_path / "logs")
    write_truth(logs, [1, 2, 3, 4, 5])
    out, _ = made(aliccp_config(source={"truth": "truth_*.parquet"}), logs, tmp_path / "out")
    assert [(row["true_propensity"], row["true_cvr"]) for row in read_split(out)] == [(0.25, 0.5)] * 5
    assert Schema.load(out / "schema.json").has_truth


@pytest.mark.parametrize(
    ("samples", "propensity", "message"),
    [
        ([1, 2, 9, 4, 5], 0.5, "row 3: expected sample_id 3 as in .*, found 9"),
        ([1, 2, 3, 4], 0.5, "has fewer rows than"),
        ([1, 2, 3, 4, 5, 6], 0.5, "has more rows than"),
        ([1, 2, 3, 4, 5], 1.5, "row 1, column true_propensity: truth: expected a probability from 0 to 1, found 1.5"),
    ],
)
def test_truth_that_does_not_fit_is_refused(tmp_path: Path, samples: list[int], propensity: float, message: str) -> None:
    logs = small_aliccp(tmp_path / "logs")
    write_truth(logs, samples, propensity)
    with pytest.raises(DataError, match=message):
        preprocess(aliccp_config(source={"truth": "truth_*.parquet"}), logs, tmp_path / "out")


def test_simulated_logs_become_a_data_set(tmp_path: Path) -> None:
    simulate(tmp_path / "logs", 3000, 7, SimulationConfig(users=200, items=300))
    config = aliccp_config(
        source={"truth": "truth_*.parquet"},
        split={"by": "hash", "column": "common_feature_index", "train": 0.8, "test": 0.2},
        keep=["101"],
    )
    out, result = made(config, tmp_path / "logs", tmp_path / "out")
    users = {split: {row["kept.101"] for row in read_split(out, split)} for split in ("train", "test")}
    assert not users["train"] & users["test"]
    assert len(users["train"]) + len(users["test"]) > 50
    assert sum(result["splits"][split]["rows"] for split in ("train", "test")) == 3000
    truths = [row["true_cvr"] for row in itertools.chain(read_split(out), read_split(out, "test"))]
    assert 0 < np.mean(truths) < 0.1

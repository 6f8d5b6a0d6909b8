"""What a config may not say of a data set that was made with another."""

from __future__ import annotations

from typing import Any

import pytest

from escm2rec.config import FeatureConfig
from escm2rec.schema import Schema
from tests.preprocess_logs import made, table_config, write_parquet

FEATURES: dict[str, dict[str, Any]] = {
    "c": {"kind": "categorical", "oov_rows": 2},
    "h": {"kind": "list", "column": "t", "hash_size": 10, "max_length": 3},
    "x": {"kind": "numeric", "clip": [0.0, 5.0]},
    "b": {"kind": "numeric", "column": "x", "buckets": 3},
    "cx": {"kind": "categorical", "cross": ["c", "d"]},
}
CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("c", {"oov_rows": 1}, "oov_rows 1, the data set was made with 2"),
    ("c", {"oov_rows": 1, "hash_size": 9}, "encoding 'hash', the data set was made with 'vocabulary'"),
    ("c", {"column": "d"}, "column 'd', the data set was made with 'c'"),
    ("h", {"hash_size": 11}, "hash_size 11, the data set was made with 10"),
    ("h", {"pooling": "sum"}, "pooling 'sum', the data set was made with 'mean'"),
    ("h", {"max_length": 4}, "max_length 4, the data set was made with 3"),
    ("h", {"max_length_keeps": "last"}, "max_length_keeps 'last', the data set was made with 'first'"),
    ("x", {"clip": None}, "clip None, the data set was made with (0.0, 5.0)"),
    ("x", {"log1p": True}, "log1p True, the data set was made with False"),
    ("x", {"clip": None, "buckets": 3}, "clip None, the data set was made with (0.0, 5.0)"),
    ("b", {"buckets": None}, "encoding None, the data set was made with 'buckets'"),
    ("cx", {"cross": ["d", "c"]}, "column 'd x c', the data set was made with 'c x d'"),
]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    folder = tmp_path_factory.mktemp("schema")
    write_parquet(folder / "a.parquet", {"c": [1, 2, 2], "d": [5, 6, 5], "t": [[1], [], [2]], "x": [0.5, 9.0, 2.0]})
    features = [{"name": name, **feature} for name, feature in FEATURES.items()]
    return Schema.load(made(table_config(features), folder / "a.parquet", folder / "out")[0] / "schema.json")


def test_a_feature_is_that_of_its_own_config(schema: Schema) -> None:
    configs = [FeatureConfig.model_validate({"name": name, **feature}) for name, feature in FEATURES.items()]
    assert [held.differs_from(config) for held, config in zip(schema.features, configs, strict=True)] == [None] * 5


@pytest.mark.parametrize(("name", "change", "said"), CHANGES)
def test_another_setting_is_told(schema: Schema, name: str, change: dict[str, Any], said: str) -> None:
    held = next(feature for feature in schema.features if feature.name == name)
    assert held.differs_from(FeatureConfig.model_validate({"name": name, **FEATURES[name], **change})) == said

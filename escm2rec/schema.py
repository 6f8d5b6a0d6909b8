"""What a data set's encoded columns mean: `schema.json`.

The schema is written by preprocess, travels with every run, and lets `score` encode raw rows exactly as training did.

Encoded Parquet columns of one impression:

    <feature>          categorical: int32, null when missing; numeric: float32, standardised, 0 when missing, in buckets as categorical;
                       list, weighted_list: bytes, int32 ids little-endian and end to end, none when missing (`escm2rec.cells`);
                       int64 instead of int32 where the table is managed
    <feature>.weight   weighted_list: bytes, such float32, as many as its values
    click, conversion  uint8, 0 or 1
    weight             float32, only when the source names one or unclicked training impressions were left out (then in every split)
    true_propensity, true_cvr   float32, only for simulated logs
    kept.<column>      raw columns carried along, with their own types

What is never null says so in the Parquet schema: lists, numbers, labels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from escm2rec.config import WEIGHT_SUFFIX, FeatureConfig, Source
from escm2rec.errors import DataError
from escm2rec.paths import DataPath

SCHEMA_VERSION = 1
MANAGED_IDS = 1 << 62
"""Values of a managed table are told apart by hashes below it: of a billion values two have the same with chance 0.1."""
CONFIGURED = ("name", "kind", "column", "weights_column", "pooling", "log1p", "max_length", "clip")
"""Settings of a feature that stand in the schema as they stand in the config."""
UNLESS_NONE = ("cross", "max_length", "max_length_keeps", "clip", "boundaries")
"""Settings that came later: written where they are used, so that the hash of an older schema stands."""


class Feature(BaseModel):
    """One encoded feature.

    Table features have `num_embeddings` rows: rows `[0, oov_rows)` are shared by out-of-vocabulary values (by stable hash),
    the vocabulary follows, from the file with `vocabulary_sha256`; with `encoding` hash all rows are hashed to; with managed, what is
    stored is no row but the top 62 bits of the value's hash, which training gives a row (`sharding/managed.py`); with buckets, which
    numeric features have, the row is the number of `boundaries` below x. Other numeric features are `(f(x) - mean) / std`, with f the
    identity or log1p, mean and std those of the training split.

    Before anything is fitted or encoded, numbers are set to the bounds of `clip`, and lists are cut to the first or last `max_length`
    values. With `cross` the value is `stable_hash.cross_hash` of these raw columns, int64.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["categorical", "list", "weighted_list", "numeric"]
    column: str
    weights_column: str | None = None
    value_type: Literal["int64", "string"] | None = None
    encoding: Literal["vocabulary", "hash", "managed", "buckets"] | None = None
    num_embeddings: int = 0
    oov_rows: int = 0
    vocabulary_sha256: str | None = None
    pooling: Literal["sum", "mean"] = "mean"
    log1p: bool = False
    mean: float = 0.0
    std: float = 1.0
    cross: tuple[str, ...] | None = None
    max_length: int | None = None
    max_length_keeps: Literal["first", "last"] | None = None
    clip: tuple[float | None, float | None] | None = None
    boundaries: tuple[float, ...] | None = None

    @model_serializer(mode="wrap")
    def _used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None or name not in UNLESS_NONE}

    @classmethod
    def of(cls, feature: FeatureConfig) -> Self:
        """A feature as configured, before anything is fitted."""
        return cls(
            **{name: getattr(feature, name) for name in CONFIGURED},
            cross=None if feature.cross is None else tuple(feature.cross),
            max_length_keeps=None if feature.max_length is None else feature.max_length_keeps,
        )

    def differs_from(self, feature: FeatureConfig) -> str | None:
        """What a config says and this feature is not, or None: `min_count 2` and other limits of a vocabulary are not known any more."""
        asked = type(self).of(feature)
        for name in (*CONFIGURED, "cross", "max_length_keeps"):
            if getattr(asked, name) != getattr(self, name):
                return f"{name} {getattr(asked, name)!r}, the data set was made with {getattr(self, name)!r}"
        encoding = _encoding(feature)
        for name, wanted, held in (
            ("encoding", encoding, self.encoding),
            ("hash_size", feature.hash_size, self.num_embeddings if encoding == "hash" else None),
            ("managed_size", feature.managed_size, self.num_embeddings if encoding == "managed" else None),
            ("oov_rows", feature.oov_rows if encoding == "vocabulary" else 0, self.oov_rows),
        ):
            if wanted != held:
                return f"{name} {wanted!r}, the data set was made with {held!r}"
        return None

    @property
    def is_table(self) -> bool:
        """Whether the feature has an embedding table."""
        return self.kind != "numeric" or self.encoding == "buckets"

    @property
    def is_managed(self) -> bool:
        """Whether its table's rows are given to values in training."""
        return self.encoding == "managed"

    @property
    def id_type(self) -> pa.DataType:
        """Of its ids in the encoded column."""
        return pa.int64() if self.is_managed else pa.int32()

    @property
    def num_ids(self) -> int:
        """Ids are below it: rows of the table, or hashes."""
        return MANAGED_IDS if self.is_managed else self.num_embeddings

    @property
    def is_list(self) -> bool:
        """Whether an impression holds any number of values."""
        return self.kind in ("list", "weighted_list")

    @property
    def weight_column(self) -> str:
        """Encoded column of the weights of a weighted_list."""
        return self.name + WEIGHT_SUFFIX


def _encoding(feature: FeatureConfig) -> str | None:
    if not feature.is_table:
        return None
    asked = {"buckets": feature.buckets, "hash": feature.hash_size, "managed": feature.managed_size}
    return next((encoding for encoding, size in asked.items() if size is not None), "vocabulary")


class Schema(BaseModel):
    """All encoded features of a data set, and the raw source that they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = SCHEMA_VERSION
    source: Source
    features: tuple[Feature, ...]
    keep: tuple[str, ...] = ()
    has_weight: bool = False
    has_truth: bool = False

    @property
    def tables(self) -> tuple[Feature, ...]:
        """Features with an embedding table, in order."""
        return tuple(feature for feature in self.features if feature.is_table)

    @property
    def numeric(self) -> tuple[Feature, ...]:
        """Features without one, in order: numbers."""
        return tuple(feature for feature in self.features if not feature.is_table)

    def hash(self) -> str:
        """SHA-256 of the canonical JSON, as 64 hex digits: equal hashes mean interchangeable encodings."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write `schema.json`, its own hash inside."""
        path.write_text(json.dumps({**self.model_dump(mode="json"), "hash": self.hash()}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: DataPath) -> Self:
        """Read `schema.json`; DataError when it is missing, newer, malformed or edited by hand."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"no schema at {path}", "is the folder complete, and the right one?") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(tree, dict):
            raise DataError(f"{path} must hold a JSON object")
        version = tree.get("version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise DataError(f"{path} has layout version {version}, this escm2rec reads up to {SCHEMA_VERSION}", "use a newer escm2rec")
        said = tree.pop("hash", None)
        try:
            schema = cls.model_validate(tree)
        except ValidationError as error:
            raise DataError(f"{path} is not a schema: {error}") from error
        if said != schema.hash():
            raise DataError(f"{path} was changed after it was written: its hash is {schema.hash()}, it says {said}", "preprocess again")
        return schema

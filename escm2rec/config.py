"""The configuration: one YAML file, checked whole before anything runs.

Paths are arguments of the verbs, not config. A default is written here and nowhere else.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from escm2rec.errors import ConfigError, did_you_mean

RESERVED_COLUMNS = ("click", "conversion", "weight", "true_propensity", "true_cvr")
KEPT_PREFIX = "kept."
WEIGHT_SUFFIX = ".weight"
MAX_TABLE_ROWS = 2**31 - 1  # ids are int32
MAX_BUCKETS = 1_000  # boundaries are written into schema.json
CROSS_SIGN = " x "

Width = Annotated[int, Field(ge=1)]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- data ---------------------------------------------------------------------------------------


class AliccpSource(Section):
    """Ali-CCP raw text: a skeleton file of impressions and a file of common records it points to."""

    kind: Literal["aliccp"]
    skeleton: str = Field(
        "sample_skeleton_*.csv", description="Pattern of the skeleton files; its one * pairs each with its common and truth file."
    )
    common: str = Field("common_features_*.csv", description="Pattern of the common-feature files, paired with skeleton files by the *.")
    truth: str | None = Field(
        None,
        description="Pattern of Parquet files with sample_id, true_propensity and true_cvr, row by row beside the skeleton (simulated logs only).",
    )

    @model_validator(mode="after")
    def _one_star(self) -> Self:
        for name, pattern in (("skeleton", self.skeleton), ("common", self.common), ("truth", self.truth)):
            if pattern is not None and pattern.count("*") != 1:
                raise ValueError(f"{name} pattern {pattern!r} must hold exactly one *, which pairs the files")
        return self


class ImpressionTable(Section):
    """What tables with one row an impression have in common, wherever the labels come from."""

    weight: str | None = Field(None, description="Column with an impression weight above 0; absent means 1.")
    list_separator: str = Field("|", min_length=1, max_length=1, description="Separator between the values of a list in a CSV cell.")
    weight_separator: str = Field(":", min_length=1, max_length=1, description="Separator between a value and its weight in a CSV cell.")


class TableSource(ImpressionTable):
    """Parquet or CSV tables with one row an impression."""

    kind: Literal["table"]
    files: str = Field("*.parquet", description="Pattern of the input files; .csv files are read as CSV with a header, others as Parquet.")
    click: str = Field("click", description="Column with the click label, 0 or 1.")
    conversion: str = Field("conversion", description="Column with the conversion label, 0 or 1.")
    true_propensity: str | None = Field(None, description="Column with the known click probability (simulated logs only).")
    true_cvr: str | None = Field(None, description="Column with the known conversion probability given a click (simulated logs only).")

    @model_validator(mode="after")
    def _whole_truth(self) -> Self:
        if (self.true_propensity is None) != (self.true_cvr is None):
            raise ValueError("true_propensity and true_cvr go together: name both, or none")
        return self


class MatrixSource(Section):
    """Ratings as dense user x item matrices in text, 0 where unrated: one of what users chose to rate, one of items shown at random.

    Every pair of the training matrix is an impression: rated is the click. A pair of the test matrix is one where it is rated.
    """

    kind: Literal["matrix"]
    train: str = Field("train.ascii", description="File of the ratings that users chose to give, in the input folder.")
    test: str = Field("test.ascii", description="File of the ratings of items shown at random, of the same users and items.")
    user_features: str | None = Field(None, description="File with one row of numbers a user, if any.")
    item_features: str | None = Field(None, description="File with one row of numbers an item, if any.")
    conversion_at: float = Field(4.0, gt=0, description="A rating of so much or more is a conversion.")

    @model_validator(mode="after")
    def _files_are_apart(self) -> Self:
        if Path(self.train).name == Path(self.test).name:
            raise ValueError(f"train and test are both named {Path(self.train).name!r}: splits go by name, give them two")
        return self


def _checked_moment(value: Any) -> Any:
    """A moment as text or number: YAML reads an unquoted 2026-01-31 as a date."""
    if isinstance(value, date):  # a datetime is one
        return value.isoformat()
    if isinstance(value, str):
        try:
            datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError("takes an ISO date or time, such as 2026-01-31 or 2026-01-31T12:00:00+01:00, or a number") from error
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("takes an ISO date or time, such as 2026-01-31, or a number")
    return value


TimeUnit = Literal["s", "ms", "us"]
Moment = Annotated[str | int | float, BeforeValidator(_checked_moment)]
"""A time in ISO text (UTC unless it says otherwise), or a number."""


class EventKey(Section):
    """The column with the impression key, where its name differs by table."""

    impressions: str = Field(description="In the impressions.")
    clicks: str = Field(description="In the clicks.")
    conversions: str | None = Field(
        description="In the conversions; null where they carry no key (then attribution_key finds the impression)."
    )


class EventTime(Section):
    """The column with the time, where its name differs by table."""

    impressions: str = Field(description="In the impressions.")
    clicks: str = Field(description="In the clicks.")
    conversions: str = Field(description="In the conversions.")


def _by_table_tag(value: Any) -> str | None:
    return "name" if isinstance(value, str) else "columns" if isinstance(value, dict | EventKey | EventTime) else None


_BY_TABLE = Discriminator(
    _by_table_tag,
    custom_error_type="by_table",
    custom_error_message="takes a column name, or one a table: {impressions: a, clicks: b, conversions: c}",
)


class EventsSource(ImpressionTable):
    """An event log: impressions, clicks and conversions in tables of their own (docs/events.md)."""

    kind: Literal["events"]
    impressions: str = Field(
        "impressions*.parquet",
        description="Pattern of the impression files, whose columns are the features; .csv files are read as CSV with a header, others as "
        "Parquet.",
    )
    clicks: str = Field("clicks*.parquet", description="Pattern of the click files.")
    conversions: str = Field("conversions*.parquet", description="Pattern of the conversion files.")
    key: Annotated[Annotated[str, Tag("name")] | Annotated[EventKey, Tag("columns")], _BY_TABLE] = Field(
        description="Column with the impression key, whole numbers or text, compared as text: one name, or one a table (impressions, clicks, "
        "conversions)."
    )
    time: Annotated[Annotated[str, Tag("name")] | Annotated[EventTime, Tag("columns")], _BY_TABLE] = Field(
        description="Column with the time of the event: numbers since 1970 in time_unit, timestamps, or ISO text (UTC unless it says "
        "otherwise). One name, or one a table."
    )
    time_unit: TimeUnit = Field("s", description="What times that are numbers count since 1970.")
    click_window_s: float = Field(gt=0, description="An impression is clicked by a click at most so many seconds after it.")
    conversion_window_s: float = Field(gt=0, description="A click is converted by a conversion at most so many seconds after it.")
    attribution_key: list[str] = Field(
        [],
        description="Columns of impressions and conversions, such as user and item: a conversion without impression key counts for the "
        "impression with these values that was clicked last before it (last touch).",
    )
    log_end: Moment | None = Field(
        None,
        description="Until when the three tables are complete: ISO text, or a number in time_unit; by default the latest time in them.",
    )
    open_windows: Literal["drop", "keep"] = Field(
        "drop",
        description="An impression whose windows together end after log_end may still convert: leave it out, whatever came of it so far, or "
        "keep it with the labels so far.",
    )

    @model_validator(mode="after")
    def _log_end_is_a_time(self) -> Self:
        in_a_second = {"s": 1, "ms": 1_000, "us": 1_000_000}[self.time_unit]
        if self.log_end is not None and not isinstance(self.log_end, str) and self.log_end / in_a_second > moment("2200-01-01") / 1e6:
            raise ValueError(f"log_end {self.log_end} is after 2200 by time_unit {self.time_unit!r}: set that to what the numbers count")
        return self

    @model_validator(mode="after")
    def _conversions_find_their_impression(self) -> Self:
        if self.column("key", "conversions") is None and not self.attribution_key:
            raise ValueError("conversions without a key (key.conversions: null) need an attribution_key, such as [user_id, item_id]")
        twice = sorted({name for name in self.attribution_key if self.attribution_key.count(name) > 1})
        if twice:
            raise ValueError(f"attribution_key names a column twice: {', '.join(twice)}")
        return self

    def column(self, what: Literal["key", "time"], table: Literal["impressions", "clicks", "conversions"]) -> str | None:
        """The name of the key or time column in a table; None where conversions carry no key."""
        named = self.key if what == "key" else self.time
        name: str | None = named if isinstance(named, str) else getattr(named, table)
        return name


Source = Annotated[AliccpSource | TableSource | MatrixSource | EventsSource, Field(discriminator="kind")]


LISTS = ("list", "weighted_list")
ONLY_FOR = {
    "cross": ("categorical",),
    "max_length": LISTS,
    "max_length_keeps": LISTS,
    "clip": ("numeric",),
    "log1p": ("numeric",),
    "buckets": ("numeric",),
    "managed_size": ("categorical", "list"),
}
"""Settings of a feature that are for some kinds alone."""


class FeatureConfig(Section):
    """One feature of an impression."""

    name: str = Field(description="Name of the feature, and of its embedding table.", pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    kind: Literal["categorical", "list", "weighted_list", "numeric"] = Field(
        description="What one impression holds: one value, several, several with weights, or a number."
    )
    column: str = Field("", description="Column (table) or field id (aliccp) it is read from; the name when empty.")
    cross: list[str] | None = Field(
        None,
        min_length=2,
        max_length=3,
        description="Of kind categorical: two or three single-valued columns instead of one, whose values together are the value.",
    )
    weights_column: str | None = Field(None, description="Parquet column with the weights of a weighted_list, beside its values.")
    min_count: int = Field(1, ge=1, description="Values seen in fewer training impressions are out of vocabulary.")
    max_size: int | None = Field(None, ge=1, description="At most so many values enter the vocabulary, the most frequent first.")
    oov_rows: int = Field(1, ge=1, le=MAX_TABLE_ROWS, description="Table rows shared by the values that are out of vocabulary.")
    hash_size: int | None = Field(None, ge=2, le=MAX_TABLE_ROWS, description="Hash values to so many rows instead of keeping a vocabulary.")
    managed_size: int | None = Field(
        None,
        ge=2,
        le=MAX_TABLE_ROWS,
        description="Of kind categorical and list: so many rows instead of a vocabulary. A value takes one when training meets it; where none is free, that of the value not met for longest.",
    )
    pooling: Literal["sum", "mean"] = Field("mean", description="How the embeddings of several values become one.")
    max_length: int | None = Field(None, ge=1, description="Of kind list and weighted_list: at most so many values of an impression.")
    max_length_keeps: Literal["first", "last"] = Field("first", description="Which values of a longer list max_length keeps.")
    clip: tuple[float | None, float | None] | None = Field(
        None, description="Of kind numeric: [least, greatest]; numbers beyond are set to it, before log1p. Either may be null."
    )
    log1p: bool = Field(False, description="Take log(1 + x) of a numeric feature before it is standardised.")
    buckets: int | None = Field(
        None,
        ge=2,
        le=MAX_BUCKETS,
        description="Of kind numeric: an embedding table instead of a number, a row for each of so many quantiles of the training values.",
    )

    @property
    def is_table(self) -> bool:
        """Whether the feature has an embedding table."""
        return self.kind != "numeric" or self.buckets is not None

    @property
    def is_fitted(self) -> bool:
        """Whether that table's rows depend on how often training has which value."""
        return self.is_table and self.hash_size is None and self.managed_size is None

    @model_validator(mode="before")
    @classmethod
    def _column_is_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("column"):
            parts: Any = value.get("cross")
            crossed = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
            return {**value, "column": CROSS_SIGN.join(parts) if crossed else value.get("name", "")}
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.name in RESERVED_COLUMNS:
            raise ValueError(f"{self.name!r} is a reserved column; give the feature another name and set its column")
        if self.weights_column is not None and self.kind != "weighted_list":
            raise ValueError("weights_column is for kind weighted_list only")
        if self.kind == "numeric":
            lacks = "table" if self.buckets is None else "vocabulary"
            for name in ("min_count", "max_size", "oov_rows", "hash_size", "managed_size", "pooling"):
                if self._is_set(name):
                    raise ValueError(f"{name} has no effect on kind numeric, which has no {lacks}")
        for name, kinds in ONLY_FOR.items():
            if self._is_set(name) and self.kind not in kinds:
                raise ValueError(f"{name} is for kind {' and '.join(kinds)} only")
        if self.hash_size is not None and (self.min_count > 1 or self.max_size is not None):
            raise ValueError("hash_size excludes min_count and max_size: hashing keeps no vocabulary")
        if self.managed_size is not None:
            for name in ("min_count", "max_size", "oov_rows", "hash_size"):
                if self._is_set(name):
                    raise ValueError(f"managed_size excludes {name}: its rows are given away in training, without a vocabulary")
        return self

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @model_validator(mode="after")
    def _transforms_do_something(self) -> Self:
        if self._is_set("max_length_keeps") and self.max_length is None:
            raise ValueError("max_length_keeps has no effect without max_length")
        if self.log1p and self.buckets is not None:
            raise ValueError("log1p has no effect on buckets: quantiles of log(1 + x) are those of x")
        if self.clip is not None:
            self._check_clip(*self.clip)
        if self.cross is not None:
            twice = sorted({part for part in self.cross if self.cross.count(part) > 1})
            if twice:
                raise ValueError(f"cross names different columns, found twice: {', '.join(twice)}")
            if self.column != CROSS_SIGN.join(self.cross):
                raise ValueError(f"column {self.column!r} is not read beside cross: leave it out")
        return self

    def _check_clip(self, low: float | None, high: float | None) -> None:
        if low is None and high is None:
            raise ValueError("clip: [null, null] has no effect: give a bound, or leave it out")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"clip: the least number must be below the greatest, got {low:g} and {high:g}")
        bounds = [bound for bound in (low, high) if bound is not None and bound <= -1]
        if self.log1p and bounds:
            raise ValueError(f"clip: log1p takes numbers above -1, got the bound {bounds[0]:g}")


class FileSplit(Section):
    """Splits by file name. An empty pattern is an empty split."""

    by: Literal["file"]
    train: str = Field(description="Pattern of the file names that train.")
    validation: str = Field("", description="Pattern of the file names that validate.")
    test: str = Field("", description="Pattern of the file names that test.")
    validation_share: float = Field(
        0.0, ge=0, lt=1, description="Share of the rows of the training files that validate instead, by a stable hash of file name and row."
    )

    @model_validator(mode="after")
    def _one_validation(self) -> Self:
        if self.validation and self.validation_share:
            raise ValueError("validation and validation_share exclude each other: files validate, or a share of the training rows")
        return self


class ColumnSplit(Section):
    """Splits by the value of a column, compared as text."""

    by: Literal["column"]
    column: str = Field(description="The column that names the split.")
    train: list[str] = Field(description="Values that train.")
    validation: list[str] = Field([], description="Values that validate.")
    test: list[str] = Field([], description="Values that test.")

    @model_validator(mode="after")
    def _values_are_apart(self) -> Self:
        values = [*self.train, *self.validation, *self.test]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"a value belongs to one split, found twice: {', '.join(twice)}")
        return self


class HashSplit(Section):
    """Splits by a stable hash of a column, so that equal values stay together."""

    by: Literal["hash"]
    column: str | None = Field(None, description="Column that is hashed; the row's place in its file when absent.")
    salt: str = Field("", description="Another salt gives another split.")
    train: float = Field(ge=0, le=1, description="Share that trains.")
    validation: float = Field(0.0, ge=0, le=1, description="Share that validates.")
    test: float = Field(0.0, ge=0, le=1, description="Share that tests.")

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test must be 1, is {total:g}")
        return self


class TimeSplit(Section):
    """Splits by time: what is older trains, what is newer tests. A row without a time belongs to no split."""

    by: Literal["time"]
    column: str = Field(description="Column with the time: numbers, timestamps, dates, or ISO text (UTC unless it says otherwise).")
    validation_from: Moment | None = Field(
        None, description="Rows from here on validate; none do when absent. ISO text, or a number, as test_from is."
    )
    test_from: Moment = Field(
        description="Rows from here on test: ISO text (UTC unless it says otherwise), or a number, which is compared with numbers as it is."
    )
    unit: TimeUnit = Field("s", description="What numbers count since 1970, where a number meets a time.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        first, second = self.validation_from, self.test_from
        if first is None:
            return self
        if isinstance(first, str) != isinstance(second, str):
            raise ValueError("validation_from and test_from are both ISO text, or both numbers")
        if moment(first) >= moment(second):
            raise ValueError(f"validation_from must be before test_from, {first} is not before {second}")
        return self


def moment(value: Moment) -> int | float:
    """ISO text as microseconds since 1970; a number as it is."""
    if not isinstance(value, str):
        return value
    parsed = datetime.fromisoformat(value)
    return ((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


class DataConfig(Section):
    """What the logs hold and how they become a data set."""

    source: Source = Field(description="Where impressions come from.")
    features: list[FeatureConfig] = Field(min_length=1, description="The features, in order.")
    keep: list[str] = Field([], description="Raw columns carried along for grouping and for predictions; never features by themselves.")
    split: Annotated[FileSplit | ColumnSplit | HashSplit | TimeSplit, Field(discriminator="by")] = Field(
        description="How impressions are split."
    )
    conversion_without_click: Literal["refuse", "drop", "click"] = Field(
        "refuse", description="A conversion whose click is 0: refuse the input, drop and count the row, or keep it as a click."
    )
    bad_rows: Literal["refuse", "count"] = Field(
        "refuse", description="A row that cannot be read: refuse the input, or leave it out and count it with its reason."
    )
    negative_keep_rate: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the unclicked training impressions that are kept, each with 1 / share times its weight. Validation and "
        "test stay whole.",
    )
    rows_per_file: int = Field(1_000_000, ge=1, description="Rows of one Parquet part.")
    rows_per_group: int = Field(32_768, ge=1, description="Rows of one Parquet row group: what the reader decodes and shuffles at a time.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [feature.name for feature in self.features]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"feature names must be unique, found twice: {', '.join(twice)}")
        if not isinstance(self.source, ImpressionTable):
            for feature in self.features:
                if feature.weights_column is not None:
                    raise ValueError(
                        f"feature {feature.name!r}: weights_column is for table sources; {self.source.kind} columns bring their own values"
                    )
        return self

    @model_validator(mode="after")
    def _features_do_not_leak(self) -> Self:
        labels = {getattr(self.source, name): name for name in RESERVED_COLUMNS if getattr(self.source, name, None) is not None}
        if not isinstance(self.source, ImpressionTable):
            return self
        for feature in self.features:
            for column in (*(feature.cross or [feature.column]), feature.weights_column):
                if column in labels:
                    raise ValueError(
                        f"feature {feature.name!r} reads column {column!r}, which is data.source.{labels[column]}: a model would learn from what "
                        "is to be predicted. Leave the feature out, or name the right column"
                    )
        return self

    @model_validator(mode="after")
    def _matrix_is_split_by_file(self) -> Self:
        if isinstance(self.source, MatrixSource):
            train, test = Path(self.source.train).name, Path(self.source.test).name
            if not isinstance(self.split, FileSplit) or (self.split.train, self.split.validation, self.split.test) != (train, "", test):
                raise ValueError(
                    f"a matrix source brings its own test set: split: {{ by: file, train: {train}, test: {test} }}, "
                    "with validation_share to validate"
                )
            if "user" not in self.keep:
                raise ValueError("a matrix source needs user under keep: its test ratings are ranked by user")
        return self


# --- model --------------------------------------------------------------------------------------


class SharedBottom(Section):
    """One network under all towers."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    hidden: list[Width] = Field([], description="Widths of the shared layers; none means that towers read the embeddings.")


class Mmoe(Section):
    """Multi-gate mixture of experts (Ma et al., KDD 2018): each tower weights the experts by a gate of its own."""

    kind: Literal["mmoe"]
    experts: int = Field(4, ge=1, description="How many experts.")
    hidden: list[Width] = Field([128], min_length=1, description="Widths of an expert's layers.")


class Ple(Section):
    """Progressive layered extraction (Tang et al., RecSys 2020): shared experts and each tower's own, level upon level."""

    kind: Literal["ple"]
    levels: int = Field(2, ge=1, description="Levels of experts; at each, a tower's gate weights its own and the shared ones.")
    task_experts: int = Field(2, ge=1, description="Experts of each tower, at each level.")
    shared_experts: int = Field(2, ge=1, description="Shared experts, at each level.")
    hidden: list[Width] = Field([128], min_length=1, description="Widths of an expert's layers.")


class DcnV2(Section):
    """Deep & cross network v2, stacked (Wang et al., WWW 2021): a cross network under shared layers under the towers."""

    kind: Literal["dcn_v2"]
    cross_layers: int = Field(2, ge=1, description="Cross layers; each lets one more input into a product.")
    rank: int | None = Field(
        None,
        ge=1,
        description="Rank of each cross layer's matrix; null is the full matrix. Less than half the number of inputs saves work.",
    )
    experts: int = Field(1, ge=1, description="Low-rank experts of each cross layer, mixed by a gate; more than one needs rank.")
    hidden: list[Width] = Field([128], description="Widths of the shared layers on the crosses; none means that towers read the crosses.")

    @model_validator(mode="after")
    def _experts_are_low_rank(self) -> Self:
        if self.experts > 1 and self.rank is None:
            raise ValueError(f"experts: {self.experts} needs a rank, for example rank: 32, or experts: 1")
        return self


class ModelConfig(Section):
    """The network, from pooled embeddings to logits."""

    embedding_dim: int = Field(16, ge=4, multiple_of=4, description="Width of every embedding table.")
    embedding_init_std: float = Field(0.01, gt=0, description="Standard deviation of the uniform initial embeddings.")
    backbone: Annotated[SharedBottom | Mmoe | Ple | DcnV2, Field(discriminator="kind")] = Field(
        SharedBottom(), description="What stands between embeddings and towers."
    )
    tower_hidden: list[Width] = Field([128, 64], description="Widths of the hidden layers of each tower.")


# --- objective ----------------------------------------------------------------------------------

# One name a file in objectives/estimators/, - and + written _ there.
ObjectiveKind = Literal[
    "esmm",
    "naive",
    "naive+ctcvr",
    "direct",
    "multi-ipw",
    "multi-dr",
    "escm2-ips",
    "escm2-snips",
    "escm2-dr",
    "stable-dr",
    "dcmt",
    "two-space",
]


class PropensityConfig(Section):
    """q, the click probability as a weight: stop_gradient(max(p_hat, floor))."""

    floor: float = Field(
        0.1, ge=0, lt=1, description="Least propensity: times the training set's base CTR (relative), or as it is (absolute)."
    )
    floor_kind: Literal["relative", "absolute"] = Field("relative", description="How floor is read. The paper's is absolute 0.1.")
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of all steps in which q is the base CTR, while the CTR head learns.")
    calibration: Literal["none", "temperature", "platt"] = Field(
        "none", description="Fit q to clicks of the validation split: a temperature, or slope and shift (Platt). Changes q only."
    )
    calibration_every_steps: int = Field(20, ge=1, description="Steps of training before each step of calibration.")
    cross_fit: bool = Field(
        False,
        description="Take q from two models, each trained on one half of the training split and asked for the other: for several epochs, "
        "in which p_hat comes to know the clicks that it weighs.",
    )
    balance: float = Field(
        0.0,
        ge=0,
        description="Weight of DR-V2's balancing term; above 0 a propensity tower of its own learns by it, and q is of that tower.",
    )


class ImputationConfig(Section):
    """The imputation tower of the objectives that impute."""

    predicts: Literal["error", "label"] = Field(
        "label",
        description="label: m = sigmoid(tower), delta_hat = BCE(eta_hat, m), by a loss that has no lower bound unless clip_pseudo_labels. "
        "error: delta_hat = softplus(tower), as the ESCM2 paper has it; all but the imputation tower then learns what IPS teaches.",
    )
    weighting: Literal["dr-jl", "mrdr", "dr-bias", "dr-mse"] = Field(
        "dr-jl", description="v of the imputation loss: 1/q, (1-q)/q^2, (1-q)^2/q^3, or a mixture of the last two."
    )
    mse_mixture: float = Field(0.5, ge=0, le=1, description="Share of dr-bias in dr-mse; the rest is mrdr.")
    loss: Literal["squared", "bce"] | None = Field(
        None,
        description="Squared error of delta_hat, or (label only) BCE(m, r), which is not blind at z = 0. By default bce for labels, "
        "squared for errors.",
    )
    normalise: bool = Field(False, description="Divide the imputation loss by the sum of its weights instead of N.")
    clip_pseudo_labels: bool = Field(
        False,
        description="Clip m + (o/q)(r - m) to [0, 1] (label only): r where clicked, m elsewhere. Bounded below; right only where m is.",
    )
    alternate: bool = Field(
        False, description="Update CVR and imputation in turn; by default both in one step, with the same stop-gradients."
    )
    cvr_steps: int = Field(1, ge=1, description="CVR steps before each imputation step, when alternating.")
    trains_embedding: bool = Field(False, description="Let the imputation loss reach the shared part and the embeddings.")

    @property
    def default_loss(self) -> Literal["squared", "bce"]:
        """The loss where none is said."""
        return "bce" if self.predicts == "label" else "squared"


class LambdaRamp(Section):
    """A weight that changes in a straight line over training."""

    start: float = Field(ge=0, description="Weight at the first step.")
    end: float = Field(ge=0, description="Weight when the share `until` of all steps is done, and after it.")
    until: float = Field(1.0, gt=0, le=1, description="Share of all steps over which it changes.")


def _lambda_tag(value: Any) -> str | None:
    if isinstance(value, dict | LambdaRamp):
        return "ramp"
    if isinstance(value, int | float):
        return "number"
    return "learned" if value == "learned" else None


Lambda = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[LambdaRamp, Tag("ramp")] | Annotated[Literal["learned"], Tag("learned")],
    Discriminator(
        _lambda_tag,
        custom_error_type="lambda",
        custom_error_message="takes a number, a ramp {start: 0, end: 1, until: 0.5}, or learned",
    ),
]


class ObjectiveConfig(Section):
    """L = L_CTR + lambda_c L_CVR + lambda_g L_CTCVR (docs/method.md)."""

    kind: ObjectiveKind = Field("escm2-dr", description="Which CVR loss.")
    lambda_c: Lambda = Field(0.5, description="Weight of the CVR loss: a number, a ramp (start, end, until), or learned.")
    lambda_g: Lambda = Field(1.0, description="Weight of the CTCVR loss: a number, a ramp, or learned.")
    lambda_imp: float = Field(
        1.0,
        gt=0,
        description="Weight of the imputation loss; it tells where imputation.trains_embedding, as AdamW does not see the scale of a tower's only loss.",
    )
    ctcvr_detach_ctr: bool | None = Field(
        None, description="Keep L_CTCVR from training the CTR head; by default true where q weighs impressions, false for esmm and naive."
    )
    propensity: PropensityConfig = Field(PropensityConfig(), description="The propensity as a weight.")
    imputation: ImputationConfig = Field(ImputationConfig(), description="The imputation tower (direct, two-space and the *-dr).")
    two_space_beta: float = Field(1.0, ge=0, description="Weight of the unclicked impressions in two-space.")
    dcmt_consistency: float = Field(1e-3, ge=0, description="Weight of |1 - eta_hat - eta_star| in dcmt.")
    stability: float = Field(1.0, ge=0, description="Weight of the constraint on the propensity tower of stable-dr.")


# --- training -----------------------------------------------------------------------------------

ShardingKind = Literal["table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise", "grid_shard", "data_parallel"]


BestBy = Literal["ctr_auc", "cvr_clicked_auc", "ctcvr_auc", "ctr_log_loss", "cvr_clicked_log_loss", "ctcvr_log_loss"]
SparseOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "rowwise_adam"]


class TrainingConfig(Section):
    """How the model is trained."""

    seed: int = Field(0, ge=0, description="Seeds tables, towers and the order of the impressions.")
    epochs: int = Field(1, ge=1, description="Passes over the training split.")
    global_batch_size: int = Field(8192, ge=1, description="Impressions of one step, over all ranks.")
    sparse_optimizer: SparseOptimizer = Field(
        "rowwise_adagrad",
        description="What steps the tables, with how many numbers of state: rowwise_adagrad (one a row), adagrad (one an element), sgd (none); on a GPU also adam (two an element) and rowwise_adam (one an element and one a row).",
    )
    sparse_learning_rate: float = Field(0.05, gt=0, description="Learning rate of the tables; 0.05 is of Adagrad.")
    dense_learning_rate: float = Field(1e-3, gt=0, description="Learning rate of everything else (AdamW).")
    warmup_steps: int = Field(0, ge=0, description="Let both learning rates rise from 0 over so many steps first.")
    learning_rate_decay: Literal["linear", "cosine", "none"] = Field(
        "linear",
        description="Let both learning rates fall to 0 over all steps, or stay: then the last batches leave their noise in the rates.",
    )
    dense_weight_decay: float = Field(0.0, ge=0, description="Weight decay of everything else.")
    clip_gradient_norm: float | None = Field(
        None, gt=0, description="Shrink the gradients of everything else to this norm, over all of them, where it is greater."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Step everything else by the mean gradient of so many steps; tables are stepped in each of them."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep a moving average of everything else that forgets 1 - ema_decay in a step (more in the first ones); it is what is measured and scored with.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of what tables hand on and towers multiply: bfloat16 is half the bytes, on a GPU; weights, optimizers, losses and metrics are float32.",
    )
    communication: Literal["full", "half"] = Field(
        "full",
        description="What ranks send each other for a number that tables hand on: all its bytes, or two (float16, gradients bfloat16).",
    )
    shuffle_lanes: int = Field(8, ge=1, description="How many places of the data set each batch mixes.")
    prefetch_batches: int = Field(4, ge=1, description="Batches read ahead by the background thread.")
    decode_threads: int = Field(1, ge=1, description="Threads that decode Parquet ahead of the batches; 1: the background thread itself.")
    log_every_steps: int = Field(50, ge=1, description="Steps between two lines of metrics.")
    mlflow: str | None = Field(
        None,
        min_length=1,
        description="Tracking URI of MLflow, such as an http address or a local folder: each line of metrics goes there too.",
    )
    mlflow_experiment: str | None = Field(None, min_length=1, description="Experiment of `mlflow` that the run is of; escm2rec by default.")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="Steps between checkpoints; the last step is always saved.")
    checkpoint_every_minutes: float | None = Field(None, gt=0, description="Minutes between checkpoints, beside those by steps.")
    keep_checkpoints: int = Field(2, ge=1, description="How many checkpoints stay: the newest ones.")
    evaluate_every_steps: int | None = Field(
        None, ge=1, description="Steps between two measurements on the whole validation split, while all ranks wait; and after the last."
    )
    keep_best: BestBy | None = Field(
        None,
        description="Keep the checkpoint of the measurement that is best by this, and make it the run's model: one of a task on its population, so that cvr_clicked sees no selection and ctcvr does.",
    )
    early_stopping: int | None = Field(
        None, ge=1, description="End the training when so many measurements after the best one were no better, by `keep_best`."
    )
    max_skipped_steps: int = Field(
        0,
        ge=0,
        description="So many steps whose loss is not finite are skipped, counted, and their batches kept, before the run ends; 0 ends it at the first one. Above 0 a GPU is waited for in each step.",
    )
    sharding: dict[str, ShardingKind] = Field(
        {},
        description="Sharding forced per feature's table ('*' for all); the planner chooses for the rest. data_parallel: every rank holds all of it. Managed tables are always row_wise.",
    )

    plan: str | None = Field(
        None,
        description="A plan.json that escm2rec plan wrote, or its folder: tables are sharded as it says. `train --plan` sets it.",
    )

    @model_validator(mode="after")
    def _plan_decides(self) -> Self:
        if self.plan is not None and self.sharding:
            raise ValueError("plan says how every table is sharded, and sharding says so of some: leave one of them out")
        return self

    @model_validator(mode="after")
    def _mlflow_is_no_secret(self) -> Self:
        if self.mlflow_experiment is not None and self.mlflow is None:
            raise ValueError("mlflow_experiment needs mlflow, the tracking URI: nothing is logged there without it")
        if self.mlflow is not None and "@" in urlsplit(self.mlflow).netloc:
            raise ValueError(
                "mlflow holds a user or password, and would be kept in RUN/config.json: give them by the environment "
                "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN)"
            )
        return self

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.keep_best is not None and self.evaluate_every_steps is None:
            raise ValueError("keep_best needs evaluate_every_steps: nothing is measured without it")
        if self.early_stopping is not None and self.keep_best is None:
            raise ValueError("early_stopping needs keep_best, which says what better is")
        if self.sparse_optimizer in ("adam", "rowwise_adam") and "data_parallel" in self.sharding.values():
            raise ValueError(
                f"sharding: data_parallel does not go with sparse_optimizer: {self.sparse_optimizer}, which moves the rows that a batch looked up, "
                "also where their gradient is 0: from gradients that are summed over ranks it is not known which; take another sharding, or rowwise_adagrad, adagrad or sgd"
            )
        if self.communication == "half" and self.precision == "bfloat16":
            raise ValueError("communication: half does not go with precision: bfloat16, whose tables hand on two bytes a number already")
        if self.evaluate_every_steps is not None and self.evaluate_every_steps % self.gradient_accumulation_steps:
            raise ValueError(
                f"evaluate_every_steps ({self.evaluate_every_steps}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}): between two of its steps there is no model to keep"
            )
        return self

    @property
    def in_bfloat16(self) -> bool:
        """Whether `precision` is bfloat16."""
        return self.precision == "bfloat16"


# --- simulation ---------------------------------------------------------------------------------


class SimulationConfig(Section):
    """A world whose propensity and CVR are known. Rates default to Ali-CCP's."""

    ctr: float = Field(0.04, gt=0, lt=1, description="Mean click probability.")
    cvr: float = Field(0.005, gt=0, lt=1, description="Mean conversion probability of the clicked impressions.")
    selection: float = Field(0.5, ge=-1, le=1, description="Correlation between what draws a click and what makes it convert.")
    users: int = Field(20_000, ge=2, description="Distinct users; some have many impressions, most have few.")
    items: int = Field(50_000, ge=2, description="Distinct items, heavy-tailed in popularity.")


# --- the whole ----------------------------------------------------------------------------------


class ChoiceConfig(Section):
    """Objectives to be tried beside `objective`, which is kept unless one errs less beyond a standard error. They share everything else."""

    objectives: list[ObjectiveConfig] = Field([], description="Sections like `objective`, each a model trained.")
    judge: ModelConfig | None = Field(
        None, description="Network of the model that judges; that of `model` by default. One that can learn more judges better."
    )
    by: Literal["dr", "snips"] = Field(
        "dr", description="What estimates the CVR risk on all impressions of the validation split: doubly robust, or self-normalised IPS."
    )


class Config(Section):
    """A complete configuration."""

    data: DataConfig = Field(description="What the logs hold and how they become a data set.")
    model: ModelConfig = Field(ModelConfig(), description="The network.")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="What is optimised.")
    choice: ChoiceConfig = Field(ChoiceConfig(), description="Further objectives to try, and how to choose.")
    training: TrainingConfig = Field(TrainingConfig(), description="How it is optimised.")
    simulation: SimulationConfig = Field(SimulationConfig(), description="The world that `simulate` draws from.")

    @model_validator(mode="after")
    def _tables_are_there(self) -> Self:
        tables = {feature.name for feature in self.data.features if feature.is_table}
        if not tables:
            raise ValueError("data.features: at least one must have a table, all are of kind numeric")
        managed = {feature.name for feature in self.data.features if feature.managed_size is not None}
        for name, kind in self.training.sharding.items():
            if name != "*" and name not in tables:
                raise ValueError(f"training.sharding names no table {name!r}{did_you_mean(name, sorted(tables))}")
            if name in managed and kind != "row_wise":
                raise ValueError(
                    f"training.sharding: {kind} does not go with the managed table {name!r}, which is always row_wise: leave it out"
                )
        return self


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config and apply `--set a.b=value` overrides, whose values are YAML too.

    Raises ConfigError with every problem found, each with its place.
    """
    text = _read_text(Path(path))
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a date that does not exist
        raise ConfigError(f"{path} is not valid YAML: {error}", "check the indentation near the place named above, and dates") from error
    return parse_config(tree, overrides, where=str(path))


def parse_config(tree: Any, overrides: Iterable[str] = (), where: str = "config") -> Config:
    """Check a config given as nested mappings; see `load_config`."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold a mapping with the key 'data', found {type(tree).__name__}")
    set_keys = [_apply_override(tree, override) for override in overrides]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_problems(error, Config, where, set_keys), "escm2rec config schema prints every key and what it takes") from error


def load_simulation(path: str | Path | None, overrides: Iterable[str] = ()) -> SimulationConfig:
    """The `simulation` section of a config, or its defaults when there is no config."""
    if path is not None:
        return load_config(path, overrides).simulation
    tree: dict[str, Any] = {}
    set_keys = [_apply_override(tree, override) for override in overrides]
    for key in tree:
        if key != "simulation":
            raise ConfigError(f"--set {key}... has no effect on simulate without --config", "only simulation.* can be set")
    try:
        return SimulationConfig.model_validate(tree.get("simulation", {}))
    except ValidationError as error:
        raise ConfigError(_problems(error, SimulationConfig, "--set", set_keys, inside="simulation")) from error


def config_json_schema() -> dict[str, Any]:
    """The JSON Schema of the config, for editors."""
    return Config.model_json_schema()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"no config file at {path}", "data/demo.yaml is a complete example") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from error


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Put an override into the tree; its key."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set takes a.b=value, got {override!r}", "for example --set training.epochs=2")
    *parents, leaf = path.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"--set {path}: {parent!r} is not a section", "only keys of sections can be set; edit lists in the file")
    try:
        node[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a date that does not exist
        is_date = not isinstance(error, yaml.YAMLError)
        what = f"no date: {error}" if is_date else "not valid YAML"
        raise ConfigError(f"--set {path}: {value!r} is {what}", "give one that exists" if is_date else "quote the value") from error
    return path


def _problems(error: ValidationError, root: type[BaseModel], where: str, set_keys: list[str], inside: str = "") -> str:
    """Every problem on a line of its own, with its place; what an override brought is told as --set."""
    lines, of_set = [], 0
    for problem in error.errors():
        path, what = _problem(problem, root)
        path = f"{inside}.{path}" if inside else path
        unknown = problem["type"] == "extra_forbidden"  # then the whole section is, whichever of its keys was set
        is_set = any(f"{path}.".startswith(f"{key}.") or (unknown and key.startswith(f"{path}.")) for key in set_keys)
        lines.append(f"  --set {path}: {what}" if is_set else f"  {path}: {what}")
        of_set += is_set
    where = "--set" if of_set == len(lines) else f"{where} with its --set" if set_keys else where
    return f"{where} has {len(lines)} problem(s):\n" + "\n".join(lines)


def _problem(problem: ErrorDetails, root: type[BaseModel]) -> tuple[str, str]:
    """The place of a problem, and what is wrong there."""
    path, seen, context = _readable_path(problem["loc"]), problem["input"], problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        return path, f"unknown key{did_you_mean(key, [name for name in _all_keys(root) if name != key])}"
    if problem["type"] == "missing":
        return path, "required, missing"
    if problem["type"] == "literal_error":
        return path, _unknown(path, seen, context["expected"])
    if problem["type"].startswith("union_tag"):
        path = f"{path}.{context['discriminator']}".replace("'", "")  # pydantic quotes it
        missing = problem["type"] == "union_tag_not_found"
        return path, "required, missing" if missing else _unknown(path, context["tag"], context["expected_tags"])
    if problem["type"] in ("model_type", "model_attributes_type"):
        return path, f"takes a section of keys{_such_as(path, seen)}, got {json.dumps(seen, default=str)}"
    if problem["type"] == "list_type" and isinstance(seen, str | int | float):
        return path, f"takes a list, such as [{seen}], got {json.dumps(seen)}"
    shown = json.dumps(seen, default=str)
    return path, problem["msg"].removeprefix("Value error, ") + (f" (got {shown})" if len(shown) <= 60 else "")


OF_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "source": ("kind", ("aliccp", "table", "matrix", "events")),
    "backbone": ("kind", ("shared_bottom", "mmoe", "ple", "dcn_v2")),
    "split": ("by", ("file", "column", "hash", "time")),
    "objective": ("kind", get_args(ObjectiveKind)),
    "objectives": ("kind", get_args(ObjectiveKind)),
}
"""Of sections, and lists of sections, that come in kinds: the key that says which, and what it may say."""


def _such_as(path: str, seen: Any) -> str:
    """What may have been meant by a word in the place of a section of some kind; else which kinds there are."""
    name = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
    if name not in OF_KINDS:
        return ""
    key, known = OF_KINDS[name]
    near = difflib.get_close_matches(str(seen), known, n=1)
    return f", such as {{{key}: {near[0]}}}" if near else f" with {key}: {', '.join(known)}"


def _unknown(path: str, seen: Any, expected: str) -> str:
    """Of a value that is none of the names that pydantic lists."""
    known = re.findall(r"'([^']*)'", expected)
    near = did_you_mean(str(seen), known)
    shown = "null" if seen is None else repr(seen)
    return f"unknown {'kind' if path.endswith('.kind') else 'value'} {shown}{near + ' ' if near else '; '}known: {', '.join(known)}"


def _readable_path(loc: tuple[int | str, ...]) -> str:
    # Discriminated unions put the tag ("aliccp", "hash", ...) into the path; a person has not written it there as a key.
    tags = {"aliccp", "table", "matrix", "events", "file", "column", "hash", "time", "shared_bottom", "mmoe", "ple", "dcn_v2"}
    tags |= {"number", "ramp", "learned", "name", "columns", "str", "int", "float"}
    before = ("source", "split", "backbone", "lambda_c", "lambda_g", "key", "time", "log_end", "validation_from", "test_from")
    parts = [str(part) for index, part in enumerate(loc) if not (part in tags and index > 0 and loc[index - 1] in before)]
    return ".".join(parts) or "config"


def _all_keys(root: type[BaseModel]) -> list[str]:
    definitions = root.model_json_schema()
    sections = [definitions, *definitions.get("$defs", {}).values()]
    return sorted({key for section in sections for key in section.get("properties", {})})

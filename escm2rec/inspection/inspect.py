"""The `inspect` verb: what a data set holds, as JSON, as a table, and as a page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from escm2rec.config import SPLITS, ImpressionTable, Split
from escm2rec.errors import ConfigError, DataError
from escm2rec.inspection.held import Held, counted_rows, held_by
from escm2rec.inspection.table import print_tables
from escm2rec.inspection.verify import verify as verify_files
from escm2rec.paths import DataPath, open_parquet
from escm2rec.preprocess.ragged import Float32s, Float64s, Int64s
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Feature

Record = dict[str, Any]
NO_ROWS: Record = {
    **dict.fromkeys(("rows", "clicks", "conversions"), 0),
    **dict.fromkeys(("weights", "rates_of", "ctr", "cvr", "ctcvr")),
    **dict.fromkeys(("files", "row_groups", "bytes"), 0),
}
"""What is said of a split without rows."""
MOST_SHOWN = 1_000
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
NUMERIC_QUANTILES = {"min": 0.0, "p1": 0.01, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p99": 0.99, "max": 1.0}
LEAST_OF_LOG1P = -1 + 2.0**-53


@dataclass(frozen=True)
class _Top:
    """How often training meets the values and the rows of a table, the most frequent first.

    values  the first MOST_SHOWN of those with a row of their own
    counts  of each of these, and of the rest
    by_row  the same of each row that is met, those that values share among them
    total   values in training
    rows    of the table
    """

    values: list[Any]
    counts: Int64s
    by_row: Int64s
    total: int
    rows: int

    def record(self, most: int) -> Record:
        shown = zip(self.values[:most], self.counts[:most].tolist(), strict=False)
        top = [{"value": value, "count": count, "share": count / self.total} for value, count in shown]
        hundredth = self.by_row[: max(self.rows // 100, 1)].sum()
        return {"top": top, "concentration": float(hundredth / self.by_row.sum()) if len(self.by_row) else None}


def inspect(data: DataPath, top: int = 10, html: Path | None = None, overwrite: bool = False, verify: bool = False) -> Record:
    """Say what the data set folder `data` holds; with `html` also write a page there, with plots.

    With `verify` every file is read first, and compared with the size and checksum that were noted when it was written.

    Returns

    splits    of each: rows, clicks, conversions; weights, the same with each row counting its weight, None where rows have none;
              ctr, cvr (of the clicked) and ctcvr; rates_of, "weights" or "rows": what they are shares of ("rows" also where weights change
              nothing); files, row_groups and bytes. Of a split without rows counts are 0, the others None, and no feature is told
    features  of each: kind, column, and by split coverage (share of the impressions with a value), in the order of the config;
              tables: encoding, table_rows, values (those with a row of their own), oov by split (share of the values without one);
              lists: lengths by split (mean, p50, p90, p99, max of the values an impression);
              the `top` most frequent: value (row of a hashed table, range of a bucket, hash of a cross), count and share of all training
              values;
              concentration: share of the training values that fall on the most frequent hundredth of the rows (one at least), those
              that values out of vocabulary share among them; None where training has no value;
              clip, cross and max_length as configured, where they are;
              numeric: mean and std of training (of the logarithm with log1p), and by split missing (share of the impressions without a
              number) and quantiles, in the units of the log; all are of the numbers that were there; quantiles are of a sample,
              every k-th row so that they are a million at most, and None where that has none, as it may of a feature that few rows have;
              they have the digits that float32 tells, about 7
    rejected, negative_keep_rate, negatives_left_out, schema_hash   as preprocess wrote them
    weight    the column of the log that the weights are of, None where there is none

    verified  with `verify`: how many files and bytes were compared

    All that is not a rate of a split counts rows, whatever they weigh.

    Raises DataError when the data set is absent, incomplete or damaged (with `verify`, be it by a bit), ConfigError when `html` may not be
    written.
    """
    _check_page(html, overwrite)
    dataset = Dataset.open(data)
    verified = {"verified": verify_files(dataset)} if verify else {}
    held = held_by(dataset)
    tops = {feature.name: _top_counts(dataset, feature, held) for feature in dataset.schema.tables}
    features = {feature.name: _feature(dataset, feature, held, tops.get(feature.name), top) for feature in dataset.schema.features}
    manifest = dataset.manifest
    record: Record = {
        "data": str(data),
        **{name: manifest[name] for name in ("schema_hash", "negative_keep_rate", "negatives_left_out")},
        "weight": _weight_column(dataset),
        "rejected": {reason: entry["rows"] for reason, entry in manifest["rejected"].items()},
        **verified,
        "splits": {split: _split(dataset, split) for split in SPLITS},
        "features": features,
    }
    print_tables(record)
    if html is not None:
        from escm2rec.inspection.html import write_inspection

        counts = {name: top_of.by_row for name, top_of in tops.items() if top_of is not None}
        write_inspection(record, dataset.schema.features, held, counts, html)
        record["html"] = str(html)
    return record


def _check_page(html: Path | None, overwrite: bool) -> None:
    if html is None:
        return
    if html.exists() and not (overwrite and html.is_file()):
        hint = "choose another file" if html.is_dir() else "choose another, or pass --overwrite to replace it"
        raise ConfigError(f"the page {html} exists", hint)
    from escm2rec.evaluation.html import is_page

    if html.exists() and not is_page(html):
        raise ConfigError(f"will not overwrite {html}: it is no page that escm2rec made", "choose another, or remove it by hand")
    if not html.parent.is_dir():
        raise ConfigError(f"no folder {html.parent} for the page", "make it first, or choose another place")


def _weight_column(dataset: Dataset) -> str | None:
    source = dataset.schema.source
    return source.weight if isinstance(source, ImpressionTable) else None


def _split(dataset: Dataset, split: Split) -> Record:
    if not dataset.manifest["splits"].get(split, {}).get("rows"):
        return dict(NO_ROWS)
    counts, weighted = dataset.split_counts(split), dataset.weighted_counts(split)
    files = dataset.manifest["splits"][split]["files"]
    return {
        **counts,
        "weights": weighted if dataset.schema.has_weight else None,
        "rates_of": "rows" if weighted == counts else "weights",
        "ctr": weighted["clicks"] / weighted["rows"],
        "cvr": weighted["conversions"] / weighted["clicks"] if weighted["clicks"] else None,
        "ctcvr": weighted["conversions"] / weighted["rows"],
        "files": len(files),
        "row_groups": len(dataset.row_groups(split)),
        "bytes": sum(file["bytes"] for file in files),
    }


def _feature(dataset: Dataset, feature: Feature, held: dict[Split, Held], top: _Top | None, most: int) -> Record:
    told = dataset.manifest["features"][feature.name]
    record: Record = {
        "kind": feature.kind,
        "column": feature.column,
        "coverage": {split: None if told["missing"][split] is None else 1 - told["missing"][split] for split in held},
    }
    transforms = {"cross": feature.cross, "max_length": feature.max_length, "clip": feature.clip}
    record |= {name: list(told) if isinstance(told, tuple) else told for name, told in transforms.items() if told is not None}
    if not feature.is_table:
        record |= {"log1p": feature.log1p, "mean": feature.mean, "std": feature.std}
        record["missing"] = {split: told["missing"][split] for split in held}
        return record | {"quantiles": {split: _number_quantiles(feature, each.numbers[feature.name]) for split, each in held.items()}}
    record |= {"encoding": feature.encoding, "table_rows": feature.num_embeddings}
    if feature.encoding == "vocabulary":
        record |= {"values": feature.num_embeddings - feature.oov_rows, "oov": {split: told["oov"][split] for split in held}}
    if feature.is_list:
        record["lengths"] = {split: length_quantiles(each.lengths[feature.name]) for split, each in held.items()}
    if top is not None:
        record |= top.record(most)
    return record


def _top_counts(dataset: Dataset, feature: Feature, held: dict[Split, Held]) -> _Top | None:
    """Of a vocabulary what it was fitted with; of other tables what the pass counted, with rows or the ranges of buckets for values.

    None where that are too many rows to be counted.
    """
    shared_alone = feature.encoding == "vocabulary" and feature.oov_rows == 1
    if not shared_alone and not counted_rows(feature):
        return None
    counted = held["train"].counts.get(feature.name)
    if feature.encoding in ("hash", "buckets"):
        counts = np.asarray(counted)
        order = np.argsort(-counts, kind="stable")
        order = order[counts[order] > 0]
        rows = order[:MOST_SHOWN].tolist()
        values = rows if feature.encoding == "hash" else [_range_of(feature.boundaries or (), row) for row in rows]
        return _Top(values, counts[order], counts[order], int(counts.sum()), feature.num_embeddings)
    path = dataset.path / "vocabulary" / f"{feature.name}.parquet"
    try:
        with open_parquet(path) as file:
            table = file.read(columns=["value", "count"])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read the vocabulary {path}: {error}", "the data set is damaged: preprocess again") from error
    told = dataset.manifest["features"][feature.name]
    total = round(told["pooling_factor"] * dataset.split_counts("train")["rows"])
    values, counts = table["value"].slice(0, MOST_SHOWN).to_pylist(), table["count"].to_numpy()
    shared = np.array([round((told["oov"]["train"] or 0) * total)]) if counted is None else counted
    by_row = -np.sort(-np.concatenate([counts, shared[shared > 0]]), kind="stable")
    return _Top(values, counts, by_row, total, feature.num_embeddings)


def _range_of(boundaries: tuple[float, ...], row: int) -> str:
    """Which numbers a bucket holds."""
    above = f"> {boundaries[row - 1]:g}" if row else ""
    upto = f"<= {boundaries[row]:g}" if row < len(boundaries) else ""
    return " and ".join(bound for bound in (above, upto) if bound) or "any"


def length_quantiles(histogram: Int64s) -> Record:
    """Mean, quantiles and maximum of lengths of which `histogram` counts 0, 1, 2, ...; a quantile is the least length that reaches it."""
    reached = np.cumsum(histogram)
    mean = float((histogram * np.arange(len(histogram))).sum() / reached[-1])
    return {"mean": mean, **{name: int(np.searchsorted(reached, share * reached[-1])) for name, share in QUANTILES.items()}} | {
        "max": len(histogram) - 1
    }


def _number_quantiles(feature: Feature, encoded: Float32s) -> Record | None:
    if not len(encoded):
        return None
    quantiles = np.quantile(raw_numbers(feature, encoded), list(NUMERIC_QUANTILES.values())).tolist()
    return {name: told_number(feature, quantile) for name, quantile in zip(NUMERIC_QUANTILES, quantiles, strict=True)}


def told_number(feature: Feature, number: float) -> float:
    """A number computed back from a standardised float32, without the digits that this does not tell, within the bounds of `clip`.

    float32 holds 24 bits of the distance from the mean (with log1p, of the logarithms). Close to the mean these are more digits than a
    float32 of the number itself has, and that many are told.
    """
    fitted = math.log1p(max(number, LEAST_OF_LOG1P)) if feature.log1p else number
    known = 2.0**-23 * max(abs(fitted - feature.mean), min(abs(fitted), feature.std)) * (1 + number if feature.log1p else 1)
    told = round(number, -math.ceil(math.log10(known))) if known else number
    low, high = feature.clip or (None, None)
    return min(max(told, -math.inf if low is None else low), math.inf if high is None else high) + 0.0  # which makes 0 of -0


def raw_numbers(feature: Feature, encoded: Float32s) -> Float64s:
    """Encoded numbers in the units of the log."""
    raw: Float64s = encoded.astype(np.float64) * feature.std + feature.mean
    return np.expm1(raw) if feature.log1p else raw

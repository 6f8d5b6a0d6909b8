"""The page of `inspect`: one file that opens offline and explains itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from escm2rec.config import Split
from escm2rec.disk import telling_of_disk
from escm2rec.evaluation.html import aligned, facts, figure, note, table, write_page
from escm2rec.inspection.held import SAMPLE_ROWS, Held
from escm2rec.inspection.inspect import NUMERIC_QUANTILES
from escm2rec.inspection.plots import histogram_plot, lengths_plot, skew_plot
from escm2rec.inspection.table import filled, kind_of, lengths_of, percent, rates_said, value_of
from escm2rec.preprocess.ragged import Int64s
from escm2rec.schema import Feature

Record = dict[str, Any]
MAX_FEATURES_SHOWN = 60
"""Features with plots on the page; its tables and the JSON hold all."""
HASH_SHOWN = 10
"""Characters of a hash on the page: enough to find it in the JSON."""
WORDS = {
    "Coverage": "Share of the impressions that have a value of the feature.",
    "Out of vocabulary": "Share of the values without a table row of their own: not seen in training, or too rarely. They share the first "
    "rows of the table. Far more in validation and test than in training means that new values keep coming.",
    "Table rows": "Rows of the embedding table: one a value of the vocabulary, and those that the others share; or as many as "
    "<code>hash_size</code> says, or one a bucket.",
    "Concentration": "Share of all training values that fall on the most frequent hundredth of the table's rows. Near 100%, few rows do "
    "all the work: a sharding plan that gives each rank as many rows does not give it as much work.",
    "Values an impression": "Of lists, in training: the mean is the pooling factor, by which a lookup costs; p99 is what only one "
    "impression in a hundred exceeds.",
}


def write_inspection(record: Record, features: tuple[Feature, ...], held: dict[Split, Held], counts: dict[str, Int64s], path: Path) -> None:
    """Write the page of what `inspect` found; `counts` are of the table features' values, the most frequent first.

    RunError when the disk is full.
    """
    plots = list(_plots(record["features"], {feature.name: feature for feature in features}, held["train"], counts))
    shown = plots[:MAX_FEATURES_SHOWN]
    left = f"{len(plots) - len(shown)} more features are in the tables and in the JSON alone." if len(plots) > len(shown) else ""
    sections = [_header(record), _splits(record), _tables(record), _numbers(record["features"])]
    drawn = f'<h2>Distributions in training</h2><div class="plots">{"".join(shown)}</div>{note(left)}' if shown else ""
    path = path.absolute()
    with telling_of_disk(path.parent, "run the same command again, or choose another file"):
        write_page(path, "What the data set holds", [*sections, drawn, _words()])


def _header(record: Record) -> str:
    rejected = ", ".join(f"{reason}: {rows:,}" for reason, rows in record["rejected"].items()) or "none"
    told = {
        "data set": record["data"],
        "schema": record["schema_hash"][:12],
        "rejected rows": rejected,
        "negatives kept in training": percent(record["negative_keep_rate"]),
        "negatives left out": f"{record['negatives_left_out']:,}",
    }
    parts = f"{len(record['features'])} features · {sum(split['rows'] for split in record['splits'].values()):,} impressions"
    return f'<header><h1>What the data set holds</h1><p class="soft">{parts}</p>{facts(told)}</header>'


def _splits(record: Record) -> str:
    splits = record["splits"]
    told = list(splits.values())
    columns = [aligned([each[name] for each in told]) for name in ("rows", "clicks", "conversions")]
    columns += [[percent(each[name]) for each in told] for name in ("ctr", "cvr", "ctcvr")]
    columns += [[each["rates_of"] or "–" for each in told]]
    columns += [aligned([each[name] for each in told]) for name in ("files", "row_groups")]
    columns.append([f"{each['bytes'] / 1e6:,.1f}" for each in told])
    heads = ["Split", "Impressions", "Clicks", "Conversions", "CTR", "CVR\nof clicks", "CTCVR", "Rates\nof", "Files", "Row\ngroups", "MB"]
    return f"<h2>Splits</h2>{table(heads, list(splits), columns)}{note(escape(rates_said(record)))}"


def _tables(record: Record) -> str:
    found = {name: told for name, told in record["features"].items() if "table_rows" in told}
    if not found:
        return ""
    told, splits = list(found.values()), filled(record["splits"])
    heads = ["Feature", "Kind", "Table\nrows", *splits, *splits, "mean, p99, max", "Most\nfrequent", "Share", "Concen-\ntration"]
    columns = [[kind_of(each) for each in told], aligned([each["table_rows"] for each in told])]
    columns += [[percent(each["coverage"][split]) for each in told] for split in splits]
    columns += [[percent(each.get("oov", {}).get(split)) for each in told] for split in splits]
    columns += [[lengths_of(each) for each in told], [_value(each) for each in told]]
    columns += [[percent(each["top"][0]["share"]) if each.get("top") else "–" for each in told]]
    columns += [[percent(each.get("concentration")) for each in told]]
    spans = [("", 3), ("Coverage", len(splits)), ("Out of vocabulary", len(splits)), ("Values an impression", 1), ("In training", 3)]
    return f"<h2>Features with tables</h2>{table(heads, _names(found), columns, spans, texts=(1,))}"


def _names(features: Mapping[str, Record]) -> list[str]:
    return [
        escape(name) + (f'<br><span class="soft">{escape(told["column"])}</span>' if told["column"] != name else "")
        for name, told in features.items()
    ]


def _value(told: Record) -> str:
    """The most frequent value; what is shortened has the whole in its title."""
    if not told.get("top"):
        return "–"
    shown = value_of(told, HASH_SHOWN)
    return f'<span title="{escape(str(told["top"][0]["value"]))}">{escape(shown)}</span>' if shown.endswith("…") else escape(shown)


def _numbers(features: Record) -> str:
    found = {name: told for name, told in features.items() if "quantiles" in told}
    if not found:
        return ""
    told = list(found.values())
    columns = [[percent(each["missing"]["train"]) for each in told]]
    columns += [aligned([each[name] for each in told]) for name in ("mean", "std")]
    columns += [aligned([(each["quantiles"]["train"] or {}).get(name) for each in told]) for name in NUMERIC_QUANTILES]
    said = (
        "In training, of the numbers that were there; missing is the share of the impressions without one. Quantiles, of "
        f"{SAMPLE_ROWS:,} impressions at most, are in the units of the log. Mean and standard deviation are of the logarithm where log1p "
        "is set."
    )
    logs = [f"{name}{', log1p' if each['log1p'] else ''}" for name, each in zip(_names(found), told, strict=True)]
    return f"<h2>Numbers</h2>{table(['Feature', 'Missing', 'Mean', 'Std', *NUMERIC_QUANTILES], logs, columns)}{note(said)}"


def _plots(records: Record, features: dict[str, Feature], held: Held, counts: dict[str, Int64s]) -> Iterator[str]:
    for name, told in records.items():
        if name in counts and len(counts[name]) > 1:
            source = skew_plot(np.cumsum(counts[name]), told["table_rows"], told["top"][0]["count"] / told["top"][0]["share"])
            yield figure(escape(name), "share of the values on the most frequent rows", source)
        if name in held.lengths:
            yield figure(escape(name), "values an impression", lengths_plot(held.lengths[name]))
        if len(held.numbers.get(name, ())):
            feature = features[name]
            numbers = held.numbers[name].astype(np.float64) * feature.std + feature.mean
            yield figure(escape(name), "log(1 + number)" if feature.log1p else "number", histogram_plot(numbers))


def _words() -> str:
    entries = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in WORDS.items())
    return f'<h2>In words</h2><dl class="words">{entries}</dl>'

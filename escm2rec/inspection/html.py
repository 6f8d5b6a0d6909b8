"""The page of `inspect`: one file that opens offline and explains itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from escm2rec.config import Split
from escm2rec.disk import telling_of_disk
from escm2rec.evaluation.html import aligned, facts, figure, note, table, write_page
from escm2rec.inspection.held import SAMPLE_ROWS, Held, sample_step
from escm2rec.inspection.inspect import NUMERIC_QUANTILES
from escm2rec.inspection.plots import histogram_plot, lengths_plot, skew_plot
from escm2rec.inspection.table import filled, kind_of, percent, rates_said, rejected_said, value_of, verified_said
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
    "rows of the table. {more}",
    "Table rows": "Rows of the embedding table: one a value of the vocabulary, and those that the others share; or as many as "
    "<code>hash_size</code> or <code>managed_size</code> says, or one a bucket.",
    "Concentration": "Share of all training values that fall on the most frequent hundredth of the table's rows, the rows "
    "that values out of vocabulary share among them. Near 100%, few rows do all the work: a sharding plan that gives each rank as many "
    "rows does not give it as much work.",
    "Values an impression": "Of lists, in training. The mean is the pooling factor, by which a lookup costs; p99 is what only one "
    "impression in a hundred exceeds.",
}
MAX_UNBROKEN = 14
"""Longest stretch of a name or value that is kept on one line: the table of features fits a page."""
NARROW = "<style>.narrow .text { min-width: 10ch; max-width: 34ch; }</style>"
MORE_IS_NEW = "Far more in validation and test than in training means that new values keep coming."
MORE_IS_LEFT_OUT = (
    "Vocabularies count the training impressions that were kept, {kept} of the unclicked ones among them: a value that was in the others "
    "alone is out of vocabulary in validation and test, which are whole. More there than in training does not mean that values are new."
)


def write_inspection(record: Record, features: tuple[Feature, ...], held: dict[Split, Held], counts: dict[str, Int64s], path: Path) -> None:
    """Write the page of what `inspect` found; `counts` are of the rows of the tables, the most frequent first.

    RunError when the disk is full.
    """
    plots = list(_plots(record["features"], {feature.name: feature for feature in features}, held["train"], counts))
    shown = plots[:MAX_FEATURES_SHOWN]
    left = f"{len(plots) - len(shown)} more features are in the tables and in the JSON alone." if len(plots) > len(shown) else ""
    sections = [_header(record), _splits(record), _tables(record), _lists(record), _numbers(record)]
    drawn = f'<h2>Distributions in training</h2><div class="plots">{"".join(shown)}</div>{note(left)}' if shown else ""
    path = path.absolute()
    with telling_of_disk(path.parent, "run the same command again, or choose another file"):
        write_page(path, "What the data set holds", [NARROW, *sections, drawn, _words(record["negative_keep_rate"])])


def _header(record: Record) -> str:
    told = {"data set": record["data"], "schema": record["schema_hash"][:12], "rejected rows": rejected_said(record)}
    if (rate := record["negative_keep_rate"]) < 1:
        told["negatives of training"] = f"{percent(rate)} kept, {record['negatives_left_out']:,} left out"
    if "verified" in record:
        told["verified"] = verified_said(record)
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
    by_split = [split.replace("validation", "vali-\ndation") for split in splits]
    heads = ["Feature", "Kind", "Table\nrows", *by_split, *by_split, "Most\nfrequent", "Share", "Concen-\ntration"]
    columns = [[kind_of(each) for each in told], aligned([each["table_rows"] for each in told])]
    columns += [[percent(each["coverage"][split]) for each in told] for split in splits]
    columns += [[percent(each.get("oov", {}).get(split)) for each in told] for split in splits]
    columns += [[_value(each) for each in told]]
    columns += [[percent(each["top"][0]["share"]) if each.get("top") else "–" for each in told]]
    columns += [[percent(each.get("concentration")) for each in told]]
    spans = [("", 3), ("Coverage", len(splits)), ("Out of vocabulary", len(splits)), ("In training", 3)]
    texts = (0, 1, heads.index("Most\nfrequent"))
    return f"<h2>Features with tables</h2>{_narrow(table(heads, _names(found), columns, spans, texts))}"


def _lists(record: Record) -> str:
    found = {name: told for name, told in record["features"].items() if "lengths" in told}
    if not found:
        return ""
    lengths = [told["lengths"]["train"] for told in found.values()]
    heads = list(lengths[0])
    columns = [aligned([each[name] for each in lengths]) for name in heads]
    said = note("In training, of all impressions; one without a value counts as 0.")
    return f"<h2>Values an impression</h2>{_narrow(table(['List', *heads], _names(found), columns, texts=(0,)))}{said}"


def _narrow(table: str) -> str:
    """A table whose words wrap in less room."""
    return f'<div class="narrow">{table}</div>'


def _names(features: Mapping[str, Record]) -> list[str]:
    return [
        breakable(name) + (f'<br><span class="soft">{breakable(told["column"])}</span>' if told["column"] != name else "")
        for name, told in features.items()
    ]


def _value(told: Record) -> str:
    """The most frequent value; what is shortened has the whole in its title."""
    if not told.get("top"):
        return "–"
    shown = value_of(told, HASH_SHOWN)
    text = breakable(shown)
    return f'<span title="{escape(str(told["top"][0]["value"]))}">{text}</span>' if shown.endswith("…") else text


def breakable(text: str) -> str:
    """HTML of a name or value that may be broken after what joins its words, and where it goes on for long without."""
    parts = re.findall(rf"[^\s_.:/-]{{1,{MAX_UNBROKEN}}}[\s_.:/-]?|[\s_.:/-]{{1,{MAX_UNBROKEN}}}", text)
    return "<wbr>".join(escape(part) for part in parts)


def _numbers(record: Record) -> str:
    found = {name: told for name, told in record["features"].items() if "quantiles" in told}
    if not found:
        return ""
    told = list(found.values())
    columns = [[percent(each["missing"]["train"]) for each in told]]
    columns += [aligned([each[name] for each in told]) for name in ("mean", "std")]
    columns += [aligned([(each["quantiles"]["train"] or {}).get(name) for each in told]) for name in NUMERIC_QUANTILES]
    step = sample_step(record["splits"]["train"]["rows"])
    said = (
        "In training, of the numbers that were there; missing is the share of the impressions without one. Quantiles are in the units of "
        "the log, mean and standard deviation of the logarithm where log1p is set. Quantiles, their range and the plot are of a sample of "
        f"{SAMPLE_ROWS:,} impressions at most, which may have none of a number that few impressions have, and lack the least and the "
        f"greatest; here it is {f'one impression in {step:,}' if step > 1 else 'all of them'}."
    )
    logs = [f"{name}{', log1p' if each['log1p'] else ''}" for name, each in zip(_names(found), told, strict=True)]
    numbers = table(["Feature", "Missing", "Mean", "Std", *NUMERIC_QUANTILES], logs, columns, texts=(0,))
    return f"<h2>Numbers</h2>{_narrow(numbers)}{note(said)}"


def _plots(records: Record, features: dict[str, Feature], held: Held, counts: dict[str, Int64s]) -> Iterator[str]:
    for name, told in records.items():
        if name in counts and len(counts[name]) > 1:
            source = skew_plot(np.cumsum(counts[name]), told["table_rows"])
            yield figure(escape(name), "share of the values on the most frequent rows", source)
        if name in held.lengths:
            yield figure(escape(name), "values an impression", lengths_plot(held.lengths[name]))
        if len(held.numbers.get(name, ())):
            feature = features[name]
            numbers = held.numbers[name].astype(np.float64) * feature.std + feature.mean
            yield figure(escape(name), "log(1 + number)" if feature.log1p else "number", histogram_plot(numbers))


def _words(negative_keep_rate: float) -> str:
    more = MORE_IS_NEW if negative_keep_rate == 1 else MORE_IS_LEFT_OUT.format(kept=percent(negative_keep_rate))
    entries = "".join(f"<dt>{name}</dt><dd>{text.format(more=more)}</dd>" for name, text in WORDS.items())
    return f'<h2>In words</h2><dl class="words">{entries}</dl>'

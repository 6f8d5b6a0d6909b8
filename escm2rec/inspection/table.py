"""The tables of `inspect`, for people, on stderr."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
WIDTH = 150  # where no terminal says


def print_tables(record: Record) -> None:
    """Print splits and features, a line each."""
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDTH)
    console.print(_splits(record["splits"]))
    console.print(rates_said(record), markup=False, highlight=False)
    console.print(left_out_said(record), markup=False, highlight=False)
    console.print(_features(record))


def _table(title: str, text: list[str], numbers: list[str], longest: int) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in text:
        table.add_column(name, overflow="fold", min_width=min(12, longest))
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _splits(splits: Record) -> Table:
    table = _table("Splits", ["split"], ["rows", "clicks", "conversions", "CTR", "CVR of clicks", "CTCVR", "rates of", "files", "MB"], 10)
    for split, told in splits.items():
        counts = [f"{told[name]:,}" for name in ("rows", "clicks", "conversions")]
        rates = [percent(told[name]) for name in ("ctr", "cvr", "ctcvr")]
        table.add_row(split, *counts, *rates, told["rates_of"] or "–", f"{told['files']:,}", f"{told['bytes'] / 1e6:,.1f}")
    return table


def filled(splits: Record) -> list[str]:
    """The splits with rows, which features are told of."""
    return [split for split, told in splits.items() if told["rows"]]


def _features(record: Record) -> Table:
    splits = filled(record["splits"])
    by_split = " / ".join(splits)
    heads = [
        "table\nrows",
        f"coverage\n{by_split}",
        f"out of vocabulary\n{by_split}",
        "values an impression\nmean, p99, max",
        "most frequent",
    ]
    table = _table("Features", ["feature", "kind"], heads, max(len(name) for name in record["features"]))
    for name, told in record["features"].items():
        rows = f"{told['table_rows']:,}" if "table_rows" in told else "–"
        table.add_row(name, kind_of(told), rows, shares(told["coverage"]), shares(told.get("oov")), lengths_of(told), most_frequent(told))
    return table


def rates_said(record: Record) -> str:
    """What the rates of the splits are of: rows, or what rows weigh, and where the weights are from."""
    splits = {of: [split for split, told in record["splits"].items() if told["rates_of"] == of] for of in ("weights", "rows")}
    if not splits["weights"]:
        why = "weights do not change them" if any(told["weights"] for told in record["splits"].values()) else "rows have no weights"
        return f"CTR, CVR and CTCVR are not weighted: of rows, each counting once ({why})."
    said = [f"CTR, CVR and CTCVR of {_listed(splits['weights'])} are weighted: of the sums of weights, not of the rows that are here."]
    if record["weight"] is not None:
        said.append(f"Rows weigh what column {record['weight']} says.")
    if (rate := record["negative_keep_rate"]) < 1:
        times = " times that" if record["weight"] is not None else ""
        said.append(
            f"Of the unclicked training impressions {percent(rate)} were kept, and each weighs {1 / rate:.4g}{times} to make up for it."
        )
    if splits["rows"]:
        said.append(f"Those of {_listed(splits['rows'])} are of rows.")
    return " ".join([*said, "All else counts rows."])


def left_out_said(record: Record) -> str:
    """Which rows of the log are not in the data set, and whether its files were verified."""
    said = f"Rejected rows: {rejected_said(record)}."
    if record["negative_keep_rate"] < 1:
        said += f" Negatives left out of training: {record['negatives_left_out']:,} ({percent(record['negative_keep_rate'])} were kept)."
    if "verified" in record:
        said += f" Verified: {verified_said(record)}."
    return said


def verified_said(record: Record) -> str:
    """How much was compared with its checksums."""
    return f"{record['verified']['files']:,} files of {record['verified']['bytes'] / 1e6:,.1f} MB are as they were written"


def rejected_said(record: Record) -> str:
    """How many rows were rejected for which reason."""
    return ", ".join(f"{reason}: {rows:,}" for reason, rows in record["rejected"].items()) or "none"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def kind_of(told: Record) -> str:
    """Kind of a feature, and what was made of it."""
    encoded = {"hash": "hashed", "managed": "managed", "buckets": "in buckets"}.get(told.get("encoding", ""))
    return ", ".join(filter(None, [str(told["kind"]), "crossed" if "cross" in told else None, encoded]))


def shares(by_split: Record | None) -> str:
    """Shares of the splits, in percent."""
    return "–" if by_split is None else " / ".join(percent(share) for share in by_split.values())


def lengths_of(told: Record) -> str:
    """Of a list, training's mean, p99 and longest; of a number, training's median and 99th percentile."""
    if "lengths" in told:
        lengths = told["lengths"]["train"]
        return f"{lengths['mean']:.1f}, {lengths['p99']:,}, {lengths['max']:,}"
    return "–"


def value_of(told: Record, longest_hash: int = 24) -> str:
    """The most frequent value of a table, shortened; the row where values are hashed, and of a cross the hash."""
    text = str(told["top"][0]["value"])
    what = "row " if told["encoding"] == "hash" else "hash " if "cross" in told else ""
    longest = longest_hash if what else 24
    return what + (text if len(text) <= longest else text[: longest - 1] + "…")


def most_frequent(told: Record) -> str:
    """The most frequent value with its share; of a number its range in training."""
    if told.get("top"):
        first = told["top"][0]
        return f"{value_of(told)}: {percent(first['share'])}"
    if quantiles := told.get("quantiles", {}).get("train"):
        return f"{quantiles['p1']:.3g} to {quantiles['p99']:.3g} (p1 to p99)"
    return "–"


def percent(share: float | None) -> str:
    """A share in percent, with three digits; a dash where there is none."""
    if share is None:
        return "–"
    return f"{100 * share:.2f}%" if share < 0.0995 else f"{100 * share:.1f}%"

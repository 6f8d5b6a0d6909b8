"""What is not wrong by itself and yet mostly a slip, of the config or of an export: told once a data set is made."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal

from escm2rec.config import SPLITS, ColumnSplit, EventsSource, FeatureConfig, moment
from escm2rec.preprocess.events import FATES
from escm2rec.preprocess.splits import AnySplit, Seen
from escm2rec.schema import Feature

EventTable = Literal["clicks", "conversions"]
EVENT_TABLES: tuple[EventTable, ...] = ("clicks", "conversions")
SAME_CLOCK = "do both tables count time from one moment, in one zone? see "


def share(part: int, whole: int, what: str) -> str:
    """A part as people read it."""
    return f"{part:,} of {whole:,} {what} ({part / whole:.1%})"


def of_rows_without_split(split: AnySplit, seen: Seen, left_out: int, rows: int) -> Iterator[str]:
    """On the rows that belong to no split, of all rows that can be used."""
    if not left_out:
        return
    values = ", ".join(f"{value} ({place})" if place else value for value, place in seen.strays.items())
    told = f"data.split gives no split to {share(left_out, rows, 'rows')}, which are left out: {values}"
    if isinstance(split, ColumnSplit):
        unseen = [f"{value!r} of data.split.{name}" for name in SPLITS for value in getattr(split, name) if value not in seen.named]
        told += f"; no row has {', '.join(unseen)}" if unseen else ""
    yield told


def of_events(source: EventsSource, counts: dict[str, Any]) -> Iterator[str]:
    """On a joined event log, by the `events` section of its manifest."""
    for table in EVENT_TABLES:
        rows = counts[table]["rows"]
        for kind in ("rejected", *FATES[table]):
            if 2 * counts[table][kind] > rows:
                yield f"of the log {share(counts[table][kind], rows, table)} are {kind}: {_settings(source, table, kind)}"
    yield from _of_log_end(source, counts["log_end"], counts["last"])


def _settings(source: EventsSource, table: EventTable, kind: str) -> str:
    """What decides that an event is of a kind that is not used, and what to ask."""
    key, time = source.column("key", table), f"data.source.time {source.column('time', table)!r}"
    by_key = [] if key is None else [f"data.source.key {key!r}"]
    by_values = [f"data.source.attribution_key {source.attribution_key}"] if table == "conversions" and source.attribution_key else []
    if kind == "rejected":
        return f"{', or '.join([*by_key, *by_values, time])} is null or not readable"
    if kind == "unknown_impression":
        both = [f"{named}, and {source.column('key', 'impressions')!r} of the impressions" for named in by_key]
        return f"do both tables hold the same values, of the same days? see {', and '.join([*both, *by_values])}"
    if kind == "before_impression":
        return f"{SAME_CLOCK}{time}, and {source.column('time', 'impressions')!r} of the impressions"
    if kind == "before_click":
        return f"{SAME_CLOCK}{time}, and {source.column('time', 'clicks')!r} of the clicks"
    window = "conversion_window_s" if kind == "late" and table == "conversions" else "click_window_s"
    lost = "no click of their impressions counts; " if kind == "without_click" else ""
    return f"{lost}data.source.{window} is {getattr(source, window):g}"


def _of_log_end(source: EventsSource, end: str | None, last: dict[str, str | None]) -> Iterator[str]:
    """On a time that no log ends at, and on one that leaves no window of an impression open."""
    if end is None:
        return
    named = f"data.source.log_end {source.log_end!r}" if source.log_end is not None else "the latest time in its tables"
    if moment(end) < moment("1971-01-01") or moment(end) > moment("2200-01-01"):
        unit = f"data.source.time_unit is {source.time_unit!r}"
        yield f"the log ends at {end}, by {named}, which is no time from 1971 to 2200: what do its numbers count? {unit}"
    shown, windows = last["impressions"], source.click_window_s + source.conversion_window_s
    if source.log_end is not None or shown is None or moment(end) - moment(shown) <= windows * 1e6:
        return
    table = next(table for table, time in last.items() if time == end)
    yield (
        f"the log ends at {end}, the latest time of its {table}, and the last impression is of {shown}, further before than both "
        f"windows last ({windows:g} s): no window is open, so data.source.open_windows has no effect. If a stray row is that late, "
        "set data.source.log_end"
    )


def of_splits(splits: dict[str, dict[str, Any]]) -> Iterator[str]:
    """On splits in which nobody clicks, by the `splits` section of a manifest."""
    for name, counts in splits.items():
        if counts["rows"] and not counts["clicks"]:
            yield f"the {name} split has {counts['rows']:,} rows and no click: is the click label what it should be?"


def of_features(asked: Sequence[FeatureConfig], features: Sequence[Feature], held: dict[str, Any], rows: int) -> Iterator[str]:
    """On features that tell nothing, as asked for and as fitted, by the `features` section of a manifest and how many rows train."""
    for config, feature in zip(asked, features, strict=True):
        if held[feature.name]["missing"]["train"] == 1:
            yield f"feature {feature.name!r} (column {feature.column!r}) has no value in any of the {rows:,} training rows"
        elif feature.encoding == "vocabulary" and feature.num_embeddings == feature.oov_rows:
            yield (
                f"feature {feature.name!r} (column {feature.column!r}) has a vocabulary of 0 values: none is in {config.min_count:,} "
                f"(min_count) of the {rows:,} training rows, so all are out of vocabulary"
            )


def of_kept(keep: Sequence[str], found: Container[str]) -> Iterator[str]:
    """On kept columns, of those in which a value was found."""
    for column in keep:
        if column not in found:
            yield f"column {column!r} of data.keep has no value in any row"

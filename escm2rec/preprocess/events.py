"""Impressions, clicks and conversions of an event log, joined (docs/events.md)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from escm2rec.config import EventsSource, Source, moment
from escm2rec.errors import DataError
from escm2rec.preprocess.block import Request
from escm2rec.preprocess.external import database
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.outcomes import CLICK, CONVERSION, NO_KEY, NO_TIME, OPEN, REPEATED_DIFFERING, REPEATED_EQUAL, Codes
from escm2rec.preprocess.ragged import Bools, Int64s
from escm2rec.preprocess.rejections import EVENT_KEY, EVENT_TIME, BadRows, Rejected, Rejection, values_at
from escm2rec.preprocess.table_columns import TableColumn
from escm2rec.preprocess.tables import TableFile
from escm2rec.preprocess.texts import not_utf8, without_other_text
from escm2rec.preprocess.times import MICROSECONDS, is_text, iso_text, microseconds
from escm2rec.progress import Progress

Table = Literal["impressions", "clicks", "conversions"]
BLOCK_ROWS = 1 << 17  # about a row group of duckdb
FATES = {
    "clicks": ("unknown_impression", "before_impression", "late"),
    "conversions": ("unknown_impression", "without_click", "before_click", "late"),
}
"""Why an event may count for no impression; one that could counts as used, or as repeated after another."""


def join_events(
    source: Source, files: Sequence[RawFile], workspace: Path, memory_bytes: int, rejected: Rejected
) -> tuple[list[RawFile], dict[str, Any] | None]:
    """The impression files of an event log (from `raw_files`), each with its outcomes; and the `events` section of the manifest.

    Files stay as they are. Outcomes are a byte a row: click, conversion, or why the row is left out. They lie under `workspace`, as does
    what does not fit `memory_bytes`. Clicks and conversions without a key or time are added to `rejected`, which may refuse them;
    impressions without are marked, and rejected when they are read. Another source has its files back, and None. Any memory gives the same.
    """
    if not isinstance(source, EventsSource):
        return list(files), None
    folder = workspace
    with database(folder / "tables", memory_bytes, "events.duckdb") as connection, Progress("join", None) as progress:
        join = _Join(source, files, connection, rejected, progress)
        lengths = join.load()
        counts = join.judge()
        _write_outcomes(folder, files, lengths, join.codes())
    shutil.rmtree(folder / "tables")
    return [replace(file, outcomes=_outcomes_path(folder, file)) for file in files], counts


class _Join:
    """The three tables in duckdb: n is the place of an impression among all, k its key, t its time in microseconds, a0, ... what
    attribution goes by."""

    def __init__(self, source: EventsSource, files: Sequence[RawFile], connection: Any, rejected: Rejected, progress: Progress) -> None:
        self._source, self._files, self._db = source, files, connection
        self._rejected, self._progress = rejected, progress
        self._attribution = {f"a{number}": name for number, name in enumerate(source.attribution_key)}

    def load(self) -> list[int]:
        """Read the tables; the number of rows of each impression file."""
        attribution = "".join(f", {name} VARCHAR" for name in self._attribution)
        self._db.execute(f"CREATE TABLE impressions (n BIGINT, k VARCHAR, t BIGINT{attribution})")
        self._db.execute("CREATE TABLE clicks (k VARCHAR, t BIGINT)")
        self._db.execute(f"CREATE TABLE conversions (k VARCHAR, t BIGINT{attribution})")
        self._rows: dict[Table, int] = {"impressions": 0, "clicks": 0, "conversions": 0}
        self._bad: dict[Table, int] = dict.fromkeys(self._rows, 0)
        lengths = []
        for file in self._files:
            before = self._rows["impressions"]
            self._load_file("impressions", file.path, self._attribution)
            lengths.append(self._rows["impressions"] - before)
        for path in self._files[0].clicks:
            self._load_file("clicks", path, {})
        for path in self._files[0].conversions:
            self._load_file("conversions", path, self._attribution)
        return lengths

    def _load_file(self, table: Table, path: Path, attribution: dict[str, str]) -> None:
        key, time = self._source.column("key", table), self._source.column("time", table)
        assert time is not None
        wanted = tuple(name for name in (key, time, *attribution.values()) if name is not None)
        is_impressions = table == "impressions"
        for rows, lines, malformed in TableFile(RawFile(path), self._source, Request((), wanted, labels=False), BLOCK_ROWS).batches():
            if not is_impressions:  # those of impressions are met again when features are read
                self._reject(table, malformed)
                self._rows[table] += sum(rejection.count for rejection in malformed)
            bad = BadRows(path, lines)
            columns = TableColumn.of(rows, path, path.suffix == ".csv", bad)
            held = {"k": _key_texts(columns(key)) if key is not None else pa.nulls(len(rows), pa.large_string())}
            times, has_time = self._times(columns(time))
            held["t"] = pa.array(times, mask=~has_time)
            held |= {name: _key_texts(columns(column)) for name, column in attribution.items()}
            for name in filter(None, (key, *attribution.values())):
                _mark_other_text(columns(name), bad)
            if is_impressions:
                if self._rejected.refuse:
                    self._rejected.add(bad.found)
                held["k"] = pc.if_else(pa.array(bad.mask), pa.scalar(None, pa.large_string()), held["k"])  # counted when read
                self._insert(table, {"n": pa.array(self._rows[table] + np.arange(len(rows))), **held})
            else:
                no_key = ~self._finds_an_impression(table, held, list(attribution))
                column = columns(key if key is not None else next(iter(attribution.values())))
                bad.mark(no_key, EVENT_KEY, column.name, values_at(column.array))
                bad.mark(~has_time, EVENT_TIME, time, values_at(columns(time).array))
                self._reject(table, bad.found)
                good = pa.array(bad.good)
                self._insert(table, {name: array.take(good) for name, array in held.items()})
            self._rows[table] += len(rows)
            self._progress.add(len(rows), path.name)

    def _finds_an_impression(self, table: Table, held: dict[str, pa.Array], attribution: list[str]) -> Bools:
        """Which events have a key, or conversions all that attribution goes by."""
        finds: Bools = held["k"].is_valid().to_numpy(zero_copy_only=False)
        if table == "conversions" and attribution:
            finds |= np.logical_and.reduce([held[name].is_valid().to_numpy(zero_copy_only=False) for name in attribution])
        return finds

    def _times(self, column: TableColumn) -> tuple[Int64s, Bools]:
        try:
            return microseconds(column.array, self._source.time_unit)
        except TypeError as error:
            raise DataError(
                f"{column.path}: column {column.name!r} is no event time: {error}", "set data.source.time to a column of times"
            ) from error

    def _reject(self, table: Table, rejections: list[Rejection]) -> None:
        self._rejected.add(rejections)
        self._bad[table] += sum(rejection.count for rejection in rejections)

    def _insert(self, table: Table, columns: dict[str, pa.Array]) -> None:
        self._db.register("batch", pa.table(columns))
        self._db.execute(f"INSERT INTO {table} SELECT * FROM batch")
        self._db.unregister("batch")

    def judge(self) -> dict[str, Any]:
        """Decide on every row of the three tables; the counts."""
        self._find_repeated()
        self._judge_clicks()
        self._judge_conversions()
        log_end = self._log_end()
        impressions = self._judge_impressions(log_end)
        return {
            "log_end": None if log_end is None else iso_text(log_end),
            "last": self._last_times(),
            "impressions": {"rows": self._rows["impressions"], **impressions},
            "clicks": self._counts("clicks"),
            "conversions": self._counts("conversions"),
        }

    def _find_repeated(self) -> None:
        """`repeated`: impressions whose key came before, and whether they differ from the first; `kept`: all others that are usable."""
        self._db.execute(
            """
            CREATE TABLE again AS SELECT n, first FROM impressions JOIN (
                SELECT k, min(n) AS first FROM impressions WHERE k IS NOT NULL AND t IS NOT NULL GROUP BY k HAVING count(*) > 1
            ) USING (k) WHERE t IS NOT NULL AND n > first"""
        )
        self._db.execute("CREATE TABLE prints (n BIGINT, print UBIGINT)")
        if self._number("SELECT count(*) FROM again"):
            self._print_repeated()
        self._db.execute(
            """
            CREATE TABLE repeated AS SELECT again.n, mine.print <> firsts.print AS differs FROM again
            JOIN prints AS mine ON mine.n = again.n JOIN prints AS firsts ON firsts.n = again.first"""
        )
        self._db.execute("CREATE VIEW kept AS SELECT * FROM impressions ANTI JOIN repeated USING (n) WHERE k IS NOT NULL AND t IS NOT NULL")

    def _print_repeated(self) -> None:
        """Hashes of the whole rows of repeated impressions and their firsts: all columns are read again, where a log repeats any."""
        import duckdb

        self._db.execute("CREATE TABLE wanted AS SELECT n FROM again UNION SELECT first FROM again")
        begin = 0
        for file in self._files:
            every = TableFile(file, self._source, Request(()), BLOCK_ROWS).names()
            names = sorted(name for name in every if every.count(name) == 1)  # one named twice is refused where a config wants it
            for rows, _, _ in TableFile(file, self._source, Request((), tuple(names), labels=False), BLOCK_ROWS).batches():
                columns = {"n": pa.array(begin + np.arange(len(rows)))}
                columns |= {f"c{number}": rows[name] for number, name in enumerate(names)}
                try:
                    self._db.register("batch", pa.table(columns))
                    self._db.execute("INSERT INTO prints SELECT n, hash(*COLUMNS(* EXCLUDE n)) FROM batch SEMI JOIN wanted USING (n)")
                except (duckdb.NotImplementedException, duckdb.ConversionException) as error:
                    raise DataError(
                        f"{file.path}: impression keys repeat, and their rows cannot be compared: {error}", "leave one row a key in the log"
                    ) from error
                self._db.unregister("batch")
                begin += len(rows)

    def _judge_clicks(self) -> None:
        """`touches`: every click with its impression and its fate, NULL where it counts."""
        attribution = "".join(f", kept.{name}" for name in self._attribution)
        self._db.execute(
            f"""
            CREATE TABLE touches AS SELECT kept.n, kept.t AS shown, clicks.t AS clicked, kept.k{attribution}, CASE
                WHEN kept.n IS NULL THEN 'unknown_impression'
                WHEN clicks.t < kept.t THEN 'before_impression'
                WHEN clicks.t - kept.t > {_window(self._source.click_window_s)} THEN 'late'
            END AS fate FROM clicks LEFT JOIN kept USING (k)"""
        )
        self._db.execute("CREATE VIEW clicked AS SELECT DISTINCT n FROM touches WHERE fate IS NULL")

    def _judge_conversions(self) -> None:
        """`credits`: every conversion with the impression of the last click before it, and its fate, NULL where it counts."""
        self._db.execute("CREATE TABLE credits (n BIGINT, fate VARCHAR)")
        self._credit(["k"], "k IS NOT NULL")
        if self._attribution:
            self._credit(list(self._attribution), "k IS NULL")
        self._db.execute("CREATE VIEW converted AS SELECT DISTINCT n FROM credits WHERE fate IS NULL")

    def _credit(self, by: list[str], where: str) -> None:
        """Conversions `where` to the impressions that are equal in the columns `by`. Of clicks at one time the last is that of the
        impression that was shown last, or else comes last in the input."""
        columns = ", ".join(by)
        equal = {table: " AND ".join(f"asked.{name} = {table}.{name}" for name in by) for table in ("last", "touches", "kept")}
        self._db.execute(
            f"""
            INSERT INTO credits
            WITH last AS (
                SELECT {columns}, clicked, n FROM touches WHERE fate IS NULL
                QUALIFY row_number() OVER (PARTITION BY {columns}, clicked ORDER BY shown DESC, n DESC) = 1
            ), asked AS (SELECT {columns}, t FROM conversions WHERE {where}),
            found AS (
                SELECT asked.*, last.n, last.clicked FROM asked ASOF LEFT JOIN last ON {equal["last"]} AND asked.t >= last.clicked
            )
            SELECT n, CASE
                WHEN t - clicked <= {_window(self._source.conversion_window_s)} THEN NULL
                WHEN clicked IS NOT NULL THEN 'late'
                WHEN EXISTS (SELECT 1 FROM touches WHERE fate IS NULL AND {equal["touches"]}) THEN 'before_click'
                WHEN EXISTS (SELECT 1 FROM kept WHERE {equal["kept"]}) THEN 'without_click'
                ELSE 'unknown_impression'
            END FROM found AS asked"""
        )

    def _counts(self, table: Literal["clicks", "conversions"]) -> dict[str, int]:
        fates, used = {"clicks": ("touches", "clicked"), "conversions": ("credits", "converted")}[table]
        by_fate = dict(self._db.execute(f"SELECT fate, count(*) FROM {fates} GROUP BY fate").fetchall())
        number_used = self._number(f"SELECT count(*) FROM {used}")
        return {
            "rows": self._rows[table],
            "rejected": self._bad[table],
            **{fate: by_fate.get(fate, 0) for fate in FATES[table]},
            "repeated": by_fate.get(None, 0) - number_used,
            "used": number_used,
        }

    def _judge_impressions(self, log_end: int | None) -> dict[str, int]:
        """`outcomes`: the code of every impression; how many have which."""
        windows = _window(self._source.click_window_s) + _window(self._source.conversion_window_s)
        is_open = f"t > {log_end - windows}" if log_end is not None else "FALSE"
        dropped = is_open if self._source.open_windows == "drop" else "FALSE"
        self._db.execute(
            f"""
            CREATE TABLE outcomes AS SELECT n, (CASE
                WHEN k IS NULL THEN {NO_KEY} WHEN t IS NULL THEN {NO_TIME}
                WHEN differs THEN {REPEATED_DIFFERING} WHEN NOT differs THEN {REPEATED_EQUAL}
                WHEN {dropped} THEN {OPEN}
                ELSE CASE WHEN clicked.n IS NULL THEN 0 ELSE {CLICK} END + CASE WHEN converted.n IS NULL THEN 0 ELSE {CONVERSION} END
            END)::UTINYINT AS code, {is_open} AS is_open
            FROM impressions LEFT JOIN repeated USING (n) LEFT JOIN clicked USING (n) LEFT JOIN converted USING (n)"""
        )
        unusable = ", ".join(map(str, (NO_KEY, REPEATED_EQUAL, REPEATED_DIFFERING)))
        codes = dict(self._db.execute("SELECT code, count(*) FROM outcomes GROUP BY code").fetchall())
        return {
            "rejected": codes.get(NO_KEY, 0) + codes.get(NO_TIME, 0),
            "repeated": codes.get(REPEATED_EQUAL, 0),
            "differing": codes.get(REPEATED_DIFFERING, 0),
            "open_windows": self._number(f"SELECT count(*) FROM outcomes WHERE is_open AND code NOT IN ({unusable})"),
            "used": sum(codes.get(code, 0) for code in (0, CLICK, CLICK | CONVERSION)),
        }

    def _log_end(self) -> int | None:
        said = self._source.log_end
        if said is not None:
            return round(moment(said) if isinstance(said, str) else said * MICROSECONDS[self._source.time_unit])
        return max((time for time in self._last().values() if time is not None), default=None)

    def _last(self) -> dict[str, int | None]:
        """The latest time of the usable rows of each table."""
        return {
            table: self._number(f"SELECT max(t) FROM {table}{' WHERE k IS NOT NULL' * (table == 'impressions')}") for table in self._rows
        }

    def _last_times(self) -> dict[str, str | None]:
        return {table: None if time is None else iso_text(time) for table, time in self._last().items()}

    def _number(self, sql: str) -> Any:
        return self._db.execute(sql).fetchall()[0][0]

    def codes(self) -> Iterator[Codes]:
        """The codes of all impressions in the order of the input."""
        for batch in self._db.sql("SELECT code FROM outcomes ORDER BY n").to_arrow_reader(BLOCK_ROWS):
            yield batch.column(0).to_numpy(zero_copy_only=False)


def _write_outcomes(folder: Path, files: Sequence[RawFile], lengths: Sequence[int], codes: Iterator[Codes]) -> None:
    """One file of codes for each impression file, which has so many rows."""
    held = np.empty(0, dtype=np.uint8)
    for file, length in zip(files, lengths, strict=True):
        with _outcomes_path(folder, file).open("wb") as out:
            left = length
            while left:
                held = held if len(held) else next(codes)
                out.write(held[:left].tobytes())
                held, left = held[left:], left - min(left, len(held))


def _outcomes_path(folder: Path, file: RawFile) -> Path:
    return folder / f"{file.name}.outcomes"


def _window(seconds: float) -> int:
    return round(seconds * MICROSECONDS["s"])


def _key_texts(column: TableColumn) -> pa.Array:
    """Keys as text, so that 12 of one table is "12" of another; null where they are no UTF-8, which `_mark_other_text` tells."""
    kind = column.array.type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"{column.path}: column {column.name!r} is no event key: expected whole numbers or text, found type {kind}",
            "write whole numbers as integers: pandas turns a column with nulls into floats",
        )
    return without_other_text(column.array.cast(pa.large_string()))


def _mark_other_text(column: TableColumn, bad: BadRows) -> None:
    """Mark the rows whose key is no UTF-8: without one they would go by what else they hold."""
    if is_text(column.array.type) and (wrong := not_utf8(column.array.cast(pa.large_string()))) is not None:
        bad.mark(wrong, EVENT_KEY, column.name, values_at(column.array))

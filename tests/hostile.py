"""Hostile raw inputs: files with one fault each, or strange and yet right, and what must become of every one.

`CASES` holds them all. A case is refused, or its bad rows are counted while the good rows stay exactly as they are, or it is read right.
"""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.config import DataConfig
from tests.preprocess_logs import aliccp_config, common_line, key, skeleton_line, table_config
from tests.rating_world import matrix_config

EMPTY = "no row belongs to the training split"
Write = Callable[[Path], object]
Row = tuple[Any, ...]

KINDS = (
    "truncated text",
    "truncated Parquet",
    "damaged Parquet",
    "empty file",
    "binary garbage",
    "wrong separator",
    "huge line",
    "encoding",
    "UTF-16",
    "NUL bytes",
    "NaN and infinity",
    "id out of range",
    "id that is no plain number",
    "duplicated header",
    "header",
    "line ends",
    "carriage returns",
    "blank lines",
    "quotes",
    "Parquet type of a label",
    "Parquet type of a value",
    "Parquet type of a list",
    "strange but right Parquet type",
    "nulls",
    "nulls in lists",
    "no rows or columns",
    "changing schema",
    "label",
    "label in Parquet",
    "conversion without click",
    "unequal lists",
    "list weight",
    "row weight",
    "known truth",
    "feature_num",
    "common record",
    "common index",
    "feature list",
    "single-valued field",
    "field id",
    "companion file",
    "truth file",
    "matrix shape",
    "matrix cell",
    "matrix features",
    "compressed or encrypted",
    "no file",
    "file name",
    "many or long columns",
    "codec",
    "value to split by",
    "event table",
    "event time",
    "event time out of range",
    "event key",
    "event order",
    "event credit",
    "impression of an event log",
)


@dataclass(frozen=True)
class Case:
    """A folder of raw files, the config it is read with, and what must happen.

    refused    matches the error, with bad rows refused; the error names a path of the folder; `names_file` is false where none is at fault
    counted    rejected rows by reason with bad rows counted; None where the same refusal stands, or no row is left
    first      row and column of the first offenders, in the order of the manifest
    events     what became of the clicks and conversions of an event log, kinds of none left out
    rows       the rows that are left: values of the features, then click, conversion, weight, kept columns; of an input without `refused`,
               all rows
    remains    why this case does not hold yet
    """

    name: str
    kind: str
    config: DataConfig
    write: Write
    refused: str = ""
    counted: dict[str, int] | None = None
    first: Sequence[tuple[int, str]] = ()
    events: dict[str, dict[str, int]] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    names_file: bool = True
    remains: str = ""
    scored: bool = True  # whether `score` must do the same


def write(**contents: str | bytes) -> Write:
    """Writes these files; `__` in a name is its dot."""

    def to(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name.replace("__", ".")).write_bytes(content.encode() if isinstance(content, str) else content)

    return to


# ---------------------------------------------------------------------------------------------------------------- CSV tables

C = {"name": "c", "kind": "categorical"}
N = {"name": "n", "kind": "numeric"}
LIST = {"name": "l", "kind": "list"}
WEIGHTED = {"name": "l", "kind": "weighted_list", "weights_column": "w"}
PAIRS = {"name": "l", "kind": "weighted_list"}

HEAD, A, B = "c,n,click,conversion\n", "a,1,1,1\n", "b,2,0,0\n"
ROWS_AB: list[Row] = [("a", 1.0, 1, 1), ("b", 2.0, 0, 0)]


def tables(features: Sequence[dict[str, Any]] = (C, N), **changes: Any) -> DataConfig:
    """A config for every file of a folder as a table."""
    return table_config(list(features), source={"files": "*", **changes.pop("source", {})}, **changes)


def csv(name: str, kind: str, text: str | bytes, refused: str = "", **more: Any) -> Case:
    """One CSV file, a.csv."""
    more = {"rows": ROWS_AB, **more}
    return Case(name, kind, more.pop("config", tables()), write(a__csv=text), refused, **more)


def csv_line(name: str, kind: str, line: str, reason: str, column: str, refused: str, **more: Any) -> Case:
    """One bad line between two good ones: line 3."""
    text = HEAD + A + line + B
    return csv(
        name, kind, text, rf"a\.csv: row 3{column and f', column {column}'}: {refused}", counted={reason: 1}, first=[(3, column)], **more
    )


COLUMNS = "number of columns"
ONE_COLUMN = "its header is one column, 'c.{1,2}n.{1,2}click.{1,2}conversion': separate columns by "
NO_COLUMN = r"a\.csv has no column 'c' \(feature 'c'\)"

CSV = [
    csv(
        "csv cut inside a line",
        "truncated text",
        HEAD + A + B + "c,3,",
        r"a\.csv: row 4: number of columns: .*3 columns instead of 4",
        counted={COLUMNS: 1},
        first=[(4, "")],
    ),
    csv(
        "csv cut before its last label",
        "truncated text",
        HEAD + A + B + "c,3,0,",
        r"a\.csv: row 4, column conversion: label: .*null",
        counted={"label": 1},
        first=[(4, "conversion")],
    ),
    csv("csv of 0 bytes", "empty file", "", r"a\.csv is empty \(0 bytes\)"),
    csv("csv of random bytes", "binary garbage", np.random.default_rng(0).bytes(3000), r"a\.csv: row 1: expected text in UTF-8"),
    csv_line(
        "csv with a line of garbage",
        "binary garbage",
        "\x07\x1b]0;\x7f\x01\x02\n",
        COLUMNS,
        "",
        "number of columns: .*1 columns instead of 4",
    ),
    csv("csv by tabs", "wrong separator", (HEAD + A + B).replace(",", "\t"), NO_COLUMN + rf"\nhint: {ONE_COLUMN}.*commas, not by '\\t'"),
    csv("csv by semicolons", "wrong separator", (HEAD + A + B).replace(",", ";"), NO_COLUMN + rf"\nhint: {ONE_COLUMN}.*not by ';'"),
    csv_line("csv with one line by semicolons", "wrong separator", "c;3;0;0\n", COLUMNS, "", "number of columns: .*1 columns instead of 4"),
    csv("csv with a line beyond a block", "huge line", "x," + HEAD + "x," + A + "x" * (17 << 20) + "," + B),
    csv_line(
        "csv with a huge line of garbage", "huge line", "x" * (17 << 20) + "\n", COLUMNS, "", "number of columns: .*1 columns instead of 4"
    ),
    csv("csv in UTF-16", "UTF-16", (HEAD + A + B).encode("utf-16"), r"a\.csv: row 1: expected text in UTF-8"),
    csv(
        "csv in Latin-1",
        "encoding",
        (HEAD + A + "é,2,0,0\n" + B).encode("latin-1"),
        r"a\.csv: row 3: expected text in UTF-8, found 'é,2,0,0'",
    ),
    csv("csv with a byte order mark", "encoding", b"\xef\xbb\xbf" + (HEAD + A + B).encode()),
    csv(
        "csv with a name in Latin-1",
        "encoding",
        ("c,n,click,conversion,prix_réduit\n" + A.replace("\n", ",9\n")).encode("latin-1"),
        r"a\.csv: row 1: expected text in UTF-8",
    ),
    csv_line("csv with NUL bytes in a number", "NUL bytes", "c,\x003,0,0\n", "number", "n", r"number: .*found '\\x003'"),
    csv_line("csv with NUL bytes in a label", "NUL bytes", "c,3,0\x00,0\n", "label", "click", r"label: .*found '0\\x00'"),
    csv(
        "csv with a tail of NUL bytes",
        "NUL bytes",
        HEAD + A + B + "\0" * 4096,
        r"a\.csv: row 4: number of columns: .*1 columns instead of 4",
        counted={COLUMNS: 1},
        first=[(4, "")],
    ),
    csv_line("csv with inf", "NaN and infinity", "c,inf,0,0\n", "number", "n", "number: .*'inf'"),
    csv_line("csv with NaN", "NaN and infinity", "c,NaN,0,0\n", "number", "n", "number: .*'NaN'"),
    csv(
        "csv ids are text",
        "id that is no plain number",
        "c,click,conversion\n007,0,0\n7,0,0\n+7,0,0\n0x7,0,0\n7.0,0,0\n-7,0,0\n",
        config=tables([C]),
        rows=[(each, 0, 0) for each in ("007", "7", "+7", "0x7", "7.0", "-7")],
    ),
    csv(
        "csv ids keep their spaces",
        "id that is no plain number",
        "c,click,conversion\n 7,0,0\n7 ,0,0\n",
        config=tables([C]),
        rows=[(" 7", 0, 0), ("7 ", 0, 0)],
    ),
    csv(
        "csv ids of any size",
        "id out of range",
        "c,click,conversion\n18446744073709551616,0,0\n-9223372036854775809,0,0\n",
        config=tables([C]),
        rows=[("18446744073709551616", 0, 0), ("-9223372036854775809", 0, 0)],
    ),
    csv("csv with a wanted column twice", "duplicated header", "c,n,n,click,conversion\na,1,1,0,0\n", r"a\.csv has 2 columns named 'n'"),
    csv("csv with a label twice", "duplicated header", "c,n,click,click,conversion\na,1,1,0,0\n", r"a\.csv has 2 columns named 'click'"),
    csv("csv with an unwanted column twice", "duplicated header", "x,x,c,n,click,conversion\n8,9,a,1,1,1\n8,9,b,2,0,0\n"),
    csv("csv without its header", "header", A + B, NO_COLUMN + r"\nhint: .*a, 1"),
    csv("csv of a header only", "header", HEAD, rf"{EMPTY}: there is none in .*a\.csv\n", scored=False),
    csv_line("csv with its header again", "header", HEAD, "label", "click", "label: .*'click'"),
    csv(
        "csv whose header has spaces",
        "header",
        HEAD.replace(",", ", ") + A + B,
        r"a\.csv has no column 'click' \(data\.source\.click\)\nhint: did you mean ' click'",
    ),
    csv("csv whose header is quoted", "header", '"c","n","click","conversion"\n' + A + B),
    csv("csv with a header cut short", "header", "c,n,click\n" + A + B, r"a\.csv has no column 'conversion' \(data\.source\.conversion\)"),
    csv("csv with CRLF", "line ends", (HEAD + A + B).replace("\n", "\r\n")),
    csv(
        "csv with CR only",
        "carriage returns",
        (HEAD + A + B).replace("\n", "\r"),
        r"a\.csv: row 1: expected lines that end in LF or CRLF, found a CR",
    ),
    csv_line("csv with a CR inside a line", "carriage returns", "c,3\r,0,0\n", "torn line", "", r"torn line: .*'c,3\\r,0,0'"),
    csv("csv without a last line end", "line ends", (HEAD + A + B)[:-1]),
    csv(
        "csv with blank lines counts them",
        "blank lines",
        HEAD + "\n" + A + "\n\n" + B + "c,3,7,0\n",
        r"a\.csv: row 7, column click: label: .*'7'",
        counted={"label": 1},
        first=[(7, "click")],
    ),
    csv("csv with blank lines at its end", "blank lines", HEAD + A + B + "\n\n"),
    csv("csv with blank lines of CRLF", "blank lines", (HEAD + A + "\n" + B + "\n").replace("\n", "\r\n")),
    csv_line("csv with a line of spaces", "blank lines", "   \n", COLUMNS, "", "number of columns: .*1 columns instead of 4"),
    csv(
        "csv with two quotes that open only",
        "quotes",
        HEAD + A + '"c,3,0,0\nd,4,0,0\n"e,5,0,0\n' + B,
        r"a\.csv: row 3: torn line: .*found '\"c,3,0,0'",
        counted={"torn line": 2},
        first=[(3, ""), (5, "")],
        rows=[*ROWS_AB, ("d", 4.0, 0, 0)],
    ),
    csv(
        "csv with a quote that never closes",
        "quotes",
        HEAD + A + B + '"c,3,0,0\n' + B,
        r"a\.csv: row 4: torn line: .*found '\"c,3,0,0'",
        counted={"torn line": 1},
        first=[(4, "")],
        rows=[*ROWS_AB, ROWS_AB[1]],
    ),
    csv(
        "csv with a quote that closes a line later",
        "quotes",
        HEAD + A + '"c\nd",4,0,0\n' + B,
        r"a\.csv: row 3: torn line: .*found '\"c'",
        counted={"torn line": 2},
        first=[(3, ""), (4, "")],
    ),
    csv("csv with quoted commas and quotes", "quotes", HEAD + A + '"b,""b""",2,0,0\n', rows=[ROWS_AB[0], ('b,"b"', 2.0, 0, 0)]),
    csv("csv with a quote inside a cell", "quotes", HEAD + A + '5" disk,2,0,0\n', rows=[ROWS_AB[0], ('5" disk', 2.0, 0, 0)]),
    csv(
        "csv with a quoted header that never closes",
        "quotes",
        'c,n,"click,conversion\n' + A + B,
        r"a\.csv is not a CSV table: CSV parse error",
    ),
    csv_line("csv with label true", "label", "c,3,true,0\n", "label", "click", "label: .*'true'"),
    csv_line("csv with label 1 and a space", "label", "c,3, 1,0\n", "label", "click", "label: .*' 1'"),
    csv("csv with labels 1.0 and 0.0", "label", HEAD + "a,1,1.0,1e0\nb,2,0.0,-0\n"),
    csv(
        "csv with a conversion without click",
        "conversion without click",
        HEAD + A + "c,3,0,1\n" + B,
        r"a\.csv: row 3: conversion without click: .*found click 0 and conversion 1",
        scored=False,
    ),
    csv(
        "csv whose conversions are clicks",
        "conversion without click",
        HEAD + A + "c,3,0,1\n" + B,
        config=tables(conversion_without_click="click"),
        rows=[*ROWS_AB, ("c", 3.0, 1, 1)],
    ),
    csv(
        "csv list with a value without weight",
        "unequal lists",
        "l,click,conversion\na:1|b,0,0\nb:2,0,0\n",
        r"a\.csv: row 2, column l: weighted value: .*found 'a:1\|b'",
        config=tables([PAIRS]),
        counted={"weighted value": 1},
        first=[(2, "l")],
        rows=[((("b", 2.0),), 0, 0)],
    ),
    csv(
        "csv list with an infinite weight",
        "list weight",
        "l,click,conversion\na:1|b:inf,0,0\nb:2,0,0\n",
        r"a\.csv: row 2, column l: weighted value: .*found 'a:1\|b:inf'",
        config=tables([PAIRS]),
        counted={"weighted value": 1},
        first=[(2, "l")],
        rows=[((("b", 2.0),), 0, 0)],
    ),
    csv(
        "csv weight 0",
        "row weight",
        "c,n,click,conversion,w\na,1,1,1,2\nb,2,0,0,0\n",
        r"a\.csv: row 3, column w: weight: .*'0'",
        config=tables(source={"weight": "w"}),
        counted={"weight": 1},
        first=[(3, "w")],
        rows=[("a", 1.0, 1, 1, 2.0)],
    ),
    csv(
        "csv truth that is no number",
        "known truth",
        "c,n,click,conversion,p,r\na,1,1,1,0.5,0.5\nb,2,0,0,0.5,often\n",
        r"a\.csv: row 3, column r: truth: .*'often'",
        config=tables(source={"true_propensity": "p", "true_cvr": "r"}),
        counted={"truth": 1},
        first=[(3, "r")],
        rows=[ROWS_AB[0]],
    ),
    csv(
        "csv of gzip bytes",
        "compressed or encrypted",
        gzip.compress((HEAD + A + B).encode(), mtime=0),
        r"a\.csv: row 1: expected text in UTF-8",
    ),
    csv(
        "csv of 5,000 columns",
        "many or long columns",
        "".join(f"x{number}," for number in range(4996)) + HEAD + "9," * 4996 + A + "9," * 4996 + B,
    ),
    csv("csv with a column name of 100,000 letters", "many or long columns", "x" * 100_000 + "," + HEAD + "9," + A + "9," + B),
    csv("csv that lacks a column of 100,000 letters", "many or long columns", "x" * 100_000 + "\n1\n", NO_COLUMN + "(?s:.{0,3000})$"),
]

# ------------------------------------------------------------------------------------------------------------- Parquet tables

TYPES = {
    "c": pa.string(),
    "n": pa.float64(),
    "click": pa.int64(),
    "conversion": pa.int64(),
    "l": pa.list_(pa.int64()),
    "w": pa.list_(pa.float64()),
}
GOOD: dict[str, list[Any]] = {"c": ["a", "b"], "n": [1.0, 2.0], "click": [1, 0], "conversion": [1, 0]}


def table_of(columns: dict[str, Any]) -> pa.Table:
    """An Arrow table; lists take the type of their name."""
    return pa.table({name: pa.array(column, TYPES.get(name)) if isinstance(column, list) else column for name, column in columns.items()})


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """The bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue().to_pybytes())


def parquet(name: str, kind: str, columns: dict[str, Any] | bytes, refused: str = "", **more: Any) -> Case:
    """One Parquet file, a.parquet, with the good columns where not given."""
    content = columns if isinstance(columns, bytes) else parquet_bytes(table_of({**GOOD, **columns}))
    more = {"rows": ROWS_AB, **more}
    return Case(name, kind, more.pop("config", tables()), write(a__parquet=content), refused and rf"a\.parquet:? {refused}", **more)


def bad_row(name: str, kind: str, columns: dict[str, Any], reason: str, column: str, refused: str, **more: Any) -> Case:
    """A Parquet file whose second row is bad."""
    more = {"rows": ROWS_AB[:1], **more}
    return parquet(name, kind, columns, rf"row 2, column {column}: {refused}", counted={reason: 1}, first=[(2, column)], **more)


def ids(
    name: str, kind: str, column: Any, refused: str = "", values: Sequence[Any] = (), features: Sequence[dict[str, Any]] = (C,), **more: Any
) -> Case:
    """A Parquet file with only such a column c and labels."""
    columns = {"c": column, "click": [0] * len(column), "conversion": [0] * len(column)}
    more = {"rows": [(value, 0, 0) for value in values], **more}
    return parquet(name, kind, parquet_bytes(pa.table(columns)), refused, config=tables(features), **more)


def lists(name: str, kind: str, columns: dict[str, Any], refused: str = "", feature: dict[str, Any] = WEIGHTED, **more: Any) -> Case:
    """A Parquet file of two rows with a list feature alone."""
    content = parquet_bytes(table_of({"click": [0, 0], "conversion": [0, 0], **columns}))
    return parquet(name, kind, content, refused, config=tables([feature]), **more)


def patched(content: bytes, place: int, replacement: bytes) -> bytes:
    """The bytes with some overwritten."""
    return content[:place] + replacement + content[place + len(replacement) :]


def with_codec(content: bytes, code: int) -> bytes:
    """A gzip Parquet file whose footer claims another codec for column c, by its number in parquet.thrift.

    In the footer the path of a column (a list of one string) goes before its codec (an i32, zigzag; gzip is 2).
    """
    path = b"\x19\x18\x01c\x15"
    assert content.count(path + b"\x04") == 1
    return content.replace(path + b"\x04", path + bytes([2 * code]))


def row_groups(sizes: Sequence[int]) -> bytes:
    """The good rows in row groups of these sizes."""
    table, sink, start = table_of(GOOD), pa.BufferOutputStream(), 0
    with pq.ParquetWriter(sink, table.schema) as writer:
        for size in sizes:
            writer.write_table(table.slice(start, size))
            start += size
    return bytes(sink.getvalue().to_pybytes())


def two_files(first: dict[str, Any], second: dict[str, Any]) -> Write:
    """a.parquet and b.parquet."""
    return write(a__parquet=parquet_bytes(table_of({**GOOD, **first})), b__parquet=parquet_bytes(table_of({**GOOD, **second})))


def trains_nothing(name: str, content: bytes) -> Case:
    """A Parquet file without a row, which is right by itself."""
    return Case(name, "no rows or columns", tables(), write(a__parquet=content), rf"{EMPTY}: there is none in .*a\.parquet\n", scored=False)


WHOLE = parquet_bytes(table_of(GOOD))
LARGE = parquet_bytes(table_of({**GOOD, "c": [letter * 500 for letter in "ab"]}), compression="snappy", use_dictionary=False)
NO_UTF8 = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
WITH_WEIGHT, WITH_TRUTH = tables(source={"weight": "w"}), tables(source={"true_propensity": "p", "true_cvr": "r"})
DAMAGED = r"(is not a Parquet file, or is damaged|row group \d+ is damaged)"
NO_NUMBER = "expected a number, found type"
NO_VALUE = "column '[cl]': expected whole numbers or strings, found type"
ONE_VALUE = "column 'c': expected one value a row, found type"
NO_LIST = "column 'l': expected a list a row, found type"
NO_PAIR = r"column 'l': expected a list of \(value, weight\) structs, a map, or a weights_column beside it, found type list"

PARQUET = [
    parquet("parquet cut in its footer", "truncated Parquet", WHOLE[:-20], DAMAGED),
    parquet("parquet cut in its data", "truncated Parquet", WHOLE[:100], DAMAGED),
    parquet("parquet whose data lacks bytes", "truncated Parquet", WHOLE[:4] + WHOLE[200:], DAMAGED),
    parquet("parquet of its magic only", "truncated Parquet", b"PAR1", DAMAGED),
    parquet(
        "parquet whose footer is longer than the file",
        "damaged Parquet",
        patched(WHOLE, len(WHOLE) - 8, struct.pack("<I", 1 << 30)),
        DAMAGED,
    ),
    parquet("parquet with zeros for data", "damaged Parquet", patched(LARGE, 4, bytes(300)), DAMAGED),
    parquet("parquet of 0 bytes", "empty file", b"", r"is empty \(0 bytes\)"),
    parquet("parquet of random bytes", "binary garbage", np.random.default_rng(1).bytes(3000), DAMAGED),
    parquet("parquet with text of 200 KiB", "huge line", {"c": ["a", "b" * 200_000]}, rows=[ROWS_AB[0], ("b" * 200_000, 2.0, 0, 0)]),
    bad_row("parquet text that is no UTF-8", "encoding", {"c": NO_UTF8}, "text", "c", r"text: expected text in UTF-8, found b'.xff'"),
    bad_row("parquet with NaN", "NaN and infinity", {"n": [1.0, float("nan")]}, "number", "n", "number: .*found nan"),
    bad_row("parquet label NaN", "NaN and infinity", {"click": pa.array([1.0, float("nan")])}, "label", "click", "label: .*found nan"),
    ids(
        "parquet ids beyond int64",
        "id out of range",
        pa.array([1, 2**64 - 1], pa.uint64()),
        "row 2, column c: id: .*found 18446744073709551615",
        [1],
        counted={"id": 1},
        first=[(2, "c")],
    ),
    ids("parquet ids at the ends of int64", "id out of range", pa.array([2**63 - 1, -(2**63), -1]), values=[2**63 - 1, -(2**63), -1]),
    ids("parquet ids that are floats", "id that is no plain number", pa.array([1.0, 2.0]), NO_VALUE + " double"),
    parquet(
        "parquet with a wanted column twice",
        "duplicated header",
        parquet_bytes(
            pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([0]), pa.array([0])], ["n", "n", "click", "conversion"])
        ),
        "has 2 columns named 'n'",
        config=tables([N]),
    ),
    parquet(
        "parquet with an unwanted column twice",
        "duplicated header",
        parquet_bytes(pa.Table.from_arrays([pa.array([8, 9])] * 2 + [pa.array(column) for column in GOOD.values()], ["x", "x", *GOOD])),
    ),
    parquet(
        "parquet labels of text", "Parquet type of a label", {"click": pa.array(["1", "0"])}, "column 'click': " + NO_NUMBER + " string"
    ),
    parquet(
        "parquet labels of lists", "Parquet type of a label", {"click": pa.array([[1], [0]])}, "column 'click': " + NO_NUMBER + " list"
    ),
    parquet(
        "parquet labels of dates",
        "Parquet type of a label",
        {"conversion": pa.array([1, 0], pa.date32())},
        "column 'conversion': " + NO_NUMBER + " date32",
    ),
    parquet("parquet labels of booleans", "Parquet type of a label", {"click": pa.array([True, False])}),
    parquet("parquet labels of decimals", "Parquet type of a label", {"click": pa.array([1, 0], pa.decimal128(5, 2))}),
    parquet("parquet labels of a dictionary", "Parquet type of a label", {"click": pa.array([1, 0]).dictionary_encode()}),
    ids("parquet ids in lists", "Parquet type of a value", pa.array([[1], [2]]), ONE_VALUE + " list"),
    ids("parquet ids in structs", "Parquet type of a value", pa.array([{"x": 1}, {"x": 2}]), ONE_VALUE + " struct"),
    ids("parquet ids in maps", "Parquet type of a value", pa.array([[("x", 1)], []], pa.map_(pa.string(), pa.int64())), ONE_VALUE + " map"),
    ids("parquet ids that are decimals", "Parquet type of a value", pa.array([1, 2], pa.decimal128(9, 0)), NO_VALUE + " decimal128"),
    ids("parquet ids that are times", "Parquet type of a value", pa.array([1, 2], pa.timestamp("us")), NO_VALUE + " timestamp"),
    ids("parquet ids that are bytes", "Parquet type of a value", pa.array([b"a", b"\xff"]), NO_VALUE + " binary"),
    lists("parquet lists of lists", "Parquet type of a list", {"l": pa.array([[[1]], [[2]]])}, NO_VALUE + " list", LIST),
    lists(
        "parquet lists of structs", "Parquet type of a list", {"l": pa.array([[{"x": 1}], []])}, NO_VALUE + " list<element: struct", LIST
    ),
    lists("parquet lists of floats", "Parquet type of a list", {"l": pa.array([[1.5], []])}, NO_VALUE + " list<element: double", LIST),
    lists("parquet text for a list", "Parquet type of a list", {"l": pa.array(["1|2", "3"])}, NO_LIST + " string", LIST),
    lists("parquet triples for pairs", "Parquet type of a list", {"l": pa.array([[{"a": 1, "b": 1.0, "c": 2}], []])}, NO_PAIR, PAIRS),
    lists(
        "parquet weights of text",
        "Parquet type of a list",
        {"l": [[1], [2]], "w": pa.array([["x"], ["y"]])},
        "column 'w': expected weights that are numbers, found type list<element: string",
    ),
    ids(
        "parquet ids in a dictionary",
        "strange but right Parquet type",
        pa.array(["x", "y", "x"]).dictionary_encode(),
        values=["x", "y", "x"],
    ),
    ids("parquet ids in large strings", "strange but right Parquet type", pa.array(["x", "y"], pa.large_string()), values=["x", "y"]),
    ids("parquet ids of booleans", "strange but right Parquet type", pa.array([True, False]), values=[1, 0]),
    ids("parquet ids in string views", "strange but right Parquet type", pa.array(["x", "y"], pa.string_view()), values=["x", "y"]),
    lists(
        "parquet lists of fixed size",
        "strange but right Parquet type",
        {"l": pa.array([[1, 2], [3, 4]], pa.list_(pa.int16(), 2))},
        "",
        LIST,
        rows=[((1, 2), 0, 0), ((3, 4), 0, 0)],
    ),
    lists(
        "parquet large lists of a dictionary",
        "strange but right Parquet type",
        {"l": pa.array([["x"], ["y", "x"]], pa.large_list(pa.dictionary(pa.int32(), pa.string())))},
        "",
        LIST,
        rows=[(("x",), 0, 0), (("y", "x"), 0, 0)],
    ),
    ids("parquet ids that are all null", "nulls", pa.array([None, None], pa.string()), values=[None, None]),
    ids("parquet ids of the null type", "nulls", pa.array([None, None], pa.null()), values=[None, None]),
    parquet(
        "parquet numbers that are all null", "nulls", {"n": pa.array([None, None], pa.float64())}, rows=[("a", 0.0, 1, 1), ("b", 0.0, 0, 0)]
    ),
    bad_row("parquet with a null label", "nulls", {"click": [1, None]}, "label", "click", "label: .*found null"),
    parquet(
        "parquet with labels of the null type",
        "nulls",
        {"click": pa.array([None, None], pa.null())},
        "row 1, column click: label: .*found null",
        counted=None,
        scored=False,
    ),
    parquet(
        "parquet with null to split by",
        "nulls",
        {},
        "",
        config=tables(split={"by": "column", "column": "c", "train": ["a", "b"]}),
        rows=ROWS_AB,
    ),
    lists(
        "parquet with null in a list",
        "nulls in lists",
        {"l": [[1], [2, None]]},
        r"row 2, column l: null in a list: .*found \[2, None\]",
        LIST,
        counted={"null in a list": 1},
        first=[(2, "l")],
        rows=[((1,), 0, 0)],
    ),
    lists("parquet with null lists", "nulls in lists", {"l": [None, [2]], "w": [None, [1.0]]}, rows=[((), 0, 0), (((2, 1.0),), 0, 0)]),
    lists(
        "parquet lists of the null type", "nulls in lists", {"l": pa.array([[], []], pa.list_(pa.null()))}, "", LIST, rows=[((), 0, 0)] * 2
    ),
    lists(
        "parquet with a null pair",
        "nulls in lists",
        {"l": pa.array([[{"v": 1, "w": 1.0}], [None]])},
        r"row 2, column l: number: .*found \[None\]",
        PAIRS,
        counted={"number": 1},
        first=[(2, "l")],
        rows=[(((1, 1.0),), 0, 0)],
    ),
    lists(
        "parquet with a null value in a pair",
        "nulls in lists",
        {"l": pa.array([[{"v": 1, "w": 1.0}], [{"v": None, "w": 1.0}]])},
        "row 2, column l: null in a list: .*'v': None",
        PAIRS,
        counted={"null in a list": 1},
        first=[(2, "l")],
        rows=[(((1, 1.0),), 0, 0)],
    ),
    lists(
        "parquet with a null weight",
        "nulls in lists",
        {"l": [[1], [2]], "w": [[1.0], [None]]},
        r"row 2, column w: number: .*found \[None\]",
        counted={"number": 1},
        first=[(2, "w")],
        rows=[(((1, 1.0),), 0, 0)],
    ),
    trains_nothing("parquet without rows", parquet_bytes(table_of(GOOD).slice(0, 0))),
    parquet("parquet without columns", "no rows or columns", parquet_bytes(pa.table({})), r"has no column 'c' .*\nhint: it has no column"),
    parquet(
        "parquet without its label",
        "no rows or columns",
        parquet_bytes(table_of(GOOD).drop_columns("conversion")),
        r"has no column 'conversion' \(data\.source\.conversion\)",
    ),
    parquet("parquet with empty row groups", "no rows or columns", row_groups([0, 1, 0, 0, 1, 0])),
    trains_nothing("parquet with empty row groups only", row_groups([0, 0])),
    Case(
        "an id is a number, then text",
        "changing schema",
        tables(),
        two_files({"c": pa.array([1, 2])}, {}),
        r"b\.parquet: feature 'c' holds string values, in .*a\.parquet it holds int64",
        scored=False,
    ),
    Case(
        "a second file without one of the columns",
        "changing schema",
        tables(),
        write(a__parquet=WHOLE, b__parquet=parquet_bytes(table_of(GOOD).drop_columns("n"))),
        r"b\.parquet has no column 'n' \(feature 'n'\)",
    ),
    Case(
        "columns in another order and narrower types",
        "changing schema",
        tables([{**C, "column": "i"}, N]),
        write(
            a__parquet=parquet_bytes(table_of({**GOOD, "i": pa.array([1, 2])})),
            b__parquet=parquet_bytes(
                table_of(
                    {
                        "conversion": pa.array([0], pa.uint8()),
                        "i": pa.array([2], pa.int8()),
                        "n": pa.array([2], pa.int16()),
                        "click": pa.array([True]),
                    }
                )
            ),
        ),
        rows=[(1, 1.0, 1, 1), (2, 2.0, 0, 0), (2, 2.0, 1, 0)],
    ),
    Case(
        "a kept column changes its type",
        "changing schema",
        tables(keep=["x"]),
        two_files({"x": pa.array([1, 2])}, {"x": pa.array(["y", "z"])}),
        r"b\.parquet: kept column 'x' holds string values, in .*a\.parquet it holds int64",
        scored=False,
    ),
    Case(
        "a numeric becomes text",
        "changing schema",
        tables(),
        two_files({}, {"n": pa.array(["1", "2"])}),
        r"b\.parquet: column 'n': expected a number, found type string",
    ),
    Case(
        "ids that are null at first",
        "changing schema",
        tables(),
        two_files({"c": pa.array([None, None], pa.null())}, {}),
        rows=[(None, 1.0, 1, 1), (None, 2.0, 0, 0), *ROWS_AB],
    ),
    bad_row("parquet label 2", "label in Parquet", {"click": [1, 2]}, "label", "click", "label: .*found 2"),
    bad_row("parquet label -1", "label in Parquet", {"conversion": [1, -1]}, "label", "conversion", "label: .*found -1"),
    bad_row("parquet label 0.5", "label in Parquet", {"click": pa.array([1.0, 0.5])}, "label", "click", r"label: .*found 0\.5"),
    parquet(
        "parquet with a conversion without click",
        "conversion without click",
        {"conversion": [1, 1]},
        "row 2: conversion without click: .*found click 0 and conversion 1",
        scored=False,
    ),
    lists(
        "parquet with more values than weights",
        "unequal lists",
        {"l": [[1], [2, 3]], "w": [[1.0], [1.0]]},
        "row 2, column l: unequal lists: .*2 values and 1 weights",
        counted={"unequal lists": 1},
        first=[(2, "l")],
        rows=[(((1, 1.0),), 0, 0)],
    ),
    lists(
        "parquet with weights of a null list",
        "unequal lists",
        {"l": [[1], None], "w": [[1.0], [1.0]]},
        "row 2, column l: unequal lists: .*0 values and 1 weights",
        counted={"unequal lists": 1},
        first=[(2, "l")],
        rows=[(((1, 1.0),), 0, 0)],
    ),
    lists(
        "parquet whose two faults even out",
        "unequal lists",
        {"l": [[1, 2], [3]], "w": [[1.0], [1.0, 2.0]]},
        "row 1, column l: unequal lists: .*2 values and 1 weights",
    ),
    lists(
        "parquet with a NaN for a weight",
        "list weight",
        {"l": [[1], [2]], "w": [[1.0], [float("nan")]]},
        r"row 2, column w: number: .*found \[nan\]",
        counted={"number": 1},
        first=[(2, "w")],
        rows=[(((1, 1.0),), 0, 0)],
    ),
    lists(
        "parquet with a weight beyond float32",
        "list weight",
        {"l": [[1], [2]], "w": [[1.0], [1e39]]},
        r"row 2, column w: number: .*found \[1e\+39\]",
        counted={"number": 1},
        first=[(2, "w")],
        rows=[(((1, 1.0),), 0, 0)],
    ),
    lists(
        "parquet with weights 0 and below",
        "list weight",
        {"l": [[1], [2, 3]], "w": [[0.0], [-2.0, 1.0]]},
        rows=[(((1, 0.0),), 0, 0), (((2, -2.0), (3, 1.0)), 0, 0)],
    ),
    *(
        bad_row(
            f"parquet row weight {weight}",
            "row weight",
            {"w": pa.array([2.0, weight])},
            "weight",
            "w",
            f"weight: .*found {said}",
            config=WITH_WEIGHT,
            rows=[(*ROWS_AB[0], 2.0)],
        )
        for weight, said in ((-1.0, "-1.0"), (float("nan"), "nan"), (None, "null"), (1e39, r"1e\+39"), (1e-50, "1e-50"))
    ),
    *(
        bad_row(
            f"parquet truth {truth}",
            "known truth",
            {"p": pa.array([0.5, truth]), "r": pa.array([0.5, 0.5])},
            "truth",
            "p",
            f"truth: .*found {said}",
            config=WITH_TRUTH,
        )
        for truth, said in ((1.5, "1.5"), (-0.5, "-0.5"), (float("nan"), "nan"), (None, "null"))
    ),
    parquet("parquet of gzip bytes", "compressed or encrypted", gzip.compress(WHOLE), DAMAGED),
    parquet("parquet that is encrypted", "compressed or encrypted", b"PARE" + WHOLE[4:-4] + b"PARE", DAMAGED),
    parquet("parquet of 5,000 columns", "many or long columns", {f"x{number}": pa.array([1, 2]) for number in range(4996)}),
    parquet("parquet with a column name of 100,000 letters", "many or long columns", {"x" * 100_000: pa.array([1, 2])}),
    parquet(
        "parquet that lacks a column beside a long one",
        "many or long columns",
        parquet_bytes(pa.table({"x" * 100_000: [1]})),
        r"has no column 'c' \(feature 'c'\)\nhint: (?s:.{0,3000})$",
    ),
    parquet("parquet of a codec that nobody has", "codec", with_codec(parquet_bytes(table_of(GOOD), compression="gzip"), 3), DAMAGED),
    parquet("parquet that lies about its codec", "codec", with_codec(parquet_bytes(table_of(GOOD), compression="gzip"), 1), DAMAGED),
    *(parquet(f"parquet in {codec}", "codec", parquet_bytes(table_of(GOOD), compression=codec)) for codec in ("brotli", "zstd", "lz4")),
    parquet(
        "parquet to split by text that is no UTF-8",
        "value to split by",
        {"c": NO_UTF8},
        config=tables([N], split={"by": "column", "column": "c", "train": ["a"]}),
        counted={"no split": 1},
        first=[(2, "c")],
        rows=[(1.0, 1, 1)],
        scored=False,
    ),
    parquet(
        "parquet to split by a time beyond all years",
        "value to split by",
        {"c": pa.array([7, 2**62], pa.timestamp("ms"))},
        config=tables([N], split={"by": "time", "column": "c", "test_from": "2026-01-01"}),
        counted={"no split": 1},
        first=[(2, "c")],
        rows=[(1.0, 1, 1)],
        scored=False,
    ),
    parquet(
        "parquet to split by times that are no UTF-8",
        "value to split by",
        {"c": NO_UTF8},
        "row 1, column c: no row has a time: expected timestamps, numbers or ISO text, found 'a'\n",
        config=tables([N], split={"by": "time", "column": "c", "test_from": "2026-01-01"}),
        scored=False,
    ),
]

# -------------------------------------------------------------------------------------------------------------------- Ali-CCP

IMPRESSION = skeleton_line(1, 0, 0, key(1), [("205", 1, 1.0)])
RECORD = common_line(key(1), [("101", 11, 1.0)])
SEEN: Row = (11, (), 1, (), 0.0, 0, 0)  # user, shops, item, words, match, click, conversion
SKELETON, COMMON = r"sample_skeleton_train\.csv", r"common_features_train\.csv"


def aliccp(
    name: str, kind: str, skeleton: str | bytes, refused: str, common: str | bytes = RECORD, rows: Sequence[Row] = (SEEN, SEEN), **more: Any
) -> Case:
    """A skeleton and a common file."""
    files = write(sample_skeleton_train__csv=skeleton, common_features_train__csv=common)
    return Case(name, kind, more.pop("config", aliccp_config()), files, refused, rows=rows, **more)


def impression(name: str, kind: str, line: str, reason: str, column: str, refused: str, common: str = RECORD, **more: Any) -> Case:
    """A bad impression between two good ones: row 2."""
    where = rf"{SKELETON}: row 2{column and f', column {column}'}: {reason}: .*{refused}"
    return aliccp(name, kind, IMPRESSION + line + IMPRESSION, where, common, counted={reason: 1}, first=[(2, column)], **more)


def features(*listed: tuple[str, Any, Any], click: Any = 0, buy: Any = 0, index: str = key(1), num: Any = None) -> str:
    """An impression with these features."""
    return skeleton_line(2, click, buy, index, listed, num)


def record(name: str, kind: str, line: str, reason: str, column: str, refused: str, **more: Any) -> Case:
    """A bad common record, the second one, that no impression needs."""
    where = rf"{COMMON}: row 2{column and f', column {column}'}: {reason}: .*{refused}"
    return aliccp(name, kind, IMPRESSION * 2, where, RECORD + line, counted={reason: 1}, first=[(2, column)], **more)


def with_truth(table: pa.Table | bytes) -> Write:
    """Two impressions with a truth file beside them."""
    content = table if isinstance(table, bytes) else parquet_bytes(table)
    return write(sample_skeleton_train__csv=IMPRESSION * 2, common_features_train__csv=RECORD, truth_train__parquet=content)


def truth(name: str, kind: str, table: pa.Table | bytes, refused: str) -> Case:
    """A truth file that does not fit."""
    return Case(name, kind, TRUTH, with_truth(table), rf"truth_train\.parquet:? {refused}")


def truth_of(samples: Any, **changes: Any) -> pa.Table:
    """Known truth of these samples."""
    return pa.table({"sample_id": samples, "true_propensity": [0.5] * len(samples), "true_cvr": [0.5] * len(samples), **changes})


TRUTH = aliccp_config(source={"truth": "truth_*.parquet"})
MALFORMED, TRUNCATED, LINE_END = "malformed line", "truncated line", "a line that ends with a newline"
LONG = features(*(("210", number % 7, 1.0) for number in range(300_000)))

ALICCP = [
    aliccp(
        "skeleton cut inside a line",
        "truncated text",
        IMPRESSION * 2 + IMPRESSION[:-15],
        f"{SKELETON}: row 3: {TRUNCATED}: expected {LINE_END}",
        counted={TRUNCATED: 1},
        first=[(3, "")],
    ),
    aliccp(
        "skeleton cut inside a number",
        "truncated text",
        IMPRESSION * 2 + features(("205", 12345, 1.25))[:-2],
        f"{SKELETON}: row 3: {TRUNCATED}: expected {LINE_END}",
        counted={TRUNCATED: 1},
        first=[(3, "")],
    ),
    aliccp(
        "common records cut inside a number",
        "truncated text",
        IMPRESSION * 2,
        f"{COMMON}: row 2: {TRUNCATED}: expected {LINE_END}",
        RECORD + common_line(key(2), [("101", 12345, 1.0)])[:-5],
        counted={TRUNCATED: 1},
        first=[(2, "")],
    ),
    aliccp("skeleton of 0 bytes", "empty file", "", rf"{SKELETON} is empty \(0 bytes\)"),
    aliccp("common records of 0 bytes", "empty file", IMPRESSION, rf"{COMMON} is empty \(0 bytes\)", ""),
    impression("skeleton with a line of garbage", "binary garbage", "\x00\x01\x02\x03\x7f,,\x01\x01\x02,\n", MALFORMED, "", ""),
    record("common records with a line of garbage", "binary garbage", "\x00\x01\x02\x03\x7f,,\x01\x01\x02,\n", MALFORMED, "", ""),
    impression(
        "commas between features", "wrong separator", features(("205", 1, 1.0), ("210", 2, 1.0)).replace("\x01", ","), MALFORMED, "", ""
    ),
    impression("tabs between header columns", "wrong separator", features(("205", 1, 1.0)).replace(",", "\t"), MALFORMED, "", ""),
    aliccp(
        "a line beyond a block",
        "huge line",
        IMPRESSION + LONG + IMPRESSION,
        "",
        rows=[SEEN, (11, (), None, tuple(number % 7 for number in range(300_000)), 0.0, 0, 0), SEEN],
    ),
    impression("a line of garbage beyond a block", "huge line", "x" * (5 << 20) + "\n", MALFORMED, "", ""),
    aliccp("skeleton in UTF-16", "UTF-16", (IMPRESSION * 2).encode("utf-16"), f"{SKELETON}: row 1: {MALFORMED}: "),
    impression("a NUL byte in a field id", "NUL bytes", features(("205\x00", 1, 1.0)), MALFORMED, "", ""),
    aliccp(
        "skeleton with a tail of NUL bytes",
        "NUL bytes",
        IMPRESSION * 2 + "\0" * 4096,
        f"{SKELETON}: row 3: {TRUNCATED}: expected {LINE_END}",
        counted={TRUNCATED: 1},
        first=[(3, "")],
    ),
    impression("a value of inf", "NaN and infinity", features(("508", 1, "inf")), "number", "508", "'inf'"),
    impression("an id beyond int64", "id out of range", features(("205", 2**63, 1.0)), "id", "205", str(2**63)),
    impression("an id of 2**64 and 5", "id out of range", features(("205", 2**64 + 5, 1.0)), "id", "205", str(2**64 + 5)),
    impression("a negative id", "id that is no plain number", features(("205", -5, 1.0)), "id", "205", "'-5'"),
    impression("an id with a plus sign", "id that is no plain number", features(("205", "+5", 1.0)), "id", "205", r"'\+5'"),
    impression("an id in hexadecimal", "id that is no plain number", features(("205", "0x1f", 1.0)), "id", "205", "'0x1f'"),
    aliccp(
        "skeleton with CRLF",
        "line ends",
        IMPRESSION.replace("\n", "\r\n") * 2,
        "",
    ),
    impression("a CR after a value that is read", "carriage returns", features(("508", 1, "0.5\r")), "number", "508", r"'0.5\\r'"),
    impression("a blank line", "blank lines", "\n", MALFORMED, "", ""),
    aliccp(
        "a label yes",
        "label",
        IMPRESSION + features(click="yes") + IMPRESSION,
        f"{SKELETON}: row 2, column click: label: .*'yes'",
        counted={"label": 1},
        first=[(2, "click")],
    ),
    aliccp(
        "a conversion without click",
        "conversion without click",
        IMPRESSION + features(buy=1) + IMPRESSION,
        f"{SKELETON}: row 2: conversion without click: .*found click 0 and conversion 1",
        scored=False,
    ),
    aliccp(
        "conversions without click dropped",
        "conversion without click",
        IMPRESSION + features(buy=1) + IMPRESSION,
        "",
        config=aliccp_config(conversion_without_click="drop"),
        counted={"conversion without click": 1},
        first=[(2, "")],
        scored=False,
    ),
    impression(
        "feature_num too large", "feature_num", features(("205", 1, 1.0), num=2), "feature_num", "feature_num", "found 2 before a list of 1"
    ),
    impression(
        "feature_num too small",
        "feature_num",
        features(("205", 1, 1.0), ("210", 1, 1.0), num=1),
        "feature_num",
        "feature_num",
        "found 1 before a list of 2",
    ),
    impression(
        "feature_num missing", "feature_num", features(("205", 1, 1.0), num=""), "feature_num", "feature_num", "found  before a list of 1"
    ),
    impression("feature_num negative", "feature_num", features(("205", 1, 1.0), num=-1), "feature_num", "feature_num", "found -1 before"),
    record(
        "feature_num of a common record",
        "feature_num",
        common_line(key(2), [("101", 1, 1.0)], 3),
        "feature_num",
        "feature_num",
        "found 3 before a list of 1",
    ),
    impression(
        "a common record that is missing", "common record", features(index=key(9)), "missing common record", "common_feature_index", key(9)
    ),
    aliccp(
        "two records of one index",
        "common record",
        IMPRESSION * 2,
        f"{COMMON}: row 2, column common_feature_index: duplicate common record: .*the index of row 1 with other features",
        RECORD + RECORD.replace("11", "12"),
        counted={"duplicate common record": 1},
        first=[(2, "common_feature_index")],
    ),
    aliccp("two equal records of one index", "common record", IMPRESSION * 2, "", RECORD * 2),
    aliccp("a record that nobody needs", "common record", IMPRESSION * 2, "", RECORD + common_line(key(2), [("101", 12, 1.0)])),
    impression(
        "an index of 15 digits",
        "common index",
        features(index=key(1)[:15]),
        "common_feature_index",
        "common_feature_index",
        f"16 hexadecimal digits in lower case, found '{key(1)[:15]}'",
    ),
    impression(
        "an index of 17 digits",
        "common index",
        features(index=key(1) + "0"),
        "common_feature_index",
        "common_feature_index",
        f"found '{key(1)}0'",
    ),
    impression(
        "an index in upper case",
        "common index",
        features(index=key(1).upper()),
        "common_feature_index",
        "common_feature_index",
        f"found '{key(1).upper()}'",
    ),
    impression("no index", "common index", features(index=""), "common_feature_index", "common_feature_index", "found ''"),
    record(
        "a record of no hexadecimal index",
        "common index",
        common_line("g" * 16, []),
        "common_feature_index",
        "common_feature_index",
        "found 'gggggggggggggggg'",
    ),
    impression("a feature without its value", "feature list", features(("205", 1, 1.0)).replace("\x031.0", ""), MALFORMED, "", ""),
    impression("a feature with an empty value", "feature list", features(("508", 1, "")), "number", "508", "found ''"),
    impression("a feature with an empty id", "feature list", features(("205", "", 1.0)), "id", "205", "found ''"),
    aliccp(
        "an empty list of features",
        "feature list",
        IMPRESSION + features() + IMPRESSION,
        "",
        rows=[SEEN, (11, (), None, (), 0.0, 0, 0), SEEN],
    ),
    impression("a list that ends in its separator", "feature list", features(("205", 1, 1.0)).replace("\n", "\x01\n"), MALFORMED, "", ""),
    impression("a list without its last comma", "feature list", features().replace(",0,\n", ",0\n"), MALFORMED, "", ""),
    impression("an item twice", "single-valued field", features(("205", 1, 1.0), ("205", 2, 1.0)), "several values", "205", "2 values"),
    record("a user twice", "single-valued field", common_line(key(2), [("101", 1, 1.0)] * 3), "several values", "101", "3 values"),
    impression(
        "a user on both sides",
        "single-valued field",
        features(("101", 1, 1.0)),
        "several values",
        "101",
        "one here and one in the common record",
    ),
    aliccp(
        "a list on both sides",
        "single-valued field",
        features(("110_14", 1, 0.5)),
        "",
        common_line(key(1), [("110_14", 2, 0.25)]),
        rows=[(None, ((1, 0.5), (2, 0.25)), None, (), 0.0, 0, 0)],
    ),
    aliccp(
        "unknown fields of any length",
        "field id",
        features(("205", 1, 1.0), ("9", "x", "y"), ("205_and_more", 7, 1.0), ("", 1, 1.0), ("20", 8, 1.0)) * 2,
        "",
    ),
    aliccp(
        "a wanted field of 9 bytes",
        "field id",
        IMPRESSION,
        "'123456789' is no Ali-CCP field id: it has 1 to 8 bytes",
        config=aliccp_config(features=[{"name": "x", "kind": "categorical", "column": "123456789"}]),
        names_file=False,
        scored=False,
    ),
    aliccp(
        "a field that nobody has",
        "field id",
        IMPRESSION * 2,
        "",
        config=aliccp_config(features=[{"name": "x", "kind": "categorical", "column": "999"}]),
        rows=[(None, 0, 0)] * 2,
    ),
    Case(
        "no common file",
        "companion file",
        aliccp_config(),
        write(sample_skeleton_train__csv=IMPRESSION),
        f"{SKELETON} has no common file: .*{COMMON} is missing",
    ),
    Case(
        "no skeleton file",
        "companion file",
        aliccp_config(),
        write(common_features_train__csv=RECORD),
        r"no file in .* matches the pattern 'sample_skeleton_\*\.csv' of data\.source\.skeleton: it holds common_features_train\.csv\n",
    ),
    Case(
        "no truth file",
        "companion file",
        TRUTH,
        write(sample_skeleton_train__csv=IMPRESSION, common_features_train__csv=RECORD),
        rf"{SKELETON} has no truth file: .*truth_train\.parquet is missing",
    ),
    truth("truth of fewer rows", "truth file", truth_of([1]), rf"has fewer rows than .*{SKELETON}(: 1 and 2)?\n"),
    truth("truth of more rows", "truth file", truth_of([1, 1, 1]), rf"has more rows than .*{SKELETON}(: 3 and 2)?\n"),
    truth("truth of other samples", "truth file", truth_of([1, 3]), rf"row 2: expected sample_id 1 as in .*{SKELETON}, found 3\n"),
    truth("truth of text", "truth file", truth_of([1, 1], true_cvr=["a", "b"]), "column 'true_cvr': expected a number, found type string"),
    truth(
        "truth with samples of text", "truth file", truth_of(["1", "1"]), "column 'sample_id': expected a whole number, found type string"
    ),
    truth("truth with null samples", "truth file", truth_of([1, None]), rf"row 2: expected sample_id 1 as in .*{SKELETON}, found null\n"),
    Case(
        "truth that is null",
        "known truth",
        TRUTH,
        with_truth(truth_of([1, 1], true_cvr=[0.5, None])),
        f"{SKELETON}: row 2, column true_cvr: truth: .*found null",
        counted={"truth": 1},
        first=[(2, "true_cvr")],
        rows=[SEEN],
    ),
    truth("truth of 0 bytes", "empty file", b"", DAMAGED),
    truth("truth with zeros for data", "damaged Parquet", patched(parquet_bytes(truth_of([1, 1])), 4, bytes(60)), DAMAGED),
]

# -------------------------------------------------------------------------------------------------------------- rating matrices

MATRIX = matrix_config(
    features=[{"name": name, "kind": "categorical"} for name in ("user", "item")], source={"user_features": None, "item_features": None}
)
WITH_FEATURES = matrix_config(features=[{"name": "age", "kind": "numeric", "column": "user_feature_1"}], source={"item_features": None})
OTHER_SHAPE = r"test\.ascii has 2 rows of 3 columns, .*train\.ascii has [12] rows of [12] columns\n"
TRAIN, TEST = "0 5 3\n4 0 0\n", "1 0 0\n0 0 4\n"
PAIRS_SEEN: list[Row] = [(1, 1, 0, 0), (1, 2, 1, 1), (1, 3, 1, 0), (2, 1, 1, 1), (2, 2, 0, 0), (2, 3, 0, 0)]


def matrix(name: str, kind: str, refused: str = "", train: str | bytes = TRAIN, test: str | bytes = TEST, **more: Any) -> Case:
    """A training and a test matrix."""
    more = {"rows": PAIRS_SEEN, **more}
    return Case(name, kind, more.pop("config", MATRIX), write(train__ascii=train, test__ascii=test), refused, scored=False, **more)


def ages(name: str, text: str, refused: str) -> Case:
    """Matrices with a file of user features."""
    files = write(train__ascii=TRAIN, test__ascii=TEST, user_features__ascii=text)
    return Case(name, "matrix features", WITH_FEATURES, files, r"user_features\.ascii:? " + refused, scored=False)


MATRICES = [
    matrix("matrix cut inside a row", "truncated text", r"train\.ascii: row 2 has 2 columns, row 1 has 3", TRAIN[:-3]),
    matrix("matrix of 0 bytes", "empty file", r"train\.ascii is empty, or begins with an empty line", ""),
    matrix(
        "matrix of random bytes", "binary garbage", r"train\.ascii: row 2 has 2 columns, row 1 has 4", np.random.default_rng(2).bytes(3000)
    ),
    matrix(
        "matrix by commas",
        "wrong separator",
        rf"train\.ascii: row 1: rating: .*found '0,5,3' in column 1|{OTHER_SHAPE}",  # with bad rows counted it goes on to the shapes
        TRAIN.replace(" ", ","),
    ),
    matrix("matrix in UTF-16", "UTF-16", r"train\.ascii: row 3 has 1 columns, row 1 has 3", TRAIN.encode("utf-16")),
    matrix(
        "matrix with a NUL byte",
        "NUL bytes",
        r"train\.ascii: row 2: rating: .*found '\\x000' in column 2",
        TRAIN.replace("4 0", "4 \0000"),
        counted={"rating": 1},
        first=[(2, "")],
        rows=[pair for pair in PAIRS_SEEN if pair[:2] != (2, 2)],
    ),
    matrix("matrix with CRLF", "line ends", "", TRAIN.replace("\n", "\r\n")),
    matrix("matrix with a blank line at its end", "blank lines", r"train\.ascii: row 3 has 0 columns, row 1 has 3", TRAIN + "\n"),
    matrix(
        "matrix with NaN",
        "NaN and infinity",
        r"train\.ascii: row 2: rating: .*'nan' in column 2",
        TRAIN.replace("4 0", "4 nan"),
        counted={"rating": 1},
        first=[(2, "")],
        rows=[pair for pair in PAIRS_SEEN if pair[:2] != (2, 2)],
    ),
    matrix("matrix with a long row", "matrix shape", r"train\.ascii: row 2 has 4 columns, row 1 has 3", TRAIN[:-1] + " 0\n"),
    matrix(
        "test matrix of fewer users",
        "matrix shape",
        r"test\.ascii has 1 rows of 3 columns, .*train\.ascii has 2 rows of 3 columns",
        test="1 0 0\n",
    ),
    matrix(
        "test matrix of fewer items",
        "matrix shape",
        r"test\.ascii has 2 rows of 2 columns, .*train\.ascii has 2 rows of 3 columns",
        test="1 0\n0 4\n",
    ),
    matrix("test matrix with a short row", "matrix shape", r"test\.ascii: row 2 has 2 columns, row 1 has 3", test="1 0 0\n0 4\n"),
    matrix("matrix without a rating", "matrix shape", r"train\.ascii holds no rating: all of its 2 x 3 cells are 0", "0 0 0\n0 0 0\n"),
    matrix("matrix that begins with a blank line", "matrix shape", r"train\.ascii is empty, or begins with an empty line", "\n" + TRAIN),
    matrix(
        "matrix with text",
        "matrix cell",
        r"train\.ascii: row 2: rating: .*'good' in column 2",
        TRAIN.replace("4 0", "4 good"),
        counted={"rating": 1},
        first=[(2, "")],
        rows=[pair for pair in PAIRS_SEEN if pair[:2] != (2, 2)],
    ),
    matrix(
        "matrix with a negative rating",
        "matrix cell",
        r"train\.ascii: row 2: rating: .*'-1' in column 2",
        TRAIN.replace("4 0", "4 -1"),
        counted={"rating": 1},
        first=[(2, "")],
        rows=[pair for pair in PAIRS_SEEN if pair[:2] != (2, 2)],
    ),
    matrix(
        "test matrix with text",
        "matrix cell",
        r"test\.ascii: row 1: rating: .*'x' in column 1",
        test=TEST.replace("1 ", "x "),
        counted={"rating": 1},
        first=[(1, "")],
    ),
    ages("user features with text", "1\nold\n", "row 2, column 1: expected a number that fits float32, found 'old'"),
    ages("user features with NaN", "1\nnan\n", "row 2, column 1: expected a number that fits float32, found 'nan'"),
    ages("user features of fewer users", "1\n", "has 1 rows, the rating matrix has 2 users"),
    ages("ragged user features", "1 2\n1\n", "row 2 has 1 columns, row 1 has 2"),
    ages("user features of 0 bytes", "", "has 0 rows, the rating matrix has 2 users"),
    Case(
        "no test matrix",
        "companion file",
        MATRIX,
        write(train__ascii=TRAIN),
        r"no file .*/test\.ascii\nhint: set data\.source\.test",
        scored=False,
    ),
    Case(
        "matrix of zip bytes",
        "compressed or encrypted",
        MATRIX,
        write(train__ascii=gzip.compress(TRAIN.encode(), mtime=0), test__ascii=TEST),
        rf"train\.ascii: row (1: rating: .*found .* in column 1|2 has . columns, row 1 has .)\n|{OTHER_SHAPE}",
        scored=False,
    ),
]

# ------------------------------------------------------------------------------------------------------------------ event logs

LOG: dict[str, str | bytes] = {
    "impressions__csv": "id,ts,c\n1,0,a\n2,1,b\n",
    "clicks__csv": "id,ts\n1,3\n",
    "conversions__csv": "id,ts\n1,4\n",
}
CONVERTED: list[Row] = [("a", 1, 1), ("b", 0, 0)]
CLICKED: list[Row] = [("a", 1, 0), ("b", 0, 0)]
NEITHER: list[Row] = [("a", 0, 0), ("b", 0, 0)]
ONE_USED = {"rows": 1, "used": 1}
UNCLICKED = {"rows": 1, "without_click": 1}
TIME, KEY, AGAIN = "event time", "event without key", "impression with the key of another"


def events(**changes: Any) -> DataConfig:
    """A config for event logs: windows of 10 and 20 seconds."""
    windows = {"click_window_s": 10, "conversion_window_s": 20, "open_windows": "keep"}
    patterns = {table: f"{table}*" for table in ("impressions", "clicks", "conversions")}
    source = {"kind": "events", "key": "id", "time": "ts", **windows, **patterns, **changes}
    return DataConfig.model_validate({"source": source, "features": [C], "split": {"by": "file", "train": "*"}})


def log(name: str, kind: str, refused: str = "", files: Mapping[str, str | bytes] | None = None, **more: Any) -> Case:
    """A log of three CSV tables, with these files beside them, or in place of those of their names."""
    given = files or {}
    left = {file: content for file, content in LOG.items() if file.split("__")[0] not in [each.split("__")[0] for each in given]}
    more = {"rows": CONVERTED, "scored": False, **more}
    return Case(name, kind, more.pop("config", events()), write(**left, **given), refused, **more)


def one_click(name: str, kind: str, times: Any, refused: str = "", keys: Any = (1,), **more: Any) -> Case:
    """A Parquet table with one click."""
    files = {"clicks__parquet": parquet_bytes(pa.table({"id": pa.array(keys), "ts": times}))}
    more = {"events": {"clicks": ONE_USED, "conversions": ONE_USED}, **more}
    return log(name, kind, refused and rf"clicks\.parquet: {refused}", files, **more)


def bad_click(name: str, kind: str, times: Any, reason: str, column: str, found: str, **more: Any) -> Case:
    """A Parquet table whose only click has no time or no key."""
    counts = {"clicks": {"rows": 1, "rejected": 1}, "conversions": UNCLICKED}
    told = {"counted": {reason: 1}, "first": [(1, column)], "rows": NEITHER, "events": counts}
    return one_click(name, kind, times, rf"row 1, column {column}: {reason}: expected .*, found {found}\n", **told, **more)


def bad_credit(name: str, column: str, conversion: dict[str, Any]) -> Case:
    """A Parquet table whose only conversion, which user "me" could have, is no UTF-8 in a column."""
    return log(
        name,
        "event credit",
        rf"conversions\.parquet: row 1, column {column}: event without key: .*, found b'\\xff'\n",
        BY_USER | {"conversions__parquet": parquet_bytes(pa.table({**conversion, "ts": [4]}))},
        config=events(attribution_key=["u"]),
        counted={KEY: 1},
        first=[(1, column)],
        rows=CLICKED,
        events={"clicks": ONE_USED, "conversions": {"rows": 1, "rejected": 1}},
    )


def clicks(name: str, kind: str, lines: str, refused: str = "", **more: Any) -> Case:
    """A CSV table of clicks."""
    return log(name, kind, refused and rf"clicks\.csv: {refused}", {"clicks__csv": "id,ts\n" + lines}, **more)


def bad_time(name: str, kind: str, time: str) -> Case:
    """A CSV table of a good click and one whose time is none."""
    found = repr(time) if time else "null"
    counts = {"clicks": {"rows": 2, "rejected": 1, "used": 1}, "conversions": ONE_USED}
    refused = rf"row 3, column ts: event time: expected a time from 1740 to 2200: .*, found {found}\n"
    return clicks(name, kind, f"1,3\n2,{time}\n", refused, counted={TIME: 1}, first=[(3, "ts")], events=counts)


def shown(name: str, content: str | bytes, refused: str, **more: Any) -> Case:
    """A CSV or Parquet table of impressions."""
    file = "impressions__parquet" if isinstance(content, bytes) else "impressions__csv"
    return log(name, "impression of an event log", refused, {file: content}, **more)


SHOWN = {"ts": [0, 1], "c": ["a", "b"]}
BY_USER = {"impressions__parquet": parquet_bytes(pa.table({**SHOWN, "id": ["1", "2"], "u": ["me", "you"]}))}
NO_IMPRESSION = {"rows": 1, "unknown_impression": 1}

EVENTS = [
    log("clicks cut in their data", "truncated Parquet", rf"clicks\.parquet {DAMAGED}", {"clicks__parquet": WHOLE[:100]}),
    clicks(
        "clicks cut inside a line",
        "event table",
        "1,3\n2",
        "row 3: number of columns: .*1 columns instead of 2 in '2'",
        counted={COLUMNS: 1},
        first=[(3, "")],
        events={"clicks": {"rows": 2, "rejected": 1, "used": 1}, "conversions": ONE_USED},
    ),
    clicks("no click at all", "event table", "", rows=NEITHER, events={"clicks": {}, "conversions": UNCLICKED}),
    log("clicks of 0 bytes", "event table", r"clicks\.csv is empty \(0 bytes\)", {"clicks__csv": ""}),
    log(
        "a second file of conversions without their time",
        "event table",
        r"conversions_2\.csv has no column 'ts' \(data\.source\.time\)\nhint: it has: id$",
        {"conversions_2__csv": "id\n2\n"},
    ),
    log(
        "clicks by semicolons",
        "event table",
        r"clicks\.csv has no column 'id' \(data\.source\.key\)\nhint: its header is one column, 'id;ts': .*commas, not by ';'",
        {"clicks__csv": "id;ts\n1;3\n"},
    ),
    log(
        "clicks with a byte order mark",
        "event table",
        files={"clicks__csv": b"\xef\xbb\xbfid,ts\n1,3\n"},
        events={"clicks": ONE_USED, "conversions": ONE_USED},
    ),
    bad_time("a click of yesterday", "event time", "yesterday"),
    bad_time("a click without a time", "event time", ""),
    bad_click("a click at NaN", "event time", pa.array([float("nan")]), TIME, "ts", "nan"),
    bad_click("a click at a time that is no UTF-8", "event time", NO_UTF8.slice(1, 1), TIME, "ts", r"b'\\xff'"),
    one_click(
        "clicks at times of day",
        "event time",
        pa.array([3], pa.time64("us")),
        r"column 'ts' is no event time: expected .*, found type time64\[us\]\n",
    ),
    log(
        "nanoseconds in open windows",
        "event time",
        files={
            "impressions__parquet": parquet_bytes(pa.table({**SHOWN, "id": [1, 2], "ts": pa.array([0, 10**9 + 7], pa.timestamp("ns"))}))
        },
        config=events(open_windows="drop", log_end=30),
        counted={"open window": 1},
        first=[(2, "ts")],
        rows=CONVERTED[:1],
    ),
    bad_time("a click in milliseconds", "event time out of range", "1767225600000"),
    bad_time("a click beyond int64", "event time out of range", "99999999999999999999"),
    bad_click("a click at the end of uint64", "event time out of range", pa.array([2**64 - 1], pa.uint64()), TIME, "ts", str(2**64 - 1)),
    bad_click(
        "a click at a timestamp beyond all years", "event time out of range", pa.array([2**62], pa.timestamp("ms")), TIME, "ts", str(2**62)
    ),
    bad_click(
        "a click at a date beyond all years", "event time out of range", pa.array([2**31 - 1], pa.date32()), TIME, "ts", str(2**31 - 1)
    ),
    bad_click("a click at infinity in 16 bits", "event time out of range", pa.array(np.array([np.inf], np.float16)), TIME, "ts", "inf"),
    bad_click("a click without a key", "event key", [3], KEY, "id", "null", keys=pa.array([None], pa.int64())),
    bad_click("a click with a key that is no UTF-8", "event key", [3], KEY, "id", r"b'\\xff'", keys=NO_UTF8.slice(1, 1)),
    bad_credit("a conversion with a key that is no UTF-8, of a user who clicked", "id", {"id": NO_UTF8.slice(1, 1), "u": ["me"]}),
    bad_credit("a conversion of a user that is no UTF-8", "u", {"id": pa.array([None], pa.string()), "u": NO_UTF8.slice(1, 1)}),
    log(
        "a conversion of a user who clicked",
        "event credit",
        files=BY_USER | {"conversions__parquet": parquet_bytes(pa.table({"id": pa.array([None], pa.string()), "ts": [4], "u": ["me"]}))},
        config=events(attribution_key=["u"]),
        events={"clicks": ONE_USED, "conversions": ONE_USED},
    ),
    log(
        "an impression of a user that is no UTF-8",
        "event credit",
        r"impressions\.parquet: row 2, column u: event without key: .*, found b'\\xff'\n",
        {"impressions__parquet": parquet_bytes(pa.table({**SHOWN, "id": ["1", "2"], "u": NO_UTF8})), "conversions__csv": "id,ts,u\n"},
        config=events(attribution_key=["u"]),
        counted={KEY: 1},
        first=[(2, "id")],
        rows=CLICKED[:1],
        events={"clicks": ONE_USED, "conversions": {}},
    ),
    one_click(
        "clicks with keys that are floats", "event key", [3], "column 'id' is no event key: .*, found type double", keys=pa.array([1.0])
    ),
    log(
        "impressions with keys of numbers, clicks with text",
        "event key",
        files={
            "impressions__parquet": parquet_bytes(pa.table({**SHOWN, "id": [1, 2]})),
            "clicks__parquet": parquet_bytes(pa.table({"id": ["1"], "ts": [3]})),
        },
        events={"clicks": ONE_USED, "conversions": ONE_USED},
    ),
    clicks("a click with a key of spaces", "event key", " 1,3\n", rows=NEITHER, events={"clicks": NO_IMPRESSION, "conversions": UNCLICKED}),
    log(
        "a conversion of no impression",
        "event key",
        files={"conversions__csv": "id,ts\n7,4\n"},
        rows=CLICKED,
        events={"clicks": ONE_USED, "conversions": NO_IMPRESSION},
    ),
    clicks(
        "a click before its impression",
        "event order",
        "2,0\n",
        rows=NEITHER,
        events={"clicks": {"rows": 1, "before_impression": 1}, "conversions": UNCLICKED},
    ),
    clicks(
        "a click at a negative time",
        "event order",
        "1,-5\n",
        rows=NEITHER,
        events={"clicks": {"rows": 1, "before_impression": 1}, "conversions": UNCLICKED},
    ),
    clicks(
        "a click after its window",
        "event order",
        "1,11\n",
        rows=NEITHER,
        events={"clicks": {"rows": 1, "late": 1}, "conversions": UNCLICKED},
    ),
    clicks(
        "clicks that repeat", "event order", "1,3\n" * 3, events={"clicks": {"rows": 3, "repeated": 2, "used": 1}, "conversions": ONE_USED}
    ),
    clicks(
        "a conversion before its click",
        "event order",
        "1,9\n",
        rows=CLICKED,
        events={"clicks": ONE_USED, "conversions": {"rows": 1, "before_click": 1}},
    ),
    shown(
        "an impression without a key",
        "id,ts,c\n,0,a\n2,1,b\n",
        r"impressions\.csv: row 2, column id: event without key: .*, found null",
        counted={KEY: 1},
        first=[(2, "id")],
        rows=NEITHER[1:],
        events={"clicks": NO_IMPRESSION, "conversions": NO_IMPRESSION},
    ),
    shown(
        "an impression with a key that is no UTF-8",
        parquet_bytes(pa.table({**SHOWN, "id": NO_UTF8})),
        r"impressions\.parquet: row 2, column id: event without key: .*, found b'\\xff'",
        counted={KEY: 1},
        first=[(2, "id")],
        rows=NEITHER[:1],
    ),
    shown(
        "an impression without a time",
        "id,ts,c\n1,0,a\n2,,b\n",
        r"impressions\.csv: row 3, column ts: event time: .*, found null",
        counted={TIME: 1},
        first=[(3, "ts")],
        rows=CONVERTED[:1],
    ),
    log(
        "an impression of another file again",
        "impression of an event log",
        files={"impressions_2__csv": "id,ts,c\n3,0,c\n1,0,a\n"},
        counted={"repeated impression": 1},
        first=[(3, "id")],
        rows=[*CONVERTED, ("c", 0, 0)],
    ),
    log(
        "the key of an impression of another file",
        "impression of an event log",
        r"impressions_2\.csv: row 3, column id: impression with the key of another: .*, found '1'",
        {"impressions_2__csv": "id,ts,c\n3,0,c\n1,0,b\n"},
        counted={AGAIN: 1},
        first=[(3, "id")],
        rows=[*CONVERTED, ("c", 0, 0)],
    ),
    shown(
        "an impression again, and a line of 2 MiB",
        "id,ts,c,x\n1,0,a," + "x" * (2 << 20) + "\n2,1,b,\n2,1,b,\n",
        "",
        counted={"repeated impression": 1},
        first=[(4, "id")],
    ),
]

# ---------------------------------------------------------------------------------------------------------------------- files

GOOD_CSV = HEAD + A + B


def zipped(folder: Path) -> None:
    """A zip archive under the name of a table."""
    with zipfile.ZipFile(folder / "a.csv", "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.csv"), GOOD_CSV)


def beside(make: Callable[[Path], object]) -> Write:
    """A good table, and something else under the name b.csv."""

    def to(folder: Path) -> None:
        (folder / "a.csv").write_text(GOOD_CSV)
        make(folder / "b.csv")

    return to


def folder_of_parts(path: Path) -> None:
    """A folder with a file inside, as Spark writes one."""
    path.mkdir()
    (path / "part-0").write_text(GOOD_CSV)


def unreadable(path: Path) -> None:
    """A file that only root may read."""
    path.write_text(GOOD_CSV)
    path.chmod(0)


HASHED = tables(split={"by": "hash", "train": 1.0})

FILES = [
    Case("csv of zip bytes", "compressed or encrypted", tables(), zipped, r"a\.csv: row 1: expected text in UTF-8"),
    Case(
        "a folder named like a file", "no file", tables(), beside(Path.mkdir), r"b\.csv is a folder, and its name is that of an input file"
    ),
    Case(
        "a folder of parts named like a file",
        "no file",
        tables(),
        beside(folder_of_parts),
        r"b\.csv is a folder, and its name is that of an input file",
    ),
    Case(
        "a link to nowhere",
        "no file",
        tables(),
        beside(lambda path: path.symlink_to("nowhere")),
        r"b\.csv is a link to nowhere, and its name is that of an input file",
    ),
    Case("a pipe named like a file", "no file", tables(), beside(os.mkfifo), r"b\.csv is no file, and its name is that of an input file"),
    Case("a file that may not be read", "no file", tables(), beside(unreadable), r"b\.csv cannot be read: .*Permission denied"),
    Case("no input at all", "no file", tables(), write(), r"no file in .* matches the pattern '\*' of data\.source\.files: it is empty\n"),
    *(
        Case(f"a file named {name!r}", "file name", HASHED, lambda folder, name=name: (folder / name).write_text(GOOD_CSV), rows=ROWS_AB)  # type: ignore[misc]
        for name in ("with space.csv", "ünï 漢字 😀.csv", "new\nline.csv", "%s {0} '\".csv")
    ),
    Case(
        "a file whose name is no UTF-8",
        "file name",
        HASHED,
        lambda folder: (folder / os.fsdecode(b"\xff.csv")).write_text(GOOD_CSV),
        r"\.csv': its name is no UTF-8",
    ),
    Case(
        "a Parquet table named .CSV",
        "file name",
        tables(),
        lambda folder: (folder / "a.CSV").write_text(GOOD_CSV),
        r"a\.CSV is not a Parquet file.*\n.*CSV tables must end in \.csv",
    ),
]

CASES = [*CSV, *PARQUET, *ALICCP, *MATRICES, *EVENTS, *FILES]

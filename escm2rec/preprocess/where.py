"""Which rows of a table are wanted: an SQL condition, as one of Arrow's, so that row groups without such rows are not read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset
import pyarrow.fs as pa_fs
import pyarrow.types as pt

from escm2rec.errors import ConfigError, DataError
from escm2rec.preprocess.ragged import Int64s

PLACE = "\0place"  # the column of rows' places, of a name that no file has
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "COMPARE_EQUAL": lambda left, right: left == right,
    "COMPARE_NOTEQUAL": lambda left, right: left != right,
    "COMPARE_LESSTHAN": lambda left, right: left < right,
    "COMPARE_GREATERTHAN": lambda left, right: left > right,
    "COMPARE_LESSTHANOREQUALTO": lambda left, right: left <= right,
    "COMPARE_GREATERTHANOREQUALTO": lambda left, right: left >= right,
}
TEXTS = (pa.string(), pa.large_string(), pa.string_view())
EXACT = 1 << 53  # texts are read as float64, which tells whole numbers below it apart
KNOWN = "columns and constants compared by =, <>, <, <=, >, >=, IN, BETWEEN, LIKE, IS NULL, joined by AND, OR, NOT"
Node = dict[str, Any]


@dataclass(frozen=True)
class Where:
    """A condition in SQL. As there, a row whose condition is null is not wanted."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Where:
        """ConfigError for what is no condition, or none of this kind."""
        where = cls(text)
        where._expression(where._tree, lambda node, column: pc.field(column))
        if not where.columns:
            raise ConfigError(f"--where {text!r} names no column", f"it takes {KNOWN}")
        return where

    @cached_property
    def _tree(self) -> Node:
        """DuckDB parses the SQL: nothing is run."""
        import duckdb

        with duckdb.connect() as connection:
            (told,) = connection.execute("SELECT json_serialize_sql(?)", [f"SELECT 1 WHERE {self.text}"]).fetchone() or ("",)
        parsed = json.loads(told)
        if parsed["error"]:
            hint = "write it as SQL, such as \"country = 'DE' AND price >= 5\"; names that are no words in double quotes"
            raise ConfigError(f"--where {self.text!r} is no SQL condition: {parsed['error_message']}", hint)
        node = parsed["statements"][0]["node"] if len(parsed["statements"]) == 1 else {}
        others = ("modifiers", "group_expressions", "having", "sample", "qualify")
        if not node.get("where_clause") or any(node.get(name) for name in others):
            raise self._unknown("more than a condition")
        tree: Node = node["where_clause"]
        return tree

    def _unknown(self, what: str) -> ConfigError:
        return ConfigError(f"--where {self.text!r}: {what} is not understood", f"it takes {KNOWN}")

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The top-level columns that it names."""
        found: dict[str, None] = {}

        def note(node: Any) -> None:
            if isinstance(node, dict):
                if node.get("class") == "COLUMN_REF":
                    found[node["column_names"][0]] = None
                for value in node.values():
                    note(value)
            elif isinstance(node, list):
                for value in node:
                    note(value)

        note(self._tree)
        return tuple(found)

    def row_groups(self, path: Path, schema: pa.Schema) -> list[int]:
        """Those of a Parquet file that may hold such rows, by their statistics."""
        fragment = pa_dataset.ParquetFileFormat().make_fragment(str(path), pa_fs.LocalFileSystem())
        with self._telling(path):
            return [group.id for group in fragment.subset(self._of(schema), schema=schema).row_groups]

    def places(self, table: pa.Table, path: Path) -> Int64s:
        """Places of the rows of a table that are wanted, in order."""
        columns = table.select(self.columns)
        with self._telling(path):
            found = columns.append_column(PLACE, pa.array(np.arange(len(table)))).filter(self._of(columns.schema))
        places: Int64s = found[PLACE].to_numpy()
        return places

    @contextmanager
    def _telling(self, path: Path) -> Iterator[None]:
        """DataError for a condition that the columns of a file cannot be held to."""
        try:
            yield
        except pa.ArrowException as error:
            raise DataError(
                f"{path}: --where {self.text!r} does not go with its columns: {str(error).splitlines()[0]}",
                "compare numbers with numbers, texts with 'texts' and times with DATE '...' or TIMESTAMP '...'",
            ) from error

    def _of(self, schema: pa.Schema) -> pc.Expression:
        """For a table of this schema: what is compared is cast to the type of its column; text, as in a CSV, is read as numbers."""

        def column(compared: Node, name: str | tuple[str, ...]) -> Any:
            kind = _type_of(schema, name)
            field = pc.field(name)
            if kind is not None and pt.is_dictionary(kind):
                field, kind = field.cast(kind.value_type), kind.value_type
            if kind in TEXTS:
                return field.cast(pa.float64()) if compared["kind"] == "number" else field.cast(pa.string())
            if kind is not None and pt.is_decimal(kind) and compared["kind"] == "number":
                return field.cast(pa.float64())
            return field.cast(pa.timestamp("us")) if kind is not None and pt.is_date(kind) and compared["kind"] == "time" else field

        return self._expression(self._tree, column, lambda name: _type_of(schema, name))

    def _expression(self, node: Node, column: Callable[[Node, Any], Any], type_of: Callable[[Any], Any] = lambda name: None) -> Any:
        """The condition of a node of DuckDB's tree."""

        def operands(nodes: list[Node]) -> list[Any]:
            return self._operands(nodes, column, type_of)

        def condition(node: Node) -> Any:
            kind, children = node["type"], node.get("children", [])
            if node["class"] == "CONJUNCTION":
                join = (lambda a, b: a & b) if kind == "CONJUNCTION_AND" else (lambda a, b: a | b)
                return reduce(join, [condition(child) for child in children])
            if kind == "OPERATOR_NOT":
                return ~condition(children[0])
            if kind in ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"):
                null = column({"kind": None}, _name(self, children[0])).is_null()
                return null if kind == "OPERATOR_IS_NULL" else ~null
            if kind in COMPARISONS:
                left, right = operands([node["left"], node["right"]])
                return COMPARISONS[kind](left, right)
            if kind == "COMPARE_BETWEEN":
                value, low, high = operands([node["input"], node["lower"], node["upper"]])
                return (value >= low) & (value <= high)
            if kind == "COMPARE_IN":
                value, *options = operands(children)
                return reduce(lambda a, b: a | b, [value == option for option in options])
            if kind == "COLUMN_REF":
                return column({"kind": None}, _name(self, node))
            if node["class"] == "FUNCTION" and node["function_name"] in ("~~", "!~~"):
                value, pattern = operands([each["expression"] for each in node["arguments"]])
                if not isinstance(pattern, pa.Scalar):
                    raise self._unknown("LIKE with no pattern")
                like = pc.match_like(value, pattern.as_py().replace("\\", "\\\\"))  # which is no escape in SQL
                return like if node["function_name"] == "~~" else ~like
            raise self._unknown(_said(node))

        return condition(node)

    def _operands(self, nodes: list[Node], column: Callable[[Node, Any], Any], type_of: Callable[[Any], Any]) -> list[Any]:
        """One column and what it is compared with."""
        constants = [_constant(self, each) for each in nodes]
        names = [_name(self, each) for each, constant in zip(nodes, constants, strict=True) if constant is None]
        if len(names) != 1:
            raise self._unknown("a comparison of two columns" if names else "a comparison without a column")
        kind = type_of(names[0])
        if kind in TEXTS and any(each["class"] == "CAST" for each in nodes):
            raise DataError(
                f"--where {self.text!r} compares a time with the column {names[0]!r}, which is text", "write the time as the file does"
            )
        known = next((each for each in constants if each is not None and each.is_valid), None)
        compared: Node = {"kind": None if known is None else _kind(known, kind)}
        return [column(compared, names[0]) if each is None else _cast(self, each, kind) for each in constants]


def _type_of(schema: pa.Schema, name: str | tuple[str, ...]) -> Any:
    """The type of a column or of a field in it; None where there is none."""
    first, *rest = (name,) if isinstance(name, str) else name
    kind = schema.field(first).type if first in schema.names else None
    for part in rest:
        if kind is None or not pt.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(kind.get_field_index(part)).type
    return kind


def _name(where: Where, node: Node) -> str | tuple[str, ...]:
    if node["class"] != "COLUMN_REF":
        raise where._unknown(_said(node))
    names = node["column_names"]
    return str(names[0]) if len(names) == 1 else tuple(names)


def _said(node: Node) -> str:
    """A part of a condition as a person would name it."""
    name = node.get("function_name")
    return f"the function {name}" if name else str(node["class"]).lower().replace("_", " ")


def _constant(where: Where, node: Node) -> pa.Scalar | None:
    """The value of a constant; None of a column."""
    if node["class"] == "COLUMN_REF":
        return None
    if node["class"] == "CAST":
        inner = _constant(where, node["child"])
        if inner is None or str(node["type_expr"].get("type_name")).upper() not in ("DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"):
            raise where._unknown("a cast")
        return inner
    if node["class"] != "CONSTANT" or "literal" not in node:
        raise where._unknown(_said(node))
    kind, text = node["literal"]["kind"], node["literal"]["text"]
    if kind == "INTEGER":
        number = int(text)
        if 1 << 63 <= number < 1 << 64:
            return pa.scalar(number, pa.uint64())
        return pa.scalar(number) if abs(number) < 1 << 63 else pa.scalar(float(number))
    made: dict[str, Callable[[str], Any]] = {
        "NUMERIC": float,
        "STRING": str,
        "BOOLEAN": lambda word: word.lower() == "true",
        "NULL_LITERAL": lambda _: None,
    }
    if kind not in made:
        raise where._unknown(f"the constant {text!r}")
    return pa.scalar(made[kind](text))


def _kind(constant: pa.Scalar, column: pa.DataType | None) -> str | None:
    """As what a column is compared with a constant: a number, a time, or as it is."""
    if pt.is_floating(constant.type) or (pt.is_integer(constant.type) and abs(constant.as_py()) < EXACT):
        return "number"
    return "time" if column is not None and pt.is_date(column) and pt.is_string(constant.type) else None


def _cast(where: Where, value: pa.Scalar, kind: pa.DataType | None) -> pa.Scalar:
    """A constant as it is compared with a column of this type: text as a time where the column holds times, a number as precise as it."""
    if kind is not None and value.is_valid:
        if pt.is_floating(value.type) and (pt.is_float32(kind) or pt.is_float16(kind)):
            return value.cast(kind, safe=False)
        if pt.is_integer(value.type) and pt.is_unsigned_integer(kind) and 0 <= value.as_py() < 1 << kind.bit_width:
            return value.cast(kind)
        if pt.is_integer(value.type) and pt.is_decimal(kind):
            return value.cast(pa.float64())
    if kind is None or not pt.is_temporal(kind) or not pt.is_string(value.type):
        return value
    try:
        if pt.is_date(kind):
            return value.cast(pa.timestamp("us"))
        zoned = pt.is_timestamp(kind) and kind.tz is not None
        return value.cast(pa.timestamp(kind.unit)).cast(kind) if zoned else value.cast(kind)
    except pa.ArrowInvalid as error:
        hint = "write it as 2024-05-31 or 2024-05-31 12:00:00"
        raise ConfigError(f"--where {where.text!r}: {value.as_py()!r} is no {kind}", hint) from error

"""A file of user, item, rating: read, checked, ids numbered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from escm2rec.errors import DataError

NAMES = {"user": ("user", "userid"), "item": ("item", "itemid", "movie", "movieid"), "rating": ("rating",)}
"""What the columns may be called, in any case, with or without underscores."""
SEPARATORS = ("::", "\t", ",")
EXPECTED = "one rating a line: user, item, rating, separated by a tab, a comma or ::"
NAMED = "name the columns user, item and rating"


@dataclass(frozen=True)
class Ratings:
    """R ratings, one a cell: user and item numbered from 0 in the order of their ids, [R] each. Every user and item has a rating."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    rating: NDArray[np.float64]

    @property
    def num_users(self) -> int:
        """Users with a rating."""
        return int(self.user.max()) + 1

    @property
    def num_items(self) -> int:
        """Items with a rating."""
        return int(self.item.max()) + 1


def read_ratings(path: Path) -> Ratings:
    """Read `.parquet`, or text separated by tabs, commas or `::`, with a header or without one; further columns are left.

    A quoted field may not hold the separator. DataError, with file and line (row, in Parquet), for what is no rating, for a cell that is
    rated twice, and where all ratings are equal.
    """
    if not path.is_file():
        raise DataError(f"no ratings file at {path}", f"--ratings takes a file, {EXPECTED}")
    if path.suffix in (".yaml", ".yml", ".json", ".jsonl"):
        raise DataError(f"{path} is no ratings file but {path.suffix}", f"--ratings takes a file, {EXPECTED}; or Parquet of such columns")
    frame, word = (_read_parquet(path), "row") if path.suffix == ".parquet" else (_read_text(path), "line")
    if frame.is_empty():
        raise DataError(f"{path} holds no rating", f"expected is {EXPECTED}")
    frame = frame.with_columns(number=pl.col("rating").cast(pl.Float64, strict=False))
    _refuse(path, word, frame, pl.col("user").is_null() | pl.col("item").is_null(), "user or item is missing", "remove or mend it")
    _refuse(path, word, frame, ~pl.col("number").is_finite().fill_null(False), "the rating is no number", EXPECTED)
    _refuse_twice(path, word, frame)
    if frame["number"].n_unique() == 1:
        raise DataError(f"{path}: all ratings are {frame['number'][0]:g}, which orders nothing", "give ratings that differ")
    user, item = ((frame[name].rank("dense") - 1).cast(pl.Int64).to_numpy() for name in ("user", "item"))
    return Ratings(user, item, frame["number"].to_numpy())


def _read_parquet(path: Path) -> pl.DataFrame:
    try:
        names = list(pl.read_parquet_schema(path))
        places = _places(path, names)
        frame = pl.read_parquet(path, columns=[names[place] for place in places])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} is not a Parquet file, or is damaged: {error}", "other files must not end in .parquet") from error
    columns = (pl.col(names[place]).cast(pl.String, strict=False).alias(name) for name, place in zip(NAMES, places, strict=True))
    return frame.select(*columns, at=pl.int_range(1, pl.len() + 1))


def _read_text(path: Path) -> pl.DataFrame:
    """Columns user, item and rating as text, empty ones null, and the line; blank lines are passed over."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}", "unpack or convert it; Parquet must end in .parquet") from error
    lines = pl.DataFrame({"text": text.replace("\r\n", "\n").split("\n")}, schema={"text": pl.String})
    lines = lines.with_columns(at=pl.int_range(1, pl.len() + 1)).filter(pl.col("text").str.strip_chars() != "")
    if lines.is_empty():
        return lines.select(**{name: pl.col("text") for name in NAMES}, at="at")
    first = str(lines["text"][0])
    separator = next((separator for separator in SEPARATORS if separator in first), None)
    if separator is None:
        raise DataError(f"{path}, line {lines['at'][0]}: no tab, comma or :: in {first[:80]!r}", f"expected is {EXPECTED}")
    cells = [cell.strip(' "') for cell in first.split(separator)]
    places = [0, 1, 2]
    if len(cells) < 3 or not _is_number(cells[2]):
        places, lines = _places(path, cells), lines[1:]
    split = lines.with_columns(pl.col("text").str.split(separator).alias("cells"))
    _refuse(path, "line", split, pl.col("cells").list.len() <= max(places), f"fewer than {max(places) + 1} columns", EXPECTED)
    columns = (
        pl.col("cells").list.get(place).str.strip_chars(' "').replace("", None).alias(n) for n, place in zip(NAMES, places, strict=True)
    )
    return split.select(*columns, "at", "text")


def _places(path: Path, names: list[str]) -> list[int]:
    """The places of user, item and rating among the names of columns."""
    plain = [re.sub(r"[_ ]", "", name.lower()) for name in names]
    found = {name: [place for place, each in enumerate(plain) if each in known] for name, known in NAMES.items()}
    wrong = [f"{len(places) or 'no'} columns for {name}" for name, places in found.items() if len(places) != 1]
    if wrong:
        raise DataError(
            f"{path} has {', '.join(wrong)} among: {', '.join(names[:20])}", f"{NAMED}, or give text without a header: {EXPECTED}"
        )
    return [places[0] for places in found.values()]


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _seen(row: dict[str, object]) -> str:
    return repr(row.get("text") or ", ".join(str(row.get(name)) for name in NAMES))[:120]


def _refuse(path: Path, word: str, frame: pl.DataFrame, wrong: pl.Expr, what: str, hint: str) -> None:
    found = frame.filter(wrong)
    if found.height:
        row = found.row(0, named=True)
        more = f", and {found.height - 1:,} more alike" if found.height > 1 else ""
        raise DataError(f"{path}, {word} {row['at']}: {what}: {_seen(row)}{more}", f"expected is {hint}" if hint == EXPECTED else hint)


def _refuse_twice(path: Path, word: str, frame: pl.DataFrame) -> None:
    twice = frame.filter(pl.struct("user", "item").is_duplicated())
    if twice.is_empty():
        return
    user, item = twice["user"][0], twice["item"][0]
    places = twice.filter((pl.col("user") == user) & (pl.col("item") == item))["at"]
    others = twice.select("user", "item").n_unique() - 1
    more = f"; and so for {others:,} more pair{'s' if others > 1 else ''} of user and item" if others else ""
    raise DataError(
        f"{path}: user {user!r} rates item {item!r} {len(places):,} times, in {word}s {places[0]} and {places[1]}"
        f"{' first' if len(places) > 2 else ''}{more}",
        "keep one rating for each user and item, the last or their mean for example",
    )

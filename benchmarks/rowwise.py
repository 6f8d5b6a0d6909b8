"""The job of preprocess on Ali-CCP text as loops over rows in plain Python: what `benchmarks.preprocess` compares with.

The same data set of one split, but for what no row needs: no checks, no manifest, no limit on memory.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.config import DataConfig, FeatureConfig
from escm2rec.preprocess.write import layout_of

Fields = dict[str, list[tuple[int, float]]]
MASK = (1 << 64) - 1


def parse(text: str) -> Fields:
    """`field \\x02 id \\x03 value` joined by \\x01, by field."""
    fields: Fields = {}
    for feature in text.split("\x01"):
        field, rest = feature.split("\x02")
        identifier, value = rest.split("\x03")
        fields.setdefault(field, []).append((int(identifier), float(value)))
    return fields


def parse_with_python(path: Path, header: int, fields: list[str]) -> int:
    """Parse a file and keep nothing: how many of the fields' features it holds."""
    wanted, found = set(fields), 0
    with path.open(encoding="ascii") as lines:
        for line in lines:
            parsed = parse(line.rstrip("\n").split(",", header)[-1])
            found += sum(len(values) for field, values in parsed.items() if field in wanted)
    return found


def run(config: DataConfig, logs: Path, out: Path) -> int:
    """Make `out/part-*.parquet` of all impressions, and return how many there are."""
    rows = sorted(read(config, logs), key=lambda row: row[0])  # stable: impressions of a record as they come
    columns: dict[str, list[Any]] = {"click": [row[1] for row in rows], "conversion": [row[2] for row in rows]}
    columns |= {f"kept.{name}": [kept(row, name) for row in rows] for name in config.keep}
    for feature in config.features:
        columns |= encode(feature, [[*row[4].get(feature.column, []), *row[5].get(feature.column, [])] for row in rows])
    table = pa.table({name: pa.array(values, kind(config, name)) for name, values in columns.items()})
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(table), config.rows_per_file)):
        part = table.slice(start, config.rows_per_file)
        pq.write_table(part, out / f"part-{number:05d}.parquet", row_group_size=config.rows_per_group, **layout_of(table.schema))
    return len(rows)


def read(config: DataConfig, logs: Path) -> Iterator[tuple[int, int, int, int, Fields, Fields]]:
    """Key, click, conversion, sample, own and common fields of each impression."""
    for skeleton in sorted(logs.glob("sample_skeleton_*.csv")):
        path = skeleton.with_name(skeleton.name.replace("sample_skeleton", "common_features"))
        place = fnv1a64(path.name)
        common: dict[str, tuple[int, Fields]] = {}
        with path.open(encoding="ascii") as lines:
            for number, line in enumerate(lines):
                index, _, text = line.rstrip("\n").split(",", 2)
                common[index] = order_key(splitmix64(place + number)), parse(text)
        with skeleton.open(encoding="ascii") as lines:
            for line in lines:
                sample, click, buy, index, _, text = line.rstrip("\n").split(",", 5)
                if buy == "1" and click == "0":
                    continue
                key, shared = common[index]
                yield key, int(click), int(buy), int(sample), parse(text), shared


def kept(row: tuple[int, int, int, int, Fields, Fields], name: str) -> int | None:
    """A kept column of a row."""
    if name == "sample_id":
        return row[3]
    values = row[4].get(name) or row[5].get(name)
    return values[0][0] if values else None


def encode(feature: FeatureConfig, rows: list[list[tuple[int, float]]]) -> dict[str, list[Any]]:
    """The encoded column of a feature, and its weights."""
    if feature.kind == "numeric":
        numbers = [values[0][1] for values in rows if values]
        mean = sum(numbers) / max(len(numbers), 1)
        std = (sum((number - mean) ** 2 for number in numbers) / max(len(numbers), 1)) ** 0.5 or 1.0
        return {feature.name: [(values[0][1] - mean) / std if values else 0.0 for values in rows]}
    counts = Counter(identifier for values in rows for identifier, _ in values)
    known = sorted((-count, value) for value, count in counts.items() if count >= feature.min_count)
    table = {value: place for place, (_, value) in enumerate(known, 1)}  # row 0 is shared by the others
    ids = [[table.get(identifier, 0) for identifier, _ in values] for values in rows]
    if feature.kind == "categorical":
        return {feature.name: [values[0] if values else None for values in ids]}
    if feature.kind == "list":
        return {feature.name: [struct.pack(f"<{len(row)}i", *row) for row in ids]}
    weights = [struct.pack(f"<{len(row)}f", *(weight for _, weight in row)) for row in rows]
    return {feature.name: [struct.pack(f"<{len(row)}i", *row) for row in ids], f"{feature.name}.weight": weights}


def kind(config: DataConfig, name: str) -> pa.DataType:
    """The type of a column."""
    if name in ("click", "conversion"):
        return pa.uint8()
    if name.startswith("kept."):
        return pa.int64()
    feature = next(feature for feature in config.features if feature.name == name.removesuffix(".weight"))
    if feature.kind == "numeric":
        return pa.float32()
    if feature.kind == "categorical":
        return pa.int32()
    return pa.binary()


def order_key(place: int) -> int:
    """As `escm2rec.preprocess.read.order_of`."""
    return splitmix64(place ^ fnv1a64("order of rows"))


def fnv1a64(text: str) -> int:
    """FNV-1a."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 & MASK
    return value


def splitmix64(value: int) -> int:
    """SplitMix64."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)

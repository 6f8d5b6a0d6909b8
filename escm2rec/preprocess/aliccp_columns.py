"""What a request means for Ali-CCP: which fields are read, and what becomes of them. The same for skeleton and common lines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from escm2rec.errors import ConfigError
from escm2rec.preprocess.aliccp_text import MAX_FIELD_BYTES, FieldCodes, Lines, Needs
from escm2rec.preprocess.block import RawColumn, Request, take_rows
from escm2rec.preprocess.ragged import Bools, Float64s, Int64s, Ragged
from escm2rec.preprocess.rejections import COMMON_INDEX, NUMBER, SEVERAL, values_at
from escm2rec.preprocess.transforms import clipped, cut
from escm2rec.schema import Feature

HEADER_COLUMNS = ("sample_id", "common_feature_index")
INDEX_BYTES = 16
MAX_FIELDS = 250
ABSENT = -1  # of an extra column; ids are never negative

_HEX = np.full(256, 16, dtype=np.uint8)
_HEX[[ord(digit) for digit in "0123456789abcdef"]] = np.arange(16, dtype=np.uint8)
_HEX_TEXT = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)


@dataclass(frozen=True)
class SideColumns:
    """Columns of one side, skeleton or common, by feature name and by raw column."""

    features: dict[str, RawColumn]
    extras: dict[str, Int64s]

    def take(self, rows: Int64s) -> SideColumns:
        """The rows at these positions."""
        return SideColumns(
            {name: take_rows(column, rows) for name, column in self.features.items()},
            {name: column[rows] for name, column in self.extras.items()},
        )


class AliccpColumns:
    """Reads the requested columns off parsed lines."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.extra_fields = tuple(name for name in request.extras if name not in HEADER_COLUMNS)
        self.needs: dict[str, Needs] = {}
        for feature in request.features:
            ids, values = feature.kind != "numeric", feature.kind in ("numeric", "weighted_list")
            self._need(feature.column, ids, values)
        for name in self.extra_fields:
            self._need(name, True, False)
        for field in self.needs:
            if not 0 < len(field.encode()) <= MAX_FIELD_BYTES:
                raise ConfigError(f"{field!r} is no Ali-CCP field id: it has 1 to {MAX_FIELD_BYTES} bytes", "set the feature's column")
        if len(self.needs) > MAX_FIELDS:
            raise ConfigError(f"{len(self.needs)} Ali-CCP fields are asked for, the most is {MAX_FIELDS}")

    def _need(self, field: str, ids: bool, values: bool) -> None:
        known = self.needs.get(field, Needs(False, False))
        self.needs[field] = Needs(known.ids or ids, known.values or values)

    @cached_property
    def codes(self) -> FieldCodes:
        """Finder of the needed fields."""
        return FieldCodes(list(self.needs))

    def read(self, lines: Lines) -> SideColumns:
        """The columns of these lines, bad lines marked."""
        fields = lines.fields(self.codes, self.needs)
        features = {feature.name: _feature(feature, fields[feature.column], lines) for feature in self.request.features}
        return SideColumns(features, {name: _single_id(name, fields[name], lines) for name in self.extra_fields})


def _feature(feature: Feature, field: Ragged, lines: Lines) -> RawColumn:
    if feature.kind == "list":
        return cut(feature, Ragged(field.values, field.offsets))
    if feature.kind == "weighted_list":
        return cut(feature, field)
    if feature.kind == "categorical":
        mark_several(lines, feature.column, field)
        return Ragged(field.values, field.offsets)
    mark_several(lines, feature.column, field)
    assert field.weights is not None
    held = np.diff(field.offsets) > 0
    numbers: Float64s = np.full(len(field), np.nan)
    numbers[held] = field.weights[field.offsets[:-1][held]]
    numbers = clipped(feature, numbers)
    if feature.log1p:
        lines.bad.mark(numbers <= -1, NUMBER, feature.column, values_at(numbers))
    return numbers


def _single_id(name: str, field: Ragged, lines: Lines) -> Int64s:
    mark_several(lines, name, field)
    held = np.diff(field.offsets) > 0
    ids = np.full(len(field), ABSENT, dtype=np.int64)
    ids[held] = field.values[field.offsets[:-1][held]]
    return ids


def mark_several(lines: Lines, column: str, field: Ragged) -> None:
    """Mark lines that hold a single-valued field more than once."""
    lengths = field.lengths
    if len(lengths) and lengths.max() > 1:
        lines.bad.mark(lengths > 1, SEVERAL, column, lambda rows: [f"{count} values" for count in lengths[rows]])


def present(column: RawColumn) -> Bools:
    """Whether each row holds anything."""
    return column.lengths > 0 if isinstance(column, Ragged) else ~np.isnan(column)


def common_keys(lines: Lines, column: int) -> Int64s:
    """The common index of each line, its 64 bits as int64; anything but 16 hexadecimal digits marks the line bad."""
    starts, ends = lines.span(column)
    nibbles = _HEX[lines.buffer[np.minimum(starts, len(lines.buffer) - INDEX_BYTES)[:, None] + np.arange(INDEX_BYTES)]]
    wrong = (ends - starts != INDEX_BYTES) | (nibbles > 15).any(axis=1)
    lines.bad.mark(wrong, COMMON_INDEX, "common_feature_index", lines.column_text(column))
    pairs = (nibbles[:, 0::2] << 4) | (nibbles[:, 1::2] & 15)
    return np.ascontiguousarray(pairs).view(">i8").astype(np.int64).reshape(-1)


def key_text(keys: Int64s) -> tuple[bytes, int]:
    """The 16 hexadecimal digits of each key, end to end, and how many bytes each has."""
    pairs = keys.astype(">i8").view(np.uint8)
    return np.stack([_HEX_TEXT[pairs >> 4], _HEX_TEXT[pairs & 15]], axis=1).tobytes(), INDEX_BYTES

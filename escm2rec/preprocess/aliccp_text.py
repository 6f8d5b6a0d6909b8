"""Ali-CCP text to columns: every feature of every line, without a loop over lines.

A line is some header columns, then `field \\x02 id \\x03 value` joined by \\x01. All separators of a block are found at once; their order
says whether each line is well formed, and the text between them is read eight bytes at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from escm2rec.errors import DataError
from escm2rec.preprocess.digits import MAX_FLOAT32, PAD, decimals, first_bytes, slices, whole_numbers, words_of
from escm2rec.preprocess.ragged import Bools, Bytes, Float64s, Int64s, Ragged, UInt64s, offsets_of
from escm2rec.preprocess.rejections import FEATURE_NUM, IDENTIFIER, MALFORMED, NUMBER, TRUNCATED, BadRows, Reason

BLOCK_BYTES = 4 << 20  # a compromise of cache, cost a block, and memory: docs/decisions/0001
MAX_FIELD_BYTES = 8  # of a field id: a word holds it
_SLOT_BITS = 12


@dataclass(frozen=True)
class TextBlock:
    """Whole lines of a file, with room to read before and after them."""

    path: Path
    first_line: int  # position in the file of the first line, from 0
    first_byte: int
    lines: int
    buffer: Bytes  # the text, PAD bytes before and after
    truncated: bool  # the last line has no newline; one was added


def text_blocks(path: Path, block_bytes: int, start: int = 0, stop: int | None = None, first_line: int = 0) -> Iterator[TextBlock]:
    """Blocks of about `block_bytes`, cut at newlines, of a range of bytes that holds whole lines. An empty file is a DataError."""
    size = os.path.getsize(path)
    if size == 0:
        raise DataError(f"{path} is empty (0 bytes)", "was the copy or the export interrupted?")
    size = size if stop is None else stop
    line, byte, carry = first_line, start, b""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while byte + len(carry) < size:
            wanted = min(block_bytes, size - byte - len(carry))
            raw = np.empty(2 * PAD + len(carry) + wanted + 1, dtype=np.uint8)
            raw[:PAD] = ord(" ")
            raw[PAD : PAD + len(carry)] = np.frombuffer(carry, dtype=np.uint8)
            end = PAD + len(carry)
            while wanted and (got := file.readinto(raw[end : end + wanted].data)):
                end, wanted = end + got, wanted - got
            at_end = byte + end - PAD >= size
            truncated = at_end and raw[end - 1] != ord("\n")
            if truncated:
                raw[end] = ord("\n")
                end += 1
            cut = end if at_end else _after_last_newline(raw, end)
            if cut == PAD:  # a line longer than the block: read on
                carry = raw[PAD:end].tobytes()
                continue
            carry = raw[cut:end].tobytes()
            lines = int(np.count_nonzero(raw[PAD:cut] == ord("\n")))
            yield TextBlock(path, line, byte, lines, raw[: cut + PAD], truncated)
            line += lines
            byte += cut - PAD
            if at_end:
                return


def _after_last_newline(raw: Bytes, end: int) -> int:
    return max(raw[PAD:end].tobytes().rfind(b"\n"), -1) + 1 + PAD


class FieldCodes:
    """Finds the wanted fields by their ids, with one multiplication and one table each (a perfect hash)."""

    def __init__(self, fields: list[str]) -> None:
        self.fields = fields
        keys = np.array([int.from_bytes(field.encode(), "little") for field in fields], dtype=np.uint64)
        generator = np.random.default_rng(0)
        shift = np.uint64(64 - _SLOT_BITS)
        while True:
            self._multiplier = np.uint64(generator.integers(2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1))
            slots = (keys * self._multiplier) >> shift
            if len(np.unique(slots)) == len(keys):
                break
        self._keys = np.zeros(1 << _SLOT_BITS, dtype=np.uint64)
        self._codes = np.full(1 << _SLOT_BITS, len(fields), dtype=np.uint8)
        self._keys[slots], self._codes[slots] = keys, np.arange(len(fields), dtype=np.uint8)

    def of(self, words: UInt64s, starts: Int64s, ends: Int64s) -> Bytes:
        """Position of each field among the wanted ones; their number for any other."""
        lengths = ends - starts
        keys = first_bytes(words, starts, np.minimum(lengths, MAX_FIELD_BYTES))
        slots = (keys * self._multiplier) >> np.uint64(64 - _SLOT_BITS)
        found = (self._keys[slots] == keys) & (lengths <= MAX_FIELD_BYTES)
        return np.where(found, self._codes[slots], np.uint8(len(self.fields)))


@dataclass(frozen=True)
class Needs:
    """What is read of a field: its ids, its values, or both."""

    ids: bool
    values: bool


class Lines:
    """The lines of a block: header columns and features. Bad lines are marked in `bad`; their content is undefined."""

    def __init__(self, block: TextBlock, header: int) -> None:
        self.buffer, self.words, self.header = block.buffer, words_of(block.buffer), header
        text = self.buffer[PAD:-PAD]
        separators = (text <= 3) | (text == ord(",")) | (text == ord("\n"))
        at = np.flatnonzero(separators)
        kinds = text[at]
        at += PAD
        last = np.flatnonzero(kinds == ord("\n"))
        first = np.empty_like(last)
        first[0], first[1:] = 0, last[:-1] + 1
        self.count = len(last)
        self.bad = BadRows(block.path, block.first_line + 1 + np.arange(self.count, dtype=np.int64))
        self._line_ends = at[last]
        self._line_starts = np.empty_like(self._line_ends)
        self._line_starts[0], self._line_starts[1:] = PAD, self._line_ends[:-1] + 1
        if block.truncated:
            where = np.zeros(self.count, dtype=np.bool_)
            where[-1] = True
            self.bad.mark(where, TRUNCATED, "", self.text)
        self._commas = at[np.minimum(first[:, None] + np.arange(header), last[:, None])]
        self._find_features(at, kinds, first, last)
        stated, good = whole_numbers(self.words, *self.span(header - 1))
        self.bad.mark(~good | (stated != np.diff(self.features)), FEATURE_NUM, "feature_num", self._feature_num_text)

    def _find_features(self, at: Int64s, kinds: Bytes, first: Int64s, last: Int64s) -> None:
        """Set `features` (offsets of each line's) and `_ends` [features, 3] (ends of field, id and value)."""
        header, separators = self.header, last - first + 1
        places = first[:, None] + np.arange(header)
        well = separators > header
        well &= (kinds[np.minimum(places, last[:, None])] == ord(",")).all(axis=1)
        in_list = separators - header
        empty = (in_list == 1) & (at[last] == self._commas[:, -1] + 1)
        well &= (in_list % 3 == 0) | empty
        is_feature = np.ones(len(at), dtype=np.bool_)
        if not well.all():
            is_feature &= np.repeat(well, separators)
            places = places[well]
        is_feature[places.reshape(-1)] = False
        is_feature[last[empty]] = False
        self.features = offsets_of(np.where(well & ~empty, in_list // 3, 0))
        self._ends = at[is_feature].reshape(-1, 3)
        last_of_line = self.features[1:][np.diff(self.features) > 0] - 1
        marks = kinds[is_feature].reshape(-1, 3)
        joined = marks[:, 2] == 1
        joined[last_of_line] = marks[last_of_line, 2] == ord("\n")
        wrong = np.flatnonzero(~(joined & (marks[:, 0] == 2) & (marks[:, 1] == 3)))
        well[np.searchsorted(self.features, wrong, side="right") - 1] = False
        self.bad.mark(~well, MALFORMED, "", self.text)

    def text(self, rows: Int64s) -> list[str]:
        """Whole lines, for messages."""
        return [repr(text) for text in slices(self.buffer, self._line_starts[rows], self._line_ends[rows]).to_pylist()]

    def _feature_num_text(self, rows: Int64s) -> list[str]:
        starts, ends = self.span(self.header - 1)
        stated = slices(self.buffer, starts[rows], ends[rows]).to_pylist()
        return [f"{said} before a list of {held}" for said, held in zip(stated, np.diff(self.features)[rows], strict=True)]

    def byte_spans(self, first_byte: int) -> Int64s:
        """Start and end of each line in its file [lines, 2], given the place of the block."""
        return np.stack([self._line_starts, self._line_ends], axis=1) + (first_byte - PAD)

    def span(self, column: int) -> tuple[Int64s, Int64s]:
        """Start and end of a header column in each line; an empty span at the end of bad lines that lack it."""
        starts = self._line_starts if column == 0 else self._commas[:, column - 1] + 1
        ends = self._commas[:, column]
        return np.minimum(starts, ends), ends

    def column_text(self, column: int) -> Callable[[Int64s], list[str]]:
        """Texts of a header column, for messages."""
        starts, ends = self.span(column)
        return lambda rows: [repr(text) for text in slices(self.buffer, starts[rows], ends[rows]).to_pylist()]

    def fields(self, codes: FieldCodes, needs: Mapping[str, Needs]) -> dict[str, Ragged]:
        """The wanted fields: ids (int64) as values, values (float64, NaN when no number) as weights; repeats in the order of the line.

        An id that is no whole number marks its line bad. What a field does not need is not read: `values` are then zeros.
        """
        ends = self._ends
        starts = np.empty(len(ends), dtype=np.int64)
        if len(ends):
            starts[1:] = ends[:-1, 2] + 1
            lines = np.flatnonzero(np.diff(self.features))
            starts[self.features[lines]] = self._commas[lines, -1] + 1
        code = codes.of(self.words, starts, ends[:, 0])
        order = np.argsort(code, kind="stable")  # radix sort on bytes
        bounds = np.searchsorted(code[order], np.arange(len(codes.fields) + 1))
        line_of = np.repeat(np.arange(self.count, dtype=np.int64), np.diff(self.features))
        return {
            field: self._field(field, needs[field], order[bounds[number] : bounds[number + 1]], line_of)
            for number, field in enumerate(codes.fields)
        }

    def _field(self, field: str, needs: Needs, which: Int64s, line_of: Int64s) -> Ragged:
        field_end, id_end, value_end = self._ends[which, 0], self._ends[which, 1], self._ends[which, 2]
        lines = line_of[which]
        offsets = offsets_of(np.bincount(lines, minlength=self.count))
        weights: Float64s | None = None
        if needs.values:
            weights = decimals(self.buffer, self.words, id_end + 1, value_end)
            self._mark(~(np.abs(weights) <= MAX_FLOAT32), lines, NUMBER, field, id_end + 1, value_end)
        if not needs.ids:
            return Ragged(np.zeros(len(which), dtype=np.int64), offsets, weights)
        ids, good = whole_numbers(self.words, field_end + 1, id_end)
        self._mark(~good, lines, IDENTIFIER, field, field_end + 1, id_end)
        return Ragged(ids.view(np.int64), offsets, weights)

    def _mark(self, wrong: Bools, lines: Int64s, reason: Reason, field: str, starts: Int64s, ends: Int64s) -> None:
        """Mark the lines of wrong features bad."""
        at = np.flatnonzero(wrong)
        if not len(at):
            return
        where = np.zeros(self.count, dtype=np.bool_)
        where[lines[at]] = True

        def seen(rows: Int64s) -> list[str]:
            firsts = at[np.searchsorted(lines[at], rows)]
            return [repr(text) for text in slices(self.buffer, starts[firsts], ends[firsts]).to_pylist()]

        self.bad.mark(where, reason, field, seen)

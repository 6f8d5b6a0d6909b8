import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from escm2rec.preprocess.digits import PAD, decimals, slices, whole_numbers, words_of
from escm2rec.preprocess.ragged import Bytes, Int64s, offsets_of


def laid_out(texts: list[str]) -> tuple[Bytes, Int64s, Int64s]:
    """The texts side by side with digits around them, and their starts and ends."""
    joined = "7".join(["", *texts, ""]).encode()
    buffer = np.frombuffer(b"9" * PAD + joined + b"9" * PAD, dtype=np.uint8)
    lengths = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    starts = PAD + 1 + offsets_of(lengths + 1)[:-1]
    return buffer, starts, starts + lengths


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64) | st.integers(0, 10**9), min_size=1, max_size=20))
def test_whole_numbers_are_read_and_overflow_is_told(numbers: list[int]) -> None:
    buffer, starts, ends = laid_out([str(number) for number in numbers])
    values, good = whole_numbers(words_of(buffer), starts, ends)
    assert good.tolist() == [number < 2**63 for number in numbers]
    assert [int(v) for v, g in zip(values, good, strict=True) if g] == [number for number in numbers if number < 2**63]


def test_what_is_no_whole_number_is_told() -> None:
    texts = ["", "-1", "1.0", "1a", "12345678x", "x12345678", "0" * 20, "9223372036854775808", "9223372036854775807", "007"]
    buffer, starts, ends = laid_out(texts)
    values, good = whole_numbers(words_of(buffer), starts, ends)
    assert good.tolist() == [False] * 8 + [True, True]
    assert values[8:].tolist() == [2**63 - 1, 7]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False).map(repr) | st.decimals(0, 1000, places=5).map(str), min_size=1, max_size=20)
)
def test_decimals_are_rounded_as_python_rounds_them(texts: list[str]) -> None:
    assert decimals_of(texts) == [float(text) for text in texts]


def decimals_of(texts: list[str]) -> list[float]:
    buffer, starts, ends = laid_out(texts)
    values: list[float] = decimals(buffer, words_of(buffer), starts, ends).tolist()
    return values


def test_odd_and_broken_decimals() -> None:
    assert decimals_of(["1", "1.", ".5", "-2.5", "1e3", "0.69315"]) == [1, 1, 0.5, -2.5, 1000, 0.69315]
    assert all(math.isnan(value) for value in decimals_of(["", ".", "1.2.3", "nan", "inf", "1e999", "abc", "1.0x"]))


def test_slices_are_the_texts() -> None:
    texts = ["", "ab", "\N{SNOWMAN}", "last"]
    buffer, starts, ends = laid_out(texts)
    assert slices(buffer, starts, ends).to_pylist() == ["", "ab", "???", "last"]

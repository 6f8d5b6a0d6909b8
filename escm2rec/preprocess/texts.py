"""Text of Parquet files, which nobody checked to be UTF-8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from escm2rec.preprocess.ragged import Bools


def not_utf8(texts: pa.Array) -> Bools | None:
    """Which of these large strings are no UTF-8; None where all are, as a rule."""
    try:
        texts.validate(full=True)
        return None
    except pa.ArrowInvalid:
        raw: list[Any] = texts.cast(pa.large_binary()).to_pylist()
    return np.array([value is not None and value.decode(errors="replace").encode() != value for value in raw], dtype=np.bool_)


def without_other_text(texts: pa.Array) -> pa.Array:
    """The strings, null where they are no UTF-8."""
    wrong = not_utf8(texts)
    return texts if wrong is None else pa.array([None if bad else text.as_py() for bad, text in zip(wrong, texts, strict=True)], texts.type)

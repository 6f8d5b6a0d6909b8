"""Text of Parquet files, which nobody checked to be UTF-8."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from escm2rec.preprocess.ragged import Bools


def not_utf8(texts: pa.Array) -> Bools | None:
    """Which of these large strings are no UTF-8; None where all are, as a rule."""
    wrong = np.zeros(len(texts), dtype=np.bool_)
    _mark(texts, wrong)
    return wrong if wrong.any() else None


def _mark(texts: pa.Array, wrong: Bools) -> None:
    """Halve what is not all UTF-8, down to single texts: a few among many are found in few passes."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        middle = len(texts) // 2
        if not middle:
            wrong[:] = True
            return
        _mark(texts[:middle], wrong[:middle])
        _mark(texts[middle:], wrong[middle:])


def without_other_text(texts: pa.Array) -> pa.Array:
    """The strings, null where they are no UTF-8."""
    wrong = not_utf8(texts)
    return texts if wrong is None else pc.if_else(pa.array(wrong), pa.scalar(None, texts.type), texts)

"""How much of what is scored is missing or out of vocabulary, beside what training saw."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from escm2rec.errors import DataError
from escm2rec.paths import DataPath
from escm2rec.preprocess.ragged import Int64s
from escm2rec.reader.columns import Columns
from escm2rec.schema import Schema
from escm2rec.training.run import COVERAGE

Record = dict[str, Any]

logger = logging.getLogger(__name__)


def held_in_columns(columns: Columns, schema: Schema) -> dict[str, Int64s]:
    """What `shares.held` counts, of columns that are encoded already; of numbers, whose missing ones are 0 there, nothing."""
    found = {}
    for feature in schema.tables:
        column = columns.jagged[feature.name]
        filled = columns.num_rows if column.offsets is None else np.count_nonzero(np.diff(column.offsets))
        shared = np.count_nonzero(column.values < feature.oov_rows) if feature.oov_rows else 0
        found[feature.name] = np.array([columns.num_rows - filled, len(column.values), shared], np.int64)
    return found


def trained_on(run: DataPath) -> Record | None:
    """By feature, the shares of the run's training split; None of a run that was trained before they were kept."""
    path = run / COVERAGE
    if not path.is_file():
        return None
    try:
        told: Record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {error}", "copy the folder again, or remove this file") from error
    return told


def compare(schema: Schema, rows: int, held: Mapping[str, Iterable[int]], trained: Record | None, gap: float) -> Record:
    """By feature: shares missing (of rows) and oov (of values) of what was scored, and of training; a warning where they differ by more
    than `gap`."""
    found: Record = {}
    for feature in schema.features:
        if feature.name not in held or not rows:
            continue
        without, values, shared = held[feature.name]
        known = (trained or {}).get(feature.name, {})
        here = {"missing": without / rows}
        if feature.encoding == "vocabulary" and values:
            here["oov"] = shared / values
        found[feature.name] = {what: {"scored": share, "training": known.get(what)} for what, share in here.items()}
        for what, said in (("missing", "have no value"), ("oov", "are out of vocabulary")):
            before = known.get(what)
            if what in here and before is not None and abs(here[what] - before) > gap:
                of = "rows" if what == "missing" else "values"
                logger.warning("feature %r: %.1f%% of %s %s, in training %.1f%%", feature.name, 100 * here[what], of, said, 100 * before)
    return found

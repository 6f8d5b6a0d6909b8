"""The rule for a conversion whose click is 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.rejections import CONVERSION, FIRST_OFFENDERS, Rejection

ClickRule = Literal["refuse", "drop", "click"]


def apply_click_rule(block: RawBlock, rule: ClickRule) -> tuple[RawBlock, Rejection | None, list[Rejection]]:
    """The block after the rule; the rows that it met, if any; and the same as a refusal when the rule is to refuse."""
    click, conversion = block.labels["click"], block.labels["conversion"]
    rows = np.flatnonzero((conversion == 1) & (click == 0))
    if not len(rows):
        return block, None, []
    lines = block.lines[rows[:FIRST_OFFENDERS]].tolist()
    met = Rejection(CONVERSION, str(block.file.path), "", len(rows), lines, ["click 0 and conversion 1"] * len(lines))
    if rule == "click":
        return replace(block, labels={**block.labels, "click": np.maximum(click, conversion)}), met, []
    kept = np.flatnonzero((conversion == 0) | (click == 1))
    return block.take(kept), met, [met] if rule == "refuse" else []

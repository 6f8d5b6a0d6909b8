"""What a finding is, and how it takes numbers from a study and writes them down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Tree = Mapping[str, Any]
"""What `study.json` holds."""

LEVEL_P = 0.05
"""Holm's p from which two candidates are called level."""
IPS, DR = "escm2-ips", "escm2-dr"
LINES = {"esmm": "ESMM", "naive": "naive", "naive+ctcvr": "control", IPS: "IPS", DR: "DR"}
"""What the plots show, and its short name; the control is naive with ESMM's loss beside it. DR is that of imputed labels: with
imputed errors its CVR tower learns exactly as that of IPS."""


class Table(NamedTuple):
    """Columns `head`, rows of as many cells; columns numbered in `texts` hold words."""

    head: tuple[str, ...]
    rows: list[list[str]]
    texts: tuple[int, ...] = (0,)


class Finding(NamedTuple):
    """A part of the page.

    lead   what the first sentence of `found` is about, in short; empty where each sentence begins with a lead of its own and a colon
    how    what is shown, and how to read it
    found  what came of it
    """

    title: str
    lead: str
    how: str
    found: list[str]
    table: Table | None = None


def spread(record: Mapping[str, Any] | None, digits: int = 2, scale: float = 1.0, sign: str = "") -> str:
    """A mean or ratio with its 95% interval."""
    if record is None:
        return "–"
    middle = record["mean"] if "mean" in record else record["ratio"]
    text = f"{scale * middle:{sign}.{digits}f}"
    if record["low"] is not None:
        text += f" ({scale * record['low']:{sign}.{digits}f} to {scale * record['high']:{sign}.{digits}f})"
    return text.replace("-", "−")


def p_value(p: float) -> str:
    """As it is written: `p = 0.012`."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def mean_of(tree: Tree, world: str, name: str, metric: str) -> Mapping[str, Any] | None:
    """The mean of a metric over seeds, None where there is none."""
    found: Mapping[str, Any] | None = tree["means"][world].get(name, {}).get(metric)
    return found


def ratio_of(tree: Tree, world: str, name: str, baseline: str, metric: str = "kl") -> Mapping[str, Any] | None:
    """`kl` or `risk` of a candidate over that of a baseline, None where they were not compared."""
    found: Mapping[str, Any] | None = tree["against"][world].get(name, {}).get(baseline, {}).get(metric)
    return found


def level_in(tree: Tree, world: str) -> list[str]:
    """The best candidate, then those level with it, the better first."""
    level = tree["level"][world]
    if not level:
        return []
    others = {name: test["ratio"] for name, test in level["against"].items() if test["p_holm"] >= LEVEL_P}
    return [level["best"], *sorted(others, key=lambda name: others[name])]


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def counted(count: int, noun: str) -> str:
    """`1 world`, `2 worlds`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")

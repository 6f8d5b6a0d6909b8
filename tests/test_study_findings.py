"""Findings are what the numbers say, and turn round with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from escm2rec.study.candidates import CANDIDATES
from escm2rec.study.claims import line, unbiased_rows
from escm2rec.study.finding import Finding, p_value, spread
from escm2rec.study.findings import findings, situation
from escm2rec.study.presets import WORLDS
from tests.study_cells import full_tree, planted, tree_of

SIZES = ("size 15k", "selection +0.8", "size 240k")


def by_lead(tree: dict[str, Any]) -> dict[str, Finding]:
    return {finding.lead: finding for finding in findings(tree)}


def tree_with(
    level: Callable[[str, str], float], worlds: tuple[str, ...] = ("selection +0.8", "selection 0"), seeds: int = 5
) -> dict[str, Any]:
    return tree_of(planted(worlds, list(CANDIDATES), seeds, level, noise=0.02))


@pytest.mark.parametrize(
    ("ips", "take", "word"), [(0.03, "a correction (1 of 1)", "better than both"), (0.09, "none (1 of 1)", "worse than one of them")]
)
def test_what_to_take_follows_the_numbers(ips: float, take: str, word: str) -> None:
    tree = tree_with(lambda world, name: ips if name == "escm2-ips" and world == "selection 0" else 0.06)
    made = by_lead(tree)
    finding = made["Which objective when"]
    assert finding.table is not None
    rows = {row[0]: row for row in finding.table.rows}
    assert rows["no selection"][2] == take
    assert float(rows["no selection"][3].split()[0]) == pytest.approx(ips / 0.06, rel=0.03)
    assert rows["clicked convert better, CVR tower too small"][2] == "no difference shown (1 of 1)"
    assert f"is {word} where: no selection (1 of 1)" in finding.found[0]
    short, *_ = findings(tree)
    assert f"Which objective when: {finding.found[0]}" in short.found
    assert short.found[1].startswith("Few seeds: With 5 a difference must be large to be shown")


def test_the_best_of_a_world_is_named_with_what_is_level() -> None:
    made = by_lead(tree_with(lambda world, name: {"dcmt": 0.02, "direct": 0.02, "oracle": 0.001}.get(name, 0.06)))["The best"]
    assert made.table is not None
    first = made.table.rows[0]
    assert first[0].startswith("selection +0.8\n")
    assert sorted((first[1].split("\n")[0], first[2])) == ["dcmt", "direct"]
    assert first[3].startswith(("2.9", "3.0", "3.1"))
    assert first[3].endswith("p < 0.0001")
    assert first[6].endswith("/ 0.00100") or first[6].split(" / ")[2].startswith(("0.00098", "0.00099", "0.00101", "0.00102"))


def test_the_sign_of_the_bias_is_told() -> None:
    # Mean CVR is planted at 1 + 10 KL.
    made = by_lead(
        tree_with(
            lambda world, name: 0.1 if world == "selection +0.8" else -0.05 if world == "selection -0.8" else 1e-9,
            ("selection +0.8", "selection 0"),
        )
    )
    said = made["Claim 1, ESMM's bias"].found[0]
    assert re.search(r"in the one world where clicked impressions convert better it is (1\.9\d|2\.0\d) times", said)
    assert "the truth (above 1 in 1, below in 0)" in said
    assert "alike it is 1.00 times the truth" in said


def test_convergence_needs_sizes_and_an_oracle() -> None:
    def level(world: str, name: str) -> float:
        return 0.01 if name == "oracle" else 0.01 + 0.04 / (1 + SIZES.index(world)) if name == "escm2-ips" else 0.05

    made = by_lead(tree_with(level, SIZES))["Claim 3, convergence"]
    assert made.table is not None
    assert made.table.head[1:] == ("15,000\nimpressions", "60,000\nimpressions", "240,000\nimpressions")
    rows = {row[0]: [float(cell.split(" ")[0]) for cell in row[1:]] for row in made.table.rows}
    assert rows["IPS"] == pytest.approx([0.04, 0.02, 0.0133], abs=0.002)
    assert rows["ESMM"] == pytest.approx([0.04] * 3, abs=0.002)
    assert "from 15,000 to 240,000 impressions" in made.found[0]


def test_wrong_propensities_come_from_their_own_worlds() -> None:
    rows = unbiased_rows(full_tree())
    assert [(name, q) for name, q, _ in rows if q.startswith("too")] == [
        (name, q) for q in ("too flat", "too steep") for name in ("escm2-ips", "escm2-dr")
    ]
    assert [(name, q) for name, q, _ in rows][:4] == [
        ("naive", "none"),
        ("direct", "in the imputation"),
        ("escm2-ips true q", "true"),
        ("escm2-dr true q", "true"),
    ]


@pytest.mark.parametrize(("ratio", "word"), [(1.0, "yes"), (1.2, "no")])
def test_the_price_is_within_5_percent_or_not(ratio: float, word: str) -> None:
    made = by_lead(tree_with(lambda world, name: 0.05 * ratio if name == "escm2-ips" else 0.05, seeds=12))["The price"]
    assert made.table is not None
    row = next(row for row in made.table.rows if row[:2] == ["selection 0", "IPS"])
    assert row[3] == word
    assert row[5] == "yes"


def test_what_is_worse_than_naive_is_told() -> None:
    made = by_lead(tree_with(lambda world, name: 0.2 if name == "direct" else 0.05))["What does not work"]
    assert made.found[0] == "Worse than naive in more worlds than better: direct (2 worse, 0 better)."
    assert made.table is not None
    row = next(row for row in made.table.rows if row[0] == "direct")
    assert row[1:5] == ["0 of 2", "0 / 0 / 2", "0 / 0 / 2", "0 / 0 / 2"]
    assert row[5].startswith(("3.9", "4.0", "4.1"))


def test_dials_are_worlds_that_differ_in_one_field() -> None:
    tree = full_tree()
    assert [name for _, name in line(tree, "selection")] == [
        "selection -0.8",
        "selection -0.4",
        "selection 0",
        "selection +0.4",
        "selection +0.8",
    ]
    assert line(tree, "ctr") == [(0.02, "ctr 2%"), (0.1, "selection +0.8"), (0.3, "ctr 30%")]
    assert line(tree, "impressions") == list(zip((15_000, 60_000, 240_000), SIZES, strict=True))
    assert line(tree_of(planted(["selection 0"], ["naive"], 2)), "ctr") == []
    situations = {situation(tree["settings"]["worlds"][world.name]) for world in WORLDS}
    assert len(situations) == 6


def test_numbers_as_they_are_written() -> None:
    assert spread({"mean": -0.123, "low": -0.2, "high": 0.1}, 1, 100, "+") == "−12.3 (−20.0 to +10.0)"
    assert spread({"ratio": 2.0, "low": None, "high": None}) == "2.00"
    assert spread(None) == "–"
    assert [p_value(p) for p in (1e-9, 0.0123, 1.0)] == ["p < 0.0001", "p = 0.012", "p = 1"]

"""study.html: complete, offline, escaped, and plain about what a study cannot tell."""

from __future__ import annotations

import base64
import copy
import re
from pathlib import Path
from typing import Any

import pytest

from escm2rec.study.candidates import CANDIDATES
from escm2rec.study.html import METRICS, TITLE, write_study_page
from escm2rec.study.presets import QUICK, WORLDS
from tests.study_cells import full_tree, planted, tree_of
from tests.test_evaluation_html import Page

SECTIONS = [
    "In short",
    "Which objective when",
    "World by world",
    "Claim 1: ESMM's CVR is biased",
    "Claim 2: with accurate propensities the risk is unbiased",
    "Claim 3: with more data the CVR converges to the counterfactual one",
    "A contender chosen on some seeds, judged on others",
    "The price of the correction",
    "The remedy: choosing by held-out clicks",
    "How the imputation of DR is trained",
    "What does not work: every candidate at a glance",
]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    return page_of(full_tree(), tmp_path_factory.mktemp("full"))


def page_of(tree: dict[str, Any], folder: Path) -> tuple[Page, str]:
    write_study_page(tree, folder / "study.html")
    assert [path.name for path in folder.iterdir()] == ["study.html"]
    text = (folder / "study.html").read_text(encoding="utf-8")
    return Page(text), text


def test_a_full_study_is_one_page_without_scripts_or_hosts(full: tuple[Page, str]) -> None:
    page, text = full
    assert page.headings == [TITLE, *SECTIONS, "Other dials", "All numbers", "What the words mean"]
    assert len(page.images) == 2 + 3 + 2 + 2 + 3
    for image in page.images:
        drawn = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).decode()
        assert "<svg" in drawn
        assert "<script" not in drawn
        assert "NaN" not in drawn
    assert page.outside == []
    assert "script" not in page.tags
    assert re.findall(r"https?://|@import|url\(", text) == []
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.S).lower().split()
    assert text.count("<details>") == len(WORLDS)
    (pages,) = {len(re.findall("<tr>", part)) for part in text.split("<details>")[1:-1]}
    assert pages == 1 + len(CANDIDATES)  # a row for each candidate
    assert [metric for metric in METRICS if metric in full_tree()["means"][WORLDS[0].name]["naive"]] == [
        "kl",
        "kl_unclicked",
        "kl_excess",
        "cvr_over_truth",
        "cvr_over_truth_unclicked",
        "true_risk",
        "risk_error",
        "heldout_snips",
        "heldout_dr",
        "heldout_snips_flexible",
        "heldout_dr_flexible",
        "heldout_auc_clicked",
    ]


def test_the_same_study_gives_the_same_bytes(full: tuple[Page, str], tmp_path: Path) -> None:
    assert page_of(copy.deepcopy(full_tree()), tmp_path)[1] == full[1]


def test_a_quick_study_says_what_it_cannot_tell(tmp_path: Path) -> None:
    page, text = page_of(tree_of(planted(["selection +0.8", "capacity right"], QUICK, 2)), tmp_path)
    absent = {"Claim 3: with more data the CVR converges to the counterfactual one", "A contender chosen on some seeds, judged on others"}
    told = [section for section in SECTIONS if section not in absent]
    assert page.headings == [TITLE, *told, "Not in this study", "All numbers", "What the words mean"]
    assert len(page.images) == 2 + 1  # beside naive and ESMM, and the errors of risks
    for said in (
        "No plot: the study holds fewer than two strengths of selection.",
        "The study holds one size of log or no oracle, so it says nothing of convergence.",
        "Worlds with a wrong propensity are not in this study.",
        "No candidate of this study has the true propensity",
        "With 2 a difference must be large to be shown",
        "No world has seeds enough to choose on some and judge on others.",
    ):
        assert said in text, said


def test_a_study_of_one_candidate_is_a_page_too(tmp_path: Path) -> None:
    page, text = page_of(tree_of(planted(["selection 0"], ["dcmt"], 2)), tmp_path)
    assert page.images == []
    for said in (
        "ESMM is not in this study.",
        "Fewer than two ways to train the imputation are in this study.",
        "No candidate of this study estimates the risk.",
        "set beside naive",
        "1 candidate was",
    ):
        assert said in text, said
    page_of(tree_of(planted(["selection 0"], ["oracle"], 2)), tmp_path)  # a reference alone, with nothing to compare


def test_values_are_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    made = tree_of(planted(["selection +0.8", "selection 0"], QUICK, 2))
    made["settings"]["worlds"]["selection 0"]["title"] = attack
    made["settings"]["version"] = attack
    page, text = page_of(made, tmp_path)
    assert "script" not in page.tags
    assert "alert(1)" in text

"""report.html: complete, offline, escaped."""

import base64
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from escm2rec.evaluation.html import METRICS, aligned, number, write_html
from escm2rec.evaluation.report import build_report
from tests.evaluation_world import simulated

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects headings, links and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.images: list[str] = []
        self.outside: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.images.append(value or "")
            elif name in {"src", "href", "action"}:
                self.outside.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"h1", "h2"}:
            self.headings.append(data)


def page_of(report: dict[str, Any], folder: Path, title: str = "A title") -> tuple[Page, str]:
    write_html(report, folder / "report.html", title)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    return Page(text), text


def test_a_full_report_is_one_page_without_scripts_or_hosts(tmp_path: Path) -> None:
    made = build_report(simulated(), by=["scene"], user="user")
    page, text = page_of({**made, "run": {"objective": "ips", "step": 12000, "lambda": {"cvr": 0.1}, "resumed": None}}, tmp_path)
    sections = [
        "Metrics",
        "CVR against the known truth",
        "Calibration",
        "Ranking",
        "Propensity",
        "Ranking within users, by user",
        "By scene",
    ]
    assert page.headings == ["A title", *sections, "What the words mean"]
    assert len(page.images) == 8
    for image in page.images:
        drawn = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).decode()
        assert "<svg" in drawn
        assert "<script" not in drawn
    assert page.outside == []
    assert "script" not in page.tags
    assert re.findall(r"https?://|@import|url\(", text) == []
    for said in (
        "4,000 impressions",
        "12,000",
        "{&quot;cvr&quot;: 0.1}",
        number(made["cvr_clicked"]["auc"]),
        number(made["cvr_unclicked"]["kl"]),
    ):
        assert said in text, said


def test_a_report_on_random_impressions_tells_of_them_only(tmp_path: Path) -> None:
    made = build_report(simulated(truth=False).with_columns(click=pl.lit(1)), by=["scene"], user="user", at_random=True)
    page, text = page_of(made, tmp_path)
    sections = ["Metrics", "Calibration", "Ranking", "Ranking within users, by user", "By scene"]
    assert page.headings == ["A title", *sections, "What the words mean"]
    assert len(page.images) == 2
    tables = text.split("<h2>What the words mean")[0]
    assert f"4,000 impressions at random · {made['conversions']:,} conversions ({number(made['conversions'] / 40, 3)}%)" in tables
    assert "CVR, random impressions" in tables
    assert re.findall(r">(\w+@\d)<", tables) == ["NDCG@5", "DCG@2", "DCG@4", "DCG@6", "Recall@2", "Recall@4", "Recall@6"]
    assert number(made["ranking_per_user"]["cvr"]["recall_at_6"]) in tables
    assert "CTR, all" not in tables
    assert "clicks" not in tables


def test_the_same_report_gives_the_same_page(tmp_path: Path) -> None:
    made = build_report(simulated(500))
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pages.append(page_of(made, tmp_path / name)[1])
    assert pages[0] == pages[1]


def test_values_are_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    frame = simulated(500).with_columns(pl.lit(attack).alias("kept.<i>scene"), pl.lit(1).alias("kept.<u>"))
    made = build_report(frame, by=["<i>scene"], user="<u>")
    made["run"] = {attack: attack, "nested": {"a": attack}}
    made["propensity"][attack] = attack
    page, text = page_of(made, tmp_path, title=attack)
    assert "script" not in page.tags
    assert {"i", "u"}.isdisjoint(page.tags)
    assert "alert(1)" in text


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_a_report_with_nothing_to_show_says_why(rows: int, tmp_path: Path) -> None:
    none = simulated(rows, truth=False).with_columns(click=pl.lit(0), conversion=pl.lit(0), weight=pl.lit(2.0))
    page, text = page_of(build_report(none, by=["scene"], user="user"), tmp_path)
    assert page.images == []
    assert f"CTR, all impressions: no {'AUC' if rows else 'mean predicted'}" in text
    assert ("(no positives)" if rows else "(no impressions)") in text
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.S).lower().split()


@pytest.mark.parametrize(("split", "kind"), [("validation", "bad"), ("test", "soft")])
def test_what_is_said_of_a_choice_warns_on_the_split_that_chose(split: str, kind: str, tmp_path: Path) -> None:
    made = build_report(simulated(200)) | {"run": {"split": split}, "choice": {"says": "Chosen <of> 3."}}
    _, text = page_of(made, tmp_path)
    assert f'<p class="{kind}">Chosen &lt;of&gt; 3.</p>' in text.split("</header>")[0]


def test_many_groups_are_cut_and_said_to_be(tmp_path: Path) -> None:
    made = build_report(simulated(), by=["user"])
    made["groups"]["user"] |= {"groups_left_out": 7, "impressions_left_out": 1234}
    _, text = page_of(made, tmp_path)
    assert "The 100 largest of 200 reported groups; the others are in report.json." in text
    assert "7 smaller groups with 1,234 impressions are not reported." in text
    assert text.split("<h2>By user")[1].count("<tr>") == 101


def diagnosed(features: int, **weights: Any) -> dict[str, Any]:
    """A report with what `evaluate` adds on weights and balance; feature 0 is the worst after weighting."""
    made = build_report(simulated(500))
    rows = [{"feature": f"feature <{index}>", "before": 0.04, "after": 0.2 - index / 1000} for index in range(features)]
    said: dict[str, Any] = {
        "floor": 0.01,
        "num_clicked": 150,
        "effective_sample_size": 100.0,
        "effective_share": 2 / 3,
        "floor_share": 0.25,
    }
    said |= {"mean_weight": 1.02, "mean_weight_expected": 0.99, "mean_weight_interval": [0.95, 1.03], "mean_weight_off": False}
    said |= {"largest_share": None, "floor_binds_for_most": False, "weighs": True, "own_tower": False, **weights}
    made["propensity"] |= {"weights": said, "balance": {"features": rows}}
    return made


def test_weights_and_balance_are_told_worst_first_and_cut(tmp_path: Path) -> None:
    page, text = page_of(diagnosed(101), tmp_path)
    assert "h3" in page.tags
    balance = text.split("Balance of clicked and all impressions")[1].split("<h2>")[0]
    assert balance.count("<tr>") == 31
    assert re.findall(r"feature &lt;(\d+)&gt;", balance) == [str(index) for index in range(30)]
    assert "The 30 of 101 features that differ most after weighting; the others are in report.json." in balance
    assert '<span class="good">0.040 ✓</span>' in balance
    assert '<span class="bad">0.200 ✗</span>' in balance
    assert "Chance alone leaves about 0.10 after weighting" in balance
    weights = text.split("<h3>Weights")[1].split("<h3>")[0]
    for name, value in {"effective sample size": "100.0", "share of clicks at the floor": "0.2500", "largest weight's share": "–"}.items():
        assert f"<dt>{escape(name)}</dt><dd>{value}</dd>" in weights
    assert "<dt>mean weight</dt><dd>1.020, expected 0.950 to 1.030 ✓</dd>" in weights
    assert "not what" not in weights
    assert "The floor keeps" not in weights
    assert "✗ marks one outside of that and more than 10% off." in weights
    assert "pooled standard deviation, the root of the mean of both variances" in balance
    assert "binds for most" not in weights
    assert "weighs nothing" not in weights
    assert "tower" not in weights


def test_a_floor_that_binds_and_weights_without_use_are_said(tmp_path: Path) -> None:
    _, text = page_of(diagnosed(3, floor_binds_for_most=True, weighs=False, own_tower=True), tmp_path)
    assert "The floor binds for most clicked impressions" in text
    assert "Lower objective.propensity.floor, or make it relative" in text
    assert "The objective of this run weighs nothing by them." in text
    assert "q is of a propensity tower of its own, the tenths above are of the CTR tower." in text
    assert "features that differ most" not in text


@pytest.mark.parametrize(("mean", "said"), [(0.7, "rarer than it says"), (1.4, "more frequent than it says")])
def test_a_mean_weight_that_misses_the_expected_one_is_a_warning(mean: float, said: str, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "mean_weight": mean,
        "mean_weight_expected": 0.8,
        "mean_weight_interval": [0.75, 0.85],
        "mean_weight_off": True,
    }
    _, text = page_of(diagnosed(1, **wrong), tmp_path)
    assert f"<dd>{number(mean)}, expected 0.750 to 0.850 ✗</dd>" in text
    assert f'<span class="bad">The mean weight is not what p̂ makes it: clicks are {said}' in text
    assert "propensity.calibration may mend it" in text
    assert "The floor keeps the mean weight at 0.80, however right p̂ is" in text
    _, text = page_of(diagnosed(1, **wrong, own_tower=True), tmp_path)
    assert "propensity.calibration may mend it" not in text, "a tower of its own takes no calibration"


def test_without_a_click_the_mean_weight_has_no_mark(tmp_path: Path) -> None:
    _, text = page_of(diagnosed(1, mean_weight=0.0, mean_weight_expected=None, mean_weight_interval=None), tmp_path)
    assert "<dt>mean weight</dt><dd>0</dd>" in text


def test_metrics_against_the_truth_are_explained_where_they_are(tmp_path: Path) -> None:
    """KL and RMSE of CTR and of CVR, each beside its figures; a log without truth has none to explain."""
    _, text = page_of(build_report(simulated(500), by=["scene"]), tmp_path)
    for heading in ("CVR against the known truth", "Propensity"):
        part = text.split(f"<h2>{heading}")[1].split("<h2>")[0]
        for name in ("KL", "RMSE", "Bias"):
            assert f"<b>{name}</b>: {METRICS[name]}" in part
    assert "KL the mean divergence from it" in text.split("<h2>By scene")[1]
    _, real = page_of(build_report(simulated(500, truth=False), by=["scene"]), tmp_path)
    assert "<b>KL</b>" not in real
    assert "KL the mean divergence" not in real


def test_numbers_have_four_significant_digits_and_aligned_points() -> None:
    values = {0.123456: "0.1235", 12.3456: "12.35", 1.0: "1.000", 0.99999: "1.000", 123456.0: "123,456", 0.00012345: "0.0001234"}
    values |= {3.21e-7: "3.210×10⁻⁷", 1.5e9: "1.500×10⁹", 0.0: "0", -0.5: "-0.5000"}
    assert {value: number(value) for value in values} == values
    assert (number(1234567), number(None), number(12345.678)) == ("1,234,567", "–", "12,346")
    pad = '<span class="pad" aria-hidden="true">'
    assert aligned([0.01234, 1.234, 12]) == ["0.01234", f"1.234{pad}00</span>", f"12{pad}.00000</span>"]
    assert aligned([1.5, None]) == ["1.500", '<span class="none">–</span>']

"""`ratings.html`: the study on a ratings file as one page that opens offline and explains itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from escm2rec.evaluation import html
from escm2rec.evaluation.html import number, table

TITLE = "Estimating the risk of a CVR model"

ESTIMATES = {
    "naive": "Mean error of the observed cells. Right only if what is observed is like what is not.",
    "direct": "Mean imputed error of all cells. The imputation knows no propensity.",
    "EIB": "Observed errors where there are some, imputed ones elsewhere (error imputation based).",
    "IPS": "Observed errors, each over its estimated propensity, over the number of cells (inverse propensity scoring).",
    "SNIPS": "IPS over the sum of its weights instead of the number of cells (self-normalised).",
    "DR-JL": "Imputed errors of all cells, plus observed minus imputed error over the estimated propensity (doubly robust). The imputation "
    "is fitted by least squares with weight 1 / q.",
    "MRDR": "The same, fitted with weight (1 - q) / q², which makes the variance least if q is right (more robust doubly robust).",
}
PREDICTIONS = {
    "ONE": "The true CVR, but as many cells of CVR 0.1 as there are of 0.9 are predicted as 0.9.",
    "THREE": "The same with cells of CVR 0.3.",
    "FIVE": "The same with cells of CVR 0.5.",
    "SKEW": "Normal around the true CVR with standard deviation (1 - CVR) / 2, clipped to 0.1 to 0.9.",
    "CRS": "Coarse: 0.2 where the true CVR is at most 0.6, else 0.6.",
}


def write_page(tree: Mapping[str, Any], path: Path) -> None:
    """Write the page of what `ratings_study` found."""
    sections = (_header(tree), _relative_errors(tree["results"]), _biases(tree["results"]), _protocol(tree), _words())
    html.write_page(path, TITLE, sections)


def _header(tree: Mapping[str, Any]) -> str:
    data, draws = tree["data"], tree["draws"]
    parts = (f"{data['ratings']:,} ratings", f"{data['users']:,} users", f"{data['items']:,} items", f"{data['cells']:,} cells")
    facts = {
        "ratings": data["file"],
        "draws": f"{tree['protocol']['draws']:,}, seed {tree['protocol']['seed']}",
        "observed cells, mean over draws": f"{mean(draws['observed']):,.0f}",
        "RMSE of the completion, given ratings": number(tree["completion"]["rmse"], 3),
    }
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    return f'<header><h1>{TITLE}</h1><p class="soft">{" · ".join(parts)}</p><dl class="facts">{cells}</dl></header>'


def _relative_errors(results: Mapping[str, Any]) -> str:
    columns = []
    for found in results.values():
        columns.append([_mean(record) for record in found.values()])
        columns.append([f'<span class="soft">{_range(record["interval"])}</span>' for record in found.values()])
    said = (
        "How far the estimated risk is from the true risk, in percent of the true risk: mean over the draws, and its 95% interval (by "
        "Student's t, cut at 0, which no such error is below). Smaller is better. <b>Bold</b> is the least, ≈ not shown to differ from it "
        "(the 95% interval of the paired difference holds 0)."
    )
    spans = [("", 1), *((name, 2) for name in results)]
    body = table(["Estimator", *(["Mean", "95% interval"] * len(results))], list(next(iter(results.values()))), columns, spans)
    return f"<h2>Relative error of the estimated risk, %</h2><p>{said}</p>{body}"


def _biases(results: Mapping[str, Any]) -> str:
    columns = [[_bias_interval(record["bias_interval"]) for record in found.values()] for found in results.values()]
    said = (
        "The 95% interval of the mean with its sign, so that errors of draws cancel unless they go one way: below 0 the risk is "
        "estimated too low. Where the interval holds 0 (✓), no bias is shown. Propensities are estimated wrongly on purpose, so weighting "
        "leaves some."
    )
    body = table(["Estimator", *results], list(next(iter(results.values()))), columns)
    return f"<h2>Bias of the estimated risk, %</h2><p>{said}</p>{body}"


def _mean(record: Mapping[str, Any]) -> str:
    text = f"{100 * record['relative_error']:.2f}"
    if record["best"]:
        return f"<b>{text}</b>"
    return f"≈ {text}" if record["level_with_best"] else text


def _range(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


def _bias_interval(interval: Sequence[float]) -> str:
    low, high = interval
    kind, mark, meaning = ("good", "✓", "0 is inside") if low <= 0 <= high else ("bad", "✗", "0 is outside")
    text = f"{100 * low:+.2f} to {100 * high:+.2f}".replace("-", "−")
    return f'<span class="{kind}" title="{meaning}">{text} {mark}</span>'


def _protocol(tree: Mapping[str, Any]) -> str:
    protocol, risks = tree["protocol"], tree["draws"]["true_risks"]
    levels = ", ".join(f"{cvr:g} ({share:.0%})" for cvr, share in zip(protocol["cvrs"], protocol["shares"], strict=True))
    steps = (
        "A matrix factorisation gives every user and item a rating. Ordered by it, the cells are given a true conversion rate (CVR): "
        f"{levels} of the cells.",
        f"A cell is observed with a propensity that halves with each step of CVR below 0.7, {protocol['observed_share']:.0%} on average: "
        "what converts is seen more often.",
        "In each draw it is drawn afresh which cells are observed, and whether each converts. Estimators see the conversions of observed "
        "cells only; the true risk is the mean error (BCE, in nats) of all.",
        "The estimated propensity q is wrong on purpose: 1 / q is a mixture of the true 1 / p and of 1 / (share observed), in proportions "
        "drawn at random in each draw.",
        "The imputed error of a cell is that of one label for all cells, fitted to the conversions of observed cells.",
    )
    true = ", ".join(f"{name} {number(mean(values), 4)}" for name, values in risks.items())
    listed = "".join(f"<li>{step}</li>" for step in steps)
    said = "The semi-synthetic protocol of DR-JL (ICML 2019) and MRDR (SIGIR 2021)."
    return f"<h2>What was done</h2><p>{said}</p><ul>{listed}</ul><p>Mean true risk: {true}.</p>"


def _words() -> str:
    def entries(words: Mapping[str, str]) -> str:
        return "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in words.items())

    return (
        f"<h2>The estimators</h2><dl class='words'>{entries(ESTIMATES)}</dl>"
        f"<h2>The predictions that are judged</h2><dl class='words'>{entries(PREDICTIONS)}</dl>"
    )

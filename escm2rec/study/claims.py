"""The three claims of the ESCM² paper: ESMM's CVR is biased, risks are unbiased under the true propensity, and CVR converges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from escm2rec.study.finding import DR, IPS, LINES, Finding, Table, Tree, counted, mean_of, spread
from escm2rec.study.presets import BASE

RISK_CANDIDATES = (
    ("naive", "none"),
    ("direct", "in the imputation"),
    ("escm2-ips true q", "true"),
    ("escm2-dr true q", "true"),
    (IPS, "learned"),
    ("escm2-snips", "learned"),
    (DR, "learned"),
)
WRONG = {"q too flat": "too flat", "q too steep": "too steep"}


def line(tree: Tree, field: str) -> list[tuple[float, str]]:
    """The base world and those that differ from it in one field alone: value and name, by value."""
    worlds = tree["settings"]["worlds"]
    fixed = [name for name in worlds.get(BASE.name, ()) if name not in ("name", "dial", "title", field)]
    same = [name for name in tree["means"] if fixed and all(worlds[name][each] == worlds[BASE.name][each] for each in fixed)]
    return sorted((worlds[name][field], name) for name in same)


def esmm_bias(tree: Tree) -> Finding:
    """Claim 1, with the sign."""
    worlds = tree["settings"]["worlds"]
    said = []
    groups = {"better": [w for w in tree["means"] if worlds[w]["selection"] > 0 or worlds[w]["hidden"] > 0]}
    groups["worse"] = [w for w in tree["means"] if worlds[w]["selection"] < 0]
    groups["alike"] = [w for w in tree["means"] if w not in groups["better"] + groups["worse"]]
    for words, members in groups.items():
        records = [each for world in members if (each := mean_of(tree, world, "esmm", "cvr_over_truth")) and each["low"] is not None]
        if records:
            above, below = sum(each["low"] > 1 for each in records), sum(each["high"] < 1 for each in records)
            least, most = min(each["mean"] for each in records), max(each["mean"] for each in records)
            span = " to ".join(dict.fromkeys((f"{least:.2f}", f"{most:.2f}"))).replace("-", "−") + " times"
            worlds_are = "the one world" if len(records) == 1 else f"the {len(records)} worlds"
            said.append(
                f"in {worlds_are} where clicked impressions convert {words} it is {span} the truth (above 1 in {above}, below in {below})"
            )
    found = [f"ESMM's mean CVR over all impressions: {'; '.join(said)}."] if said else ["ESMM is not in this study."]
    shown = [name for name in LINES if any(name in of_world for of_world in tree["means"].values())]
    dial = [name for name, world in worlds.items() if world["dial"] == "selection" and name in tree["means"]] or list(tree["means"])
    rows = [[world, *(spread(mean_of(tree, world, name, "cvr_over_truth")) for name in shown)] for world in dial]
    how = (
        "ESMM never looks at CVR alone, so nothing keeps its CVR right where nobody clicked (Theorem 1 of ESCM²: too high). Mean "
        "predicted over mean true CVR of all impressions, with 95% intervals over seeds; 1 is right."
    )
    return Finding(
        "Claim 1: ESMM's CVR is biased", "Claim 1, ESMM's bias", how, found, Table(("World", *(LINES[name] for name in shown)), rows)
    )


def unbiased_rows(tree: Tree) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Candidate, propensity and error of the risk: in the base world (else the first), with a wrong propensity in worlds of their own."""
    base = BASE.name if BASE.name in tree["means"] else next(iter(tree["means"]))
    found = [(name, q, each) for name, q in RISK_CANDIDATES if (each := mean_of(tree, base, name, "risk_error"))]
    for world, q in WRONG.items():
        if world in tree["means"] and base == BASE.name:
            found += [(name, q, each) for name in (IPS, DR) if (each := mean_of(tree, world, name, "risk_error"))]
    return found


def unbiased(tree: Tree) -> Finding:
    """Claim 2, with true, learned and wrong propensities."""
    base = BASE.name if BASE.name in tree["means"] else next(iter(tree["means"]))
    usual = [world for world in tree["means"] if world not in WRONG]
    rows, said = [], []
    for name, q, record in unbiased_rows(tree):
        row = [name, q, spread(record, 1, 100, "+")]
        if q in WRONG.values():
            row += ["–", "–"]
        else:
            all_worlds = [each for world in usual if (each := mean_of(tree, world, name, "risk_error")) and each["low"] is not None]
            holds = sum(each["low"] <= 0 <= each["high"] for each in all_worlds)
            size = float(np.mean([abs(each["mean"]) for each in all_worlds])) if all_worlds else math.nan
            row += [f"{100 * size:.1f}", f"{holds} of {len(all_worlds)}"]
            if name in ("naive", IPS, DR, "escm2-ips true q", "escm2-dr true q"):
                said.append(f"{name} {100 * size:.1f}% ({holds} of {len(all_worlds)})")
        rows.append(row)
    found = ["No candidate of this study estimates the risk."]
    if said:
        found = [
            f"Mean size of the error of the estimated risk over {counted(len(usual), 'world')}, and in how many 0 is in its interval: "
            f"{', '.join(said)}."
        ]
    wrong = [f"{name}, q {q}: {spread(each, 1, 100, '+')}%" for name, q, each in unbiased_rows(tree) if q in WRONG.values()]
    found += (
        [f"With a wrong propensity in {base}: {'; '.join(wrong)}."] if wrong else ["Worlds with a wrong propensity are not in this study."]
    )
    if said and not any(q == "true" for _, q, _ in unbiased_rows(tree)):
        found.append("No candidate of this study has the true propensity: it shows learned ones, the claim is of accurate ones.")
    head = ("Estimator", "Propensity q", f"Error, %, in\n{base}", "Mean size,\nall worlds, %", "0 inside\nthe interval")
    how = (
        "The CVR loss of an objective is an estimate of the model's risk (log loss) on all impressions, made from clicked ones. Its "
        "relative error on fresh impressions, in percent, with 95% intervals over seeds: 0 is unbiased, below 0 the risk is made too "
        "small. IPS and DR promise 0 if q is right."
    )
    return Finding(
        "Claim 2: with accurate propensities the risk is unbiased", "Claim 2, unbiasedness", how, found, Table(head, rows, (0, 1))
    )


def convergence(tree: Tree) -> Finding:
    """Claim 3, over the size of the log."""
    title = "Claim 3: with more data the CVR converges to the counterfactual one"
    how = (
        "KL less that of the oracle, which is trained on the conversion of every impression with the same towers: what is lost by "
        "seeing clicks only. With 95% intervals over seeds; 0 is the goal."
    )
    sizes = line(tree, "impressions")
    shown = [name for name in LINES if sizes and mean_of(tree, sizes[0][1], name, "kl_excess")]
    if len(sizes) < 2 or not shown:
        return Finding(
            title, "Claim 3, convergence", how, ["The study holds one size of log or no oracle, so it says nothing of convergence."]
        )
    rows, said = [], []
    for name in shown:
        records = [mean_of(tree, world, name, "kl_excess") for _, world in sizes]
        rows.append([LINES[name], *(spread(each, 4) for each in records)])
        if records[0] and records[-1]:
            said.append(f"{LINES[name]} from {records[0]['mean']:.4f} to {records[-1]['mean']:.4f}")
    found = [f"KL above the oracle's, from {sizes[0][0]:,.0f} to {sizes[-1][0]:,.0f} impressions: {', '.join(said)}.".replace("-", "−")]
    return Finding(
        title, "Claim 3, convergence", how, found, Table(("Candidate", *(f"{size:,.0f}\nimpressions" for size, _ in sizes)), rows)
    )

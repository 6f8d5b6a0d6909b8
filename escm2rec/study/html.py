"""`study.html`: what a study found, as one page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from escm2rec.evaluation.html import facts, figure, note, number, table, write_page
from escm2rec.study.claims import WRONG, line, unbiased_rows
from escm2rec.study.finding import DR, IPS, LINES, Finding, Table, Tree, counted
from escm2rec.study.findings import findings, situation
from escm2rec.study.plots import Dot, dot_plot, line_plot

TITLE = "CVR objectives where the truth is known"
METRICS = {
    "kl": "KL",
    "kl_unclicked": "KL,\nunclicked",
    "kl_excess": "KL less\noracle's",
    "cvr_over_truth": "CVR /\ntruth",
    "cvr_over_truth_unclicked": "CVR / truth,\nunclicked",
    "rmse": "RMSE",
    "rmse_unclicked": "RMSE,\nunclicked",
    "true_risk": "True\nrisk",
    "risk_error": "Error of\nthe risk",
    "cvr_auc_entire": "CVR AUC,\nall",
    "ctcvr_auc": "CTCVR\nAUC",
    "ctr_calibration": "CTR\ncalibration",
    "cvr_clicked_calibration": "CVR calibr.,\nclicked",
    "ctcvr_calibration": "CTCVR\ncalibration",
    "ctr_kl": "CTR\nKL",
    "priority": "Priority\nslope",
    "effective_share": "Effective\nshare",
    "mean_weight": "Mean\nweight",
    "heldout_snips": "SNIPS risk,\nheld out",
    "heldout_dr": "DR risk,\nheld out",
    "heldout_snips_flexible": "SNIPS risk,\nflexible judge",
    "heldout_dr_flexible": "DR risk,\nflexible judge",
    "heldout_auc_clicked": "AUC clicked,\nheld out",
}
WORDS = {
    "KL": "Mean Kullback-Leibler divergence from the true to the predicted CVR over fresh impressions, in nats. Unclicked: each impression "
    "weighs its chance of not being clicked.",
    "CVR / truth": "Mean predicted over mean true CVR: the estimation bias. 1 is right.",
    "True risk, and its error": "The log loss of the prediction on all impressions, and by which share the objective's own loss misses "
    "it. The oracle's is measured with clicks alone, which it was not trained on.",
    "Priority slope": "Independence priority: the slope of the predicted CVR logit on the true click logit, beside the true CVR logit. 0 "
    "is a prediction that follows conversion alone and ignores the click; a tower too small for the truth is not at 0 even as the "
    "oracle.",
    "Effective share": "Effective sample size of the weights over the number of clicks. Mean weight: of o / q over all impressions, 1 if "
    "q is right.",
    "Naive, control": "Naive learns CVR from clicked impressions alone. The control, naive+ctcvr, adds ESMM's loss: what an objective of "
    "ESCM² has beyond it is the correction.",
    "Oracle, true q": "References, not candidates: trained on the conversion of every impression, or given the true click probability as "
    "q. No log holds either.",
    "Level": "Holm's adjusted p of the paired t-test on log KL is at least 0.05: no difference is shown, which is no proof that there is "
    "none. The best is found on the seeds that test it, so the others look a little worse than they are.",
    "95% interval": "Of the mean over seeds, by Student's t. Ratios are geometric means over seeds.",
}
DIALS = {
    "ctr": ("share of impressions clicked", "x"),
    "click_std": ("spread of the click logit: overlap falls", ""),
    "slope": ("slope put on the logit of q: 1 is right", ""),
}
"""Further dials: field of a world, its name, logarithmic axes besides y."""


def write_study_page(tree: Tree, path: Path) -> None:
    """Write the page of what `study.json` holds; the same study gives the same bytes."""
    plots = {"Which objective when": _by_world, "Claim 1": _bias_plots, "Claim 2": _risk_plots, "Claim 3": _size_plots}
    sections = [_header(tree)]
    for finding in findings(tree):
        drawn = next((plot(tree) for start, plot in plots.items() if finding.title.startswith(start)), "")
        sections.append(_section(finding, drawn))
    write_page(path, TITLE, (*sections, _dials(tree), _all_numbers(tree), _words()))


def _header(tree: Tree) -> str:
    names = dict.fromkeys(name for of_world in tree["means"].values() for name in of_world)
    seeds = tree["seeds"]
    cells = sum(seeds[world] * len(of_world) for world, of_world in tree["means"].items())
    parts = " · ".join(counted(*each) for each in ((len(tree["means"]), "world"), (len(names), "candidate"), (cells, "trained model")))
    constants = tree["settings"]["constants"]
    passes, of_ids = (f"{constants[f'EPOCHS{kind}']}, {constants[f'BATCH_ROWS{kind}']:,}" for kind in ("", "_OF_IDS"))
    known = {
        "version": tree["settings"]["version"],
        "seeds a world": ", ".join(str(count) for count in sorted(set(seeds.values()))),
        "passes, rows a batch": f"{passes} (in worlds of ids {of_ids})",
        "fresh impressions": f"{constants['FRESH_ROWS']:,}",
    }
    return f'<header><h1>{TITLE}</h1><p class="soft">{parts}</p>{facts(known)}</header>'


def _section(finding: Finding, drawn: str) -> str:
    how = note(escape(finding.how)) if finding.how else ""
    said = [f"<p>{escape(text)}</p>" for text in finding.found]
    if not finding.lead:  # each sentence has its own
        leads = [text.partition(": ") for text in finding.found]
        said = [f"<ul>{''.join(f'<li><b>{escape(lead)}</b>{colon}{escape(text)}</li>' for lead, colon, text in leads)}</ul>"]
    return f"<h2>{escape(finding.title)}</h2>{''.join(said)}{how}{drawn}{_table(finding.table) if finding.table else ''}"


def _table(plain: Table) -> str:
    first, *columns = ([escape(cell).replace("\n", "<br>") for cell in column] for column in zip(*plain.rows, strict=True))
    return table(plain.head, first, columns, texts=plain.texts)


def _plots(figures: Sequence[str], kind: str) -> str:
    return f'<div class="{kind}">{"".join(figures)}</div>' if figures else ""


def _by_world(tree: Tree) -> str:
    """KL of IPS and DR over that of naive and of ESMM, a row a world, ordered by situation."""
    worlds = tree["settings"]["worlds"]
    order = list(dict.fromkeys(situation(worlds[name]) for name in tree["means"]))
    rows = sorted(tree["means"], key=lambda name: order.index(situation(worlds[name])))
    figures = []
    for baseline in ("naive", "esmm"):
        found = [(world, name, tree["against"][world].get(name, {}).get(baseline)) for world in rows for name in (IPS, DR)]
        dots = [Dot(world, LINES[name], test["kl"]) for world, name, test in found if test]
        shown = [world for world in rows if any(dot.row == world for dot in dots)]
        breaks = [i for i in range(1, len(shown)) if situation(worlds[shown[i]]) != situation(worlds[shown[i - 1]])]
        if dots:
            other = LINES[baseline]
            source = dot_plot(shown, dots, f"KL over that of {other}: left of 1 the correction is better", at=1.0, log=True, breaks=breaks)
            figures.append(figure(f"Beside {other}", "ratio of KL and 95% interval, by world", source))
    return _plots(figures, "plots two")


def _series(tree: Tree, points: Sequence[tuple[float, str]], metric: str) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    found = {
        short: [(x, record) for x, world in points if (record := tree["means"][world].get(name, {}).get(metric))]
        for name, short in LINES.items()
    }
    return {short: places for short, places in found.items() if len(places) > 1}


def _bias_plots(tree: Tree) -> str:
    points = line(tree, "selection")
    if len(points) < 2:
        return note("No plot: the study holds fewer than two strengths of selection.")
    xlabel = "selection: clicked convert worse (−) or better (+)"
    shown = {
        "cvr_over_truth": ("All impressions", "mean predicted over true CVR", 1.0, ""),
        "cvr_over_truth_unclicked": ("Where nobody clicked", "mean predicted over true CVR", 1.0, ""),
        "kl": ("The error that is left", "KL", None, "y"),
    }
    ticks = {x: f"{x:+g}".replace("-", "−") if x else "0" for x, _ in points}
    figures = []
    for metric, (name, ylabel, at, log) in shown.items():
        series = _series(tree, points, metric)
        if series:
            figures.append(figure(name, f"{ylabel}, 95% intervals", line_plot(series, xlabel, ylabel, at, log, ticks)))
    return _plots(figures, "plots")


def _risk_plots(tree: Tree) -> str:
    found = unbiased_rows(tree)
    short = {"naive": "naive", "direct": "control"}
    rows, dots = [], []
    for name, q, record in found:
        row = name.removesuffix(" true q") + ("" if q == "none" else f", q {q}")
        rows.append(row)
        dots.append(Dot(row, short.get(name, "DR" if "dr" in name else "IPS"), record))
    figures = [
        figure(
            "Error of the estimated risk",
            "percent of the true risk, and 95% interval",
            dot_plot(rows, dots, "error of the risk, %: left of 0 too small, right too great", 0.0, scale=100, named=False),
        )
    ]
    true = [("escm2-ips true q", "IPS"), ("escm2-dr true q", "DR")]
    across = [
        Dot(world, name, each)
        for world in tree["means"]
        if world not in WRONG
        for key, name in true
        if (each := tree["means"][world].get(key, {}).get("risk_error"))
    ]
    if across:
        shown = [world for world in tree["means"] if any(dot.row == world for dot in across)]
        figures.append(
            figure(
                "With the true propensity, in every world",
                "percent of the true risk, and 95% interval",
                dot_plot(shown, across, "error of the risk, %", 0.0, scale=100),
            )
        )
    return _plots(figures, "plots two")


def _size_plots(tree: Tree) -> str:
    points = line(tree, "impressions")
    series = _series(tree, points, "kl_excess")
    if not series:
        return ""
    ticks = {x: f"{x / 1000:g}k" for x, _ in points}
    excess = line_plot(series, "impressions in the log", "KL less the oracle's", log="xy", ticks=ticks)
    bias = line_plot(
        _series(tree, points, "cvr_over_truth"), "impressions in the log", "mean predicted over mean true CVR", 1.0, "x", ticks
    )
    figures = [
        figure("KL above the oracle's", "and 95% interval; both axes logarithmic", excess),
        figure("Mean CVR over truth", "and 95% interval", bias),
    ]
    return _plots(figures, "plots")


def _dials(tree: Tree) -> str:
    figures = []
    for field, (words, log) in DIALS.items():
        points = line(tree, field)
        series = _series(tree, points, "kl")
        if len(points) > 1 and series:
            ticks = {x: f"{100 * x:g}%" if field == "ctr" else f"{x:g}" for x, _ in points}
            figures.append(
                figure(words[0].upper() + words[1:], "KL, and 95% interval", line_plot(series, words, "KL", log=f"{log}y", ticks=ticks))
            )
    return (
        f"<h2>Other dials</h2>{note('KL over all impressions as one dial of the base world is turned.')}{_plots(figures, 'plots')}"
        if figures
        else ""
    )


def _all_numbers(tree: Tree) -> str:
    """Every candidate and the metrics that say something alone, a folded table a world."""
    parts = []
    for world, of_world in tree["means"].items():
        about = tree["settings"]["worlds"][world]
        metrics = [metric for metric in METRICS if any(metric in found for found in of_world.values())]
        columns = [[_plus_minus(found.get(metric)) for found in of_world.values()] for metric in metrics]
        body = table(["Candidate", *(METRICS[metric] for metric in metrics)], [escape(name) for name in of_world], columns)
        settings = ", ".join(f"{name} {value}" for name, value in about.items() if name not in ("name", "title", "dial"))
        head = f"<b>{escape(world)}</b>: {escape(about['title'])}, {tree['seeds'][world]} seeds"
        parts.append(f"<details><summary>{head}</summary>{note(escape(settings))}{body}</details>")
    said = "Mean over seeds, ± half of its 95% interval. A dash: the candidate has no such number."
    return f"<h2>All numbers</h2>{note(said)}{''.join(parts)}"


def _plus_minus(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return '<span class="none">–</span>'
    text = number(record["mean"]).replace("-", "−")
    return text if record["low"] is None else f'{text} <span class="soft">± {number((record["high"] - record["low"]) / 2, 2)}</span>'


def _words() -> str:
    entries = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in WORDS.items())
    return f"<h2>What the words mean</h2><dl class='words'>{entries}</dl>"

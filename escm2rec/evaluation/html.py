"""`report.html`: a report as one page that opens offline, prints, and explains itself to a reader who is no expert."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from escm2rec.evaluation.balance import BALANCED, WEIGHT_TOLERANCE
from escm2rec.evaluation.plots import calibration_plot, roc_plot
from escm2rec.evaluation.report import OBSERVED, Record
from escm2rec.evaluation.user_ranking import RANKING_METRICS

MAX_GROUPS_SHOWN = 100
"""Groups of one column on the page; report.json holds more."""
MAX_FEATURES_SHOWN = 30
"""Features whose balance is on the page; report.json holds all."""
KNOWN = ("cvr_entire", "cvr_unclicked")

ABBREVIATIONS = ("auc", "ctr", "ctcvr", "cvr", "dcg", "ece", "kl", "ks", "ndcg", "rmse")

NAMES = {
    "ctr": "CTR, all impressions",
    "ctcvr": "CTCVR, all impressions",
    "cvr_clicked": "CVR, clicked impressions",
    "cvr_entire": "CVR and truth, all impressions",
    "cvr_unclicked": "CVR and truth, unclicked impressions",
    "cvr": "CVR, random impressions",
}
POPULATIONS = {
    "CTR, all impressions": "Will the impression be clicked? Measured on every impression.",
    "CTCVR, all impressions": "Will it be clicked and then convert? The product of both predictions, measured on every impression.",
    "CVR, clicked impressions": "Once clicked, will it convert? Logs show this for clicked impressions only, so only they are measured. "
    "Clicked impressions are not like the others: this says nothing certain about the rest.",
    "CVR and truth": "Simulated logs come with the true conversion probability of every impression, so that the "
    "prediction can be judged where nobody clicked: what ESCM² is for. Real logs cannot show this.",
    "CVR, random impressions": "Will it convert? Of rating sets whose test items were drawn at random and all rated, so that clicks have "
    "selected nothing: what holds here holds for all impressions.",
}
WEIGHTS = {
    "num_clicked": "clicked impressions",
    "effective_sample_size": "effective sample size",
    "effective_share": "effective share",
    "mean_weight": "mean weight",
    "largest_share": "largest weight's share",
    "floor": "floor",
    "floor_share": "share of clicks at the floor",
    "slope": "calibration, slope of the logit",
    "shift": "calibration, shift of the logit",
}
METRICS = {
    "AUC": "The chance that a random positive is ranked above a random negative. 0.5 is guessing, 1 is perfect. Says nothing about the "
    "size of the predictions. Against the truth, it is the AUC to be expected from labels drawn with the true probabilities; "
    "even a perfect model then stays below 1.",
    "Log loss": "Mean penalty of the predicted probabilities, in nats; smaller is better. Compare only on the same data: it depends on "
    "the base rate.",
    "Normalized entropy": "Log loss divided by that of always predicting the base rate. Below 1 beats the base rate; smaller is better.",
    "Calibration": "Sum of predictions over number of positives. 1 is right, 1.1 predicts 10% too much. The 95% interval is what chance "
    "in the labels leaves open; where it holds 1, no miscalibration is shown. Rows of one user are not quite independent, so the true "
    "interval is somewhat wider.",
    "ECE": "Expected calibration error: mean distance between predicted and observed rate over 15 bins of equal size. It is never quite 0, "
    "even for a perfect model, as observed rates scatter.",
    "KS": "Kolmogorov-Smirnov: the largest gap between the shares of positives and of negatives found above one threshold. 0 is no "
    "separation, 1 is perfect.",
    "KL": "Mean Kullback-Leibler divergence from the true probability to the predicted one, in nats: the log loss that a perfect model "
    "would save. 0 is perfect.",
    "RMSE": "Root mean square distance between predicted and true probability.",
    "Bias": "Mean predicted over mean true probability (ratio), and their difference. 1 and 0 are right.",
    "GAUC": "AUC within each user, averaged by impressions: can the model order what one person sees? Users without both a positive and a "
    "negative are left out.",
    "NDCG, DCG, Recall": "Of the first k impressions of each user, by falling prediction. Recall@k is the share of the user's "
    "positives that are there, DCG@k adds 1 / log2(position + 1) for each, NDCG@k divides that by the best possible. Means over users "
    "with a positive; equal predictions share their positions.",
    "Propensity": "The predicted click probability, as the weight that ESCM² corrects selection by. Where it is wrong, the correction is.",
    "Weights": "A clicked impression weighs 1 / q, q the propensity p̂, at least the floor: it stands for all impressions like it. The "
    "mean weight, over all impressions, is 1 if p̂ is right and the floor never binds. Expected: what it is, with a 95% interval of chance "
    f"in the clicks, if each impression is clicked with p̂. ✗ marks one outside of that and more than {100 * WEIGHT_TOLERANCE:g}% off. The "
    "effective sample size is the number of equally weighted clicks that would say as much; the effective share is that over the number "
    "of clicks. Clicks at the floor all weigh the same.",
    "Balance": "How far clicked impressions differ from all impressions: the difference of two means over their pooled standard deviation, "
    "the root of the mean of both variances (before weighting in both columns, so that only the means change). Of a number: of the "
    "impressions that have it, or of the share that have none, whichever differs more. Of other features: of the share of impressions "
    "with a value, the largest of the five most frequent values, no value being one. Weights of a right propensity bring it near 0; what "
    "stays is selection that is not corrected. Below 0.1 usually counts as balance.",
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="escm2rec">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; --ink: #1c2430; --soft: #5b6573; --line: #dfe3e9; --blue: #1f5fa8; --good: #1d7046; --bad: #a8431a; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif; }}
main {{ max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }}
h1 {{ font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }}
h3 {{ font-size: 15px; margin: 26px 0 4px; }}
h2 {{ font-size: 18px; margin: 44px 0 6px; padding-top: 18px; border-top: 1px solid var(--line); }}
p {{ margin: 4px 0 14px; max-width: 78ch; }}
.soft, figcaption, caption {{ color: var(--soft); }}
ul {{ margin: 8px 0; padding-left: 20px; max-width: 88ch; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums lining-nums; font-size: 13.5px; margin: 8px 0 4px; }}
th, td {{ padding: 6px 0 6px 13px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; vertical-align: bottom; }}
thead th {{ border-bottom: 1.5px solid var(--ink); font-size: 12.5px; line-height: 1.3; }}
thead tr.spans th {{ border-bottom: 0; padding-bottom: 0; text-align: center; }}
thead tr.spans th span {{ display: block; border-bottom: 1px solid var(--soft); padding-bottom: 3px; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
tbody th {{ font-weight: 500; }}
tbody th, tbody td {{ vertical-align: top; }}
th.text, td.text {{ text-align: left; white-space: normal; min-width: 16ch; max-width: 42ch; }}
.pad {{ visibility: hidden; }}
.none {{ color: var(--soft); }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 10px 28px; margin: 22px 0 0; }}
.facts div {{ border-left: 2px solid var(--line); padding-left: 10px; min-width: 0; }}
.facts dt, dl.words dt {{ font-weight: 600; }}
.facts dt {{ font-size: 12.5px; font-weight: 500; color: var(--soft); }}
.facts dd {{ margin: 0; overflow-wrap: anywhere; }}
.plots {{ display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 18px 26px; margin-top: 12px; }}
.plots.two {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }}
.plots.two img {{ max-width: 540px; }}
figure {{ margin: 0; break-inside: avoid; }}
figure img {{ width: 100%; max-width: 360px; display: block; }}
figcaption {{ font-size: 13px; margin-bottom: 4px; }}
figcaption b {{ color: var(--ink); font-weight: 600; }}
dl.words {{ display: grid; grid-template-columns: 190px 1fr; gap: 8px 20px; margin: 10px 0 0; font-size: 14px; }}
dl.words dd {{ margin: 0; max-width: 82ch; }}
.notes {{ font-size: 13px; }}
summary {{ cursor: pointer; padding: 5px 0; }} summary b {{ font-weight: 600; }}
@media (max-width: 760px) {{ .plots, .plots.two {{ grid-template-columns: 1fr; }} dl.words {{ grid-template-columns: 1fr; gap: 2px; }}
  dl.words dd {{ margin-bottom: 8px; }} main {{ padding: 24px 16px; }} }}
@media print {{ @page {{ size: A4 landscape; margin: 14mm; }} main {{ padding: 0; max-width: none; }} body {{ font-size: 11pt; }}
  h2, h3 {{ break-after: avoid; }} h2 {{ margin-top: 24px; }} tr {{ break-inside: avoid; }} thead {{ display: table-header-group; }}
  .wide {{ overflow: visible; }} table {{ font-size: 9pt; }} th, td {{ padding-left: 11px; }} }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_html(report: Record, path: Path, title: str) -> None:
    """Write the page of a report of `build_report`; `report["run"]` may hold facts of the run, as names and values, and
    `report["choice"]["says"]` that it was chosen."""
    sections = (_header(report, title), _observed(report), _truth(report), _calibration(report), _roc(report), _propensity(report))
    more = (_gauc(report), *(_groups(name, groups, _present(report)) for name, groups in report.get("groups", {}).items()), _words())
    write_page(path, title, (*sections, *more))


def is_page(path: Path) -> bool:
    """Whether a file is a page that `write_page` wrote."""
    try:
        with path.open("rb") as file:
            return b'content="escm2rec"' in file.read(400)
    except OSError:
        return False


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write sections of HTML as one page, whole or absent; `title` is plain text."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(PAGE.format(title=escape(title), body="\n".join(sections)), encoding="utf-8")
    os.replace(partial, path)


def number(value: float | None, digits: int = 4) -> str:
    """Plain text with at least `digits` significant digits: counts with separators, small and large values as powers of ten."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if -5 < exponent < 7:
        return f"{value:,.{max(digits - 1 - exponent, 0)}f}"
    mantissa = f"{rounded / 10.0**exponent:.{digits - 1}f}"
    return f"{mantissa}×10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def aligned(values: Sequence[float | None]) -> list[str]:
    """HTML of a column's numbers, padded by invisible digits so that right alignment lines up the decimal points."""
    texts = [number(value) for value in values]
    plain = [index for index, text in enumerate(texts) if "×" not in text and text != "–"]
    decimals = {index: len(texts[index].partition(".")[2]) for index in plain}
    most = max(decimals.values(), default=0)
    cells = []
    for index, text in enumerate(texts):
        missing = most - decimals.get(index, most)
        filler = "0" * missing if "." in text else "." + "0" * missing
        cells.append(f'<span class="none">{text}</span>' if text == "–" else escape(text) + (_pad(filler) if missing else ""))
    return cells


def _pad(filler: str) -> str:
    return f'<span class="pad" aria-hidden="true">{filler}</span>'


def table(
    head: Sequence[str],
    first: Sequence[str],
    columns: Sequence[Sequence[str]],
    spans: Sequence[tuple[str, int]] = (),
    texts: Sequence[int] = (),
) -> str:
    """A table of HTML cells: row headers `first`, then `columns`; `head` and `spans` (a row of headers above) are plain
    text, which a newline breaks. Columns numbered in `texts` (0 is `first`) hold words, which wrap."""
    above = "".join(f'<th colspan="{width}">{f"<span>{escape(text)}</span>" if text else ""}</th>' for text, width in spans)
    top = f'<tr class="spans">{above}</tr>' if spans else ""
    kinds = [' class="text"' if index in texts else "" for index in range(len(head))]
    heads = "".join(f'<th scope="col"{kind}>{escape(text).replace(chr(10), "<br>")}</th>' for kind, text in zip(kinds, head, strict=True))
    rows = "".join(
        f'<tr><th scope="row"{kinds[0]}>{name}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], cells, strict=True))
        + "</tr>"
        for name, *cells in zip(first, *columns, strict=True)
    )
    return f'<div class="wide"><table><thead>{top}<tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _present(report: Record) -> list[str]:
    """The sections of a report whose labels were observed."""
    return [section for section in OBSERVED if section in report]


def _columns(records: Sequence[Record], names: Sequence[str]) -> list[list[str]]:
    return [aligned([record.get(name) for record in records]) for name in names]


def _header(report: Record, title: str) -> str:
    clicks, conversions, impressions = report["clicks"], report["conversions"], report["impressions"]
    parts = [f"{impressions:,} impressions", f"{clicks:,} clicks", f"{conversions:,} conversions"]
    if report["at_random"]:
        share = f" ({number(100 * conversions / impressions, 3)}%)" if impressions and not report["weighted"] else ""
        parts = [f"{impressions:,} impressions at random", parts[2] + share]
    elif report["weighted"]:  # shares of rows would mislead
        parts.append("weighted")
    elif clicks:
        parts[1] += f" ({number(100 * clicks / impressions, 3)}%)"
        parts[2] += f" ({number(100 * conversions / clicks, 3)}% of clicks)"
    run = report.get("run", {})
    kind = "bad" if run.get("split") == "validation" else "soft"
    chosen = f'<p class="{kind}">{escape(report["choice"]["says"])}</p>' if "choice" in report else ""
    return f'<header><h1>{escape(title)}</h1><p class="soft">{" · ".join(parts)}</p>{chosen}{facts(run)}</header>'


def facts(known: Mapping[str, Any]) -> str:
    """Names and values in a grid."""
    cells = "".join(f"<div><dt>{escape(str(name))}</dt><dd>{escape(_fact(value))}</dd></div>" for name, value in known.items())
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def _fact(value: Any) -> str:
    """A run fact as text: numbers as the tables show them, nested values as JSON."""
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return "–" if value is None else str(value)
    if isinstance(value, int | float):
        return number(value) if isinstance(value, int) else f"{value:,.6g}"
    return json.dumps(value, ensure_ascii=False)


def _observed(report: Record) -> str:
    sections = _present(report)
    records = [report[section] for section in sections]
    columns = [
        *_columns(records, ("impressions", "positives", "mean_predicted", "mean_observed", "auc", "log_loss", "normalized_entropy")),
        *_columns(records, ("calibration",)),
        [_interval(record["calibration_interval"]) for record in records],
        *_columns(records, ("ece", "ks")),
    ]
    head = ("Prediction,\npopulation", "Impressions", "Positives", "Mean\npredicted", "Mean\nobserved", "AUC", "Log loss")
    heads = (*head, "Norm.\nentropy", "Calibration", "95% interval", "ECE", "KS")
    weights = "Impression weights multiply every sum; impressions and positives are counts of rows." if report["weighted"] else ""
    return f"<h2>Metrics</h2>{table(heads, [NAMES[s] for s in sections], columns)}{_reasons(report, sections)}{note(weights)}"


def _interval(interval: Sequence[float | None] | None) -> str:
    """An interval of a ratio; green when it holds 1, else red."""
    if interval is None or interval[0] is None:
        return '<span class="none">–</span>'
    low, high = interval[0], interval[1]
    holds = low <= 1 and (high is None or high >= 1)
    said = f"{low:.3f} to " + ("∞" if high is None else f"{high:.3f}")
    kind, mark, meaning = ("good", "✓", "1 is inside") if holds else ("bad", "✗", "1 is outside")
    return f'<span class="{kind}" title="{meaning}">{said} {mark}</span>'


def _reasons(report: Record, sections: Sequence[str]) -> str:
    """Why cells are empty."""
    lines = [
        f"{NAMES[section]}: no {', '.join(map(_words_of, reasons))} ({escape(next(iter(reasons.values())))})."
        for section in sections
        if (reasons := report.get(section, {}).get("undefined"))
    ]
    return note("<br>".join(lines))


def note(text: str) -> str:
    return f'<p class="soft notes">{text}</p>' if text else ""


def _truth(report: Record) -> str:
    known = [section for section in KNOWN if section in report]
    if not known:
        return ""
    names = ("impressions", "mean_predicted", "mean_truth", "bias_ratio", "bias_difference", "kl", "rmse", "auc")
    head = ("Population", "Impressions", "Mean\npredicted", "Mean\ntruth", "Bias\n(ratio)", "Bias\n(difference)", "KL", "RMSE", "AUC")
    columns = _columns([report[section] for section in known], names)
    first = [NAMES[section].split(", ")[1].capitalize() for section in known]
    said = "These impressions were simulated, so the conversion probability of each is known, clicked or not."
    body = table(head, first, columns) + note(_meaning("Bias", "KL", "RMSE")) + _reasons(report, known)
    return f"<h2>CVR against the known truth</h2><p>{said}</p>{body}"


def _meaning(*names: str) -> str:
    """What these metrics are, where a reader first meets them."""
    return " ".join(f"<b>{name}</b>: {METRICS[name]}" for name in names)


def _calibration(report: Record) -> str:
    figures = []
    for section in (*OBSERVED, *KNOWN):
        curve = report.get("curves", {}).get(section, {}).get("calibration", {})
        observed = "mean_observed" if section in OBSERVED else "mean_truth"
        if any(curve.get(observed, ())):
            source = calibration_plot(curve, observed)
            figures.append(figure(NAMES[section], f"{len(curve['mean_predicted'])} bins of equal size", source))
    said = "Predicted against observed rate. On the diagonal predictions are right; below it they are too high. "
    said += "Bars are 95% intervals; a hollow mark is a bin without a positive."
    return f'<h2>Calibration</h2><p>{said}</p><div class="plots">{"".join(figures)}</div>' if figures else ""


def _roc(report: Record) -> str:
    figures = []
    for section in OBSERVED:
        roc = report.get("curves", {}).get(section, {}).get("roc", {})
        if roc.get("false_positive_rate"):
            figures.append(figure(NAMES[section], f"AUC {number(report[section]['auc'])}", roc_plot(roc)))
    said = "Share of positives found against share of negatives taken along, as the threshold falls. The diagonal is guessing."
    return f'<h2>Ranking</h2><p>{said}</p><div class="plots">{"".join(figures)}</div>' if figures else ""


def figure(name: str, detail: str, source: str) -> str:
    return f'<figure><figcaption><b>{name}</b><br>{detail}</figcaption><img src="{source}" alt="{name}: {detail}"></figure>'


def _propensity(report: Record) -> str:
    propensity = report.get("propensity") or {}
    scalars = {name: value for name, value in propensity.items() if not isinstance(value, Mapping | list)}
    weights, balance = propensity.get("weights", {}), propensity.get("balance", {})
    deciles = propensity.get("deciles") or {}
    if not scalars and not deciles.get("impressions"):
        return ""
    known = facts({_words_of(name): number(value) if isinstance(value, float) else value for name, value in scalars.items()})
    if "ctr_kl" in scalars:
        known = note(f"Against the true click probabilities, which are known here. {_meaning('KL', 'RMSE', 'Bias')}") + known
    parts = ["<h2>Propensity</h2>", f"<p>{METRICS['Propensity']} Impressions by tenth of the predicted click probability:</p>"]
    if deciles.get("impressions"):
        names = ["impressions", "mean_predicted", "mean_clicked"] + (["mean_truth"] if "mean_truth" in deciles else [])
        head = ["Tenth", "Impressions", "Mean\npredicted", "Share\nclicked"] + (["Mean\ntruth"] if "mean_truth" in deciles else [])
        columns = [aligned(deciles[name]) for name in names]
        ratios = [p / c if c else None for p, c in zip(deciles["mean_predicted"], deciles["mean_clicked"], strict=True)]
        bounds = zip(deciles["mean_predicted"], deciles["clicked_high"], deciles["clicked_low"], strict=True)
        intervals = [_interval([p / high if high else None, p / low if low else None]) for p, high, low in bounds]
        first = [str(index + 1) for index in range(len(ratios))]
        parts.append(table([*head, "Predicted /\nclicked", "95% interval"], first, [*columns, aligned(ratios), intervals]))
    return "".join(parts) + known + _weights(weights) + _balance(balance, weights)


def _weights(weights: Record) -> str:
    """What the weights of the split come to, and what to do where they say little."""
    if not weights:
        return ""
    texts = {name: number(weights[name]) for name in WEIGHTS if name in weights}
    notes = []
    if (interval := weights["mean_weight_interval"]) is not None:
        texts["mean_weight"] += f", expected {interval[0]:.3f} to {interval[1]:.3f} {'✗' if weights['mean_weight_off'] else '✓'}"
    expected = weights["mean_weight_expected"]
    if weights["mean_weight_off"]:
        what = "rarer" if weights["mean_weight"] < expected else "more frequent"
        mends = (
            "" if weights["own_tower"] else " Where p̂ is of the right order but not of the right size, propensity.calibration may mend it."
        )
        said = f"The mean weight is not what p̂ makes it: clicks are {what} than it says"
        notes.append(f'<span class="bad">{said}</span> (see the tenths above).{mends}')
    if expected is not None and expected < 1 - WEIGHT_TOLERANCE:
        notes.append(
            f"The floor keeps the mean weight at {expected:.2f}, however right p̂ is: impressions less likely to be clicked than the floor "
            "count for less than they are. Lower objective.propensity.floor if selection among them matters."
        )
    if weights["floor_binds_for_most"]:
        notes.append(
            '<span class="bad">The floor binds for most clicked impressions: they all weigh the same, and selection stays uncorrected '
            "among them.</span> Lower objective.propensity.floor, or make it relative (floor_kind)."
        )
    if weights["own_tower"]:
        notes.append("q is of a propensity tower of its own, the tenths above are of the CTR tower.")
    if not weights["weighs"]:
        notes.append("The objective of this run weighs nothing by them.")
    return (
        f"<h3>Weights</h3><p>{METRICS['Weights']}</p>{facts({WEIGHTS[name]: text for name, text in texts.items()})}{note(' '.join(notes))}"
    )


def _balance(balance: Record, weights: Record) -> str:
    if not balance:
        return ""
    rows = balance["features"]
    shown = rows[:MAX_FEATURES_SHOWN]
    columns = [_differences([row[name] for row in shown]) for name in ("before", "after")]
    notes = [f"✓ marks differences below {BALANCED}."]
    if effective := weights["effective_sample_size"]:
        chance = f"Chance alone leaves about {number(effective**-0.5, 2)} after weighting (1 / √ effective sample size)"
        notes.append(f"{chance}, more for a number that few clicks have.")
    if len(rows) > len(shown):
        notes.append(f"The {len(shown)} of {len(rows):,} features that differ most after weighting; the others are in report.json.")
    head = ("Feature", "Difference\nbefore weighting", "Difference\nafter weighting")
    body = table(head, [escape(row["feature"]) for row in shown], columns)
    return f"<h3>Balance of clicked and all impressions</h3><p>{METRICS['Balance']}</p>{body}{note(' '.join(notes))}"


def _differences(values: Sequence[float]) -> list[str]:
    """Standardised differences; green with a check mark below BALANCED, else red."""
    return [
        f'<span class="{"good" if value < BALANCED else "bad"}">{value:.3f} {"✓" if value < BALANCED else "✗"}</span>' for value in values
    ]


def _words_of(name: str) -> str:
    """A metric's name as a reader writes it: `ctr_bias_ratio` is CTR bias ratio."""
    return " ".join(word.upper() if word in ABBREVIATIONS else word for word in name.split("_"))


def _gauc(report: Record) -> str:
    gauc = report.get("gauc_per_user")
    if not gauc:
        return ""
    names = ("auc", "users_used", "users_skipped", "impressions_used", "impressions_skipped", "impressions_without_user")
    head = (
        "Prediction, population",
        "GAUC",
        "Users\nused",
        "Users\nskipped",
        "Impressions\nused",
        "Impressions\nskipped",
        "Impressions\nwithout user",
    )
    sections = _present(report)
    body = table(head, [NAMES[s] for s in sections], _columns([gauc[s] for s in sections], names))
    body += f"<p>{METRICS['NDCG, DCG, Recall']}</p>{_ranking(report['ranking_per_user'], sections)}"
    return f"<h2>Ranking within users, by {escape(gauc['user'])}</h2><p>{METRICS['GAUC']}</p>{body}"


def _ranking(ranking: Record, sections: Sequence[str]) -> str:
    names = (*RANKING_METRICS, "users_used", "users_without_positive")
    heads = [_words_of(name).replace(" at ", "@").replace("recall", "Recall") for name in RANKING_METRICS]
    head = ("Prediction, population", *heads, "Users\nused", "Users without\na positive")
    return table(head, [NAMES[s] for s in sections], _columns([ranking[s] for s in sections], names)) + _reasons(ranking, sections)


def _groups(name: str, groups: Record, sections: Sequence[str]) -> str:
    shown = groups["rows"][:MAX_GROUPS_SHOWN]
    columns: list[list[str]] = []
    head, spans = [name], [("", 1)]
    counts = {"ctr": ["impressions", "positives"], "ctcvr": [], "cvr_clicked": ["positives"], "cvr": ["impressions", "positives"]}
    titles = {"ctr": ["Impressions", "Clicks"], "ctcvr": [], "cvr_clicked": ["Conversions"], "cvr": ["Impressions", "Conversions"]}
    for section in sections:
        names = [*counts[section], "auc", "normalized_entropy", "calibration"]
        columns += _columns([row[section] for row in shown], names)
        task = NAMES[section].removesuffix(" impressions")
        head, spans = [*head, *titles[section], "AUC", "NE", "Calib."], [*spans, (task, len(names))]
    if all("cvr_unclicked" in row for row in shown):
        columns += _columns([row["cvr_unclicked"] for row in shown], ["bias_ratio", "kl"])
        head, spans = [*head, "Bias", "KL"], [*spans, ("CVR, unclicked", 2)]
    left = groups["groups_reported"] - len(shown)
    notes = [f"AUC needs {groups['least_per_class']} positives and negatives. NE is normalized entropy."]
    notes += ["Bias is mean predicted over mean true CVR, KL the mean divergence from it: 1 and 0 are right."] if "KL" in head else []
    notes += [f"The {len(shown)} largest of {groups['groups_reported']:,} reported groups; the others are in report.json."] if left else []
    if groups["groups_left_out"]:
        notes.append(f"{groups['groups_left_out']:,} smaller groups with {groups['impressions_left_out']:,} impressions are not reported.")
    first = ['<span class="none">missing</span>' if row["value"] is None else escape(str(row["value"])) for row in shown]
    return f"<h2>By {escape(name)}</h2>{table(head, first, columns, spans)}{note(' '.join(notes))}"


def _words() -> str:
    def entries(words: Mapping[str, str]) -> str:
        return "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in words.items())

    caution = "CVR is never measured on all impressions with unclicked ones counted as failures: that would measure CTCVR."
    return f"<h2>What the words mean</h2>{note(caution)}<dl class='words'>{entries(POPULATIONS)}{entries(METRICS)}</dl>"

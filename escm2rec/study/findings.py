"""What a study found, as sentences and tables of plain text: the page and the document say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from escm2rec.evaluation.entire_risk import MARGIN
from escm2rec.evaluation.html import number
from escm2rec.study.candidates import INCUMBENT
from escm2rec.study.claims import convergence, esmm_bias, unbiased
from escm2rec.study.finding import (
    DR,
    IPS,
    LEVEL_P,
    LINES,
    Finding,
    Table,
    Tree,
    counted,
    joined,
    level_in,
    mean_of,
    p_value,
    ratio_of,
    spread,
)
from escm2rec.study.summary import ALWAYS, BASELINES, WITHIN, trainable

REFERENCES = ("escm2-ips true q", "escm2-dr true q", "oracle")
PRICED = ("capacity right", "selection 0", "clicks at random", "hidden", "ids flexible", "ids small")
"""Worlds where there is no selection, a model that is right without weights, or a propensity that cannot show the selection."""
FEW_SEEDS = 10
TAKE = {
    "a correction": ("is better where", "is better than both where"),
    "no difference shown": ("shows no difference where", "is neither better than both nor worse than one where"),
    "none": ("is worse where", "is worse than one of them where"),
}


def findings(tree: Tree) -> list[Finding]:
    """All findings, the short ones first; at the end those that the study cannot tell of, each with its reason."""
    parts = (_situations, _worlds, esmm_bias, unbiased, convergence, _chosen, _price, _choosers, _alternation, _candidates)
    made = [each(tree) for each in parts]
    told, absent = ([part for part in made if bool(part.table and part.table.rows) == there] for there in (True, False))
    reasons = [f"{part.lead}: {part.found[0] if part.found else 'No candidate that tells of it.'}" for part in absent]
    missing = [Finding("Not in this study", "", "", reasons)] if absent else []
    return [_in_short(tree, told), *told, *missing]


def situation(world: Mapping[str, Any]) -> str:
    """What sort of world it is, in words."""
    if world["users"]:
        return "sparse ids"
    if world["hidden"]:
        return "hidden confounder"
    if world["selection"] == 0:
        return "no selection"
    if world["towers"] == "flexible" or not world["interactions"]:
        return "CVR tower can learn the truth"
    return f"clicked convert {'better' if world['selection'] > 0 else 'worse'}, CVR tower too small"


def _in_short(tree: Tree, made: Sequence[Finding]) -> Finding:
    """What was run, and the first sentence of every part, after its lead and a colon."""
    names = {name for of_world in tree["means"].values() for name in of_world}
    seeds = sorted(set(tree["seeds"].values()))
    often = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    were = "was" if len(names) == 1 else "were"
    run = (
        f"{counted(len(names), 'candidate')} {were} trained in {counted(len(tree['means']), 'simulated world')}, with {often} seeds each. "
        "In them the CVR of every impression is known, so a prediction can be judged where nobody clicked. The judge is KL: the mean "
        f"divergence of predicted from true CVR over {tree['settings']['constants']['FRESH_ROWS']:,} fresh impressions, clicked or not; "
        "0 is perfect. lambda_c is 1 where a name says nothing else; the library's default is 0.5."
    )
    few = min(tree["seeds"].values())
    caution = [f"Few seeds: With {few} a difference must be large to be shown: “level” and “no difference” leave open which is better."]
    return Finding(
        "In short",
        "",
        "",
        [f"What was run: {run}", *(caution if few < FEW_SEEDS else []), *(f"{part.lead}: {part.found[0]}" for part in made if part.found)],
    )


def _situations(tree: Tree) -> Finding:
    """What to take: by what IPS does beside ESMM and naive, world by world."""
    worlds = tree["settings"]["worlds"]
    groups: dict[str, list[str]] = {}
    for name in tree["means"]:
        groups.setdefault(situation(worlds[name]), []).append(name)
    rows = []
    said: dict[str, list[str]] = {}
    for words, members in groups.items():
        cells = [_ratios(tree, members, name, baseline) for name in (IPS, DR) for baseline in ("naive", "esmm")]
        take, count, of_worlds = _take(tree, members)
        if take:
            said.setdefault(take, []).append(f"{words} ({count} of {of_worlds})")
        levels = [level_in(tree, world) for world in members]
        often = {name: sum(name in level for level in levels) for name in trainable(tree["means"][members[0]])}
        most = max(often.values(), default=0)
        best = _some([name for name, count in often.items() if count == most])
        rows.append(
            [words, str(len(members)), f"{take} ({count} of {of_worlds})" if take else "–", *cells, f"{best} ({most} of {len(members)})"]
        )
    found = []
    if said:
        shown = {baseline for against in tree["against"].values() for baseline in against.get(IPS, {})}
        beside = " and ".join(word for baseline, word in (("naive", "naive"), ("esmm", "ESMM")) if baseline in shown)
        parts = [f"{words[len(shown) > 1]}: {joined(said[take])}" for take, words in TAKE.items() if take in said]
        found.append(f"Beside {beside}, ESCM²-IPS {'; '.join(parts)}. In brackets: the worlds that show it, of those of the kind.")
    head = ("Situation", "Worlds", "Take", "IPS /\nnaive", "IPS /\nESMM", "DR /\nnaive", "DR /\nESMM", "Most often best or level")
    how = (
        "Take a correction: ESCM²-IPS has a smaller KL than naive (clicks only) and ESMM, as far as they are there, each by Holm's p "
        "below 0.05; take none: a greater one than either; else no difference is shown. Ratios of KL are geometric means over worlds, "
        "with the least and the greatest: below 1 the first is better."
    )
    return Finding("Which objective when", "Which objective when", how, found, Table(head, rows, (0, 2, 7)))


def _take(tree: Tree, members: Sequence[str]) -> tuple[str, int, int]:
    """What most worlds advise, how many do, and how many there are to ask; on a tie the cautious."""
    votes = []
    for world in members:
        tests = [test for baseline in ("naive", "esmm") if (test := tree["against"][world].get(IPS, {}).get(baseline))]
        shown = [test["kl"]["ratio"] if test["kl_p_holm"] < LEVEL_P else 1.0 for test in tests]
        if shown:
            votes.append("none" if max(shown) > 1 else "a correction" if max(shown) < 1 else "no difference shown")
    words = max(("none", "no difference shown", "a correction"), key=votes.count)
    return (words if votes else "", votes.count(words), len(votes))


def _ratios(tree: Tree, members: Sequence[str], name: str, baseline: str) -> str:
    ratios = [each["ratio"] for world in members if (each := ratio_of(tree, world, name, baseline))]
    if not ratios:
        return "–"
    middle = math.exp(float(np.mean(np.log(ratios))))
    return f"{middle:.2f}" + (f"\n({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else "")


def _worlds(tree: Tree) -> Finding:
    rows = []
    for world in tree["means"]:
        best, *level = level_in(tree, world) or ["–"]
        against = tree["level"][world].get("against", {})
        cells = []
        for name in BASELINES:
            test = against.get(name)
            cells.append("best" if name == best else "–" if test is None else f"{spread(test)}\n{p_value(test['p_holm'])}")
        kls = [_kl(mean_of(tree, world, name, "kl")) for name in (best, *REFERENCES)]
        title = tree["settings"]["worlds"][world]["title"]
        rows.append([f"{world}\n{title}", f"{best}\n{kls[0]}", _some(level), *cells, " / ".join(kls[1:])])
    counts = _level_counts(tree)
    most = sorted((name for name in counts if name not in BASELINES), key=lambda name: -counts[name])[:3]
    best_of = [f"{name} in {counts[name]}" for name in most if counts[name]]
    others = [f"{name} in {counts[name]}" for name in BASELINES if counts.get(name)]
    found = [
        f"Most often best or level with the best, of {counted(len(rows), 'world')}: "
        f"{'; '.join(joined(each) for each in (best_of, others) if each)}."
    ]
    head = (
        "World",
        "Best,\nits KL",
        "Level with it",
        "ESMM\n/ best",
        "naive\n/ best",
        "naive+ctcvr\n/ best",
        "KL of references:\nIPS / DR, true q / oracle",
    )
    how = (
        "The candidate of least KL in each world, those level with it (paired t-test of log KL over seeds, Holm's p at least 0.05), "
        "and the KL of the baselines over its own, with 95% interval. References know what no log holds: the true propensity, or "
        "(oracle) the conversion of every impression; an oracle far from 0 is a tower too small."
    )
    return Finding("World by world", "The best", how, found, Table(head, rows, (0, 1, 2)))


def _some(names: Sequence[str], most: int = 6) -> str:
    return "none" if not names else ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _kl(record: Mapping[str, Any] | None) -> str:
    return number(record["mean"], 3) if record else "–"


def _level_counts(tree: Tree) -> dict[str, int]:
    levels = [level_in(tree, world) for world in tree["means"]]
    names = dict.fromkeys(name for of_world in tree["means"].values() for name in trainable(of_world))
    return {name: sum(name in level for level in levels) for name in names}


def _chosen(tree: Tree) -> Finding:
    title, how = (
        "A contender chosen on some seeds, judged on others",
        (
            "In worlds with 30 seeds: of all trainable candidates but the baselines the one of least KL on seeds 0 to 9, judged on the "
            "other seeds. KL over the baseline's with 95% interval, p by Holm over all rows, effect size as Cohen's d of pairs."
        ),
    )
    rows, better, worse, level = [], 0, 0, 0
    for entry in tree["chosen"]:
        for baseline, test in entry["against"].items():
            rows.append(
                [
                    entry["world"],
                    entry["candidate"],
                    baseline,
                    spread(test),
                    p_value(test["p_holm"]),
                    f"{test['effect']:+.1f}".replace("-", "−"),
                    f"{test['wins']} of {test['seeds']}",
                ]
            )
            shown = test["p_holm"] < LEVEL_P
            better, worse, level = better + (shown and test["ratio"] < 1), worse + (shown and test["ratio"] > 1), level + (not shown)
    if not rows:
        return Finding(title, "Chosen and judged", how, ["No world has seeds enough to choose on some and judge on others."])
    found = [
        f"Of {counted(len(rows), 'test')} on seeds that chose nothing, the chosen contender is better than the baseline in {better}, "
        f"level in {level}, worse in {worse}."
    ]
    return Finding(
        title,
        "Chosen and judged",
        how,
        found,
        Table(("World", "Chosen", "Beside", "KL ratio", "p (Holm)", "Effect", "Seeds won"), rows, (0, 1, 2)),
    )


def _price(tree: Tree) -> Finding:
    title, how = (
        "The price of the correction",
        (
            "Where nothing selects, the model is right without weights, or features show too little for the propensity to be right, a "
            "correction promises little and weights add noise. KL and risk (log loss on all impressions) over those of naive, with 95% "
            "intervals. Within 5%: the whole interval lies at or below 1.05; no: above it; else open."
        ),
    )
    rows: list[list[str]] = []
    verdicts: dict[str, list[str]] = {"kl": [], "risk": []}
    for world in (name for name in PRICED if name in tree["means"]):
        for name in (IPS, DR):
            kl, risk = (ratio_of(tree, world, name, "naive", metric) for metric in verdicts)
            if kl and risk:
                rows.append([world, LINES[name], spread(kl), _within(kl), spread(risk, 3), _within(risk)])
                verdicts["kl"].append(_within(kl))
                verdicts["risk"].append(_within(risk))
    if not rows:
        return Finding(
            title, "The price", how, ["The study holds no world without selection in which IPS or DR could be set beside naive."]
        )
    kls, risks = ([found.count(word) for word in ("yes", "no", "open")] for found in verdicts.values())
    found = [
        f"Of {counted(len(rows), 'pair')} of objective and world where a correction promises little, {kls[0]} stay within 5% of naive in "
        f"KL ({kls[1]} do not, {kls[2]} are open) and {risks[0]} in risk ({risks[1]} do not, {risks[2]} are open)."
    ]
    return Finding(
        title, "The price", how, found, Table(("World", "", "KL / naive", "Within 5%", "Risk / naive", "Within 5%"), rows, (0, 1))
    )


def _within(test: Mapping[str, Any]) -> str:
    return "yes" if test["high"] <= WITHIN else "no" if test["low"] > WITHIN else "open"


def _choosers(tree: Tree) -> Finding:
    title, how = (
        "The remedy: choosing by held-out clicks",
        (
            "A log holds no truth to choose by. Choosers take, seed by seed, the candidate of least SNIPS or DR risk, or of greatest "
            f"AUC on clicked impressions, on a held-out log. Cautious ones keep {INCUMBENT}, unless some candidates are below it by more "
            f"than {MARGIN:g} standard error of the difference: of those the one of least risk, as train does. The risk takes propensity "
            "and imputed labels from a judge: a model of the world's own towers, or of flexible ones. Beside them choosers that look at no "
            "log and always take the same: the one that is oftenest near the best, which only a study knows, and plain ones. Mean "
            "KL, and mean risk, of what was taken over the least of any candidate in the world: what each world gives is in study.json."
        ),
    )
    choosers = {name: each for name, each in tree["choosers"].items() if each["of_worlds"]}
    if not choosers:
        return Finding(title, "The remedy", how, ["No candidate of this study could be trained on a log."])
    constant = {name: each for name, each in choosers.items() if name.startswith(ALWAYS)}
    looking = {name: each for name, each in choosers.items() if name not in constant}
    shown = {**looking, **{name: constant[name] for name in _best_constants(constant)}}
    worlds = counted(max(each["of_worlds"] for each in shown.values()), "world")
    first, fixed = next(iter(looking)), list(shown)[len(looking)]
    told = [f"{name} in {shown[name]['kl_within_5_percent']} (worst {number(shown[name]['kl_worst'], 3)})" for name in (first, fixed)]
    incumbent = f"{ALWAYS}{INCUMBENT}"
    if incumbent in shown and incumbent != fixed:
        told.append(f"{incumbent} in {shown[incumbent]['kl_within_5_percent']} (worst {number(shown[incumbent]['kl_worst'], 3)})")
    found = [f"Within 5% of the best KL, of {worlds}: {'; '.join(told)}. The worst is its KL over the best's where that is greatest."]
    rows = []
    for name, each in shown.items():
        ends = [f"{each[f'{metric}_within_5_percent']} of {each['of_worlds']}" for metric in ("kl", "risk")]
        rows.append([name, ends[0], number(each["kl_geometric_mean"], 3), number(each["kl_worst"], 3), ends[1]])
    head = (
        "What is taken",
        "KL within 5%\nof the best",
        "KL / best,\ngeometric mean",
        "KL / best,\nworst world",
        "Risk within 5%\nof the best",
    )
    return Finding(title, "The remedy", how, found, Table(head, rows, (0,)))


def _best_constants(constant: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The best of always taking one candidate, by how often it is near the best, and the baselines and plain corrections."""
    best = max(constant, key=lambda name: (constant[name]["kl_within_5_percent"], -constant[name]["kl_geometric_mean"]))
    plain = [f"{ALWAYS}{name}" for name in (IPS, DR, *BASELINES)]
    return list(dict.fromkeys([best, *(name for name in plain if name in constant)]))


def _alternation(tree: Tree) -> Finding:
    title, how = (
        "How the imputation of DR is trained",
        (
            "KL of one way over that of another, with 95% interval: CVR and imputation in turn, one step each (alternating) or three to "
            "one (3:1), beside both in each step, at the same number of CVR steps; and imputed labels beside IPS, which is what imputed "
            "errors teach the CVR tower. In worlds of ids one pass shows joint steps every row once, CVR steps in turn some never and some "
            "twice. Below 1 the first is better; ≈ is level (Holm's p over worlds at least 0.05)."
        ),
    )
    pairs = tree["alternation"]
    if not pairs:
        return Finding(title, "Imputation", how, ["Fewer than two ways to train the imputation are in this study."])
    said = []
    for pair in pairs:
        tests = pair["worlds"].values()
        shown = [test for test in tests if test["p_holm"] < LEVEL_P]
        better = sum(test["ratio"] < 1 for test in shown)
        said.append(
            f"{pair['candidate']} beside {pair['beside']}: better in {better}, level in {len(tests) - len(shown)}, worse in "
            f"{len(shown) - better} worlds"
        )
    rows = []
    for world in tree["means"]:
        tests = [pair["worlds"].get(world) for pair in pairs]
        rows.append([world, *(spread(test) + (" ≈" if test and test["p_holm"] >= LEVEL_P else "") for test in tests)])
    return Finding(
        title,
        "Imputation",
        how,
        [f"{'; '.join(said)}."],
        Table(("World", *(f"{pair['candidate']} /\n{pair['beside']}" for pair in pairs)), rows),
    )


def _candidates(tree: Tree) -> Finding:
    """Every candidate, the losers too."""
    counts, rows = _level_counts(tree), []
    failing = []
    for name in sorted(counts, key=lambda name: -counts[name]):
        cells = []
        for baseline in BASELINES:
            tests = [each[name][baseline] for each in tree["against"].values() if baseline in each.get(name, {})]
            shown = [test for test in tests if test["kl_p_holm"] < LEVEL_P]
            better = sum(test["kl"]["ratio"] < 1 for test in shown)
            cells.append(f"{better} / {len(tests) - len(shown)} / {len(shown) - better}" if tests else "–")
            if baseline == "naive" and name not in BASELINES and len(shown) - better > better:
                failing.append(f"{name} ({len(shown) - better} worse, {better} better)")
        ratios = {world: each["ratio"] for world in tree["means"] if (each := ratio_of(tree, world, name, "naive"))}
        worst = max(ratios, key=lambda world: ratios[world]) if ratios else None
        shares = [each["mean"] for world in tree["means"] if (each := mean_of(tree, world, name, "effective_share"))]
        share = f"{np.mean(shares):.2f}" if shares else "–"
        rows.append([name, f"{counts[name]} of {len(tree['means'])}", *cells, f"{ratios[worst]:.2f} in {worst}" if worst else "–", share])
    found = [f"Worse than naive in more worlds than better: {', '.join(failing) or 'no candidate'}."] if "naive" in counts else []
    never = [name for name, count in counts.items() if count == 0]
    found += [f"Never level with the best: {', '.join(never)}."] if never else []
    head = (
        "Candidate",
        "Best or\nlevel in",
        "Beside\nESMM",
        "Beside\nnaive",
        "Beside\nnaive+ctcvr",
        "Worst KL / naive",
        "Effective\nshare",
    )
    how = (
        "Each candidate that a log can train, over all worlds. Beside a baseline: worlds in which its KL is better / level / worse "
        "(Holm's p within a world below 0.05). Effective share: effective sample size of the weights over the number of clicks, mean "
        "over worlds."
    )
    return Finding("What does not work: every candidate at a glance", "What does not work", how, found, Table(head, rows, (0, 5)))

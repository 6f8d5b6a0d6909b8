"""From cells to findings: means, the best and what is level with it, a choice that is judged on other seeds, choosers."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest

from escm2rec.study.compare import holm, paired
from escm2rec.study.presets import CHOOSING_SEEDS
from escm2rec.study.summary import BASELINES, CHOOSERS, contenders, summarise, trainable
from tests.study_cells import planted

WORLD = "selection +0.8"
NAMES = ("esmm", "naive", "naive+ctcvr", "escm2-ips", "escm2-dr", "dcmt", "escm2-ips true q", "oracle")


def planted_best(world: str, name: str) -> float:
    return {"escm2-dr": 0.030, "dcmt": 0.0302, "escm2-ips": 0.036, "oracle": 0.001, "escm2-ips true q": 0.002}.get(name, 0.06)


def test_means_skip_what_does_not_exist() -> None:
    cells = planted([WORLD], ["naive", "oracle"], 2)
    for name, kls in (("naive", (0.1, 0.3)), ("oracle", (0.05, 0.05))):
        for values, kl, x in zip(cells[WORLD][name], kls, (1.0, None), strict=True):
            values |= {"kl": kl, "x": x}
    means = summarise(cells)["means"][WORLD]["naive"]
    assert means["kl"]["mean"] == pytest.approx(0.2)
    assert means["x"] == {"mean": 1.0, "low": None, "high": None, "seeds": 1}
    assert means["kl_excess"]["mean"] == pytest.approx(0.15)
    assert "ctr_kl" not in means


def test_contenders_are_neither_baselines_nor_references() -> None:
    assert trainable(NAMES) == list(NAMES[:6])
    assert contenders(dict.fromkeys(NAMES, ())) == ["escm2-ips", "escm2-dr", "dcmt"]


def test_a_candidate_is_set_beside_each_baseline() -> None:
    cells = planted([WORLD], NAMES, 6, planted_best)
    against = summarise(cells)["against"][WORLD]
    kls = {name: [values["kl"] for values in seeds] for name, seeds in cells[WORLD].items()}
    assert set(against["escm2-dr"]) == set(BASELINES)
    assert set(against["naive"]) == {"esmm", "naive+ctcvr"}
    assert against["escm2-dr"]["naive"]["kl"] == paired(kls["escm2-dr"], kls["naive"])._asdict()  # type: ignore[arg-type]
    others = [name for name in NAMES if name != "naive"]
    adjusted = holm([paired(kls[name], kls["naive"]).p for name in others])  # type: ignore[arg-type]
    assert [against[name]["naive"]["kl_p_holm"] for name in others] == pytest.approx(adjusted)
    assert against["escm2-dr"]["naive"]["risk"]["ratio"] == pytest.approx(0.33 / 0.36, rel=0.02)


def test_the_best_is_found_and_what_is_level_with_it() -> None:
    level = summarise(planted([WORLD], NAMES, 10, planted_best))["level"][WORLD]
    assert level["best"] in ("escm2-dr", "dcmt")  # which differ by less than their noise
    assert set(level["against"]) == set(NAMES[:6]) - {level["best"]}
    assert [name for name, test in level["against"].items() if test["p_holm"] >= 0.05] == [({"escm2-dr", "dcmt"} - {level["best"]}).pop()]
    assert level["against"]["esmm"]["ratio"] == pytest.approx(2, rel=0.1)


def test_a_planted_best_is_chosen_and_judged_on_other_seeds() -> None:
    def level(world: str, name: str) -> float:
        return 0.03 if name == "escm2-ips" else 0.06

    cells = planted([WORLD, "selection 0"], NAMES, CHOOSING_SEEDS + 10, level)
    chosen = summarise(cells)["chosen"]
    assert [(entry["world"], entry["candidate"]) for entry in chosen] == [(WORLD, "escm2-ips"), ("selection 0", "escm2-ips")]
    kls = {name: [values["kl"] for values in seeds[CHOOSING_SEEDS:]] for name, seeds in cells[WORLD].items()}
    test = chosen[0]["against"]["esmm"]
    assert test["ratio"] == pytest.approx(paired(kls["escm2-ips"], kls["esmm"]).ratio)  # type: ignore[arg-type]
    assert test["seeds"] == 10
    p_values = [test["p"] for entry in chosen for test in entry["against"].values()]
    assert [test["p_holm"] for entry in chosen for test in entry["against"].values()] == pytest.approx(holm(p_values))
    assert len(p_values) == 6


def test_a_choice_never_looks_at_judging_seeds() -> None:
    cells = planted([WORLD], NAMES, CHOOSING_SEEDS + 10, lambda world, name: 0.05, noise=0.3)
    before = summarise(cells)["chosen"][0]
    for turn in range(5):
        shuffled = copy.deepcopy(cells)
        names = list(NAMES)
        random.Random(turn).shuffle(names)
        for name, other in zip(NAMES, names, strict=True):
            shuffled[WORLD][name][CHOOSING_SEEDS:] = [
                {**values, "kl": (values["kl"] or 0) * (1 + turn)} for values in cells[WORLD][other][CHOOSING_SEEDS:]
            ]
        after = summarise(shuffled)["chosen"][0]
        assert after["candidate"] == before["candidate"]
        assert after["against"] != before["against"]
    # The choosing seeds do choose.
    worst = copy.deepcopy(cells)
    for values in worst[WORLD][before["candidate"]][:CHOOSING_SEEDS]:
        values["kl"] = 10.0
    assert summarise(worst)["chosen"][0]["candidate"] != before["candidate"]


def test_too_few_seeds_choose_nothing() -> None:
    assert summarise(planted([WORLD], NAMES, CHOOSING_SEEDS + 9))["chosen"] == []


def test_choosers_are_judged_by_the_truth() -> None:
    cells = planted([WORLD, "selection 0"], ("naive", "escm2-ips", "oracle"), 2)
    for of_world in cells.values():
        for seed, (naive, ips, oracle) in enumerate(zip(*of_world.values(), strict=True)):
            for each, risk in ((naive, 0.5), (ips, 0.4), (oracle, 0.0)):
                each |= {"heldout_snips_flexible": risk, "heldout_dr_flexible": risk}
            naive |= {"kl": 0.04, "true_risk": 0.40, "heldout_snips": 0.5, "heldout_dr": 0.3, "heldout_auc_clicked": 0.8}
            ips |= {"kl": 0.02, "true_risk": 0.39, "heldout_snips": 0.4, "heldout_dr": 0.2 if seed else 0.4, "heldout_auc_clicked": None}
            oracle |= {"kl": 1e-6, "true_risk": 0.1, "heldout_snips": 0.0, "heldout_dr": 0.0, "heldout_auc_clicked": 1.0}
    choosers = summarise(cells)["choosers"]
    assert choosers["SNIPS risk"]["worlds"][WORLD]["taken"] == {"escm2-ips": 2}
    assert choosers["DR risk"]["worlds"][WORLD]["taken"] == {"naive": 1, "escm2-ips": 1}
    assert choosers["AUC, clicked"]["worlds"][WORLD]["taken"] == {"naive": 2}  # never one whose AUC does not exist, nor the oracle
    ratios = {name: (each["worlds"][WORLD]["kl"], each["worlds"][WORLD]["true_risk"]) for name, each in choosers.items()}
    assert ratios["SNIPS risk"] == (1, 1)
    assert ratios["DR risk"] == pytest.approx((1.5, 0.395 / 0.39))
    assert ratios["AUC, clicked"] == pytest.approx((2, 0.40 / 0.39))
    counts = {name: (each["kl_within_5_percent"], each["risk_within_5_percent"], each["of_worlds"]) for name, each in choosers.items()}
    expected = {"SNIPS risk": (2, 2, 2), "DR risk": (0, 2, 2), "AUC, clicked": (0, 2, 2)}
    expected |= {f"{by} risk, flexible judge": (2, 2, 2) for by in ("SNIPS", "DR")}
    expected |= {"always naive": (0, 2, 2), "always escm2-ips": (2, 2, 2)}
    assert (choosers["always naive"]["kl_geometric_mean"], choosers["always naive"]["kl_worst"]) == pytest.approx((2, 2))
    assert "always oracle" not in choosers, "no log could train it"
    cautious = {name for name, chooser in CHOOSERS.items() if chooser.cautious}
    assert {name: counts[name] for name in counts if name not in cautious} == expected


@pytest.mark.parametrize(("over", "taken"), [(-0.011, "escm2-ips"), (-0.009, "direct"), (None, "direct")])
def test_a_cautious_chooser_takes_the_least_of_those_below_naive_beyond_a_standard_error(over: float | None, taken: str) -> None:
    """escm2-ips has the least risk; where its difference from naive is within its standard error of 0.01, direct is the next."""
    cells = planted([WORLD], ("naive", "escm2-ips", "direct", "dcmt"), 3)
    differences = {"naive": 0.0, "escm2-ips": over, "direct": -0.015, "dcmt": -0.005}
    for name, seeds in cells[WORLD].items():
        for values in seeds:
            values |= {"heldout_dr": {"naive": 0.3, "escm2-ips": 0.28, "direct": 0.285, "dcmt": 0.295}[name], "heldout_dr_over_error": 0.01}
            values["heldout_dr_over"] = differences[name]
    choosers = summarise(cells)["choosers"]
    assert choosers["DR risk, cautious"]["worlds"][WORLD]["taken"] == {taken: 3}
    assert choosers["DR risk"]["worlds"][WORLD]["taken"] == {"escm2-ips": 3}
    some = {WORLD: {name: cells[WORLD][name] for name in ("naive", "dcmt")}}
    assert summarise(some)["choosers"]["DR risk, cautious"]["worlds"][WORLD]["taken"] == {"naive": 3}
    without = {WORLD: {name: cells[WORLD][name] for name in ("escm2-ips", "direct")}}
    assert summarise(without)["choosers"]["DR risk, cautious"]["of_worlds"] == 0, "there is no incumbent to be cautious about"


def test_ways_to_train_the_imputation_are_set_beside_each_other() -> None:
    names = ("naive", "escm2-ips", "escm2-dr", "escm2-dr alternating")
    cells = planted([WORLD, "selection 0"], names, 4, lambda world, name: 0.02 if name.endswith("alternating") else 0.04)
    pairs = summarise(cells)["alternation"]
    assert [(pair["candidate"], pair["beside"]) for pair in pairs] == [
        ("escm2-dr alternating", "escm2-dr"),
        ("escm2-dr", "escm2-ips"),
    ]
    alternating = pairs[0]["worlds"]
    assert [round(test["ratio"], 1) for test in alternating.values()] == [0.5, 0.5]
    assert [test["p_holm"] for test in alternating.values()] == pytest.approx(holm([test["p"] for test in alternating.values()]))


def test_a_candidate_without_a_kl_is_compared_with_none() -> None:
    cells = planted([WORLD], NAMES, CHOOSING_SEEDS + 10, planted_best)
    cells[WORLD]["escm2-dr"][3]["kl"] = None
    found = summarise(cells)
    assert found["means"][WORLD]["escm2-dr"]["kl"]["seeds"] == CHOOSING_SEEDS + 9
    assert "escm2-dr" not in found["against"][WORLD]
    assert found["level"][WORLD]["best"] == "dcmt"
    assert found["chosen"][0]["candidate"] == "dcmt"
    numbers = [each["worlds"][WORLD]["kl"] for each in found["choosers"].values()]
    assert np.isfinite(numbers).all()

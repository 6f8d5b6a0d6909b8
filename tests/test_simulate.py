"""escm2rec.simulate: the format is what a parser of its own reads, the truth is true, and the same seed is the same log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import escm2rec.simulate as simulate_module
from escm2rec.config import SimulationConfig
from escm2rec.errors import ConfigError
from escm2rec.folder import read_manifest, sha256_of
from escm2rec.simulate import simulate
from escm2rec.simulate.log import Impressions, shard
from escm2rec.simulate.population import Fields
from escm2rec.simulate.world import make_world

SMALL = SimulationConfig(ctr=0.2, cvr=0.1, selection=0.5, users=2_000, items=3_000)
IMPRESSIONS, SEED = 60_000, 7
COMMON_FIELDS = {"101", "121", "122", "124", "125", "126", "127", "128", "129", "109_14", "110_14", "127_14", "150_14"}
SKELETON_FIELDS = {"205", "206", "207", "210", "216", "301", "508", "509", "702", "853"}
COUNTED = {"109_14", "110_14", "127_14", "150_14", "508", "509", "702", "853"}
REPEATED = {"109_14", "110_14", "127_14", "150_14", "210", "853"}

Features = list[tuple[str, int, str]]


@dataclass
class Parsed:
    """A shard of Ali-CCP text, read line by line from what the format says and nothing else."""

    rows: list[tuple[int, int, int, str, Features]] = field(default_factory=list)
    common: dict[str, Features] = field(default_factory=dict)


def parse_features(num: str, text: str) -> Features:
    features = [tuple(re.split("[\x02\x03]", token)) for token in text.split("\x01")]
    assert len(features) == int(num)
    assert all(len(feature) == 3 for feature in features)
    return [(name, int(number), value) for name, number, value in features]


def parse(folder: Path, number: int = 0) -> Parsed:
    parsed = Parsed()
    text = (folder / f"common_features_{number:05d}.csv").read_bytes().decode("ascii")
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        index, num, features = line.split(",")
        assert re.fullmatch("[0-9a-f]{16}", index)
        assert index not in parsed.common
        parsed.common[index] = parse_features(num, features)
    text = (folder / f"sample_skeleton_{number:05d}.csv").read_bytes().decode("ascii")
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        sample_id, click, buy, index, num, features = line.split(",")
        parsed.rows.append((int(sample_id), int(click), int(buy), index, parse_features(num, features)))
    return parsed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same log in both formats."""
    root = tmp_path_factory.mktemp("logs")
    return {
        "aliccp": simulate(root / "aliccp", IMPRESSIONS, SEED, SMALL, "aliccp"),
        "parquet": simulate(root / "parquet", IMPRESSIONS, SEED, SMALL, "parquet"),
    }


@pytest.fixture(scope="module")
def aliccp(results: dict[str, dict[str, Any]]) -> Path:
    return Path(results["aliccp"]["out"])


@pytest.fixture(scope="module")
def parsed(aliccp: Path) -> Parsed:
    return parse(aliccp)


@pytest.fixture(scope="module")
def table(results: dict[str, dict[str, Any]]) -> pl.DataFrame:
    return pl.read_parquet(Path(results["parquet"]["out"]) / "part-00000.parquet")


def draw(config: SimulationConfig, count: int, seed: int = 0) -> list[Impressions]:
    return list(shard(make_world(config, seed), 0, count))


def column(parts: list[Impressions], name: str) -> np.ndarray[Any, Any]:
    return np.concatenate([getattr(part, name) for part in parts])


# --- the text -----------------------------------------------------------------------------------


def test_text_is_in_the_format(parsed: Parsed) -> None:
    assert len(parsed.rows) == IMPRESSIONS
    assert sorted(row[0] for row in parsed.rows) == list(range(1, IMPRESSIONS + 1))
    for _, click, buy, index, features in parsed.rows:
        assert (click, buy) in {(0, 0), (1, 0), (1, 1)}
        assert index in parsed.common
        names = Counter(name for name, _, _ in features)
        assert {"205", "206", "207", "210", "301"} <= set(names) <= SKELETON_FIELDS
        assert {name for name, count in names.items() if count > 1} <= REPEATED
    assert {row[3] for row in parsed.rows} == set(parsed.common)
    for features in parsed.common.values():
        names = Counter(name for name, _, _ in features)
        assert names["101"] == 1
        assert set(names) <= COMMON_FIELDS
        assert {name for name, count in names.items() if count > 1} <= REPEATED


def all_features(parsed: Parsed) -> Iterator[tuple[str, int, str]]:
    for row in parsed.rows:
        yield from row[4]
    for features in parsed.common.values():
        yield from features


def test_values_are_one_or_log_counts_and_fields_own_their_ids(parsed: Parsed) -> None:
    ranges: dict[str, tuple[int, int]] = {}
    log_counts = {f"{round(float(np.log1p(count)), 5)}" for count in range(1, 300)}
    for name, number, value in all_features(parsed):
        low, high = ranges.get(name, (number, number))
        ranges[name] = min(low, number), max(high, number)
        assert value in log_counts if name in COUNTED else value == "1.0"
    assert set(ranges) == COMMON_FIELDS | SKELETON_FIELDS
    bounds = sorted(ranges.values())
    assert bounds[0][0] >= 1
    assert all(before[1] < after[0] for before, after in pairwise(bounds))


def test_records_repeat_fields_and_miss_fields(parsed: Parsed) -> None:
    rows = [Counter(name for name, _, _ in row[4]) for row in parsed.rows]
    assert 0.24 < np.mean([names["216"] == 0 for names in rows]) < 0.30
    assert np.mean([names["210"] > 1 for names in rows]) > 0.5
    assert np.mean([names["853"] > 1 for names in rows]) > 0.1
    records = [Counter(name for name, _, _ in features) for features in parsed.common.values()]
    sizes = [sum(names.values()) for names in records]
    assert 45 < np.mean(sizes) < 75
    assert min(sizes) < 10
    assert max(sizes) > 200
    for name in COMMON_FIELDS - {"101"}:
        assert 0 < np.mean([names[name] == 0 for names in records]) < 0.2, name
    apart = [[name for name, _, _ in row[4]] for row in parsed.rows if Counter(n for n, _, _ in row[4])["210"] == 2]
    assert any(abs(names.index("210") - (len(names) - 1 - names[::-1].index("210"))) > 1 for names in apart)  # not always adjacent


def test_rows_of_a_record_stand_together(parsed: Parsed) -> None:
    indices = [row[3] for row in parsed.rows]
    changes = sum(before != after for before, after in pairwise(indices))
    assert changes == len(parsed.common) - 1


def test_crosses_are_the_history_of_the_item(parsed: Parsed) -> None:
    starts = Fields.of(SMALL).starts
    seen = Counter[str]()
    for _, _, _, index, features in parsed.rows[:20_000]:
        held = {(name, number - starts[name]): value for name, number, value in parsed.common[index]}
        for cross, history, of_item in (
            ("508", "109_14", "206"),
            ("509", "110_14", "207"),
            ("702", "127_14", "216"),
            ("853", "150_14", "210"),
        ):
            values = {number - starts[of_item] for name, number, _ in features if name == of_item}
            expected = {value: held[history, value] for value in values if (history, value) in held}
            assert {number - starts[cross]: value for name, number, value in features if name == cross} == expected
            seen[cross] += len(expected)
    assert min(seen[cross] for cross in ("508", "509", "702", "853")) > 500


def test_truth_stands_row_by_row_beside_the_skeleton(aliccp: Path, parsed: Parsed) -> None:
    truth = pl.read_parquet(aliccp / "truth_00000.parquet")
    assert truth.schema == {"sample_id": pl.Int64, "true_propensity": pl.Float64, "true_cvr": pl.Float64}
    assert truth["sample_id"].to_list() == [row[0] for row in parsed.rows]
    assert truth.select(pl.all_horizontal(pl.col("true_propensity", "true_cvr").is_between(0, 1, closed="none")).all()).item()


# --- both formats, every run --------------------------------------------------------------------


def test_both_formats_hold_the_same_impressions(aliccp: Path, parsed: Parsed, table: pl.DataFrame) -> None:
    truth = pl.read_parquet(aliccp / "truth_00000.parquet")
    assert table.select(truth.columns).equals(truth)
    profile = [f"profile_{name}" for name in ("121", "122", "124", "125", "126", "127", "128", "129")]
    histories = {"109_14": "history_categories", "110_14": "history_shops", "127_14": "history_brands", "150_14": "history_intentions"}
    singles = {"205": "item_id", "206": "category", "207": "shop", "216": "brand", "301": "scene", "101": "user_id"}
    singles |= {name.removeprefix("profile_"): name for name in profile}
    crosses = {"508": "user_category_count", "509": "user_shop_count", "702": "user_brand_count", "853": "user_intention_count"}
    compared = 0
    for row, (sample_id, click, buy, index, skeleton) in zip(table.iter_rows(named=True), parsed.rows, strict=True):
        if sample_id % 40:
            continue
        compared += 1
        features = skeleton + parsed.common[index]
        of: dict[str, dict[int, float]] = {}
        for name, number, value in features:
            of.setdefault(name, {})[number] = float(value)
        assert (row["sample_id"], row["click"], row["conversion"]) == (sample_id, click, buy)
        assert {name: row[name] for name in singles.values()} == {name: next(iter(of.get(f, {})), None) for f, name in singles.items()}
        assert sorted(row["intentions"]) == sorted(of["210"])
        for code, name in histories.items():
            weights = dict(zip(row[name], row[f"{name}_weight"], strict=True))
            assert weights == pytest.approx(of.get(code, {}), rel=1e-6)
        for code, name in crosses.items():
            count = sum(round(float(np.expm1(value))) for value in of.get(code, {}).values())
            assert row[name] == (count or None)
    assert compared == IMPRESSIONS // 40


@pytest.mark.parametrize("format", ["aliccp", "parquet"])
def test_same_seed_same_bytes(format: Any, results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    first, again = Path(results[format]["out"]), tmp_path / "again"
    simulate(again, IMPRESSIONS, SEED, SMALL, format)
    names = sorted(path.name for path in first.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert len(names) == {"aliccp": 4, "parquet": 2}[format]
    for name in names:
        assert sha256_of(first / name) == sha256_of(again / name)


def test_another_seed_is_another_log(table: pl.DataFrame, tmp_path: Path) -> None:
    simulate(tmp_path / "other", 5_000, SEED + 1, SMALL, "parquet")
    other = pl.read_parquet(tmp_path / "other" / "part-00000.parquet").sort("sample_id")
    same = other["item_id"].to_numpy() == table.sort("sample_id")["item_id"][:5_000].to_numpy()
    assert same.mean() < 0.1


def test_shards_and_length_change_no_impression(table: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_module, "SHARD_ROWS", 21_000)
    result = simulate(tmp_path / "shards", 55_000, SEED, SMALL, "parquet")
    assert result["files"] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    shards = pl.concat([pl.read_parquet(tmp_path / "shards" / name) for name in result["files"]])
    assert shards.sort("sample_id").equals(table.sort("sample_id").head(55_000))
    simulate(tmp_path / "text", 27_000, SEED, SMALL)
    for number, rows in enumerate((21_000, 6_000)):
        part = parse(tmp_path / "text", number)
        assert len(part.rows) == rows
        assert {row[3] for row in part.rows} == set(part.common)


# --- the truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ctr", "cvr"), [(0.04, 0.005), (0.2, 0.1)])
def test_rates_are_those_of_the_config(ctr: float, cvr: float) -> None:
    parts = draw(SimulationConfig(ctr=ctr, cvr=cvr), 500_000)
    p, eta, click, conversion = (column(parts, name) for name in ("propensity", "cvr", "click", "conversion"))
    assert p.mean() == pytest.approx(ctr, rel=0.02)
    assert (p * eta).sum() / p.sum() == pytest.approx(cvr, rel=0.02)
    assert abs(click.sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())
    assert abs(conversion.sum() - (p * eta).sum()) < 4 * np.sqrt((p * eta).sum())


@pytest.mark.parametrize("selection", [-0.5, 0.0, 0.5, 1.0])
def test_selection_is_the_correlation_of_click_and_conversion(selection: float) -> None:
    parts = draw(SMALL.model_copy(update={"selection": selection}), 100_000)
    p, eta = column(parts, "propensity"), column(parts, "cvr")
    click_logit, cvr_logit = np.log(p / (1 - p)), np.log(eta / (1 - eta))
    assert np.corrcoef(click_logit, cvr_logit)[0, 1] == pytest.approx(selection, abs=0.02)
    assert click_logit.std() == pytest.approx(1.0, abs=0.03)
    assert cvr_logit.std() == pytest.approx(1.2, abs=0.04)
    click = column(parts, "click")
    ratio = eta[click].mean() / eta[~click].mean()
    if selection == 0:
        assert ratio == pytest.approx(1.0, abs=0.08)
    else:
        assert ratio > 1.3 if selection > 0 else ratio < 0.8


def assert_calibrated(truth: np.ndarray[Any, Any], label: np.ndarray[Any, Any]) -> None:
    """Labels are Bernoulli(truth) in every decile of the truth, within 4.5 standard errors."""
    deciles = np.array_split(np.argsort(truth), 10)
    for rows in deciles:
        error = np.sqrt((truth[rows] * (1 - truth[rows])).sum())
        assert abs(label[rows].sum() - truth[rows].sum()) < 4.5 * error


def test_labels_are_drawn_from_the_truth(table: pl.DataFrame) -> None:
    p, eta, click, conversion = (table[name].to_numpy() for name in ("true_propensity", "true_cvr", "click", "conversion"))
    assert_calibrated(p, click)
    clicked = click == 1
    assert_calibrated(eta[clicked], conversion[clicked])
    assert not conversion[~clicked].any()
    for likely in (True, False):  # given x, conversion does not depend on how likely the click was
        rows = clicked & ((p > np.median(p[clicked])) == likely)
        assert_calibrated(eta[rows], conversion[rows])


def test_truth_is_a_function_of_the_features(table: pl.DataFrame) -> None:
    same = table.group_by("user_id", "item_id", "scene").agg(pl.len(), pl.col("true_propensity", "true_cvr").n_unique())
    assert same.filter(pl.col("len") > 1).height > 1_000
    assert same.select(pl.col("true_propensity", "true_cvr").max()).row(0) == (1, 1)


def test_activity_and_popularity_are_heavy_tailed(table: pl.DataFrame) -> None:
    for name, most in (("user_id", 4), ("item_id", 50)):
        counts = table[name].value_counts()["count"].to_numpy()
        assert counts.max() > most * counts.mean()
        assert np.median(counts) < counts.mean()
    top = table["item_id"].value_counts(sort=True)["count"]
    assert top[:30].sum() > 0.15 * IMPRESSIONS  # 1% of the items
    assert top.len() > 2_000
    assert table["user_id"].n_unique() > 1_900


# --- the call -----------------------------------------------------------------------------------


def test_result_and_manifest_agree(results: dict[str, dict[str, Any]], table: pl.DataFrame) -> None:
    for format, result in results.items():
        json.dumps(result, allow_nan=False)
        manifest = read_manifest(Path(result["out"]), "raw logs")
        shared = set(result) - {"out", "files", "seconds"}
        assert {key: manifest[key] for key in shared} == {key: result[key] for key in shared}
        assert manifest["config"] == SMALL.model_dump()
        assert (manifest["seed"], manifest["format"]) == (SEED, format)
        assert [file["name"] for file in manifest["files"]] == result["files"]
        for file in manifest["files"]:
            assert file["sha256"] == sha256_of(Path(result["out"]) / file["name"])
    result, eta, click = results["parquet"], table["true_cvr"].to_numpy(), table["click"].to_numpy() == 1
    assert (result["impressions"], result["clicks"], result["conversions"]) == (IMPRESSIONS, click.sum(), table["conversion"].sum())
    assert result["ctr"] == click.mean()
    assert result["cvr"] == table["conversion"].sum() / click.sum()
    assert result["mean_true_cvr"] == pytest.approx(eta.mean())
    assert result["mean_true_cvr_clicked"] == pytest.approx(eta[click].mean())
    assert result["mean_true_cvr_unclicked"] == pytest.approx(eta[~click].mean())


@pytest.mark.parametrize("format", ["aliccp", "parquet"])
def test_smallest_world(format: Any, tmp_path: Path) -> None:
    result = simulate(tmp_path / "one", 1, 0, SimulationConfig(ctr=1e-6, users=2, items=2), format)
    assert (result["impressions"], result["clicks"], result["cvr"], result["mean_true_cvr_clicked"]) == (1, 0, None, None)


@pytest.mark.parametrize(
    ("impressions", "seed", "format", "message"),
    [
        (0, 0, "aliccp", "impressions must be at least 1, is 0\nhint: give the number of impressions"),
        (10, -1, "aliccp", "seed must be 0 or more, is -1\nhint: choose another seed"),
        (10, 0, "csv", "unknown format 'csv'\nhint: choose one of: aliccp, parquet"),
    ],
)
def test_bad_arguments_are_refused(impressions: int, seed: int, format: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        simulate(tmp_path / "out", impressions, seed, SMALL, format)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    simulate(out, 50, 0, SMALL)
    (out / "kept").touch()
    with pytest.raises(ConfigError, match=r"the output folder .*out exists\nhint: .*--overwrite"):
        simulate(out, 100, 0, SMALL)
    assert (out / "kept").exists()
    simulate(out, 100, 0, SMALL, overwrite=True)
    assert not (out / "kept").exists()
    assert read_manifest(out, "raw logs")["impressions"] == 100


def test_torch_is_not_loaded() -> None:
    subprocess.run([sys.executable, "-c", "import sys, escm2rec.simulate; assert 'torch' not in sys.modules"], check=True)

"""The README: its file map holds every file, its commands exist."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from escm2rec.cli import app
from escm2rec.config import parse_config
from escm2rec.study.candidates import CANDIDATES
from escm2rec.study.presets import PRESETS
from escm2rec.training.choice import check_choice
from escm2rec.training.idle import refuse_idle

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def mapped() -> list[str]:
    """The Python files of the file map, with their folders."""
    (tree,) = (block for block in re.findall(r"^```\w*\n(.*?)^```$", README, re.S | re.M) if block.startswith("escm2rec/\n"))
    folders: list[str] = []
    files = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        if name.endswith(".py"):
            files.append("".join(folders[:depth]) + name)
    return files


def test_the_file_map_holds_every_file_once() -> None:
    known = [path for room in ("escm2rec", "torchx_components", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    expected = sorted(str(path.relative_to(ROOT)) for path in known if not path.name.startswith("__"))
    assert len(expected) > 60
    assert sorted(mapped()) == expected


def test_every_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_verb_is_told_with_its_options() -> None:
    commands = get_command(app)
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?)\| ", README, re.M))
    assert {"simulate", "preprocess", "train", "evaluate", "score", "export", "pipeline", "study", "plan", "doctor"} == set(told)
    for verb, options in told.items():
        known = {option for parameter in commands.commands[verb].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert set(re.findall(r"--[a-z-]+", options)) <= known


def test_launching_tells_what_was_proved_of_lost_nodes() -> None:
    proof = json.loads((ROOT / "docs" / "results" / "slurm.json").read_text(encoding="utf-8"))
    lost = {name: proof[name] for name in ("node", "slurmd")}
    assert all(each["losses_equal_bit_for_bit"] for each in lost.values())
    (records,) = {each["records"] for each in lost.values()}
    told = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    assert f"each of its {records} losses was that of an undisturbed training, bit for bit" in told
    assert all(each["trained_again_after_s"] == pytest.approx(200, abs=30) for each in lost.values()), "some 200 s"


def test_metrics_cost_what_their_decision_says() -> None:
    found = json.loads((ROOT / "docs" / "results" / "metrics.json").read_text(encoding="utf-8"))
    told = (ROOT / "docs" / "decisions" / "0013-metrics-of-training.md").read_text(encoding="utf-8")
    for name in ("rec_metrics_ne_calibration", "rec_metrics_ne_calibration_auc"):
        assert f"| {found[name]['step_us'] / 1e3:.1f} ms | {found[name]['record_ms']:.0f} ms |" in told
    ours = found["train"]
    assert found["rec_metrics_ne_calibration_auc"]["record_ms"] > 3 * ours["record_ms"]
    assert ours["step_us"] < 0.01 * 150_000  # of a step of the reference shape
    assert f"| {ours['step_us'] / 1e3:.2f} ms | {ours['record_ms']:.0f} ms | {ours['beside_ms']:.0f} ms |" in told


def test_managed_tables_cost_what_their_decision_says() -> None:
    found = json.loads((ROOT / "docs" / "results" / "managed.json").read_text(encoding="utf-8"))["results"]
    decision = (ROOT / "docs" / "decisions" / "0014-managed-tables.md").read_text(encoding="utf-8")
    assert len(found) == 6
    for rows in (100_000, 1_000_000):
        cases = [each for each in found if each["rows"] == rows]
        assert [each["case"] for each in cases] == ["known", "growing", "full"]
        pairs = [", ".join(_short(each[f"{who}_ms"]) for who in ("ours", "torchrec")) for each in cases]
        assert f"| {rows:,} | {' | '.join(pairs)} |" in decision
    ours, torchrec = ([_short(each[f"{who}_ms"]) for each in found[3:]] for who in ("ours", "torchrec"))
    assert f"{ours[0]} ms where all have a row, {ours[1]} where a hundredth is new, {ours[2]} where those take rows of others" in README
    assert f"chooses the same values in {torchrec[0]}, {torchrec[1]} and {torchrec[2]} |" in README


def test_plans_are_as_fast_and_as_good_as_told() -> None:
    sets = json.loads((ROOT / "docs" / "results" / "planner.json").read_text(encoding="utf-8"))["sets"]
    many, most = sets["100 tables, 64 H100"], sets["1,000 tables, 128 H100"]["priced"]
    ours, theirs = many["priced"], many["torchrec"]
    found = f"{theirs['step_ms'] / ours['step_ms']:.2f} times as fast a step as what TorchRec's default finds in {theirs['seconds']:.0f} s"
    assert f"in {ours['seconds']:.1f} s, {found}, {100 * (ours['over_bound'] - 1):.1f}% above what no plan can beat" in README
    assert f"1,000 tables on 128 in {most['seconds']:.0f} s, {100 * (most['over_bound'] - 1):.1f}% above" in README
    assert ours["seconds"] < 5
    assert most["seconds"] < 60
    for told in sets.values():
        others = [told[planner]["step_ms"] for planner in ("torchrec", "greedy", "uniform") if "step_ms" in told.get(planner, {})]
        assert all(told["priced"]["step_ms"] <= 1.01 * other for other in others)


def test_scoring_is_as_fast_as_told() -> None:
    found = json.loads((ROOT / "docs" / "results" / "score.json").read_text(encoding="utf-8"))
    encoded, raw, sparse = (found["of_bare"][kind] for kind in ("encoded", "raw", "raw_sparse"))
    assert f"{encoded['median']:.2f} of encoded rows ({round(found['rows_per_s']['encoded'], -3):,} rows/s)" in README
    assert f"{raw['median']:.2f} of raw rows with dense ids, {sparse['median']:.2f} with ids of 63 bits" in README
    low, *others = (f"{min(each['rounds']):.2f} to {max(each['rounds']):.2f}" for each in (encoded, raw, sparse))
    assert f"medians of {len(raw['rounds'])} rounds, from {low}, {' and '.join(others)}." in README
    assert encoded["median"] >= 0.8
    assert raw["median"] >= 0.65
    pandas, ray_data = found["pandas"]["raw_over_it"], found["ray_data"]["encoded_over_it"]
    assert f"{pandas:.0f} times a loop in pandas and PyTorch (raw rows), {ray_data:.2f} of Ray Data's `map_batches`" in README
    assert pandas >= 5
    assert f"with 49 others {found['repeats_over_one_by_one']['median']:.2f} times as fast as one by one" in README
    assert "the same within 3e-8" in README
    assert found["same_repeats"] < 3.01e-8
    assert found["same"] == 0
    memory = json.loads((ROOT / "docs" / "results" / "score_memory.json").read_text(encoding="utf-8"))["memory_mb"]
    few, many = memory["1,000,000 rows"]["own_mb"], memory["50,000,000 rows"]["own_mb"]
    assert f"{few:,.0f} MB of own memory in both processes at 1 M rows, {many:,.0f} MB at 50 M" in README
    assert many < 1.05 * few


def test_exported_models_are_as_told() -> None:
    found = json.loads((ROOT / "docs" / "results" / "export.json").read_text(encoding="utf-8"))
    of_int8 = {name: told for each in found["quality"].values() for name, told in each.items() if name.startswith("int8")}
    sizes = [of_int8[f"int8, dimension {dim}"]["tables_of_fp32"] for dim in (16, 64)]
    assert f"{sizes[0]:.3f} of their bytes at dimension 16, {sizes[1]:.3f} at 64" in README
    assert sizes[0] <= 0.5
    assert sizes[1] <= 0.35
    cases = [told for each in found["quality"].values() for name, told in each.items() if name.startswith("int8")]
    changes = [abs(change) for told in cases for change in told["auc_change"].values()]
    assert len(changes) == 12, "two logs, two dimensions, three tasks"
    assert f"AUC changes by {max(changes):.0e} at the most" in README
    assert max(changes) < 1e-4
    names = [f"{format}, int8" for format in ("torchscript", "torch-export", "aoti")]
    rates = [found["rates"][name]["of_fp32"]["median"] for name in names]
    assert "{:.2f}, {:.2f} and {:.2f} times the rows/s of float32".format(*rates) in README
    assert min(rates) >= 1
    assert (
        "one call of one impression {:.0f}, {:.0f} and {:.0f} µs".format(*(found["rates"][name]["call_us"]["1"] for name in names))
        in README
    )


def test_random_plans_are_no_worse_than_torchrecs() -> None:
    found = json.loads((ROOT / "docs" / "results" / "planner_random.json").read_text(encoding="utf-8"))
    assert found["slowest_over_torchrecs"] <= 1.01
    assert f"{found['cases']} random sets of up to 12 tables, {found['both_fit']} of which both planners fit" in README
    assert f"at the most {found['slowest_over_torchrecs']:.3f} times as slow" in README


def test_estimates_rank_plans_as_told() -> None:
    found = json.loads((ROOT / "docs" / "results" / "plans.json").read_text(encoding="utf-8"))
    alike, popular, not_told = found["calibrated"], found["popular"], found["popular, not told"]
    said = f"Spearman {alike['spearman']:.2f}, the estimate off by {alike['off_by_factor_most']:.2f} times at the most, "
    assert f"of {found['plans']} plans" in README
    assert said + f"{alike['off_by_factor_median']:.2f} in the median" in README
    assert f"most lookups {popular['spearman']:.2f}, and {not_told['spearman']:.2f} by a planner that is not told so" in README
    assert f"in the median {popular['estimate_over_measured_median']:.2f} times" in README
    assert min(len(each["ms"]) for each in (alike, popular)) == found["plans"] >= 12
    assert min(alike["spearman"], popular["spearman"]) >= 0.7


def _short(ms: float) -> str:
    return f"{ms:.1f}" if ms < 20 else f"{ms:.0f}"


def test_no_place_is_left_unfilled() -> None:
    assert re.findall(r"^[A-Z]+_[A-Z]+$", README, re.M) == []


def test_figures_are_those_of_the_results() -> None:
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "docs" / "results").glob("*.json")}
    known = {path.stem for path in (ROOT / "docs" / "results").glob("*.json")}
    assert known == {
        "train",
        "train_again",
        "first_step",
        "train_gpu",
        "preprocess",
        "preprocess_xeon",
        "table",
        "table_xeon",
        "table_16m",
        "table_4m",
        "table_100m",
        "layout",
        "reader",
        "kills",
        "soak",
        "hillstrom",
        "study",
        "slurm",
        "metrics",
        "managed",
        "planner",
        "plans",
        "planner_random",
        "score",
        "score_memory",
        "score_kills",
        "export",
    }
    text = results["preprocess"]
    _, middle, largest = text["whole"]
    assert f"{largest['mb_per_s']:.0f} MB/s of text and {round(largest['rows_per_s'], -3):,} rows/s at 4 M impressions" in README
    assert f"reached {text['parse']['python']['mb_per_s']} MB/s" in README
    assert f"{max(largest['peak_own_mb'])} MB of own memory in all processes at 4 M, {max(middle['peak_own_mb'])} MB at 1 M" in README
    assert f"{text['rowwise']['times']} times as fast as loops over rows" in README
    assert text["rowwise"]["times"] >= 10
    assert f"with the lines of common records scattered {text['scattered']['times']} times as long" in README
    where_100_is_asked_for = {"python": 34, "duckdb": 163, "polars": 186}  # MB/s that these parsers reach there
    assert min(largest["mb_per_s"] / text["parse"][parser]["mb_per_s"] * rate for parser, rate in where_100_is_asked_for.items()) >= 100
    _check_other_machine(results)
    lists, singles = (results["table"]["shapes"][shape]["values_per_s_per_core"] / 1e6 for shape in ("lists", "single"))
    assert f"{lists:.1f} M of 15 ids, 4 numbers and 5 lists a row, {singles:.1f} M without the 4 long lists" in README
    assert lists >= 5
    many = results["table_100m"]["shapes"]["single"]
    assert (many["rows"], results["table_100m"]["distinct"], many["memory_gib"]) == (100_000_000, 20_000_000, 2.0)
    own, mapped = many["peak_own_mb"][0], many["peak_mapped_mb"][0]
    assert f"{own:,} MB of own memory and {mapped} MB of mapped pages in all processes together" in README
    assert own + mapped < 2_500
    few = results["table_4m"]["shapes"]["single"]
    assert (few["rows"], results["table_4m"]["distinct"], few["memory_gib"]) == (4_000_000, 800_000, 2.0)
    assert f"a 25th of both takes {few['peak_own_mb'][0]:,} MB and {few['peak_mapped_mb'][0]} MB" in README
    assert own < 1.25 * few["peak_own_mb"][0], "memory of its own does not grow with rows and ids"
    layouts = results["layout"]["shapes"]["lists"]
    assert layouts["parquet lists"]["write_ns"] > 2 * layouts["as written"]["write_ns"]
    assert layouts["parquet lists"]["read_ns"] > 2 * layouts["as written"]["read_ns"]
    assert f"kill -9 at {results['kills']['kills']} random moments" in README
    assert results["kills"]["files_compared"] > 10
    kills = results["score_kills"]
    assert (
        f"kill -9 at {kills['kills']} random moments, the same command again | the bytes of an undisturbed job, in each of {kills['jobs']}"
        in README
    )
    assert kills["parts_compared"] == kills["jobs"] * 36
    soak = results["soak"]
    assert f"hit by {sum(soak['faults'].values())} faults at random moments" in README
    assert f"{soak['steps_done']:,} steps for {soak['steps']:,}, in {soak['seconds'] / 60:.0f} minutes" in README
    assert soak["equal"]
    _check_reader(results["reader"]["speed"])
    _check_training(results["train"]["results"], results["train_gpu"]["results"])
    _check_again(*results["train_again"]["results"])
    _check_first_step(results["first_step"]["results"])
    assert min(each["mb_per_s"] for each in text["whole"]) >= 20
    means = results["hillstrom"]["mean_calibration"]
    assert f"CTR {means['ctr']:.3f}, CVR {means['cvr_clicked']:.3f}, CTCVR {means['ctcvr']:.3f}" in README
    assert f"{15 - len(results['hillstrom']['outside'])} of 15 intervals" in README
    chosen = {each["world"]: each["against"] for each in results["study"]["chosen"]}
    for world in ("selection +0.8", "selection -0.8"):
        against = chosen[world]
        assert ", ".join(f"{against[name]['ratio']:.2f}" for name in ("esmm", "naive", "naive+ctcvr")) in README
        assert max(each["p_holm"] for each in against.values()) < 0.01


def _check_other_machine(results: dict[str, Any]) -> None:
    text, shapes = results["preprocess_xeon"]["whole"][-1], results["table_xeon"]["shapes"]
    assert f"On two cores of a Xeon {text['mb_per_s']:.0f} MB/s" in README
    lists, singles = (shapes[shape]["values_per_s_per_core"] / 1e6 for shape in ("lists", "single"))
    assert f"On two cores of a Xeon {lists:.1f} M and {singles:.1f} M" in README
    assert lists >= 5
    assert results["preprocess_xeon"]["machine"]["cores"] == results["table_xeon"]["machine"]["cores"] == 2


def _check_training(on_cores: list[dict[str, Any]], on_gpu: list[dict[str, Any]]) -> None:
    assert [each["ranks"] for each in on_cores] == [1, 2]
    for each in on_cores:
        ranks = f"{each['ranks']} rank{'s' * (each['ranks'] > 1)}"
        rows = round(statistics.median(each["parquet_rows_per_s"]), -3)
        assert f"{each['parquet_of_bare']:.2f} on {ranks} ({rows:,} rows/s)" in README
        assert f"{each['parquet_of_metrics']:.2f} on {ranks}" in README
        assert f"{each['metrics_of_bare']:.2f} on {ranks}" in README
        assert f"{statistics.median(each['checkpoint_s']):.1f} s on {ranks}" in README
        assert each["parquet_of_bare"] >= 0.95
        assert (1 - each["metrics_of_bare"]) + each["checkpoint_share_of_5_min"] < 0.03 + 0.005  # to the digits that are kept
    for each in on_gpu:
        assert f"{each['kernels_ms_a_step']:.1f} of {each['step_ms']:.1f} ms in {each['precision']}" in README


def _check_again(one: dict[str, Any], two: dict[str, Any]) -> None:
    told = []
    for each in (one, two):
        rounds = sorted(parquet / bare for parquet, bare in zip(each["parquet_rows_per_s"], each["bare_rows_per_s"], strict=True))
        told.append(
            f"{each['parquet_of_bare']:.2f} on {each['ranks']} rank{'s' * (each['ranks'] > 1)} ({rounds[0]:.2f} to {rounds[-1]:.2f})"
        )
    assert len(rounds) == 5
    assert ", ".join(told) in README
    metrics, checkpoint = (
        (f"{one['metrics_of_bare']:.2f} and {two['metrics_of_bare']:.2f}"),
        [f"{100 * each['checkpoint_share_of_5_min']:.1f}%" for each in (one, two)],
    )
    assert f"metrics alone {metrics}, a checkpoint {' and '.join(checkpoint)}" in README


def _check_reader(speed: dict[str, Any]) -> None:
    single, mix = speed["20 single"], speed["14 single, 6 lists"]
    (first, second), over = ([each["rows_per_s"]["reader"] for each in (single, mix)], [each["reader_over"] for each in (single, mix)])
    assert f"{first / 1e6:.2f} M rows/s of 20 single-valued columns, {second / 1e6:.2f} M of 14 single and 6 lists" in README
    assert f"{over[1]['data_loader']:.0f} times a torch DataLoader over rows" in README
    said = f"{over[0]['iter_batches']} and {over[1]['iter_batches']} of pyarrow's own iteration, which neither shuffles nor checks"
    assert said in README
    assert first >= 1.5e6
    assert second >= 0.9e6


def _check_first_step(measured: list[dict[str, Any]]) -> None:
    assert [each["ranks"] for each in measured] == [1, 2]
    (one, two), (again, again_two) = ([round(each[f"{how}_s"], 1) for each in measured] for how in ("fresh", "resumed"))
    assert f"{one} s on 1 rank, {two} s on 2 ranks by torchrun; resumed {again} s and {again_two} s" in README
    assert max(one, two, again, again_two) < 10


def test_the_study_of_the_docs_is_the_full_preset_of_this_code() -> None:
    """As many models, worlds and candidates as `study --preset full` trains, and no candidate that it does not know."""
    preset, study = PRESETS["full"], json.loads((ROOT / "docs" / "results" / "study.json").read_text(encoding="utf-8"))
    cells = sum(preset.seeds_of(world) for world in preset.worlds) * len(preset.candidates)
    assert (study["worlds"], study["candidates"], study["cells"]) == (len(preset.worlds), len(CANDIDATES), cells)
    assert f"{len(CANDIDATES)} candidates in {len(preset.worlds)} worlds, {cells:,} models" in README
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert f"{cells:,} trained models" in page
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) [\d.×⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+ \|", page.partition("## World by world")[2].partition("## ")[0], re.M))
    assert len(rows) == len(preset.worlds)
    assert {*rows.values(), *(each["candidate"] for each in study["chosen"])} <= set(CANDIDATES)


def test_the_configs_of_the_readme_hold_together() -> None:
    first, second = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", README, re.S | re.M))
    for tree in (first, {**first, **second}):
        config = parse_config(tree)
        refuse_idle(config)
        check_choice(config)
    assert len(config.choice.objectives) == 3

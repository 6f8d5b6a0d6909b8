"""The cross-fitted propensity: each row's is of the model that has not seen it, on any number of ranks."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from tests.encoded import write_dataset
from tests.ranks import run_ranks, train_on_ranks

ROWS = 3_000
SETTINGS = ["objective.kind=escm2-ips", "objective.propensity={cross_fit: true}", "training.log_every_steps=1"]
train = functools.partial(train_on_ranks, overrides=SETTINGS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": ROWS, "test": 500})


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for world_size in (1, 2):
        result = train(data, folder / str(world_size), folder / f"ranks-{world_size}", world_size)
        assert result.get("objective") == "escm2-ips", result
    return {world_size: folder / str(world_size) for world_size in (1, 2)}


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_cross_fitted_run_is_evaluated_by_its_ctr_tower(data: Path, runs: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "run")
    (result,) = run_ranks(1, [("tests.training_calls:evaluate_run", {"run": str(tmp_path / "run"), "data": str(data)})], tmp_path / "ranks")
    assert "metrics" in result, result
    assert (tmp_path / "run" / "report.html").is_file()


def test_halves_are_apart_and_together_the_split(data: Path) -> None:
    dataset = Dataset.open(data)
    halves = [Dataset(data, dataset.schema, dataset.manifest, half).row_groups("train") for half in (0, 1)]
    numbers = [group.number for half in halves for group in half]
    assert sorted(numbers) == [group.number for group in dataset.row_groups("train")]
    assert len(halves[0]) > 5
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    starts = [group.start for group in dataset.row_groups("train")]
    assert starts == np.cumsum([0, *(group.num_rows for group in dataset.row_groups("train"))])[:-1].tolist()


@pytest.mark.parametrize("world_size", [1, 3])
def test_places_are_those_of_the_rows(data: Path, world_size: int) -> None:
    """`kept.row_id` counts the rows of the split: what a batch holds stands where `places` says."""
    dataset = Dataset.open(data)
    half = Dataset(data, dataset.schema, dataset.manifest, 1)
    seen = []
    for rank in range(world_size):
        reader = Reader(half, "train", 256, rank, world_size, lanes=world_size, shuffle=False, extra_columns=("kept.row_id",))
        for step, (batch, extra) in enumerate(reader.batches(0)):
            places = reader.places(step)
            assert len(places) == batch.num_rows
            if len(places):
                assert places.tolist() == extra.column("kept.row_id").to_pylist()
            seen += places.tolist()
    assert sorted(seen) == [row for group in half.row_groups("train") for row in range(group.start, group.start + group.num_rows)]


def test_batches_hold_the_logit_of_each_row(data: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", np.arange(ROWS, dtype=np.float32))
    reader = Reader(Dataset.open(data), "train", 256, extra_columns=("kept.row_id",), propensity_logits=tmp_path / "logits.npy")
    rows = 0
    for batch, extra in reader.batches(0):
        assert batch.propensity_logit is not None
        assert batch.propensity_logit[: batch.num_rows].tolist() == extra.column("kept.row_id").to_pylist()
        rows += batch.num_rows
    assert rows == ROWS


def test_one_and_two_ranks_cross_fit_and_train_alike(runs: dict[int, Path]) -> None:
    one, two = (np.load(runs[world_size] / "propensity" / "logits.npy") for world_size in (1, 2))
    assert one.shape == (ROWS,)
    assert one.std() > 0.01
    np.testing.assert_allclose(two, one, atol=1e-4)
    for left, right in zip(records(runs[1]), records(runs[2]), strict=True):
        assert right["loss_cvr"] == pytest.approx(left["loss_cvr"], abs=1e-4)


def test_no_logit_is_of_a_model_that_saw_its_row(data: Path, runs: dict[int, Path], tmp_path: Path) -> None:
    """Clicks of one half turned round: the logits of that half stay to the last bit, since its model never saw them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turned = tmp_path / "turned"
    shutil.copytree(data, turned)
    dataset = Dataset.open(data)
    mine = {(group.path.name, group.index) for group in Dataset(data, dataset.schema, dataset.manifest, 0).row_groups("train")}
    for path in sorted((turned / "train").glob("*.parquet")):
        file = pq.ParquetFile(path)
        groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
        with pq.ParquetWriter(path, file.schema_arrow) as writer:
            for index, group in enumerate(groups):
                if (path.name, index) in mine:
                    click = pa.array(1 - group.column("click").to_numpy(), group.schema.field("click").type)
                    group = group.set_column(group.schema.get_field_index("click"), "click", click)
                writer.write_table(group, row_group_size=len(group))
    result = train(turned, tmp_path / "run", tmp_path / "ranks")
    assert result.get("objective") == "escm2-ips", result
    before, after = (np.load(run / "propensity" / "logits.npy") for run in (runs[1], tmp_path / "run"))
    inside = np.zeros(ROWS, bool)
    for group in Dataset(data, dataset.schema, dataset.manifest, 0).row_groups("train"):
        inside[group.start : group.start + group.num_rows] = True
    assert (before[inside] == after[inside]).all()
    assert (before[~inside] != after[~inside]).mean() > 0.9


def test_a_cross_fitting_that_was_cut_off_goes_on(data: Path, runs: dict[int, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs[1], out)
    for path in (out / "manifest.json", out / "propensity" / "manifest.json", out / "propensity" / "logits.npy"):
        path.unlink()
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "propensity" / "half-1")
    assert "--resume goes on with the run" in train(data, out, tmp_path / "refused")["hint"]
    kept = (out / "propensity" / "half-0" / "manifest.json").stat().st_mtime_ns
    result = train(data, out, tmp_path / "ranks", resume=True)
    assert result.get("objective") == "escm2-ips", result
    assert (out / "propensity" / "half-0" / "manifest.json").stat().st_mtime_ns == kept
    assert (np.load(out / "propensity" / "logits.npy") == np.load(runs[1] / "propensity" / "logits.npy")).all()
    assert [record["loss_cvr"] for record in records(out)] == [record["loss_cvr"] for record in records(runs[1])]


def test_one_row_group_has_no_halves(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "set", {"train": 100})
    result = train(made, tmp_path / "run", tmp_path / "ranks")
    assert "objective.propensity.cross_fit halves the row groups of the training split" in result["message"]
    assert not (tmp_path / "run").exists()

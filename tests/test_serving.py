"""What `export` writes: every format and kind of weights, served without this library, and what it says of itself."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from escm2rec.config import load_config
from escm2rec.errors import ConfigError, DataError, RunError
from escm2rec.evaluation.metrics import auc, calibration
from escm2rec.paths import data_path
from escm2rec.preprocess import preprocess
from escm2rec.reader.columns import decode
from escm2rec.reader.dataset import Dataset
from escm2rec.scoring.options import Options
from escm2rec.scoring.score import score
from escm2rec.serving import artifact as artifact_module
from escm2rec.serving.artifact import Artifact
from escm2rec.serving.export import export
from escm2rec.serving.formats import FILES, Format
from escm2rec.serving.model import OUTPUTS, example_inputs, model_inputs
from escm2rec.serving.quality import refuse_other
from escm2rec.serving.weights import Weights, look_up, pack
from escm2rec.training.run import Run
from escm2rec.training.train import train
from tests.raw_tables import CONFIG, raw_table
from tests.s3_server import s3_server
from tests.small_disks import small_disk

FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical", "managed_size": 400},
    {"name": "shop", "kind": "categorical", "min_count": 2},
    {"name": "tags", "kind": "list", "managed_size": 20, "pooling": "sum"},
    {"name": "words", "kind": "list", "column": "tags"},
    {"name": "history", "kind": "weighted_list", "weights_column": "history_weight", "hash_size": 40},
    {"name": "price", "kind": "numeric", "log1p": True},
]
MODELS: dict[str, list[str]] = {
    "averaged": ["training.ema_decay=0.9"],
    "linear": ["model.tower_hidden=[]"],
    "mmoe": ["model.backbone={kind: mmoe, experts: 3, hidden: [12]}"],
    "ple": ["model.backbone={kind: ple, hidden: [12]}"],
    "dcn": ["model.backbone={kind: dcn_v2, hidden: [12]}"],
    "experts": ["model.backbone={kind: dcn_v2, rank: 4, experts: 2, hidden: [12]}"],
    "half": ["training.precision=bfloat16"],
    "stable": ["objective={kind: stable-dr}"],
}
COMPILED: tuple[Weights, ...] = ("fp32", "int4")  # of aoti, which takes 10 seconds each; it is the same graph with others
FORMATS: tuple[Format, ...] = ("torch-export", "torchscript", "aoti")
WEIGHTS: tuple[Weights, ...] = ("fp32", "bf16", "int8", "int4")
CASES = [(format, weights) for format in FORMATS for weights in WEIGHTS if format != "aoti" or weights in COMPILED]
BATCHES = (0, 1, 2, 3, 700)
LARGEST = {"fp32": 1e-6, "bf16": 2e-3, "int8": 5e-3, "int4": 0.05}  # difference of a probability from fp32
TIMEOUT_S = 240

ALONE = """
import importlib.abc, sys

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("escm2rec", "torchrec", "fbgemm_gpu", "pyarrow", "polars"):
            raise ImportError(f"{name} is not for serving")

sys.meta_path.insert(0, Refuses())
import torch
from pathlib import Path

folder, cases = Path(sys.argv[1]), sys.argv[2:]
batches = torch.load(folder / "batches.pt")
results = {}
for case in cases:
    file, format = next((folder / case).glob("model.*")), case.rpartition("-")[0]
    if format == "torchscript":
        model = torch.jit.load(file)
    elif format == "torch-export":
        model = torch.export.load(file).module()
    else:
        model = torch._inductor.aoti_load_package(str(file))
    with torch.no_grad():
        results[case] = [model(*batch) for batch in batches]
        refused = []
        for place, row, value, message in torch.load(folder / "wrong.pt"):
            batch = [each.clone() for each in batches[-1]]
            batch[place][row] = value
            try:
                model(*batch)
                refused.append(None)
            except Exception as error:
                refused.append(message in str(error))
        assert refused == [True] * 5, (case, refused)
        values, lengths, numeric, weights = batches[-1]
        spoiled = [(values, lengths, numeric.double(), weights), (values, lengths, numeric[1:], weights)]
        spoiled += [(values, lengths[1:], numeric, weights), (values, lengths, numeric, weights[1:]), (values, lengths, numeric)]
        for number, inputs in enumerate(spoiled):
            try:
                model(*inputs)
            except Exception:
                continue
            raise SystemExit(f"{case} takes wrong inputs {number}")
torch.save(results, folder / "results.pt")
assert not {"escm2rec", "fbgemm_gpu", "torchrec"} & set(sys.modules)
"""


@pytest.fixture(autouse=True, scope="module")
def short_rates() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("escm2rec.serving.quality.ROUND_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("a folder of models")
    (root / "logs").mkdir()
    (root / "in").mkdir()
    pq.write_table(raw_table(4_000, 0, labels=True), root / "logs" / "train.parquet")
    pq.write_table(raw_table(1_000, 1), root / "in" / "a.parquet")
    pq.write_table(raw_table(300, 2), root / "in" / "b.parquet")
    split = {"by": "hash", "train": 0.7, "test": 0.3}
    config = {**CONFIG, "data": {**CONFIG["data"], "features": FEATURES, "split": split}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    preprocess(load_config(root / "config.yaml").data, root / "logs", root / "data")
    train(load_config(root / "config.yaml"), root / "data", root / "run")
    return root


@pytest.fixture(scope="module")
def artifacts(folder: Path) -> Path:
    """One of each case, named FORMAT-WEIGHTS."""
    for format, weights in CASES:
        export(folder / "run", folder / f"{format}-{weights}", format, weights)
    return folder


def scored(folder: Path, out: Path, run: Path | None = None, **options: Any) -> pl.DataFrame:
    model = options.pop("model", None)
    score(run, [folder / "in"], out, Options(columns=["row", *OUTPUTS], **options), model=model)
    return pl.concat([pl.read_parquet(path) for path in sorted(out.glob("part-*"))])


# --- the model -----------------------------------------------------------------------------------


def test_every_format_and_weights_serves_batches_of_any_size_by_torch_alone(artifacts: Path) -> None:
    dataset = Dataset.open(artifacts / "data")
    table = pq.read_table(next((artifacts / "data" / "test").glob("*.parquet")))
    columns = decode(table, dataset.schema, labels=False, where="test")
    assert columns.num_rows > BATCHES[-1]
    batches = [model_inputs(columns, 0, rows, dataset.schema) for rows in BATCHES]
    torch.save(batches, artifacts / "batches.pt")
    no_id, no_length = "values: one is below 0, or is no id of its feature", "lengths: one is below 0, or they do not add up"
    wrong = [(0, -1, 40, no_id), (0, 0, -1, no_id), (0, 3, 1 << 62, no_id), (1, (0, 0), 2, no_length), (1, (2, 0), -1, no_length)]
    torch.save(wrong, artifacts / "wrong.pt")
    names = [f"{format}-{weights}" for format, weights in CASES]
    command, checks = [sys.executable, "-c", ALONE, str(artifacts), *names], {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=artifacts, env=checks)
    assert done.returncode == 0, done.stderr
    results = torch.load(artifacts / "results.pt")
    assert list(results) == names
    expected = results["torchscript-fp32"]
    for (_, weights), name in zip(CASES, names, strict=True):
        for rows, outputs, same, right in zip(BATCHES, results[name], results[f"torchscript-{weights}"], expected, strict=True):
            assert [each.shape for each in outputs] == [(rows,)] * len(OUTPUTS)
            assert all(each.dtype == torch.float32 for each in outputs)
            for output, alike, of_fp32 in zip(outputs[:3], same, right, strict=False):
                torch.testing.assert_close(output, alike, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(output, of_fp32, rtol=0, atol=LARGEST[weights])
        whole = results[name][-1]
        for rows, outputs in zip(BATCHES, results[name], strict=True):
            torch.testing.assert_close([each[:rows] for each in whole], list(outputs), rtol=1e-6, atol=1e-6)
    assert (results["torchscript-int4"][-1][0] - expected[-1][0]).abs().max() > 1e-5


@pytest.mark.parametrize("model", MODELS)
def test_a_model_predicts_as_its_run_does(folder: Path, model: str, tmp_path: Path) -> None:
    run = folder / model
    train(load_config(folder / "config.yaml", ["training.epochs=1", *MODELS[model]]), folder / "data", run)
    expected = scored(folder, tmp_path / "of-run", run)
    for format in FORMATS[:2]:
        export(run, tmp_path / format, format, rows=100)
        found = scored(folder, tmp_path / f"of-{format}", model=tmp_path / format)
        assert found["row"].equals(expected["row"])
        rtol, atol = (1e-2, 1e-2) if model == "half" else (1e-6, 2e-6)
        for name in OUTPUTS:
            np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=atol, err_msg=f"{format}: {name}")
    assert expected["ctr_logit"].std() > 0.01  # type: ignore[operator]


def test_a_model_without_numbers_is_exported(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "config.yaml", [f"data.features={json.dumps(FEATURES[1:2])}"])
    train(config, _other_schema(folder), tmp_path / "run")
    expected = scored(folder, tmp_path / "of-run", tmp_path / "run")
    for format in FORMATS[:2]:
        export(tmp_path / "run", tmp_path / format, format, "int8")
        found = scored(folder, tmp_path / f"of-{format}", model=tmp_path / format)
        for name in OUTPUTS[:3]:
            np.testing.assert_allclose(found[name], expected[name], atol=LARGEST["int8"])


# --- weights -------------------------------------------------------------------------------------


SIZES = [("int8", 16, 0.375), ("int8", 64, 0.28125), ("int4", 16, 0.1875), ("bf16", 16, 0.5)]


@pytest.mark.parametrize(("weights", "dim", "of_fp32"), SIZES)
def test_packed_tables_are_so_small(weights: Weights, dim: int, of_fp32: float, tmp_path: Path) -> None:
    tables = torch.randn(1_000, dim)
    packed = pack(tables, weights, tmp_path / "packed.bin")
    assert packed.nbytes == of_fp32 * tables.nbytes == (tmp_path / "packed.bin").stat().st_size


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_row_is_off_by_half_a_step_of_its_own_range_at_the_most(
    weights: Weights, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("escm2rec.serving.weights.CHUNK_BYTES", 4 * 16 * 100)  # several chunks, the last one short
    tables = scale * torch.randn(250, 16, generator=torch.Generator().manual_seed(0))
    tables[7] = 0
    rows = torch.arange(250)
    found = look_up(pack(tables, weights, tmp_path / "packed.bin"), weights, rows, torch.arange(251), None)
    largest, range_ = tables.abs().amax(dim=1, keepdim=True), (tables.amax(dim=1) - tables.amin(dim=1)).unsqueeze(1)
    # FBGEMM adds 1e-8 to the range of int8. Scale and offset of int4 are float16: 2^-11 of either, or the least of float16.
    half = largest * 2**-10 + 2**-24 * 16
    allowed = {"fp32": 0 * largest, "bf16": largest * 2**-8, "int8": range_ / 255 * 0.51 + 1e-8, "int4": range_ / 15 * 0.51 + half}[weights]
    assert ((found - tables).abs() <= allowed + 1e-12).all()
    assert (found[7] == 0).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bags_are_sums_of_rows_times_their_weights(weights: Weights, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    packed = pack(torch.randn(50, 8, generator=generator), weights, tmp_path / "packed.bin")
    rows, ends = torch.randint(0, 50, (9,), generator=generator), torch.tensor([0, 4, 4, 9])
    times = torch.rand(9, generator=generator)
    each = look_up(packed, weights, rows, torch.arange(10), None)
    for scales in (None, times):
        found = look_up(packed, weights, rows, ends, scales)
        scaled = each if scales is None else each * scales.unsqueeze(1)
        expected = torch.stack([scaled[:4].sum(0), torch.zeros(8), scaled[4:].sum(0)])
        torch.testing.assert_close(found, expected, rtol=2e-2 if weights == "bf16" else 1e-5, atol=3e-2 if weights == "bf16" else 1e-5)


# --- the folder ----------------------------------------------------------------------------------


def test_the_manifest_says_what_the_model_takes_and_what_it_loses(artifacts: Path) -> None:
    schema = Run.open(artifacts / "run").schema
    of_format = {}
    for format, weights in CASES:
        path = artifacts / f"{format}-{weights}"
        manifest = json.loads((path / "manifest.json").read_text())
        of_format[format, weights] = manifest
        names = {str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()}
        assert names == {
            "manifest.json",
            "schema.json",
            "coverage.json",
            FILES[format],
            "vocabulary/shop.parquet",
            "vocabulary/words.parquet",
        }
        assert (manifest["format"], manifest["weights"], manifest["run"]) == (format, weights, str(artifacts / "run"))
        assert manifest["model"]["bytes"] == (path / FILES[format]).stat().st_size
        assert manifest["schema_hash"] == schema.hash()
        assert manifest["outputs"] == list(OUTPUTS)
        assert [each["name"] for each in manifest["inputs"]] == ["values", "lengths", "numeric", "weights"]
        tables = [each["name"] for each in FEATURES[:-1]]
        assert [each["name"] for each in manifest["inputs"][0]["features"]] == tables == manifest["inputs"][1]["features"]
        assert manifest["inputs"][1]["shape"] == [5, "batch"]
        assert manifest["inputs"][2] == {"name": "numeric", "type": "float32", "shape": ["batch", 1], "features": ["price"]}
        assert manifest["inputs"][3]["features"] == ["history"]
        quality = manifest["quality"]
        assert (quality["data"], quality["split"], quality["batch_rows"]) == (str(artifacts / "data"), "test", 4096)
        assert quality["rows"] == Dataset.open(artifacts / "data").split_counts("test")["rows"]
        assert min(quality["rows_per_s"].values()) > 0
        for name in OUTPUTS:
            difference = quality["difference"][name]
            assert 0 <= difference["mean"] <= difference["largest"] <= 8 * LARGEST[weights]
            assert (difference["mean"] > 0) == (weights != "fp32")
        labelled = sorted((artifacts / "data" / "test").iterdir())
    table = pl.concat([pl.read_parquet(each, columns=["click", "conversion"]) for each in labelled])
    for weights in ("fp32", "int8"):
        out = artifacts / f"predicted-{weights}"
        score(None, [artifacts / "data" / "test"], out, Options(columns=list(OUTPUTS)), model=artifacts / f"torchscript-{weights}")
        found = pl.concat([pl.read_parquet(each) for each in sorted(out.glob("part-*"))])
        told = of_format["torchscript", weights]["quality"]["metrics"]
        clicked = table["click"].to_numpy() > 0
        key = "artifact"
        for task, logits, labels in (
            ("ctr", found["ctr_logit"].to_numpy(), table["click"].to_numpy()),
            ("cvr", found["cvr_logit"].to_numpy()[clicked], table["conversion"].to_numpy()[clicked]),
        ):
            assert told[task]["auc"][key] == pytest.approx(auc(logits, labels), abs=1e-9)
            assert told[task]["calibration"][key] == pytest.approx(calibration(logits, labels), rel=1e-6)
            for name in ("auc", "calibration"):
                each = told[task][name]
                assert each["change"] == each["artifact"] - each["fp32"]


def test_quality_is_measured_on_so_many_rows_and_without_a_label_says_nothing(folder: Path, tmp_path: Path) -> None:
    told = export(folder / "run", tmp_path / "one", rows=1, data=folder / "data", split="train")
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert told["measured_rows"] == manifest["quality"]["rows"] == 1
    assert manifest["quality"]["metrics"]["ctr"]["auc"] == {"fp32": None, "artifact": None, "change": None}
    assert told["auc_change"] == {"ctr": None, "cvr": None, "ctcvr": None}


def test_score_takes_an_artifact_in_every_layout_of_processes(artifacts: Path, tmp_path: Path) -> None:
    model = artifacts / "torch-export-int8"
    expected = scored(artifacts, tmp_path / "one", model=model)
    several = scored(artifacts, tmp_path / "two", model=model, processes=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "apps/score.py"]
    options = ["--model", str(model), "--input", str(artifacts / "in"), "--out", str(tmp_path / "ranks"), "--columns"]
    done = subprocess.run([*command, *options, ",".join(["row", *OUTPUTS])], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    ranks = pl.concat([pl.read_parquet(path) for path in sorted((tmp_path / "ranks").glob("part-*"))])
    assert expected.height == 1_300
    for found in (several, ranks):
        assert found["row"].equals(expected["row"])
        for name in OUTPUTS:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["model"] == str(model)
    assert "run" not in manifest
    assert manifest["features"]["shop"]["oov"]["training"] is not None
    assert sorted(each.name for each in (tmp_path / "one").iterdir()) == ["manifest.json", "part-00000.parquet", "part-00001.parquet"]


def test_the_ten_lines_of_the_documentation_give_what_score_gives(folder: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "serving.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line]) == 10
    features = [{"name": name, "kind": "categorical"} for name in ("user", "shop")] + FEATURES[-1:]
    config = load_config(folder / "config.yaml", [f"data.features={json.dumps(features)}"])
    preprocess(config.data, folder / "logs", tmp_path / "data")
    train(config, tmp_path / "data", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    told = "import json; print(json.dumps([candidates, p_ctr.tolist(), p_cvr.tolist(), p_ctcvr.tolist()]))"
    done = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    candidates, *found = json.loads(done.stdout)
    pq.write_table(pa.Table.from_pylist(candidates), tmp_path / "candidates.parquet")
    score(tmp_path / "run", [tmp_path / "candidates.parquet"], tmp_path / "out", Options(columns=list(OUTPUTS[:3])))
    expected = pl.read_parquet(tmp_path / "out" / "part-00000.parquet")
    assert expected.height == 2
    np.testing.assert_allclose(found, [expected[name] for name in OUTPUTS[:3]], rtol=1e-5)
    assert found[0][0] != found[0][1]


def test_runs_and_artifacts_on_a_store_are_fetched(artifacts: Path, tmp_path: Path) -> None:
    with s3_server("models"):
        store = fsspec.filesystem("s3")
        store.put(str(artifacts / "run"), "models/run", recursive=True)
        told = export(data_path("s3://models/run"), tmp_path / "model", "torchscript", "int8")
        assert (told["format"], told["weights"]) == ("torchscript", "int8")
        assert json.loads((tmp_path / "model" / "manifest.json").read_text())["run"] == "s3://models/run"
        store.put(str(tmp_path / "model"), "models/model", recursive=True)
        found = scored(artifacts, tmp_path / "out", model=data_path("s3://models/model"))
        assert found.equals(scored(artifacts, tmp_path / "here", model=artifacts / "torchscript-int8"))
        store.pipe("models/model/model.pt", b"another")
        with pytest.raises(DataError, match=r"^s3://models/model/model\.pt is damaged: it is not the file that was written\n"):
            scored(artifacts, tmp_path / "damaged", model=data_path("s3://models/model"))


# --- what is wrong -------------------------------------------------------------------------------


def test_an_artifact_that_is_not_what_was_written_is_refused(artifacts: Path, tmp_path: Path) -> None:
    def spoiled(name: str, of: str = "torchscript-fp32") -> Path:
        return Path(shutil.copytree(artifacts / of, tmp_path / name))

    file = (flipped := spoiled("flipped")) / "model.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (cut := spoiled("cut")).joinpath("model.pt").write_bytes(content[:-1])
    (gone := spoiled("gone")).joinpath("model.pt").unlink()
    (mixed := spoiled("mixed")).joinpath("schema.json").write_text((_other_schema(artifacts) / "schema.json").read_text())
    (partial := spoiled("partial")).joinpath("manifest.json").unlink()
    damaged = "is damaged: it is not the file that was written\nhint: copy it again, or export it again$"
    for model, message in (
        (flipped, f"^{flipped}/model.pt {damaged}"),
        (cut, f"^{cut}/model.pt {damaged}"),
        (gone, f"^{gone}/model.pt is missing, the manifest names it\nhint: export it again$"),
        (mixed, f"^the artifact at {mixed} mixes two: manifest and schema.json differ in their schema hash\nhint: export it again$"),
        (
            partial,
            f"^the artifact at {partial} is incomplete: it has no manifest.json\nhint: run the command that makes",
        ),
        (tmp_path / "no", f"^no artifact at {tmp_path}/no\nhint: did you mean .*"),
        (artifacts / "run", f"^{artifacts}/run is no artifact: its manifest.json says 'run'\nhint: give the folder that export made"),
    ):
        with pytest.raises(DataError, match=message):
            score(None, [artifacts / "in"], tmp_path / "out", model=model)
        assert not list(tmp_path.glob("*out*")), "nothing stays of a job that could not begin"


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_torch_cannot_read_is_told_with_both_releases(artifacts: Path, format: Format, tmp_path: Path) -> None:
    opened = Artifact.open(artifacts / f"{format}-fp32")
    (tmp_path / FILES[format]).write_bytes(b"no model")
    here = torch.__version__.partition("+")[0]
    told = f"^torch {here} cannot read {tmp_path}/{FILES[format]}, which torch {here} wrote: "
    with pytest.raises(DataError, match=told) as caught:
        replace(opened, path=tmp_path).load()
    assert caught.value.hint == "export it again"


def _other_schema(folder: Path) -> Path:
    """A data set of the same logs, encoded by another schema."""
    out = folder / "other"
    if not out.exists():
        config = load_config(folder / "config.yaml", [f"data.features={json.dumps(FEATURES[1:2])}"])
        preprocess(config.data, folder / "logs", out)
    return out


def test_compiled_code_runs_where_it_was_made_for(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Artifact.open(artifacts / "aoti-fp32")
    opened.check()
    with monkeypatch.context() as patch:
        patch.setattr(artifact_module, "release", lambda: "2.99.0")
        Artifact.open(artifacts / "torchscript-fp32").check()
        with pytest.raises(DataError, match=f"^the artifact at {opened.path} was compiled for torch .*, this is 2.99.0\n"):
            opened.check()
    with monkeypatch.context() as patch:
        patch.setattr(artifact_module, "machine", lambda: "riscv64")
        with pytest.raises(DataError, match=r"was compiled for processor \w+, this is riscv64\nhint: export it again, here$"):
            opened.check()
    more = {**opened.manifest, "cpu": {**opened.manifest["cpu"], "features": ["avx1024", *opened.manifest["cpu"]["features"]]}}
    with pytest.raises(DataError, match="was compiled for a processor with avx1024\n"):
        replace(opened, manifest=more).check()


def test_what_cannot_be_exported_is_told_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    run, out = folder / "run", tmp_path / "out"
    with pytest.raises(DataError, match=r"^the data set at .*/data has no rows in split 'validation'\nhint: it has rows in: train, test$"):
        export(run, out, split="validation")
    with pytest.raises(DataError, match=f"^{folder}/other is encoded by another schema than that of {run}\nhint: give"):
        export(run, out, data=_other_schema(folder))
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    assert manifest["data"] == str(folder / "data")
    told = "^quality is measured on rows of the data set that .*moved was trained on, and "
    for data, where in (("/nowhere", "/nowhere is not there"), (None, "it does not say where")):
        (moved / "manifest.json").write_text(json.dumps({**manifest, "data": data}))
        with pytest.raises(DataError, match=f"{told}{where}\nhint: give one of the same schema: --data DATA$"):
            export(moved, out)
    with pytest.raises(ConfigError, match=f"^will not overwrite {run}: it holds no artifact that escm2rec made\n"):
        export(run, run, overwrite=True)
    for inside in (run / "checkpoints" / "model", folder / "data" / "test" / "model"):
        with pytest.raises(ConfigError, match=f"^the output folder {inside} lies in {folder}/(run|data), and would go with it\nhint"):
            export(run, inside)
    assert not list(tmp_path.glob("*out*"))


def test_the_batch_that_a_model_is_traced_by_has_sizes_of_its_own(folder: Path) -> None:
    schema = Run.open(folder / "run").schema
    for features in (schema.features, schema.features[1:2], schema.features[4:], schema.features[:1]):
        ids, lengths, numeric, *weights = example_inputs(schema.model_copy(update={"features": features}))
        rows = lengths.shape[1]
        assert 1 < rows < len(ids) == int(lengths.sum())
        assert len(ids) % rows
        assert numeric.shape == (rows, sum(not each.is_table for each in features))
        assert [len(each) for each in weights] == [len(ids)] * any(each.kind == "weighted_list" for each in features)


@pytest.mark.parametrize("format", FORMATS[:2])
def test_a_full_disk_is_told_before_the_model_is_written(folder: Path, format: Format, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        with pytest.raises(RunError, match="No space left on device") as caught:
            export(folder / "run", disk / "model", format)
        assert "run the same command again" in caught.value.hint
        assert not list(disk.iterdir())
        del caught  # it holds what maps the tables
        gc.collect()


def test_a_model_that_changed_is_found_when_a_job_goes_on(artifacts: Path, tmp_path: Path) -> None:
    model, logs = Path(shutil.copytree(artifacts / "torchscript-fp32", tmp_path / "model")), tmp_path / "logs"
    logs.mkdir()
    shutil.copy(artifacts / "in" / "a.parquet", logs)
    pq.write_table(raw_table(5, 1).drop_columns(["shop"]), logs / "b.parquet")
    with pytest.raises(DataError, match="shop"):
        score(None, [logs], tmp_path / "out", model=model)
    shutil.copy(artifacts / "in" / "b.parquet", logs)
    content = (model / "model.pt").read_bytes()
    (model / "model.pt").write_bytes(bytes([content[0] ^ 1]) + content[1:])  # in place: what the job linked changes too
    with pytest.raises(DataError, match=f"^{model}/model.pt is damaged"):
        score(None, [logs], tmp_path / "out", model=model)
    (model / "model.pt").write_bytes(content)
    assert score(None, [logs], tmp_path / "out", model=model)["files_done_before"] == 1


def test_an_artifact_whose_coverage_is_damaged_is_told_at_once(artifacts: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(artifacts / "torchscript-fp32", tmp_path / "model"))
    (model / "coverage.json").write_text("{")
    with pytest.raises(DataError, match=f"^{model}/coverage.json is not readable JSON: .*\nhint: copy the folder again"):
        score(None, [artifacts / "in"], tmp_path / "out", model=model)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_without_a_compiler_aoti_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"^--format aoti compiles the model, and there is no C\+\+ compiler\nhint: install g\+\+"):
        export(folder / "run", tmp_path / "out", "aoti")
    assert not list(tmp_path.iterdir())


def test_a_model_that_predicts_otherwise_when_read_back_is_no_artifact() -> None:
    right, wrong = (torch.zeros(3),) * 5, (torch.zeros(3), torch.tensor([0.0, 2e-5, 0.0]), *(torch.zeros(3),) * 3)
    refuse_other(lambda *_: right, lambda *_: right, (), in_half=False)
    refuse_other(lambda *_: wrong, lambda *_: right, (), in_half=True)
    with pytest.raises(RunError, match=r"^the exported model gives another p_cvr than the run's, by 2e-05 on a batch of 3\n"):
        refuse_other(lambda *_: wrong, lambda *_: right, (), in_half=False)
    nan = (torch.full((3,), torch.nan),) * 5
    with pytest.raises(RunError, match="another p_ctr"):
        refuse_other(lambda *_: nan, lambda *_: right, (), in_half=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "^give either --run or --model\nhint: --run takes what train made, --model what export made of it$"),
        ({"run": Path("a"), "model": Path("b")}, "^give either --run or --model\n"),
        ({"model": Path("b"), "options": Options(tables="shared")}, "^--tables is of runs: a model that was exported is loaded whole\n"),
        ({"model": Path("b"), "options": Options(columns=["q = propensity"])}, "^a model that was exported has no propensity"),
        ({"model": Path("b"), "options": Options(top_k=1, by="user", score="propensity")}, "^a model that was exported has no propensity"),
    ],
)
def test_score_refuses_what_does_not_go_with_a_model(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        score(arguments.get("run"), ["in"], tmp_path / "out", arguments.get("options"), model=arguments.get("model"))

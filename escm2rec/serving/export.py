"""The `export` verb: a run in, one folder out that serves without it."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from escm2rec.config import Split
from escm2rec.disk import telling_of_disk
from escm2rec.doctor import require_matching_packages
from escm2rec.errors import ConfigError, DataError
from escm2rec.folder import ANEW, new_folder, refuse_existing, refuse_overlap, sha256_of, write_manifest
from escm2rec.paths import DataPath, copy_folder, data_path
from escm2rec.reader.dataset import Dataset
from escm2rec.serving.artifact import cpu_features, machine, release
from escm2rec.serving.formats import Format, load_model, save_model
from escm2rec.serving.mapped import managed_rows, mapped_tables, trained_head, write_model
from escm2rec.serving.model import OUTPUTS, ServedModel, describe_inputs, example_inputs, model_inputs
from escm2rec.serving.quality import measure, refuse_other, sample
from escm2rec.serving.weights import Weights, pack
from escm2rec.sharding.runtime import Runtime, distributed_runtime
from escm2rec.training.fetched import run_here
from escm2rec.training.run import COVERAGE, Run

QUALITY_ROWS = 100_000
FEW_ROWS = 4  # of a batch that must give the same when the model is read back
TIMES: dict[Format, int] = {"torch-export": 1, "torchscript": 1, "aoti": 3}  # its bytes that are on the disk while it is written
MORE_BYTES = 8 << 20  # code and the like
Record = dict[str, Any]

logger = logging.getLogger(__name__)


def export(
    run: DataPath,
    out: Path,
    format: Format = "torch-export",
    weights: Weights = "fp32",
    data: DataPath | None = None,
    split: Split = "test",
    rows: int = QUALITY_ROWS,
    overwrite: bool = False,
) -> Record:
    """Write the model of a run as one folder that torch alone can serve.

    What it loses beside the run's model in float32 is measured on the first `rows` rows of a split of `data`, by default of the data set
    that the run was trained on, and stands in the manifest. DataError where there are no such rows, ConfigError where a compiler is
    lacking, RunError where the model that is read back predicts otherwise than the one that was written.
    """
    require_matching_packages()
    started = time.perf_counter()
    with distributed_runtime() as runtime, run_here(run, runtime) as here:
        _refuse_ranks(runtime)
        refuse_existing(out, "artifact", overwrite)
        opened = Run.open(here)
        dataset = _dataset(opened, run, data)
        dataset.split_counts(split)
        refuse_overlap(out, [run, dataset.path])
        _refuse_inside(out, [run, dataset.path])
        with new_folder(out, "artifact", overwrite) as folder, telling_of_disk(folder, ANEW):
            with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
                content = _export(opened, dataset, split, rows, Path(work), folder, format, weights)
            content = {"run": str(run), "checkpoint": opened.manifest["checkpoint"], **content}
            write_manifest(folder, "artifact", {**content, "seconds": round(time.perf_counter() - started, 3)})
    return {"artifact": str(out), **_in_short(content), "seconds": round(time.perf_counter() - started, 3)}


def _in_short(content: Record) -> Record:
    """What a person looks at first; the manifest has all."""
    quality = content["quality"]
    changes = {name: {task: told[name]["change"] for task, told in quality["metrics"].items()} for name in ("auc", "calibration")}
    return {
        **{name: content[name] for name in ("format", "weights")},
        "model_bytes": content["model"]["bytes"],
        "tables_of_fp32": round(content["tables"]["bytes"] / content["tables"]["fp32_bytes"], 4),
        "measured_rows": quality["rows"],
        "largest_difference": max(quality["difference"][name]["largest"] for name in OUTPUTS[:3]),
        **{f"{name}_change": change for name, change in changes.items()},
        "rows_per_s": quality["rows_per_s"],
    }


def _refuse_ranks(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        raise ConfigError(f"export is the work of one process, and torchrun started {runtime.world_size}", "run escm2rec export by itself")


def _refuse_inside(out: Path, places: Sequence[DataPath]) -> None:
    for place in places:
        if isinstance(place, Path) and out.resolve().is_relative_to(place.resolve()):
            raise ConfigError(f"the output folder {out} lies in {place}, and would go with it", "choose another --out")


def _refuse_full_disk(model: ServedModel, format: Format, folder: Path) -> None:
    """OSError where there is no room for the model: torch's own writers end the process."""
    size = TIMES[format] * sum(each.nbytes for each in (*model.parameters(), *model.buffers())) + MORE_BYTES
    room = folder / ".room"
    try:
        with room.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        room.unlink(missing_ok=True)


def _dataset(opened: Run, run: DataPath, data: DataPath | None) -> Dataset:
    """The data set whose rows the quality is measured on."""
    if data is None:
        recorded = opened.manifest.get("data")
        place = None if recorded is None else data_path(recorded)
        if place is None or not place.is_dir():
            where = "it does not say where" if place is None else f"{place} is not there"
            hint = "give one of the same schema: --data DATA"
            raise DataError(f"quality is measured on rows of the data set that {run} was trained on, and {where}", hint)
        data = place
    dataset = Dataset.open(data)
    if dataset.schema.hash() != opened.schema.hash():
        raise DataError(f"{data} is encoded by another schema than that of {run}", "give the data set that it was trained on: --data")
    return dataset


def eager_model(run: Run, work: Path) -> ServedModel:
    """The run's model in float32, its tables in an empty folder that it maps."""
    write_model(run, work)
    dim, managed = run.config.model.embedding_dim, managed_rows(run.schema, work)
    model = ServedModel(run.schema, mapped_tables(run, work), "fp32", dim, trained_head(run, work), managed)
    return model.eval().requires_grad_(False)


def _export(run: Run, dataset: Dataset, split: Split, rows: int, work: Path, folder: Path, format: Format, weights: Weights) -> Record:
    """Write all but the manifest, which is returned."""
    schema, dim = run.schema, run.config.model.embedding_dim
    logger.info("reading the tables of %s", run.checkpoint.name)
    fp32 = eager_model(run, work)
    tables = fp32.tables
    packed = tables if weights == "fp32" else pack(tables, weights, work / weights)
    model = ServedModel(schema, packed, weights, dim, fp32.head, managed_rows(schema, work)).eval().requires_grad_(False)
    block = next(sample(dataset, split, FEW_ROWS))
    example = example_inputs(schema)
    logger.info("writing the model as %s", format)
    _refuse_full_disk(model, format, folder)
    file = save_model(model, example, format, folder)
    served = load_model(file, format)
    in_half = run.config.training.in_bfloat16
    for batch in (example, *(model_inputs(block, 0, rows, schema) for rows in (block.num_rows, 1, 0))):
        refuse_other(served, model, batch, in_half)
    logger.info("measuring it on %s", dataset.path)
    quality = measure(fp32, served, dataset, split, rows)
    copy_folder(run.path / "vocabulary", folder / "vocabulary")
    schema.save(folder / "schema.json")
    if (run.path / COVERAGE).is_file():
        (folder / COVERAGE).write_bytes((run.path / COVERAGE).read_bytes())
    return {
        "schema_hash": schema.hash(),
        "format": format,
        "weights": weights,
        "torch": release(),
        "cpu": {"machine": machine(), "features": cpu_features()},
        "model": {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)},
        "tables": {"rows": len(tables), "dim": dim, "bytes": packed.nbytes, "fp32_bytes": tables.nbytes},
        "inputs": describe_inputs(schema),
        "outputs": list(OUTPUTS),
        "quality": {"data": str(dataset.path), **quality},
    }

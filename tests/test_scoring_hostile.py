"""The hostile corpus through `score`, in one job: what cannot be read is told by file, what can is scored, and nothing stops the others."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from escm2rec.cells import to_cells
from escm2rec.config import Config, DataConfig
from escm2rec.errors import DataError
from escm2rec.folder import new_folder, write_manifest
from escm2rec.schema import Feature, Schema
from escm2rec.scoring.inputs import log_files
from escm2rec.scoring.options import Options
from escm2rec.scoring.score import score
from escm2rec.training.train import train
from tests.hostile import CASES, Case

OF_LABELS = {"label", "label in Parquet", "Parquet type of a label", "conversion without click", "row weight", "known truth", "truth file"}
"""Kinds of faults that nothing is read of."""
SKIPPED = {
    "csv with blank lines counts them": "the fault is of a label",
    "csv whose header has spaces": "another column is missed first",
    **({"a file that may not be read": "root may read every file"} if os.geteuid() == 0 else {}),
}
TABLE_ROWS = 9


def by_config() -> list[list[Case]]:
    """Cases that one model reads, the most first."""
    found: dict[str, list[Case]] = defaultdict(list)
    for case in CASES:
        if case.scored and not case.remains:
            told = [case.config.source.model_dump(mode="json"), [each.model_dump(mode="json") for each in case.config.features]]
            found[json.dumps([*told, case.config.keep])].append(case)
    return sorted(found.values(), key=len, reverse=True)


GROUPS = by_config()


def write_run(root: Path, config: DataConfig, value_type: str) -> Path:
    """A model of these features, trained on a few rows that mean nothing."""
    hashed = {"encoding": "hash", "num_embeddings": TABLE_ROWS, "value_type": value_type}
    drafts = (Feature.of(feature) for feature in config.features)
    features = tuple(draft.model_copy(update=hashed if draft.is_table else {}) for draft in drafts)
    schema = Schema(source=config.source, features=features, keep=tuple(config.keep))
    rng, rows = np.random.default_rng(0), 64
    columns: dict[str, Any] = {}
    for feature in schema.features:
        if feature.is_list:
            columns[feature.name] = to_cells(rng.integers(0, TABLE_ROWS, rows).astype(np.int32), np.arange(rows + 1))
            if feature.kind == "weighted_list":
                columns[feature.weight_column] = to_cells(rng.random(rows).astype(np.float32), np.arange(rows + 1))
        else:
            ids = rng.integers(0, TABLE_ROWS, rows).astype(np.int32)
            columns[feature.name] = ids if feature.is_table else rng.random(rows).astype(np.float32)
    columns |= {"click": (rng.random(rows) < 0.5).astype(np.uint8), "conversion": np.zeros(rows, np.uint8)}
    counts = {"rows": rows, "clicks": int(columns["click"].sum()), "conversions": 0}
    with new_folder(root / "data", "data set", overwrite=False) as folder:
        (folder / "train").mkdir()
        (folder / "vocabulary").mkdir()
        pq.write_table(pa.table(columns), folder / "train" / "part-00000.parquet")
        schema.save(folder / "schema.json")
        splits = {"train": {**counts, "files": [{**counts, "path": "train/part-00000.parquet"}]}}
        write_manifest(folder, "data set", {"schema_hash": schema.hash(), "splits": splits, "negative_keep_rate": 1.0})
    hashed_config = [{**each.model_dump(mode="json"), **({"hash_size": TABLE_ROWS} if each.is_table else {})} for each in config.features]
    data = {**config.model_dump(mode="json"), "features": hashed_config, "split": {"by": "hash", "train": 1.0}}
    tree: Any = {"data": data, "model": {"embedding_dim": 4, "tower_hidden": [4]}, "training": {"global_batch_size": 64}}
    train(Config.model_validate(tree), root / "data", root / "run")
    return root / "run"


def outcomes(cases: Sequence[Case], root: Path, value_type: str) -> dict[str, list[Any]]:
    """Of each case the records of its files, or the error that says that there are none."""
    run = write_run(root, cases[0].config, value_type)
    schema = Schema.load(run / "schema.json")
    folders, found = {}, {}
    for number, case in enumerate(cases):
        folder = root / "logs" / f"{number:03d}"
        folder.mkdir(parents=True)
        case.write(folder)
        try:
            log_files(schema, [str(folder)], skips=True)
            folders[str(folder)] = case.name
        except DataError as error:
            found[case.name] = [{"rows": 0, "error": str(error)}]
    result = score(run, list(folders), root / "out", Options(bad_rows="count", on_error="skip"))
    records = json.loads((root / "out" / "manifest.json").read_text())["files"]
    for record in records:
        found.setdefault(folders[str(Path(record["input"]).parent)], []).append(record)
    assert result["failed"] == sum("error" in record for record in records)
    assert set(found) == {case.name for case in cases}
    return found


@pytest.mark.parametrize("group", range(3))
@pytest.mark.timeout(240)
def test_a_hostile_corpus_is_told_by_file_and_stops_nothing(group: int, tmp_path: Path) -> None:
    """Ids are taken for numbers, then for text, and of one of the two the outcome is right."""
    cases = GROUPS[group]
    told = [outcomes(cases, tmp_path / kind, kind) for kind in ("int64", "string")]
    wrong = []
    for case in cases:
        if case.kind in OF_LABELS or "label" in case.name or case.name in SKIPPED:
            continue
        right = [_is_right(case, each[case.name]) for each in told]
        if not any(right):
            wrong.append((case.name, [each[case.name] for each in told]))
    assert not wrong, "\n".join(map(str, wrong))


def test_the_corpus_is_large() -> None:
    assert sum(len(group) for group in GROUPS[:3]) >= 150


def _is_right(case: Case, records: Sequence[Any]) -> bool:
    """Whether what cannot be read failed for its reason, and of the others the rows that are good were scored."""
    errors = [record for record in records if "error" in record]
    if case.refused and case.counted is None:
        nothing_left = not errors and all(record["rows"] == 0 and record["rejected"] for record in records)
        said = [f"{record['error']}\nhint: {record.get('hint', '')}" for record in errors]
        return nothing_left or any(re.search(case.refused, each) is not None for each in said)
    if errors:
        return False
    rejected = sum(each["rows"] for record in records for each in record["rejected"].values())
    return bool(rejected == sum((case.counted or {}).values())) and sum(record["rows"] for record in records) == len(case.rows)

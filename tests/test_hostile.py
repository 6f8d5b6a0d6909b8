"""Every hostile input is refused with its place, or counted with its reason, or read right: none crashes, hangs or slips through."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from escm2rec.config import DataConfig
from escm2rec.errors import Escm2Error
from escm2rec.preprocess import encode_raw, preprocess, raw_files
from escm2rec.schema import Feature, Schema
from tests.hostile import CASES, EMPTY, KINDS, Case
from tests.preprocess_logs import read_split, values_of

MOST_OF_A_KIND = 6
TIME_LIMIT_S = 20
ROOT = os.geteuid() == 0


def test_the_corpus_is_large_and_broad() -> None:
    kinds = Counter(case.kind for case in CASES)
    assert len(CASES) >= 100
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) <= MOST_OF_A_KIND
    assert len({case.name for case in CASES}) == len(CASES)


def cases(chosen: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrised by their names, known failures marked."""

    def marks(case: Case) -> list[Any]:
        found = [pytest.mark.timeout(TIME_LIMIT_S)]
        if case.remains:
            found.append(pytest.mark.xfail(strict=True, reason=case.remains))
        if ROOT and case.name == "a file that may not be read":
            found.append(pytest.mark.skip(reason="root may read every file"))
        return found

    return pytest.mark.parametrize("case", [pytest.param(case, marks=marks(case), id=ascii(case.name)) for case in chosen])


@cases(CASES)
def test_a_hostile_input_is_refused_counted_or_read_right(case: Case, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    case.write(logs)
    if case.refused:
        assert_refused(case, case.config, logs, tmp_path / "out")
    else:
        assert_left(case, case.config, logs, tmp_path / "out")
    count = case.config.model_copy(update={"bad_rows": "count"})
    if case.refused and case.counted is None:
        assert_refused(case, count, logs, tmp_path / "counted")
    else:
        assert_left(case, count, logs, tmp_path / "counted")


def assert_refused(case: Case, config: DataConfig, logs: Path, out: Path) -> None:
    nothing_left = f"|{EMPTY}" if config.bad_rows == "count" else ""
    with pytest.raises(Escm2Error, match=case.refused + nothing_left) as error:
        preprocess(config, logs, out)
    assert error.value.exit_code == 2
    assert len(error.value.message) < 3000
    assert not out.exists()
    if case.names_file and not (nothing_left and EMPTY in error.value.message):
        assert str(logs) in error.value.message


def assert_left(case: Case, config: DataConfig, logs: Path, out: Path) -> None:
    """The good rows are as they were, the others counted with their places."""
    result = preprocess(config, logs, out)
    assert result["rejected"] == (case.counted or {})
    for table, counts in case.events.items():
        assert {kind: count for kind, count in result["events"][table].items() if count} == counts
    first = [place for reason in json.loads((out / "manifest.json").read_text())["rejected"].values() for place in reason["first"]]
    assert [(place["row"], place["column"]) for place in first] == list(case.first)
    assert all(place["file"].startswith(str(logs)) and place["value"] for place in first)
    assert sorted(rows_of(out), key=repr) == sorted(case.rows, key=repr)


def rows_of(out: Path) -> list[tuple[Any, ...]]:
    """The rows that train as they were before they were encoded."""
    schema = Schema.load(out / "schema.json")
    values: dict[str, dict[Any, Any]] = {feature.name: values_of(out, feature.name) | {None: None} for feature in schema.tables}

    def row(held: dict[str, Any]) -> tuple[Any, ...]:
        cells: list[Any] = []
        for feature in schema.features:
            cell = held[feature.name]
            if feature.kind == "numeric":
                cells.append(round(cell * feature.std + feature.mean, 4))
            elif feature.kind == "categorical":
                cells.append(values[feature.name][cell])
            else:
                named = [values[feature.name][each] for each in cell]
                cells.append(tuple(named if feature.kind == "list" else zip(named, held[feature.weight_column], strict=True)))
        return (*cells, *(held[name] for name in ("click", "conversion", "weight") if name in held))

    return [row(held) for held in read_split(out)]


@cases([case for case in CASES if case.scored])
def test_score_reads_a_hostile_input_alike(case: Case, tmp_path: Path) -> None:
    """With labels, so that what is wrong with them is seen too; ids are taken for numbers, then for text, and one of the two is right."""
    case.write(tmp_path)
    outcomes = [scored_rows(case, tmp_path, value_type) for value_type in ("int64", "string")]
    if case.refused:
        assert all(isinstance(outcome, str) for outcome in outcomes)
        assert any(re.search(case.refused, str(outcome)) for outcome in outcomes), outcomes
    else:
        assert len(case.rows) in outcomes


def scored_rows(case: Case, logs: Path, value_type: str) -> int | str:
    """How many rows `score` would encode, or the error that it would end with."""
    hashed = {"encoding": "hash", "num_embeddings": 9, "value_type": value_type}
    drafts = (Feature.of(feature) for feature in case.config.features)
    schema = Schema(source=case.config.source, features=tuple(d.model_copy(update=hashed if d.is_table else {}) for d in drafts))
    try:
        files = raw_files(schema.source, logs)
        return sum(len(block.table) for block in encode_raw(schema, logs, files, case.config.keep, labels=True))
    except Escm2Error as error:
        return str(error)

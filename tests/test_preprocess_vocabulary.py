"""Vocabularies beyond memory: the same values, order and rows as in it, whatever went to disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from escm2rec.config import FeatureConfig
from escm2rec.errors import DataError
from escm2rec.preprocess import external, preprocess, read, value_counts, vocabulary
from escm2rec.preprocess.stable_hash import hash64
from escm2rec.preprocess.value_counts import ValueCounter, count_values, spill_largest
from escm2rec.preprocess.vocabulary import HashedValues, Vocabulary, fit_vocabulary, write_lookup
from escm2rec.schema import Feature
from tests.preprocess_logs import made, table_config, write_parquet

MEMORY = 1 << 30


def fitted(folder: Path, blocks: list[list[Any]], spill_every: int | None, **settings: Any) -> Path:
    """A vocabulary of these blocks; counts go to disk after every so many."""
    folder.mkdir(parents=True, exist_ok=True)
    counter = ValueCounter("v", folder)
    for number, block in enumerate(blocks, 1):
        counter.add(count_values(pa.array(block, pa.string()) if isinstance(block[0], str) else np.array(block, np.int64)))
        if spill_every and number % spill_every == 0:
            counter.spill()
            assert counter.bytes == 0
    path = folder / "v.parquet"
    size = fit_vocabulary(FeatureConfig(name="v", kind="categorical", **settings), counter, path, MEMORY)
    assert size == pq.read_metadata(path).num_rows
    return path


def expected(blocks: list[list[Any]], min_count: int, max_size: int | None, oov_rows: int) -> list[tuple[Any, int, int]]:
    counts = Counter(value for block in blocks for value in block)
    kept = [(value, count) for value, count in counts.items() if count >= min_count]
    kept.sort(key=lambda entry: (-entry[1], entry[0].encode() if isinstance(entry[0], str) else entry[0]))
    return [(value, count, oov_rows + place) for place, (value, count) in enumerate(kept[:max_size])]


INTEGERS = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), min_size=1, max_size=12), min_size=1, max_size=6)
STRINGS = st.lists(st.lists(st.text(max_size=4) | st.sampled_from("abé\x00"), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    blocks=INTEGERS | STRINGS,
    spill_every=st.none() | st.integers(1, 3),
    in_memory=st.booleans(),
    min_count=st.integers(1, 3),
    max_size=st.none() | st.integers(1, 5),
    oov_rows=st.integers(1, 3),
)
def test_a_vocabulary_is_that_of_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory,
    blocks: list[list[Any]],
    spill_every: int | None,
    in_memory: bool,
    min_count: int,
    max_size: int | None,
    oov_rows: int,
) -> None:
    config = {"min_count": min_count, "max_size": max_size, "oov_rows": oov_rows}
    with mock.patch.object(value_counts, "IN_MEMORY_ROWS", value_counts.IN_MEMORY_ROWS if in_memory else 0):
        path = fitted(tmp_path_factory.mktemp("fitted"), blocks, spill_every, **config)
    table = pq.read_table(path)
    found = list(zip(*(table[name].to_pylist() for name in ("value", "count", "row")), strict=True))
    assert found == expected(blocks, min_count, max_size, oov_rows)


def test_what_went_to_disk_does_not_show(tmp_path: Path) -> None:
    blocks = [np.random.default_rng(seed).integers(0, 500, 300).tolist() for seed in range(9)]
    files = [fitted(tmp_path / str(every), blocks, every).read_bytes() for every in (None, 1, 2, 4)]
    assert len(set(files)) == 1


def test_the_whole_job_is_the_same_when_counts_go_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = {"c": rng.integers(0, 2**40, 2_000).tolist(), "t": [f"w{number}" for number in rng.zipf(1.5, 2_000)]}
    source = tmp_path / "logs"
    source.mkdir()
    for name, half in (("a", slice(0, 1_000)), ("b", slice(1_000, None))):
        write_parquet(source / f"{name}.parquet", {column: values[half] for column, values in rows.items()})
    config = table_config([{"name": name, "kind": "categorical"} for name in rows])
    whole, _ = made(config, source, tmp_path / "whole")
    spilled, spill = Counter[str](), ValueCounter.spill

    def counted(counter: ValueCounter) -> None:
        spilled[counter._name] += bool(counter._parts)
        spill(counter)

    monkeypatch.setattr(ValueCounter, "spill", counted)
    monkeypatch.setattr(read, "SPILL_BYTES", 1_000)
    monkeypatch.setattr(value_counts, "IN_MEMORY_ROWS", 0)
    monkeypatch.setattr(vocabulary, "SORT_ROWS", 10)
    monkeypatch.setattr(vocabulary, "DENSE_SPAN", 0)
    preprocess(config, source, on_disk := tmp_path / "on-disk", memory_gib=1e-6)
    assert set(spilled) == {"c", "t", "count-00000-c", "count-00000-t"}
    assert max(spilled.values()) > 1, "more than once, so that runs are merged"
    for path in (*(whole / "vocabulary").iterdir(), *(whole / "train").iterdir()):
        assert path.read_bytes() == (on_disk / path.relative_to(whole)).read_bytes()


def looked_up(path: Path, folder: Path, value_type: Any, oov_rows: int) -> Vocabulary:
    size = pq.read_metadata(path).num_rows
    feature = Feature(name="v", kind="categorical", column="v", value_type=value_type, num_embeddings=size + oov_rows, oov_rows=oov_rows)
    folder.mkdir(exist_ok=True)
    write_lookup(path, feature, folder, MEMORY)
    return Vocabulary(feature, folder)


@pytest.mark.parametrize("sort_rows", [vocabulary.SORT_ROWS, 3])
@pytest.mark.parametrize("dense_span", [vocabulary.DENSE_SPAN, 0])
@pytest.mark.parametrize("kind", ["narrow", "wide", "strings"])
def test_values_are_found_and_others_share_rows_by_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dense_span: int, sort_rows: int
) -> None:
    monkeypatch.setattr(vocabulary, "SORT_ROWS", sort_rows)
    monkeypatch.setattr(vocabulary, "DENSE_SPAN", dense_span)
    rng = np.random.default_rng(1)
    known: list[Any] = rng.integers(-50, 50, 40).tolist() if kind == "narrow" else rng.integers(-(2**62), 2**62, 40).tolist()
    asked: Any = np.array([*known, -(2**63), 2**63 - 1, 0, 51, -51], np.int64)
    if kind == "strings":
        known = [f"word {value}" for value in known]
        asked = pa.array([*known, "", "word", "wörd"])
    path = fitted(tmp_path / "fitted", [known], None, oov_rows=5)
    found = looked_up(path, tmp_path / "lookup", "string" if kind == "strings" else "int64", 5).rows(asked)
    rows = {value: row for value, _, row in expected([known], 1, None, 5)}
    hashes = (hash64(asked) % np.uint64(5)).tolist()
    assert found.dtype == np.int32
    values = asked.tolist()
    assert found.tolist() == [rows.get(value, shared) for value, shared in zip(values, hashes, strict=True)]
    assert sum(value in rows for value in values) >= 40


@pytest.mark.parametrize("low", [-(2**63), 2**63 - 40], ids=["the least numbers", "the largest numbers"])
def test_a_dense_vocabulary_at_an_end_of_int64_finds_its_values_alone(tmp_path: Path, low: int) -> None:
    """The number before the least one is no int64, and differences of numbers at both ends are none either."""
    known = list(range(low, low + 40, 3))
    asked = np.array([*known, low + 1, -(2**63), 2**63 - 1, -1, 0, 1], np.int64)
    vocabulary = looked_up(fitted(tmp_path / "fitted", [known], None, oov_rows=5), tmp_path / "lookup", "int64", 5)
    assert (tmp_path / "lookup" / "v.dense").is_file()
    rows = {value: row for value, _, row in expected([known], 1, None, 5)}
    shared = (hash64(asked) % np.uint64(5)).tolist()
    assert vocabulary.rows(asked).tolist() == [rows.get(value, other) for value, other in zip(asked.tolist(), shared, strict=True)]


@pytest.mark.parametrize("dense_span", [vocabulary.DENSE_SPAN, 0])
def test_narrow_numbers_are_found_as_wide_ones_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense_span: int) -> None:
    monkeypatch.setattr(vocabulary, "DENSE_SPAN", dense_span)
    asked = np.array([*range(-20, 20, 3), 2**31 - 1, -(2**31), 1, 2], np.int64)
    found = looked_up(fitted(tmp_path / "fitted", [list(range(-20, 20, 3))], None, oov_rows=5), tmp_path / "lookup", "int64", 5)
    assert found.rows(asked.astype(np.int32)).tolist() == found.rows(asked).tolist()
    hashed = HashedValues(Feature(name="h", kind="categorical", column="h", encoding="hash", num_embeddings=7))
    assert hashed.rows(asked.astype(np.int32)).tolist() == hashed.rows(asked).tolist()


def test_a_vocabulary_without_values_shares_all(tmp_path: Path) -> None:
    for value_type, values in (("int64", np.array([1, 2], np.int64)), ("string", pa.array(["a", "b"]))):
        folder = tmp_path / value_type
        folder.mkdir()
        path = folder / "v.parquet"
        assert fit_vocabulary(FeatureConfig(name="v", kind="categorical", oov_rows=7), ValueCounter("v", folder), path, MEMORY) == 0
        found = looked_up(path, folder / "lookup", value_type, 7).rows(values)
        assert found.tolist() == (hash64(values) % np.uint64(7)).tolist()


def test_of_two_words_with_one_hash_the_more_frequent_has_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fitted(tmp_path / "fitted", [["b", "b", "a"]], None)
    monkeypatch.setattr(vocabulary, "hash64", lambda values: np.zeros(len(values), np.uint64))
    assert looked_up(path, tmp_path / "lookup", "string", 1).rows(pa.array(["a", "b"])).tolist() == [1, 1]


def test_a_table_that_cannot_hold_the_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_TABLE_ROWS", 3)
    with pytest.raises(DataError, match="feature 'v' has more values than the 3 rows of a table") as caught:
        fitted(tmp_path, [[1, 2, 3]], None)
    assert caught.value.hint == "set max_size or hash_size"


def test_the_largest_counters_go_first(tmp_path: Path) -> None:
    counters = {name: ValueCounter(name, tmp_path) for name in ("small", "large")}
    for name, counter in counters.items():
        counter.add(pl.DataFrame({"value": np.arange(10 if name == "small" else 10_000), "count": 1}))
    assert 0 < counters["small"].bytes < counters["large"].bytes
    spill_largest(counters.values(), 2 * counters["small"].bytes)
    assert counters["large"].bytes == 0
    assert counters["small"].bytes > 0


def test_a_sort_beyond_memory_comes_in_tables_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "LEAST_BYTES", 0)
    values = np.random.default_rng(2).permutation(700_000)
    table = pa.table({"key": values, "text": [f"{value:>60}" for value in values]})
    tables = list(external.query("SELECT * FROM rows ORDER BY key", table.to_reader(50_000), tmp_path / "sort", 48 << 20, 100_001))
    assert [len(each) for each in tables] == [100_001] * 6 + [99_994]
    found = pa.concat_tables(tables)
    assert found["key"].to_pylist() == list(range(700_000))
    assert not list((tmp_path / "sort").iterdir())


def test_counts_merge_before_they_take_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_counts, "MERGE_ROWS", 100)
    counter = ValueCounter("v", tmp_path)
    for _ in range(50):
        counter.add(count_values(np.arange(60)))
    assert counter.bytes < 5 * 60 * 16


@pytest.mark.parametrize("table_rows", [7, 1 << 20])
@pytest.mark.parametrize("values", [0, 1, 2, 3, 64, 65, 5_000])
@pytest.mark.parametrize("kind", ["int64", "string"])
def test_any_number_of_sparse_values_is_found_and_no_other(
    tmp_path: Path, values: int, kind: Any, table_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers far apart, also negative ones and the least and greatest, and texts."""
    monkeypatch.setattr(vocabulary, "TABLE_ROWS", table_rows)
    rng = np.random.default_rng(values)
    drawn = np.unique(rng.integers(-(1 << 63), (1 << 63) - 1, 3 * values))
    numbers = rng.permutation(np.union1d(drawn, [-(1 << 63), (1 << 63) - 1]))
    known, others = numbers[:values], numbers[values:]

    def typed(held: Any) -> Any:
        return held if kind == "int64" else pa.array([f"v{value}" for value in held], pa.large_string())

    rows = np.arange(2, 2 + values, dtype=np.int32)
    column = pa.array(typed(known)).cast(pa.int64() if kind == "int64" else pa.string())
    pq.write_table(pa.table({"value": column, "row": rows}), tmp_path / "a.parquet")
    known_as: dict[str, Any] = {"value_type": kind, "encoding": "vocabulary", "num_embeddings": values + 2, "oov_rows": 2}
    feature = Feature(name="a", kind="categorical", column="a", **known_as)
    write_lookup(tmp_path / "a.parquet", feature, tmp_path, 1 << 28)
    lookup = Vocabulary(feature, tmp_path)
    assert (tmp_path / "a.slots").is_file() == (kind == "string" or values > 1)
    asked = np.concatenate([known, known[::-1], others])
    found = lookup.rows(typed(asked))
    assert found[: 2 * values].tolist() == [*rows, *rows[::-1]]
    assert set(found[2 * values :].tolist()) <= {0, 1}
    assert lookup.rows(typed(asked[:0])).tolist() == []


@pytest.mark.parametrize("is_known", [True, False])
def test_a_value_whose_hash_is_that_of_a_free_slot_is_as_any_other(tmp_path: Path, is_known: bool) -> None:
    """Free slots hold 0, which is the hash of one whole number."""
    zero = np.array([-0x9E3779B97F4A7C15 + (1 << 64)], np.uint64).view(np.int64)
    assert hash64(zero).tolist() == [0]
    far = np.random.default_rng(0).integers(-(1 << 63), (1 << 63) - 1, 100)
    known = np.concatenate([far, zero] if is_known else [far]).tolist()
    found = looked_up(fitted(tmp_path / "fitted", [known], None, oov_rows=1), tmp_path / "lookup", "int64", 1).rows(zero)
    assert bool(found[0]) == is_known

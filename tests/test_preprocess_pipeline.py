import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from escm2rec.cells import with_lists
from escm2rec.config import DataConfig, MatrixSource, Source
from escm2rec.errors import ConfigError, DataError, RunError
from escm2rec.parallel import ordered_map
from escm2rec.preprocess import encode_raw, merge, pipeline, portions, preprocess, raw_files, read
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Schema
from tests.preprocess_logs import (
    aliccp_config,
    common_line,
    key,
    made,
    read_split,
    skeleton_line,
    small_aliccp,
    table_config,
    values_of,
    write_aliccp,
    write_parquet,
)
from tests.small_disks import small_disk

ONE = [{"name": "c", "kind": "categorical"}]
HASHED = {"by": "hash", "train": 0.7, "validation": 0.1, "test": 0.2}


def numbered(path: Path, rows: int) -> Path:
    return write_parquet(path, {"c": [row % 7 for row in range(rows)], "row": list(range(rows)), "click": [row % 2 for row in range(rows)]})


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def test_parts_and_row_groups_have_the_configured_rows(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.parquet", 250)
    out, result = made(table_config(ONE, rows_per_file=100, rows_per_group=30, keep=["row"]), source, tmp_path / "out")
    parts = sorted((out / "train").iterdir())
    assert [part.name for part in parts] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    groups = [[pq.ParquetFile(part).metadata.row_group(i).num_rows for i in range(pq.ParquetFile(part).num_row_groups)] for part in parts]
    assert groups == [[30, 30, 30, 10], [30, 30, 30, 10], [30, 20]]
    assert [row["kept.row"] for row in read_split(out, a=250)] == list(range(250))
    assert [row["kept.row"] for row in read_split(out)] != list(range(250)), "shuffled"
    assert result["splits"]["train"] == {"rows": 250, "clicks": 125, "conversions": 0}


def test_rows_are_shuffled_over_the_whole_split(tmp_path: Path) -> None:
    """A log in the order of its clicks, in two files: neither rows nor clicks lie as they lay, within a row group or between groups."""
    rows = 20_000
    source = tmp_path / "logs"
    source.mkdir()
    for part in range(2):
        place = np.arange(part * rows // 2, (part + 1) * rows // 2)
        write_parquet(source / f"{part}.parquet", {"c": place % 7, "row": place, "click": (place > 0.9 * rows).astype(int)})
    out, _ = made(table_config(ONE, rows_per_file=8_000, rows_per_group=2_000, keep=["row"]), source, tmp_path / "out")
    stored = [pq.read_table(path, columns=["kept.row", "click"]) for path in sorted((out / "train").iterdir())]
    table = pa.concat_tables(stored)
    place, click = table["kept.row"].to_numpy(), table["click"].to_numpy().astype(float)
    assert sorted(place) == list(range(rows))
    bound = 4 / rows**0.5  # four standard errors of a correlation of independent pairs
    assert abs(np.corrcoef(place, np.arange(rows))[0, 1]) < bound, "with the order of the log"
    for lag in (1, 2, 10, 100, 1_000):
        assert abs(np.corrcoef(place[lag:], place[:-lag])[0, 1]) < bound, lag
        assert abs(np.corrcoef(click[lag:], click[:-lag])[0, 1]) < bound, lag
    groups = click.reshape(-1, 2_000).mean(1)
    assert len(groups) == 10
    assert abs(groups - click.mean()).max() < 4 * (0.1 * 0.9 / 2_000) ** 0.5, groups


def test_the_manifest_describes_every_file(tmp_path: Path) -> None:
    out, result = made(table_config(ONE, rows_per_file=40, split=HASHED), numbered(tmp_path / "a.parquet", 100), tmp_path / "out")
    manifest = manifest_of(out)
    assert manifest["kind"] == "data set"
    assert manifest["schema_hash"] == Schema.load(out / "schema.json").hash() == result["schema_hash"]
    assert manifest["negative_keep_rate"] == 1.0
    assert manifest["input"] == [{"path": str(tmp_path / "a.parquet"), "bytes": (tmp_path / "a.parquet").stat().st_size}]
    files = [file for split in manifest["splits"].values() for file in split["files"]]
    assert len(files) == 4
    for file in files:
        data = (out / file["path"]).read_bytes()
        table = pq.read_table(out / file["path"])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
        assert (len(table), sum(table["click"].to_pylist())) == (file["rows"], file["clicks"])
    assert sum(file["rows"] for file in files) == 100
    assert {entry.name for entry in out.iterdir()} == {"manifest.json", "schema.json", "vocabulary", "train", "validation", "test"}


def test_shares_of_missing_and_unknown_values(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"c": [1, None, 1, 2], "l": [[1, 2], [], [1], [3]], "n": [1.0, None, 2.0, 3.0]})
    write_parquet(tmp_path / "test.parquet", {"c": [9, 1], "l": [[9], [9, 1, 1]], "n": [1.0, 1.0]})
    features = [{"name": "c", "kind": "categorical"}, {"name": "l", "kind": "list"}, {"name": "n", "kind": "numeric"}]
    config = table_config(features, split={"by": "file", "train": "train*", "test": "test*"})
    out, _ = made(config, tmp_path, tmp_path / "out")
    shares = manifest_of(out)["features"]
    nothing = {"validation": None}
    assert shares["c"] == {
        "pooling_factor": 0.75,
        "missing": {"train": 0.25, "test": 0.0, **nothing},
        "oov": {"train": 0.0, "test": 0.5, **nothing},
    }
    assert shares["l"] == {
        "pooling_factor": 1.0,
        "missing": {"train": 0.25, "test": 0.0, **nothing},
        "oov": {"train": 0.0, "test": 0.5, **nothing},
    }
    assert shares["n"] == {"pooling_factor": 0.75, "missing": {"train": 0.25, "test": 0.0, **nothing}}


def test_everything_is_fitted_on_training_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"c": [1, 1], "n": [0.0, 2.0]})
    write_parquet(tmp_path / "test.parquet", {"c": [5, 1], "n": [100.0, 1.0]})
    features = [{"name": "c", "kind": "categorical"}, {"name": "n", "kind": "numeric"}]
    out, _ = made(table_config(features, split={"by": "file", "train": "train*", "test": "test*"}), tmp_path, tmp_path / "out")
    assert [(row["c"], row["n"]) for row in read_split(out, "test", test=2)] == [(0, 99.0), (1, 0.0)]


@pytest.mark.parametrize("kind", ["int", "text"])
def test_splits_by_column(tmp_path: Path, kind: str) -> None:
    days = [1, 2, 3, 4, None]
    write_parquet(
        tmp_path / "a.parquet", {"c": [1] * 5, "day": days if kind == "int" else [None if day is None else str(day) for day in days]}
    )
    split = {"by": "column", "column": "day", "train": ["1", "2"], "test": ["3"]}
    out, result = made(table_config(ONE, split=split), tmp_path / "a.parquet", tmp_path / "out")
    assert [result["splits"][name]["rows"] for name in ("train", "validation", "test")] == [2, 0, 1]
    assert result["rejected"] == {"no split": 2}
    assert [each["value"] for each in manifest_of(out)["rejected"]["no split"]["first"]] == ["4", "None"]


def test_a_file_of_no_split_is_counted(tmp_path: Path) -> None:
    numbered(tmp_path / "train.parquet", 3)
    numbered(tmp_path / "other.parquet", 4)
    config = table_config(ONE, split={"by": "file", "train": "train*"})
    assert made(config, tmp_path, tmp_path / "out")[1]["rejected"] == {"no split": 4}


def test_a_share_of_the_training_files_validates(tmp_path: Path) -> None:
    """The rows that a hash split of that share would take first; test files and files of no split stay whole."""
    for name in ("train", "test", "other"):
        numbered(tmp_path / f"{name}.parquet", 2000)
    split = {"by": "file", "train": "train*", "test": "test*", "validation_share": 0.3}
    out, result = made(table_config(ONE, split=split, keep=["row"]), tmp_path, tmp_path / "out")
    hashed = {"by": "hash", "train": 0.3, "test": 0.7}
    expected, _ = made(table_config(ONE, split=hashed, keep=["row"]), tmp_path / "train.parquet", tmp_path / "hashed")
    for name, same in (("validation", "train"), ("train", "test")):
        assert [row["kept.row"] for row in read_split(out, name)] == [row["kept.row"] for row in read_split(expected, same)]
    assert result["splits"]["test"]["rows"] == 2000
    assert result["rejected"] == {"no split": 2000}


def test_splits_by_hash_of_the_row_or_of_a_column(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.parquet", 2000)
    by_row = made(table_config(ONE, split=HASHED, keep=["row"]), source, tmp_path / "row")[0]
    salted = made(table_config(ONE, split={**HASHED, "salt": "x"}, keep=["row"]), source, tmp_path / "salt")[0]
    by_column = made(table_config(ONE, split={**HASHED, "column": "c"}, keep=["c"]), source, tmp_path / "column")[0]
    rows = {name: {each["kept.row"] for each in read_split(by_row, name)} for name in ("train", "validation", "test")}
    assert sum(map(len, rows.values())) == 2000
    assert abs(len(rows["train"]) - 1400) < 100
    assert abs(len(rows["validation"]) - 200) < 60
    assert {each["kept.row"] for each in read_split(salted)} != rows["train"]
    values = [{each["kept.c"] for each in read_split(by_column, name)} for name in ("train", "validation", "test")]
    assert sum(map(len, values)) == 7


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    logs = small_aliccp(tmp_path / "logs")
    first, second = (made(aliccp_config(keep=["101"]), logs, tmp_path / name)[0] for name in ("first", "second"))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert len(names) == 6
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert {**manifest_of(first), "seconds": 0} == {**manifest_of(second), "seconds": 0}


@pytest.mark.parametrize("kind", ["aliccp", "table"])
def test_a_conversion_without_click_follows_the_rule(tmp_path: Path, kind: str) -> None:
    if kind == "aliccp":
        lines = [skeleton_line(row, click, buy, key(1), []) for row, (click, buy) in enumerate([(0, 0), (0, 1), (1, 1)])]
        logs = write_aliccp(tmp_path / "logs", "".join(lines), common_line(key(1), []))
        configs = {rule: aliccp_config(conversion_without_click=rule) for rule in ("refuse", "drop", "click")}
    else:
        logs = write_parquet(tmp_path / "a.parquet", {"c": [1, 2, 3], "click": [0, 0, 1], "conversion": [0, 1, 1]})
        configs = {rule: table_config(ONE, conversion_without_click=rule) for rule in ("refuse", "drop", "click")}
    with pytest.raises(DataError, match=r"row 2: conversion without click: .*\nhint: set data.conversion_without_click"):
        preprocess(configs["refuse"], logs, tmp_path / "refuse")
    dropped, result = made(configs["drop"], logs, tmp_path / "drop")
    assert sorted((row["click"], row["conversion"]) for row in read_split(dropped)) == [(0, 0), (1, 1)]
    assert result["rejected"] == {"conversion without click": 1}
    clicked, result = made(configs["click"], logs, tmp_path / "click")
    assert sorted((row["click"], row["conversion"]) for row in read_split(clicked)) == [(0, 0), (1, 1), (1, 1)]
    assert result["rejected"] == {}
    assert manifest_of(clicked)["conversion_without_click"] == {"rule": "click", "rows": 1}


def test_bad_rows_that_count_do_not_loosen_the_click_rule(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"c": [1, 2], "click": [0, 0], "conversion": [0, 1]})
    with pytest.raises(DataError, match="conversion without click"):
        preprocess(table_config(ONE, bad_rows="count"), file, tmp_path / "out")


def test_input_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no raw logs at .*nowhere"):
        preprocess(table_config(ONE), tmp_path / "nowhere", tmp_path / "out")
    set_names = r"hint: set data\.source\.{0} to the names of the files, or pass their folder$"
    told = rf"^no file in {tmp_path} matches the pattern '\*\.parquet' of data\.source\.files: it is empty\n"
    with pytest.raises(DataError, match=told + set_names.format("files")):
        preprocess(table_config(ONE), tmp_path, tmp_path / "out")
    (tmp_path / "sub").mkdir()
    for name in "abcdefg":
        (tmp_path / f"{name}.txt").touch()
    held = "it holds a.txt, b.txt, c.txt, d.txt, e.txt and 3 more"
    told = rf"^no file in {tmp_path} matches the pattern 'sample_skeleton_\*\.csv' of data\.source\.skeleton: {held}\n"
    with pytest.raises(DataError, match=told + set_names.format("skeleton")):
        preprocess(aliccp_config(), tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"e\.txt and 3 more\nhint: pass the files themselves$"):
        raw_files(table_config(ONE).source, tmp_path, labels=False)
    (tmp_path / "other.csv").touch()
    with pytest.raises(DataError, match=r"other\.csv does not match the skeleton pattern"):
        preprocess(aliccp_config(), tmp_path / "other.csv", tmp_path / "out")


def deny(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Nobody may read files of these names: of root, who runs the tests in containers, permissions keep nothing."""
    real = Path.open

    def opened(path: Path, *given: Any, **named: Any) -> Any:
        if path.name in names:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *given, **named)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("name", ["common_features_train.csv", "truth_train.parquet", "train.ascii", "test.ascii", "users.ascii"])
def test_a_companion_that_may_not_be_read_is_told_with_its_path(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_aliccp(tmp_path)
    for file in ("truth_train.parquet", "train.ascii", "test.ascii", "users.ascii"):
        (tmp_path / file).write_text("1 0\n")
    source: Source = aliccp_config(source={"truth": "truth_*.parquet"}).source
    if name.endswith(".ascii"):
        source = MatrixSource(kind="matrix", train="train.ascii", test="test.ascii", user_features="users.ascii", conversion_at=3)
    assert raw_files(source, tmp_path)
    deny(monkeypatch, name)
    with pytest.raises(DataError, match=rf"^{tmp_path / name} cannot be read: Permission denied\nhint: check who may read it$"):
        raw_files(source, tmp_path)


def test_an_existing_output_is_kept_unless_told(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.parquet", 10)
    out, _ = made(table_config(ONE), source, tmp_path / "out")
    before = manifest_of(out)
    with pytest.raises(ConfigError, match=r"the output folder .* exists\nhint: .*--overwrite"):
        preprocess(table_config(ONE), source, out)
    assert manifest_of(out) == before
    preprocess(table_config(ONE, keep=["row"]), source, out, overwrite=True)
    assert manifest_of(out) != before


def encoded(out: Path, logs: Path, **options: Any) -> Iterator[pa.Table]:
    schema = Schema.load(out / "schema.json")
    for block in encode_raw(schema, out / "vocabulary", raw_files(schema.source, logs), **options):
        yield block.table


@pytest.mark.parametrize("block_rows", [2, 65_536])
def test_encode_raw_gives_the_columns_of_the_data_set(tmp_path: Path, block_rows: int) -> None:
    config, logs = aliccp_config(keep=["101", "sample_id"]), small_aliccp(tmp_path / "logs")
    out, _ = made(config, logs, tmp_path / "out")
    written = pq.read_table(out / "train" / "part-00000.parquet")
    expected = written.take(pc.sort_indices(written["kept.sample_id"])).combine_chunks()
    tables = list(encoded(out, logs, keep=["101", "sample_id"], block_rows=block_rows, labels=True))
    assert max(map(len, tables)) <= block_rows
    assert pa.concat_tables(tables).equals(expected.select(tables[0].column_names))
    assert set(tables[0].column_names) == set(expected.column_names)
    bare = pa.concat_tables(encoded(out, logs, keep=["sample_id"], block_rows=block_rows))
    assert set(bare.column_names) == set(expected.column_names) - {"click", "conversion", "kept.101"}
    assert bare.equals(expected.select(bare.column_names))


def test_encode_raw_needs_no_labels_and_keeps_files_apart(tmp_path: Path) -> None:
    config: DataConfig = table_config([*ONE, {"name": "t", "kind": "list"}])
    columns = {"c": [1, 2, 2], "t": [["a"], [], ["b", "a"]]}
    write_parquet(tmp_path / "train.parquet", columns)
    out, _ = made(config, tmp_path / "train.parquet", tmp_path / "out")
    (tmp_path / "candidates").mkdir()
    for name in ("one", "two"):
        pq.write_table(pa.table({**columns, "who": [name] * 3}), tmp_path / "candidates" / f"{name}.parquet")
    schema = Schema.load(out / "schema.json")
    files = raw_files(schema.source, tmp_path / "candidates")
    blocks = list(encode_raw(schema, out / "vocabulary", files, keep=["who"], block_rows=2))
    assert [(block.file.name, len(block.table)) for block in blocks] == [
        ("one.parquet", 2),
        ("one.parquet", 1),
        ("two.parquet", 2),
        ("two.parquet", 1),
    ]
    expected = [{name: row[name] for name in ("c", "t")} for row in read_split(out, train=3)]
    rows = [row for block in blocks for row in with_lists(block.table).to_pylist()]
    assert rows == [{**row, "kept.who": name} for name in ("one", "two") for row in expected]


def test_encode_raw_tells_of_a_full_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"c": [0, 4_000_000]})
    out, _ = made(table_config(ONE), source, tmp_path / "out")
    cut = r"a write was cut short \(\d+ requested and \d+ written\); 0\.0 MB of 2\.1 MB are free there"
    limit = r"make room there, or raise the limit on the size of a file \(ulimit -f\)"
    hint = "then run the same command again, or set TMPDIR to a folder with more room"
    with small_disk(tmp_path / "disk", "2m") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(RunError, match=rf"^cannot write {disk}/escm2rec-\w+: {cut}\nhint: {limit}, {hint}$"):
            list(encoded(out, source, keep=[]))
        assert list(disk.iterdir()) == []


def test_encode_raw_refuses_bad_rows_and_other_types(tmp_path: Path) -> None:
    config = table_config([*ONE, {"name": "n", "kind": "numeric"}], bad_rows="count")
    write_parquet(tmp_path / "a.parquet", {"c": [1, 2], "n": [1.0, 2.0]})
    out, _ = made(config, tmp_path / "a.parquet", tmp_path / "out")
    write_parquet(tmp_path / "b.parquet", {"c": [1, 2], "n": [1.0, float("nan")]})
    with pytest.raises(DataError, match=r"b\.parquet: row 2, column n: number"):
        list(encoded(out, tmp_path / "b.parquet", keep=[]))
    write_parquet(tmp_path / "c.parquet", {"c": ["x", "y"], "n": [1.0, 1.0]})
    with pytest.raises(DataError, match="column 'c' holds string values, it was trained on int64"):
        list(encoded(out, tmp_path / "c.parquet", keep=[]))


def test_a_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.parquet", 10)
    out, _ = made(table_config(ONE), source, tmp_path / "out")
    short = pq.read_table(out / "vocabulary" / "c.parquet").slice(1)
    pq.write_table(short, out / "vocabulary" / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet is not the vocabulary that the schema was made with"):
        list(encoded(out, source, keep=[]))
    (out / "vocabulary" / "c.parquet").unlink()
    with pytest.raises(DataError, match=r"cannot read the vocabulary .*c\.parquet"):
        list(encoded(out, source, keep=[]))


def test_a_vocabulary_that_may_not_be_read_is_not_told_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = numbered(tmp_path / "a.parquet", 10)
    out, _ = made(table_config(ONE), source, tmp_path / "out")
    told = rf"^the vocabulary {out}/vocabulary/c\.parquet cannot be read: Permission denied\nhint: check who may read it$"
    deny(monkeypatch, "c.parquet")
    with pytest.raises(DataError, match=told):
        list(encoded(out, source, keep=[]))


def test_ordered_map_keeps_order_and_holds_few_results() -> None:
    started: list[int] = []

    def task(number: int) -> int:
        return number

    def tasks() -> Iterator[Any]:
        for number in range(20):
            started.append(number)
            yield lambda n=number: task(n)

    results = []
    for result in ordered_map(tasks(), 3):
        results.append(result)
        assert len(started) - len(results) <= 3
    assert results == list(range(20))


def test_ordered_map_raises_what_a_task_raises() -> None:
    def fail() -> int:
        raise DataError("this one")

    with pytest.raises(DataError, match="this one"):
        list(ordered_map([lambda: 1, fail, lambda: 2], 2))


def test_wide_ids_are_found_without_a_dense_table(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(-(2**62), 2**62, 100).tolist()
    write_parquet(tmp_path / "a.parquet", {"c": ids})
    out, _ = made(table_config(ONE), tmp_path / "a.parquet", tmp_path / "out")
    assert [row["c"] for row in read_split(out, a=100)] == (np.argsort(np.argsort(ids)) + 1).tolist()


def test_the_schema_hash_covers_which_value_has_which_row(tmp_path: Path) -> None:
    """Tables of one size whose values are ranked the other way round are not interchangeable."""
    hashes = []
    for number, values in enumerate((["a", "a", "b"], ["a", "b", "b"])):
        source = write_parquet(tmp_path / f"{number}.parquet", {"c": values})
        hashes.append(made(table_config(ONE), source, tmp_path / f"out-{number}")[1]["schema_hash"])
    assert hashes[0] != hashes[1]


def test_an_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    out, _ = made(table_config(ONE), numbered(tmp_path / "a.parquet", 10), tmp_path / "out")
    with pytest.raises(ConfigError, match="is or holds the input"):
        preprocess(table_config(ONE), out, out, overwrite=True)
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_an_input_without_rows_is_told_as_such(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "logs").mkdir()
    for number in range(7):
        path = tmp_path / "logs" / f"{number}.{suffix}"
        if suffix == "csv":
            path.write_text("c,click,conversion\n")
        else:
            write_parquet(path, {"c": pa.array([], pa.int64())})
    names = ", ".join(f"{tmp_path}/logs/{number}.{suffix}" for number in range(5))
    told = f"no row belongs to the training split: there is none in {names} and 2 more"
    hint = f"was the export cut off? or are rows in files of other names? data.source.files is '*.{suffix}'"
    with pytest.raises(DataError) as error:
        preprocess(table_config(ONE, source={"files": f"*.{suffix}"}), tmp_path / "logs", tmp_path / "out")
    assert (error.value.message, error.value.hint) == (told, hint)


def test_rows_that_do_not_train_are_counted_where_none_does(tmp_path: Path) -> None:
    columns = {"c": [1, 2, 3, 4, 5], "day": ["tue", "tue", "wed", "thu", "tue"], "click": [0, 1, 0, 0, 7]}
    write_parquet(tmp_path / "a.parquet", columns)
    split = {"by": "column", "column": "day", "train": ["mon"], "test": ["tue"]}
    counts = "2 belong to other splits; left out: 1 for label, 2 for no split"
    seen = "column 'day' has 'tue', 'wed', 'thu'"
    told = rf"^no row belongs to the training split: {counts}; {seen}\nhint: check data\.split, and the rows that are left out$"
    with pytest.raises(DataError, match=told):
        preprocess(table_config(ONE, split=split, bad_rows="count"), tmp_path / "a.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("times", "split", "seen"),
    [
        (["2026-01-31", "2026-02-02 12:00"], {"test_from": "2026-01-02"}, "2026-01-31T00:00:00Z to 2026-02-02T12:00:00Z"),
        ([20260131, 20260202], {"test_from": 20260102}, "20260131 to 20260202"),
        (["20260131", "20260202"], {"test_from": 20260102}, "20260131 to 20260202"),
        ([0.25, 0.5, None], {"test_from": 0.1}, "0.25 to 0.5"),
    ],
)
def test_the_times_that_there_are_are_told_where_none_trains(tmp_path: Path, times: list[Any], split: dict[str, Any], seen: str) -> None:
    for number, time in enumerate(times):
        kind = pa.array(times).type
        write_parquet(tmp_path / f"{number}.parquet", {"c": [1], "ts": pa.array([time], kind)})
    with pytest.raises(DataError, match=rf"2 belong to other splits; left out: .*; column 'ts' goes from {seen}\nhint"):
        preprocess(table_config(ONE, split={"by": "time", "column": "ts", **split}), tmp_path, tmp_path.parent / f"{tmp_path.name}-out")


def test_a_data_set_is_no_raw_log(tmp_path: Path) -> None:
    """Its parts have labels and columns of the features' names: they would be read as a log, and as candidates to score."""
    logs = tmp_path / "logs"
    logs.mkdir()
    config, source = table_config(ONE), numbered(logs / "a.parquet", 10)
    out, _ = made(config, logs, logs / "out")
    (out / "new-logs").mkdir()
    new = numbered(out / "new-logs" / "day.parquet", 10)
    assert [file.path for file in raw_files(config.source, new.parent)] == [new], "beside what is encoded"
    shutil.rmtree(new.parent)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.parquet").symlink_to(out / "train" / "part-00000.parquet")
    part = out / "train" / "part-00000.parquet"
    cases = {
        out: part,
        out / "train": part,
        part: part,
        out / "vocabulary": out / "vocabulary" / "c.parquet",
        tmp_path / "links": tmp_path / "links" / "b.parquet",
        logs: part,
    }
    for given, named in cases.items():
        told = rf"^{named} is of a data set that escm2rec made \({out}\): its values are encoded, it is no raw log\n"
        for labels in (True, False):
            with pytest.raises(DataError, match=told + r"hint: pass the raw logs, and keep data sets \(--out\) outside of their folder$"):
                raw_files(config.source, given, labels)
    assert [file.path for file in raw_files(config.source, source)] == [source]


def test_a_part_is_known_wherever_it_lies(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.parquet", 10)
    out, _ = made(table_config(ONE), source, tmp_path / "out")
    shutil.copytree(out, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "manifest.json").unlink()
    shutil.copytree(out / "train", tmp_path / "copied")
    numbered(tmp_path / "copied" / "a.parquet", 10)  # among others
    for given in (tmp_path / "copied", tmp_path / "unfinished" / "train"):
        with pytest.raises(DataError, match=r"part-00000\.parquet is of a data set that escm2rec made.*: its values are encoded"):
            raw_files(table_config(ONE).source, given)
    part = out / "train" / "part-00000.parquet"
    pq.write_table(pq.read_table(part).replace_schema_metadata(), part)  # as of before the mark
    with pytest.raises(DataError, match=rf"^{part} is of a data set that escm2rec made \({out}\)"):
        raw_files(table_config(ONE).source, part)


def test_files_in_sub_folders_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "logs" / "day").mkdir(parents=True)
    for path in (tmp_path / "logs" / "a.parquet", tmp_path / "logs" / "day" / "b.parquet"):
        numbered(path, 10)
    with pytest.raises(DataError, match=r"day/b\.parquet lies in a sub-folder: only files right in .*logs are read"):
        preprocess(table_config(ONE), tmp_path / "logs", tmp_path / "out")


def test_a_column_of_nulls_comes_before_its_type(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write_parquet(tmp_path / "logs" / "a.parquet", {"c": pa.nulls(3), "h": pa.nulls(3)})
    write_parquet(tmp_path / "logs" / "b.parquet", {"c": ["x", "x", None], "h": ["y", None, "z"]})
    hashed: dict[str, Any] = {"name": "h", "kind": "categorical", "hash_size": 10}
    out, _ = made(table_config([*ONE, hashed]), tmp_path / "logs", tmp_path / "out")
    assert [feature.value_type for feature in Schema.load(out / "schema.json").features] == ["string", "string"]
    assert [row["c"] for row in read_split(out, a=3, b=3)] == [None, None, None, 1, 1, None]


@pytest.mark.parametrize("where", ["one spill", "two spills", "two portions"])
def test_a_kept_column_of_two_types_is_refused(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the two files that hold a value, and the same words wherever the type changes."""
    if where == "two spills":
        monkeypatch.setattr(read, "SPILL_BYTES", 1)
    if where == "two portions":
        monkeypatch.setattr(portions, "PORTION_BYTES", 1)
    (tmp_path / "logs").mkdir()
    values = {"a": pa.nulls(1, pa.string()), "b": pa.array([1], pa.int32()), "c": pa.nulls(1), "d": pa.array([1], pa.int64())}
    for name, kept in values.items():
        write_parquet(tmp_path / "logs" / f"{name}.parquet", {"c": [1], "k": kept})
    with pytest.raises(DataError) as error:
        preprocess(table_config(ONE, keep=["k"]), tmp_path / "logs", tmp_path / "out")
    logs = tmp_path / "logs"
    assert error.value.message == f"{logs}/d.parquet: kept column 'k' holds int64 values, in {logs}/b.parquet it holds int32"
    assert error.value.hint == "use one type in all files, or do not keep the column"


SOMETIMES: dict[str, pa.Array] = {
    "strings": pa.array(["s", None, "t"], pa.string()),
    "numbers": pa.array([1, None, 3], pa.int64()),
    "lists": pa.array([["a", None], None, []], pa.large_list(pa.large_string())),
    "empty lists": pa.array([[], None, []], pa.large_list(pa.int64())),
    "structs": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}]),
    "maps": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "none": pa.nulls(3, pa.string()),
    "nulls": pa.nulls(3),
}
ROWS_A_FILE = 30


@pytest.mark.parametrize("kind", SOMETIMES)
@pytest.mark.parametrize("filled", [(0, 2, 4, 6), (6,)])
@pytest.mark.parametrize("at_once", [2, 256])
def test_a_kept_column_that_some_files_have_as_null_is_of_one_type(
    tmp_path: Path, kind: str, filled: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some buckets, and merged files, hold no value of it."""
    monkeypatch.setattr(portions, "PORTION_BYTES", 1)
    monkeypatch.setattr(pipeline, "BUCKET_ROWS", 7)
    monkeypatch.setattr(merge, "MERGED", at_once)
    (tmp_path / "logs").mkdir()
    values, expected = SOMETIMES[kind], []
    for file in range(7):
        kept = pa.nulls(ROWS_A_FILE)
        if file in filled:  # three rows of many
            kept = pa.concat_arrays([values, pa.nulls(ROWS_A_FILE - len(values), values.type)])
        expected += kept.to_pylist()
        write_parquet(tmp_path / "logs" / f"{file}.parquet", {"c": list(range(ROWS_A_FILE)), "k": kept})
    config = table_config(ONE, keep=["k"], rows_per_file=60, rows_per_group=20)
    out, _ = made(config, tmp_path / "logs", tmp_path / "out")
    (type_,) = {pq.read_schema(part).field("kept.k").type for part in (out / "train").iterdir()}
    assert type_.id == values.type.id, "its fields have names of Parquet's"
    places: dict[str, Any] = {str(file): ROWS_A_FILE for file in range(7)}
    assert [row["kept.k"] for row in read_split(out, **places)] == expected


VIEWS: dict[str, tuple[pa.DataType, pa.DataType, list[Any]]] = {
    "texts": (pa.string_view(), pa.string(), ["a", None, "a text of more than twelve bytes"]),
    "bytes": (pa.binary_view(), pa.binary(), [b"a", None, b""]),
    "lists": (pa.list_(pa.string_view()), pa.list_(pa.string()), [["a", None], None, []]),
    "large lists": (pa.large_list(pa.binary_view()), pa.large_list(pa.binary()), [[b"a"], None, []]),
    "lists of one size": (pa.list_(pa.string_view(), 2), pa.list_(pa.string(), 2), [["a", "b"], None, ["c", None]]),
    "structs": (
        pa.struct([("a", pa.string_view()), ("b", pa.list_(pa.string_view()))]),
        pa.struct([("a", pa.string()), ("b", pa.list_(pa.string()))]),
        [{"a": "x", "b": ["y"]}, None, {"a": None, "b": None}],
    ),
    "maps": (pa.map_(pa.string_view(), pa.binary_view()), pa.map_(pa.string(), pa.binary()), [[("k", b"v")], None, []]),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_views_are_kept_as_plain_texts_and_bytes(tmp_path: Path, kind: str) -> None:
    view, plain, values = VIEWS[kind]
    write_parquet(tmp_path / "a.parquet", {"c": pa.array(["x", "y", "x"], pa.string_view()), "k": pa.array(values, plain).cast(view)})
    assert pq.read_schema(tmp_path / "a.parquet").field("k").type == view
    out, _ = made(table_config(ONE, keep=["k"]), tmp_path / "a.parquet", tmp_path / "out")
    assert pq.read_schema(out / "train" / "part-00000.parquet").field("kept.k").type == plain
    assert [row["kept.k"] for row in read_split(out, a=3)] == values
    assert pa.concat_tables(encoded(out, tmp_path / "a.parquet", keep=["k"]))["kept.k"].to_pylist() == values


def test_what_polars_writes_is_kept(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"c": ["x", None], "text": ["a", None], "bytes": [b"a", None], "list": [["a"], None], "click": [1, 0], "conversion": [0, 0]}
    )
    frame.write_parquet(tmp_path / "a.parquet")
    out, _ = made(table_config(ONE, keep=["text", "bytes", "list"]), tmp_path / "a.parquet", tmp_path / "out")
    rows = [tuple(row[f"kept.{name}"] for name in ("text", "bytes", "list")) for row in read_split(out, a=2)]
    assert rows == [("a", b"a", ["a"]), (None, None, None)]


UNSPLITTABLE = {
    "a number beyond int64": ("hash", pa.array([2**64 - 1], pa.uint64())),
    "lists": ("hash", pa.array([[1]])),
    "lists as text": ("column", pa.array([[1]])),
    "bytes": ("hash", pa.array([b"\xff\xfe"])),
    "bytes as text": ("column", pa.array([b"\xff\xfe"])),
}


@pytest.mark.parametrize("case", UNSPLITTABLE)
def test_a_column_that_cannot_split_is_named(tmp_path: Path, case: str) -> None:
    by, values = UNSPLITTABLE[case]
    source = write_parquet(tmp_path / "a.parquet", {"c": [1], "s": values})
    split = {"by": by, "column": "s", "train": ["1"] if by == "column" else 1.0}
    with pytest.raises(DataError, match=r"a\.parquet: column 's' of type .* cannot split"):
        preprocess(table_config(ONE, split=split), source, tmp_path / "out")


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


STRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "column": (
        {"by": "column", "column": "day", "train": ["mon", "sun"], "test": ["wen"]},
        r"data\.split gives no split to 4 of 5 rows \(80\.0%\), which are left out: 'wed' \(.*a\.parquet: row 1\), "
        r"null \(.*a\.parquet: row 3\), 'tue' \(.*b\.parquet: row 2\); no row has 'sun' of data\.split\.train, 'wen' of data\.split\.test",
    ),
    "time": (
        {"by": "time", "column": "ts", "test_from": "2026-01-03"},
        r"data\.split gives no split to 2 of 5 rows \(40\.0%\), which are left out: '\?' \(.*a\.parquet: row 2\), null \(.*: row 3\)",
    ),
    "hash": (
        {"by": "hash", "column": "day", "train": 1.0},
        r"data\.split gives no split to 1 of 5 rows \(20\.0%\), which are left out: null \(.*a\.parquet: row 3\)",
    ),
    "file": (
        {"by": "file", "train": "a*"},
        r"data\.split gives no split to 2 of 5 rows \(40\.0%\), which are left out: \S*b\.parquet",
    ),
}


@pytest.mark.parametrize("by", STRAYS)
def test_rows_without_a_split_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, by: str) -> None:
    split, message = STRAYS[by]
    (tmp_path / "log").mkdir()
    days: dict[str, list[str | None]] = {"a": ["wed", "mon", None], "b": ["wed", "tue"]}
    times = {"a": ["2026-01-01", "?", None], "b": ["2026-01-01", "2026-01-02"]}
    for name in days:
        write_parquet(tmp_path / "log" / f"{name}.parquet", {"c": [1] * len(days[name]), "day": days[name], "ts": times[name]})
    preprocess(table_config(ONE, split=split), tmp_path / "log", tmp_path / "out")
    (told,) = [each for each in warned(caplog) if "no split" in each]
    assert re.fullmatch(message, told)


def test_a_file_of_two_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for name in ("train", "train_test"):
        numbered(tmp_path / "log" / f"{name}.parquet", 3)
    message = r"train_test\.parquet belongs to one split, and matches 2 patterns of data\.split: train 'train\*' and test '\*test\*'"
    config = table_config(ONE, split={"by": "file", "train": "train*", "test": "*test*"})
    with pytest.raises(ConfigError, match=message):
        preprocess(config, tmp_path / "log", tmp_path / "out")


def test_weights_are_added_up_by_label(tmp_path: Path) -> None:
    columns = {"c": [1, 2, 3], "w": [4.0, 1.0, 2.0], "click": [0, 1, 1], "conversion": [0, 0, 1]}
    out, _ = made(table_config(ONE, source={"weight": "w"}), write_parquet(tmp_path / "a.parquet", columns), tmp_path / "out")
    opened = Dataset.open(out)
    assert opened.split_counts("train") == {"rows": 3, "clicks": 2, "conversions": 1}
    assert opened.weighted_counts("train") == {"rows": 7.0, "clicks": 3.0, "conversions": 2.0}


def test_a_vocabulary_that_is_missing_is_named(tmp_path: Path) -> None:
    out, _ = made(table_config(ONE), numbered(tmp_path / "a.parquet", 10), tmp_path / "out")
    (out / "vocabulary" / "c.parquet").unlink()
    with pytest.raises(DataError, match=r"vocabulary/c\.parquet is missing, the schema names it"):
        Dataset.open(out)


@pytest.mark.parametrize("kind", ["categorical", "list"])
def test_ids_that_are_narrow_in_one_portion_and_wide_in_another(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "PORTION_BYTES", 100)
    ids = [3, 2**31 - 1, 2**31, -(2**40)]
    for number, value in enumerate(ids):
        write_parquet(tmp_path / f"{number}.parquet", {"c": [[value, 3]] if kind == "list" else [value]})
    out, _ = made(table_config([{"name": "c", "kind": kind}]), tmp_path, tmp_path / "out")
    value_of = values_of(out, "c")
    places: dict[str, Any] = {str(number): 1 for number in range(4)}
    rows = read_split(out, **places)
    back = [[value_of[row] for row in each["c"]] if kind == "list" else value_of[each["c"]] for each in rows]
    assert back == ([[value, 3] for value in ids] if kind == "list" else ids)


def test_kept_columns_of_any_type_come_back_as_they_were(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    kept = {
        "strings": pa.array([["a", None], None, []], pa.large_list(pa.string())),
        "ids": pa.array([None, [1, 2], []], pa.large_list(pa.int64())),
        "times": pa.array([[moment], [], None], pa.large_list(pa.timestamp("us", "UTC"))),
        "structs": pa.array([[{"a": 1}], None, [None]], pa.large_list(pa.struct([("a", pa.int32())]))),
        "bytes": pa.array([b"ab", None, b""], pa.binary()),
    }
    write_parquet(tmp_path / "a.parquet", {"c": [1, 2, 3], **kept})
    split = {"by": "hash", "train": 0.5, "validation": 0.25, "test": 0.25, "salt": "2"}
    out, _ = made(table_config(ONE, keep=[*kept], split=split), tmp_path / "a.parquet", tmp_path / "out")
    parts = [pq.read_table(path) for path in sorted(out.glob("t*/*.parquet")) + sorted(out.glob("validation/*.parquet"))]
    back = pa.concat_tables(parts)
    assert len(back) == 3
    for name, column in kept.items():
        assert sorted(map(repr, back[f"kept.{name}"].to_pylist())) == sorted(map(repr, column.to_pylist())), name
        assert back.schema.field(f"kept.{name}").type == column.type


def test_a_split_that_is_asked_for_and_empty_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"by": "time", "column": "ts", "test_from": 10**9}, ["test"]),
        ({"by": "time", "column": "ts", "validation_from": 10**9, "test_from": 2 * 10**9}, ["validation", "test"]),
        ({"by": "hash", "column": "c", "train": 1.0}, []),
        ({"by": "file", "train": "*", "test": "test*"}, ["test"]),
        ({"by": "column", "column": "c", "train": ["1", "2"], "validation": ["3"]}, ["validation"]),
    ]
    for split, empty in cases:
        caplog.clear()
        source = {"ts": [10**8, 10**8 + 1]} if split["by"] == "time" else {}
        write_parquet(tmp_path / "a.parquet", {"c": [1, 2], **source})
        preprocess(table_config(ONE, split=split), tmp_path / "a.parquet", tmp_path / "out", overwrite=True)
        told = [f"data.split asks for a {name} split, and no usable row belongs to it" for name in empty]
        assert [message for message in warned(caplog) if "no usable row" in message] == told


def test_a_split_without_a_click_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = {"by": "column", "column": "c", "train": ["1"], "validation": ["2"], "test": ["3"]}
    write_parquet(tmp_path / "a.parquet", {"c": [1, 2, 3, 2], "click": [1, 0, 1, 0]})
    preprocess(table_config(ONE, split=split), tmp_path / "a.parquet", tmp_path / "out")
    assert warned(caplog) == ["the validation split has 2 rows and no click: is the click label what it should be?"]


def test_features_and_kept_columns_that_tell_nothing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = {"name": "empty", "kind": "categorical"}
    features: list[dict[str, Any]] = [
        *ONE,
        empty,
        {**empty, "name": "hashed", "hash_size": 5},
        {"name": "lists", "kind": "list"},
        {"name": "late", "kind": "numeric", "column": "n"},
        {"name": "bucketed", "kind": "numeric", "column": "n", "buckets": 4},
        {"name": "rare", "kind": "categorical", "column": "c", "min_count": 3},
        {"name": "cross", "kind": "categorical", "cross": ["c", "empty"]},
    ]
    nothing = pa.nulls(5, pa.int64())
    columns = {
        "c": [1, 1, 2, 2, 3],
        "day": ["mon"] * 4 + ["tue"],
        "click": [1] * 5,
        "empty": nothing,
        "hashed": nothing,
        "lists": pa.array([[], None, [], [], [7]]),
        "n": [None, None, None, None, 1.5],
        "k": nothing,
        "of one": [None, None, 1, None, None],
    }
    split = {"by": "column", "column": "day", "train": ["mon"], "test": ["tue"]}
    config = table_config(features, split=split, keep=["k", "of one"])
    preprocess(config, write_parquet(tmp_path / "a.parquet", columns), tmp_path / "out")
    named = {"empty": "empty", "hashed": "hashed", "lists": "lists", "late": "n", "bucketed": "n", "cross": "c x empty"}
    told = [f"feature {name!r} (column {column!r}) has no value in any of the 4 training rows" for name, column in named.items()]
    rare = (
        "feature 'rare' (column 'c') has a vocabulary of 0 values: none is in 3 (min_count) of the 4 training rows, "
        "so all are out of vocabulary"
    )
    assert warned(caplog) == [*told[:5], rare, told[5], "column 'k' of data.keep has no value in any row"]

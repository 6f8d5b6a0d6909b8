"""What `score` reads and writes by its options, what it makes of rows and files that are wrong, and who does the work."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from escm2rec.config import load_config
from escm2rec.errors import ConfigError, DataError
from escm2rec.preprocess import preprocess
from escm2rec.preprocess.raw import RawEncoder
from escm2rec.schema import Schema
from escm2rec.scoring.inputs import LogFile, log_files
from escm2rec.scoring.options import Layout, Options
from escm2rec.scoring.output import files_of
from escm2rec.scoring.score import score
from escm2rec.scoring.summary import estimated_rows
from escm2rec.training.run import COVERAGE
from escm2rec.training.train import train
from tests.raw_tables import raw_table, write_config
from tests.s3_server import s3_server

PROBABILITIES = ["p_ctr", "p_cvr", "p_ctcvr"]
ROWS = {"a.parquet": 900, "b.parquet": 400, "c.parquet": 300}
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and candidates with columns of every type that are of no use to it."""
    root = tmp_path_factory.mktemp("job")
    (root / "logs").mkdir()
    (root / "in").mkdir()
    pq.write_table(raw_table(2_000, 0, labels=True), root / "logs" / "train.parquet")
    config = load_config(write_config(root / "config.yaml"), ["data.bad_rows=count"])
    preprocess(config.data, root / "logs", root / "data")
    train(config, root / "data", root / "run")
    for seed, (name, rows) in enumerate(ROWS.items(), start=1):
        pq.write_table(with_types(raw_table(rows, seed, users=60)), root / "in" / name, row_group_size=100)
    return root


def with_types(table: pa.Table) -> pa.Table:
    """The table with a column of each type that is passed through."""
    rows = len(table)
    nested = [{"id": row, "path": [{"at": row / 7, "tags": ["x"] * (row % 3)}]} if row % 5 else None for row in range(rows)]
    columns: dict[str, pa.Array] = {
        "nested": pa.array(nested),
        "map": pa.array([[("k", row)] if row % 2 else None for row in range(rows)], pa.map_(pa.string(), pa.int16())),
        "decimal": pa.array([Decimal(row) / 4 for row in range(rows)], pa.decimal128(12, 2)),
        "time": pa.array([datetime(2024, 1, 1, tzinfo=UTC)] * rows, pa.timestamp("us", "Europe/Berlin")),
        "word": pa.array(["a", "b"] * (rows // 2) + ["c"] * (rows % 2)).dictionary_encode(),
        "pair": pa.array([[row, row + 1] for row in range(rows)], pa.list_(pa.float32(), 2)),
        "large": pa.array(["x"] * rows, pa.large_string()),
        "bytes": pa.array([b"\xff"] * rows, pa.binary()),
        "small": pa.array(np.arange(rows, dtype=np.uint8)),
        "p_ctr": pa.array(np.zeros(rows)),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def run_score(folder: Path, out: Path, inputs: Any = None, **options: Any) -> dict[str, Any]:
    given = [folder / "in"] if inputs is None else inputs if isinstance(inputs, list) else [inputs]
    return score(folder / "run", given, out, Options(**options))


def manifest(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return told


def frame(out: Path) -> pl.DataFrame:
    """All rows, in the order of the manifest."""
    parts = [part["path"] for file in manifest(out)["files"] for part in file["parts"]]
    assert sorted(parts) == sorted(path.name for path in out.glob("*.parquet"))
    return pl.concat([pl.read_parquet(out / part) for part in parts])


@pytest.fixture(scope="module")
def plain(folder: Path) -> pl.DataFrame:
    """All rows with user and predictions."""
    run_score(folder, folder / "plain", keep=["row", "user"])
    return frame(folder / "plain")


# --- what is written ----------------------------------------------------------------------------


def test_columns_keep_their_types_and_values(folder: Path, tmp_path: Path) -> None:
    names = ["nested", "map", "decimal", "time", "word", "pair", "large", "bytes", "small", "tags"]
    run_score(folder, tmp_path / "out", keep=names)
    assert manifest(tmp_path / "out")["columns"] == [*names, *PROBABILITIES]
    for number, name in enumerate(ROWS):
        raw, found = pq.read_table(folder / "in" / name), pq.read_table(tmp_path / "out" / f"part-{number:05d}.parquet")
        assert found.column_names == [*names, *PROBABILITIES]
        for column in names:
            kind = raw.schema.field(column).type
            assert found[column].type == (kind.value_type if pa.types.is_dictionary(kind) else kind), column
            assert found[column].to_pylist() == raw[column].to_pylist(), column


def test_columns_are_chosen_named_and_ordered(folder: Path, plain: pl.DataFrame, tmp_path: Path) -> None:
    asked = ["ctr=p_ctr", "user", "who=user", "ctr_logit", "cvr_logit", "ctcvr_logit", "propensity", "p_ctcvr"]
    result = run_score(folder, tmp_path / "out", columns=asked)
    found = frame(tmp_path / "out")
    assert found.columns == result["columns"] == [each.partition("=")[0] for each in asked]
    assert found["ctr"].equals(plain["p_ctr"])
    assert found["who"].equals(plain["user"])
    for name, logit in (("p_ctr", "ctr_logit"), ("p_cvr", "cvr_logit"), ("p_ctcvr", "ctcvr_logit")):
        np.testing.assert_allclose(1 / (1 + np.exp(-found[logit].to_numpy())), plain[name], rtol=1e-5)
    assert found["propensity"].min() > 0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": ["user"], "columns": ["p_ctr"]}, "--keep and --columns both say what to write"),
        ({"columns": ["user", "row"]}, "--columns user,row names no prediction"),
        ({"columns": ["user", "user", "p_ctr"]}, "two columns are to be written as 'user'"),
        ({"columns": ["=user", "p_ctr"]}, "'=user' is neither COLUMN nor NAME=COLUMN"),
        ({"keep": ["p_ctr"]}, "two columns are to be written as 'p_ctr'"),
        ({"top_k": 3}, "--top-k needs --by"),
        ({"by": "user"}, "--by goes with --top-k"),
        ({"top_k": 3, "by": "user", "score": "p"}, "--score 'p' is no prediction"),
        ({"top_k": 3, "by": "user", "columns": ["rank=row", "p_ctr"]}, "a column is to be written as 'rank', and --top-k writes one"),
        ({"processes": 2, "ray_address": "auto"}, "--processes is of this machine alone"),
        ({"tables": "sharded", "processes": 2}, "--tables sharded is of ranks"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_score(folder, tmp_path / "out", **options)
    assert told in error.value.message
    assert error.value.hint
    assert not list(tmp_path.iterdir())


def test_parts_are_laid_out_as_asked(folder: Path, plain: pl.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_score(folder, out, keep=["row", "user"], layout=Layout(row_group_rows=120, compression="snappy", rows_per_file=250))
    assert result["parts"] == 4 + 2 + 2
    assert frame(out).equals(plain)
    sizes = [[part["rows"] for part in file["parts"]] for file in manifest(out)["files"]]
    assert sizes == [[250, 250, 250, 150], [250, 150], [250, 50]]
    metadata = pq.read_metadata(out / "part-00000-00001.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [120, 120, 10]
    assert metadata.row_group(0).column(0).compression == "SNAPPY"


@pytest.mark.parametrize("layout", [Layout(), Layout(row_group_rows=7, rows_per_file=20)])
def test_the_best_rows_of_each_user_are_those_of_all_inputs(
    folder: Path, plain: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    monkeypatch.setattr("escm2rec.scoring.top.MOST_ROWS", 200)  # so that some are handed on before the end
    out = tmp_path / "out"
    result = run_score(folder, out, top_k=3, by="user", columns=["row", "user", *PROBABILITIES], layout=layout)
    place = plain.with_row_index("place").sort(["p_ctcvr", "place"], descending=[True, False])
    ranked = place.with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("user")).filter(pl.col("rank") <= 3)
    expected = ranked.sort("place").drop("place")
    assert frame(out).equals(expected)
    assert (result["rows"], result["rows_scored"]) == (expected.height, sum(ROWS.values()))
    assert expected["rank"].to_list().count(1) == plain["user"].n_unique(), "rows without a user are one more"
    assert not (out / "best").exists()


def test_the_best_rows_by_another_prediction_say_whose_they_are(folder: Path, plain: pl.DataFrame, tmp_path: Path) -> None:
    run_score(folder, tmp_path / "out", top_k=1, by="shop", score="p_cvr")
    found = frame(tmp_path / "out")
    assert found.columns == ["shop", "row", *PROBABILITIES, "rank"]
    assert found["shop"].n_unique() == found.height
    assert found["p_cvr"].max() == plain["p_cvr"].max()


def test_a_column_that_tells_no_users_apart_is_refused(folder: Path, tmp_path: Path) -> None:
    for column, kind in (("price", "double"), ("nested", "struct")):
        with pytest.raises(DataError, match=rf"--by {column}: the column is of type {kind}.*whole numbers or texts tell users apart"):
            run_score(folder, tmp_path / "out", top_k=1, by=column)


def test_a_condition_leaves_rows_out_and_counts_them(folder: Path, plain: pl.DataFrame, tmp_path: Path) -> None:
    result = run_score(folder, tmp_path / "out", keep=["row", "user"], where="user >= 30 and small < 100")
    raw = pl.concat([pl.read_parquet(path, columns=["user", "small"]) for path in sorted((folder / "in").iterdir())])
    mask = raw.select((pl.col("user") >= 30) & (pl.col("small") < 100)).to_series().fill_null(False)
    found = frame(tmp_path / "out")
    assert found.select("row", "user").equals(plain.filter(mask).select("row", "user"))
    np.testing.assert_allclose(found["p_ctr"], plain.filter(mask)["p_ctr"], rtol=2e-6)
    assert result["not_selected"] == plain.height - found.height > 0
    assert (result["rejected"], manifest(tmp_path / "out")["rejected_by_reason"]) == (0, {})


def test_encoded_rows_can_be_chosen_by_what_was_kept(folder: Path, tmp_path: Path) -> None:
    run_score(folder, tmp_path / "out", folder / "data" / "test", where="row like '0-1%'")
    found = frame(tmp_path / "out")["row"].to_list()
    assert found
    assert all(row.startswith("0-1") for row in found)
    with pytest.raises(DataError, match=r"keeps no column 'user'; it keeps: row\nhint"):
        run_score(folder, tmp_path / "none", folder / "data" / "test", where="user > 3")


# --- where it comes from -------------------------------------------------------------------------


def test_inputs_are_files_folders_patterns_and_parts(folder: Path, plain: pl.DataFrame, tmp_path: Path) -> None:
    part = next((folder / "data" / "train").glob("part-*"))
    shutil.copy(part, tmp_path / "moved.parquet")
    given = [f"{folder}/in/[bc].parquet", folder / "in" / "a.parquet", tmp_path / "moved.parquet"]
    run_score(folder, tmp_path / "out", given, columns=["row", "p_ctr"])
    told = manifest(tmp_path / "out")
    assert [Path(file["input"]).name for file in told["files"]] == ["b.parquet", "c.parquet", "a.parquet", "moved.parquet"]
    assert frame(tmp_path / "out")["p_ctr"][: ROWS["b.parquet"]].equals(plain["p_ctr"][900:1300])


def test_files_of_a_store_are_scored_and_known_by_what_it_tells(folder: Path, plain: pl.DataFrame, tmp_path: Path) -> None:
    with s3_server("logs"):
        store = fsspec.filesystem("s3")
        store.put(str(folder / "in") + "/", "logs/day/", recursive=True)
        store.put(str(folder / "data"), "logs/data", recursive=True)
        for number, given in enumerate(["s3://logs/day", "s3://logs/day/*.parquet", "s3://logs/*/[abc].parquet"]):
            run_score(folder, tmp_path / f"out-{number}", given, keep=["row", "user"])
            assert frame(tmp_path / f"out-{number}").equals(plain)
        (told,) = manifest(tmp_path / "out-0")["files"][0]["inputs"]
        assert (told["path"], told["bytes"]) == ("s3://logs/day/a.parquet", (folder / "in" / "a.parquet").stat().st_size)
        run_score(folder, tmp_path / "encoded", "s3://logs/data/test")
        assert frame(tmp_path / "encoded").height > 100
        store.pipe("logs/day/b.parquet", b"no table")
        with pytest.raises(DataError, match=r"^s3://logs/day/b\.parquet is not a Parquet file"):
            run_score(folder, tmp_path / "bad", "s3://logs/day")
        with pytest.raises(DataError, match=r"^no file matches 's3://logs/day/x\*'\nhint"):
            run_score(folder, tmp_path / "bad", "s3://logs/day/x*")
        with pytest.raises(DataError, match=r"^no raw logs at s3://logs/none\nhint"):
            run_score(folder, tmp_path / "bad", "s3://logs/none")


def test_a_data_set_of_another_schema_is_refused(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "config.yaml", ["data.keep=[row,user]"])
    preprocess(config.data, folder / "logs", tmp_path / "data")
    part = next((tmp_path / "data" / "test").iterdir())
    for given in (tmp_path / "data" / "test", part):
        with pytest.raises(DataError, match=rf"^{tmp_path / 'data'} is encoded by another schema than that of the model\nhint"):
            run_score(folder, tmp_path / "out", given)


# --- what is wrong with it -----------------------------------------------------------------------


@pytest.fixture
def bad(folder: Path, tmp_path: Path) -> Path:
    """A folder of seven files: two good ones, one with bad rows, and four that cannot be scored."""
    logs = tmp_path / "bad"
    logs.mkdir()
    shutil.copy(folder / "in" / "a.parquet", logs / "0-good.parquet")
    (logs / "1-text.parquet").write_text("no table")
    content = bytearray((folder / "in" / "b.parquet").read_bytes())
    column = pq.read_metadata(folder / "in" / "b.parquet").row_group(2).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    (logs / "2-damaged.parquet").write_bytes(content)
    pq.write_table(raw_table(50, 3).drop_columns(["shop"]), logs / "3-without.parquet")
    (logs / "4-nowhere.parquet").symlink_to(logs / "absent")
    rows = raw_table(60, 4)
    price = rows["price"].to_pylist()
    price[7] = price[30] = -5.0
    pq.write_table(rows.set_column(rows.column_names.index("price"), "price", pa.array(price)), logs / "5-rows.parquet")
    shutil.copy(folder / "in" / "c.parquet", logs / "6-good.parquet")
    return logs


FAULTS = {
    "1-text.parquet": "is not a Parquet file, or is damaged",
    "2-damaged.parquet": "row group 2 is damaged",
    "3-without.parquet": "has no column 'shop' (feature 'shop')",
    "4-nowhere.parquet": "is a link to nowhere, and its name is that of an input",
    "5-rows.parquet": "row 8, column price: number: expected a number that fits float32 (above -1 with log1p), found -5.0",
}


def test_bad_files_do_not_stop_the_others_and_the_same_call_tries_them_again(
    folder: Path, bad: Path, plain: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    result = run_score(folder, out, bad, on_error="skip", columns=["row", "p_ctr"])
    assert (result["failed"], result["parts"], result["rows"]) == (5, 2, 1200)
    told = {Path(file["input"]).name: file for file in manifest(out)["files"]}
    assert sorted(told) == sorted(path.name for path in bad.iterdir())
    for name, fault in FAULTS.items():
        assert fault in told[name]["error"]
        assert str(bad / name) in told[name]["error"]
        assert told[name]["hint"]
    assert frame(out)["p_ctr"].equals(pl.concat([plain["p_ctr"][:900], plain["p_ctr"][1300:]]))
    shutil.copy(folder / "in" / "b.parquet", bad / "2-damaged.parquet")
    (bad / "4-nowhere.parquet").unlink()
    shutil.copy(folder / "in" / "c.parquet", bad / "4-nowhere.parquet")
    again = run_score(folder, out, bad, on_error="skip", columns=["row", "p_ctr"])
    assert (again["failed"], again["parts"], again["files_done_before"], again["rows"]) == (3, 4, 2, 1900)
    with pytest.raises(ConfigError, match="exists"):
        run_score(folder, out, bad, on_error="skip", columns=["row", "p_cvr"])


def test_the_first_bad_file_stops_without_the_option(folder: Path, bad: Path, tmp_path: Path) -> None:
    (bad / "4-nowhere.parquet").unlink()
    with pytest.raises(DataError, match=r"1-text\.parquet is not a Parquet file"):
        run_score(folder, tmp_path / "out", bad)
    (tmp_path / "absent").mkdir()
    with pytest.raises(DataError, match="it is empty"):
        run_score(folder, tmp_path / "out", tmp_path / "absent", on_error="skip")


def test_bad_rows_are_left_out_and_counted(folder: Path, bad: Path, tmp_path: Path) -> None:
    result = run_score(folder, tmp_path / "out", bad / "5-rows.parquet", bad_rows="count")
    assert (result["rows"], result["rejected"]) == (58, 2)
    found = frame(tmp_path / "out")["row"].to_list()
    assert found == [f"4-{row}" for row in range(60) if row not in (7, 30)]
    told = manifest(tmp_path / "out")["rejected_by_reason"]["number"]
    assert (told["rows"], told["first"][0]["row"], told["first"][0]["column"]) == (2, 8, "price")
    with pytest.raises(DataError, match=r"row 8, column price.*\nhint: mend the input, or leave such rows out .*--bad-rows count"):
        run_score(folder, tmp_path / "none", bad / "5-rows.parquet")


def test_the_command_ends_with_2_and_its_result_where_a_file_failed(folder: Path, bad: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "escm2rec", "score", "--run", str(folder / "run"), "--input", str(bad), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--on-error", "skip"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["failed"] == 5
    assert "error: 5 of 7 files could not be scored" in done.stderr
    assert "hint: mend them and run the same command again: it scores them alone (with other options" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.strip().startswith("1-text.parquet") and FAULTS["1-text.parquet"] in line]
    assert [line for line in done.stderr.splitlines() if "6-good.parquet" in line and " 300 " in line], "a table by file"


def test_shares_are_beside_those_of_training_and_gaps_are_warned_of(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = json.loads((folder / "run" / COVERAGE).read_text())
    rows = raw_table(500, 9)
    strange = rows.set_column(rows.column_names.index("shop"), "shop", pa.array(["new"] * 500))
    strange = strange.set_column(strange.column_names.index("user"), "user", pa.nulls(500, pa.int64()))
    pq.write_table(strange, tmp_path / "strange.parquet")
    with caplog.at_level(logging.WARNING, "escm2rec"):
        run_score(folder, tmp_path / "out", tmp_path / "strange.parquet")
    found = manifest(tmp_path / "out")["features"]
    assert found["user"]["missing"] == {"scored": 1.0, "training": trained["user"]["missing"]}
    assert found["shop"]["oov"] == {"scored": 1.0, "training": trained["shop"]["oov"]}
    assert found["price"]["missing"]["scored"] == 0
    said = [record.getMessage() for record in caplog.records]
    assert f"feature 'user': 100.0% of rows have no value, in training {100 * trained['user']['missing']:.1f}%" in said
    assert f"feature 'shop': 100.0% of values are out of vocabulary, in training {100 * trained['shop']['oov']:.1f}%" in said
    assert len(said) == 2
    caplog.clear()
    run_score(folder, tmp_path / "again", tmp_path / "strange.parquet", warn_gap=1.0)
    run_score(folder, tmp_path / "known", folder / "data" / "train", warn_gap=0.0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert manifest(tmp_path / "known")["features"]["tags"]["missing"] == {
        "scored": trained["tags"]["missing"],
        "training": trained["tags"]["missing"],
    }


def with_bad(folder: Path, logs: Path) -> Path:
    """Three files, the last of which cannot be scored."""
    shutil.copytree(folder / "in", logs)
    (logs / "c.parquet").write_text("no table")
    return logs


@pytest.mark.parametrize("layout", [Layout(), Layout(row_group_rows=7, rows_per_file=20)])
def test_the_best_of_all_are_found_anew_when_a_file_is_mended(folder: Path, tmp_path: Path, layout: Layout) -> None:
    logs = with_bad(folder, tmp_path / "logs")
    options: dict[str, Any] = {"top_k": 2, "by": "user", "on_error": "skip", "layout": layout, "columns": ["row", "p_ctcvr"]}
    assert run_score(folder, tmp_path / "out", logs, **options)["failed"] == 1
    shutil.copy(folder / "in" / "c.parquet", logs)
    again = run_score(folder, tmp_path / "out", logs, **options)
    assert (again["failed"], again["files_done_before"]) == (0, 2)
    run_score(folder, tmp_path / "fresh", logs, **options)
    assert frame(tmp_path / "out").equals(frame(tmp_path / "fresh"))
    assert not (tmp_path / "out" / "best").exists()


def test_predictions_that_lack_files_stay_until_those_are_there(folder: Path, tmp_path: Path) -> None:
    """A further try that fails, or is killed, takes nothing away."""
    logs, out = with_bad(folder, tmp_path / "logs"), tmp_path / "out"
    run_score(folder, out, logs, on_error="skip")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match=r"c\.parquet is not a Parquet file"):
        run_score(folder, out, logs)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shutil.copy(folder / "in" / "c.parquet", logs)
    assert run_score(folder, out, logs)["files_done_before"] == 2
    assert not list(tmp_path.glob(".out*"))


def test_whatever_names_and_errors_hold_the_table_is_printed(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "[/z]" / "in[red]"
    logs.mkdir(parents=True)
    shutil.copy(folder / "in" / "c.parquet", logs / "[b]a.parquet")
    pq.write_table(raw_table(5, 1).rename_columns(["row", "[/b]", *raw_table(5, 1).column_names[2:]]), logs / "b.parquet")
    assert run_score(folder, tmp_path / "out", str(logs), on_error="skip")["failed"] == 1
    said = capfd.readouterr().err
    assert "[b]a.parquet" in said
    assert "has no column 'user'" in said


def test_an_input_that_changes_or_goes_meanwhile_leaves_no_part(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = tmp_path / "logs"
    shutil.copytree(folder / "in", logs)
    blocks = RawEncoder.blocks

    def disturbed(encoder: RawEncoder, file: Any, rejected: Any) -> Iterator[Any]:
        yield from blocks(encoder, file, rejected)
        if file.name == "a.parquet":
            os.utime(file.path, (1, 1))
        if file.name == "b.parquet":
            file.path.unlink()
            (logs / "c.parquet").unlink()

    monkeypatch.setattr(RawEncoder, "blocks", disturbed)
    result = run_score(folder, tmp_path / "out", logs, on_error="skip")
    assert (result["failed"], result["parts"]) == (3, 0)
    errors = [record["error"].rpartition("/")[2] for record in manifest(tmp_path / "out")["files"]]
    missing = "cannot be read: No such file or directory"
    assert errors == ["a.parquet changed while it was scored", f"b.parquet {missing}", f"c.parquet {missing}"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


class KilledError(BaseException):
    """Stands in for a kill: nothing is done after it."""


@pytest.mark.parametrize("where", ["scoring.score.write_lookups", "scoring.score.write_manifest", "folder._take_place"])
def test_a_job_is_taken_up_wherever_it_ended(
    folder: Path, plain: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """While the model is written; before the manifest is; between it and the place of the folder."""

    def killed(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(f"escm2rec.{where}", killed)
        with pytest.raises(KilledError):
            run_score(folder, tmp_path / "out", keep=["row", "user"])
    result = run_score(folder, tmp_path / "out", keep=["row", "user"])
    assert result["files_done_before"] == (0 if "lookups" in where else 3)
    assert frame(tmp_path / "out").equals(plain)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".parquet") == ["manifest.json"]


def test_files_of_an_input_are_not_those_of_one_with_a_longer_number(tmp_path: Path) -> None:
    names = ["part-10000.parquet", "part-10000-00001.parquet", "part-100000.parquet", ".part-10000.parquet.partial"]
    for name in names:
        (tmp_path / name).touch()
    assert sorted(path.name for path in files_of(tmp_path, 10_000)) == sorted(set(names) - {"part-100000.parquet"})


def test_places_that_would_spoil_something_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "in", tmp_path / "in")
    for out, inputs, told in (
        (tmp_path / "in" / "sub", tmp_path / "in", "lies in the input"),
        (Path("s3:/bucket/out"), tmp_path / "in", "are written to a local folder"),
        (tmp_path / "out", "", "--input names nothing"),
    ):
        with pytest.raises(ConfigError, match=told):
            run_score(folder, out, inputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_job_that_did_nothing_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    for options in ({"keep": ["nosuch"]}, {"where": "nosuch > 3"}, {"top_k": 1, "by": "bytes"}):
        with pytest.raises(DataError):
            run_score(folder, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# --- who does it ----------------------------------------------------------------------------------


def bytes_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*")}


def test_processes_make_the_same_bytes(folder: Path, plain: pl.DataFrame, tmp_path: Path) -> None:
    run_score(folder, tmp_path / "out", keep=["row", "user"], processes=2)
    assert bytes_of(tmp_path / "out") == bytes_of(folder / "plain")
    assert plain.height == sum(ROWS.values())


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine."""
    utils = pytest.importorskip("ray.cluster_utils")
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    try:
        yield made
    finally:
        made.shutdown()


def test_ray_makes_the_same_bytes(folder: Path, plain: pl.DataFrame, tmp_path: Path, cluster: Any) -> None:
    command = [sys.executable, "-m", "escm2rec", "score", "--run", str(folder / "run"), "--input", str(folder / "in")]
    command += ["--out", str(tmp_path / "out"), "--keep", "row,user", "--engine", "ray", "--address", cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert bytes_of(tmp_path / "out") == bytes_of(folder / "plain")
    assert plain.height == json.loads(done.stdout)["rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_rows_are_estimated_by_footers(folder: Path, bad: Path) -> None:
    schema = Schema.load(folder / "run" / "schema.json")
    assert estimated_rows(log_files(schema, [str(folder / "in")])) == sum(ROWS.values())
    known = [ROWS["a.parquet"], ROWS["b.parquet"], 50, 60, ROWS["c.parquet"]]
    assert estimated_rows(log_files(schema, [str(bad)], skips=True)) == round(sum(known) / 5 * 7)
    assert estimated_rows([LogFile("s3://a/b", urls=("s3://a/b",))]) is None


def test_a_csv_is_scored_as_the_table_that_it_was_written_from(tmp_path: Path) -> None:
    """Of a model that was trained on CSV, whose ids are texts."""
    (tmp_path / "logs").mkdir()
    flat = raw_table(900, 0, labels=True).drop_columns(["tags", "history", "history_weight"])
    pa_csv.write_csv(flat, tmp_path / "logs" / "train.csv")
    overrides = [
        'data.source.files="*.csv"',
        "data.features=[{name: user, kind: categorical}, {name: shop, kind: categorical}, {name: price, kind: numeric}]",
    ]
    config = load_config(write_config(tmp_path / "config.yaml"), overrides)
    preprocess(config.data, tmp_path / "logs", tmp_path / "data")
    train(config, tmp_path / "data", tmp_path / "run")
    candidates = raw_table(300, 5).select(["row", "user", "shop", "price"])
    pa_csv.write_csv(candidates, tmp_path / "c.csv")
    texts = candidates.set_column(1, "user", candidates["user"].cast(pa.string()))
    pq.write_table(texts, tmp_path / "c.parquet")
    for name in ("csv", "parquet"):
        score(tmp_path / "run", [tmp_path / f"c.{name}"], tmp_path / name, Options(where="price > 10"))
    assert frame(tmp_path / "csv").height > 100
    assert frame(tmp_path / "csv").equals(frame(tmp_path / "parquet"))


def test_a_job_leaves_nothing_but_its_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    run_score(folder, tmp_path / "out", top_k=2, by="user")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scratch"]
    assert {path.suffix or path.name for path in (tmp_path / "out").iterdir()} == {".parquet", ".json"}
    assert not [path for path in os.scandir(tmp_path / "scratch") if "escm2rec" in path.name]

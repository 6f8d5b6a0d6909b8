"""The reader: every row once an epoch, the same global batches on any number of ranks, bad files named."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.reader import data_loader, iter_batches, order, write_grouped_data
from benchmarks.reference import reference_schema, write_reference_data
from escm2rec.cells import with_lists
from escm2rec.errors import DataError
from escm2rec.reader import reader as reader_module
from escm2rec.reader.batch import Batch
from escm2rec.reader.columns import Columns, Slice, assemble, decode
from escm2rec.reader.dataset import Dataset, RowGroup
from escm2rec.reader.reader import Reader, read_ahead
from tests.encoded import impressions, schema, write_dataset

ROWS = 2_345


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("reader") / "data", {"train": ROWS, "test": 10}))


def _row_ids(
    dataset: Dataset, ranks: int, epoch: int = 0, lanes: int = 8, shuffle: bool = True, start: int = 0, batch: int = 100, seed: int = 0
) -> list[set[int]]:
    """Row ids of each global batch from place `start` on, and a check that the ranks share them out evenly."""
    readers = [
        Reader(dataset, "train", batch, rank, ranks, seed=seed, lanes=lanes, shuffle=shuffle, extra_columns=("kept.row_id",))
        for rank in range(ranks)
    ]
    steps: list[set[int]] = []
    for shares in zip(*(reader.batches(epoch, start) for reader in readers), strict=True):
        ids = [extra["kept.row_id"].to_pylist() if extra.num_columns else [] for _, extra in shares]
        assert len({len(share) for share, _ in shares}) == 1, "all ranks have batches of one size"
        assert max(map(len, ids)) - min(map(len, ids)) <= 1
        assert [share.num_rows for share, _ in shares] == list(map(len, ids))
        steps.append(set().union(*ids))
        assert len(steps[-1]) == sum(map(len, ids))
    return steps


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_every_row_comes_once_and_global_batches_do_not_depend_on_the_ranks(dataset: Dataset, ranks: int) -> None:
    steps = _row_ids(dataset, ranks)
    assert len(steps) == 24
    assert sorted(row for step in steps for row in step) == list(range(ROWS))
    assert steps == _row_ids(dataset, 1)
    assert max(map(len, steps)) - min(map(len, steps)) <= 2


@pytest.mark.parametrize("lanes", [1, 3, 64])
def test_any_number_of_lanes_covers_all_rows(dataset: Dataset, lanes: int) -> None:
    assert sorted(row for step in _row_ids(dataset, 2, lanes=lanes) for row in step) == list(range(ROWS))


@pytest.mark.parametrize(("batch", "lanes"), [(2, 8), (4, 8), (9, 8), (64, 8), (64, 1000), (ROWS, 8), (10 * ROWS, 8)])
def test_batches_are_of_one_size_whatever_the_lanes(dataset: Dataset, batch: int, lanes: int) -> None:
    reader = Reader(dataset, "train", batch, lanes=lanes)
    cuts = [reader.row_at(step) for step in range(reader.num_steps + 1)]
    ranges = [reader._share(begin, end)[0] for begin, end in pairwise(cuts)]
    sizes = [sum(stop - start for start, stop in each) for each in ranges]
    assert sizes == [end - begin for begin, end in pairwise(cuts)]
    assert (cuts[0], cuts[-1]) == (0, ROWS)
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1


def test_row_groups_are_permuted_each_in_its_own_way(dataset: Dataset) -> None:
    reader = Reader(dataset, "train", 100, extra_columns=("kept.row_id",))
    orders = []
    for group in reader.groups:
        if group.num_rows == 128:
            ids = reader._decode(group, epoch=0).extra["kept.row_id"].to_numpy()
            orders.append(tuple((ids - ids.min()).tolist()))
    assert len(orders) > 10
    assert len(set(orders)) == len(orders)


def test_epochs_differ_and_repeat(dataset: Dataset) -> None:
    assert _row_ids(dataset, 1, epoch=0) != _row_ids(dataset, 1, epoch=1)
    assert _row_ids(dataset, 1, epoch=1) == _row_ids(dataset, 1, epoch=1)


def test_the_order_is_of_the_seed_whoever_reads(dataset: Dataset) -> None:
    """Shared out by one rank or two."""
    one, other = (_row_ids(dataset, 1, seed=seed) for seed in (1, 2))
    assert one != other
    assert _row_ids(dataset, 1, seed=1) == _row_ids(dataset, 2, seed=1) == one
    assert sorted(row for step in one for row in step) == list(range(ROWS))


def test_a_later_start_goes_on_with_the_same_batches(dataset: Dataset) -> None:
    assert _row_ids(dataset, 2, start=Reader(dataset, "train", 100).row_at(17)) == _row_ids(dataset, 1)[17:]


@pytest.mark.parametrize(("ranks", "batch"), [(1, 100), (2, 100), (3, 77), (4, 1_000)])
def test_an_epoch_goes_on_from_any_row_on_other_ranks_in_other_batches(dataset: Dataset, ranks: int, batch: int) -> None:
    """The rows before place r and those from it on are apart and together the epoch, whoever reads which in what sizes."""
    before = _row_ids(dataset, 2)
    rows = Reader(dataset, "train", 100).row_at(9)
    assert 0 < rows == sum(map(len, before[:9]))
    after = _row_ids(dataset, ranks, start=rows, batch=batch)
    assert sorted(set().union(*before[:9], *after)) == list(range(ROWS))
    assert sum(map(len, after)) == ROWS - rows
    assert len(after) == -(-(ROWS - rows) // batch)
    assert _row_ids(dataset, ranks, start=ROWS, batch=batch) == []


def test_a_place_of_the_order_holds_one_row_whatever_the_batches(tmp_path: Path) -> None:
    """Read one row at a time, the order is a sequence; every other batch size cuts that sequence."""
    dataset = Dataset.open(write_dataset(tmp_path / "data", {"train": 203}, rows_per_group=20))
    sequence = [row for (row,) in _row_ids(dataset, 1, batch=1)]
    for batch in (7, 100, 203):
        reader = Reader(dataset, "train", batch)
        cuts = [reader.row_at(step) for step in range(reader.num_steps + 1)]
        assert _row_ids(dataset, 2, batch=batch) == [set(sequence[begin:end]) for begin, end in pairwise(cuts)]


def test_what_is_left_after_any_step_is_divided_as_before() -> None:
    compared = 0
    for rows in (1, 5, 97, 1_000, 4_099):
        for batch in (1, 2, 7, 64, 999, 5_000):
            reader = object.__new__(Reader)
            reader.num_rows, reader.num_steps, reader._global_batch_size = rows, -(-rows // batch), batch
            cuts = [reader.row_at(step) for step in range(reader.num_steps + 1)]
            for step in range(0, reader.num_steps, 1 + reader.num_steps // 50):
                assert [reader.row_at(more, cuts[step]) for more in range(reader.num_steps - step + 1)] == cuts[step:]
                compared += 1
    assert compared > 200


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_no_row_group_is_decoded_by_two_ranks(tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 groups in 8 lanes: each begins with a group of its own. Batches of 60 do not divide by the lanes."""
    made = Dataset.open(write_dataset(tmp_path / "data", {"train": 1_600}, rows_per_file=400, rows_per_group=100))
    decoded: list[int] = []
    decode_group = Reader._decode

    def counted(self: Reader, group: RowGroup, epoch: int) -> Columns:
        decoded.append(group.number)
        return decode_group(self, group, epoch)

    monkeypatch.setattr(Reader, "_decode", counted)
    for rank in range(ranks):
        list(Reader(made, "train", 60, rank, ranks).batches(0))
    assert sorted(decoded) == list(range(16))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_that_decode_change_nothing(dataset: Dataset, threads: int) -> None:
    expected = list(Reader(dataset, "train", 100).batches(3, 250))
    seen = list(Reader(dataset, "train", 100, decode_threads=threads).batches(3, 250))
    assert len(seen) == len(expected) == 21
    for (batch, _), (other, _) in zip(seen, expected, strict=True):
        assert batch.features is not None
        assert other.features is not None
        assert torch.equal(batch.features.values(), other.features.values())
        assert torch.equal(batch.features.lengths(), other.features.lengths())
        assert torch.equal(batch.click, other.click)


def test_row_groups_are_decoded_side_by_side(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three wait for each other."""
    decode, met, decoding = Reader._decode, threading.Barrier(3, timeout=20), itertools.count()

    def decode_together(self: Reader, group: RowGroup, epoch: int) -> Columns:
        if next(decoding) < 3:
            met.wait()
        return decode(self, group, epoch)

    monkeypatch.setattr(Reader, "_decode", decode_together)
    assert sum(batch.num_rows for batch, _ in Reader(dataset, "train", 100, decode_threads=3).batches(0)) == ROWS


@pytest.mark.parametrize("prefetch", [1, 5])
def test_no_more_batches_than_asked_for_are_made_ahead(dataset: Dataset, prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the one that was taken and the one that waits to be put among them."""
    made = itertools.count(1)
    counted: list[int] = []

    def counting(*arguments: Any) -> Batch:
        counted.append(next(made))
        return assemble(*arguments)

    monkeypatch.setattr(reader_module, "assemble", counting)
    batches = Reader(dataset, "train", 100, prefetch=prefetch).epoch(0)
    next(batches)
    until = time.monotonic() + 20
    while len(counted) < prefetch + 1 and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    assert prefetch + 1 <= len(counted) <= prefetch + 2
    del batches


def test_what_is_not_shuffled_lies_where_arrow_read_it() -> None:
    """Ids of lists, without a copy: a batch is made of them in one pass."""
    table = impressions(50, seed=3)
    history = decode(table, schema(), labels=True, where="x").jagged["history"]
    cells = table.column("history").chunk(0).buffers()[2]
    assert np.shares_memory(history.values, np.frombuffer(cells, np.uint8))


def test_an_error_of_a_decoding_thread_reaches_the_reader(tmp_path: Path) -> None:
    damaged = _damaged(tmp_path, "user", pa.array(np.full(100, 300, np.int32)))
    before = threading.active_count()
    with pytest.raises(DataError, match="row 0, column user: id 300"):
        list(Reader(damaged, "train", 10, decode_threads=3).epoch(0))
    assert _settles(before)


def test_rows_of_a_user_are_spread_over_an_epoch(tmp_path: Path) -> None:
    """Users of 50 rows and very different click rates, in 12 groups of 80 users: neighbours are as good as strangers, batches nearly so."""
    write_grouped_data(tmp_path / "data", 49_152, rows_per_group=4_096, rows_per_user=50)
    found = order(tmp_path / "data", 512, lanes=(8,), epochs=3)
    files, full, read = (found[name] for name in ("files", "full shuffle", "reader, 8 lanes"))
    assert files["autocorrelation"]["1"] > 0.2
    assert files["batch_variance"] > 5
    for lag in ("1", "2", "4", "8", "64"):
        assert abs(full["autocorrelation"][lag]) < 0.01
        assert abs(read["autocorrelation"][lag]) < 0.02
    assert 0.7 < full["batch_variance"] < 1.4
    assert read["batch_variance"] < 2


def test_one_lane_without_shuffling_keeps_the_order_of_the_files(dataset: Dataset) -> None:
    reader = Reader(dataset, "train", 100, lanes=1, shuffle=False, extra_columns=("kept.row_id",))
    assert [row for _, extra in reader.batches(0) for row in extra["kept.row_id"].to_pylist()] == list(range(ROWS))


def test_batches_hold_what_the_files_hold() -> None:
    """Against a row-by-row reading of the same table, with rows taken from the middle of two blocks."""
    table = impressions(50, seed=3)
    columns = decode(table, schema(), labels=True, where="table")
    batch = assemble([Slice(columns, 7, 20), Slice(columns, 31, 33)], schema(), padded_rows=17)
    rows = [with_lists(table.slice(row, 1)).to_pylist()[0] for row in [*range(7, 20), 31, 32]]
    assert (len(batch), batch.num_rows) == (17, 15)
    checked = 0
    for keyed, weighted in ((batch.features, False), (batch.weighted_features, True)):
        assert keyed is not None
        for name, jagged in keyed.to_dict().items():
            lengths = jagged.lengths().tolist()
            values = [part.tolist() for part in torch.split(jagged.values(), lengths)]
            expected = [[] if row[name] is None else row[name] if isinstance(row[name], list) else [row[name]] for row in rows]
            assert values == [*expected, [], []], name
            if weighted:
                weights = [part.tolist() for part in torch.split(jagged.weights(), lengths)]
                assert weights == [*(row[f"{name}.weight"] for row in rows), [], []]
            checked += 1
    assert checked == 4
    assert batch.numeric[:15].tolist() == [[row["price"], row["age"]] for row in rows]
    assert batch.click.tolist() == [*(row["click"] for row in rows), 0, 0]
    assert batch.conversion.tolist() == [*(row["conversion"] for row in rows), 0, 0]
    assert batch.weight.tolist() == [1] * 15 + [0] * 2


def _damaged(tmp_path: Path, column: str, array: pa.Array, rows_per_group: int = 128) -> Dataset:
    folder = write_dataset(tmp_path / "data", {"train": len(array)}, rows_per_group=rows_per_group)
    path = folder / "train" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, array), path, row_group_size=rows_per_group)
    return Dataset.open(folder)


LISTS = pa.list_(pa.int32())


def cells(lists: list[list[Any]], kind: Any = np.int32) -> pa.Array:
    """Lists as a data set has them."""
    return pa.array([np.array(each, kind).tobytes() for each in lists], pa.binary())


INT32 = pa.int32()
BAD_IDS: dict[str, tuple[str, pa.Array, str]] = {
    # Rows 0 to 39 are the first row group, rows 40 to 79 the second, which has row 57.
    "too large": (
        "user",
        pa.array([3] * 57 + [300] + [3] * 62, INT32),
        "row 57, column user: id 300 is out of range, its table has rows 0 to 299",
    ),
    "negative": ("user", pa.array([3] * 57 + [-1] + [3] * 62, INT32), "row 57, column user: id -1 is out of range"),
    "after missing ones": (
        "scene",
        pa.array([None] * 50 + [1] * 7 + [5] + [None] * 62, INT32),
        "row 57, column scene: id 5 is out of",
    ),
    "negative after missing ones": (
        "scene",
        pa.array([None, 1] * 28 + [None, -9] + [None] * 62, INT32),
        "row 57, column scene: id -9 is",
    ),
    "in a list": ("tags", cells([[1, 2], []] * 28 + [[], [5, 60]] + [[]] * 62), "row 57, column tags: id 60 is out of range"),
    "negative in a list": ("tags", cells([[1, 2], []] * 28 + [[], [-7, 5]] + [[]] * 62), "row 57, column tags: id -7 is out of"),
    "a list that is missing": ("tags", pa.array([b"\1\0\0\0"] * 57 + [None] + [b""] * 62), "row 57, column tags: a list is missing"),
    "half a value": (
        "tags",
        pa.array([b""] * 57 + [b"\1\0\0\0" * 2 + b"\1"] + [b""] * 62),
        "row 57, column tags: a list of 9 bytes is no whole",
    ),
    "lists of another version": ("tags", pa.array([[1]] * 120, LISTS), "column tags: it is of type list<.*int32>, expected binary"),
    "of another type": ("user", pa.array([1.5] * 120), "column user: it is of type double, expected int32"),
    "a list of one": ("user", pa.array([[1]] * 120, LISTS), "column user: it is of type list<.*int32>, expected int32"),
    "not a list": ("tags", pa.array([1] * 120, INT32), "column tags: it is of type int32, expected binary"),
}


@pytest.mark.parametrize("kind", BAD_IDS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_bad_id_names_its_file_the_row_in_it_column_and_value(tmp_path: Path, kind: str, shuffle: bool) -> None:
    column, array, message = BAD_IDS[kind]
    damaged = _damaged(tmp_path, column, array, rows_per_group=40)
    assert [group.first_row for group in damaged.row_groups("train")] == [0, 40, 80]
    with pytest.raises(DataError, match=f"part-00000.parquet, {message}"):
        list(Reader(damaged, "train", 10, shuffle=shuffle).batches(0))


def test_a_bad_id_in_a_slice_of_lists_names_its_row() -> None:
    table = impressions(50, seed=3)
    bad = cells([[1, 2, 3]] * 30 + [[4, 60]] + [[]] * 19)
    table = table.set_column(table.column_names.index("tags"), "tags", bad).slice(20)
    with pytest.raises(DataError, match="table, row 30, column tags: id 60"):
        decode(table, schema(), labels=True, where="table", first_row=20)


def test_a_column_that_is_missing_and_weights_that_are_too_few_are_refused() -> None:
    table = impressions(50, seed=3)
    with pytest.raises(DataError, match="table: no column 'scene'"):
        decode(table.drop_columns(["scene"]), schema(), labels=True, where="table")
    weights = cells([[1.0]] * 50, np.float32)
    with pytest.raises(DataError, match=r"table, column history.weight: not as many weights as values"):
        decode(
            table.set_column(table.column_names.index("history.weight"), "history.weight", weights), schema(), labels=True, where="table"
        )


def test_an_order_takes_the_rows_of_every_column() -> None:
    table = impressions(200, seed=4).slice(30, 101)
    permutation = np.random.default_rng(0).permutation(101)
    taken = decode(table, schema(), labels=True, where="table", order=permutation)
    moved = decode(table.take(pa.array(permutation)), schema(), labels=True, where="table")
    batch, other = (assemble([Slice(columns, 0, 101)], schema()) for columns in (taken, moved))
    for keyed, expected in ((batch.features, other.features), (batch.weighted_features, other.weighted_features)):
        assert keyed is not None
        assert expected is not None
        assert torch.equal(keyed.lengths(), expected.lengths())
        assert torch.equal(keyed.values(), expected.values())
    assert batch.weighted_features is not None
    assert other.weighted_features is not None
    assert torch.equal(batch.weighted_features.weights(), other.weighted_features.weights())
    assert torch.equal(batch.numeric, other.numeric)
    assert torch.equal(batch.click, other.click)
    assert taken.extra.equals(moved.extra)


def test_a_file_that_is_missing_or_no_parquet_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {"train": 100})
    path = folder / "train" / "part-00000.parquet"
    path.write_bytes(b"click,conversion\n1,0\n")
    with pytest.raises(DataError, match="is not a Parquet file"):
        Dataset.open(folder).row_groups("train")
    path.unlink()
    with pytest.raises(DataError, match="is missing, the manifest names it"):
        Dataset.open(folder).row_groups("train")


def test_a_file_with_other_rows_than_the_manifest_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {"train": 100})
    pq.write_table(impressions(90, 0), folder / "train" / "part-00000.parquet")
    with pytest.raises(DataError, match="has 90 rows, the manifest says 100"):
        Reader(Dataset.open(folder), "train", 10)


def test_incomplete_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {"train": 100})
    with pytest.raises(DataError, match="has no rows in split 'test'"):
        Dataset.open(folder).split_counts("test")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"is incomplete: it has no manifest\.json"):
        Dataset.open(folder)
    with pytest.raises(DataError, match="no data set at"):
        Dataset.open(tmp_path / "absent")


def test_a_schema_edited_by_hand_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {"train": 100})
    path = folder / "schema.json"
    path.write_text(path.read_text().replace('"num_embeddings": 300', '"num_embeddings": 301'))
    with pytest.raises(DataError, match="was changed after it was written"):
        Dataset.open(folder)


def test_reading_ahead_passes_errors_on_and_stops_with_its_consumer() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise DataError("row 7 is bad")

    with pytest.raises(DataError, match="row 7 is bad"):
        list(read_ahead(failing(), 2))
    made: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    items = read_ahead(endless(), 2)
    assert [next(items), next(items)] == [0, 1]
    items.close()  # type: ignore[attr-defined]
    time.sleep(0.4)
    seen = len(made)
    time.sleep(0.3)
    assert len(made) == seen <= 6
    assert not any(thread.name == "escm2rec-reader" and thread.is_alive() for thread in threading.enumerate())


LEAVING = """
import atexit, itertools, sys, threading, time
readers = lambda: [thread.name for thread in threading.enumerate() if thread.name == "escm2rec-reader"]
atexit.register(lambda: print(len(readers()), "left", file=sys.stderr))  # the first to be registered is the last to run
from escm2rec.reader import reader
reader.EXIT_S = 2
def stuck():
    yield 1
    time.sleep(600)
items = {"full": itertools.count, "closed": itertools.count, "stuck": stuck}[sys.argv[1]]()
left = reader.read_ahead(items, 2)
threading.Thread(target=lambda: next(left)).start()  # another thread takes the first
time.sleep(0.3)
if sys.argv[1] != "stuck":
    assert next(left) == 1
print(len(readers()), "at work", file=sys.stderr)
if sys.argv[1] == "closed":
    left.close()
sys.exit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
@pytest.mark.parametrize("pin_memory", [False, True])
def test_a_reader_on_cores_gives_way_to_the_step(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, pin_memory: bool) -> None:
    """By the priority of its thread, and of those that it starts; one that feeds a GPU keeps its own, and so does the caller."""
    seen: set[int] = set()

    def decode_and_look(*args: Any, **options: Any) -> Columns:
        seen.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return decode(*args, **options)

    monkeypatch.setattr(reader_module, "decode", decode_and_look)
    monkeypatch.setattr(reader_module, "assemble", lambda slices, schema, rows, pin_memory: assemble(slices, schema, rows))
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    for threads in (1, 2):
        seen.clear()
        assert list(Reader(dataset, "train", 500, decode_threads=threads, pin_memory=pin_memory).epoch(0))
        assert seen == {own if pin_memory else min(19, own + reader_module.NICENESS)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


@pytest.mark.parametrize(("how", "left"), [("full", 0), ("closed", 0), ("stuck", 1)])
def test_a_program_that_leaves_a_reader_in_the_middle_ends(how: str, left: int) -> None:
    """Its thread is waited for: dropped in the middle of Arrow's code it aborted about one process in five. But not for ever."""
    done = subprocess.run([sys.executable, "-c", LEAVING, how], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (3, f"1 at work\n{left} left\n")


def _settles(threads: int, within_s: float = 5.0) -> bool:
    """Whether there are no more threads than before, soon."""
    until = time.monotonic() + within_s
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.02)
    return threading.active_count() <= threads


def test_what_the_reader_is_timed_against_reads_the_same_ids(tmp_path: Path) -> None:
    """Of one row group, which is all that the slow one reads; its order apart."""
    write_reference_data(tmp_path / "data", 3_000, schema=reference_schema(2, 2))
    data = Dataset.open(tmp_path / "data")
    ways = [[batch for batch, _ in Reader(data, "train", 1_000).batches(0)], list(iter_batches(data)), list(data_loader(data))]
    read = [torch.cat([batch.features.values() for batch in batches if batch.features is not None]).sort().values for batches in ways]
    assert len(read[0]) > 10_000
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])

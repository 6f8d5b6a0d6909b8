"""The reader: every row once an epoch, the same global batches on any number of ranks, bad files named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from escm2rec.errors import DataError
from escm2rec.reader.columns import Slice, assemble, decode
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader, read_ahead
from tests.encoded import impressions, schema, write_dataset

ROWS = 2_345


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("reader") / "data", {"train": ROWS, "test": 10}))


def _row_ids(dataset: Dataset, ranks: int, epoch: int = 0, lanes: int = 8, shuffle: bool = True, start: int = 0) -> list[set[int]]:
    """Row ids of each global batch, and a check that the ranks share them out evenly."""
    readers = [
        Reader(dataset, "train", 100, rank, ranks, lanes=lanes, shuffle=shuffle, extra_columns=("kept.row_id",)) for rank in range(ranks)
    ]
    steps: list[set[int]] = []
    for shares in zip(*(reader.batches(epoch, start) for reader in readers), strict=True):
        ids = [extra["kept.row_id"].to_pylist() for _, extra in shares]
        assert len({len(batch) for batch, _ in shares}) == 1, "all ranks have batches of one size"
        assert max(map(len, ids)) - min(map(len, ids)) <= 1
        assert [batch.num_rows for batch, _ in shares] == list(map(len, ids))
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


def test_a_later_start_goes_on_with_the_same_batches(dataset: Dataset) -> None:
    assert _row_ids(dataset, 2, start=Reader(dataset, "train", 100).row_at(17)) == _row_ids(dataset, 1)[17:]


def test_one_lane_without_shuffling_keeps_the_order_of_the_files(dataset: Dataset) -> None:
    reader = Reader(dataset, "train", 100, lanes=1, shuffle=False, extra_columns=("kept.row_id",))
    assert [row for _, extra in reader.batches(0) for row in extra["kept.row_id"].to_pylist()] == list(range(ROWS))


def test_batches_hold_what_the_files_hold() -> None:
    """Against a row-by-row reading of the same table, with rows taken from the middle of two blocks."""
    table = impressions(50, seed=3)
    columns = decode(table, schema(), labels=True, where="table")
    batch = assemble([Slice(columns, 7, 20), Slice(columns, 31, 33)], schema(), padded_rows=17)
    rows = [table.slice(row, 1).to_pylist()[0] for row in [*range(7, 20), 31, 32]]
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


def _damaged(tmp_path: Path, column: str, array: pa.Array) -> Dataset:
    folder = write_dataset(tmp_path / "data", {"train": 100})
    path = folder / "train" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, array), path)
    return Dataset.open(folder)


def test_an_id_out_of_range_names_file_row_column_and_value(tmp_path: Path) -> None:
    ids = np.zeros(100, np.int32)
    ids[37] = 300
    dataset = _damaged(tmp_path, "user", pa.array(ids))
    with pytest.raises(DataError, match=r"part-00000.parquet, row 37, column user: id 300 is out of range, its table has rows 0 to 299"):
        list(Reader(dataset, "train", 10).batches(0))


def test_a_negative_id_in_a_list_names_its_row(tmp_path: Path) -> None:
    lists = pa.array([[1, 2]] * 41 + [[], [5, -7]] + [[]] * 57, pa.list_(pa.int32()))
    with pytest.raises(DataError, match="row 42, column tags: id -7 is out of range"):
        list(Reader(_damaged(tmp_path, "tags", lists), "train", 10).batches(0))


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

"""Rating matrices: which pairs become impressions, with which features, and what is refused or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from escm2rec.errors import DataError
from escm2rec.preprocess import encode_raw, raw_files
from escm2rec.preprocess.block import RawBlock, Request
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.matrix import MatrixFile
from escm2rec.preprocess.ragged import Ragged
from escm2rec.schema import Feature, Schema
from tests.preprocess_logs import made, read_split, values_of
from tests.rating_world import FEATURES, Ratings, matrix_config, write_ratings

IDS: list[dict[str, Any]] = FEATURES[:2]
TINY = {"train": "0 5 3\n4 0 0\n", "test": "1 2 0\n4 0 4.5\n"}


def write(folder: Path, **files: str) -> Path:
    """A folder with these matrices, TINY unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**TINY, **files}.items():
        (folder / f"{name}.ascii").write_text(text, encoding="utf-8")
    return folder


def config_of(features: list[dict[str, Any]] = IDS, **changes: Any) -> Any:
    """A config that reads no feature file unless told to."""
    source = {"user_features": None, "item_features": None, **changes.pop("source", {})}
    return matrix_config(features=features, source=source, **changes)


def pairs(folder: Path, split: str) -> list[tuple[int, int, int, int]]:
    """User, item, click and conversion of the rows of a split, sorted."""
    return sorted(tuple(row[name] for name in ("kept.user", "kept.item", "click", "conversion")) for row in read_split(folder, split))


def test_every_pair_trains_and_the_random_ratings_test(tmp_path: Path) -> None:
    """User 2 has rated item 1 in both files: that pair is left out of the test, and counted."""
    out, result = made(config_of(), write(tmp_path / "in"), tmp_path / "out")
    assert pairs(out, "train") == [(1, 1, 0, 0), (1, 2, 1, 1), (1, 3, 1, 0), (2, 1, 1, 1), (2, 2, 0, 0), (2, 3, 0, 0)]
    assert pairs(out, "test") == [(1, 1, 1, 0), (2, 3, 1, 1)]
    assert result["rejected"] == {"rated in train and test": 2}
    manifest = json.loads((out / "manifest.json").read_text())
    path = str(tmp_path / "in" / "test.ascii")
    assert manifest["rejected"]["rated in train and test"]["first"] == [
        {"file": path, "row": 1, "column": "", "value": "'2' and '5' in column 2"},
        {"file": path, "row": 2, "column": "", "value": "'4' and '4' in column 1"},
    ]
    assert [Path(entry["path"]).name for entry in manifest["input"]] == ["train.ascii", "test.ascii"]


def test_the_threshold_is_configured(tmp_path: Path) -> None:
    out, _ = made(config_of(source={"conversion_at": 4.5}), write(tmp_path / "in"), tmp_path / "out")
    assert [pair for pair in pairs(out, "train") if pair[3]] == [(1, 2, 1, 1)]
    assert [pair for pair in pairs(out, "test") if pair[3]] == [(2, 3, 1, 1)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda items: st.lists(
            st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=items, max_size=items), min_size=1, max_size=9
        )
    ),
    st.integers(1, 30),
)
def test_blocks_hold_what_a_loop_over_cells_finds(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[tuple[int, int]]], block_rows: int
) -> None:
    both = np.array(cells)
    train, test = both[..., 0], both[..., 1]
    folder = tmp_path_factory.mktemp("cells")
    expected: dict[str, list[tuple[int, ...]]] = {"train": [], "test": []}
    for user, row in enumerate(both.tolist()):
        for item, (rating, random) in enumerate(row):
            expected["train"].append((user + 1, item + 1, int(rating > 0), int(rating >= 4)))
            if random and not rating:
                expected["test"].append((user + 1, item + 1, 1, int(random >= 4)))
    for name, matrix in (("train", train), ("test", test)):
        np.savetxt(folder / f"{name}.ascii", matrix, fmt="%d")
        if not matrix.any():
            with pytest.raises(DataError, match=rf"{name}\.ascii holds no rating: all of its {len(both)} x {both.shape[1]} cells are 0"):
                blocks_of(folder, name, block_rows)
            continue
        blocks = blocks_of(folder, name, block_rows)
        found = [pair for block in blocks for pair in pairs_of(block)]
        assert found == expected[name]
        places = np.concatenate([block.rows for block in blocks])
        assert [(place // both.shape[1] + 1, place % both.shape[1] + 1) for place in places.tolist()] == [pair[:2] for pair in found]
        assert all(len(block) <= max(block_rows, both.shape[1]) for block in blocks)
        np.testing.assert_array_equal(np.concatenate([block.lines for block in blocks]), [pair[0] for pair in found])


def blocks_of(folder: Path, name: str, block_rows: int) -> list[RawBlock]:
    """Blocks of one of the matrices, read with ids and labels."""
    source = config_of().source
    file = RawFile(folder / f"{name}.ascii", train=folder / "train.ascii" if name == "test" else None)
    request = Request(tuple(Feature.of(feature) for feature in config_of().features), ("item",))
    return [task() for task in MatrixFile(file, source, request, block_rows).tasks()]


def pairs_of(block: RawBlock) -> list[tuple[int, ...]]:
    """User, item, click and conversion of the rows of a block."""
    user, item = block.features["user"], block.features["item"]
    assert isinstance(user, Ragged)
    assert isinstance(item, Ragged)
    assert block.extras["item"].to_pylist() == item.values.tolist()
    columns = (user.values, item.values, block.labels["click"], block.labels["conversion"])
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ratings]:
    folder = tmp_path_factory.mktemp("ratings")
    return folder, write_ratings(folder / "in")


def test_feature_files_give_lists_weights_and_numbers(world: tuple[Path, Ratings]) -> None:
    folder, ratings = world
    out, result = made(matrix_config(), folder / "in", folder / "features")
    user_columns, item_columns = values_of(out, "user_profile"), values_of(out, "item_profile")
    price = ratings.item_features[:, 2]
    rows = read_split(out, "train")
    assert len(rows) == ratings.train.size == result["splits"]["train"]["rows"]
    for row in rows:
        user, item = ratings.user_features[row["kept.user"] - 1], ratings.item_features[row["kept.item"] - 1]
        assert [user_columns[value] for value in row["user_profile"]] == (np.flatnonzero(user) + 1).tolist()
        assert [item_columns[value] for value in row["item_profile"]] == (np.flatnonzero(item) + 1).tolist()
        assert row["item_profile.weight"] == item[item > 0].tolist()
        assert row["item_price"] == pytest.approx((item[2] - price.mean()) / price.std(), abs=1e-5)
    assert result["splits"]["train"]["clicks"] == np.count_nonzero(ratings.train)
    assert result["splits"]["test"]["rows"] == np.count_nonzero((ratings.test > 0) & (ratings.train == 0))
    assert result["rejected"] == {"rated in train and test": np.count_nonzero((ratings.test > 0) & (ratings.train > 0))}


def test_single_columns_can_be_ids_and_be_kept(tmp_path: Path) -> None:
    features = [*IDS, {"name": "age", "kind": "categorical", "column": "user_feature_2"}]
    source = {"user_features": "more/users.txt"}
    folder = write(tmp_path / "in")
    (folder / "more").mkdir()
    (folder / "more" / "users.txt").write_text("\ufeff0.5\t30 \r\n1 41\n")
    config = config_of(features, source=source, keep=["user", "user_feature_1", "user_feature_2"])
    out, _ = made(config, folder, tmp_path / "out")
    ages = values_of(out, "age")
    kept = [(row["kept.user"], row["kept.user_feature_1"], row["kept.user_feature_2"], ages[row["age"]]) for row in read_split(out)]
    assert sorted(kept) == [(1, 0.5, 30, 30)] * 3 + [(2, 1.0, 41, 41)] * 3


def test_a_share_of_the_training_pairs_validates(world: tuple[Path, Ratings]) -> None:
    """By a hash of the cell: the same pairs whatever the block and the features, and none of the test."""
    folder, ratings = world
    out, result = made(config_of(split={"validation_share": 0.2}), folder / "in", folder / "shared")
    _, whole = made(config_of(), folder / "in", folder / "whole")
    counts = result["splits"]
    assert counts["train"]["rows"] + counts["validation"]["rows"] == ratings.train.size
    assert counts["validation"]["rows"] / ratings.train.size == pytest.approx(0.2, abs=0.03)
    assert counts["test"] == whole["splits"]["test"]
    held, trained = {pair[:2] for pair in pairs(out, "validation")}, {pair[:2] for pair in pairs(out, "train")}
    assert not held & trained
    again, _ = made(matrix_config(split={"validation_share": 0.2}, rows_per_group=64), folder / "in", folder / "again")
    assert {pair[:2] for pair in pairs(again, "validation")} == held


def test_bad_cells_are_refused_or_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", train="0 5 x\n-4 nan 3\n", test="0 0 2\n3 0 0\n")
    with pytest.raises(DataError, match=r"train\.ascii: row 1: rating: expected a number from 0, .* found 'x' in column 3") as caught:
        made(config_of(), folder, tmp_path / "out")
    assert caught.value.hint == "mend the input, or set data.bad_rows to count to leave such rows out"
    out, result = made(config_of(bad_rows="count"), folder, tmp_path / "out")
    assert result["rejected"] == {"rating": 3, "rated in train and test": 2}, "what is no number may have been a rating"
    assert pairs(out, "train") == [(1, 1, 0, 0), (1, 2, 1, 1), (2, 3, 1, 0)]


FILES: dict[str, tuple[dict[str, str], str, str]] = {
    "a short row": ({"train": "0 5 3\n4 0\n"}, r"train\.ascii: row 2 has 2 columns, row 1 has 3", "a row of numbers, separated by spaces"),
    "an empty row": ({"train": "0 5 3\n\n"}, r"train\.ascii: row 2 has 0 columns, row 1 has 3", "mend the row"),
    "commas": ({"train": "0,5\n4,0\n", "test": "1\n1\n"}, r"row 1: rating: .* found '0,5' in column 1", "mend the input"),
    "other rows": ({"test": "1 0 0\n"}, r"test\.ascii has 1 rows of 3 columns, .*train\.ascii has 2 rows of 3", "one order"),
    "other columns": ({"test": "1 0\n0 0\n"}, r"test\.ascii has 2 rows of 2 columns, .*train\.ascii has 2 rows of 3", "one order"),
    "no rating": ({"train": "0 0 0\n0 0.0 0\n"}, r"train\.ascii holds no rating: all of its 2 x 3 cells are 0", "is it the right file"),
    "no test rating": ({"test": "0 0 0\n0 0 0\n"}, r"test\.ascii holds no rating: all of its 2 x 3 cells are 0", "is it the right file"),
    "nothing": ({"train": ""}, r"train\.ascii is empty, or begins with an empty line", "a row of numbers a user"),
    "a negative rating": ({"train": "0 -1 3\n4 0 0\n"}, r"row 1: rating: .* found '-1' in column 2", "mend the input"),
    "an infinite rating": ({"test": "0 0 0\n0 0 inf\n"}, r"test\.ascii: row 2: rating: .* found 'inf' in column 3", "mend the input"),
    "too few users": ({"users": "1 2\n"}, r"users\.ascii has 1 rows, the rating matrix has 2 users", "one row for each user"),
    "too many items": ({"items": "1\n2\n3\n4\n"}, r"items\.ascii has 4 rows, the rating matrix has 3 items", "one row for each item"),
    "a ragged feature row": ({"users": "1 2\n1\n"}, r"users\.ascii: row 2 has 1 columns, row 1 has 2", "mend the row"),
    "a feature that is no number": (
        {"items": "1\n2\nred\n"},
        r"items\.ascii: row 3, column 1: expected a number that fits float32, found 'red'",
        "mend the file",
    ),
    "an empty feature row": ({"items": "\n2\n3\n"}, r"items\.ascii: row 1, column 1: expected a number .* found ''", "mend the file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_told_with_its_place(tmp_path: Path, case: str) -> None:
    files, message, hint = FILES[case]
    source = {f"{name[:-1]}_features": f"{name}.ascii" for name in files if name in ("users", "items")}
    with pytest.raises(DataError, match=message) as caught:
        made(config_of(source=source), write(tmp_path / "in", **files), tmp_path / "out")
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    (folder / "train.ascii").write_bytes(b"PK\xff\x00 1 2\n3 4 5\n")
    with pytest.raises(DataError, match=r"train\.ascii: row 1: rating: .* found 'PK.*' in column 1"):
        made(config_of(), folder, tmp_path / "out")


FEATURE_FILE: dict[str, Any] = {"source": {"user_features": "users.ascii"}}
COLUMNS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no column": ({"column": "usr"}, "the rating matrices have no column 'usr'", "did you mean 'user'?"),
    "nothing like it": ({"column": "zzz"}, "the rating matrices have no column 'zzz'", "they have: user, user_features, user_feature_1"),
    "no file": ({"column": "item_feature_1"}, "no file holds column 'item_feature_1'", "set data.source.item_features"),
    "beyond the file": ({"column": "user_feature_9"}, "no column 'user_feature_9'", "did you mean 'user_feature_"),
    "an id as a number": (
        {"column": "user", "kind": "numeric"},
        "feature 'x' of kind numeric cannot be read from column 'user'",
        "that column takes kind categorical",
    ),
    "a row as an id": ({"column": "user_features"}, "of kind categorical cannot be read", "that column takes kind list or weighted_list"),
    "a number as a list": ({"column": "user_feature_1", "kind": "list"}, "of kind list cannot", "takes kind numeric or categorical"),
    "a fraction as an id": (
        {"column": "user_feature_2"},
        r"users\.ascii: row 2, column 2: expected a whole number, for kind categorical, found 0.5",
        "or the feature 'x'",
    ),
    "a logarithm of -1": (
        {"column": "user_feature_1", "kind": "numeric", "log1p": True},
        r"users\.ascii: row 1, column 1: expected a number above -1, for log1p, found -1",
        "mend the file",
    ),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_that_is_not_there_or_does_not_fit_is_told(tmp_path: Path, case: str) -> None:
    feature, message, hint = COLUMNS[case]
    folder = write(tmp_path / "in", users="-1 2\n3 0.5\n")
    features = [*IDS, {"name": "x", "kind": "categorical", **feature}]
    with pytest.raises(DataError, match=message) as caught:
        made(config_of(features, **FEATURE_FILE), folder, tmp_path / "out")
    assert hint in caught.value.hint


def test_what_cannot_be_kept_or_found_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", users="1 2\n3 4\n")
    with pytest.raises(DataError, match="column 'user_features' holds a whole row, it cannot be kept"):
        made(config_of(keep=["user", "user_features"], **FEATURE_FILE), folder, tmp_path / "out")
    with pytest.raises(DataError, match=r"no file .*absent\.txt") as caught:
        made(config_of(source={"item_features": "absent.txt"}), folder, tmp_path / "out")
    assert caught.value.hint == "set data.source.item_features, or fetch the file"
    with pytest.raises(DataError, match=r"is no folder: rating matrices are read from one, which holds train\.ascii"):
        made(config_of(), folder / "train.ascii", tmp_path / "out")


@pytest.mark.parametrize("block_rows", [1, 120, 100_000])
def test_scoring_encodes_every_pair_and_reads_no_rating(world: tuple[Path, Ratings], tmp_path: Path, block_rows: int) -> None:
    folder, ratings = world
    out = folder / "encoded"
    if not out.exists():
        made(matrix_config(), folder / "in", out)
    schema = Schema.load(out / "schema.json")
    candidates = write_ratings(tmp_path / "candidates")
    (tmp_path / "candidates" / "train.ascii").write_text(("x " * ratings.train.shape[1] + "\n") * ratings.train.shape[0])
    (tmp_path / "candidates" / "test.ascii").unlink()
    assert (candidates.item_features == ratings.item_features).all()
    files = raw_files(schema.source, tmp_path / "candidates", labels=False)
    blocks = list(encode_raw(schema, out / "vocabulary", files, ["user", "item"], block_rows))
    found = pl.concat([pl.DataFrame(pl.from_arrow(block.table)) for block in blocks])
    train = pl.concat([pl.read_parquet(file) for file in sorted((out / "train").iterdir())])
    assert all(block.table.num_rows <= block_rows for block in blocks)
    order = ["kept.user", "kept.item"]
    assert found.equals(train.select(found.columns).sort(order))

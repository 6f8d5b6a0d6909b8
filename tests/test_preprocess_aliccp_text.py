from collections import defaultdict
from pathlib import Path

import pytest

from escm2rec.errors import DataError
from escm2rec.preprocess.aliccp_text import FieldCodes, Lines, Needs, text_blocks
from tests.preprocess_logs import common_line, key, shared_data, skeleton_line

Parsed = dict[str, list[tuple[int, float]]]


def parsed_plainly(line: str, header: int) -> Parsed:
    """The features of a line by field, read with str.split."""
    fields: Parsed = defaultdict(list)
    for feature in filter(None, line.rstrip("\n").split(",", header)[header].split("\x01")):
        field, rest = feature.split("\x02")
        identifier, value = rest.split("\x03")
        fields[field].append((int(identifier), float(value)))
    return dict(fields)


def parsed(path: Path, header: int, fields: list[str], block_bytes: int = 1 << 20) -> list[Parsed]:
    """The same by the parser."""
    rows: list[Parsed] = []
    codes = FieldCodes(fields)
    for block in text_blocks(path, block_bytes):
        lines = Lines(block, header)
        assert not lines.bad.found
        assert block.first_line == len(rows)
        columns = lines.fields(codes, dict.fromkeys(fields, Needs(ids=True, values=True)))
        for row in range(lines.count):
            held = {}
            for field, column in columns.items():
                at = slice(column.offsets[row], column.offsets[row + 1])
                assert column.weights is not None
                if column.offsets[row + 1] > column.offsets[row]:
                    held[field] = list(zip(column.values[at].tolist(), column.weights[at].tolist(), strict=True))
            rows.append(held)
    return rows


REAL = [
    ("common_features_train.head3.csv", 2, [343, 811, 7]),
    ("derived_10rows/common_features.csv", 2, [867]),
    ("derived_10rows/sample_skeleton.csv", 5, [9, 10, 20, 13, 9, 21, 13, 11, 9, 10]),
    ("sample_skeleton_train.head1.csv", 5, [9]),
]


@pytest.mark.parametrize(("name", "header", "counts"), REAL)
@pytest.mark.parametrize("block_bytes", [1 << 20, 700])
def test_real_lines_are_parsed_to_exactly_what_they_hold(name: str, header: int, counts: list[int], block_bytes: int) -> None:
    path = shared_data() / "aliccp_raw" / name
    expected = [parsed_plainly(line, header) for line in path.read_text().splitlines()]
    found = parsed(path, header, sorted({field for row in expected for field in row}), block_bytes)
    assert found == expected
    assert [sum(len(values) for values in row.values()) for row in found] == counts


def test_repeats_that_are_not_adjacent_keep_their_order_and_values(tmp_path: Path) -> None:
    path = tmp_path / "common.csv"
    path.write_text(common_line(key(1), [("a", 3, 0.5), ("b", 1, 1.0), ("a", 2, 0.25), ("other", 1, 1.0), ("a", 3, 0.125)]))
    assert parsed(path, 2, ["a", "b"]) == [{"a": [(3, 0.5), (2, 0.25), (3, 0.125)], "b": [(1, 1.0)]}]


def test_blocks_cut_at_newlines_and_grow_for_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "skeleton.csv"
    path.write_text("".join(skeleton_line(n, 0, 0, key(n), [("a", n, 1.0)] * (n % 7)) for n in range(200)))
    assert parsed(path, 5, ["a"], 16) == parsed(path, 5, ["a"]) == [{"a": [(n, 1.0)] * (n % 7)} if n % 7 else {} for n in range(200)]


def test_many_fields_are_told_apart(tmp_path: Path) -> None:
    fields = [f"f{number}" for number in range(240)]
    path = tmp_path / "common.csv"
    path.write_text(common_line(key(1), [(field, number, 1.0) for number, field in enumerate([*fields, "f24", "f", "f2400000000"])]))
    (row,) = parsed(path, 2, fields)
    assert row == {**{f"f{number}": [(number, 1.0)] for number in range(240)}, "f24": [(24, 1.0), (240, 1.0)]}


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.touch()
    with pytest.raises(DataError, match=r"empty\.csv is empty \(0 bytes\)"):
        list(text_blocks(path, 100))


def problems(tmp_path: Path, text: str) -> list[tuple[str, list[int], str]]:
    path = tmp_path / "skeleton.csv"
    path.write_text(text)
    found = []
    for block in text_blocks(path, 1 << 20):
        lines = Lines(block, 5)
        lines.fields(FieldCodes(["a"]), {"a": Needs(ids=True, values=True)})
        found += [(each.reason.name, each.lines, each.seen[0]) for each in lines.bad.found]
    return found


GOOD = skeleton_line(1, 0, 0, key(1), [("a", 1, 1.0)])


@pytest.mark.parametrize(
    ("line", "reason", "seen"),
    [
        ("no,commas\n", "malformed line", "no,commas"),
        ("\n", "malformed line", "''"),
        (GOOD.replace("\x02", "\x03"), "malformed line", "a"),
        (GOOD.replace("\x02", "").replace("\x03", ""), "malformed line", "a1"),
        (GOOD.replace("\x03", "\x01"), "malformed line", "a"),
        (skeleton_line(1, 0, 0, key(1), [("a", 1, 1.0)], num=2), "feature_num", "2 before a list of 1"),
        (skeleton_line(1, 0, 0, key(1), [("a", 1, 1.0)], num=""), "feature_num", " before a list of 1"),
        (skeleton_line(1, 0, 0, key(1), [], num=1), "feature_num", "1 before a list of 0"),
        (skeleton_line(1, 0, 0, key(1), [("a", "9223372036854775808", 1.0)]), "id", "'9223372036854775808'"),
        (skeleton_line(1, 0, 0, key(1), [("b", 1, 1.0), ("a", 1, 1), ("a", "-5", 1.0)]), "id", "'-5'"),
        (skeleton_line(1, 0, 0, key(1), [("a", 1, "nan")]), "number", "'nan'"),
        (skeleton_line(1, 0, 0, key(1), [("a", 1, "")]), "number", "''"),
    ],
)
def test_bad_lines_are_found_between_good_ones(tmp_path: Path, line: str, reason: str, seen: str) -> None:
    ((found, lines, text),) = problems(tmp_path, GOOD + line + GOOD)
    assert (found, lines) == (reason, [2])
    assert seen in text


def test_a_cut_last_line_is_found_even_where_its_features_are_whole(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD + GOOD[:-1])[0][:2] == ("truncated line", [2])
    assert problems(tmp_path, GOOD + GOOD[:-5])[0][:2] == ("truncated line", [2])

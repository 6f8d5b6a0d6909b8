import numpy as np
import pyarrow as pa

from escm2rec.preprocess.stable_hash import cross_hash, fnv1a64, hash64, row_hash, split_points, splitmix64

KNOWN_CROSSES = [
    13423955206379915340,
    158139556965974356,
    13423955206379915340,
]  # Of (12, "a"), (-3, "") and (12, "a"): on disk in vocabularies, so for ever


def test_fnv1a64_matches_the_published_vectors() -> None:
    # http://www.isthe.com/chongo/src/fnv/test_fnv.c
    known = {"": 0xCBF29CE484222325, "a": 0xAF63DC4C8601EC8C, "foobar": 0x85944171F73967E8}
    assert fnv1a64(pa.array(list(known))).tolist() == list(known.values())


def test_fnv1a64_reads_utf8_and_slices() -> None:
    words = pa.array(["x", "ü", "foobar", "a"])
    assert fnv1a64(words.slice(2)).tolist() == [0x85944171F73967E8, 0xAF63DC4C8601EC8C]
    expected = 0xCBF29CE484222325
    for byte in "ü".encode():
        expected = (expected ^ byte) * 0x100000001B3 % 2**64
    assert fnv1a64(words)[1] == expected


def test_splitmix64_matches_the_reference_generator() -> None:
    # First outputs of splitmix64.c for the seeds 0 and 1; a negative seed is its two's complement.
    assert splitmix64(np.array([0, 1])).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    assert splitmix64(np.array([-1])) == splitmix64(np.array([2**64 - 1], dtype=np.uint64))


def test_hashes_are_the_same_for_ever() -> None:
    assert hash64(pa.array(["a"]))[0] == splitmix64(np.array([0xAF63DC4C8601EC8C], dtype=np.uint64))[0]
    assert row_hash("a", np.array([0, 3])).tolist() == splitmix64(np.array([0xAF63DC4C8601EC8C, 0xAF63DC4C8601EC8F], np.uint64)).tolist()


def test_a_cross_hashes_the_texts_of_its_values_in_order() -> None:
    def one(value: object) -> int:
        return int(hash64(pa.array([str(value)]))[0])

    columns = [pa.array([12, -3, 12]), pa.array(["a", "", "a"]), pa.array([2, 12, 12], pa.uint8())]
    expected = []
    for values in zip(*(column.to_pylist() for column in columns), strict=True):
        whole = np.zeros(1, np.uint64)
        for value in values:
            whole = splitmix64(whole ^ np.uint64(one(value)))
        expected.append(int(whole[0]))
    assert cross_hash(columns).tolist() == expected
    assert cross_hash([columns[0].cast(pa.string()), *columns[1:]]).tolist() == expected
    assert cross_hash(columns[:2]).tolist() == KNOWN_CROSSES
    assert cross_hash([columns[1], columns[0]]).tolist()[0] != KNOWN_CROSSES[0], "the order counts"


def test_split_points_are_uniform_and_depend_on_the_salt() -> None:
    base = splitmix64(np.arange(20_000))
    points, others = split_points(base, "one"), split_points(base, "two")
    assert 0 <= points.min() < points.max() < 1
    assert abs(np.corrcoef(points, others)[0, 1]) < 0.03
    assert abs((points < 0.3).mean() - 0.3) < 0.02

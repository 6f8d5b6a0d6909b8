"""Impressions as Ali-CCP's raw text, byte for byte in its format: skeleton, common features, and the truth beside them.

    skeleton  sample_id,click,buy,common_feature_index,feature_num,feature_list
    common    common_feature_index,feature_num,feature_list

Features are joined by \\x01, each `field \\x02 feature_id \\x03 value`, in no particular order.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from escm2rec.simulate.log import Impressions
from escm2rec.simulate.population import CROSSES, PROFILE_SIZES, Ints
from escm2rec.simulate.world import World

COMMON_RECORDS = 10_000  # held as text at a time
LABELS = pa.array(["0,0", "1,0", "1,1"])  # by click + conversion
TRUTH = pa.schema([("sample_id", pa.int64()), ("true_propensity", pa.float64()), ("true_cvr", pa.float64())])


def log_counts(largest: int) -> list[float]:
    """log(1 + count) to 5 decimals, as the logs hold it, for every count up to the largest."""
    return [round(float(value), 5) for value in np.log1p(np.arange(largest + 1))]


class AliccpWriter:
    """Writes shards of a world's log."""

    def __init__(self, world: World) -> None:
        self._world = world
        histories = world.users.histories.values()
        largest = max((int(history.counts.max(initial=0)) for history in histories), default=0)
        self._values = pa.array([repr(value) for value in log_counts(largest)])
        counted = (*CROSSES, *world.users.histories)
        self._tokens = {field: self._field_tokens(field, "" if field in counted else "1.0") for field in world.fields.sizes}
        self._index = pa.array([f"{key:016x}" for key in _mix(np.arange(world.fields.sizes["101"]), world.seed).tolist()])
        self._item_text, self._item_num = self._items()

    def write(self, folder: Path, number: int, slices: Iterable[Impressions]) -> dict[str, int]:
        """Write one shard and return its files with their rows."""
        skeleton, common, truth = f"sample_skeleton_{number:05d}.csv", f"common_features_{number:05d}.csv", f"truth_{number:05d}.parquet"
        users, rows = [], 0
        with (folder / skeleton).open("wb") as text, pq.ParquetWriter(folder / truth, TRUTH) as columns:
            for part in slices:
                text.write(_lines(self._skeleton(part)))
                columns.write_table(pa.table([part.sample_id, part.propensity, part.cvr], schema=TRUTH))
                users.append(np.unique(part.rows.user))
                rows += len(part.sample_id)
        needed = np.unique(np.concatenate(users))
        with (folder / common).open("wb") as text:
            for low in range(0, len(needed), COMMON_RECORDS):
                text.write(_lines(self._common(needed[low : low + COMMON_RECORDS])))
        return {skeleton: rows, common: len(needed), truth: rows}

    def _skeleton(self, part: Impressions) -> Any:
        """The lines of impressions."""
        rows, items = part.rows, self._world.items
        scene = self._tokens["301"].take(pa.array(rows.scene))
        values = {"508": items.category[rows.item], "509": items.shop[rows.item], "702": items.brand[rows.item]}
        crosses = [self._counted(field, value, rows.counts[field]) for field, value in values.items()]
        intentions = self._counted("853", rows.intentions, rows.intention_counts)
        held = np.diff(rows.intention_offsets)
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(rows.intention_offsets, pa.int32()), intentions), "\x01")
        joined = pc.if_else(pa.array(held > 0), joined, None)
        features = pc.binary_join_element_wise(
            *crosses, self._item_text.take(pa.array(rows.item)), joined, scene, "\x01", null_handling="skip"
        )
        num = self._item_num[rows.item] + 1 + held + sum((rows.counts[field] > 0).astype(np.int64) for field in values)
        labels = LABELS.take(pa.array(part.click.astype(np.int64) + part.conversion))
        index = self._index.take(pa.array(rows.user))
        return pc.binary_join_element_wise(_text(part.sample_id), labels, index, _text(num), features, ",")

    def _common(self, users: Ints) -> Any:
        """The lines of users' common records."""
        source = self._world.users
        owners, tokens = [np.arange(len(users))], [self._tokens["101"].take(pa.array(users))]
        for field in PROFILE_SIZES:
            value = source.profile[field][users]
            known = np.flatnonzero(value >= 0)
            owners.append(known)
            tokens.append(self._tokens[field].take(pa.array(value[known])))
        for field, history in source.histories.items():
            offsets, places = history.take(users)
            owners.append(np.repeat(np.arange(len(users)), np.diff(offsets)))
            tokens.append(self._counted(field, history.values[places], history.counts[places]))
        owner = np.concatenate(owners)
        features, num = _join(owner, pa.concat_arrays(tokens), users[owner], len(users))
        return pc.binary_join_element_wise(self._index.take(pa.array(users)), _text(num), features, ",")

    def _items(self) -> tuple[Any, Ints]:
        """For each item, the features that it brings to every impression, and how many."""
        items = self._world.items
        count = len(items.category)
        values = {"205": np.arange(count), "206": items.category, "207": items.shop, "216": items.brand}
        owners = [np.flatnonzero(value >= 0) for value in values.values()]
        tokens = [self._tokens[f].take(pa.array(v[o])) for (f, v), o in zip(values.items(), owners, strict=True)]
        owners.append(np.repeat(np.arange(count), np.diff(items.intentions.offsets)))
        tokens.append(self._tokens["210"].take(pa.array(items.intentions.values)))
        owner = np.concatenate(owners)
        return _join(owner, pa.concat_arrays(tokens), owner, count)

    def _counted(self, field: str, value: Ints, count: Ints) -> Any:
        """Tokens with a log-count; null where the count is 0."""
        absent = count == 0
        prefix = self._tokens[field].take(pa.array(value, mask=absent))
        return pc.binary_join_element_wise(prefix, self._values.take(pa.array(count)), "")

    def _field_tokens(self, field: str, value: str) -> Any:
        """`field \\x02 feature_id \\x03 value` for every value of a field."""
        fields = self._world.fields
        ids = _text(fields.ids(field, np.arange(fields.sizes[field])))
        return pc.binary_join_element_wise(f"{field}\x02", ids, f"\x03{value}", "")


def _join(owner: Ints, tokens: Any, salt: Ints, count: int) -> tuple[Any, Ints]:
    """Join the tokens of each of `count` owners in an order that is arbitrary and fixed (a hash of salt and place)."""
    place = np.argsort(np.argsort(owner, kind="stable"), kind="stable")  # of a token among those of all owners
    num = np.bincount(owner, minlength=count)
    place -= (np.cumsum(num) - num)[owner]
    order = np.argsort((owner.astype(np.uint64) << np.uint64(32)) | (_mix(salt * 4096 + place, 1) >> np.uint64(32)), kind="stable")
    offsets = np.concatenate([[0], np.cumsum(num)])
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), tokens.take(pa.array(order))), "\x01"), num


def _mix(values: Ints, seed: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al., OOPSLA 2014): another 64-bit number for every number."""
    z = values.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _text(numbers: Ints) -> Any:
    return pa.array(numbers).cast(pa.string())


def _lines(lines: Any) -> Any:
    """All lines as bytes, each ended by a newline."""
    ended = pc.binary_join_element_wise(lines, "", "\n")
    whole = pa.ListArray.from_arrays(pa.array([0, len(ended)], pa.int32()), ended)
    return pc.binary_join(whole, "")[0].as_buffer()

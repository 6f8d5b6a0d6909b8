"""Impressions as Parquet tables, one row an impression, one column a field.

    sample_id, click, conversion, true_propensity, true_cvr
    user_id, profile_121 ... profile_129, scene                      int64, profile null where missing
    item_id, category, shop, brand, intentions                       int64, brand null where missing, intentions a list
    history_categories, _shops, _brands, _intentions                 lists, beside each `<name>_weight` with its log(1 + count)
    user_category_count, user_shop_count, user_brand_count,          how often the user's history holds the item's category, shop,
    user_intention_count                                             brand, or any of its intentions; null for never

Ids are those of the Ali-CCP text, and so are the log-counts of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.simulate.aliccp import log_counts
from escm2rec.simulate.log import Impressions
from escm2rec.simulate.population import PROFILE_SIZES, Ints
from escm2rec.simulate.world import World

HISTORIES = {"109_14": "history_categories", "110_14": "history_shops", "127_14": "history_brands", "150_14": "history_intentions"}
CROSSES = {"508": "user_category_count", "509": "user_shop_count", "702": "user_brand_count", "853": "user_intention_count"}


def _schema() -> Any:
    numbers, weights = pa.list_(pa.int64()), pa.list_(pa.float32())
    columns = [("sample_id", pa.int64()), ("click", pa.int8()), ("conversion", pa.int8())]
    columns += [("true_propensity", pa.float64()), ("true_cvr", pa.float64()), ("user_id", pa.int64())]
    columns += [(f"profile_{field}", pa.int64()) for field in PROFILE_SIZES]
    for name in HISTORIES.values():
        columns += [(name, numbers), (f"{name}_weight", weights)]
    columns += [(name, pa.int64()) for name in ("item_id", "category", "shop", "brand")]
    columns += [("intentions", numbers), ("scene", pa.int64())]
    return pa.schema(columns + [(name, pa.float32()) for name in CROSSES.values()])


SCHEMA = _schema()


class TableWriter:
    """Writes shards of a world's log."""

    def __init__(self, world: World) -> None:
        self._world = world
        largest = max(int(history.counts.max(initial=0)) for history in world.users.histories.values())
        self._log_counts = np.array(log_counts(largest), np.float32)

    def write(self, folder: Path, number: int, slices: Iterable[Impressions]) -> dict[str, int]:
        """Write one shard and return its file with its rows."""
        name, rows = f"part-{number:05d}.parquet", 0
        with pq.ParquetWriter(folder / name, SCHEMA, compression="zstd") as file:
            for part in slices:
                file.write_table(pa.table(self._columns(part), schema=SCHEMA))
                rows += len(part.sample_id)
        return {name: rows}

    def _columns(self, part: Impressions) -> dict[str, Any]:
        """One Arrow array a column."""
        rows, items, users, fields = part.rows, self._world.items, self._world.users, self._world.fields
        columns = {"sample_id": part.sample_id, "click": part.click.astype(np.int8), "conversion": part.conversion.astype(np.int8)}
        columns |= {"true_propensity": part.propensity, "true_cvr": part.cvr, "user_id": fields.ids("101", rows.user)}
        columns |= {f"profile_{field}": _nullable(fields.ids(field, users.profile[field][rows.user])) for field in PROFILE_SIZES}
        for field, name in HISTORIES.items():
            history = users.histories[field]
            offsets, places = history.take(rows.user)
            columns[name] = _lists(offsets, fields.ids(field, history.values[places]))
            columns[f"{name}_weight"] = _lists(offsets, self._log_counts[history.counts[places]])
        values = {"item_id": ("205", rows.item), "category": ("206", items.category[rows.item]), "shop": ("207", items.shop[rows.item])}
        values |= {"brand": ("216", items.brand[rows.item]), "scene": ("301", rows.scene)}
        columns |= {name: _nullable(fields.ids(field, value)) for name, (field, value) in values.items()}
        offsets, places = items.intentions.take(rows.item)
        columns["intentions"] = _lists(offsets, fields.ids("210", items.intentions.values[places]))
        for field, name in CROSSES.items():
            columns[name] = pa.array(rows.counts[field].astype(np.float32), mask=rows.counts[field] == 0)
        return columns


def _nullable(ids: Ints) -> Any:
    return pa.array(ids, mask=ids < 0)


def _lists(offsets: Ints, values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))

"""Sets of embedding tables to plan: one that is public, and random ones of the same nature, of any size.

Public is MLPerf's DLRM-DCNv2: rows and ids an impression of the 26 features of Criteo 1TB, made multi-hot
(https://github.com/facebookresearch/dlrm, `--num_embeddings_per_feature`, `--multi_hot_sizes`). A few of its tables have millions of times
the rows of others, and one feature a third of all lookups. Meta's published lookups of one model have 856 tables
(https://github.com/facebookresearch/dlrm_datasets, `fbgemm_t856_bs65536`), so the random ones come in hundreds too, rows and ids drawn
from power laws.
"""

from __future__ import annotations

import numpy as np

from escm2rec.planning.tables import Table

CRITEO_ROWS = (
    *(40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10),
    *(2_209, 11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
)
CRITEO_IDS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
DIMENSIONS = (16, 32, 64, 96, 128, 192, 256)
HARDWARE = ("a100-40gb", "h100-80gb", "t4-16gb", "b200-180gb", "cpu-epyc-7763")
CLUSTERS = ((1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (2, 1), (2, 2), (2, 8), (4, 2), (3, 5))  # nodes, and ranks of each


def criteo_multi_hot(dimension: int = 128) -> list[Table]:
    """The 26 tables of DLRM-DCNv2, 104 GiB at dimension 128."""
    return [
        Table(name=f"cat_{number}", rows=rows, dimension=dimension, pooling_factor=ids)
        for number, (rows, ids) in enumerate(zip(CRITEO_ROWS, CRITEO_IDS, strict=True))
    ]


def power_law(tables: int, seed: int, least_rows: int = 30_000, dimensions: tuple[int, ...] = DIMENSIONS) -> list[Table]:
    """Tables whose rows and ids an impression have Pareto tails of index 0.5 and 1.2, cut at 500 M rows and 200 ids."""
    draw = np.random.default_rng([seed, tables])
    rows = np.clip(least_rows * (1 - draw.random(tables)) ** -2.0, least_rows, 500_000_000).astype(np.int64)
    ids = np.clip((1 - draw.random(tables)) ** (-1 / 1.2), 1, 200).round(2)
    dims = draw.choice(dimensions, tables)
    return [
        Table(name=f"table_{number}", rows=int(row), dimension=int(dim), pooling_factor=float(factor))
        for number, (row, factor, dim) in enumerate(zip(rows, ids, dims, strict=True))
    ]


def random_case(seed: int) -> tuple[list[Table], str, int]:
    """Few tables of any size, a cluster of any of HARDWARE that has half to thrice the memory that they take, and a batch a rank."""
    draw = np.random.default_rng([seed, 0])
    largest = draw.choice([5.0, 8.0, 8.5])
    tables = [
        Table(
            name=f"table_{number}",
            rows=int(10 ** draw.uniform(0, largest)) + 1,
            dimension=int(draw.choice([4, 16, 32, 64, 128, 256, 512, 1024])),
            pooling_factor=round(10 ** draw.uniform(-1, 2), 2),
            features=int(draw.choice([1, 1, 1, 2, 5, 20])),
            weighted=bool(draw.random() < 0.3),
            dtype=draw.choice(["fp32", "fp32", "fp16"]),
        )
        for number in range(draw.choice([1, 2, 3, 4, 5, 6, 8, 10, 12]))
    ]
    nodes, ranks = CLUSTERS[draw.integers(len(CLUSTERS))]
    hardware = draw.choice(HARDWARE)
    gib = sum(table.weight_bytes for table in tables) / 2**30 / (nodes * ranks) * draw.choice([0.5, 0.9, 1.1, 1.3, 2, 3]) / 0.85 + 0.05
    host = f"host_memory_gib={ranks * gib * draw.choice([1, 1, 4]) + 0.1:.3f}"
    memory = host if hardware.startswith("cpu") else f"memory_gib={gib:.3f},{host}"
    return tables, f"{nodes}x{ranks}:{hardware},{memory}", int(draw.choice([64, 4_096, 16_384]))

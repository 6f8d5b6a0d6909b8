"""The plain loops over rows that preprocess is timed against make the same data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import rowwise
from escm2rec.config import SimulationConfig, load_config
from escm2rec.preprocess import preprocess
from escm2rec.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]


def test_a_loop_over_rows_makes_the_same_parts(tmp_path: Path) -> None:
    simulate(tmp_path / "logs", 3_000, 3, SimulationConfig(users=100, items=200))
    config = load_config(ROOT / "data" / "aliccp.yaml", ["data.split={by: file, train: '*'}", "data.rows_per_file=1000"]).data
    preprocess(config, tmp_path / "logs", tmp_path / "out")
    rows = rowwise.run(config, tmp_path / "logs", tmp_path / "rowwise")
    parts = sorted((tmp_path / "out" / "train").iterdir())
    assert len(parts) == -(-rows // 1_000) > 1
    for part in parts:
        ours, theirs = pq.read_table(part), pq.read_table(tmp_path / "rowwise" / part.name)
        assert set(ours.column_names) == set(theirs.column_names)
        for name in ours.column_names:
            if ours[name].type == pa.float32():
                np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), atol=1e-5)
            else:
                assert ours[name].to_pylist() == theirs[name].to_pylist(), name

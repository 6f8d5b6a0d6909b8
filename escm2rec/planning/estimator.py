"""TorchRec's estimate of a shard, but for what was measured otherwise."""

from __future__ import annotations

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.estimator.annotations import bwd_comms
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimator
from torchrec.distributed.planner.estimator.types import HardwarePerfConfig, ShardPerfContext
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import CollectiveType, ParameterConstraints, ShardEstimator

from escm2rec.planning.hardware import Hardware


def estimators_of(hardware: Hardware, topology: Topology, constraints: dict[str, ParameterConstraints]) -> list[ShardEstimator]:
    """Of time and of bytes, as an enumerator of TorchRec takes them: its own two, with `WholeTables` where the hardware was measured so."""
    rate = hardware.whole_tables_gb_per_s
    config = TorchRecs() if rate is None else WholeTables(rate * 1e6)
    return [
        EmbeddingPerfEstimator(topology=topology, constraints=constraints, config=config),
        EmbeddingStorageEstimator(topology=topology, constraints=constraints),
    ]


class TorchRecs(HardwarePerfConfig):
    """TorchRec's own. For each price it looks through all names of this for methods that are annotated: half of the time, and there are
    none."""

    def __dir__(self) -> list[str]:
        return []


class WholeTables(TorchRecs):
    """What a table that every rank holds whole costs by its size: TorchRec's all-reduce; cleared and stepped at a measured rate.

    TorchRec's are nine passes at half the rate of lookups; on cores, whose memory is read in order several times as fast as at random, that
    is several times what is measured (`benchmarks/plans.py`).
    """

    def __init__(self, bytes_per_ms: float) -> None:
        self._bytes_per_ms = bytes_per_ms

    def __dir__(self) -> list[str]:
        return ["by_size"]

    @bwd_comms(sharding_type="data_parallel")  # type: ignore[untyped-decorator]
    def by_size(self, table: ShardPerfContext) -> float:
        """Ms of one step of all of its rows."""
        size = table.hash_size * table.emb_dim * table.table_data_type_size
        world, local = table.world_size, table.local_world_size
        assert table.comms_bandwidths is not None
        rate = table.comms_bandwidths.get_bw(local_world_size=local, world_size=world, collective_type=CollectiveType.ALL_REDUCE)
        nodes = min(world / local, 2)
        reduced = size * (2 * nodes - 1) / nodes / rate * (2 if world > 2 * local else 1) if world > 1 else 0.0
        return float(reduced + size / self._bytes_per_ms)

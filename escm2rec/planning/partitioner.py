"""Ranks for the shards of a proposal, as TorchRec's planner asks for them."""

from __future__ import annotations

from torchrec.distributed.planner.types import Partitioner, PlannerError, PlannerErrorType, ShardingOption, Topology

from escm2rec.planning.options import rooms_of
from escm2rec.planning.placement import Placer


class Partitioning(Partitioner):
    """Places shards by `Placer`, thoroughly; PlannerError where it finds no places that fit."""

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Set `rank` of all shards of the proposal, which is returned; `storage_constraint` stays as it is."""
        placed = Placer(rooms_of(storage_constraint), storage_constraint.intra_group_size).place(proposal)
        if placed is None:
            raise PlannerError("no places were found for the shards", PlannerErrorType.PARTITION)
        placed.write()
        return proposal

"""What a rank's memory holds beside its shards."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from torch import nn
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, Storage, Topology
from torchrec.distributed.types import ModuleSharder

ID_BYTES = 8
BATCH_COPIES = 20  # TorchRec's guess: two batches on their way, ten copies of each
RESERVED = 0.15  # of a GPU's memory, TorchRec's guess: workspaces, fragments, the other libraries


def beside_shards(ids_a_batch: float, dense_bytes: int, device: str, device_bytes: int) -> dict[str, int]:
    """Bytes of each rank, by part: what is no table, the batches that are read ahead, and of a GPU what is left free."""
    return {
        "dense": dense_bytes,
        "batches": math.ceil(ids_a_batch * ID_BYTES) * BATCH_COPIES,
        "reserved": int(RESERVED * device_bytes) if device == "cuda" else 0,
    }


class Reservation(FixedPercentageStorageReservation):
    """Takes so many bytes from each rank's device, or from its share of the host where it has none.

    Of a percentage, 0, because TorchRec's planner asks any reservation for one when nothing fits.
    """

    def __init__(self, bytes_a_rank: int) -> None:
        super().__init__(percentage=0.0)
        self.bytes_a_rank = bytes_a_rank

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: Mapping[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """As `taken_from`."""
        return self.taken_from(topology)

    def taken_from(self, topology: Topology) -> Topology:
        """A topology that has what is left, which may be less than nothing."""
        reserved = copy.deepcopy(topology)
        is_gpu = topology.compute_device == "cuda"
        for device in reserved.devices:
            device.storage -= Storage(hbm=self.bytes_a_rank if is_gpu else 0, ddr=0 if is_gpu else self.bytes_a_rank)
        self._last_reserved_topology = reserved
        return reserved

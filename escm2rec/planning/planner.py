"""A plan for tables on a cluster, by TorchRec's planner with our search in it, or with its own."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import DynamicProgrammingProposer, GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import PlannerError, Proposer, ShardingOption

from escm2rec.config import SparseOptimizer
from escm2rec.errors import ConfigError
from escm2rec.planning.bound import lower_bound
from escm2rec.planning.cluster import Cluster
from escm2rec.planning.enumerator import Enumerator
from escm2rec.planning.estimator import estimators_of
from escm2rec.planning.options import Floats, Options, rooms_of
from escm2rec.planning.partitioner import Partitioning
from escm2rec.planning.proposer import Pricing
from escm2rec.planning.reservation import Reservation, beside_shards
from escm2rec.planning.tables import Table, Tables, constraints_of
from escm2rec.sharding.planner import ALL_TYPES, RowWiseSharder
from escm2rec.sharding.runtime import is_news

PlannerName = Literal["priced", "torchrec", "greedy", "uniform", "grid", "dynamic"]
NO_OPTION = re.compile("No available sharding type and compute kernel combination after applying user provided constraints for ([^ ]+)\\. ")
KERNELS = {"cuda": ["fused", "fused_uvm", "fused_uvm_caching", "dense"], "cpu": ["fused", "dense"]}


@dataclass(frozen=True)
class Request:
    """What a plan is asked for; `allowed` gives the sharding types of single tables, '*' those of the others."""

    tables: Sequence[Table]
    cluster: Cluster
    batch_size: int  # impressions a rank and step
    optimizer: SparseOptimizer = "rowwise_adagrad"
    planner: PlannerName = "priced"
    allowed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kernels: Sequence[str] | None = None
    dense_bytes: int = 0  # of what is no table, with its gradients and its optimizer's state, on each rank
    global_batch_size: int | None = None  # of a config: it is divided anew on a cluster of other ranks; None where a batch is a rank's

    @property
    def beside_shards(self) -> dict[str, int]:
        """Bytes of each rank that no shard takes, by part."""
        ids = sum(table.pooling_factor * table.features for table in self.tables) * self.batch_size
        return beside_shards(ids, self.dense_bytes, self.cluster.hardware.device, self.cluster.device_bytes)

    @property
    def reservation(self) -> Reservation:
        """The same, for TorchRec's planner."""
        return Reservation(sum(self.beside_shards.values()))


@dataclass(frozen=True)
class Planned:
    """What a planner found: the options that it took, with ranks, and what it had to choose from. No options: nothing fits."""

    request: Request
    chosen: list[ShardingOption] | None
    search_space: list[ShardingOption]
    rooms: Floats  # bytes that each rank has for tables, [ranks, 3]: of the device, the host, a disk
    bound: float  # ms that the slowest rank takes at the least
    seconds: float
    error: PlannerError | None = None

    @property
    def tables(self) -> dict[str, Table]:
        """Those of the request, by name."""
        return {table.name: table for table in self.request.tables}


def check_planner(planner: PlannerName, cluster: Cluster) -> None:
    """ConfigError where a planner cannot plan for a cluster."""
    if planner == "dynamic" and cluster.hardware.device == "cpu":
        raise ConfigError(
            f"--planner dynamic cannot plan for {cluster.name}: TorchRec's search counts in shares of a GPU's memory",
            "choose another planner for hosts without a GPU",
        )


def find_plan(request: Request) -> Planned:
    """Search. It takes some seconds for a hundred tables on 64 ranks and half a minute for a thousand on 128.

    ConfigError where the sharding types and kernels that are allowed leave a table no option, or where the planner cannot plan for the
    cluster.
    """
    check_planner(request.planner, request.cluster)
    began = time.perf_counter()
    topology, reservation, keeper = request.cluster.topology(), request.reservation, _Keeper()
    enumerator = _enumerator(request, topology)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=request.batch_size,
        enumerator=enumerator,
        proposer=_proposers(request.planner),
        partitioner=Partitioning() if request.planner == "priced" else None,
        storage_reservation=reservation,
        stats=[],
        callbacks=[keeper.keep],
    )
    error = None
    with _quietly():
        try:
            planner.plan(Tables(list(request.tables), request.optimizer), [RowWiseSharder()])
        except PlannerError as raised:
            error = raised
    space = enumerator.last_stored_search_space or []
    rooms = rooms_of(reservation.taken_from(topology))
    bound = lower_bound(Options.of(space), rooms)
    return Planned(request, keeper.chosen, space, rooms, bound, time.perf_counter() - began, error)


def search_space(request: Request) -> list[ShardingOption]:
    """All options of all tables, priced."""
    with _quietly():
        enumerator = _enumerator(request, request.cluster.topology())
        space: list[ShardingOption] = enumerator.enumerate(Tables(list(request.tables), request.optimizer), [RowWiseSharder()])
    return space


def _enumerator(request: Request, topology: Topology) -> EmbeddingEnumerator:
    """Ours for our search, and for any where rows are not looked up alike, which TorchRec's cannot price."""
    impressions = request.batch_size * request.cluster.world_size
    constraints = {
        table.name: constraints_of(table, types_of(request, table.name), kernels_of(request), impressions) for table in request.tables
    }
    estimators = estimators_of(request.cluster.hardware, topology, constraints)
    popularity = {table.name: table.popularity for table in request.tables if table.popularity}
    if request.planner == "priced" or popularity:
        return Enumerator(topology, request.batch_size, constraints, estimators, popularity)
    return EmbeddingEnumerator(topology, request.batch_size, constraints, estimators)


def types_of(request: Request, table: str) -> list[str]:
    """Sharding types that a table may have."""
    default = [each for each in ALL_TYPES if each != "grid_shard"]
    return list(request.allowed.get(table, request.allowed.get("*", default)))


def kernels_of(request: Request) -> list[str]:
    """Kernels that tables may have."""
    return list(request.kernels) if request.kernels is not None else KERNELS[request.cluster.hardware.device]


class _Keeper:
    """Takes the options of the plan that the planner has settled on."""

    def __init__(self) -> None:
        self.chosen: list[ShardingOption] | None = None

    def keep(self, plan: list[ShardingOption]) -> list[ShardingOption]:
        self.chosen = plan
        return plan


def _proposers(name: PlannerName) -> list[Proposer] | None:
    """None stands for TorchRec's own four."""
    return {
        "priced": [Pricing()],
        "torchrec": None,
        "greedy": [GreedyProposer()],
        "uniform": [UniformProposer()],
        "grid": [GridSearchProposer()],
        "dynamic": [DynamicProgrammingProposer()],
    }[name]


@contextmanager
def _quietly() -> Iterator[None]:
    """TorchRec's planner tells at length what it does."""
    logger, root = logging.getLogger("torchrec"), logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    root.addFilter(is_news)
    try:
        yield
    except RuntimeError as error:
        if (match := NO_OPTION.match(str(error))) is None:
            raise
        raise ConfigError(
            f"table {match[1]!r}: no sharding type that it may have goes with a kernel that is allowed",
            "allow more by --types or --kernels: data_parallel goes with dense alone, all others with the other kernels",
        ) from error
    finally:
        logger.setLevel(level)
        root.removeFilter(is_news)

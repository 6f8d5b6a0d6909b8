"""`--cluster 2x8:h100-80gb`: nodes, ranks a node and what they are made of."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torchrec.distributed.planner import Topology

from escm2rec.errors import ConfigError, did_you_mean
from escm2rec.planning.hardware import Hardware, find_hardware

FORM = re.compile(r"(?:(?P<nodes>\d{1,9})x)?(?P<ranks>\d{1,9}):(?P<hardware>[^,]+)(?P<overrides>(?:,[^,]*)*)")
MAX_RANKS = 65_536
SHAPE = "write it as NODESxRANKS:HARDWARE, such as 2x8:h100-80gb, or 2x8:h100-80gb,inter_node_gb_per_s=25"


@dataclass(frozen=True)
class Cluster:
    """Nodes of as many ranks each, all of one hardware."""

    nodes: int
    ranks_per_node: int
    hardware_name: str
    hardware: Hardware
    overrides: str = ""  # of the hardware's figures, as they were asked for: ",NAME=NUMBER,..."

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{self.nodes}x{self.ranks_per_node}:{self.hardware_name}{self.overrides}"

    @property
    def device_bytes(self) -> int:
        """Memory that tables of a rank are looked up in: its GPU's, or its share of the host's."""
        return self.host_bytes if self.hardware.device == "cpu" else int(self.hardware.memory_gib * 2**30)

    @property
    def host_bytes(self) -> int:
        """A rank's share of the host's memory."""
        return int(self.hardware.host_memory_gib * 2**30) // self.ranks_per_node

    def topology(self) -> Topology:
        """For TorchRec, whose rates are bytes a millisecond."""
        hardware = self.hardware
        quiet = logging.getLogger("torchrec.distributed.planner.types")
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # it asks for a factory that only fills in what is known here
        try:
            return Topology(
                world_size=self.world_size,
                local_world_size=self.ranks_per_node,
                compute_device=hardware.device,
                hbm_cap=self.device_bytes if hardware.device == "cuda" else None,
                ddr_cap=self.host_bytes,
                hbm_mem_bw=hardware.memory_gb_per_s * 1e6,
                ddr_mem_bw=hardware.host_memory_gb_per_s * 1e6 / self.ranks_per_node,
                hbm_to_ddr_mem_bw=hardware.host_link_gb_per_s * 1e6,
                intra_host_bw=hardware.intra_node_gb_per_s * 1e6,
                inter_host_bw=hardware.inter_node_gb_per_s * 1e6,
                bwd_compute_multiplier=hardware.backward_multiplier,
            )
        finally:
            quiet.setLevel(level)

    def as_json(self) -> dict[str, Any]:
        """All of it, sources left out."""
        return {
            "nodes": self.nodes,
            "ranks_per_node": self.ranks_per_node,
            "hardware": self.hardware_name,
            "overrides": self.overrides,
            **self.hardware.model_dump(mode="json", exclude={"sources"}),
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Cluster:
        """What `as_json` gave."""
        rest = dict(tree)
        nodes, ranks, name, overrides = (rest.pop(key) for key in ("nodes", "ranks_per_node", "hardware", "overrides"))
        return cls(nodes, ranks, name, Hardware.model_validate(rest), overrides)


def parse_cluster(text: str, own: Path | None = None) -> Cluster:
    """A cluster as the command line gives it; ConfigError where it is none, with what to write."""
    match = FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--cluster {text!r} is no cluster", SHAPE)
    nodes, ranks = int(match["nodes"] or 1), int(match["ranks"])
    if nodes < 1 or ranks < 1 or nodes * ranks > MAX_RANKS:
        raise ConfigError(f"--cluster {text!r} has {nodes * ranks:,} ranks", f"give it 1 to {MAX_RANKS:,}")
    hardware = find_hardware(match["hardware"], own)
    return Cluster(nodes, ranks, match["hardware"], _overridden(hardware, match["overrides"], text), match["overrides"])


def _overridden(hardware: Hardware, overrides: str, text: str) -> Hardware:
    changed: dict[str, Any] = {}
    for part in overrides.split(",")[1:]:
        name, separator, value = part.partition("=")
        if not separator or name not in Hardware.numbers():
            near = did_you_mean(name, Hardware.numbers())
            raise ConfigError(
                f"--cluster {text!r}: {part!r} overrides nothing{near}", f"give NAME=NUMBER of {', '.join(Hardware.numbers())}"
            )
        changed[name] = value
    try:
        return Hardware.model_validate({**hardware.model_dump(), **changed})
    except ValidationError as error:
        wrong = "; ".join(
            f"{each['loc'][0]}={each['input']}: {each['msg']}" if each["loc"] else each["msg"].removeprefix("Value error, ")
            for each in error.errors()
        )
        raise ConfigError(f"--cluster {text!r}: {wrong}", SHAPE) from error

"""What one node of a cluster is made of: `hardware.yaml`, and entries of one's own in the same form."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from escm2rec.errors import ConfigError

MOST = 1e9  # of any figure: beyond it is a slip
BUILT_IN = Path(__file__).with_name("hardware.yaml")


class Hardware(BaseModel):
    """A rank's device, and the node that it is in. GB/s are 10^9 bytes a second, in one direction; GiB are 2^30 bytes.

    `host_*` are of a whole node, whose ranks share them alike; everything else is one rank's. Cores (`device: cpu`) have the host's memory
    alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: Literal["cuda", "cpu"]
    memory_gib: float = Field(0.0, ge=0, le=MOST)
    memory_gb_per_s: float = Field(0.0, ge=0, le=MOST)
    host_memory_gib: float = Field(gt=0, le=MOST)
    host_memory_gb_per_s: float = Field(gt=0, le=MOST)
    host_link_gb_per_s: float = Field(32.0, gt=0, le=MOST)  # between the device and the host's memory
    intra_node_gb_per_s: float = Field(gt=0, le=MOST)
    inter_node_gb_per_s: float = Field(gt=0, le=MOST)
    whole_tables_gb_per_s: float | None = Field(None, gt=0, le=MOST)  # tables that every rank holds, cleared and stepped; None: TorchRec's
    backward_multiplier: float = Field(2.0, gt=0, le=1_000)  # time of a lookup's backward over its forward pass
    price_per_hour: float | None = Field(None, ge=0, le=MOST)  # of one rank
    sources: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_memory(self) -> Self:
        if self.device == "cuda" and not (self.memory_gib and self.memory_gb_per_s):
            raise ValueError("a GPU needs memory_gib and memory_gb_per_s")
        return self

    @classmethod
    def numbers(cls) -> list[str]:
        """Fields that a cluster may override."""
        return [name for name in cls.model_fields if name not in ("device", "sources")]


@cache
def hardware_table(own: Path | None = None) -> dict[str, Hardware]:
    """Entries by name, those of the file `own` before the built-in ones; ConfigError where it is none."""
    table = _read(BUILT_IN)
    return table if own is None else table | _read(own)


def find_hardware(name: str, own: Path | None = None) -> Hardware:
    """The entry of a name; ConfigError with the nearest names where there is none."""
    table = hardware_table(own)
    if (known := name if name in table else name.lower()) in table:
        return table[known]
    near = get_close_matches(name, table, n=3, cutoff=0.4) or sorted(table)
    raise ConfigError(
        f"no hardware {name!r}; the nearest are {', '.join(near)}",
        "escm2rec plan hardware lists all; --hardware FILE.yaml adds your own, which escm2rec plan calibrate can measure",
    )


def _read(path: Path) -> dict[str, Hardware]:
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--hardware {path} cannot be read: {error}", f"write it as {BUILT_IN.name} of the package is written") from error
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"--hardware {path} holds no entries by name", "write NAME: {device: cuda, memory_gib: 80, ...}")
    table = {}
    for name, entry in tree.items():
        try:
            table[str(name)] = Hardware.model_validate(entry)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, each['loc'])) or 'the entry'}: {each['msg'].removeprefix('Value error, ')}" for each in error.errors()
            )
            raise ConfigError(f"--hardware {path}, entry {name!r}: {wrong}", f"fields are {', '.join(Hardware.model_fields)}") from error
    return table

"""The tables of a model that a plan is made for: of a list in YAML, or of a config and its data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from escm2rec.config import SparseOptimizer
from escm2rec.errors import ConfigError, did_you_mean
from escm2rec.planning.popularity import Lookups, Popularity, wrong_popularity
from escm2rec.sharding.model import OPTIMIZERS

DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}  # TorchRec counts int8 as float16
WRITE = (
    "write a list of {name: ..., rows: ..., dimension: ...}, with pooling_factor, features, weighted and dtype where they are not "
    "1, 1, false and fp32, and popularity where rows are not looked up alike"
)


class Table(BaseModel):
    """One embedding table, and how it is looked up."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, pattern=r"^[^.\s]+$")
    rows: int = Field(gt=0, le=2**40)
    dimension: int = Field(gt=0, le=2**16, multiple_of=4)  # FBGEMM's tables
    pooling_factor: float = Field(1.0, ge=1e-6, le=1e6)  # ids an impression, on average, of each feature
    features: int = Field(1, gt=0, le=1_000)  # that look it up
    weighted: bool = False
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    popularity: Popularity = ()  # which rows have which share of the lookups: `planning/popularity.py`

    @model_validator(mode="after")
    def _is_popularity(self) -> Self:
        if (wrong := wrong_popularity(self.popularity, self.rows)) is not None:
            raise ValueError(f"popularity: {wrong}")
        return self

    @field_validator("name")
    @classmethod
    def _is_no_attribute(cls, name: str) -> str:
        if hasattr(nn.ModuleDict(), name):
            raise ValueError("TorchRec keeps tables in a torch.nn.ModuleDict, which has an attribute of this name: choose another")
        return name

    @property
    def weight_bytes(self) -> int:
        """Of all rows."""
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.dimension * {"fp32": 4, "fp16": 2, "bf16": 2}[self.dtype]


def read_tables(path: Path) -> list[Table]:
    """Tables of a YAML list; ConfigError with the place of what is wrong."""
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--tables {path} cannot be read: {error}", WRITE) from error
    if not isinstance(tree, list) or not tree:
        raise ConfigError(f"--tables {path} holds no list of tables", WRITE)
    tables = [_table(entry, f"--tables {path}, table {number}") for number, entry in enumerate(tree, 1)]
    check_names(tables, f"--tables {path}")
    return tables


def check_names(tables: list[Table], where: str) -> None:
    """ConfigError when two tables have one name."""
    seen: dict[str, int] = {}
    for number, table in enumerate(tables, 1):
        if (before := seen.setdefault(table.name, number)) != number:
            raise ConfigError(f"{where}: tables {before} and {number} are both named {table.name!r}", "give each its own name")


def _table(entry: Any, where: str) -> Table:
    name = entry.get("name") if isinstance(entry, dict) else None
    try:
        return Table.model_validate(entry)
    except ValidationError as error:
        wrong = "; ".join(_wrong(each) for each in error.errors())
        raise ConfigError(f"{where}{f' ({name!r})' if name else ''}: {wrong}", WRITE) from error


def _wrong(error: Any) -> str:
    if error["type"] == "value_error" and not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = ".".join(map(str, error["loc"])) or "it"
    if error["type"] == "extra_forbidden":
        return f"{name} is no field of a table{did_you_mean(name, sorted(Table.model_fields))}"
    return f"{name}: {error['msg']}, and is {error['input']!r}"


class Tables(nn.Module):
    """Tables on the meta device, weighted ones in a collection of their own as in a model."""

    def __init__(self, tables: list[Table], optimizer: SparseOptimizer) -> None:
        super().__init__()
        parts = [[table for table in tables if table.weighted == weighted] for weighted in (False, True)]
        self.collection = _collection(parts[0], weighted=False) if parts[0] else None
        self.weighted_collection = _collection(parts[1], weighted=True) if parts[1] else None
        kind, _ = OPTIMIZERS[optimizer]
        apply_optimizer_in_backward(kind, list(self.parameters()), {"lr": 1.0})  # by which the planner knows its state


def constraints_of(table: Table, sharding_types: list[str], kernels: list[str], impressions: int) -> ParameterConstraints:
    """What the planner is told of a table; a step is of so many `impressions`, on all ranks."""
    cache = None
    if table.popularity:
        lookups = Lookups(table.popularity, impressions * table.pooling_factor * table.features)
        cache = CacheParams(load_factor=UVM_CACHING_RATIO, stats=lookups)
    return ParameterConstraints(
        cache_params=cache,
        sharding_types=sharding_types,
        compute_kernels=kernels,
        pooling_factors=[table.pooling_factor] * table.features,
        is_weighted=table.weighted,
    )


def _collection(tables: list[Table], weighted: bool) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            embedding_dim=table.dimension,
            num_embeddings=table.rows,
            feature_names=[table.name] if table.features == 1 else [f"{table.name}.{i}" for i in range(table.features)],
            pooling=PoolingType.SUM,
            data_type=DTYPES[table.dtype],
        )
        for table in tables
    ]
    return EmbeddingBagCollection(configs, is_weighted=weighted, device=torch.device("meta"))

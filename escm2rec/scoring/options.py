"""How a job of scoring is to be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Layout:
    """How parts are written. With `rows_per_file` an input's rows go to as many files as that needs; else to one."""

    row_group_rows: int = 131_072
    compression: str = "zstd"
    rows_per_file: int | None = None


@dataclass(frozen=True)
class Options:
    """How to score; the command's options have the same names.

    keep, columns     what to write: `output.output_columns`
    where             an SQL condition on the columns of tables
    top_k, by, score  only the `top_k` best rows of each value of the column `by`, by the prediction `score` (p_ctcvr)
    bad_rows          refuse: a row that cannot be read fails its file; count: it is left out, and the manifest counts it
    on_error          stop at the first file that fails, or skip such files
    layout            of the Parquet parts
    tables            shared: every machine has one copy; sharded: ranks have a share each. By default shared on cores, unless ranks
                      have several machines' memory and need it
    processes         of this machine, without torchrun or Ray; by default one a processor, at most one a file
    ray_address       of a Ray cluster to score on
    warn_gap          from which difference to training on a share of missing or out-of-vocabulary values is warned of
    finds_repeats     whether rows that share their user are computed at once
    """

    keep: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    where: str | None = None
    top_k: int | None = None
    by: str | None = None
    score: str | None = None
    bad_rows: Literal["refuse", "count"] = "refuse"
    on_error: Literal["stop", "skip"] = "stop"
    layout: Layout = field(default_factory=Layout)
    tables: Literal["shared", "sharded"] | None = None
    processes: int | None = None
    ray_address: str | None = None
    warn_gap: float = 0.1
    finds_repeats: bool = True

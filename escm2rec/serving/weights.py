"""Tables as they are stored in an artifact, and the look-up of their rows, by functions of torch alone.

    fp32, bf16   rows as they are, or rounded to bfloat16
    int8, int4   each row by the scale and the offset of its own least and greatest number, which stand at its end: 8 bytes beside int8 and
                 4 beside int4 (two numbers a byte), as torch's `quantized::embedding_bag_*_rowwise_offsets` read them

All tables are one, [N, D], so that a batch takes one look-up. These functions take tensors and give tensors, unlike FBGEMM's modules of
quantised tables, whose script objects torch.export refuses: so every kind of weights goes into every format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Weights = Literal["fp32", "bf16", "int8", "int4"]
CHUNK_BYTES = 64 << 20
_PACK: dict[Weights, tuple[torch.dtype, Callable[[int], int], Callable[[Tensor], Tensor]]] = {
    "fp32": (torch.float32, lambda dim: dim, lambda rows: rows),
    "bf16": (torch.bfloat16, lambda dim: dim, lambda rows: rows.bfloat16()),
    "int8": (torch.uint8, lambda dim: dim + 8, torch.ops.quantized.embedding_bag_byte_prepack),
    "int4": (torch.uint8, lambda dim: dim // 2 + 4, torch.ops.quantized.embedding_bag_4bit_prepack),
}
"""Of each kind: the type of what is stored, how many of it a row takes, and how rows [N, D] of float32 become it."""


def pack(tables: Tensor, weights: Weights, path: Path) -> Tensor:
    """Tables [N, D] of float32 as `weights` stores them, in the file at `path`, which the result maps; memory does not grow with them."""
    dtype, width_of, packed = _PACK[weights]
    rows, dim = tables.shape
    width = width_of(dim)
    mapped = torch.from_file(str(path), shared=True, size=rows * width, dtype=dtype).view(rows, width)
    step = max(1, CHUNK_BYTES // (4 * dim))
    for start in range(0, rows, step):
        mapped[start : start + step] = packed(tables[start : start + step])
    return mapped


def look_up(tables: Tensor, weights: Weights, rows: Tensor, ends: Tensor, of_rows: Tensor | None) -> Tensor:
    """Sums of rows: bag b is of `rows[ends[b]:ends[b + 1]]`, each times its number in `of_rows`, if there are any -> float32 [bags, D]."""
    if weights in ("int8", "int4"):
        lookup: Any = torch.ops.quantized
        lookup = lookup.embedding_bag_byte_rowwise_offsets if weights == "int8" else lookup.embedding_bag_4bit_rowwise_offsets
        pooled: Tensor = lookup(tables, rows, ends, False, 0, False, of_rows, None, True)
        return pooled
    scales = None if of_rows is None else of_rows.to(tables.dtype)
    return functional.embedding_bag(rows, tables, ends, mode="sum", per_sample_weights=scales, include_last_offset=True).float()

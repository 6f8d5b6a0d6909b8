"""Tensors of a checkpoint, read where they lie: a part of a table takes the memory of that part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from escm2rec.errors import DataError

NUMBERS = "data/0"  # the record of a tensor's numbers in what torch.save writes of it


class StoredPart(NamedTuple):
    """A part of a stored tensor, as one rank wrote it: where it begins, and what it holds, mapped."""

    offsets: tuple[int, ...]
    values: Any


class StoredTensors:
    """The tensors of a complete checkpoint, by the names that `Checkpoints` gives them; DataError where it cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise DataError(f"cannot read checkpoint {folder}: {type(error).__name__}: {error}", "is it damaged?") from error
        stored = metadata.state_dict_metadata.items()
        self._tensors = {name: known for name, known in stored if isinstance(known, TensorStorageMetadata)}
        self._places = metadata.storage_data
        self.shapes = {name: tuple(known.size) for name, known in self._tensors.items()}

    def parts(self, name: str) -> Iterator[StoredPart]:
        """The parts of a tensor, each mapped: what is not looked at is not read."""
        known = self._tensors[name]
        for chunk in known.chunks:
            place = self._places[MetadataIndex(name, chunk.offsets)]
            yield StoredPart(tuple(chunk.offsets), self._mapped(place, known.properties.dtype, tuple(chunk.sizes)))

    def whole(self, name: str) -> Tensor:
        """A tensor of one part, in memory."""
        (part,) = self.parts(name)
        return torch.from_numpy(np.array(part.values)).reshape(self.shapes[name])

    def _mapped(self, place: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        """torch.save writes an archive whose record of the numbers is not compressed."""
        path, kind = self._folder / place.relative_path, torch.empty(0, dtype=dtype).numpy().dtype
        count = math.prod(shape)
        if not count:
            return np.empty(shape, kind)
        try:
            with path.open("rb") as file:
                archive = torch._C.PyTorchFileReader(_create_file_view(file, place.offset, place.length))  # type: ignore[call-overload]
                start, size = archive.get_record_offset(NUMBERS), archive.get_record_size(NUMBERS)
            if size == count * kind.itemsize:
                return np.memmap(path, kind, "r", place.offset + start, (count,)).reshape(shape)
        except (OSError, RuntimeError) as error:
            raise DataError(f"cannot read {path}: {type(error).__name__}: {error}", "the checkpoint is damaged") from error
        raise DataError(f"{path} holds {size:,} bytes for {count:,} numbers of {dtype}", "was it written by another torch?")

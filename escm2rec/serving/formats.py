"""The files of an exported model: torch.export's archive, AOTInductor's compiled package, TorchScript's archive."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import Dim

from escm2rec.errors import ConfigError
from escm2rec.serving.model import Inputs, ServedModel
from escm2rec.temporary import temporary_folder

Format = Literal["torch-export", "aoti", "torchscript"]
FILES: dict[Format, str] = {"torch-export": "model.pt2", "aoti": "model.pt2", "torchscript": "model.pt"}
COMPILED = "escm2rec-compiled-"  # how its folder among the temporary files begins
AOTI_HINT = "install g++, or choose --format torch-export, which compiles nothing"
# Which dimensions of the inputs differ from batch to batch.
BATCH = ({0: Dim.DYNAMIC}, {1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
Served = Callable[..., tuple[Tensor, ...]]


@torch.library.impl("quantized::embedding_bag_4bit_rowwise_offsets", "Meta")
def _shape_of_int4(weight: Tensor, indices: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    """What torch.export must know of a look-up to write it down: torch tells it for int8 alone."""
    return weight.new_empty((offsets.shape[0] - 1, (weight.shape[1] - 4) * 2), dtype=torch.float32)


@torch.no_grad()
def save_model(model: ServedModel, example: Inputs, format: Format, folder: Path) -> Path:
    """Write the model's one file into a folder; `example` is a batch of several impressions. ConfigError where a compiler is lacking."""
    path = folder / FILES[format]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        if format == "torchscript":
            torch.jit.save(torch.jit.trace(model, example, check_trace=False), path)  # type: ignore[no-untyped-call]
            return path
        exported = torch.export.export(model, example, dynamic_shapes=BATCH[: len(example)])
        if format == "torch-export":
            torch.export.save(exported, path)
        else:
            _compile(exported, path, folder)
    return path


def _compile(exported: torch.export.ExportedProgram, path: Path, folder: Path) -> None:
    """AOTInductor's package; what it compiles, tables included, lies beside the package until it ends."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError

    options = {
        "aot_inductor.check_lowerbound": False,  # who asks for checks of inputs has batches of 0 and 1 all the same
        "aot_inductor.precompile_headers": False,  # 280 MB in a cache, for the next time
        "cpp_cache_precompile_headers": False,
    }
    with _inductor_cache(folder), redirect_stderr(io.StringIO()):
        try:
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
        except InductorError as error:
            if "InvalidCxxCompiler" in str(error):
                raise ConfigError("--format aoti compiles the model, and there is no C++ compiler", AOTI_HINT) from error
            said = next((line for line in str(error).splitlines() if "error: " in line), str(error).partition("\n")[0])
            raise ConfigError(f"--format aoti: the model does not compile on this machine: {said}", AOTI_HINT) from error


@contextmanager
def _inductor_cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # torch cuts its command at spaces: a folder with one in its name will not do.
    spaced = " " in str(folder)
    with temporary_folder(COMPILED) if spaced else tempfile.TemporaryDirectory(prefix=".compiled-", dir=folder) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def load_model(path: Path, format: Format) -> Served:
    """The model of a file, as anyone loads it: by torch alone."""
    loaded: Any
    if format == "torchscript":
        loaded = torch.jit.load(path)  # type: ignore[no-untyped-call]
    elif format == "torch-export":
        loaded = torch.export.load(path).module()
    else:
        from torch._inductor import aoti_load_package

        loaded = aoti_load_package(str(path))
    served: Served = loaded
    return served

"""Hosts by name, for `--h` of the TorchX components: what a job asks a scheduler for. TorchX finds them by their entry points.

A name says how many cores and GPUs and how much memory. Which GPU it is, a scheduler is told by its partition, queue or node labels.
"""

from __future__ import annotations

from torchx.specs import Resource

GB = 1_000  # TorchX counts memory in MB


def cpu_small() -> Resource:
    """4 cores, 16 GB: preprocess of some GB, small trainings."""
    return Resource(cpu=4, gpu=0, memMB=16 * GB)


def cpu_large() -> Resource:
    """32 cores, 128 GB: preprocess, whose processes are 8 at most, and training on cores."""
    return Resource(cpu=32, gpu=0, memMB=128 * GB)


def gpu_h100_1() -> Resource:
    """An eighth of a host of 8 H100: 12 cores and 120 GB beside one GPU of 80 GB."""
    return Resource(cpu=12, gpu=1, memMB=120 * GB)


def gpu_h100_8() -> Resource:
    """A host of 8 H100: 96 cores and 960 GB, in which a copy of all tables fits while a checkpoint is written."""
    return Resource(cpu=96, gpu=8, memMB=960 * GB)

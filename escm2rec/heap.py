"""One heap for all threads of a process."""

from __future__ import annotations

import ctypes

M_ARENA_MAX = -8  # glibc's malloc.h


def share_one_heap() -> None:
    """Let all threads allocate from one heap, where the C library is glibc; to be called before there are threads.

    glibc gives each thread a heap of its own, and blocks of changing sizes leave holes in every one: memory then grows with the rows that
    pass through (docs/decisions/0001).
    """
    try:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    except (AttributeError, OSError):
        return

"""Worker processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """To be called in a worker of `multiprocessing`: when its parent is gone, even by kill -9, so is it.

    It would hold memory, and go on writing beside the job that takes over.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, name="escm2rec-parent", daemon=True).start()

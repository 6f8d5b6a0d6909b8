"""`escm2rec train` that is killed when it is about to copy a file: `python -m tests.killed_copy NAME ...`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from escm2rec.cli import main
from escm2rec.paths import RemotePath

if __name__ == "__main__":
    put, name = RemotePath.put, sys.argv[1]

    def put_or_end(self: RemotePath, source: Path) -> None:
        if str(self).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, source)

    RemotePath.put = put_or_end  # type: ignore[method-assign]
    main(["train", *sys.argv[2:]])

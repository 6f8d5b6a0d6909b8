"""`escm2rec export` as a program: what torchrun and TorchX start."""

import sys

from escm2rec.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])

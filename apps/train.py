"""`escm2rec train` as a program: what torchrun and TorchX start."""

import sys

from escm2rec.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

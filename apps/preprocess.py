"""`escm2rec preprocess` as a program: what torchrun and TorchX start."""

import sys

from escm2rec.cli import main

if __name__ == "__main__":
    main(["preprocess", *sys.argv[1:]])

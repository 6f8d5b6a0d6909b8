"""`escm2rec study` as a program."""

import sys

from escm2rec.cli import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])

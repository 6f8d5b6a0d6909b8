"""`python -m escm2rec` is the command `escm2rec`."""

from escm2rec.cli import main

if __name__ == "__main__":
    main()

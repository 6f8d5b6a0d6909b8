"""One file an objective, named after it: its formula, its source, and `ESTIMATOR`, what it is made of (docs/extending.md)."""

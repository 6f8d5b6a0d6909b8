"""Training: optimizers, loop, checkpoints, run folders."""

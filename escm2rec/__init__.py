"""Unbiased click and conversion models (ESCM2) on TorchRec's sharded embeddings.

Importing this package is instant and loads no torch; each verb lives in its own package.
"""

__version__ = "0.1.0"

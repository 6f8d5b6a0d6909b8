"""A propensity that balances what the towers read between clicked and unclicked impressions."""

from __future__ import annotations

import torch

from escm2rec.objectives.propensity import LEAST_PROPENSITY
from escm2rec.objectives.reduction import LossTerm, squared_mean_of
from escm2rec.objectives.rows import Rows, required


def balance_term(rows: Rows) -> LossTerm:
    """|| (1/N) sum w (o / p - (1 - o) / (1 - p)) phi ||^2 (DR-V2, Li et al., ICML 2023), phi = (1, inputs), held.

    Its mean over clicks is 0 under the true propensity. p is of the propensity tower, with gradient; it and 1 - p are at least the floor.
    """
    if rows.inputs is None:
        raise ValueError("the balancing term needs predictions that hold the inputs: build the head with keeps_inputs=True")
    p = torch.sigmoid(required(rows.propensity_logit, "propensity"))
    floor = max(rows.floor, LEAST_PROPENSITY)
    contrast = rows.click / p.clamp(min=floor) - (1 - rows.click) / (1 - p).clamp(min=floor)
    phi = torch.cat([torch.ones_like(p).unsqueeze(1), rows.inputs.to(p.dtype)], dim=1)
    return squared_mean_of((rows.weight * contrast).unsqueeze(1) * phi, rows.weight)

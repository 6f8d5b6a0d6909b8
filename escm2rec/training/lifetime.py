"""Figures of all impressions that trained since step 1: those that sums can keep."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from escm2rec.sharding.runtime import Runtime

TASKS = ("ctr", "cvr_clicked", "ctcvr")
COUNTS = ("rows", "clicks", "conversions")
NUM_SUMS = len(COUNTS) + 4 * len(TASKS)


class Lifetime:
    """What each rank has added up so far. Nothing is rounded on the way to the others: one that goes on adds to the same numbers."""

    def __init__(self, runtime: Runtime, stored: list[list[float]] | None = None) -> None:
        """`stored` is what `table` of a checkpoint held, a list a rank; of another number of ranks, rank 0 goes on with their sum."""
        world_size, device = runtime.world_size, runtime.device
        table = torch.tensor(stored or [[0.0] * NUM_SUMS], dtype=torch.float64)
        if len(table) != world_size:
            table = torch.cat([table.sum(dim=0, keepdim=True), torch.zeros(world_size - 1, NUM_SUMS, dtype=torch.float64)])
        self.table = table  # [ranks, sums], when it was last shared
        self._rank, self._mine = runtime.rank, table[runtime.rank].to(device, copy=True)

    def add(self, rows: Tensor) -> None:
        """Take the rows of one step of this rank, as `StepOutput.rows` gives them; a GPU's queue is not waited for."""
        self._mine += row_sums(rows)

    def placed(self) -> Tensor:
        """[ranks * sums], 0 but for this rank's: added over the ranks, which is exact, it is what `share` takes."""
        placed = torch.zeros_like(self.table, device=self._mine.device)
        placed[self._rank] = self._mine
        return placed.flatten()

    def share(self, added: Tensor) -> None:
        """Take what all ranks have."""
        self.table = added.view_as(self.table).cpu()

    def figures(self) -> dict[str, float]:
        """Counts, log loss and calibration of each task on its population, when they were last shared; not finite where there is none."""
        total = self.table.sum(dim=0)
        found: dict[str, float] = {f"lifetime_{name}": int(count) for name, count in zip(COUNTS, total, strict=False)}
        for task, (weight, loss, predicted, observed) in zip(TASKS, total[len(COUNTS) :].view(4, -1).T, strict=True):
            found[f"lifetime_{task}_log_loss"] = float(loss / weight)
            found[f"lifetime_{task}_calibration"] = float(predicted / observed)
        return found


def row_sums(rows: Tensor) -> Tensor:
    """[sums], of rows as `StepOutput.rows` gives them, in float64: `COUNTS`; sum w, sum w loss, sum w p and sum w y, each of all tasks."""
    ctr_logit, cvr_logit, click, conversion, weight = rows.double()
    converted = click * conversion
    log_p, log_p_cvr = logsigmoid(torch.stack([ctr_logit, cvr_logit]))
    log_not_p, log_not_p_cvr = log_p - ctr_logit, log_p_cvr - cvr_logit  # what is left where that cancels is below 1e-14
    # Not both is no click, or a click without a conversion: 1 - pq = (1 - p) + p (1 - q), of which neither cancels.
    log_p_both, log_not_p_both = log_p + log_p_cvr, torch.logaddexp(log_not_p, log_p + log_not_p_cvr)
    log_ps = torch.stack([log_p, log_p_cvr, log_p_both])
    log_not_ps = torch.stack([log_not_p, log_not_p_cvr, log_not_p_both])
    labels, weights = torch.stack([click, converted, converted]), torch.stack([weight, weight * click, weight])
    counts = torch.stack([torch.ones_like(click), click, converted])
    losses = -torch.lerp(log_not_ps, log_ps, labels)
    return torch.cat([each.sum(dim=1) for each in (counts, weights, weights * losses, weights * log_ps.exp(), weights * labels)])

"""One cell of a study: one candidate trained on one draw of one world, and measured on fresh impressions of it.

The model is `Escm2Head`, the loss `Objective` and `reduce_terms`, as in training; only tables, reader and ranks are left out, since a
world's log fits into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from escm2rec.models.backbone import SharedBottom
from escm2rec.models.head import Escm2Head, Task
from escm2rec.models.predictions import Predictions
from escm2rec.models.tower import Tower
from escm2rec.objectives.objective import Objective, Stage
from escm2rec.objectives.reduction import LossTerm, local_sums, reduce_terms
from escm2rec.study.candidates import Candidate, Reference
from escm2rec.study.worlds import NUM_NUMBERS, Sample, World, draw, drop_negatives, wrong_shift
from escm2rec.training.build import BaseRates, build_objective

# The same for every candidate. Chosen on seeds from 1,000 on, which no study uses, so that the oracle has stopped moving: over three
# seeds its mean CVR is within 6% of the truth, of ids 8%. Ids take one pass, since tables of rare ids overfit in the second.
EPOCHS, BATCH_ROWS, LEARNING_RATE = 10, 4_000, 6e-2
EPOCHS_OF_IDS, BATCH_ROWS_OF_IDS, LEARNING_RATE_OF_IDS, LEARNING_RATE_OF_TABLES = 1, 2_000, 2e-2, 1e-2
LEAST_BATCHES = 8  # an epoch, of a log however small
WEIGHT_DECAY = 1e-3
FLEXIBLE = (32, 16)
ID_DIM, ID_STD = 8, 0.1
WARM_UP = 0.1
FRESH_ROWS = 50_000
TRAINING, HELD_OUT, FRESH = 0, 1, 2


class Rows(NamedTuple):
    """A sample as tensors."""

    numeric: Tensor
    ids: Tensor
    click: Tensor
    conversion: Tensor
    weight: Tensor
    true_logit: Tensor

    @classmethod
    def of(cls, sample: Sample) -> Rows:
        """The sample, float32 and int64."""
        logit = np.log(sample.propensity) - np.log1p(-sample.propensity)
        parts = (sample.numeric, sample.ids, sample.click, sample.conversion, sample.weight, logit.astype(np.float32))
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))

    def take(self, index: Tensor) -> Rows:
        """Some rows."""
        return Rows(*(part[index] for part in self))

    def split(self, sizes: list[int]) -> Iterator[Rows]:
        """The rows cut into parts, in order; no copy."""
        return (Rows(*parts) for parts in zip(*(torch.split(part, sizes) for part in self), strict=True))


class Draw(NamedTuple):
    """What one seed of a world draws: a log to train on, one held out, and fresh impressions with all that is true of them."""

    training: Sample
    held_out: Sample
    fresh: Sample


def draw_world(world: World, seed: int) -> Draw:
    """Three independent draws; negatives are dropped from the logs, never from the fresh impressions."""
    training = draw(world, world.impressions, (seed, TRAINING))
    held_out = draw(world, world.impressions // 3, (seed, HELD_OUT))
    fresh = draw(world, FRESH_ROWS, (seed, FRESH))
    logs = [drop_negatives(sample, world.keep_rate, (seed, part, 1)) for part, sample in ((TRAINING, training), (HELD_OUT, held_out))]
    return Draw(logs[0], logs[1], fresh)


class StudyModel(nn.Module):
    """A head over numbers, or over the embeddings of user and item. Towers are linear or not, as the world says."""

    def __init__(self, world: World, objective: Objective) -> None:
        super().__init__()
        sizes = (world.users, world.users // 4) if world.users else ()
        self.tables = nn.ModuleList(nn.Embedding(size, ID_DIM) for size in sizes)
        for table in self.tables.parameters():
            nn.init.normal_(table, std=ID_STD)
        num_inputs = len(sizes) * ID_DIM if sizes else NUM_NUMBERS
        hidden = () if world.towers == "linear" else FLEXIBLE
        further = objective.towers
        self.head = Escm2Head(num_inputs, SharedBottom(num_inputs, ()), hidden, further, keeps_inputs=objective.lambda_balance > 0)
        if world.towers == "small":
            for task in (self.head.cvr, self.head.imputation, self.head.counterfactual):
                if isinstance(task, Task):
                    task.tower = Tower(num_inputs, ())

    def forward(self, rows: Rows) -> Predictions:
        """Logits of rows."""
        found = [table(rows.ids[:, column]) for column, table in enumerate(self.tables)]
        predictions: Predictions = self.head(torch.cat([rows.numeric, *found], dim=1))
        return predictions


class Trained(NamedTuple):
    """A candidate that was trained on one draw of a world."""

    model: StudyModel
    objective: Objective
    calibration: Tensor | None
    reference: Reference | None

    @torch.no_grad()
    def predict(self, sample: Sample) -> Predictions:
        """Logits of a sample."""
        rows = Rows.of(sample)
        predictions: Predictions = self.model(rows)
        return _with_truth(self.objective, predictions, rows)

    @property
    def stage(self) -> Stage:
        """Where it stands: at the end."""
        return Stage("cvr", progress=1.0, calibration=self.calibration)


def train(world: World, candidate: Candidate, sample: Sample, seed: int) -> Trained:
    """Train a candidate on a log, in one thread; the same arguments give the same model."""
    rows = Rows.of(sample)
    rates = BaseRates.of(_counts(rows.weight, rows.click, rows.conversion))
    objective = _objective(candidate, rates)
    calibration = torch.tensor([world.slope, wrong_shift(world)]) if world.slope != 1 and candidate.reference is None else None
    model = _model(world, objective, rates, seed)
    optimizer = _optimizer(world, model)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    epochs, batch_rows = (EPOCHS_OF_IDS, BATCH_ROWS_OF_IDS) if world.users else (EPOCHS, BATCH_ROWS)
    batches = _batches(len(sample), epochs, batch_rows, objective, seed)
    in_order = rows.take(torch.cat(batches)).split([len(batch) for batch in batches])  # one gather, not one a step
    for step, batch in enumerate(in_order):
        progress = step / len(batches)
        for group, first in zip(optimizer.param_groups, first_rates, strict=True):
            group["lr"] = first * (1 - progress)
        stage = Stage(objective.phase(step), progress < WARM_UP, progress, calibration)
        terms = _terms(objective, candidate, model, batch, stage)
        loss, _ = reduce_terms(terms, local_sums(terms), world_size=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Trained(model, objective, calibration, candidate.reference)


def _model(world: World, objective: Objective, rates: BaseRates, seed: int) -> StudyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StudyModel(world, objective)
    model.head.set_base_rates(rates.ctr, rates.cvr, imputes_labels=objective.settings.imputation.predicts == "label")
    return model


def _optimizer(world: World, model: StudyModel) -> torch.optim.AdamW:
    rate = LEARNING_RATE_OF_IDS if world.users else LEARNING_RATE
    groups: list[dict[str, Any]] = [{"params": list(model.head.parameters()), "lr": rate}]
    if world.users:
        groups.append({"params": list(model.tables.parameters()), "lr": LEARNING_RATE_OF_TABLES})
    return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)


def _batches(rows: int, epochs: int, batch_rows: int, objective: Objective, seed: int) -> list[Tensor]:
    """Places of the rows of each step, every row once an epoch: so many that CTR and CVR learn in the same number of steps under all
    objectives, whatever steps an objective takes beside them."""
    order = torch.Generator().manual_seed(seed)
    by_epoch = max(LEAST_BATCHES, round(rows / batch_rows))
    steps = _steps(objective, epochs * by_epoch)
    passes = -(-steps // by_epoch)
    return [index for _ in range(passes) for index in torch.randperm(rows, generator=order).chunk(by_epoch)][:steps]


def _steps(objective: Objective, cvr_steps: int) -> int:
    """How many steps hold so many that train CTR and CVR."""
    trains = (step for step in count() if objective.phase(step) in ("cvr", "joint"))
    return next(islice(trains, cvr_steps - 1, None)) + 1


def _terms(objective: Objective, candidate: Candidate, model: StudyModel, batch: Rows, stage: Stage) -> dict[str, LossTerm]:
    """The terms of a step. The oracle sees every conversion, as if all had clicked, and learns no CTR."""
    predictions = _with_truth(objective, model(batch), batch)
    everything = candidate.reference == "all conversions"
    click = torch.ones_like(batch.click) if everything else batch.click
    terms = objective.terms(predictions, click, batch.conversion, batch.weight, stage)
    return {name: term for name, term in terms.items() if not (everything and name == "ctr")}


def _objective(candidate: Candidate, rates: BaseRates) -> Objective:
    objective = build_objective(candidate.objective, rates.ctr)
    return replace(objective, given=candidate.reference == "true propensity")


def _with_truth(objective: Objective, predictions: Predictions, rows: Rows) -> Predictions:
    return predictions._replace(propensity_logit=rows.true_logit) if objective.given else predictions


def _counts(weight: Tensor, click: Tensor, conversion: Tensor) -> dict[str, float]:
    clicks = float((weight * click).sum())
    return {"rows": float(weight.sum()), "clicks": clicks, "conversions": float((weight * click * conversion).sum())}

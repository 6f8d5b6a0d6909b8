"""What is built from a config: any backbone under any objective."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from escm2rec.config import ObjectiveKind
from escm2rec.models.head import Escm2Head
from escm2rec.objectives.reduction import local_denominators, reduce_terms
from escm2rec.training.build import BaseRates, build_model, build_objective
from tests.encoded import config, schema

BACKBONES = {
    "shared_bottom": "{kind: shared_bottom, hidden: [8]}",
    "mmoe": "{kind: mmoe, experts: 2, hidden: [8]}",
    "ple": "{kind: ple, hidden: [8]}",
    "dcn_v2": "{kind: dcn_v2, hidden: [8]}",
    "dcn_v2_mixture": "{kind: dcn_v2, rank: 4, experts: 2, hidden: [8]}",
}
NUM_STEPS = 60


@pytest.mark.parametrize("kind", get_args(ObjectiveKind))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_trains_with_any_objective(backbone: str, kind: ObjectiveKind) -> None:
    chosen = config(f"objective.kind={kind}", f"model.backbone={BACKBONES[backbone]}")
    objective = build_objective(chosen.objective, base_ctr=0.3)
    head = build_model(schema(), chosen.model, chosen.objective, BaseRates(0.3, 0.5), seed=0).head
    assert isinstance(head, Escm2Head)
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    inputs = torch.randn(256, head.num_inputs, generator=torch.Generator().manual_seed(1))
    click = (inputs[:, 0] > 0.5).float()
    conversion = click * (inputs[:, 1] > 0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.0)
    shares: dict[str, list[float]] = {}
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        terms = objective.terms(head(inputs), click, conversion, torch.ones(256), objective.phase(step), warm_up=False)
        loss, parts = reduce_terms(terms, local_denominators(terms), world_size=1)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for name, share in parts.items():
            shares.setdefault(name, []).append(float(share))
    assert shares["ctr"][-1] < 0.8 * shares["ctr"][0]
    assert all(torch.isfinite(torch.tensor(values)).all() for values in shares.values())
    still = [name for name, parameter in head.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []

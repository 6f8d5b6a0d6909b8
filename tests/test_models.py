"""The dense part of the model: shapes, and who trains whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from escm2rec.models.backbone import Backbone, Mmoe, SharedBottom, SoftmaxGate
from escm2rec.models.dcn_v2 import DcnV2
from escm2rec.models.head import Escm2Head, Task
from escm2rec.models.ple import Ple
from escm2rec.models.predictions import Predictions
from escm2rec.models.tower import Tower
from escm2rec.objectives.objective import Phase, Stage
from escm2rec.objectives.reduction import local_sums, reduce_terms
from tests.objectives_world import make_objective

NUM_INPUTS = 6
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "shared_bottom": lambda: SharedBottom(NUM_INPUTS, (5,)),
    "bare": lambda: SharedBottom(NUM_INPUTS, ()),
    "mmoe": lambda: Mmoe(NUM_INPUTS, 3, (5, 4)),
    "ple": lambda: Ple(NUM_INPUTS, 3, 2, 3, (5, 4)),
    "ple_of_one_level": lambda: Ple(NUM_INPUTS, 1, 2, 3, (5, 4)),
    "dcn_v2": lambda: DcnV2(NUM_INPUTS, 2, None, 1, (5,)),
    "dcn_v2_low_rank": lambda: DcnV2(NUM_INPUTS, 2, 2, 1, ()),
    "dcn_v2_mixture": lambda: DcnV2(NUM_INPUTS, 2, 2, 3, (5,)),
}
WITH_GATES = {"mmoe", "ple", "ple_of_one_level"}


def make_head(backbone: str, imputation: bool = True, trains_shared: bool = False) -> Escm2Head:
    torch.manual_seed(0)
    return Escm2Head(NUM_INPUTS, BACKBONES[backbone](), (7,), {"imputation"} if imputation else (), trains_shared)


def make_inputs(rows: int = 8) -> Tensor:
    return torch.randn(rows, NUM_INPUTS, generator=torch.Generator().manual_seed(1)).requires_grad_()


def step(head: nn.Module, inputs: Tensor, phase: Phase) -> Tensor:
    """Forward, loss and backward of one rank."""
    rows = torch.arange(len(inputs))
    predictions = head(inputs)
    assert isinstance(predictions, Predictions)
    objective = make_objective("escm2-dr", predicts="label")
    terms = objective.terms(predictions, rows % 2, rows % 4 == 1, torch.ones(len(inputs)), Stage(phase))
    loss, _ = reduce_terms(terms, local_sums(terms), world_size=1)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def trained(head: nn.Module) -> set[str]:
    """Parameters that received a gradient, zero or not."""
    return {name for name, parameter in head.named_parameters() if parameter.grad is not None}


def imputation_names(head: nn.Module) -> set[str]:
    return {name for name, _ in head.named_parameters() if name.startswith("imputation.")}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("rows", [0, 1, 8])
def test_logits_are_one_a_row(backbone: str, rows: int) -> None:
    predictions = make_head(backbone)(make_inputs(rows))
    assert [logit.shape for logit in predictions[:3]] == [(rows,)] * 3
    assert predictions[3:] == (None, None, None)
    assert make_head(backbone, imputation=False)(make_inputs(rows)).imputation_logit is None


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_empty_batch_has_a_backward(backbone: str) -> None:
    # A rank whose share of a batch is empty takes part in the step all the same.
    head = make_head(backbone)
    assert step(head, make_inputs(0), "joint") == 0
    grads = [parameter.grad for parameter in head.parameters()]
    assert len(grads) > 10
    assert all(grad is not None and (grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_imputation_phase_trains_the_imputation_part_alone(backbone: str) -> None:
    head, inputs = make_head(backbone), make_inputs()
    step(head, inputs, "imputation")
    assert trained(head) == imputation_names(head)
    assert inputs.grad is None
    assert head.imputation is not None
    assert len(imputation_names(head)) == len(list(head.imputation.parameters()))
    assert any("gate" in name for name in imputation_names(head)) is (backbone in WITH_GATES)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cvr_phase_trains_all_but_the_imputation_part(backbone: str) -> None:
    head, inputs = make_head(backbone), make_inputs()
    step(head, inputs, "cvr")
    assert trained(head) == {name for name, _ in head.named_parameters()} - imputation_names(head)
    assert inputs.grad is not None


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("imputation", [True, False])
def test_every_main_parameter_has_a_task_that_trains_it(backbone: str, imputation: bool) -> None:
    # Otherwise DDP, which looks for unused parameters only where an objective has parts, would wait for their gradients.
    head, inputs = make_head(backbone, imputation), make_inputs()
    predictions = head(inputs)
    (predictions.ctr_logit.sum() + predictions.cvr_logit.sum()).backward()
    assert trained(head) == {name for name, _ in head.named_parameters()} - imputation_names(head)
    assert bool(imputation_names(head)) is imputation


@pytest.mark.parametrize("backbone", BACKBONES)
def test_further_towers_share_no_parameter(backbone: str) -> None:
    head, inputs = make_head(backbone, imputation=False), make_inputs()
    towers = [Task(head.backbone.gate(), Tower(head.backbone.num_outputs, (7,))) for _ in range(2)]
    shared = head.backbone(inputs)
    towers[0](inputs.detach(), shared.detach()).sum().backward()
    assert trained(towers[0]) == {name for name, _ in towers[0].named_parameters()}
    assert trained(towers[1]) == trained(head) == set()
    assert inputs.grad is None


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_main_logits_do_not_depend_on_further_towers(backbone: str) -> None:
    inputs = make_inputs()
    with_it, without = make_head(backbone)(inputs), make_head(backbone, imputation=False)(inputs)
    assert torch.equal(with_it.ctr_logit, without.ctr_logit)
    assert torch.equal(with_it.cvr_logit, without.cvr_logit)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_traced_head_computes_the_same(backbone: str) -> None:
    # TorchRec's pipelines trace what holds tables and leave the head whole; it does not depend on that.
    head = make_head(backbone)
    traced = torch.fx.symbolic_trace(head)
    for rows in (0, 8):
        for seen, expected in zip(traced(make_inputs(rows))[:3], head(make_inputs(rows))[:3], strict=True):
            assert torch.equal(seen, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_joint_phase_keeps_the_imputation_loss_out_of_the_shared_part(backbone: str) -> None:
    joint, alone = make_head(backbone), make_head(backbone)
    inputs, same_inputs = make_inputs(), make_inputs()
    step(joint, inputs, "joint")
    step(alone, same_inputs, "cvr")
    for (name, left), right in zip(joint.named_parameters(), alone.parameters(), strict=True):
        if not name.startswith("imputation."):
            assert left.grad is not None
            assert right.grad is not None
            assert torch.equal(left.grad, right.grad), name
    assert inputs.grad is not None
    assert same_inputs.grad is not None
    assert torch.equal(inputs.grad, same_inputs.grad)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_imputation_may_train_the_shared_part_when_asked(backbone: str) -> None:
    head, inputs = make_head(backbone, trains_shared=True), make_inputs()
    step(head, inputs, "imputation")
    assert trained(head) == imputation_names(head) | {name for name, _ in head.named_parameters() if name.startswith("backbone.")}
    assert inputs.grad is not None
    assert inputs.grad.abs().sum() > 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_further_towers_train_what_they_may(backbone: str) -> None:
    """The propensity tower nothing but itself, the counterfactual tower the shared part too; each is named after its task."""
    torch.manual_seed(0)
    head = Escm2Head(NUM_INPUTS, BACKBONES[backbone](), (7,), {"counterfactual", "propensity"}, keeps_inputs=True)
    assert head.imputation is None
    for task, shares in (("propensity", False), ("counterfactual", True)):
        head.zero_grad(set_to_none=True)
        inputs = make_inputs()
        predictions = head(inputs)
        assert predictions.inputs is inputs
        getattr(predictions, f"{task}_logit").sum().backward()
        own = {name for name, _ in head.named_parameters() if name.startswith(f"{task}.")}
        assert own
        assert own <= trained(head)
        assert (trained(head) == own and inputs.grad is None) is not shares
        assert not any(name.startswith(("ctr.", "cvr.")) for name in trained(head))


@pytest.mark.parametrize("backbone", sorted(WITH_GATES))
def test_held_parameters_stay_bit_identical_under_adam(backbone: str) -> None:
    # A gradient of zero would not do: Adam's momentum would go on moving them.
    head, inputs = make_head(backbone), make_inputs()
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.1)
    step(head, inputs, "joint")
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    optimizer.zero_grad()
    step(head, inputs, "imputation")
    optimizer.step()
    moved = {name for name, parameter in head.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == imputation_names(head)


def test_each_task_has_a_gate_of_its_own() -> None:
    head, inputs = make_head("mmoe"), make_inputs()
    gates = [task.gate for task in (head.ctr, head.cvr, head.imputation) if task is not None]
    shares = [gate.shares(inputs) for gate in gates if isinstance(gate, SoftmaxGate)]
    assert len(shares) == 3
    for share in shares:
        assert share.shape == (8, 3)
        torch.testing.assert_close(share.sum(dim=1), torch.ones(8))
    assert not torch.equal(shares[0], shares[1])


def test_mixture_is_the_gated_sum_of_the_experts() -> None:
    backbone = Mmoe(NUM_INPUTS, 3, (5,))
    gate, inputs = backbone.gate(), make_inputs()
    expected = sum(gate.shares(inputs)[:, [index]] * expert(inputs) for index, expert in enumerate(backbone.experts))
    torch.testing.assert_close(gate(inputs, backbone(inputs)), expected)


def test_shared_bottom_without_layers_is_the_identity() -> None:
    backbone, inputs = SharedBottom(NUM_INPUTS, ()), make_inputs()
    assert torch.equal(backbone.gate()(inputs, backbone(inputs)), inputs)
    assert (backbone.num_outputs, list(backbone.parameters())) == (NUM_INPUTS, [])


def test_tower_without_layers_is_linear() -> None:
    tower, inputs = Tower(NUM_INPUTS, ()), make_inputs()
    torch.testing.assert_close(tower(inputs), inputs @ tower.output.weight[0] + tower.output.bias)


def test_base_rates_are_where_training_starts() -> None:
    head = make_head("shared_bottom")
    for task in (head.ctr, head.cvr):
        nn.init.zeros_(task.tower.output.weight)
    head.set_base_rates(ctr=0.04, cvr=0.005, imputes_labels=False)
    predictions = head(make_inputs())
    torch.testing.assert_close(torch.sigmoid(predictions.ctr_logit), torch.full((8,), 0.04))
    torch.testing.assert_close(torch.sigmoid(predictions.cvr_logit), torch.full((8,), 0.005))


@pytest.mark.parametrize("rate", [0.0, 1.0, float("nan")])
def test_base_rates_have_a_logit(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        make_head("bare").set_base_rates(ctr=0.1, cvr=rate, imputes_labels=False)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_same_seed_gives_the_same_head(backbone: str) -> None:
    for left, right in zip(make_head(backbone).parameters(), make_head(backbone).parameters(), strict=True):
        assert torch.equal(left, right)


def test_alternation_works_under_ddp(tmp_path: Path) -> None:
    # Half of the parameters have no gradient in each phase: DDP must neither wait for them nor invent zeros.
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        head = make_head("mmoe")
        ddp = DistributedDataParallel(head, find_unused_parameters=True)
        phases: tuple[Phase, ...] = ("cvr", "imputation", "cvr")
        for phase in phases:
            ddp.zero_grad(set_to_none=True)
            step(ddp, make_inputs(), phase)
            names = imputation_names(head)
            assert trained(head) == (names if phase == "imputation" else {name for name, _ in head.named_parameters()} - names)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("imputes_labels", [False, True])
def test_imputed_labels_start_at_the_base_rate(imputes_labels: bool) -> None:
    head = make_head("bare")
    assert head.imputation is not None
    before = head.imputation.tower.output.bias.item()
    head.set_base_rates(ctr=0.04, cvr=0.005, imputes_labels=imputes_labels)
    after = head.imputation.tower.output.bias.item()
    assert after == (pytest.approx(math.log(0.005 / 0.995)) if imputes_labels else before)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_rounds_what_layers_multiply_and_no_logit(backbone: str) -> None:
    exact, rounded = make_head(backbone), make_head(backbone)
    rounded.in_bfloat16 = True
    rate = 0.004
    for head in (exact, rounded):
        head.set_base_rates(0.04, rate, imputes_labels=True)
    inputs = make_inputs()
    seen, want = rounded(inputs.to(torch.bfloat16)), exact(inputs)
    for logits, expected in zip(seen[:3], want[:3], strict=True):
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, expected, atol=0.05)
    assert not torch.equal(seen.cvr_logit, want.cvr_logit)
    torch.stack(seen[:3]).sum().backward()  # type: ignore[no-untyped-call]
    grads = [parameter.grad for parameter in rounded.parameters() if parameter.grad is not None]
    assert {grad.dtype for grad in grads} == {torch.float32}
    # Where nothing but the bias is left, its rate is exact: bfloat16 has no number between 0.00396 and 0.00409 there.
    with torch.no_grad():
        rounded.cvr.tower.output.weight.zero_()
    assert torch.sigmoid(rounded(inputs).cvr_logit).tolist() == pytest.approx([rate] * len(inputs), rel=1e-5)

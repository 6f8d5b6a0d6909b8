"""Tables that every rank holds whole: their steps are those that FBGEMM takes, and no row moves that no impression has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch.nn.functional import embedding_bag

from escm2rec.config import TrainingConfig
from escm2rec.models.embeddings import PooledEmbeddings
from escm2rec.schema import Feature
from escm2rec.sharding.model import shard_model, whole_tables
from escm2rec.sharding.runtime import distributed_runtime
from escm2rec.training.whole_tables import WholeTables

ROWS, UNSEEN, DIM, BATCH, LENGTH = 50, 5, 8, 20, 3
NAME = "model.embeddings.collection.embedding_bags.tags.weight"
FUSED = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


def whole(kind: str, weight: Tensor) -> tuple[torch.nn.Parameter, WholeTables]:
    table = torch.nn.Parameter(weight.clone())
    return table, WholeTables({NAME: table}, TrainingConfig.model_validate({"sparse_optimizer": kind}))


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Ids, some more than once in an impression, and gradients of what is pooled, which grow from where the epsilon decides."""
    made = torch.Generator().manual_seed(3)
    ids = torch.randint(0, ROWS - UNSEEN, (steps, BATCH, LENGTH), generator=made)
    gradients = torch.randn(steps, BATCH, DIM, generator=made) * torch.logspace(-9, 0, steps)[:, None, None]
    return list(zip(ids, gradients, strict=True))


@pytest.mark.parametrize("kind", FUSED)
def test_steps_are_those_of_fbgemm(kind: str) -> None:
    """At rates that change, as by a schedule; the last rows are in no batch, and stay bit for bit."""
    begin = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))
    fused: Any = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=FUSED[kind], learning_rate=0.0
    )
    (expected,) = fused.split_embedding_weights()
    expected.copy_(begin)
    table, optimizer = whole(kind, begin)
    for number, (ids, gradient) in enumerate(batches(30)):
        rate = 0.5 / (1 + number)
        fused.set_learning_rate(rate)
        fused(ids.flatten(), torch.arange(0, ids.numel() + 1, LENGTH)).backward(gradient)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        embedding_bag(ids, table, mode="sum").backward(gradient)  # type: ignore[no-untyped-call]
        optimizer.step()
        torch.testing.assert_close(table.detach(), expected, rtol=1e-5, atol=2e-6)
    assert float((expected - begin)[:-UNSEEN].abs().min()) > 0, "all others moved"
    assert torch.equal(table[-UNSEEN:], begin[-UNSEEN:])
    theirs = [] if kind == "sgd" else fused.split_optimizer_states()[0]
    for state, other in zip(optimizer.state[table].values(), theirs, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=0)


def test_a_batch_that_trains_nothing_moves_nothing() -> None:
    """There are no gradients then, and none of before."""
    table, optimizer = whole("rowwise_adagrad", torch.ones(ROWS, DIM))
    table.grad = torch.ones(ROWS, DIM)
    optimizer.step()
    (squares,) = (state.clone() for state in optimizer.state[table].values())
    moved = table.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(table, moved)
    assert torch.equal(next(iter(optimizer.state[table].values())), squares)


def test_those_that_the_plan_names_are_wrapped_in_nothing() -> None:
    """DistributedDataParallel would average their gradients too, in an order of its own."""
    features = [Feature(name=name, kind="list", column=name, encoding="hash", num_embeddings=ROWS) for name in ("tags", "words")]
    model = torch.nn.ModuleDict({"embeddings": PooledEmbeddings(features, DIM, torch.device("meta"))})
    settings: dict[str, Any] = {"seed": 0, "init_std": 0.1, "optimizer": "adagrad", "learning_rate": 0.1, "local_batch_size": 4}
    with distributed_runtime() as runtime:
        sharded = shard_model(model, ["tags", "words"], runtime, **settings, forced={"tags": "data_parallel"}, in_bfloat16=False)
        assert list(whole_tables(sharded)) == ["embeddings.collection.embedding_bags.tags.weight"]
        lookups = [each for module in sharded.module.modules() for each in getattr(module, "_lookups", [])]
    assert [type(each).__name__ for each in lookups] == ["GroupedPooledEmbeddingsLookup"] * 2

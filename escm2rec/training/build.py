"""From config and schema to objective and model: the one builder that training, evaluation and scoring share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from escm2rec.config import Config, Lambda, LambdaRamp, ModelConfig, ObjectiveConfig
from escm2rec.errors import ConfigError
from escm2rec.models.backbone import Backbone, Mmoe, SharedBottom
from escm2rec.models.dcn_v2 import DcnV2
from escm2rec.models.embeddings import PooledEmbeddings
from escm2rec.models.head import Escm2Head
from escm2rec.models.model import Escm2Model
from escm2rec.models.ple import Ple
from escm2rec.objectives.estimator import Settings, estimator_of
from escm2rec.objectives.imputation import Imputation
from escm2rec.objectives.objective import Objective
from escm2rec.objectives.weights import Constant, Learned, Ramp, TermWeight
from escm2rec.schema import Schema
from escm2rec.sharding.model import ShardedModel, shard_model
from escm2rec.sharding.runtime import Runtime


@dataclass(frozen=True)
class BaseRates:
    """CTR and clicked CVR of the training split, inside (0, 1)."""

    ctr: float
    cvr: float

    @classmethod
    def of(cls, counts: dict[str, float]) -> BaseRates:
        """From `rows`, `clicks` and `conversions`, weighted or not, with half a count added so that neither rate is 0 or 1."""
        return cls((counts["clicks"] + 0.5) / (counts["rows"] + 1), (counts["conversions"] + 0.5) / (counts["clicks"] + 1))


def build_objective(config: ObjectiveConfig, base_ctr: float) -> Objective:
    """The objective that the config describes, its floor made absolute; ConfigError where its parts do not go together."""
    relative = config.propensity.floor_kind == "relative"
    objective = Objective(
        kind=config.kind,
        lambda_c=_term_weight(config.lambda_c),
        lambda_g=_term_weight(config.lambda_g),
        lambda_imp=config.lambda_imp,
        lambda_balance=config.propensity.balance,
        detach_ctr=config.ctcvr_detach_ctr,
        floor=config.propensity.floor * (base_ctr if relative else 1.0),
        base_ctr=base_ctr,
        settings=Settings(
            imputation=_imputation(config),
            beta=config.two_space_beta,
            consistency=config.dcmt_consistency,
            stability=config.stability,
        ),
        given=config.propensity.cross_fit,
    )
    if objective.given:
        _check_cross_fit(config, objective)
    if config.propensity.calibration != "none" and "propensity" in objective.towers:
        raise ConfigError(
            f"objective.propensity.calibration would undo what the propensity tower of {config.kind} is held to", "set calibration: none"
        )
    if objective.lambda_balance > 0 and not objective.estimator.weighs:
        raise ConfigError(f"objective.propensity.balance has no effect on {config.kind}, which weighs nothing by q", "set it to 0")
    estimator = objective.estimator
    for name, weight, there in (("c", objective.lambda_c, estimator.cvr is not None), ("g", objective.lambda_g, estimator.ctcvr)):
        if isinstance(weight, Learned) and not there:
            raise ConfigError(f"objective.lambda_{name}: learned has nothing to learn from, {config.kind} has no such term", "leave it out")
    if objective.counts_pseudo_labels and not config.imputation.clip_pseudo_labels and isinstance(objective.lambda_c, Learned):
        raise ConfigError(
            f"objective.lambda_c: learned does not go with the pseudo-labels of {config.kind}, whose loss has no lower bound",
            "give lambda_c a number, or set objective.imputation.clip_pseudo_labels: true, or objective.imputation.predicts: error",
        )
    return objective


def _check_cross_fit(config: ObjectiveConfig, objective: Objective) -> None:
    where = "objective.propensity.cross_fit"
    if not objective.estimator.weighs:
        raise ConfigError(f"{where} has no effect on {config.kind}, which weighs nothing by q", "set it to false")
    if "propensity" in objective.towers:
        raise ConfigError(f"{where} gives q from two models, and {config.kind} has a propensity tower of its own", "choose one of them")
    if config.propensity.calibration != "none":
        raise ConfigError(
            f"{where} gives q from two models, which calibration does not reach", "set objective.propensity.calibration: none"
        )


def _imputation(config: ObjectiveConfig) -> Imputation:
    imputation = config.imputation
    estimator = estimator_of(config.kind)
    predicts = imputation.predicts
    if estimator.labels_only and predicts == "error":
        raise ConfigError(f"objective.imputation.predicts: error teaches the CVR tower of {config.kind} nothing", "set it to label")
    for name, asked in (("loss: bce", imputation.loss == "bce"), ("clip_pseudo_labels: true", imputation.clip_pseudo_labels)):
        if asked and predicts == "error" and "imputation" in estimator.towers:
            raise ConfigError(
                f"objective.imputation.{name} needs predicts: label: an error is neither a probability nor a label",
                "set objective.imputation.predicts: label, or leave this out",
            )
    return Imputation(
        predicts=predicts,
        weighting=imputation.weighting,
        mse_mixture=imputation.mse_mixture,
        loss=imputation.loss or imputation.default_loss,
        normalise=imputation.normalise,
        clip_pseudo_labels=imputation.clip_pseudo_labels,
        alternate=imputation.alternate,
        cvr_steps=imputation.cvr_steps,
    )


def _term_weight(weight: Lambda) -> TermWeight:
    if isinstance(weight, LambdaRamp):
        return Ramp(weight.start, weight.end, weight.until)
    return Learned() if weight == "learned" else Constant(weight)


def build_model(
    schema: Schema, config: ModelConfig, objective: ObjectiveConfig, rates: BaseRates, seed: int, in_bfloat16: bool = False
) -> Escm2Model:
    """The model with its tables on the meta device; its dense part is the same on every rank, by the seed."""
    embeddings = PooledEmbeddings(schema.tables, config.embedding_dim, torch.device("meta"))
    num_inputs = embeddings.num_outputs + len(schema.numeric)
    needs = build_objective(objective, rates.ctr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Escm2Head(
            num_inputs,
            _backbone(num_inputs, config),
            config.tower_hidden,
            needs.towers,
            imputation_trains_shared=objective.imputation.trains_embedding,
            keeps_inputs=needs.lambda_balance > 0,
            in_bfloat16=in_bfloat16,
        )
    head.set_base_rates(rates.ctr, rates.cvr, imputes_labels=needs.settings.imputation.predicts == "label")
    return Escm2Model(schema.tables, embeddings, head)


def shard(module: nn.Module, schema: Schema, config: Config, runtime: Runtime, followed: Path | None = None) -> ShardedModel:
    """Shard a module that holds the model over the ranks of this job, by a plan that was made before or as the config says."""
    training = config.training
    return shard_model(
        module,
        [feature.name for feature in schema.tables],
        runtime,
        seed=training.seed,
        init_std=config.model.embedding_init_std,
        optimizer=training.sparse_optimizer,
        learning_rate=training.sparse_learning_rate,
        local_batch_size=training.global_batch_size // runtime.world_size,
        forced=training.sharding,
        in_bfloat16=training.in_bfloat16,
        in_half_bytes=training.communication == "half",
        followed=followed,
    )


def _backbone(num_inputs: int, config: ModelConfig) -> Backbone:
    chosen = config.backbone
    if chosen.kind == "shared_bottom":
        return SharedBottom(num_inputs, chosen.hidden)
    if chosen.kind == "mmoe":
        return Mmoe(num_inputs, chosen.experts, chosen.hidden)
    if chosen.kind == "ple":
        return Ple(num_inputs, chosen.levels, chosen.task_experts, chosen.shared_experts, chosen.hidden)
    return DcnV2(num_inputs, chosen.cross_layers, chosen.rank, chosen.experts, chosen.hidden)

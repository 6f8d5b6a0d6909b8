"""The tables of a config and its data set, and what the rest of its model takes."""

from __future__ import annotations

from escm2rec.config import Config
from escm2rec.errors import DataError
from escm2rec.planning.cluster import Cluster
from escm2rec.planning.planner import Request
from escm2rec.planning.popularity import Popularity, popularity_of_vocabulary
from escm2rec.planning.tables import Table
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Feature
from escm2rec.training.build import BaseRates, build_model

LEAST_IDS = 1e-3  # of a feature that is nearly always missing: an estimate of nothing would divide by it
DENSE_COPIES = 4  # weight, gradient and AdamW's two moments, float32


def request_of_config(config: Config, dataset: Dataset, cluster: Cluster) -> Request:
    """What a config asks for: its tables as the data set was measured, its optimizer, batch and forced sharding types."""
    training = config.training
    allowed = {name: [kind] for name, kind in training.sharding.items()}
    allowed |= {feature.name: ["row_wise"] for feature in dataset.schema.tables if feature.is_managed}
    return Request(
        tables_of(config, dataset),
        cluster,
        max(1, training.global_batch_size // cluster.world_size),
        training.sparse_optimizer,
        allowed=allowed,
        global_batch_size=training.global_batch_size,
        dense_bytes=_dense_bytes(config, dataset),
    )


def tables_of(config: Config, dataset: Dataset) -> list[Table]:
    """Its tables; DataError where the manifest lacks what preprocess measured of them."""
    measured = dataset.manifest.get("features", {})
    tables = []
    for feature in dataset.schema.tables:
        factor = measured.get(feature.name, {}).get("pooling_factor")
        if factor is None:
            raise DataError(
                f"{dataset.path}: the manifest says no pooling factor of feature {feature.name!r}", "preprocess again: it is measured there"
            )
        tables.append(
            Table(
                name=feature.name,
                rows=feature.num_embeddings,
                dimension=config.model.embedding_dim,
                pooling_factor=max(factor, LEAST_IDS),
                weighted=feature.kind == "weighted_list",
                popularity=_popularity(dataset, feature),
            )
        )
    return tables


def _popularity(dataset: Dataset, feature: Feature) -> Popularity:
    """By the counts of a vocabulary; of hashed and managed rows nothing was counted."""
    if feature.encoding != "vocabulary":
        return ()
    oov = dataset.manifest["features"][feature.name].get("oov", {}).get("train") or 0.0
    path = dataset.path / "vocabulary" / f"{feature.name}.parquet"
    return popularity_of_vocabulary(path, feature.num_embeddings, feature.oov_rows, oov)


def _dense_bytes(config: Config, dataset: Dataset) -> int:
    rates = BaseRates.of(dataset.weighted_counts("train"))
    model = build_model(dataset.schema, config.model, config.objective, rates, config.training.seed)
    numbers = sum(parameter.numel() for name, parameter in model.named_parameters() if ".embedding_bags." not in name)
    return 4 * numbers * (DENSE_COPIES + (config.training.ema_decay is not None))

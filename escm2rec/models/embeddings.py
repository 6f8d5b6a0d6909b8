"""Embedding tables, one a feature, pooled per impression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from escm2rec.reader.batch import Batch, tables_by_batch
from escm2rec.schema import Feature
from escm2rec.sharding.managed import managed_tables


class PooledEmbeddings(nn.Module):
    """One table a feature: ids in, one vector of `dim` an impression and feature out.

    Features with weights live in a collection of their own, because weights cost every lookup of a collection, and so do managed ones,
    whose ids are no rows yet. On the meta device no memory is taken: sharding gives each rank its part.
    """

    def __init__(self, tables: Sequence[Feature], dim: int, device: torch.device) -> None:
        super().__init__()
        self.num_outputs = dim * len(tables)
        unweighted, weighted, managed = tables_by_batch(tables)
        self.collection = EmbeddingBagCollection(_configs(unweighted, dim), device=device) if unweighted else None
        self.weighted_collection = EmbeddingBagCollection(_configs(weighted, dim), is_weighted=True, device=device) if weighted else None
        self.managed_collection = managed_tables(_configs(managed, dim), device) if managed else None

    def forward(self, batch: Batch) -> list[KeyedTensor]:
        """Pooled embeddings, a KeyedTensor a collection. Traced by TorchRec's pipelines: no branch on data here."""
        pooled = []
        if self.collection is not None:
            pooled.append(self.collection(batch.features))
        if self.weighted_collection is not None:
            pooled.append(self.weighted_collection(batch.weighted_features))
        if self.managed_collection is not None:
            pooled.append(self.managed_collection(batch.managed_features)[0])
        return pooled


class ConcatenatedInputs(nn.Module):
    """Pooled embeddings by feature name, then numeric features: [B, num_outputs].

    By name, because the order inside a sharded KeyedTensor changes with the plan. Tables sum, and means are made here: TorchRec's own mean
    of weighted values is another one when a table is sharded by rows than when it is not (1.8.0). The precision is that of the tables'
    outputs.
    """

    def __init__(self, tables: Sequence[Feature]) -> None:
        super().__init__()
        self.names = [feature.name for feature in tables]
        self.mean_names = {feature.name for feature in tables if feature.is_list and feature.pooling == "mean"}

    def forward(self, pooled: list[KeyedTensor], batch: Batch) -> Tensor:
        """Concatenate in the order of the schema; a mean is over the number of values, weighted or not, and 0 of none."""
        by_name = {name: tensor for keyed in pooled for name, tensor in keyed.to_dict().items()}
        for ids in (batch.features, batch.weighted_features, batch.managed_features):
            if ids is not None:
                lengths = ids.lengths().view(len(ids.keys()), -1, 1).clamp(min=1)
                by_name |= {name: by_name[name] / lengths[index] for index, name in enumerate(ids.keys()) if name in self.mean_names}
        parts = [by_name[name] for name in self.names]
        return torch.cat([*parts, batch.numeric.to(parts[0].dtype)], dim=1)


def _configs(tables: Sequence[Feature], dim: int) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=feature.name,
            embedding_dim=dim,
            num_embeddings=feature.num_embeddings,
            feature_names=[feature.name],
            pooling=PoolingType.SUM,
        )
        for feature in tables
    ]

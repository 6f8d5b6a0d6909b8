"""The whole network: tables, then everything dense."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from escm2rec.models.embeddings import ConcatenatedInputs, PooledEmbeddings
from escm2rec.models.predictions import Predictions
from escm2rec.reader.batch import Batch
from escm2rec.schema import Feature


class Escm2Model(nn.Module):
    """Impressions in, logits out. It does not know whether its tables are sharded."""

    def __init__(self, tables: Sequence[Feature], embeddings: PooledEmbeddings, head: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.inputs = ConcatenatedInputs(tables)
        self.head = head

    def forward(self, batch: Batch) -> Predictions:
        """Logits of B impressions."""
        predictions: Predictions = self.head(self.inputs(self.embeddings(batch), batch))
        return predictions

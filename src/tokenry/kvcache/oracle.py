"""Oracle: the tokens that get the most attention, found by looking at all of them. The ceiling of retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenry.kvcache.engine import RetrievalPolicy, TokenLayer


@dataclass(frozen=True, kw_only=True)
class Oracle(RetrievalPolicy):
    """Attend to the tokens of the largest true attention logits at each step.

    It computes all logits first, so it saves nothing; no other choice of as many tokens keeps more attention.

    Args:
        budget: Slots that a decode step attends to in each layer and head; of equal ones the earlier are chosen.
        per: ``"query"``: every query head chooses for itself; ``"kv"``: the query heads of a KV head share a choice, by
            the sum of their probabilities.
        dense_layers: First layers that attend to everything.
    """

    per: Literal["query", "kv"] = "query"
    dense_layers: int = 0

    def validate(self) -> None:
        self.check("dense_layers", "at least 0", self.dense_layers >= 0)
        super().validate()

    def retrieve(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        return None if layer.number < self.dense_layers else super().retrieve(layer, query, visible)

    def largest(self, score: Tensor, count: int) -> tuple[Tensor, Tensor]:
        # A query of zeros ties with every key; what it attends to must not depend on how it came.
        values, slots = score.sort(dim=-1, descending=True, stable=True)
        return values[..., :count], slots[..., :count]

    def score(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> Tensor:
        keys, _ = layer.held()
        batch, heads, rows, dim = query.shape
        kv_heads = keys.shape[1]
        packed = query.reshape(batch, kv_heads, -1, dim)
        logits = torch.matmul(packed, keys.transpose(-1, -2))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.per == "query":
            return logits.view(batch, heads, rows, -1)
        logits = logits.view(batch, kv_heads, heads // kv_heads, rows, -1) * layer.scaling
        if visible is not None:
            logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
        return logits.softmax(-1).sum(2)

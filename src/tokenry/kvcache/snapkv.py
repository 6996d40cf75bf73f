"""A SnapKV-style window: what the newest queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenry.kvcache.engine import AttentionRows, CachePolicy, TokenLayer, age_first


@dataclass(frozen=True, kw_only=True)
class SnapKV(CachePolicy):
    """Keep the newest tokens and those that the newest queries attend to (SnapKV, arXiv 2404.14469, section 4).

    A prompt's score is the mean attention of its last ``window`` queries over the query heads of each KV head, pooled
    over neighbouring slots. The paper compresses the prompt alone and lets the cache grow; here the budget holds in
    decoding too: each later query takes part in the mean with a weight of ``1 / window``, and what it adds is not
    pooled. A further turn shorter than the window takes the place of as many of its queries.

    Args:
        budget: Slots a layer and KV head after every forward, the window included.
        window: Queries that judge, and newest tokens that always stay (the paper's 32).
        kernel: Width of the pooling in slots, odd; 1 does without (the official code's 5).
        pooling: ``"mean"`` as in the official code, or ``"max"``.
    """

    needs_attention: ClassVar[bool] = True
    sums: ClassVar[bool] = False
    ordered: ClassVar[bool] = False

    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    def validate(self) -> None:
        self.check("window", "at least 1", self.window >= 1)
        self.check("kernel", "an odd number of at least 1", self.kernel >= 1 and self.kernel % 2 == 1)
        super().validate()

    def protected(self) -> int:
        return self.window

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros(positions.shape[0], heads, positions.shape[1], device=positions.device)}

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        share = 1 / (self.window * rows.groups)
        if rows.count == 1 or layer.pending is not None:
            ages, counts = rows.ages()
            fade = 1 - 1 / self.window
            faded = layer.state["mean"] * (fade**counts)[:, None, None]
            layer.state["mean"] = faded + rows.column_sums(fade**ages) * share
            return
        start = max(0, rows.count - self.window)
        added = self._judged(layer, rows, start) * share
        if rows.valid is None:
            faded = layer.state["mean"] * (1 - (rows.count - start) / self.window)
        else:
            faded = layer.state["mean"] * (1 - rows.valid[:, start:].sum(-1) / self.window)[:, None, None]
        layer.state["mean"] = faded + added

    def _judged(self, layer: TokenLayer, rows: AttentionRows, start: int) -> Tensor:
        """What the queries from row ``start`` on give to each slot, ``[batch, kv_heads, slots]``, summed and pooled."""
        return self._pooled(layer, rows.rows(start).sum(2))

    def _pooled(self, layer: TokenLayer, attention: Tensor) -> Tensor:
        """``[batch, kv_heads, ..., slots]`` pooled over neighbours; the window stays apart, as it is kept anyway."""
        valid, positions = layer.slots.materialise(layer.cache.batch, layer.device)
        near = positions >= layer.cache.seen_after[:, None, None] - self.window
        # Neighbours in time: after tokens were dropped, slots may stand in any order.
        order = positions.masked_fill(~valid, -1).argsort(dim=-1, stable=True)
        if attention.ndim == 4:
            near, order = near[:, :, None], order[:, :, None]
        order = order.expand_as(attention)
        pool = F.avg_pool1d if self.pooling == "mean" else F.max_pool1d
        far = attention.masked_fill(near, 0).gather(-1, order)
        far = pool(far.flatten(1, -2), self.kernel, stride=1, padding=self.kernel // 2).view_as(attention)
        return torch.where(near, attention, torch.zeros_like(attention).scatter_(-1, order, far))

    def keep(self, layer: TokenLayer) -> Tensor | None:
        budget = int(self.budget)
        if self.pooling == "mean" or layer.size <= budget:
            return super().keep(layer)
        # The largest of neighbours is the score of each: of equal ones the oldest stay, whatever stands beside them.
        order = self._masked_score(layer).argsort(dim=-1, descending=True, stable=True)
        return order[..., :budget].sort(-1).values

    def score(self, layer: TokenLayer) -> Tensor:
        return layer.state["mean"].masked_fill(age_first(layer, self.window), float("inf"))

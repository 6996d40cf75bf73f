"""FastKV: the later layers read a prompt's salient tokens alone, and every layer keeps slots of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenry.errors import BadParameter
from tokenry.kvcache.engine import AttentionRows, TokenLayer
from tokenry.kvcache.snapkv import SnapKV
from tokenry.models import Rows, TokenCache


@dataclass(frozen=True, kw_only=True)
class FastKV(SnapKV):
    """Run the first layers on the whole prompt and pass only its salient tokens to the rest (arXiv 2502.01068).

    What the prompt's last ``window`` queries attend to at one layer decides which tokens go on behind it (section 3.2,
    equations 1 and 2). Every layer then keeps its budget, chosen for each KV head as SnapKV does, of the tokens that it
    has read, at the positions they have in the text. A prompt that fits the budget is neither cut nor passed on in
    part; a batch row is counted by its own tokens.

    The paper compresses the prompt alone and lets the cache grow; here the budget holds in decoding too, as SnapKV's
    does. Only the first forward of a cache is shortened: later chunks of a prompt and further turns run through all
    layers. The prompt's outputs are NaN where a token did not go on, its last ``window`` ones are not.
    ``cache.computed_share()`` says how much of the prompt the layers have read. Sliding-window layers behind the layer
    see of their windows what goes on.

    Args:
        budget: Slots of each layer and KV head, the window included; the paper runs shares of 0.1 and 0.2, and 512.
        propagated: Tokens that go on, the window included, as a count (the paper's 2048) or a share of the prompt;
            never fewer than the budget, as later layers cannot keep what they have not read.
        layer: Number of the last layer that reads everything. None: halfway, as in the paper (15 of 32 layers, counted
            from 0), or the nearest before it, else behind it, that attends in full.
        window: Queries that judge, and newest tokens that always stay.
        kernel: Width of the pooling in slots, odd; 1 does without.
        pooling: ``"max"`` as in the paper's runs, or ``"mean"``; each query head's scores are pooled before they are
            summed.
    """

    skips: ClassVar[bool] = True

    budget: int | float = 0.1
    propagated: int | float = 0.2
    layer: int | None = None
    window: int = 8
    kernel: int = 7
    pooling: Literal["mean", "max"] = "max"

    def validate(self) -> None:
        if isinstance(self.propagated, float):
            self.check("propagated", "a count, or a share above 0 and at most 1", 0 < self.propagated <= 1)
        else:
            self.check("propagated", "at least 1", self.propagated >= 1)
        self.check("layer", "at least 0, or none", self.layer is None or self.layer >= 0)
        super().validate()

    def cut_layer(self, cache: TokenCache) -> int:
        """The layer behind which only salient tokens go on."""
        full = [layer.number for layer in cache.layers if layer.window is None]
        if self.layer is None:
            middle = max(0, len(cache.layers) // 2 - 1)
            return next((number for number in reversed(full) if number <= middle), full[0])
        if self.layer not in full:
            raise BadParameter(
                f"{self.slug}: layer={self.layer} is not allowed; layer must be one of the layers of this model that "
                f"attend in full ({', '.join(map(str, full))})"
            )
        return self.layer

    def _judged(self, layer: TokenLayer, rows: AttentionRows, start: int) -> Tensor:
        attention = rows.logits(start).softmax(-1)
        if rows.valid is not None:
            attention = attention * rows.valid[:, None, None, start:, None]
        return self._pooled(layer, attention.sum(3)).sum(2)

    def passes(self, layer: TokenLayer, rows: AttentionRows | None) -> Rows | None:
        cache = layer.cache
        if cache.total > 0 or cache.new == 1 or layer.number != self.cut_layer(cache):
            return None
        budgets = layer.budgets()
        lengths = cache.seen_after.tolist()
        if len(budgets) == 1:
            budgets = budgets * len(lengths)
        counts = [self._count(length, budget) for length, budget in zip(lengths, budgets, strict=True)]
        if counts == lengths:
            return None
        # Slots stand as the rows of the prompt do: nothing was dropped yet.
        score = layer.state["mean"].sum(1)
        positions = layer.slots.places(cache.batch, layer.device)[:, 0]
        score = score.masked_fill(positions >= cache.seen_after[:, None] - self.window, float("inf"))
        if layer.slots.valid is not None:
            score = score.masked_fill(~layer.slots.valid[:, 0], float("-inf"))
        order = score.argsort(dim=-1, descending=True, stable=True)
        best = torch.arange(cache.new, device=layer.device) < torch.tensor(counts, device=layer.device)[:, None]
        return Rows.chosen(cache, torch.zeros_like(best).scatter_(1, order, best), positions)

    def _count(self, length: int, budget: int) -> int:
        """Tokens of a prompt that go on."""
        if length <= budget:
            return length
        count = int(self.propagated * length) if isinstance(self.propagated, float) else self.propagated
        return min(length, max(count, budget))

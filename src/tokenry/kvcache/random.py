"""A random choice of the past beside the newest tokens: the baseline that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenry.kvcache.engine import CachePolicy, TokenLayer, age_first, part, scramble


@dataclass(frozen=True, kw_only=True)
class Random(CachePolicy):
    """Keep the newest tokens and a uniform random sample of the others.

    Each token draws its priority once, from its position, its layer, its head and ``seed``, so that a token that was
    dropped could not have been kept by drawing again, and a row does not depend on its batch.

    Args:
        budget: Slots a layer and KV head after every forward, the newest included.
        recent: Share of the budget that the newest tokens hold.
        seed: Seed of the priorities, of which the lowest 32 bits count.
    """

    ordered: ClassVar[bool] = False

    recent: float = 0.5
    seed: int = 0

    def validate(self) -> None:
        self.check("recent", "between 0 and 1", 0 <= self.recent <= 1)
        super().validate()

    def protected(self) -> int:
        return part(self.recent, int(self.budget))

    def least(self) -> int:
        return 1

    def score(self, layer: TokenLayer) -> Tensor:
        batch, heads = layer.shape
        # A number of its own for each position and head, so that one draw serves heads that hold different tokens.
        head = torch.arange(heads, device=layer.device)[:, None]
        numbers = layer.slots.places(batch, layer.device) * heads + head
        salt = (self.seed * 2_654_435_761 + (layer.number + 1) * 2_246_822_519) & 0xFFFF_FFFF
        priority = scramble(numbers.flatten(1), 1, salt).view(batch, heads, -1)
        return priority.masked_fill(age_first(layer, self.protected()), float("inf"))

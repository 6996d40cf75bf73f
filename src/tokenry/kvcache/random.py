"""A random choice of the past beside the newest tokens: the baseline that every score has to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenry.kvcache.engine import CachePolicy, TokenLayer, age_first, scramble


@dataclass(frozen=True, kw_only=True)
class Random(CachePolicy):
    """Keep the newest tokens and a uniform random sample of the others.

    Each token draws its priority once, from its position, its head and ``seed``, so that a token that was dropped
    could not have been kept by drawing again, and a row does not depend on its batch.

    Args:
        budget: Slots a layer and KV head after every forward, the newest included.
        recent: Share of the budget that the newest tokens hold.
        seed: Seed of the priorities.
    """

    ordered: ClassVar[bool] = False

    recent: float = 0.5
    seed: int = 0

    def validate(self) -> None:
        self.check("recent", "between 0 and 1", 0 <= self.recent <= 1)
        super().validate()

    def protected(self) -> int:
        return math.floor(self.recent * self.budget)

    def least(self) -> int:
        return 1

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        return {"priority": scramble(positions, heads, self.seed)}

    def score(self, layer: TokenLayer) -> Tensor:
        return layer.state["priority"].masked_fill(age_first(layer, self.protected()), float("inf"))

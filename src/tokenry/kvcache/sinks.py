"""Attention sinks: the first tokens and the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tokenry.kvcache.engine import CachePolicy, TokenLayer


@dataclass(frozen=True, kw_only=True)
class Sinks(CachePolicy):
    """Keep the first tokens and the newest (StreamingLLM, arXiv 2309.17453).

    Args:
        budget: Slots a layer and KV head after every forward, sinks included.
        sinks: First tokens that always stay (the paper's 4).
        positions: ``"rolling"`` counts positions over the held tokens, as the paper does to run on without end;
            ``"original"`` leaves every token where it stood.
    """

    ordered: ClassVar[bool] = False

    sinks: int = 4
    positions: Literal["original", "rolling"] = "original"

    def validate(self) -> None:
        self.check("sinks", "at least 0", self.sinks >= 0)
        super().validate()

    def protected(self) -> int:
        return self.sinks

    def score(self, layer: TokenLayer) -> Tensor:
        positions = layer.slots.places(layer.cache.batch, layer.device)
        return positions.float().masked_fill(positions < self.sinks, float("inf"))

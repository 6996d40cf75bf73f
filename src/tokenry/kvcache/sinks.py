"""Attention sinks: the first tokens and the newest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenry.kvcache.engine import CachePolicy, TokenLayer


@dataclass(frozen=True, kw_only=True)
class Sinks(CachePolicy):
    """Keep the first tokens and the newest (StreamingLLM, arXiv 2309.17453), at their original positions.

    Args:
        budget: Slots a layer and KV head after every forward, sinks included.
        sinks: First tokens that always stay (the paper's 4).
    """

    sinks: int = 4

    def validate(self) -> None:
        self.check("sinks", "at least 0", self.sinks >= 0)
        super().validate()

    def protected(self) -> int:
        return self.sinks

    def score(self, layer: TokenLayer) -> Tensor:
        _, positions = layer.slots.materialise(layer.cache.batch, layer.device)
        return positions.float().masked_fill(positions < self.sinks, float("inf"))

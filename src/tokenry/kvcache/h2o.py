"""H2O: the newest tokens and the heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenry.kvcache.engine import AttentionRows, CachePolicy, TokenLayer, age_first, part


@dataclass(frozen=True, kw_only=True)
class H2O(CachePolicy):
    """Keep the newest tokens and those that collected the most attention (arXiv 2306.14048, section 4).

    Each slot's score is the sum of the attention probabilities it received from all queries so far, and from all
    query heads of its KV head, in float32.

    Args:
        budget: Slots a layer and KV head after every forward, the newest included.
        recent: Share of the budget that the newest tokens hold (the paper's runs: half).
        normalise: ``"count"`` divides a score by the number of queries that could see the slot, which takes away the
            advantage of early tokens; not in the paper.
        decay: Factor of all scores at each new token; 1 in the paper.
        positions: ``"rolling"`` counts positions over the held tokens, as the official streaming runs do.
        variant: ``"real_drop"`` drops slots; ``"mask_simulation"`` keeps them all and hides those that are dropped, as
            the official studies of quality do: the same outputs, and no memory saved.
    """

    needs_attention: ClassVar[bool] = True
    ordered: ClassVar[bool] = False

    recent: float = 0.5
    normalise: Literal["none", "count"] = "none"
    decay: float = 1.0
    positions: Literal["original", "rolling"] = "original"
    variant: Literal["real_drop", "mask_simulation"] = "real_drop"

    @property
    def hides(self) -> bool:
        return self.variant == "mask_simulation"

    def validate(self) -> None:
        self.check("recent", "between 0 and 1", 0 <= self.recent <= 1)
        self.check("decay", "above 0 and at most 1", 0 < self.decay <= 1)
        why = "rolling positions are counted over the slots that are held"
        self.check("variant", "real_drop where positions are rolling", not (self.hides and self.rolling), why=why)
        super().validate()

    def protected(self) -> int:
        return part(self.recent, int(self.budget))

    def least(self) -> int:
        # Without heavy hitters the newest tokens may hold the whole budget.
        return 1

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        return {"mass": torch.zeros(positions.shape[0], heads, positions.shape[1], device=positions.device)}

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        if self.decay == 1:
            layer.state["mass"] = layer.state["mass"] + rows.column_sums()
            return
        # Each row of the batch decays by its own number of new tokens.
        ages, counts = rows.ages()
        faded = layer.state["mass"] * (self.decay**counts)[:, None, None]
        layer.state["mass"] = faded + rows.column_sums(self.decay**ages)

    def score(self, layer: TokenLayer) -> Tensor:
        mass = layer.state["mass"]
        if self.normalise == "count":
            positions = layer.slots.places(layer.cache.batch, layer.device)
            mass = mass / (layer.cache.seen_after[:, None, None] - positions).clamp(min=1)
        return mass.masked_fill(age_first(layer, self.protected()), float("inf"))

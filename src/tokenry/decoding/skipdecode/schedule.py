"""Which layers run for which token: a budget that never grows, so that no token misses another's keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tokenry.errors import BadParameter

Shape = Literal["linear", "power"]
Exit = Literal["skip", "early"]


@dataclass(frozen=True, kw_only=True)
class SkipSchedule:
    """Active layers by index of the token that is fed: 0 for the prompt, then 1, 2, ... for what was generated.

    Attributes:
        layers: Layers of the model.
        first: Active layers at index 0.
        last: Active layers from index `horizon - 1` on.
        warmup: Bottom layers that always run.
        horizon: Length of the schedule in tokens.
        shape: `"linear"` between the two, or `"power"`: `first * alpha ** index`, not below `last`.
        alpha: Of the power law.
        exit: `"skip"` leaves out layers between the bottom ones and the top ones; `"early"` the top ones (early
            termination, the baseline).

    Raises:
        BadParameter: The budgets do not fit the model, or would grow.
    """

    layers: int
    first: int
    last: int
    warmup: int = 1
    horizon: int = 128
    shape: Shape = "linear"
    alpha: float = 0.98
    exit: Exit = "skip"

    def __post_init__(self) -> None:
        least = self.warmup + 1 if self.exit == "skip" else 1
        if not least <= self.last <= self.first <= self.layers:
            raise BadParameter(
                f"a schedule from {self.first} to {self.last} active layers is not allowed for {self.layers} layers; "
                f"it must fall, or stay, within {least} to {self.layers}: a token that ran deeper than one before it "
                "would miss the keys of that one, and something must run above the bottom layers"
            )
        if self.warmup < 0 or self.horizon < 1 or not 0 < self.alpha <= 1:
            raise BadParameter(
                f"warmup={self.warmup}, horizon={self.horizon}, alpha={self.alpha} is not allowed; warmup must be at "
                "least 0, horizon at least 1, alpha above 0 and at most 1"
            )

    def budget(self, index: int) -> int:
        """Active layers at an index."""
        if self.shape == "power":
            # Where a power of alpha is a whole number but for the last bit, it is meant to be that number.
            return max(self.last, math.floor(self.first * self.alpha**index + 1e-9))
        share = min(index / (self.horizon - 1), 1.0) if self.horizon > 1 else float(index > 0)
        return math.floor(self.first + (self.last - self.first) * share + 0.5)

    def active(self, index: int) -> tuple[int, ...]:
        """The layers that run at an index, ascending."""
        budget = self.budget(index)
        if self.exit == "early":
            return tuple(range(budget))
        return (*range(self.warmup), *range(self.layers - (budget - self.warmup), self.layers))

    def reach(self, prompt: int, length: int) -> tuple[int, ...]:
        """For each layer how many tokens of a sequence of `length` run through it, of which `prompt` are the prompt:
        the first ones, because budgets never grow."""
        reach = [0] * self.layers
        for position in range(prompt - 1, length):
            for layer in self.active(position - prompt + 1):
                reach[layer] = position + 1
        return tuple(reach)

    def average(self, count: int | None = None) -> float:
        """Mean active layers over the indices 1 to `count`; by default over the horizon."""
        count = self.horizon if count is None else count
        return sum(self.budget(index) for index in range(1, count + 1)) / count

    def speedup(self, count: int | None = None) -> float:
        """How many times fewer layers run while decoding; embedding, head and prompt do not count."""
        return self.layers / self.average(count)

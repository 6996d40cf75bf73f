"""A cache whose model has read less than the rows have committed, and what of it can be handed to a caller."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tokenry.errors import CacheMisuse
from tokenry.models import TokenCache


class PartialCache(TokenCache):
    """A `TokenCache` of which the first columns alone are handed over.

    Sliding-window layers keep everything and hide what is outside the window, so that it can be cut anywhere.

    Attributes:
        complete: Columns that every layer holds of every row as the whole model computed them; None: all of them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.complete: int | None = None
        for layer in self.layers:
            layer.policy, layer.slots = None, self.slots

    @classmethod
    def of(cls, model: PreTrainedModel, cache: TokenCache) -> PartialCache:
        """Take over what a cache without a policy holds, which is empty or all of it in every layer."""
        own = cls(model)
        if cache.batch == 0:
            return own
        for mine, layer in zip(own.layers, cache.layers, strict=True):
            mine._write(*layer.held())
        slots = cache.slots
        own.slots.size, own.slots.valid, own.slots.positions = slots.size, slots.valid, slots.positions
        own.total, own._seen, own._lead, own._ragged = cache.total, cache._seen, cache._lead, cache._ragged
        return own

    def to_dynamic(self, length: int | None = None, first: Tensor | None = None) -> DynamicCache:
        """As of any cache, but no longer than `complete`: a caller goes on from there and feeds the rest."""
        if self.complete is None:
            return super().to_dynamic(length, first)
        if self.complete == 0:
            # Some layers may never have run.
            return DynamicCache(config=self.config)
        return super().to_dynamic(self.complete if length is None else min(length, self.complete), first)


def check_given(name: str, given: Any) -> None:
    """Refuse a `TokenCache` of a caller's own, which would have to be left with less than plain decoding leaves in it.

    Raises:
        CacheMisuse: It is one without a policy.
    """
    if isinstance(given, TokenCache) and given.policy is None:
        raise CacheMisuse(
            f"{name} does not go on in a TokenCache of its caller's: pass a DynamicCache as past_key_values, or "
            "leave it out"
        )

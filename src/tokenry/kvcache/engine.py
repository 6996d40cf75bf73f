"""What every cache policy of the evict kind shares: the budget, the block, and when tokens are dropped.

A policy says which slots are protected and how the others score; the engine keeps the best of each KV head within the
budget. Nothing is dropped before a token's own attention has run: eviction follows the output.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, BudgetTooSmall, CacheMisuse
from tokenry.methods import Method
from tokenry.models import AttentionRows, TokenCache, TokenLayer, attach, detach, policy_block


@dataclass(frozen=True, kw_only=True)
class CachePolicy(Method):
    """A rule for which past tokens stay in the cache.

    ``with policy(model):`` gives every forward of the model inside the block a cache that the policy keeps;
    ``policy.cache(model)`` makes one to pass as ``past_key_values``. Sliding-window layers keep their window; the
    policy rules the full-attention layers. The block holds in the thread that entered it; a thread started inside
    runs without the policy unless it is started with ``contextvars.copy_context().run``.

    Args:
        budget: Slots that each full-attention layer and KV head holds after a forward.
        compact_every: Drop tokens only after tokens whose position is a multiple of this, so up to
            ``compact_every - 1`` further slots are held. Drafters need it above 1.
    """

    role: ClassVar[str] = "policy"
    needs_attention: ClassVar[bool] = False

    budget: int = 256
    compact_every: int = 1

    def validate(self) -> None:
        self.check("compact_every", "at least 1", self.compact_every >= 1)
        least = self.least()
        why = "the protected tokens and one more must fit"
        self.check("budget", f"at least {least}", self.budget >= least, BudgetTooSmall, why)

    def protected(self) -> int:
        """Slots that are kept whatever their score."""
        return 0

    def least(self) -> int:
        """The smallest budget."""
        return self.protected() + 1

    @abstractmethod
    def score(self, layer: TokenLayer) -> Tensor:
        """How much each slot is worth, ``[batch, 1 or kv_heads, slots]``, larger stays; infinite where protected."""

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        """State of new slots, each ``[batch, kv_heads, new]``, from their positions ``[batch, new]``."""
        return {}

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        """Take in the attention of the committed rows (only where ``needs_attention``)."""

    def keep(self, layer: TokenLayer) -> Tensor | None:
        """The slots that stay, ``[batch, kv_heads, budget]`` ascending, or None while all fit."""
        if layer.size <= self.budget:
            return None
        assert layer.keys is not None
        score = self.score(layer).expand(*layer.keys.shape[:2], -1)
        if layer.slots.valid is not None:
            score = score.masked_fill(~layer.slots.valid, float("-inf"))
        return score.topk(self.budget, -1).indices.sort(-1).values

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> AbstractContextManager[PreTrainedModel]:
        """The block in which every forward of ``model`` runs on a cache that this policy keeps.

        Raises:
            UnsupportedModel: The model cannot run on Tokenry's attention.
            CacheMisuse: Another policy is active in this thread.
        """
        if args or kwargs:
            raise BadParameter(
                f"{self} is a cache policy, not a decoding method: write `with {type(self).__name__}(...)(model): "
                "model.generate(...)`, and give a decoder to custom_generate inside the block"
            )
        return policy_block(model, self)

    def cache(self, model: PreTrainedModel) -> TokenCache:
        """A cache to pass as ``past_key_values``; the model stays switched for as long as the cache lives."""
        cache = TokenCache(model, self)
        attach(model)
        cache.on_release = lambda: detach(model)
        return cache


def age_first(layer: TokenLayer, recent: int) -> Tensor:
    """Which slots are among the ``recent`` newest real tokens of their row, ``[batch, 1 or kv_heads, slots]``."""
    valid, positions = layer.slots.materialise(layer.cache.batch, layer.device)
    return valid & (positions >= layer.cache.seen_after[:, None, None] - recent)


def scramble(positions: Tensor, heads: int, seed: int) -> Tensor:
    """A number in [0, 1) for each position and head, ``[batch, heads, new]``, the same in every run and batch."""
    mixed = (
        positions[:, None].to(torch.int64) * 2_654_435_761
        + (torch.arange(heads, device=positions.device)[:, None] + 1) * 40_503
    )
    mixed = mixed + seed * 1_013_904_223
    for shift, factor in ((16, 73_244_475), (15, 73_244_475), (16, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFF_FFFF
    # Not float64, which some accelerators lack.
    return mixed.to(torch.float32) / 2**32


__all__ = ["AttentionRows", "CacheMisuse", "CachePolicy", "TokenLayer", "age_first", "scramble"]

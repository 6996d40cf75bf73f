"""What all cache policies share: the budget, the block, and when tokens are dropped or chosen.

CachePolicy      drops tokens: a policy says which slots are protected and how the others score, and the engine keeps
                 the best of each KV head within the budget. Nothing is dropped before a token's own attention has run:
                 eviction follows the output.
RetrievalPolicy  drops nothing: before the attention of a decode step it chooses the slots that the step attends to.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, BudgetTooSmall, CacheMisuse
from tokenry.methods import Method
from tokenry.models import AttentionRows, Block, Rows, TokenCache, TokenLayer, attach, detach, policy_block


@dataclass(frozen=True, kw_only=True)
class BudgetedPolicy(Method):
    """A rule for which past tokens a model attends to; the base of both kinds.

    ``with policy(model):`` gives every forward of the model inside the block a cache that the policy keeps;
    ``policy.cache(model)`` makes one to pass as ``past_key_values``. Sliding-window layers keep their window; the
    policy rules the full-attention layers. The block holds in the thread that entered it; a thread started inside
    runs without the policy unless it is started with ``contextvars.copy_context().run``.

    Args:
        budget: Slots of each full-attention layer and KV head, as a count, or below 1 as a share of the real tokens of
            each row's prompt (``budget=0.25``), rounded down, at least ``least()``. The prompt ends with the first
            forward of a single token; a prompt in chunks is held to the share of what has come so far.
    """

    role: ClassVar[str] = "policy"
    needs_attention: ClassVar[bool] = False
    # Whether it has a `passes` of its own.
    skips: ClassVar[bool] = False

    budget: int | float = 256

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # As in H2O(model), or custom_generate=H2O.
        if args:
            raise BadParameter(
                f"{cls.__name__} takes its parameters by name, not a {type(args[0]).__name__}: write "
                f"`with {cls.__name__}(budget=...)(model):`, or {cls.__name__}(budget=...).cache(model)"
            )
        return super().__new__(cls)

    def validate(self) -> None:
        if isinstance(self.budget, float):
            self.check("budget", "a count, or a share above 0 and below 1", 0 < self.budget < 1, BudgetTooSmall)
            return
        least = self.least()
        why = "the protected tokens and one more must fit"
        self.check("budget", f"at least {least}", self.budget >= least, BudgetTooSmall, why)

    def least(self) -> int:
        """The smallest budget."""
        return 1

    def layer_budget(self, layer: TokenLayer) -> int | float:
        """The budget of one layer (``layer.number``), as a count or a share; every layer has the same by default."""
        return self.budget

    def slots(self, share: float, length: int) -> int:
        """Slots that a share of ``length`` tokens gives."""
        return max(int(share * length), self.least())

    def prepare(self, model: PreTrainedModel) -> Any:
        """What it needs beside the model, made or loaded for each cache and kept as ``cache.prepared``."""
        return None

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        """Take in the attention of the committed rows (only where ``needs_attention``)."""

    def passes(self, layer: TokenLayer, rows: AttentionRows | None) -> Rows | None:
        """The rows that the layers behind this one run for, asked behind the layer's attention before anything is
        dropped; None: those that it ran for (only where ``skips``)."""
        return None

    def hand_on(self, layer: TokenLayer, rows: Rows, hidden: Tensor) -> Tensor:
        """Hidden states of the rows that go on, ``[batch, rows, size]``, from the output of the layer."""
        return rows.taken(hidden)

    def after(self, model: PreTrainedModel, cache: TokenCache, input_ids: Tensor | None) -> None:
        """Do what is to be done behind a forward of several tokens, a prompt, a chunk of it or a further turn.

        Args:
            model: The model, or the decoder below its head.
            cache: The cache with the forward's tokens in it.
            input_ids: ``[batch, new]``, padding included; None where the model was given embeddings.
        """

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> AbstractContextManager[PreTrainedModel]:
        """The block in which every forward of ``model`` runs on a cache that this policy keeps.

        Raises:
            BadParameter: It was called as a decoder is, or with something else than a model.
            UnsupportedModel: The model cannot run on Tokenry's attention, or not with this policy.
            CacheMisuse: Another policy is active in this thread.
        """
        if args or kwargs:
            raise BadParameter(
                f"{self} is a cache policy, not a decoding method: write `with {type(self).__name__}(...)(model): "
                "model.generate(...)`, and give a decoder to custom_generate inside the block"
            )
        if not isinstance(model, torch.nn.Module):
            name = type(self).__name__
            raise BadParameter(
                f"{name}(...)({model!r}) is not allowed; it takes a loaded model: "
                f"model, tokenizer = tokenry.load(name), then `with {name}(...)(model):`"
            )
        return policy_block(model, self)  # type: ignore[arg-type]

    def cache(self, model: PreTrainedModel) -> TokenCache:
        """A cache to pass as ``past_key_values``; the model stays switched for as long as the cache lives."""
        cache = TokenCache(model, self)  # type: ignore[arg-type]
        attach(model, self)  # type: ignore[arg-type]
        cache.on_release = lambda: detach(model, self)  # type: ignore[arg-type]
        return cache


@dataclass(frozen=True, kw_only=True)
class CachePolicy(BudgetedPolicy):
    """A rule for which past tokens stay in the cache.

    Where a policy has a field ``positions``, ``"original"`` leaves every token at its true position; ``"rolling"``
    counts positions over the tokens that are held, so that a model can run past the length it was trained for. Rolling
    needs rotary positions whose frequencies do not change with the length.

    Args:
        budget: Slots that each full-attention layer and KV head holds after a forward, as a count, or below 1 as a
            share of the real tokens of each row's prompt.
        compact_every: Drop tokens only after every ``compact_every``-th token of a row, its first token counted as 1
            and padding not at all, so up to ``compact_every - 1`` further slots are held. Drafters need it above 1.
    """

    drops: ClassVar[bool] = True
    # Whether `score`, `observe` and `keep` rely on slots in the order of time. Where they do not, a new token takes the
    # slot of the one that goes, which costs a step far less than moving all others.
    ordered: ClassVar[bool] = True

    compact_every: int = 1

    def validate(self) -> None:
        self.check("compact_every", "at least 1", self.compact_every >= 1)
        super().validate()

    @property
    def rolling(self) -> bool:
        return getattr(self, "positions", "original") == "rolling"

    def protected(self) -> int:
        """Slots that are kept whatever their score."""
        return 0

    def least(self) -> int:
        return self.protected() + 1

    def at(self, budget: int) -> CachePolicy:
        """The same policy with a budget that is counted; one with a share is never asked for scores itself."""
        return self if budget == self.budget else dataclasses.replace(self, budget=budget)

    @abstractmethod
    def score(self, layer: TokenLayer) -> Tensor:
        """How much each slot is worth, ``[batch, 1 or kv_heads, slots]``, larger stays; infinite where protected."""

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        """State of new slots, each ``[batch, kv_heads, new]``, from their positions ``[batch, new]``."""
        return {}

    def keep(self, layer: TokenLayer) -> Tensor | None:
        """The slots that stay, ``[batch, kv_heads, budget]`` ascending, or None while all fit. Where heads keep unequal
        numbers: which slots stay, bool ``[batch, kv_heads, slots]``."""
        budget = int(self.budget)
        if layer.size <= budget:
            return None
        return self._masked_score(layer).topk(budget, -1).indices.sort(-1).values

    def victim(self, layer: TokenLayer) -> Tensor:
        """The slot of the smallest score, ``[batch, kv_heads, 1]`` (only where not ``ordered``)."""
        return self._masked_score(layer).argmin(-1, keepdim=True)

    def _masked_score(self, layer: TokenLayer) -> Tensor:
        score = self.score(layer).expand(*layer.shape, -1)
        return score if layer.slots.valid is None else score.masked_fill(~layer.slots.valid, float("-inf"))


@dataclass(frozen=True, kw_only=True)
class RetrievalPolicy(BudgetedPolicy):
    """A rule for which past tokens a decode step attends to; the cache keeps them all.

    A forward of one token behind others, and every row of drafts under verification, retrieves for itself, as if it
    came alone; prompts and further turns attend to everything. Slots of padding, and drafts that a row does not follow,
    are never chosen. ``cache.attended_share()`` says which share of the slots the steps attended to.

    Args:
        budget: Slots that a decode step attends to in each full-attention layer and head, as a count, or below 1 as a
            share of the real tokens of each row's prompt.
    """

    drops: ClassVar[bool] = False
    # Nothing is dropped, so nothing limits how many drafts are verified at once.
    compact_every: ClassVar[int] = 2**30

    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        """What is kept of new keys ``[batch, kv_heads, new, head_dim]`` beside them, each ``[batch, kv_heads, new,
        size]``; read with ``layer.indexed(name)``. Drafts are indexed too, and their entries go where they go."""
        return {}

    def settled(self, layer: TokenLayer) -> None:
        """Take in that the tokens of a forward have become part of the text: ``layer.state`` may hold tensors
        ``[batch, ...]`` for summaries of more than one token, replaced and never changed in place."""

    def retrieves(self, layer: TokenLayer, block: Block) -> bool:
        """Whether the rows of this block retrieve; the others attend to everything."""
        return (block.new == 1 or block.deferred) and layer.slots.size > 0

    @abstractmethod
    def score(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> Tensor:
        """How much each slot is worth to each row, ``[batch, kv_heads or heads, rows, slots]``, larger is chosen.

        Args:
            query: ``[batch, heads, rows, head_dim]``, rotated.
            visible: Bool ``[1 or batch, 1, rows, slots]``, what each row may look at; None: everything. Slots that are
                hidden need no mark in the score.
        """

    def retrieve(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The slots that each row attends to, ``[batch, kv_heads or heads, rows, chosen]``, and which of them count,
        bool of that shape or None for all; None where every row attends to all it sees."""
        budgets = layer.budgets()
        most = max(budgets)
        if min(budgets) >= layer.size:
            return None
        score = self.score(layer, query, visible)
        if visible is not None:
            score = score.masked_fill(~visible, float("-inf"))
        values, slots = self.largest(score, min(most, layer.size))
        counts = None
        if visible is not None:
            counts = values > float("-inf")
        if len(budgets) > 1:
            rank = torch.arange(values.shape[-1], device=score.device)
            within = rank < torch.tensor(budgets, device=score.device)[:, None, None, None]
            counts = within.expand_as(values) if counts is None else counts & within
        return slots, counts

    def largest(self, score: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest scores and their slots, largest first; which of equal scores come is left open."""
        best = score.topk(count, -1)
        return best.values, best.indices


def age_first(layer: TokenLayer, recent: int) -> Tensor:
    """Which slots are among the ``recent`` newest real tokens of their row, ``[batch, 1 or kv_heads, slots]``."""
    positions = layer.slots.places(layer.cache.batch, layer.device)
    newest = positions >= (layer.cache.seen_after - recent)[:, None, None]
    return newest if layer.slots.valid is None else newest & layer.slots.valid


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


__all__ = [
    "AttentionRows", "BudgetedPolicy", "CacheMisuse", "CachePolicy", "RetrievalPolicy", "TokenLayer", "age_first",
    "scramble",
]  # fmt: skip

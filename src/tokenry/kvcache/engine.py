"""What all cache policies share: the budget, the block, and when tokens are dropped or chosen.

CachePolicy      drops tokens: a policy says which slots are protected and how the others score, and the engine keeps
                 the best of each KV head within the budget. Nothing is dropped before a token's own attention has run:
                 eviction follows the output.
RetrievalPolicy  drops nothing: before the attention of a decode step it chooses the slots that the step attends to.
PredictionPolicy drops nothing: what the cache holds of a prompt does not come from the model itself.
SkippingPolicy   drops nothing: it chooses the tokens that the later layers run for.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, BadPrompt, BudgetTooSmall, CacheMisuse
from tokenry.methods import Method
from tokenry.models import AttentionRows, Block, PolicyBlock, Rows, TokenCache, TokenLayer, attach, detach


@dataclass(frozen=True, kw_only=True)
class BasePolicy(Method):
    """A rule for what a model's cache holds or which of it a token attends to; the base of all kinds.

    ``with policy(model):`` gives every forward of the model inside the block a cache that the policy keeps;
    ``policy.cache(model)`` makes one to pass as ``past_key_values``. Sliding-window layers keep their window; the
    policy rules the full-attention layers. The block holds in the thread that entered it; a thread started inside
    runs without the policy unless it is started with ``contextvars.copy_context().run``.
    """

    role: ClassVar[str] = "policy"
    needs_attention: ClassVar[bool] = False
    # Whether what it needs of a prompt is sums over all its rows, and not the last rows alone.
    sums: ClassVar[bool] = True
    # Whether it has a `passes` of its own.
    skips: ClassVar[bool] = False
    # Whether layers may hold different tokens though none is dropped.
    uneven: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # As in H2O(model), or custom_generate=H2O.
        if args:
            raise BadParameter(
                f"{cls.__name__} takes its parameters by name, not a {type(args[0]).__name__}: write "
                f"`with {cls.__name__}(budget=...)(model):`, or {cls.__name__}(budget=...).cache(model)"
            )
        return super().__new__(cls)

    def prepare(self, model: PreTrainedModel) -> Any:
        """What it needs beside the model, made or loaded for each cache and kept as ``cache.prepared``."""
        return None

    def before(self, model: PreTrainedModel, cache: TokenCache, inputs: Mapping[str, Any]) -> None:
        """Do what is to be done before a forward that begins an empty cache.

        Args:
            model: The model, or the decoder below its head.
            cache: The empty cache.
            inputs: Arguments of the forward by name.
        """

    @property
    def stops(self) -> tuple[int, ...]:
        """What later steps see changes after positions that are multiples of these; drafts are verified at most up to
        the next of them."""
        return ()

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        """Take in the attention of the committed rows (only where ``needs_attention``)."""

    def passes(self, layer: TokenLayer, rows: AttentionRows | None) -> Rows | None:
        """The rows that the layers behind this one run for, asked behind the layer's attention before anything is
        dropped; None: those that it ran for (only where ``skips``)."""
        return None

    def hand_on(self, layer: TokenLayer, rows: Rows, tensors: list[Tensor]) -> list[Tensor]:
        """What the rows that go on take with them.

        Args:
            tensors: The output of the layer ``[batch, rows before, size]``, then what layers are given for each token,
                ``[batch, rows before, ...]``: positions, rotary angles.
        """
        return [rows.taken(tensor) for tensor in tensors]

    @property
    def attends(self) -> bool:
        """Whether it has an ``attend`` of its own that is to be used."""
        return False

    def attend(self, layer: TokenLayer, rows: AttentionRows, value: Tensor) -> Tensor:
        """The output of the attention of ``rows``, ``[batch, heads, rows, head_dim]``, from ``value`` ``[batch,
        kv_heads, slots, head_dim]``."""
        return rows.attend(value)

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
            CacheMisuse: A policy is active in this thread already, this one or another.
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
        return PolicyBlock(model, self)  # type: ignore[arg-type]

    def cache(self, model: PreTrainedModel) -> TokenCache:
        """A cache to pass as ``past_key_values``; the model stays switched for as long as the cache lives."""
        cache = TokenCache(model, self)  # type: ignore[arg-type]
        attach(model, self)  # type: ignore[arg-type]
        cache.on_release = lambda: detach(model, self)  # type: ignore[arg-type]
        return cache


@dataclass(frozen=True, kw_only=True)
class BudgetedPolicy(BasePolicy):
    """A rule for which past tokens a model attends to; the base of the two kinds that choose among them.

    Args:
        budget: Slots of each full-attention layer and KV head, as a count, or below 1 as a share of the real tokens of
            each row's prompt (``budget=0.25``), rounded down, at least ``least()``. The prompt ends with the first
            forward of a single token; a prompt in chunks is held to the share of what has come so far.
        bits: 8 or 4: older keys and values are stored in codes of so many bits, each token and head for itself with a
            scale for up to 64 numbers, and decoded where they are read; 0: as the model computes them. A prompt sees
            itself as it is; a part of one, or a further turn, sees codes of what came before.
        residual: With ``bits``, a row's tokens are read from their codes once its length reaches a multiple of this,
            and drafts are verified at most up to there; the last ones, fewer than this, are read as they are (128, as
            in transformers).
    """

    budget: int | float = 256
    bits: Literal[0, 4, 8] = 0
    residual: int = 128

    def validate(self) -> None:
        self.check("bits", "0, 4 or 8", self.bits in (0, 4, 8))
        self.check("residual", "at least 1", self.residual >= 1)
        if isinstance(self.budget, float):
            self.check("budget", "a count, or a share above 0 and below 1", 0 < self.budget < 1, BudgetTooSmall)
            return
        least = self.least()
        why = "the protected tokens and one more must fit"
        self.check("budget", f"at least {least}", self.budget >= least, BudgetTooSmall, why)

    def least(self) -> int:
        """The smallest budget."""
        return 1

    @property
    def stops(self) -> tuple[int, ...]:
        return (self.residual,) if self.bits else ()

    def layer_budget(self, layer: TokenLayer) -> int | float:
        """The budget of one layer (``layer.number``), as a count or a share; every layer has the same by default."""
        return self.budget

    def slots(self, share: float, length: int) -> int:
        """Slots that a share of ``length`` tokens gives."""
        return max(part(share, length), self.least())


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

    @property
    def hides(self) -> bool:
        """Whether dropped slots are only hidden, for studies of quality: nothing is saved."""
        return False

    def validate(self) -> None:
        self.check("compact_every", "at least 1", self.compact_every >= 1)
        why = "keys that are turned anew at each step cannot be coded once"
        self.check("bits", "0 where positions are rolling", not (self.bits and self.rolling), why=why)
        super().validate()

    @property
    def stops(self) -> tuple[int, ...]:
        return (self.compact_every, *super().stops)

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
    came alone; prompts and further turns attend to everything. So would what transformers' assisted generation
    verifies, which is refused beyond the budget when a part of it is taken back. Slots of padding, and drafts that a
    row does not follow, are never chosen. ``cache.attended_share()`` says which share of the slots the steps attended
    to.

    Args:
        budget: Slots that a decode step attends to in each full-attention layer and head, as a count, or below 1 as a
            share of the real tokens of each row's prompt.
        offload: Keep all but the newest keys and values of a layer in the CPU's memory, and on the model's device a
            copy of those that the last step attended to: a step copies what it attends to anew. Prompts in parts and
            further turns bring a layer's keys and values for the time of its attention. ``cache.copied_slots()`` counts
            what was copied. On a CPU it saves nothing.
    """

    drops: ClassVar[bool] = False
    # Nothing is dropped, so nothing limits how many drafts are verified at once.
    compact_every: ClassVar[int] = 2**30

    offload: bool = False

    def validate(self) -> None:
        why = "codes stay on the model's device"
        self.check("offload", "False with bits, or bits=0", not (self.offload and self.bits), why=why)
        super().validate()

    def offloads(self, layer: TokenLayer) -> bool:
        """Whether the layer's older keys and values go to the CPU's memory; layers that attend to all keep them."""
        return self.offload and layer.number >= getattr(self, "dense_layers", 0)

    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        """What is kept of new keys ``[batch, kv_heads, new, head_dim]`` beside them, each ``[batch, kv_heads, new,
        size]``; read with ``layer.indexed(name)``. Drafts are indexed too, and their entries go where they go."""
        return {}

    def settled(self, layer: TokenLayer) -> None:
        """Take in that the tokens of a forward have become part of the text: ``layer.state`` may hold tensors
        ``[batch, ...]`` for summaries of more than one token, replaced and never changed in place."""

    def cropped(self, layer: TokenLayer) -> None:
        """Take in that the newest tokens were taken back: the layer holds them no more, ``layer.state`` may speak of
        them."""

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


@dataclass(frozen=True, kw_only=True)
class PredictionPolicy(BasePolicy):
    """A rule for the keys and values that a cache begins with, in place of those that the model would compute.

    Only the last token of the prompt runs through the model, against what was predicted for the others; whatever comes
    later runs as usual, further turns and the later chunks of a prompt in chunks too, and so does a first chunk in
    which a row has nothing but padding. The cache keeps every token. The prompt's outputs are NaN but for its last
    token's; transformers' assisted generation, which asks for more of them, is refused. ``cache.computed_share()`` says
    which share of the tokens the model's own layers ran for.
    """

    skips: ClassVar[bool] = True
    drops: ClassVar[bool] = False
    # Nothing is dropped, so nothing limits how many drafts are verified at once.
    compact_every: ClassVar[int] = 2**30

    @abstractmethod
    def predict(
        self, cache: TokenCache, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a prompt but its last token, for each layer as its own forward would have cached them,
        ``[batch, kv_heads, length, head_dim]``.

        Args:
            cache: The empty cache, with what ``prepare`` gave in ``prepared``.
            input_ids: ``[batch, length]``.
            mask: ``[batch, length]``, 0 for left padding; None: all real.
            position_ids: ``[batch, length]`` as the model was given them, or None.
        """

    def before(self, model: PreTrainedModel, cache: TokenCache, inputs: Mapping[str, Any]) -> None:
        ids: Tensor | None = inputs.get("input_ids")
        if ids is None:
            raise CacheMisuse(f"{self.slug} predicts from ids: pass input_ids for the prompt, not inputs_embeds")
        if ids.shape[1] == 1:
            return
        own = cache._staged is not None
        valid = cache.staged(inputs.get("attention_mask"), ids.shape[1])
        # The first forward of assisted generation carries the prompt and drafts, whose rows would not be computed.
        # Tokenry's loop stages what it feeds, and may learn from as many rows of a prompt as are there.
        rows = inputs.get("logits_to_keep")
        if isinstance(rows, int) and rows > 1 and not own:
            raise CacheMisuse(
                f"{self.slug} computes the last row of a prompt alone, and its first forward asks for {rows} rows of "
                "logits, as transformers' assisted generation and prompt lookup do: draft with Tokenry's drafters, "
                "such as custom_generate=PromptLookup()"
            )
        if valid is not None and not bool(valid[:, -1].all()):
            if bool((valid.any(-1) & ~valid[:, -1]).any()):
                raise BadPrompt(
                    f"{self.slug}: the prompt is padded on the right: pad it on the left "
                    "(tokenizer.padding_side = 'left')"
                )
            # The first chunk of a prompt, and a row that begins in a later one has no last token here to run.
            return
        mask = None if valid is None else valid[:, :-1]
        positions = inputs.get("position_ids")
        positions = None if positions is None else positions[..., :-1].expand(ids.shape[0], -1)
        cache.foretell(self.predict(cache, ids[:, :-1], None if mask is None else mask.long(), positions), mask)

    # What the cache asks of a policy that chooses the slots of a step: none are chosen, all are attended to.
    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        return {}

    def settled(self, layer: TokenLayer) -> None: ...

    def cropped(self, layer: TokenLayer) -> None: ...

    def retrieves(self, layer: TokenLayer, block: Block) -> bool:
        return False


def members(pool: Tensor, starts: Tensor, sizes: Tensor, order: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of groups, group after group: the ``rank``-th of them all, and whether there are so many.

    Args:
        pool: The slots of all groups, ``[batch, heads, slots]``.
        starts: Where each group's first slot stands in the pool, ``[batch, heads, groups]``.
        sizes: Slots of each group that count for each row, ``[batch, heads, rows, groups]``.
        order: The groups that each row takes, the first ones first, ``[batch, heads, rows, taken]``.
        rank: ``[batch, heads, rows, places]``; below 0 none is meant.
    """
    sizes = sizes.gather(-1, order)
    filled = sizes.cumsum(-1)
    turn = torch.searchsorted(filled, rank.contiguous(), right=True).clamp(max=filled.shape[-1] - 1)
    within = rank - filled.gather(-1, turn) + sizes.gather(-1, turn)
    rows = order.shape[2]
    start = starts[:, :, None].expand(-1, -1, rows, -1).gather(-1, order.gather(-1, turn))
    index = (start + within).clamp(0, pool.shape[-1] - 1)
    return pool[:, :, None].expand(-1, -1, rows, -1).gather(-1, index), (rank >= 0) & (rank < filled[..., -1:])


@dataclass(frozen=True, kw_only=True)
class SkippingPolicy(BudgetedPolicy):
    """A rule for the tokens that the later layers run for; each layer holds what it ran for, and drops nothing.

    Args:
        budget: Prompt tokens that the last layers attend to, as a count or a share of the prompt.
        compact_every: Choose anew only for every ``compact_every``-th token of a row. Drafters need it above 1.
    """

    skips: ClassVar[bool] = True
    uneven: ClassVar[bool] = True
    drops: ClassVar[bool] = False

    compact_every: int = 1

    def validate(self) -> None:
        self.check("compact_every", "at least 1", self.compact_every >= 1)
        why = "layers hold tokens of their own here, which are stored as they came"
        self.check("bits", "0", not self.bits, why=why)
        super().validate()

    @property
    def stops(self) -> tuple[int, ...]:
        # What the first token behind such a position chooses holds up to the next.
        return (self.compact_every,)

    # What the cache asks of a policy that chooses the slots of a step: none are chosen, all are attended to.
    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        return {}

    def settled(self, layer: TokenLayer) -> None: ...

    def cropped(self, layer: TokenLayer) -> None: ...

    def offloads(self, layer: TokenLayer) -> bool:
        return False

    def retrieves(self, layer: TokenLayer, block: Block) -> bool:
        return False


def part(share: float, count: int) -> int:
    """A share of ``count`` slots or tokens, rounded down."""
    # 0.29 * 100 is a little less than 29.
    return math.floor(share * count + 1e-9)


def age_first(layer: TokenLayer, recent: int) -> Tensor:
    """Which slots are among the ``recent`` newest real tokens of their row, ``[batch, 1 or kv_heads, slots]``."""
    positions = layer.slots.places(layer.cache.batch, layer.device)
    newest = positions >= (layer.cache.seen_after - recent)[:, None, None]
    return newest if layer.slots.valid is None else newest & layer.slots.valid


def marked(positions: Tensor, real: Tensor, length: int) -> Tensor:
    """Which positions are among the real ones of ``positions`` ``[batch, count]``, bool ``[batch, length]``."""
    marks = torch.zeros(positions.shape[0], length + 1, dtype=torch.bool, device=positions.device)
    return marks.scatter_(1, torch.where(real, positions, length), True)[:, :length]


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
    "AttentionRows", "BasePolicy", "BudgetedPolicy", "CacheMisuse", "CachePolicy", "PredictionPolicy",
    "RetrievalPolicy", "SkippingPolicy", "TokenLayer", "age_first", "marked", "members",
    "part", "scramble",
]  # fmt: skip

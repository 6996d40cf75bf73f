"""The method: the model writes group after group by itself, or its groups are drafts for another to verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from tokenry.errors import BadParameter, CacheMisuse, ResourceError
from tokenry.generation.engine import Commit, Options, Session
from tokenry.generation.result import Source
from tokenry.models import active_policy, attached, compat, context_length, loaded_name, trained_folder
from tokenry.models.anatomy import text_config
from tokenry.speculation.engine import Drafter, DraftTree, TreeShape, Walk
from tokenry.speculation.hamburger.cache import MacroCache
from tokenry.speculation.hamburger.model import HamburgerModel


@dataclass
class _Writing:
    """The last group of each row, which no entry holds yet."""

    model: HamburgerModel
    tokens: Tensor | None = None
    sizes: Tensor | None = None


@dataclass
class _Drafting:
    """What the drafter has read: `held` `[batch]` columns of the ids, and how the tokens behind them are grouped."""

    model: HamburgerModel
    cache: MacroCache
    held: Tensor | None = None
    unread: Tensor | None = None
    drafted: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Hamburger(Drafter):
    """Several tokens a step and one cache entry for them all, from a base model that was fine-tuned for it.

    A step of the base reads the last group of 1 to 4 tokens, merged into one vector, and a small decoder on its hidden
    states writes the next group; a stop head ends it. Nothing is verified: what is written is the fine-tuned model's,
    not that of the model passed, which gives vocabulary, dtype, device and the settings of `generate`, and must be of
    the shape that was trained. Results say so in `stats.extra["lossless"]`, and count in `stats.extra["groups"]` the
    groups of 1, 2, ... tokens. First tokens of groups have the source `plain`, the others `router`, after the stop head
    that kept them from the base. Prompt tokens are not merged. Inside a cache policy, its budget counts entries. The
    returned cache goes on in this method alone, with the ids of the whole conversation: what it holds stays merged.
    Source: HAMburger, arXiv 2505.20438. Sampling, batches and other architectures than Llama are additions.

    With `lossless` the groups are drafts that the model passed verifies, which may be any model of the same vocabulary.
    The accepted tokens of a group are then read as one entry, the target's own token as another.

    Attributes:
        weights: Folder that `tokenry train hamburger` wrote; None: where it writes for this model by default. The
            resource `weights` hands over a loaded `HamburgerModel`.
        confidence: Least chance of going on at which a group goes on; 1 writes one token a step, which is plain
            decoding of the fine-tuned base.
        max_group: Most tokens of a group; None: as trained.
        lossless: Whether another model verifies the groups.
        groups: Groups that are drafted for it at a time.
    """

    resources: ClassVar[tuple[str, ...]] = ("weights",)

    weights: str | None = None
    confidence: float = 0.9
    max_group: int | None = None
    lossless: bool = False
    groups: int = 2

    def validate(self) -> None:
        self.check("confidence", "from 0 to 1", 0 <= self.confidence <= 1)
        self.check("max_group", "none or at least 1", self.max_group is None or self.max_group >= 1)
        self.check("groups", "from 1 to 16", 1 <= self.groups <= 16)

    @property
    def drafts(self) -> bool:  # type: ignore[override]
        """Whether its tokens are verified."""
        return self.lossless

    def load(self, model: PreTrainedModel, resources: dict[str, Any]) -> HamburgerModel:
        """The fine-tuned model that writes beside, or in place of, `model`."""
        given = resources.get("weights")
        if given is None:
            given = HamburgerModel.load(self.weights or trained_folder("hamburger", loaded_name(model)), model)
        if not isinstance(given, HamburgerModel):
            raise ResourceError(
                f"hamburger: the resource weights is a {type(given).__name__}; hand over a HamburgerModel, or its "
                "folder as hamburger:weights=FOLDER"
            )
        mine, own = text_config(model), given.base.config
        # A drafter may be of any shape; a writer takes the place of the model it was trained from.
        named = ("vocab_size",) if self.lossless else ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        for name in named:
            if getattr(mine, name, None) != getattr(own, name):
                other = "" if name == "vocab_size" else "; to draft for another model, say hamburger:lossless=true"
                raise ResourceError(
                    f"hamburger: the weights were trained from a model of {name} {getattr(own, name)}, and "
                    f"{type(model).__name__} has {getattr(mine, name, None)}: train them for it with `tokenry train "
                    f"hamburger`{other}"
                )
        if self.max_group is not None and self.max_group > given.max_group:
            raise BadParameter(
                f"hamburger: max_group={self.max_group} is not allowed; these weights were trained for groups of at "
                f"most {given.max_group}"
            )
        return given

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        tokenry_options: Options | None = None,
        **model_kwargs: Any,
    ) -> Any:
        own = self.load(model, tokenry_options.resources if isinstance(tokenry_options, Options) else {})
        rest = (input_ids, logits_processor, stopping_criteria, generation_config, tokenry_options)
        if self.lossless:
            with attached(own.base):
                return super().__call__(model, *rest, **model_kwargs)
        return super().__call__(own.base, *rest, **_on_own_cache(own, active_policy(model), input_ids, model_kwargs))

    def start(self, session: Session) -> _Writing | _Drafting:
        if self.lossless:
            own = self.load(session.model, session.resources)
            return _Drafting(own, MacroCache(own))
        own = session.cache.model
        session.stats.extra |= {"lossless": False, "groups": [0] * own.max_group}
        return _Writing(own)

    def step(self, session: Session, state: Any) -> Commit:
        return super().step(session, state) if self.lossless else self._write(session, state)

    # By itself -------------------------------------------------------------------------------------
    def _write(self, session: Session, state: _Writing) -> Commit:
        cache: MacroCache = session.cache
        if session.has_pending:
            logits = session.next_logits()
            cache.columns = session.length
        else:
            assert state.tokens is not None and state.sizes is not None and cache.columns is not None
            sizes = state.sizes * session.active
            logits = state.model.read(cache, state.tokens[:, None], sizes[:, None])
            cache.columns = torch.where(session.active, session.length, cache.columns)
            session.stats.forwards += 1
            session.stats.passes += sum(session.alive)

        def choose(logits: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
            scores = session.process(logits, ahead)
            tokens = session.choose(scores, ahead)
            session.look_ahead(tokens, ahead)
            return tokens, scores

        shortest = min(length for length, alive in zip(session.lengths, session.alive, strict=True) if alive)
        most = min(self.max_group or state.model.max_group, session.max_length - shortest)
        assert cache.features is not None
        tokens, sizes, raw, scores = state.model.write(
            cache.features, logits, choose, session.active, self.confidence, most
        )
        state.tokens, state.sizes = tokens, sizes
        for size in sizes.tolist():
            if size:
                session.stats.extra["groups"][size - 1] += 1
        sources = torch.full_like(tokens, int(Source.ROUTER), dtype=torch.int8)
        sources[:, 0] = int(Source.PLAIN)
        return Commit(
            tokens,
            sizes,
            sources,
            logits=torch.stack(raw, 1) if session.want_logits else None,
            scores=torch.stack(scores, 1) if session.want_scores else None,
        )

    # For another model -----------------------------------------------------------------------------
    def propose(self, session: Session, state: _Drafting, room: int) -> DraftTree:
        own, cache = state.model, state.cache
        context = context_length(own.base)
        if context is not None and max(session.lengths) + self.groups * own.max_group > context:
            return DraftTree.root(session.anchor)
        logits = self._catch_up(session, state)
        before, fed = cache.tokens, 0
        tokens, sizes = [], []
        for number in range(self.groups):
            assert cache.features is not None
            written, size, _, _ = own.write(
                cache.features, logits, _likeliest, session.active, self.confidence, self.max_group or own.max_group
            )
            tokens.append(F.pad(written, (0, own.max_group - written.shape[1])))
            sizes.append(size)
            short = session.active & (torch.stack(sizes, 1).sum(1) < room)
            if number + 1 == self.groups or not bool(short.any()):
                break
            logits = own.read(cache, written[:, None], size[:, None])
            fed += 1
        # Entries of drafts go: those that are accepted are read again, beside the token that follows them.
        cache.rewind(fed, before)
        state.drafted = torch.stack(sizes, 1)
        return _chain(session.anchor, torch.stack(tokens, 1), state.drafted)

    def observe(self, session: Session, state: _Drafting, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        if state.unread is None:
            return
        kept = walk.counts[:, None] - 1
        groups = [state.unread]
        if state.drafted is not None:
            begin = state.drafted.cumsum(1) - state.drafted
            groups.append(torch.minimum((kept - begin).clamp(min=0), state.drafted))
        state.unread = torch.cat([*groups, torch.ones_like(kept)], 1)
        state.drafted = None

    def _catch_up(self, session: Session, state: _Drafting) -> Tensor:
        """Read what was committed since the last time; float32 logits `[batch, vocab]` behind the anchor."""
        if state.held is None or state.unread is None:
            column = torch.arange(max(session.lengths), device=session.device)
            state.held = session.first
            state.unread = ((column >= session.first[:, None]) & (column < session.length[:, None])).long()
        sizes = state.unread * session.active[:, None]
        # Drafted groups of which nothing was accepted in any row leave no slots.
        sizes = sizes[:, (sizes > 0).any(0)]
        begin = state.held[:, None] + sizes.cumsum(1) - sizes
        columns = begin[..., None] + torch.arange(max(int(sizes.max()), 1), device=session.device)
        columns = columns.clamp(max=session.ids.shape[1] - 1)
        tokens = session.ids.gather(1, columns.flatten(1)).view(columns.shape)
        state.held, state.unread = session.length, sizes[:, :0]
        return state.model.read(state.cache, tokens, sizes)


def _likeliest(logits: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    return logits.argmax(-1), logits


def _chain(anchor: Tensor, tokens: Tensor, sizes: Tensor) -> DraftTree:
    """One chain behind each row's anchor from its groups `[batch, groups, longest]`."""
    real = (torch.arange(tokens.shape[2], device=tokens.device) < sizes[..., None]).flatten(1)
    order = real.byte().argsort(dim=1, descending=True, stable=True)
    counts = real.sum(1)
    longest = int(counts.max())
    drafts = tokens.flatten(1).gather(1, order)[:, :longest]
    valid = torch.arange(longest + 1, device=tokens.device) <= counts[:, None]
    return DraftTree(
        torch.cat([anchor[:, None], drafts], 1),
        TreeShape.chain(longest + 1, tokens.device),
        None if bool(valid.all()) else valid,
    )


def _on_own_cache(own: HamburgerModel, policy: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with a macro cache in them: a fresh one, or the caller's with what it holds masked."""
    given: Cache | None = model_kwargs.get("past_key_values")
    if isinstance(given, MacroCache):
        if given.model is not own or given.policy is not policy:
            raise CacheMisuse(
                "past_key_values comes from other HAMburger weights or from the block of another cache policy: start "
                "from the whole prompt"
            )
        return model_kwargs | {"attention_mask": _unread(given, input_ids, model_kwargs), "position_ids": None}
    if given is not None and (compat.is_callers(given) or given.get_seq_length()):
        raise CacheMisuse(
            "hamburger fills a cache of its own, with merged entries of its fine-tuned model: leave past_key_values "
            "out, or pass on the one that an earlier call of hamburger returned"
        )
    return model_kwargs | {"past_key_values": MacroCache(own, policy)} if type(given) is DynamicCache else model_kwargs


def _unread(cache: MacroCache, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """The mask `[batch, length]` of a conversation that goes on: rows that hold more than the shortest row do not read
    those tokens again."""
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    width = input_ids.shape[1]
    covered = max([width, *(known.shape[-1] for known in (mask, positions) if known is not None)])
    held = cache.columns
    if held is None or covered != width or input_ids.shape[0] != held.shape[0] or int(held.max()) >= width:
        raise CacheMisuse(
            "hamburger goes on from its cache with the ids of the whole conversation, a row for each row it holds and "
            "new tokens in each"
        )
    column = torch.arange(width, device=held.device)
    again = (column >= held.min()) & (column < held[:, None])
    real = torch.ones_like(again) if mask is None else mask.to(held.device).bool()
    return (real & ~again).long()

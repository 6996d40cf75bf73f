"""A second model that reads along with the target and drafts for it.

Companion          the model beside one call: its cache, what each row still has to be fed, forwards of drafts
DraftCache         a `TokenCache` whose newest slots hold drafts that grow by several forwards
Draws              how drafts are chosen from the second model's distributions
CompanionDrafter   base of the drafters that have such a model
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from tokenry.errors import ResourceError
from tokenry.generation.engine import Options, Session
from tokenry.generation.result import GenerationResult
from tokenry.generation.session import keeps_logits
from tokenry.models import Block, Slots, TokenCache, attached, context_length, resource
from tokenry.models.anatomy import text_config
from tokenry.sampling import substream
from tokenry.speculation.engine import Drafter, DraftTree, Walk

__all__ = ["Companion", "CompanionDrafter", "DraftCache", "Draws", "end_tokens"]

# A batch's cache closes its gaps once they take this share of the longest row, and this many slots.
_GAP_SHARE, _GAP_SLOTS = 0.25, 32
# Noise of drafts that the target's own noise must know nothing of: no branch of a session has this stream.
_DRAFTS = substream(0, 0, 2**32)


class _Level(Block):
    """New drafts of which each sees the whole text, itself and some of the drafts before it."""

    def __init__(self, relation: Tensor, seen: Tensor) -> None:
        new = relation.shape[1]
        super().__init__(new, None, relation[..., -new:], deferred=False)
        self.earlier = relation[..., :-new]
        self.positions = seen[:, None] + relation.sum(-1) - 1

    def mask(self, slots: Slots, window: int | None, device: torch.device) -> tuple[Tensor | None, bool]:
        allowed, _ = super().mask(slots, window, device)
        assert allowed is not None
        drafts = self.earlier.shape[-1]
        if drafts:
            allowed[..., slots.size - drafts : slots.size] &= self.earlier[:, None]
        return allowed, False


class DraftCache(TokenCache):
    """The cache of a model that drafts: drafts are added by any number of forwards, and then some of them stay.

    Sliding-window layers keep everything and hide what is outside the window, so drafts can be taken back anywhere.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        for layer in self.layers:
            layer.policy, layer.slots = None, self.slots
        self._relation: Tensor | None = None
        self._text: tuple[Any, ...] = ()

    def open(self) -> None:
        """Note where the text ends: what comes from here on are drafts, until `keep`."""
        slots = self.slots
        self._text = slots.size, slots.valid, slots.positions, self.total, self._seen, self._ragged

    def stage_drafts(self, relation: Tensor) -> None:
        """Describe the drafts of the next forward: which of the drafts so far and of themselves each of them sees,
        bool `[1 or batch, new, so far + new]`."""
        self.ready()
        self._relation = relation

    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Add the drafts `path[b, :counts[b]]` of each row, numbered in the order they came, to the text and drop all
        others; `path` is `[batch, longest]`."""
        drafts = self.slots.size - self._text[0]
        slots = self.slots
        slots.size, slots.valid, slots.positions, self.total, self._seen, self._ragged = self._text
        self._block = Block(drafts, None, None, deferred=True)
        self.commit(path, counts)

    def block(self, new: int, mask: Tensor | None, device: torch.device) -> Block:
        if self._block is None and self._relation is not None:
            self.seen_before = self.seen_after = self.seen
            self._block, self._relation = _Level(self._relation, self.seen), None
        return super().block(new, mask, device)


class Companion:
    """A second model beside one call.

    Every step begins with `catch_up`, which feeds what the rows have committed since, goes on with `feed` for drafts,
    and ends with `keep`, so that accepted drafts are not fed again. Rows progress unequally, as in the session.

    Attributes:
        model: The second model.
        cache: Its keys and values.
        nodes: Which draft each node of the proposed tree is, numbered in the order they were fed, -1 for the root and
            nodes that were not: `[1 or batch, n]`. A drafter sets it; None: nothing is open.
    """

    def __init__(self, session: Session, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DraftCache(model)
        self.nodes: Tensor | None = None
        self._vocab = int(text_config(model).vocab_size)
        self._context = context_length(model)
        self._first = session.first.tolist()
        # Columns of the session's ids that each row has been fed.
        self._read = [0] * session.batch
        self._counts = session.stats.extra
        self._counts["draft_forwards"] = 0

    def room(self, session: Session) -> int:
        """Most tokens that may be drafted: behind the second model's own context it is not asked."""
        if self._context is None:
            return session.max_length
        rows = zip(session.lengths, self._first, session.alive, strict=True)
        return max(0, self._context - max(length - first for length, first, alive in rows if alive))

    def catch_up(self, session: Session) -> Tensor:
        """Feed what each row has committed and not been fed, the anchor last, and return the logits behind the anchor,
        float32 `[batch, vocab]`."""
        rows = list(zip(session.lengths, self._read, session.alive, strict=True))
        if session.batch == 1:
            start = max(self._read[0], self._first[0])
            tokens, valid = session.ids[:, start : session.lengths[0]], None
        else:
            width = max(length - read for length, read, alive in rows if alive)
            columns = session.length[:, None] + torch.arange(-width, 0, device=session.device)
            tokens = session.ids.gather(1, columns.clamp(min=0))
            start = torch.maximum(torch.tensor(self._read, device=session.device), session.first)
            real = (columns >= start[:, None]) & session.active[:, None]
            valid = None if bool(real.all()) else real
        width = tokens.shape[1]
        chunk = session.config.prefill_chunk_size or width
        options = {"logits_to_keep": 1} if keeps_logits(self.model) else {}
        for begin in range(0, width, chunk):
            piece = tokens[:, begin : begin + chunk]
            here = None if valid is None else valid[:, begin : begin + chunk]
            self.cache.stage(here)
            ahead = torch.arange(piece.shape[1], device=piece.device)[None] if here is None else here.cumsum(1) - 1
            positions = ahead + (self.cache.seen[:, None] if self.cache.batch else 0)
            logits = self._forward(piece, positions.clamp(min=0), **options)
        self._read = [length if alive else read for length, read, alive in rows]
        self.cache.open()
        return self._fitting(logits[:, -1], session.vocab)

    def feed(self, session: Session, tokens: Tensor, relation: Tensor | None = None) -> Tensor:
        """Feed drafts `[batch, new]` and return the logits behind each, float32 `[batch, new, vocab]`.

        Args:
            session: The call.
            tokens: Drafts.
            relation: Which of the drafts so far and of themselves each sees, bool `[1 or batch, new, so far + new]`;
                None: all, a chain.
        """
        if relation is None:
            self.cache.stage()
            ahead = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            self.cache.stage_drafts(relation)
            ahead = relation.sum(-1) - 1
        positions = self.cache.seen[:, None] + ahead
        if self._context is not None:
            # Finished rows ride along, and need positions that the model has.
            positions = positions.clamp(max=self._context - 1)
        return self._fitting(self._forward(tokens, positions), session.vocab)

    def keep(self, session: Session, walk: Walk) -> None:
        """Keep the drafts that a walk accepts and drop the others."""
        if self.nodes is None:
            return
        path = walk.path[:, 1:]
        fed = self.nodes.expand(session.batch, -1).gather(1, path)
        # The anchor was fed as text; of the accepted nodes, those that were fed stand first.
        within = torch.arange(1, walk.path.shape[1], device=path.device) < walk.counts[:, None]
        kept = ((fed >= 0) & within & session.active[:, None]).sum(1)
        self.cache.keep(fed.clamp(min=0), kept)
        self._read = [read + count for read, count in zip(self._read, kept.tolist(), strict=True)]
        self.nodes = None
        excess = self.cache.slots.size - max(self._read)
        if session.batch > 1 and excess >= _GAP_SLOTS and excess > _GAP_SHARE * max(self._read):
            self.cache.realign()
        self._counts["draft_kv_bytes"] = self.cache.nbytes()

    def _forward(self, tokens: Tensor, positions: Tensor, **options: Any) -> Tensor:
        self._counts["draft_forwards"] += 1
        output = self.model(
            input_ids=tokens.clamp(max=self._vocab - 1),
            position_ids=positions.expand_as(tokens),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        return output.logits

    def _fitting(self, logits: Tensor, vocab: int) -> Tensor:
        """Logits as wide as the target's: ids that only one model has are padding, which is not drafted."""
        logits = logits[..., :vocab].to(torch.float32)
        return torch.nn.functional.pad(logits, (0, vocab - logits.shape[-1]), value=-torch.inf)


class Draws:
    """How drafts are chosen from the second model's distributions in one call.

    Greedy decoding takes the most probable. Sampling without a seed draws, and the verifier is told the distributions.
    With a seed the draws run on the noise that the target's own choice at the position will run on, so the two agree
    wherever the models agree, and the target samples what it samples without drafts (coupling by common random
    numbers, Daliri et al. 2408.07978).

    Attributes:
        sampled: Whether drafts are drawn independently of the target's choice, so that the verifier needs their
            distributions.
        coupled: Whether they are drawn with the target's noise.
    """

    def __init__(self, session: Session, choice: str) -> None:
        self._noise = session.noise
        drawn = session.do_sample and choice != "top"
        self.coupled = drawn and choice == "auto" and self._noise is not None
        self.sampled = drawn and not self.coupled

    def order(self, session: Session, probs: Tensor, ahead: int, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` drafts behind nodes with distributions `[batch, n, vocab]`, in the order they are drawn.

        Without replacement, so no token comes twice; that is the order of a race in which each token's clock runs as
        fast as it is probable (the Gumbel trick).

        Args:
            session: The call.
            probs: The distributions.
            ahead: How many tokens lie between the committed ids and these drafts.
            count: Drafts for each node.

        Returns:
            Tokens and how likely each is, `[batch, n, count]`: its probability, or where draws are coupled, its share
            of the race, whose lead tells how much the models may differ without choosing differently.
        """
        if not (self.sampled or self.coupled):
            top = probs.topk(count, -1)
            return top.indices, top.values
        race = probs / self._clocks(session, probs, ahead)
        first = race.topk(count, -1)
        likely = probs.gather(-1, first.indices) if self.sampled else first.values / race.sum(-1, keepdim=True)
        return first.indices, likely

    def _clocks(self, session: Session, probs: Tensor, ahead: int) -> Tensor:
        """Exponential noise, `[batch, n, vocab]`: one for each node, as what is drawn at one node decides how much is
        drawn at others; or where draws are coupled, that of the position, `[batch, 1, vocab]`."""
        if self._noise is None:
            return torch.empty_like(probs).exponential_(1)
        clocks = []
        for row, length in enumerate(session.lengths):
            position = length - session.prompt_length + ahead
            # Every step has noise of its own, and none of it is the target's.
            nodes = [0] if self.coupled else [substream(_DRAFTS, length, node) for node in range(probs.shape[1])]
            clocks += [self._noise.exponential(row, position, probs[row, 0], stream) for stream in nodes]
        return torch.stack(clocks).view(session.batch, -1, probs.shape[-1])


def end_tokens(session: Session) -> Tensor:
    """Ids that end a text, `[n]`: nothing is drafted behind them."""
    ids = session.config.eos_token_id
    ids = [] if ids is None else ids
    return torch.tensor(ids if isinstance(ids, list) else [ids], dtype=torch.long, device=session.device)


@dataclass(frozen=True, kw_only=True)
class CompanionDrafter(Drafter, ABC):
    """Base of drafters that have a second model of the same tokenizer.

    The second model is named, or handed over as `resources={"draft": model}`. Vocabularies of different size are
    taken where the tokenizer is at hand and has no more tokens than the smaller (some families pad them).

    Attributes:
        draft: Path or id of the second model.
        choice: How drafts are chosen when the target samples. `"auto"`: drawn from the second model and verified by
            rejection sampling, or with a seed, drawn with the target's own noise, so that the seed gives the tokens of
            plain sampling. `"sampled"`: always the first. `"top"`: the most probable tokens. Greedy decoding always
            drafts the most probable.
    """

    resources: ClassVar[tuple[str, ...]] = ("draft",)
    draft: str = "tokenry/code-draft"
    choice: Literal["auto", "sampled", "top"] = "auto"

    def second_model(self, model: PreTrainedModel, resources: dict[str, Any]) -> PreTrainedModel:
        """The second model for a target.

        Raises:
            ResourceError: It does not load, is on another device, or has another vocabulary.
        """
        given = resources.get("draft")
        if given is not None and not isinstance(given, PreTrainedModel):
            raise ResourceError(
                f"{self.slug}: the resource 'draft' must be a loaded model, not {type(given).__name__}; "
                "name a path or id as draft="
            )
        draft = resource(self.draft if given is None else given, model)
        name = self.draft if given is None else type(given).__name__
        if draft.device != model.device:
            raise ResourceError(
                f"{self.slug}: the draft {name} is on {draft.device} and the model on {model.device}; move it there"
            )
        mine, its = (int(text_config(each).vocab_size) for each in (model, draft))
        tokenizer = resources.get("tokenizer")
        if mine != its and (tokenizer is None or len(tokenizer) > min(mine, its)):
            known = "no tokenizer is at hand" if tokenizer is None else f"the tokenizer has {len(tokenizer)} tokens"
            raise ResourceError(
                f"{self.slug}: the draft {name} has {its} tokens in its vocabulary and the model {mine}; both must "
                f"share one tokenizer, and may differ in padding alone ({known}): give the model's own small sibling, "
                f"as in {self.slug}:draft=PATH"
            )
        return draft

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tokenry_options: Options | None = None,
        **model_kwargs: Any,
    ) -> GenerationResult | Tensor:
        # transformers reads the names of these parameters, so they are written out.
        given = tokenry_options.resources if isinstance(tokenry_options, Options) else {}
        with attached(self.second_model(model, given)):
            return super().__call__(
                model, input_ids, logits_processor, stopping_criteria, generation_config, tokenry_options,
                **model_kwargs,
            )  # fmt: skip

    def observe(self, session: Session, state: Any, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        state.companion.keep(session, walk)

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

from tokenry.generation.engine import Options, Session
from tokenry.generation.follower import Follower, second_model
from tokenry.generation.result import GenerationResult
from tokenry.models import Block, Slots, TokenCache, attached
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


class Companion(Follower):
    """A second model that drafts beside one call.

    Every step begins with `catch_up`, which feeds what the rows have committed since, goes on with `feed` for drafts,
    and ends with `keep`, so that accepted drafts are not fed again. Rows progress unequally, as in the session.

    Attributes:
        cache: Its keys and values.
        nodes: Which draft each node of the proposed tree is, numbered in the order they were fed, -1 for the root and
            nodes that were not: `[1 or batch, n]`. A drafter sets it; None: nothing is open.
    """

    cache: DraftCache

    def __init__(self, session: Session, model: PreTrainedModel) -> None:
        super().__init__(session, model, DraftCache(model), "draft")
        self.nodes: Tensor | None = None

    def catch_up(self, session: Session, rows: Tensor | None = None, *, hidden: bool = False) -> Tensor:
        logits = super().catch_up(session, rows, hidden=hidden)
        self.cache.open()
        return logits

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
        self.read = [read + count for read, count in zip(self.read, kept.tolist(), strict=True)]
        self.nodes = None
        excess = self.cache.slots.size - max(self.read)
        if session.batch > 1 and excess >= _GAP_SLOTS and excess > _GAP_SHARE * max(self.read):
            self.cache.realign()
        self._counts["draft_kv_bytes"] = self.cache.nbytes()


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
        return second_model(self.slug, "draft", self.draft, model, resources)

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

"""Draft a chain of tokens with the model itself behind a cache of few tokens; its full cache verifies them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from tokenry.generation.engine import Options, Session
from tokenry.generation.follower import Follower
from tokenry.generation.result import GenerationResult
from tokenry.methods import Combination, Method, method, parameters
from tokenry.models import TokenCache
from tokenry.speculation import draft_model
from tokenry.speculation.companion import Companion, Draws, end_tokens
from tokenry.speculation.draft_model import DraftModel
from tokenry.speculation.engine import Drafter, DraftTree

# Under this name a call hands its drafting cache to `start`.
_CACHE = "self-draft cache"
_ANY = 2**30


class Behind(Follower):
    """The target model beside itself, on a cache that a policy keeps.

    A policy that dropped tokens cannot take drafts back. So its cache is fed what is text alone, and drafts go to a
    copy of it, which is given up at the next `catch_up`.

    Attributes:
        cache: What the policy holds of the text.
        drafting: What it holds of text and drafts; None: nothing was fed behind the text.
        nodes: Not read: drafts that are accepted are fed anew, as text.
    """

    def __init__(self, session: Session, model: PreTrainedModel, cache: TokenCache) -> None:
        super().__init__(session, model, cache, "draft")
        self.drafting: TokenCache | None = None
        self.nodes: Tensor | None = None

    def catch_up(self, session: Session, rows: Tensor | None = None, *, hidden: bool = False) -> Tensor:
        """Feed what the unfinished rows have committed, the anchor last, and return the logits behind the anchor,
        float32 `[batch, vocab]`: the prompt in one forward, or in pieces of `prefill_chunk_size`; what came since in
        one, cut where the policy drops or chooses tokens."""
        self.drafting = None
        if not self.cache.batch:
            # Rows that ended at their first token too: no policy has to know of a row without a prompt.
            return super().catch_up(session, torch.ones_like(session.active))
        lengths = zip(session.lengths, self.read, session.alive, strict=True)
        left = [length - read if alive else 0 for length, read, alive in lengths]
        logits = torch.zeros(session.batch, session.vocab, device=session.device)
        while any(left):
            counts = [min(pair) for pair in zip(left, self._room(), strict=True)]
            piece = self._read_on(session, counts)
            last = torch.tensor([0 < rest == count for rest, count in zip(left, counts, strict=True)])
            logits = torch.where(last.to(logits.device)[:, None], piece, logits)
            left = [rest - count for rest, count in zip(left, counts, strict=True)]
        return logits

    def feed(self, session: Session, tokens: Tensor) -> Tensor:
        """Feed a draft of each row, `[batch, 1]`, and return the logits behind it, float32 `[batch, 1, vocab]`."""
        if self.drafting is None:
            self.drafting = self.cache.fork()
        self.drafting.stage()
        logits = self._forward(tokens, self._within(self.drafting.seen[:, None]), self.drafting)
        self._counts["draft_kv_bytes"] = self.cache.nbytes() + self.drafting.nbytes()
        return self._fitting(logits, session.vocab)

    def _room(self) -> list[int]:
        """Tokens of each row up to the next place where the policy drops or chooses tokens. One that does so after
        every token does it once for a run of them, as for a chunk of a prompt."""
        assert self.cache.policy is not None
        stops = [every for every in self.cache.policy.stops if every > 1]
        return [min((every - seen % every for every in stops), default=_ANY) for seen in self.cache.seen.tolist()]

    def _read_on(self, session: Session, counts: list[int]) -> Tensor:
        """Feed the next `counts[b]` committed tokens of each row as decode steps in one forward, and return the logits
        behind the last of them, float32 `[batch, vocab]`."""
        kept = torch.tensor(counts, device=session.device)
        order = torch.arange(max(counts), device=session.device).expand(session.batch, -1)
        columns = torch.tensor(self.read, device=session.device)[:, None] + order
        real = order < kept[:, None]
        self.cache.stage(None if bool(real.all()) else real, deferred=True)
        tokens = session.ids.gather(1, columns.clamp(max=session.max_length))
        logits = self._forward(tokens, self._within(self.cache.seen[:, None] + order))
        self.cache.commit(order, kept)
        self.read = [read + count for read, count in zip(self.read, counts, strict=True)]
        rows = torch.arange(session.batch, device=session.device)
        return self._fitting(logits[rows, (kept - 1).clamp(min=0)], session.vocab)

    def _within(self, positions: Tensor) -> Tensor:
        """Positions that the model has: finished rows, and rows with fewer tokens than others, ride along."""
        return positions if self._context is None else positions.clamp(max=self._context - 1)


@dataclass
class _State:
    companion: Behind
    chain: DraftModel
    drafted: draft_model._State


@dataclass(frozen=True, kw_only=True)
class SelfDraft(Drafter):
    """Draft a chain with the model itself behind a cache that holds few tokens, one forward a token, and verify it with
    the full cache.

    A forward over a long text waits for the keys and values of all of it; one behind a budget waits for few, and mostly
    says the same. After the retrieval cache of TriForce, arXiv 2404.11912, section 4, and MagicDec, arXiv 2408.11049,
    with any cache policy: the output is that of plain decoding whatever it drops. Text is fed to the policy's cache
    once it is verified, so the policy keeps what it keeps alone; drafts are fed to a copy of that cache, which is given
    up after each step. Both papers make the small cache from the full one; here the prompt is read a second time
    behind the policy, and a policy that drops nothing holds all keys and values a second time, so what it saves is
    time at most. Nothing is drafted behind an end token or behind the model's context.

    The passes that draft are counted as `draft_forwards`, the bytes of the drafting cache and its copy as
    `draft_kv_bytes`.

    Attributes:
        policy: Text form of a cache policy, such as `h2o` or `"h2o:recent=0.25;decay=0.9"`; a policy itself is taken as
            its text.
        budget: Slots of the drafting cache in each layer and KV head, as a count or a share of the prompt, in place of
            the policy's own; None: the policy's own.
        tokens: Most tokens drafted.
        confidence: A row's draft ends with the first token whose probability is below this; 0 never ends it.
        choice: How drafts are chosen when the target samples, as `CompanionDrafter` says.

    Raises:
        BadParameter: `policy` is not a cache policy, or has no budget and one is given.
        UnsupportedModel: The policy cannot rule this model, as where every layer has a sliding window.
    """

    inner: ClassVar[tuple[str, ...]] = (_CACHE,)

    policy: str = "snapkv"
    budget: int | float | None = None
    tokens: int = 4
    confidence: float = 0.0
    choice: Literal["auto", "sampled", "top"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.policy, Method | Combination):
            object.__setattr__(self, "policy", str(self.policy))
        super().__post_init__()

    def validate(self) -> None:
        self.check("tokens", "at least 1", self.tokens >= 1)
        self.check("confidence", "from 0 to 1", 0 <= self.confidence <= 1)
        self.ruling()

    def ruling(self) -> Any:
        """The policy of the drafting cache, with its budget."""
        policy = method(self.policy)
        fits = isinstance(policy, Method) and policy.role == "policy"
        self.check("policy", "one cache policy, such as h2o or snapkv", fits)
        if self.budget is None:
            return policy
        why = f"{self.policy} has no budget"
        self.check("budget", "none", "budget" in parameters(type(cast(Method, policy))), why=why)
        return dataclasses.replace(cast(Method, policy), budget=self.budget)  # type: ignore[call-arg]

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
        options = tokenry_options or Options()
        with _kept(model, self.ruling()) as cache:
            if isinstance(options, Options):
                options = dataclasses.replace(options, resources={**options.resources, _CACHE: cache})
            return super().__call__(
                model, input_ids, logits_processor, stopping_criteria, generation_config, options, **model_kwargs
            )

    def start(self, session: Session) -> _State:
        companion = Behind(session, session.model, session.resources[_CACHE])
        draws, ends = Draws(session, self.choice), end_tokens(session)
        chain = DraftModel(tokens=self.tokens, confidence=self.confidence, choice=self.choice)
        return _State(companion, chain, draft_model._State(cast(Companion, companion), draws, ends, None))

    def propose(self, session: Session, state: _State, room: int) -> DraftTree:
        tree = state.chain.propose(session, state.drafted, room)
        state.companion.drafting = None  # not to be held while the target verifies
        return tree


@contextlib.contextmanager
def _kept(model: PreTrainedModel, policy: Any) -> Iterator[TokenCache]:
    """A cache of the policy; the model is switched no longer than the block, though a traceback may hold the cache."""
    cache: TokenCache = policy.cache(model)
    cache.beside = True
    try:
        yield cache
    finally:
        release, cache.on_release = cache.on_release, None
        if release is not None:
            release()

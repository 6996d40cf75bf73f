"""Routing between a small and a large model, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from tokenry.decoding.partial_cache import PartialCache, check_given
from tokenry.decoding.r2r.router import Router
from tokenry.errors import CacheMisuse, ResourceError
from tokenry.generation.engine import Commit, Decoder, Options, Session
from tokenry.generation.follower import Follower, second_model
from tokenry.generation.result import GenerationResult, Source
from tokenry.models import TokenCache, attached, context_length, loaded_name, trained_folder
from tokenry.sampling import entropy

# The repository's threshold of the rule by entropy, in nats.
_ENTROPY = 0.45


@dataclass(frozen=True)
class Signals:
    """What the small model says of its next token; what a router of one's own is called with.

    Attributes:
        hidden: What its head read, `[batch, hidden]`.
        tokens: The token that it chose, `[batch]`.
        logits: Raw logits that it chose from, float32 `[batch, vocab]`.
        embedded: Input embedding of the token, `[batch, embedding]`.
    """

    hidden: Tensor
    tokens: Tensor
    logits: Tensor
    embedded: Tensor


Chances = Callable[[Signals], Tensor]


@dataclass
class _State:
    """Of one call.

    Attributes:
        small, large: The models as they read along; the large one's cache is the session's.
        chances: The router; None where a rule needs more than the small model's signals.
        threshold: Tokens of at least this chance come from the large model.
        lags: Whether the large model reads only what it is asked for.
        parameters: Of the small model and router together, and of the large model.
        probabilities: For each row the router's chance of each token so far.
        prefill: Forwards of the large model that read the prompt.
    """

    small: Follower
    large: Follower
    chances: Chances | None
    threshold: float
    lags: bool
    parameters: tuple[int, int]
    probabilities: list[list[float]] = field(default_factory=list)
    prefill: int = 0
    committed: int = 0
    routed: int = 0

    def unread(self, session: Session) -> list[tuple[int, int, bool]]:
        """Of each row the columns that the model has read, the row's length, and whether it goes on."""
        return list(zip(self.large.read, session.lengths, session.alive, strict=True))


@dataclass(frozen=True, kw_only=True)
class R2R(Decoder):
    """Let a small model write, and take from the model itself only the tokens that a router holds to change the path.

    Before a token is committed the router reads what the small model computed for it. From a chance of `threshold` on,
    the model replaces it: it reads in one forward all that was written since its last token, and gives one token. Then
    the small model goes on. Nothing is verified, so the output is neither model's own. Source: R2R, arXiv 2505.21600.
    The model reads the prompt at once, not at its first token.

    Tokens of the small model have the source `router`, those of the model `plain`. `stats.extra` counts forwards of
    both, has the router's `probabilities` by row, the model's `share` of the tokens, and `activated_parameters`: the
    mean of a token, small model and router charged for every one, the model for its own. The returned cache holds what
    the model has read of every row; inside a cache policy it reads every token at once, which saves nothing.

    `tokenry train router` makes the router. `resources={"small": model, "router": router}` hands both over loaded; the
    router may be any callable from `Signals` to chances `[batch]`.

    Attributes:
        small: Path or id of the small model, which shares the tokenizer.
        router: Folder of the router; none: where `tokenry train router` puts it for the model.
        rule: What decides: the `router`; the `entropy` of the small model's distribution in nats (the repository's
            rule); `random`; or the `oracle`, which runs the model for every token and routes where the two differ.
        threshold: Chance, or entropy, from which a token is routed: 0 routes all, above 1 none. None: what the router
            was calibrated to; 0.45 for entropy, 0.9 for random (a tenth of the tokens), 0.5 for the oracle.
        share: Instead of a threshold, the share of tokens that the model should write, as measured on the text that
            the router was calibrated on.
    """

    resources: ClassVar[tuple[str, ...]] = ("small", "router")
    small: str = "tokenry/code-draft"
    router: str | None = None
    rule: Literal["router", "entropy", "random", "oracle"] = "router"
    threshold: float | None = None
    share: float | None = None

    def validate(self) -> None:
        self.check("threshold", "at least 0, or none", self.threshold is None or self.threshold >= 0)
        self.check("share", "from 0 to 1, or none", self.share is None or 0 <= self.share <= 1)
        self.check("share", "none beside a threshold", self.share is None or self.threshold is None)
        self.check("share", "none beside rule=oracle", self.share is None or self.rule != "oracle")

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
        check_given(self.slug, model_kwargs.get("past_key_values"))
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] != input_ids.shape[1]:
            raise CacheMisuse(
                f"{self.slug}: {input_ids.shape[1]} ids came with a mask of {mask.shape[1]}: pass the whole text as "
                "input_ids beside past_key_values, because the small model reads it too"
            )
        given = tokenry_options.resources if isinstance(tokenry_options, Options) else {}
        with attached(second_model(self.slug, "small", self.small, model, given)):
            return super().__call__(
                model, input_ids, logits_processor, stopping_criteria, generation_config, tokenry_options,
                **model_kwargs,
            )  # fmt: skip

    def start(self, session: Session) -> _State:
        model = session.model
        small = second_model(self.slug, "small", self.small, model, session.resources)
        chances, threshold = self._routing(session, small)
        lags = session.policy is None
        if lags:
            session.cache = PartialCache.of(model, session.cache)
        reader = Follower(session, small, TokenCache(small), "small")
        context, needed = context_length(small), session.max_length - int(session.first.min()) - 1
        if context is not None and needed > context:
            raise ResourceError(
                f"{self.slug}: the small model {small.name_or_path or type(small).__name__} reads {context} tokens, "
                f"and prompt and output have {needed}: lower max_new_tokens, or take one of a longer context"
            )
        beside = _parameters(chances.router) if isinstance(chances, _Reading) else 0
        sizes = _parameters(small) + beside, _parameters(model)
        return _State(
            reader,
            Follower(session, model, session.cache, "large", session.prompt_length),
            chances,
            threshold,
            lags,
            sizes,
            [[] for _ in range(session.batch)],
        )

    def step(self, session: Session, state: _State) -> Commit:
        first = session.has_pending
        theirs = session.next_logits() if first else None
        if first:
            state.prefill = session.stats.forwards
        logits = state.small.catch_up(session, hidden=True)
        scores = session.process(logits)
        tokens = session.choose(scores)
        active, asked = session.active, None
        if self.rule == "oracle" or not state.lags:
            asked = active
        if self.rule != "oracle":
            chances = self._chances(session, state, logits, tokens)
            routed = (chances >= state.threshold) & active
            asked = routed if asked is None else asked
        assert asked is not None
        if bool(asked.any()):
            if theirs is None:
                # Rows that have ended are read to their end on the way, for whoever goes on from the cache.
                owed = [not alive and read < length for read, length, alive in state.unread(session)]
                theirs = state.large.catch_up(session, asked | torch.tensor(owed, device=session.device))
                session.stats.passes += int(asked.sum())
            their_scores = session.process(theirs)
            their_tokens = session.choose(their_scores)
            if self.rule == "oracle":
                chances = (their_tokens != tokens).float()
                routed = (chances >= state.threshold) & active
            tokens = torch.where(routed, their_tokens, tokens)
            scores = torch.where(routed[:, None], their_scores, scores)
            logits = torch.where(routed[:, None], theirs, logits)
        self._note(session, state, chances, routed)
        return Commit(
            tokens[:, None],
            active.long(),
            torch.where(routed, Source.PLAIN, Source.ROUTER)[:, None],
            logits=logits[:, None] if session.want_logits else None,
            scores=scores[:, None] if session.want_scores else None,
        )

    def _routing(self, session: Session, small: PreTrainedModel) -> tuple[Chances | None, float]:
        """The router, if it is one that reads signals, and the threshold."""
        fixed = {"entropy": _ENTROPY, "random": 0.9, "oracle": 0.5}
        given = session.resources.get("router")
        router: Any = None
        if self.rule == "router" or (self.rule == "entropy" and self.share is not None):
            router = given if callable(given) else self._load(session.model, small, given)
        chances = {"router": router, "entropy": _entropy}.get(self.rule)
        threshold = self.threshold
        if self.share is not None and self.rule == "random":
            threshold = 1 - self.share if self.share else 2.0
        elif self.share is not None:
            if not isinstance(router, Router):
                raise ResourceError(
                    f"{self.slug}: share={self.share} needs a router that was calibrated; give a threshold beside a "
                    "router of your own"
                )
            threshold = router.threshold_for(self.share, self.rule)
        elif threshold is None:
            threshold = fixed.get(self.rule, router.threshold if isinstance(router, Router) else 0.5)
        assert threshold is not None
        return chances if not isinstance(chances, Router) else _Reading(chances), threshold

    def _load(self, model: PreTrainedModel, small: PreTrainedModel, given: Any) -> Router:
        place = given or self.router or trained_folder("router", loaded_name(model))
        return Router.load(place, small, model)

    def _chances(self, session: Session, state: _State, logits: Tensor, tokens: Tensor) -> Tensor:
        if state.chances is None:
            draws = [session.uniform(row, 0, 1)[0] if alive else 0.0 for row, alive in enumerate(session.alive)]
            return torch.tensor(draws, device=session.device)
        assert state.small.hidden is not None
        embed: Any = state.small.model.get_input_embeddings()
        known = tokens.clamp(max=embed.weight.shape[0] - 1)
        return state.chances(Signals(state.small.hidden, tokens, logits, embed(known)))

    def _note(self, session: Session, state: _State, chances: Tensor, routed: Tensor) -> None:
        for own, chance, alive in zip(state.probabilities, chances.tolist(), session.alive, strict=True):
            if alive:
                own.append(chance)
        state.committed += sum(session.alive)
        state.routed += int(routed.sum())
        extra = session.stats.extra
        session.stats.forwards = state.prefill + extra["large_forwards"]
        share = state.routed / state.committed
        own_parameters, their_parameters = state.parameters
        extra["probabilities"] = state.probabilities
        extra["routed"], extra["share"] = state.routed, share
        extra["large_tokens"] = sum(
            read - first for read, first in zip(state.large.read, session.first.tolist(), strict=True)
        )
        extra["activated_parameters"] = own_parameters + share * their_parameters
        if isinstance(session.cache, PartialCache):
            # A row that is behind when the others are done has that much less to hand over.
            session.cache.complete = min(
                (read for read, length, _ in state.unread(session) if read < length), default=None
            )


class _Reading:
    """A router behind signals."""

    def __init__(self, router: Router) -> None:
        self.router = router

    def __call__(self, signals: Signals) -> Tensor:
        # Sorted, raw, and as many as it was trained on.
        top = signals.logits.topk(self.router.topk, -1).values
        return self.router(signals.hidden.float(), signals.embedded.float(), top.float()).sigmoid()


def _entropy(signals: Signals) -> Tensor:
    return entropy(signals.logits)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""Other libraries' ways to generate, as methods that `compare` measures in the same run.

Each runs its library natively. Forward passes and verify steps are counted by hooks, since the libraries do not report
them.
"""

import contextlib
import copy
import time
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from tokenry.errors import BadParameter, ResourceError
from tokenry.generation.result import Stats
from tokenry.methods import Method
from tokenry.models import resource


@dataclass(frozen=True)
class PeerResult:
    """What a peer generated, and what its run cost.

    Args:
        sequences: Prompts and new tokens `[batch, length]`.
        stats: Forward passes, bytes of keys and values (0 if the cache's class does not show its tensors; the peak
            counts drafts until they are rejected), and of a peer that drafts its verify steps. What is committed is
            for the caller to count, who knows the end tokens.
        draft_forwards: Forward passes of the second model.
        drafter_seconds: Time within the second model's own `generate`; None where there is none to time.
    """

    sequences: torch.Tensor
    stats: Stats
    draft_forwards: int
    drafter_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Peer(Method, ABC):
    """Base of other libraries' methods; `setting` gives what to add to transformers' `generate`."""

    role: ClassVar[str] = "peer"
    batches: ClassVar[bool] = True
    """Whether it takes several prompts at once."""

    drafts: ClassVar[bool] = False
    """Whether it drafts, so that each of its forward passes is a verify step."""

    @contextlib.contextmanager
    def setting(self, model: Any, resources: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the options of `generate` that make up this method, which hold inside the block."""
        yield {}

    def run(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        resources: dict[str, Any] | None = None,
        **options: Any,
    ) -> PeerResult:
        """Run transformers' `generate` and count its forward passes.

        Args:
            model: The model.
            input_ids: Prompts `[batch, length]`, left-padded.
            attention_mask: 0 where they are padded `[batch, length]`.
            resources: Second models that are loaded already, by name.
            options: Options of `generate`.

        Raises:
            BadParameter: The method takes one prompt at a time and was given several.
        """
        if input_ids.shape[0] > 1 and not self.batches:
            raise BadParameter(f"{self.slug} takes one prompt at a time; use batch size 1 with it")
        target, draft = _Passes(), _Passes()
        generate = model.generate
        with self.setting(model, resources or {}) as own:
            second = own.get("assistant_model")
            with target.on(model), draft.on(second), _timed(second) as clock:
                output = generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    return_dict_in_generate=True,
                    **options,
                    **own,
                )
        stats = Stats(forwards=len(target.seen))
        stats.kv_bytes, stats.kv_peak_bytes = _nbytes(output.past_key_values, target.longest)
        # The passes of a model that drafts for itself cannot be told apart.
        if self.drafts and second is not model:
            _count_steps(stats, target.seen, input_ids.shape[1], output.sequences.shape[1])
        return PeerResult(output.sequences, stats, len(draft.seen), None if second is None else clock.seconds)


class _Passes:
    """Notes of each forward pass of a model how many tokens its cache held and how many it was given, by a hook."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    @property
    def longest(self) -> int:
        """The longest that the cache was."""
        return max((past + new for past, new in self.seen), default=0)

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[None]:
        if model is None:
            yield
            return
        handle = model.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache = kwargs.get("past_key_values")
        self.seen.append((0 if cache is None else int(cache.get_seq_length()), ids.shape[1]))


class _Clock:
    seconds = 0.0


@contextlib.contextmanager
def _timed(model: Any) -> Iterator[_Clock]:
    """Time a second model's `generate` inside the block; it waits for its own tokens, so no device is left behind."""
    clock = _Clock()
    if model is None:
        yield clock
        return
    generate = model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return generate(*args, **kwargs)
        finally:
            clock.seconds += time.perf_counter() - start

    model.generate = timed
    try:
        yield clock
    finally:
        del model.generate


def _count_steps(stats: Stats, seen: list[tuple[int, int]], prompt: int, end: int) -> None:
    """Count one row's verify steps from its passes: the text before each is what its cache holds and one token more."""
    starts = [prompt, *(past + 1 for past, _ in seen[1:]), end]
    for (past, given), start, following in zip(seen, starts, starts[1:], strict=False):
        drafted = past + given - start
        # The last token of a step is the model's own, unless an end token among the drafts ended the text.
        accepted = min(drafted, following - start - 1)
        stats.steps += 1
        stats.verified += following - start
        stats.drafted += drafted
        stats.accepted += accepted
        stats.note_walk(torch.tensor([drafted]), torch.tensor([accepted]))
    stats.settle()


def _nbytes(cache: Any, longest: int) -> tuple[int, int]:
    """Bytes of keys and values in a cache as it is, and as it was when it held `longest` tokens; none of states of
    another kind."""
    layers = getattr(cache, "layers", None) or []
    parts = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if not tensors:
        return 0, 0
    length = cache.get_seq_length()
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return held, round(held * max(longest, length) / length) if length else 0


@dataclass(frozen=True, kw_only=True)
class TransformersGenerate(Peer):
    """transformers' own `generate`: the plain loop that every speed is measured against."""


@dataclass(frozen=True, kw_only=True)
class TransformersPromptLookup(Peer):
    """transformers' prompt lookup: draft the tokens that followed the last n-gram where it stood before.

    Source: transformers' `prompt_lookup_num_tokens`; 10 tokens as in its documentation, n-grams up to 2.
    """

    batches: ClassVar[bool] = False
    drafts: ClassVar[bool] = True
    tokens: int = 10

    def validate(self) -> None:
        self.check("tokens", "at least 1", self.tokens >= 1)

    @contextlib.contextmanager
    def setting(self, model: Any, resources: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"prompt_lookup_num_tokens": self.tokens}


@dataclass(frozen=True, kw_only=True)
class TransformersAssisted(Peer):
    """transformers' assisted generation: a small model with the same tokenizer drafts.

    `tokens` and `schedule` are transformers' `num_assistant_tokens` and `num_assistant_tokens_schedule`;
    the schedule "heuristic" adds 2 tokens after a step that accepted all and removes 1 after any other.
    Each run starts from `tokens`. A draft stops early where its own probability falls below `confidence`
    (0 never stops).

    Source: transformers' `assistant_model`, whose defaults these are.
    """

    resources: ClassVar[tuple[str, ...]] = ("draft",)
    batches: ClassVar[bool] = False
    drafts: ClassVar[bool] = True
    draft: str = "tokenry/code-draft"
    tokens: int = 20
    schedule: Literal["constant", "heuristic", "heuristic_transient"] = "constant"
    confidence: float = 0.4

    def validate(self) -> None:
        self.check("tokens", "at least 1", self.tokens >= 1)
        self.check("confidence", "from 0 to 1", 0 <= self.confidence <= 1)

    @contextlib.contextmanager
    def setting(self, model: Any, resources: dict[str, Any]) -> Iterator[dict[str, Any]]:
        draft = resources.get("draft")
        if draft is None:
            draft = resource(self.draft, model)
        sizes = [m.config.get_text_config().vocab_size for m in (model, draft)]
        if sizes[0] != sizes[1]:
            raise ResourceError(
                f"{self.slug}: the draft {self.draft} has {sizes[1]} tokens and the model {sizes[0]}; "
                "both must share one tokenizer"
            )
        # transformers reads the schedule from the draft's own config and writes the heuristic's last value
        # back to it, which would leak from one run into the next.
        before = draft.generation_config
        draft.generation_config = copy.deepcopy(before)
        draft.generation_config.num_assistant_tokens = self.tokens
        draft.generation_config.num_assistant_tokens_schedule = self.schedule
        draft.generation_config.assistant_confidence_threshold = self.confidence
        try:
            yield {"assistant_model": draft}
        finally:
            draft.generation_config = before

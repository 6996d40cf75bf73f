"""Other libraries' ways to generate, as methods that `compare` measures in the same run.

Each runs its library natively. Forward passes are counted by hooks, since the libraries do not report them.
"""

import contextlib
import copy
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from tokenry.errors import BadParameter, ResourceError
from tokenry.methods import Method
from tokenry.models import resource


@dataclass(frozen=True)
class PeerResult:
    """What a peer generated, and what its run cost.

    Args:
        sequences: Prompts and new tokens `[batch, length]`.
        forwards: Forward passes of the model.
        draft_forwards: Forward passes of the second model.
        kv_bytes: Bytes of the model's key-value cache at the end; 0 if its class does not show its tensors.
        kv_peak_bytes: The most it held: drafts stand in it until they are rejected.
    """

    sequences: torch.Tensor
    forwards: int
    draft_forwards: int
    kv_bytes: int
    kv_peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Peer(Method, ABC):
    """Base of other libraries' methods; `setting` gives what to add to transformers' `generate`."""

    role: ClassVar[str] = "peer"
    batches: ClassVar[bool] = True

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
        target, draft = _Count(), _Count()
        with self.setting(model, resources or {}) as own, target.on(model), draft.on(own.get("assistant_model")):
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                return_dict_in_generate=True,
                **options,
                **own,
            )
        held, peak = _nbytes(output.past_key_values, target.longest)
        return PeerResult(output.sequences, target.forwards, draft.forwards, held, peak)


class _Count:
    """Counts a model's forward passes and notes its longest cache, by a hook."""

    def __init__(self) -> None:
        self.forwards = 0
        self.longest = 0

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[None]:
        if model is None:
            yield
            return
        handle = model.register_forward_hook(self._seen)
        try:
            yield
        finally:
            handle.remove()

    def _seen(self, module: Any, args: Any, output: Any) -> None:
        self.forwards += 1
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self.longest = max(self.longest, cache.get_seq_length())


def _nbytes(cache: Any, longest: int) -> tuple[int, int]:
    """Bytes of a dynamic cache as it is, and as it was when it held `longest` tokens."""
    length = cache.get_seq_length() if cache is not None else 0
    layers = getattr(cache, "layers", None) or []
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    held = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
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

"""`tokenry.fill`: text with masked places to text without, by any method that fills them.

A decoder continues a prompt; an infiller fills places anywhere in it, in an order of its own. The door prepares the
canvas and names the result; the order, the model calls and the counts are the method's.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, BadPrompt, PromptTooLong
from tokenry.generation.engine import check_resources
from tokenry.generation.full import Prompt, _padded, _rows
from tokenry.generation.result import GenerationResult
from tokenry.generation.session import check_seed
from tokenry.methods import Method, method
from tokenry.models import context_length
from tokenry.sampling import Noise

__all__ = ["Canvas", "InfillResult", "Infiller", "fill"]


@dataclass(frozen=True)
class Canvas:
    """Ids with places to fill.

    Attributes:
        ids: `[batch, length]`, on the model's device.
        masked: The places to fill, bool `[batch, length]`.
        valid: Which columns hold text rather than padding, bool `[batch, length]`.
        mask_id: The mask token, which no place is filled with.
        noise: Randomness of this call, by row and position.
        resources: Second models, tables and the like by name, handed over loaded.
    """

    ids: Tensor
    masked: Tensor
    valid: Tensor
    mask_id: int
    noise: Noise
    resources: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ids: Tensor,
        attention_mask: Tensor | None,
        mask_id: int,
        seed: int | torch.Generator | None = None,
        resources: dict[str, Any] | None = None,
    ) -> Canvas:
        """The canvas of ids `[batch, length]` whose places to fill hold the mask token.

        Args:
            seed: Sampling depends on it alone; a generator gives one, None takes it from torch's global generator.

        Raises:
            BadPrompt: The ids are not two-dimensional, or a row has nothing to fill.
        """
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise BadPrompt(f"ids of shape {tuple(ids.shape)} cannot be filled; give integers [batch, length]")
        valid = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if valid.shape != ids.shape:
            raise BadPrompt(f"the attention mask is {tuple(valid.shape)} and the ids are {tuple(ids.shape)}")
        masked = (ids == mask_id) & valid
        if not bool(masked.any(1).all()):
            raise BadPrompt(f"a text has nothing to fill; put the mask token (id {mask_id}) where tokens are wanted")
        if not isinstance(seed, torch.Generator):
            check_seed(seed)
        if seed is None or isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (1,), generator=seed))
        return cls(ids, masked, valid, mask_id, Noise(int(seed), ids.device), resources or {})

    @property
    def positions(self) -> Tensor:
        """Place of each column in its row's text, padding left out, `[batch, length]`."""
        return (self.valid.long().cumsum(-1) - 1).clamp(min=0)


@dataclass
class InfillResult(GenerationResult):
    """What came of a canvas: `sequences` are the filled ids, `sources` is -1 where a column was given.

    `stats.passes` counts model calls once for each row that they served; `stats.extra["calls"]` has them by row.
    """

    def texts(self, tokenizer: Any = None) -> list[str]:
        """The whole text of each row, special tokens left out."""
        return [self._tokenizer(tokenizer).decode(ids, skip_special_tokens=True) for ids in self.sequences]

    def holes(self, tokenizer: Any = None) -> list[list[str]]:
        """What was put into each run of masked places, by row."""
        if self.sources is None:
            raise BadParameter("this result holds no sources, so its holes are not known")
        known = self._tokenizer(tokenizer)
        found = []
        for ids, sources in zip(self.sequences.tolist(), self.sources.tolist(), strict=True):
            runs = itertools.groupby(zip(ids, sources, strict=True), key=lambda pair: pair[1] >= 0)
            found.append([known.decode([token for token, _ in run]) for filled, run in runs if filled])
        return found

    def _tokenizer(self, given: Any) -> Any:
        tokenizer = given if given is not None else self.__dict__.get("tokenizer")
        if tokenizer is None:
            raise BadParameter("this result does not know its tokenizer: pass it")
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class Infiller(Method, ABC):
    """Base of every method that fills masked places, wherever they are; `tokenry.fill` runs it."""

    role: ClassVar[str] = "infiller"

    @abstractmethod
    def fill(self, model: PreTrainedModel, canvas: Canvas) -> InfillResult:
        """Fill every masked place of a canvas; columns that are not masked stay as they are.

        Raises:
            UnsupportedModel: The model cannot be asked in the method's way.
        """


def fill(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    *,
    method: str | Method = "any-subset-speculative-decoding",
    seed: int | None = None,
    resources: dict[str, Any] | None = None,
) -> InfillResult:
    """Fill the masked places of a text.

    Args:
        model: A model that the method can ask, such as one trained by `tokenry train any-order`.
        tokenizer: Its tokenizer, with a mask token; None where ids are given and the model's configuration has
            `mask_token_id`.
        prompt: A text or texts in which the mask token (`<mask>`) stands once for each token to fill in, or ids
            `[length]` or `[batch, length]` (lists or a tensor). How many tokens fit must be known beforehand.
        method: An infiller: a method object or its text form, such as
            `any-subset-speculative-decoding:k=8;temperature=0`.
        seed: Sampling depends on it alone. None: torch's global generator.
        resources: Second models, tables and the like by name, handed over loaded.

    Returns:
        The result; `print` shows its text and counts.

    Raises:
        BadPrompt: The prompt is empty, cannot be read, or has nothing to fill.
        PromptTooLong: It exceeds the model's context.
        BadParameter: The method does not fill, or no mask token is known.
        MethodNotFound, UnsupportedModel: As the method raises.
    """
    if not isinstance(model, torch.nn.Module):
        raise BadParameter(f"{model!r} is not a model; load one first: model, tokenizer = tokenry.load(name)")
    infiller = _infiller(method)
    check_seed(seed)
    check_resources([infiller], resources or {})
    mask_id = getattr(tokenizer, "mask_token_id", None)
    if mask_id is None:
        mask_id = getattr(model.config, "mask_token_id", None)
    if mask_id is None:
        raise BadParameter(
            "neither the tokenizer nor the model's configuration names a mask token; "
            "set tokenizer.mask_token or model.config.mask_token_id"
        )
    ids, mask = _padded(_rows(tokenizer, prompt), tokenizer, model)
    context = context_length(model)
    # XLNet says -1 for no limit.
    if context is not None and 0 < context < ids.shape[1]:
        raise PromptTooLong(f"the text has {ids.shape[1]} tokens, but the model's context is {context}; shorten it")
    canvas = Canvas.of(ids.to(model.device), mask.to(model.device), mask_id, seed, resources)
    started = time.perf_counter()
    result = infiller.fill(model, canvas)
    if result.stats is not None:
        result.stats.seconds = time.perf_counter() - started
    result.method = str(infiller)
    object.__setattr__(result, "tokenizer", tokenizer)
    return result


def _infiller(given: str | Method) -> Infiller:
    found = method(given)
    if not isinstance(found, Infiller):
        role = getattr(found, "role", "") or type(found).__name__
        raise BadParameter(f"{found} does not fill masked places (it is a {role}); `tokenry methods` lists infillers")
    return found

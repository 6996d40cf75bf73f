"""Figures of a run: bits per byte, agreement with plain decoding, losslessness, medians with quartiles."""

import contextlib
import functools
import gzip
import lzma
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tokenry.errors import BadParameter, BadPrompt
from tokenry.models import context_length

NEAR_TIE = 4
"""Largest gap between plain's two best logits, in units in the last place of the top one, that counts as a tie."""

PAIRS = 7
"""Fewest interleaved pairs that a statement on speed rests on."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, without unit or in the unit of what was measured."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of `values`; quartiles interpolate between neighbours (the inclusive rule)."""
        found = sorted(values)
        if not found:
            return cls(math.nan, math.nan, math.nan, 0)
        lower, median, upper = statistics.quantiles(found, n=4, method="inclusive") if found[1:] else found * 3
        return cls(median, lower, upper, len(found))


# --- text under a model -------------------------------------------------------------------------


@torch.inference_mode()
def bits_per_byte(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    policy: Any = None,
    stepwise: bool = False,
) -> float:
    """Return the bits a byte of UTF-8 that `model` needs for `texts`, each read from its start.

    A text longer than the window is read in windows that advance by `stride` tokens, and every token is
    scored once, with at least `window - stride` tokens before it. The first token is scored after the
    tokenizer's BOS token; without one it costs log2 of the vocabulary.

    Args:
        model: A causal model of transformers.
        tokenizer: Its tokenizer.
        texts: One text or several.
        window: Tokens a window; by default the model's context, at most 2,048.
        stride: Tokens between the starts of two windows; by default half the window, stepwise one less than it.
        policy: A cache policy; tokens are then read stepwise inside it, so its cache decides what is seen.
        stepwise: Read tokens one by one with a cache, as generation does.

    Raises:
        BadPrompt: There is no text.
        BadParameter: The window is below 2 tokens or the stride is outside 1 to `window - 1`.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    size = sum(len(text.encode()) for text in texts)
    if size == 0:
        raise BadPrompt("there is no text to measure: give at least one byte")
    window = min(window or 2048, context_length(model) or 2048)
    if window < 2:
        raise BadParameter(f"window={window} is not allowed; a window must hold at least 2 tokens")
    stride = stride or (window - 1 if stepwise or policy else window // 2)
    if not 0 < stride < window:
        raise BadParameter(f"stride={stride} is not allowed; it must be from 1 to {window - 1} (window - 1)")
    nats = 0.0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token_id is None:
            nats += math.log(model.config.get_text_config().vocab_size) if ids else 0.0
        else:
            ids = [tokenizer.bos_token_id, *ids]
        read = _stepped_logits if stepwise or policy else _window_logits
        with policy(model) if policy else contextlib.nullcontext():
            nats += _nats(functools.partial(read, model), torch.tensor([ids], device=model.device), window, stride)
    return nats / math.log(2) / size


def _nats(read: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, window: int, stride: int) -> float:
    """Sum of the negative log likelihoods of `ids[:, 1:]`, ids `[1, length]`; `read` gives a window's logits."""
    total, scored, length = 0.0, 1, ids.shape[1]
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        piece = ids[:, begin:end]
        if end > scored:
            losses = cross_entropy(read(piece)[0].float(), piece[0, 1:], reduction="none")
            total += losses[-(end - scored) :].double().sum().item()
            scored = end
        if end == length:
            break
    return total


def _window_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, :-1]


def _stepped_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    rows, cache = [], None
    for index in range(ids.shape[1] - 1):
        output = model(input_ids=ids[:, index : index + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits)
    return torch.cat(rows, dim=1)


def compressed_bits_per_byte(texts: str | Sequence[str]) -> dict[str, float]:
    """Return the bits a byte that gzip and xz need at their strongest for all texts as one stream.

    One stream favours the compressors: unlike a model that reads each text alone, they see earlier texts.

    Raises:
        BadPrompt: There is no text.
    """
    data = (texts if isinstance(texts, str) else "".join(texts)).encode()
    if not data:
        raise BadPrompt("there is no text to measure: give at least one byte")
    sizes = {
        "gzip": len(gzip.compress(data, 9, mtime=0)),
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}


# --- tokens against plain's ---------------------------------------------------------------------


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Return the index of the first token that differs, counting a missing token; None if all are equal."""
    for index, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return index
    return None if len(expected) == len(got) else min(len(expected), len(got))


@dataclass(frozen=True)
class Agreement:
    """Shares, between 0 and 1, of the longer output: tokens before the first difference, tokens equal in place."""

    leading: float
    equal: float


def agreement(expected: Sequence[int], got: Sequence[int]) -> Agreement:
    """Return how far the tokens of an output agree with those expected."""
    longer = max(len(expected), len(got))
    if longer == 0:
        return Agreement(1.0, 1.0)
    difference = first_difference(expected, got)
    equal = sum(a == b for a, b in zip(expected, got, strict=False))
    return Agreement(1.0 if difference is None else difference / longer, equal / longer)


@dataclass(frozen=True)
class Lossless:
    """How many outputs were compared with plain's, and how many differed at a near tie or otherwise."""

    prompts: int = 0
    near_ties: int = 0
    broken: int = 0

    @property
    def ok(self) -> bool:
        """Whether no output broke the promise."""
        return self.broken == 0

    def __add__(self, other: "Lossless") -> "Lossless":
        return Lossless(self.prompts + other.prompts, self.near_ties + other.near_ties, self.broken + other.broken)

    def __str__(self) -> str:
        if self.broken:
            return f"no ({self.broken} of {self.prompts})"
        return f"yes, {self.near_ties} near-tie{'s' * (self.near_ties > 1)}" if self.near_ties else "yes"


def ulp(value: float, dtype: torch.dtype) -> float:
    """Return the unit in the last place of a number of this size in `dtype`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


@torch.inference_mode()
def check_lossless(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    expected: Sequence[Sequence[int]],
    got: Sequence[Sequence[int]],
    **options: Any,
) -> Lossless:
    """Compare greedy outputs with plain's as the design defines lossless.

    In float32 and float64 all tokens must be equal. In half precision a first difference is allowed where
    plain's own two best scores lie at most 4 units in the last place of the top one apart. They are
    recomputed here by transformers' plain `generate` over the same batch, up to that token.

    Args:
        model: The model that gave both outputs.
        input_ids: The prompts `[batch, length]`, left-padded.
        attention_mask: 0 where they are padded `[batch, length]`.
        expected: The new tokens of plain greedy decoding, row by row.
        got: The new tokens of the method.
        options: Further options of `generate` that both outputs were made with.
    """
    places: dict[int, int] = {}
    for row, pair in enumerate(zip(expected, got, strict=True)):
        place = first_difference(*pair)
        if place is not None:
            places[row] = place
    if not places or torch.finfo(model.dtype).eps < 1e-4:
        return Lossless(len(expected), 0, len(places))
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    options["max_new_tokens"] = max(places.values()) + 1
    scores = model.generate(input_ids=input_ids, attention_mask=attention_mask, **options).scores
    near = 0
    for row, place in places.items():
        # One output ending before the other is no tie: both stop at the same tokens and the same length.
        if place < min(len(expected[row]), len(got[row])):
            top, second = scores[place][row].double().topk(2).values.tolist()
            near += top - second <= NEAR_TIE * ulp(top, model.dtype)
    return Lossless(len(expected), near, len(places) - near)

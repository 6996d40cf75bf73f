"""Logits to probabilities to tokens: processors, entropy, margin, seeded noise.

Nothing here narrows a float64: enumeration tests and the byte view rely on its precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process

__all__ = [
    "Noise",
    "entropy",
    "is_context_free",
    "is_row_free",
    "is_stateful",
    "kl",
    "likeliest",
    "margin",
    "probabilities",
    "substream",
]


def probabilities(scores: Tensor) -> Tensor:
    """Probabilities of scores `[..., vocab]`, in their own dtype."""
    return torch.softmax(scores, dim=-1)


def likeliest(scores: Tensor) -> Tensor:
    """Id of the largest of scores `[..., vocab]`, the first of equals, `[...]`."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64) and not scores.requires_grad:
        # On a CPU numpy takes a tenth of torch's time, which over many ids is that of a layer.
        return torch.from_numpy(np.asarray(scores.numpy().argmax(-1)))
    return scores.argmax(-1)


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of the distribution that scores `[..., vocab]` give, `[...]`; -inf scores count 0."""
    logs = torch.log_softmax(scores, dim=-1)
    return -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0)).sum(-1)


def margin(scores: Tensor) -> Tensor:
    """Difference of the two largest scores `[..., vocab]`, `[...]`."""
    top = scores.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def kl(p_scores: Tensor, q_scores: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) in nats of scores `[..., vocab]`, `[...]`."""
    p, q = torch.log_softmax(p_scores, dim=-1), torch.log_softmax(q_scores, dim=-1)
    return torch.where(p == -torch.inf, 0, p.exp() * (p - q)).sum(-1)


# --- what a logits processor looks at -------------------------------------------------------------
# Exact types: a subclass may look at anything.


def _types(*names: str) -> frozenset[type]:
    # Not every release has every processor.
    return frozenset(getattr(logits_process, name) for name in names if hasattr(logits_process, name))


_CONTEXT_FREE = _types(
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
_ROW_FREE = _CONTEXT_FREE | _types(
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
    "WatermarkLogitsProcessor",
)
_STATEFUL = _types(
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
)


def is_context_free(processor: object) -> bool:
    """Whether a logits processor looks at nothing but the scores, so that any rows may go in one call."""
    return type(processor) in _CONTEXT_FREE


def is_row_free(processor: object) -> bool:
    """Whether a logits processor treats each row by its ids and scores alone, wherever it stands in the batch."""
    return type(processor) in _ROW_FREE


def is_stateful(processor: object) -> bool:
    """Whether a logits processor remembers its calls, so that it must see each position once and in order."""
    return isinstance(processor, tuple(_STATEFUL))


# --- randomness -----------------------------------------------------------------------------------

_MASK = 2**64 - 1


def _mixed(*parts: int) -> int:
    """A well-mixed 64-bit number from integers (splitmix64's finaliser, chained)."""
    value = 0
    for part in parts:
        value = (value + part + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def substream(stream: int, position: int, number: int) -> int:
    """The stream of noise of the `number`-th branch that leaves a stream at a position: no other branch has it."""
    return _mixed(stream, position, number)


class Noise:
    """Random numbers that depend on a seed, a row and a position, and on nothing else.

    A row's choices then do not depend on its neighbours, nor on how many tokens a step drafts: every lossless
    method with deterministic drafts samples the same tokens as plain sampling with the same seed.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self._generator = torch.Generator(device)
        self._host = torch.Generator()

    def _seed_at(self, row: int, position: int, stream: int, purpose: int) -> int:
        # The CPU's generator reads 32 bits of a seed.
        return _mixed(self.seed, row, position, stream, purpose) >> 32

    def exponential(self, row: int, position: int, like: Tensor, stream: int = 0) -> Tensor:
        """Exponential noise `[vocab]` for the token at a position, in the shape and dtype of `like` `[vocab]`."""
        generator = self._generator.manual_seed(self._seed_at(row, position, stream, 0))
        return torch.empty_like(like).exponential_(1, generator=generator)

    def uniform(self, row: int, position: int, count: int, stream: int = 0) -> list[float]:
        """`count` numbers in [0, 1)."""
        generator = self._host.manual_seed(self._seed_at(row, position, stream, 1))
        return torch.rand(count, generator=generator, dtype=torch.float64).tolist()

    def sample(self, probs: Tensor, rows: Sequence[int], positions: Sequence[int], streams: Sequence[int]) -> Tensor:
        """One token for each row of probabilities `[n, vocab]`, `[n]`, by the race of exponential clocks that
        `torch.multinomial` runs too."""
        drawn = zip(probs, rows, positions, streams, strict=True)
        noise = [self.exponential(row, position, like, stream) for like, row, position, stream in drawn]
        return (probs / torch.stack(noise)).argmax(-1)

"""Several models, whatever their tokenizers, as one model of bytes; and how bytes are generated."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.decoding.byte_view.covers import Paths
from tokenry.decoding.byte_view.view import ByteState, ByteView, as_bytes, together
from tokenry.errors import BadParameter, BadPrompt
from tokenry.models import attached
from tokenry.sampling import Noise

END = 256
"""The outcome of an ensemble that stands for the end of the text."""


@dataclass(frozen=True)
class ByteResult:
    """Bytes that were generated.

    Attributes:
        data: The new bytes.
        ended: Whether the end of the text was chosen.
        forwards: Forwards of each model, that of the prompt included.
        forwards_per_byte: For each model the forwards behind the prompt, for each new byte.
        seconds: Wall time.
        kept: For each model the share of probability that was not pruned.
    """

    data: bytes
    ended: bool
    forwards: tuple[int, ...]
    forwards_per_byte: tuple[float, ...]
    seconds: float
    kept: tuple[float, ...]

    @property
    def text(self) -> str:
        """The new text; bytes that form no character are replaced by U+FFFD."""
        return self.data.decode(errors="replace")

    def __str__(self) -> str:
        rate = ", ".join(f"{each:.2f}" for each in self.forwards_per_byte)
        return f"{self.text}\n[{len(self.data)} bytes, {rate} forward passes a byte, {self.seconds:.2f} s]"


class ByteEnsemble:
    """The mean of several models' next-byte distributions (arXiv 2410.09303, section 4.3).

    Its bits per byte are at most the mean of its members', because the logarithm is concave. The members' tokenizers
    need nothing in common. Special tokens but the end of the text are left out, and each member renormalised.

    Args:
        members: Models with their tokenizers, or byte views.
        weights: A weight for each, which need not sum to 1; None: equal ones.
        paths: As in :class:`ByteView`, for members that are not views.
        prune: Likewise.

    Raises:
        BadParameter: There is no member, or a weight is not positive.
    """

    def __init__(
        self,
        members: Sequence[ByteView | tuple[PreTrainedModel, Any]],
        weights: Sequence[float] | None = None,
        *,
        paths: Paths = "canonical",
        prune: float = 0.0,
    ) -> None:
        if not members:
            raise BadParameter("an ensemble needs at least one model with its tokenizer")
        weights = [1.0] * len(members) if weights is None else list(weights)
        if len(weights) != len(members) or not all(0 < weight < math.inf for weight in weights):
            raise BadParameter(f"weights={weights} is not allowed; give a positive number for each of {len(members)}")
        self.views = [
            member if isinstance(member, ByteView) else ByteView(*member, paths=paths, prune=prune)
            for member in members
        ]
        total = math.fsum(weights)
        self.weights = [weight / total for weight in weights]

    def start(self, text: str | bytes = b"", contexts: Sequence[Sequence[int] | None] | None = None) -> EnsembleState:
        """The state behind a text; `contexts` are ids before it for each member, as in `ByteView.start`."""
        contexts = [None] * len(self.views) if contexts is None else contexts
        pairs = zip(self.views, contexts, strict=True)
        return EnsembleState([view.start(text, context) for view, context in pairs], self.weights)

    def log_prob(self, text: str | bytes, after: str | bytes = b"") -> float:
        """Log-probability in nats that a text follows another."""
        return float(self.start(after).read(as_bytes(text)).sum())

    def bits_per_byte(self, text: str | bytes, after: str | bytes = b"") -> float:
        """Bits per byte of a text that follows another.

        Raises:
            BadPrompt: The text is empty.
        """
        data = as_bytes(text)
        if not data:
            raise BadPrompt("the text is empty; bits per byte need at least one byte")
        return -self.log_prob(data, after) / len(data) / math.log(2)

    def generate(self, text: str | bytes = b"", **options: Any) -> ByteResult:
        """Continue a text; options are those of `EnsembleState.generate`."""
        return self.start(text).generate(**options)


class EnsembleState:
    """An ensemble behind one text; `append` moves it on in place."""

    def __init__(self, states: Sequence[ByteState], weights: Sequence[float] | None = None) -> None:
        self.states = list(states)
        self.weights = [1 / len(self.states)] * len(self.states) if weights is None else list(weights)
        self._logs = [math.log(weight) for weight in self.weights]

    def log_probs(self) -> Tensor:
        """Log-probabilities of the next byte and of the end of the text, `[257]`, on the first model's device."""
        return self._mixed([_closed(state, state.log_probs()) for state in self.states])

    def _mixed(self, parts: list[Tensor]) -> Tensor:
        device = parts[0].device
        weighted = [part.to(device) + log for part, log in zip(parts, self._logs, strict=True)]
        return torch.stack(weighted).logsumexp(0)

    def append(self, byte: int) -> None:
        """Add a byte to the text of every model; where one of them refuses it (see `ByteState.append`), to none."""
        together(self.states, functools.partial(ByteState.offer, byte=byte))

    def read(self, data: bytes) -> Tensor:
        """Add bytes and return the log-probability of each, `[bytes]`."""
        return self.read_members(data)[0]

    def read_members(self, data: bytes) -> tuple[Tensor, list[Tensor]]:
        """Add bytes and return the log-probability of each, `[bytes]`, under the ensemble and under each member."""
        data, most = as_bytes(data), min(state.most for state in self.states)
        found = [[state.read(b"")] for state in self.states]
        for begin in range(0, len(data), most):
            new = together(self.states, functools.partial(_read, data=data[begin : begin + most]))
            for own, logs in zip(found, new, strict=True):
                own.append(logs)
        parts = [torch.cat(own) for own in found]
        # The mean at every byte is over what the models give it there, whatever they gave the bytes before.
        return self._mixed(parts), parts

    def generate(
        self,
        *,
        max_bytes: int = 500,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[bytes | str] | bytes | str = (),
        stream: Callable[[bytes], Any] | None = None,
    ) -> ByteResult:
        """Choose byte after byte.

        Args:
            max_bytes: Bytes at most.
            temperature: Exponent `1 / temperature` on the bytes' probabilities; 0 takes the likeliest.
            top_p: The likeliest outcomes that together have this probability stay.
            seed: Sampling depends on it alone; None: torch's global generator.
            stop: A text or texts that end the generation once they were generated, themselves included.
            stream: Called with each byte.

        Raises:
            BadParameter: An option is out of range.
        """
        if max_bytes < 1:
            raise BadParameter(f"max_bytes={max_bytes} is not allowed; it must be at least 1")
        if not temperature >= 0:
            raise BadParameter(f"temperature={temperature} is not allowed; it must be at least 0")
        if not 0 < top_p <= 1:
            raise BadParameter(f"top_p={top_p} is not allowed; it must be above 0 and at most 1")
        stops = _marks(stop)
        begin = time.perf_counter()
        before = [(state.forwards, len(state.text)) for state in self.states]
        data = bytearray()
        ended = False
        noise = None
        with contextlib.ExitStack() as stack:
            for state in self.states:
                # One switch of the attention for the whole text.
                stack.enter_context(attached(state.view.model))
            while len(data) < max_bytes:
                logs = self.log_probs()
                noise = Noise(seed, logs.device) if seed is not None and noise is None else noise
                choice = choose(logs, temperature, top_p, noise, len(data))
                if choice == END:
                    ended = True
                    break
                data.append(choice)
                if stream is not None:
                    stream(bytes([choice]))
                if data.endswith(stops) or len(data) == max_bytes:
                    break
                self.append(choice)
        count = max(1, len(data))
        return ByteResult(
            bytes(data),
            ended,
            tuple(state.forwards for state in self.states),
            tuple((s.forwards - asked) / count for s, (asked, _) in zip(self.states, before, strict=True)),
            time.perf_counter() - begin,
            tuple(state.kept for state in self.states),
        )


def _marks(stop: Sequence[bytes | str] | bytes | str) -> tuple[bytes, ...]:
    marks = [stop] if isinstance(stop, str | bytes | bytearray) else list(stop)
    if not all(isinstance(mark, str | bytes | bytearray) and mark for mark in marks):
        raise BadParameter(f"stop={stop!r} is not allowed; give a text, or texts that are not empty, as str or bytes")
    return tuple(as_bytes(mark) for mark in marks)


def choose(logs: Tensor, temperature: float, top_p: float, noise: Noise | None, position: int) -> int:
    """An outcome of log-probabilities `[outcomes]`."""
    if temperature == 0:
        return int(logs.argmax())
    probs = (logs / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = probs.sort(descending=True)
        # What comes before the threshold is reached stays, and so the likeliest always does.
        kept = ordered.cumsum(-1) - ordered < top_p
        probs = torch.zeros_like(probs).scatter(0, places[kept], ordered[kept])
    if noise is None:
        return int(torch.multinomial(probs, 1))
    return int(noise.sample(probs[None], [0], [position], [0]))


def _read(state: ByteState, data: bytes) -> Tensor:
    return state.offer_text(data, functools.partial(_closed, state))


def _closed(state: ByteState, logs: Tensor) -> Tensor:
    """Log-probabilities `[..., 257]` of bytes and the end of the text, of `[..., 256 + symbols]`."""
    ends = logs[..., state.view.ends].logsumexp(-1, keepdim=True)
    joint = torch.cat([logs[..., :256], ends], -1)
    return joint.log_softmax(-1)

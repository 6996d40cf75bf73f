"""What a call of generate returns: ids with a source for each, counts and times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from tokenry.errors import BadParameter


class Source(IntEnum):
    """Where a token comes from."""

    PLAIN = 0
    """The target model's choice, one forward pass for this token."""
    DRAFT = 1
    """Drafted, and accepted by the target model."""
    BONUS = 2
    """The target model's own token that closes a verify step."""
    TRIAL = 3
    """From the trial that was kept out of several."""
    ROUTER = 4
    """From the model or path that a router chose."""


NO_SOURCE = -1
"""What stands in `sources` under prompt and padding."""


@dataclass
class Stats:
    """Counts and times of one call.

    Attributes:
        forwards: Forward passes of the target model, prefill included (one for each chunk of it).
        passes: The same counted once for each row that was unfinished: `committed / passes` is tokens per pass.
        steps: Verify steps, counted once for each unfinished row.
        drafted: Draft tokens that were verified, all rows.
        accepted: Draft tokens that were committed.
        drafted_to: At `d - 1` the verify steps whose drafts reached depth `d`, counted once for each row.
        accepted_to: Those of them whose walk reached it too, before an end token or a limit cut it.
        verified: Tokens that verify steps committed, the target's own token of each step included.
        committed: Tokens committed, all rows.
        seconds: Wall time of the whole call after transformers' preparation, in seconds.
        prefill_seconds: The part of it before the first token.
        drafter_seconds: The part of it spent on proposing and learning.
        kv_bytes: Bytes of keys and values held at the end.
        kv_peak_bytes: Most bytes of keys and values held at any time.
        extra: What a method counts besides.
    """

    forwards: int = 0
    passes: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    committed: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    drafter_seconds: float = 0.0
    kv_bytes: int = 0
    kv_peak_bytes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    drafted_to: list[int] = field(default_factory=list)
    accepted_to: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._walks: list[tuple[Tensor, Tensor]] = []

    def note_walk(self, deepest: Tensor, accepted: Tensor) -> None:
        """Note for each row how deep a verify step's drafts and its walk reached, both `[batch]`, without waiting for
        the device; `settle` counts them."""
        self._walks.append((deepest, accepted))

    def settle(self) -> None:
        """Count the walks noted so far into `drafted_to` and `accepted_to`."""
        if self._walks:
            deepest, accepted = (torch.cat(parts).cpu() for parts in zip(*self._walks, strict=True))
            self.drafted_to = _added(self.drafted_to, _reaching(deepest))
            self.accepted_to = _added(self.accepted_to, _reaching(accepted))
            self.accepted_to += [0] * (len(self.drafted_to) - len(self.accepted_to))
            self._walks = []

    @classmethod
    def total(cls, parts: Iterable[Stats]) -> Stats:
        """The stats of several calls as one: counts and times summed, bytes the largest, `extra` left out."""
        whole = cls()
        for part in parts:
            for name in _SUMMED:
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            whole.drafted_to = _added(whole.drafted_to, part.drafted_to)
            whole.accepted_to = _added(whole.accepted_to, part.accepted_to)
            whole.kv_bytes = max(whole.kv_bytes, part.kv_bytes)
            whole.kv_peak_bytes = max(whole.kv_peak_bytes, part.kv_peak_bytes)
        return whole

    @property
    def acceptance(self) -> list[float]:
        """Share of the verify steps that drafted to depth 1, 2, ... whose walk reached it."""
        return [accepted / drafted for drafted, accepted in zip(self.drafted_to, self.accepted_to, strict=True)]

    @property
    def tokens_per_pass(self) -> float:
        """Tokens committed per forward pass and row; 1 for plain decoding."""
        return self.committed / self.passes if self.passes else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted tokens (MAT): tokens committed per verify step, the target's own token included."""
        return self.verified / self.steps if self.steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens committed per second, prefill included."""
        return self.committed / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        text = f"{self.committed} tokens in {self.forwards} passes ({self.tokens_per_pass:.2f} a pass), "
        text += f"{self.seconds:.2f} s ({self.tokens_per_second:.1f} tokens/s)"
        if self.drafted:
            text += f", {self.accepted} of {self.drafted} drafted tokens accepted"
        return text


_SUMMED = (
    "forwards", "passes", "steps", "drafted", "accepted", "verified", "committed", "seconds", "prefill_seconds",
    "drafter_seconds",
)  # fmt: skip


def _reaching(depths: Tensor) -> list[int]:
    """How many depths are at least 1, 2, ..."""
    return torch.bincount(depths).flip(0).cumsum(0).flip(0)[1:].tolist()


def _added(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(one, other, fillvalue=0)]


@dataclass
class GenerationResult(GenerateDecoderOnlyOutput):
    """transformers' output with the source of every token and the call's counts.

    Attributes:
        sequences: Ids `[batch, length]`, prompt and padding included, as `generate` returns them.
        scores: For each new token the processed scores `[batch, vocab]`, if asked for; zeros where a row was
            finished before the token, except in the plain loop.
        logits: Likewise the raw logits.
        past_key_values: The cache, `length - 1` tokens long; the policy's own cache inside a policy's block.
        sources: `Source` of each token, int8 `[batch, length]`, -1 under prompt and padding.
        stats: Counts and times.
        prompt_length: Columns of the prompt, left padding included.
        method: The text form of the decoder, and of the cache policy it ran inside, if any.
    """

    sources: Tensor | None = None
    stats: Stats | None = None
    prompt_length: int | None = None
    method: str | None = None

    @property
    def new_tokens(self) -> list[list[int]]:
        """The new ids of each row, without padding."""
        if self.sources is None:
            raise BadParameter("this result holds no sources, so its new tokens are not known")
        return [ids[source >= 0].tolist() for ids, source in zip(self.sequences, self.sources, strict=True)]

    @property
    def new_sources(self) -> list[list[Source]]:
        """The source of each new id of each row."""
        if self.sources is None:
            raise BadParameter("this result holds no sources")
        return [[Source(s) for s in source[source >= 0].tolist()] for source in self.sources]

    def texts(self, tokenizer: Any = None) -> list[str]:
        """The new text of each row, special tokens left out; results of `tokenry.generate` know their tokenizer."""
        tokenizer = tokenizer if tokenizer is not None else self.__dict__.get("tokenizer")
        if tokenizer is None:
            raise BadParameter("this result does not know its tokenizer: call texts(tokenizer)")
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in self.new_tokens]

    def text(self, tokenizer: Any = None, row: int = 0) -> str:
        """The new text of one row."""
        return self.texts(tokenizer)[row]

    def __str__(self) -> str:
        if self.__dict__.get("tokenizer") is not None:
            body = "\n---\n".join(self.texts())
        else:
            body = "\n".join(" ".join(map(str, ids)) for ids in self.new_tokens)
        return f"{body}\n[{self.method}: {self.stats}]" if self.stats else body


def stacked(entries: list[Tensor], counts: list[list[int]], batch: int) -> tuple[Tensor, ...]:
    """For each new token its `[batch, vocab]`, from per-step tensors `[batch, m, vocab]` of which row `b` kept the
    first `counts[step][b]`; zeros where a row has no such token."""
    if all(entry.shape[1] == 1 for entry in entries):
        # One token a step: rows keep step and token aligned, and finished rows ran along.
        return tuple(entry[:, 0] for entry in entries)
    rows = [
        torch.cat([entry[row, : count[row]] for entry, count in zip(entries, counts, strict=True)])
        for row in range(batch)
    ]
    return tuple(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unbind(1))

"""One token a step, as transformers' own greedy search and sampling choose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokenry.generation.engine import Commit, Decoder, Session
from tokenry.generation.result import Source


@dataclass(frozen=True, kw_only=True)
class Plain(Decoder):
    """Greedy search or multinomial sampling, one forward pass a token.

    Equal to transformers' `generate` to the bit, sampling without a seed included. It is the baseline of every
    comparison, and what a cache policy runs under.
    """

    native: ClassVar[bool] = True

    def step(self, session: Session, state: Any) -> Commit:
        return plain_step(session)


def plain_step(session: Session, logits: Tensor | None = None, scores: Tensor | None = None) -> Commit:
    """Commit one token for each row from the next logits, or from logits and scores `[batch, vocab]` at hand."""
    if logits is None or scores is None:
        logits = session.next_logits()
        scores = session.process(logits)
    tokens = session.choose(scores)
    return Commit(
        tokens[:, None],
        session.active.long(),
        Source.PLAIN,
        logits=logits[:, None] if session.want_logits else None,
        scores=scores[:, None] if session.want_scores else None,
    )

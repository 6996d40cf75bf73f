"""What the drafters share that copy one chain from the text: prompt lookup and suffix decoding."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenry.generation.engine import Session
from tokenry.speculation.budget import RunCounts, StepCosts, best_size
from tokenry.speculation.engine import Drafter, DraftTree, TreeShape, Walk
from tokenry.speculation.sources import Text, Texts

Match = tuple[int, int]
"""The index of an occurrence's last token, and over how many tokens it agrees."""


@dataclass
class CopyState:
    """What a call keeps: its texts, for `tokens="auto"` counts and costs, and what each row last copied."""

    texts: Texts
    counts: RunCounts | None
    costs: StepCosts | None
    runs: list[int] = field(default_factory=list)
    copies: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CopyDrafter(Drafter):
    """Base of drafters that copy what followed an earlier occurrence of the last tokens, as one chain.

    A method gives `find`, and `reach`, over how many tokens occurrences are compared. Where `tokens="auto"`, a step
    drafts the length that promises most tokens a second, by the measured cost of a forward over n tokens and by how
    often copied tokens were right so far in this call, counted by the length of the match behind them. Rows of a batch
    look up and count for themselves, and draft to one length.

    Attributes:
        tokens: Most tokens drafted, or `"auto"`.
    """

    early: ClassVar[bool] = True

    tokens: int | Literal["auto"] = "auto"

    def validate(self) -> None:
        self.check("tokens", "auto or at least 1", self.tokens == "auto" or self.tokens >= 1)

    @property
    @abstractmethod
    def reach(self) -> int:
        """Most tokens that an occurrence is compared over."""

    @abstractmethod
    def find(self, text: Text) -> Match | None:
        """The occurrence whose continuation is copied."""

    def most(self, run: int) -> int:
        """Most tokens drafted after a match of `run` tokens, where `tokens` is a number."""
        assert self.tokens != "auto"
        return self.tokens

    def start(self, session: Session) -> CopyState:
        if self.tokens == "auto":
            return CopyState(Texts(session, self.reach), RunCounts(), StepCosts(session))
        return CopyState(Texts(session, self.reach), None, None)

    def propose(self, session: Session, state: CopyState, room: int) -> DraftTree:
        if state.costs is not None:
            state.costs.begin()
        state.texts.update(session)
        rows = state.texts.rows
        found = [self.find(text) if alive else None for text, alive in zip(rows, session.alive, strict=True)]
        state.runs = [match[1] if match else 0 for match in found]
        if state.costs is not None:
            # One more than is drafted: it is judged by the target's own token.
            room = min(room, len(state.costs.seconds) - 2)
            lengths = [room + 1 if run else 0 for run in state.runs]
        else:
            lengths = [min(self.most(run), room) if run else 0 for run in state.runs]
        state.copies = [
            text.copy(match[0], length) if match and length > 0 else []
            for text, match, length in zip(rows, found, lengths, strict=True)
        ]
        drafts = state.copies
        if state.counts is not None and state.costs is not None:
            reaches = [
                state.counts.reach(run, max(len(copy) - 1, 0))
                for run, copy, alive in zip(state.runs, drafts, session.alive, strict=True)
                if alive
            ]
            size = best_size(reaches, state.costs.seconds)
            state.costs.take(size)
            drafts = [copy[: size - 1] for copy in drafts]
        longest = max(map(len, drafts))
        if longest == 0:
            return DraftTree.root(session.anchor)
        padded = [copy + [0] * (longest - len(copy)) for copy in drafts]
        tokens = torch.cat([session.anchor[:, None], torch.tensor(padded, device=session.device)], 1)
        valid: Tensor | None = None
        if any(len(copy) < longest for copy in drafts):
            real = [[True] * (1 + len(copy)) + [False] * (longest - len(copy)) for copy in drafts]
            valid = torch.tensor(real, device=session.device)
        return DraftTree(tokens, TreeShape.chain(longest + 1, session.device), valid)

    def observe(self, session: Session, state: CopyState, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        # Without room for drafts nothing was looked up.
        if state.counts is None or not state.runs:
            return
        rows = zip(state.runs, state.copies, walk.tokens.tolist(), walk.counts.tolist(), strict=True)
        for run, copy, tokens, count in rows:
            state.counts.learn(run, copy, tokens[:count])
        state.runs, state.copies = [], []

"""Draft a chain of tokens with a small model of the same tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenry.generation.engine import Session
from tokenry.sampling import probabilities
from tokenry.speculation.companion import Companion, CompanionDrafter, Draws, end_tokens
from tokenry.speculation.engine import DraftTree, TreeShape, Walk
from tokenry.speculation.sizing import Sizing

# Lengths that `tokens="auto"` chooses from, and the one it begins with.
_LENGTHS, _FIRST = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20), 4


@dataclass
class _State:
    companion: Companion
    draws: Draws
    ends: Tensor
    sizing: Sizing | None


@dataclass(frozen=True, kw_only=True)
class DraftModel(CompanionDrafter):
    """Draft a chain with a second model, one of its forwards a token.

    Speculative decoding as Leviathan et al. 2211.17192 and Chen et al. 2302.01318 published it. The drafts see every
    logits processor that the target's tokens see, so temperature, truncation and penalties are those of the target.
    Number and confidence are the defaults of transformers' assisted generation. It drafts nothing behind an end token,
    and nothing behind the second model's own context.

    Where `tokens="auto"`, forwards of both models are measured once per process, and before every step the chain gets
    the length that has given most tokens a second, none at all included (`sizing`).

    Attributes:
        tokens: Most tokens drafted, or `"auto"`.
        confidence: A row's draft ends with the first token whose probability is below this; 0 never ends it.
    """

    tokens: int | Literal["auto"] = 20
    confidence: float = 0.4

    def validate(self) -> None:
        self.check("tokens", "at least 1, or auto", self.tokens == "auto" or self.tokens >= 1)
        self.check("confidence", "from 0 to 1", 0 <= self.confidence <= 1)

    def start(self, session: Session) -> _State:
        model = self.second_model(session.model, session.resources)
        sizing = Sizing(session, model, _LENGTHS, _FIRST) if self.tokens == "auto" else None
        return _State(Companion(session, model), Draws(session, self.choice), end_tokens(session), sizing)

    def propose(self, session: Session, state: _State, room: int) -> DraftTree:
        companion, draws = state.companion, state.draws
        wanted = self.tokens if state.sizing is None else state.sizing.next()
        count = min(int(wanted), room, companion.room(session))
        if count < 1:
            return DraftTree.root(session.anchor)
        logits = companion.catch_up(session)
        going = session.active
        tokens, real, proposals = [session.anchor], [torch.ones_like(going)], []
        for ahead in range(count):
            probs = probabilities(_processed(session, logits, ahead))
            token, _ = draws.order(session, probs[:, None], ahead, 1)
            token = token[:, 0, 0]
            tokens.append(token)
            real.append(going)
            proposals.append(probs)
            going = going & ~torch.isin(token, state.ends)
            if self.confidence > 0:
                going = going & (probs.gather(1, token[:, None])[:, 0] >= self.confidence)
            if ahead + 1 == count or not bool(going.any()):
                break
            if not session.context_free:
                session.look_ahead(token, ahead)
            logits = companion.feed(session, token[:, None])[:, 0]
        drafted = len(tokens) - 1
        companion.nodes = torch.arange(-1, drafted, device=session.device)[None]
        companion.nodes[:, -1] = -1  # the last draft was never fed
        valid = torch.stack(real, 1)
        return DraftTree(
            torch.stack(tokens, 1),
            TreeShape.chain(drafted + 1, session.device),
            None if bool(valid.all()) else valid,
            q=torch.stack([*proposals, torch.zeros_like(proposals[0])], 1) if draws.sampled else None,
        )

    def observe(self, session: Session, state: _State, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        if state.sizing is not None:
            nodes = torch.arange(1, tree.shape.size, device=session.device)
            depth = nodes.expand(session.batch, -1)
            if tree.valid is not None:
                depth = depth * tree.valid[:, 1:]
            accepted = nodes < walk.counts[:, None]
            state.sizing.count(depth[session.active], accepted[session.active])
        super().observe(session, state, tree, logits, walk)


def _processed(session: Session, logits: Tensor, ahead: int) -> Tensor:
    """Scores as the target's are processed, `[batch, vocab]`."""
    if session.processors and session.context_free:
        # Context-free processors read no ids, so rows of unequal length go in one call.
        return session.processors(session.anchor[:, None], logits)
    return session.process(logits, ahead)

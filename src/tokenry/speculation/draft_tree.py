"""Draft a tree of fixed shape with a small model of the same tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenry.generation.engine import Session
from tokenry.sampling import is_context_free, probabilities
from tokenry.speculation.companion import Companion, CompanionDrafter, Draws
from tokenry.speculation.engine import DraftTree, TreeShape


@dataclass
class _State:
    companion: Companion
    draws: Draws


@dataclass(frozen=True, kw_only=True)
class FixedDraftTree(CompanionDrafter):
    """Draft the same number of children under every node, breadth first, one forward of the second model a level.

    The control for trees that grow where the draft is confident, after the fixed expansion of SpecInfer, arXiv
    2305.09781, section 3; its widths vary by level, here they do not. With one child it is a chain.

    Attributes:
        size: Nodes of the tree, the root left out.
        children: Children of a node.
    """

    size: int = 16
    children: int = 2

    def validate(self) -> None:
        self.check("size", "at least 1", self.size >= 1)
        self.check("children", "at least 1", self.children >= 1)

    def start(self, session: Session) -> _State:
        model = self.second_model(session.model, session.resources)
        return _State(Companion(session, model), Draws(session, self.choice))

    def propose(self, session: Session, state: _State, room: int) -> DraftTree:
        companion, draws, device = state.companion, state.draws, session.device
        deepest = min(room, companion.room(session))
        if deepest < 1:
            return DraftTree.root(session.anchor)
        children = min(self.children, session.vocab)
        logits = companion.catch_up(session)[:, None]
        tokens, nodes, proposals = [session.anchor[:, None]], [torch.tensor([-1])], []
        # Which drafts each node of the level sees.
        lines = torch.zeros(1, 1, 0, dtype=torch.bool, device=device)
        left, fed = self.size, 0
        for level in range(deepest):
            probs = probabilities(_scores(session, logits))
            drafts, _ = draws.order(session, probs, level, children)
            drafts = drafts.flatten(1)[:, :left]
            proposals.append(probs)
            left -= drafts.shape[1]
            inner = min(drafts.shape[1], -(-left // children)) if level + 1 < deepest else 0
            tokens.append(drafts)
            nodes += [torch.arange(fed, fed + inner), torch.full((drafts.shape[1] - inner,), -1)]
            if not inner:
                break
            above = lines.repeat_interleave(children, 1)[:, :inner]
            lines = torch.cat([above, torch.eye(inner, dtype=torch.bool, device=device)[None]], 2)
            logits = companion.feed(session, drafts[:, :inner], lines)
            fed += inner
        companion.nodes = torch.cat(nodes)[None].to(device)
        tree = torch.cat(tokens, 1)
        parents = tuple((node - 1) // children for node in range(tree.shape[1]))
        q = _spread(torch.cat(proposals, 1), companion.nodes[0]) if draws.sampled else None
        return DraftTree(tree, TreeShape.of(parents, device), q=q)


def _spread(probs: Tensor, fed: Tensor) -> Tensor:
    """Distributions of the root and the fed nodes `[batch, 1 + fed, vocab]` at the nodes of the tree, 0 elsewhere."""
    place = (fed + 1).clamp(min=0)
    parent = fed >= 0
    parent[0] = True
    return probs[:, place] * parent[None, :, None]


def _scores(session: Session, logits: Tensor) -> Tensor:
    """Scores `[batch, n, vocab]` of logits: processors that read the text are left to the target."""
    scores = logits.reshape(-1, logits.shape[-1])
    unread = session.anchor[:1, None].expand(scores.shape[0], 1)
    for processor in session.processors:
        if is_context_free(processor):
            scores = processor(unread, scores)
    return scores.view_as(logits)

"""DySpec: grow the draft tree at run time where the draft model is confident."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper

from tokenry.generation.engine import Session
from tokenry.sampling import is_context_free, probabilities
from tokenry.speculation.companion import Companion, CompanionDrafter, Draws, end_tokens
from tokenry.speculation.engine import DraftTree, TreeShape, Walk
from tokenry.speculation.sizing import Sizing

# Numbers of nodes that `size="auto"` chooses from, and the one it begins with.
_SIZES, _FIRST = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), 8
# A draw that is less likely to be verified than this is rounding.
_FLOOR = 1e-8


@dataclass(frozen=True)
class _Pool:
    """All draws that could be made at the nodes that the draft model was fed, the root included: `width` of each node.

    Attributes:
        width: Draws of each node, in the order they are drawn.
        tokens: `[batch, fed * width]`.
        rank: How much each is worth, -inf where there is none; never above that of the draw's node or elder sibling.
        reach: Chance that the walk passes the drawn token, likewise.
        chosen: Which are made, bool.
        own: The draw that each fed node is, `[batch, fed]`, -1 for the root.
        probs: Distribution at each fed node `[batch, fed, vocab]`, if drafts are sampled.
    """

    width: int
    tokens: Tensor
    rank: Tensor
    reach: Tensor
    chosen: Tensor
    own: Tensor
    probs: Tensor | None


@dataclass
class _State:
    companion: Companion
    draws: Draws
    ends: Tensor
    sizing: Sizing | None
    # Nodes of the last tree in the order of their worth, `[batch, n]`.
    ranking: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DySpec(CompanionDrafter):
    """Draft the tree whose nodes are likeliest to be reached, by the draft model's own probabilities.

    A draw at a node is worth `v`, the chance that verification gets to it: the product of the draft probabilities on
    the path times what the elder siblings leave. The tree is made of the `size` draws worth most; each is decided upon
    before its token is looked at, so rejection sampling without replacement keeps the target's law. Source: DySpec,
    arXiv 2410.11744, algorithms 1 to 3; size and draft temperature are the paper's. Where drafts are not sampled
    (greedy decoding, `choice="top"`, a seed), a token may be looked at first: a node is worth the product of the
    probabilities of its path, its own included (appendix D.1), and no tree of its size is expected to have more
    accepted.

    The paper takes draws from a heap and runs the draft model once for each. As no draw is worth more than the one
    above it or its elder sibling, the heap's tree is the set of the `size` best draws, which is found level by level
    with one forward a level: a node is fed only if a draw of its own can still be among them.

    Where drafts are coupled to a seed they follow the target's own temperature. Processors that read the text
    (penalties) are left to the target.

    Attributes:
        size: Nodes of the tree, the root left out, or `"auto"`: before every step the number that has given most
            tokens a second by measured forwards of both models (`sizing`).
        mode: `"heap"`: the `size` best draws (algorithm 1). `"layered"`: level by level all draws that are worth
            `threshold` or more, the best first, until there are `size` (algorithm 2).
        threshold: For `"layered"`; None: 1 / size.
        draft_temperature: Temperature of the draft model, whatever the target's is.
        max_depth: Deepest node; None: no limit.
    """

    size: int | Literal["auto"] = 64
    mode: Literal["heap", "layered"] = "heap"
    threshold: float | None = None
    draft_temperature: float = 0.6
    max_depth: int | None = None

    def validate(self) -> None:
        self.check("size", "at least 1, or auto", self.size == "auto" or self.size >= 1)
        self.check("threshold", "above 0 and at most 1", self.threshold is None or 0 < self.threshold <= 1)
        unused = self.threshold is not None and self.mode == "heap"
        self.check("threshold", "left out", not unused, why="mode=heap takes the best draws whatever they are worth")
        self.check("draft_temperature", "above 0", 0 < self.draft_temperature < math.inf)
        self.check("max_depth", "at least 1", self.max_depth is None or self.max_depth >= 1)

    def start(self, session: Session) -> _State:
        model = self.second_model(session.model, session.resources)
        sizing = Sizing(session, model, _SIZES, _FIRST) if self.size == "auto" else None
        return _State(Companion(session, model), Draws(session, self.choice), end_tokens(session), sizing)

    def propose(self, session: Session, state: _State, room: int) -> DraftTree:
        size = int(self.size if state.sizing is None else state.sizing.next())
        deepest = min(room, state.companion.room(session), self.max_depth or room)
        state.ranking = None
        if size < 1 or deepest < 1:
            return DraftTree.root(session.anchor)
        return _assembled(session, state, self._grown(session, state, size, deepest))

    def _grown(self, session: Session, state: _State, size: int, deepest: int) -> _Pool:
        """Feed the draft model level by level."""
        companion, device = state.companion, session.device
        logits = companion.catch_up(session)[:, None]
        reach, real = torch.ones(session.batch, 1, device=device), session.active[:, None]
        own = torch.full((session.batch, 1), -1, device=device)
        # A row that may commit less than others has its nodes where it can.
        rooms = torch.tensor(session.limits(), device=device)[:, None] - 1
        # Which drafts each node of the level sees.
        lines = torch.zeros(session.batch, 1, 0, dtype=torch.bool, device=device)
        pool = None
        for level in range(deepest):
            pool = self._drawn(session, state, pool, logits, reach, real & (level < rooms), own, level, size)
            begin = pool.rank.shape[1] - logits.shape[1] * pool.width
            pool, bar = self._choose(pool, begin, size)
            # A node's draws are worth at most its reach, so a node below the bar stays a leaf.
            inner = pool.chosen[:, begin:] & (pool.reach[:, begin:] > bar)
            inner &= ~torch.isin(pool.tokens[:, begin:], state.ends)
            count = int(inner.sum(1).max())
            if count == 0 or level + 1 == deepest:
                break
            picks = inner.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
            real = inner.gather(1, picks)
            own, reach = picks + begin, pool.reach[:, begin:].gather(1, picks)
            above = lines.gather(1, (picks // pool.width)[..., None].expand(-1, -1, lines.shape[2]))
            itself = torch.eye(count, dtype=torch.bool, device=device).expand(session.batch, -1, -1)
            lines = torch.cat([above, itself], 2)
            logits = companion.feed(session, pool.tokens.gather(1, own), lines)
        assert pool is not None
        return pool

    def _drawn(
        self,
        session: Session,
        state: _State,
        pool: _Pool | None,
        logits: Tensor,
        reach: Tensor,
        real: Tensor,
        own: Tensor,
        level: int,
        size: int,
    ) -> _Pool:
        """The pool with the draws of a level's nodes, of which those that are not `real` `[batch, n]` have none."""
        draws = state.draws
        probs = probabilities(self._warped(session, logits, draws.coupled))
        width = min(size, probs.shape[-1])
        tokens, likely = draws.order(session, probs, level, width)
        left = 1 - (likely.cumsum(-1) - likely)
        value = (reach[..., None] * left).clamp(min=0).cummin(-1).values
        passed = torch.minimum(reach[..., None] * likely, value)
        rank = value if draws.sampled else passed
        rank = rank.masked_fill(~real[..., None] | (likely <= 0) | (rank < _FLOOR), -torch.inf)
        new = _Pool(
            width,
            tokens.flatten(1),
            rank.flatten(1),
            passed.flatten(1),
            torch.zeros_like(rank, dtype=torch.bool).flatten(1),
            own,
            probs if draws.sampled else None,
        )
        return new if pool is None else _joined(pool, new)

    def _warped(self, session: Session, logits: Tensor, coupled: bool) -> Tensor:
        """Scores `[batch, n, vocab]` of logits: the call's truncation at the draft's temperature."""
        scores = logits.reshape(-1, logits.shape[-1])
        if not coupled:
            scores = scores / self.draft_temperature
        unread = session.anchor[:1, None].expand(scores.shape[0], 1)
        for processor in session.processors:
            if is_context_free(processor) and (coupled or type(processor) is not TemperatureLogitsWarper):
                scores = processor(unread, scores)
        return scores.view_as(logits)

    def _choose(self, pool: _Pool, begin: int, size: int) -> tuple[_Pool, Tensor]:
        """Choose among the draws; those from `begin` on are new. Also what a node's reach must exceed, `[batch, 1]`,
        for its draws to be chosen."""
        if self.mode == "heap":
            # A stable sort: of two that are worth the same, the one higher up or drawn first comes first.
            order = pool.rank.argsort(dim=1, descending=True, stable=True)[:, :size]
            best = pool.rank.gather(1, order)
            chosen = torch.zeros_like(pool.chosen).scatter_(1, order, best > -torch.inf)
            bar = best[:, -1:] if best.shape[1] == size else torch.full_like(best[:, :1], -torch.inf)
            return replace(pool, chosen=chosen), bar.clamp(min=_FLOOR)
        threshold = self.threshold or 1 / size
        left = size - pool.chosen.sum(1, keepdim=True)
        order = pool.rank[:, begin:].argsort(dim=1, descending=True, stable=True)
        taken = torch.arange(order.shape[1], device=order.device) < left
        fits = taken & (pool.rank[:, begin:].gather(1, order) >= threshold)
        new = torch.zeros_like(pool.chosen[:, begin:]).scatter_(1, order, fits)
        chosen = torch.cat([pool.chosen[:, :begin], new], 1)
        full = chosen.sum(1, keepdim=True) >= size
        # The next level takes what reaches the threshold itself.
        bar = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)).to(pool.rank.device)
        return replace(pool, chosen=chosen), torch.where(full, torch.inf, bar)

    def observe(self, session: Session, state: _State, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        if state.sizing is not None and state.ranking is not None:
            ranking = state.ranking[:, : tree.shape.size]
            nodes = torch.arange(tree.shape.size, device=session.device)
            steps = torch.arange(walk.path.shape[1], device=session.device) < walk.counts[:, None]
            walked = ((walk.path[:, :, None] == nodes) & steps[..., None]).any(1)
            depth = tree.shape.depth.expand_as(tree.tokens)
            if tree.valid is not None:
                depth = depth * tree.valid
            order = ranking.argsort(dim=1, descending=True, stable=True)[:, 1:]  # the root comes first
            depth, walked = (each.gather(1, order)[session.active] for each in (depth, walked))
            state.sizing.count(depth, walked)
        super().observe(session, state, tree, logits, walk)


def _joined(pool: _Pool, new: _Pool) -> _Pool:
    names = ("tokens", "rank", "reach", "chosen", "own")
    joined = {name: torch.cat([getattr(pool, name), getattr(new, name)], 1) for name in names}
    probs = None if pool.probs is None or new.probs is None else torch.cat([pool.probs, new.probs], 1)
    return _Pool(width=pool.width, probs=probs, **joined)


def _assembled(session: Session, state: _State, pool: _Pool) -> DraftTree:
    """The tree of the chosen draws. Draws stand level by level, siblings as drawn, so their order is breadth first."""
    batch, device = session.batch, session.device
    count = int(pool.chosen.sum(1).max())
    if count == 0:
        state.companion.nodes = torch.full((1, 1), -1, device=device)
        return DraftTree.root(session.anchor)
    place = pool.chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    valid = torch.nn.functional.pad(pool.chosen.gather(1, place), (1, 0), value=True)
    # Node of each draw, and of each fed node; a column beyond the last takes those that were fed and not chosen.
    number = torch.where(pool.chosen, pool.chosen.cumsum(1), count + 1)
    node = torch.where(pool.own < 0, 0, number.gather(1, pool.own.clamp(min=0)))
    parents = node.gather(1, place // pool.width).masked_fill(~valid[:, 1:], 0)
    # What pads a row stands under its last parent, so that depths ascend.
    parents = torch.nn.functional.pad(parents.cummax(1).values, (1, 0), value=-1)
    fed = torch.full((batch, count + 2), -1, device=device)
    fed.scatter_(1, node, torch.arange(node.shape[1], device=device).expand_as(node))
    fed = fed[:, : count + 1]
    state.companion.nodes = fed - 1  # the root was fed as text
    if state.sizing is not None:
        worth = pool.rank.gather(1, place).masked_fill(~valid[:, 1:], -torch.inf)
        state.ranking = torch.nn.functional.pad(worth, (1, 0), value=torch.inf)
    q = None
    if pool.probs is not None:
        vocab = pool.probs.shape[-1]
        q = pool.probs.gather(1, fed.clamp(min=0)[..., None].expand(-1, -1, vocab)) * (fed >= 0)[..., None]
    return DraftTree(
        torch.cat([session.anchor[:, None], pool.tokens.gather(1, place)], 1),
        TreeShape.of(parents),
        None if bool(valid.all()) else valid,
        q=q,
    )

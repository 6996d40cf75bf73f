"""One lossless verify step that every drafter plugs into: chain or tree, greedy or sampled, any batch.

A drafter proposes a tree of continuations whose node 0 is the anchor, the last committed token. One forward scores
every node. A walk from the root keeps the longest path that plain decoding could have produced and adds one token of
the target's own. Source: Leviathan et al. 2211.17192, Chen et al. 2302.01318, SpecInfer 2305.09781, Medusa 2401.10774,
recursive rejection without replacement 2402.14160 and 2402.12374.
"""

from __future__ import annotations

import contextlib
import functools
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.generation.auxiliary import Auxiliary
from tokenry.generation.engine import Commit, Decoder, Session
from tokenry.generation.plain import plain_step
from tokenry.generation.result import Source
from tokenry.models import packed
from tokenry.sampling import probabilities

__all__ = ["Auxiliary", "DraftTree", "Drafter", "TreeShape", "Walk", "rejection"]


class TreeShape:
    """How the nodes of a tree hang together.

    Nodes stand in breadth-first order: parents before children, depths ascending, siblings in the order they were
    drawn. Shapes are shared between steps and calls, so nothing changes them.

    Attributes:
        parents: `[1 or batch, n]`; the root's is -1.
        depth: `[1 or batch, n]`.
        ancestors: Bool `[1 or batch, n, n]`: whether `j` is `i` or an ancestor of `i`.
        size: n.
        deepest: The largest depth.
        is_chain: Whether every node's parent is the node before it.
    """

    def __init__(self, parents: Tensor, depth: Tensor, ancestors: Tensor) -> None:
        self.parents, self.depth, self.ancestors = parents, depth, ancestors
        self.size = parents.shape[1]
        self.deepest = int(depth.max())
        # In breadth-first order only a chain is as deep as it is long.
        self.is_chain = parents.shape[0] == 1 and self.deepest == self.size - 1
        self._prefixes: dict[int, TreeShape] = {}

    @functools.cached_property
    def on_host(self) -> tuple[list[list[int]], list[list[int]]]:
        """`parents` and `depth` as lists."""
        return self.parents.tolist(), self.depth.tolist()

    @classmethod
    def of(cls, parents: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> TreeShape:
        """The shape of parents `(-1, 0, 0, 1, ...)`, or one shape for each row from a tensor `[batch, n]`."""
        if isinstance(parents, Tensor):
            return _built(parents.to(device))
        return _static(tuple(parents), torch.device(device))

    @classmethod
    def chain(cls, size: int, device: torch.device | str = "cpu") -> TreeShape:
        """The chain of `size` nodes, the anchor included."""
        return cls.of(tuple(range(-1, size - 1)), device)

    def prefix(self, size: int) -> TreeShape:
        """The first `size` nodes."""
        if size >= self.size:
            return self
        if size not in self._prefixes:
            self._prefixes[size] = TreeShape(
                self.parents[:, :size], self.depth[:, :size], self.ancestors[:, :size, :size]
            )
        return self._prefixes[size]

    def shallow(self, deepest: int) -> TreeShape:
        """The nodes down to a depth."""
        if deepest >= self.deepest:
            return self
        return self.prefix(int((self.depth.amin(0) <= deepest).nonzero()[-1]) + 1)

    def select(self, nodes: Tensor) -> TreeShape:
        """Some nodes, ascending `[m]`; a node's parent must be among them."""
        place = torch.full((self.size + 1,), -1, device=nodes.device)
        place[nodes] = torch.arange(nodes.shape[0], device=nodes.device)
        parents = place[self.parents.index_select(1, nodes)]  # -1 reads the extra last entry
        ancestors = self.ancestors.index_select(1, nodes).index_select(2, nodes)
        return TreeShape(parents, self.depth.index_select(1, nodes), ancestors)


@functools.lru_cache(maxsize=256)
def _static(parents: tuple[int, ...], device: torch.device) -> TreeShape:
    return _built(torch.tensor([parents], device=device))


def _built(parents: Tensor) -> TreeShape:
    batch, size = parents.shape
    ancestors = torch.eye(size, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    depth = torch.zeros_like(parents)
    above = parents
    while bool((above >= 0).any()):
        real = above >= 0
        depth += real
        ancestors |= torch.nn.functional.one_hot(above.clamp(min=0), size).bool() & real[..., None]
        above = torch.where(real, parents.gather(1, above.clamp(min=0)), -1)
    return TreeShape(parents, depth, ancestors)


@dataclass(frozen=True)
class DraftTree:
    """A proposal.

    Attributes:
        tokens: `[batch, n]`; node 0 is the anchor.
        shape: How the nodes hang together.
        valid: Which nodes are real, bool `[batch, n]`; None: all. A node below an unreal one must be unreal.
        q: For drafts that were sampled, the distribution that each node's children were drawn from,
            `[batch, n, vocab]`: after its own temperature and truncation. None: drafts were not sampled.
        replacement: Whether siblings were drawn independently from `q`; otherwise each was drawn from what `q` is
            after its elder siblings are taken out and the rest is normalised.
    """

    tokens: Tensor
    shape: TreeShape
    valid: Tensor | None = None
    q: Tensor | None = None
    replacement: bool = False

    @classmethod
    def root(cls, anchor: Tensor) -> DraftTree:
        """No drafts: the anchor alone."""
        return cls(anchor[:, None], TreeShape.chain(1, anchor.device))

    def shallow(self, deepest: int) -> DraftTree:
        """The nodes down to a depth."""
        shape = self.shape.shallow(deepest)
        if shape is self.shape:
            return self
        n = shape.size
        return replace(
            self,
            tokens=self.tokens[:, :n],
            shape=shape,
            valid=None if self.valid is None else self.valid[:, :n],
            q=None if self.q is None else self.q[:, :n],
        )


@dataclass(frozen=True)
class Walk:
    """What a verify step accepts.

    Attributes:
        path: Nodes from the root down, `[batch, m]`, of which row `b` walked the first `counts[b]`.
        counts: `[batch]`, at least 1.
        tokens: The token chosen at each node of the path, `[batch, m]`: what row `b` commits is the first `counts[b]`,
            its last being the target's own.
        scores: Processed scores at the nodes of the path `[batch, m, vocab]`, if asked for.
    """

    path: Tensor
    counts: Tensor
    tokens: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Drafter(Decoder):
    """Base of every method that drafts several tokens for the target model to verify in one pass.

    Output is that of plain decoding, token for token (greedy) or in distribution (sampling), whatever is proposed.
    A method gives `propose`, and `observe` if it learns; `start` and `Session.on_prompt` are for what it keeps, and
    `beside` for rows of its own in the verify pass.

    Attributes:
        packed: Whether float32 weights on a CPU are packed for verify passes, which takes up to 1 GiB more memory while
            the model lives; see `tokenry.models.packed`.
    """

    drafts: ClassVar[bool] = True
    packed: bool = True

    @contextlib.contextmanager
    def around(self, model: PreTrainedModel) -> Iterator[None]:
        with super().around(model), packed(model) if self.packed else contextlib.nullcontext():
            yield

    @abstractmethod
    def propose(self, session: Session, state: Any, room: int) -> DraftTree:
        """Return drafts behind `session.anchor`; nodes deeper than `room` (at least 1) will be cut off."""

    def beside(self, session: Session, state: Any, tree: DraftTree) -> Auxiliary | None:
        """Return rows to forward beside a tree, as it was cut; `observe` finds their states in `session.hidden`."""
        return None

    def observe(self, session: Session, state: Any, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        """Learn from a verified tree, rejected nodes included; `logits` are raw, float32 `[batch, n, vocab]`."""

    def step(self, session: Session, state: Any) -> Commit:
        if session.has_pending:
            return plain_step(session)
        limits = session.limits()
        room = max(limits) - 1
        started = time.perf_counter()
        tree = self.propose(session, state, room).shallow(room) if room > 0 else DraftTree.root(session.anchor)
        auxiliary = self.beside(session, state, tree)
        session.stats.drafter_seconds += time.perf_counter() - started
        session.stats.drafted += _drafted(session, tree)
        shape = tree.shape
        relation = None if shape.is_chain else shape.ancestors
        logits = session.verify(tree.tokens, relation, shape.depth, tree.valid, auxiliary)
        walked = walk(session, tree, logits, limits)
        session.stats.note_walk(_deepest(tree, limits), walked.counts - 1)
        started = time.perf_counter()
        self.observe(session, state, tree, logits, walked)
        session.stats.drafter_seconds += time.perf_counter() - started
        if walked.path.shape[1] == 1:
            sources: Tensor | Source = Source.BONUS
        else:
            last = torch.arange(walked.path.shape[1], device=session.device) >= walked.counts[:, None] - 1
            sources = torch.where(last, int(Source.BONUS), int(Source.DRAFT)).to(torch.int8)
        return Commit(
            walked.tokens,
            walked.counts,
            sources,
            path=walked.path,
            logits=_gathered(logits, walked.path) if session.want_logits else None,
            scores=walked.scores,
        )


def walk(session: Session, tree: DraftTree, logits: Tensor, limits: Sequence[int], at_once: bool | None = None) -> Walk:
    """Walk every row's tree as far as its drafts hold, at most `limits[b]` tokens.

    Deterministic drafts (and any drafts under greedy decoding) are compared with the token that the target chooses at
    each node, its argmax or a sample: rejection sampling with one-hot proposals, valid for any tree. `at_once` chooses
    at all nodes in one call, otherwise only at the nodes that are reached, depth by depth. None: at once where that is
    possible and no dearer, which for sampling means off the CPU.
    """
    if at_once is None:
        at_once = not session.do_sample or logits.device.type != "cpu"
    if at_once and session.context_free and not session.do_sample and logits.device.type == "cpu":
        return _walk_on_host(session, tree, logits, limits)
    limit = torch.tensor(limits, device=logits.device)
    if tree.q is not None and session.do_sample:
        return _walk_down(session, tree, logits, limit)
    if at_once and session.context_free:
        return _walk_at_once(session, tree, logits, limit)
    return _walk_down(session, replace(tree, q=None), logits, limit)


def _scores(session: Session, tree: DraftTree, logits: Tensor) -> Tensor:
    """Processed scores at all nodes; context-free processors read no ids, so rows and nodes may stand in any order."""
    if not session.processors:
        return logits
    return session.processors(tree.tokens.reshape(-1, 1), logits.flatten(0, 1)).view_as(logits)


def _walk_on_host(session: Session, tree: DraftTree, logits: Tensor, limits: Sequence[int]) -> Walk:
    """The greedy walk on a CPU, where a few dozen comparisons take less time than as many tensor operations."""
    scores = _scores(session, tree, logits)
    chosen = session.choose_nodes(scores, tree.shape.depth).tolist()
    tokens, (parents, depths) = tree.tokens.tolist(), tree.shape.on_host
    valid = None if tree.valid is None else tree.valid.tolist()
    paths: list[list[int]] = []
    for row, limit in enumerate(limits):
        above, depth = parents[row % len(parents)], depths[row % len(depths)]
        reached, last = [True] * len(above), 0
        for node in range(1, len(above)):
            parent = above[node]
            reached[node] = (
                reached[parent]
                and tokens[row][node] == chosen[row][parent]
                and depth[node] < limit
                and (valid is None or valid[row][node])
            )
            if reached[node] and depth[node] > depth[last]:
                last = node
        path = [last]
        while path[-1]:
            path.append(above[path[-1]])
        paths.append(path[::-1])
    counts = [len(path) for path in paths]
    longest = max(counts)
    # A row's own path is followed by the last node, as paths ascend.
    behind = [tree.shape.size - 1]
    full = torch.tensor([path + behind * (longest - len(path)) for path in paths], device=logits.device)
    ids = [[chosen[row][node] for node in path] + [0] * (longest - len(path)) for row, path in enumerate(paths)]
    return Walk(
        full,
        torch.tensor(counts, device=logits.device),
        torch.tensor(ids, device=logits.device),
        _gathered(scores, full) if session.want_scores else None,
    )


def _walk_at_once(session: Session, tree: DraftTree, logits: Tensor, limit: Tensor) -> Walk:
    batch, n, _ = logits.shape
    scores = _scores(session, tree, logits)
    chosen = session.choose_nodes(scores, tree.shape.depth)
    shape = tree.shape
    depth = shape.depth.expand(batch, n)
    fits = tree.tokens == chosen.gather(1, shape.parents.clamp(min=0).expand(batch, n))
    fits[:, 0] = True
    fits &= depth < limit[:, None].clamp(min=1)
    if tree.valid is not None:
        fits &= tree.valid
        fits[:, 0] = True
    if session.do_sample and not shape.is_chain:
        fits &= ~_repeated(tree)
    if shape.is_chain:
        last = fits.long().cumprod(1).sum(1) - 1
        path = torch.arange(n, device=logits.device).expand(batch, n)
    else:
        reached = ~(shape.ancestors & ~fits[:, None, :]).any(-1)
        last = torch.where(reached, depth, -1).argmax(1)
        # A path's nodes ascend, so those of the last node's ancestors in order are the path.
        nodes = torch.arange(n, device=logits.device)
        ancestors = shape.ancestors.expand(batch, n, n)[torch.arange(batch, device=logits.device), last]
        path = torch.where(ancestors, nodes, n - 1).sort(1).values[:, : shape.deepest + 1]
    counts = depth.gather(1, last[:, None])[:, 0] + 1
    return Walk(path, counts, chosen.gather(1, path), _gathered(scores, path) if session.want_scores else None)


def _repeated(tree: DraftTree) -> Tensor:
    """Nodes with a real elder sibling of the same token, bool `[batch, n]`. Each would be judged by a sample of its own
    for the text that it shares, and the deepest walk would pick the sample that its drafts fit."""
    parents, nodes = tree.shape.parents, torch.arange(tree.shape.size, device=tree.tokens.device)
    same = (parents[:, :, None] == parents[:, None, :]) & (nodes[:, None] > nodes)
    same = same & (tree.tokens[:, :, None] == tree.tokens[:, None, :])
    return same.any(-1) if tree.valid is None else (same & tree.valid[:, None, :]).any(-1)


def _walk_down(session: Session, tree: DraftTree, logits: Tensor, limit: Tensor) -> Walk:
    """Walk depth by depth; processors see each row's committed ids and the path, as in the plain loop."""
    batch, n, _ = logits.shape
    device = logits.device
    rows = torch.arange(batch, device=device)
    parents = tree.shape.parents.expand(batch, n)
    real = tree.shape.depth.expand(batch, n) < limit[:, None]
    if tree.valid is not None:
        real = real & tree.valid
    node = torch.zeros(batch, dtype=torch.long, device=device)
    going = session.active
    counts = torch.ones_like(node)
    path, tokens, kept = [], [], []
    for ahead in range(tree.shape.deepest + 1):
        scores = session.process(logits[rows, node], ahead)
        children = (parents == node[:, None]) & real & going[:, None]
        if tree.q is None:
            chosen = session.choose(scores, ahead)
            match = children & (tree.tokens == chosen[:, None])
        else:
            chosen, match = _reject(session, tree, scores, node, children, ahead)
        path.append(node)
        tokens.append(chosen)
        if session.want_scores:
            kept.append(scores)
        going = match.any(1)
        if not bool(going.any()):
            break
        node = torch.where(going, match.int().argmax(1), node)
        counts = counts + going
        session.look_ahead(chosen, ahead)
    return Walk(
        torch.stack(path, 1), counts, torch.stack(tokens, 1), torch.stack(kept, 1) if session.want_scores else None
    )


def _reject(
    session: Session, tree: DraftTree, scores: Tensor, node: Tensor, children: Tensor, ahead: int
) -> tuple[Tensor, Tensor]:
    """At each row's node, the token to emit `[batch]` and the child that was accepted, if any, `[batch, n]`."""
    assert tree.q is not None
    target = probabilities(scores)
    left = target.clone()
    match = torch.zeros_like(children)
    for row, brood in enumerate(children.tolist()):
        nodes = [i for i, is_child in enumerate(brood) if is_child]
        if not nodes:
            continue
        drafts = [int(tree.tokens[row, i]) for i in nodes]
        odds, left[row] = rejection(target[row], tree.q[row, node[row]], drafts, tree.replacement)
        draws = session.uniform(row, ahead, len(nodes))
        for child, draw, chance in zip(nodes, draws, odds, strict=True):
            if draw < chance:
                match[row, child] = True
                left[row] = 0
                left[row, tree.tokens[row, child]] = 1
                break
    return session.choose(left.log(), ahead), match


def rejection(
    target: Tensor, q: Tensor, drafts: Sequence[int], replacement: bool = False
) -> tuple[list[float], Tensor]:
    """Recursive rejection sampling at one node.

    Args:
        target: The target's distribution `[vocab]`.
        q: The distribution that the drafts were drawn from `[vocab]`.
        drafts: Tokens in the order they were drawn.
        replacement: Whether they were drawn independently.

    Returns:
        For each draft the probability of accepting it once its elders are rejected, and the distribution `[vocab]` to
        draw from if all are. Source: SpecInfer section 4.3 (with), RSD and Sequoia (without replacement).
    """
    left, proposal = target, q
    odds: list[float] = []
    for token in drafts:
        chance = float(proposal[token])
        odds.append(min(1.0, float(left[token]) / chance) if chance > 0 else 0.0)
        rest = (left - proposal).clamp(min=0)
        total = rest.sum()
        # Nothing is left where target and proposal are equal; only rounding brings a rejection here.
        left = rest / total if total > 0 else left
        if not replacement:
            proposal = proposal.clone()
            proposal[token] = 0
            if float(proposal.sum()) <= 0:
                break
            proposal = proposal / proposal.sum()
    odds += [0.0] * (len(drafts) - len(odds))
    return odds, left


def _gathered(values: Tensor, path: Tensor) -> Tensor:
    return values.gather(1, path[..., None].expand(-1, -1, values.shape[-1]))


def _deepest(tree: DraftTree, limits: Sequence[int]) -> Tensor:
    """Depth that each row's real drafts reach, as far as the row may commit them, `[batch]`."""
    room = torch.tensor([max(limit - 1, 0) for limit in limits], device=tree.tokens.device)
    if tree.valid is None and tree.shape.depth.shape[0] == 1:
        return room.clamp(max=tree.shape.deepest)
    depth = tree.shape.depth.expand_as(tree.tokens)
    if tree.valid is not None:
        depth = depth.masked_fill(~tree.valid, 0)
    return torch.minimum(depth.amax(1), room)


def _drafted(session: Session, tree: DraftTree) -> int:
    if tree.valid is None:
        return (tree.shape.size - 1) * sum(session.alive)
    return int(tree.valid[session.active, 1:].sum())

"""Trees of what the model wanted before: how Token Recycling and Goose keep a table, grow a tree from it, and learn.

Tree       nodes as they are added
Recycler   a call's table: candidates by context, trees laid out for the verifier, what each pass teaches
Odds       how often candidates were right, so that a tree grows where the next token is likeliest
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenry.generation.engine import Session
from tokenry.speculation.budget import Counts, Growth, StepCosts, best_size
from tokenry.speculation.engine import DraftTree, TreeShape
from tokenry.speculation.sources import Candidates, RecyclingTable

Context = tuple[int, ...]
"""The last ids of a path, oldest first."""

ORDER, CONTEXTS = 4, 65_537
"""Most tokens of a context, and rows for them, where a tree grows for speed."""

_CPU = torch.device("cpu")
_SPAN = 2048
# Scores that are told apart, the middle of each class, and how far a score is trusted at first, by the known context's
# length.
_SCORES = (0.03, 0.06, 0.12, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97)
_MIDDLES = (0.02, 0.045, 0.09, 0.16, 0.25, 0.37, 0.52, 0.67, 0.82, 0.93, 0.98)
_TRUST = (0.6, 0.8, 0.8, 0.8)


class Tree:
    """Nodes as they are added: the anchor, then children of nodes that are there already.

    Attributes:
        tokens, parents, depths: Of each node.
        before: The tokens before the anchor, oldest first, as far as the anchor is to be learned behind them.
    """

    def __init__(self, anchor: int, before: Sequence[int] = ()) -> None:
        self.tokens, self.parents, self.depths = [anchor], [-1], [0]
        self.before = tuple(before)

    def add(self, token: int, parent: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    def __len__(self) -> int:
        return len(self.tokens)

    def prefix(self, size: int) -> Tree:
        """The first `size` nodes."""
        tree = Tree(self.tokens[0], self.before)
        tree.tokens, tree.parents, tree.depths = self.tokens[:size], self.parents[:size], self.depths[:size]
        return tree


class Recycler:
    """A call's table on the host, where drafting needs many small look-ups.

    Attributes:
        table: Shared by threads; `propose` and `observe` of a drafter hold its lock.
        least: Least score of a candidate that is looked at.
    """

    def __init__(self, batch: int, table: RecyclingTable, least: float = 0.0) -> None:
        self.table, self.least = table, least
        # The tokens before what comes next of the prompt, and before each node of the tree that is being verified.
        self._tail = torch.full((batch, table.order - 1), -1)
        self._before: Tensor | None = None
        # What was looked up since the table learned last.
        self._found: dict[Context, tuple[int, Candidates]] = {}

    @property
    def waits(self) -> bool:
        """Whether a tree was laid out whose pass is to be learned from; a step without room for drafts has none."""
        return self._before is not None

    def open(self, vocab: int) -> None:
        """Make the table fit; another thread may have taken it to its device."""
        self.table.open(vocab, _CPU)

    def candidates(self, context: Context) -> tuple[int, Candidates]:
        """How long the longest known context at the end of a path is, and what was wanted behind it, best first."""
        if context not in self._found:
            row, length = self.table.row(context)
            self._found[context] = length, self.table.candidates(row, self.least)
        return self._found[context]

    def harvest(self, ids: Tensor, valid: Tensor | None, logits: Tensor) -> None:
        """Learn from a piece of the prompt; for `Session.on_prompt`."""
        tokens, width = ids.cpu(), self.table.order - 1
        real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.cpu()
        line = torch.cat([self._tail, tokens.masked_fill(~real, -1)], 1)
        self._tail = line[:, line.shape[1] - width :]
        # Nearest first, as the table takes them.
        before = line[:, :-1].unfold(1, width, 1).flip(-1) if width else None
        with self.table.lock:
            self.open(logits.shape[-1])
            self._found.clear()
            for begin in range(0, tokens.shape[1], _SPAN):
                span = slice(begin, begin + _SPAN)
                own = real[:, span]
                scores = logits[:, span].flatten(0, 1) if valid is None else logits[:, span][own.to(logits.device)]
                self.table.learn(tokens[:, span][own], scores.float(), None if before is None else before[:, span][own])

    def lay_out(self, session: Session, trees: Sequence[Tree]) -> DraftTree:
        """The trees of all rows, breadth first, smaller ones filled up with nodes that are not real."""
        size, width = max(map(len, trees)), self.table.order - 1
        tokens = [[0] * size for _ in trees]
        parents, depths = [[-1] * size for _ in trees], [[0] * size for _ in trees]
        nothing = (-1,) * width
        before = [[nothing] * size for _ in trees]
        sees = np.zeros((session.batch, size, size), dtype=bool)
        for row, tree in enumerate(trees):
            order = sorted(range(len(tree)), key=tree.depths.__getitem__)
            place = [0] * len(tree)
            own = sees[row]
            before[row][0] = (*tree.before[::-1], *nothing)[:width]
            for new, old in enumerate(order):
                place[old] = new
                tokens[row][new], depths[row][new] = tree.tokens[old], tree.depths[old]
                if new:
                    above = parents[row][new] = place[tree.parents[old]]
                    own[new] = own[above]
                    before[row][new] = (tokens[row][above], *before[row][above])[:width]
                own[new, new] = True
            # Nodes that are not real stand beside the last one, so that depths ascend.
            last = len(tree) - 1
            for new in range(last + 1, size):
                parents[row][new], depths[row][new] = max(parents[row][last], 0), max(depths[row][last], 1)
                own[new] = own[parents[row][new]]
                own[new, new] = True
        self._before = torch.from_numpy(np.array(before, dtype=np.int64).reshape(session.batch, size, width))
        if size == 1:
            return DraftTree.root(session.anchor)
        valid: Tensor | None = None
        if any(len(tree) < size for tree in trees):
            real = np.arange(size) < np.array([[len(tree)] for tree in trees])
            valid = torch.from_numpy(real).to(session.device)
        drafts, up, depth = torch.from_numpy(np.array([tokens, parents, depths])).to(session.device)
        drafts[:, 0] = session.anchor
        return DraftTree(drafts, TreeShape(up, depth, torch.from_numpy(sees).to(session.device)), valid)

    def learn(self, session: Session, tree: DraftTree, logits: Tensor) -> None:
        """Learn from every real node of a verified tree, which may have been cut since it was laid out."""
        tokens = tree.tokens.cpu()
        before = None if self._before is None else self._before[:, : tokens.shape[1]]
        self._before = None
        self._found.clear()
        if tree.valid is None and all(session.alive):
            self.table.learn(tokens.flatten(), logits.flatten(0, 1), None if before is None else before.flatten(0, 1))
            return
        real = torch.tensor(session.alive)[:, None].expand_as(tokens)
        real = real if tree.valid is None else real & tree.valid.cpu()
        self.table.learn(tokens[real], logits[real.to(logits.device)], None if before is None else before[real])


class Odds:
    """How often candidates were right in this call, by their score and by how much of their context was known.

    Attributes:
        costs: What its steps cost.
    """

    def __init__(self, session: Session) -> None:
        self.costs = StepCosts(session)
        self._counts = Counts([trust * middle for trust in _TRUST for middle in _MIDDLES], 4.0)

    def likely(self, length: int, found: Candidates, least: float) -> Candidates:
        """The candidates behind a context of a length that come next with a chance above `least`, and that chance,
        likeliest first."""
        if not found:
            return []
        chances = self._counts.chances[_kind(length, 0.0) : _kind(length + 1, 0.0)]
        if max(chances) <= least:
            return []
        each = [(token, chances[bisect_right(_SCORES, score)]) for token, score in found]
        return sorted((pair for pair in each if pair[1] > least), key=by_chance, reverse=True)

    def count(self, length: int, found: Candidates, chosen: int) -> None:
        """Count a committed token against the candidates for its place, drafted or not."""
        for token, score in found:
            self._counts.add(_kind(length, score), token == chosen)

    def grow(self, recycler: Recycler, context: Context, room: int) -> tuple[Tree, list[float]]:
        """The tree of likeliest candidates behind the last tokens, in the order they were taken, and the chance that
        each node is reached."""
        order = recycler.table.order

        def children(path: Context, least: float) -> Iterator[tuple[float, Context]]:
            for token, chance in self.likely(*recycler.candidates(path), least):
                yield chance, (*path, token)[-order:]

        grown = Growth(context, children, self.costs.seconds, self.costs.floors, room)
        return planted(context, [path[-1] for path in grown.nodes], grown.parents), grown.reach

    def cut(self, trees: list[Tree], reaches: Sequence[Sequence[float]]) -> list[Tree]:
        """The trees' prefixes of the size that gives all rows together most tokens a second."""
        size = best_size(reaches, self.costs.seconds)
        self.costs.take(size)
        return [tree if len(tree) <= size else tree.prefix(size) for tree in trees]


def planted(context: Context, tokens: Sequence[int], parents: Sequence[int]) -> Tree:
    """A tree of given nodes, the anchor first, behind the last tokens."""
    tree = Tree(context[-1], context[:-1])
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        tree.add(token, parent)
    return tree


by_chance = operator.itemgetter(1)


def _kind(length: int, score: float) -> int:
    return (length - 1) * len(_MIDDLES) + bisect_right(_SCORES, score)

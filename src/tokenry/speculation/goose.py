"""Goose: a deep spine of copied text, with branches of what the model wanted before where the copy may break."""

from __future__ import annotations

import math
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from tokenry.generation.engine import Session
from tokenry.speculation.budget import Counts, Growth, RunCounts, StepCosts
from tokenry.speculation.copying import CopyState
from tokenry.speculation.engine import Drafter, DraftTree, Walk
from tokenry.speculation.recycling import CONTEXTS, ORDER, Context, Odds, Recycler, Tree, by_chance, planted
from tokenry.speculation.sources import Candidates, RecyclingTable, Text, Texts, table_of
from tokenry.speculation.suffix import Suffix

Successors = Callable[[Context], Candidates]
"""Candidates behind the last one or two tokens of a path, best first."""


def harmonic_split(share: int, count: int) -> list[int]:
    """Deal out `share` nodes to `count` places with weights 1, 1/2, 1/3, ...: each at least 1, until none is left."""
    whole = sum(1 / place for place in range(1, count + 1))
    given: list[int] = []
    for place in range(1, count + 1):
        given.append(min(max(1, _floor(share / (place * whole))), share - sum(given)))
    return given


def _floor(value: float) -> int:
    # 0.7 + 0.2 is a little less than 0.9.
    return math.floor(value + 1e-9)


# What `size="auto"` tells apart of copied tokens, beside the length of the match before them: what the table's first
# candidate says of them.
_UNKNOWN, _AGREES, _DIFFERS = range(3)
# Chance at first that a copy is right where the table differs, by the kinds of `RunCounts`.
_DIFFERING = (0.15, 0.4, 0.48, 0.55, 0.62, 0.7, 0.8, 0.86, 0.92)


@dataclass
class _Row:
    """One row's state, and what it drafts in the step that is under way; `copies` are the nodes of a grown tree's
    spine."""

    rate: float = 0.5
    chain: list[int] = field(default_factory=list)
    run: int = 0
    spine: int = 0
    copies: list[int] = field(default_factory=list)


class _Auto(Odds):
    """What `size="auto"` keeps for a call: the odds of candidates, and of copied tokens."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        # Against a long copy the table's word is worth little: the model may want on its own what it copies.
        kinds = zip(RunCounts.PRIOR, _DIFFERING, strict=True)
        self.spine = Counts([chance for p, differing in kinds for chance in (p, 1 - 0.4 * (1 - p), differing)], 4.0)


# Every so many calls the slower way is tried; what a step weighs after each further one.
_PROBE, _MEMORY = 8, 0.995
_lock = threading.Lock()
_branches: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], _Branches]] = weakref.WeakKeyDictionary()


class _Branches:
    """Whether branches pay in this process: what trees gain a second, against what their spines alone would.

    The first call of a process drafts trees, the second copies alone, to time steps of both kinds. Further calls go the
    faster way, and every few calls the other, as texts change. Calls of a single step do not count.
    """

    TREES, COPIES = range(2)

    def __init__(self) -> None:
        self.calls = 0
        # Of the steps that drafted trees, for the trees and for their spines alone: tokens, seconds of forwards.
        self._gains = np.zeros((2, 2))
        # Of steps with trees and with copies alone: seconds that they took, and of their forwards as measured.
        self._taken = np.zeros((2, 2))

    def next(self) -> bool:
        """Whether the call that begins drafts branches."""
        if self.calls < 2:
            return self.calls == 0
        return self.pay != (self.calls % _PROBE == 0)

    @property
    def pay(self) -> bool:
        """Whether trees are the faster way, as far as is known."""
        if not self._gains.all() or not self._taken.all():
            return True
        tokens, forwards = self._gains.T
        # Forwards may have been measured on a busy machine: whole steps take so many times as long.
        paces = self._taken[:, 0] / self._taken[:, 1]
        trees, copies = tokens / (forwards * paces)
        return bool(trees >= copies)

    def time(self, way: int, costs: StepCosts) -> None:
        """Count what the step before took."""
        if costs.last is not None:
            self._taken[way] = self._taken[way] * _MEMORY + costs.last

    def count(self, costs: StepCosts, tree: tuple[int, int], spine: tuple[int, int]) -> None:
        """Count a step with trees: tokens and nodes, of the trees and of their spines alone."""
        own = [[tokens, costs.forward(nodes)] for tokens, nodes in (tree, spine)]
        self._gains = self._gains * _MEMORY + own


# What a spine alone amounts to where its length is for speed.
_ALONE = Suffix(longest=RunCounts.LONGEST)


@dataclass
class _State:
    """What a call keeps.

    Attributes:
        branches: Whether they pay, where that is judged.
        copying: Instead of the rest, in a call that drafts copies alone.
        steps: That proposed drafts.
    """

    recycler: Recycler
    texts: Texts
    rows: list[_Row]
    auto: _Auto | None
    branches: _Branches | None
    copying: CopyState | None
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Goose(Drafter):
    """Draft a tree whose deep spine is copied text and whose wide branches are candidates of the model's own past.

    Copied tokens are accepted far more often than recycled ones, so they lie as one chain under the last token, while
    recycled ones hang on the root and along the spine, most of them near the root: where the copy breaks, the walk goes
    on in a branch. A confidence in the copy, from its length and from whether all earlier occurrences go on alike, and
    a running rate of accepted spine nodes move the budget between the two. Source: Goose, arXiv 2604.02047, section 4
    and algorithms 1 and 2; the defaults are the paper's. It needs no training.

    Spine: of the longest n-gram that stood in the text before, what followed its first occurrence; a confident copy is
    extended by looking up its own end. Branches: the best ids after each token, or after a pair of tokens where that is
    known, from the logits of every position that was forwarded, rejected nodes and the prompt included. As in the
    authors' code, a tree does not teach the pair that its root makes with the token before it; a chain and a step
    without drafts do.

    Where `size="auto"`, copies and candidates fill a tree for speed. Once per process and model it measures what a
    forward over n tokens costs. Of every committed token it counts whether the copy was right, by how many tokens
    agreed before it and by what the table says, and whether each candidate was, by its score. A tree then grows node by
    node where the next token is likeliest, to the number of nodes with the most expected tokens per measured second.
    As counts tell what a match is worth, the newest of the longest matches is copied however short it is; the table
    knows contexts of up to four tokens. Where both sources draft and the table is the call's own, steps are timed over
    the calls of a process too: calls for which branches cost more time than they save draft the copy alone, as `suffix`
    does. These take the place of `extra`, `confidence`, `ngrams`, `copied`, `extended`,
    `long_match`, `spine_share`, `decay` and `depth`.

    One row alone drafts a copy before its prompt was read, which saves a pass: the first verify step reads both.

    A batch has a text and a rate for each row, and one table, as rows only add knowledge. The table is on the host. It
    starts empty unless `resources={"table": Goose().new_table()}` or `table` gives one, as for Token Recycling.

    Attributes:
        size: Nodes of a tree, the root included, before confidence adds up to `extra`; or `"auto"`.
        extra: Nodes that full confidence adds.
        sources: Which of the two sources drafts.
        tree: `"isotropic"` is the paper's control: `children` candidates under every node, breadth first, no spine.
        children: Children of a node in the isotropic tree.
        confidence: Whether the copy's confidence is used; otherwise it counts as 0.
        ngrams: Lengths of the n-grams that are looked up, descending.
        copied: Most tokens copied from one occurrence.
        extended: Most tokens of a chain that is extended, at full confidence.
        long_match: Length from which a copied chain is trusted.
        spine_share: Share of the branches that hang on the spine rather than on the root.
        decay: Weight of a step in the running rate of accepted spine nodes.
        k: Candidates kept in a row of the table.
        bigrams: Rows of the table for pairs of tokens; 0: pairs are not told apart.
        least_score: Least score of a candidate that is drafted.
        depth: Deepest branch.
        harvest_prompt: Whether the prompt's logits go into the table.
        table: File of a saved table, or the folder of a trained one.
    """

    resources: ClassVar[tuple[str, ...]] = ("table",)
    early: ClassVar[bool] = True
    size: int | Literal["auto"] = 60
    extra: int = 40
    sources: Literal["both", "spine", "branches"] = "both"
    tree: Literal["spine", "isotropic"] = "spine"
    children: int = 3
    confidence: bool = True
    ngrams: tuple[int, ...] = (5, 4, 3)
    copied: int = 20
    extended: int = 100
    long_match: int = 8
    spine_share: float = 0.5
    decay: float = 0.3
    k: int = 10
    bigrams: int = 65_537
    least_score: float = 0.01
    depth: int = 6
    harvest_prompt: bool = True
    table: str | None = None

    def validate(self) -> None:
        self.check("size", "auto or at least 1", self.size == "auto" or self.size >= 1)
        for name in ("children", "copied", "extended", "long_match", "k", "depth"):
            self.check(name, "at least 1", getattr(self, name) >= 1)
        for name in ("extra", "bigrams"):
            self.check(name, "at least 0", getattr(self, name) >= 0)
        for name in ("spine_share", "decay", "least_score"):
            self.check(name, "from 0 to 1", 0 <= getattr(self, name) <= 1)
        falling = bool(self.ngrams) and sorted(set(self.ngrams), reverse=True) == list(self.ngrams)
        self.check("ngrams", "lengths of at least 1, descending", falling and min(self.ngrams) >= 1)
        self.check(
            "tree", "spine", self.tree == "spine" or (self.size != "auto" and self.sources != "spine"),
            why="the isotropic tree has a given size and is made of branches",
        )  # fmt: skip

    # The copied chain -----------------------------------------------------------------------------
    def copy(self, text: Text, drafted: Sequence[int] = ()) -> tuple[list[int], int, bool]:
        """What followed the first occurrence of the longest n-gram at the end of a text and of drafts behind it, over
        how many tokens the occurrence agrees, and whether there are several which all go on alike."""
        ends, runs = text.matches(drafted)
        longest = int(runs.max()) if len(runs) else 0
        n = next((n for n in self.ngrams if n <= longest), None)
        if n is None:
            return [], 0, False
        agree = runs >= n
        ends = ends[agree]
        nexts = text.ids[ends + 1]
        consensus = len(ends) > 1 and bool((nexts == nexts[0]).all())
        chain = text.ids[ends[0] + 1 : ends[0] + 1 + self.copied].tolist()
        return chain, int(runs[agree][0]), consensus

    def trust(self, length: int, consensus: bool) -> float:
        """Confidence in a chain of a length: 1 where all earlier occurrences agree, else by its length."""
        if length and consensus:
            return 1.0
        if length >= self.long_match:
            return min(0.9, 0.7 + 0.2 * (length - self.long_match) / 12)
        return 0.6 * length / self.long_match

    def extend(self, text: Text, chain: list[int], confidence: float) -> list[int]:
        """Go on copying behind a confident chain; a chain of full confidence ends with the first piece of less."""
        most = _floor(self.extended * confidence)
        while len(chain) < most:
            piece, _, consensus = self.copy(text, chain)
            if not piece:
                break
            chain = chain + piece
            if confidence == 1 and self.trust(len(piece), consensus) < 1:
                break
        return chain[:most]

    # The tree -------------------------------------------------------------------------------------
    def build(
        self,
        context: Context,
        chain: Sequence[int],
        confidence: float,
        rate: float,
        successors: Successors,
    ) -> tuple[Tree, int]:
        """The paper's tree (algorithm 1), and the length of its spine, whose nodes are 1 to that.

        Args:
            context: The last committed token, and the one before it if there is one.
            chain: Copied tokens.
            confidence: In the chain, 0 to 1.
            rate: Running rate of accepted spine nodes.
            successors: The table.
        """
        assert self.size != "auto"
        tree = Tree(context[-1])
        budget = self.size + _floor(self.extra * confidence)
        base = 0.15 if rate < 0.2 else 0.3 if rate < 0.4 else 0.5
        spine = min(len(chain), _floor(budget * (base + confidence * (1 - base))))
        for place in range(spine):
            tree.add(chain[place], place)
        share = max(0, budget - 1 - spine)
        along = min(share, max(1, _floor(self.spine_share * share))) if spine else 0
        queue: deque[tuple[int, float]] = deque()
        shares = [share - along, *harmonic_split(along, spine)]
        for node, most in enumerate(shares):
            # The next spine token is drafted already.
            taken = chain[node] if node < spine else None
            behind = _behind(tree, node) if node else context
            others = ((token, score) for token, score in successors(behind) if token != taken)
            for token, score in _first(others, most):
                child = tree.add(token, node)
                if tree.depths[child] < self.depth:
                    queue.append((child, score))
        while queue and len(tree) < budget:
            node, score = queue.popleft()
            depth, left = tree.depths[node], budget - len(tree)
            width = min(max(1, math.ceil(left * score)), max(1, self.k // depth), left)
            for token, own in successors(_behind(tree, node))[:width]:
                child = tree.add(token, node)
                if depth + 1 < self.depth:
                    queue.append((child, own))
        return tree, spine

    def build_isotropic(self, context: Context, confidence: float, successors: Successors) -> Tree:
        """The control: the same candidates and number of nodes, as many under every node."""
        assert self.size != "auto"
        tree = Tree(context[-1])
        budget = self.size + _floor(self.extra * confidence)
        queue = deque([0])
        while queue and len(tree) < budget:
            node = queue.popleft()
            behind = _behind(tree, node) if node else context
            for token, _ in successors(behind)[: min(self.children, budget - len(tree))]:
                child = tree.add(token, node)
                if tree.depths[child] < self.depth:
                    queue.append(child)
        return tree

    def grow(
        self, auto: _Auto, recycler: Recycler, context: Context, chain: Sequence[int], run: int, room: int
    ) -> tuple[Tree, list[float], list[int]]:
        """The tree of likeliest nodes in the order they were taken, the chance that each is reached, and its spine.

        A node is the last ids of its path, and how much of the chain they end: -1 off the spine.
        """

        def children(node: tuple[Context, int], least: float) -> Iterator[tuple[float, tuple[Context, int]]]:
            path, place = node
            length, found = self._candidates(recycler, path)
            ways, copied, rest = [], None, 1.0
            if 0 <= place < len(chain):
                copied = chain[place]
                chance = auto.spine.chances[_spine_kind(run + place, copied, found)]
                ways.append((copied, chance, place + 1))
                own = next((score for other, score in found if other == copied), 0.0)
                # Where the copy is wrong, what the table gives to its token falls to the others.
                rest = (1 - chance) / max(1 - own, 1 - chance, 0.05)
            others = auto.likely(length, found, least / rest)
            ways += [(other, rest * chance, -1) for other, chance in others if other != copied]
            ways.sort(key=by_chance, reverse=True)
            for token, chance, after in ways:
                yield chance, ((*path, token)[-ORDER:], after)

        grown = Growth((context, 0), children, auto.costs.seconds, auto.costs.floors, room)
        copies = [node for node, (_, place) in enumerate(grown.nodes) if place > 0]
        return planted(context, [path[-1] for path, _ in grown.nodes], grown.parents), grown.reach, copies

    # The drafter ----------------------------------------------------------------------------------
    def new_table(self) -> RecyclingTable:
        """An empty table of the kind that this drafter keeps, to share among calls."""
        return RecyclingTable(self.k, **self._form())

    def _form(self) -> dict[str, Any]:
        if self.size == "auto":
            return {"order": ORDER, "contexts": CONTEXTS, "scored": True}
        return {"order": 2 if self.bigrams else 1, "contexts": self.bigrams, "scored": True}

    def start(self, session: Session) -> _State:
        table = table_of(session, self.slug, self.table, self.k, **self._form())
        branches: _Branches | None = None
        copying: CopyState | None = None
        own = self.table is None and session.resources.get("table") is None
        if self.size == "auto" and self.sources == "both" and own:
            branches = self._branches(session)
            session.stats.extra["branches"] = branches.next()
            copying = None if session.stats.extra["branches"] else _ALONE.start(session)
        auto = _Auto(session) if self.size == "auto" else None
        reach = max(self.ngrams) if auto is None else RunCounts.LONGEST
        recycler = Recycler(session.batch, table, self.least_score)
        if self.harvest_prompt and self.sources != "spine" and copying is None:
            session.on_prompt = recycler.harvest
        rows = [_Row() for _ in range(session.batch)]
        return _State(recycler, Texts(session, reach), rows, auto, branches, copying)

    def _branches(self, session: Session) -> _Branches:
        kind = (str(self), str(session.policy), session.batch, session.device, session.model.dtype, session.do_sample)
        with _lock:
            return _branches.setdefault(session.model, {}).setdefault(kind, _Branches())

    def propose(self, session: Session, state: _State, room: int) -> DraftTree:
        state.steps += 1
        if state.branches is not None and state.steps == 2:
            state.branches.calls += 1
        if state.copying is not None:
            return _ALONE.propose(session, state.copying, room)
        if state.auto is not None:
            state.auto.costs.begin()
        state.texts.update(session)
        trees: list[Tree] = []
        reaches: list[list[float]] = []
        with state.recycler.table.lock:
            state.recycler.open(session.vocab)
            for row, text, alive in zip(state.rows, state.texts.rows, session.alive, strict=True):
                if not alive:
                    # What a finished row drafts is not looked at.
                    trees.append(Tree(0))
                elif state.auto is None:
                    trees.append(self._fixed(state.recycler, row, text))
                else:
                    tree, reach = self._auto(state.auto, state.recycler, row, text, room)
                    trees.append(tree)
                    reaches.append(reach)
        if state.auto is not None:
            trees = state.auto.cut(trees, reaches)
        return state.recycler.lay_out(session, trees)

    def _fixed(self, recycler: Recycler, row: _Row, text: Text) -> Tree:
        context = tuple(text.ids[-2:].tolist())
        chain, _, consensus = self.copy(text) if self.sources != "branches" else ([], 0, False)
        row.chain, row.spine = chain, 0
        if self.sources == "spine" or not recycler.candidates(context)[0]:
            # The root is a node too; at full confidence the tree has `extra` nodes more.
            assert self.size != "auto"
            chain = row.chain = chain[: self.size + self.extra - 1]
            row.spine = len(chain)
            return planted(context, [context[-1], *chain], range(-1, len(chain)))
        confidence = self.trust(len(chain), consensus) if self.confidence else 0.0
        successors: Successors = lambda behind: recycler.candidates(behind)[1]  # noqa: E731
        if self.tree == "isotropic":
            tree = self.build_isotropic(context, confidence, successors)
        else:
            if confidence > 0.6:
                row.chain = self.extend(text, chain, confidence)
            tree, row.spine = self.build(context, row.chain, confidence, row.rate, successors)
        if len(tree) == 1:
            tree.before = context[:-1]
        return tree

    def _auto(self, auto: _Auto, recycler: Recycler, row: _Row, text: Text, room: int) -> tuple[Tree, list[float]]:
        match = text.longest() if self.sources != "branches" else None
        row.chain, row.run = [], 0
        if match is not None:
            # One more than can be drafted: it is judged by the target's own token.
            row.chain, row.run = text.copy(match[0], min(room, len(auto.costs.seconds) - 2) + 1), match[1]
        tree, reach, row.copies = self.grow(auto, recycler, tuple(text.ids[-ORDER:].tolist()), row.chain, row.run, room)
        return tree, reach

    def _candidates(self, recycler: Recycler, context: Context) -> tuple[int, Candidates]:
        return (0, []) if self.sources == "spine" else recycler.candidates(context)

    def observe(self, session: Session, state: _State, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        if state.copying is not None:
            # Without room for drafts nothing was looked up, and no step began.
            if state.branches is not None and state.copying.costs is not None and state.copying.runs:
                state.branches.time(_Branches.COPIES, state.copying.costs)
            _ALONE.observe(session, state.copying, tree, logits, walk)
            return
        chosen, counts = walk.tokens.tolist(), walk.counts.tolist()
        # Tokens of the trees, and tokens and nodes that their spines alone would have had.
        gained, copied, longest = 0, 0, 1
        with state.recycler.table.lock:
            state.recycler.open(session.vocab)
            waits = state.recycler.waits
            for number, row in enumerate(state.rows):
                if not session.alive[number] or not waits:
                    continue
                tokens = chosen[number][: counts[number]]
                # The tree may have been cut to the room that was left.
                spine = min(row.spine, tree.shape.deepest)
                if state.auto is not None:
                    self._count(state.auto, state.recycler, row, state.texts.rows[number], tokens)
                    nodes = bisect_left(row.copies, tree.shape.size)
                    gained += len(tokens)
                    copied += 1 + _agreeing(row.chain[:nodes], tokens[:-1])
                    longest = max(longest, 1 + nodes)
                elif spine:
                    agreed = _agreeing(row.chain[:spine], tokens[:-1])
                    row.rate = self.decay * agreed / spine + (1 - self.decay) * row.rate
            if self.sources != "spine":
                state.recycler.learn(session, tree, logits)
        if state.branches is not None and state.auto is not None and waits:
            state.branches.time(_Branches.TREES, state.auto.costs)
            state.branches.count(state.auto.costs, (gained, tree.shape.size), (copied, longest))

    def _count(self, auto: _Auto, recycler: Recycler, row: _Row, text: Text, tokens: Sequence[int]) -> None:
        context = tuple(text.ids[-ORDER:].tolist())
        copying = True
        for place, chosen in enumerate(tokens):
            length, found = self._candidates(recycler, context)
            auto.count(length, found, chosen)
            if copying and place < len(row.chain):
                copying = row.chain[place] == chosen
                auto.spine.add(_spine_kind(row.run + place, row.chain[place], found), copying)
            context = (*context, chosen)[-ORDER:]


def _behind(tree: Tree, node: int) -> Context:
    """A node's token and its parent's."""
    return tree.tokens[tree.parents[node]], tree.tokens[node]


def _first(candidates: Iterator[tuple[int, float]], most: int) -> Candidates:
    return [candidate for candidate, _ in zip(candidates, range(most), strict=False)]


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two runs share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _spine_kind(run: int, copied: int, found: Candidates) -> int:
    says = _UNKNOWN if not found else _AGREES if found[0][0] == copied else _DIFFERS
    return 3 * RunCounts.KINDS[min(run, RunCounts.LONGEST)] + says

"""Token Recycling: draft a tree from what the model last wanted after each token."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenry.generation.engine import Session
from tokenry.speculation.budget import RankCounts, best_nodes, forward_costs
from tokenry.speculation.engine import Drafter, DraftTree, Walk
from tokenry.speculation.sources import Path_, RecyclingTable, Template, table_of

# Children of each node of the official tree 2.2.2 in breadth-first order, level by level.
_CHILDREN = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)

# Chance of each rank before a call has counted its own, for `template="auto"`.
_PRIOR = (0.45, 0.13, 0.07, 0.04, 0.03, 0.02, 0.015, 0.01)
# Verify steps between two choices of the tree.
_PATIENCE = 4
# Where one path goes on being right, it pays to go on beyond the paper's six levels.
_DEEPEST = 20
_SPAN = 2048


@functools.cache
def standard_template() -> tuple[Path_, ...]:
    """The paper's 80 nodes as paths of candidate ranks, breadth first."""
    level: list[Path_] = [()]
    nodes: list[Path_] = []
    for children in _CHILDREN:
        level = [(*path, rank) for path, count in zip(level, children, strict=True) for rank in range(count)]
        nodes += level
    return tuple(nodes)


@functools.cache
def _candidates() -> tuple[Path_, ...]:
    """What `template="auto"` chooses from: the paper's nodes, and its deepest path further down."""
    paths = standard_template()
    return (*paths, *((0,) * depth for depth in range(len(_CHILDREN) + 1, _DEEPEST + 1)))


@functools.lru_cache(maxsize=512)
def _template(paths: tuple[Path_, ...], device: torch.device) -> Template:
    return Template(paths, device)


@dataclass
class _State:
    table: RecyclingTable
    template: Template
    counts: RankCounts | None = None
    costs: list[float] | None = None
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenRecycling(Drafter):
    """Draft from a table of what the model last wanted after each token, a fixed tree of candidates at a time.

    The table `[vocab, k]` is walked breadth first from the last token along a template; one pass verifies the tree and
    its logits, at rejected nodes too, overwrite the rows of all tokens in it. Source: Turning Trash into Treasure,
    arXiv 2408.08696, section 3; tree and k are the authors'. It needs no training and under 2 MB.

    Where `template="auto"`, the nodes of the paper's tree are chosen for speed. Once per process and model it measures
    what a forward over n tokens costs. From the rank that every committed token had among the candidates of the token
    before it, it estimates by depth how likely each node is accepted. Every few steps it takes the tree with the most
    expected tokens per measured second: the likeliest nodes of the best number.

    On the CPU, where every node costs, what lies under tokens not yet learned is left out; elsewhere the tree keeps its
    shape. A batch shares one table, as rows only add knowledge.

    Every call starts with an empty table, unless it is given one: `resources={"table": RecyclingTable()}` shares a
    table among calls and threads, each learning from the others (the paper's hot start); `table=PATH` starts each call
    from what `RecyclingTable.save` wrote there.

    Attributes:
        k: Candidates kept for each token.
        template: `"2.2.2"` (the paper's 80 nodes), `"auto"`, a number of nodes (the first so many of the 80), or paths
            of candidate ranks such as `((0,), (1,), (0, 0))`; `()` is plain decoding.
        harvest_prompt: Whether a table that holds nothing yet learns from the prompt (an addition; False reproduces the
            paper).
        table: File of a saved table.
    """

    resources: ClassVar[tuple[str, ...]] = ("table",)
    k: int = 8
    template: int | str | tuple[tuple[int, ...], ...] = "2.2.2"
    harvest_prompt: bool = True
    table: str | None = None

    def validate(self) -> None:
        self.check("k", "at least 1", self.k >= 1)
        if isinstance(self.template, str):
            self.check("template", "2.2.2, auto, a number of nodes, or paths", self.template in ("2.2.2", "auto"))
        elif isinstance(self.template, int):
            self.check("template", "from 0 to 80 nodes", 0 <= self.template <= 80)
        else:
            known = {(), *self.template}
            whole = all(path and path[:-1] in known for path in self.template)
            self.check("template", "paths whose beginnings are all among them", whole)
        ranks = max((rank for path in self._paths() for rank in path), default=-1)
        self.check("k", f"at least {ranks + 1}", ranks < self.k, why="the template uses that many candidates")

    def _paths(self) -> tuple[Path_, ...]:
        if isinstance(self.template, str):
            return standard_template()
        return standard_template()[: self.template] if isinstance(self.template, int) else self.template

    def start(self, session: Session) -> _State:
        table = table_of(session, self.slug, self.table, self.k)
        state = _State(table, _template(self._paths(), session.device))
        if self.harvest_prompt and table.is_cold:
            session.on_prompt = functools.partial(self._harvest, session, state)
        if self.template == "auto":
            state.counts = RankCounts(_DEEPEST, _PRIOR)
            state.costs = forward_costs(session)
        return state

    def _harvest(self, session: Session, state: _State, ids: Tensor, valid: Tensor | None, logits: Tensor) -> None:
        table = state.table
        with table.lock:
            table.open(logits.shape[-1], logits.device)
            for begin in range(0, ids.shape[1], _SPAN):
                tokens, scores = ids[:, begin : begin + _SPAN], logits[:, begin : begin + _SPAN]
                if valid is not None:
                    real = valid[:, begin : begin + _SPAN]
                    table.learn(tokens[real], scores[real].float())
                else:
                    table.learn(tokens.flatten(), scores.flatten(0, 1).float())

    def propose(self, session: Session, state: _State, room: int) -> DraftTree:
        table = state.table
        if state.counts is not None and state.costs is not None and state.steps % _PATIENCE == 0:
            state.template = self._chosen(state.counts, state.costs, session.device)
        state.steps += 1
        template = state.template
        with table.lock:
            table.open(session.vocab, session.device)
            tokens, known = table.draft(session.anchor, template)
        tree = DraftTree(tokens, template.shape)
        if session.device.type != "cpu" or bool(known.all()):
            return tree
        nodes = known[session.active].any(0).nonzero()[:, 0]
        known = known[:, nodes]
        return DraftTree(tokens[:, nodes], template.shape.select(nodes), None if bool(known.all()) else known)

    def observe(self, session: Session, state: _State, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        table = state.table
        with table.lock:
            # Another thread may have taken the table to its device.
            table.open(session.vocab, session.device)
            if state.counts is not None:
                self._count(session, state.counts, table, tree, walk)
            if tree.valid is None and all(session.alive):
                table.learn(tree.tokens.flatten(), logits.flatten(0, 1))
            else:
                real = session.active[:, None] if tree.valid is None else tree.valid & session.active[:, None]
                real = real.expand_as(tree.tokens)
                table.learn(tree.tokens[real], logits[real])

    def _count(self, session: Session, counts: RankCounts, table: RecyclingTable, tree: DraftTree, walk: Walk) -> None:
        assert table.ids is not None and table.seen is not None
        behind = tree.tokens.gather(1, walk.path)
        hits = table.ids[behind] == walk.tokens[..., None]
        rank = torch.where(hits.any(-1) & table.seen[behind], hits.int().argmax(-1), -1).tolist()
        for row, count in enumerate(walk.counts.tolist()):
            if session.alive[row]:
                for depth in range(count):
                    found = rank[row][depth]
                    counts.add(depth, found if 0 <= found < len(_PRIOR) else None)

    def _chosen(self, counts: RankCounts, costs: list[float], device: torch.device) -> Template:
        paths = _candidates()
        whole = _template(paths, device)
        nodes = best_nodes(whole.parents, whole.ranks, whole.depths, counts.chances(), costs)
        return _template(tuple(paths[node - 1] for node in nodes[1:]), device)

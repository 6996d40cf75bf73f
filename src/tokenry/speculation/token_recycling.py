"""Token Recycling: draft a tree from what the model last wanted after each token."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenry.generation.engine import Session
from tokenry.speculation.engine import Drafter, DraftTree, Walk
from tokenry.speculation.recycling import CONTEXTS, ORDER, Odds, Recycler, Tree
from tokenry.speculation.sources import Path_, RecyclingTable, Template, Texts, table_of

# Children of each node of the official tree 2.2.2 in breadth-first order, level by level.
_CHILDREN = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)

# Candidates below this score are not worth a node of `template="auto"`.
_LEAST = 0.01
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


@functools.lru_cache(maxsize=512)
def _template(paths: tuple[Path_, ...], device: torch.device) -> Template:
    return Template(paths, device)


@dataclass
class _State:
    """A call with a fixed tree."""

    table: RecyclingTable
    template: Template


@dataclass
class _Auto:
    """A call with `template="auto"`."""

    recycler: Recycler
    odds: Odds
    texts: Texts


@dataclass(frozen=True, kw_only=True)
class TokenRecycling(Drafter):
    """Draft from a table of what the model last wanted after each token, a fixed tree of candidates at a time.

    The table `[vocab, k]` is walked breadth first from the last token along a template; one pass verifies the tree and
    its logits, at rejected nodes too, overwrite the rows of all tokens in it. Source: Turning Trash into Treasure,
    arXiv 2408.08696, section 3; tree and k are the authors'. It needs no training and under 2 MB at 32,000 ids.

    Where `template="auto"`, a tree is grown for speed, node by node where the next token is likeliest, to the number
    of nodes with the most expected tokens per measured second. Once per process and model it measures what a forward
    over n tokens costs. The table then keeps the candidates' scores, and rows for contexts of up to four tokens too;
    the longest known context at the end of a path gives its candidates, and counts of this call say how far to trust a
    score. These are additions: the paper's table knows single tokens alone, and this one takes some megabytes more.

    On the CPU, where every node costs, what lies under tokens not yet learned is left out of a fixed tree; elsewhere
    the tree keeps its shape. A batch shares one table, as rows only add knowledge.

    Every call starts with an empty table, unless it is given one: `resources={"table": RecyclingTable()}` shares a
    table among calls and threads, each learning from the others (the paper's hot start); `table=PATH` starts each call
    from what `RecyclingTable.save` or `tokenry train token-recycling` wrote there. `template="auto"` needs one made by
    `TokenRecycling.new_table`.

    Attributes:
        k: Candidates kept for each token.
        template: `"2.2.2"` (the paper's 80 nodes), `"auto"`, a number of nodes (the first so many of the 80), or paths
            of candidate ranks such as `((0,), (1,), (0, 0))`; `()` is plain decoding.
        harvest_prompt: Whether the table learns from the prompt: one that holds nothing yet, and with `template="auto"`
            any (an addition; False reproduces the paper).
        table: File of a saved table, or the folder of a trained one.
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
            whole = all(path and path[:-1] in known and min(path) >= 0 for path in self.template)
            self.check("template", "paths of ranks from 0 on whose beginnings are all among them", whole)
        ranks = max((rank for path in self._paths() for rank in path), default=-1)
        self.check("k", f"at least {ranks + 1}", ranks < self.k, why="the template uses that many candidates")

    def _paths(self) -> tuple[Path_, ...]:
        if isinstance(self.template, str):
            return standard_template()
        return standard_template()[: self.template] if isinstance(self.template, int) else self.template

    def new_table(self) -> RecyclingTable:
        """An empty table of the kind that this drafter keeps, to share among calls."""
        return RecyclingTable(self.k, **self._form())

    def _form(self) -> dict[str, Any]:
        return {"order": ORDER, "contexts": CONTEXTS, "scored": True} if self.template == "auto" else {}

    def start(self, session: Session) -> _State | _Auto:
        table = table_of(session, self.slug, self.table, self.k, **self._form())
        learns = self.harvest_prompt and table.is_cold
        if self.template == "auto":
            recycler = Recycler(session.batch, table, _LEAST)
            if self.harvest_prompt:
                # What the prompt's own contexts say is worth more than what other texts said.
                session.on_prompt = recycler.harvest
            return _Auto(recycler, Odds(session), Texts(session, 1))
        state = _State(table, _template(self._paths(), session.device))
        if learns:
            session.on_prompt = functools.partial(self._harvest, session, state)
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

    def propose(self, session: Session, state: _State | _Auto, room: int) -> DraftTree:
        if isinstance(state, _Auto):
            return self._grown(session, state, room)
        table, template = state.table, state.template
        with table.lock:
            table.open(session.vocab, session.device)
            tokens, known = table.draft(session.anchor, template)
        tree = DraftTree(tokens, template.shape)
        if session.device.type != "cpu" or bool(known.all()):
            return tree
        nodes = known[session.active].any(0).nonzero()[:, 0]
        known = known[:, nodes]
        return DraftTree(tokens[:, nodes], template.shape.select(nodes), None if bool(known.all()) else known)

    def _grown(self, session: Session, state: _Auto, room: int) -> DraftTree:
        state.odds.costs.begin()
        state.texts.update(session)
        trees: list[Tree] = []
        reaches: list[list[float]] = []
        with state.recycler.table.lock:
            state.recycler.open(session.vocab)
            for text, alive in zip(state.texts.rows, session.alive, strict=True):
                if not alive:
                    # What a finished row drafts is not looked at.
                    trees.append(Tree(0))
                    continue
                tree, reach = state.odds.grow(state.recycler, tuple(text.ids[-ORDER:].tolist()), room)
                trees.append(tree)
                reaches.append(reach)
        return state.recycler.lay_out(session, state.odds.cut(trees, reaches))

    def observe(self, session: Session, state: _State | _Auto, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        table = state.recycler.table if isinstance(state, _Auto) else state.table
        with table.lock:
            # Another thread may have taken the table to its device.
            if isinstance(state, _Auto):
                state.recycler.open(session.vocab)
                if state.recycler.waits:
                    self._count(session, state, walk)
                state.recycler.learn(session, tree, logits)
                return
            table.open(session.vocab, session.device)
            if tree.valid is None and all(session.alive):
                table.learn(tree.tokens.flatten(), logits.flatten(0, 1))
            else:
                real = session.active[:, None] if tree.valid is None else tree.valid & session.active[:, None]
                real = real.expand_as(tree.tokens)
                table.learn(tree.tokens[real], logits[real])

    def _count(self, session: Session, state: _Auto, walk: Walk) -> None:
        rows = zip(walk.tokens.tolist(), walk.counts.tolist(), session.alive, state.texts.rows, strict=True)
        for tokens, count, alive, text in rows:
            if not alive:
                continue
            context = tuple(text.ids[-ORDER:].tolist())
            for chosen in tokens[:count]:
                state.odds.count(*state.recycler.candidates(context), chosen)
                context = (*context, chosen)[-ORDER:]

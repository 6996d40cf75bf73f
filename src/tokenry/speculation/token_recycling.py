"""Token Recycling: draft a tree from what the model last wanted after each token."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenry.errors import ResourceError
from tokenry.generation.engine import Session
from tokenry.speculation.budget import RankCounts, best_nodes, forward_costs
from tokenry.speculation.engine import Drafter, DraftTree, TreeShape, Walk

Path_ = tuple[int, ...]

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
_PATIENCE = 8
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


class Template:
    """A tree of candidate ranks, laid out for retrieval: one gather per level.

    Attributes:
        parents, ranks, depths: Of each node, the root first.
        shape: The tree on a device.
        levels: For each level below the root its nodes' parents, numbered within the level above, and ranks.
    """

    def __init__(self, paths: Sequence[Path_], device: torch.device) -> None:
        nodes: list[Path_] = [(), *sorted(paths, key=lambda path: (len(path), path))]
        place = {path: i for i, path in enumerate(nodes)}
        self.parents = [-1] + [place[path[:-1]] for path in nodes[1:]]
        self.ranks = [0] + [path[-1] for path in nodes[1:]]
        self.depths = [len(path) for path in nodes]
        self.shape = TreeShape.of(self.parents, device)
        self.levels: list[tuple[Tensor, Tensor]] = []
        above = 0
        for depth in range(1, max(self.depths) + 1):
            level = [i for i, d in enumerate(self.depths) if d == depth]
            parents = torch.tensor([self.parents[i] - above for i in level], device=device)
            self.levels.append((parents, torch.tensor([self.ranks[i] for i in level], device=device)))
            above = level[0]


@functools.lru_cache(maxsize=512)
def _template(paths: tuple[Path_, ...], device: torch.device) -> Template:
    return Template(paths, device)


class RecyclingTable:
    """What the model last wanted after each token: `[vocab, k]` ids, best first, and which rows were ever written.

    It outlives calls when the caller keeps it (`resources={"table": table}`), and is then shared by threads under its
    lock. It takes the width of the logits at first use.

    Attributes:
        ids: `[vocab, k]` int32, None before the first use.
        seen: Which rows hold anything, bool `[vocab]`.
        lock: Held while a call reads or writes.
    """

    def __init__(self, k: int = 8, tokenizer: str = "") -> None:
        self.k = k
        self.tokenizer = tokenizer
        self.ids: Tensor | None = None
        self.seen: Tensor | None = None
        self.lock = threading.RLock()

    @property
    def is_cold(self) -> bool:
        """Whether nothing was learned yet."""
        return self.seen is None or not bool(self.seen.any())

    def open(self, vocab: int, device: torch.device) -> None:
        """Make the table fit logits of a width on a device.

        Raises:
            ResourceError: It was learned with another vocabulary.
        """
        if self.ids is None:
            self.ids = torch.zeros(vocab, self.k, dtype=torch.int32, device=device)
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
        elif self.ids.shape[0] != vocab:
            raise ResourceError(
                f"the recycling table was learned with {self.ids.shape[0]} ids and the model has {vocab}; "
                "use a table of the same model and tokenizer"
            )
        elif self.ids.device != device:
            assert self.seen is not None
            self.ids, self.seen = self.ids.to(device), self.seen.to(device)

    def draft(self, anchor: Tensor, template: Template) -> tuple[Tensor, Tensor]:
        """Tokens of a tree behind anchors `[batch]`, and which were ever learned, both `[batch, n]`."""
        assert self.ids is not None and self.seen is not None
        flat = self.ids.view(-1)
        tokens = [anchor[:, None]]
        known = [torch.ones_like(tokens[0], dtype=torch.bool)]
        for parents, ranks in template.levels:
            above = tokens[-1].index_select(1, parents)
            known.append(known[-1].index_select(1, parents) & self.seen[above])
            tokens.append(flat[above * self.k + ranks].long())
        return torch.cat(tokens, 1), torch.cat(known, 1)

    def learn(self, tokens: Tensor, logits: Tensor) -> None:
        """Write the k best ids of raw logits `[n, vocab]` into the rows of tokens `[n]`; the last occurrence wins."""
        assert self.ids is not None and self.seen is not None
        # A stable sort puts a token's occurrences together in order; a scatter would leave the winner to the device.
        ordered, order = tokens.sort(stable=True)
        last = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=last[:-1])
        rows, pick = ordered[last], order[last]
        self.ids[rows] = logits[pick].topk(self.k, dim=-1).indices.int()
        self.seen[rows] = True

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors, with the tokenizer's name and vocabulary size."""
        if self.ids is None or self.seen is None:
            raise ResourceError("the recycling table is empty; generate with it before saving it")
        about = {"k": self.k, "tokenizer": self.tokenizer, "vocab": self.ids.shape[0]}
        with self.lock:
            tensors = {"ids": self.ids.cpu().contiguous(), "seen": self.seen.cpu()}
        save_file(tensors, str(path), metadata={"recycling": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, tokenizer: str | None = None) -> RecyclingTable:
        """Read a table.

        Args:
            path: What `save` wrote.
            tokenizer: Name that the table must have been learned with; None: any.

        Raises:
            ResourceError: The file is missing, is no recycling table, or is of another tokenizer.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("recycling", "null"))
                ids, seen = file.get_tensor("ids"), file.get_tensor("seen")
        except (OSError, SafetensorError, ValueError) as error:
            raise ResourceError(f"cannot read a recycling table from {path}: {error}") from error
        if about is None:
            raise ResourceError(f"{path} is not a recycling table; write one with RecyclingTable.save")
        if tokenizer is not None and about["tokenizer"] != tokenizer:
            raise ResourceError(f"{path} was learned with tokenizer {about['tokenizer']!r}, not {tokenizer!r}")
        table = cls(about["k"], about["tokenizer"])
        table.ids, table.seen = ids, seen
        return table


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

    Attributes:
        k: Candidates kept for each token.
        template: `"2.2.2"` (the paper's 80 nodes), `"auto"`, a number of nodes (the first so many of the 80), or paths
            of candidate ranks such as `((0,), (1,), (0, 0))`; `()` is plain decoding.
        harvest_prompt: Whether a table that holds nothing yet learns from the prompt (an addition; False reproduces the
            paper).
    """

    k: int = 8
    template: int | str | tuple[tuple[int, ...], ...] = "2.2.2"
    harvest_prompt: bool = True

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
        table = session.resources.get("table")
        if table is None:
            table = RecyclingTable(self.k)
        if not isinstance(table, RecyclingTable) or table.k != self.k:
            raise ResourceError(f"{self.slug}: the resource 'table' must be a RecyclingTable with k={self.k}")
        state = _State(table, _template(self._paths(), session.device))
        if self.harvest_prompt and table.is_cold:
            session.on_prompt = functools.partial(self._harvest, session, state)
        if self.template == "auto":
            state.counts = RankCounts(6, _PRIOR)
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
        whole = _template(standard_template(), device)
        nodes = best_nodes(whole.parents, whole.ranks, whole.depths, counts.chances(), costs)
        paths = standard_template()
        return _template(tuple(paths[node - 1] for node in nodes[1:]), device)

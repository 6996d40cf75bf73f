"""Drafters that make the verifier's life hard, and a session whose every random decision can be enumerated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tests import tiny
from tokenry.speculation import Drafter, DraftTree, TreeShape


@dataclass(frozen=True, kw_only=True)
class Oracle(Drafter):
    """Drafts a chain of the true continuation, which the test puts into the resources: ids `[batch, length]`."""

    slug: ClassVar[str] = "oracle-chain"
    resources: ClassVar[tuple[str, ...]] = ("truth", "never")
    depth: int = 4

    def propose(self, session: Any, state: Any, room: int) -> DraftTree:
        truth = session.resources["truth"]
        columns = session.length[:, None] + torch.arange(min(self.depth, room))
        drafts = truth.gather(1, columns.clamp(max=truth.shape[1] - 1))
        tokens = torch.cat([session.anchor[:, None], drafts], 1)
        return DraftTree(tokens, TreeShape.chain(tokens.shape[1]))


@dataclass(frozen=True, kw_only=True)
class Junk(Drafter):
    """Drafts a tree of the one token that never comes."""

    slug: ClassVar[str] = "junk"
    resources: ClassVar[tuple[str, ...]] = ("truth", "never")

    def propose(self, session: Any, state: Any, room: int) -> DraftTree:
        shape = TreeShape.of((-1, 0, 0, 1, 1, 3))
        tokens = torch.full((session.batch, shape.size), session.resources["never"])
        tokens[:, 0] = session.anchor
        return DraftTree(tokens, shape)


@dataclass(frozen=True, kw_only=True)
class Mixed(Drafter):
    """Drafts random trees that hold the right token at some nodes and junk at others, for each row its own shape, with
    nodes that are not real; duplicates happen."""

    slug: ClassVar[str] = "mixed"
    resources: ClassVar[tuple[str, ...]] = ("truth", "never")
    nodes: int = 9
    shared: bool = False
    holes: bool = True

    def start(self, session: Any) -> torch.Generator:
        return torch.Generator().manual_seed(5)

    def propose(self, session: Any, state: torch.Generator, room: int) -> DraftTree:
        truth = session.resources["truth"]
        shapes = [self._parents(state) for _ in range(1 if self.shared else session.batch)]
        parents = torch.tensor(shapes)
        shape = TreeShape.of(shapes[0]) if self.shared else TreeShape.of(parents)
        depth = shape.depth.expand(session.batch, -1)
        columns = (session.length[:, None] - 1 + depth).clamp(max=truth.shape[1] - 1)
        right = torch.rand(depth.shape, generator=state) < 0.6
        junk = torch.randint(3, tiny.VOCABULARY, depth.shape, generator=state)
        tokens = torch.where(right, truth.gather(1, columns), junk)
        tokens[:, 0] = session.anchor
        valid = torch.rand(depth.shape, generator=state) < (0.9 if self.holes else 2)
        valid[:, 0] = True
        valid = ~(shape.ancestors & ~valid[:, None]).any(-1)
        return DraftTree(tokens, shape, valid if self.holes else None)

    def _parents(self, generator: torch.Generator) -> list[int]:
        """Breadth-first parents of a random tree."""
        parents = [-1]
        for node in range(1, self.nodes):
            least = max(parents[-1], 0)
            parents.append(int(torch.randint(least, node, (1,), generator=generator)) if node > 1 else 0)
        return parents


class Ended(Exception):
    """The script of decisions is used up."""


class Scripted:
    """Stands in for a session of one row over a tabulated model, and follows a script of decisions.

    `probability` is the chance of the decisions taken; a decision that the script does not hold raises `Ended` with the
    number of its alternatives.
    """

    batch = 1
    do_sample = True
    processors = ()
    want_scores = False

    def __init__(self, script: list[int], context_free: bool = False) -> None:
        self.script, self.taken, self.probability = script, 0, 1.0
        self.active = torch.ones(1, dtype=torch.bool)
        self.context_free = context_free

    def process(self, logits: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        return logits

    def look_ahead(self, tokens: torch.Tensor, column: int) -> None:
        pass

    def choose(self, scores: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        return self._token(scores[0])[None]

    def choose_nodes(self, scores: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._token(node) for node in scores[0]])[None]

    def uniform(self, row: int, ahead: int, count: int) -> list[_Draw]:
        return [_Draw(self)] * count

    def decide(self, chances: list[float]) -> int:
        if self.taken == len(self.script):
            raise Ended(len(chances))
        choice = self.script[self.taken]
        self.taken += 1
        self.probability *= chances[choice]
        return choice

    def _token(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.decide(scores.softmax(-1).tolist()))


class _Draw:
    """A number in [0, 1) that is below a chance with that chance."""

    def __init__(self, session: Scripted) -> None:
        self.session = session

    def __lt__(self, chance: float) -> bool:
        return self.session.decide([1 - chance, chance]) == 1


def outcomes(run: Callable[[Scripted], Any], **options: Any) -> Iterator[tuple[Any, float]]:
    """Every result of `run(session)` with its probability, over all decisions it takes."""
    scripts: list[list[int]] = [[]]
    while scripts:
        session = Scripted(scripts.pop(), **options)
        try:
            result = run(session)
        except Ended as ended:
            scripts += [[*session.script, choice] for choice in range(ended.args[0])]
            continue
        if session.probability > 0:
            yield result, session.probability

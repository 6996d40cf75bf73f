"""How many draft nodes pay? Measured cost of a forward against counted acceptance."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence

import torch

from tokenry.generation.engine import Session
from tokenry.models import TokenCache, context_length

_SIZES = (1, 2, 4, 8, 16, 32, 48, 81)
_ROUNDS = 5
_costs: weakref.WeakKeyDictionary[object, dict[tuple[object, ...], list[float]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def forward_costs(session: Session, sizes: Sequence[int] = _SIZES) -> list[float]:
    """Seconds of a forward over 0, 1, 2, ... `sizes[-1]` tokens and row, read by number of tokens; a model of a shorter
    context is measured up to its length.

    Measured once per process for a model, batch, device and dtype, with an empty cache, and linear between the sizes.
    Whatever else the machine does only adds time, so the least of a few rounds over all sizes counts, and no size costs
    more than a larger one.
    """
    model = session.model
    longest = context_length(model)
    if longest is not None and longest < sizes[-1]:
        sizes = (*(size for size in sizes if size < longest), longest)
    key = (session.batch, session.device, model.dtype, tuple(sizes))
    with _lock:
        known = _costs.setdefault(model, {})
        if key not in known:
            _seconds(session, sizes[-1])  # the first pays for allocations
            rounds = [[_seconds(session, size) for size in sizes] for _ in range(_ROUNDS)]
            least = [min(times) for times in zip(*rounds, strict=True)]
            known[key] = _filled(sizes, [min(least[i:]) for i in range(len(sizes))])
        return known[key]


def _seconds(session: Session, size: int) -> float:
    tokens = torch.zeros(session.batch, size, dtype=torch.long, device=session.device)
    positions = torch.arange(size, device=session.device).expand(session.batch, -1)
    cache = TokenCache(session.model)
    cache.stage()
    _synchronise(session.device)
    start = time.perf_counter()
    session.model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
    _synchronise(session.device)
    return time.perf_counter() - start


def _filled(sizes: Sequence[int], seconds: Sequence[float]) -> list[float]:
    costs = [seconds[0]] * (sizes[0] + 1)
    for (n, a), (m, b) in zip(
        zip(sizes, seconds, strict=True), zip(sizes[1:], seconds[1:], strict=False), strict=False
    ):
        costs += [a + (b - a) * i / (m - n) for i in range(1, m - n + 1)]
    return costs


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class RankCounts:
    """How often the token that came next was the candidate of each rank, by depth in the tree.

    Every token that a verify step commits tells one such rank, whether the candidate stood in the tree or not, so the
    counts do not depend on the trees that were tried. `prior` gives the chance of each rank before anything is counted;
    it weighs `weight` tokens, and all depths together weigh as much again for each depth.
    """

    def __init__(self, depths: int, prior: Sequence[float], weight: float = 8.0) -> None:
        self.prior = prior
        self.weight = weight
        self.hits = [[0.0] * len(prior) for _ in range(depths)]
        self.trials = [0.0] * depths

    def add(self, depth: int, rank: int | None) -> None:
        """Count a committed token behind a node at `depth`; None: its rank is beyond the candidates."""
        if depth < len(self.trials):
            self.trials[depth] += 1
            if rank is not None:
                self.hits[depth][rank] += 1

    def chances(self) -> list[list[float]]:
        """Chance of each rank behind a node of each depth that was itself accepted."""
        trials = sum(self.trials)
        pooled = [
            (sum(hits[rank] for hits in self.hits) + self.weight * chance) / (trials + self.weight)
            for rank, chance in enumerate(self.prior)
        ]
        return [
            [(h + self.weight * p) / (n + self.weight) for h, p in zip(hits, pooled, strict=True)]
            for hits, n in zip(self.hits, self.trials, strict=True)
        ]


def best_nodes(
    parents: Sequence[int],
    ranks: Sequence[int],
    depths: Sequence[int],
    chances: Sequence[Sequence[float]],
    costs: Sequence[float],
) -> list[int]:
    """The nodes of a template, root included and ascending, whose tree gives most tokens a second.

    A node counts with the chance that all of its path is accepted; for every size the likeliest nodes are taken, which
    always hold their parents, and the size with the best ratio of expected tokens to measured cost wins. Sizes beyond
    the measured ones are not taken.
    """
    reach = [1.0]
    for node in range(1, len(parents)):
        chance = chances[depths[node] - 1][ranks[node]]
        reach.append(reach[parents[node]] * min(chance, 0.99))
    order = sorted(range(len(parents)), key=lambda node: (-reach[node], node))
    best, rate, expected = 1, 0.0, 0.0
    for size, node in enumerate(order, 1):
        expected += reach[node]
        if size < len(costs) and expected / costs[size] > rate:
            best, rate = size, expected / costs[size]
    return sorted(order[:best])

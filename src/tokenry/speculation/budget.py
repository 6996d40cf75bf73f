"""How many draft nodes pay? Measured cost of a forward against counted acceptance."""

from __future__ import annotations

import heapq
import statistics
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from tokenry.generation.engine import Session
from tokenry.models import TokenCache, context_length, is_packed

# Kernels may change where the rows reach a power of two, and a pass then costs much more, or less, than one row before.
_SIZES = (1, 2, 3, 4, 8, 12, 15, 16, 24, 31, 32, 48, 64, 81)
_ROUNDS = 7
# Tokens in the cache behind which a forward is measured.
_CACHED = 64
# Steps between two looks at what they take; steps that a measured forward counts for, and as many as are remembered.
_PATIENCE, _TRUST, _MEMORY = 8, 4.0, 64.0
_clock = time.perf_counter
_costs: weakref.WeakKeyDictionary[object, dict[tuple[object, ...], list[float]]] = weakref.WeakKeyDictionary()
_steps: weakref.WeakKeyDictionary[object, dict[tuple[object, ...], _Learned]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def forward_costs(session: Session, sizes: Sequence[int] = _SIZES) -> list[float]:
    """Seconds of a forward over 0, 1, 2, ... `sizes[-1]` tokens and row, read by number of tokens; a model of a shorter
    context is measured up to its length.

    Measured once per process for a model, batch, device and dtype, behind a few cached tokens, and linear between the
    sizes. The median of a few rounds over all sizes counts: the least is what a size takes at its luckiest, and
    flatters those that vary. No size costs more than a larger one.
    """
    model = session.model
    longest = context_length(model)
    if longest is not None and longest < sizes[-1]:
        sizes = (*(size for size in sizes if size < longest), longest)
    key = (session.batch, session.device, model.dtype, is_packed(model), tuple(sizes))
    with _lock:
        known = _costs.setdefault(model, {})
        if key not in known:
            behind = TokenCache(session.model)
            cached = _CACHED if longest is None else min(_CACHED, longest - sizes[-1])
            if cached:
                _seconds(session, behind, 0, cached)
            rounds = [
                [_seconds(session, behind.fork(), cached, size) for size in sizes]
                for _ in range(1 + _ROUNDS)  # the first pays for allocations
            ]
            typical = [statistics.median(times[1:]) for times in zip(*rounds, strict=True)]
            known[key] = _filled(sizes, [min(typical[i:]) for i in range(len(sizes))])
        return known[key]


def _seconds(session: Session, cache: TokenCache, cached: int, size: int) -> float:
    tokens = torch.zeros(session.batch, size, dtype=torch.long, device=session.device)
    positions = torch.arange(cached, cached + size, device=session.device).expand(session.batch, -1)
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


def best_size(reaches: Sequence[Sequence[float]], costs: Sequence[float]) -> int:
    """How many nodes each row's tree should have for most tokens a second; 1 is no drafts.

    Args:
        reaches: For each row the chance that each node is reached, in the order the nodes would be taken, the root's 1
            first. A row of fewer nodes than others waits for them.
        costs: Seconds of a forward by nodes; sizes beyond the measured ones are not taken.
    """
    best, rate, expected = 1, 0.0, 0.0
    for size in range(1, min(len(costs), max(map(len, reaches)) + 1)):
        expected += sum(row[size - 1] for row in reaches if size <= len(row))
        if expected / costs[size] > rate:
            best, rate = size, expected / costs[size]
    return best


class _Learned:
    """What whole steps took in this process, beside their forwards as measured.

    Few forwards are measured, with nothing else between them and perhaps while the machine was busy, so sizes stand to
    each other a little otherwise than in steps. What all sizes have in common changes no choice and is left out: the
    machine's speed, which drifts.
    """

    def __init__(self, forwards: Sequence[float]) -> None:
        self.forwards = forwards
        last = len(forwards) - 1
        self._sizes = [*(size for size in _SIZES if size < last), last]
        self._ratios, self._steps = np.ones(len(self._sizes)), np.full(len(self._sizes), _TRUST)
        self._pace: float | None = None
        self._look()

    def _look(self) -> None:
        ratios = np.interp(np.arange(len(self.forwards)), self._sizes, self._ratios)
        # No size costs more than a larger one.
        self.seconds = np.maximum.accumulate(np.asarray(self.forwards) * ratios).tolist()
        self.floors = least_slopes(self.seconds)

    def add(self, size: int, seconds: float) -> float:
        """Count what a step took that verified so many nodes; return it without a hiccup of the machine."""
        error = seconds / self.seconds[size]
        pace = error if self._pace is None else self._pace
        error = min(error, 2 * pace)
        self._pace = pace + (error - pace) / _PATIENCE
        relative = error / self._pace
        # So far off, it is the pace that is not known yet.
        if relative > 0.5:
            self._correct(size, relative)
        return error * self.seconds[size]

    def _correct(self, size: int, relative: float) -> None:
        right = max(bisect_left(self._sizes, size), 1)
        low, high = self._sizes[right - 1], self._sizes[right]
        share = (size - low) / (high - low)
        for node, weight in ((right - 1, 1 - share), (right, share)):
            self._steps[node] = min(self._steps[node] + weight, _MEMORY)
            self._ratios[node] *= 1 + weight * (relative - 1) / self._steps[node]

    def look(self) -> None:
        """Take what was counted into account."""
        with _lock:
            self._look()


class StepCosts:
    """What the steps of a call cost: forwards as they were measured, corrected by what steps took in this process.

    Attributes:
        seconds: Of a step by the nodes of its tree, 1 being no drafts.
        floors: `least_slopes` of them.
        last: Seconds that the step before took, and of a forward of its size as it was measured; None if it was not
            timed or had no drafts.
    """

    def __init__(self, session: Session) -> None:
        self.last: tuple[float, float] | None = None
        self._stats = session.stats
        self._forwards = forward_costs(session)
        self._learned = _learned_of(session, self._forwards)
        self.seconds, self.floors = self._learned.seconds, self._learned.floors
        self._began = 0.0
        self._size = self._steps = self._passes = 0

    def begin(self) -> None:
        """Note that a step begins, which ends the one before."""
        now = _clock()
        self.last = None
        passes = self._stats.forwards
        # The first step may read the prompt too; steps without room for drafts do not begin here.
        if self._steps and self._size and passes == self._passes + 1:
            # A clock may stand still.
            if now > self._began:
                took = self._learned.add(self._size, now - self._began)
                self.last = (took, self._forwards[self._size]) if self._size > 1 else None
            if self._steps % _PATIENCE == 0:
                self._learned.look()
                self.seconds, self.floors = self._learned.seconds, self._learned.floors
        self._steps += self._size > 0
        self._began, self._size, self._passes = now, 0, passes

    def take(self, size: int) -> None:
        """Note how many nodes the step that has begun verifies."""
        self._size = size

    def forward(self, size: int) -> float:
        """Seconds of a forward over the anchor and drafts, `size` nodes together, as it was measured."""
        return self._forwards[size]


def _learned_of(session: Session, forwards: Sequence[float]) -> _Learned:
    key = (session.batch, session.device, session.model.dtype, is_packed(session.model))
    with _lock:
        known = _steps.setdefault(session.model, {})
        if key not in known or known[key].forwards is not forwards:
            known[key] = _Learned(forwards)
        return known[key]


class Counts:
    """How often what was foreseen came true, by kind of foresight.

    Attributes:
        chances: Chance of each kind. The prior ones that it starts with weigh `weight` trials.
    """

    def __init__(self, prior: Sequence[float], weight: float = 8.0) -> None:
        self.chances = list(prior)
        self._hits = [chance * weight for chance in prior]
        self._trials = [weight] * len(prior)

    def add(self, kind: int, hit: bool) -> None:
        """Count a trial."""
        self._hits[kind] += hit
        self._trials[kind] += 1
        # Nothing is certain: a chance of 1 would draft without end.
        self.chances[kind] = min(self._hits[kind] / self._trials[kind], 0.99)


class RunCounts(Counts):
    """How often a copied token was right, by how many tokens agreed before it, those copied themselves included."""

    LONGEST = 24
    # Lengths from 1 to 4, 5 and 6, 7 to 9, 10 to 15, 16 to 23, and more.
    KINDS = (0, 0, 1, 2, 3, 4, 4, 5, 5, 5, *[6] * 6, *[7] * 8, 8)
    PRIOR = (0.35, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)

    def __init__(self) -> None:
        super().__init__(self.PRIOR)

    def kind(self, run: int) -> int:
        """The kind of a copied token behind so many tokens that agree."""
        return self.KINDS[min(run, self.LONGEST)]

    def reach(self, run: int, count: int) -> list[float]:
        """Chance that each of the anchor and up to `count` tokens copied after a match of `run` tokens is reached, as
        long as there is a fair one."""
        reach = [1.0]
        for place in range(count):
            if reach[-1] < 0.01:
                break
            reach.append(reach[-1] * self.chances[self.kind(run + place)])
        return reach

    def learn(self, run: int, copied: Sequence[int], chosen: Sequence[int]) -> None:
        """Count what was copied after a match of `run` tokens against what was chosen, as far as both agree and once
        more; copied tokens tell as much where they were not drafted."""
        for place, (copy, token) in enumerate(zip(copied, chosen, strict=False)):
            self.add(self.kind(run + place), copy == token)
            if copy != token:
                break


N = TypeVar("N")


class Growth(Generic[N]):
    """A tree that grows where the next token is likeliest, as long as another node can pay.

    Attributes:
        nodes: In the order they were taken, the root first; parents stand before children.
        parents: Index of each node's parent, -1 for the root.
        reach: Chance that each node is reached, descending.
    """

    def __init__(
        self,
        root: N,
        children: Callable[[N, float], Iterable[tuple[float, N]]],
        costs: Sequence[float],
        floors: Sequence[float],
        deepest: int,
    ) -> None:
        """`children(node, least)` gives a node's children, likeliest first, with the chance of each once the node is
        reached; it may end with the first of a chance below `least`. `floors` are `least_slopes(costs)`."""
        self.nodes: list[N] = []
        self.parents: list[int] = []
        self.reach: list[float] = []
        expected = rate = 0.0
        most = len(costs) - 1
        # The counter keeps the order of equals, and nodes from being compared. A child waits for its elder siblings, so
        # that the heap holds one of each brood.
        entries = 0
        heap: list[tuple[float, int, int, int, N, Iterator[tuple[float, N]]]] = [(-1.0, 0, -1, 0, root, iter(()))]
        while heap and len(self.nodes) < most:
            negative, _, parent, depth, node, younger = heapq.heappop(heap)
            reach, place = -negative, len(self.nodes)
            # What is left in the heap is no likelier. So nothing after it pays either, if as many as may come do not
            # pay for themselves and for what the best size so far is ahead.
            ahead = rate * costs[place] - expected if place else 0.0
            if reach <= rate * floors[place] + ahead / (most - place):
                break
            self.nodes.append(node)
            self.parents.append(parent)
            self.reach.append(reach)
            expected += reach
            rate = max(rate, expected / costs[place + 1])
            broods = [(parent, depth, younger)]
            if depth < deepest:
                least = rate * floors[place + 1] / reach
                broods.append((place, depth + 1, iter(children(node, least))))
            for above, below, brood in broods:
                following = next(brood, None)
                if following is not None:
                    chance, child = following
                    entries += 1
                    heapq.heappush(heap, (-self.reach[above] * chance, entries, above, below, child, brood))


def least_slopes(costs: Sequence[float]) -> list[float]:
    """For every number of nodes, the least that another node costs on average, at that size or any larger one."""
    cost, size = np.asarray(costs), np.arange(len(costs))
    further = size[None, :] - size[:-1, None]
    slopes = np.where(further > 0, (cost[None, :] - cost[:-1, None]) / np.maximum(further, 1), np.inf).min(1)
    return [*np.minimum.accumulate(slopes[::-1])[::-1].tolist(), float("inf")]

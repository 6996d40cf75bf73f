"""Which size of a draft pays? Measured cost of both models' forwards against counted acceptance."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.generation.engine import Session
from tokenry.speculation.budget import forward_costs

# Every so many steps the next larger size is tried, so that it is counted too; one that never was is tried at once.
_PROBE = 8
# What a step weighs after each further one.
_MEMORY = 0.95
# Steps at the first size, and one without drafts, before any choice.
_PATIENCE = 4
_clock = time.perf_counter


class Sizing:
    """The size that gives most tokens a second, chosen anew before every step.

    The nodes of a tree come in the order in which they were worth drafting. Had the step stopped at the first `s` of
    them, it would have drafted exactly these, and committed the nodes of its walk that are among them and one token of
    the target. So every step tells what each smaller size would have committed and cost; larger ones are tried now
    and then. Size 0 is plain decoding.

    What forwards alone take leaves out the work between them, which drafting has more of. So the time of whole steps is
    held against what their forwards were expected to take, for steps with drafts and steps without.

    Args:
        session: The call; the target's forwards are measured once per process (`budget.forward_costs`).
        draft: The second model; likewise.
        sizes: Sizes to choose from, ascending from 0; those beyond what is measured are left out.
        first: The size to begin with.
    """

    def __init__(self, session: Session, draft: PreTrainedModel, sizes: Sequence[int], first: int) -> None:
        self.verify = torch.tensor(forward_costs(session), dtype=torch.float64)
        beside = cast(Session, SimpleNamespace(model=draft, batch=session.batch, device=session.device))
        self.draft = torch.tensor(forward_costs(beside), dtype=torch.float64)
        most = min(len(self.verify), len(self.draft)) - 2
        self.sizes = [size for size in sizes if size <= most]
        self.rung = max(i for i, size in enumerate(self.sizes) if size <= first)
        self.steps = 0
        self.tokens = [0.0] * len(self.sizes)
        self.seconds = [0.0] * len(self.sizes)
        self._began: float | None = None
        # Of the step that is under way: what its forwards take, if it drafts.
        self._planned: float | None = None
        # Without drafts, and with: seconds that steps took, and those that their forwards were expected to take.
        self._took = [[0.0, 0.0], [0.0, 0.0]]

    def next(self) -> int:
        """The number of nodes to draft in the coming step."""
        self.steps += 1
        self._time()
        if self.steps == _PATIENCE:
            self.rung = 0  # plain decoding is timed too
        elif self.steps > _PATIENCE:
            best = self.best()
            larger = min(best + 1, len(self.sizes) - 1)
            self.rung = larger if self.steps % _PROBE == 0 or not self.seconds[larger] else best
        return self.sizes[self.rung]

    def _time(self) -> None:
        """Close the time of the step before."""
        now = _clock()
        if self._began is not None:
            drafted = self._planned is not None
            took = self._took[drafted]
            took[0] = _MEMORY * took[0] + now - self._began
            took[1] = _MEMORY * took[1] + (self._planned if self._planned is not None else float(self.verify[1]))
        self._began, self._planned = now, None

    def _excess(self, drafted: bool) -> float:
        """How many times as long as their forwards alone steps take."""
        seconds, planned = self._took[drafted]
        return seconds / planned if seconds else 1.0

    def best(self) -> int:
        """The place among the sizes of the one that gave most tokens a second; plain decoding is known beforehand."""
        plain = 1 / (float(self.verify[1]) * self._excess(False))
        excess = self._excess(True)
        rates = [n / (s * excess) if s else 0.0 for n, s in zip(self.tokens, self.seconds, strict=True)]
        rates[0] = plain
        return max(range(len(rates)), key=rates.__getitem__)

    def count(self, depth: Tensor, accepted: Tensor) -> None:
        """Count a step: depth of each row's drafted nodes `[batch, n]`, 0 where there is none, and which of them were
        accepted, bool `[batch, n]`, in the order in which they were worth drafting."""
        if depth.numel() == 0:
            return
        depth, accepted = depth.cpu(), accepted.cpu()
        ends = torch.tensor([min(size, depth.shape[1]) for size in self.sizes[: self.rung + 1]])
        drafts, last = (ends > 0)[:, None], (ends - 1).clamp(min=0)
        levels = torch.nn.functional.one_hot(depth, int(depth.max()) + 1)[..., 1:].cumsum(1)
        # Width of each level in its widest row, had the tree ended at each size.
        widths = levels.amax(0)[last] * drafts
        # The first level is drafted from the anchor, each further one from the level before it.
        fed = torch.cat([torch.ones_like(widths[:, :1]), widths[:, :-1]], 1)
        seconds = (self.draft[fed] * (widths > 0)).sum(1) + self.verify[ends + 1]
        tokens = (accepted.double().mean(0).cumsum(0)[last, None] * drafts)[:, 0] + 1
        for rung, (won, took) in enumerate(zip(tokens.tolist(), seconds.tolist(), strict=True)):
            self.tokens[rung] = _MEMORY * self.tokens[rung] + won
            self.seconds[rung] = _MEMORY * self.seconds[rung] + took
        if self.rung:
            self._planned = float(seconds[-1])

"""TreeKV: a cache whose density falls off smoothly from near to far."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenry.kvcache.engine import AttentionRows, CachePolicy, TokenLayer, age_first, part


@dataclass(frozen=True, kw_only=True)
class TreeKV(CachePolicy):
    """Drop the less attended of two neighbours, the next two each time (arXiv 2501.04987, algorithm 1).

    Between the sinks and the newest tokens lies the tree: when it overflows, the token of the scoped pair with the
    smaller mean attention goes, and the scope moves one slot to the right, cyclically. Every sweep halves the density
    of what it passes, so the gaps between kept tokens double with distance. The scope stands where the number of
    dropped tokens says, so a row does not depend on its batch, and each KV head keeps leaves of its own.

    A prompt that is too long by more than ``compact_every`` tokens is swept by blocks of tokens, as the attention of
    its last ``block`` queries judges them, then token by token down to the budget.

    Args:
        budget: Slots a layer and KV head after every forward; 256 is the family's common default, the paper's language
            modelling has 1024.
        sinks: First tokens that always stay.
        recent: Share of the budget that the newest tokens hold (the paper: 508 of 1024).
        block: Tokens a block and queries that judge a prompt, at most a quarter of the tree a block; the paper gives
            no number.
        shared: Whether the KV heads of a layer keep the same tokens, by their mean attention.
        guided: Whether attention decides which of a pair goes; otherwise the older does, which leaves the bare tree
            (the paper's ablation).
        stride: Slots that the scope moves with each drop. 1 gives the tree of the paper's picture; its printed formula
            moves by 2, which passes over every third token.
        positions: ``"rolling"`` counts positions over the held tokens, as the paper does to run past the trained
            length; ``"original"`` leaves every token where it stood.
    """

    needs_attention: ClassVar[bool] = True

    sinks: int = 4
    recent: float = 508 / 1024
    block: int = 16
    shared: bool = False
    guided: bool = True
    stride: Literal[1, 2] = 1
    positions: Literal["original", "rolling"] = "original"

    def validate(self) -> None:
        self.check("sinks", "at least 0", self.sinks >= 0)
        self.check("recent", "at least 0 and below 1", 0 <= self.recent < 1)
        self.check("block", "at least 1", self.block >= 1)
        super().validate()

    def protected(self) -> int:
        return self._protected(int(self.budget))

    def least(self) -> int:
        return next(budget for budget in count(self.sinks + 1) if budget > self._protected(budget))

    def _protected(self, budget: int) -> int:
        return self.sinks + part(self.recent, budget)

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        zeros = torch.zeros(positions.shape[0], heads, positions.shape[1], device=positions.device)
        return {"mass": zeros, "count": zeros}

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        if not self.guided:
            return
        # A prompt is judged by its last queries, all verified tokens judge like single ones.
        start = 0 if layer.pending is not None else max(0, rows.count - self.block)
        layer.state["mass"] = layer.state["mass"] + rows.rows(start).sum(2) / rows.groups
        positions = layer.slots.places(layer.cache.batch, layer.device)
        # Each slot was seen by the queries that came with it or after it.
        seeing = (layer.cache.seen_after[:, None, None] - positions).clamp(min=0, max=rows.count - start)
        if rows.valid is not None:
            seeing = torch.minimum(seeing, rows.valid[:, start:].sum(-1)[:, None, None])
        layer.state["count"] = layer.state["count"] + seeing

    def score(self, layer: TokenLayer) -> Tensor:
        """1 for what stays and 0 for what goes, as many as are over the budget."""
        valid, positions = layer.slots.materialise(layer.cache.batch, layer.device)
        worth = layer.state["mass"] / layer.state["count"].clamp(min=1)
        if self.shared:
            worth = worth.mean(1, keepdim=True).expand_as(worth)
        budget = int(self.budget)
        size = budget - self.protected()
        inside = valid & (positions >= self.sinks) & ~age_first(layer, self.protected() - self.sinks)
        # The tree's slots in the order of time, all others behind them.
        order = inside.expand_as(worth).byte().argsort(dim=-1, descending=True, stable=True)
        held = valid.sum(-1, keepdim=True)
        excess = (held - budget).clamp(min=0)
        gone = layer.cache.seen_after[:, None, None] - held
        most = layer.size - budget

        block = min(self.block, max(1, size // 4))
        if block > 1 and most > self.compact_every:
            blocks = torch.where(excess > self.compact_every, excess // block, 0)
            groups = worth.gather(-1, order)[..., : worth.shape[-1] // block * block].unflatten(-1, (-1, block))
            lost = sweep(groups.mean(-1), size // block, blocks, gone // block, most // block, self.stride)
            lost = F.pad(lost.repeat_interleave(block, -1), (0, worth.shape[-1] % block))
            order = order.gather(-1, lost.byte().argsort(dim=-1, stable=True))
            excess, gone, whole = excess - blocks * block, gone + blocks * block, blocks * block
            most = min(most, max(block - 1, self.compact_every))
        else:
            whole = torch.zeros_like(excess)
        lost = sweep(worth.gather(-1, order), size, excess, gone, most, self.stride)
        # Those that went in blocks stand at the end.
        lost = lost | (torch.arange(lost.shape[-1], device=lost.device) >= lost.shape[-1] - whole)
        return torch.zeros_like(worth).scatter_(-1, order, (~lost).to(worth.dtype))


def sweep(worth: Tensor, size: int, drops: Tensor, gone: Tensor, most: int, stride: int = 1) -> Tensor:
    """Which entries go when the scope drops the lesser of its two neighbours ``drops`` times, as bool like ``worth``.

    The pairs between two wraps of the scope are disjoint, so each sweep is one step.

    Args:
        worth: ``[batch, heads, entries]`` in the order of time; on a tie the older goes.
        size: Entries that the tree holds; the scope wraps there.
        drops: ``[batch, 1 or heads, 1]``; at least ``size + drops`` entries belong to the tree.
        gone: Likewise, how many were dropped before, which says where the scope stands.
        most: The most that ``drops`` can be.
        stride: Slots that the scope moves with each drop.
    """
    column = torch.arange(worth.shape[-1], device=worth.device)
    order = column.expand(worth.shape)
    scope, left = gone * stride % size, drops
    for _ in range(1 + (most * stride - 1 + size - 1) // size if most > 0 else 0):
        here = torch.minimum(left, (size - scope + stride - 1) // stride)
        # What a drop leaves moves one to the left, so a pair begins at every entry of so many.
        offset = column - scope
        place = offset % (stride + 1)
        paired = (offset >= 0) & (offset < (stride + 1) * here) & (place < 2)
        values = worth.gather(-1, order)
        older_goes = values <= values.roll(-1, -1)
        lost = paired & torch.where(place == 0, older_goes, ~older_goes.roll(1, -1))
        order = order.gather(-1, lost.byte().argsort(dim=-1, stable=True))
        scope, left = (scope + here * stride) % size, left - here
    # Whatever was lost stands behind all that was not.
    return torch.zeros_like(worth, dtype=torch.bool).scatter_(
        -1, order, (column >= worth.shape[-1] - drops).expand(worth.shape)
    )

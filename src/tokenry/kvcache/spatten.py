"""SpAtten: tokens and heads leave layer by layer by what they collected in all layers so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter
from tokenry.kvcache.engine import AttentionRows, CachePolicy, TokenLayer, age_first, marked, part
from tokenry.models import Rows, TokenCache, anatomy

_UNBOUNDED = 2**30


@dataclass(frozen=True)
class _Plan:
    """What a model's layers keep: the full-attention layers in order, the budgets of those that prune tokens as shares
    of the prompt, or of the budget where that is a count, and the query heads of those that prune heads."""

    full: tuple[int, ...]
    budgets: dict[int, float]
    heads: dict[int, int]

    def earlier(self, layer: TokenLayer) -> TokenLayer | None:
        """The full-attention layer before ``layer``."""
        place = self.full.index(layer.number)
        return layer.cache.layers[self.full[place - 1]] if place else None


@dataclass(frozen=True, kw_only=True)
class SpAtten(CachePolicy):
    """Prune tokens and heads in cascade, by the attention that they accumulate (arXiv 2012.09852, section III).

    A token's score is the attention it received from all rows and heads of this layer and all layers before it; a
    head's is the magnitude of its outputs there. A token that is dropped in a layer is in none behind it, and so is a
    head. In prompts the later layers do not even run for such tokens: their outputs are NaN, the newest one's are not.
    A layer's feed-forward part still runs for what its attention drops.

    The paper keeps one score a token through all steps of generation; here each layer's holds what that layer and those
    before it gave, which is the same in prompts, so that drafts can be verified in one pass. Heads are silenced: their
    scores and outputs are zero, and the projections run all the same, so that pruning heads, reading few values and
    reading few bits save nothing on ordinary hardware but what ``traffic`` counts. Sliding-window layers prune nothing.

    Args:
        budget: Slots of a layer and KV head in the mean over the layers that prune, as a count or a share of the
            prompt. The default is about the mean of the official schedule for GPT-2 medium.
        spread: How far the first of them is above the mean, and the last below, as a share of it; linear between.
            Narrowed where the first would hold more than the whole prompt.
        dense: First layers that drop nothing. None: 15 % of them, but at least 3, as in the paper, and at most half.
        heads: Share of the query heads that the last layer keeps; falls linearly behind the first 30 % of the layers.
            1: no head is pruned.
        values: Share of the seen slots whose values a decode step reads in each head, those of the largest
            probabilities; what is left out is not made up for. 1: all.
        msb: Bits of queries and keys that a decode step reads first; 0: all that there are. A simulation: keys are
            stored as ever and rounded on reading, each token and head for itself.
        lsb: Bits that it reads in addition where the largest probability is below ``threshold``.
        threshold: See ``lsb`` (the paper: 0.1; the official schedules: 0.05).
        recent: Share of a layer's budget that the newest tokens hold, at least the newest one. The paper protects that
            one alone, ``recent=0``; new tokens have collected little yet, and go at once then.
        normalise: ``"count"`` divides a score by the number of tokens that came behind the slot, which takes away the
            advantage of early tokens; not in the paper.
        skip: Whether later layers do not run for the tokens of a prompt that were dropped; otherwise they leave the
            cache alone.
    """

    needs_attention: ClassVar[bool] = True
    ordered: ClassVar[bool] = False
    skips: ClassVar[bool] = True

    budget: int | float = 0.45
    spread: float = 0.5
    dense: int | None = None
    heads: float = 1.0
    values: float = 1.0
    msb: int = 0
    lsb: int = 4
    threshold: float = 0.1
    recent: float = 0.5
    normalise: Literal["none", "count"] = "none"
    skip: bool = True

    def validate(self) -> None:
        self.check("spread", "at least 0 and below 1", 0 <= self.spread < 1)
        self.check("dense", "at least 0, or none", self.dense is None or self.dense >= 0)
        self.check("heads", "above 0 and at most 1", 0 < self.heads <= 1)
        self.check("values", "above 0 and at most 1", 0 < self.values <= 1)
        self.check("msb", "0, or between 2 and 16", self.msb == 0 or 2 <= self.msb <= 16)
        self.check("lsb", "between 0 and 16", 0 <= self.lsb <= 16)
        self.check("threshold", "between 0 and 1", 0 <= self.threshold <= 1)
        self.check("recent", "at least 0 and below 1", 0 <= self.recent < 1)
        super().validate()

    def protected(self) -> int:
        # The newest token's outputs are asked for.
        return max(1, part(self.recent, int(self.budget)))

    def least(self) -> int:
        return 2

    def prepare(self, model: PreTrainedModel) -> _Plan:
        """What each layer of a model keeps.

        Raises:
            BadParameter: No layer would prune tokens.
        """
        parts = anatomy(model)
        count = len(parts.layers)
        full = tuple(number for number, window in enumerate(parts.windows) if window is None)
        dense = min(max(3, math.ceil(0.15 * count)), count // 2) if self.dense is None else self.dense
        pruning = [number for number in full if number >= dense]
        if not pruning:
            raise BadParameter(
                f"{self.slug}: dense={self.dense} is not allowed for this model; behind the first {dense} layers must "
                f"be one that attends in full ({', '.join(map(str, full))})"
            )
        budgets = dict(zip(pruning, self._schedule(len(pruning)), strict=True))
        heads = {}
        start = math.ceil(0.3 * count)
        if self.heads < 1:
            for number in full:
                if number >= max(start, 1):
                    share = 1 - (1 - self.heads) * (number - start + 1) / (count - start)
                    heads[number] = max(1, math.floor(parts.heads * share + 1e-9))
        return _Plan(full, budgets, heads)

    def _schedule(self, layers: int) -> list[float]:
        """Shares of the layers that prune, from the first to the last; their mean is the budget, or 1 of a count."""
        mean = self.budget if isinstance(self.budget, float) else 1.0
        first = mean * (1 + self.spread)
        if isinstance(self.budget, float):
            first = min(1.0, first)
        last = 2 * mean - first
        return [first + (last - first) * place / (layers - 1) for place in range(layers)] if layers > 1 else [mean]

    def layer_budget(self, layer: TokenLayer) -> int | float:
        return layer.cache.prepared.budgets.get(layer.number, _UNBOUNDED)

    def slots(self, share: float, length: int) -> int:
        """Slots that a share gives, of a prompt of ``length`` tokens or of a budget that is a count."""
        if isinstance(self.budget, float):
            return super().slots(share, length)
        # How far the layers may be from the budget so that the first holds no more than there is.
        above = min(self.spread, max(0.0, length / self.budget - 1))
        narrow = above / self.spread if self.spread else 0.0
        return max(self.least(), round(self.budget * (1 + (share - 1) * narrow)))

    # Tokens ----------------------------------------------------------------------------------------------------------
    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        return {"mass": torch.zeros(positions.shape[0], heads, positions.shape[1], device=positions.device)}

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        cache = layer.cache
        own = rows.column_sums().sum(1)
        positions = layer.slots.places(cache.batch, layer.device)[:, 0].clamp(min=0)
        # What the layers so far gave in this forward, by position; tokens that are not in this layer keep theirs.
        gain = cache.handed.get("tokens")
        if gain is None:
            gain = own.new_zeros(cache.batch, cache.total + cache.new)
        gain = gain.scatter_add(1, positions, own)
        cache.handed["tokens"] = gain
        gain = gain.gather(1, positions)[:, None]
        layer.state["mass"] = layer.state["mass"] + (gain if layer.slots.valid is None else gain * layer.slots.valid)
        if rows.norms is not None:
            norms = rows.norms if rows.valid is None else rows.norms * rows.valid[:, None]
            cache.handed["heads"] = _added(norms.sum(-1), cache.handed.get("heads"))
            layer.lay("magnitude", _added(cache.handed["heads"], layer.beside.get("magnitude")))
            if rows.count == 1 or layer.pending is not None:
                self._choose_heads(layer, cache.seen_after % self.compact_every == 0)

    def score(self, layer: TokenLayer) -> Tensor:
        cache = layer.cache
        positions = layer.slots.places(cache.batch, layer.device)[:, :1]
        score = layer.state["mass"][:, :1]
        if self.normalise == "count":
            score = score / (cache.seen_after[:, None, None] - positions).clamp(min=1)
        earlier = cache.prepared.earlier(layer)
        if earlier is not None and earlier.number in cache.prepared.budgets:
            valid, held = (each[:, 0] for each in earlier.slots.materialise(cache.batch, layer.device))
            there = marked(held, valid, cache.total + cache.new)
            present = there.gather(1, positions[:, 0].clamp(min=0))[:, None]
            score = score.masked_fill(~present, float("-inf"))
        return score.masked_fill(age_first(layer, self.protected())[:, :1], float("inf"))

    def keep(self, layer: TokenLayer) -> Tensor | None:
        budget = int(self.budget)
        if layer.size <= budget:
            return None
        # Of equal ones the earlier stay, and the same in all heads.
        order = self._masked_score(layer)[:, :1].argsort(dim=-1, descending=True, stable=True)
        return order[..., :budget].sort(-1).values.expand(-1, layer.shape[1], -1)

    def passes(self, layer: TokenLayer, rows: AttentionRows | None) -> Rows | None:
        cache = layer.cache
        block = cache.forward_block if cache.rows is None else cache.rows.block
        if not self.skip or cache.new == 1 or layer is cache.layers[-1]:
            return None
        kept = layer.staying()
        if kept is None:
            return None
        goes = kept[:, 0, -block.new :]
        if block.valid is not None:
            goes = goes & block.valid
        return Rows.chosen(cache, goes, layer._new_positions(block))

    # Heads, values, bits ---------------------------------------------------------------------------------------------
    @property
    def attends(self) -> bool:
        return self.heads < 1 or self.values < 1 or self.msb > 0

    def attend(self, layer: TokenLayer, rows: AttentionRows, value: Tensor) -> Tensor:
        block = layer.cache.forward_block
        step = (block.new == 1 or block.deferred) and layer.slots.size > 0
        if not step:
            # In prompts the heads of this layer follow from what the layers before have just seen.
            self._choose_heads(layer)
        alive = layer.beside.get("heads")
        if alive is not None:
            rows.heads = alive.view(alive.shape[0], -1, rows.groups).to(torch.float32)
        sparse = step and (self.values < 1 or self.msb > 0)
        output = self._read_little(layer, rows, value) if sparse else rows.attend(value)
        if alive is not None:
            output = output * alive[:, :, None, None]
        if self.heads < 1:
            rows.norms = output.abs().sum(-1, dtype=torch.promote_types(output.dtype, torch.float32))
        return output

    def _choose_heads(self, layer: TokenLayer, due: Tensor | None = None) -> None:
        """Decide which query heads of a layer live, from the magnitudes in the layers before; in the rows that are due,
        bool ``[batch]``, or all."""
        plan: _Plan = layer.cache.prepared
        earlier = plan.earlier(layer)
        if earlier is None or layer.number not in plan.heads:
            return
        score = earlier.beside["magnitude"]
        if "heads" in earlier.beside:
            score = score.masked_fill(~earlier.beside["heads"], float("-inf"))
        order = score.argsort(dim=-1, descending=True, stable=True)[:, : plan.heads[layer.number]]
        alive = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
        if due is not None and "heads" in layer.beside:
            alive = torch.where(due[:, None], alive, layer.beside["heads"])
        layer.lay("heads", alive)

    def _read_little(self, layer: TokenLayer, rows: AttentionRows, value: Tensor) -> Tensor:
        """The output of decode steps that read few bits of the keys and few values."""
        if self.msb:
            weights = self._weights(rows, self.lsb)
            again = weights.amax(-1, keepdim=True) < self.threshold
            weights = torch.where(again, self._weights(rows, 0), weights)
        else:
            weights = rows.logits().softmax(-1)
            again = torch.zeros_like(weights[..., :1], dtype=torch.bool)
        rows.take(weights)
        batch, kv_heads, groups, count, slots = weights.shape
        seen = torch.full((1, 1, count), slots, device=weights.device) if rows.mask is None else rows.mask.sum(-1)
        read = (seen * self.values - 1e-6).ceil().clamp(min=1)[:, :, None, :, None]
        if self.values < 1:
            # Slots are not in the order of time; of equal probabilities the earlier are read.
            held = layer.slots.places(batch, weights.device).argsort(dim=-1)
            new = torch.arange(held.shape[-1], slots, device=weights.device).expand(*held.shape[:2], -1)
            time = torch.cat([held, new], -1)[:, :, None, None].expand_as(weights)
            order = time.gather(-1, weights.gather(-1, time).argsort(dim=-1, descending=True, stable=True))
            within = torch.arange(slots, device=weights.device) < read
            weights = weights * torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, within.expand_as(order))
        self._count(layer, rows, again, read, seen)
        packed = weights.to(value.dtype).view(batch, kv_heads, groups * count, slots)
        return torch.matmul(packed, value).view(batch, kv_heads * groups, count, -1)

    def _weights(self, rows: AttentionRows, hidden: int) -> Tensor:
        """Probabilities from queries and keys without their ``hidden`` lowest bits."""
        query, key = (_rounded(part, self.msb + self.lsb, hidden) for part in (rows.query, rows.key))
        return AttentionRows(query, key, rows.mask, rows.causal, rows.scaling, rows.softcap).logits().softmax(-1)

    def _count(self, layer: TokenLayer, rows: AttentionRows, again: Tensor, read: Tensor, seen: Tensor) -> None:
        """Count for each row of the batch: rows of live heads, those that read the low bits, values read and held."""
        live = torch.ones_like(again[..., 0]) if rows.heads is None else rows.heads[..., None].expand_as(again[..., 0])
        if rows.valid is not None:
            live = live * rows.valid[:, None, None]
        live = live.to(torch.float32)
        parts = (torch.ones_like(live), again[..., 0], read[..., 0], seen[:, :, None])
        counts = torch.stack([(live * part).sum((1, 2, 3)) for part in parts], -1)
        layer.lay("traffic", _added(counts, layer.beside.get("traffic")))

    def traffic(self, cache: TokenCache) -> dict[str, float]:
        """What decode steps have read, drafts included: ``heads``, the share of the query heads that were read at all;
        ``values``, the share of the slots whose values were; ``again``, the share of the rows that took the low bits;
        ``bits``, the bits of each number of queries and keys (only where ``msb``). Shares are over the layers that this
        policy rules, and 1 where a saving is not asked for."""
        layers = [cache.layers[number] for number in cache.prepared.full]
        heads = [layer.beside["heads"].float().mean() if "heads" in layer.beside else 1.0 for layer in layers]
        shares = {"heads": float(sum(heads)) / len(heads), "values": 1.0, "again": 1.0}
        counted = [layer.beside["traffic"] for layer in layers if "traffic" in layer.beside]
        if counted:
            ran, again, read, seen = torch.stack(counted).sum((0, 1)).tolist()
            shares["values"] = read / seen
            if self.msb:
                shares["again"] = again / ran
                shares["bits"] = self.msb + self.lsb * again / ran
        return shares


def _added(counts: Tensor, known: Tensor | None) -> Tensor:
    return counts if known is None else counts + known


def _rounded(tensor: Tensor, bits: int, hidden: int) -> Tensor:
    """Numbers of ``bits`` bits in even steps up to the largest of each vector, in float32 or wider; of which the
    ``hidden`` lowest bits are not known, so that the middle of what they may be stands for them."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    step = wide.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = (wide / step.clamp(min=torch.finfo(wide.dtype).tiny)).round()
    if hidden:
        codes = torch.floor(codes / 2**hidden) * 2**hidden + (2**hidden - 1) / 2
    return codes * step


__all__ = ["SpAtten"]

"""Attention statistics of one layer call, without the full attention matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 128


class AttentionRows:
    """The attention probabilities of the rows of one layer call, computed when they are asked for.

    :meth:`attend` gives the output and takes the statistics on the way; without it they cost a product of their own.
    All are float32, or float64 where the model runs in it, whatever the precision of queries and keys.

    Args:
        query: ``[batch, heads, rows, head_dim]``, rotated.
        key: ``[batch, kv_heads, slots, head_dim]``.
        mask: Bool ``[1 or batch, 1 or kv_heads, rows, slots]``, or None where nothing is hidden but the future.
        causal: Whether the newest columns are hidden in causal order (only without a mask).
        scaling: Factor of the logits.
        softcap: Bound of the logits by tanh, or None.
        valid: ``[batch, rows]`` bool, False for rows of padding; None: all real.

    Attributes:
        heads: Factor of each query head in all sums, ``[batch, kv_heads, groups]``; None: 1.
        norms: Sum of the magnitudes of each query head's output, ``[batch, heads, rows]``, where a policy took it.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        causal: bool,
        scaling: float,
        softcap: float | None = None,
        valid: Tensor | None = None,
    ) -> None:
        self.query, self.key, self.mask, self.causal = query, key, mask, causal
        self.scaling, self.softcap, self.valid = scaling, softcap, valid
        self.count = query.shape[2]
        self.groups = query.shape[1] // key.shape[1]
        self.heads: Tensor | None = None
        self.norms: Tensor | None = None
        self._rows: Tensor | None = None
        self._sums: Tensor | None = None

    def at(self, index: Tensor) -> AttentionRows:
        """One row of each row of the batch, ``index`` ``[batch]``."""
        batch, heads, _, dim = self.query.shape
        picks = index[:, None, None, None]
        mask = self.mask
        if mask is not None:
            mask = mask.expand(batch, -1, -1, -1).gather(2, picks.expand(-1, mask.shape[1], -1, mask.shape[-1]))
        elif self.causal:
            slots = self.key.shape[2]
            mask = torch.arange(slots, device=index.device) <= picks + (slots - self.count)
        query = self.query.gather(2, picks.expand(-1, heads, -1, dim))
        return AttentionRows(query, self.key, mask, False, self.scaling, self.softcap)

    def take(self, weights: Tensor) -> None:
        """Note the probabilities ``[batch, kv_heads, groups, rows, slots]`` of all rows, for the questions that
        follow."""
        self._rows = self._real(self._grouped(weights), 0, self.count)

    def logits(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Scaled logits of rows ``start`` to ``stop``, ``[batch, kv_heads, groups, rows, width]``, -inf where a row
        may not look; ``width`` ends at the last slot that any of the rows sees."""
        stop = self.count if stop is None else stop
        batch, heads, _, dim = self.query.shape
        # The query heads of a group as further rows of one head: no repeated keys.
        packed = self.query[:, :, start:stop].reshape(batch, heads // self.groups, -1, dim)
        width = self.key.shape[2] - self.count + stop if self.causal else self.key.shape[2]
        # The power of two in the scaling goes in first: it adds no rounding, keeps products of float16 in range, and
        # mostly leaves nothing to multiply the logits by.
        mantissa, exponent = math.frexp(self.scaling)
        logits = torch.matmul(packed * 2.0 ** (exponent - 1), self.key[:, :, :width].transpose(-1, -2))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if mantissa != 0.5:
            logits = logits.mul_(2 * mantissa)
        logits = logits.view(batch, heads // self.groups, self.groups, stop - start, width)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.mask is not None:
            logits = logits.masked_fill_(~self.mask[:, :, None, start:stop], float("-inf"))
        elif self.causal and stop - start > 1:
            late = torch.ones(stop - start, stop - start, dtype=torch.bool, device=logits.device).triu_(1)
            logits[..., width - (stop - start) :].masked_fill_(late, float("-inf"))
        return logits

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of rows: start, stop and the probabilities ``[batch, kv_heads, groups, rows, width]``."""
        for start in range(0, self.count, _ROWS):
            stop = min(start + _ROWS, self.count)
            yield start, stop, self.logits(start, stop).softmax(-1)

    def attend(self, value: Tensor) -> Tensor:
        """The output of the rows, ``[batch, heads, rows, head_dim]``, from ``value`` ``[batch, kv_heads, slots,
        head_dim]``; column sums, or all probabilities of a short block, stay for the questions that follow."""
        batch, heads, _, _ = self.query.shape
        kv_heads, dim = value.shape[1], value.shape[-1]
        if self.count <= _ROWS:
            weights = self.logits().softmax(-1)
            self.take(weights)
            packed = weights.to(value.dtype).view(batch, kv_heads, self.groups * self.count, -1)
            return torch.matmul(packed, value).view(batch, heads, self.count, dim)
        output = value.new_empty(batch, kv_heads, self.groups, self.count, dim)
        sums = self._zeros()
        for start, stop, weights in self._blocks():
            packed = weights.to(value.dtype).view(batch, kv_heads, self.groups * (stop - start), -1)
            part = torch.matmul(packed, value[:, :, : packed.shape[-1]])
            output[:, :, :, start:stop] = part.view(batch, kv_heads, self.groups, stop - start, dim)
            self._add(sums, start, stop, weights, None)
        self._sums = sums
        return output.view(batch, heads, self.count, dim)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Probabilities of rows ``start`` to ``stop``, summed over the query heads of each key head:
        ``[batch, kv_heads, rows, slots]``."""
        stop = self.count if stop is None else stop
        if self._rows is not None:
            return self._rows[:, :, start:stop]
        rows = self._real(self._grouped(self.logits(start, stop).softmax(-1)), start, stop)
        return F.pad(rows, (0, self.key.shape[2] - rows.shape[-1]))

    def column_sums(self, weights: Tensor | None = None) -> Tensor:
        """What each slot received from all rows, ``[batch, kv_heads, slots]``.

        Args:
            weights: ``[batch, rows]`` factor of each row; None: 1.
        """
        if self._rows is not None:
            rows = self._rows if weights is None else self._rows * weights[:, None, :, None]
            return rows[:, :, 0] if self.count == 1 else rows.sum(2)
        if self._sums is not None and weights is None:
            return self._sums
        sums = self._zeros()
        for start, stop, block in self._blocks():
            self._add(sums, start, stop, block, weights)
        return sums

    def _zeros(self) -> Tensor:
        wide = torch.promote_types(self.query.dtype, torch.float32)
        return self.key.new_zeros(self.key.shape[:3], dtype=wide)

    def _grouped(self, weights: Tensor) -> Tensor:
        """``[batch, kv_heads, groups, ...]`` summed over the query heads of each key head."""
        return weights.sum(2) if self.heads is None else (weights * self.heads[..., None, None]).sum(2)

    def _real(self, rows: Tensor, start: int, stop: int) -> Tensor:
        return rows if self.valid is None else rows * self.valid[:, None, start:stop, None]

    def _add(self, sums: Tensor, start: int, stop: int, block: Tensor, weights: Tensor | None) -> None:
        """Add a block's columns to ``sums``; the factors of the rows make it one product."""
        scale = block.new_ones(*block.shape[:-1], 1)
        for factor in (self.valid, weights):
            if factor is not None:
                scale = scale * factor[:, None, None, start:stop, None]
        if self.heads is not None:
            scale = scale * self.heads[..., None, None]
        scale, block = scale.flatten(2, 3), block.flatten(2, 3)
        sums[..., : block.shape[-1]] += torch.matmul(scale.transpose(-1, -2), block)[:, :, 0]

    def ages(self) -> tuple[Tensor, Tensor]:
        """How many real rows of its batch row come after each row ``[1 or batch, rows]``, and how many there are in
        all ``[1 or batch]``."""
        if self.valid is None:
            order = torch.arange(1, self.count + 1, device=self.key.device)[None]
        else:
            order = self.valid.long().cumsum(-1)
        return (order[:, -1:] - order).clamp(min=0), order[:, -1]

    def kept(self) -> AttentionRows:
        """The same with the probabilities computed now, for blocks whose committed rows are not known yet."""
        self._rows = self.rows()
        return self

    def path(self, path: Tensor, valid: Tensor | None, base: int) -> AttentionRows:
        """The committed rows of a kept block, their new columns in path order.

        Args:
            path: ``[batch, taken]`` committed rows.
            valid: ``[batch, taken]`` bool, False behind a row's last committed token; None: all real.
            base: Slots before the block.
        """
        rows = self.rows()
        index = path[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[-1])
        rows = rows.gather(2, index)
        columns = (base + path)[:, None, None, :].expand(*rows.shape[:3], -1)
        rows = torch.cat([rows[..., :base], rows.gather(3, columns)], -1)
        if valid is not None:
            rows = (
                rows
                * valid[:, None, :, None]
                * torch.cat([valid.new_ones(valid.shape[0], base), valid], -1)[:, None, None]
            )
        other = AttentionRows(self.query, self.key, None, False, self.scaling, valid=valid)
        other._rows, other.count = rows, rows.shape[2]
        if self.norms is not None:
            other.norms = self.norms.gather(2, path[:, None].expand(-1, self.norms.shape[1], -1))
        return other

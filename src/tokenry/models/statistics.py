"""Attention statistics of one layer call, without the full attention matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 256


class AttentionRows:
    """The attention probabilities of the rows of one layer call, computed when they are asked for.

    Args:
        query: ``[batch, heads, rows, head_dim]``, rotated.
        key: ``[batch, kv_heads, slots, head_dim]``.
        mask: Bool ``[1 or batch, 1 or kv_heads, rows, slots]``, or None where nothing is hidden but the future.
        causal: Whether the newest columns are hidden in causal order (only without a mask).
        scaling: Factor of the logits.
        softcap: Bound of the logits by tanh, or None.
        valid: ``[batch, rows]`` bool, False for rows of padding; None: all real.
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
        self._rows: Tensor | None = None

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Probabilities of rows ``start`` to ``stop``, summed over the query heads of each key head, in float32 (or
        float64 where the model runs in it): ``[batch, kv_heads, rows, slots]``."""
        rows = self._block(start, self.count if stop is None else stop)
        return F.pad(rows, (0, self.key.shape[2] - rows.shape[-1])) if self._rows is None else rows

    def _block(self, start: int, stop: int) -> Tensor:
        """The same up to the last slot that any of the rows sees."""
        if self._rows is not None:
            return self._rows[:, :, start:stop]  # rows of padding are zeros here already
        batch, heads, _, dim = self.query.shape
        wide = torch.promote_types(self.query.dtype, torch.float32)
        query = self.query[:, :, start:stop].view(batch, heads // self.groups, self.groups, stop - start, dim)
        slots = self.key.shape[2] - self.count + stop if self.causal else self.key.shape[2]
        key = self.key[:, :, None, :slots]
        logits = torch.matmul(query, key.transpose(-1, -2)).to(wide) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask[:, :, None, start:stop], float("-inf"))
        elif self.causal:
            row = torch.arange(slots - stop + start, slots, device=logits.device)
            logits = logits.masked_fill(torch.arange(slots, device=logits.device) > row[:, None], float("-inf"))
        rows = logits.softmax(-1).sum(2)
        if self.valid is not None:
            rows = rows * self.valid[:, None, start:stop, None]
        return rows

    def column_sums(self, weights: Tensor | None = None) -> Tensor:
        """What each slot received from all rows, ``[batch, kv_heads, slots]``, summed in blocks of rows.

        Args:
            weights: ``[batch, rows]`` factor of each row; None: 1.
        """
        total: Tensor | None = None
        for start in range(0, self.count, _ROWS):
            stop = min(start + _ROWS, self.count)
            rows = self._block(start, stop)
            if weights is not None:
                rows = rows * weights[:, None, start:stop, None]
            if total is None:
                width = rows.shape[-1] if self._rows is not None else self.key.shape[2]
                total = rows.new_zeros(*rows.shape[:2], width)
            total[..., : rows.shape[-1]] += rows.sum(2)
        assert total is not None
        return total

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
        return other

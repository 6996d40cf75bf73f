"""Which tokens stand where in a cache, and what the new tokens of one forward may see."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenry.errors import CacheMisuse


class Slots:
    """Which tokens stand in a run of slots.

    ``valid`` and ``positions`` are ``[batch, 1 or kv_heads, size]``; None stands for the common case, all slots hold
    real tokens and the position is the slot's number.
    """

    def __init__(self) -> None:
        self.size = 0
        self.valid: Tensor | None = None
        self.positions: Tensor | None = None

    def materialise(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Validity and positions as tensors; what is None stays None, since masks are built for what is not."""
        valid = self.valid
        if valid is None:
            valid = torch.ones(batch, 1, self.size, dtype=torch.bool, device=device)
        return valid, self.places(batch, device)

    def places(self, batch: int, device: torch.device) -> Tensor:
        """Positions as a tensor."""
        if self.positions is None:
            return torch.arange(self.size, device=device).expand(batch, 1, self.size)
        return self.positions

    def append(
        self, count: int, valid: Tensor | None, positions: Tensor | None, batch: int, device: torch.device
    ) -> None:
        """Add ``count`` slots; ``valid`` and ``positions`` are ``[batch, count]``, None as in the class."""
        if self.valid is not None or valid is not None:
            new = torch.ones(batch, count, dtype=torch.bool, device=device) if valid is None else valid
            old = torch.ones(batch, 1, self.size, dtype=torch.bool, device=device) if self.valid is None else self.valid
            self.valid = torch.cat([old, new[:, None].expand(-1, old.shape[1], -1)], -1)
        if self.positions is not None or positions is not None:
            if positions is None:
                raise CacheMisuse("positions of new slots are needed once a cache is no longer contiguous")
            old = (
                torch.arange(self.size, device=device).expand(batch, 1, -1)
                if self.positions is None
                else self.positions
            )
            self.positions = torch.cat([old, positions[:, None].expand(-1, old.shape[1], -1)], -1)
        self.size += count

    def gather(self, keep: Tensor) -> None:
        """Keep the slots ``keep`` ``[batch, heads, kept]`` of each head."""
        if self.valid is not None:
            self.valid = self.valid.expand(-1, keep.shape[1], -1).gather(-1, keep)
        if self.positions is None:
            self.positions = keep
        else:
            self.positions = self.positions.expand(-1, keep.shape[1], -1).gather(-1, keep)
        self.size = keep.shape[-1]

    def replace(self, victim: Tensor) -> None:
        """Put the last slot in the place of slot ``victim`` ``[batch, heads, 1]`` of each head."""
        if self.valid is not None:
            self.valid = replaced(self.valid.expand(-1, victim.shape[1], -1), victim)
        positions = self.places(victim.shape[0], victim.device)
        self.positions = replaced(positions.expand(-1, victim.shape[1], -1), victim)
        self.size -= 1

    def contiguous(self) -> bool:
        """Whether every slot holds the real token of its own position."""
        if self.valid is not None and not bool(self.valid.all()):
            return False
        column = torch.arange(self.size, device=None if self.positions is None else self.positions.device)
        return self.positions is None or bool((self.positions == column).all())

    def select(self, rows: Tensor) -> None:
        if self.valid is not None:
            self.valid = self.valid.index_select(0, rows)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows)

    def crop(self, size: int) -> None:
        self.size = size
        if self.valid is not None:
            self.valid = self.valid[..., :size]
        if self.positions is not None:
            self.positions = self.positions[..., :size]

    def copy(self) -> Slots:
        other = Slots()
        other.size, other.valid, other.positions = self.size, self.valid, self.positions
        return other


def replaced(tensor: Tensor, victim: Tensor) -> Tensor:
    """``[batch, heads, slots]`` without its last slot, which stands where ``victim`` ``[batch, heads, 1]`` stood."""
    return tensor.scatter(-1, victim, tensor[..., -1:])[..., :-1]


class Block:
    """The new tokens of one forward: ``valid`` ``[batch, new]`` or None (all real), ``relation``
    ``[1 or batch, new, new]`` or None (causal), and the position of each, ``[batch, new]`` or None (contiguous)."""

    def __init__(self, new: int, valid: Tensor | None, relation: Tensor | None, deferred: bool) -> None:
        self.new = new
        self.valid = valid
        self.relation = relation
        self.deferred = deferred
        self.positions: Tensor | None = None
        self.first = 0  # the position of the first new token where they are contiguous
        self.apart = False  # whether tokens stand between them that are not among them
        self.before = 0  # rows in front that are tokens of earlier forwards, of which they see what is older
        self.dead: Tensor | None = None  # by position, bool ``[batch, length]``: tokens that no row may see
        self.padding: Tensor | None = None  # the mask of padding that layers are given
        self.places: Tensor | None = None  # the positions as a tensor in any case, once a layer asked for them
        self.masks: dict[int | None, tuple[Tensor | None, bool]] = {}
        self._packed: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def among(self, device: torch.device) -> Tensor:
        """Which new tokens see which, ``[1 or batch, new, new]``; every token sees itself, so no row is empty."""
        among = self.relation
        if among is None:
            among = torch.ones(1, self.new, self.new, dtype=torch.bool, device=device).tril()
        if self.valid is not None:
            among = (among & self.valid[:, None, :]) | torch.eye(self.new, dtype=torch.bool, device=device)
        return among

    def mask(self, slots: Slots, window: int | None, device: torch.device) -> tuple[Tensor | None, bool]:
        """The mask over ``slots`` and the new tokens, ``[1 or batch, 1 or heads, new, slots + new]`` or None where
        nothing is hidden, and whether plain causal order does."""
        plain = slots.valid is None and self.valid is None and self.relation is None
        plain = plain and (self.dead is None or slots.size == 0)
        near = window is None or (slots.positions is None and not self.apart and slots.size + self.new <= window)
        if plain and near and (self.new == 1 or slots.size == 0):
            return None, self.new > 1
        among = self.among(device)[:, None]
        batch = among.shape[0] if slots.valid is None else slots.valid.shape[0]
        before = (
            torch.ones(1, 1, 1, slots.size, dtype=torch.bool, device=device)
            if slots.valid is None
            else slots.valid[:, :, None, :]
        )
        if self.dead is not None and slots.size:
            before = before & self._standing(slots, self.dead, device)
            batch = max(batch, before.shape[0])
        if window is not None and not near:
            before, among = self._within(slots, window, before, among, device)
            batch = max(batch, before.shape[0], among.shape[0])
        heads = before.shape[1]
        before = before.expand(batch, heads, self.new, slots.size)
        return torch.cat([before, among.expand(batch, heads, self.new, self.new)], -1), False

    def packed(self, allowed: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """A mask ``[..., new, slots]`` for the query heads of a group as rows of one head, ``[..., groups * new,
        slots]``, made once for the layers that share it.

        On CPUs it is additive: there the fused kernel makes such a one of a bool mask at every call.
        """
        key = id(allowed), groups, dtype
        if key in self._packed:
            return self._packed[key]
        packed = allowed.repeat(1, 1, groups, 1) if groups > 1 and allowed.shape[2] > 1 else allowed
        if packed.device.type == "cpu":
            packed = torch.zeros(packed.shape, dtype=dtype).masked_fill_(~packed, float("-inf"))
        # What `masks` keeps is not freed, so its id stays its own; what it does not is of one layer.
        if any(allowed is mask for mask, _ in self.masks.values()):
            self._packed[key] = packed
        return packed

    def _standing(self, slots: Slots, dead: Tensor, device: torch.device) -> Tensor:
        """Which slots each row may see of those that are not dead, ``[batch, 1 or heads, 1 or new, slots]``."""
        places = slots.places(dead.shape[0], device)
        standing = ~dead.gather(1, places.clamp(min=0).flatten(1)).view_as(places)[:, :, None]
        if self.before:
            assert self.positions is not None
            standing = standing & (places[:, :, None] < self.positions[:, None, :, None])
        return standing

    def _within(
        self, slots: Slots, window: int, before: Tensor, among: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        old = slots.positions
        if old is None:
            old = torch.arange(slots.size, device=device)[None, None]
        new = self.positions
        if new is None:
            # Not the number of slots: a layer that dropped tokens, or ran for fewer, holds less than what was read.
            new = self.first + torch.arange(self.new, device=device)[None]
        before = before & (new[:, None, :, None] - old[:, :, None, :] < window)
        return before, among & (new[:, None, :, None] - new[:, None, None, :] < window)

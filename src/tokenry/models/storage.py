"""Where the keys and values of a layer stand: buffers that grow, codes of a few bits, the memory of another device.

``far`` storage takes the older slots of a layer; its newest stay in buffers of the model's own precision and device, so
that what a forward writes, and a commit moves, is never far (see ``TokenLayer`` in ``cache.py``).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenry.errors import UnsupportedModel

# Numbers of a head that share a scale.
_GROUP = 64


# Buffers -------------------------------------------------------------------------------------------------------------
def picked(buffer: Tensor, picks: Tensor) -> Tensor:
    """Slots ``picks`` ``[batch, heads, kept]`` of ``[batch, heads, slots, head_dim]``, copied whole rows at a time."""
    batch, heads, slots, dim = buffer.shape
    first = torch.arange(batch * heads, device=buffer.device).view(batch, heads, 1) * slots
    return buffer.reshape(-1, dim).index_select(0, (picks + first).flatten()).view(batch, heads, -1, dim)


def fetched(buffer: Tensor, slots: Tensor) -> Tensor:
    """Slots ``[batch, heads, rows, chosen]`` of ``[batch, kv_heads, slots, head_dim]``, where several heads may read
    from one."""
    batch, kv_heads, room, dim = buffer.shape
    heads = torch.arange(slots.shape[1], device=buffer.device) // (slots.shape[1] // kv_heads)
    first = torch.arange(batch, device=buffer.device)[:, None] * kv_heads + heads
    picks = slots + first[:, :, None, None] * room
    return buffer.reshape(-1, dim).index_select(0, picks.flatten()).view(*slots.shape, dim)


def grown(buffer: Tensor, room: int, used: int, pinned: bool = False) -> Tensor:
    """The same with ``room`` slots, of which the first ``used`` are copied."""
    larger = torch.empty(
        *buffer.shape[:2], room, buffer.shape[-1], dtype=buffer.dtype, device=buffer.device, pin_memory=pinned
    )
    larger[:, :, :used] = buffer[:, :, :used]
    return larger


def frozen(buffer: Tensor) -> bool:
    """Whether it was made in inference mode and that is over, so that it may be read and not written."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def slot_nbytes(buffer: Tensor) -> int:
    """Bytes of one slot of all rows and heads."""
    return buffer.shape[0] * buffer.shape[1] * buffer.shape[3] * buffer.element_size()


# Codes ---------------------------------------------------------------------------------------------------------------
def quantised(tensor: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes of ``bits`` bits, 4 or 8, each slot and head for itself: a slot is coded once and may then be moved.

    Groups of up to 64 numbers of a head have a scale and a lowest value in float32; a code is the nearest of the
    ``2**bits`` even steps between the lowest and the largest.

    Args:
        tensor: ``[batch, heads, slots, head_dim]``.
        bits: Bits of a code; two codes of 4 share a byte, so ``head_dim`` must then be even.

    Raises:
        UnsupportedModel: Codes of 4 bits were asked for and heads have an odd size.
    """
    if bits == 4 and tensor.shape[-1] % 2:
        raise UnsupportedModel(
            f"heads of size {tensor.shape[-1]} do not fit codes of 4 bits, two of which share a byte: use bits=8"
        )
    wide = torch.promote_types(tensor.dtype, torch.float32)
    size = tensor.shape[-1]
    groups = tensor.to(wide).unflatten(-1, (-1, _GROUP if size % _GROUP == 0 else size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / (2**bits - 1)
    # A group of equal numbers has no step; its codes are zero.
    steps = (groups - low[..., None]) / torch.where(scale > 0, scale, 1)[..., None]
    codes = steps.round().clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {"codes": codes, "scale": scale, "low": low}


def dequantised(codes: Tensor, scale: Tensor, low: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """What :func:`quantised` coded, to within half a step."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).to(scale.dtype)
    return (groups * scale[..., None] + low[..., None]).flatten(-2).to(dtype)


# Another device ------------------------------------------------------------------------------------------------------
class Offloaded:
    """The older keys and values of a layer on another device, and a staging area for those that steps attend to.

    A step lists the slots that it wants and that are not staged; these alone are copied, into the places of slots that
    it does not want. Slots never change once they are here, so what is staged is never stale.

    Attributes:
        size: Slots that stand here.
        copied: Slots of single heads that were copied to the model's device, in all.
        staged: Keys and values in the staging area, ``[batch, sets, places, head_dim]``; a set is a head, or what
            heads share.
        resident: The slot in each place, ``[batch, sets, places]``, negative where there is none.
    """

    home = torch.device("cpu")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.size = self.copied = 0
        self.staged: list[Tensor] = []
        self.resident: Tensor | None = None
        self._parts: list[Tensor] = []
        self._place: Tensor | None = None  # where each slot is staged, [batch, sets, slots], negative where it is not
        # Pinned buffers for copies under way, taken in turn, each with the event after which it is free again.
        self._pinned: list[Tensor | None] = [None, None]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take in further slots, ``[batch, kv_heads, new, head_dim]``."""
        end = self.size + keys.shape[2]
        if not self._parts:
            rows = torch.contiguous_format
            self._parts = [part.to(self.home, copy=True, memory_format=rows) for part in (keys, values)]
            if self._cuda:
                self._parts = [part.pin_memory() for part in self._parts]
        else:
            if end > self._parts[0].shape[2] or frozen(self._parts[0]):
                room = end + max(_GROUP, end // 8)
                self._parts = [grown(part, room, self.size, self._cuda) for part in self._parts]
            for part, new in zip(self._parts, (keys, values), strict=True):
                part[:, :, self.size : end] = new.to(self.home)
        self.size = end

    def keys(self, slots: Tensor) -> Tensor:
        """Keys of ``[batch, heads, rows, chosen]``, where they stand."""
        return fetched(self._parts[0], slots)

    def whole(self) -> list[Tensor]:
        """All keys and values, copied to the model's device for the time that they are used."""
        batch, heads = self._parts[0].shape[:2]
        self.copied += batch * heads * self.size
        return [part[:, :, : self.size].to(self.device) for part in self._parts]

    def fetch(self, slots: Tensor, here: Tensor) -> list[Tensor]:
        """Keys and values of the slots ``[batch, sets, rows, chosen]`` by way of the staging area, each
        ``[..., head_dim]``; where ``here`` is False whatever is staged comes."""
        slots, here = slots.to(self.home), here.to(self.home)
        wanted = torch.where(here, slots, 0).flatten(2)
        asked = here.flatten(2)
        self._stage(*wanted.shape[:2])
        assert self._place is not None and self.resident is not None
        place = self._place.gather(-1, wanted).masked_fill(~asked, -1)
        # Each missing slot once, though several rows may want it.
        missing, _ = torch.where(asked & (place < 0), wanted, self.size).sort(dim=-1)
        first = missing < self.size
        first[..., 1:] &= missing[..., 1:] != missing[..., :-1]
        row, set_, at = first.nonzero(as_tuple=True)
        if row.numel():
            used = torch.zeros(*place.shape[:2], self.resident.shape[-1] + 1, dtype=torch.bool)
            used = used.scatter_(-1, torch.where(place < 0, self.resident.shape[-1], place), True)[..., :-1]
            needed = first.sum(-1)
            self._widen(int((needed + used.sum(-1)).max()))
            free = F.pad(~used, (0, self.resident.shape[-1] - used.shape[-1]), value=True)
            into = free.byte().argsort(dim=-1, descending=True, stable=True)
            into = into[row, set_, (first.cumsum(-1) - 1)[row, set_, at]]
            slot = missing[row, set_, at]
            gone = self.resident[row, set_, into]
            left = gone >= 0
            self._place[row[left], set_[left], gone[left]] = -1
            self.resident[row, set_, into], self._place[row, set_, slot] = slot, into
            head = set_ // (wanted.shape[1] // self._parts[0].shape[1])
            room, places = self._parts[0].shape[2], self.resident.shape[-1]
            source = (row * self._parts[0].shape[1] + head) * room + slot
            target = ((row * wanted.shape[1] + set_) * places + into).to(self.device)
            for part, staged in zip(self._parts, self.staged, strict=True):
                copied = self._copied(part.view(-1, part.shape[-1]), source)
                staged.view(-1, staged.shape[-1]).index_copy_(0, target, copied)
            self.copied += row.numel()
            place = self._place.gather(-1, wanted)
        # Nothing was ever staged where only new slots are wanted.
        self._widen(1)
        place = place.clamp(min=0).view(slots.shape).to(self.device)
        return [fetched(staged, place) for staged in self.staged]

    def _stage(self, batch: int, sets: int) -> None:
        """Make the staging area, and places for slots that came since."""
        if (
            self.resident is None
            or self._place is None
            or self.resident.shape[1] != sets
            or any(map(frozen, (self.resident, self._place, *self.staged)))
        ):
            self.resident = torch.zeros(batch, sets, 0, dtype=torch.long)
            self._place = torch.full((batch, sets, self.size), -1)
            self.staged = [
                torch.empty(batch, sets, 0, part.shape[-1], dtype=part.dtype, device=self.device)
                for part in self._parts
            ]
        short = self.size - self._place.shape[-1]
        if short > 0:
            # Some more, so that not every new slot copies the list.
            self._place = F.pad(self._place, (0, short + self.size // 8), value=-1)

    def _widen(self, places: int) -> None:
        assert self.resident is not None
        held = self.resident.shape[-1]
        if places > held:
            self.resident = F.pad(self.resident, (0, places - held), value=-1)
            # Zeros and not what memory held, since places without a slot are multiplied by weights of zero.
            self.staged = [F.pad(staged, (0, 0, 0, places - held)) for staged in self.staged]

    def _copied(self, source: Tensor, rows: Tensor) -> Tensor:
        """Rows of a tensor on the model's device: gathered into a pinned buffer and copied on a stream of their own."""
        if not self._cuda:
            return source.index_select(0, rows).to(self.device)
        self._turn = turn = 1 - self._turn
        event, buffer = self._events[turn], self._pinned[turn]
        if event is not None:
            event.synchronize()  # the last copy out of this buffer
        if buffer is None or frozen(buffer) or buffer.shape[0] < rows.numel() or buffer.shape[1] != source.shape[1]:
            buffer = torch.empty(2 * rows.numel(), source.shape[1], dtype=source.dtype, pin_memory=True)
            self._pinned[turn] = buffer
        gathered = buffer[: rows.numel()]
        torch.index_select(source, 0, rows, out=gathered)
        main, side = torch.cuda.current_stream(self.device), _side_stream(self.device)
        with torch.cuda.stream(side):
            copied = gathered.to(self.device, non_blocking=True)
            done = self._events[turn] = torch.cuda.Event()
            done.record(side)
        main.wait_event(done)
        copied.record_stream(main)
        return copied

    def crop(self, size: int) -> None:
        """Drop the slots from ``size`` on."""
        self.size = min(size, self.size)
        if self.resident is not None and self._place is not None:
            self.resident = self.resident.masked_fill(self.resident >= self.size, -1)
            self._place = self._place[..., : self.size]

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.home)
        self._parts = [part.index_select(0, rows) for part in self._parts]
        if self._cuda:
            self._parts = [part.pin_memory() for part in self._parts]
        if self.resident is not None and self._place is not None:
            self.resident, self._place = self.resident.index_select(0, rows), self._place.index_select(0, rows)
            self.staged = [staged.index_select(0, rows.to(self.device)) for staged in self.staged]

    def copy(self) -> Offloaded:
        other = copy.copy(self)
        other._parts = [part[:, :, : self.size].clone() for part in self._parts]
        if self._cuda:
            other._parts = [part.pin_memory() for part in other._parts]
        other.staged = [staged.clone() for staged in self.staged]
        other.resident = None if self.resident is None else self.resident.clone()
        other._place = None if self._place is None else self._place.clone()
        other._pinned, other._events = [None, None], [None, None]
        return other

    @property
    def staged_nbytes(self) -> int:
        """Bytes of the staging area."""
        return sum(staged.numel() * staged.element_size() for staged in self.staged)

    @property
    def nbytes(self) -> int:
        """Bytes on the other device."""
        return sum(slot_nbytes(part) * self.size for part in self._parts)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]

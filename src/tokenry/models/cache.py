"""The one cache: keys, values, positions, validity and policy state of every layer, moved together.

Two regimes. On a model's own attention it behaves as transformers' ``DynamicCache``. Inside
:func:`tokenry.models.attached` the attention function asks it for each layer's mask, so rows may progress unequally,
layers may hold different tokens, and the new tokens may form a tree.

Reading order: ``slots.py`` (which tokens stand where, the tokens of one forward), ``storage.py`` (buffers, codes of a
few bits, another device), :class:`TokenLayer` (one layer), :class:`TokenCache` (all layers).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from tokenry.errors import CacheMisuse, UnsupportedModel
from tokenry.models import compat
from tokenry.models.anatomy import check_decoder, text_config, windows
from tokenry.models.rotary import Rotary
from tokenry.models.rows import Rows
from tokenry.models.slots import Block, Slots, replaced
from tokenry.models.statistics import AttentionRows
from tokenry.models.storage import Offloaded, dequantised, fetched, frozen, grown, picked, quantised, slot_nbytes

_GROWTH = 64


class Policy(Protocol):
    """What the cache asks of a cache policy (see :mod:`tokenry.kvcache.engine`): of every kind, of those that drop
    tokens, and of those that retrieve."""

    drops: ClassVar[bool]
    """Whether it drops tokens; a policy that does not chooses those that a step attends to."""
    needs_attention: ClassVar[bool]
    """Whether ``observe`` is to be called."""
    sums: ClassVar[bool]
    """Whether it then needs sums over all rows of a prompt."""
    skips: ClassVar[bool]
    """Whether later layers may run for other tokens than a forward's own."""
    uneven: ClassVar[bool]
    """Whether layers may hold different tokens though none is dropped: those that did not run for a token lack it."""

    @property
    def attends(self) -> bool:
        """Whether ``attend`` is to give the output of the attention."""
        ...

    @property
    def compact_every(self) -> int:
        """Tokens are dropped after positions that are multiples of this."""
        ...

    @property
    def stops(self) -> tuple[int, ...]:
        """What later steps see changes after positions that are multiples of these."""
        ...

    def prepare(self, model: PreTrainedModel) -> Any:
        """What it needs beside the model, for a cache's ``prepared``."""
        ...

    def layer_budget(self, layer: TokenLayer) -> int | float:
        """Slots of a layer and head, or their share of the prompt."""
        ...

    def slots(self, share: float, length: int) -> int:
        """Slots that a share of ``length`` tokens gives."""
        ...

    def before(self, model: PreTrainedModel, cache: TokenCache, inputs: Mapping[str, Any]) -> None:
        """A forward with these arguments is about to begin an empty cache."""
        ...

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        """Take in the attention of the committed rows; all state is already ``[batch, heads, slots]``."""
        ...

    def passes(self, layer: TokenLayer, rows: AttentionRows | None) -> Rows | None:
        """The rows that the layers behind this one run for; None: those that it ran for."""
        ...

    def hand_on(self, layer: TokenLayer, rows: Rows, tensors: list[Tensor]) -> list[Tensor]:
        """What the rows that go on take with them, of a layer's output and what layers are given for each token."""
        ...

    def attend(self, layer: TokenLayer, rows: AttentionRows, value: Tensor) -> Tensor:
        """The output of the attention, ``[batch, heads, rows, head_dim]``."""
        ...

    def after(self, model: PreTrainedModel, cache: TokenCache, input_ids: Tensor | None) -> None:
        """A forward of several tokens has ended and is accounted for."""
        ...


class Evicting(Policy, Protocol):
    """What the cache asks of a policy that drops tokens."""

    ordered: ClassVar[bool]
    """Whether its slots must stay in the order of time."""

    @property
    def rolling(self) -> bool:
        """Whether positions are counted over the tokens that are held."""
        ...

    @property
    def hides(self) -> bool:
        """Whether dropped slots are only hidden."""
        ...

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        """State of new slots, each ``[batch, heads, new]``, from their positions ``[batch, new]``."""
        ...

    def keep(self, layer: TokenLayer) -> Tensor | None:
        """Slots to keep, ``[batch, heads, kept]`` ascending, or which slots stay, bool ``[batch, heads, slots]``;
        None to keep all."""
        ...

    def victim(self, layer: TokenLayer) -> Tensor:
        """The one slot to drop, ``[batch, heads, 1]``."""
        ...

    def at(self, budget: int) -> Evicting:
        """The same policy with that budget."""
        ...


class Retrieving(Policy, Protocol):
    """What the cache asks of a policy that chooses the slots a step attends to."""

    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        """What is kept of new keys beside them, each ``[batch, kv_heads, new, size]``."""
        ...

    def retrieves(self, layer: TokenLayer, block: Block) -> bool:
        """Whether the rows of this block retrieve; the others attend to everything."""
        ...

    def retrieve(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Slots that each row attends to, ``[batch, kv_heads or heads, rows, chosen]``, and which of them count."""
        ...

    def settled(self, layer: TokenLayer) -> None:
        """The new tokens of a forward have become part of the text."""
        ...

    def cropped(self, layer: TokenLayer) -> None:
        """The newest tokens were taken back."""
        ...


class _Window:
    """The rule of a sliding-window layer: the newest tokens stay, and some before them, so that a few can be taken
    back."""

    drops: ClassVar[bool] = True
    ordered: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    skips: ClassVar[bool] = False
    uneven: ClassVar[bool] = False
    rolling = hides = attends = False
    compact_every = 1
    stops: tuple[int, ...] = ()
    spare = _GROWTH // 2

    def __init__(self, window: int) -> None:
        self.budget = window + self.spare

    def prepare(self, model: PreTrainedModel) -> Any: ...

    def layer_budget(self, layer: TokenLayer) -> int | float:
        return self.budget

    def slots(self, share: float, length: int) -> int:
        return self.budget

    def at(self, budget: int) -> _Window:
        return self

    def victim(self, layer: TokenLayer) -> Tensor:
        raise NotImplementedError

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        return {}

    def before(self, model: PreTrainedModel, cache: TokenCache, inputs: Mapping[str, Any]) -> None: ...

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None: ...

    def passes(self, layer: TokenLayer, rows: AttentionRows | None) -> Rows | None: ...

    def hand_on(self, layer: TokenLayer, rows: Rows, tensors: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def attend(self, layer: TokenLayer, rows: AttentionRows, value: Tensor) -> Tensor:
        raise NotImplementedError

    def after(self, model: PreTrainedModel, cache: TokenCache, input_ids: Tensor | None) -> None: ...

    def keep(self, layer: TokenLayer) -> Tensor | None:
        if layer.size < self.budget + _GROWTH:
            return None
        valid, positions = layer.slots.materialise(layer.cache.batch, layer.device)
        newest = positions.masked_fill(~valid, -1).topk(self.budget, -1).indices.sort(-1).values
        return newest.expand(-1, layer.held()[0].shape[1], -1)


class TokenLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[batch, kv_heads, slots, head_dim]``, in buffers with room to grow.

    Attributes:
        number: Which layer of the model it is.
        window: Sliding window in tokens, or None.
        slots: Which tokens the slots hold. Layers that drop nothing share the cache's.
        state: What the policy keeps for each slot, ``[batch, kv_heads, slots]`` by name.
        beside: What it keeps beside that, ``[batch, ...]`` by name; set with :meth:`lay`, never changed in place.
        reads: Slots that the rows of decode steps attended to, counted for each row and head, and those they could
            have attended to; kept where the policy retrieves.
        ran: Tokens of each row that ran through the layer, padding included.
        products: Pairs of a query and a key that its attention multiplied, for each row and head.
        evicted: Whether a slot was ever dropped.
        misjudged: Whether the policy's state counts the attention of tokens that were taken back.
        far: Where older keys and values stand, if on another device.
        scaling: Factor of the layer's attention logits, known once it ran.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: TokenCache, window: int | None, number: int = 0) -> None:
        # A strong reference would keep a dropped cache, and the switch it holds, until the next garbage collection.
        self._cache = weakref.ref(cache)
        self.window, self.number = window, number
        self.policy: Policy | None = cache.policy if window is None else _Window(window)
        self.slots = cache.slots if not self._apart else Slots()
        self.state: dict[str, Tensor] = {}
        self.beside: dict[str, Tensor] = {}
        self.reads = [0, 0]
        self.ran = self.products = 0
        self.scaling = 1.0
        # Beside the keys and values, in buffers of as many slots: what a policy keeps of keys, and codes.
        self._index: dict[str, Tensor] = {}
        # The first slot in the buffers of keys and values; those before stand elsewhere.
        self._base = 0
        self.far: Offloaded | None = None
        # Of slots with codes, those at a row's positions from here on are read as they came, [batch].
        self._exact_from: Tensor | None = None
        ruled = self.policy is not None and window is None
        self.bits: int = getattr(self.policy, "bits", 0) if ruled else 0
        self._residual: int = getattr(self.policy, "residual", 0)
        self._offloads: bool = ruled and getattr(self.policy, "offload", False) and self.policy.offloads(self)  # type: ignore[union-attr]
        self._nbytes = 0
        # The budget of each row, or of all, and the policy at each of them.
        self._budgets: list[int] | None = None
        self._at: dict[int, Evicting] = {}
        self._size = 0
        self.evicted = self.misjudged = False
        self.pending: AttentionRows | None = None
        self.is_initialized = False
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def cache(self) -> TokenCache:
        cache = self._cache()
        assert cache is not None
        return cache

    @property
    def _drops(self) -> bool:
        return self.policy is not None and self.policy.drops

    @property
    def _apart(self) -> bool:
        """Whether it holds tokens of its own choice."""
        return self.policy is not None and (self.policy.drops or self.policy.uneven)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and KV heads."""
        if self._keys is None:
            raise CacheMisuse("this cache is empty: run the model on a prompt first")
        return self._keys.shape[0], self._keys.shape[1]

    @property
    def _evicting(self) -> Evicting:
        return cast(Evicting, self.policy)

    # Storage ---------------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        """Slots that are held."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        self._size = size
        self.account()

    def account(self) -> None:
        """Count the bytes that the layer holds on the model's device."""
        if self._keys is None or self._values is None:
            return
        held = (slot_nbytes(self._keys) + slot_nbytes(self._values)) * (self._size - self._base)
        held += sum(map(slot_nbytes, self._index.values())) * self._size
        held += sum(part.numel() * part.element_size() for part in self.beside.values())
        held += 0 if self.far is None else self.far.staged_nbytes
        self.cache.held_nbytes += held - self._nbytes
        self._nbytes = held

    def lay(self, name: str, tensor: Tensor) -> None:
        """Keep ``[batch, ...]`` beside the keys and values; it counts among the bytes that are held."""
        self.beside[name] = tensor
        self.account()

    @property
    def cold(self) -> bool:
        """Whether slots stand elsewhere than in buffers of the model's own precision and device."""
        return self._base > 0 or self._exact_from is not None

    @property
    def home(self) -> torch.device:
        """The device on which older keys are read for a search."""
        return self.device if self.far is None else self.far.home

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots that are held, brought from elsewhere for the time that they are used."""
        keys, values = self._near()
        return self._whole(keys, values) if self.cold else (keys, values)

    def _near(self) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            raise CacheMisuse("this cache is empty: run the model on a prompt first")
        near = self.size - self._base
        return self._keys[:, :, :near], self._values[:, :, :near]

    def newest(self, count: int) -> Tensor:
        """Keys of the newest slots, which a forward wrote, ``[batch, kv_heads, count, head_dim]``."""
        assert self._keys is not None
        end = self.size - self._base
        return self._keys[:, :, end - count : end]

    def indexed(self, name: str) -> Tensor:
        """What a retrieving policy keeps of the keys of the slots that are held, ``[batch, kv_heads, slots, size]``."""
        return self._index[name][:, :, : self.size]

    def fetch(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots ``[batch, kv_heads or heads, rows, chosen]``, each ``[..., head_dim]``.

        Keys and values are read through this alone once a step has retrieved, so where they stand is its business.
        """
        near = self._near()
        if not self.cold:
            return fetched(near[0], slots), fetched(near[1], slots)
        parts = [fetched(part, (slots - self._base).clamp(min=0)) for part in near] if near[0].shape[2] else None
        if self.far is not None:
            here = slots < self._base
            there = self.far.fetch(slots, here)
            self.account()
        else:
            batch, _ = self.shape
            own = self._exact().expand(batch, slots.shape[1], -1)
            here = ~own.gather(-1, slots.flatten(2)).view(slots.shape)
            there = self._decoded(slots)
        if parts is None:
            return there[0], there[1]
        keys, values = (torch.where(here[..., None], old, new) for old, new in zip(there, parts, strict=True))
        return keys, values

    def keys_at(self, slots: Tensor) -> Tensor:
        """Keys of the slots ``[batch, kv_heads or heads, rows, chosen]``, on :attr:`home`, where ``slots`` is, too."""
        if not self.cold or self.far is None:
            return self.fetch(slots)[0] if self.cold else fetched(self._near()[0], slots)
        old = self.far.keys(slots.clamp(max=self._base - 1))
        near = self._near()[0].to(self.far.home)
        if near.shape[2] == 0:
            return old
        new = fetched(near, (slots - self._base).clamp(min=0))
        return torch.where((slots < self._base)[..., None], old, new)

    def _whole(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All slots in the model's precision, on its device."""
        parts = []
        if self.far is not None:
            parts = [torch.cat(pair, 2) for pair in zip(self.far.whole(), (keys, values), strict=True)]
        else:
            exact = self._exact()[:, :, self._base :, None]
            for whole, near in zip(self._decoded(None), (keys, values), strict=True):
                whole[:, :, self._base :] = torch.where(exact, near, whole[:, :, self._base :])
                parts.append(whole)
        brought = sum(part.numel() * part.element_size() for part in parts)
        self.cache.peak_nbytes = max(self.cache.peak_nbytes, self.cache.held_nbytes + brought)
        return parts[0], parts[1]

    def _exact(self, positions: Tensor | None = None) -> Tensor:
        """Which slots are read as they came, ``[batch, 1 or kv_heads, slots]``; those under way all are."""
        assert self._exact_from is not None
        if positions is None:
            positions = self.slots.places(self.shape[0], self.device)
        exact = positions >= self._exact_from[:, None, None]
        exact = torch.nn.functional.pad(exact, (0, self.size - exact.shape[-1]), value=True)
        exact[..., : self._base] = False
        return exact

    def _decoded(self, slots: Tensor | None) -> list[Tensor]:
        """Keys and values from their codes: of all slots, or of those asked for."""
        parts = []
        for name in ("keys", "values"):
            codes = (self.indexed(f"{name}.{part}") for part in ("codes", "scale", "low"))
            chosen = [part if slots is None else fetched(part, slots) for part in codes]
            parts.append(dequantised(chosen[0], chosen[1], chosen[2], self.bits, self.dtype))
        return parts

    def cool(self, many: bool, positions: Tensor | None = None) -> None:
        """After tokens became text: let older slots stand where the policy wants them, in codes or elsewhere.

        Args:
            many: Whether there were several, a prompt or a part of it.
            positions: Of all slots, ``[batch, 1 or kv_heads, slots]``; None: those of :attr:`slots`.
        """
        if self._keys is None:
            return
        near = self.size - self._base
        if self.far is not None and near > (_GROWTH if many else 2 * _GROWTH):
            keys, values = self._near()
            away = near - _GROWTH
            self.far.append(keys[:, :, :away], values[:, :, :away])
            self._shed(away)
        elif self.bits:
            seen = self.cache.seen_after
            start = seen - seen % self._residual
            if bool((start > (0 if self._exact_from is None else self._exact_from)).any()):
                self._exact_from = start
                exact = self._exact(positions).flatten(0, 1).any(0)
                first = int(exact.byte().argmax()) if bool(exact.any()) else self.size
                self._shed(first - self._base)

    def _shed(self, count: int) -> None:
        """Let go of the first slots of the buffers."""
        if count <= 0:
            return
        keys, values = self._near()
        self._keys, self._values = keys[:, :, count:].clone(), values[:, :, count:].clone()
        self._base += count
        self.account()

    def shorten(self, count: int) -> None:
        """Drop the newest slots."""
        size = self.size - count
        if size < self._base:
            self._base = size
            if self.far is not None:
                self.far.crop(size)
        self.size = size

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return None if self._keys is None else self.held()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self._keys is None else self.held()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache.policy is not None and _current() is not self.cache:
            raise CacheMisuse(
                "a budgeted cache was used outside its block, where nothing would keep its budget: run the model "
                "inside `with policy(model):`, or make the cache with `policy.cache(model)`"
            )
        index = {}
        if self.policy is not None and not self.policy.drops:
            index = cast(Retrieving, self.policy).index(self, key_states)
        if self.bits:
            for name, states in (("keys", key_states), ("values", value_states)):
                index |= {f"{name}.{part}": code for part, code in quantised(states, self.bits).items()}
        self._write(key_states, value_states, index)
        # Where the rows retrieve they fetch what they attend to, and nothing else is brought.
        keys, values = self._near() if self.cold and self.will_retrieve(key_states.shape[2]) else self.held()
        # The attention function is given tensors alone; this is how it finds the layer they belong to.
        keys._tokenry_layer = self  # type: ignore[attr-defined]
        return keys, values

    def _write(self, keys: Tensor, values: Tensor, index: dict[str, Tensor] | None = None) -> None:
        if self._keys is None or self._values is None:
            self.lazy_initialization(keys, values)
            if self._offloads:
                self.far = Offloaded(keys.device)
            # A prompt is kept as it came: no copy, and no more memory than it takes.
            self._keys, self._values, self._index = keys, values, index or {}
            self.size = keys.shape[2]
            return
        self._keys = self._put(self._keys, keys, self.size - self._base)
        self._values = self._put(self._values, values, self.size - self._base)
        for name, new in (index or {}).items():
            self._index[name] = self._put(self._index[name], new, self.size)
        self.size += keys.shape[2]

    def _put(self, buffer: Tensor, new: Tensor, start: int) -> Tensor:
        """A buffer with new slots from ``start`` on, the same one where there is room."""
        end = start + new.shape[2]
        if end > buffer.shape[2] or frozen(buffer):
            tight = self._drops and self.evicted
            room = end + self._evicting.compact_every if tight else max(end + _GROWTH, end + end // 8)
            buffer = grown(buffer, room, start)
        buffer[:, :, start:end] = new
        return buffer

    def will_retrieve(self, new: int) -> bool:
        """Whether the rows of the forward that writes ``new`` slots retrieve."""
        if self.policy is None or self.policy.drops:
            return False
        block, staged = self.cache._block, self.cache._staged
        if block is None:  # the first layer opens it later
            block = Block(new, None, None, staged is not None and staged[2])
        return cast(Retrieving, self.policy).retrieves(self, block)

    # One forward -----------------------------------------------------------------------------------------------------
    def mask(self, block: Block) -> tuple[Tensor | None, bool]:
        if self.slots is not self.cache.slots:
            return block.mask(self.slots, self.window, self.device)
        if self.window not in block.masks:
            block.masks[self.window] = block.mask(self.slots, self.window, self.device)
        return block.masks[self.window]

    def retrieve(self, block: Block, query: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The slots that each row of a block attends to and which of them count, or None where it attends to all.

        Args:
            query: ``[batch, heads, rows, head_dim]``.
            visible: Bool ``[1 or batch, 1, rows, slots]``; None: all.
        """
        if self.policy is None or self.policy.drops:
            return None
        policy = cast(Retrieving, self.policy)
        if not policy.retrieves(self, block):
            return None
        found = policy.retrieve(self, query, visible)
        if found is None and self.cold:
            found = self._everything(block.new, visible)
        self.reads[0] += block.new * (self.size if found is None else found[0].shape[-1])
        self.reads[1] += block.new * self.size
        return found

    def _everything(self, rows: int, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All slots as a choice, so that they are fetched and not brought anew at each step."""
        batch, heads = self.shape
        slots = torch.arange(self.size, device=self.device).expand(batch, heads, rows, -1)
        return slots, None if visible is None else visible.expand(batch, heads, rows, -1)

    def positions(self, block: Block) -> tuple[Tensor, Tensor]:
        """Positions of the slots, the block's own behind the old ones, ``[batch, 1 or kv_heads, slots]``, and of the
        block's rows, ``[batch, rows]``."""
        assert self._keys is not None
        new = self._new_positions(block).expand(self._keys.shape[0], -1)
        old = self.slots.places(new.shape[0], self.device)
        return torch.cat([old, new[:, None].expand(-1, old.shape[1], -1)], -1), new

    def _new_positions(self, block: Block) -> Tensor:
        if block.places is None:
            block.places = block.positions
        if block.places is None:
            block.places = self.cache.seen_before.unsqueeze(-1) + torch.arange(block.new, device=self.device)
        return block.places

    def roll(self, block: Block, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys at their places among the tokens that are held, where the policy counts those.

        Once a slot was dropped, keys are stored as at position 0, so that no error adds up from turning them often.
        """
        if not self._drops or not self._evicting.rolling or not self.evicted:
            return query, key
        rotary = self.cache.rotary
        assert rotary is not None and self._keys is not None
        base = self.size - block.new
        positions = self._new_positions(block)
        new = self._keys[:, :, base : self.size]
        new.copy_(rotary.turn(new, -positions[:, None].expand(new.shape[0], -1, -1)))
        held, _ = self.slots.materialise(new.shape[0], self.device)
        count = held.sum(-1, keepdim=True)
        # A new token stands as far behind the held ones as it stands behind the tokens seen.
        ranks = count + (positions - self.cache.seen_before[:, None])[:, None]
        places = torch.cat([held.cumsum(-1) - 1, ranks], -1)
        if ranks.shape[1] > 1:
            ranks = ranks.repeat_interleave(query.shape[1] // ranks.shape[1], 1)
        # By way of position 0, as keys go: far out float32 angles are rough, and what the model's own is off by goes
        # only with the same angle turned back.
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        query = rotary.turn(rotary.turn(wide, -positions[:, None]), ranks).to(query.dtype)
        return query, rotary.turn(key, places)

    def attended(self, block: Block, rows: AttentionRows | None) -> None:
        """After the layer's attention: hand the statistics to the policy, or keep them until the commit."""
        self.ran += block.new
        self.products += block.new * self.size
        policy = self.policy
        if policy is None:
            return
        if block.deferred:
            self.pending = rows.kept() if rows is not None and policy.needs_attention else None
            if block.before:
                # What runs in front of the drafts is text whatever becomes of them.
                valid = None if block.valid is None else block.valid[:, : block.before]
                self._take(block.before, valid, self._new_positions(block)[:, : block.before], True)
            if policy.uneven:
                self.cache.next_rows = policy.passes(self, rows)
            return
        if self._apart:
            self._take(block.new, block.valid, self._new_positions(block), block.apart)
        if policy.needs_attention and rows is not None:
            policy.observe(self, rows)
        if policy.skips:
            self.cache.next_rows = policy.passes(self, rows)
        if policy.drops:
            self.evict(block.new > 1)
            self.cool(block.new > 1)
        elif block.new > 1 and not policy.uneven and (self.bits or self.far is not None):
            # At once, so that no two layers hold a whole prompt.
            self.cool(True, self.positions(block)[0])

    def _take(self, count: int, valid: Tensor | None, positions: Tensor, apart: bool = False) -> None:
        assert self._keys is not None
        batch, heads = self._keys.shape[:2]
        told = apart or self.slots.positions is not None or valid is not None
        self.slots.append(count, valid, positions if told else None, batch, self.device)
        if not self._drops:
            return
        for name, new in self._evicting.fresh(positions, heads).items():
            self.state[name] = torch.cat([self.state[name], new], -1) if name in self.state else new

    def budgets(self) -> list[int]:
        """Slots that the rows may hold once tokens were dropped: one number for all rows, or one for each."""
        if self._budgets is None:
            assert self.policy is not None
            budget = self.policy.layer_budget(self)
            if isinstance(budget, int):
                self._budgets = [budget]
            else:
                rows = [self.policy.slots(budget, length) for length in self.cache.prompt_lengths()]
                self._budgets = rows if len(set(rows)) > 1 else rows[:1]
        return self._budgets

    def _rule(self, budget: int) -> Evicting:
        if budget not in self._at:
            self._at[budget] = self._evicting.at(budget)
        return self._at[budget]

    def evict(self, always: bool) -> None:
        """Let the policy drop tokens in the rows that are due, and close the gaps where slots ran over its bound."""
        if self.cache.keeps:
            return
        policy, budgets = self._evicting, self.budgets()
        most = max(budgets)
        due = None
        if not always and policy.compact_every > 1:
            due = self.cache.seen_after % policy.compact_every == 0
            if bool(due.all()):
                due = None
            elif not bool(due.any()) and self.size < most + policy.compact_every:
                return
        if due is None and len(budgets) == 1:
            if self._replaceable(most):
                self._replace(self._rule(most).victim(self))
                return
            keep = self._rule(most).keep(self)
        else:
            keep = self._kept(budgets)
        if keep is None:
            return
        if self.misjudged:
            self._check_loss(keep, due)
        if due is not None or keep.dtype == torch.bool or policy.hides:
            # Rows that are not due keep their tokens, and heads may keep unequal numbers: the tensors stay as long as
            # the longest of them.
            chosen = keep if keep.dtype == torch.bool else self._marked(keep)
            if due is not None:
                chosen = chosen | ~due[:, None, None]
            held, _ = self.slots.materialise(chosen.shape[0], self.device)
            self.slots.valid = held & chosen
            if policy.hides:
                self.evicted = True
                return
            longest = int(self.slots.valid.sum(-1).max())
            keep = self.slots.valid.byte().argsort(dim=-1, descending=True, stable=True)[..., :longest].sort(-1).values
        self.gather(keep)
        if always and self.slots.valid is not None and bool(self.slots.valid.all()):
            # The padding is gone, so nothing is left to hide.
            self.slots.valid = None

    def _replaceable(self, budget: int) -> bool:
        """Whether one token too many is held and its slot may take the newest: the common step of decoding."""
        policy = self._evicting
        return (
            self.size == budget + 1
            and self.evicted
            and not self.misjudged
            and not policy.hides
            and not policy.ordered
            and not policy.rolling
            and not self.bits
            and self._keys is not None
            and self._values is not None
            and self._keys.is_contiguous()
            and self._values.is_contiguous()
        )

    def _check_loss(self, keep: Tensor, due: Tensor | None) -> None:
        """Refuse to drop real tokens by scores that count the attention of tokens that are gone."""
        kept = keep if keep.dtype == torch.bool else self._marked(keep)
        held, _ = self.slots.materialise(kept.shape[0], self.device)
        lost = held & ~kept
        if bool((lost if due is None else lost & due[:, None, None]).any()):
            raise CacheMisuse(
                f"tokens were taken back from this cache with crop, and {self.cache.policy} would now drop others by "
                "scores that still count the attention of those: use a budget above the whole length, or one of "
                "Tokenry's drafters, whose drafts count only once they are accepted, or start again from the whole "
                "prompt after cache.reset()"
            )

    def _replace(self, victim: Tensor) -> None:
        """Drop slot ``victim`` ``[batch, kv_heads, 1]`` of each head; the newest token takes its place."""
        assert self._keys is not None and self._values is not None
        batch, heads, room, _ = self._keys.shape
        first = torch.arange(0, batch * heads * room, room, device=self.device)
        rows, last = victim.flatten() + first, first + (self.size - 1)
        for buffer in (self._keys, self._values):
            flat = buffer.view(-1, buffer.shape[-1])
            flat.index_copy_(0, rows, flat.index_select(0, last))
        self.size -= 1
        self.slots.replace(victim)
        for name, tensor in self.state.items():
            self.state[name] = replaced(tensor, victim)

    def _marked(self, keep: Tensor) -> Tensor:
        return torch.zeros(*keep.shape[:2], self.size, dtype=torch.bool, device=self.device).scatter_(-1, keep, True)

    def _kept(self, budgets: list[int]) -> Tensor | None:
        """Which slots stay where rows have budgets of their own, bool ``[batch, kv_heads, slots]``."""
        assert self._keys is not None
        if len(budgets) == 1:
            keep = self._rule(budgets[0]).keep(self)
            return keep if keep is None or keep.dtype == torch.bool else self._marked(keep)
        chosen = torch.ones(*self._keys.shape[:2], self.size, dtype=torch.bool, device=self.device)
        rows = torch.tensor(budgets, device=self.device)
        for budget in sorted(set(budgets)):
            keep = self._rule(budget).keep(self)
            if keep is not None:
                marked = keep if keep.dtype == torch.bool else self._marked(keep)
                chosen = torch.where((rows == budget)[:, None, None], marked, chosen)
        return None if bool(chosen.all()) else chosen

    def staying(self) -> Tensor | None:
        """The slots that stay if all rows drop tokens now, bool ``[batch, kv_heads, slots]``; None: all."""
        return None if self.cache.keeps else self._kept(self.budgets())

    def gather(self, keep: Tensor) -> None:
        """Keep the slots ``keep`` ``[batch, kv_heads, kept]`` of each head and drop the others."""
        assert self._keys is not None and self._values is not None
        # Room for the tokens that come before slots are next dropped, so that none of them copies the rest once more.
        spare = self._evicting.compact_every if self._drops else 1
        if self._drops and self._evicting.rolling and not self.evicted:
            places = self.slots.places(keep.shape[0], self.device)
            assert self.cache.rotary is not None
            self._keys = self.cache.rotary.turn(self.held()[0], -places)
        # Heads may drop unequal numbers of the slots that have codes alone: what stands behind those of the head that
        # keeps fewest has a place in the buffers, read or not.
        base = int((keep < self._base).sum(-1).min()) if self._base else 0
        near = (keep[..., base:] - self._base).clamp(min=0)
        picks = torch.cat([near, near[..., -1:].expand(-1, -1, spare if near.shape[-1] else 0)], -1)
        self._keys, self._values = picked(self._keys, picks), picked(self._values, picks)
        if self._index:
            picks = torch.cat([keep, keep[..., -1:].expand(-1, -1, spare)], -1)
            self._index = {name: picked(buffer, picks) for name, buffer in self._index.items()}
        self._base = base
        self.size = keep.shape[-1]
        self.slots.gather(keep)
        for name, tensor in self.state.items():
            self.state[name] = tensor.gather(-1, keep)
        self.evicted = True

    def commit(
        self, block: Block, path: Tensor, counts: Tensor, take: int, straight: bool, valid: Tensor | None
    ) -> None:
        """Close a deferred block: keep the new slots ``path`` ``[batch, take]`` of each row behind the old ones."""
        assert self._keys is not None and self._values is not None
        base = self.size - block.new
        if not straight:
            index = path[:, None, :, None]
            near = base - self._base
            beside = [(buffer, base) for buffer in self._index.values()]
            for buffer, start in ((self._keys, near), (self._values, near), *beside):
                new = buffer[:, :, start : start + block.new]
                chosen = new.gather(2, index.expand(-1, buffer.shape[1], -1, buffer.shape[-1]))
                buffer[:, :, start : start + take] = chosen
        self.size = base + take
        if self.policy is None:
            return
        if self._apart:
            self._take(take, valid, self.cache.seen_before.unsqueeze(-1) + torch.arange(take, device=self.device))
        if self.pending is not None:
            self.policy.observe(self, self.pending.path(path, valid, base))
            self.pending = None
        if self.policy.drops:
            self.evict(False)
            self.cool(False)

    # transformers' interface -----------------------------------------------------------------------------------------
    def get_seq_length(self) -> int:
        return self.cache.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.size + query_length, self.cache.total - self.size

    def get_max_length(self) -> int:
        return -1

    def select(self, rows: Tensor) -> None:
        if self._keys is not None:
            keys, values = self._near()
            self._keys, self._values = keys.index_select(0, rows), values.index_select(0, rows)
            self._index = {name: self.indexed(name).index_select(0, rows) for name in self._index}
            if self.far is not None and self.far.size:
                self.far.select(rows)
            if self._exact_from is not None:
                self._exact_from = self._exact_from.index_select(0, rows)
        self._budgets = None
        if self.slots is not self.cache.slots:
            self.slots.select(rows)
        self.state = {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in self.state.items()}
        self.beside = {name: tensor.index_select(0, rows) for name, tensor in self.beside.items()}

    def reset(self) -> None:
        self._size, self._keys, self._values, self.state, self.pending = 0, None, None, {}, None
        self.evicted = self.misjudged = False
        self._index, self._budgets, self.reads = {}, None, [0, 0]
        self._base, self._nbytes, self.far, self._exact_from = 0, 0, None, None
        self.beside = {}
        self.ran = self.products = 0
        self.is_initialized = False
        self.slots = Slots() if self._apart else self.cache.slots


class _Life:
    """What a cache and its copies share, and what is to be done when the last of them is gone."""

    on_release: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.on_release is not None:
            self.on_release()


class TokenCache(Cache):
    """Past keys and values of a decoder, with positions, validity and policy state.

    Args:
        model: The model whose forward fills the cache.
        policy: A cache policy that decides which tokens stay; None keeps all.

    Raises:
        UnsupportedModel: The model has layers that a key-value cache does not serve, or none that the policy rules.
    """

    layers: list[TokenLayer]  # type: ignore[assignment]

    def __init__(self, model: PreTrainedModel, policy: Policy | None = None) -> None:
        check_decoder(model)
        self.policy = policy
        self.prepared: Any = None if policy is None else policy.prepare(model)
        """What the policy needs beside the model."""
        self.rotary = Rotary(model) if policy is not None and getattr(policy, "rolling", False) else None
        self.slots = Slots()
        self.total = 0
        """Columns the model has been fed, padding included: what transformers calls the sequence length."""
        self.held_nbytes = 0
        """Bytes of the keys and values that are held on the model's device."""
        self.peak_nbytes = 0
        """Most bytes that were held there at any time, within a forward too."""
        self._life = _Life()
        # Whether it stands beside a call's own cache, so that a block's policy leaves it alone.
        self.beside = False
        self._seen: Tensor | None = None
        # Tokens of each row's prompt, which ends with the first forward of a single token or of a draft.
        self._prompt: Tensor | None = None
        self._prompt_ended = self.keeps = False
        # Columns of left padding in each row, and whether rows have gaps behind them.
        self._lead: Tensor | None = None
        self._ragged = False
        self._staged: tuple[Tensor | None, Tensor | None, bool] | None = None
        self._block: Block | None = None
        # The last layer that the forward under way has written to, and whether one that had begun to write failed.
        self._reached, self._broken = -1, False
        # Within a forward whose policy does not pass on all tokens: the rows that run, and those of the next layer.
        self.rows: Rows | None = None
        self.next_rows: Rows | None = None
        self.handed: dict[str, Tensor] = {}
        """What a policy hands from layer to layer within a forward or a commit."""
        self.foretold: tuple[list[tuple[Tensor, Tensor]], Tensor | None] | None = None
        """Keys and values of each layer, and which are real, that wait for the first layer of a forward."""
        self.filled = 0
        """Columns whose keys and values the model has not computed; ``_ahead`` of them in the present forward."""
        self._ahead = 0
        self.config = config = text_config(model)
        spans = windows(config, config.num_hidden_layers)
        if policy is not None and None not in spans:
            raise UnsupportedModel(
                f"every layer of {type(model).__name__} has a sliding window of {spans[0]} tokens, so {policy} would "
                "rule none of them: use a model with full-attention layers"
            )
        super().__init__(layers=[TokenLayer(self, window, number) for number, window in enumerate(spans)])

    @property
    def on_release(self) -> Callable[[], None] | None:
        """What is called when the cache and all copies of it are gone."""
        return self._life.on_release

    @on_release.setter
    def on_release(self, release: Callable[[], None] | None) -> None:
        self._life.on_release = release

    # What a decoding method sees -------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Rows, 0 before the first forward."""
        keys = self.layers[0]._keys
        return 0 if keys is None else keys.shape[0]

    @property
    def length(self) -> int:
        """Slots of the longest layer."""
        return max(layer.size for layer in self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def seen(self) -> Tensor:
        """Real tokens that each row has cached ``[batch]``: the position of its next token."""
        if self._seen is None:
            return torch.full((self.batch,), self.total, device=self.device)
        return self._seen

    def room(self) -> Tensor | None:
        """Tokens that a deferred forward may commit before the policy changes what is seen ``[batch]``; None: any."""
        if self.policy is None or not self.policy.stops:
            return None
        return torch.stack([every - self.seen % every for every in self.policy.stops]).amin(0)

    def stage(self, valid: Tensor | None = None, relation: Tensor | None = None, deferred: bool = False) -> None:
        """Describe the tokens of the next forward.

        Args:
            valid: ``[batch, new]`` bool, False for padding; None: all real.
            relation: ``[1 or batch, new, new]`` bool, which new token sees which; None: causal.
            deferred: Leave the new slots open until :meth:`commit` says which stay.
        """
        self.ready()
        self._staged = (valid, relation, deferred)

    def staged(self, mask: Tensor | None, new: int) -> Tensor | None:
        """Which tokens of the next forward are real, bool ``[batch, new]``, or None: all; from what was staged, or from
        the 2-D mask of padding that the forward is given."""
        if self._staged is not None:
            valid, relation, deferred = self._staged
            if relation is not None or deferred:
                raise CacheMisuse(f"{self.policy} predicts prompts, and this forward is a tree or a draft")
            return valid
        if mask is None:
            return None
        if mask.ndim != 2:
            raise CacheMisuse(f"a mask of {mask.ndim} dimensions came to a TokenCache: pass the 2-D mask of padding")
        return None if bool(mask[:, -new:].all()) else mask[:, -new:].to(torch.bool)

    def foretell(self, states: list[tuple[Tensor, Tensor]], valid: Tensor | None) -> None:
        """Let the next forward, which begins the cache, run its last token alone, behind these.

        Args:
            states: For each layer keys and values of the others, ``[batch, kv_heads, new - 1, head_dim]``.
            valid: ``[batch, new - 1]`` bool, False for padding; None: all real.
        """
        self.foretold = states, valid

    def begin(self) -> Rows:
        """Cache what was foretold, open the block of the forward's last token, and return that row."""
        assert self.foretold is not None
        (states, valid), self.foretold = self.foretold, None
        ahead, self._reached = states[0][0].shape[2], len(self.layers) - 1
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer._write(keys, values)
        self._staged = (None if valid is None or bool(valid.all()) else valid, None, False)
        block = self.block(ahead, None, self.device)
        for layer in self.layers:
            if layer._drops:
                layer._take(ahead, block.valid, layer._new_positions(block))
                layer.evict(True)
        self.finish()
        self.filled, self._ahead = self.filled + ahead, ahead
        block = self.block(1, None, self.device)
        self._prompt = self.seen_after
        columns = torch.full((self.batch, 1), ahead, device=self.device)
        self.rows = Rows(columns, columns, self.layers[0]._new_positions(block), None)
        self.rows.block = block
        return self.rows

    def commit(self, path: Tensor, counts: Tensor) -> None:
        """Close the open block: row ``b`` keeps its new slots ``path[b, :counts[b]]``, in that order.

        Args:
            path: ``[batch, longest]`` slots of the block.
            counts: ``[batch]`` slots that each row keeps.
        """
        block = self._block
        if block is None:
            raise CacheMisuse("no block is open: stage(deferred=True) and a forward come before commit")
        kept = counts.tolist()
        take = max(kept)
        path = path[:, :take]
        valid = None
        if min(kept) < take:
            valid = torch.arange(take, device=counts.device) < counts[:, None]
            path = path.masked_fill(~valid, 0)
        straight = bool((path == torch.arange(take, device=path.device)).all())
        self.seen_before = self.seen
        self.seen_after = self.seen_before + counts
        self.handed = {}
        for layer in self.layers:
            layer.commit(block, path, counts, take, straight, valid)
        self.handed = {}
        contiguous = self.slots.positions is None and valid is None
        positions = None if contiguous else self.seen_before[:, None] + torch.arange(take, device=self.device)
        self.slots.append(take, valid, positions, self.batch, self.device)
        self._seen = None if contiguous and self._seen is None else self.seen_after
        self._ragged |= valid is not None
        self.total += take
        self._block = None
        self._settle()

    def _settle(self) -> None:
        """Tell a policy that retrieves that the new tokens are text."""
        if self.policy is not None and not self.policy.drops:
            for layer in self.layers:
                if layer.policy is self.policy:
                    cast(Retrieving, self.policy).settled(layer)
                    layer.cool(False)

    def prompt_lengths(self) -> list[int]:
        """Real tokens of each row's prompt; a prompt in chunks counts as far as it has come."""
        lengths = self.seen if self._prompt is None else self._prompt
        return lengths.tolist()

    def attended_share(self) -> float:
        """Share of the slots that decode steps attended to, over the layers where a policy retrieves; 1 before."""
        read, held = (sum(layer.reads[part] for layer in self.layers) for part in (0, 1))
        return read / held if held else 1.0

    def computed_share(self) -> float:
        """Share of the pairs of a token and a layer that ran, padding included; 1 before."""
        fed = self.layers[0].ran + self.filled
        return sum(layer.ran for layer in self.layers) / (len(self.layers) * fed) if fed else 1.0

    def fork(self) -> TokenCache:
        """An independent copy, policy state included; what is done on release waits for the last of them."""
        other = object.__new__(TokenCache)
        other.__dict__.update(self.__dict__)
        other.handed = {}
        other.slots = self.slots.copy()
        other.layers = []
        for layer in self.layers:
            twin = object.__new__(TokenLayer)
            twin.__dict__.update(layer.__dict__)
            twin._cache = weakref.ref(other)
            twin.slots = other.slots if layer.slots is self.slots else layer.slots.copy()
            twin.state, twin.beside, twin.reads = dict(layer.state), dict(layer.beside), list(layer.reads)
            twin._index = {name: layer.indexed(name).clone() for name in layer._index}
            if layer._keys is not None:
                twin._keys, twin._values = (tensor.clone() for tensor in layer._near())
            twin.far = None if layer.far is None else layer.far.copy()
            other.layers.append(twin)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenCache:
        return self.fork()

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows, in place; ``rows`` is ``[new batch]``."""
        if self.batch == 0:
            return
        rows = rows.to(self.device)
        for layer in self.layers:
            layer.select(rows)
        self.slots.select(rows)
        self._seen = None if self._seen is None else self._seen.index_select(0, rows)
        self._lead = None if self._lead is None else self._lead.index_select(0, rows)
        self._prompt = None if self._prompt is None else self._prompt.index_select(0, rows)
        self._recount()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest slots, ``tokens_to_remove`` being their negative number as in transformers.

        Scores of attention still count what the dropped tokens added, so a policy that has such scores may drop
        nothing afterwards: a forward that would make it do so raises ``CacheMisuse``.

        Raises:
            CacheMisuse: The policy has dropped tokens already, so the state before them is gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not allowed: give the number of tokens to drop as a negative number"
            )
        drop = -tokens_to_remove
        if drop == 0:
            return
        for layer in self.layers:
            if layer.evicted and not (isinstance(layer.policy, _Window) and drop <= layer.policy.spare):
                raise CacheMisuse(
                    "a cache that has dropped tokens cannot go back: run assisted generation with a budget above the "
                    "whole length, or one of Tokenry's drafters, which verify before they drop"
                )
        # Columns that came in on the model's own attention have no slots yet.
        counted = max(0, self.slots.size - (self.total - drop))
        if self.slots.valid is not None and counted:
            self._seen = self.seen - self.slots.valid[:, 0, -counted:].sum(-1)
        self.total -= drop
        self.slots.crop(self.slots.size - counted)
        for layer in self.layers:
            layer.shorten(drop)
            if layer._exact_from is not None:
                # What stands in codes stays so; what comes now is read as it is.
                layer._exact_from = torch.minimum(layer._exact_from, self.seen)
            if layer.slots is not self.slots:
                layer.slots.crop(min(layer.slots.size, layer.size))
            if layer._drops:
                layer.state = {name: tensor[..., :-drop] for name, tensor in layer.state.items()}
                # What the tokens that go added to the others cannot be told apart any more.
                layer.misjudged = layer._evicting.needs_attention and layer.size > 0
            elif layer.policy is not None:
                cast(Retrieving, layer.policy).cropped(layer)

    def keep_all(self) -> None:
        """Drop nothing more: what stands is what the budget left of a prompt, and all that comes is added to it."""
        self.keeps = True

    def compact(self) -> None:
        """Drop the slots that hold no real token in any row."""
        if self.slots.valid is None or self.policy is not None:
            return
        used = self.slots.valid.any(0).any(0)
        if not bool(used.all()):
            index = used.nonzero()[:, 0]
            for layer in self._sharing():
                keys, values = layer.held()
                layer.size = index.numel()
                layer._keys, layer._values = keys.index_select(2, index), values.index_select(2, index)
            self._seen = self.seen
            self.slots.gather(index.expand(self.batch, 1, -1))
        if self.slots.contiguous():
            # Nothing is left to hide, so masks are not needed any more.
            self.slots.valid = self.slots.positions = self._seen = self._lead = None
            self._ragged = False
            self.total = self.slots.size

    def realign(self) -> None:
        """Close the gaps that rows of unequal progress leave, so that no row is longer than its tokens and padding."""
        if self.policy is not None or not self._ragged:
            return
        columns, valid, positions = self._columns(self.slots, None)
        for layer in self._sharing():
            keys, values = layer.held()
            layer.size = columns.shape[1]
            picks = columns[:, None].expand(-1, keys.shape[1], -1)
            layer._keys, layer._values = picked(keys, picks), picked(values, picks)
        self._seen = self.seen
        self.slots.size = self.total = columns.shape[1]
        self.slots.valid, self.slots.positions = valid[:, None], positions[:, None]
        # Rows that are shorter than the longest end in slots without a token, which the next tokens stand behind.
        self._ragged = not bool(valid[:, -1].all())

    def _sharing(self) -> list[TokenLayer]:
        """The layers that hold every token of the cache."""
        return [layer for layer in self.layers if layer.slots is self.slots]

    def _columns(self, slots: Slots, last: int | None, end: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The slot that stands in each column of aligned rows, whether there is one, and its position, each
        ``[batch, columns]``: of the first ``end`` columns, or as many as the longest row has, the ``last``, or all."""
        held, places = slots.copy().materialise(self.batch, self.device)
        lead = self._lead if self._lead is not None else torch.zeros_like(self.seen)
        end = int((lead + self.seen).max()) if end is None else end
        start = 0 if last is None else max(0, end - last)
        positions = torch.arange(start, end, device=self.device) - lead[:, None]
        match = (places[:, :1] == positions[:, :, None]) & held[:, :1]
        return match.byte().argmax(-1), match.any(-1), positions.clamp(min=0)

    def _recount(self) -> None:
        self.held_nbytes = 0
        for layer in self.layers:
            layer._nbytes = 0
            layer.account()

    def nbytes(self) -> int:
        """Bytes of the keys and values that are held on the model's device, with codes and what a policy keeps of
        keys."""
        return self.held_nbytes

    def state_nbytes(self) -> int:
        """Bytes of what is known of the slots: where each stands, and a policy's scores, means and lists."""
        parts = [
            part
            for layer in self.layers
            for part in (layer.slots.valid, layer.slots.positions, *layer.state.values())
            if part is not None
        ]
        return sum(part.numel() * part.element_size() for part in parts)

    def offloaded_nbytes(self) -> int:
        """Bytes of the keys and values that stand in the CPU's memory."""
        return sum(layer.far.nbytes for layer in self.layers if layer.far is not None)

    def copied_slots(self) -> int:
        """Slots of single heads, each a key and a value, that were copied from the CPU's memory so far."""
        return sum(layer.far.copied for layer in self.layers if layer.far is not None)

    def kept_positions(self) -> list[Tensor]:
        """For each layer the positions it holds in order, ``[batch, 1 or kv_heads, slots]``, with a -1 before them for
        each slot that holds no token."""
        kept = []
        for layer in self.layers:
            valid, positions = layer.slots.copy().materialise(self.batch, layer.device)
            # A slot that was given to a newer token stands out of order.
            kept.append(positions.masked_fill(~valid, -1).sort(-1).values)
        return kept

    def to_dynamic(self, length: int | None = None) -> DynamicCache:
        """The same keys and values as transformers' own cache: each row's tokens contiguous behind its left padding,
        rows that ended early padded on the right with zeros.

        Args:
            length: Columns to hand over; None: as many as the longest row has.

        Raises:
            CacheMisuse: A policy has dropped tokens.
        """
        if self.policy is not None and any(layer.evicted for layer in self.layers):
            raise CacheMisuse(
                "a budgeted cache holds too few tokens for a DynamicCache: pass it on as it is, inside the block"
            )
        lead = 0 if self._lead is None else self._lead
        end = int((self.seen + lead).max()) if length is None else length
        tensors = []
        for layer in self.layers:
            keys, values = layer.held()
            if layer.window is None and self.slots.valid is None:
                tensors.append((keys[:, :, :end], values[:, :, :end]))
                continue
            columns, valid, _ = self._columns(layer.slots, None if layer.window is None else layer.window - 1, end)
            picks = columns[:, None].expand(-1, keys.shape[1], -1)
            real = valid[:, None, :, None]
            tensors.append((picked(keys, picks) * real, picked(values, picks) * real))
        return compat.filled(self.config, tensors, end)

    @classmethod
    def from_dynamic(cls, model: PreTrainedModel, dynamic: DynamicCache, valid: Tensor | None = None) -> TokenCache:
        """Take over a filled ``DynamicCache`` of full-attention layers.

        Args:
            model: The model that filled it.
            dynamic: The cache; its tensors are used, not copied.
            valid: ``[batch, length]`` bool, False for padding; None: all real.
        """
        cache = cls(model)
        if any(layer.window is not None for layer in cache.layers):
            raise CacheMisuse(
                "a filled cache of a sliding-window model cannot be taken over: start from the whole prompt"
            )
        for layer, (keys, values) in zip(cache.layers, compat.dynamic_layers(dynamic), strict=True):
            layer._write(keys, values)
        valid = None if valid is None or bool(valid.all()) else valid.bool()
        positions = None if valid is None else valid.cumsum(-1) - 1
        cache.slots.append(cache.layers[0].size, valid, positions, cache.batch, cache.device)
        cache.total = cache.layers[0].size
        if valid is not None:
            cache._seen, cache._lead = valid.sum(-1), _leading(valid)
        return cache

    # The forward, driven by the attention function -------------------------------------------------------------------
    def block(self, new: int, mask: Tensor | None, device: torch.device) -> Block:
        """The block of the forward that is under way; its first layer opens it."""
        if self.next_rows is not None or (self.rows is not None and self.rows.block.new != new):
            raise CacheMisuse(
                f"{self.policy} passes on {(self.next_rows or self.rows).block.new} tokens, and a layer ran for {new}: "  # type: ignore[union-attr]
                "run the model inside `with policy(model):`, or make the cache with `policy.cache(model)`"
            )
        if self.rows is not None:
            return self.rows.block
        if self._block is not None:
            return self._block
        if self._staged is not None:
            valid, relation, deferred = self._staged
            self._staged = None
        else:
            relation, deferred = None, False
            if mask is not None and mask.ndim != 2:
                raise CacheMisuse(
                    f"a mask of {mask.ndim} dimensions came to a TokenCache, which makes its layers' masks itself: "
                    "pass the 2-D mask of padding, or say who sees whom with cache.stage(relation=...)"
                )
            valid = None if mask is None or bool(mask[:, -new:].all()) else mask[:, -new:].to(torch.bool)
        if self.slots.size < self.total and self.slots.positions is None:
            self._catch_up(mask, device)
        block = Block(new, valid, relation, deferred)
        block.padding, block.first = mask, self.total
        self.seen_before = self.seen
        if relation is not None:
            block.positions = self.seen_before[:, None] + relation.sum(-1) - 1
        elif valid is not None or self.slots.positions is not None or self._seen is not None:
            counted = torch.arange(1, new + 1, device=device)[None] if valid is None else valid.cumsum(-1)
            block.positions = self.seen_before[:, None] + counted - 1
        self.seen_after = self.seen_before + (new if valid is None else valid.sum(-1))
        if not self._prompt_ended:
            self._prompt_ended = self._prompt is not None and (deferred or new == 1)
            if not self._prompt_ended:
                self._prompt = self.seen_after
                for layer in self.layers:
                    layer._budgets = None
        self._block = block
        return block

    def _catch_up(self, mask: Tensor | None, device: torch.device) -> None:
        """Account for columns that came in on the model's own attention, whose padding only the mask knows."""
        missing = slice(self.slots.size, self.total)
        valid = None if mask is None else mask[:, missing].to(torch.bool)
        if valid is None or bool(valid.all()):
            self.slots.append(self.total - self.slots.size, None, None, self.batch, device)
            return
        self.slots.append(valid.shape[-1], valid, valid.cumsum(-1) - 1 + self.slots.size, self.batch, device)
        assert self.slots.valid is not None
        self._seen, self._lead = self.slots.valid[:, 0].sum(-1), _leading(self.slots.valid[:, 0])

    @property
    def forward_block(self) -> Block:
        """The block of the forward that is under way."""
        assert self._block is not None
        return self._block

    @property
    def new(self) -> int:
        """Columns of the forward that is under way."""
        return 0 if self._block is None else self._ahead + self._block.new

    def ready(self) -> None:
        """Refuse a forward while a block is open, or after one that failed."""
        self._check_whole(self._reached < 0)
        if self._block is not None:
            raise CacheMisuse("the last block is still open: call commit before the next forward")

    def _check_whole(self, whole: bool) -> None:
        # Nobody is told of a forward that was interrupted from the keyboard; the next one finds what it left.
        self._broken |= not whole
        if self._broken:
            raise CacheMisuse(
                "a forward that filled this cache failed halfway, so its layers hold different tokens: start again "
                "from the whole prompt, with a new cache or after cache.reset()"
            )

    def finish(self) -> None:
        """After a forward: account for its tokens, unless they wait for a commit."""
        self._reached = -1
        self.rows = self.next_rows = None
        self.handed = {}
        self._ahead = 0
        block = self._block
        if block is None or block.deferred:
            return
        if block.valid is not None:
            # Padding leads a row until its first real token, in whichever chunk of the prompt that comes.
            leads = block.valid.cumsum(-1) + self.seen_before[:, None] == 0
            self._lead = leads.sum(-1) + (0 if self._lead is None else self._lead)
            self._ragged = self._ragged or (self.total > 0 and not bool((block.valid | leads).all()))
        self.slots.append(block.new, block.valid, block.positions, self.batch, self.device)
        self.total += block.new
        self._seen = None if self.slots.valid is None and self.slots.positions is None else self.seen_after
        self._block = None
        self._settle()

    def abandon(self) -> None:
        """After a forward that failed: forget its block; if it had begun to write, refuse any further one."""
        self._broken |= self._reached >= 0
        self._reached = -1
        self._block = self._staged = self.rows = self.next_rows = self.foretold = None
        self.handed = {}
        self._ahead = 0

    # transformers' interface -----------------------------------------------------------------------------------------
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        attached = _current() is self
        if not attached and self.policy is None and (self._ragged or any(layer.evicted for layer in self.layers)):
            raise CacheMisuse(
                "this cache has gaps or has dropped tokens, which the model's own attention knows nothing of: go on "
                "inside a block, or with cache.to_dynamic()"
            )
        self._check_whole(layer_idx > self._reached)
        self._reached = layer_idx
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        self.peak_nbytes = max(self.peak_nbytes, self.held_nbytes)
        if not attached and layer_idx == len(self.layers) - 1:
            self.total, self._reached = self.layers[0].size, -1
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.total

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(
            torch.arange(self.batch, device=self.device).repeat_interleave(repeats) if self.batch else torch.empty(0)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices if indices.dtype == torch.long else indices.nonzero()[:, 0])

    def reset(self) -> None:
        self.slots, self.total, self._seen, self._lead, self._ragged = Slots(), 0, None, None, False
        self._staged = self._block = self._prompt = self.foretold = None
        self.filled = self._ahead = 0
        self._prompt_ended = self.keeps = False
        self.held_nbytes = self.peak_nbytes = 0
        self._reached, self._broken = -1, False
        for layer in self.layers:
            layer.reset()


def _leading(valid: Tensor) -> Tensor:
    """Columns of ``[batch, length]`` before each row's first real token, ``[batch]``."""
    return (valid.cumsum(-1) == 0).sum(-1)


_thread = threading.local()


def _current() -> TokenCache | None:
    """The cache of the attached forward that runs in this thread."""
    return getattr(_thread, "cache", None)


def set_current(cache: TokenCache | None) -> None:
    """Note which cache the attached forward of this thread fills."""
    _thread.cache = cache


current = _current

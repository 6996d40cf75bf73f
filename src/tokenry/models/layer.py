"""One layer of the cache: its keys and values, which tokens they are, and what its policy knows of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from tokenry.errors import CacheMisuse
from tokenry.models.current import current
from tokenry.models.policy import Evicting, Policy, Retrieving
from tokenry.models.rows import Rows
from tokenry.models.slots import Block, Slots, replaced
from tokenry.models.statistics import AttentionRows
from tokenry.models.storage import Offloaded, dequantised, fetched, frozen, grown, picked, quantised, slot_nbytes

if TYPE_CHECKING:
    from tokenry.models.cache import TokenCache

_GROWTH = 64


class SlidingWindow:
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

    def at(self, budget: int) -> SlidingWindow:
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
        self.policy: Policy | None = cache.policy if window is None else SlidingWindow(window)
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
        if self.cache.policy is not None and current() is not self.cache:
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

"""The one cache: keys, values, positions, validity and policy state of every layer, moved together.

Two regimes. On a model's own attention it behaves as transformers' ``DynamicCache``. Inside
:func:`tokenry.models.attached` the attention function asks it for each layer's mask, so rows may progress unequally,
layers may hold different tokens, and the new tokens may form a tree.

Reading order: ``slots.py`` (which tokens stand where, the tokens of one forward), :class:`TokenLayer` (storage),
:class:`TokenCache` (all layers).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from tokenry.errors import CacheMisuse, UnsupportedModel
from tokenry.models import compat
from tokenry.models.anatomy import check_decoder, text_config, windows
from tokenry.models.slots import Block, Slots
from tokenry.models.statistics import AttentionRows

_GROWTH = 64


class Policy(Protocol):
    """What the cache asks of a cache policy (see :class:`tokenry.kvcache.engine.CachePolicy`)."""

    @property
    def budget(self) -> int:
        """Slots that a layer and head hold once tokens were dropped."""
        ...

    @property
    def compact_every(self) -> int:
        """Tokens are dropped after positions that are multiples of this."""
        ...

    @property
    def needs_attention(self) -> bool:
        """Whether ``observe`` is to be called."""
        ...

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        """State of new slots, each ``[batch, heads, new]``, from their positions ``[batch, new]``."""
        ...

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        """Take in the attention of the committed rows; all state is already ``[batch, heads, slots]``."""
        ...

    def keep(self, layer: TokenLayer) -> Tensor | None:
        """Slots to keep, ``[batch, heads, kept]`` ascending, or None to keep all."""
        ...


class TokenLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[batch, kv_heads, slots, head_dim]``, in buffers with room to grow.

    Attributes:
        window: Sliding window in tokens, or None.
        slots: Which tokens the slots hold. Layers that drop nothing share the cache's.
        state: What the policy keeps for each slot, ``[batch, kv_heads, slots]`` by name.
        evicted: Whether a slot was ever dropped.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: TokenCache, window: int | None) -> None:
        # A strong reference would keep a dropped cache, and the switch it holds, until the next garbage collection.
        self._cache = weakref.ref(cache)
        self.window = window
        self.policy = cache.policy if window is None else None
        self.slots = Slots() if self.policy is not None else cache.slots
        self.state: dict[str, Tensor] = {}
        self.size = 0
        self.evicted = False
        self.pending: AttentionRows | None = None
        self.is_initialized = False
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def cache(self) -> TokenCache:
        cache = self._cache()
        assert cache is not None
        return cache

    # Storage ---------------------------------------------------------------------------------------------------------
    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots that are held."""
        if self._keys is None or self._values is None:
            raise CacheMisuse("this cache is empty: run the model on a prompt first")
        return self._keys[:, :, : self.size], self._values[:, :, : self.size]

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
        self._write(key_states, value_states)
        keys, values = self.held()
        # The attention function is given tensors alone; this is how it finds the layer they belong to.
        keys._tokenry_layer = self  # type: ignore[attr-defined]
        return keys, values

    def _write(self, keys: Tensor, values: Tensor) -> None:
        if self._keys is None or self._values is None:
            self.lazy_initialization(keys, values)
            # A prompt is kept as it came: no copy, and no more memory than it takes.
            self._keys, self._values, self.size = keys, values, keys.shape[2]
            return
        end = self.size + keys.shape[2]
        if end > self._keys.shape[2]:
            room = max(end + _GROWTH, end + end // 8) if self.policy is None else end + self.policy.compact_every
            self._keys, self._values = (_grown(tensor, room, self.size) for tensor in (self._keys, self._values))
        self._keys[:, :, self.size : end] = keys
        self._values[:, :, self.size : end] = values
        self.size = end

    def nbytes(self) -> int:
        """Bytes of the slots that are held."""
        return 0 if self._keys is None else sum(tensor.numel() * tensor.element_size() for tensor in self.held())

    # One forward -----------------------------------------------------------------------------------------------------
    def mask(self, block: Block) -> tuple[Tensor | None, bool]:
        if self.slots is not self.cache.slots:
            return block.mask(self.slots, self.window, self.device)
        if self.window not in block.masks:
            block.masks[self.window] = block.mask(self.slots, self.window, self.device)
        return block.masks[self.window]

    def attended(self, block: Block, rows: AttentionRows) -> None:
        """After the layer's attention: hand the statistics to the policy, or keep them until the commit."""
        if self.policy is None:
            return
        if block.deferred:
            self.pending = rows.kept() if self.policy.needs_attention else None
            return
        self._take(block.new, block.valid, block.positions)
        if self.policy.needs_attention:
            self.policy.observe(self, rows)
        self._evict(block.new > 1)

    def _take(self, count: int, valid: Tensor | None, positions: Tensor | None) -> None:
        assert self.policy is not None and self._keys is not None
        batch, heads = self._keys.shape[:2]
        if positions is None:
            positions = self.cache.seen_before.unsqueeze(-1) + torch.arange(count, device=self.device)
        self.slots.append(
            count,
            valid,
            positions if self.slots.positions is not None or valid is not None else None,
            batch,
            self.device,
        )
        for name, new in self.policy.fresh(positions, heads).items():
            self.state[name] = torch.cat([self.state[name], new], -1) if name in self.state else new

    def _evict(self, always: bool) -> None:
        """Let the policy drop tokens in the rows that are due, and close the gaps where slots ran over its bound."""
        policy = self.policy
        assert policy is not None
        due = None
        if not always and policy.compact_every > 1:
            due = self.cache.seen_after % policy.compact_every == 0
            if bool(due.all()):
                due = None
            elif not bool(due.any()) and self.size < policy.budget + policy.compact_every:
                return
        keep = policy.keep(self)
        if keep is None:
            return
        if due is not None:
            # Rows that are not due keep their tokens, so the tensors stay as long as the longest of them.
            held, _ = self.slots.materialise(keep.shape[0], self.device)
            chosen = torch.zeros(*keep.shape[:2], self.size, dtype=torch.bool, device=self.device).scatter_(
                -1, keep, True
            )
            self.slots.valid = held & (chosen | ~due[:, None, None])
            longest = int(self.slots.valid.sum(-1).max())
            keep = self.slots.valid.byte().argsort(dim=-1, descending=True, stable=True)[..., :longest].sort(-1).values
        self.gather(keep)
        self.evicted = True

    def gather(self, keep: Tensor) -> None:
        """Keep the slots ``keep`` ``[batch, kv_heads, kept]`` of each head and drop the others."""
        assert self._keys is not None and self._values is not None
        index = keep.unsqueeze(-1)
        self._keys = self._keys.gather(2, index.expand(-1, -1, -1, self._keys.shape[-1]))
        self._values = self._values.gather(2, index.expand(-1, -1, -1, self._values.shape[-1]))
        self.size = keep.shape[-1]
        self.slots.gather(keep)
        for name, tensor in self.state.items():
            self.state[name] = tensor.gather(-1, keep)

    def commit(
        self, block: Block, path: Tensor, counts: Tensor, take: int, straight: bool, valid: Tensor | None
    ) -> None:
        """Close a deferred block: keep the new slots ``path`` ``[batch, take]`` of each row behind the old ones."""
        assert self._keys is not None and self._values is not None
        base = self.size - block.new
        if not straight:
            index = path[:, None, :, None]
            for buffer in (self._keys, self._values):
                new = buffer[:, :, base : self.size]
                chosen = new.gather(2, index.expand(-1, buffer.shape[1], -1, buffer.shape[-1]))
                buffer[:, :, base : base + take] = chosen
        self.size = base + take
        if self.policy is None:
            return
        positions = self.cache.seen_before.unsqueeze(-1) + torch.arange(take, device=self.device)
        self._take(take, valid, positions)
        if self.pending is not None:
            self.policy.observe(self, self.pending.path(path, valid, base))
            self.pending = None
        self._evict(False)

    # transformers' interface -----------------------------------------------------------------------------------------
    def get_seq_length(self) -> int:
        return self.cache.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.size + query_length, self.cache.total - self.size

    def get_max_length(self) -> int:
        return -1

    def select(self, rows: Tensor) -> None:
        if self._keys is not None:
            keys, values = self.held()
            self._keys, self._values = keys.index_select(0, rows), values.index_select(0, rows)
        if self.slots is not self.cache.slots:
            self.slots.select(rows)
        self.state = {name: tensor.index_select(0, rows) for name, tensor in self.state.items()}

    def reset(self) -> None:
        self.size, self._keys, self._values, self.state, self.evicted = 0, None, None, {}, False
        self.is_initialized = False
        self.slots = Slots() if self.policy is not None else self.cache.slots


def _grown(buffer: Tensor, room: int, used: int) -> Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[-1])
    grown[:, :, :used] = buffer[:, :, :used]
    return grown


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
        self.slots = Slots()
        self.total = 0
        """Columns the model has been fed, padding included: what transformers calls the sequence length."""
        self.peak_nbytes = 0
        self.on_release: Callable[[], None] | None = None
        self._seen: Tensor | None = None
        self._staged: tuple[Tensor | None, Tensor | None, bool] | None = None
        self._block: Block | None = None
        config = text_config(model)
        spans = windows(config, config.num_hidden_layers)
        if policy is not None and None not in spans:
            raise UnsupportedModel(
                f"every layer of {type(model).__name__} has a sliding window of {spans[0]} tokens, so {policy} would "
                "rule none of them: use a model with full-attention layers"
            )
        super().__init__(layers=[TokenLayer(self, window) for window in spans])

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
        """Tokens that a deferred forward may commit before the policy next drops some ``[batch]``; None: no limit."""
        if self.policy is None:
            return None
        return self.policy.compact_every - self.seen % self.policy.compact_every

    def stage(self, valid: Tensor | None = None, relation: Tensor | None = None, deferred: bool = False) -> None:
        """Describe the tokens of the next forward.

        Args:
            valid: ``[batch, new]`` bool, False for padding; None: all real.
            relation: ``[1 or batch, new, new]`` bool, which new token sees which; None: causal.
            deferred: Leave the new slots open until :meth:`commit` says which stay.
        """
        if self._block is not None:
            raise CacheMisuse("the last block is still open: call commit before the next forward")
        self._staged = (valid, relation, deferred)

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
        for layer in self.layers:
            layer.commit(block, path, counts, take, straight, valid)
        contiguous = self.slots.positions is None and valid is None
        positions = None if contiguous else self.seen_before[:, None] + torch.arange(take, device=self.device)
        self.slots.append(take, valid, positions, self.batch, self.device)
        self._seen = None if contiguous and self._seen is None else self.seen_after
        self.total += take
        self._block = None

    def fork(self) -> TokenCache:
        """An independent copy, policy state included."""
        other = object.__new__(TokenCache)
        other.__dict__.update(self.__dict__)
        other.on_release = None
        other.slots = self.slots.copy()
        other.layers = []
        for layer in self.layers:
            twin = object.__new__(TokenLayer)
            twin.__dict__.update(layer.__dict__)
            twin._cache = weakref.ref(other)
            twin.slots = other.slots if layer.slots is self.slots else layer.slots.copy()
            twin.state = dict(layer.state)
            if layer._keys is not None:
                twin._keys, twin._values = (tensor.clone() for tensor in layer.held())
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
        if self._seen is not None:
            self._seen = self._seen.index_select(0, rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest slots, ``tokens_to_remove`` being their negative number as in transformers.

        Raises:
            CacheMisuse: The policy has dropped tokens already, so the state before them is gone.
        """
        drop = abs(tokens_to_remove)
        if drop == 0:
            return
        if any(layer.evicted for layer in self.layers):
            raise CacheMisuse(
                "a budgeted cache that has dropped tokens cannot go back: run assisted generation with a budget above "
                "the whole length, or one of Tokenry's drafters, which verify before they drop"
            )
        if self.slots.valid is not None:
            self._seen = self.seen - self.slots.valid[:, 0, -drop:].sum(-1)
        self.total -= drop
        for layer in self.layers:
            layer.size -= drop
            layer.state = {name: tensor[..., :-drop] for name, tensor in layer.state.items()}
            if layer.slots is not self.slots:
                layer.slots.crop(layer.size)
        self.slots.crop(self.slots.size - drop)

    def compact(self) -> None:
        """Drop the slots that hold no real token in any row."""
        if self.slots.valid is None or self.policy is not None:
            return
        used = self.slots.valid.any(0).any(0)
        if not bool(used.all()):
            index = used.nonzero()[:, 0]
            for layer in self.layers:
                layer._keys, layer._values = (tensor.index_select(2, index) for tensor in layer.held())
                layer.size = index.numel()
            self._seen = self.seen
            self.slots.gather(index.expand(self.batch, 1, -1))
        if self.slots.contiguous():
            # Nothing is left to hide, so masks are not needed any more.
            self.slots.valid = self.slots.positions = self._seen = None
            self.total = self.slots.size

    def nbytes(self) -> int:
        """Bytes of the keys and values that are held."""
        return sum(layer.nbytes() for layer in self.layers)

    def kept_positions(self) -> list[Tensor]:
        """For each layer the positions it holds, ``[batch, 1 or kv_heads, slots]``, -1 where a slot holds no token."""
        kept = []
        for layer in self.layers:
            valid, positions = layer.slots.copy().materialise(self.batch, layer.device)
            kept.append(positions.masked_fill(~valid, -1))
        return kept

    def to_dynamic(self) -> DynamicCache:
        """The same keys and values as transformers' own cache: each row's tokens contiguous behind its left padding,
        rows that ended early padded on the right with zeros.

        Raises:
            CacheMisuse: A policy has dropped tokens.
        """
        if any(layer.evicted for layer in self.layers):
            raise CacheMisuse(
                "a budgeted cache holds too few tokens for a DynamicCache: pass it on as it is, inside the block"
            )
        dynamic = DynamicCache()
        valid = self.slots.valid
        for number, layer in enumerate(self.layers):
            keys, values = layer.held()
            if valid is not None:
                keys, values = _realigned(keys, valid[:, 0]), _realigned(values, valid[:, 0])
            dynamic.update(keys, values, number)
        return dynamic

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
        cache._seen = None if valid is None else valid.sum(-1)
        return cache

    # The forward, driven by the attention function -------------------------------------------------------------------
    def block(self, new: int, mask: Tensor | None, device: torch.device) -> Block:
        """The block of the forward that is under way; its first layer opens it."""
        if self._block is not None:
            return self._block
        if self._staged is not None:
            valid, relation, deferred = self._staged
            self._staged = None
        else:
            relation, deferred = None, False
            # The newest row of the mask sees every real token, so it tells which of the new columns are real.
            valid = None if mask is None else (mask if mask.ndim == 2 else mask[:, 0, -1])[:, -new:].to(torch.bool)
            if valid is not None and bool(valid.all()):
                valid = None
        if self.slots.size < self.total and self.slots.positions is None:
            self._catch_up(mask, device)
        block = Block(new, valid, relation, deferred)
        self.seen_before = self.seen
        if relation is not None:
            block.positions = self.seen_before[:, None] + relation.sum(-1) - 1
        elif valid is not None or self.slots.positions is not None or self._seen is not None:
            counted = torch.arange(1, new + 1, device=device)[None] if valid is None else valid.cumsum(-1)
            block.positions = self.seen_before[:, None] + counted - 1
        self.seen_after = self.seen_before + (new if valid is None else valid.sum(-1))
        self._block = block
        return block

    def _catch_up(self, mask: Tensor | None, device: torch.device) -> None:
        """Account for columns that came in on the model's own attention, whose padding only the mask knows."""
        missing = slice(self.slots.size, self.total)
        valid = None if mask is None or mask.ndim != 2 else mask[:, missing].to(torch.bool)
        if valid is None or bool(valid.all()):
            self.slots.append(self.total - self.slots.size, None, None, self.batch, device)
            return
        self.slots.append(valid.shape[-1], valid, valid.cumsum(-1) - 1 + self.slots.size, self.batch, device)
        assert self.slots.valid is not None
        self._seen = self.slots.valid[:, 0].sum(-1)

    def finish(self) -> None:
        """After a forward: account for its tokens, unless they wait for a commit."""
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes())
        block = self._block
        if block is None or block.deferred:
            return
        self.slots.append(block.new, block.valid, block.positions, self.batch, self.device)
        self.total += block.new
        self._seen = None if self.slots.valid is None and self.slots.positions is None else self.seen_after
        self._block = None

    def abandon(self) -> None:
        """After a forward that failed: forget its block; the cache itself is not fit for further use."""
        self._block = self._staged = None

    # transformers' interface -----------------------------------------------------------------------------------------
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        if _current() is not self and layer_idx == len(self.layers) - 1:
            self.total = self.layers[0].size
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes())
        elif self.policy is not None:
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes())
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
        self.slots, self.total, self._seen = Slots(), 0, None
        self._staged = self._block = None
        for layer in self.layers:
            layer.reset()

    def __del__(self) -> None:
        release = getattr(self, "on_release", None)
        if release is not None:
            release()


def _realigned(tensor: Tensor, valid: Tensor) -> Tensor:
    """Close the gaps behind each row's first real slot; ``tensor`` ``[batch, heads, slots, dim]``."""
    lead = valid.int().argmax(-1, keepdim=True)
    column = torch.arange(valid.shape[-1], device=valid.device)
    held = valid | (column < lead)
    order = held.byte().argsort(dim=-1, descending=True, stable=True)
    filled = column < held.sum(-1, keepdim=True)
    longest = int(held.sum(-1).max())
    moved = tensor.gather(2, order[:, None, :, None].expand_as(tensor))
    return (moved * filled[:, None, :, None])[:, :, :longest]


_thread = threading.local()


def _current() -> TokenCache | None:
    """The cache of the attached forward that runs in this thread."""
    return getattr(_thread, "cache", None)


def set_current(cache: TokenCache | None) -> None:
    """Note which cache the attached forward of this thread fills."""
    _thread.cache = cache


current = _current

"""A model of which some layers run for some of the tokens, and the cache of layers with unequal numbers of tokens."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.decoding.partial_cache import PartialCache
from tokenry.errors import UnsupportedModel
from tokenry.models import Slots, TokenCache, anatomy
from tokenry.models.anatomy import text_config

# --- layers that do not run ---------------------------------------------------------------------


class Depth:
    """Which layers run in the forwards of one model in this thread.

    Attributes:
        layers: Layers of the model.
    """

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        self.layers = layers
        self._model = weakref.ref(model)
        self._reach: Sequence[int] | None = None
        self._active: frozenset[int] | None = None

    def all(self) -> None:
        """Every layer runs for every token."""
        self._reach = self._active = None

    def only(self, active: Sequence[int]) -> None:
        """The layers `active` run; past the others tokens go unchanged."""
        self._reach, self._active = None, frozenset(active)

    def prefixes(self, reach: Sequence[int]) -> None:
        """Each layer runs for the first `reach[layer]` tokens of a forward without a cache."""
        self._reach, self._active = reach, None

    def of(self, model: PreTrainedModel | None) -> bool:
        """Whether it is the depth of `model`."""
        return self._model() is model

    def run(self, layer: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a layer's forward gives for the tokens it runs for; the others' hidden states as they came."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        length = hidden.shape[1]
        count = length
        if self._active is not None:
            count = length if layer in self._active else 0
        elif self._reach is not None:
            count = min(self._reach[layer], length)
        if count == 0:
            return hidden
        if count < length:
            args = tuple(_first(value, count, length) for value in args)
            kwargs = {name: _first(value, count, length) for name, value in kwargs.items()}
        output = forward(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise UnsupportedModel(
                f"a layer of this model returns a {type(output).__name__}, not its hidden states: layers can be "
                "skipped in models of transformers whose layers return one tensor"
            )
        return output if count == length else torch.cat([output, hidden[:, count:]], 1)


def _first(value: Any, count: int, length: int) -> Any:
    """A layer's argument for its first `count` tokens of `length`: hidden states, positions, rotary angles, masks."""
    if isinstance(value, tuple):
        return tuple(_first(part, count, length) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 4 and value.shape[-2:] == (length, length):
        return value[..., :count, :count]
    if value.ndim in (2, 3) and value.shape[1] == length:
        return value[:, :count]
    raise UnsupportedModel(
        f"a layer is given a tensor of shape {list(value.shape)} beside {length} tokens, which cannot be cut to the "
        "first of them"
    )


_depth: ContextVar[Depth | None] = ContextVar("tokenry_depth", default=None)
_lock = threading.RLock()
# How many blocks are open for each model, and what its layers had for a forward of their own before.
_wrapped: weakref.WeakKeyDictionary[PreTrainedModel, list[Any]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def skipping(model: PreTrainedModel) -> Iterator[Depth]:
    """Forwards of `model` in this block and thread run the layers that the returned `Depth` says, at first all.

    Other threads run all layers. Blocks of several models do not nest.

    Raises:
        UnsupportedModel: Its layers cannot be found, or lend each other their keys.
    """
    layers = anatomy(model).layers
    if getattr(text_config(model), "num_kv_shared_layers", None):
        raise UnsupportedModel(
            f"{type(model).__name__} has layers that read the keys of other layers, which may be skipped: use a model "
            "whose layers keep keys of their own"
        )
    _hold(model, layers)
    depth = Depth(model, len(layers))
    token = _depth.set(depth)
    try:
        yield depth
    finally:
        _depth.reset(token)
        _release(model, layers)


def depth_of(model: PreTrainedModel) -> Depth:
    """The depth of the block of `model` that this thread is in."""
    depth = _depth.get()
    assert depth is not None and depth.of(model)
    return depth


def _hold(model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    with _lock:
        held = _wrapped.setdefault(model, [0, []])
        held[0] += 1
        if held[0] == 1:
            held[1] = [vars(layer).get("forward") for layer in layers]
            owner = weakref.ref(model)
            for number, layer in enumerate(layers):
                # A hook cannot keep a module from running, and changed lists of layers would change other threads.
                layer.forward = _guarded(owner, number, layer.forward)


def _release(model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    with _lock:
        held = _wrapped[model]
        held[0] -= 1
        if held[0] == 0:
            for layer, before in zip(layers, _wrapped.pop(model)[1], strict=True):
                if before is None:
                    del layer.forward
                else:
                    layer.forward = before


def _guarded(owner: weakref.ref[PreTrainedModel], number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        depth = _depth.get()
        if depth is None or not depth.of(owner()):
            return forward(*args, **kwargs)
        return depth.run(number, forward, args, kwargs)

    return guarded


# --- their cache --------------------------------------------------------------------------------


class JaggedCache(PartialCache):
    """A cache whose layers hold unequal numbers of tokens: each those that ran through it.

    `complete` counts the columns in front that all layers ran for.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        for layer in self.layers:
            layer.slots = Slots()
        self.complete = 0
        self._ran: set[int] = set()

    @classmethod
    def of(cls, model: PreTrainedModel, cache: TokenCache) -> JaggedCache:
        own = super().of(model, cache)
        assert isinstance(own, JaggedCache)
        own.complete = own.total
        for layer in own.layers:
            layer.slots = own.slots.copy()
        return own

    @property
    def batch(self) -> int:
        return next((layer._keys.shape[0] for layer in self.layers if layer._keys is not None), 0)

    @property
    def device(self) -> torch.device:
        return next(layer.device for layer in self.layers if layer._keys is not None)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._ran.add(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def finish(self) -> None:
        block, before = self._block, self.total
        super().finish()
        if block is None or block.deferred:
            return
        for number in self._ran:
            slots = self.layers[number].slots
            slots.append(block.new, block.valid, block.positions, self.batch, self.device)
        if len(self._ran) == len(self.layers) and self.complete == before:
            self.complete = self.total
        self._ran.clear()

"""Keys and values where they are made: read them in a forward, put others in their place, and rotate them as a model
does before it caches them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenry.errors import UnsupportedModel
from tokenry.models import Rotary, TokenCache, anatomy, attached

Pair = tuple[Tensor, Tensor]
"""Keys and values of one layer; as a model's maps give them, each ``[batch, length, kv_heads * head_dim]``."""


class Source(NamedTuple):
    """Where a layer's keys or values are made.

    Attributes:
        module: A linear map of the layer.
        columns: Which of its outputs they are, ``[kv_heads * head_dim]``; None: all.
    """

    module: nn.Module
    columns: Tensor | None

    def read(self, output: Tensor) -> Tensor:
        return output if self.columns is None else output[..., self.columns.to(output.device)]


def sources(model: PreTrainedModel) -> list[tuple[Source, Source]]:
    """Where each layer's keys and values are made.

    Raises:
        UnsupportedModel: A layer has no such maps.
    """
    parts = anatomy(model)
    width, queries = parts.kv_heads * parts.head_dim, parts.heads * parts.head_dim
    found = []
    for attention in parts.attention:
        key, value = getattr(attention, "k_proj", None), getattr(attention, "v_proj", None)
        if isinstance(key, nn.Linear) and isinstance(value, nn.Linear):
            found.append((Source(key, None), Source(value, None)))
            continue
        # One map for queries, keys and values: side by side, or side by side in each head.
        whole = next((m for name in ("c_attn", "qkv_proj") if (m := getattr(attention, name, None)) is not None), None)
        columns = torch.arange(queries + 2 * width)
        first, second = columns[queries : queries + width], columns[queries + width :]
        if whole is None:
            whole = getattr(attention, "query_key_value", None)
            by_head = columns.view(-1, 3, parts.head_dim) if queries == width else columns.new_empty(0, 3, 1)
            first, second = by_head[:, 1].flatten(), by_head[:, 2].flatten()
        if not isinstance(whole, nn.Linear | Conv1D) or _outputs(whole) != queries + 2 * width or not len(first):
            raise UnsupportedModel(
                f"{type(model).__name__}: {type(attention).__name__} has no linear maps for keys and values (k_proj "
                "and v_proj, or one map with the queries), so they can be neither read nor predicted"
            )
        found.append((Source(whole, first), Source(whole, second)))
    return found


def _outputs(module: nn.Linear | Conv1D) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.nf


class _Enough(Exception):
    """All that was to be read is read."""


class _Heard:
    """What modules gave in a forward of this thread; after the last of ``until`` it ends."""

    def __init__(self, until: set[nn.Module]) -> None:
        self.until = until
        self.outputs: dict[nn.Module, Tensor] = {}


_heard: ContextVar[_Heard | None] = ContextVar("tokenry_projections_heard", default=None)
_given: ContextVar[dict[nn.Module, list[tuple[Source, Tensor]]] | None] = ContextVar(
    "tokenry_projections_given", default=None
)


def remember(model: PreTrainedModel, whole: bool = False, **inputs: Any) -> tuple[list[Pair], Any]:
    """Run a model and read its keys and values of all layers, before norms and rotary positions.

    Args:
        model: The model.
        whole: Whether to run it to its end; otherwise it ends with the last layer's keys and values.
        inputs: Arguments of the forward, without a cache unless they name one.

    Returns:
        Keys and values of each layer, and the model's output or None.
    """
    places = sources(model)
    modules = [source.module for pair in places for source in pair]
    heard = _Heard(set() if whole else set(modules[-2:]))
    token = _heard.set(heard)
    # Threads that share a model each add hooks, and all of them run in every thread: what they find is the thread's.
    hooks = [module.register_forward_hook(_hear) for module in dict.fromkeys(modules)]
    output = None
    try:
        output = model(**{"use_cache": False, "return_dict": True, **inputs})
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        _heard.reset(token)
    pairs = [tuple(source.read(heard.outputs[source.module]) for source in pair) for pair in places]
    return pairs, output  # type: ignore[return-value]


def _hear(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    heard = _heard.get()
    if heard is None or module in heard.outputs:
        return
    heard.outputs[module] = output
    if heard.until and heard.until <= heard.outputs.keys():
        raise _Enough


@contextlib.contextmanager
def replaced(model: PreTrainedModel, pairs: Sequence[Pair]) -> Iterator[None]:
    """In forwards of this thread in the block, every layer attends to these keys and values in place of its own; norms,
    rotary positions and masks are the model's."""
    given: dict[nn.Module, list[tuple[Source, Tensor]]] = {}
    for places, pair in zip(sources(model), pairs, strict=True):
        for source, tensor in zip(places, pair, strict=True):
            given.setdefault(source.module, []).append((source, tensor))
    token = _given.set(given)
    hooks = [module.register_forward_hook(_replace) for module in given]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _given.reset(token)


def _replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    given = _given.get()
    if given is None or module not in given:
        return None
    for source, tensor in given[module]:
        if source.columns is None:
            output = tensor.to(output.dtype)
        else:
            output = output.index_copy(-1, source.columns.to(output.device), tensor.to(output.dtype))
    return output


class Placement:
    """How a model turns keys as its maps give them into keys as it caches them.

    Raises:
        UnsupportedModel: In a way that is not known here; found by a comparison on a few tokens, once for a model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        parts = anatomy(model)
        self.heads, self.head_dim = parts.kv_heads, parts.head_dim
        self.norms = [getattr(attention, "k_norm", None) for attention in parts.attention]
        self.rotary: Any = parts.rotary
        self.halves, self.width = True, 0
        if parts.rotary is not None:
            rotary = Rotary(model)
            self.halves, self.width = rotary.layout == "halves", rotary.width
        with _lock:
            if model not in _verdicts:
                _verdicts[model] = self._verdict(model)
            if not _verdicts[model]:
                raise UnsupportedModel(
                    f"{type(model).__name__} makes cached keys and values in a way of its own (not by a norm k_norm "
                    "and rotary positions alone), so they cannot be predicted"
                )

    def normed(self, layer: int, keys: Tensor) -> Tensor:
        """Keys ``[batch, length, kv_heads * head_dim]`` behind the layer's norm, if it has one,
        ``[batch, length, kv_heads, head_dim]``."""
        norm: Any = self.norms[layer]
        apart = keys.unflatten(-1, (self.heads, self.head_dim))
        if norm is None:
            return apart
        if getattr(norm, "weight", None) is not None and norm.weight.numel() == keys.shape[-1] != self.head_dim:
            return norm(keys).unflatten(-1, (self.heads, self.head_dim))
        return norm(apart)

    def placed(self, pairs: Sequence[Pair], positions: Tensor) -> list[Pair]:
        """Keys and values of all layers at positions ``[1 or batch, length]`` as the model caches them, each
        ``[batch, kv_heads, length, head_dim]``."""
        cos = sin = None
        if self.rotary is not None:
            cos, sin = (part[:, None] for part in self.rotary(pairs[0][0], positions))
        placed = []
        for layer, (keys, values) in enumerate(pairs):
            keys = self.normed(layer, keys).transpose(1, 2)
            if cos is not None and sin is not None:
                first, rest = keys[..., : self.width], keys[..., self.width :]
                keys = torch.cat([first * cos + self._quarter(first) * sin, rest], -1)
            values = values.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            placed.append((keys.contiguous(), values.contiguous()))
        return placed

    def _quarter(self, states: Tensor) -> Tensor:
        """Every plane turned by a quarter."""
        if self.halves:
            one, two = states.chunk(2, -1)
            return torch.cat([-two, one], -1)
        return torch.stack([-states[..., 1::2], states[..., 0::2]], -1).flatten(-2)

    def _verdict(self, model: PreTrainedModel) -> bool:
        """Whether keys and values of a few tokens come out as the model caches them."""
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.tensor([[3, 5, 7, 11]], device=model.device) % vocabulary
        with attached(model), torch.inference_mode(False), torch.no_grad():
            cache = TokenCache(model)
            pairs, _ = remember(model, whole=True, input_ids=ids.clone(), past_key_values=cache, use_cache=True)
            positions = torch.arange(4, device=model.device)[None]
            noise = {torch.float64: 1e-4, torch.float32: 1e-3}.get(model.dtype, 0.1)
            for layer, mine in zip(cache.layers, self.placed(pairs, positions), strict=True):
                for held, own in zip(layer.held(), mine, strict=True):
                    if held.shape != own.shape:
                        return False
                    if float((held - own).abs().max()) > noise * max(1.0, float(held.abs().max())):
                        return False
        return True


_lock = threading.RLock()
_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()

"""Linear maps over weights that were packed once, for passes over a few rows on a CPU.

A product in float32 lays its weight out anew for the kernel in every call, at a cost that the few rows of a verify pass
do not make up for. oneDNN multiplies with a weight that stands in its layout already.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["is_packed", "packed"]

# Rows that packed weights serve: one is multiplied where the weight stands, and many are worth the layout.
_FEW, _MANY = 2, 128
# Bytes of packed weights a model may take.
_MOST_BYTES = 1 << 30
# What is timed to see whether packing pays: rows, rounds, bytes of weights (more than caches hold).
_ROWS, _ROUNDS, _TIMED_BYTES = 8, 5, 64 << 20

_lock = threading.RLock()
_packs: weakref.WeakKeyDictionary[nn.Linear, _Pack] = weakref.WeakKeyDictionary()
_blocks: weakref.WeakKeyDictionary[PreTrainedModel, _Blocks] = weakref.WeakKeyDictionary()
_pays: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Pack:
    """A weight in oneDNN's layout.

    Attributes:
        weight: The packed weight.
        digest: Sums over the bits of each column and each row of what it was made from.
    """

    weight: Tensor
    digest: Tensor


class _Blocks:
    """The blocks that a model is in.

    Attributes:
        maps: Maps that run packed.
        count: How many blocks there are.
    """

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        self.maps, self.count = maps, 0

    def enter(self) -> None:
        self.count += 1
        if self.count == 1:
            for each in self.maps:
                each.forward = types.MethodType(forward, each)  # type: ignore[method-assign]

    def leave(self) -> bool:
        """Leave a block; whether it was the last."""
        self.count -= 1
        if self.count == 0:
            for each in self.maps:
                each.__dict__.pop("forward", None)
        return self.count == 0


@contextlib.contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Run the linear maps of `model` over packed weights inside the block, where they are fed 2 to 128 rows without
    gradients; blocks may nest and run in several threads.

    It takes effect for float32 on CPUs, where a measurement, once per process and model, finds it faster, and where the
    packed weights take no more than 1 GiB. They are kept as long as the model lives, and made anew where its weights
    have changed. Outputs differ from the model's own by rounding, as those of passes over other numbers of rows do.
    """
    maps, blocks = _maps(model), None
    try:
        with _lock:
            if maps and model not in _pays:
                _pays[model] = _pay(maps)
            if maps and _pays[model]:
                for each in maps:
                    _pack(each)
                blocks = _blocks.setdefault(model, _Blocks(maps))
                blocks.enter()
        yield
    finally:
        if blocks is not None:
            with _lock:
                if blocks.leave():
                    del _blocks[model]


def is_packed(model: PreTrainedModel) -> bool:
    """Whether the model is inside a block that takes effect."""
    return model in _blocks


def _maps(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear maps that can run packed; none where torch lacks the kernel or the packed weights are too large."""
    if _kernels() is None or not torch.backends.mkldnn.enabled:
        return []
    maps = [module for module in model.modules() if type(module) is nn.Linear and _can_pack(module)]
    return maps if sum(each.weight.nbytes for each in maps) <= _MOST_BYTES else []


def _can_pack(linear: nn.Linear) -> bool:
    weight, placed = linear.weight, linear.__dict__.get("forward")
    # A forward that something else has put in place, such as a hook that offloads, is left to it. Copies of a model
    # that was inside a block carry ours, or where they were pickled, the class's.
    ours = placed is None or getattr(placed, "__func__", None) in (forward, nn.Linear.forward)
    plain = weight.layout is torch.strided and weight.is_contiguous() and weight.numel() > 0
    return ours and plain and weight.device.type == "cpu" and weight.dtype is torch.float32


@functools.cache
def _kernels() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """What packs a weight and what multiplies with it, where this build of torch has both."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight.default, torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


def _pack(linear: nn.Linear) -> None:
    """Pack a weight, unless it is packed and has not changed."""
    weight = linear.weight.detach()
    # What writes to `weight.data` leaves no trace but in the bits. Sums one way alone miss signs that turn in pairs or
    # places that change. The wider type is the faster.
    bits = weight.view(torch.int64 if weight.shape[1] % 2 == 0 else torch.int32)
    digest = torch.cat([bits.sum(0), bits.sum(1)])
    known = _packs.get(linear)
    if known is None or not torch.equal(known.digest, digest):
        kernels = _kernels()
        assert kernels is not None
        _packs[linear] = _Pack(kernels[0](weight, _ROWS), digest)


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward of a map inside a block; it bears the name of what it stands for, by which models are pickled."""
    pack = _packs.get(self)
    few = _FEW <= input.numel() // max(input.shape[-1], 1) <= _MANY
    exact = input.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    kernels = _kernels()
    if pack is None or kernels is None or not few or not exact or torch.is_grad_enabled():
        return F.linear(input, self.weight, self.bias)
    return kernels[1](input, pack.weight, self.bias, "none", [], "")


def _pay(maps: Sequence[nn.Linear]) -> bool:
    """Whether packing makes the maps faster here, timed on the first of them in turns."""
    timed, nbytes = [], 0
    for each in maps:
        timed.append(each)
        nbytes += each.weight.nbytes
        if nbytes >= _TIMED_BYTES:
            break
    for each in timed:
        _pack(each)
    inputs = [each.weight.new_ones(_ROWS, each.in_features) for each in timed]
    seconds: dict[Callable[..., Tensor], list[float]] = {nn.Linear.forward: [], forward: []}
    with torch.no_grad():
        for _ in range(1 + _ROUNDS):  # the first pays for allocations
            for multiply, times in seconds.items():
                start = time.perf_counter()
                for each, rows in zip(timed, inputs, strict=True):
                    multiply(each, rows)
                times.append(time.perf_counter() - start)
    usual, ours = (statistics.median(times[1:]) for times in seconds.values())
    if ours < usual:
        return True
    for each in timed:
        del _packs[each]
    return False

"""Which model is it? A hash that its copies in other precisions share, for what is trained for one model alone."""

from __future__ import annotations

import hashlib
import threading
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# A sample of the weights: entries of each of so many tensors, and how far they may be apart. float16 and bfloat16 round
# to 2**-11 and 2**-9 of a number, and float16 no number to less than 2**-25.
_TENSORS, _ENTRIES, _APART, _LEAST = 16, 4, 2**-8, 2**-24
_lock = threading.RLock()
_hashes: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], str]] = weakref.WeakKeyDictionary()


def rounded_hash(model: PreTrainedModel) -> str:
    """Twelve hexadecimal digits that depend on the weights as bfloat16 rounds them, so that they are those of the same
    model in float32 and float64 too; taken anew where weights were written to."""
    weights = sorted(model.state_dict().items())
    state = [(name, tensor.data_ptr(), tensor._version) for name, tensor in weights]
    with _lock:
        known = _hashes.get(model)
        if known is None or known[0] != state:
            digest = hashlib.sha256()
            for name, tensor in weights:
                digest.update(name.encode())
                rounded = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
                digest.update(rounded.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            known = _hashes[model] = (state, digest.hexdigest()[:12])
        return known[1]


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Class, name and weights of a model, as what is trained for it remembers them."""
    return {
        "class": type(model).__name__, "name": str(model.name_or_path), "weights": rounded_hash(model),
        "sample": _sample(model),
    }  # fmt: skip


def is_described(note: dict[str, Any], model: PreTrainedModel) -> bool:
    """Whether a model is the one that :func:`describe` noted. What float16 rounds, bfloat16 would have rounded
    otherwise, so of a model in it a sample of the weights is compared, within what both round; the class alone where
    an older note has no sample."""
    if note["class"] != type(model).__name__:
        return False
    if model.dtype != torch.float16:
        return note["weights"] == rounded_hash(model)
    known, own = note.get("sample"), _sample(model)
    return known is None or (
        len(known) == len(own) and torch.allclose(torch.tensor(own), torch.tensor(known), rtol=_APART, atol=_LEAST)
    )


def _sample(model: PreTrainedModel) -> list[float]:
    """Evenly spaced entries of evenly spaced weights, in the order of their names."""
    weights = [tensor for _, tensor in sorted(model.state_dict().items()) if tensor.is_floating_point()]
    found: list[float] = []
    for tensor in weights[:: max(1, len(weights) // _TENSORS)]:
        flat = tensor.detach().flatten()
        count, last = min(_ENTRIES, flat.numel()), flat.numel() - 1
        places = [number * last // max(1, count - 1) for number in range(count)]
        found += flat[places].float().tolist()
    return found

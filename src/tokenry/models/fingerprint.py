"""Which model is it? A hash that its copies in other precisions share, for what is trained for one model alone."""

from __future__ import annotations

import hashlib
import threading
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

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
    return {"class": type(model).__name__, "name": str(model.name_or_path), "weights": rounded_hash(model)}


def is_described(note: dict[str, Any], model: PreTrainedModel) -> bool:
    """Whether a model is the one that :func:`describe` noted. What float16 rounds, bfloat16 would have rounded
    otherwise, so of a model in it the class alone is compared."""
    if note["class"] != type(model).__name__:
        return False
    return model.dtype == torch.float16 or note["weights"] == rounded_hash(model)

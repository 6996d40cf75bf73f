"""What is trained beside a frozen model: mask embeddings, LoRA behind a gate, and the sampler."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenry.errors import ResourceError, UnsupportedModel
from tokenry.models import anatomy
from tokenry.models.fingerprint import describe, is_described

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
_SCHEMA = 1


class Sampler(nn.Module):
    """Makes drafts coherent: from the token before and a mask's hidden state to the hidden state of the draft.

    Two blocks of a linear map, SiLU and LayerNorm, the first over both inputs (section 3.2 of the paper). Their result
    is added to the mask's state with a factor per channel that starts at zero, so that training starts from what the
    mask says by itself (an addition).
    """

    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(embedding + hidden, hidden), nn.Linear(hidden, hidden)
        self.norm, self.last_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        nn.init.zeros_(self.last_norm.weight)

    def forward(self, before: Tensor, state: Tensor) -> Tensor:
        """States `[..., hidden]` for the head, from embeddings of the tokens before `[..., embedding]` and states."""
        inner = self.norm(F.silu(self.first(torch.cat([before, state], -1))))
        return state + self.last_norm(F.silu(self.second(inner)))


class Adapters(nn.Module):
    """Mask embeddings, a LoRA pair for every linear map of the decoder's layers, and the sampler, for one base model.

    Maps inside a nested list of modules (experts) are left alone, since they may be fed a selection of the rows.

    Args:
        model: The base model; nothing of it is changed or kept.
        k: Mask tokens.
        r: Rank of the LoRA pairs.
        alpha: Their scale is `alpha / r`.

    Attributes:
        masks: Input embeddings of the masks `[k, embedding]`.
        targets: Names of the adapted maps in the model; `down[i]` `[r, in]` and `up[i]` `[out, r]` are the i-th's.
        note: What `adapter.json` says of them, base model and training included; empty before they are loaded.

    Raises:
        UnsupportedModel: A layer of the model has no linear map.
    """

    def __init__(self, model: PreTrainedModel, k: int, r: int, alpha: float) -> None:
        super().__init__()
        self.k, self.r, self.alpha = k, r, alpha
        self.note: dict[str, Any] = {}
        found = _maps(model)
        self.targets = list(found)
        parts = anatomy(model)
        device = model.device
        with torch.no_grad():
            some: Tensor = parts.embedding(torch.arange(min(256, _vocabulary(model)), device=device)).float()
        # As large as the embeddings that the layers know.
        noise = torch.randn(k, some.shape[-1], device=device)
        self.masks = nn.Parameter(some.mean(0) + some.std() * noise)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for module in found.values():
            rows, columns = _sizes(module)
            self.down.append(nn.Parameter(torch.randn(r, columns, device=device) / columns**0.5))
            self.up.append(nn.Parameter(torch.zeros(rows, r, device=device)))
        self.sampler = Sampler(some.shape[-1], head_width(model)).to(device)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that these adapters do not fit.

        Raises:
            ResourceError: It has other maps, or maps of other sizes, or is on another device.
        """
        found = _maps(model)
        own = [(up.shape[0], down.shape[1]) for up, down in zip(self.up, self.down, strict=True)]
        if list(found) != self.targets or list(map(_sizes, found.values())) != own:
            raise ResourceError(
                f"the adapters do not fit {type(model).__name__}: they were trained for another model; train its own "
                f"by tokenry train mtp --model {model.name_or_path or 'MODEL'}"
            )
        if self.masks.device != model.device:
            raise ResourceError(
                f"the adapters are on {self.masks.device} and the model on {model.device}; move them there"
            )

    def add(self, index: int, x: Tensor, output: Tensor, first: int, rows: int) -> None:
        """Add what the i-th pair gives for rows from `first` on to a map's output, in place.

        Args:
            index: Which pair.
            x: What the map was fed, `[batch, rows, in]` or `[batch * rows, in]`.
            output: What it gave, likewise with `out`.
            first: First row behind the open gate.
            rows: Rows of the forward.
        """
        if x.shape[1] != rows if x.ndim == 3 else x.shape[0] % rows:
            raise UnsupportedModel(
                f"the map {self.targets[index]} was fed {list(x.shape)}, not the {rows} rows of the forward: LoRA "
                "behind a gate serves maps that see every token in order"
            )
        inside = x.reshape(-1, rows, x.shape[-1])[:, first:]
        down, up = self.down[index].to(x.dtype), self.up[index].to(x.dtype)
        delta = F.linear(F.linear(inside, down), up) * (self.alpha / self.r)
        into = output if output.ndim == 3 else output.view(-1, rows, output.shape[-1])
        into[:, first:] += delta.to(output.dtype)

    def draft(self, model: PreTrainedModel, anchor: Tensor, states: Tensor) -> Tensor:
        """Draft `[batch, n]` tokens behind anchors `[batch]` from the states of their masks `[batch, n, hidden]`."""
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert embed is not None and head is not None
        own = self.masks.dtype
        drafts = [anchor]
        for state in states.unbind(1):
            found = self.sampler(embed(drafts[-1]).to(own), state.to(own))
            drafts.append(head(found.to(states.dtype)).argmax(-1))
        return torch.stack(drafts[1:], 1)

    def save(self, folder: str | Path, base: PreTrainedModel, **about: Any) -> None:
        """Write `adapter.safetensors` and `adapter.json`, which names the base model and hashes its weights."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().float().cpu().contiguous() for n, t in self.state_dict().items()}, folder / WEIGHTS)
        note = {
            "schema_version": _SCHEMA, "kind": "gated-lora-mtp", "k": self.k, "r": self.r, "alpha": self.alpha,
            "targets": self.targets, "base": describe(base), **about,
        }  # fmt: skip
        (folder / ABOUT).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel) -> Adapters:
        """Read adapters for a model, in its dtype and on its device; each folder is read once.

        Raises:
            ResourceError: There are none, or they were trained for another model.
        """
        place = Path(folder).expanduser()
        try:
            note = json.loads((place / ABOUT).read_text(encoding="utf-8"))
            changed = (place / WEIGHTS).stat().st_mtime_ns
        except (OSError, ValueError) as error:
            raise ResourceError(f"no gated-LoRA adapters in {str(folder)!r}: {error}") from error
        if note.get("kind") != "gated-lora-mtp" or note.get("schema_version") != _SCHEMA:
            raise ResourceError(f"{str(place / ABOUT)!r} does not describe gated-LoRA adapters of this version")
        _check_base(place, note, model)
        key = (str(place.resolve()), changed, model.dtype, model.device)
        with _lock:
            if key not in _loaded:
                _loaded[key] = cls._read(place, note, model)
                while len(_loaded) > _KEPT:
                    del _loaded[next(iter(_loaded))]
            return _loaded[key]

    @classmethod
    def _read(cls, place: Path, note: dict[str, Any], model: PreTrainedModel) -> Adapters:
        adapters = cls(model, note["k"], note["r"], note["alpha"])
        adapters.note = note
        try:
            if adapters.targets != note["targets"]:
                raise ValueError("they adapt other maps than the model has")
            adapters.load_state_dict(load_file(place / WEIGHTS))
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise ResourceError(f"the adapters in {str(place)!r} do not fit {type(model).__name__}: {error}") from error
        return adapters.to(model.device, model.dtype).eval().requires_grad_(False)


_KEPT = 4
_loaded: dict[tuple[str, int, torch.dtype, torch.device], Adapters] = {}
_lock = threading.RLock()


# --- the gate -----------------------------------------------------------------------------------
# Masks stand behind all real tokens of a forward, so the gate of the paper, 1 at masks and 0 at real tokens, is a range
# of rows. It belongs to a thread's context; the hooks that read it are on the modules, which threads share.


@dataclass(frozen=True)
class _Gate:
    adapters: Adapters
    first: int
    rows: int


_gate: ContextVar[_Gate | None] = ContextVar("tokenry_gate", default=None)
# For every adapters in use, the models whose maps carry hooks for them: how many blocks are open, and the hooks.
_hooks: weakref.WeakKeyDictionary[Adapters, dict[int, list[Any]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def gated(model: PreTrainedModel, adapters: Adapters, first: int, rows: int) -> Iterator[None]:
    """Forwards of `model` in this block and thread apply LoRA to rows from `first` on, of `rows`.

    Rows before them, other threads and forwards outside run the base model's own arithmetic, to the bit.
    """
    _hold(model, adapters)
    token = _gate.set(_Gate(adapters, first, rows))
    try:
        yield
    finally:
        _gate.reset(token)
        _release(model, adapters)


def _hold(model: PreTrainedModel, adapters: Adapters) -> None:
    with _lock:
        held = _hooks.setdefault(adapters, {})
        if id(model) not in held:
            reference = weakref.ref(adapters)
            # All are looked up before the first is hooked: nothing stays behind where one is missing.
            modules = [model.get_submodule(name) for name in adapters.targets]
            hooks = [
                module.register_forward_hook(functools.partial(_open, reference, index))
                for index, module in enumerate(modules)
            ]
            held[id(model)] = [0, hooks]
        held[id(model)][0] += 1


def _release(model: PreTrainedModel, adapters: Adapters) -> None:
    with _lock:
        held = _hooks[adapters]
        held[id(model)][0] -= 1
        if held[id(model)][0] == 0:
            for hook in held.pop(id(model))[1]:
                hook.remove()


def _open(
    reference: weakref.ref[Adapters], index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    gate = _gate.get()
    if gate is not None and gate.adapters is reference():
        gate.adapters.add(index, args[0], output, gate.first, gate.rows)


# --- the base model -----------------------------------------------------------------------------


def _maps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear maps of the decoder's layers, by their names in the model."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for layer in anatomy(model).layers:
        before = len(found)
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and not any(part.isdigit() for part in name.split(".")):
                found[names[module]] = module
        if len(found) == before:
            raise UnsupportedModel(f"{type(model).__name__}: the layer {names[layer]} has no linear map to adapt")
    return found


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear map."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def head_width(model: PreTrainedModel) -> int:
    """Size of the hidden states that the head reads."""
    return _sizes(anatomy(model).head)[1]


def _vocabulary(model: PreTrainedModel) -> int:
    weight: Any = anatomy(model).embedding.weight
    return weight.shape[0]


def _check_base(place: Path, note: dict[str, Any], model: PreTrainedModel) -> None:
    base = note["base"]
    if not is_described(base, model):
        raise ResourceError(
            f"the adapters in {str(place)!r} were trained for {base['class']} {base['name']!r}, and this "
            f"{type(model).__name__} ({str(model.name_or_path)!r}) has other weights: train its own by "
            f"tokenry train mtp --model {model.name_or_path or 'MODEL'}"
        )

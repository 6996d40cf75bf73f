"""An auxiliary model, and the linear maps from what it remembers of a text to what the base model would."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenry.errors import BadParameter, PromptTooLong, ResourceError, UnsupportedModel
from tokenry.kvcache.kv_prediction.projections import Pair, Placement, remember, sources
from tokenry.models import TokenCache, anatomy, attached, context_length, loaded_name
from tokenry.models.anatomy import text_config
from tokenry.models.fingerprint import describe, is_described

MAPS, ABOUT, AUXILIARY = "predictor.safetensors", "predictor.json", "auxiliary"
_KIND, _SCHEMA = "kv-prediction", 1


def contiguous_map(auxiliary: int, base: int) -> tuple[int, ...]:
    """Which of ``auxiliary`` layers feeds each of ``base`` layers: in order, the first ones one layer more where the
    numbers do not divide (the paper's released configurations)."""
    share, more = divmod(base, auxiliary)
    counts = [share + (layer < more) for layer in range(auxiliary)]
    return tuple(layer for layer, count in enumerate(counts) for _ in range(count))


def retained_layers(count: int, share: float) -> tuple[int, ...]:
    """The layers of a model that its pruned copy retains: all but every fourth at 0.75, every second at 0.5, every
    fourth at 0.25, the first one always."""
    # Rounded, because a share in binary can lie just above the number that is meant.
    before = [math.ceil(round(layer * share, 6)) for layer in range(count + 1)]
    return tuple(layer for layer in range(count) if before[layer + 1] > before[layer] or layer == 0)


def pruned(model: PreTrainedModel, share: float) -> tuple[PreTrainedModel, tuple[int, ...]]:
    """A copy of some of a model's layers, with the embeddings and the head, and which layers those are.

    Args:
        model: The model.
        share: Of its layers.

    Raises:
        UnsupportedModel: The copy cannot be made: it is built by another plan than the model.
    """
    layers = anatomy(model).layers
    kept = retained_layers(len(layers), share)
    config = copy.deepcopy(model.config)
    settings = text_config(model) if config is model.config else config.get_text_config(decoder=True)
    # What the configuration says for each layer is said for those that stay.
    for name, value in vars(settings).items():
        if isinstance(value, list | tuple) and len(value) == len(layers):
            setattr(settings, name, [value[layer] for layer in kept])
    settings.num_hidden_layers = len(kept)
    stack = next(name for name, module in model.named_modules() if module is layers[0]).rpartition(".")[0] + "."
    names = {f"{stack}{old}.": f"{stack}{new}." for new, old in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(stack):
            number = name.removeprefix(stack).partition(".")[0]
            if f"{stack}{number}." not in names:
                continue
            name = names[f"{stack}{number}."] + name.removeprefix(f"{stack}{number}.")
        state[name] = tensor
    copied: Any = type(model)._from_config(config)
    try:
        copied.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().split("\n")[0]
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be pruned to layers {', '.join(map(str, kept))} ({first}): name a smaller "
            "model of the same tokenizer as the auxiliary model"
        ) from error
    copied.generation_config = copy.deepcopy(model.generation_config)
    return copied.to(model.device, model.dtype).eval(), kept


class CacheMaps(nn.Module):
    """For every layer of the base model a linear map to its keys and one to its values, with bias, from those of one
    layer of the auxiliary model, all before norms and rotary positions (section 3.2 of the paper).

    Args:
        base: The base model.
        auxiliary: The auxiliary model.
        layer_map: The auxiliary layer of each base layer.
        same: Base layers whose auxiliary layer began as their own copy: their maps begin as the identity (an addition).
    """

    def __init__(
        self, base: PreTrainedModel, auxiliary: PreTrainedModel, layer_map: Sequence[int], same: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.layer_map = tuple(layer_map)
        width, wide = (parts.kv_heads * parts.head_dim for parts in (anatomy(auxiliary), anatomy(base)))
        self.keys = nn.ModuleList(nn.Linear(width, wide) for _ in self.layer_map)
        self.values = nn.ModuleList(nn.Linear(width, wide) for _ in self.layer_map)
        for layer in same:
            for linear in (self.keys[layer], self.values[layer]):
                nn.init.eye_(linear.weight)  # type: ignore[arg-type]
                nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Keys and values of each base layer from those of each auxiliary layer, ``[batch, length, width]``."""
        return [
            (key(pairs[source][0]), value(pairs[source][1]))
            for source, key, value in zip(self.layer_map, self.keys, self.values, strict=True)
        ]


@dataclass(frozen=True)
class Operations:
    """Multiplications of a number by a number before the first token: in the linear maps of the layers, in attention
    and in one row of the head.

    Attributes:
        auxiliary: Of the auxiliary model, which reads the prompt but its last token up to its last keys and values.
        maps: Of the linear maps.
        base: Of the base model on the last token.
        full: Of the base model on the whole prompt, as it is without prediction.
    """

    auxiliary: int
    maps: int
    base: int
    full: int

    @property
    def share(self) -> float:
        """What is computed, as a share of what would be computed without prediction."""
        return (self.auxiliary + self.maps + self.base) / self.full


class KVPredictor:
    """What KV Prediction needs beside a base model.

    Args:
        base: The base model, which is neither changed nor kept.
        auxiliary: A model of the same tokenizer that reads prompts in its place.
        layer_map: The auxiliary layer that feeds each base layer; None: contiguous, in order.
        maps: The linear maps, trained; None: new ones.

    Raises:
        ResourceError: The auxiliary model does not fit the base.
        UnsupportedModel: Keys and values of one of them cannot be read or predicted.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        auxiliary: PreTrainedModel,
        layer_map: Sequence[int] | None = None,
        maps: CacheMaps | None = None,
    ) -> None:
        check_pair(base, auxiliary)
        if layer_map is None:
            layer_map = contiguous_map(len(anatomy(auxiliary).layers), len(anatomy(base).layers))
        check_map(base, auxiliary, layer_map)
        self.auxiliary = auxiliary
        self.maps = CacheMaps(base, auxiliary, layer_map).to(base.device, base.dtype) if maps is None else maps
        self.placement = Placement(base)
        self.note: dict[str, Any] = {}

    def predict(self, input_ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> list[Pair]:
        """Keys and values of a text as the base model would cache them, ``[batch, kv_heads, length, head_dim]`` for
        each layer.

        Args:
            input_ids: ``[batch, length]``.
            mask: ``[batch, length]``, 0 for left padding; None: all real.
            position_ids: ``[batch, length]``; None: columns.

        Raises:
            PromptTooLong: The text is longer than the auxiliary model's context.
        """
        longest = context_length(self.auxiliary)
        if longest is not None and input_ids.shape[1] > longest:
            raise PromptTooLong(
                f"the prompt has {input_ids.shape[1]} tokens before its last, and the auxiliary model of "
                f"{_KIND} reads {longest}: shorten the prompt, or train with an auxiliary model of longer context"
            )
        given = {"attention_mask": mask, "position_ids": position_ids}
        inputs: dict[str, Any] = {name: tensor for name, tensor in given.items() if tensor is not None}
        # On Tokenry's attention, where padding in a sliding window makes no tokens that are not numbers.
        with attached(self.auxiliary):
            cache = TokenCache(self.auxiliary)
            pairs, _ = remember(self.auxiliary, input_ids=input_ids, past_key_values=cache, use_cache=True, **inputs)
        predicted = self.maps(pairs)
        if mask is not None:
            # What stands at padding is hidden, but must be a number.
            hidden = mask[:, :, None] == 0
            predicted = [tuple(part.masked_fill(hidden, 0) for part in pair) for pair in predicted]
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.placement.placed(predicted, position_ids)

    def operations(self, base: PreTrainedModel, length: int) -> Operations:
        """What a prompt of ``length`` tokens costs before its first token."""
        read = length - 1
        layers = anatomy(self.auxiliary).layers
        last = {source.module for pair in sources(self.auxiliary)[-1:] for source in pair}
        queries = getattr(anatomy(self.auxiliary).attention[-1], "q_proj", None)
        last |= {queries} if isinstance(queries, nn.Module) else set()
        auxiliary = read * (_weights(layers[:-1]) + sum(_weight(module) for module in last))
        auxiliary += _attention(self.auxiliary, read, read, layers=len(layers) - 1)
        maps = read * _weights([self.maps])
        whole = anatomy(base)
        head = _weight(whole.head)
        every = _weights(whole.layers)
        return Operations(
            auxiliary=auxiliary,
            maps=maps,
            base=every + _attention(base, length, 1) + head,
            full=length * every + _attention(base, length, length) + head,
        )

    def serve(self, base: PreTrainedModel) -> None:
        """Let :class:`KVPrediction` use this for ``base`` where it names no folder, as long as the model lives.

        Raises:
            ResourceError: It is in another dtype or on another device than the model.
        """
        own, wanted = (self.auxiliary.dtype, self.auxiliary.device), (base.dtype, base.device)
        if own != wanted:
            raise ResourceError(
                f"the predictor of {_KIND} is in {own[0]} on {own[1]} and the model in {wanted[0]} on {wanted[1]}: "
                "bring its auxiliary model and maps there with .to(...)"
            )
        _served[base] = self

    def save(self, folder: str | Path, base: PreTrainedModel, **about: Any) -> None:
        """Write the auxiliary model (a model folder), the maps and a note that names the base model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.auxiliary.save_pretrained(folder / AUXILIARY)
        save_file({n: t.detach().cpu().contiguous() for n, t in self.maps.state_dict().items()}, folder / MAPS)
        note = {
            "schema_version": _SCHEMA, "kind": _KIND, "layer_map": list(self.maps.layer_map), "base": describe(base),
            **about,
        }  # fmt: skip
        (folder / ABOUT).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, base: PreTrainedModel) -> KVPredictor:
        """Read what ``save`` wrote, in the base model's dtype and on its device; each folder is read once.

        Raises:
            ResourceError: There is nothing, or it was trained for another model.
        """
        place = Path(folder).expanduser()
        try:
            note = json.loads((place / ABOUT).read_text(encoding="utf-8"))
            changed = (place / MAPS).stat().st_mtime_ns
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"no predictor of {_KIND} in {str(folder)!r} ({error}): make one by tokenry train {_KIND}"
            ) from error
        if not isinstance(note, dict) or note.get("kind") != _KIND or note.get("schema_version") != _SCHEMA:
            raise ResourceError(f"{str(place / ABOUT)!r} does not describe a predictor of this version")
        _check_note(place / ABOUT, note)
        if not is_described(note["base"], base):
            named = loaded_name(base) or "MODEL"
            raise ResourceError(
                f"the predictor in {str(place)!r} was trained for {note['base']['class']} {note['base']['name']!r}, "
                f"and this {type(base).__name__} ({named!r}) has other weights: train its own by tokenry train {_KIND} "
                f"--model {named}"
            )
        key = (str(place.resolve()), changed, base.dtype, base.device)
        with _lock:
            if key not in _loaded:
                _loaded[key] = cls._read(place, note, base)
                while len(_loaded) > _KEPT:
                    del _loaded[next(iter(_loaded))]
            return _loaded[key]

    @classmethod
    def _read(cls, place: Path, note: dict[str, Any], base: PreTrainedModel) -> KVPredictor:
        try:
            auxiliary: Any = AutoModelForCausalLM.from_pretrained(place / AUXILIARY, dtype=base.dtype)
            auxiliary.to(base.device)
            maps = CacheMaps(base, auxiliary, note["layer_map"])
            maps.load_state_dict(load_file(place / MAPS))
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise ResourceError(
                f"the predictor in {str(place)!r} does not fit {type(base).__name__}: {error}"
            ) from error
        maps.to(base.device, base.dtype).requires_grad_(False)
        found = cls(base, auxiliary.eval().requires_grad_(False), note["layer_map"], maps)
        found.note = note
        return found


def _check_note(file: Path, note: dict[str, Any]) -> None:
    """Refuse a note that does not say what is read from it."""
    base, layer_map = note.get("base"), note.get("layer_map")
    if isinstance(base, dict):
        lacking = [f"base.{name}" for name in ("class", "name", "weights") if name not in base]
    else:
        lacking = ["base"]
    if not isinstance(layer_map, list) or not all(isinstance(layer, int) for layer in layer_map):
        lacking.append("layer_map")
    if lacking:
        raise ResourceError(
            f"{str(file)!r} lacks {', '.join(lacking)}: make the predictor anew by tokenry train {_KIND}"
        )


def served(base: PreTrainedModel) -> KVPredictor | None:
    """The predictor that was handed over for a model by :meth:`KVPredictor.serve`."""
    return _served.get(base)


@contextlib.contextmanager
def handed_over(base: PreTrainedModel, predictor: KVPredictor) -> Iterator[None]:
    """Inside the block a model is served by a predictor, and behind it by the one before."""
    before = served(base)
    predictor.serve(base)
    try:
        yield
    finally:
        del _served[base]
        if before is not None:
            _served[base] = before


_KEPT = 4
_loaded: dict[tuple[str, int, torch.dtype, torch.device], KVPredictor] = {}
_served: weakref.WeakKeyDictionary[PreTrainedModel, KVPredictor] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def check_pair(base: PreTrainedModel, auxiliary: PreTrainedModel) -> None:
    """Refuse an auxiliary model that cannot read a base model's prompts.

    Raises:
        ResourceError: It is the base model itself, on another device, or of another vocabulary.
    """
    if auxiliary is base:
        raise ResourceError(f"the auxiliary model of {_KIND} is the base model itself: give a smaller one, or a copy")
    if auxiliary.device != base.device:
        raise ResourceError(
            f"the auxiliary model of {_KIND} is on {auxiliary.device} and the model on {base.device}; move it there"
        )
    mine, its = (int(text_config(each).vocab_size) for each in (base, auxiliary))
    if mine != its:
        raise ResourceError(
            f"the auxiliary model of {_KIND} has {its} tokens in its vocabulary and the model {mine}: both must share "
            "one tokenizer; where they differ in padding alone, call auxiliary.resize_token_embeddings"
            f"({mine}) and save it"
        )


def check_map(base: PreTrainedModel, auxiliary: PreTrainedModel, layer_map: Sequence[int]) -> None:
    """Refuse a layer map that does not name an auxiliary layer for each base layer."""
    wanted, there = len(anatomy(base).layers), len(anatomy(auxiliary).layers)
    if len(layer_map) != wanted or not all(0 <= layer < there for layer in layer_map):
        raise BadParameter(
            f"layer_map={tuple(layer_map)} is not allowed; it must name one of the auxiliary model's layers 0 to "
            f"{there - 1} for each of the model's {wanted} layers"
        )


# --- counting -----------------------------------------------------------------------------------


def _weight(module: nn.Module) -> int:
    return sum(part.numel() for part in module.parameters(recurse=False) if part.ndim == 2)


def _weights(modules: Sequence[nn.Module]) -> int:
    """Numbers in the linear maps, each of which a token is multiplied by."""
    linear = (part for module in modules for part in module.modules() if isinstance(part, nn.Linear | Conv1D))
    return sum(_weight(part) for part in linear)


def _attention(model: PreTrainedModel, length: int, rows: int, layers: int | None = None) -> int:
    """Products of the last ``rows`` queries of ``length`` tokens with keys, and of weights with values."""
    parts = anatomy(model)
    pairs = 0
    for window in parts.windows[:layers]:
        span = length if window is None else min(window, length)
        # Query t sees min(t, span) tokens.
        short = max(0, span - (length - rows))
        first = length - rows + 1
        pairs += sum(range(first, first + short)) + (rows - short) * span
    return 2 * parts.heads * parts.head_dim * pairs

"""The parts of a decoder that methods ask for, found on any decoder of transformers or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tokenry.errors import UnsupportedModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a decoder are.

    Attributes:
        layers: The decoder layers in order.
        attention: The self-attention module of each layer.
        embedding: Input embedding.
        head: Output projection to the vocabulary.
        rotary: Rotary embedding module, or None where positions are learned or absent.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Size of one head.
        windows: For each layer the sliding window in tokens, or None for full attention.
        context: Longest sequence the model was built for, or None where the configuration does not say.
    """

    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    embedding: nn.Module
    head: nn.Module
    rotary: nn.Module | None
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    context: int | None


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the text decoder (of the whole model, where it is one)."""
    return model.config.get_text_config(decoder=True)


def windows(config: Any, count: int) -> tuple[int | None, ...]:
    """The sliding window of each layer.

    Raises:
        UnsupportedModel: A layer is neither full nor sliding-window attention (recurrent, linear, chunked).
    """
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        return (window,) * count
    other = sorted(set(types) - _LAYER_TYPES)
    if other:
        raise UnsupportedModel(
            f"{config.model_type} has layers of the kind {', '.join(other)}: Tokenry's cache serves full and "
            "sliding-window attention layers only; use a decoder whose layers are all of these kinds"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was built for in tokens, or None where its configuration does not say."""
    config = text_config(model)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def check_decoder(model: PreTrainedModel) -> None:
    """Refuse what is not a decoder-only model with attention in every layer.

    Raises:
        UnsupportedModel: With the model's class and what is missing.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder model: Tokenry serves decoder-only models")
    config = text_config(model)
    if getattr(config, "num_hidden_layers", None) is None or getattr(config, "num_attention_heads", None) is None:
        raise UnsupportedModel(
            f"{name} has no attention layers that a key-value cache could serve (a recurrent model?)"
        )
    windows(config, config.num_hidden_layers)


def check_plain(model: PreTrainedModel) -> None:
    """Refuse models in forms that Tokenry's attention has not been tested in.

    Raises:
        UnsupportedModel: The model is split over devices, quantised, compiled or carries adapters.
    """
    name = type(model).__name__
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise UnsupportedModel(f"{name} is split over several devices: load it onto one, without device_map")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(f"{name} is quantised: load its weights in float32, bfloat16 or float16")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel(f"{name} is compiled: pass the model as it was before torch.compile")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel(f"{name} carries adapters: merge them first (merge_and_unload)")


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a decoder.

    Raises:
        UnsupportedModel: A part is missing; the message names it.
    """
    check_decoder(model)
    name = type(model).__name__
    config = text_config(model)
    count = config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    attention: tuple[nn.Module, ...] = ()
    layers: tuple[nn.Module, ...] = ()
    for stack in stacks:
        found = tuple(
            next((m for m in layer.modules() if hasattr(m, "layer_idx") and _is_attention(m)), None) for layer in stack
        )
        if all(module is not None for module in found):
            layers, attention = tuple(stack), found  # type: ignore[assignment]
            break
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for part, value in (
        ("decoder layers with attention", layers),
        ("input embedding", embedding),
        ("head", head),
    ):
        if value is None or value == ():
            raise UnsupportedModel(f"{name}: found no {part}; Tokenry serves decoder-only models of transformers")
    heads = config.num_attention_heads
    return Anatomy(
        layers=layers,
        attention=attention,
        embedding=embedding,
        head=head,
        rotary=next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        windows=windows(config, count),
        context=context_length(model),
    )


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()

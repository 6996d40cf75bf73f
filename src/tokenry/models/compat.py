"""The private corners of transformers that Tokenry stands on, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

NAME = "tokenry"
"""Name under which the attention function stands in both registries of transformers."""


def register(attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register the attention function and its mask function; a name missing in either would drop the mask silently."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention_function(name: str) -> Callable[..., Any] | None:
    """The attention function registered under ``name``; eager attention is each model's own and is not registered."""
    return AttentionInterface._global_mapping.get(name)


def mask_function(name: str) -> Callable[..., Any] | None:
    """The mask function registered under ``name``."""
    return AttentionMaskInterface._global_mapping.get(name)  # type: ignore[return-value]


def implementation(model: PreTrainedModel) -> str:
    """The attention implementation the model runs on at present."""
    return model.config._attn_implementation or "eager"


def settings(model: PreTrainedModel) -> list[tuple[Any, str]]:
    """The configuration of the model and of each model inside it, with the attention implementation it names."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs[id(module.config)] = module.config
            for name in module.config.sub_configs:
                part = getattr(module.config, name, None)
                if part is not None:
                    configs[id(part)] = part
    return [(config, config._attn_implementation) for config in configs.values()]


def restore(found: list[tuple[Any, str]]) -> None:
    """Put back what :func:`settings` found; the public setter would give every part the same."""
    for config, name in found:
        config._attn_implementation_internal = name


def can_switch(model: PreTrainedModel) -> bool:
    """Whether the model's code asks the registry for its attention; others ignore a switch with only a warning."""
    return bool(model._can_set_attn_implementation())


def dynamic_layers(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of a dense ``DynamicCache``, each ``[batch, kv_heads, length, head_dim]``."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr,misc]


def is_callers(cache: object) -> bool:
    """Whether `generate` was given the cache by its caller, who then keeps it."""
    return bool(getattr(cache, "_is_user_defined", False))


def filled(config: Any, tensors: list[tuple[torch.Tensor, torch.Tensor]], length: int) -> DynamicCache:
    """A ``DynamicCache`` that holds keys and values and has seen ``length`` columns."""
    cache = DynamicCache(config=config)
    for layer, (keys, values) in zip(cache.layers, tensors, strict=True):
        layer.lazy_initialization(keys, values)  # type: ignore[union-attr]
        layer.keys, layer.values = keys, values  # type: ignore[union-attr]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    return cache

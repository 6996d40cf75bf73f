"""Where a forward enters the layers with a prompt that is cached already but for its last token."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tokenry.models.anatomy import anatomy
from tokenry.models.current import current


def entrance(model: PreTrainedModel) -> RemovableHandle:
    """A hook before the first layer, ahead of those that cut a layer's arguments to the rows that run.

    The model must see its cache empty until then: it counts positions from what the cache holds.
    """
    return anatomy(model).layers[0].register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)


def _enter(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = current()
    if cache is None or cache.foretold is None:
        return None
    rows = cache.begin()
    if args:
        return (rows.taken(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": rows.taken(kwargs["hidden_states"])}

"""Which tokens the later layers of a forward run for, where a policy does not pass all of them on.

Hooks around the decoder layers hand on the rows that the policy chose, give each layer the positions of its own rows,
and put what comes out of the last layer back into the columns of the forward. What they act on is in the cache of the
forward, so threads, and caches of one model, do not meet.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tokenry.errors import UnsupportedModel
from tokenry.models.anatomy import anatomy, text_config
from tokenry.models.slots import Block

if TYPE_CHECKING:
    from tokenry.models.cache import TokenCache


class Rows:
    """The rows that the layers behind some layer run for, in the order of time.

    Attributes:
        index: Where each stood among the rows before, ``[batch, rows]``.
        columns: Its column in the forward, ``[batch, rows]``, negative where its token is of an earlier forward.
        block: What the layers are told of them: which are real and at which positions.
    """

    def __init__(self, index: Tensor, columns: Tensor, positions: Tensor, valid: Tensor | None) -> None:
        self.index, self.columns = index, columns
        self.block = Block(index.shape[1], valid, None, False)
        self.block.positions, self.block.apart = positions, True

    @classmethod
    def chosen(cls, cache: TokenCache, chosen: Tensor, positions: Tensor) -> Rows:
        """The rows that a policy marks among those that run, bool ``[batch, rows]``; batch rows with fewer than the
        most get padding in front.

        Args:
            cache: The cache of the forward.
            chosen: Which go on.
            positions: The position of every row that runs, ``[batch, rows]``.
        """
        most = int(chosen.sum(-1).max())
        index = chosen.byte().argsort(dim=-1, stable=True)[:, -most:]
        valid: Tensor | None = chosen.gather(1, index)
        assert valid is not None
        if bool(valid.all()):
            valid = None
        columns = index if cache.rows is None else cache.rows.columns.gather(1, index)
        return cls(index, columns, positions.expand(index.shape[0], -1).gather(1, index), valid)

    def taken(self, hidden: Tensor) -> Tensor:
        """The hidden states ``[batch, rows before, size]`` of these rows."""
        return hidden.gather(1, self.index[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def restored(self, hidden: Tensor, new: int) -> Tensor:
        """What the last layer made of the rows, in the forward's ``new`` columns; NaN where a token did not reach it,
        so that nobody takes such an output for the model's."""
        real = self.columns >= 0 if self.block.valid is None else self.block.valid & (self.columns >= 0)
        place = torch.where(real, self.columns, new)[:, :, None].expand(-1, -1, hidden.shape[-1])
        out = hidden.new_full((hidden.shape[0], new + 1, hidden.shape[-1]), float("nan"))
        return out.scatter_(1, place, hidden)[:, :new]

    def cut(self, value: Any, new: int) -> Any:
        """An argument of a layer for these rows of the forward's ``new``: positions, rotary angles."""
        if isinstance(value, tuple | list):
            return type(value)(self.cut(part, new) for part in value)
        if isinstance(value, dict):
            return {name: self.cut(part, new) for name, part in value.items()}
        # The mask of padding is read by the first layer alone.
        if not isinstance(value, Tensor) or (value.ndim == 2 and value.shape[1] != new):
            return value
        if value.ndim not in (2, 3) or value.shape[1] != new:
            raise UnsupportedModel(
                f"a layer is given a tensor of shape {list(value.shape)} beside {new} tokens, of which not all go on: "
                "policies that skip layers serve models whose layers are given hidden states and positions"
            )
        index = self.columns if value.ndim == 2 else self.columns[:, :, None].expand(-1, -1, value.shape[-1])
        return value.expand(index.shape[0], *value.shape[1:]).gather(1, index)


def guard(model: PreTrainedModel) -> list[RemovableHandle]:
    """Hooks around the layers of a model, for policies that do not pass on all tokens.

    Raises:
        UnsupportedModel: Its layers cannot be found, or lend each other their keys.
    """
    if getattr(text_config(model), "num_kv_shared_layers", None):
        raise UnsupportedModel(
            f"{type(model).__name__} has layers that read the keys of other layers, which may have run for other "
            "tokens: use a model whose layers keep keys of their own"
        )
    hooks = []
    layers = anatomy(model).layers
    for number, layer in enumerate(layers):
        last = number == len(layers) - 1
        hooks.append(layer.register_forward_pre_hook(_before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(_after, number, last)))
    return hooks


def _cache() -> TokenCache | None:
    from tokenry.models.cache import current

    cache = current()
    return cache if cache is not None and cache.policy is not None and cache.policy.skips else None


def _before(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = _cache()
    if cache is None or cache.rows is None:
        return None
    rows, new = cache.rows, cache.new
    given = {name: value if name == "hidden_states" else rows.cut(value, new) for name, value in kwargs.items()}
    return (*args[:1], *(rows.cut(value, new) for value in args[1:])), given


def _after(number: int, last: bool, layer: nn.Module, args: Any, output: Any) -> Tensor | None:
    cache = _cache()
    if cache is None or (cache.next_rows is None and (cache.rows is None or not last)):
        return None
    if not isinstance(output, Tensor):
        raise UnsupportedModel(
            f"a layer of this model returns a {type(output).__name__}, not its hidden states: policies that skip "
            "layers serve models of transformers whose layers return one tensor"
        )
    if cache.next_rows is not None:
        assert cache.policy is not None
        output = cache.policy.hand_on(cache.layers[number], cache.next_rows, output)
        cache.rows, cache.next_rows = cache.next_rows, None
    if last:
        assert cache.rows is not None
        output = cache.rows.restored(output, cache.new)
    return output

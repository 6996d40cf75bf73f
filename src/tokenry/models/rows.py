"""Which tokens the later layers of a forward run for, where a policy does not pass all of them on.

Hooks around the decoder layers hand on the rows that the policy chose, give each layer the positions of its own rows,
and put what comes out of the last layer back into the columns of the forward. What they act on is in the cache of the
forward, so threads, and caches of one model, do not meet.

Rows may be tokens of earlier forwards that stopped behind a layer then: the policy keeps what they need to go on, their
hidden states and what layers are given for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tokenry.errors import UnsupportedModel
from tokenry.models.anatomy import anatomy, text_config
from tokenry.models.current import current
from tokenry.models.slots import Block

if TYPE_CHECKING:
    from tokenry.models.cache import TokenCache


class Rows:
    """The rows that the layers behind some layer run for, in the order of time.

    Attributes:
        index: Where each stood among the rows before, ``[batch, rows]``.
        columns: Its column in the forward, ``[batch, rows]``, negative where its token is of an earlier forward.
        block: What the layers are told of them: which are real and at which positions.
        given: What layers are given for each of them, beside what they are given for each column, by its identity.

    Args:
        valid: Which are real, bool ``[batch, rows]``; None: all.
        relation: Which sees which, bool ``[1 or batch, rows, rows]``; None: causal in their order.
        deferred: Whether the rows of the forward itself wait for a commit.
        before: Rows in front that are tokens of earlier forwards.
        dead: Tokens that no row may see, by position, bool ``[batch, length]``; None: none.
    """

    def __init__(
        self,
        index: Tensor,
        columns: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        *,
        relation: Tensor | None = None,
        deferred: bool = False,
        before: int = 0,
        dead: Tensor | None = None,
    ) -> None:
        self.index, self.columns = index, columns
        self.block = Block(index.shape[1], valid, relation, deferred)
        self.block.positions, self.block.apart = positions, True
        self.block.before, self.block.dead = before, dead
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

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

    def taken(self, tensor: Tensor) -> Tensor:
        """These rows of ``[batch, rows before, ...]``."""
        index = self.index.view(*self.index.shape, *[1] * (tensor.ndim - 2))
        return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))

    def restored(self, hidden: Tensor, new: int) -> Tensor:
        """What the last layer made of the rows, in the forward's ``new`` columns; NaN where a token did not reach it,
        so that nobody takes such an output for the model's."""
        real = self.columns >= 0 if self.block.valid is None else self.block.valid & (self.columns >= 0)
        place = torch.where(real, self.columns, new)[:, :, None].expand(-1, -1, hidden.shape[-1])
        out = hidden.new_full((hidden.shape[0], new + 1, hidden.shape[-1]), float("nan"))
        return out.scatter_(1, place, hidden)[:, :new]

    def cut(self, value: Any, cache: TokenCache) -> Any:
        """An argument of a layer for these rows of the forward: positions, rotary angles."""
        if isinstance(value, tuple | list):
            return type(value)(self.cut(part, cache) for part in value)
        if isinstance(value, dict):
            return {name: self.cut(part, cache) for name, part in value.items()}
        if not _each_token(value, cache):
            return value
        if id(value) not in self.given:
            # In a layer behind the one that they passed on from, another tensor is given than there.
            if self.block.before:
                raise UnsupportedModel(
                    "this model gives its layers different positions, so tokens that stopped behind a layer cannot go "
                    "on from it: use a model whose layers share one rotary embedding, or a policy without revival"
                )
            self.given[id(value)] = value, self._of_columns(value)
        return self.given[id(value)][1]

    def _of_columns(self, value: Tensor) -> Tensor:
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
        hooks.append(layer.register_forward_hook(partial(_after, number, last), with_kwargs=True))
    return hooks


def _cache() -> TokenCache | None:
    cache = current()
    return cache if cache is not None and cache.policy is not None and cache.policy.skips else None


def _before(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = _cache()
    if cache is None or cache.rows is None:
        return None
    rows = cache.rows
    given = {name: value if name == "hidden_states" else rows.cut(value, cache) for name, value in kwargs.items()}
    return (*args[:1], *(rows.cut(value, cache) for value in args[1:])), given


def _each_token(value: Any, cache: TokenCache) -> bool:
    """Whether an argument of a layer is a tensor of something for each token, ``[batch, new, ...]``."""
    # The mask of padding is read by the first layer alone; transformers may have made another for each kind of layer.
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value is cache.forward_block.padding:
        return False
    if value.ndim == 2 and value.shape[1] != cache.new:
        return False
    if value.ndim not in (2, 3) or value.shape[1] != cache.new:
        raise UnsupportedModel(
            f"a layer is given a tensor of shape {list(value.shape)} beside {cache.new} tokens, of which not all go "
            "on: policies that skip layers serve models whose layers are given hidden states and positions"
        )
    return True


def _tokens(value: Any, cache: TokenCache) -> Iterator[Tensor]:
    """The tensors among the arguments of a layer that hold something for each token."""
    if isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tokens(part, cache)
    elif _each_token(value, cache):
        yield value


def _after(
    number: int, last: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor | None:
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
        rows = cache.next_rows
        if cache.rows is None:
            named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            # Each once, though a layer may be given it twice.
            found = {id(value): value for value in _tokens((args[1:], named), cache)}
            given = [(value, value.expand(output.shape[0], *value.shape[1:])) for value in found.values()]
        else:
            given = list(cache.rows.given.values())
        output, *cut = cache.policy.hand_on(cache.layers[number], rows, [output, *(own for _, own in given)])
        rows.given = {id(value): (value, own) for (value, _), own in zip(given, cut, strict=True)}
        cache.rows, cache.next_rows = rows, None
    if last:
        assert cache.rows is not None
        output = cache.rows.restored(output, cache.new)
    return output

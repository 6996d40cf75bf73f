"""What an any-subset model is, and how it is asked: the probability of a token given any set of others.

Every token has a level: 0 where it was given, 1, 2, ... from left to right where it is to be filled in. Two streams
run through the model. The content stream reads tokens; a content row sees the rows of its own level and below, so given
tokens see each other and filled ones what came before them. The query stream asks for a token without reading it; a
query at level n sees content below n alone. So one rule on levels gives both masks of the paper (2504.20456): queries
at their own levels are its oracle mask, queries all at the first open level are its draft mask. The order is the
paper's "binary lattice": which places are given varies, in which order the others are filled does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import DynamicCache, PreTrainedModel, XLNetLMHeadModel

from tokenry.errors import BadPrompt, UnsupportedModel
from tokenry.generation.infill import Canvas
from tokenry.generation.session import keeps_logits
from tokenry.models import compat
from tokenry.models.anatomy import check_decoder, check_plain, text_config, windows

HIDDEN = 2**30
"""The level of padding and of dropped content: above every query's."""


@dataclass(frozen=True)
class Places:
    """Columns of the canvas with a level for each, both `[batch, n]`; a column of -1 is padding."""

    columns: Tensor
    levels: Tensor

    @property
    def real(self) -> Tensor:
        """Which are not padding, bool `[batch, n]`."""
        return self.columns >= 0

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """One after the other."""
        return cls(torch.cat([part.columns for part in parts], 1), torch.cat([part.levels for part in parts], 1))

    def take(self, values: Tensor) -> Tensor:
        """Values `[batch, length]` at the columns, `[batch, n]`."""
        return values.gather(1, self.columns.clamp(min=0))

    def put(self, into: Tensor, values: Tensor) -> Tensor:
        """A copy of `into` `[batch, length]` with values `[batch, n]` at the columns."""
        length = into.shape[1]
        wide = torch.cat([into, into[:, :1]], 1)
        return wide.scatter(1, torch.where(self.real, self.columns, length), values)[:, :length]


def levels_of(canvas: Canvas) -> Tensor:
    """The level of each column, `[batch, length]`."""
    ranks = canvas.masked.long().cumsum(-1)
    return torch.where(canvas.masked, ranks, 0).masked_fill(~canvas.valid, HIDDEN)


def columns_where(chosen: Tensor) -> Tensor:
    """Columns where a bool `[batch, length]` holds, ascending, filled up with -1, `[batch, most]`."""
    most = int(chosen.sum(1).max())
    columns = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    ordered = columns.masked_fill(~chosen, chosen.shape[1]).sort(1).values[:, :most]
    return ordered.masked_fill(ordered == chosen.shape[1], -1)


# --- the two streams on a decoder ---------------------------------------------------------------


def any_subset(model: PreTrainedModel, mask_id: int) -> PreTrainedModel:
    """Declare a decoder an any-subset model: its configuration says so, and names the token that queries are made of.

    It stays a model of its own class and is saved and loaded as one; what makes it any-subset is how it was trained.

    Raises:
        UnsupportedModel: It has an encoder, recurrent or sliding-window layers, or takes no positions.
    """
    _check_body(model)
    model.config.any_subset = True
    model.config.mask_token_id = int(mask_id)
    return model


def two_streams(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    levels: Tensor,
    asked: Tensor,
    asked_levels: Tensor,
    cache: DynamicCache | None = None,
    cached_levels: Tensor | None = None,
) -> Tensor:
    """Logits of the tokens at positions that are asked for.

    Content and queries are one sequence to the decoder. A query is the mask token at its position; it sees content
    below its level and itself, and nobody sees it. The card's query stream starts from a vector of its own in just
    this way, with the weights of the content stream.

    Args:
        model: A decoder that `any_subset` accepts.
        tokens: Content `[batch, content]`.
        positions: Positions of the content `[batch, content]`.
        levels: Levels of the content `[batch, content]`.
        asked: Positions asked for `[batch, asked]`, at least one.
        asked_levels: Levels of the queries `[batch, asked]`.
        cache: Keys and values of content read before; that of `tokens` is added.
        cached_levels: Levels of what the cache holds `[batch, cached]`.

    Returns:
        Logits `[batch, asked, vocab]`, as the model gives them.
    """
    batch, content = tokens.shape
    count = asked.shape[1]
    queries = torch.full_like(asked, model.config.mask_token_id)
    seen = levels if cached_levels is None else torch.cat([cached_levels, levels], 1)
    below = torch.cat([levels, asked_levels - 1], 1)[:, :, None] >= seen[:, None, :]
    itself = torch.eye(content + count, dtype=torch.bool, device=tokens.device)[:, content:].expand(batch, -1, -1)
    allowed = torch.cat([below, itself], 2)[:, None]
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=tokens.device)
    options: dict[str, Any] = {"logits_to_keep": count} if keeps_logits(model) else {}
    logits = model(
        input_ids=torch.cat([tokens, queries], 1),
        position_ids=torch.cat([positions, asked], 1),
        attention_mask=mask.masked_fill_(~allowed, torch.finfo(model.dtype).min),
        past_key_values=cache,
        use_cache=cache is not None,
        return_dict=True,
        **options,
    ).logits[:, -count:]
    if cache is not None:
        cache.crop(-count)
    return logits


# --- readers ------------------------------------------------------------------------------------


class Reader(ABC):
    """An any-subset model during one fill; it may keep what it has read."""

    def __init__(self, model: Any, canvas: Canvas) -> None:
        self.model, self.canvas = model, canvas

    @abstractmethod
    def read(self, ids: Tensor, content: Places, asked: Places) -> Tensor:
        """Raw float32 logits `[batch, asked, vocab]` of the places asked for (float64 stays).

        `content` are the places whose tokens in `ids` `[batch, length]` are to be read in addition to those of earlier
        calls.
        """

    @abstractmethod
    def forget(self, level: Tensor) -> None:
        """Take back what was read above each row's level `[batch]`."""


class DecoderReader(Reader):
    """A decoder; keys and values of content are kept, so that a call computes new content and the queries alone.

    Content never changes once read: under every mask it sees its own level and below.
    """

    def __init__(self, model: Any, canvas: Canvas) -> None:
        super().__init__(model, canvas)
        self.cache = DynamicCache(config=model.config)
        self.levels = canvas.ids.new_empty(canvas.ids.shape[0], 0)
        self.positions = canvas.positions

    def read(self, ids: Tensor, content: Places, asked: Places) -> Tensor:
        levels = content.levels.masked_fill(~content.real, HIDDEN)
        logits = two_streams(
            self.model,
            content.take(ids),
            content.take(self.positions),
            levels,
            asked.take(self.positions),
            asked.levels.masked_fill(~asked.real, 0),
            self.cache,
            self.levels,
        )
        self.levels = torch.cat([self.levels, levels], 1)
        return _wide(logits)

    def forget(self, level: Tensor) -> None:
        gone = self.levels > level[:, None]
        self.levels = self.levels.masked_fill(gone, HIDDEN)
        kept = (self.levels < HIDDEN).any(0).nonzero()
        spare = self.levels.shape[1] - (int(kept[-1]) + 1 if len(kept) else 0)
        if spare:
            self.cache.crop(-spare)
            self.levels = self.levels[:, :-spare]


class XLNetReader(Reader):
    """transformers' XLNet, whose two streams read the whole text at every call."""

    def __init__(self, model: XLNetLMHeadModel, canvas: Canvas) -> None:
        super().__init__(model, canvas)
        self.levels = levels_of(canvas)

    def read(self, ids: Tensor, content: Places, asked: Places) -> Tensor:
        rows = asked.put(self.levels, asked.levels)[:, :, None]
        columns = self.levels[:, None, :]
        # 1 forbids. The content stream sees itself whatever is forbidden, the query stream does not.
        forbidden = (columns >= rows) & ~((columns == 0) & (rows == 0))
        length = ids.shape[1]
        # A row of zeros asks for nothing: places asked for twice would be added up.
        mapping = one_hot(torch.where(asked.real, asked.columns, length), length + 1)[..., :length]
        logits = self.model(
            ids,
            perm_mask=forbidden.to(self.model.dtype),
            target_mapping=mapping.to(self.model.dtype),
            use_mems=False,
            return_dict=True,
        ).logits
        return _wide(logits)

    def forget(self, level: Tensor) -> None:
        pass


def reader(model: PreTrainedModel, canvas: Canvas) -> Reader:
    """The way to ask a model.

    Raises:
        UnsupportedModel: It is no any-subset model, or in a form that cannot be asked.
        BadPrompt: XLNet, and a text without a given token.
    """
    name = type(model).__name__
    if model.training:
        raise UnsupportedModel(f"{name} is in training mode, where dropout changes its answers: call model.eval()")
    if isinstance(model, XLNetLMHeadModel):
        _check_xlnet(model, canvas)
        return XLNetReader(model, canvas)
    if not getattr(model.config, "any_subset", False):
        raise UnsupportedModel(
            f"{name} was not trained to predict a token from any subset of the others (causal models see the left side "
            "alone, and a masked language model cannot score the tokens it sees): use XLNet, or make an any-subset "
            "model of a decoder with `tokenry train any-order`"
        )
    _check_body(model)
    return DecoderReader(model, canvas)


def _check_body(model: PreTrainedModel) -> None:
    check_decoder(model)
    check_plain(model)
    name = type(model).__name__
    config = text_config(model)
    if any(window is not None for window in windows(config, config.num_hidden_layers)):
        raise UnsupportedModel(f"{name} has sliding-window layers, which would not see every token: use full attention")
    import inspect

    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise UnsupportedModel(f"{name} takes no position_ids, so its tokens cannot be read in any order")
    attention = compat.implementation(model)
    if attention not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"{name} runs on {attention} attention, which cannot take a mask for each pair of tokens: load it with "
            "attn_implementation='sdpa', outside of a cache policy's block"
        )


def _check_xlnet(model: XLNetLMHeadModel, canvas: Canvas) -> None:
    check_plain(model)
    if model.dtype != torch.float32:
        raise UnsupportedModel(
            f"XLNet in {model.dtype} is not allowed: its relative positions are float32 alone; call model.float()"
        )
    if model.config.attn_type != "bi" or model.config.bi_data:
        raise UnsupportedModel("XLNet must attend in both directions: set attn_type='bi' and bi_data=False")
    if not bool((canvas.valid & ~canvas.masked).any(1).all()):
        raise BadPrompt(
            "a text has no given token: XLNet's query stream would see the drafts; give at least one, such as <bos>"
        )


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()

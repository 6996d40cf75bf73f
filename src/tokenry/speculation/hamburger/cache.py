"""The macro cache: one entry for each group of tokens, so entries and tokens are counted apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenry.errors import CacheMisuse
from tokenry.models import TokenCache

if TYPE_CHECKING:
    from tokenry.speculation.hamburger.model import HamburgerModel

_FOREIGN = (
    "this cache holds the merged entries of a HAMburger model: pass it to the method hamburger, or start from the "
    "whole prompt without past_key_values"
)


class MacroCache(TokenCache):
    """Keys and values of a :class:`HamburgerModel`'s base, an entry for each token of the prompt and each group.

    The position of an entry is that of its group's last token, so positions skip numbers. Slots, policies and sliding
    windows count entries: a window of 8 reaches 8 entries back, in training and here.

    Attributes:
        model: The model that fills it; no other may read it.
        tokens: Real tokens that the entries of each row stand for, `[batch]`: the position of the next one.
        columns: Columns of the caller's ids that the entries cover, padding included, `[batch]`.
        features: The features behind the last entry, `[batch, features, width]`.
    """

    def __init__(self, model: HamburgerModel, policy: Any = None) -> None:
        super().__init__(model.base, policy)
        self.model = model
        self.tokens: Tensor | None = None
        self.columns: Tensor | None = None
        self.features: Tensor | None = None
        self._given: tuple[Tensor | None, Tensor | None] | None = None
        self._after: Tensor | None = None

    def stage(
        self,
        valid: Tensor | None = None,
        relation: Tensor | None = None,
        deferred: bool = False,
        sizes: Tensor | None = None,
    ) -> None:
        """As in :class:`TokenCache`; `sizes` `[batch, new]`: tokens that each entry stands for, one by default."""
        if deferred:
            raise CacheMisuse(_FOREIGN)
        super().stage(valid, relation)
        self._given = valid, sizes

    def place(self, batch: int, new: int, device: torch.device) -> Tensor:
        """Positions `[batch, new]` of the entries that were staged."""
        if self._given is None:
            raise CacheMisuse(_FOREIGN)
        valid, sizes = self._given
        self._given = None
        if sizes is None:
            sizes = torch.ones(batch, new, dtype=torch.long, device=device)
        if valid is not None:
            sizes = sizes * valid
        after = sizes.cumsum(1) + (0 if self.tokens is None else self.tokens[:, None])
        self._after = after[:, -1]
        return (after - 1).clamp(min=0)

    def placed(self, features: Tensor) -> None:
        """Note that the entries are in, and the features behind the last."""
        self.tokens, self.features, self._after = self._after, features, None

    def rewind(self, entries: int, tokens: Tensor | None) -> None:
        """Drop the newest entries of all rows and go back to so many `tokens` `[batch]`."""
        if entries:
            super().crop(-entries)
        self.tokens = tokens

    def crop(self, tokens_to_remove: int) -> None:
        raise CacheMisuse(
            "the entries of a HAMburger cache stand for several tokens each, so tokens cannot be dropped from it: "
            "start from the whole prompt, without past_key_values"
        )

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._after is None:
            raise CacheMisuse(_FOREIGN)
        return super().update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.columns is None else int(self.columns.min())

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        for name in ("tokens", "columns", "features"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.index_select(0, rows.to(value.device)))

    def fork(self) -> TokenCache:
        other = super().fork()
        other.__class__ = type(self)
        return other

    def reset(self) -> None:
        super().reset()
        self.tokens = self.columns = self.features = self._after = None

"""What a cache asks of a policy: to judge what its layers hold, to drop tokens, or to choose those that a step sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from tokenry.models.rows import Rows
from tokenry.models.slots import Block
from tokenry.models.statistics import AttentionRows

if TYPE_CHECKING:
    from tokenry.models.cache import TokenCache
    from tokenry.models.layer import TokenLayer


class Policy(Protocol):
    """What the cache asks of a cache policy (see :mod:`tokenry.kvcache.engine`): of every kind, of those that drop
    tokens, and of those that retrieve."""

    drops: ClassVar[bool]
    """Whether it drops tokens; a policy that does not chooses those that a step attends to."""
    needs_attention: ClassVar[bool]
    """Whether ``observe`` is to be called."""
    sums: ClassVar[bool]
    """Whether it then needs sums over all rows of a prompt."""
    skips: ClassVar[bool]
    """Whether later layers may run for other tokens than a forward's own."""
    uneven: ClassVar[bool]
    """Whether layers may hold different tokens though none is dropped: those that did not run for a token lack it."""

    @property
    def attends(self) -> bool:
        """Whether ``attend`` is to give the output of the attention."""
        ...

    @property
    def compact_every(self) -> int:
        """Tokens are dropped after positions that are multiples of this."""
        ...

    @property
    def stops(self) -> tuple[int, ...]:
        """What later steps see changes after positions that are multiples of these."""
        ...

    def prepare(self, model: PreTrainedModel) -> Any:
        """What it needs beside the model, for a cache's ``prepared``."""
        ...

    def layer_budget(self, layer: TokenLayer) -> int | float:
        """Slots of a layer and head, or their share of the prompt."""
        ...

    def slots(self, share: float, length: int) -> int:
        """Slots that a share of ``length`` tokens gives."""
        ...

    def before(self, model: PreTrainedModel, cache: TokenCache, inputs: Mapping[str, Any]) -> None:
        """A forward with these arguments is about to begin an empty cache."""
        ...

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        """Take in the attention of the committed rows; all state is already ``[batch, heads, slots]``."""
        ...

    def passes(self, layer: TokenLayer, rows: AttentionRows | None) -> Rows | None:
        """The rows that the layers behind this one run for; None: those that it ran for."""
        ...

    def hand_on(self, layer: TokenLayer, rows: Rows, tensors: list[Tensor]) -> list[Tensor]:
        """What the rows that go on take with them, of a layer's output and what layers are given for each token."""
        ...

    def attend(self, layer: TokenLayer, rows: AttentionRows, value: Tensor) -> Tensor:
        """The output of the attention, ``[batch, heads, rows, head_dim]``."""
        ...

    def after(self, model: PreTrainedModel, cache: TokenCache, input_ids: Tensor | None) -> None:
        """A forward of several tokens has ended and is accounted for."""
        ...


class Evicting(Policy, Protocol):
    """What the cache asks of a policy that drops tokens."""

    ordered: ClassVar[bool]
    """Whether its slots must stay in the order of time."""

    @property
    def rolling(self) -> bool:
        """Whether positions are counted over the tokens that are held."""
        ...

    @property
    def hides(self) -> bool:
        """Whether dropped slots are only hidden."""
        ...

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        """State of new slots, each ``[batch, heads, new]``, from their positions ``[batch, new]``."""
        ...

    def keep(self, layer: TokenLayer) -> Tensor | None:
        """Slots to keep, ``[batch, heads, kept]`` ascending, or which slots stay, bool ``[batch, heads, slots]``;
        None to keep all."""
        ...

    def victim(self, layer: TokenLayer) -> Tensor:
        """The one slot to drop, ``[batch, heads, 1]``."""
        ...

    def at(self, budget: int) -> Evicting:
        """The same policy with that budget."""
        ...


class Retrieving(Policy, Protocol):
    """What the cache asks of a policy that chooses the slots a step attends to."""

    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        """What is kept of new keys beside them, each ``[batch, kv_heads, new, size]``."""
        ...

    def retrieves(self, layer: TokenLayer, block: Block) -> bool:
        """Whether the rows of this block retrieve; the others attend to everything."""
        ...

    def retrieve(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Slots that each row attends to, ``[batch, kv_heads or heads, rows, chosen]``, and which of them count."""
        ...

    def settled(self, layer: TokenLayer) -> None:
        """The new tokens of a forward have become part of the text."""
        ...

    def cropped(self, layer: TokenLayer) -> None:
        """The newest tokens were taken back."""
        ...

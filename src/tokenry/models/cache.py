"""The one cache: keys, values, positions, validity and policy state of every layer, moved together.

Two regimes. On a model's own attention it behaves as transformers' ``DynamicCache``. Inside
:func:`tokenry.models.attached` the attention function asks it for each layer's mask, so rows may progress unequally,
layers may hold different tokens, and the new tokens may form a tree.

Reading order: ``slots.py`` (which tokens stand where, the tokens of one forward), ``storage.py`` (buffers, codes of a
few bits, another device), ``policy.py`` (what a cache asks of a policy), ``layer.py`` (one layer), :class:`TokenCache`
(all layers).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from tokenry.errors import CacheMisuse, UnsupportedModel
from tokenry.models import compat
from tokenry.models.anatomy import check_decoder, text_config, windows
from tokenry.models.current import current
from tokenry.models.layer import SlidingWindow, TokenLayer
from tokenry.models.policy import Policy, Retrieving
from tokenry.models.rotary import Rotary
from tokenry.models.rows import Rows
from tokenry.models.slots import Block, Slots
from tokenry.models.storage import picked


class _Life:
    """What a cache and its copies share, and what is to be done when the last of them is gone."""

    on_release: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.on_release is not None:
            self.on_release()


class TokenCache(Cache):
    """Past keys and values of a decoder, with positions, validity and policy state.

    Args:
        model: The model whose forward fills the cache.
        policy: A cache policy that decides which tokens stay; None keeps all.

    Raises:
        UnsupportedModel: The model has layers that a key-value cache does not serve, or none that the policy rules.
    """

    layers: list[TokenLayer]  # type: ignore[assignment]

    def __init__(self, model: PreTrainedModel, policy: Policy | None = None) -> None:
        check_decoder(model)
        self.policy = policy
        self.prepared: Any = None if policy is None else policy.prepare(model)
        """What the policy needs beside the model."""
        self.rotary = Rotary(model) if policy is not None and getattr(policy, "rolling", False) else None
        self.slots = Slots()
        self.total = 0
        """Columns the model has been fed, padding included: what transformers calls the sequence length."""
        self.held_nbytes = 0
        """Bytes of the keys and values that are held on the model's device."""
        self.peak_nbytes = 0
        """Most bytes that were held there at any time, within a forward too."""
        self._life = _Life()
        # Whether it stands beside a call's own cache, so that a block's policy leaves it alone.
        self.beside = False
        self._seen: Tensor | None = None
        # Tokens of each row's prompt, which ends with the first forward of a single token or of a draft.
        self._prompt: Tensor | None = None
        self.prompt_ended = self.keeps = False
        # Tokens of the last forward behind others.
        self._turn = 0
        # Columns of left padding in each row, and whether rows have gaps behind them.
        self._lead: Tensor | None = None
        self._ragged = False
        self._staged: tuple[Tensor | None, Tensor | None, bool] | None = None
        self._block: Block | None = None
        # The last layer that the forward under way has written to, and whether one that had begun to write failed.
        self._reached, self._broken = -1, False
        # Within a forward whose policy does not pass on all tokens: the rows that run, and those of the next layer.
        self.rows: Rows | None = None
        self.next_rows: Rows | None = None
        self.handed: dict[str, Tensor] = {}
        """What a policy hands from layer to layer within a forward or a commit."""
        self.foretold: tuple[list[tuple[Tensor, Tensor]], Tensor | None] | None = None
        """Keys and values of each layer, and which are real, that wait for the first layer of a forward."""
        self.filled = 0
        """Columns whose keys and values the model has not computed; ``_ahead`` of them in the present forward."""
        self._ahead = 0
        self.config = config = text_config(model)
        spans = windows(config, config.num_hidden_layers)
        if policy is not None and None not in spans:
            raise UnsupportedModel(
                f"every layer of {type(model).__name__} has a sliding window of {spans[0]} tokens, so {policy} would "
                "rule none of them: use a model with full-attention layers"
            )
        super().__init__(layers=[TokenLayer(self, window, number) for number, window in enumerate(spans)])

    @property
    def on_release(self) -> Callable[[], None] | None:
        """What is called when the cache and all copies of it are gone."""
        return self._life.on_release

    @on_release.setter
    def on_release(self, release: Callable[[], None] | None) -> None:
        self._life.on_release = release

    # What a decoding method sees -------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Rows, 0 before the first forward."""
        keys = self.layers[0]._keys
        return 0 if keys is None else keys.shape[0]

    @property
    def length(self) -> int:
        """Slots of the longest layer."""
        return max(layer.size for layer in self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def seen(self) -> Tensor:
        """Real tokens that each row has cached ``[batch]``: the position of its next token."""
        if self._seen is None:
            return torch.full((self.batch,), self.total, device=self.device)
        return self._seen

    def room(self) -> Tensor | None:
        """Tokens that a deferred forward may commit before the policy changes what is seen ``[batch]``; None: any."""
        if self.policy is None or not self.policy.stops:
            return None
        return torch.stack([every - self.seen % every for every in self.policy.stops]).amin(0)

    def stage(self, valid: Tensor | None = None, relation: Tensor | None = None, deferred: bool = False) -> None:
        """Describe the tokens of the next forward.

        Args:
            valid: ``[batch, new]`` bool, False for padding; None: all real.
            relation: ``[1 or batch, new, new]`` bool, which new token sees which; None: causal.
            deferred: Leave the new slots open until :meth:`commit` says which stay.
        """
        self.ready()
        self._staged = (valid, relation, deferred)

    def staged(self, mask: Tensor | None, new: int) -> Tensor | None:
        """Which tokens of the next forward are real, bool ``[batch, new]``, or None: all; from what was staged, or from
        the 2-D mask of padding that the forward is given."""
        if self._staged is not None:
            valid, relation, deferred = self._staged
            if relation is not None or deferred:
                raise CacheMisuse(f"{self.policy} predicts prompts, and this forward is a tree or a draft")
            return valid
        if mask is None:
            return None
        if mask.ndim != 2:
            raise CacheMisuse(f"a mask of {mask.ndim} dimensions came to a TokenCache: pass the 2-D mask of padding")
        return None if bool(mask[:, -new:].all()) else mask[:, -new:].to(torch.bool)

    def foretell(self, states: list[tuple[Tensor, Tensor]], valid: Tensor | None) -> None:
        """Let the next forward, which begins the cache, run its last token alone, behind these.

        Args:
            states: For each layer keys and values of the others, ``[batch, kv_heads, new - 1, head_dim]``.
            valid: ``[batch, new - 1]`` bool, False for padding; None: all real.
        """
        self.foretold = states, valid

    def begin(self) -> Rows:
        """Cache what was foretold, open the block of the forward's last token, and return that row."""
        assert self.foretold is not None
        (states, valid), self.foretold = self.foretold, None
        ahead, self._reached = states[0][0].shape[2], len(self.layers) - 1
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer._write(keys, values)
        self._staged = (None if valid is None or bool(valid.all()) else valid, None, False)
        block = self.block(ahead, None, self.device)
        for layer in self.layers:
            if layer._drops:
                layer._take(ahead, block.valid, layer._new_positions(block))
                layer.evict(True)
        self.finish()
        self.filled, self._ahead = self.filled + ahead, ahead
        block = self.block(1, None, self.device)
        self._prompt = self.seen_after
        columns = torch.full((self.batch, 1), ahead, device=self.device)
        self.rows = Rows(columns, columns, self.layers[0]._new_positions(block), None)
        self.rows.block = block
        return self.rows

    def commit(self, path: Tensor, counts: Tensor) -> None:
        """Close the open block: row ``b`` keeps its new slots ``path[b, :counts[b]]``, in that order.

        Args:
            path: ``[batch, longest]`` slots of the block.
            counts: ``[batch]`` slots that each row keeps.
        """
        block = self._block
        if block is None:
            raise CacheMisuse("no block is open: stage(deferred=True) and a forward come before commit")
        kept = counts.tolist()
        take = max(kept)
        path = path[:, :take]
        self._turn = 0
        valid = None
        if min(kept) < take:
            valid = torch.arange(take, device=counts.device) < counts[:, None]
            path = path.masked_fill(~valid, 0)
        straight = bool((path == torch.arange(take, device=path.device)).all())
        self.seen_before = self.seen
        self.seen_after = self.seen_before + counts
        self.handed = {}
        for layer in self.layers:
            layer.commit(block, path, counts, take, straight, valid)
        self.handed = {}
        contiguous = self.slots.positions is None and valid is None
        positions = None if contiguous else self.seen_before[:, None] + torch.arange(take, device=self.device)
        self.slots.append(take, valid, positions, self.batch, self.device)
        self._seen = None if contiguous and self._seen is None else self.seen_after
        self._ragged |= valid is not None
        self.total += take
        self._block = None
        self._settle()

    def _settle(self) -> None:
        """Tell a policy that retrieves that the new tokens are text."""
        if self.policy is not None and not self.policy.drops:
            for layer in self.layers:
                if layer.policy is self.policy:
                    cast(Retrieving, self.policy).settled(layer)
                    layer.cool(False)

    def prompt_lengths(self) -> list[int]:
        """Real tokens of each row's prompt; a prompt in chunks counts as far as it has come."""
        lengths = self.seen if self._prompt is None else self._prompt
        return lengths.tolist()

    def attended_share(self) -> float:
        """Share of the slots that decode steps attended to, over the layers where a policy retrieves; 1 before."""
        read, held = (sum(layer.reads[part] for layer in self.layers) for part in (0, 1))
        return read / held if held else 1.0

    def computed_share(self) -> float:
        """Share of the pairs of a token and a layer that ran, padding included; 1 before."""
        fed = self.layers[0].ran + self.filled
        return sum(layer.ran for layer in self.layers) / (len(self.layers) * fed) if fed else 1.0

    def fork(self) -> TokenCache:
        """An independent copy, policy state included; what is done on release waits for the last of them."""
        other = object.__new__(TokenCache)
        other.__dict__.update(self.__dict__)
        other.handed = {}
        other.slots = self.slots.copy()
        other.layers = []
        for layer in self.layers:
            twin = object.__new__(TokenLayer)
            twin.__dict__.update(layer.__dict__)
            twin._cache = weakref.ref(other)
            twin.slots = other.slots if layer.slots is self.slots else layer.slots.copy()
            twin.state, twin.beside, twin.reads = dict(layer.state), dict(layer.beside), list(layer.reads)
            twin._index = {name: layer.indexed(name).clone() for name in layer._index}
            if layer._keys is not None:
                twin._keys, twin._values = (tensor.clone() for tensor in layer._near())
            twin.far = None if layer.far is None else layer.far.copy()
            other.layers.append(twin)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenCache:
        return self.fork()

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows, in place; ``rows`` is ``[new batch]``."""
        if self.batch == 0:
            return
        rows = rows.to(self.device)
        for layer in self.layers:
            layer.select(rows)
        self.slots.select(rows)
        self._seen = None if self._seen is None else self._seen.index_select(0, rows)
        self._lead = None if self._lead is None else self._lead.index_select(0, rows)
        self._prompt = None if self._prompt is None else self._prompt.index_select(0, rows)
        self._recount()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest slots, ``tokens_to_remove`` being their negative number as in transformers.

        Scores of attention still count what the dropped tokens added, so a policy that has such scores may drop
        nothing afterwards: a forward that would make it do so raises ``CacheMisuse``.

        Raises:
            CacheMisuse: The policy has dropped tokens already, so the state before them is gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not allowed: give the number of tokens to drop as a negative number"
            )
        drop = -tokens_to_remove
        if drop == 0:
            return
        for layer in self.layers:
            if layer.evicted and not (isinstance(layer.policy, SlidingWindow) and drop <= layer.policy.spare):
                raise CacheMisuse(
                    "a cache that has dropped tokens cannot go back: run assisted generation with a budget above the "
                    "whole length, or one of Tokenry's drafters, which verify before they drop"
                )
            if drop < self._turn and layer.will_retrieve(1) and layer.size > max(layer.budgets()):
                raise CacheMisuse(
                    f"a part of the last {self._turn} tokens is taken back, as transformers' assisted generation and "
                    f"prompt lookup do, and these attended to everything, not to what {self.policy} retrieves: use one "
                    "of Tokenry's drafters, whose drafts retrieve, or take back the whole turn"
                )
        # Columns that came in on the model's own attention have no slots yet.
        counted = max(0, self.slots.size - (self.total - drop))
        if self.slots.valid is not None and counted:
            self._seen = self.seen - self.slots.valid[:, 0, -counted:].sum(-1)
        self.total -= drop
        self._turn = max(0, self._turn - drop)
        self.slots.crop(self.slots.size - counted)
        for layer in self.layers:
            layer.shorten(drop)
            if layer._exact_from is not None:
                # What stands in codes stays so; what comes now is read as it is.
                layer._exact_from = torch.minimum(layer._exact_from, self.seen)
            if layer.slots is not self.slots:
                layer.slots.crop(min(layer.slots.size, layer.size))
            if layer._drops:
                layer.state = {name: tensor[..., :-drop] for name, tensor in layer.state.items()}
                # What the tokens that go added to the others cannot be told apart any more.
                layer.misjudged = layer._evicting.needs_attention and layer.size > 0
            elif layer.policy is not None:
                cast(Retrieving, layer.policy).cropped(layer)

    def keep_all(self) -> None:
        """Drop nothing more: what stands is what the budget left of a prompt, and all that comes is added to it."""
        self.keeps = True

    def compact(self) -> None:
        """Drop the slots that hold no real token in any row."""
        if self.slots.valid is None or self.policy is not None:
            return
        used = self.slots.valid.any(0).any(0)
        if not bool(used.all()):
            index = used.nonzero()[:, 0]
            for layer in self._sharing():
                keys, values = layer.held()
                layer.size = index.numel()
                layer._keys, layer._values = keys.index_select(2, index), values.index_select(2, index)
            self._seen = self.seen
            self.slots.gather(index.expand(self.batch, 1, -1))
        if self.slots.contiguous():
            # Nothing is left to hide, so masks are not needed any more.
            self.slots.valid = self.slots.positions = self._seen = self._lead = None
            self._ragged = False
            self.total = self.slots.size

    def realign(self) -> None:
        """Close the gaps that rows of unequal progress leave, so that no row is longer than its tokens and padding."""
        if self.policy is not None or not self._ragged:
            return
        columns, valid, positions = self._columns(self.slots, None)
        for layer in self._sharing():
            keys, values = layer.held()
            layer.size = columns.shape[1]
            picks = columns[:, None].expand(-1, keys.shape[1], -1)
            layer._keys, layer._values = picked(keys, picks), picked(values, picks)
        self._seen = self.seen
        self.slots.size = self.total = columns.shape[1]
        self.slots.valid, self.slots.positions = valid[:, None], positions[:, None]
        # Rows that are shorter than the longest end in slots without a token, which the next tokens stand behind.
        self._ragged = not bool(valid[:, -1].all())

    def _sharing(self) -> list[TokenLayer]:
        """The layers that hold every token of the cache."""
        return [layer for layer in self.layers if layer.slots is self.slots]

    def _columns(
        self, slots: Slots, last: int | None, end: int | None = None, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The slot that stands in each column of aligned rows, whether there is one, and its position, each
        ``[batch, columns]``: of the first ``end`` columns, or as many as the longest row has, the ``last``, or all.
        ``first`` says of the first columns which hold a token; without it rows are contiguous behind their padding."""
        held, places = slots.copy().materialise(self.batch, self.device)
        lead = self._lead if self._lead is not None else torch.zeros_like(self.seen)
        end = int((lead + self.seen).max()) if end is None else end
        start = 0 if last is None else max(0, end - last)
        if first is None:
            positions = torch.arange(start, end, device=self.device) - lead[:, None]
        else:
            behind = torch.arange(max(0, end - first.shape[1]), device=self.device) + first.sum(-1, keepdim=True)
            positions = torch.cat([(first.cumsum(-1) - 1).masked_fill(~first, -1), behind], 1)[:, start:end]
        match = (places[:, :1] == positions[:, :, None]) & held[:, :1]
        return match.byte().argmax(-1), match.any(-1), positions.clamp(min=0)

    def _recount(self) -> None:
        self.held_nbytes = 0
        for layer in self.layers:
            layer._nbytes = 0
            layer.account()

    def nbytes(self) -> int:
        """Bytes of the keys and values that are held on the model's device, with codes and what a policy keeps of
        keys."""
        return self.held_nbytes

    def state_nbytes(self) -> int:
        """Bytes of what is known of the slots: where each stands, and a policy's scores, means and lists."""
        # Layers that drop nothing share their slots.
        parts = {
            id(part): part
            for layer in self.layers
            for part in (layer.slots.valid, layer.slots.positions, *layer.state.values())
            if part is not None
        }
        return sum(part.numel() * part.element_size() for part in parts.values())

    def offloaded_nbytes(self) -> int:
        """Bytes of the keys and values that stand in the CPU's memory."""
        return sum(layer.far.nbytes for layer in self.layers if layer.far is not None)

    def copied_slots(self) -> int:
        """Slots of single heads, each a key and a value, that were copied from the CPU's memory so far."""
        return sum(layer.far.copied for layer in self.layers if layer.far is not None)

    def kept_positions(self) -> list[Tensor]:
        """For each layer the positions it holds in order, ``[batch, 1 or kv_heads, slots]``, with a -1 before them for
        each slot that holds no token."""
        kept = []
        for layer in self.layers:
            valid, positions = layer.slots.copy().materialise(self.batch, layer.device)
            # A slot that was given to a newer token stands out of order.
            kept.append(positions.masked_fill(~valid, -1).sort(-1).values)
        return kept

    def to_dynamic(self, length: int | None = None, first: Tensor | None = None) -> DynamicCache:
        """The same keys and values as transformers' own cache: each row's tokens contiguous behind its left padding,
        rows that ended early padded on the right with zeros.

        Args:
            length: Columns to hand over; None: as many as the longest row has.
            first: Which of the first columns hold a token, bool ``[batch, n]``, where padding stands among them, as
                behind rows that ended early in an earlier turn.

        Raises:
            CacheMisuse: A policy has dropped tokens.
        """
        if self.policy is not None and any(layer.evicted for layer in self.layers):
            raise CacheMisuse(
                "a budgeted cache holds too few tokens for a DynamicCache: pass it on as it is, inside the block"
            )
        lead = 0 if self._lead is None else self._lead
        end = int((self.seen + lead).max()) if length is None else length
        tensors = []
        for layer in self.layers:
            keys, values = layer.held()
            if layer.window is None and self.slots.valid is None:
                tensors.append((keys[:, :, :end], values[:, :, :end]))
                continue
            columns, valid, _ = self._columns(
                layer.slots, None if layer.window is None else layer.window - 1, end, first
            )
            picks = columns[:, None].expand(-1, keys.shape[1], -1)
            real = valid[:, None, :, None]
            tensors.append((picked(keys, picks) * real, picked(values, picks) * real))
        return compat.filled(self.config, tensors, end)

    @classmethod
    def from_dynamic(cls, model: PreTrainedModel, dynamic: DynamicCache, valid: Tensor | None = None) -> TokenCache:
        """Take over a filled ``DynamicCache`` of full-attention layers.

        Args:
            model: The model that filled it.
            dynamic: The cache; its tensors are used, not copied.
            valid: ``[batch, length]`` bool, False for padding; None: all real.
        """
        cache = cls(model)
        if any(layer.window is not None for layer in cache.layers):
            raise CacheMisuse(
                "a filled cache of a sliding-window model cannot be taken over: start from the whole prompt"
            )
        for layer, (keys, values) in zip(cache.layers, compat.dynamic_layers(dynamic), strict=True):
            layer._write(keys, values)
        valid = None if valid is None or bool(valid.all()) else valid.bool()
        positions = None if valid is None else valid.cumsum(-1) - 1
        cache.slots.append(cache.layers[0].size, valid, positions, cache.batch, cache.device)
        cache.total = cache.layers[0].size
        if valid is not None:
            cache._seen, cache._lead = valid.sum(-1), _leading(valid)
        return cache

    # The forward, driven by the attention function -------------------------------------------------------------------
    def block(self, new: int, mask: Tensor | None, device: torch.device) -> Block:
        """The block of the forward that is under way; its first layer opens it."""
        if self.next_rows is not None or (self.rows is not None and self.rows.block.new != new):
            raise CacheMisuse(
                f"{self.policy} passes on {(self.next_rows or self.rows).block.new} tokens, and a layer ran for {new}: "  # type: ignore[union-attr]
                "run the model inside `with policy(model):`, or make the cache with `policy.cache(model)`"
            )
        if self.rows is not None:
            return self.rows.block
        if self._block is not None:
            return self._block
        if self._staged is not None:
            valid, relation, deferred = self._staged
            self._staged = None
        else:
            relation, deferred = None, False
            if mask is not None and mask.ndim != 2:
                raise CacheMisuse(
                    f"a mask of {mask.ndim} dimensions came to a TokenCache, which makes its layers' masks itself: "
                    "pass the 2-D mask of padding, or say who sees whom with cache.stage(relation=...)"
                )
            valid = None if mask is None or bool(mask[:, -new:].all()) else mask[:, -new:].to(torch.bool)
        if self.slots.size < self.total and self.slots.positions is None:
            self._catch_up(mask, device)
        block = Block(new, valid, relation, deferred)
        block.padding, block.first = mask, self.total
        self.seen_before = self.seen
        if relation is not None:
            block.positions = self.seen_before[:, None] + relation.sum(-1) - 1
        elif valid is not None or self.slots.positions is not None or self._seen is not None:
            counted = torch.arange(1, new + 1, device=device)[None] if valid is None else valid.cumsum(-1)
            block.positions = self.seen_before[:, None] + counted - 1
        self.seen_after = self.seen_before + (new if valid is None else valid.sum(-1))
        if not self.prompt_ended:
            self.prompt_ended = self._prompt is not None and (deferred or new == 1)
            if not self.prompt_ended:
                self._prompt = self.seen_after
                for layer in self.layers:
                    layer._budgets = None
        self._block = block
        return block

    def _catch_up(self, mask: Tensor | None, device: torch.device) -> None:
        """Account for columns that came in on the model's own attention, whose padding only the mask knows."""
        missing = slice(self.slots.size, self.total)
        valid = None if mask is None else mask[:, missing].to(torch.bool)
        if valid is None or bool(valid.all()):
            self.slots.append(self.total - self.slots.size, None, None, self.batch, device)
            return
        self.slots.append(valid.shape[-1], valid, valid.cumsum(-1) - 1 + self.slots.size, self.batch, device)
        assert self.slots.valid is not None
        self._seen, self._lead = self.slots.valid[:, 0].sum(-1), _leading(self.slots.valid[:, 0])

    @property
    def forward_block(self) -> Block:
        """The block of the forward that is under way."""
        assert self._block is not None
        return self._block

    @property
    def new(self) -> int:
        """Columns of the forward that is under way."""
        return 0 if self._block is None else self._ahead + self._block.new

    def ready(self) -> None:
        """Refuse a forward while a block is open, or after one that failed."""
        self._check_whole(self._reached < 0)
        if self._block is not None:
            raise CacheMisuse("the last block is still open: call commit before the next forward")

    def _check_whole(self, whole: bool) -> None:
        # Nobody is told of a forward that was interrupted from the keyboard; the next one finds what it left.
        self._broken |= not whole
        if self._broken:
            raise CacheMisuse(
                "a forward that filled this cache failed halfway, so its layers hold different tokens: start again "
                "from the whole prompt, with a new cache or after cache.reset()"
            )

    def finish(self) -> None:
        """After a forward: account for its tokens, unless they wait for a commit."""
        self._reached = -1
        self.rows = self.next_rows = None
        self.handed = {}
        self._ahead = 0
        block = self._block
        if block is None or block.deferred:
            return
        if block.valid is not None:
            # Padding leads a row until its first real token, in whichever chunk of the prompt that comes.
            leads = block.valid.cumsum(-1) + self.seen_before[:, None] == 0
            self._lead = leads.sum(-1) + (0 if self._lead is None else self._lead)
            self._ragged = self._ragged or (self.total > 0 and not bool((block.valid | leads).all()))
        self.slots.append(block.new, block.valid, block.positions, self.batch, self.device)
        self.total += block.new
        self._turn = block.new if self.total > block.new else 0
        self._seen = None if self.slots.valid is None and self.slots.positions is None else self.seen_after
        self._block = None
        self._settle()

    def abandon(self) -> None:
        """After a forward that failed: forget its block; if it had begun to write, refuse any further one."""
        self._broken |= self._reached >= 0
        self._reached = -1
        self._block = self._staged = self.rows = self.next_rows = self.foretold = None
        self.handed = {}
        self._ahead = 0

    # transformers' interface -----------------------------------------------------------------------------------------
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        attached = current() is self
        if not attached and self.policy is None and (self._ragged or any(layer.evicted for layer in self.layers)):
            raise CacheMisuse(
                "this cache has gaps or has dropped tokens, which the model's own attention knows nothing of: go on "
                "inside a block, or with cache.to_dynamic()"
            )
        self._check_whole(layer_idx > self._reached)
        self._reached = layer_idx
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        self.peak_nbytes = max(self.peak_nbytes, self.held_nbytes)
        if not attached and layer_idx == len(self.layers) - 1:
            self.total, self._reached = self.layers[0].size, -1
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.total

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(
            torch.arange(self.batch, device=self.device).repeat_interleave(repeats) if self.batch else torch.empty(0)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices if indices.dtype == torch.long else indices.nonzero()[:, 0])

    def reset(self) -> None:
        self.slots, self.total, self._seen, self._lead, self._ragged = Slots(), 0, None, None, False
        self._staged = self._block = self._prompt = self.foretold = None
        self.rows = self.next_rows = None
        self.handed = {}
        self.filled = self._ahead = self._turn = 0
        self.prompt_ended = self.keeps = False
        self.held_nbytes = self.peak_nbytes = 0
        self._reached, self._broken = -1, False
        for layer in self.layers:
            layer.reset()


def _leading(valid: Tensor) -> Tensor:
    """Columns of ``[batch, length]`` before each row's first real token, ``[batch]``."""
    return (valid.cumsum(-1) == 0).sum(-1)

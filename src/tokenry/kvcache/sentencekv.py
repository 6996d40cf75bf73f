"""SentenceKV: whole sentences are retrieved, each found by the mean of its keys."""

from __future__ import annotations

import functools
import threading
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AutoTokenizer, PreTrainedModel

from tokenry.errors import CacheMisuse, ResourceError
from tokenry.kvcache.engine import AttentionRows, RetrievalPolicy, TokenLayer, members
from tokenry.models import PolicyBlock, Slots, TokenCache, loaded_name, path
from tokenry.vocabulary import token_bytes

_MARKS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
# What may stand behind the mark in one token: ." and .) end a sentence as well.
_CLOSING = "\"')]}\u201d\u2019"
_FAR = 2**40


@dataclass(frozen=True, kw_only=True)
class SentenceKV(RetrievalPolicy):
    """Attend to the sentences whose mean key is closest to the running sentence's mean query (arXiv 2504.00970).

    The last ``window`` queries of a prompt judge its tokens: ``factor`` times the budget stay candidates, the others
    are never chosen. Candidates are grouped by sentences, each summarised by the mean of its rotated keys. A step
    compares these with the mean of the queries since the last sentence ended, both per KV head (queries are averaged
    over its query heads), and takes the tokens of the closest sentences until the budget is full; the last sentence
    may be cut. The first ``start`` tokens of the prompt and the newest ``recent`` are attended to in any case, and take
    no place among the others. A generated sentence becomes a candidate like those of the prompt; unlike in the authors'
    code, so does the running one, as far as it reaches behind the newest tokens, and the budget holds from a
    sentence's first token on.

    A further turn is judged anew with all that came before. Discarded tokens keep their place in memory.

    Args:
        budget: Slots that a decode step attends to in each layer and KV head, the first and the newest included (the
            paper's runs: 1,024), as a count, or below 1 as a share of the real tokens of each row's prompt.
        start: First tokens that are always attended to.
        recent: Newest tokens that are always attended to, the current one included.
        factor: Candidates among a prompt's tokens, as a multiple of the budget (the paper's r: 3 for LongBench, 2 for
            RULER).
        window: Last queries of a prompt that judge its tokens.
        kernel: Width of the max-pooling of their attention in tokens, odd; 1 does without.
        max_sentence: Tokens after which a sentence is cut where no mark ends it.
        ends: Ids that end a sentence. Without any, those whose text ends in ``. ! ?``, their CJK forms, or a blank
            line, as the tokenizer in the model's folder spells them.
        tokenizer: Folder or id of the tokenizer, where it is not in the model's folder.
    """

    needs_attention: ClassVar[bool] = True
    sums: ClassVar[bool] = False

    budget: int | float = 1024
    start: int = 32
    recent: int = 32
    factor: float = 3.0
    window: int = 32
    kernel: int = 7
    max_sentence: int = 64
    ends: tuple[int, ...] = ()
    tokenizer: str = ""

    def validate(self) -> None:
        for name, least in (("start", 0), ("recent", 1), ("factor", 1), ("window", 1), ("max_sentence", 1)):
            self.check(name, f"at least {least}", getattr(self, name) >= least)
        self.check("kernel", "an odd number of at least 1", self.kernel >= 1 and self.kernel % 2 == 1)
        self.check("ends", "ids of at least 0", all(number >= 0 for number in self.ends))
        super().validate()

    def least(self) -> int:
        return self.start + self.recent + 1

    # Token ids -------------------------------------------------------------------------------------------------------
    def prepare(self, model: PreTrainedModel) -> Tensor:
        """Which ids end a sentence, bool ``[ids]``."""
        embedding: Any = model.get_input_embeddings()
        size = embedding.weight.shape[0]
        ends = torch.zeros(size, dtype=torch.bool)
        ids = self.ends or _spelled_ends(self, model)
        ends[[number for number in ids if number < size]] = True
        return ends.to(model.device)

    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        """Whether each new token ends a sentence, and its number in its forward, from which a commit takes some."""
        if not getattr(_thread, "depth", 0):
            raise CacheMisuse(
                f"{self} reads the ids of the tokens, and nothing shows them to it here: run the model inside "
                "`with policy(model):`, or make the cache with `policy.cache(model)`"
            )
        batch, _, new, _ = keys.shape
        ids = getattr(_thread, "ids", None)
        marks = torch.zeros(batch, 1, new, 2, dtype=torch.int32, device=keys.device)
        marks[..., 1] = torch.arange(new, device=keys.device)
        # Rows that come as mixtures of embeddings, or stand behind the ids of a block, spell nothing and end nothing.
        if ids is not None and ids.ndim == 2 and ids.shape[0] == batch and ids.shape[1] <= new:
            marks[:, 0, : ids.shape[1], 0] = layer.cache.prepared[ids.to(keys.device)].int()
        return {"mark": marks}

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> AbstractContextManager[PreTrainedModel]:
        super().__call__(model, *args, **kwargs)  # refuses what is no model
        return _ReadingBlock(model, self)

    def cache(self, model: PreTrainedModel) -> TokenCache:
        cache = super().cache(model)
        release = cache.on_release
        _listen(model)

        def released() -> None:
            _forgo(model)
            if release is not None:
                release()

        cache.on_release = released
        return cache

    # Prompts ---------------------------------------------------------------------------------------------------------
    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        if layer.pending is not None or (rows.count == 1 and layer.state):
            return
        heads, count = rows.query.shape[1:3]
        last = slice(max(0, count - self.window), None)
        queries = rows.query[:, :, last]
        _, own = layer.positions(layer.cache.forward_block)
        at = own[:, last]
        if rows.valid is not None:
            at = at.masked_fill(~rows.valid[:, last], -1)
        if "window" in layer.state:
            # A prompt in chunks, or a further turn that is shorter than the window.
            queries = torch.cat([layer.state["window"], queries], 2)
            at = torch.cat([layer.state["window_at"], at], 1)
            newest = at.argsort(dim=-1, stable=True)[:, -self.window :]
            queries = queries.gather(2, newest[:, None, :, None].expand(-1, heads, -1, queries.shape[-1]))
            at = at.gather(1, newest)
        layer.state["window"], layer.state["window_at"] = queries, at
        if rows.softcap is not None:
            layer.state["softcap"] = torch.full((at.shape[0],), rows.softcap, device=at.device)
        layer.state.pop("listed", None)
        if not layer.bits:
            # Now, where the keys are at hand: behind the forward they may stand elsewhere.
            slots = layer.slots.copy()
            slots.append(count, rows.valid, own, at.shape[0], rows.key.device)
            self._read(layer, rows.key, slots)

    def _judged(
        self, layer: TokenLayer, keys: Tensor, seen: Tensor, order: Tensor, at: Tensor, length: Tensor
    ) -> Tensor:
        """Which tokens are candidates, bool ``[batch, kv_heads, tokens]``, tokens in the order of time.

        Args:
            keys: ``[batch, kv_heads, slots, head_dim]``.
            seen: Which slots each query of the window sees, bool ``[batch, window, slots]``.
            order: The slot of each token ``[batch, tokens]``.
            at: Its position, likewise.
            length: Real tokens of each row ``[batch]``.
        """
        heads, size = keys.shape[1:3]
        real = at < _FAR
        most = (self.factor * torch.tensor(layer.budgets(), device=keys.device)).long()
        if bool((length <= most).all()):
            return real[:, None].expand(-1, heads, -1)
        softcap = layer.state.get("softcap")
        queries, cap = layer.state["window"], None if softcap is None else float(softcap[0])
        logits = AttentionRows(queries, keys, seen[:, None], False, layer.scaling, cap).logits()
        # A query of padding sees nothing: its probabilities count as zero.
        worth = torch.nan_to_num(logits.softmax(-1)).sum((2, 3)).gather(-1, order[:, None].expand(-1, heads, -1))
        newest = at >= (length - self.window)[:, None]
        worth = F.max_pool1d(worth.masked_fill(newest[:, None], 0), self.kernel, stride=1, padding=self.kernel // 2)
        worth = worth.masked_fill(newest[:, None], 1e30)
        fixed = (at < self.start) | (at >= (length - self.recent)[:, None])
        worth = worth.masked_fill(fixed[:, None], float("inf")).masked_fill(~real[:, None], float("-inf"))
        ranked = worth.argsort(dim=-1, descending=True, stable=True)
        within = torch.arange(size, device=keys.device) < most[:, None, None]
        return torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, ranked, within.expand_as(worth)) & real[:, None]

    def _read(self, layer: TokenLayer, keys: Tensor, held: Slots) -> None:
        """Group all that is held by sentences, from its keys ``[batch, kv_heads, slots, head_dim]``."""
        batch, heads, size, dim = keys.shape
        device, wide = keys.device, torch.promote_types(keys.dtype, torch.float32)
        valid, places = held.materialise(batch, device)
        at = places[:, 0].masked_fill(~valid[:, 0], _FAR)
        at, order = at.sort(dim=-1, stable=True)
        real = at < _FAR
        length = real.sum(-1)
        natural = layer.indexed("mark")[:, 0, :, 0].bool().gather(1, order) & real
        since = at - _before(at, natural, length * 0) + 1
        ended = (natural | (since % self.max_sentence == 0)) & real
        sentence = ended.long().cumsum(-1) - ended.long()
        count = int(sentence.max()) + 1
        seen = valid[:, :1] & (places[:, :1] <= layer.state["window_at"][:, :, None])
        kept = self._judged(layer, keys, seen, order, at, length)
        most = int(kept.sum(-1).max())
        listed = kept.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
        used = kept.gather(-1, listed)
        whose = sentence[:, None].expand(-1, heads, -1).gather(-1, listed)
        slots = order[:, None].expand(-1, heads, -1).gather(-1, listed)
        chosen = keys.gather(2, slots[..., None].expand(-1, -1, -1, dim)).to(wide) * used[..., None]
        sums = torch.zeros(batch, heads, count, dim, dtype=wide, device=device)
        sums.scatter_add_(2, whose[..., None].expand(-1, -1, -1, dim), chosen)
        sizes = torch.zeros(batch, heads, count, dtype=torch.long, device=device).scatter_add_(-1, whose, used.long())
        tail = length[:, None] - torch.arange(self.recent - 1, 0, -1, device=device)
        layer.state |= {
            "listed": slots,
            "when": at[:, None].expand(-1, heads, -1).gather(-1, listed).masked_fill(~used, _FAR),
            "means": sums / sizes.clamp(min=1)[..., None],
            "starts": F.pad(sizes.cumsum(-1), (1, 0)),
            "begun": length.clamp(max=self.start),
            "last": at.masked_fill(~real, -1).amax(-1) + 1,
            "covered": torch.full((batch,), size, device=device),
            **_nothing_open(batch, heads, dim, wide, device),
            "newest": order.gather(1, tail.clamp(min=0)),
            "newest_at": at.gather(1, tail.clamp(min=0)).masked_fill(tail < 0, -_FAR),
        }

    # Decoding --------------------------------------------------------------------------------------------------------
    def score(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> Tensor:
        raise NotImplementedError("sentences are scored, not tokens")

    def retrieve(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        state, block = layer.state, layer.cache.forward_block
        batch, heads = layer.shape
        new, dim, device = query.shape[2], query.shape[3], query.device
        wide = torch.promote_types(query.dtype, torch.float32)
        asked = state["asked"] = query.view(batch, heads, -1, new, dim).to(wide).mean(2)
        budgets = layer.budgets()
        if min(budgets) >= layer.size:
            return None
        own = layer.positions(block)[1]  # [batch, new]
        old = own - self.recent  # the newest position of each row that is not recent
        path = block.among(device).expand(batch, -1, -1)  # [batch, row, token]
        itself = torch.eye(new, dtype=torch.bool, device=device)
        above = path & ~itself
        # Sentences along the path of each row: a draft may end one for those behind it.
        natural = layer.indexed("mark")[:, 0, -new:, 0].bool()
        back = torch.where(above & natural[:, None], own[:, None] + 1, 0).amax(-1)
        ended = natural | ((own - torch.maximum(back, state["last"][:, None]) + 1) % self.max_sentence == 0)
        closed = above & ended[:, None]
        number = closed.sum(-1)
        same = path & (number[:, :, None] == number[:, None])
        first = number == 0
        spoken = state["open_at"] >= 0
        share = first[:, None, :, None].to(wide)
        total = (same.sum(-1) + first * spoken.sum(-1, keepdim=True))[:, None, :, None]
        among = same[:, None].to(wide)
        mean_query = (among @ asked + share * state["open_query"][:, :, None]) / total
        mean_key = (among @ layer.newest(new).to(wide) + share * state["open_key"][:, :, None]) / total
        similar = mean_query @ torch.cat([state["means"], mean_key], 2).transpose(-1, -2)
        # The tokens of the sentences that end, or still run, in the block.
        member = torch.cat([first[:, :, None] & spoken[:, None], same], -1)  # [batch, sentence, tokens]
        inner = member.byte().argsort(dim=-1, descending=True, stable=True)
        slots = torch.cat([state["open"], (layer.size - new + torch.arange(new, device=device)).expand(batch, -1)], -1)
        slots = slots[:, None].expand_as(member).gather(-1, inner)
        when = torch.cat([state["open_at"], own], -1)[:, None].masked_fill(~member, _FAR)
        seen = (itself | closed) * (when[:, None] <= old[:, :, None, None]).sum(-1)
        # The listed tokens of each sentence that are neither the first nor recent.
        upto = torch.searchsorted(state["when"], old[:, None].expand(-1, heads, -1).contiguous(), right=True)
        low = torch.maximum(state["starts"][..., :-1], state["begun"][:, None, None])
        high = torch.minimum(state["starts"][..., None, 1:], upto[..., None])
        lengths = torch.cat([(high - low[:, :, None]).clamp(min=0), seen[:, None].expand(-1, heads, -1, -1)], -1)
        width = member.shape[-1]
        known = state["listed"].shape[-1]
        bases = torch.cat([low, (known + torch.arange(new, device=device) * width).expand(batch, heads, -1)], -1)
        pool = torch.cat([state["listed"], slots.flatten(1)[:, None].expand(-1, heads, -1)], -1)

        order = similar.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(max(budgets) - self.recent, device=device)
        rank = (place - state["begun"][:, None]).expand(batch, -1)[:, None, None].expand(-1, heads, new, -1)
        listed, counts = members(pool, bases, lengths, order, rank)
        # The prompt's first tokens come first, and stand first in the pool.
        begun = pool[:, :, None, : place.numel()].expand(-1, -1, new, -1)
        begun = F.pad(begun, (0, place.numel() - begun.shape[-1]))
        chosen = torch.where(rank < 0, begun, listed)
        counts = torch.where(rank < 0, place <= old[:, None, :, None], counts)
        counts = counts & (place < torch.tensor(budgets, device=device)[:, None] - self.recent)[:, None, None]
        near = torch.cat([state["newest"], slots.new_zeros(batch, new) + torch.arange(new, device=device)
                          + layer.size - new], -1)  # fmt: skip
        near_at = torch.cat([state["newest_at"], own], -1)
        recent = near_at[:, None] > old[:, :, None]
        recent[..., -new:] &= path
        near = near[:, None, None].expand(-1, heads, new, -1)
        return torch.cat([chosen, near], -1), torch.cat([counts, recent[:, None].expand(-1, heads, -1, -1)], -1)

    def settled(self, layer: TokenLayer) -> None:
        state = layer.state
        if "listed" not in state:
            self._read(layer, layer.held()[0], layer.slots)
            return
        (batch, heads), size, dim, device = layer.shape, layer.size, state["means"].shape[-1], layer.device
        covered = int(state["covered"][0])
        take = size - covered
        if take == 0:
            return
        valid, places = layer.slots.materialise(batch, device)
        real, at = valid[:, 0, covered:], places[:, 0, covered:]
        slots = torch.arange(covered, size, device=device).expand(batch, -1)
        mark = layer.indexed("mark")[:, 0, covered:]
        asked = state["asked"].gather(2, mark[:, None, :, 1:].long().expand(-1, heads, -1, dim))
        keys = layer.newest(take).to(asked.dtype)
        natural = mark[..., 0].bool() & real
        since = at - _before(at, natural, state["last"]) + 1
        ended = (natural | (since % self.max_sentence == 0)) & real
        number = ended.long().cumsum(-1) - ended.long()
        closing = ended.sum(-1)
        state["last"] = torch.maximum(state["last"], torch.where(natural, at + 1, 0).amax(-1))
        state["covered"] = state["covered"] + take
        newest_at, best = torch.cat([state["newest_at"], at.masked_fill(~real, -_FAR)], -1).sort(dim=-1, stable=True)
        state["newest_at"] = newest_at[:, take:]
        state["newest"] = torch.cat([state["newest"], slots], -1).gather(1, best[:, take:])

        tokens = torch.cat([state["open"], slots], -1)
        when = torch.cat([state["open_at"], at.masked_fill(~real, -1)], -1)
        whose = torch.cat([torch.zeros_like(state["open"]), number], -1)
        ends = int(closing.max())
        if ends:
            self._close(layer, keys, when, tokens, whose, closing, ends)
        running = (number == closing[:, None]) & real
        carried = (closing == 0)[:, None, None]
        rows = running[:, None, None].to(keys.dtype)
        state["open_key"] = state["open_key"] * carried + (rows @ keys)[:, :, 0]
        state["open_query"] = state["open_query"] * carried + (rows @ asked)[:, :, 0]
        stay = (when >= 0) & (whose == closing[:, None])
        if ends or bool(state["open"].shape[-1] > 2 * self.max_sentence):
            width = int(stay.sum(-1).max())
            place = stay.byte().argsort(dim=-1, descending=True, stable=True)[:, :width]
            tokens, when, stay = (part.gather(1, place) for part in (tokens, when, stay))
        state["open"], state["open_at"] = tokens, when.masked_fill(~stay, -1)

    def cropped(self, layer: TokenLayer) -> None:
        """Group what remains by sentences anew; the queries that judge a prompt must not all be gone."""
        if "window" not in layer.state:
            return
        at = layer.state["window_at"].masked_fill(layer.state["window_at"] >= layer.cache.seen[:, None], -1)
        if bool((at < 0).all(-1).any()):
            raise CacheMisuse(
                f"{self} judges the prompt by its last {self.window} queries, and all of them are taken back: start "
                "from the whole prompt, or use a larger window"
            )
        layer.state = {name: part for name, part in layer.state.items() if name in ("window", "softcap")}
        layer.state["window_at"] = at
        self._read(layer, layer.held()[0], layer.slots)

    def _close(
        self, layer: TokenLayer, keys: Tensor, when: Tensor, tokens: Tensor, whose: Tensor, closing: Tensor, ends: int
    ) -> None:
        """Make candidates of the sentences that have ended: ``whose`` ``[batch, tokens]`` numbers them."""
        state = layer.state
        heads, take = keys.shape[1:3]
        each = torch.arange(ends, device=keys.device)[:, None]
        belongs = (whose[:, None] == each) & (when >= 0)[:, None] & (each < closing[:, None, None])
        sizes = belongs.sum(-1)  # [batch, ends]
        sums = belongs[:, None, :, -take:].to(keys.dtype) @ keys
        sums[:, :, 0] += state["open_key"] * (closing > 0)[:, None, None]
        state["means"] = torch.cat([state["means"], sums / sizes.clamp(min=1)[:, None, :, None]], 2)
        starts = state["starts"]
        state["starts"] = torch.cat([starts, starts[..., -1:] + sizes.cumsum(-1)[:, None]], -1)
        added = when.masked_fill(~belongs.any(1), _FAR)[:, None].expand(-1, heads, -1)
        # Rows and sentences of unequal length leave gaps, which go to the end.
        known, order = torch.cat([state["when"], added], -1).sort(dim=-1, stable=True)
        width = int(state["starts"][..., -1].max())
        listed = torch.cat([state["listed"], tokens[:, None].expand(-1, heads, -1)], -1)
        state["when"], state["listed"] = known[..., :width].contiguous(), listed.gather(-1, order[..., :width])


def _before(at: Tensor, natural: Tensor, last: Tensor) -> Tensor:
    """Where the sentence of each token of a chain ``[batch, tokens]`` begins, as far as marks tell."""
    ends = torch.where(natural, at + 1, 0).cummax(-1).values
    return torch.maximum(F.pad(ends[:, :-1], (1, 0)), last[:, None])


def _nothing_open(batch: int, heads: int, dim: int, wide: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    sums = torch.zeros(batch, heads, dim, dtype=wide, device=device)
    slots = torch.zeros(batch, 0, dtype=torch.long, device=device)
    return {"open": slots, "open_at": slots, "open_key": sums, "open_query": sums}


def sentence_ends(tokenizer: Any) -> tuple[int, ...]:
    """Ids whose text, blanks and closing quotes or brackets aside, ends in a sentence's mark, or holds a blank line.

    Raises:
        UnsupportedModel: The tokenizer is neither byte-level BPE nor SentencePiece, so what its ids spell is not known.
    """
    found = []
    for number, spelled in enumerate(token_bytes(tokenizer)):
        text = spelled.decode(errors="ignore")
        if "\n\n" in text or text.rstrip().rstrip(_CLOSING).endswith(_MARKS):
            found.append(number)
    return tuple(found)


def _spelled_ends(policy: SentenceKV, model: PreTrainedModel) -> tuple[int, ...]:
    where = policy.tokenizer or loaded_name(model)
    if where.startswith("tokenry/"):
        where = str(path(where))
    try:
        if where:
            return _ends_of(where, max((file.stat().st_mtime_ns for file in Path(where).glob("*token*")), default=0))
        fault = "the model has no folder"
    except (OSError, ValueError, KeyError) as error:
        fault = f"{where!r} has none that loads ({str(error).strip().splitlines()[0]})"
    raise ResourceError(
        f"{policy.slug} needs a tokenizer to know where sentences end, and {fault}: give tokenizer=FOLDER, or the ids "
        "themselves, as in ends=(13,30)"
    )


@functools.lru_cache(maxsize=8)
def _ends_of(where: str, changed: int) -> tuple[int, ...]:
    """The ends of a tokenizer, whose whole vocabulary is spelled once for all caches until its files change."""
    return sentence_ends(AutoTokenizer.from_pretrained(where))


# Reading ids ---------------------------------------------------------------------------------------------------------
_thread = threading.local()
_lock = threading.RLock()
# The hooks of each model that is read, and how many blocks and caches want them.
_readers: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, list[RemovableHandle]]] = weakref.WeakKeyDictionary()


class _ReadingBlock(PolicyBlock):
    """A block whose policy is shown the ids that forwards look up."""

    def __enter__(self) -> PreTrainedModel:
        model = super().__enter__()
        _listen(model)
        _start_anew()
        return model

    def __exit__(self, *error: object) -> None:
        _start_anew()
        _forgo(self.model)
        super().__exit__(*error)


def _listen(model: PreTrainedModel) -> None:
    """Note which ids are looked up in each thread until a forward has used them; decoders that feed embeddings look up
    the ids of their tokens, too."""
    with _lock:
        count, hooks = _readers.get(model, (0, []))
        if not count:
            modules = dict.fromkeys((model, model.base_model))
            hooks = [
                model.get_input_embeddings().register_forward_pre_hook(_looked_up),
                *(module.register_forward_pre_hook(_enter) for module in modules),
                *(module.register_forward_hook(_leave, always_call=True) for module in modules),
            ]
        _readers[model] = count + 1, hooks


def _forgo(model: PreTrainedModel) -> None:
    """Leave what :func:`_listen` entered."""
    with _lock:
        count, hooks = _readers.pop(model, (0, []))
        if count > 1:
            _readers[model] = count - 1, hooks
            return
        for hook in hooks:
            hook.remove()


def _start_anew() -> None:
    """No forward runs in this thread, though torch runs no hook behind one that was interrupted from outside."""
    _thread.depth, _thread.ids = 0, None


def _looked_up(module: Any, args: tuple[Any, ...]) -> None:
    _thread.ids = args[0] if args else None


def _enter(module: Any, args: tuple[Any, ...]) -> None:
    _thread.depth = getattr(_thread, "depth", 0) + 1


def _leave(module: Any, args: Any, output: Any) -> None:
    _thread.depth = max(0, getattr(_thread, "depth", 0) - 1)
    if _thread.depth == 0:
        _thread.ids = None


__all__ = ["SentenceKV", "sentence_ends"]

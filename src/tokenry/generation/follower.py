"""A second model that reads along with a call: its cache, what each row still has to be fed, and which one it is."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import ResourceError
from tokenry.generation.auxiliary import listening
from tokenry.generation.session import Session, keeps_logits
from tokenry.models import TokenCache, context_length, own_tokenizer, resource
from tokenry.models.anatomy import text_config


class Follower:
    """A model beside one call that is fed what the rows have committed, when it is asked and not before.

    Rows progress unequally, and not every row has to be fed at once. The model must be inside `attached`.

    Attributes:
        model: The model.
        cache: Its keys and values; of each row all that was fed.
        read: Columns of the session's ids that each row has been fed, padding included.
        hidden: What the head read of each row's last token in the last `catch_up` that asked for it, `[batch, hidden]`.
    """

    def __init__(self, session: Session, model: PreTrainedModel, cache: TokenCache, name: str, read: int = 0) -> None:
        """`name` is what it is called in the counts; the cache holds `read` columns of each row already."""
        self.model = model
        self.cache = cache
        self.read = [read] * session.batch
        self.hidden: Tensor | None = None
        self._vocab = int(text_config(model).vocab_size)
        self._context = context_length(model)
        self._first = session.first.tolist()
        self._counts = session.stats.extra
        self._name = f"{name}_forwards"
        self._counts[self._name] = 0

    def room(self, session: Session) -> int:
        """Tokens of its own context that are left behind the longest unfinished row."""
        if self._context is None:
            return session.max_length
        rows = zip(session.lengths, self._first, session.alive, strict=True)
        return max(0, self._context - max(length - first for length, first, alive in rows if alive))

    def catch_up(self, session: Session, rows: Tensor | None = None, *, hidden: bool = False) -> Tensor:
        """Feed what rows have committed and not been fed, the anchor last, in one forward (or in pieces of
        `prefill_chunk_size`), and return the logits behind the anchor, float32 `[batch, vocab]`.

        Args:
            session: The call.
            rows: Which rows are fed, bool `[batch]`, all with something to be fed; None: the unfinished ones. What
                comes back for the others means nothing.
            hidden: Whether to leave what the head read.
        """
        fed = session.alive if rows is None else rows.tolist()
        state = list(zip(session.lengths, self.read, fed, strict=True))
        if session.batch == 1:
            start = max(self.read[0], self._first[0])
            tokens, valid = session.ids[:, start : session.lengths[0]], None
        else:
            width = max(length - read for length, read, own in state if own)
            columns = session.length[:, None] + torch.arange(-width, 0, device=session.device)
            tokens = session.ids.gather(1, columns.clamp(min=0))
            start = torch.maximum(torch.tensor(self.read, device=session.device), session.first)
            real = (columns >= start[:, None]) & (session.active if rows is None else rows)[:, None]
            valid = None if bool(real.all()) else real
        width = tokens.shape[1]
        chunk = session.config.prefill_chunk_size or width
        options: dict[str, Any] = {"logits_to_keep": 1} if keeps_logits(self.model) else {}
        for begin in range(0, width, chunk):
            piece = tokens[:, begin : begin + chunk]
            here = None if valid is None else valid[:, begin : begin + chunk]
            self.cache.stage(here)
            ahead = torch.arange(piece.shape[1], device=piece.device)[None] if here is None else here.cumsum(1) - 1
            positions = (ahead + (self.cache.seen[:, None] if self.cache.batch else 0)).clamp(min=0)
            if hidden and begin + chunk >= width:
                with listening(self.model, slice(-1, None)) as heard:
                    logits = self._forward(piece, positions, **options)
                assert heard.hidden is not None
                self.hidden = heard.hidden[:, -1]
            else:
                logits = self._forward(piece, positions, **options)
        self.read = [length if own else read for length, read, own in state]
        return self._fitting(logits[:, -1], session.vocab)

    def _forward(self, tokens: Tensor, positions: Tensor, cache: TokenCache | None = None, **options: Any) -> Tensor:
        """Logits of tokens; `cache` is filled in place of the own one."""
        self._counts[self._name] += 1
        output = self.model(
            input_ids=tokens.clamp(max=self._vocab - 1),
            position_ids=positions.expand_as(tokens),
            past_key_values=self.cache if cache is None else cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        return output.logits

    def _fitting(self, logits: Tensor, vocab: int) -> Tensor:
        """Logits as wide as the target's: ids that only one model has are padding, which is not chosen."""
        logits = logits[..., :vocab].to(torch.float32)
        return torch.nn.functional.pad(logits, (0, vocab - logits.shape[-1]), value=-torch.inf)


def second_model(
    slug: str, field: str, name: str, model: PreTrainedModel, resources: Mapping[str, Any]
) -> PreTrainedModel:
    """The second model of a method beside `model`: the resource `field` if it was handed over, else the one of `name`.

    Vocabularies of different size are taken where the tokenizer is at hand and has no more tokens than the smaller
    (some families pad them). Where the second model's folder has a tokenizer too, the two must agree; a few special
    tokens may differ.

    Raises:
        ResourceError: It does not load, is on another device, or has another vocabulary.
    """
    given = resources.get(field)
    if given is not None and not isinstance(given, PreTrainedModel):
        raise ResourceError(
            f"{slug}: the resource {field!r} must be a loaded model, not {type(given).__name__}; "
            f"name a path or id as {field}="
        )
    second = resource(name if given is None else given, model)
    said = name if given is None else type(given).__name__
    if second.device != model.device:
        raise ResourceError(
            f"{slug}: the {field} {said} is on {second.device} and the model on {model.device}; move it there"
        )
    mine, its = (int(text_config(each).vocab_size) for each in (model, second))
    tokenizer = resources.get("tokenizer")
    if mine != its and (tokenizer is None or len(tokenizer) > min(mine, its)):
        known = "no tokenizer is at hand" if tokenizer is None else f"the tokenizer has {len(tokenizer)} tokens"
        raise ResourceError(
            f"{slug}: the {field} {said} has {its} tokens in its vocabulary and the model {mine}; both must "
            f"share one tokenizer, and may differ in padding alone ({known}): give the model's own small sibling, "
            f"as in {slug}:{field}=PATH"
        )
    other = own_tokenizer(second) if hasattr(tokenizer, "get_vocab") else None
    if other is not None and _agreement(tokenizer, other) < _AGREEMENT:
        raise ResourceError(
            f"{slug}: the {field} {said} has another tokenizer than the model, so its tokens mean other texts: give "
            f"the model's own small sibling, as in {slug}:{field}=PATH"
        )
    return second


# Share of the ids of the smaller tokenizer that must stand for the same token in both.
_AGREEMENT = 0.9
_agreements: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, float]] = weakref.WeakKeyDictionary()


def _agreement(one: Any, other: Any) -> float:
    known = _agreements.setdefault(one, weakref.WeakKeyDictionary())
    if other not in known:
        mine, its = one.get_vocab(), other.get_vocab()
        same = sum(its.get(token) == number for token, number in mine.items())
        known[other] = same / max(1, min(len(mine), len(its)))
    return known[other]

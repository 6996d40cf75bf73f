"""DapQ: a prompt's tokens judged by pseudo queries at the positions where decoding will ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import CacheMisuse
from tokenry.kvcache.engine import AttentionRows, CachePolicy, TokenLayer, age_first
from tokenry.models import TokenCache, context_length

# Above any sum of attention: generated tokens outrank the prompt's.
_GENERATED = 2**20


@dataclass(frozen=True, kw_only=True)
class DapQ(CachePolicy):
    """Keep the prompt's tokens that pseudo queries at the coming positions attend to (arXiv 2603.11564).

    Behind each prompt, ``pseudo`` tokens of its own (half its first, half its last) run once at the positions of the
    tokens to be generated. The attention that their queries give to a slot, summed over them and over the query heads
    of its KV head, is its score; then they are forgotten. The prompt's own outputs and keys do not know of them. What
    the pseudo queries see is the whole prompt, so all of it is held until they have run.

    The paper drops prompt tokens once and lets the cache grow; here the budget holds in decoding too: generated tokens
    stay, and each takes the place of the prompt token with the least score, then of the oldest generated one. A
    forward of several tokens, a further turn or a chunk of a prompt, is judged with all that is held at its end.

    Args:
        budget: Slots a layer and KV head after every forward.
        pseudo: Pseudo tokens (the paper's 32), fewer where the model's context ends before.
        recent: Newest tokens that always stay; the paper names none.
    """

    needs_attention: ClassVar[bool] = True
    ordered: ClassVar[bool] = False

    pseudo: int = 32
    recent: int = 8

    def validate(self) -> None:
        self.check("pseudo", "at least 1", self.pseudo >= 1)
        self.check("recent", "at least 0", self.recent >= 0)
        super().validate()

    def protected(self) -> int:
        return self.recent

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        return {"score": (positions + _GENERATED).float()[:, None].expand(-1, heads, -1)}

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        if "unjudged" in layer.state and rows.count:
            raise CacheMisuse(f"{self} could not judge the prompt of this cache: start a new one")
        if rows.count > 1 and layer.pending is None:
            # A mark for the prompt's end; it moves with the state.
            layer.state["unjudged"] = torch.zeros_like(layer.state["score"], dtype=torch.bool)

    def score(self, layer: TokenLayer) -> Tensor:
        return layer.state["score"].masked_fill(age_first(layer, self.recent), float("inf"))

    def keep(self, layer: TokenLayer) -> Tensor | None:
        return None if "unjudged" in layer.state else super().keep(layer)

    def judge(self, model: PreTrainedModel, cache: TokenCache, tokens: Tensor) -> None:
        """Score what the cache holds by the queries of ``tokens`` behind it, and drop what is over the budget.

        Args:
            model: The model that fills the cache, inside its block.
            cache: A cache of this policy, at the end of a prompt.
            tokens: Ids ``[batch, pseudo]``; nothing of them stays.
        """
        layers = _ruled(cache)
        count = tokens.shape[1]
        positions = cache.seen[:, None] + torch.arange(count, device=tokens.device)
        ended = cache.prompt_ended
        cache.stage(deferred=True)
        with torch.no_grad():
            model.base_model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        # They are no drafts: the prompt may go on.
        cache.prompt_ended = ended
        scores = [layer.pending.rows()[..., :-count].sum(2) for layer in layers if layer.pending is not None]
        cache.commit(tokens[:, :1] * 0, torch.zeros_like(tokens[:, 0]))
        for layer, score in zip(layers, scores, strict=True):
            layer.state["score"] = score
            layer.state.pop("unjudged", None)
            layer.evict(True)

    def after(self, model: PreTrainedModel, cache: TokenCache, input_ids: Tensor | None) -> None:
        if input_ids is None:
            raise CacheMisuse(
                f"{self} takes its pseudo tokens from the prompt's ids: give input_ids, not inputs_embeds"
            )
        count = self.pseudo
        context = context_length(model)
        if context is not None:
            count = min(count, context - int(cache.seen.max()))
        if count < 1:
            raise CacheMisuse(
                f"the prompt fills the model's context of {context} tokens, which leaves {self} no position that could "
                "be decoded at: shorten the prompt"
            )
        self.judge(model, cache, pseudo_tokens(cache, input_ids, count))


def _ruled(cache: TokenCache) -> list[TokenLayer]:
    return [layer for layer in cache.layers if layer.window is None]


def pseudo_tokens(cache: TokenCache, ids: Tensor, count: int) -> Tensor:
    """The first and the last real tokens of each row of ``ids`` ``[batch, length]``, ``[batch, count]`` in all; a row
    that has fewer repeats them."""
    valid, _ = cache.slots.materialise(cache.batch, cache.device)
    real = valid[:, 0, -ids.shape[1] :]
    order = real.byte().argsort(dim=-1, descending=True, stable=True)
    length = real.sum(-1, keepdim=True).clamp(min=1)
    half = count // 2
    place = torch.arange(count, device=ids.device)
    place = torch.where(place < half, place, length - count + place) % length
    return ids.gather(1, order.gather(1, place))

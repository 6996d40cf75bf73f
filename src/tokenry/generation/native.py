"""A session on the model's own attention and transformers' own cache: one token a step, any causal model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation import GenerationMixin

from tokenry.errors import CacheMisuse
from tokenry.generation.session import Commit, Session, keeps_logits


class NativeSession(Session):
    """Feeds the model exactly what transformers' own loop feeds it, finished rows and their padding included.

    The cache is the one that `generate` prepared or the caller passed, of whatever layers the model has.
    """

    def prepare(self, position_ids: Tensor | None) -> None:
        """Take the prompt's positions `[..., length]` as `generate` prepared them."""
        self._position_ids = position_ids
        # A mask that has room for all tokens to come, so that a step takes a view of it.
        if self._mask is not None:
            after = self._mask.new_ones(self.batch, self.max_length + 1 - self.prompt_length)
            self._mask = torch.cat([self._mask, after], 1)
        self._options: dict[str, Any] = {"use_cache": True}
        if keeps_logits(self.model):
            self._options["logits_to_keep"] = 1
        # A model that prepares its inputs in its own way is asked to; for the others the way is known and shorter.
        model: Any = self.model
        own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
        self._prepares = own or model.is_remote_code()

    def prefill(self, later: bool = False) -> None:
        super().prefill()
        if self._position_ids is not None:
            self._position_ids = self._position_ids[..., -1:]
        self._fed = self.anchor

    def accept(self, commit: Commit) -> None:
        super().accept(commit)
        # Rows finished before this step are fed padding, as transformers feeds them.
        self._fed = self.anchor if self._carry_all else torch.where(self._carry, self.anchor, self.pad)

    def verify(self, *args: Any, **kwargs: Any) -> Tensor:
        raise CacheMisuse("a session on the model's own attention verifies no drafts")

    def branch(self, rows: Tensor) -> Session:
        raise CacheMisuse("a session on the model's own attention has no branches")

    def final_cache(self, given: Cache | None) -> Cache:
        return self.cache

    # Inside ----------------------------------------------------------------------------------------
    def _forward_prompt(self, ids: Tensor, valid: Tensor | None, count: int) -> Tensor:
        model: Any = self.model
        past = self.cache.get_seq_length()
        end = past + ids.shape[1]
        options = dict(self._options)
        if self._position_ids is not None:
            # Positions of the whole prompt, or of its new part where the cache held the rest.
            begin = past - (self._covered - self._position_ids.shape[-1])
            options["position_ids"] = self._position_ids[..., begin : begin + ids.shape[1]]
        if self._mask is not None:
            options["attention_mask"] = self._mask[:, :end]
        if self._prepares:
            inputs = model.prepare_inputs_for_generation(
                ids, past_key_values=self.cache, is_first_iteration=True, **options
            )
            return self._logits_of(inputs)
        return self._logits_of({"input_ids": ids, "past_key_values": self.cache, **options})

    def _forward_anchor(self) -> Tensor:
        model: Any = self.model
        options = dict(self._options)
        length = self.cache.get_seq_length() + 1
        if self._position_ids is not None:
            self._position_ids = self._position_ids + 1
            options["position_ids"] = self._position_ids
        if self._mask is not None:
            options["attention_mask"] = self._mask[:, :length]
        if self._prepares:
            columns = max(n for n, alive in zip(self.lengths, self.alive, strict=True) if alive)
            ids = self.ids[:, :columns]
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1, past_key_values=self.cache, **options
            )
            inputs["input_ids"] = self._fed[:, None]
        else:
            inputs = {"input_ids": self._fed[:, None], "past_key_values": self.cache, **options}
        return self._logits_of(inputs)[:, -1]

    def _logits_of(self, inputs: dict[str, Any]) -> Tensor:
        return self.model(**inputs, return_dict=True).logits

    def _kv_bytes(self) -> int:
        held = 0
        for layer in getattr(self.cache, "layers", []):
            for name in ("keys", "values"):
                tensor = getattr(layer, name, None)
                held += tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0
        return held

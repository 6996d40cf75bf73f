"""Decoders that write several sequences behind each prompt, and forwards of what no one commits.

The rows of their results are laid out as transformers lays out `num_return_sequences`: all of the first prompt, then
all of the second, best first. Inside a call the session keeps one row a prompt, and so does its cache.
"""

from __future__ import annotations

import copy
from abc import ABC
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from tokenry.errors import CacheMisuse
from tokenry.generation.engine import Decoder, Options, Session
from tokenry.generation.result import NO_SOURCE, GenerationResult, Source
from tokenry.generation.session import keeps_logits
from tokenry.methods import Combination, Method
from tokenry.models import compat

_PLACE = "several sequences"


@dataclass
class Several:
    """The sequences of one call, filled by its steps; n of them for each row of the session.

    Attributes:
        ends: Ids that end a text, `[ends]`.
        criteria: Stopping criteria of the call besides end tokens and length.
        start: Columns of the session's ids that come before the sequences.
        pad: What stands behind a sequence that is shorter than the longest.
        tokens: `[batch, n, m]`; None while the session's own rows are the result.
        counts: Real ones of them, `[batch, n]`.
        logits: For each of the m places raw logits `[batch, n, vocab]`, if the call wants them; `scores` likewise.
    """

    ends: Tensor
    criteria: Any
    start: int = 0
    pad: int = 0
    tokens: Tensor | None = None
    counts: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, session: Session) -> Several:
        """Where a session's decoder puts its sequences."""
        place: Several = session.resources[_PLACE]
        return place

    def stopped(self, ids: Tensor) -> Tensor:
        """Which of ids `[n, length]` end with their last token, bool `[n]`."""
        ended = torch.isin(ids[:, -1], self.ends.to(ids.device))
        if len(self.criteria):
            ended = ended | self.criteria(ids, None).to(ids.device)
        return ended

    def spread(self, result: GenerationResult) -> None:
        """Make the sequences the rows of a result."""
        if self.tokens is None or self.counts is None:
            return
        assert result.sources is not None and result.stats is not None and result.prompt_length is not None
        batch, n, _ = self.tokens.shape
        width = int(self.counts.max())
        counts = self.counts.flatten()
        rows = torch.arange(batch, device=counts.device).repeat_interleave(n)
        real = torch.arange(width, device=counts.device) < counts[:, None]
        tokens = torch.where(real, self.tokens[..., :width].flatten(0, 1), self.pad)
        sources = torch.where(real, int(Source.PLAIN), NO_SOURCE).to(torch.int8)
        ids = cast(Tensor, result.sequences)
        before = ids[rows.to(ids.device), : self.start]
        result.sequences = torch.cat([before, tokens.to(ids.device)], 1)  # type: ignore[assignment]
        result.sources = torch.cat([result.sources[rows, : self.start], sources], 1)
        for name in ("logits", "scores"):
            own: tuple[Tensor, ...] | None = getattr(result, name)
            if own is not None:
                mine = [step.flatten(0, 1) for step in getattr(self, name)[:width]]
                setattr(result, name, (*(step[rows] for step in own[: self.start - result.prompt_length]), *mine))
        # What the session has cached is no single sequence's past.
        result.past_key_values = None
        result.stats.committed = int((result.sources >= 0).sum())


@dataclass(frozen=True, kw_only=True)
class SeveralDecoder(Decoder, ABC):
    """Base of decoders that write several sequences behind each prompt."""

    inner: ClassVar[tuple[str, ...]] = (_PLACE,)

    @property
    def single(self) -> bool:
        """Whether one sequence a prompt is written, as the session commits it."""
        return False

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tokenry_options: Options | None = None,
        **model_kwargs: Any,
    ) -> GenerationResult | Tensor:
        options = tokenry_options or Options()
        if not self.single and compat.is_callers(model_kwargs.get("past_key_values")):
            raise CacheMisuse(
                f"{self.slug}: past_key_values is not allowed beside several sequences, because no single one's past "
                "would be left in it: start from the whole prompt"
            )
        config = copy.copy(generation_config)
        if not config.return_dict_in_generate:
            # Sources tell what was written; records that nobody will see are not kept.
            config.return_dict_in_generate = True
            config.output_logits = config.output_scores = False
        known = (EosTokenCriteria, MaxLengthCriteria)
        ends = [c.eos_token_id.flatten() for c in stopping_criteria if type(c) is EosTokenCriteria]
        place = Several(
            torch.cat(ends) if ends else input_ids.new_empty(0),
            StoppingCriteriaList(c for c in stopping_criteria if type(c) not in known),
        )
        if isinstance(options, Options):
            options = replace(options, resources={**options.resources, _PLACE: place})
        rest = (logits_processor, stopping_criteria, config, options)
        result = super().__call__(model, input_ids, *rest, **model_kwargs)
        assert isinstance(result, GenerationResult)
        place.spread(result)
        return result if generation_config.return_dict_in_generate else cast(Tensor, result.sequences)


def writes_several(method: Method | Combination) -> bool:
    """Whether a method, or the decoder of a combination, writes several sequences behind each prompt."""
    decoder = method.decoder if isinstance(method, Combination) else method
    return isinstance(decoder, SeveralDecoder) and not decoder.single


def read(session: Session, valid: Tensor | None = None, **inputs: Tensor) -> Tensor:
    """Forward tokens that the session does not commit, into its cache.

    Args:
        session: A session, or a branch.
        valid: Which of them are real, bool `[batch, n]`, the last one of a row that is read; None: all.
        **inputs: `input_ids` `[batch, n]` or `inputs_embeds` `[batch, n, embedding]`.

    Returns:
        Float32 logits `[batch, vocab]` behind the last.
    """
    count = next(iter(inputs.values())).shape[1]
    cache, model = session.cache, session.model
    step = torch.arange(count, device=session.device)[None] if valid is None else valid.long().cumsum(-1) - 1
    positions = (cache.seen[:, None] + step.clamp(min=0)).expand(session.batch, -1)
    options: dict[str, Any] = {"logits_to_keep": 1} if keeps_logits(model) else {}
    cache.stage(None if valid is None or bool(valid.all()) else valid)
    output = model(position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True, **inputs, **options)
    session.stats.forwards += 1
    session.stats.passes += session.batch if valid is None else int(valid.any(1).sum())
    return output.logits[:, -1].to(torch.float32, copy=True)

"""Decoding under a schedule of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from tokenry.decoding.partial_cache import check_given
from tokenry.decoding.skipdecode.layers import Depth, JaggedCache, depth_of, skipping
from tokenry.decoding.skipdecode.schedule import Exit, Shape, SkipSchedule
from tokenry.errors import BadParameter
from tokenry.generation.engine import Commit, Decoder, Options, Session
from tokenry.generation.plain import plain_step
from tokenry.generation.result import GenerationResult


@dataclass
class _State:
    schedule: SkipSchedule
    depth: Depth
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class SkipDecode(Decoder):
    """Give every next token no more layers than the one before it, all rows of a batch alike.

    The prompt runs through `first` layers; what was generated through fewer and fewer, down to `last` at the end of the
    schedule and from there on. The bottom `warmup` layers and the top ones run, those between are passed by. A layer
    that runs for a token has run for all before it, so no key is missing and none is computed twice. Source:
    SkipDecode, arXiv 2307.02628; where the decay starts, its rounding and the defaults are reconstructions.

    A model that was not fine-tuned under the schedule (`tokenry train skipdecode`) writes badly. The returned cache
    holds the columns that ran through all layers, so plain decoding may go on from it. `stats.extra` has
    `active_layers` of every decoding forward and `layer_speedup`, the model's layers by their mean.

    Attributes:
        first: Active layers for the prompt; none: all.
        last: Active layers at the end of the schedule; none: half of them, rounded up, but at least 1 above the bottom
            ones.
        warmup: Bottom layers that always run.
        horizon: Tokens over which the budget falls; none: as many as the call may generate. The paper takes the median
            length of the outputs that it was trained on.
        shape: `"linear"` (the paper's), or `"power"`: `first * alpha ** index` (D3, arXiv 2503.08524).
        alpha: Of the power law.
        exit: `"early"` leaves out the top layers instead, as the baseline of early termination does.
    """

    first: int | None = None
    last: int | None = None
    warmup: int = 1
    horizon: int | None = None
    shape: Shape = "linear"
    alpha: float = 0.98
    exit: Exit = "skip"

    def validate(self) -> None:
        self.check("first", "at least 1, or none", self.first is None or self.first >= 1)
        self.check("last", "at least 1, or none", self.last is None or self.last >= 1)
        if self.first is not None and self.last is not None:
            self.check("last", "at most first", self.last <= self.first, why="later tokens need earlier ones' keys")
        self.check("warmup", "at least 0", self.warmup >= 0)
        self.check("horizon", "at least 1, or none", self.horizon is None or self.horizon >= 1)
        self.check("alpha", "above 0 and at most 1", 0 < self.alpha <= 1)

    def schedule(self, layers: int, new: int) -> SkipSchedule:
        """The schedule for a model of so many layers and a call of so many new tokens."""
        first = layers if self.first is None else self.first
        least = self.warmup + 1 if self.exit == "skip" else 1
        return SkipSchedule(
            layers=layers,
            first=first,
            last=min(first, max(least, (layers + 1) // 2)) if self.last is None else self.last,
            warmup=self.warmup,
            horizon=max(1, new) if self.horizon is None else self.horizon,
            shape=self.shape,
            alpha=self.alpha,
            exit=self.exit,
        )

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
        # transformers reads the names of these parameters, so they are written out.
        check_given(self.slug, model_kwargs.get("past_key_values"))
        with skipping(model):
            return super().__call__(
                model, input_ids, logits_processor, stopping_criteria, generation_config, tokenry_options,
                **model_kwargs,
            )  # fmt: skip

    def start(self, session: Session) -> _State:
        depth = depth_of(session.model)
        schedule = self.schedule(depth.layers, session.max_length - session.prompt_length)
        active = schedule.active(0)
        if session.policy is None:
            session.cache = JaggedCache.of(session.model, session.cache)
        elif 0 not in active:
            raise BadParameter(
                f"{self} skips the bottom layer from the start, which a cache policy counts tokens by: give it "
                "warmup=1, or leave the policy's block"
            )
        depth.only(active)
        session.stats.extra["active_layers"] = []
        return _State(schedule, depth)

    def step(self, session: Session, state: _State) -> Commit:
        if not session.has_pending:
            state.index += 1
            active = state.schedule.active(state.index)
            state.depth.only(active)
            counts = session.stats.extra["active_layers"]
            counts.append(len(active))
            session.stats.extra["layer_speedup"] = state.depth.layers * len(counts) / sum(counts)
        return plain_step(session)

"""The one loop, and the door through which transformers' `generate` calls it.

Read this first, then session.py. A decoder implements `step(session, state) -> Commit`; everything hard (end and stop
tokens inside a run, length limits, rows of unequal progress, processors, randomness, the cache, records) is the
session's.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from tokenry.errors import BadParameter, BadPrompt, CacheMisuse, UnsupportedModel
from tokenry.generation.native import NativeSession
from tokenry.generation.result import GenerationResult, Source
from tokenry.generation.session import Commit, Options, Session
from tokenry.methods import Method
from tokenry.models import TokenCache, active_policy, attached, compat
from tokenry.sampling import is_stateful

__all__ = ["Commit", "Decoder", "Options", "Session", "Source"]


@dataclass(frozen=True, kw_only=True)
class Decoder(Method, ABC):
    """Base of every method that decides which tokens come next.

    A decoder is what `generate` takes as `custom_generate`::

        model.generate(**inputs, custom_generate=TokenRecycling(), max_new_tokens=64)

    transformers does not hand `streamer`, `tokenizer` and `assistant_model` to such a callable: `tokenry.generate`
    streams and takes stop strings and second models.
    """

    role: ClassVar[str] = "decoder"
    native: ClassVar[bool] = False
    """Whether it asks for one next token at a time only, so that any causal model serves as it is."""

    drafts: ClassVar[bool] = False
    """Whether it drafts several tokens a step, and so needs a policy's `compact_every` above 1."""

    sampled: ClassVar[bool] = False
    """Whether it chooses among sampled continuations, so that it is sampled where nobody says otherwise."""

    early: ClassVar[bool] = False
    """Whether it can draft before the prompt was read, which saves the pass that reads it: its first verify step does
    (one row, no policy)."""

    inner: ClassVar[tuple[str, ...]] = ()
    """Resources that it hands to itself, which nobody else names."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # As in custom_generate=TokenRecycling, which transformers calls with the model.
        if args:
            raise BadParameter(
                f"{cls.__name__} takes its parameters by name, not a {type(args[0]).__name__}: hand over an object, as "
                f"in custom_generate={cls.__name__}()"
            )
        return super().__new__(cls)

    def start(self, session: Session) -> Any:
        """Make the state of one call, before the prefill."""
        return None

    def around(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
        """What a call runs in."""
        return attached(model)

    @abstractmethod
    def step(self, session: Session, state: Any) -> Commit:
        """Return the next tokens of every unfinished row, at least one each."""

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
        """Generate; called by transformers' `generate`, which has prepared the arguments.

        Returns:
            Ids `[batch, length]`, or a `GenerationResult` with `return_dict_in_generate`.

        Raises:
            BadParameter: An option that this method cannot honour.
            UnsupportedModel: A model that it cannot serve.
            CacheMisuse: A cache that it cannot continue from.
        """
        options = tokenry_options or Options()
        if not isinstance(options, Options):
            raise BadParameter(
                f"tokenry_options={options!r} is not allowed; it must be tokenry.generation.Options(...)"
            )
        refuse(self, model, generation_config, logits_processor, model_kwargs)
        check_resources([self, active_policy(model)], options.resources)
        given: Cache | None = model_kwargs.get("past_key_values")
        mask: Tensor | None = model_kwargs.get("attention_mask")
        positions: Tensor | None = model_kwargs.get("position_ids")
        if input_ids.device != model.device and len(logits_processor):
            # transformers builds processors for the device of the ids; the loop runs on the model's.
            raise BadParameter(
                f"the prompt is on {input_ids.device} and the model on {model.device}; move it with .to(model.device)"
            )
        prompt = input_ids.to(model.device)
        mask = None if mask is None else mask.to(model.device)
        policy = active_policy(model)
        native = self.native and policy is None and not isinstance(given, TokenCache)
        covered = prompt.shape[1]
        if mask is not None or positions is not None:
            covered = mask.shape[1] if mask is not None else positions.shape[-1]  # type: ignore[union-attr]
        arguments = (mask, covered, logits_processor, stopping_criteria, generation_config, options)
        with contextlib.nullcontext() if native else self.around(model):
            if native:
                session: Session = NativeSession(model, prompt, given, *arguments)
                session.prepare(None if positions is None else positions.to(model.device))  # type: ignore[attr-defined]
            else:
                _check_prompt(mask, positions, prompt)
                session = Session(model, prompt, _cache(model, policy, given, mask), *arguments)
            if self.drafts:
                _warn_of_no_room(self, session)
            if self.sampled and not session.do_sample:
                _warn(
                    f"{self.slug} chooses among samples, and do_sample is off: it decodes as plain does; "
                    "say do_sample=True"
                )
            run(self, session)
            keep = generation_config.return_dict_in_generate or compat.is_callers(given)
            result = session.result(session.final_cache(given) if keep else None)
        result.sequences = result.sequences.to(input_ids.device)  # type: ignore[assignment]
        result.method = str(self) if session.policy is None else f"{self}+{session.policy}"
        return result if generation_config.return_dict_in_generate else result.sequences


def run(decoder: Decoder, session: Session) -> None:
    """Run a decoder until every row is finished."""
    start = time.perf_counter()
    state = decoder.start(session)
    session.prefill(later=decoder.early)
    while session.running:
        session.accept(decoder.step(session, state))
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    session.stats.seconds = time.perf_counter() - start
    session.finish()


def refuse(
    decoder: Decoder,
    model: PreTrainedModel,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: dict[str, Any],
) -> None:
    """Raise for what a call asks and no decoder of Tokenry can honour."""
    name = decoder.slug
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} serves decoder models, and {type(model).__name__} has an encoder besides")
    if (config.num_beams or 1) > 1:
        raise BadParameter(
            f"{name}: num_beams={config.num_beams} is not allowed; beams need transformers' own generate"
        )
    if config.use_cache is False or model_kwargs.get("use_cache") is False:
        raise BadParameter(f"{name}: use_cache=False is not allowed; a decoder of Tokenry works on a key-value cache")
    if config.cache_implementation not in (None, "dynamic"):
        raise BadParameter(
            f"{name}: cache_implementation={config.cache_implementation!r} is not allowed; leave it out, because "
            "static, offloaded and quantised caches cannot keep part of a draft"
        )
    for option in (
        "prompt_lookup_num_tokens",
        "penalty_alpha",
        "dola_layers",
        "assistant_early_exit",
        "compile_config",
    ):
        if getattr(config, option, None) is not None:
            raise BadParameter(
                f"{name}: {option}={getattr(config, option)!r} is not allowed; it chooses another way of generating: "
                "leave it out, or call generate without custom_generate"
            )
    for option in ("output_attentions", "output_hidden_states"):
        if getattr(config, option, None) or model_kwargs.get(option):
            raise BadParameter(f"{name}: {option}=True is not allowed; call generate without custom_generate for it")
    if model_kwargs.get("inputs_embeds") is not None:
        raise BadParameter(f"{name}: inputs_embeds is not allowed; pass input_ids, because drafts are made of ids")
    given = model_kwargs.get("past_key_values")
    if given is None:
        raise UnsupportedModel(
            f"{name} needs a model with a key-value cache, and {type(model).__name__} generates without one"
        )
    known = {"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    strange = sorted(key for key, value in model_kwargs.items() if key not in known and value is not None)
    if strange:
        raise BadParameter(f"{name}: {', '.join(strange)} is not allowed; Tokenry generates from input_ids alone")
    if not decoder.native:
        for processor in processors:
            if is_stateful(processor):
                raise BadParameter(
                    f"{name}: {type(processor).__name__} is not allowed, because it must see every token once and in "
                    "order; leave it out, or decode with plain"
                )
    if type(given) is not DynamicCache and not isinstance(given, TokenCache):
        raise BadParameter(
            f"{name}: a {type(given).__name__} is not allowed as past_key_values; pass a DynamicCache, or leave it out"
        )
    if getattr(given, "offloading", False):
        raise BadParameter(f"{name}: an offloaded cache is not allowed as past_key_values; pass a plain DynamicCache")


def check_resources(parts: Sequence[Any], resources: Mapping[str, Any]) -> None:
    """Refuse a name that the method does not take, whose value would be lost."""
    known = [name for part in parts if part is not None for name in part.resources]
    inner = {name for part in parts for name in getattr(part, "inner", ())}
    for name in resources:
        if name in known or name == "tokenizer" or name in inner:
            continue
        near = difflib.get_close_matches(str(name), known, n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        owner = "+".join(part.slug for part in parts if part is not None)
        raise BadParameter(
            f"{name!r} is no resource of {owner}{guess}; it takes {', '.join(map(repr, known)) or 'none'}"
        )


_warned: set[tuple[str, int, str]] = set()


def _warn_of_no_room(decoder: Decoder, session: Session) -> None:
    """Say that a policy leaves a drafter nothing to draft."""
    policy = session.policy
    if policy is None or policy.compact_every > 1:
        return
    _warn(
        f"{decoder.slug} drafts nothing, because {policy} drops tokens after every one: give the policy room, as in "
        f"{type(policy).__name__}(budget={policy.budget}, compact_every=16)"
    )


def _warn(text: str) -> None:
    """Say it once for each line of code that generates."""
    frame = sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    site = (frame.f_code.co_filename, frame.f_lineno, text)
    if site not in _warned:
        _warned.add(site)
        logging.getLogger("tokenry").warning(text)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in ("tokenry", "transformers", "torch", "contextlib")


def _check_prompt(mask: Tensor | None, positions: Tensor | None, prompt: Tensor) -> None:
    if mask is not None and not bool(mask.any(1).all()):
        row = int(mask.any(1).int().argmin())
        raise BadPrompt(f"row {row} of the batch is empty, padding alone: give it at least one token, or leave it out")
    if mask is not None and not bool(mask[:, -1].all()):
        raise BadPrompt("the prompt is padded on the right: pad it on the left (tokenizer.padding_side = 'left')")
    if positions is None:
        return
    # `generate` always passes positions; only ones that a caller made up differ from these.
    if mask is not None:
        expected = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    else:
        expected = torch.arange(positions.shape[-1], device=positions.device)[None]
    if positions.ndim != 2 or not bool((positions == expected.to(positions.device)).all()):
        raise BadParameter("position_ids of one's own are not allowed; they follow from the attention mask")


def _cache(model: PreTrainedModel, policy: Any, given: Cache | None, mask: Tensor | None) -> TokenCache:
    past = 0 if given is None else given.get_seq_length()
    if isinstance(given, TokenCache):
        if policy is not None and given.policy is not policy:
            raise CacheMisuse(
                f"past_key_values keeps another policy than the block of {policy} it came into: leave the block"
            )
        return given
    if not past:
        return TokenCache(model, policy)
    if policy is not None:
        raise CacheMisuse(
            f"a cache that already holds {past} tokens came into the block of {policy}: start from the whole prompt"
        )
    return TokenCache.from_dynamic(model, given, None if mask is None else mask[:, :past])  # type: ignore[arg-type]

"""`tokenry.generate`: from text to text, with everything that transformers' `generate` does not hand to a decoder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from tokenry.errors import BadParameter, BadPrompt, PromptTooLong
from tokenry.generation.engine import Decoder, Options
from tokenry.generation.plain import Plain
from tokenry.generation.result import GenerationResult
from tokenry.generation.stream import TextStream
from tokenry.methods import Combination, Method, method
from tokenry.models import context_length

Prompt = str | Tensor | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[dict[str, Any]]

_NEW_TOKENS = 128
_COMPACT_EVERY = 16


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    *,
    method: str | Method | Combination = "plain",
    stream: Callable[[str], Any] | Any | None = None,
    seed: int | None = None,
    resources: dict[str, Any] | None = None,
    **generate_options: Any,
) -> GenerationResult:
    """Generate from a prompt with a method.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; needed for text and for stop strings.
        prompt: A text, a list of texts, ids `[length]` or `[batch, length]` (lists or a tensor; lists of different
            lengths are padded), or the messages of a chat (`{"role": ..., "content": ...}`), to which the tokenizer's
            chat template is applied.
        method: A decoder or drafter, a cache policy, or one of each: a method object or its text form, such as
            `token-recycling+h2o:budget=256`. A policy beside a drafter gets `compact_every=16` unless the caller sets
            it above 1; `result.method` says so.
        stream: Called with each new piece of text; one prompt only. A streamer of transformers (with `put` and `end`)
            is given the ids instead.
        seed: Sampling depends on it alone. Lossless drafters then sample the tokens that plain samples. None: torch's
            global generator.
        resources: Second models, tables and the like by name, handed over loaded.
        **generate_options: All that transformers' `generate` takes: options of GenerationConfig (`max_new_tokens`,
            128 if no length is given anywhere; `stop_strings`; `do_sample`; ...), `logits_processor`,
            `stopping_criteria`, `generation_config`.

    Returns:
        The result; `print` shows its text and counts.

    Raises:
        BadPrompt: The prompt is empty or cannot be read.
        PromptTooLong: The prompt and what is to follow it exceed the model's context.
        BadParameter: `max_new_tokens` or `max_length` is below 1.
        MethodNotFound, BadParameter, UnsupportedModel: As the method raises.
    """
    decoder, policy = _parts(method)
    rows = _rows(tokenizer, prompt)
    ids, mask = _padded(rows, tokenizer, model)
    options = dict(generate_options)
    _check_length(model, ids.shape[1], options)
    if decoder.sampled and "generation_config" not in options:
        options.setdefault("do_sample", True)
    stops = options.pop("stop_strings", None)
    if stops is None:
        stops = getattr(options.get("generation_config"), "stop_strings", None)
    if stops is None:
        stops = model.generation_config.stop_strings
    if stops is not None:
        _take_stops(tokenizer, stops, options)
    if stream is not None and len(rows) > 1:
        raise BadParameter(f"stream serves one prompt, not {len(rows)}; leave it out, or generate one by one")
    writer = None if stream is None else _writer(stream, tokenizer, rows[0])
    with contextlib.nullcontext() if policy is None else policy(model):  # type: ignore[operator]
        result: GenerationResult = model.generate(  # type: ignore[operator]
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            custom_generate=decoder,
            tokenry_options=Options(seed=seed, stream=writer, resources={"tokenizer": tokenizer, **(resources or {})}),
            return_dict_in_generate=True,
            **options,
        )
    object.__setattr__(result, "tokenizer", tokenizer)
    return result


def effective(given: str | Method | Combination) -> Method | Combination:
    """Return the method that `generate` runs when given this one.

    A policy that drops tokens after every one leaves no room for drafts; beside a drafter it drops after every
    16. All others are run as they are.
    """
    found = method(given)
    if not isinstance(found, Combination) or not getattr(found.decoder, "drafts", False):
        return found
    if getattr(found.policy, "compact_every", None) != 1:
        return found
    policy: Any = found.policy
    return Combination(found.decoder, dataclasses.replace(policy, compact_every=_COMPACT_EVERY))


def _parts(given: str | Method | Combination) -> tuple[Decoder, Method | None]:
    found = effective(given)
    decoder, policy = (found.decoder, found.policy) if isinstance(found, Combination) else (found, None)
    if decoder.role == "policy":
        decoder, policy = Plain(), decoder
    if not isinstance(decoder, Decoder):
        raise BadParameter(
            f"{decoder} does not generate (it is a {decoder.role or type(decoder).__name__}); "
            "`tokenry methods` lists decoders and drafters"
        )
    return decoder, policy


def _rows(tokenizer: Any, prompt: Prompt) -> list[list[int]]:
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        rows = [_encode(tokenizer, prompt)]
    elif not isinstance(prompt, Sequence) or not prompt:
        raise BadPrompt(f"the prompt {prompt!r} is empty or cannot be read; give a text, texts, ids or chat messages")
    elif all(isinstance(part, str) for part in prompt):
        rows = [_encode(tokenizer, part) for part in prompt]  # type: ignore[arg-type]
    elif all(isinstance(part, dict) for part in prompt):
        rows = [_chat(tokenizer, prompt)]  # type: ignore[arg-type]
    elif all(isinstance(part, int) for part in prompt):
        rows = [list(prompt)]  # type: ignore[arg-type]
    elif all(isinstance(part, Sequence) and all(isinstance(i, int) for i in part) for part in prompt):
        rows = [list(part) for part in prompt]  # type: ignore[arg-type]
    else:
        raise BadPrompt("the prompt mixes kinds; give a text, a list of texts, ids, or chat messages")
    for number, row in enumerate(rows):
        if not row:
            which = "the prompt" if len(rows) == 1 else f"prompt {number + 1}"
            raise BadPrompt(f"{which} is empty; give at least one token to continue from")
    return rows


def _encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer is None:
        raise BadPrompt("a text needs a tokenizer; pass the model's, or pass ids")
    # Special tokens alone are not a prompt.
    return list(tokenizer(text)["input_ids"]) if text else []


def _chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise BadPrompt("the tokenizer has no chat template; give the prompt as one text")
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(ids["input_ids"])


def _padded(rows: list[list[int]], tokenizer: Any, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[batch, length]`, padded on the left."""
    candidates = [getattr(tokenizer, "pad_token_id", None), model.generation_config.pad_token_id, 0]
    pad = next(candidate for candidate in candidates if candidate is not None)
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    embeddings: Any = model.get_input_embeddings()
    vocab = embeddings.weight.shape[0]
    if int(ids.max()) >= vocab or int(ids.min()) < 0:
        raise BadPrompt(f"the prompt has an id outside the model's {vocab}; was it made by another tokenizer?")
    return ids, mask


def _check_length(model: PreTrainedModel, prompt: int, options: dict[str, Any]) -> None:
    """Raise if the model's context is too short; give a length if nobody did."""
    context = context_length(model)
    config: GenerationConfig | None = options.get("generation_config")
    new, whole = (
        getattr(config, name, None) if options.get(name) is None else options[name]
        for name in ("max_new_tokens", "max_length")
    )
    if new is None and whole is None:
        new, whole = model.generation_config.max_new_tokens, model.generation_config.max_length
    for name, value in (("max_new_tokens", new), ("max_length", whole)):
        if value is not None and value < 1:
            raise BadParameter(f"{name}={value} is not allowed; it must be at least 1")
    if new is None and whole is None:
        room = _NEW_TOKENS if context is None else context - prompt
        new = options["max_new_tokens"] = max(1, min(_NEW_TOKENS, room))
    total: int = prompt + new if new is not None else whole  # type: ignore[assignment]
    if context is not None and total > context:
        raise PromptTooLong(
            f"the prompt has {prompt} tokens and {total - prompt} may follow, {total} together, "
            f"but the model's context is {context}; shorten the prompt or lower max_new_tokens"
        )


def _take_stops(tokenizer: Any, stops: str | list[str], options: dict[str, Any]) -> None:
    # transformers makes this criterion itself, but has no tokenizer for it when a decoder is passed.
    if tokenizer is None:
        raise BadParameter("stop_strings need a tokenizer; pass the model's")
    if not all([stops] if isinstance(stops, str) else stops):
        raise BadParameter("stop_strings holds an empty string, which every text ends with; leave it out")
    given = options.get("stopping_criteria") or []
    options["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, stops)])
    options["stop_strings"] = None


def _writer(stream: Any, tokenizer: Any, prompt: list[int]) -> Callable[[list[int] | None], None]:
    if not hasattr(stream, "put"):
        if tokenizer is None:
            raise BadParameter("a stream of text needs a tokenizer; pass the model's, or a streamer of transformers")
        return TextStream(tokenizer, stream, prompt)

    def put(ids: list[int] | None) -> None:
        if ids is None:
            stream.end()
        else:
            stream.put(torch.tensor(ids))

    stream.put(torch.tensor([prompt]))
    return put

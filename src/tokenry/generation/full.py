"""`tokenry.generate`: from text to text, with everything that transformers' `generate` does not hand to a decoder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from tokenry.errors import BadParameter, BadPrompt, PromptTooLong
from tokenry.generation.engine import Decoder, Options, check_resources
from tokenry.generation.plain import Plain
from tokenry.generation.result import GenerationResult
from tokenry.generation.session import check_seed, is_integer
from tokenry.generation.stream import TextStream
from tokenry.methods import Combination, Method, method
from tokenry.models import context_length

Prompt = (
    str | Tensor | np.ndarray | Mapping[str, Any] | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
    | Sequence[Tensor] | Sequence[dict[str, Any]]
)  # fmt: skip

# What transformers' generate takes and this door takes in another way, and in which.
_ELSEWHERE = {
    "assistant_model": 'say method="draft-model" and resources={"draft": model}; what transformers does with it is '
    "measured by tokenry compare as transformers-assisted",
    "custom_generate": "say method= with the decoder or its name",
    "tokenry_options": "say seed=, stream= and resources= for themselves",
    **dict.fromkeys(("inputs", "input_ids", "attention_mask", "inputs_embeds"), "hand texts or ids over as the prompt"),
}
# What a tokenizer gives beside the ids; anything else, such as pixels, would be lost.
_OF_A_TOKENIZER = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length"}
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
        prompt: A text, a list of texts, ids `[length]` or `[batch, length]` (lists, tensors or arrays; rows of
            different lengths are padded), what a tokenizer gives for texts (padding on either side is left out), or the
            messages of a chat (`{"role": ..., "content": ...}`), to which the tokenizer's chat template is applied.
        method: A decoder or drafter, a cache policy, or one of each: a method object or its text form, such as
            `token-recycling+h2o:budget=256`. A policy beside a drafter gets `compact_every=16` unless the caller sets
            it above 1; `result.method` says so.
        stream: Called with each new piece of text; one prompt only. A streamer of transformers (with `put` and `end`)
            is given the ids instead; `streamer=` is taken as well.
        seed: Sampling depends on it alone. Lossless drafters then sample the tokens that plain samples. None: torch's
            global generator.
        resources: Second models, tables and the like by name, handed over loaded.
        **generate_options: All that transformers' `generate` takes: options of GenerationConfig (`max_new_tokens`,
            128 if no length is given anywhere; `stop_strings`; `do_sample`; ...), `logits_processor`,
            `stopping_criteria`, `generation_config`. A method that chooses among samples, such as cntp, is sampled
            unless `do_sample` is given.

    Returns:
        The result; `print` shows its text and counts.

    Raises:
        BadPrompt: The prompt is empty or cannot be read, or a text in it is no whole Unicode.
        PromptTooLong: The prompt and what is to follow it exceed the model's context.
        BadParameter: An option is given in another way here or has a value that is not allowed, or the method does not
            take a resource.
        MethodNotFound, BadParameter, UnsupportedModel: As the method raises.
    """
    if not isinstance(model, torch.nn.Module):
        raise BadParameter(f"{model!r} is not a model; load one first: model, tokenizer = tokenry.load(name)")
    decoder, policy = _parts(method)
    options = dict(generate_options)
    stream = _check_options(options, stream, seed)
    check_resources([decoder, policy], resources or {})
    rows = _rows(tokenizer, prompt)
    ids, mask = _padded(rows, tokenizer, model)
    _check_length(model, ids.shape[1], options)
    said = options.get("do_sample", getattr(options.get("generation_config"), "do_sample", None))
    if samples(decoder) and said is None:
        options["do_sample"] = True
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


def taken(given: Method | Combination, resources: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the resources of a set that a method takes; one set may serve several methods."""
    parts = (given.decoder, given.policy) if isinstance(given, Combination) else (given,)
    names = {"tokenizer", *(name for part in parts for name in part.resources)}
    return {name: value for name, value in (resources or {}).items() if name in names}


def samples(given: Method | Combination) -> bool:
    """Whether a method chooses among sampled continuations, so that it is sampled where nobody says otherwise."""
    part = given.decoder if isinstance(given, Combination) else given
    return bool(getattr(part, "sampled", False))


def _parts(given: str | Method | Combination) -> tuple[Decoder, Method | None]:
    found = effective(given)
    decoder, policy = (found.decoder, found.policy) if isinstance(found, Combination) else (found, None)
    if decoder.role == "policy":
        decoder, policy = Plain(), decoder
    if not isinstance(decoder, Decoder):
        raise BadParameter(
            f"{decoder} does not generate (it is {_with_article(decoder.role or type(decoder).__name__)}); "
            "`tokenry methods` lists decoders and drafters"
        )
    return decoder, policy


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _check_options(options: dict[str, Any], stream: Any, seed: int | None) -> Any:
    """Refuse options that would be lost or clash, take out the ones that are this door's own, and return the stream."""
    for name, mend in _ELSEWHERE.items():
        if options.pop(name, None) is not None:
            raise BadParameter(f"{name} is not allowed in tokenry.generate; {mend}")
    if not options.pop("return_dict_in_generate", True):
        raise BadParameter(
            "return_dict_in_generate=False is not allowed; tokenry.generate returns a GenerationResult, whose "
            "`sequences` are the ids"
        )
    check_seed(seed)
    streamer = options.pop("streamer", None)
    if streamer is None:
        if stream is not None and not _is_streamer(stream) and not callable(stream):
            raise BadParameter(
                f"stream={stream!r} is not allowed; it must be a function that takes a text, such as print, or a "
                "streamer of transformers, with put and end"
            )
        return stream
    if stream is not None:
        raise BadParameter("stream and streamer are both given; give one of them")
    if not _is_streamer(streamer):
        raise BadParameter(
            f"streamer={streamer!r} is not allowed; it must have put and end, as transformers' streamers do; "
            "a function that takes a text goes into stream="
        )
    return streamer


def _is_streamer(given: Any) -> bool:
    return callable(getattr(given, "put", None)) and callable(getattr(given, "end", None))


def _listed(given: Any) -> Any:
    """Tensors and arrays as lists, inside a list or tuple too; anything else as it is."""
    if isinstance(given, list | tuple):
        return [part.tolist() if hasattr(part, "tolist") else part for part in given]
    return given.tolist() if hasattr(given, "tolist") else given


def _unpadded(batch: Mapping[str, Any]) -> Any:
    """The ids that a tokenizer gave, without their padding."""
    strange = sorted(map(str, set(batch) - _OF_A_TOKENIZER))
    if "input_ids" not in batch or strange:
        raise BadPrompt(
            f"a mapping of {', '.join(map(str, batch)) or 'nothing'} is not a prompt; give a text, ids, what a "
            "tokenizer gives for texts, or a list of chat messages"
        )
    ids, mask = _listed(batch["input_ids"]), _listed(batch.get("attention_mask"))
    if mask is None or not ids:
        return ids
    flat = is_integer(ids[0])
    pairs = [(ids, mask)] if flat else list(zip(ids, mask, strict=False))
    if (not flat and len(ids) != len(mask)) or any(len(row) != len(own) for row, own in pairs):
        raise BadPrompt("the attention mask is not of the shape of the ids; give what the tokenizer returned")
    rows = [[token for token, real in zip(row, own, strict=True) if real] for row, own in pairs]
    return rows[0] if flat else rows


def _rows(tokenizer: Any, prompt: Prompt) -> list[list[int]]:
    prompt = _listed(_unpadded(prompt) if isinstance(prompt, Mapping) else prompt)
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise BadPrompt("bytes are not a prompt; make a text of them with .decode(), or give ids")
    if isinstance(prompt, str):
        rows = [_encode(tokenizer, prompt)]
    elif not isinstance(prompt, Sequence) or not prompt:
        raise BadPrompt(f"the prompt {prompt!r} is empty or cannot be read; give a text, texts, ids or chat messages")
    elif all(isinstance(part, str) for part in prompt):
        rows = [_encode(tokenizer, part) for part in prompt]  # type: ignore[arg-type]
    elif all(isinstance(part, dict) for part in prompt):
        rows = [_chat(tokenizer, prompt)]  # type: ignore[arg-type]
    elif all(is_integer(part) for part in prompt):
        rows = [[int(part) for part in prompt]]  # type: ignore[arg-type]
    elif all(isinstance(part, list | tuple | range) and all(map(is_integer, part)) for part in prompt):
        rows = [[int(token) for token in part] for part in prompt]  # type: ignore[union-attr]
    else:
        raise BadPrompt(
            "the prompt mixes kinds or holds what is neither text nor integer ids; "
            "give a text, a list of texts, ids, or chat messages"
        )
    for number, row in enumerate(rows):
        if not row:
            which = "the prompt" if len(rows) == 1 else f"prompt {number + 1}"
            raise BadPrompt(f"{which} is empty; give at least one token to continue from")
    return rows


def _encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer is None:
        raise BadPrompt("a text needs a tokenizer; pass the model's, or pass ids")
    check_unicode(text)
    # Special tokens alone are not a prompt.
    return list(tokenizer(text)["input_ids"]) if text else []


def check_unicode(text: str) -> None:
    """Raise BadPrompt where a text holds half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadPrompt(
            f"the prompt holds half of a character, {text[error.start]!r} at place {error.start + 1} (a lone "
            "surrogate, as bytes that are not UTF-8 leave it): leave it out, or read the text with its right encoding"
        ) from None


def _chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise BadPrompt("the tokenizer has no chat template; give the prompt as one text")
    check_unicode(json.dumps(messages, ensure_ascii=False, default=str))
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
        if value is not None and not is_integer(value):
            raise BadParameter(f"{name}={value!r} is not allowed; it must be an integer")
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
    stops = [stops] if isinstance(stops, str) else list(stops)
    options["stop_strings"] = None
    if not stops:
        return
    if not all(isinstance(stop, str) for stop in stops):
        raise BadParameter(f"stop_strings={stops!r} is not allowed; it must be a text or a list of texts")
    if not all(stops):
        raise BadParameter("stop_strings holds an empty string, which every text ends with; leave it out")
    given = options.get("stopping_criteria") or []
    options["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, stops)])


def _writer(stream: Any, tokenizer: Any, prompt: list[int]) -> Callable[[list[int] | None], None]:
    if not _is_streamer(stream):
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

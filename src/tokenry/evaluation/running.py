"""One run of one method over one batch of prompts: timed, counted, cut at the end of text."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenry.errors import BadParameter, BadPrompt, PromptTooLong
from tokenry.generation import Stats, generate
from tokenry.generation.full import check_unicode, taken
from tokenry.methods import Combination, Method, find
from tokenry.models import context_length
from tokenry.workloads import Example, examples, jsonl

from .peers import Peer

Prompts = str | Path | Example | Sequence[str | Example] | Mapping[str, Sequence[str | Example]]


@dataclass(frozen=True)
class Setting:
    """How the next token is chosen: greedily, or sampled at a temperature with nucleus and top-k limits.

    Raises:
        BadParameter: A value is out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        # Logits divided by less overflow.
        if self.do_sample and not 1e-6 <= self.temperature < math.inf:
            raise BadParameter(
                f"temperature={self.temperature} is not allowed where tokens are sampled; it must be at least 1e-6 "
                "(greedy decoding is the limit at 0)"
            )
        if not 0 <= self.top_p <= 1:
            raise BadParameter(f"top_p={self.top_p} is not allowed; it must be from 0 to 1 (1 is no limit)")
        if self.top_k < 0:
            raise BadParameter(f"top_k={self.top_k} is not allowed; it must be at least 0 (0 is no limit)")

    @property
    def options(self) -> dict[str, Any]:
        """The options of transformers' `generate`."""
        if not self.do_sample:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }

    def __str__(self) -> str:
        if not self.do_sample:
            return "greedy"
        limits = f", top-p {self.top_p:g}" * (self.top_p < 1) + f", top-k {self.top_k}" * (self.top_k > 0)
        return f"sampled at temperature {self.temperature:g}{limits}"


@dataclass(frozen=True)
class Variant:
    """A method under a setting: one row of a table."""

    method: Method | Combination
    setting: Setting

    @property
    def label(self) -> str:
        """The method's text form, a policy's with its budget, marked where it samples."""
        text = "+".join(_with_budget(part) for part in self.parts)
        return f"{text} (sampled)" if self.setting.do_sample else text

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods it consists of."""
        return (self.method.decoder, self.method.policy) if isinstance(self.method, Combination) else (self.method,)

    @property
    def family(self) -> str:
        """The family of the method, a combination's joined by `+`."""
        return "+".join(find(part.slug).family for part in self.parts)


def _with_budget(method: Method) -> str:
    """The text form with the budget in it even where it is the default, since tables set budgets side by side."""
    name, _, rest = str(method).partition(":")
    budget = getattr(method, "budget", None) if method.role == "policy" else None
    if budget is None or "budget=" in rest:
        return str(method)
    return f"{name}:budget={budget}" + (f";{rest}" if rest else "")


@dataclass(frozen=True)
class Batch:
    """Prompts that run together: ids and mask `[batch, length]`, left-padded, and the examples behind them."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the new tokens of each row (end of text included), and what it cost.

    Args:
        tokens: The new tokens.
        seconds: Time of the whole call.
        stats: Its counts; a peer's own, as far as they can be seen from outside.
        drafter_seconds: The part of the time spent on drafting; None where the library does not tell.
        draft_forwards: Forward passes of a peer's second model.
        sources: Where each token comes from; None where the library does not tell.
    """

    tokens: list[list[int]]
    seconds: float
    stats: Stats
    drafter_seconds: float | None
    draft_forwards: int = 0
    sources: list[list[str]] | None = None


@dataclass(frozen=True)
class Task:
    """A workload made ready for a model: its batches, and how many tokens each prompt may get."""

    name: str
    batches: tuple[Batch, ...]
    max_new_tokens: int
    scored: bool  # whether the examples have answers to score against

    @property
    def prompts(self) -> int:
        """How many prompts it has."""
        return sum(len(batch.examples) for batch in self.batches)

    @property
    def prompt_tokens(self) -> float:
        """Tokens of a prompt, on average."""
        return sum(int(batch.attention_mask.sum()) for batch in self.batches) / self.prompts


# --- prompts ------------------------------------------------------------------------------------


def collect(
    prompts: Prompts | None,
    workloads: Sequence[str] | Mapping[str, Mapping[str, Any]] | None,
    *,
    limit: int,
    seed: int,
) -> dict[str, list[Example]]:
    """Return the examples to run by workload: the user's prompts, or `limit` test examples of each workload.

    Raises:
        BadPrompt: There are no prompts, one is empty or not text, or a file is missing or malformed.
        BadParameter: A workload is not known, or has the name of the prompts.
    """
    found: dict[str, list[Example]] = {}
    if prompts is not None:
        found |= _of_user(prompts)
    for name in workloads or ():
        options = dict(workloads[name]) if isinstance(workloads, Mapping) else {}
        task = Path(name).stem if name.endswith((".json", ".jsonl")) else name
        join(found, {task: examples(name, limit, seed=seed, **options)})
    if not any(found.values()):
        raise BadPrompt("there are no prompts: give at least one text or name a workload")
    for name, group in found.items():
        for number, example in enumerate(group, 1):
            if not example.prompt.strip():
                raise BadPrompt(f"{name}: prompt {number} is empty; give it at least one character")
            check_unicode(example.prompt)
    return {name: group for name, group in found.items() if group}


def join(found: dict[str, list[Example]], more: Mapping[str, list[Example]]) -> None:
    """Add tasks to those that were found.

    Raises:
        BadParameter: Two have one name.
    """
    if twice := [name for name in more if name in found]:
        raise BadParameter(f"there are two tasks named {twice[0]!r}: give the prompts another name, or leave out one")
    found |= more


def _of_user(prompts: Prompts) -> dict[str, list[Example]]:
    if isinstance(prompts, Path) or (isinstance(prompts, str) and prompts.endswith((".json", ".jsonl"))):
        return {Path(prompts).stem: list(jsonl.read(prompts))}
    if isinstance(prompts, Mapping):
        return {name: [_example(prompt) for prompt in group] for name, group in prompts.items()}
    group = [prompts] if isinstance(prompts, str | Example) else list(prompts)
    return {"prompts": [_example(prompt) for prompt in group]}


def _example(prompt: Any) -> Example:
    if isinstance(prompt, Example):
        return prompt
    if not isinstance(prompt, str):
        raise BadPrompt(f"a prompt must be a text or an Example, not {type(prompt).__name__}")
    return Example(prompt, "", lambda output: 1.0)


def pad_token(model: Any, tokenizer: Any) -> int:
    """Return the id that fills rows, chosen as `tokenry.generate` chooses it."""
    candidates = (tokenizer.pad_token_id, model.generation_config.pad_token_id, 0)
    return int(next(candidate for candidate in candidates if candidate is not None))


def end_tokens(model: Any) -> frozenset[int]:
    """Return the ids that end a text, as the model's generation config names them."""
    ends = model.generation_config.eos_token_id
    return frozenset(() if ends is None else ends if isinstance(ends, list) else [ends])


def deal(count: int, repeats: int) -> list[list[int]]:
    """Deal `count` batches over `repeats` pairs: each runs once, or in turns where there are fewer than pairs."""
    if count < repeats:
        return [[pair % count] for pair in range(repeats)]
    return [list(range(count * pair // repeats, count * (pair + 1) // repeats)) for pair in range(repeats)]


# --- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """A model and what all runs on it share.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        ignore_eos: Go on after an end of text.
        resources: Second models that are loaded already, by name.
    """

    model: Any
    tokenizer: Any
    ignore_eos: bool = False
    resources: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of `generate` that all methods share."""
        options: dict[str, Any] = {"pad_token_id": pad_token(self.model, self.tokenizer)}
        if self.ignore_eos:
            # An id that no token has: nothing is suppressed, so tokens are those of a usual run as far as it goes.
            options["eos_token_id"] = self.model.config.get_text_config().vocab_size
        return options

    def prepare(
        self,
        name: str,
        group: Sequence[Example],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 1,
        tail: int | None = None,
    ) -> Task:
        """Turn examples into batches of ids on the model's device.

        Without `max_new_tokens` a prompt may get what the longest answer takes, from 64 to 256 tokens. `tail`
        keeps only the last so many tokens of each prompt.

        Raises:
            PromptTooLong: A prompt and its new tokens exceed the model's context.
            BadParameter: The batch size, the tail or the number of new tokens is below 1.
        """
        for option, value in (("batch_size", batch_size), ("tail", tail), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise BadParameter(f"{option}={value} is not allowed; it must be at least 1")
        rows = [self.tokenizer(example.prompt)["input_ids"] for example in group]
        if tail:
            rows = [row[-tail:] for row in rows]
        longest, limit = max(map(len, rows)), context_length(self.model)
        if max_new_tokens is None:
            wanted = max(len(self.tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in group) + 4
            max_new_tokens = min(max(64, wanted), 256, max(1, (limit or longest + 256) - longest))
        for number, row in enumerate(rows, 1):
            if limit and len(row) + max_new_tokens > limit:
                raise PromptTooLong(
                    f"{name}: prompt {number} has {len(row)} tokens, and with {max_new_tokens} new ones it exceeds the "
                    f"model's context of {limit}; shorten it, keep its end (tail) or ask for fewer new tokens"
                )
        pad = pad_token(self.model, self.tokenizer)
        batches = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            width = max(map(len, part))
            ids = [[pad] * (width - len(row)) + row for row in part]
            mask = [[0] * (width - len(row)) + [1] * len(row) for row in part]
            batches.append(
                Batch(
                    torch.tensor(ids, device=self.model.device),
                    torch.tensor(mask, device=self.model.device),
                    tuple(group[start : start + batch_size]),
                )
            )
        return Task(name, tuple(batches), max_new_tokens, any(example.answer for example in group))

    def run(self, variant: Variant, batch: Batch, max_new_tokens: int, seed: int = 0) -> Outcome:
        """Generate once and return tokens and counts; the seconds span the whole call."""
        model, method = self.model, variant.method
        devices = [model.device] if model.device.type == "cuda" else []
        # Peers draw from torch's global generator; the caller's must not move.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            _wait(model)
            start = time.perf_counter()
            result: Any
            if isinstance(method, Peer):
                options = {**self.options, **variant.setting.options, "max_new_tokens": max_new_tokens}
                own = taken(method, self.resources)
                result = method.run(model, batch.input_ids, batch.attention_mask, resources=own, **options)
            else:
                result = self._generate(variant, batch, max_new_tokens, seed)
            _wait(model)
            seconds = time.perf_counter() - start
        if not isinstance(method, Peer):
            sources = [[source.name.lower() for source in row] for row in result.new_sources]
            tokens = result.new_tokens
            # Of a method that writes several texts a prompt, best first, the best one counts.
            each = len(tokens) // len(batch.input_ids)
            if each > 1:
                tokens, sources = tokens[::each], sources[::each]
                result.stats.committed = sum(map(len, tokens))
            return Outcome(tokens, seconds, result.stats, result.stats.drafter_seconds, sources=sources)
        ends = frozenset() if self.ignore_eos else end_tokens(model)
        tokens = [_cut(row, ends) for row in result.sequences[:, batch.input_ids.shape[1] :].tolist()]
        stats = result.stats
        stats.committed = sum(map(len, tokens))
        # A peer that takes several rows is plain, and a row is in as many passes as it has tokens.
        stats.passes = stats.forwards if len(tokens) == 1 else stats.committed
        return Outcome(tokens, seconds, stats, result.drafter_seconds, result.draft_forwards)

    def _generate(self, variant: Variant, batch: Batch, max_new_tokens: int, seed: int) -> Any:
        masks = batch.attention_mask.bool()
        return generate(
            self.model,
            self.tokenizer,
            [ids[mask].tolist() for ids, mask in zip(batch.input_ids, masks, strict=True)],
            method=variant.method,
            seed=seed if variant.setting.do_sample else None,
            resources=taken(variant.method, self.resources),
            **{**self.options, **variant.setting.options, "max_new_tokens": max_new_tokens},
        )

    def kept_tokens(self, variant: Variant, input_ids: torch.Tensor, max_new_tokens: int) -> dict[str, list[float]]:
        """Return, after prefill and at the end, the share of layers and heads that hold each position, by position.

        Args:
            variant: A variant with a cache policy.
            input_ids: One prompt `[1, length]`.
            max_new_tokens: Tokens that are generated before the end.
        """
        batch = Batch(input_ids, torch.ones_like(input_ids), ())
        found = {}
        for moment, limit in (("prefill", 1), ("end", max_new_tokens)):
            result = self._generate(variant, batch, limit, 0)
            held = torch.zeros(result.sequences.shape[1], dtype=torch.float64)
            layers = result.past_key_values.kept_positions()
            for positions in layers:  # [1, heads, slots]
                heads = positions[0].cpu()
                for head in heads:
                    held[head[head >= 0]] += 1 / (len(layers) * len(heads))
            found[moment] = [round(share, 4) for share in held.tolist()]
        return found


def _wait(model: Any) -> None:
    """Wait for queued work, which an accelerator does behind the caller's back."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    elif model.device.type == "mps":
        torch.mps.synchronize()


def _cut(row: list[int], ends: frozenset[int]) -> list[int]:
    stop = next((index for index, token in enumerate(row) if token in ends), None)
    return row if stop is None else row[: stop + 1]

"""Scores on recall and the RULER-style tasks at shares of the cache, beside kvpress on the same ids.

A prompt is read in three pieces: what is compressed at once (the context, or where the question is seen all but its
last token), the rest but for the last token, and the last token, from which the answer is written. So the first token
of an answer is predicted from what was kept, as the others are, and a retrieving policy retrieves for it. As kvpress
does, nothing is dropped behind the context: the question and the answer are added to what was kept of it, and of the
context so much is kept that with the question the share is held. kvpress reads the second and third piece in one, which
changes nothing where nothing is dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenry.errors import BadParameter, PromptTooLong, ResourceError
from tokenry.methods import Method
from tokenry.models import context_length
from tokenry.workloads import Example, examples
from tokenry.workloads.ruler import parted

from ..kvpress import KVPress
from ..running import pad_token
from .engine import PLAIN, Bench, drops, said, way

TASKS = ("recall", "ruler-single", "ruler-multikey", "ruler-multivalue", "ruler-tracking", "ruler-words")
AGNOSTIC, AWARE = "question-agnostic", "question-aware"
AVERAGE = "average"
NONE = "kvpress: none"
_SAMPLE = 3000  # characters that a workload's tokens are counted on


@dataclass(frozen=True)
class Asked:
    """An example in ids.

    Args:
        example: The example.
        seed: Which seed it belongs to.
        ids: Of context and question, each divided into tokens for itself.
        question: How many of the ids are the question's.
    """

    example: Example
    seed: int
    ids: list[int]
    question: int


@dataclass(frozen=True)
class Task:
    """A workload's prompts.

    Args:
        name: Name of the workload.
        batches: Prompts that run together, seed after seed.
        new: New tokens that each gets.
        line: Whether an answer ends with its line.
    """

    name: str
    batches: list[list[Asked]]
    new: int
    line: bool


@dataclass(frozen=True)
class Answers:
    """What was answered to some prompts.

    Args:
        texts: One for each prompt.
        kept: Share of each prompt's slots that were held when the answer began, or attended to in it; mean over layers
            and heads.
    """

    texts: list[str]
    kept: list[float]


def measure(bench: Bench) -> None:
    """Every method at every share on every task, and the presses of kvpress."""
    with bench.peer(bench.model) as peer:
        _measure(bench, peer)
    _average(bench)


def _measure(bench: Bench, peer: KVPress | None) -> None:
    ours: list[tuple[str, Method | None, str]] = [(PLAIN, None, "")]
    ours += [(way(base), method, budget) for base, method, budget in bench.budgeted(bench.shares)]
    presses = [(press, share) for press in bench.presses for share in bench.shares] if peer else []
    bench.expect(len(bench.workloads) * (2 * len(ours) + 2 * len(presses) + (1 if presses else 0)))
    for name in bench.workloads:
        task = prepared(bench, name)
        for group in (AGNOSTIC, AWARE):
            for label, method, budget in ours:
                run = functools.partial(_score, bench, task, group, label, method, budget)
                bench.attempt(", ".join(filter(None, (label, budget))), run, f"({name}, {group})")
        if peer is not None:
            _kvpress(bench, peer, task, presses)


def _score(bench: Bench, task: Task, group: str, label: str, method: Method | None, budget: str) -> None:
    found = [answers(bench, method, batch, group == AWARE, task.new, task.line) for batch in task.batches]
    texts = [text for each in found for text in each.texts]
    _note(bench, group, label, budget, task, texts, [kept for each in found for kept in each.kept])


def prepared(bench: Bench, name: str) -> Task:
    """Examples of a workload of about as many tokens as are asked for.

    Raises:
        PromptTooLong: They and their answers exceed the model's context.
        BadParameter: Its prompts have no question.
    """
    read = bench.tokenizer
    sample = examples(name, 1, length=_SAMPLE)[0].prompt
    length = int(bench.tokens * len(sample) / len(read(sample)["input_ids"]))
    asked, answers = [], []
    for seed in range(bench.seeds):
        for example in examples(name, bench.limit, seed=seed, length=length):
            context, question = parted(example.prompt)
            asking = read(question, add_special_tokens=False)["input_ids"]
            asked.append(Asked(example, seed, read(context)["input_ids"] + asking, len(asking)))
            answers.append(len(read(example.answer, add_special_tokens=False)["input_ids"]))
    longest, new, limit = max(len(each.ids) for each in asked), max(answers) + 4, context_length(bench.model)
    if limit and longest + new > limit:
        raise PromptTooLong(
            f"{name}: a prompt of {longest} tokens and an answer of {new} exceed the model's context of {limit}; ask "
            "for fewer tokens"
        )
    batches = [asked[start : start + bench.batch_size] for start in range(0, len(asked), bench.batch_size)]
    return Task(name, batches, new, "\n" not in asked[0].example.answer.rstrip("\n"))


@torch.inference_mode()
def answers(bench: Bench, method: Method | None, asked: Sequence[Asked], aware: bool, new: int, line: bool) -> Answers:
    """Greedy answers to a batch of prompts.

    Args:
        bench: Model and tokenizer.
        method: A cache policy at its budget, a share as the module says, a count to the end; None keeps everything.
        asked: The prompts.
        aware: Whether the question is read with the context.
        new: New tokens.
        line: Whether an answer ends with its line.
    """
    model, tokenizer = bench.model, bench.tokenizer
    width, pad = max(len(each.ids) for each in asked), pad_token(model, tokenizer)
    ids = torch.tensor([[pad] * (width - len(each.ids)) + each.ids for each in asked], device=model.device)
    mask = torch.tensor([[0] * (width - len(each.ids)) + [1] * len(each.ids) for each in asked], device=model.device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cuts = [cut(asked, aware, width), width - 1]
    budget = getattr(method, "budget", None)
    # A count says how many slots are held to the end.
    once = method is not None and drops(method) and isinstance(budget, float)
    if once:
        assert isinstance(budget, float)
        method = dataclasses.replace(method, budget=of_context(asked, aware, budget))  # type: ignore[type-var]
    block: Any = contextlib.nullcontext() if method is None else method(model)  # type: ignore[operator]
    options: dict[str, Any] = {"stop_strings": ["\n"], "tokenizer": tokenizer} if line else {}
    with block:
        cache, begin = None, 0
        for end in dict.fromkeys(cuts):
            cache = model(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=places[:, begin:end],
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            ).past_key_values  # fmt: skip
            if once:
                cache.keep_all()
            begin = end
        kept = [1.0] * len(asked) if method is None else held(cache, mask[:, :-1].sum(-1))
        out = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False,
            pad_token_id=pad, use_cache=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        if method is not None and not getattr(method, "drops", False):
            share = out.past_key_values.attended_share()
            kept = [each * share for each in kept]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in out.sequences[:, width:].tolist()]
    return Answers(texts, kept)


def cut(asked: Sequence[Asked], aware: bool, width: int) -> int:
    """Columns of a left-padded batch that are compressed at once.

    The rows' questions have different lengths, and a gap between context and question would be padding; so all rows
    are cut where the longest question begins.
    """
    return width - 1 if aware else width - max(each.question for each in asked)


def of_context(asked: Sequence[Asked], aware: bool, share: float) -> float:
    """The share of what is compressed at once that leaves room for the question in a share of the whole prompt.

    Rows of a batch get the same one, for the mean of their lengths.

    Raises:
        BadParameter: The question alone is more than the share.
    """
    behind = 0 if aware else max(each.question for each in asked) - 1
    before = statistics.fmean(len(each.ids) for each in asked) - 1
    if share * before - behind < 1:
        raise BadParameter(f"{share:.4g} of {before:.0f} slots leave none beside the question's {behind}")
    return (share * before - behind) / (before - behind)


def held(cache: Any, lengths: torch.Tensor) -> list[float]:
    """Share of each row's tokens that the cache holds, mean over layers and heads.

    Args:
        cache: A cache of Tokenry's.
        lengths: Tokens that each row has read `[rows]`.
    """
    layers = [(positions >= 0).float().sum(-1).mean(-1) for positions in cache.kept_positions()]
    rows = torch.stack([layer.expand(len(lengths)) for layer in layers]).mean(0)
    return (rows.to(lengths.device) / lengths).tolist()


# --- kvpress ------------------------------------------------------------------------------------


def _kvpress(bench: Bench, peer: KVPress, task: Task, presses: Sequence[tuple[str, float]]) -> None:
    asked = [each for batch in task.batches for each in batch]
    for part in (0, 1):
        texts = [parted(each.example.prompt)[part] for each in asked]
        theirs = peer.ask("tokens", texts=texts, special=part == 0)["ids"]
        ours = [each.ids[-each.question :] if part else each.ids[: -each.question] for each in asked]
        if theirs != ours:
            bench.broken.append(f"kvpress divides the prompts of {task.name} into other tokens")
            return
    stop = _breaks(bench.tokenizer) if task.line else []

    def score(press: str, share: float, group: str) -> None:
        texts, kept = [], []
        for batch in task.batches:
            for each in batch:
                before = len(each.ids) - 1
                # The same cut as in our batch of these prompts.
                split = cut(batch, group == AWARE, len(each.ids))
                within = 1.0 if press == "none" else of_context(batch, group == AWARE, share)
                keep = max(int(within * split + 1e-9), 1)
                reply = peer.ask("answer", press=press, ids=each.ids, split=split, keep=keep, new=task.new, stop=stop)
                if reply["kept"] != keep:
                    raise ResourceError(f"kvpress kept {reply['kept']} slots where {keep} were asked for")
                texts.append(bench.tokenizer.decode(reply["tokens"], skip_special_tokens=True))
                kept.append((keep + before - split) / before)
        label, budget = (NONE, "") if press == "none" else (f"kvpress: {press}", said(share))
        _note(bench, group, label, budget, task, texts, kept)

    bench.attempt(NONE, lambda: score("none", 1.0, AWARE), f"({task.name})")
    for group in (AGNOSTIC, AWARE):
        for press, share in presses:
            run = functools.partial(score, press, share, group)
            bench.attempt(f"kvpress: {press}, {said(share)}", run, f"({task.name}, {group})")


def _breaks(tokenizer: Any) -> list[int]:
    """Ids whose text has the end of a line in it."""
    return [index for index in range(len(tokenizer)) if "\n" in tokenizer.decode([index])]


# --- figures ------------------------------------------------------------------------------------


def _note(
    bench: Bench, group: str, label: str, budget: str, task: Task, texts: Sequence[str], kept: Sequence[float]
) -> None:
    asked = [each for batch in task.batches for each in batch]
    scores = [(each.seed, each.example.check(text)) for each, text in zip(asked, texts, strict=True)]
    values = [statistics.fmean(score for own, score in scores if own == seed) for seed in range(bench.seeds)]
    bench.add("quality", group, label, budget, task.name, "score", values)
    bench.add("quality", f"{group}, share kept", label, budget, task.name, "share", [statistics.fmean(kept)])


def _average(bench: Bench) -> None:
    """Means over the tasks, and over tasks and shares, of what was measured on all of them."""
    scored = [each for each in bench.figures if each.part == "quality" and each.form == "score"]
    budgets = dict.fromkeys(each.budget for each in scored if each.budget)
    for group in (AGNOSTIC, AWARE):
        for label in dict.fromkeys(each.way for each in scored):
            whole = []
            mine = [each for each in scored if (each.group, each.way) == (group, label)]
            for budget in dict.fromkeys(each.budget for each in mine):
                tasks = [each.values for each in mine if each.budget == budget]
                if len(tasks) == len(bench.workloads):
                    values = [statistics.fmean(seed) for seed in zip(*tasks, strict=True)]
                    bench.add("quality", group, label, budget, AVERAGE, "score", values)
                    whole.append(values)
            # Of a method without a budget one mean stands for all.
            if len(whole) == (len(budgets) if all(each.budget for each in mine) else 1):
                values = [statistics.fmean(seed) for seed in zip(*whole, strict=True)]
                bench.add("quality", f"{group}, over all shares", label, "", AVERAGE, "score", values)

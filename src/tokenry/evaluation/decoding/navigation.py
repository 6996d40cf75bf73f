"""In-Context Navigation on lists of names: those of constants that stand in a context, and Python's own."""

import builtins
import keyword
import re
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from tokenry.decoding import InContextNavigation
from tokenry.workloads import Example, examples

from .cntp import vote
from .engine import ACCURACY, Bench, Tally, longest, promised

_ROUNDS = 5
_KEYS, _LENGTH = 20, 2400  # constants of a context, and its characters
_PLANTED, _KNOWN = "constants of a context", "names of Python"
_NAVIGATED, _RANKED = "in-context-navigation", "in-context-navigation:navigate=false"
_SAMPLED = "plain (sampled)"
_LOOKED = 4  # contexts of a seed on which the ranking itself is looked at
_WAYS, _CHAINS = 4, 12  # ways to solve a problem, as the paper has them, and most problems of a seed
_WORKED = "worked arithmetic"
_NAVIGATED_VOTE, _RANKED_VOTE = (f"{way}, {_WORKED}, vote of {_WAYS}" for way in (_NAVIGATED, _RANKED))
_GREEDY = f"plain (greedy), {_WORKED}"

LISTS: dict[str, frozenset[str]] = {
    "Python's keywords.": frozenset(keyword.kwlist),
    "Names of Python's standard modules.": frozenset(sys.stdlib_module_names),
    "Names of Python's built-in exceptions.": frozenset(
        name for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    ),
    "Names of Python's built-in functions.": frozenset(name for name in dir(builtins) if name[0].islower()),
    "Names of the methods of str.": frozenset(name for name in dir(str) if name[0] != "_"),
}  # fmt: skip
"""Lists that a code model can write, with their right answers."""


def _right(count: int) -> str:
    return f"distinct right answers of {count}"


# Of a context, half of the constants are asked for, of what Python has far fewer than there are.
_FEW, _MANY = 2, 4

PROMISES = (
    promised("navigation-above-ranking", "listing the constants found so far reaches at least as many of a context's "
             "as one ranking", _right(_ROUNDS * _FEW), f"{_NAVIGATED}, {_PLANTED}", f"{_RANKED}, {_PLANTED}",
             otherwise="a small model's ranking hardly moves with the list"),
    promised("navigation-above-ranking-names", "listing the names found so far reaches at least as many of Python's as "
             "one ranking", _right(_ROUNDS * _MANY), f"{_NAVIGATED}, {_KNOWN}", f"{_RANKED}, {_KNOWN}",
             otherwise="a small code model was not trained to go on with a list"),
    promised("navigation-ranking-above-sampling", "one ranking reaches at least as many of Python's names as as many "
             "samples at temperature 1", _right(_ROUNDS * _MANY), f"{_RANKED}, {_KNOWN}", f"{_SAMPLED}, {_KNOWN}",
             otherwise="samples go apart behind their first tokens as well"),
    promised("navigation-above-sampling", "listing the names found so far reaches at least as many of Python's as as "
             "many samples at temperature 1", _right(_ROUNDS * _MANY), f"{_NAVIGATED}, {_KNOWN}",
             f"{_SAMPLED}, {_KNOWN}", otherwise="samples go apart behind their first tokens as well"),
    promised("navigation-vote", f"a vote of {_WAYS} ways, each listed for the next, is at least as good as one of ways "
             "from one ranking", ACCURACY, _NAVIGATED_VOTE, _RANKED_VOTE,
             otherwise="what is listed is copied, and all ways make the same mistake"),
    promised("navigation-vote-of-ranking", f"a vote of {_WAYS} ways from one ranking is at least as good as the single "
             "greedy one", ACCURACY, _RANKED_VOTE, _GREEDY,
             otherwise="this task has one right first token, and what is begun by another goes wrong"),
)  # fmt: skip


def measure(bench: Bench) -> None:
    """Distinct right answers when all that was found is listed, and when all come from one ranking."""
    contexts = [
        [planted(example.prompt) for example in examples("recall", bench.limit, seed=seed, keys=_KEYS,
                                                         length=_LENGTH)]
        for seed in range(bench.seeds)
    ]  # fmt: skip
    lists = [[(f'"""{about}"""\n\nNAMES = [\n', known)] for about, known in LISTS.items()]
    # A list in the form in which the bundled model has seen lists: questions answered before, and source code.
    asked = {"item": '# recall KEY_{answer}\nKEY_{answer} = "000000"\n\n', "cue": "# recall KEY_", "end": "\n"}
    quoted = {"item": '    "{answer}",\n', "cue": '    "', "end": '"'}

    def answer(name: str, method: InContextNavigation, groups: Sequence[_Group], note: str) -> None:
        tally, effects = Tally(), Tally()
        shifts: list[_Shift] = []
        for group in groups:
            found = _answers(bench, group, method, tally)
            tally.values.append(_distinct([[answer["text"] for answer in row] for row in found], group))
            if method.navigate:
                effects.timed(lambda group=group, found=found: shifts.append(  # type: ignore[misc]
                    _shift(bench, group[:_LOOKED], found[:_LOOKED], method)
                ))  # fmt: skip
        bench.add("navigation", name, _right(method.rounds * method.per_round), tally, note)
        if method.navigate:
            _check_shifts(bench, name.partition(", ")[2], shifts)

    def sampled(name: str, method: InContextNavigation, groups: Sequence[_Group], note: str) -> None:
        tally, count = Tally(), method.rounds * method.per_round
        for seed, group in enumerate(groups):
            prompts = [_cued(bench, prompt, (), method) for prompt, _ in group for _ in range(count)]
            texts: list[str] = []
            options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            for result in bench.run(tally, prompts, "plain", seed=seed * 1_000_003, max_new_tokens=12, **options):
                texts += [text.partition(method.end)[0] for text in result.texts(bench.tokenizer)]
            rows = [texts[start : start + count] for start in range(0, len(texts), count)]
            tally.values.append(_distinct(rows, group))
        bench.add("navigation", name, _right(count), tally, note)

    for way, navigated in ((_NAVIGATED, True), (_RANKED, False)):
        for task, groups, texts, each, note in (
            (_PLANTED, contexts, asked, _FEW, f"{_KEYS} constants a context"),
            (_KNOWN, lists, quoted, _MANY, f"{len(LISTS)} lists in the place of seeds"),
        ):
            settings: dict[str, Any] = {"rounds": _ROUNDS, "per_round": each, "pool": 200, "header": "", **texts}
            method = InContextNavigation(navigate=navigated, **settings)
            bench.attempt(f"{way}, {task}", partial(answer, f"{way}, {task}", method, groups, note))
            # Of contexts, every sample would read the whole one again.
            if task == _KNOWN and not navigated:
                name = f"{_SAMPLED}, {task}"
                bench.attempt(name, partial(sampled, name, method, groups, f"temperature 1, {note}"))
        bench.attempt(f"{way}, {_WORKED}", partial(_vote, bench, f"{way}, {_WORKED}", navigated))
    bench.attempt(_GREEDY, partial(_greedily, bench))


def _chains(bench: Bench) -> list[list[Example]]:
    """The problems of each seed."""
    return [examples("arithmetic", min(bench.limit, _CHAINS), seed=seed) for seed in range(bench.seeds)]


def _vote(bench: Bench, name: str, navigated: bool) -> None:
    """What most of some ways to solve a problem say, each begun by another token, and each way by itself."""
    voted, single = Tally(), Tally()
    for tasks in _chains(bench):
        right: list[float] = []
        each: list[float] = []
        for task in tasks:
            # A way is listed as this model has seen ways: a comment, and the problem again for the next one.
            method = InContextNavigation(
                rounds=_WAYS, per_round=1, pool=100, navigate=navigated, header="", item="{answer}\n" + task.prompt,
                cue="", end="\n",
            )  # fmt: skip
            group = [(task.prompt, frozenset[str]())]
            (found,) = _answers(bench, group, method, voted, max_new_tokens=longest(bench.tokenizer, tasks))
            texts = [answer["text"] for answer in found]
            right.append(task.check(vote(texts)))
            each.append(statistics.fmean(map(task.check, texts)))
        voted.values.append(statistics.fmean(right))
        single.values.append(statistics.fmean(each))
    note = f"{min(bench.limit, _CHAINS)} problems a seed"
    bench.add("navigation", f"{name}, vote of {_WAYS}", ACCURACY, voted, note)
    bench.add("navigation", f"{name}, each way", ACCURACY, single, note)


def _greedily(bench: Bench) -> None:
    tally = Tally()
    for tasks in _chains(bench):
        texts: list[str] = []
        options = {"do_sample": False, "max_new_tokens": longest(bench.tokenizer, tasks)}
        for result in bench.run(tally, [task.prompt for task in tasks], "plain", **options):
            texts += result.texts(bench.tokenizer)
        tally.values.append(statistics.fmean(task.check(text) for task, text in zip(tasks, texts, strict=True)))
    bench.add("navigation", _GREEDY, ACCURACY, tally)


_Group = Sequence[tuple[str, frozenset[str]]]
"""Prompts with their right answers."""


def _answers(
    bench: Bench, group: _Group, method: InContextNavigation, tally: Tally, max_new_tokens: int = 12
) -> list[list[dict[str, Any]]]:
    """The answers to each of some prompts, as `stats.extra["answers"]` has them."""
    own, written = Tally(), 0
    found: list[list[dict[str, Any]]] = []
    for result in bench.run(own, [prompt for prompt, _ in group], method, do_sample=False,
                            max_new_tokens=max_new_tokens):  # fmt: skip
        assert result.stats is not None
        found += result.stats.extra["answers"]
        written += sum(map(len, result.new_tokens))
    tally.count(own.passes, written, own.seconds)
    return found


def _distinct(texts: Sequence[Sequence[str]], group: _Group) -> float:
    """Mean number of distinct right answers of some prompts."""
    pairs = zip(texts, group, strict=True)
    return statistics.fmean(len({text.strip() for text in own} & right) for own, (_, right) in pairs)


def _cued(bench: Bench, prompt: str, listed: Sequence[str], method: InContextNavigation) -> list[int]:
    """Ids of a prompt with a list of answers and what asks for the next one."""
    items = [method.item.replace("{number}", str(n)).replace("{answer}", text) for n, text in enumerate(listed, 1)]
    cue = method.cue.replace("{number}", str(len(listed) + 1))
    behind = bench.tokenizer(method.header + "".join(items) + cue, add_special_tokens=False)["input_ids"]
    return [*bench.tokenizer(prompt)["input_ids"], *behind]


_Shift = tuple[list[float], list[float]]
"""How much log-probability explored first tokens lose to a list, and how many ranks first tokens of right answers gain
that are not on it."""


@torch.no_grad()
def _shift(
    bench: Bench, group: _Group, found: Sequence[Sequence[dict[str, Any]]], method: InContextNavigation
) -> _Shift:
    """What the list of the last round does to the ranking of first tokens: a log-probability is a logit minus the
    log-sum-exp of all."""
    lost: list[float] = []
    gained: list[float] = []
    for (prompt, right), answers in zip(group, found, strict=True):
        # A list that the context does not hold is cut, and is then another one.
        listed = [answer for answer in answers if answer["round"] < method.rounds - 1]
        if not listed or any(answer["capped"] for answer in answers):
            continue
        texts = [answer["text"] for answer in listed]
        before, after = (
            bench.model(torch.tensor([ids], device=bench.model.device)).logits[0, -1].float().log_softmax(-1)
            for ids in (_cued(bench, prompt, (), method), _cued(bench, prompt, texts, method))
        )
        explored = sorted({answer["first"] for answer in listed})
        lost.append(float((before - after)[explored].mean()))
        rest = {bench.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in right - set(texts)}
        rest -= set(explored)
        gained += [float((before > before[first]).sum() - (after > after[first]).sum()) for first in sorted(rest)]
    return lost, gained


def _check_shifts(bench: Bench, task: str, shifts: Sequence[_Shift]) -> None:
    """Whether the list moves the ranking as the card says; a value for each seed."""
    kind = "contexts" if task == _PLANTED else "names"
    for which, name, statement, figure, otherwise in (
        (0, "lose", "explored first tokens lose probability once they are listed", "nats lost",
         "the model copies what stands before, and a list is read as what comes next"),
        (1, "gain", "first tokens of right answers that are not listed gain rank", "ranks gained",
         "the list moves the query away from all of its kind, right ones among them"),
    ):  # fmt: skip
        values = [statistics.fmean(shift[which]) for shift in shifts if shift[which]]
        if values:
            bench.check(
                f"navigation-{name}-{kind}", f"{statement} ({task})", figure, {_NAVIGATED: statistics.fmean(values)},
                values, strict=True, otherwise=otherwise,
            )  # fmt: skip


def planted(prompt: str) -> tuple[str, frozenset[str]]:
    """The context of a recall prompt without its question, and the names of its constants behind `KEY_`."""
    context = prompt.rpartition("# recall ")[0]
    return context, frozenset(re.findall(r'^KEY_([A-Z]+) = "', context, re.MULTILINE))

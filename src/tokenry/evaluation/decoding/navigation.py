"""In-Context Navigation on lists of names: those of constants that stand in a context, and Python's own."""

import builtins
import keyword
import re
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from tokenry.decoding import InContextNavigation
from tokenry.workloads import examples

from .engine import Bench, Tally, promised

_ROUNDS = 5
_KEYS, _LENGTH = 20, 2400  # constants of a context, and its characters
_PLANTED, _KNOWN = "constants of a context", "names of Python"
_NAVIGATED, _RANKED = "in-context-navigation", "in-context-navigation:navigate=false"

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
        tally = Tally()
        tally.values += [_found(bench, group, method, tally) for group in groups]
        bench.add("navigation", name, _right(method.rounds * method.per_round), tally, note)

    for way, navigated in ((_NAVIGATED, True), (_RANKED, False)):
        for task, groups, texts, each, note in (
            (_PLANTED, contexts, asked, _FEW, f"{_KEYS} constants a context"),
            (_KNOWN, lists, quoted, _MANY, f"{len(LISTS)} lists in the place of seeds"),
        ):
            settings: dict[str, Any] = {"rounds": _ROUNDS, "per_round": each, "pool": 200, "header": "", **texts}
            method = InContextNavigation(navigate=navigated, **settings)
            bench.attempt(f"{way}, {task}", partial(answer, f"{way}, {task}", method, groups, note))


_Group = Sequence[tuple[str, frozenset[str]]]
"""Prompts with their right answers."""


def _found(bench: Bench, group: _Group, method: InContextNavigation, tally: Tally) -> float:
    """Mean number of distinct right answers of some prompts."""
    prompts, known = zip(*group, strict=True)
    own, written, found = Tally(), 0, []
    for result in bench.run(own, prompts, method, do_sample=False, max_new_tokens=12):
        assert result.stats is not None
        found += [frozenset(answer["text"].strip() for answer in row) for row in result.stats.extra["answers"]]
        written += sum(map(len, result.new_tokens))
    tally.count(own.passes, written, own.seconds)
    return statistics.fmean(len(answers & right) for answers, right in zip(found, known, strict=True))


def planted(prompt: str) -> tuple[str, frozenset[str]]:
    """The context of a recall prompt without its question, and the names of its constants behind `KEY_`."""
    context = prompt.rpartition("# recall ")[0]
    return context, frozenset(re.findall(r'^KEY_([A-Z]+) = "', context, re.MULTILINE))

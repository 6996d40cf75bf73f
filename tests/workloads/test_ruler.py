"""RULER-style tasks: the question can be told apart, and the context holds what is asked for, as often as it says."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from tokenry.errors import BadParameter
from tokenry.workloads import WORKLOADS, examples
from tokenry.workloads.ruler import parted

TASKS = [name for name in WORKLOADS if name.startswith("ruler-")]


@pytest.mark.parametrize("name", ["recall", *TASKS])
def test_context_and_question_make_the_prompt(name):
    for example in examples(name, 6, length=900):
        context, question = parted(example.prompt)
        assert context + question == example.prompt
        assert question.startswith("\n\n# recall ") and question.count("\n\n") == 1
        assert 800 < len(context) < 1600


def test_a_prompt_without_a_question_is_refused():
    with pytest.raises(BadParameter, match="no question"):
        parted("def f():\n    return 1")


def test_single_plants_one_constant_at_its_depth_among_lines_that_say_nothing():
    for example in examples("ruler-single", 10, length=2000):
        lines = parted(example.prompt)[0].split("\n")
        (place,) = [number for number, line in enumerate(lines) if line.startswith("KEY_")]
        assert lines[place].endswith(f'"{example.answer}'.rstrip("\n"))
        assert abs(place / len(lines) - example.meta["depth"]) < 0.05
        assert len(set(lines)) == 5


def test_multikey_has_nothing_but_constants_of_different_names():
    for example in examples("ruler-multikey", 10, length=2000):
        context, question = parted(example.prompt)
        found = dict(re.fullmatch(r'(KEY_\w+) = "(\d{6})"', line).groups() for line in context.split("\n"))
        assert len(found) == context.count("\n") + 1 > 50
        name = re.match(r"\n\n# recall (\w+)\n", question)[1]
        assert example.answer == found[name] + '"\n'


@pytest.mark.parametrize("values", [1, 3])
def test_multivalue_scores_the_share_of_the_values(values):
    for example in examples("ruler-multivalue", 10, length=900, values=values):
        context, question = parted(example.prompt)
        name = re.match(r"\n\n# recall (\w+)\n", question)[1]
        found = re.findall(rf'^{name} = "(\d+)"$', context, re.MULTILINE)
        assert len(set(found)) == values
        assert example.check(example.answer) == 1
        assert example.check(found[0]) == pytest.approx(1 / values)


@pytest.mark.parametrize("hops", [1, 3])
def test_tracking_follows_the_links_to_a_value(hops):
    for example in examples("ruler-tracking", 10, length=900, hops=hops):
        context, question = parted(example.prompt)
        links = dict(re.findall(r"^(KEY_\w+) = (.+)$", context, re.MULTILINE))
        assert len(links) == hops + 1
        at = re.match(r"\n\n# recall (\w+)\n", question)[1]
        walked = []
        while at in links:
            at = links[at]
            walked.append(at)
        assert len(walked) == hops + 1
        assert example.check("\n".join(walked)) == 1
        assert example.check(walked[-1]) == pytest.approx(1 / (hops + 1))


def test_words_stand_as_often_as_they_say_and_the_others_once():
    for example in examples("ruler-words", 10, length=1500, common=3, often=5):
        context, _ = parted(example.prompt)
        counts = Counter(context.split("\n"))
        common = [line for line, count in counts.items() if count > 1]
        assert [counts[line] for line in common] == [5, 5, 5] and len(counts) > 10
        names = [line.removeprefix("# recall KEY_") for line in common]
        assert example.check(" ".join(names)) == 1
        assert example.check(names[0]) == pytest.approx(1 / 3)


def test_tasks_of_one_seed_do_not_share_their_constants():
    names = [set(re.findall(r"KEY_\w+", examples(name, 1, length=900)[0].prompt)) for name in TASKS]
    assert not any(one & other for one, other in itertools.combinations(names, 2))

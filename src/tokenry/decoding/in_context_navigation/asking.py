"""Lists of answers and chains of thought, as In-Context Navigation asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tokenry.decoding.in_context_navigation.decoder import InContextNavigation
from tokenry.errors import BadPrompt
from tokenry.generation.full import generate

WAYS = InContextNavigation(
    rounds=4,
    per_round=1,
    pool=100,
    header="\n\nPlease show me some different ways to solve this problem."
    "\n\nHere are different ways to solve the problem:\n",
    item="### Way {number}:\n* **Step 1:**\n{answer}\n",
    cue="### Way {number}:\n* **Step 1:**\n",
    end="#",
)
"""The authors' four chains of thought."""


@dataclass(frozen=True)
class Answer:
    """One answer of a list.

    Attributes:
        text: What stands before the mark that ends it.
        first: Id of its first token.
        rank: Place of that token in the ranking that it was taken from, from 1.
        round: Round of the ranking, from 0.
        capped: Whether the list that was read had lost its oldest answers.
        correct: What the judge says, None without one.
    """

    text: str
    first: int
    rank: int
    round: int
    capped: bool = False
    correct: bool | None = None


def navigate(
    model: PreTrainedModel,
    tokenizer: Any,
    instruction: str,
    *,
    method: InContextNavigation | None = None,
    judge: Callable[[str], bool] | None = None,
    max_new_tokens: int = 64,
    **generate_options: Any,
) -> list[Answer]:
    """List answers to an instruction such as "Please show me some fruits.", in the order they were found.

    Args:
        method: Rounds, texts and the like; by default the paper's ten rounds of ten.
        judge: Whether an answer is right; asked once for each text, blanks and case aside. What has no text is wrong.
        max_new_tokens: Most tokens of an answer.
        **generate_options: As `tokenry.generate` takes them.
    """
    options = {"do_sample": False, "max_new_tokens": max_new_tokens} | generate_options
    method = method or InContextNavigation()
    result = generate(model, tokenizer, instruction, method=method, **options)
    assert result.stats is not None
    verdicts: dict[str, bool] = {"": False}
    found = []
    for about in result.stats.extra["answers"][0]:
        plain = " ".join(about["text"].lower().split())
        if judge is not None and plain not in verdicts:
            verdicts[plain] = bool(judge(about["text"].strip()))
        found.append(Answer(**about, correct=None if judge is None else verdicts[plain]))
    return found


def mean_precision(correct: Iterable[bool]) -> float:
    """Mean over i of the share of right ones among the first i answers: MAP@k as the authors' code has it."""
    right, shares = 0, []
    for number, verdict in enumerate(correct, 1):
        right += verdict
        shares.append(right / number)
    if not shares:
        raise BadPrompt("there are no answers to measure; give at least one")
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Paths:
    """Chains of thought, the answer of each (empty where none was read), and the answer most of them give."""

    paths: list[str]
    answers: list[str]
    vote: str


def chain_of_thought(
    model: PreTrainedModel,
    tokenizer: Any,
    question: str,
    *,
    method: InContextNavigation = WAYS,
    suffix: str = '\n**Final Answer (Only Number):** "',
    read: Callable[[str], str] | None = None,
    max_new_tokens: int = 256,
) -> Paths:
    """Solve a problem in several ways, each begun by a token that no other began with, and vote.

    Args:
        method: Number of ways and their texts; `navigate=False` in it gives the paper's baseline.
        suffix: Text behind a way that asks for its answer, up to an opening quote.
        read: The answer in what was written up to the closing quote, by default its digits; `letter` reads a choice.
        max_new_tokens: Most tokens of a way; the authors' are 256, and 512 for AQuA.
    """
    answers = navigate(model, tokenizer, question, method=method, max_new_tokens=max_new_tokens)
    paths = [answer.text for answer in answers]
    begin = question + method.header + method.cue.replace("{number}", "1")
    texts = [begin + path.rstrip("\n") + suffix for path in paths]
    result = generate(model, tokenizer, texts, max_new_tokens=8, do_sample=False)
    found = [(read or digits)(text.partition('"')[0]) for text in result.texts()]
    return Paths(paths, found, vote(found))


def digits(text: str) -> str:
    """The digits of a text."""
    return "".join(letter for letter in text if letter.isdigit())


def letter(text: str) -> str:
    """The first of the letters A to E in a text, empty if there is none."""
    return next((sign for sign in text if sign in "ABCDE"), "")


def vote(answers: list[str]) -> str:
    """The answer that most give, the earliest of several; no answer has no vote."""
    given = [answer for answer in answers if answer]
    return Counter(given).most_common(1)[0][0] if given else ""

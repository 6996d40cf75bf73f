"""Infill: one or several lines taken out of a function of a held-out package, to be filled in from both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tokenry.workloads.engine import Example, functions, seeded

MASK = "<mask>"
"""Stands for the hole in a prompt, whatever its length and whatever the model's own mask token."""


def generate(seed: int, split: str, *, lines: int = 1) -> Iterator[Example]:
    """Yield functions with `<mask>` in place of some lines of their bodies; the answer is what stood there.

    A hole begins behind the indentation of its first line and ends with its last line, so the texts on both sides are
    divided into tokens as they are in the whole function.

    Args:
        seed: Seed of the stream.
        split: ``"test"`` takes functions of the held-out packages, ``"train"`` those of the standard library.
        lines: Lines of a hole.
    """
    rng = seeded("infill", seed, split)
    pool = [source for source in functions(split) if MASK not in source]
    while True:
        rows = rng.choice(pool).split("\n")
        # The first line stays, and one behind the hole; a hole begins and ends with text.
        starts = [
            first for first in range(1, len(rows) - lines) if rows[first].strip() and rows[first + lines - 1].strip()
        ]
        if not starts:
            continue
        first = rng.choice(starts)
        indent = rows[first][: len(rows[first]) - len(rows[first].lstrip())]
        answer = "\n".join(rows[first : first + lines])[len(indent) :]
        before = "\n".join([*rows[:first], indent])
        after = "\n" + "\n".join(rows[first + lines :]) + "\n"
        yield Example(before + MASK + after, answer, _check(answer), {"lines": lines, "length": len(answer)})


def with_masks(example: Example, tokenizer: Any) -> str:
    """The prompt with as many of the tokenizer's mask tokens in its hole as the answer has tokens."""
    count = len(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    return example.prompt.replace(MASK, tokenizer.mask_token * count)


def _check(answer: str) -> Callable[[str], float]:
    return lambda output: float(output.strip() == answer.strip())

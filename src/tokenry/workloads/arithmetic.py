"""Arithmetic: a chain of additions and subtractions, worked step by step to an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tokenry.workloads.engine import Example, seeded

_ANSWER = re.compile(r"answer (-?\d+)\.")


def generate(seed: int, split: str, *, steps: int | None = None, largest: int = 99) -> Iterator[Example]:
    """Yield chains such as ``# compute 37 + 48 - 19`` with the worked clauses as the answer.

    Args:
        seed: Seed of the stream.
        split: ``"train"`` or ``"test"``.
        steps: Operations in a chain; by default 2 to 6, drawn for each example.
        largest: Largest operand.
    """
    rng = seeded("arithmetic", seed, split)
    while True:
        count = steps or rng.randint(2, 6)
        value = rng.randint(1, largest)
        question, clauses = str(value), []
        for _ in range(count):
            sign, operand = rng.choice("+-"), rng.randint(1, largest)
            if sign == "-" and operand > value:
                sign = "+"
            result = value + operand if sign == "+" else value - operand
            question += f" {sign} {operand}"
            clauses.append(f"{value} {sign} {operand} = {result}")
            value = result
        answer = "; ".join(clauses) + f"; answer {value}.\n"
        yield Example(f"# compute {question}\n# ", answer, _check(value), {"steps": count})


def _check(value: int) -> Callable[[str], float]:
    def check(output: str) -> float:
        found = _ANSWER.search(output)
        return float(found is not None and int(found.group(1)) == value)

    return check

"""Code: complete a function of a held-out package from its head."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from tokenry.workloads.engine import Example, functions, seeded


def generate(seed: int, split: str) -> Iterator[Example]:
    """Yield function heads (the signature, and the docstring if there is one) with the rest as the answer.

    Args:
        seed: Seed of the stream.
        split: ``"test"`` takes functions of the held-out packages, ``"train"`` those of the standard library.
    """
    rng = seeded("code", seed, split)
    pool = functions(split)
    while True:
        source = rng.choice(pool)
        lines = source.split("\n")
        node = ast.parse(source).body[0]
        assert isinstance(node, ast.FunctionDef)
        head = node.body[0].lineno - 1
        if ast.get_docstring(node) is not None:
            head = node.body[0].end_lineno or head
        if head >= len(lines):
            continue
        answer = "\n" + "\n".join(lines[head:]) + "\n"
        yield Example("\n".join(lines[:head]), answer, _check(answer), {"length": len(answer)})


def _check(answer: str) -> Callable[[str], float]:
    first = next(line for line in answer.split("\n") if line.strip())

    def check(output: str) -> float:
        return float(next((line for line in output.split("\n") if line.strip()), "") == first)

    return check

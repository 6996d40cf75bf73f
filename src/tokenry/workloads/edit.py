"""Edit: repeat a given function with one name changed."""

from __future__ import annotations

import ast
import keyword
import random
import re
from collections.abc import Callable, Iterator

from tokenry.workloads.engine import END, Example, functions, seeded

_NAMES = (
    "alpha", "buffer", "cell", "delta", "entry", "frame", "group", "handle", "inner", "joint", "kernel", "label",
    "marker", "node", "offset", "packet", "query", "record", "slot", "target", "unit", "vector", "window", "extra",
    "total", "source", "result", "counter", "holder", "bundle",
)  # fmt: skip


def _names(source: str) -> list[str]:
    tree = ast.parse(source)
    stored = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    stored |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return sorted(
        name
        for name in stored - {"self", "cls"}
        if len(name) > 1 and not keyword.iskeyword(name) and len(re.findall(rf"\b{name}\b", source)) >= 2
    )


def generate(seed: int, split: str, *, longest: int = 700) -> Iterator[Example]:
    """Yield functions of at most ``longest`` characters whose answer is the function with one name replaced.

    Args:
        seed: Seed of the stream.
        split: ``"train"`` takes functions of the standard library, ``"test"`` those of the held-out packages.
        longest: Longest function in characters.
    """
    rng = seeded("edit", seed, split)
    pool = [source for source in functions(split) if len(source) <= longest]
    while True:
        source = rng.choice(pool)
        names = _names(source)
        if not names:
            continue
        old, new = rng.choice(names), _fresh(rng, source)
        answer = re.sub(rf"\b{old}\b", new, source)
        yield Example(
            f"# rename {old} to {new}\n{source}\n# renamed\n",
            f"{answer}\n{END}\n",
            _check(answer),
            {"length": len(source)},
        )


def _fresh(rng: random.Random, source: str) -> str:
    while True:
        name = "_".join(rng.sample(_NAMES, rng.randint(1, 2)))
        if name not in source:
            return name


def _check(answer: str) -> Callable[[str], float]:
    return lambda output: float(output.split(f"\n{END}")[0] == answer)

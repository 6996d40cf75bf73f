"""RULER-style tasks (arXiv 2404.06654) of constants, as `recall` plants them, so that a small code model solves some.

ruler-single      one constant among lines that say nothing
ruler-multikey    every line is a constant, one of them is asked for
ruler-multivalue  one constant is given several values at different places, all of them are wanted
ruler-tracking    constants that are given the value of another one: the chain from one of them is wanted
ruler-words       a list in which some names stand often: these are wanted

The prompt is a context and, behind a blank line, a question that begins with ``# ``: `parted` tells them apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from tokenry.errors import BadParameter
from tokenry.workloads.engine import Example, functions, seeded
from tokenry.workloads.recall import DEPTHS, _key

_IDLE = ("# nothing is stored on this line", "pass", "# the next line is like this one", "pass  # and so on")
_QUESTION = "\n\n# "


def parted(prompt: str) -> tuple[str, str]:
    """Context and question of a prompt of `recall` or of a task of this module; their sum is the prompt."""
    context, mark, question = prompt.rpartition(_QUESTION)
    if not mark:
        raise BadParameter("the prompt has no question: a blank line and '# ' begin it")
    return context, mark + question


def single(seed: int, split: str, *, length: int = 5400, depth: float | None = None) -> Iterator[Example]:
    """Yield one constant in a context of idle lines (RULER's niah_single_1).

    Args:
        seed: Seed of the stream.
        split: ``"train"`` or ``"test"``.
        length: Length of the context in characters.
        depth: Share of the context that precedes the constant; by default the depths take turns.
    """
    rng = seeded("ruler-single", seed, split)
    index = 0
    while True:
        wanted = depth if depth is not None else DEPTHS[index % len(DEPTHS)]
        index += 1
        (name,) = _names(rng, 1)
        value = _value(rng)
        lines = _filled(lambda count: _IDLE[count % len(_IDLE)], length)
        lines.insert(int(wanted * len(lines)), f'{name} = "{value}"')
        yield _example(lines, f'recall {name}\n{name} = "', f'{value}"\n', [value], depth=wanted, length=length)


def multikey(seed: int, split: str, *, length: int = 5400) -> Iterator[Example]:
    """Yield contexts of nothing but constants, one of which is asked for (RULER's niah_multikey_2).

    Args:
        seed: Seed of the stream.
        split: ``"train"`` or ``"test"``.
        length: Length of the context in characters.
    """
    rng = seeded("ruler-multikey", seed, split)
    while True:
        values: dict[str, str] = {}
        lines: list[str] = []
        while not lines or sum(map(len, lines)) + len(lines) < length:
            name = _key(rng)
            if name not in values:
                values[name] = _value(rng)
                lines.append(f'{name} = "{values[name]}"')
        wanted = rng.choice(list(values))
        value = values[wanted]
        yield _example(lines, f'recall {wanted}\n{wanted} = "', f'{value}"\n', [value], length=length)


def multivalue(seed: int, split: str, *, length: int = 5400, values: int = 2) -> Iterator[Example]:
    """Yield code in which a constant is given several values, all of which are wanted (RULER's niah_multivalue).

    Args:
        seed: Seed of the stream.
        split: ``"train"`` or ``"test"``.
        length: Length of the context in characters.
        values: Values of the constant. A model that writes one of them and stops scores one over this number.
    """
    rng = seeded("ruler-multivalue", seed, split)
    while True:
        (name,) = _names(rng, 1)
        wanted = list(dict.fromkeys(_value(rng) for _ in range(values)))
        lines = _planted(rng, split, length, [f'{name} = "{value}"' for value in wanted])
        answer = f'"\n{name} = "'.join(wanted) + '"\n'
        yield _example(lines, f'recall {name}\n{name} = "', answer, wanted, length=length)


def tracking(seed: int, split: str, *, length: int = 5400, hops: int = 2) -> Iterator[Example]:
    """Yield code with a chain of constants, each given the next one, the last a value (RULER's variable tracking).

    The first is asked for; the other names of the chain and its value are wanted, the links of the chain standing in
    any order.

    Args:
        seed: Seed of the stream.
        split: ``"train"`` or ``"test"``.
        length: Length of the context in characters.
        hops: Links between constants.
    """
    rng = seeded("ruler-tracking", seed, split)
    while True:
        first, *others = _names(rng, hops + 1)
        value = _value(rng)
        links = [*(f"{one} = {other}" for one, other in zip([first, *others], others, strict=False)),
                 f'{others[-1]} = "{value}"']  # fmt: skip
        lines = _planted(rng, split, length, links)
        # The question names the kind of value, which the model would otherwise have to guess.
        start, wanted = "KEY_", [name.removeprefix("KEY_") for name in others]
        answer = "\n".join([wanted[0], *links[1:]]) + "\n"
        yield _example(lines, f"recall {first}\n{first} = {start}", answer, [*wanted, value], length=length)


def words(seed: int, split: str, *, length: int = 5400, common: int = 2, often: int = 12) -> Iterator[Example]:
    """Yield lists of constants in which some stand often and the others once (RULER's common words).

    Args:
        seed: Seed of the stream.
        split: ``"train"`` or ``"test"``.
        length: Length of the context in characters.
        common: Names that stand often; all of them are wanted.
        often: How many times they do.
    """
    rng = seeded("ruler-words", seed, split)
    while True:
        wanted = _names(rng, common)
        lines = [f"# recall {name}" for name in wanted for _ in range(often)]
        known = set(wanted)
        while sum(map(len, lines)) + len(lines) < length:
            name = _key(rng)
            if name not in known:
                known.add(name)
                lines.append(f"# recall {name}")
        rng.shuffle(lines)
        found = [name.removeprefix("KEY_") for name in wanted]
        answer = "\n# recall KEY_".join(found) + "\n"
        yield _example(lines, "recall KEY_", answer, found, length=length)


# --- shared -------------------------------------------------------------------------------------


def _example(lines: Sequence[str], question: str, answer: str, wanted: Sequence[str], **meta: object) -> Example:
    return Example("\n".join(lines) + _QUESTION + question, answer, _share(wanted), meta)


def _share(wanted: Sequence[str]) -> Callable[[str], float]:
    """RULER's score: the share of the wanted strings that the output contains."""
    return lambda output: sum(each in output for each in wanted) / len(wanted)


def _value(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(6))


def _names(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_key(rng)] = None
    return list(found)


def _filled(line: Callable[[int], str], length: int) -> list[str]:
    lines: list[str] = []
    size = 0
    while size < length:
        lines.append(line(len(lines)))
        size += len(lines[-1]) + 1
    return lines


def _planted(rng: random.Random, split: str, length: int, needles: Sequence[str]) -> list[str]:
    """Lines of functions of about ``length`` characters, with the needles at random places in random order."""
    pool = functions(split)
    blocks: list[str] = []
    size = 0
    while size < length:
        blocks.append(rng.choice(pool)[: max(40, length - size)])
        size += len(blocks[-1]) + 2
    lines = "\n\n".join(blocks)[:length].split("\n")
    for place, needle in sorted(((rng.random(), needle) for needle in needles), reverse=True):
        lines.insert(int(place * len(lines)), needle)
    return lines

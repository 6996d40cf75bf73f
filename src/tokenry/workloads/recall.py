"""Recall: the value of one key, planted in a long context, asked for at the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tokenry.errors import BadParameter
from tokenry.workloads.engine import Example, functions, seeded

_SYLLABLES = (
    "ba",
    "co",
    "du",
    "fe",
    "gi",
    "ho",
    "ka",
    "lu",
    "me",
    "ni",
    "po",
    "ra",
    "so",
    "ti",
    "vu",
    "we",
    "xa",
    "yo",
    "zi",
)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def _key(rng: random.Random) -> str:
    return "KEY_" + "".join(rng.choice(_SYLLABLES) for _ in range(3)).upper()


def generate(
    seed: int,
    split: str,
    *,
    length: int = 5400,
    keys: int = 8,
    depth: float | None = None,
    asked: int = 0,
    questions: int = 1,
) -> Iterator[Example]:
    """Yield contexts of about ``length`` characters in which ``keys`` constants are planted.

    Args:
        seed: Seed of the stream.
        split: ``"train"`` or ``"test"``.
        length: Length of the context in characters (about 3.3 a token for the bundled tokenizer).
        keys: Number of planted constants, one of which is asked for.
        depth: Share of the context that precedes the wanted constant; by default the depths take turns.
        asked: How many times the wanted constant was asked for and answered before, evenly between where it stands and
            the end: a cache policy that keeps what was looked at before has something to go by.
        questions: Constants asked for one after another, for training; the check reads the first answer.
    """
    if questions > keys:
        raise BadParameter(
            f"recall: questions={questions} is not allowed; it must be at most the number of keys, {keys}"
        )
    rng = seeded("recall", seed, split)
    pool = functions(split)
    index = 0
    while True:
        wanted = depth if depth is not None else DEPTHS[index % len(DEPTHS)]
        index += 1
        names = list(dict.fromkeys(_key(rng) for _ in range(keys)))
        values = {name: "".join(rng.choice("0123456789") for _ in range(6)) for name in names}
        places = [wanted] + [rng.random() for _ in names[1:]]
        blocks: list[str] = []
        size = 0
        while size < length:
            block = rng.choice(pool)[: max(40, length - size)]
            blocks.append(block)
            size += len(block) + 2
        lines = "\n\n".join(blocks)[:length].split("\n")
        planted = [(place, f'{name} = "{values[name]}"') for name, place in zip(names, places, strict=True)]
        for number in range(1, asked + 1):
            place = wanted + (1 - wanted) * number / (asked + 1)
            planted.append((place, f'\n# recall {names[0]}\n{names[0]} = "{values[names[0]]}"\n'))
        for place, line in sorted(planted, key=lambda pair: -pair[0]):
            lines.insert(int(place * len(lines)), line)
        prompt = "\n".join(lines) + f'\n\n# recall {names[0]}\n{names[0]} = "'
        answer = values[names[0]] + '"\n'
        for name in names[1:questions]:
            answer += f'\n# recall {name}\n{name} = "{values[name]}"\n'
        yield Example(prompt, answer, _check(values[names[0]]), {"depth": wanted, "length": length})


def _check(value: str) -> Callable[[str], float]:
    return lambda output: float(output[: len(value)] == value)

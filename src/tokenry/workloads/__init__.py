"""What is a model asked to do? Pure generators of examples, the same for a seed and split everywhere.

code        complete a function of a held-out package
recall      the value of a key from a long context
arithmetic  worked steps with a checkable answer
edit        repeat a function with one name changed
infill      fill lines back into a function (for infillers: the prompt has a hole, `<mask>`)
ruler-...   RULER-style tasks of constants: single, multikey, multivalue, tracking, words
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenry.errors import BadParameter
from tokenry.workloads import arithmetic, code, edit, infill, jsonl, recall, ruler
from tokenry.workloads.engine import END, HELD_OUT, Example, functions, held_out_files, is_held_out, library_files

WORKLOADS: dict[str, Callable[..., Iterator[Example]]] = {
    "code": code.generate,
    "recall": recall.generate,
    "arithmetic": arithmetic.generate,
    "edit": edit.generate,
    "infill": infill.generate,
    "ruler-single": ruler.single,
    "ruler-multikey": ruler.multikey,
    "ruler-multivalue": ruler.multivalue,
    "ruler-tracking": ruler.tracking,
    "ruler-words": ruler.words,
}

__all__ = [
    "END", "HELD_OUT", "WORKLOADS", "Example", "examples", "functions", "held_out_files", "is_held_out",
    "library_files",
]  # fmt: skip


def examples(name: str, count: int, *, seed: int = 0, split: str = "test", **options: object) -> list[Example]:
    """The first ``count`` examples of a workload, or of a JSONL file when ``name`` ends in ``.jsonl``.

    A workload's name may carry options of its generator: ``recall:asked=3;length=3000``.

    Raises:
        BadParameter: The workload or an option is not known, or the split is neither ``"train"`` nor ``"test"``.
        BadPrompt: The file is missing or malformed.
    """
    if name.endswith((".jsonl", ".json")) or Path(name).is_file():
        return list(itertools.islice(jsonl.read(name), count))
    name, _, given = name.partition(":")
    if name not in WORKLOADS:
        raise BadParameter(f"no workload {name!r}: choose one of {', '.join(WORKLOADS)}, or name a .jsonl file")
    options = _options(name, given) | options
    if split not in ("train", "test"):
        raise BadParameter(f"split={split!r}: choose 'train' or 'test'")
    for key, value in options.items():
        _check(name, key, value)
    return list(itertools.islice(WORKLOADS[name](seed, split, **options), count))


# The least of an option, where it is not 1; shorter functions have no name to replace.
_LEAST = {"asked": 0, "longest": 100}


def _check(name: str, key: str, value: object) -> None:
    """Refuse an option's value that would give no tasks, or other ones than it says."""
    if key == "depth":
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise BadParameter(f"{name}: depth={value} is not allowed; it must be from 0 to 1")
        return
    least = _LEAST.get(key, 1)
    if value is not None and not (isinstance(value, int) and value >= least):
        raise BadParameter(f"{name}: {key}={value} is not allowed; it must be a whole number of at least {least}")


def _options(name: str, given: str) -> dict[str, object]:
    """Read ``key=number;key=number`` as options of a workload."""
    known = [
        key
        for key, parameter in inspect.signature(WORKLOADS[name]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    found: dict[str, object] = {}
    for part in filter(None, given.split(";")):
        key, _, value = part.partition("=")
        if key not in known:
            raise BadParameter(f"{name}: no option {key!r}; options: {', '.join(known) or 'none'}")
        try:
            found[key] = float(value) if "." in value else int(value)
        except ValueError:
            raise BadParameter(f"{name}: {part} is not allowed; give {key} a number, such as {key}=3") from None
    return found

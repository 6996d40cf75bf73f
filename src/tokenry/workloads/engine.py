"""What every workload shares: the example, the seeded generator, and where Python source comes from."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT = ("rich", "typer", "click", "hypothesis", "pytest", "_pytest")
"""Packages that no bundled model was trained on, wherever they lie (vendored copies included)."""

END = "# end"
"""The line that closes an answer in the workloads whose answers span several lines."""


@dataclass(frozen=True)
class Example:
    """One task: a prompt, the answer that is expected, and how an output is scored.

    Args:
        prompt: Text given to the model.
        answer: The expected continuation.
        check: Maps the generated continuation to a score between 0 and 1.
        meta: Facts about the example that reports group by (depth, steps, ...).
    """

    prompt: str
    answer: str
    check: Callable[[str], float]
    meta: dict[str, object] = field(default_factory=dict)


def seeded(workload: str, seed: int, split: str) -> random.Random:
    """A generator that never shares its stream between splits, so no test example is trained on."""
    digest = hashlib.sha256(f"{workload}/{split}/{seed}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def is_held_out(path: Path) -> bool:
    """Whether a source file belongs to a held-out package or to a vendored copy of one."""
    return any(part in HELD_OUT for part in (*path.parts[:-1], path.stem))


def held_out_files() -> list[Path]:
    """Source files of the held-out packages that are installed, in a fixed order."""
    files: list[Path] = []
    for name in HELD_OUT:
        spec = importlib.util.find_spec(name)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            files += sorted(Path(root).rglob("*.py"))
    return files


def library_files() -> list[Path]:
    """Source files of the standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.parts) and not is_held_out(path))


@functools.cache
def functions(split: str) -> tuple[str, ...]:
    """Sources of complete top-level functions and methods, dedented, from 120 to 1,200 characters.

    Args:
        split: ``"test"`` reads the held-out packages, ``"train"`` the standard library.
    """
    files = held_out_files() if split == "test" else library_files()
    found: dict[str, None] = {}
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for source in _functions_of(text.splitlines(), tree):
            if 120 <= len(source) <= 1200 and source.isascii():
                found[source] = None
    return tuple(found)


def _functions_of(lines: list[str], tree: ast.Module) -> Iterator[str]:
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for parent in tree.body:
        if isinstance(parent, ast.ClassDef):
            nodes += [node for node in parent.body if isinstance(node, ast.FunctionDef)]
    for node in nodes:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        block = lines[first - 1 : node.end_lineno]
        indent = len(block[0]) - len(block[0].lstrip())
        if all(not line.strip() or line[:indent].isspace() or indent == 0 for line in block):
            yield "\n".join(line[indent:] for line in block)

"""Tokenry: what transformer models do with tokens, as methods to use, combine and compare.

`tokenry.load` gives a model and its tokenizer, `tokenry.generate` runs a method, `tokenry.fill` runs one
that fills masked places, `tokenry.compare` measures several side by side, `tokenry.method` reads a
method's text form. Names load on first use, so that `import tokenry` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenry.errors import TokenryError as TokenryError
    from tokenry.evaluation import compare as compare
    from tokenry.generation import fill as fill
    from tokenry.generation import generate as generate
    from tokenry.methods import Method as Method
    from tokenry.methods import Paper as Paper
    from tokenry.methods import method as method
    from tokenry.models import load as load
    from tokenry.models import path as path

__version__ = "0.1.0"

_HOME = {
    "load": "tokenry.models",
    "path": "tokenry.models",
    "generate": "tokenry.generation",
    "fill": "tokenry.generation",
    "compare": "tokenry.evaluation",
    "method": "tokenry.methods",
    "Method": "tokenry.methods",
    "Paper": "tokenry.methods",
    "TokenryError": "tokenry.errors",
}

__all__ = [
    "Method",
    "Paper",
    "TokenryError",
    "__version__",
    "compare",
    "fill",
    "generate",
    "load",
    "method",
    "path",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

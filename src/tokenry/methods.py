"""What a method is, how it is written as text, and where it is found.

A method is a frozen dataclass of hyperparameters. Its text form is `name[:key=value[;key=value]]`,
and `decoder+policy` where a decoder runs inside a cache policy; `method(text)` and `str(method)` are
inverse. Names come from the catalogue and from entry points in the group `tokenry.methods`; classes
are imported on use, so this module stays light.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import json
import logging
import re
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

from tokenry.catalogue import BY_SLUG, BY_TARGET, FAMILIES, ROWS, TRAINERS, Paper, Row
from tokenry.errors import BadMethod, BadParameter, MethodNotFound

__all__ = [
    "Combination",
    "Method",
    "Paper",
    "Parameter",
    "Row",
    "describe",
    "find",
    "load_class",
    "method",
    "parameters",
    "rows",
    "split_methods",
    "trainer",
]

GROUP = "tokenry.methods"
ROLES = ("decoder", "policy", "peer", "infiller", "trainer", "chooser")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method: hyperparameters, checked on construction, with a text form.

    A family's base sets `role`; a method's class is a frozen dataclass of typed fields whose defaults
    are the paper's, and overrides `validate`. `resources` names the fields that hold the path or id of
    a second model, table or router. `slug` and `paper` come from the catalogue, or `slug` from the
    entry point, unless the class sets them.
    """

    slug: ClassVar[str] = ""
    role: ClassVar[str] = ""
    resources: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[Paper | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        target = f"{cls.__module__}:{cls.__qualname__}"
        row = BY_TARGET.get(target)
        # A subclass never inherits a name: two classes with one name could not be told apart as text.
        if "slug" not in cls.__dict__:
            cls.slug = row.slug if row else _external_slug(target) or cls.__name__
        if row and "paper" not in cls.__dict__:
            cls.paper = row.paper

    def __post_init__(self) -> None:
        for parameter in parameters(type(self)).values():
            fitting = _coerce(getattr(self, parameter.name), parameter.kind)
            self.check(parameter.name, _say(parameter.kind), fitting is not MISSING)
            object.__setattr__(self, parameter.name, fitting)
        self.validate()

    def validate(self) -> None:
        """Check the values beyond their types; raise `BadParameter`, most simply by `check`."""

    def check(self, name: str, allowed: str, ok: bool, error: type[BadParameter] = BadParameter, why: str = "") -> None:
        """Raise `error` unless `ok`; `allowed` completes "`name` must be ...", `why` gives the reason."""
        if not ok:
            reason = f", because {why}" if why else ""
            value = getattr(self, name)
            raise error(f"{self.slug}: {name}={value!r} is not allowed; {name} must be {allowed}{reason}")

    def __str__(self) -> str:
        changed = [
            f"{p.name}={_write(getattr(self, p.name), p.kind)}"
            for p in parameters(type(self)).values()
            if not _same(getattr(self, p.name), p.default)
        ]
        return self.slug + (":" + ";".join(changed) if changed else "")


@dataclass(frozen=True)
class Combination:
    """A decoder or drafter that runs inside a cache policy; its text form is "decoder+policy"."""

    decoder: Method
    policy: Method

    def __post_init__(self) -> None:
        for name in ("decoder", "policy"):
            part = getattr(self, name)
            if not isinstance(part, Method) or part.role != name:
                raise BadParameter(
                    f"{part} cannot be the {name} of a combination; "
                    "join one decoder or drafter and one cache policy, such as token-recycling+h2o"
                )

    def __str__(self) -> str:
        return f"{self.decoder}+{self.policy}"


@dataclass(frozen=True)
class Parameter:
    """A field of a method: its name, its resolved type and its default (`MISSING` if it must be given)."""

    name: str
    kind: Any
    default: Any

    def __str__(self) -> str:
        return self.name if self.default is MISSING else f"{self.name}={_write(self.default, self.kind)}"


def parameters(cls: type[Method]) -> dict[str, Parameter]:
    """Return the parameters of a method's class by name, in the order of its fields."""
    kinds = _kinds.get(cls)
    if kinds is None:
        kinds = _kinds[cls] = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if field.init:
            default: Any = field.default
            if field.default_factory is not MISSING:
                default = field.default_factory()
            found[field.name] = Parameter(field.name, kinds[field.name], default)
    return found


# Every result names its method, and reading annotations takes a good part of a short forward.
_kinds: weakref.WeakKeyDictionary[type[Method], dict[str, Any]] = weakref.WeakKeyDictionary()


# --- text form ----------------------------------------------------------------------------------


def method(text: str | Method | Combination) -> Method | Combination:
    """Return the method that a text form names; a method or combination is returned as it is.

    Reads `name`, `name:key=value;key=value`, `name(key=value, key=value)` and two of them joined by
    `+`. Text values with reserved characters are quoted as in JSON: `draft-model:draft="a;b"`.
    Raises `MethodNotFound` for a name that is unknown or not available yet, `BadParameter` for text
    that cannot be read and values that are not allowed.
    """
    if isinstance(text, Method | Combination):
        return text
    if not isinstance(text, str):
        raise BadParameter(
            f"{text!r} is not a method; give its name as text, such as 'h2o:budget=256', or the method itself"
        )
    parts = [_read_method(part) for part in _split(text, "+")]
    if len(parts) == 1:
        return parts[0]
    roles = sorted(part.role for part in parts)
    if roles != ["decoder", "policy"]:
        raise BadParameter(
            f"{text!r} cannot be combined: it joins {' and '.join(f'{p.slug} ({p.role})' for p in parts)}; "
            "join at most one decoder or drafter and one cache policy, such as token-recycling+h2o"
        )
    first, second = parts
    return Combination(first, second) if first.role == "decoder" else Combination(second, first)


def split_methods(text: str) -> list[str]:
    """Split a command line's list of methods at the commas outside parentheses and quotes."""
    parts = [part.strip() for part in _split(text, ",")]
    if not all(parts):
        raise BadParameter(
            f"{text!r} has an empty place in its list of methods; "
            "separate names by single commas, such as plain,h2o:budget=256"
        )
    return parts


# A name, then either nothing, ":" and parameters, or parameters in parentheses.
_TEXT = re.compile(r"([^:()+=;,\"\s]+)\s*(?::(?P<plain>.+)|\((?P<call>.*)\))?", re.DOTALL)


def _read_method(text: str) -> Method:
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise BadParameter(
            f"cannot read {text.strip()!r} as a method; write name, name:key=value;key=value "
            "or name(key=value, key=value)"
        )
    cls = load_class(match[1])
    known = parameters(cls)
    values: dict[str, Any] = {}
    for pair in _split(match["plain"] or match["call"] or "", ";," if match["call"] else ";"):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not pair.strip() and match["plain"] is None:
            continue
        if not equals:
            raise BadParameter(f"{cls.slug}: cannot read {pair.strip()!r} as a parameter; write key=value")
        if key not in known:
            raise BadParameter(f"{cls.slug} has no parameter {key!r}{_nearest(key, known)}; {_list_parameters(cls)}")
        if key in values:
            raise BadParameter(f"{cls.slug}: {key} is given twice; give it once")
        values[key] = _read(value, known[key].kind)
        if values[key] is MISSING:
            mend = ' (quote text that holds any of ; , + ( ) or ")' if _RESERVED & set(value) else ""
            raise BadParameter(f"{cls.slug}: {key}={value} is not allowed; {key} must be {_say(known[key].kind)}{mend}")
    missing = [p.name for p in known.values() if p.default is MISSING and p.name not in values]
    if missing:
        form = ";".join(f"{name}=..." for name in missing)
        raise BadParameter(f"{cls.slug} needs {' and '.join(missing)}; write {cls.slug}:{form}")
    return cls(**values)


def _split(text: str, separators: str) -> list[str]:
    """Split at separators outside parentheses and quotes."""
    parts, start, depth, quoted, skip = [], 0, 0, False, False
    for i, char in enumerate(text):
        if skip:
            skip = False
        elif quoted:
            quoted, skip = char != '"', char == "\\"
        elif char == '"':
            quoted = True
        elif char in "()":
            depth += 1 if char == "(" else -1
            if depth < 0:
                break
        elif char in separators and depth == 0:
            # In 1e+9 the sign belongs to the number; a method's name starts with a letter.
            if char == "+" and text[i + 1 : i + 2].isdigit():
                continue
            parts.append(text[start:i])
            start = i + 1
    if quoted or depth:
        raise BadParameter(
            f"cannot read {text!r}: a {'quote' if quoted else 'parenthesis'} has no partner; "
            "close each, and quote text values that hold one"
        )
    return [*parts, text[start:]]


# --- values as text -----------------------------------------------------------------------------
# A parameter's kind is its annotation. A union is read as its first alternative that fits, text last.
# `MISSING` stands for "does not fit", since None is a value.

_RESERVED = set(';,+()"')
_ORDER = {types.NoneType: 0, bool: 1, Literal: 2, int: 3, float: 4, tuple: 5, str: 6}


def _alternatives(kind: Any) -> list[Any]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        flat = [atom for part in typing.get_args(kind) for atom in _alternatives(part)]
        return sorted(flat, key=lambda atom: _ORDER[_type(atom)])
    if _type(kind) not in _ORDER or kind is tuple:
        raise BadMethod(
            f"the type {kind} of a method's parameter has no text form; "
            "use int, float, bool, str, None, Literal, a tuple such as tuple[int, ...], or a union of them"
        )
    return [kind]


def _type(atom: Any) -> Any:
    return typing.get_origin(atom) or atom


def _first(use: Callable[[Any, Any], Any], value: Any, kind: Any) -> Any:
    """Return the first of `use(value, alternative)` that is not MISSING."""
    results = (use(value, atom) for atom in _alternatives(kind))
    return next((result for result in results if result is not MISSING), MISSING)


def _each(use: Callable[[Any, Any], Any], values: Sequence[Any], atom: Any) -> Any:
    """Return the tuple of `use(value, kind)` over a tuple's elements, MISSING where one does not fit."""
    kinds = typing.get_args(atom)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    if len(kinds) != len(values):
        return MISSING
    results = tuple(map(use, values, kinds))
    return MISSING if MISSING in results else results


def _read(text: str, kind: Any) -> Any:
    """Return the value that `text` gives under `kind`."""
    return _first(_read_atom, text, kind)


def _read_atom(text: str, atom: Any) -> Any:
    kind = _type(atom)
    if kind is tuple:
        if not (text.startswith("(") and text.endswith(")")):
            return MISSING
        pieces = [piece.strip() for piece in _split(text[1:-1], ",")]
        return _each(_read, pieces[:-1] if pieces[-1] == "" else pieces, atom)
    if text.startswith('"'):
        try:
            return _coerce_atom(json.loads(text), atom)
        except ValueError:
            return MISSING
    if kind is Literal:
        return next((option for option in typing.get_args(atom) if _plain(option) == text), MISSING)
    if kind is str:
        return MISSING if not text or _RESERVED & set(text) else text
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return MISSING
    names: dict[str, Any] = {"none": None} if kind is types.NoneType else {"true": True, "false": False}
    return names.get(text.lower(), MISSING)


def _coerce(value: Any, kind: Any) -> Any:
    """Return `value` as the type that `kind` names: an integer for a number, a list for a tuple."""
    return _first(_coerce_atom, value, kind)


def _coerce_atom(value: Any, atom: Any) -> Any:
    kind = _type(atom)
    if kind is Literal:
        return value if any(_same(value, option) for option in typing.get_args(atom)) else MISSING
    if kind is tuple:
        return _each(_coerce, value, atom) if isinstance(value, tuple | list) else MISSING
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return kind(value) if number else MISSING
    return value if isinstance(value, kind) else MISSING


def _write(value: Any, kind: Any) -> str:
    if isinstance(value, tuple):
        atom = next(a for a in _alternatives(kind) if _coerce_atom(value, a) is not MISSING)
        return "(" + ",".join(_each(_write, value, atom)) + ")"
    text = _plain(value)
    if not isinstance(value, str):
        return text
    clear = text.isprintable() and text == text.strip() and not _RESERVED & set(text)
    if clear and _same(_read(text, kind), value):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    # "+" joins methods, so 1e+20 is written 1e20.
    return repr(value).replace("e+", "e") if isinstance(value, float) else str(value)


def _same(a: Any, b: Any) -> bool:
    # 1 == True == 1.0 in Python, but not as parameters.
    return type(a) is type(b) and a == b


def _say(kind: Any) -> str:
    """Return what `kind` allows in words."""
    words = {types.NoneType: "none", bool: "true or false", int: "an integer", float: "a number", str: "text"}
    said = []
    for atom in _alternatives(kind):
        if typing.get_origin(atom) is Literal:
            said += [_plain(option) for option in typing.get_args(atom)]
        elif atom in words:
            said.append(words[atom])
        else:
            said.append("a tuple such as (1,2)")
    return ", ".join(said[:-1]) + " or " + said[-1] if len(said) > 1 else said[0]


# --- registry -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _scan(path: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """Return name -> [(target, package)] of the installed entry points; `path` keys the cache."""
    found: dict[str, list[tuple[str, str]]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.dist.name if point.dist else "an unnamed package"
        entry = (point.value, package)
        # An editable install can list the same entry point twice.
        if entry not in found.setdefault(point.name, []):
            found[point.name].append(entry)
    return found


def _entry_points() -> dict[str, list[tuple[str, str]]]:
    return _scan(tuple(sys.path))


def _external_slug(target: str) -> str | None:
    for slug, entries in _entry_points().items():
        if any(value == target for value, _ in entries):
            return slug
    return None


def _external_row(slug: str) -> Row | None:
    """Return the row of a method that another package registers; raise `BadMethod` if two claim its name."""
    entries = _entry_points().get(slug)
    if not entries:
        return None
    if slug in BY_SLUG or len(entries) > 1:
        owners = [package for _, package in entries] + ["Tokenry's catalogue"] * (slug in BY_SLUG)
        raise BadMethod(
            f"the method name {slug!r} is claimed by {' and '.join(owners)}; a package may not take a name "
            "that is in use: rename its entry point or uninstall it"
        )
    target, package = entries[0]
    summary = f"Registered by the package {package}."
    return Row(slug, "external", target, None, (), "", summary, "external")


def rows(*, unavailable: bool = False) -> list[Row]:
    """Return the rows of all methods in use, without importing any; `unavailable` adds those to come."""
    found = [row for row in ROWS if row.available or unavailable]
    for slug in sorted(_entry_points()):
        try:
            row = _external_row(slug)
        except BadMethod as error:
            _log.warning("%s", error)
        else:
            if row:
                found.append(row)
    return found


def find(slug: str) -> Row:
    """Return the row of a method by name; raise `MethodNotFound` with the nearest name if there is none."""
    row = _external_row(slug) or BY_SLUG.get(slug)
    if row is None:
        names = [*BY_SLUG, *_entry_points()]
        raise MethodNotFound(f"no method is called {slug!r}{_nearest(slug, names)}; `tokenry methods` lists all")
    return row


def load_class(slug: str) -> type[Method]:
    """Import and return the class of a method by name.

    Raises `MethodNotFound` for a name that is unknown or not available yet, and `BadMethod` for a class
    that cannot be imported from its package or breaks the rules of `Method`.
    """
    row = find(slug)
    if row.target is None:
        source = f" ({row.paper})" if row.paper else ""
        raise MethodNotFound(
            f"{slug}{source} is in the catalogue but not available yet; `tokenry methods` lists what is"
        )
    return _import(slug, row.target)


def trainer(name: str, options: Mapping[str, str], others: Iterable[str] = ()) -> Method:
    """Return the trainer of a name with options as a command line gives them, each value as text.

    `others` are names that the caller trains by other means; the nearest of all is suggested. Raises
    `MethodNotFound` for an unknown name, `BadParameter` for an option or a value that is not allowed.
    """
    if name not in TRAINERS:
        near = _nearest(name, [*TRAINERS, *others])
        raise MethodNotFound(f"nothing called {name!r} can be trained{near}; `tokenry train` lists what can")
    cls = _import(name, TRAINERS[name])
    if cls.role != "trainer":
        fault = f"has the role {cls.role!r}; derive it from tokenry.objectives.Trainable"
        raise BadMethod(f"{name}: {TRAINERS[name]} {fault}")
    known = parameters(cls)
    values: dict[str, Any] = {}
    for option, text in options.items():
        key = option.replace("-", "_")
        if key not in known:
            raise BadParameter(f"{name} has no option --{option}{_nearest(key, known)}; {_list_parameters(cls)}")
        value = _read(text, known[key].kind)
        if value is MISSING and str in _alternatives(known[key].kind):
            # Nothing is reserved on a command line: a path may hold any sign.
            value = text
        if value is MISSING:
            raise BadParameter(f"{name}: --{option} {text} is not allowed; it must be {_say(known[key].kind)}")
        values[key] = value
    missing = [p.name for p in known.values() if p.default is MISSING and p.name not in values]
    if missing:
        raise BadParameter(f"{name} needs {' and '.join(f'--{key}' for key in missing)}")
    return cls(**values)


def _import(slug: str, target: str) -> type[Method]:
    module, _, name = target.partition(":")
    try:
        cls = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise BadMethod(f"{slug}: cannot load {target}: {error}; reinstall the package that holds it") from error
    for fault in _faults(cls, slug):
        raise BadMethod(f"{slug}: {target} {fault}")
    return typing.cast(type[Method], cls)


def _faults(cls: Any, slug: str) -> Iterator[str]:
    if not (inspect.isclass(cls) and issubclass(cls, Method)):
        yield "is not a subclass of tokenry.Method; derive it from its family's base"
    elif inspect.isabstract(cls):
        yield "is abstract; register a class that implements every abstract method"
    elif "__dataclass_params__" not in cls.__dict__:
        yield "is not a dataclass; decorate it with @dataclass(frozen=True, kw_only=True)"
    elif cls.slug != slug:
        yield f"calls itself {cls.slug!r}; give the class and its entry point one name"
    elif cls.role not in ROLES:
        yield f"has the role {cls.role!r}, not {' or '.join(ROLES)}; derive it from its family's base"


def describe(slug: str) -> str:
    """Return what a user should know of a method as text: summary, paper, needs, cost, parameters."""
    row = find(slug)
    lines = [f"{row.slug} ({row.family}: {FAMILIES[row.family]})" if row.family in FAMILIES else row.slug]
    lines.append(row.summary)
    if row.paper:
        lines.append(f"paper: {row.paper}" + (f", github.com/{row.paper.code}" if row.paper.code else ""))
    if row.needs:
        lines.append(f"needs: {', '.join(row.needs)}")
    if row.cost:
        lines.append(f"cost: {row.cost}")
    if row.slug in TRAINERS:
        lines.append(f"trained by: tokenry train {row.slug}")
    lines.append(_list_parameters(load_class(slug)) if row.available else "not available yet")
    return "\n".join(lines)


def _list_parameters(cls: type[Method]) -> str:
    known = parameters(cls).values()
    return "parameters: " + ", ".join(str(p) for p in known) if known else "it has no parameters"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""

"""What several commands do: read what they were given, show and write what they found."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenry.errors import BadParameter, BadPrompt, TokenryError

if TYPE_CHECKING:
    from rich.console import Console


def load_model(model: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer, loaded without a word on standard error."""
    import torch
    from transformers.utils import logging

    from tokenry.models import load

    # Standard error belongs to our progress and our one line of error.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype is not None and dtype not in kinds:
        raise BadParameter(f"--dtype {dtype} is not allowed; it must be one of {', '.join(kinds)}")
    try:
        place = torch.device(device or "cpu")
        torch.ones(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise BadParameter(f"--device {device} cannot be used here: {reason}") from error
    return load(model, dtype=kinds[dtype] if dtype else None, device=place)


def method_list(given: Iterable[str] | None) -> list[str]:
    """Methods of a repeated option, each of which may hold several between commas."""
    from tokenry.methods import split_methods

    return [text for part in given or () for text in split_methods(part)]


def split_names(given: Iterable[str] | None) -> list[str]:
    """Names of a repeated option, likewise."""
    names = [name.strip() for part in given or () for name in part.split(",")]
    if not all(names):
        raise BadParameter(f"{','.join(names)!r} has an empty place; separate names by single commas")
    return names


def check_prompts(prompts: Path | None, names: Sequence[str]) -> None:
    """Raise before a model is loaded if a file of prompts or a workload is not what it should be."""
    from tokenry.evaluation.running import collect

    # What a pipe holds can be read once.
    file = prompts if prompts is None or not os.path.exists(prompts) or os.path.isfile(prompts) else None
    if file is not None or names:
        collect(file, names or None, limit=1, seed=0)


def read_file(path: Path) -> str:
    """The text of a file, which must hold some."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadPrompt(f"cannot read {path} as UTF-8 text: {error}") from error
    if not text.strip():
        raise BadPrompt(f"{path} is empty; give a file with text")
    return text


def read_stdin() -> str:
    """The text that comes on standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise BadPrompt(f"standard input is not {error.encoding} text: {error.reason} at byte {error.start}") from error


def wide_console(err: bool = False) -> "Console":
    """Where tables are printed: as wide as the terminal, or wide enough."""
    from rich.console import Console

    console = Console(stderr=err)
    # A file or a pipe has no width; tables get the room they need.
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(stderr=err, width=150)


class NotWritten(TokenryError):
    """A file could not be written after all."""


def show(result: Any, text: str, json_path: str | None, html: Path | None = None) -> None:
    """Write a result's JSON and HTML and print it, to standard error where standard output is for JSON.

    JSON that cannot be written goes to standard output, so that no figure is lost; then an error is raised.
    """
    faults = []
    if json_path not in (None, "-"):
        try:
            write_json(text, json_path)
        except OSError as error:
            faults.append(f"--json {json_path} could not be written ({error.strerror or error}); it is printed instead")
            json_path = "-"
    if html is not None:
        try:
            result.to_html(html)
            typer.echo(f"report: {html}", err=True)
        except OSError as error:
            faults.append(f"--html {html} could not be written ({error.strerror or error})")
    wide_console(err=json_path == "-").print(result)
    if json_path == "-":
        typer.echo(text)
    if faults:
        raise NotWritten("; ".join(faults))


def check_output(option: str, path: str | Path | None) -> None:
    """Raise before anything is measured if a file could not be written after; make its folder."""
    if path is None or path == "-":
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.is_dir()
        # Only trying tells: a disk may be read-only, and a superuser may write everywhere else. A pipe would wait.
        if path.is_file() or not path.exists():
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadParameter(f"{option} {path} cannot be written ({reason}); name another place") from error
    if folder:
        raise BadParameter(f"{option} {path} is a folder; name a file")


def write_json(text: str, json_path: str | None) -> None:
    """Write JSON to a file, to standard output for `-`, or nowhere."""
    if json_path == "-":
        typer.echo(text)
    elif json_path is not None:
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def print_json(data: Any) -> None:
    """Print data as JSON."""
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False))

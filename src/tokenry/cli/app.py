"""The `tokenry` command itself: its options, and what becomes of errors."""

import os
import sys
from typing import Annotated

import typer

from tokenry import __version__
from tokenry.cli.options import FAILED, INTERRUPTED, MISUSED, OK
from tokenry.cli.shared import NotWritten
from tokenry.errors import BadMethod, CacheMisuse, TokenryError

app = typer.Typer(
    name="tokenry",
    help="What transformer models do with tokens: run methods, combine them, and measure them on your own "
    "model and text.",
    epilog="Example: tokenry compare --workload code --methods plain,token-recycling,h2o:budget=256",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(
    help="Measure a model, or a family of methods against its promises.",
    epilog="Example: tokenry bench model --json figures.json",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tokenry {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    """See `main` for --debug, which is taken out before the commands see their arguments."""


def _prepared(arguments: list[str]) -> tuple[list[str], bool]:
    """Take --debug out, wherever it stands, and give a --json without a value its `-` where it takes one."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    head = [argument for argument in arguments[:end] if argument != "--debug"]
    command = next((argument for argument in head if not argument.startswith("-")), "")
    if command in ("compare", "choose", "bench"):
        for index in reversed(range(len(head))):
            following = head[index + 1] if index + 1 < len(head) else "--"
            if head[index] == "--json" and following.startswith("-") and following != "-":
                head.insert(index + 1, "-")
    return head + arguments[end:], debug


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 fine, 1 failed, 2 misuse or bad input, 130 interrupted."""
    given, debug = _prepared(sys.argv[1:] if arguments is None else list(arguments))
    try:
        code = app(args=given, prog_name="tokenry", standalone_mode=False)
        code = code if isinstance(code, int) else OK
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`).
        _give_up_output()
        return FAILED
    except Exception as error:
        # What the command line itself complains of needs no traceback.
        if debug and not hasattr(error, "format_message"):
            raise
        if isinstance(error, TokenryError):
            ours = isinstance(error, BadMethod | CacheMisuse | NotWritten)
            return _complain(str(error), FAILED if ours else MISUSED)
        # Errors of the command line itself come from typer, which names their code.
        if hasattr(error, "format_message"):
            return _complain(error.format_message(), getattr(error, "exit_code", MISUSED))
        try:
            sys.stdout.flush()
        except OSError:
            _give_up_output()
        of_files = PermissionError | FileNotFoundError | IsADirectoryError | NotADirectoryError
        if isinstance(error, of_files) and error.filename is not None:
            return _complain(f"{error.filename} cannot be used: {error.strerror}", MISUSED)
        return _complain(f"{type(error).__name__}: {error} (--debug shows where)", FAILED)
    return _complain("interrupted", INTERRUPTED) if code == INTERRUPTED else code


def _give_up_output() -> None:
    """Keep the interpreter from complaining at exit that standard output cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, code: int) -> int:
    # Without arguments the help is all that is said.
    if line := " ".join(message.split()):
        typer.echo(f"tokenry: {line}", err=True)
    return code

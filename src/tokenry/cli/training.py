"""`tokenry train`."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenry.cli.app import app
from tokenry.cli.options import OK, AsJson, Device
from tokenry.cli.shared import check_output, load_model, print_json
from tokenry.errors import BadParameter

_STEPS = {"code": (("corpus",), ("train", "code"), ("train", "code-draft"), ("export",), ("card",))}


@app.command(
    epilog="Examples:\n\ntokenry train\n\n"
    "tokenry train adaspec --draft tokenry/code-draft --keep 0.4 --text ./my-code --out ./my-draft\n\n"
    "tokenry train code -- train code --steps 200",
    context_settings={"ignore_unknown_options": True},
)
def train(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="What to train; none lists it.")] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[--KEY VALUE] [-- ARGS]",
            help="Options of the trainer; of a recipe, its arguments, none of which runs all its steps.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Model to train for; by default tokenry/code."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A folder of text files, a text file, or JSONL with one text a line; by default Python's standard "
            "library.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the result goes; by default the user's cache folder.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the optimizer; by default the trainer's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and new weights; by default 0.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> int:
    """Train what a method needs beside the model, or what is bundled; a stopped run goes on where it was."""
    recipes = _recipes()
    if name is None:
        return _list_trainers(recipes, as_json)
    if name in recipes:
        shared = {"--model": model, "--text": text, "--out": out, "--steps": steps, "--seed": seed, "--device": device}
        given = [*(arguments or ()), *(str(part) for pair in shared.items() if pair[1] is not None for part in pair)]
        for step in [tuple(given)] if given else _STEPS.get(name, ((),)):
            code = subprocess.run([sys.executable, str(recipes[name]), *step], check=False).returncode
            if code:
                return code
        return OK
    from tokenry.catalogue import TRAINERS
    from tokenry.methods import trainer

    # An unknown name is the first thing to be said.
    options = _options(name, arguments or ()) if name in TRAINERS else {}
    chosen: Any = trainer(name, options, recipes)
    from tokenry.models import trained_folder
    from tokenry.objectives import training_texts
    from tokenry.objectives.trainable import run

    model = model or "tokenry/code"
    folder = out or trained_folder(name, model)
    if folder.exists() and not folder.is_dir():
        raise BadParameter(f"--out {folder} is a file; name a folder")
    check_output("--out", folder / "training.json")
    # What is wrong with the text is said before the model is loaded.
    texts = training_texts(text)
    loaded, tokenizer = load_model(model, "float32", device)
    note = run(chosen, loaded, tokenizer, texts, folder, steps=steps, seed=seed or 0)
    if as_json:
        print_json(note)
    else:
        for key, value in note.items():
            typer.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return OK


def _list_trainers(recipes: Mapping[str, Path], as_json: bool) -> int:
    from tokenry.catalogue import BY_SLUG, BY_TARGET, TRAINERS

    # A trainer is listed with what its method is about; nothing is imported for it.
    about = {target.partition(":")[0].split(".")[2]: row for target, row in BY_TARGET.items()}
    rows = {
        name: about.get(target.partition(":")[0].split(".")[2], BY_SLUG.get(name)) for name, target in TRAINERS.items()
    }
    listed = {name: row.summary if row else "" for name, row in rows.items()}
    listed |= {name: _first_line(path) for name, path in recipes.items()}
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in listed.items()])
        return OK
    width = max(map(len, listed))
    for name, summary in listed.items():
        typer.echo(f"{name:{width}}  {summary}".rstrip())
    if not recipes:
        typer.echo("what is bundled is trained by recipes: they lie in recipes/ of a checkout, not in the wheel")
    return OK


def _options(name: str, arguments: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value` as a mapping."""
    found: dict[str, str] = {}
    rest = [argument for argument in arguments if argument != "--"]
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--") or len(key) < 3:
            raise BadParameter(f"{name}: cannot read {key!r}; write options as --key value")
        if not equals:
            if not rest:
                raise BadParameter(f"{name}: {key} has no value; write {key} VALUE")
            value = rest.pop(0)
        if key[2:] in found:
            raise BadParameter(f"{name}: {key} is given twice; give it once")
        found[key[2:]] = value
    return found


def _recipes() -> dict[str, Path]:
    folder = Path(__file__).resolve().parents[3] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}


def _first_line(path: Path) -> str:
    import ast

    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]

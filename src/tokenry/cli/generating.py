"""`tokenry generate` and `methods`."""

import re
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from tokenry.cli.app import app
from tokenry.cli.options import OK, AsJson, Device, Dtype, Model
from tokenry.cli.shared import load_model, print_json, read_stdin, wide_console
from tokenry.errors import BadParameter, BadPrompt


@app.command(
    epilog="Examples:\n\n"
    'tokenry generate "def quicksort(" --method token-recycling\n\n'
    "cat prompt.txt | tokenry generate - --method h2o:budget=256 --temperature 0.8 --seed 1"
)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads standard input.")],
    model: Model = "tokenry/code",
    method: Annotated[str, typer.Option(metavar="METHOD", help="A method's text form.")] = "plain",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy; by default 0, and 1 for methods that sample.")
    ] = None,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus limit when sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Top-k limit when sampling; 0 is none.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End at this text; may be repeated.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print counts to standard error.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> int:
    """Continue a text, streamed to standard output; several texts of a method come numbered, at the end."""
    from tokenry.decoding.several import writes_several
    from tokenry.evaluation import Setting, samples
    from tokenry.generation import generate as run
    from tokenry.generation.full import check_unicode, effective
    from tokenry.methods import method as read_method

    asked = read_method(method)
    chosen = effective(asked)
    several = writes_several(chosen)
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise BadPrompt("the prompt is empty; give a text to continue")
    check_unicode(text)
    if temperature is None:
        temperature = 1.0 if samples(chosen) else 0.0
    if temperature == 0 and (top_p < 1 or top_k):
        raise BadParameter("--top-p and --top-k say how tokens are sampled; give --temperature above 0 with them")
    setting = Setting(temperature != 0, temperature, top_p, top_k)
    loaded, tokenizer = load_model(model, dtype, device)
    if chosen != asked:
        typer.echo(f"method: {chosen} (drafts need a policy that does not drop tokens after every one)", err=True)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, **setting.options}
    if stop:
        options["stop_strings"] = stop
    try:
        # Of several texts none is the text until all are done.
        stream = None if as_json or several else write
        result = run(loaded, tokenizer, text, method=chosen, stream=stream, seed=seed, **options)
    except KeyboardInterrupt:
        if not as_json:
            write("\n")  # the message begins a line of its own
        raise
    if as_json:
        print_json(
            {
                "schema_version": 1,
                "model": model,
                "method": str(chosen),
                "setting": str(setting),
                "seed": seed,
                "prompt": text,
                "text": result.text(tokenizer),
                "texts": result.texts(tokenizer),
                "tokens": result.new_tokens[0],
                "sources": [source.name.lower() for source in result.new_sources[0]],
                "stats": asdict(result.stats) if result.stats else None,
            }
        )
    elif several:
        for number, own in enumerate(result.texts(tokenizer), 1):
            write(f"{number}: {own}\n")
    else:
        write("\n")
    if stats:
        typer.echo(str(result.stats), err=True)
    return OK


@app.command(epilog="Examples:\n\ntokenry methods --all\n\ntokenry methods h2o")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Describe this method.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Add the methods that are not available yet.")] = False,
    family: Annotated[str | None, typer.Option(metavar="NAME", help="Only this family.")] = None,
    as_json: AsJson = False,
) -> int:
    """List the methods, or describe one with its parameters."""
    from tokenry.catalogue import FAMILIES
    from tokenry.methods import describe, find, rows

    if name is not None:
        name = name.strip()
        if bare := re.match(r"([\w.-]+)\s*[:(+]", name):
            raise BadParameter(f"{name!r} is more than a name; write tokenry methods {bare[1]}")
        row = find(name)
        if as_json:
            print_json({**asdict(row), "available": row.available})
        else:
            typer.echo(describe(name))
        return OK
    known = [row for row in rows(unavailable=True) if family in (None, row.family)]
    if not known:
        raise BadParameter(f"no family {family!r} has methods to list; there are {', '.join(FAMILIES)}")
    found = [row for row in known if row.available or everything]
    if as_json:
        print_json([{**asdict(row), "available": row.available} for row in found])
        return OK
    console = wide_console()
    if not found:
        console.print(f"no method of {family} is available yet; --all lists them", highlight=False)
        return OK
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for group in dict.fromkeys(row.family for row in found):
        table.add_row(Text(group, style="bold"), Text(FAMILIES.get(group, "registered by other packages"), style="dim"))
        for row in found:
            if row.family == group:
                mark = "" if row.available else " (not available yet)"
                style = "" if row.available else "dim"
                table.add_row(Text(f"  {row.slug}", style=style), Text(row.summary + mark, style=style))
    console.print(table)
    groups = {
        "papers": [row for row in known if row.kind == "paper"],
        "baselines and peers": [row for row in known if row.kind in ("baseline", "peer")],
        "methods of other packages": [row for row in known if row.kind == "external"],
    }
    counts = [
        f"{sum(row.available for row in group)} of {len(group)} {name}" for name, group in groups.items() if group
    ]
    line = f"{counts[0]} available" + "".join(f"; {count}" for count in counts[1:])
    console.print(line + ("" if everything else "; --all lists all"), highlight=False)
    return OK

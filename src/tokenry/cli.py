"""The `tokenry` command: thin, so that help is instant; whatever is heavy is imported inside the commands."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenry import __version__
from tokenry.errors import BadMethod, BadParameter, BadPrompt, CacheMisuse, TokenryError

if TYPE_CHECKING:
    from rich.console import Console

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130

DEMO_METHODS = (
    "plain", "transformers-prompt-lookup", "transformers-assisted", "prompt-lookup", "token-recycling",
    "token-recycling:template=auto", "sinks:budget=128", "sinks:budget=256", "h2o:budget=128", "h2o:budget=256",
    "cntp",
)  # fmt: skip
DEMO_WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "code": {},
    "recall": {},
    "arithmetic": {},
    "edit": {"longest": 240},  # short functions, so that whole answers fit into few tokens
}
DEMO_LIMIT = 7

_STEPS = {"code": (("corpus",), ("train", "code"), ("train", "code-draft"), ("export",), ("card",))}

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

Model = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="A bundled name, a folder (./x) or a hub id.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; by default the weights' own.")
]
Device = Annotated[str | None, typer.Option(metavar="PLACE", help="cpu, cuda or mps; by default cpu.")]
Seed = Annotated[int, typer.Option(min=-(2**62), max=2**62, help="Seed of workloads and sampling.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="[PATH]", help="Write JSON to a file, or to standard output without one or with -."),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="JSONL, one prompt a line: a string, or an object with prompt, text, question or turns."
    ),
]
Workloads = Annotated[
    list[str] | None,
    typer.Option(
        "--workload",
        "-w",
        metavar="NAMES",
        help="code, recall, arithmetic, edit, infill, ruler-...; repeat or use commas. Options: recall:asked=3.",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", metavar="LIST", help="Methods by text form; repeat or use commas."),
]
Repeats = Annotated[int, typer.Option(min=1, help="Interleaved pairs; 7 are the fewest to claim a speed from.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Examples of each workload; by default 14.")]
NewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="New tokens a prompt; by default what the longest answer takes, from 64 to 256."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


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


# --- compare ------------------------------------------------------------------------------------


@app.command(
    epilog="Examples:\n\n"
    "tokenry compare --workload code,edit --methods plain,token-recycling,h2o:budget=256 --html report.html\n\n"
    "tokenry compare --model ./my-model --prompts my.jsonl --methods 'plain,prompt-lookup' --json results.json"
)
def compare(
    model: Model = "tokenry/code",
    prompts: Prompts = None,
    workload: Workloads = None,
    methods: Methods = None,
    max_new_tokens: NewTokens = None,
    repeats: Repeats = 7,
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 1,
    tail: Annotated[int | None, typer.Option(min=1, help="Keep the last so many tokens of each prompt.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end of text.")] = False,
    temperature: Annotated[float, typer.Option(help="Of methods that sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of methods that sample.")] = 1.0,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Draws a sampled prompt; by default 3 on arithmetic, else 1.")
    ] = None,
    sample: Annotated[
        bool | None, typer.Option("--sample/--greedy", help="All methods sampled, or all greedy.")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Note in the report which cached tokens were kept.")] = False,
    bits: Annotated[
        Path | None, typer.Option("--bits", metavar="FILE", help="Text to measure bits per byte on.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    json_path: Json = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report, one HTML file.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="All kinds of method on all workloads, in minutes.")] = False,
    quiet: Quiet = False,
) -> int:
    """Measure methods side by side: speed against transformers' plain generate, cost and quality.

    Ctrl-C ends early with what is measured so far.
    """
    from tokenry.evaluation import DEFAULT_METHODS, Setting
    from tokenry.evaluation import compare as run
    from tokenry.methods import method

    chosen = [method(text) for text in _methods(methods) or (DEMO_METHODS if demo else DEFAULT_METHODS)]
    names = _split(workload)
    workloads: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = names or None
    if demo and not names and prompts is None:
        workloads = DEMO_WORKLOADS
    Setting(True, temperature, top_p)
    text = _read(bits) if bits else None
    _check_prompts(prompts, names)
    _check_output("--json", json_path)
    _check_output("--html", html)
    loaded, tokenizer = _load(model, dtype, device)
    result = run(
        loaded,
        tokenizer,
        prompts,
        chosen,
        workloads=workloads,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        limit=limit or (DEMO_LIMIT if demo else 14),
        batch_size=batch_size,
        seed=seed,
        sample=sample,
        temperature=temperature,
        top_p=top_p,
        seeds=seeds,
        tail=tail,
        ignore_eos=ignore_eos,
        text=text,
        trace=trace,
        progress=not quiet,
    )
    _show(result, result.to_json(), json_path, html)
    return INTERRUPTED if result.partial else OK


# --- choose -------------------------------------------------------------------------------------


@app.command(
    epilog="Examples:\n\n"
    "tokenry choose --model ./my-model --prompts my.jsonl --no-weights --no-distribution --no-second-model\n\n"
    "tokenry choose --workload code,edit --second-model --json choice.json"
)
def choose(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Bundled name, folder (./x) or hub id; or tokenry/code."),
    ] = None,
    prompts: Prompts = None,
    workload: Workloads = None,
    weights: Annotated[
        bool | None, typer.Option("--weights/--no-weights", help="Whether weights may be trained.")
    ] = None,
    distribution: Annotated[
        bool | None, typer.Option("--distribution/--no-distribution", help="Whether the output may be another one.")
    ] = None,
    second_model: Annotated[
        bool | None, typer.Option("--second-model/--no-second-model", help="Whether a model may run beside.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="NAME", help="The second model; by default each method's own.")
    ] = None,
    goal: Annotated[str, typer.Option(metavar="GOAL", help="speed, memory or quality.")] = "speed",
    loss: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Score that may be lost where the output may change.")
    ] = 0.0,
    budget: Annotated[
        float, typer.Option(min=0.0, help="What cache policies keep: slots, or below 1 a share of the prompt.")
    ] = 0.5,
    methods: Annotated[
        list[str] | None, typer.Option("--methods", metavar="LIST", help="More methods to measure, by text form.")
    ] = None,
    max_new_tokens: NewTokens = None,
    repeats: Repeats = 7,
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 1,
    tail: Annotated[int | None, typer.Option(min=1, help="Keep the last so many tokens of each prompt.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above it everything is sampled.")] = 0.0,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    json_path: Json = None,
    quiet: Quiet = False,
) -> int:
    """Find the method for a model and its text: measure what may be used, recommend one with the figures.

    What is not given is asked for on a terminal; elsewhere nothing may change.
    """
    from tokenry.evaluation import Allowed, Chooser, Setting
    from tokenry.evaluation import choose as run

    Setting(temperature != 0, temperature)
    Chooser(goal=goal, loss=loss, budget=budget)  # type: ignore[arg-type]
    _check_output("--json", json_path)
    asking = sys.stdin.isatty() and sys.stdout.isatty()
    if asking and model is None:
        model = typer.prompt("Model", default="tokenry/code")
    if asking and prompts is None and not workload:
        given = typer.prompt("Prompts (a JSONL file) or workloads", default="code,recall,arithmetic,edit")
        prompts, workload = (Path(given), None) if given.endswith((".json", ".jsonl")) else (None, [given])
    second_model = True if second_model is None and draft else second_model
    may = {
        "Weights may be trained?": weights,
        "The output may be another one than plain decoding's?": distribution,
        "A second model may run beside?": second_model,
    }
    answers = [
        typer.confirm(text, default=False) if asking and given is None else bool(given) for text, given in may.items()
    ]
    allowed = Allowed(
        weights=answers[0],
        distribution=answers[1],
        second_model=answers[2],
        sampled=temperature > 0,
        batch_size=batch_size,
    )
    if draft and not allowed.second_model:
        raise BadParameter("--draft and --no-second-model exclude each other; leave one out")
    _check_prompts(prompts, _split(workload))
    loaded, tokenizer = _load(model or "tokenry/code", dtype, device)
    result = run(
        loaded,
        tokenizer,
        prompts,
        workloads=_split(workload) or None,
        allowed=allowed,
        goal=goal,  # type: ignore[arg-type]
        loss=loss,
        draft=draft,
        budget=budget,
        methods=_methods(methods),
        max_new_tokens=max_new_tokens,
        limit=limit or 14,
        repeats=repeats,
        temperature=temperature or 1.0,
        tail=tail,
        seed=seed,
        progress=not quiet,
    )
    _show(result, result.to_json(), json_path)
    return INTERRUPTED if result.partial else OK


# --- generate -----------------------------------------------------------------------------------


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
    text = _read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise BadPrompt("the prompt is empty; give a text to continue")
    check_unicode(text)
    if temperature is None:
        temperature = 1.0 if samples(chosen) else 0.0
    if temperature == 0 and (top_p < 1 or top_k):
        raise BadParameter("--top-p and --top-k say how tokens are sampled; give --temperature above 0 with them")
    setting = Setting(temperature != 0, temperature, top_p, top_k)
    loaded, tokenizer = _load(model, dtype, device)
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
        _print_json(
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


# --- methods ------------------------------------------------------------------------------------


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
            _print_json({**asdict(row), "available": row.available})
        else:
            typer.echo(describe(name))
        return OK
    known = [row for row in rows(unavailable=True) if family in (None, row.family)]
    if not known:
        raise BadParameter(f"no family {family!r} has methods to list; there are {', '.join(FAMILIES)}")
    found = [row for row in known if row.available or everything]
    if as_json:
        _print_json([{**asdict(row), "available": row.available} for row in found])
        return OK
    console = _console()
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


# --- bench --------------------------------------------------------------------------------------


@bench_app.command(
    "model",
    epilog="Example: tokenry bench model --model tokenry/code --draft tokenry/code-draft --json figures.json",
)
def bench_model(
    model: Model = "tokenry/code",
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A second model to show beside, none to leave it out; by default tokenry/code-draft beside "
            "tokenry/code, and none beside others.",
        ),
    ] = None,
    text_bytes: Annotated[
        int, typer.Option("--bytes", min=1, help="About how many bytes of held-out source to read.")
    ] = 1_000_000,
    limit: Annotated[int, typer.Option(min=1, help="Examples of each workload.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that run together.")] = 8,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    json_path: Json = None,
) -> int:
    """Measure a code model: bits per byte on held-out packages, recall, arithmetic, edit."""
    from tokenry.evaluation import bench_model as run
    from tokenry.models import resource

    if draft is None and model == "tokenry/code":
        draft = "tokenry/code-draft"
    _check_output("--json", json_path)
    loaded, tokenizer = _load(model, dtype, device)
    second = resource(draft, loaded) if draft and draft != "none" and draft != model else None
    figures = run(loaded, tokenizer, draft=second, text_bytes=text_bytes, count=limit, batch_size=batch_size, seed=seed)
    _show(figures, json.dumps(figures.to_dict(), indent=1), json_path)
    return OK


@bench_app.command(
    "speculation",
    epilog="Examples:\n\ntokenry bench speculation --workload code,edit --batch-size 1 --batch-size 8\n\n"
    "tokenry bench speculation --prompts spec_bench.jsonl --per-task 10 --json runs/speculation.json",
)
def bench_speculation(
    model: Model = "tokenry/code",
    prompts: Prompts = None,
    workload: Workloads = None,
    methods: Methods = None,
    per_task: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts of each task (workload, or category of the file); by default 14 of a workload, else all.",
        ),
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Prompts a batch; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens a prompt.")] = 64,
    tail: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the last so many tokens of each prompt; by default what fits the context."),
    ] = None,
    repeats: Repeats = 7,
    draft: Annotated[
        str | None, typer.Option(metavar="NAME", help="Draft model of the default methods that take one.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above it everything is sampled.")] = 0.0,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    json_path: Json = None,
    quiet: Quiet = False,
) -> int:
    """Measure drafters task by task beside plain and transformers' own; exits with 1 where an output is not plain's.

    Without --methods every drafter runs that can, with its automatic size, and what the checks compare.
    """
    from tokenry.evaluation import Setting
    from tokenry.evaluation import bench_speculation as run
    from tokenry.methods import method

    chosen = [method(text) for text in _methods(methods)] or None
    Setting(temperature != 0, temperature)
    _check_prompts(prompts, _split(workload))
    _check_output("--json", json_path)
    loaded, tokenizer = _load(model, dtype, device)
    result = run(
        loaded,
        tokenizer,
        prompts,
        methods=chosen,
        workloads=_split(workload) or None,
        per_task=per_task,
        batch_sizes=batch_size or (1,),
        max_new_tokens=max_new_tokens,
        tail=tail,
        repeats=repeats,
        draft=draft,
        temperature=temperature,
        seed=seed,
        progress=not quiet,
    )
    _show(result, result.to_json(), json_path)
    if result.partial:
        return INTERRUPTED
    return FAILED if result.broken else OK


@bench_app.command(
    "drafters",
    epilog="Examples:\n\ntokenry bench drafters --part mtp\n\n"
    "tokenry bench drafters --trained ./trained --json runs/drafters.json",
)
def bench_drafters(
    model: Model = "tokenry/code",
    part: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="mtp, ftp, hamburger, any-subset or adaspec; by default all."),
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Holds what `tokenry train` wrote as mtp, ftp, hamburger and any-order (and ftp-tuned); by default "
            "where it writes.",
        ),
    ] = None,
    workload: Workloads = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Prompts of each task; texts with holes are three times as many.")
    ] = 14,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens a prompt.")] = 96,
    repeats: Repeats = 7,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the drafters beside plain; 0 is greedy.")] = 0.0,
    draft: Annotated[
        str, typer.Option(metavar="NAME", help="The draft model that adaspec distils.")
    ] = "tokenry/code-draft",
    text: Annotated[
        Path | None, typer.Option(metavar="PATH", help="What it is distilled on; by default the standard library.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of every distillation.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Distillations of each kind.")] = 3,
    controls: Annotated[
        bool, typer.Option("--controls", help="Distil longer, at equal steps, and with controls of the selection too.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    json_path: Json = None,
    quiet: Quiet = False,
) -> int:
    """Measure what the trainers of drafters made, and distil drafts with and without selection side by side.

    A part that is not trained yet is skipped and says how to train it. Exits with 1 where an output is not plain's.
    """
    from tokenry.evaluation import Setting
    from tokenry.evaluation import bench_drafters as run
    from tokenry.objectives import training_texts

    Setting(temperature != 0, temperature)
    _check_prompts(None, _split(workload))
    if text is not None:
        training_texts(text)
    _check_output("--json", json_path)
    loaded, tokenizer = _load(model, dtype, device)
    result = run(
        loaded,
        tokenizer,
        parts=_split(part) or None,
        trained=trained,
        workloads=_split(workload) or ("code",),
        limit=limit,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        temperature=temperature,
        draft=draft,
        text=text,
        steps=steps,
        seeds=seeds,
        controls=controls,
        seed=seed,
        progress=not quiet,
    )
    _show(result, result.to_json(), json_path)
    if result.partial:
        return INTERRUPTED
    return FAILED if result.broken else OK


@bench_app.command(
    "decoding",
    epilog="Examples:\n\ntokenry bench decoding --json runs/decoding.json\n\n"
    "tokenry bench decoding --part cntp --part r2r --limit 50 --seeds 5",
)
def bench_decoding(
    model: Model = "tokenry/code",
    part: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="cntp, r2r, skipdecode, superposed, navigation or bytes; by default all."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Prompts of each seed; of lines of code, which are cut at every byte, a quarter.")
    ] = 20,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds; 5 are the fewest to claim an ordering from.")] = 5,
    small: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="R2R's small model, of the same tokenizer; by default tokenry/code-draft."),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="What `tokenry train skipdecode` wrote; by default where it writes."),
    ] = None,
    tuned_early: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The same with --exit early: the baseline.")
    ] = None,
    partner: Annotated[
        str | None, typer.Option(metavar="NAME", help="A model with another tokenizer, for the ensemble of bytes.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 32,
    dtype: Dtype = None,
    device: Device = None,
    json_path: Json = None,
    quiet: Quiet = False,
) -> int:
    """Measure the decoders against the orderings that their papers promise, over several seeds with costs.

    A model that is named must be there. The exit code is 1 if a check that must hold on every model does not.
    """
    from tokenry.evaluation import bench_decoding as run
    from tokenry.evaluation.decoding import chosen_parts

    parts = chosen_parts(_split(part))
    _check_output("--json", json_path)
    loaded, tokenizer = _load(model, dtype, device)
    result = run(
        loaded,
        tokenizer,
        parts=parts,
        limit=limit,
        seeds=seeds,
        small=small,
        tuned=tuned,
        tuned_early=tuned_early,
        partner=partner,
        batch_size=batch_size,
        progress=not quiet,
    )
    _show(result, result.to_json(), json_path)
    if result.partial:
        return INTERRUPTED
    return FAILED if result.broken else OK


@bench_app.command(
    "kvcache",
    epilog="Examples:\n\ntokenry bench kvcache --part quality --json runs/kvcache-quality.json\n\n"
    "tokenry bench kvcache --part time --methods h2o,sinks --lengths 4096,32768 --no-kvpress",
)
def bench_kvcache(
    model: Model = "tokenry/code",
    part: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="quality, bits, time or prefill; by default all.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", metavar="LIST", help="Cache policies by text form; by default all available."),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", "-w", metavar="NAMES", help="recall, ruler-single, ...; by default all six."),
    ] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Of the slots that are kept, may be repeated; by default 0.5 0.25 0.125.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="About how many tokens a prompt has.")] = 800,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each task and seed.")] = 2,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds; 5 are the fewest to claim an ordering from.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 10,
    bits_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the texts that bits are measured on.")] = 1024,
    bits_prompt: Annotated[
        int, typer.Option(min=0, help="How many of them are read at once, as a prompt, and not scored.")
    ] = 0,
    lengths: Annotated[
        list[str] | None,
        typer.Option(metavar="LIST", help="Tokens that steps are timed behind; by default 4096,8192,16384,32768."),
    ] = None,
    prefill: Annotated[int, typer.Option(min=2, help="Tokens of the prompt whose reading is timed.")] = 8192,
    budget: Annotated[int, typer.Option(min=1, help="Slots that are kept where steps are timed.")] = 512,
    repeats: Repeats = 7,
    kvpress: Annotated[bool, typer.Option("--kvpress/--no-kvpress", help="Whether kvpress runs beside.")] = True,
    peers: Annotated[
        Path | None,
        typer.Option(metavar="PYTHON", help="Interpreter with kvpress; by default that of `make peers`."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    json_path: Json = None,
    quiet: Quiet = False,
) -> int:
    """Measure cache policies: quality at shares of the cache beside kvpress, bits per byte, time, bytes, prefill.

    Exits with 1 where a policy holds more than its budget, or kvpress reads other tokens.
    """
    from tokenry.evaluation import bench_kvcache as run
    from tokenry.evaluation.kvpress import PRESSES

    counts = _split(lengths)
    if wrong := [text for text in counts if not text.isdecimal()]:
        raise BadParameter(f"--lengths {wrong[0]} is not allowed; give numbers of tokens, such as 4096,32768")
    _check_output("--json", json_path)
    chosen: dict[str, Any] = {"shares": tuple(share)} if share else {}
    if counts:
        chosen["lengths"] = tuple(map(int, counts))
    loaded, tokenizer = _load(model, dtype, device)
    result = run(
        loaded,
        tokenizer,
        parts=_split(part) or None,
        methods=_methods(methods) or None,
        workloads=_split(workload) or None,
        tokens=tokens,
        limit=limit,
        seeds=seeds,
        batch_size=batch_size,
        bits_tokens=bits_tokens,
        bits_prompt=bits_prompt,
        prefill=prefill,
        budget=budget,
        repeats=repeats,
        presses=PRESSES if kvpress else (),
        peers=peers,
        progress=not quiet,
        **chosen,
    )
    _show(result, result.to_json(), json_path)
    if result.partial:
        return INTERRUPTED
    return FAILED if result.broken else OK


# --- results ------------------------------------------------------------------------------------


@app.command(epilog="Example: tokenry results runs --out docs/results")
def results(
    places: Annotated[list[Path], typer.Argument(metavar="FOLDER|FILE...", help="JSON of compare, choose or a bench.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the pages go.")] = Path("docs/results"),
) -> int:
    """Write one Markdown page a family from measured JSON: what papers claim, what came out, and why they differ."""
    from tokenry.evaluation import write_pages

    try:
        pages = write_pages(places, out)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        named = ", ".join(map(str, places))
        raise BadParameter(f"a result in {named} is not whole ({error!r}); measure again or leave it out") from error
    for page in pages:
        typer.echo(page)
    return OK


# --- train --------------------------------------------------------------------------------------


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
    _check_output("--out", folder / "training.json")
    # What is wrong with the text is said before the model is loaded.
    texts = training_texts(text)
    loaded, tokenizer = _load(model, "float32", device)
    note = run(chosen, loaded, tokenizer, texts, folder, steps=steps, seed=seed or 0)
    if as_json:
        _print_json(note)
    else:
        for key, value in note.items():
            typer.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return OK


def _list_trainers(recipes: Mapping[str, Path], as_json: bool) -> int:
    from tokenry.catalogue import BY_TARGET, TRAINERS

    # A trainer is listed with what its method is about; nothing is imported for it.
    about = {target.partition(":")[0].split(".")[2]: row.summary for target, row in BY_TARGET.items()}
    listed = {name: about.get(target.partition(":")[0].split(".")[2], "") for name, target in TRAINERS.items()}
    listed |= {name: _first_line(path) for name, path in recipes.items()}
    if as_json:
        _print_json([{"name": name, "summary": summary} for name, summary in listed.items()])
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
    folder = Path(__file__).resolve().parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}


def _first_line(path: Path) -> str:
    import ast

    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


# --- shared -------------------------------------------------------------------------------------


def _load(model: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
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


def _methods(given: Iterable[str] | None) -> list[str]:
    from tokenry.methods import split_methods

    return [text for part in given or () for text in split_methods(part)]


def _split(given: Iterable[str] | None) -> list[str]:
    names = [name.strip() for part in given or () for name in part.split(",")]
    if not all(names):
        raise BadParameter(f"{','.join(names)!r} has an empty place; separate names by single commas")
    return names


def _check_prompts(prompts: Path | None, names: Sequence[str]) -> None:
    """Raise before a model is loaded if a file of prompts or a workload is not what it should be."""
    from tokenry.evaluation.running import collect

    # What a pipe holds can be read once.
    file = prompts if prompts is None or not os.path.exists(prompts) or os.path.isfile(prompts) else None
    if file is not None or names:
        collect(file, names or None, limit=1, seed=0)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadPrompt(f"cannot read {path} as UTF-8 text: {error}") from error
    if not text.strip():
        raise BadPrompt(f"{path} is empty; give a file with text")
    return text


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise BadPrompt(f"standard input is not {error.encoding} text: {error.reason} at byte {error.start}") from error


def _console(err: bool = False) -> "Console":
    from rich.console import Console

    console = Console(stderr=err)
    # A file or a pipe has no width; tables get the room they need.
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(stderr=err, width=150)


class _NotWritten(TokenryError):
    """A file could not be written after all."""


def _show(result: Any, text: str, json_path: str | None, html: Path | None = None) -> None:
    """Write a result's JSON and HTML and print it, to standard error where standard output is for JSON.

    JSON that cannot be written goes to standard output, so that no figure is lost; then an error is raised.
    """
    faults = []
    if json_path not in (None, "-"):
        try:
            _write_json(text, json_path)
        except OSError as error:
            faults.append(f"--json {json_path} could not be written ({error.strerror or error}); it is printed instead")
            json_path = "-"
    if html is not None:
        try:
            result.to_html(html)
            typer.echo(f"report: {html}", err=True)
        except OSError as error:
            faults.append(f"--html {html} could not be written ({error.strerror or error})")
    _console(err=json_path == "-").print(result)
    if json_path == "-":
        typer.echo(text)
    if faults:
        raise _NotWritten("; ".join(faults))


def _check_output(option: str, path: str | Path | None) -> None:
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


def _write_json(text: str, json_path: str | None) -> None:
    if json_path == "-":
        typer.echo(text)
    elif json_path is not None:
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False))


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
            ours = isinstance(error, BadMethod | CacheMisuse | _NotWritten)
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


if __name__ == "__main__":
    sys.exit(main())

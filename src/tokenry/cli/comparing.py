"""`tokenry compare`, `choose` and `results`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenry.cli.app import app
from tokenry.cli.options import (
    INTERRUPTED,
    OK,
    Device,
    Dtype,
    Json,
    Limit,
    Methods,
    Model,
    NewTokens,
    Prompts,
    Quiet,
    Repeats,
    Seed,
    Workloads,
)
from tokenry.cli.shared import check_output, check_prompts, load_model, method_list, read_file, show, split_names
from tokenry.errors import BadParameter

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

    chosen = [method(text) for text in method_list(methods) or (DEMO_METHODS if demo else DEFAULT_METHODS)]
    names = split_names(workload)
    workloads: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = names or None
    if demo and not names and prompts is None:
        workloads = DEMO_WORKLOADS
    Setting(True, temperature, top_p)
    text = read_file(bits) if bits else None
    check_prompts(prompts, names)
    check_output("--json", json_path)
    check_output("--html", html)
    loaded, tokenizer = load_model(model, dtype, device)
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
    show(result, result.to_json(), json_path, html)
    return INTERRUPTED if result.partial else OK


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
    check_output("--json", json_path)
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
    check_prompts(prompts, split_names(workload))
    loaded, tokenizer = load_model(model or "tokenry/code", dtype, device)
    result = run(
        loaded,
        tokenizer,
        prompts,
        workloads=split_names(workload) or None,
        allowed=allowed,
        goal=goal,  # type: ignore[arg-type]
        loss=loss,
        draft=draft,
        budget=budget,
        methods=method_list(methods),
        max_new_tokens=max_new_tokens,
        limit=limit or 14,
        repeats=repeats,
        temperature=temperature or 1.0,
        tail=tail,
        seed=seed,
        progress=not quiet,
    )
    show(result, result.to_json(), json_path)
    return INTERRUPTED if result.partial else OK


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

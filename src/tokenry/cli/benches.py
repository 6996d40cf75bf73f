"""`tokenry bench`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenry.cli.app import bench_app
from tokenry.cli.options import (
    FAILED,
    INTERRUPTED,
    OK,
    Device,
    Dtype,
    Json,
    Methods,
    Model,
    Prompts,
    Quiet,
    Repeats,
    Seed,
    Workloads,
)
from tokenry.cli.shared import check_output, check_prompts, load_model, method_list, show, split_names
from tokenry.errors import BadParameter


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
    check_output("--json", json_path)
    loaded, tokenizer = load_model(model, dtype, device)
    second = resource(draft, loaded) if draft and draft != "none" and draft != model else None
    figures = run(loaded, tokenizer, draft=second, text_bytes=text_bytes, count=limit, batch_size=batch_size, seed=seed)
    show(figures, json.dumps(figures.to_dict(), indent=1), json_path)
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

    chosen = [method(text) for text in method_list(methods)] or None
    Setting(temperature != 0, temperature)
    check_prompts(prompts, split_names(workload))
    check_output("--json", json_path)
    loaded, tokenizer = load_model(model, dtype, device)
    result = run(
        loaded,
        tokenizer,
        prompts,
        methods=chosen,
        workloads=split_names(workload) or None,
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
    show(result, result.to_json(), json_path)
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
    check_prompts(None, split_names(workload))
    if text is not None:
        training_texts(text)
    check_output("--json", json_path)
    loaded, tokenizer = load_model(model, dtype, device)
    result = run(
        loaded,
        tokenizer,
        parts=split_names(part) or None,
        trained=trained,
        workloads=split_names(workload) or ("code",),
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
    show(result, result.to_json(), json_path)
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

    parts = chosen_parts(split_names(part))
    check_output("--json", json_path)
    loaded, tokenizer = load_model(model, dtype, device)
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
    show(result, result.to_json(), json_path)
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

    counts = split_names(lengths)
    if wrong := [text for text in counts if not text.isdecimal()]:
        raise BadParameter(f"--lengths {wrong[0]} is not allowed; give numbers of tokens, such as 4096,32768")
    check_output("--json", json_path)
    chosen: dict[str, Any] = {"shares": tuple(share)} if share else {}
    if counts:
        chosen["lengths"] = tuple(map(int, counts))
    loaded, tokenizer = load_model(model, dtype, device)
    result = run(
        loaded,
        tokenizer,
        parts=split_names(part) or None,
        methods=method_list(methods) or None,
        workloads=split_names(workload) or None,
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
    show(result, result.to_json(), json_path)
    if result.partial:
        return INTERRUPTED
    return FAILED if result.broken else OK

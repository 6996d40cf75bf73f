"""What several commands take, and the exit codes."""

from pathlib import Path
from typing import Annotated

import typer

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130

Model = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="A bundled name, a folder (./x) or a hub id.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="TYPE", help="float32, bfloat16, float16 or float64; by default the weights' own.")
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

"""docs/results: one page a family, generated from the JSON that `compare` and `bench speculation` wrote.

Nothing on a page is typed: the figures come from the files, what the papers claim from `claims`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenry.catalogue import BY_SLUG, FAMILIES
from tokenry.errors import BadParameter

from .choose import recommendation
from .claims import CLAIMS
from .decoding import page as decoding
from .drafters import cell, headers
from .kvcache import page as kvcache
from .metrics import PAIRS
from .results import SCHEMA_VERSION
from .tables import (
    CHECK_HEADERS,
    SPECULATION_NOTE,
    Column,
    check_cells,
    columns,
    measured_on,
    notes,
    size,
    speculation_columns,
    workload_title,
)

Run = Mapping[str, Any]
"""A comparison as it stands in the JSON."""

_SHARED = ("generation", "peers")  # families whose rows stand beside those of any other


@dataclass(frozen=True)
class _File:
    """A result file: its name, its comparisons, and the checks made of them.

    Of `bench drafters` also what it was measured on, and tables that are no comparison. `bench decoding` and
    `bench kvcache` have no comparison; `choose` has one, and what it recommended.
    """

    name: str
    runs: tuple[Run, ...]
    checks: tuple[Mapping[str, Any], ...] = ()
    skipped: tuple[Mapping[str, Any], ...] = ()
    prompts: Mapping[str, str] | None = None
    about: Mapping[str, Any] | None = None
    tables: tuple[Mapping[str, Any], ...] = ()
    decoding: Mapping[str, Any] | None = None
    kvcache: Mapping[str, Any] | None = None
    choice: Mapping[str, Any] | None = None


def write_pages(places: Iterable[str | Path], out: str | Path) -> list[Path]:
    """Write one Markdown page for each family that the result files have rows of.

    Args:
        places: JSON files of `compare`, `choose`, `bench speculation`, `bench drafters`, `bench decoding` or
            `bench kvcache`, or folders of them. In a folder, JSON of other kinds is passed over.
        out: The folder of the pages; `out/speculation.md` and so on.

    Returns:
        The pages that were written.

    Raises:
        BadParameter: There is no result in these places, or a file is of another kind or schema.
    """
    pages = family_pages(places)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for family, text in pages.items():
            (out / f"{family}.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadParameter(
            f"the pages cannot be written to {out}: {error.strerror or error}; name a folder that can be written"
        ) from error
    return [out / f"{family}.md" for family in pages]


def family_pages(places: Iterable[str | Path]) -> dict[str, str]:
    """Return the pages as text by family; see `write_pages`."""
    files = [found for place in places for found in _read(Path(place))]
    present = {part for file in files for run in file.runs for row in run["rows"] for part in _families(row)}
    present |= {BY_SLUG[table["method"]].family for file in files for table in file.tables}
    if any(file.decoding or file.choice for file in files):
        present.add("decoding")
    if any(file.kvcache for file in files):
        present.add("kvcache")
    families = [family for family in FAMILIES if family in present and family not in _SHARED]
    if not families:
        raise BadParameter(
            "there are no results of any family; write some with `tokenry compare --json FILE` or "
            "`tokenry bench speculation --json FILE`"
        )
    return {family: _page(family, files) for family in families}


# --- files --------------------------------------------------------------------------------------


def _read(place: Path) -> list[_File]:
    if place.is_dir():
        found = [_read_file(path) for path in sorted(place.glob("*.json"))]
        return [file for file in found if file is not None]
    if not place.is_file():
        raise BadParameter(f"no result file or folder at {str(place)!r}; name one that `--json FILE` wrote")
    file = _read_file(place)
    if file is None:
        raise BadParameter(
            f"{place} is no result of `tokenry compare`, `tokenry choose` or `tokenry bench`; name a file that "
            "their `--json FILE` wrote"
        )
    return [file]


def _read_file(path: Path) -> _File | None:
    """The results in a file; None if it holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadParameter(f"cannot read {path} as JSON: {error}; name a file that `--json FILE` wrote") from error
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in ("comparison", "speculation", "drafters", "decoding", "kvcache", "choice"):
        return None
    if data.get("schema_version") != SCHEMA_VERSION:
        raise BadParameter(
            f"{path} has schema version {data.get('schema_version')}, and this release reads {SCHEMA_VERSION}; "
            "measure again"
        )
    if kind == "comparison":
        return _File(path.name, (data,))
    if kind == "decoding":
        return _File(path.name, (), decoding=data)
    if kind == "kvcache":
        return _File(path.name, (), kvcache=data)
    if kind == "choice":
        return _File(path.name, (data["comparison"],), choice=data)
    found = (path.name, tuple(data["runs"]), tuple(data["checks"]), tuple(data["skipped"]))
    if kind == "drafters":
        return _File(*found, about=data, tables=tuple(data["tables"]))
    return _File(*found, data["prompts"])


# --- a page -------------------------------------------------------------------------------------


def _page(family: str, files: Sequence[_File]) -> str:
    parts = [
        f"# Results: {family}",
        f"{FAMILIES[family].capitalize()}. Generated by `tokenry results`: every figure is read from the JSON of the "
        "runs named below, none is typed. [How things are measured](../measuring.md).",
        "## What the papers claim, and what was measured here",
        *_claims(family, files),
        "## Runs",
    ]
    for file in files:
        runs = [run for run in file.runs if _methods_of(family, run)]
        tables = [table for table in file.tables if BY_SLUG[table["method"]].family == family]
        if runs or tables:
            parts += [f"### {file.name}", *(_about(file, runs) if runs else []), *_trained(file)]
            for run in runs:
                parts += _tables(family, run)
            for table in tables:
                parts += _figures_table(table)
            parts += _checks(family, file)
        if file.decoding and family == "decoding":
            parts += [f"### {file.name}", *decoding.section(file.decoding, _table)]
        if file.kvcache and family == "kvcache":
            parts += [f"### {file.name}", *kvcache.section(file.kvcache, _table)]
    return "\n\n".join(parts) + "\n"


def _families(row: Mapping[str, Any]) -> list[str]:
    return row["family"].split("+")


def _slugs(row: Mapping[str, Any]) -> list[str]:
    """Names of the methods of a row, a combination's both."""
    return [part.partition(":")[0].partition("(")[0] for part in row["method"].split("+")]


def _methods_of(family: str, run: Run) -> list[Mapping[str, Any]]:
    return [row for row in run["rows"] if family in _families(row)]


def _shown(family: str, run: Run) -> list[Mapping[str, Any]]:
    """The family's rows, and those that they are read beside: plain under the same setting, peers of drafters."""
    settings = {row["setting"] for row in _methods_of(family, run)}
    found = []
    for row in run["rows"]:
        beside = row["family"] == "generation" or row["method"] == run["settings"]["reference"]
        beside |= row["family"] == "peers" and family == "speculation"
        if family in _families(row) or (beside and row["setting"] in settings):
            found.append(row)
    return found


def _about(file: _File, runs: Sequence[Run]) -> list[str]:
    run = runs[0]
    lines = [f"- {recommendation(file.choice)}"] if file.choice else []
    lines += [f"- {measured_on(run)}; weights {run['model']['weights_hash']}, attention {run['model']['attention']}."]
    lines += [
        f"- {second['resource']} of `{second['method']}`: {second['name']}, weights {second['weights_hash']}."
        for second in run["resources"]
    ]
    if file.prompts:
        lines.append(f"- Prompts: {file.prompts['file']}, SHA-256 {file.prompts['sha256'][:16]}.")
    settings = ", ".join(run["settings"]["settings"])
    tail = run["settings"]["tail"]
    lines.append(
        f"- {run['created'][:10]}, {settings}, seed {run['settings']['seed']}, {run['settings']['repeats']} "
        "interleaved pairs" + (f", the last {tail} tokens of each prompt" if tail else "") + "."
    )
    said = dict.fromkeys(note for each in runs for note in notes(each)[:-1])
    return ["\n".join(lines), " ".join(said)]


def _trained(file: _File) -> list[str]:
    """What the tables of trained drafters were measured on, and how each was trained."""
    if file.about is None:
        return []
    weights, day = file.about["model"]["weights_hash"], file.about["created"][:10]
    lines = [f"- Tables of trained drafters: {day}, {measured_on(file.about)}; weights {weights}."]
    for part, facts in file.about["trained"].items():
        lines.append(f"- {part}: " + ", ".join(f"{name} {value}" for name, value in facts.items()) + ".")
    return ["\n".join(lines)]


def _figures_table(table: Mapping[str, Any]) -> list[str]:
    names = headers(table["rows"])
    rows = [[cell(row.get(name)) for name in names] for row in table["rows"]]
    return [f"#### {table['title']}", _table(names, rows), *([table["note"]] if table["note"] else [])]


def _tables(family: str, run: Run) -> list[str]:
    rows = _shown(family, run)
    chosen = speculation_columns() if family == "speculation" else columns(rows)
    if any(row["speed"]["count"] < PAIRS for row in rows):
        chosen = [column for column in chosen if column[0] not in ("speed", "tokens/s")]
    batch = run["settings"]["batch_size"]
    parts = []
    for workload in run["workloads"]:
        group = [row for row in rows if row["workload"] == workload["name"]]
        if group:
            title = workload_title(workload) + (f" · batch size {batch}" if batch > 1 else "")
            parts += [f"#### {title}", _row_table(group, chosen)]
    if family == "speculation":
        parts.append(SPECULATION_NOTE)
    return parts


def _row_table(rows: Sequence[Mapping[str, Any]], chosen: Sequence[Column]) -> str:
    headers = ["method", *(header for header, _ in chosen)]
    return _table(headers, [[f"`{row['label']}`", *(cell(row) for _, cell in chosen)] for row in rows])


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---", *("---:" for _ in headers[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _checks(family: str, file: _File) -> list[str]:
    if family != "speculation" or not (file.checks or file.skipped):
        return []
    parts = []
    if file.checks:
        parts += ["#### Checks", _table(CHECK_HEADERS, map(check_cells, file.checks))]
        tasks = list(dict.fromkeys(task for check in file.checks for task in check["by_task"]))
        by_task = [
            [check["name"], *(f"{check['by_task'][task]:.3g}" if task in check["by_task"] else "–" for task in tasks)]
            for check in file.checks
        ]
        parts += [
            "Quartiles are over the prompts of all tasks (of speeds over the pairs, of distillation over the seeds). "
            "By task, as ratios; losslessness as the number of outputs that differ:",
            _table(["check", *tasks], by_task),
        ]
    if file.skipped:
        parts.append("\n".join(f"- Skipped `{each['method']}`: {each['reason']}" for each in file.skipped))
    return parts


# --- claims -------------------------------------------------------------------------------------


def _claims(family: str, files: Sequence[_File]) -> list[str]:
    """For every method that was measured what its paper claims, what came out here, and why it can differ."""
    rows = [
        (file, run, row)
        for file in files
        for run in file.runs
        for row in _methods_of(family, run)
    ]  # fmt: skip
    parts = []
    tables = [(file, table) for file in files for table in file.tables]
    found = [slug for *_, row in rows for slug in _slugs(row)] + [table["method"] for _, table in tables]
    more = _decoded(files)
    for slug in dict.fromkeys([*found, *more]):
        known = BY_SLUG.get(slug)
        if known is None or known.family != family:
            continue
        lines = [f"### {slug}", f"{known.summary}" + (f" *{known.paper}.*" if known.paper else "")]
        measured = [f"  - {line}" for line in _measured(slug, rows) or _measured_alone(slug, tables)]
        measured += [f"  - {line}" for line in more.get(slug, ())]
        claim = CLAIMS.get(slug)
        points = []
        if claim:
            points += [f"- **Claimed:** {claim.claim}", f"- **On:** {claim.setting}"]
        points += ["- **Measured here:**", *measured]
        if claim:
            points.append(f"- **Why they differ:** {claim.why}")
        parts += [*lines, "\n".join(points)]
    return parts


def _measured(slug: str, rows: Sequence[tuple[_File, Run, Mapping[str, Any]]]) -> list[str]:
    """One line for each variant of a method and run: the range of its figures over the tasks."""
    groups: dict[tuple[str, int, str], list[tuple[Run, Mapping[str, Any]]]] = {}
    for file, run, row in rows:
        if slug in _slugs(row):
            groups.setdefault((file.name, run["settings"]["batch_size"], row["label"]), []).append((run, row))
    found = []
    for (name, batch, label), group in groups.items():
        run = group[0][0]
        tasks = f"{len(group)} task{'s' * (len(group) > 1)}"
        place = f"{run['model']['name']} on {run['machine']['accelerator'] or 'a CPU'}, {tasks}"
        place += f", batch size {batch}" * (batch > 1)
        figures = [f"{what} {_range(values, form)}" for what, values, form in _figures(group) if values]
        found.append(f"`{label}` ({name}: {place}): {', '.join(figures)}.")
    return found


def _decoded(files: Sequence[_File]) -> dict[str, list[str]]:
    """Lines by method: the figures of the benches of decoders and policies, and what was recommended."""
    found: dict[str, list[str]] = {}
    for file in files:
        lines = decoding.measured(file.decoding, file.name) if file.decoding else {}
        lines |= kvcache.measured(file.kvcache, file.name) if file.kvcache else {}
        if file.choice:
            said = f"{recommendation(file.choice)} ({file.name}: {file.choice['comparison']['model']['name']})"
            lines = {"parallel-generation-survey": [said]}
        for slug, own in lines.items():
            found.setdefault(slug, []).extend(own)
    return found


def _measured_alone(slug: str, tables: Sequence[tuple[_File, Mapping[str, Any]]]) -> list[str]:
    """One line for each row of a method that has no comparison: its figures."""
    found = []
    for file, table in tables:
        if table["method"] == slug:
            assert file.about is not None
            name, *others = headers(table["rows"])
            place = f"{file.about['model']['name']} on {file.about['machine']['accelerator'] or 'a CPU'}"
            for row in table["rows"]:
                figures = [f"{other} {cell(row[other])}" for other in others if row.get(other) is not None]
                found.append(f"{row[name]} ({file.name}: {place}): {', '.join(figures)}.")
    return found


def _figures(
    group: Sequence[tuple[Run, Mapping[str, Any]]],
) -> Iterable[tuple[str, list[float], Callable[[float], str]]]:
    rows = [row for _, row in group]
    # Speed of fewer pairs says more of what else the machine did.
    timed = [row["speed"]["median"] for row in rows if row["speed"]["count"] >= PAIRS]
    yield "speed", [median for median in timed if median is not None], "{:.2f}×".format
    yield "tokens per pass", [row["tokens_per_pass"] for row in rows], "{:.2f}".format
    if any("kvcache" in _families(row) for row in rows):
        yield "kept at most", [row["kv_bytes"] for row in rows], lambda value: size(int(value))
        shares = [row["kv_bytes"] / plain["kv_bytes"] for run, row in group if (plain := _plain(run, row))]
        yield "of plain's bytes", shares, "{:.0%}".format
        yield "agreement", [row["agreement"] for row in rows if row["agreement"] is not None], "{:.0%}".format
    # What promises plain's output has plain's quality.
    scored = [(run, row) for run, row in group if row["quality"] is not None and row["lossless"] is None]
    yield "quality", [row["quality"] for _, row in scored], "{:.2f}".format
    beside = [plain["quality"] for run, row in scored if (plain := _plain(run, row)) and plain["quality"] is not None]
    yield "plain's quality", beside, "{:.2f}".format
    for name, own in (("bits per byte", rows), ("plain's bits per byte", [_plain(run, row) for run, row in group])):
        yield name, [row["bits_per_byte"] for row in own if row and row["bits_per_byte"] is not None], "{:.3f}".format


def _plain(run: Run, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Plain's row on the same task under the same setting, if its cache has bytes to compare with: Tokenry's, which
    draws from the same seeds, or else the reference's."""
    rows = [
        each
        for each in run["rows"]
        if each["workload"] == row["workload"] and each["setting"] == row["setting"] and each["kv_bytes"]
    ]
    named = ("plain", run["settings"]["reference"])
    return next((each for name in named for each in rows if each["method"] == name), None)


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"

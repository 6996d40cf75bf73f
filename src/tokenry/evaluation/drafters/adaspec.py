"""AdaSPEC: a draft distilled with and without selection, from the same weights, over seeds."""

import functools
import hashlib
import statistics
from typing import Any

import torch

from tokenry.models import weights_hash
from tokenry.objectives import mixed, token_rows, training_texts
from tokenry.speculation import DraftModel
from tokenry.speculation.adaspec import ARMS, AdaSpecTrainer, compare_distillation, sampled

from ..running import Runner, Setting, Variant
from .engine import Bench, held_out_texts
from .results import Table

_ROWS, _LENGTH = 1024, 128  # of the text that is learned
_MEASURED = 48  # rows that acceptance is measured on
_PROMPT = 32  # their first tokens, which are given; the target has sampled the others


def measure(bench: Bench) -> None:
    """A draft distilled with and without selection, from the same weights, over seeds."""
    draft = AdaSpecTrainer(draft=bench.draft).start(bench.model, bench.tokenizer)
    texts = training_texts(bench.text)
    rows = token_rows(texts, bench.tokenizer, _LENGTH, bench.seed, rows=_ROWS)
    held = token_rows(held_out_texts(), bench.tokenizer, _LENGTH, bench.seed, rows=_MEASURED)
    with bench.saying("the model writes what drafts are measured on"):
        held = sampled(bench.model, held, prompt=_PROMPT, seed=bench.seed)
    arms = ARMS if bench.controls else ("plain", "equal tokens")
    # Runs of other settings go elsewhere, so that none stands in another's way.
    known = f"{weights_hash(bench.model)} {weights_hash(draft)} {bench.steps} {rows.ids.tolist()}"
    folder = bench.folder("adaspec-bench") / hashlib.sha256(known.encode()).hexdigest()[:12]
    dtype = mixed("auto" if bench.model.dtype == torch.bfloat16 else "float32", bench.model.device)
    found = compare_distillation(
        bench.model, draft, rows, held_out=held, arms=arms, seeds=bench.seeds, steps=bench.steps, dtype=dtype,
        measure=functools.partial(_drafting, bench), folder=folder, progress=bench.progress,
    )  # fmt: skip
    bench.trained_as["adaspec"] = {**found["settings"], "seed": bench.seed}
    _distilled(bench, found)


def _drafting(bench: Bench, draft: Any) -> dict[str, float]:
    """Tokens a pass on the tasks, greedily, with a draft model in the target's dtype."""
    second = type(draft)(draft.config).to(bench.model.device, bench.model.dtype).eval()
    second.load_state_dict(draft.state_dict())
    runner = Runner(bench.model, bench.tokenizer, resources={"draft": second})
    variant, tokens, passes = Variant(DraftModel(), Setting()), 0, 0
    for name, group in bench.tasks.items():
        task = runner.prepare(name, group, max_new_tokens=bench.max_new_tokens, batch_size=8)
        for batch in task.batches:
            stats = runner.run(variant, batch, task.max_new_tokens).stats
            tokens, passes = tokens + stats.committed, passes + stats.passes
    return {"tokens per pass": tokens / passes}


def _distilled(bench: Bench, found: dict[str, Any]) -> None:
    figure = "tokens per pass"
    names = {"plain": "plain distillation", "equal tokens": "adaspec"}
    rows: list[dict[str, Any]] = [
        {
            "draft": "before", "acceptance": found["before"], "sd": None, "over plain": None,
            figure: found["figures_before"][figure],
        }
    ]  # fmt: skip
    for arm, each in found["arms"].items():
        gained = each["figures"][figure]
        rows.append(
            {
                "draft": names.get(arm, arm if arm.startswith("plain") else f"adaspec, {arm}"),
                "acceptance": each["mean"],
                "sd": each["deviation"],
                "over plain": statistics.fmean(each["over_plain"]),
                figure: statistics.fmean(gained),
                f"sd of {figure}": statistics.stdev(gained) if len(gained) > 1 else None,
                "tokens learned": each["tokens_learned"],
                "read by the draft": each["tokens_read"]["draft"],
                "by the reference": each["tokens_read"]["reference"],
            }
        )
    settings = found["settings"]
    bench.tables.append(
        Table(
            part="adaspec",
            method="adaspec",
            title=f"adaspec · {settings['steps']} steps, {settings['rows']} rows of {settings['length']} tokens, "
            f"{settings['seeds']} seeds",
            rows=tuple(rows),
            note="acceptance: mean of the sum of min(p, q) over tokens that the model sampled at temperature 1 "
            f"behind held-out code; tokens per pass: greedily on {', '.join(bench.tasks)} with {DraftModel()}. Same "
            "start, steps and learning rate; adaspec selects from a batch larger by 1 / keep, so that both learn "
            "as many tokens a step, and its reference is the plainly distilled draft of the seed.",
        )
    )
    plain, selective = found["arms"]["plain"], found["arms"]["equal tokens"]
    few = f"{settings['steps']} steps from a trained draft; the paper trains for some 14,000 on each of its tasks"
    for name, unit, mine, its in (
        ("adaspec-above-plain", "acceptance", selective["acceptance"], plain["acceptance"]),
        ("adaspec-above-plain-tokens", figure, selective["figures"][figure], plain["figures"][figure]),
    ):
        bench.ratio(
            name,
            f"AdaSPEC's draft has more {unit} than the plainly distilled one, over {len(mine)} seeds",
            unit,
            {"adaspec": statistics.fmean(mine), "plain distillation": statistics.fmean(its)},
            [one / other for one, other in zip(mine, its, strict=True)],
            strict=True,
            reason=f"possibly because of {few}",
        )
    if (control := found["arms"].get("smallest gaps")) is not None:
        bench.ratio(
            "adaspec-largest-above-smallest",
            "keeping the largest gaps accepts more than keeping the smallest",
            "acceptance",
            {"largest gaps": selective["mean"], "smallest gaps": control["mean"]},
            [one / other for one, other in zip(selective["acceptance"], control["acceptance"], strict=True)],
            strict=True,
        )

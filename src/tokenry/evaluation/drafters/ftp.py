"""Future token prediction: drafting with one state, what a state says by offset, how smoothly states change."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenry.models import load, loaded_name
from tokenry.objectives import shifted_ce, token_rows
from tokenry.speculation.future_token_prediction.drafter import load_decoder
from tokenry.speculation.future_token_prediction.measure import bench_states

from .engine import Bench, accepted, held_out_texts
from .results import Table

_ROWS, _LENGTH = 32, 256  # rows of held-out text and their tokens


def measure(bench: Bench) -> None:
    """Drafting with the decoder of one state, what a state says by offset, and how smoothly states change."""
    place = bench.trained("ftp")
    decoder = load_decoder(str(place), bench.model.dtype, bench.model.device)
    bench.note("ftp", decoder, place)
    method = "future-token-prediction"
    run = bench.compared([method, f"{method}:lossless=false;tokens_per_step=2"], {"weights": decoder})
    texts = held_out_texts()
    options: dict[str, Any] = {"rows": _ROWS, "length": _LENGTH, "seed": bench.seed}
    with bench.saying("what states say"):
        mine = bench_states(bench.model, bench.tokenizer, texts, weights=place, **options)
    states = {loaded_name(bench.model) or "the model": mine}
    tuned = bench.folder("ftp-tuned")
    if tuned.is_dir():
        whole, own = load(tuned, dtype=bench.model.dtype, device=bench.model.device)
        bench.note("ftp-tuned", whole, tuned)
        with bench.saying("what tuned states say"):
            states["tuned on the task"] = bench_states(whole, own, texts, **options)
    future = mine["future"]
    rows = []
    for offset, (loss, gap) in enumerate(zip(future["loss"], future["gap"], strict=True), 1):
        row: dict[str, Any] = {"offset": offset, "loss": loss, "gap": gap}
        for name, found in list(states.items())[1:]:
            row |= {f"loss, {name}": found["future"]["loss"][offset - 1],
                    f"gap, {name}": found["future"]["gap"][offset - 1]}  # fmt: skip
        row["loss of blocks"] = future["block_loss"][str(offset)]
        row["accepted"] = accepted(run, method, offset - 2) if offset > 1 else None
        rows.append(row)
    bench.tables.append(
        Table(
            part="ftp",
            method=method,
            title=f"future-token-prediction, by offset · {mine['rows']} held-out rows of {_LENGTH} tokens",
            rows=tuple(rows),
            note="Nats a token, the true tokens before it known, so loss need not grow with the offset. gap: loss "
            "with the state of a random other position, less that with the true one: what the state knows. loss of "
            "blocks: mean loss of the model that commits so many tokens a step unverified. accepted: of the verify "
            "steps that drafted this offset, the share that accepted it; offset 1 is the model's own token.",
        )
    )
    flat = sum(gap <= 0 for gap in future["gap"][1:])
    bench.check(
        "ftp-states-know-ahead",
        "from offset 2 on, the true state predicts better than another position's",
        "offsets where it does not",
        {method: flat},
        passed=flat == 0,
        reason="possibly because the decoder was trained too shortly to read more than the next token",
    )
    _smoothness(bench, states, texts)


def _smoothness(bench: Bench, states: Mapping[str, dict[str, Any]], texts: Sequence[str]) -> None:
    rows = []
    for name, found in states.items():
        smooth = found["smoothness"]
        rows.append(
            {
                "states": name, "cosine": smooth["cosine"], "centred": smooth["centred_cosine"],
                "centred, random pairs": smooth["shuffled_cosine"], "next-token loss": found["future"]["loss"][0],
            }
        )  # fmt: skip
    ids = token_rows(texts, bench.tokenizer, _LENGTH, bench.seed, rows=_ROWS).ids
    rows[0]["next-token loss"] = _next_token_loss(bench, ids)
    bench.tables.append(
        Table(
            part="ftp",
            method="future-token-prediction",
            title="smoothness of states along held-out text",
            rows=tuple(rows),
            note="Cosine of neighbouring states, raw and after the mean state is subtracted. The paper compares at "
            "equal next-token loss (nats; of the first line the model's own). States that nothing was trained on "
            "are the model's: only a model tuned on the task can change them (tokenry train ftp --encoder tuned).",
        )
    )
    if len(rows) > 1:
        before, after = (row["centred"] for row in rows)
        bench.check(
            "ftp-smoother",
            "after tuning on future tokens, neighbouring states are more alike (centred cosine)",
            "centred cosine, thousandths",
            {rows[1]["states"]: 1000 * after, rows[0]["states"]: 1000 * before},
            passed=after > before,
            reason="possibly because a few hundred steps change the states of a trained model little",
        )


@torch.no_grad()
def _next_token_loss(bench: Bench, ids: torch.Tensor) -> float:
    total = 0.0
    for part in ids.split(8):
        part = part.to(bench.model.device)
        total += shifted_ce(bench.model(input_ids=part, use_cache=False).logits, part).item()
    return total / (ids.shape[0] * (ids.shape[1] - 1))

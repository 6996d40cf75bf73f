"""Bits per byte of long code, read token by token, so that the policy decides at each what is seen."""

import contextlib
import functools
import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tokenry.errors import BadPrompt, PromptTooLong
from tokenry.methods import Method
from tokenry.models import anatomy, context_length
from tokenry.workloads import held_out_files

from .engine import PLAIN, Bench, way

BITS = "bits per byte"


def measure(bench: Bench) -> None:
    """Every method at every share of the text's tokens, as a count, on one text for each seed."""
    budgets = [max(1, int(share * bench.bits_tokens)) for share in bench.shares]
    group = f"{bench.bits_tokens:,} tokens"
    if bench.bits_prompt:
        group += f", {bench.bits_prompt:,} of them read at once"
    ours = [each for each in bench.budgeted(budgets) if each[2]]
    bench.expect(1 + len(ours))
    ids, sizes = texts(bench)

    def score(method: Method | None, label: str, budget: str) -> None:
        nats = stepwise_nats(bench.model, ids, method, bench.bits_prompt)
        values = (nats / math.log(2) / sizes).tolist()
        bench.add("bits", group, label, budget, BITS, "bits", values)

    bench.attempt(PLAIN, lambda: score(None, PLAIN, ""), "(bits)")
    for base, method, budget in ours:
        bench.attempt(f"{way(base)}, {budget}", functools.partial(score, method, way(base), budget), "(bits)")


def texts(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """Beginnings of held-out files, one for each seed: ids `[seeds, tokens]` and bytes `[seeds]`.

    Raises:
        BadPrompt: There are too few long files.
        PromptTooLong: The texts exceed the context of a model whose positions end there.
    """
    limit = context_length(bench.model)
    # Rotary positions go on; what the full cache loses behind the trained length is a figure of its own.
    if limit and bench.bits_tokens > limit and anatomy(bench.model).rotary is None:
        raise PromptTooLong(f"{bench.bits_tokens} tokens exceed the model's context of {limit}; ask for fewer")
    rows, sizes = [], []
    # In an order that mixes the packages; the same on every machine that has the same releases.
    files = held_out_files()
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        text = files[index].read_text(encoding="utf-8", errors="replace")
        # A token may end inside a character of several bytes, which would be counted wrongly.
        if not text.isascii():
            continue
        found = bench.tokenizer(text)["input_ids"][: bench.bits_tokens]
        if len(found) == bench.bits_tokens:
            rows.append(found)
            # What is scored: all but the first token, the beginning of a text where there is a token for it, or all
            # behind the prompt.
            scored = found[bench.bits_prompt or 1 :]
            sizes.append(len(bench.tokenizer.decode(scored, clean_up_tokenization_spaces=False)))
        if len(rows) == bench.seeds:
            return torch.tensor(rows, device=bench.model.device), torch.tensor(sizes, dtype=torch.float64)
    raise BadPrompt(
        f"only {len(rows)} held-out files have {bench.bits_tokens} tokens, and {bench.seeds} are wanted: ask for fewer "
        "tokens or seeds, or pip install rich typer click hypothesis pytest"
    )


@torch.inference_mode()
def stepwise_nats(model: Any, ids: torch.Tensor, method: Method | None, prompt: int = 0) -> torch.Tensor:
    """Sum of each row's negative log likelihoods of `ids[:, 1:]`, or of all behind the prompt, read one by one.

    Args:
        model: A causal model.
        ids: Texts of one length `[rows, length]`.
        method: A cache policy; None keeps everything.
        prompt: Tokens that are read at once before, as a prompt.

    Returns:
        In nats, `[rows]`.
    """
    total = torch.zeros(len(ids), dtype=torch.float64)
    block: Any = contextlib.nullcontext() if method is None else method(model)  # type: ignore[operator]
    with block:
        read, cache = max(0, prompt - 1), None
        if read:
            cache = model(input_ids=ids[:, :read], use_cache=True).past_key_values
        for index in range(read, ids.shape[1] - 1):
            out = model(input_ids=ids[:, index : index + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            losses = cross_entropy(out.logits[:, -1].float(), ids[:, index + 1], reduction="none")
            total += losses.double().cpu()
    return total

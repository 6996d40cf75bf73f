"""What state vectors hold: loss and information by offset, and how smoothly states follow each other along a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter
from tokenry.speculation.future_token_prediction.drafter import load_decoder
from tokenry.speculation.future_token_prediction.model import FTPForCausalLM


def bench_states(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    weights: str | Path | None = None,
    rows: int = 64,
    length: int = 256,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model's state vectors on held-out texts, as JSON.

    Args:
        model: An `FTPForCausalLM`, a causal model with `weights`, or one without, of which smoothness alone is said.
        tokenizer: Its tokenizer.
        texts: Documents that nothing was trained on.
        weights: Folder of a future decoder that was trained on the model's states.
        rows: Rows that are measured.
        length: Tokens of a row.
        batch: Rows that run together.
        seed: Order of the texts, and what is drawn.
    """
    from tokenry.objectives.data import token_rows

    ids = token_rows(texts, tokenizer, length, seed, rows=rows).ids
    found: dict[str, Any] = {
        "rows": len(ids), "length": length, "smoothness": smoothness(model, ids, batch=batch, seed=seed)
    }  # fmt: skip
    if weights is not None:
        model = FTPForCausalLM.around(model, load_decoder(str(weights), model.dtype, model.device))
    if isinstance(model, FTPForCausalLM):
        found["future"] = future_losses(model, ids, batch=batch, seed=seed)
    return found


@torch.no_grad()
def future_losses(model: FTPForCausalLM, rows: Tensor, *, batch: int = 8, seed: int = 0) -> dict[str, Any]:
    """Measure what a state vector tells of each of the next N tokens.

    Cross-entropy is teacher-forced: at offset j the decoder reads the true tokens 1 to j - 1, so its loss need not grow
    with j. What the state adds is the gap: the loss with the state of another position, drawn at random, less the loss
    with the true one.

    Args:
        model: The model, or a decoder on a model that is there (`FTPForCausalLM.around`).
        rows: Held-out ids `[rows, length]`.
        batch: Rows that run together; the other position is drawn among them.
        seed: Of the other positions.

    Returns:
        As JSON: `loss` and `gap` by offset in nats, `block_loss` by tokens per step (the mean loss of the model that
        commits so many unverified), and `positions`.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = model.config.num_future_tokens
    sums, other_sums = torch.zeros(2, offsets, dtype=torch.float64)
    counts = torch.zeros(offsets, dtype=torch.long)
    model.eval()
    for part in rows.split(batch):
        ids = part.to(model.device)
        states = model.state_vectors(ids)
        targets = model.targets(ids, ids)
        place = model.draw(targets, None)
        flat = states.flatten(0, 1)
        # A shift by at least one place, so that no position keeps its own.
        order = torch.randperm(len(flat), generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        mixed = flat[other.to(flat.device)].view(states.shape)
        sums += model.offset_sums(states, ids, targets, *place).cpu()
        other_sums += model.offset_sums(mixed, ids, targets, *place).cpu()
        counts += (targets != -100).sum((0, 1)).cpu()
    if int(counts[0]) == 0:
        raise BadParameter(f"rows of {rows.shape[1]} tokens have no next token to measure; give longer ones")
    loss, gap = sums / counts, (other_sums - sums) / counts
    block = loss.cumsum(0) / torch.arange(1, offsets + 1)
    return {
        "positions": int(counts[0]),
        "loss": loss.tolist(),
        "gap": gap.tolist(),
        "block_loss": {str(size): float(value) for size, value in enumerate(block, 1)},
    }


@torch.no_grad()
def smoothness(model: PreTrainedModel, rows: Tensor, *, batch: int = 8, seed: int = 0) -> dict[str, float]:
    """Measure the cosine of neighbouring state vectors along held-out text.

    A direction that all states share inflates it, so it is given raw, after the mean vector is subtracted, and, as the
    level of chance, between positions paired at random.

    Args:
        model: A future token prediction model or any causal model, whose states are those its head reads.
        rows: Ids `[rows, length]`.
        batch: Rows that run together.
        seed: Of the random pairs.
    """
    model.eval()
    found = []
    for part in rows.split(batch):
        found.append(model.base_model(input_ids=part.to(model.device)).last_hidden_state.float().cpu())
    states = torch.cat(found)
    centred = states - states.mean((0, 1))
    pairs = torch.randperm(states.shape[0] * states.shape[1], generator=torch.Generator().manual_seed(seed))
    flat = centred.flatten(0, 1)

    def cosine(left: Tensor, right: Tensor) -> float:
        return float(torch.cosine_similarity(left, right, dim=-1).mean())

    return {
        "cosine": cosine(states[:, :-1], states[:, 1:]),
        "centred_cosine": cosine(centred[:, :-1], centred[:, 1:]),
        "shuffled_cosine": cosine(flat, flat[pairs]),
    }

"""How far a model's output for a mixture of tokens is from the mixture of its outputs for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.decoding.superposed.decoder import mixed


@torch.no_grad()
def linearity(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, *, k: int = 3, steps: int = 10
) -> Tensor:
    """Cosine between both, step by step, while a mixture follows k beams.

    Beam search writes k beams with a cache each. Beside them the model reads, from a cache of its own, the mixture of
    their last tokens, weighted by the softmax of the beams' log-probabilities; what its head is given is compared with
    the same mixture of what it is given for the beams (Superposed Decoding 2405.18400, section 3.3).

    Args:
        input_ids: Prompts `[batch, length]`, padded on the left.
        attention_mask: Likewise; None: nothing is padded.
        k: Beams.
        steps: Tokens.

    Returns:
        `[steps, batch]`; the Llama-2-7B of the paper stays at 0.6 or above for 10 steps.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    body: Any = model.base_model
    head: Any = model.get_output_embeddings()
    batch = len(input_ids)

    def read(cache: Any, mask: Tensor, **inputs: Tensor) -> tuple[Tensor, Any]:
        count = next(iter(inputs.values())).shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
        out = body(attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **inputs)
        return out.last_hidden_state[:, -1], out.past_key_values

    hidden, cache = read(None, mask, input_ids=input_ids)
    wide = mask.repeat_interleave(k, 0)
    _, beams = read(None, wide, input_ids=input_ids.repeat_interleave(k, 0))
    scores, tokens = head(hidden).float().log_softmax(-1).topk(k, -1)
    found = []
    for _ in range(steps):
        mask, wide = (torch.nn.functional.pad(own, (0, 1), value=1) for own in (mask, wide))
        weights = scores.softmax(-1)
        hidden, cache = read(cache, mask, inputs_embeds=mixed(model, tokens, weights))
        each, beams = read(beams, wide, input_ids=tokens.reshape(-1, 1))
        wanted = (weights[..., None] * each.view(batch, k, -1).float()).sum(1)
        found.append(torch.cosine_similarity(hidden.float(), wanted, dim=-1))
        logs = head(each).float().log_softmax(-1).view(batch, k, -1)
        scores, pick = (scores[..., None] + logs).flatten(1).topk(k, -1)
        tokens = pick % logs.shape[-1]
        parents = pick // logs.shape[-1] + k * torch.arange(batch, device=pick.device)[:, None]
        beams.reorder_cache(parents.flatten())
    return torch.stack(found)

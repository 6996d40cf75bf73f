"""The oracle against a dense run in which every step is masked to its own largest logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from tests import tiny
from tokenry.kvcache import FASA, Oracle
from tokenry.models import TokenCache, attached

PROMPT, BUDGET = 30, 7


def simulated(model, ids, per):
    """Logits of a dense run whose rows behind the prompt see their largest logits alone."""

    def masked(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        length = query.shape[2]
        logits = (query @ key.transpose(-1, -2) * scaling).masked_fill(
            ~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf")
        )
        worth = logits
        if per == "kv":
            shared = logits.softmax(-1).unflatten(1, (-1, groups)).sum(2)
            worth = shared.repeat_interleave(groups, 1).masked_fill(logits.isinf(), float("-inf"))
        for row in range(PROMPT, length):
            best = worth[:, :, row].topk(BUDGET, -1).indices
            kept = torch.zeros_like(logits[:, :, row], dtype=torch.bool).scatter_(-1, best, True)
            logits[:, :, row] = logits[:, :, row].masked_fill(~kept, float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("largest", masked)
    own = model.config._attn_implementation
    model.set_attn_implementation("largest")
    try:
        return model(ids, use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(own)


def stepwise(model, ids, policy):
    with attached(model):
        cache = TokenCache(model, policy)
        model(ids[:, :PROMPT], past_key_values=cache)
        return torch.stack([model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in ids[0, PROMPT:]])


@torch.no_grad()
@pytest.mark.parametrize("per", ("query", "kv"))
def test_equals_a_dense_run_masked_to_the_largest_logits(per):
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((42,))["input_ids"]
    got = stepwise(model, ids, Oracle(budget=BUDGET, per=per))
    assert torch.allclose(got, simulated(model, ids, per)[PROMPT:], atol=1e-9)
    assert not torch.allclose(got, model(ids).logits[0, PROMPT:], atol=1e-3), "the budget must matter in this test"


@torch.no_grad()
@pytest.mark.parametrize("kind", ("llama", "qwen3", "gpt_neox", "gpt2"))
def test_fasa_with_all_planes_is_the_oracle(kind):
    model = tiny.model(kind, torch.float64)
    ids = tiny.prompts((42,))["input_ids"]
    oracle = stepwise(model, ids, Oracle(budget=BUDGET, dense_layers=1))
    assert torch.allclose(stepwise(model, ids, FASA(budget=BUDGET, planes=1.0)), oracle, atol=1e-9)
    assert not torch.allclose(stepwise(model, ids, FASA(budget=BUDGET, planes=0.25)), oracle, atol=1e-3)

"""Layers with a sliding window behind texts that are longer than what such a layer holds."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tokenry.kvcache import H2O, FastKV, LazyLLM, SpAtten
from tokenry.models import TokenCache, attached
from tokenry.models.slots import Block
from tokenry.speculation import PromptLookup, TokenRecycling

# Beyond the window and what a layer holds before it drops tokens.
PROMPT, TEXT = 150, 180
POLICIES = [None, H2O(budget=1000), LazyLLM(budget=1000)]


def windowed(kind):
    config = tiny.config(kind)
    if kind == "gemma2":
        # It hardly attends to anything in particular by itself.
        config.query_pre_attn_scalar = 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.generation_config.eos_token_id = None
    return model


def text(rows=1):
    return torch.randint(3, 97, (rows, TEXT), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.slug if policy else "none")
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
@torch.no_grad()
def test_steps_behind_a_long_text_are_those_without_a_cache(kind, policy):
    if kind == "mistral" and policy is not None:
        pytest.skip("no layer of this Mistral attends to everything")
    model = windowed(kind)
    wanted = model(text(), use_cache=False).logits
    with policy(model) if policy else attached(model):
        cache = policy.cache(model) if policy else TokenCache(model)
        found = [model(text()[:, :PROMPT], past_key_values=cache).logits]
        for place in range(PROMPT, TEXT):
            found.append(model(text()[:, place : place + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(found, 1), wanted, atol=1e-5)  # Gemma 2 has its weights in float32


# transformers' own Gemma 2 gives NaN in padded rows in float64.
@pytest.mark.parametrize(
    ("kind", "lengths"), [("mistral", (60,)), ("mistral", (120,)), ("mistral", (120, 90)), ("gemma2", (120,))]
)
@pytest.mark.parametrize("method", [TokenRecycling(), PromptLookup()], ids=lambda method: method.slug)
def test_drafters_stay_lossless_beyond_the_window(kind, method, lengths):
    model, inputs = windowed(kind), tiny.prompts(lengths)
    options = {"do_sample": False, "max_new_tokens": 60}
    wanted = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, custom_generate=method, **options), wanted)


@pytest.mark.parametrize(
    "policy",
    [FastKV(budget=0.25, propagated=0.5, window=4, kernel=3), SpAtten(budget=0.4, dense=0)],
    ids=lambda policy: policy.slug,
)
@torch.no_grad()
def test_layers_that_ran_for_fewer_tokens_keep_their_window(policy, monkeypatch):
    model, seen = windowed("gemma2"), []
    mask = Block.mask

    def spied(block, slots, window, device):
        found = mask(block, slots, window, device)
        if window is not None and block.new == 1:
            held = torch.cat([slots.places(1, device)[0, 0], torch.tensor([40])])
            seen.append(held if found[0] is None else held[found[0][0, 0, -1]])
        return found

    monkeypatch.setattr(Block, "mask", spied)
    with policy(model):
        cache = model(tiny.prompts((40,))["input_ids"]).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache)
    assert seen and all(int(positions.min()) > 40 - 8 for positions in seen)

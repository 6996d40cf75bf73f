"""Positions counted over the tokens that are held."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from tests import tiny
from tokenry.errors import UnsupportedModel
from tokenry.kvcache import H2O, Sinks
from tokenry.models import TokenCache, attached


@torch.no_grad()
@pytest.mark.parametrize("every", (1, 3))
def test_one_layer_sees_the_held_tokens_as_a_text_of_their_own(every):
    """Keys and values of a single layer depend on their tokens alone, so the kept tokens fed afresh must agree."""
    torch.manual_seed(0)
    config = tiny.config("llama")
    config.num_hidden_layers = 1
    model = LlamaForCausalLM(config).double().eval()
    stream = torch.randint(3, tiny.VOCABULARY, (60,), generator=torch.Generator().manual_seed(0))
    outputs = {}
    for positions in ("rolling", "original"):
        with attached(model):
            cache = TokenCache(model, Sinks(budget=9, compact_every=every, positions=positions))
            model(stream[None, :20], past_key_values=cache)
            outputs[positions] = []
            for place in range(20, 60):
                kept = cache.kept_positions()[0][0, 0]
                out = model(stream[None, place : place + 1], past_key_values=cache).logits[0, -1]
                wanted = model(stream[torch.cat([kept, torch.tensor([place])])][None], use_cache=False).logits[0, -1]
                outputs[positions].append((out - wanted).abs().max())
    assert max(outputs["rolling"]) < 1e-4
    assert max(outputs["original"]) > 1e-2, "the positions must matter in this test"


@pytest.mark.parametrize("policy", (H2O, Sinks))
@pytest.mark.parametrize("kind", ("llama", "qwen3", "gpt_neox", "gemma2"))
def test_rolling_rows_equal_each_alone_and_the_plain_model_while_all_fits(policy, kind):
    model = tiny.model(kind)
    options = {"do_sample": False, "max_new_tokens": 20}
    inputs = tiny.prompts((40, 29))
    wanted = model.generate(**inputs, **options)
    with policy(budget=64, positions="rolling")(model):
        assert torch.equal(model.generate(**inputs, **options), wanted)
    with policy(budget=12, positions="rolling")(model):
        both = model.generate(**inputs, **options)
        for row, length in enumerate((40, 29)):
            alone = model.generate(inputs["input_ids"][row : row + 1, -length:], **options)
            assert torch.equal(both[row, -20:], alone[0, -20:])


@torch.no_grad()
def test_verified_drafts_equal_single_steps():
    model = tiny.model(dtype=torch.float64)
    policy = H2O(budget=12, compact_every=8, positions="rolling")
    with attached(model):
        single, block = TokenCache(model, policy), TokenCache(model, policy)
        for cache in (single, block):
            model(tiny.prompts((30,))["input_ids"], past_key_values=cache)
        one = [
            model(torch.tensor([[token]]), past_key_values=single, position_ids=single.seen[:, None]).logits[0, -1]
            for token in (5, 6)
        ]
        relation = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
        block.stage(relation=relation, deferred=True)
        tree = model(torch.tensor([[5, 9, 6]]), past_key_values=block, position_ids=torch.tensor([[30, 31, 31]]))
        block.commit(torch.tensor([[0, 2]]), torch.tensor([2]))
        assert torch.allclose(tree.logits[0, [0, 2]], torch.stack(one), atol=1e-6)
        assert torch.equal(single.layers[2].slots.positions, block.layers[2].slots.positions)
        for token in (7, 8):
            ends = [
                model(torch.tensor([[token]]), past_key_values=cache, position_ids=cache.seen[:, None]).logits
                for cache in (single, block)
            ]
            assert torch.allclose(*ends, atol=1e-6)


def test_models_without_rotary_positions_are_refused():
    model = tiny.model("gpt2")
    with pytest.raises(UnsupportedModel, match="positions=original"), Sinks(budget=8, positions="rolling")(model):
        model(tiny.prompts((20,))["input_ids"])
    assert model.config._attn_implementation == "sdpa"

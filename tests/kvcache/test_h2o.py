"""H2O's own invariants, as on its card."""

from __future__ import annotations

import torch

from tests import tiny
from tokenry.kvcache import H2O
from tokenry.models import TokenCache, attached


def _eager(model, ids):
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(own)


@torch.no_grad()
def test_mass_after_the_prompt_is_the_column_sum_of_eager_attention():
    model = tiny.model()
    ids = tiny.prompts((37,))["input_ids"]
    attentions = _eager(model, ids)
    with attached(model):
        cache = TokenCache(model, H2O(budget=64))
        model(ids, past_key_values=cache)
        for layer, probabilities in zip(cache.layers, attentions, strict=True):
            wanted = probabilities[0].sum(1).view(2, 2, 37).sum(1)
            mass = layer.state["mass"][0]
            assert torch.allclose(mass, wanted, atol=1e-4)
            assert torch.allclose(mass.sum(-1), torch.tensor(37.0 * 2), atol=1e-3)


@torch.no_grad()
def test_padding_adds_no_mass_and_is_dropped_first():
    model = tiny.model()
    inputs = tiny.prompts((37, 20))
    with attached(model):
        cache = TokenCache(model, H2O(budget=64))
        model(**inputs, past_key_values=cache)
        alone = TokenCache(model, H2O(budget=64))
        model(inputs["input_ids"][1:, -20:], past_key_values=alone)
        for layer, single in zip(cache.layers, alone.layers, strict=True):
            assert bool((layer.state["mass"][1, :, :17] == 0).all())
            assert torch.allclose(layer.state["mass"][1, :, 17:], single.state["mass"][0], atol=1e-4)


@torch.no_grad()
def test_keeps_the_newest_and_the_largest_sums():
    model = tiny.model()
    ids = tiny.prompts((37,))["input_ids"]
    first = _eager(model, ids)[0][0].sum(1).view(2, 2, 37).sum(1)
    with attached(model):
        cache = TokenCache(model, H2O(budget=12))
        model(ids, past_key_values=cache)
        kept = cache.kept_positions()[0][0]
    for head in range(2):
        heavy = first[head, :31].topk(6).indices.sort().values.tolist()
        assert kept[head].tolist() == [*heavy, *range(31, 37)]


@torch.no_grad()
def test_no_heavy_hitters_token_by_token_is_a_causal_band():
    """Fed one by one with the newest tokens alone, each row sees the budget's tokens and itself."""
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((30,))["input_ids"]
    with attached(model):
        cache = TokenCache(model, H2O(budget=7, recent=1.0))
        logits = [model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in ids[0]]
        assert bool((cache.kept_positions()[0] == torch.arange(23, 30)).all())
    band = torch.ones(30, 30, dtype=torch.bool).tril() & ~torch.ones(30, 30, dtype=torch.bool).tril(-8)
    wanted = model(ids, attention_mask=torch.zeros(1, 1, 30, 30, dtype=torch.float64).masked_fill(~band, -1e9)).logits[
        0
    ]
    assert torch.allclose(torch.stack(logits), wanted, atol=1e-6)
    assert not torch.allclose(wanted, model(ids).logits[0], atol=1e-2), "the band must matter in this test"


@torch.no_grad()
def test_decay_and_count_change_the_choice():
    model = tiny.model()
    ids = tiny.prompts((60,))["input_ids"]
    kept = {}
    for policy in (H2O(budget=10), H2O(budget=10, normalise="count"), H2O(budget=10, decay=0.8)):
        with attached(model):
            cache = TokenCache(model, policy)
            model(ids, past_key_values=cache)
            kept[str(policy)] = torch.cat(cache.kept_positions(), 1)
    plain, count, decay = kept.values()
    early = (plain < 20).sum()
    assert (count < 20).sum() < early and (decay < 20).sum() < early


@torch.no_grad()
def test_half_precision_accumulates_in_float32():
    model = tiny.model(dtype=torch.bfloat16)
    with attached(model):
        cache = TokenCache(model, H2O(budget=64))
        model(tiny.prompts((37,))["input_ids"], past_key_values=cache)
        assert cache.layers[0].state["mass"].dtype == torch.float32
        assert torch.allclose(cache.layers[0].state["mass"].sum(-1), torch.tensor(74.0), atol=1e-2)


@torch.no_grad()
def test_verify_step_adds_committed_rows_only():
    """A deferred block whose rejected rows are dropped leaves the state of single steps."""
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((30,))["input_ids"]
    with attached(model):
        for policy in (H2O(budget=12, compact_every=8), H2O(budget=12, compact_every=8, decay=0.9)):
            single, block = TokenCache(model, policy), TokenCache(model, policy)
            for cache in (single, block):
                model(ids, past_key_values=cache)
            # 30 tokens are seen: at most two more before the boundary at 32.
            assert block.room().tolist() == [2]
            for token in (5, 6):
                model(torch.tensor([[token]]), past_key_values=single, position_ids=single.seen[:, None])
            relation = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
            block.stage(relation=relation, deferred=True)
            model(torch.tensor([[5, 9, 6]]), past_key_values=block, position_ids=torch.tensor([[30, 31, 31]]))
            block.commit(torch.tensor([[0, 2]]), torch.tensor([2]))
            for one, two in zip(single.layers, block.layers, strict=True):
                assert one.size == two.size == 12
                assert torch.equal(one.slots.positions, two.slots.positions)
                assert torch.allclose(one.state["mass"], two.state["mass"], atol=1e-9)
                assert torch.allclose(one.keys, two.keys, atol=1e-9)

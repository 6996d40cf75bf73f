"""H2O's own invariants, as on its card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from tests import tiny
from tokenry.errors import BadParameter, CacheMisuse
from tokenry.kvcache import H2O
from tokenry.models import TokenCache, attached
from tokenry.speculation import PromptLookup


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


def _decoded(model, policy, inputs, steps=14, fork=False):
    """Logits of every step and the positions that each layer holds after it, rows in other order behind the prompt if
    forked."""
    logits, held = [], []
    with attached(model):
        cache = TokenCache(model, policy)
        mask = inputs["attention_mask"].bool()
        cache.stage(valid=None if bool(mask.all()) else mask)
        model(inputs["input_ids"], past_key_values=cache, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        if fork:
            cache.reorder_cache(torch.arange(len(mask)).flip(0))
        for step in range(steps):
            kept = cache.kept_positions()
            held.append(
                [[set(head[head >= 0].tolist()) for own in kept for head in own[row]] for row in range(len(mask))]
            )
            token = torch.full((len(mask), 1), 5 + step)
            out = model(token, past_key_values=cache, position_ids=cache.seen[:, None])
            logits.append(out.logits[:, -1])
    return torch.stack(logits), held, cache


@torch.no_grad()
@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma2"))
@pytest.mark.parametrize(
    "policy",
    (H2O(budget=9), H2O(budget=9, compact_every=4), H2O(budget=0.4), H2O(budget=9, normalise="count"), H2O(budget=30)),
    ids=str,
)
def test_real_drop_equals_mask_simulation(policy, kind):
    """Dropping slots and hiding them give the same keep sets and the same outputs, also in a padded batch."""
    model = tiny.model(kind, dtype=torch.float64)
    inputs = tiny.prompts((26, 17))
    drop, kept, cache = _decoded(model, policy, inputs, fork=True)
    hidden, simulated, whole = _decoded(model, replace(policy, variant="mask_simulation"), inputs, fork=True)
    assert kept == simulated
    assert torch.allclose(drop, hidden, atol=1e-9)
    full = [layer for layer in whole.layers if layer.window is None]
    assert all(layer.size == 40 for layer in full), "nothing is dropped"
    assert whole.nbytes() >= cache.nbytes()
    plain, _, _ = _decoded(model, H2O(budget=64), inputs, fork=True)
    assert not torch.allclose(drop, plain, atol=1e-3), "the budget must matter in this test"


@torch.no_grad()
def test_mask_simulation_generates_and_takes_nothing_back():
    model = tiny.model()
    inputs = tiny.prompts((40, 29))
    options = {"do_sample": False, "max_new_tokens": 16}
    simulated = H2O(budget=12, variant="mask_simulation")
    for extra in ({}, {"num_beams": 3}):
        with H2O(budget=12)(model):
            wanted = model.generate(**inputs, **options, **extra)
        with simulated(model):
            assert torch.equal(model.generate(**inputs, **options, **extra), wanted)
    spaced = replace(simulated, compact_every=8)
    with spaced(model):
        wanted = model.generate(**inputs, **options)
        drafted = model.generate(**inputs, **options, custom_generate=PromptLookup(), return_dict_in_generate=True)
    assert torch.equal(drafted.sequences, wanted)
    with pytest.raises(CacheMisuse, match="cannot go back"):
        drafted.past_key_values.crop(-1)
    with pytest.raises(BadParameter, match="variant must be real_drop where positions are rolling"):
        H2O(variant="mask_simulation", positions="rolling")


@dataclass(frozen=True, kw_only=True)
class _InOrder(H2O):
    """H2O whose slots are gathered in the order of time, as the official class for Llama does."""

    ordered: ClassVar[bool] = True


@torch.no_grad()
def test_a_slot_that_is_replaced_holds_the_set_of_sort_and_gather():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((26, 17))
    replaced, held, _ = _decoded(model, H2O(budget=9), inputs)
    gathered, wanted, _ = _decoded(model, _InOrder(budget=9), inputs)
    assert held == wanted and torch.allclose(replaced, gathered, atol=1e-9)
    for step, rows in enumerate(held):
        for row, heads in enumerate(rows):
            newest = {(25, 16)[row] + step - back for back in range(4)}
            assert all(len(head) == 9 and newest <= head for head in heads)


@torch.no_grad()
def test_without_a_recent_part_a_new_token_may_go_at_once():
    model = tiny.model()
    ids = tiny.prompts((30,))["input_ids"]
    gone = 0
    with H2O(budget=6, recent=0.0)(model):
        cache = model(ids).past_key_values
        for step in range(10):
            model(torch.tensor([[5 + step]]), past_key_values=cache)
            assert all(layer.size == 6 for layer in cache.layers)
            gone += sum(int((kept[..., -1] != 30 + step).sum()) for kept in cache.kept_positions())
    assert gone > 0

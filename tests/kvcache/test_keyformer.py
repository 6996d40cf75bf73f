"""Keyformer's own invariants, as on its card."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.kvcache.test_h2o import _eager
from tokenry.errors import BadParameter
from tokenry.kvcache import H2O, Keyformer
from tokenry.kvcache.keyformer import pair_noise, words
from tokenry.models import TokenCache, attached

PLAIN = {"noise": "none", "temperature": (1.0, 1.0)}


def fed(model, policy, ids, *more):
    """A cache that has read the prompt, then each of the further runs of tokens."""
    cache = TokenCache(model, policy)
    for run in (ids, *more):
        model(run, past_key_values=cache, position_ids=cache.total + torch.arange(run.shape[1])[None])
    return cache


@torch.no_grad()
def test_without_noise_at_a_temperature_of_one_it_is_h2o():
    model = tiny.model(dtype=torch.float64)
    with attached(model):
        ours, other = TokenCache(model, Keyformer(budget=20, **PLAIN)), TokenCache(model, H2O(budget=20, recent=0.3))
        for run in tiny.prompts((61,))["input_ids"].split([37, *[1] * 24], 1):
            for cache in (ours, other):
                model(run, past_key_values=cache, position_ids=cache.total + torch.arange(run.shape[1])[None])
            assert all(map(torch.equal, ours.kept_positions(), other.kept_positions()))
            for one, two in zip(ours.layers, other.layers, strict=True):
                masses = (each.state["mass"].gather(-1, each.slots.positions.argsort(-1)) for each in (one, two))
                assert torch.allclose(*masses, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("noise", ("gumbel", "gaussian"))
def test_score_is_the_noised_softmax_of_the_logits(noise):
    """One query head a KV head, as in the paper: the formula over logits, by brute force, prompt and decoding."""
    model = tiny.model("gpt2", torch.float64)
    policy = Keyformer(budget=64, noise=noise, rise=4, seed=3)
    ids = tiny.prompts((26,))["input_ids"]
    attentions = _eager(model, ids)
    with attached(model):
        cache = fed(model, policy, *ids.split([20, 1, 1, 1, 1, 1, 1], 1))
    places = torch.arange(26)
    steps = (places - 19).clamp(min=0)
    tau = 1 + (steps / 4).clamp(max=1).double()
    for layer, probabilities in zip(cache.layers, attentions, strict=True):
        queries, slots = (words(places[None], policy._salts(side, 4, ids.device)) for side in (1 + layer.number, 0))
        uniform = pair_noise(queries, slots).double()
        z = -torch.log(-torch.log(uniform))
        if noise == "gaussian":
            z = 0.5772156649 + torch.pi / 6**0.5 * torch.distributions.Normal(0, 1).icdf(uniform)
        # A row of logits is the logarithm of its probabilities, up to a number that the softmax takes away.
        noised = ((probabilities.log() + z) / tau[:, None]).softmax(-1)
        assert torch.allclose(layer.state["mass"], noised.sum(2), atol=1e-5)
        assert torch.equal(layer.state["step"][0, 0], steps.to(layer.state["step"].dtype))


@torch.no_grad()
def test_every_query_head_adds_one_for_each_row():
    model = tiny.model()
    ids = tiny.prompts((42,))["input_ids"]
    with attached(model):
        for options in ({}, {"noise": "gaussian"}, {"temperature": (0.2, 9.0), "rise": 2}, PLAIN):
            cache = fed(model, Keyformer(budget=64, **options), *ids.split([37, 1, 1, 3], 1))
            for layer in cache.layers:
                assert torch.allclose(layer.state["mass"].sum(-1), torch.tensor(42.0 * 2), atol=1e-3)


@torch.no_grad()
def test_extreme_temperatures_count_and_vote():
    model = tiny.model()
    ids = tiny.prompts((37,))["input_ids"]
    with attached(model):
        hot = fed(model, Keyformer(budget=64, temperature=(1e7, 1e7)), ids)
        cold = fed(model, Keyformer(budget=64, noise="none", temperature=(1e-3, 1e-3)), ids)
        kept = fed(model, Keyformer(budget=12, temperature=(1e7, 1e7)), ids).kept_positions()[0]
    uniform = (1 / torch.arange(1.0, 38)).flip(0).cumsum(0).flip(0)
    assert torch.allclose(hot.layers[0].state["mass"][0], 2 * uniform.expand(2, -1), atol=1e-3)
    assert torch.equal(kept[0, 0], torch.tensor([*range(8), *range(33, 37)])), "the oldest and the newest"
    groups = _eager(model, ids)[0][0].view(2, 2, 37, 37).sum(1)
    votes = torch.nn.functional.one_hot(groups.argmax(-1), 37).sum(1).float()
    assert torch.allclose(cold.layers[0].state["mass"][0], 2 * votes, atol=0.5)


def test_noise_is_gumbel_and_independent():
    """20,000 draws; every bound is more than 4 standard deviations wide, so a sound generator fails one of the 40
    comparisons with probability below 0.003 over seeds; the seed is fixed."""
    draws = 20_000
    places = torch.tensor([[5, 6, 7, 1000, 30_000, 31_000, 40_000, 50_000]])
    salts = (Keyformer()._salts(side, 2, places.device) for side in (1, 0))
    uniform = pair_noise(
        *(words(each, salt) for each, salt in zip((torch.arange(draws)[None], places), salts, strict=True))
    )
    assert uniform.shape == (1, 2, draws, 8) and float(uniform.min()) > 0 and float(uniform.max()) < 1
    z = -torch.log(-torch.log(uniform))[0, 0]
    assert torch.allclose(z.mean(0), torch.tensor(0.5772), atol=0.04)
    assert torch.allclose(z.var(0), torch.tensor(torch.pi**2 / 6), atol=0.12)
    # Pairs of slots, and the same pair in two heads or two queries that follow each other, go their own ways.
    columns = torch.cat([z, uniform[0, 1].log(), z.roll(1, 0)], 1)
    correlation = torch.corrcoef(columns.T) - torch.eye(24)
    assert float(correlation.abs().max()) < 5 / draws**0.5
    # Gumbel-max: the largest noised logit is a sample of the softmax.
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2])
    shares = torch.nn.functional.one_hot((logits + z).argmax(-1), 8).float().mean(0)
    assert torch.allclose(shares, logits.softmax(0), atol=0.015)


@torch.no_grad()
def test_seed_layer_and_head_decide_the_noise():
    model = tiny.model()
    ids = tiny.prompts((60,))["input_ids"]
    with attached(model):
        once, again, other = (fed(model, Keyformer(budget=16, seed=seed), ids).kept_positions() for seed in (0, 0, 1))
        masses = [layer.state["mass"] for layer in fed(model, Keyformer(budget=64, temperature=(9e9, 9e9)), ids).layers]
    assert all(map(torch.equal, once, again))
    assert not all(map(torch.equal, once, other))
    assert torch.allclose(masses[0], masses[1], atol=1e-3), "a temperature without end takes noise and logits away"
    salts = torch.cat([Keyformer(seed=seed)._salts(side, 8, ids.device) for seed in range(3) for side in range(64)])
    assert salts.unique().numel() == salts.numel()


@torch.no_grad()
def test_chunks_of_a_prompt_and_a_further_turn_do_not_raise_the_temperature():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((50,))["input_ids"]
    policy = Keyformer(budget=64, rise=5)
    with attached(model):
        whole = fed(model, policy, ids)
        chunks = fed(model, policy, *ids.split([16, 16, 18], 1))
        turns = fed(model, policy, *ids.split([40, 1, 1, 8], 1))
    for one, two, three in zip(whole.layers, chunks.layers, turns.layers, strict=True):
        assert torch.allclose(one.state["mass"], two.state["mass"], atol=1e-5)
        assert three.state["step"][0, 0, 38:].tolist() == [0, 0, 1, 2, *[2] * 8]


@torch.no_grad()
def test_verify_step_equals_single_steps():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((30,))["input_ids"]
    policy = Keyformer(budget=12, compact_every=8, rise=3)
    with attached(model):
        single, block = fed(model, policy, ids), fed(model, policy, ids)
        for token in (5, 6):
            model(torch.tensor([[token]]), past_key_values=single, position_ids=single.seen[:, None])
        relation = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
        block.stage(relation=relation, deferred=True)
        model(torch.tensor([[5, 9, 6]]), past_key_values=block, position_ids=torch.tensor([[30, 31, 31]]))
        block.commit(torch.tensor([[0, 2]]), torch.tensor([2]))
    for one, two in zip(single.layers, block.layers, strict=True):
        assert one.size == two.size == 12
        assert torch.equal(one.state["word"], two.state["word"])
        assert torch.equal(one.slots.places(1, one.device), two.slots.places(1, two.device))
        for name in ("mass", "step"):
            assert torch.allclose(one.state[name], two.state[name], atol=1e-6)


@torch.no_grad()
def test_half_precision_scores_in_float32():
    model = tiny.model(dtype=torch.bfloat16)
    with attached(model):
        cache = fed(model, Keyformer(budget=64), tiny.prompts((37,))["input_ids"])
    assert cache.layers[0].state["mass"].dtype == torch.float32
    assert torch.allclose(cache.layers[0].state["mass"].sum(-1), torch.tensor(74.0), atol=1e-2)


def test_bad_values_are_refused():
    for options in ({"temperature": (0.0, 2.0)}, {"rise": 0}, {"recent": 1.2}, {"budget": 4}, {"noise": "uniform"}):
        with pytest.raises(BadParameter, match=next(iter(options))):
            Keyformer(**options)

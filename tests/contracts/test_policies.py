"""What every cache policy promises beyond the engine's own tests: it combines with every decoder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import tiny
from tests.contracts.registered import at_hand, drafters, made, registered
from tests.contracts.test_decoders import TOKENIZER, generate
from tokenry.errors import BudgetTooSmall, UnsupportedModel
from tokenry.methods import parameters

CLASSES = registered("policy")
# Parameters beyond the defaults that change how state is kept.
VARIANTS = {"h2o": ({"decay": 0.7}, {"normalise": "count"}), "random": ({"recent": 0.1},)}
VARIANTS["spatten"] = ({"heads": 0.5, "values": 0.5, "msb": 4},)
EVERY = [made(cls) for cls in registered("decoder")]
DRAFTERS = [made(cls) for cls in drafters()]
SERVED = [kind for kind in tiny.SERVED if kind != "mistral"]
# Defaults that protect more tokens than a tiny budget has.
SMALLER = {"snapkv": {"window": 8}, "fasa": {"budget": 4}, "oracle": {"budget": 4}}
# Two pages beside the first one and the newest, in every layer.
SMALLER["icecache"] = {"budget": 20, "page": 4, "sink_pages": 1, "dense_layers": 0, "cells": 3}
# A tiny model has no tokenizer to say which ids end a sentence.
SMALLER["sentencekv"] = {"budget": 6, "start": 1, "recent": 2, "window": 4, "ends": tuple(range(3, 20))}
# The same budget in every layer of a tiny model, as all others have it.
SMALLER["spatten"] = {"dense": 0, "spread": 0.0}
# Its adapters find their rows by the number in the forward; LazyLLM runs tokens of earlier forwards in front of them.
REFUSED = {("lazyllm", "gated-lora-mtp")}
# Policies that drop tokens; the others choose those that a step attends to.
DROPPING = [cls for cls in CLASSES if cls.drops]


def small(cls, **options):
    """A policy with a budget that a tiny test exceeds."""
    options = {"budget": 24} | SMALLER.get(cls.slug, {}) | options
    return cls(**{name: value for name, value in options.items() if name in parameters(cls)})


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.slug)
def test_budget_above_the_length_is_plain(cls, kind):
    model = tiny.model(kind)
    at_hand(cls, model, kind, exact=True)
    inputs = tiny.prompts((40, 21))
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    with small(cls, budget=128)(model):
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=16), wanted)
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("cls", DROPPING, ids=lambda cls: cls.slug)
def test_every_full_attention_layer_keeps_its_budget(cls, kind):
    model = tiny.model(kind)
    for every in (1, 6):
        policy = small(cls, compact_every=every)
        with policy(model):
            result = model.generate(
                **tiny.prompts((60, 41)), do_sample=False, max_new_tokens=30, return_dict_in_generate=True
            )
        full = [layer for layer in result.past_key_values.layers if layer.window is None]
        assert full and all(layer.size <= 24 + every - 1 for layer in full)


def combinations():
    """Every policy with every drafter over a padded batch. What other architectures and a single row add does not
    depend on both: a drafter of trees stands for all on the architectures, h2o for all policies of a single row."""
    for cls in CLASSES:
        for options in ({}, *VARIANTS.get(cls.slug, ())):
            for method in DRAFTERS:
                trees = method.slug == "token-recycling"
                kinds = ("llama", "qwen3", "gpt2") if trees else ("llama",)
                cases = [(kind, (60, 47)) for kind in kinds]
                if trees or (cls.slug == "h2o" and not options):
                    cases.append(("llama", (60,)))
                for kind, lengths in cases:
                    name = f"{cls.slug}-{'-'.join(options) or 'defaults'}-{method}-{kind}-{lengths}"
                    yield pytest.param(cls, options, method, kind, lengths, id=name)


@pytest.mark.parametrize(("cls", "options", "method", "kind", "lengths"), list(combinations()))
def test_a_drafter_inside_equals_the_policy_alone(cls, options, method, kind, lengths):
    """Same policy, same `compact_every`, no drafts: the same tokens, exactly."""
    model = tiny.model(kind, torch.float64)
    at_hand(cls, model, kind)
    inputs = tiny.prompts(lengths)
    # A repetition in the prompt gives every drafter something to accept.
    inputs["input_ids"][:, -16:-8] = inputs["input_ids"][:, -8:]
    policy = small(cls, compact_every=8, **options)
    if (cls.slug, method.slug) in REFUSED:
        with policy(model), pytest.raises(UnsupportedModel, match="every token in order"):
            generate(method, model, inputs, max_new_tokens=28)
        return
    with policy(model):
        wanted = model.generate(**inputs, do_sample=False, max_new_tokens=28)
        got = generate(method, model, inputs, max_new_tokens=28, return_dict_in_generate=True)
    assert torch.equal(got.sequences, wanted)
    if cls.drops:
        assert all(layer.size <= 31 for layer in got.past_key_values.layers if layer.window is None)
    if len(lengths) == 1:
        free = model.generate(**inputs, do_sample=False, max_new_tokens=28)
        assert not torch.equal(free, wanted), "the budget must matter in this test"


def pairs():
    """Every policy with every decoder. Drafters stand beside each policy above: sampled, they need one that drops
    tokens and one that retrieves them."""
    for cls in CLASSES:
        for method in EVERY:
            if method not in DRAFTERS or cls.slug in ("h2o", "sentencekv"):
                yield pytest.param(cls, method, id=f"{cls.slug}-{method}")


@pytest.mark.parametrize(("cls", "method"), list(pairs()))
def test_every_decoder_runs_inside(cls, method):
    model = tiny.model()
    at_hand(cls, model)
    if (cls.slug, method.slug) in REFUSED:
        pytest.skip("refused, as asserted above")
    with small(cls, compact_every=4)(model):
        result = generate(method, model, tiny.prompts((60, 47)), do_sample=True, seed=0, return_dict_in_generate=True)
    assert result.sequences.shape == (2, 80)
    if cls.drops:
        assert all(layer.size <= 27 for layer in result.past_key_values.layers if layer.window is None)
    assert TOKENIZER.decode(result.sequences[0, 60:])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.slug)
def test_a_policy_is_a_frozen_value(cls):
    import pickle

    policy = small(cls)
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.budget = 3  # type: ignore[misc]
    if "budget" in parameters(cls):
        with pytest.raises(BudgetTooSmall, match="at least"):
            cls(budget=0)

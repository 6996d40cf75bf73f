"""Offloading: older keys and values in the CPU's memory, and a staging area for what steps attend to.

Both sides are the CPU here; what is copied is counted all the same.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests import tiny
from tests.kvcache import test_engine_retrieval as engine
from tokenry.errors import BadParameter
from tokenry.kvcache import FASA, H2O, IceCache, Oracle, SentenceKV
from tokenry.methods import method
from tokenry.models.storage import Offloaded

POLICIES = (
    FASA(budget=12, dense_layers=0),
    FASA(budget=12, per="kv", recent=2),
    Oracle(budget=12, per="kv"),
    SentenceKV(budget=12, start=1, recent=2, window=8, kernel=3, ends=tuple(range(3, 20))),
    IceCache(budget=24, page=4, sink_pages=1, dense_layers=1, cells=3),
    IceCache(budget=24, page=4, sink_pages=1, dense_layers=0, cells=2, reuse=2),
)
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)
GREEDY = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True, "output_logits": True}


def offloaded(policy):
    return dataclasses.replace(policy, offload=True)


@pytest.fixture
def few_stay(monkeypatch):
    """The newest few tokens stay on the model's device, so that short texts are offloaded."""
    monkeypatch.setattr("tokenry.models.layer._GROWTH", 4)


def check_staging(cache):
    """What is staged is what stands in the CPU's memory, and every place is known by its slot."""
    for layer in cache.layers:
        far = layer.far
        if far is None or far.resident is None:
            continue
        groups = far.resident.shape[1] // far._parts[0].shape[1]
        for row, set_, place in (far.resident >= 0).nonzero().tolist():
            slot = int(far.resident[row, set_, place])
            assert slot < far.size == layer._base
            assert int(far._place[row, set_, slot]) == place
            for part, staged in zip(far._parts, far.staged, strict=True):
                assert torch.equal(staged[row, set_, place], part[row, set_ // groups, slot])
        assert int((far._place >= 0).sum()) == int((far.resident >= 0).sum())


@every_policy
@pytest.mark.parametrize("kind", ("llama", "gemma2"))
def test_on_equals_off_bit_for_bit(policy, kind, few_stay):
    model = tiny.model(kind)
    for lengths in ((60,), (60, 33)):
        inputs = tiny.prompts(lengths)
        with policy(model):
            wanted = model.generate(**inputs, **GREEDY)
        with offloaded(policy)(model):
            got = model.generate(**inputs, **GREEDY)
        assert torch.equal(got.sequences, wanted.sequences)
        assert torch.equal(torch.stack(got.logits), torch.stack(wanted.logits))
        cache = got.past_key_values
        assert cache.copied_slots() > 0
        check_staging(cache)
        for layer in cache.layers:
            ruled = layer.window is None and layer.number >= getattr(policy, "dense_layers", 0)
            assert (layer.far is not None) == ruled
            assert not ruled or (layer.size - layer._base <= 8 and layer.far.size > 80)
        assert cache.get_seq_length() == wanted.past_key_values.get_seq_length()


def test_a_step_copies_what_was_not_staged_and_the_same_step_nothing():
    generator = torch.Generator().manual_seed(0)
    store = Offloaded(torch.device("cpu"))
    keys, values = torch.randn(2, 2, 50, 8, generator=generator), torch.randn(2, 2, 50, 6, generator=generator)
    store.append(keys[:, :, :30], values[:, :, :30])
    for step in range(60):
        if step % 10 == 9 and store.size < 50:
            store.append(keys[:, :, store.size : store.size + 5], values[:, :, store.size : store.size + 5])
        rows, chosen = (1, 8) if step % 3 else (3, 4)
        slots = torch.randint(store.size, (2, 4, rows, chosen), generator=generator)
        here = torch.rand(slots.shape, generator=generator) < 0.8
        before = torch.full((2, 4, 0), -1) if store.resident is None else store.resident.clone()
        copied = store.copied
        got = store.fetch(slots, here)
        missing = 0
        for row in range(2):
            for set_ in range(4):
                wanted = set(slots[row, set_][here[row, set_]].tolist())
                missing += len(wanted - set(before[row, set_].tolist()))
                for part, whole in zip(got, (keys, values), strict=True):
                    own = here[row, set_]
                    assert torch.equal(part[row, set_][own], whole[row, set_ // 2][slots[row, set_][own]])
        assert store.copied - copied == missing
        again = store.fetch(slots, here)
        assert store.copied - copied == missing, "what is staged is not copied again"
        assert all(torch.equal(one[here], two[here]) for one, two in zip(got, again, strict=True))
    # A place for each slot that a step wants, and no more.
    assert store.resident.shape[-1] <= 12


@torch.no_grad()
def test_device_bytes_do_not_grow_with_the_text():
    model = tiny.model()
    policy = IceCache(budget=20, page=4, sink_pages=1, dense_layers=0, offload=True)
    slot = 2 * 2 * 8 * 4  # keys and values, KV heads, head size, bytes of a float32
    for length in (200, 400):
        with policy(model):
            cache = model(tiny.prompts((length,))["input_ids"]).past_key_values
            # One layer at a time holds the whole prompt.
            assert cache.peak_nbytes == slot * (length + 2 * 64)
            for token in range(5, 15):
                model(torch.tensor([[token]]), past_key_values=cache)
        assert cache.nbytes() <= 3 * slot * (64 + 10 + 20)
        assert cache.offloaded_nbytes() == 3 * slot * (length - 64)
        assert cache.nbytes() == sum(
            slot * (layer.size - layer._base) + layer.far.staged_nbytes for layer in cache.layers
        )


@every_policy
def test_every_row_of_drafts_retrieves_as_a_single_step(policy, few_stay):
    if policy.slug in ("fasa", "oracle"):
        engine.test_every_row_of_drafts_retrieves_as_a_single_step(offloaded(policy))
    elif policy.slug == "icecache":
        from tests.kvcache.test_icecache import test_every_row_of_drafts_retrieves_as_a_single_step as check

        check(offloaded(policy))
    else:
        from tests.kvcache.test_sentencekv import test_every_row_of_drafts_retrieves_as_a_single_step as check

        check(offloaded(policy))


def step(model, cache, ids):
    """Logits of one token; padding is known from the prompt."""
    mask = torch.ones(ids.shape[0], cache.total + 1, dtype=torch.long)
    positions = cache.seen[:, None]
    return model(ids, attention_mask=mask, past_key_values=cache, position_ids=positions).logits[:, -1]


@every_policy
@torch.no_grad()
def test_reorder_fork_and_crop_carry_what_is_away(policy, few_stay):
    model = tiny.model(dtype=torch.float64)
    text = tiny.prompts((40, 33))
    places = (text["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    caches = []
    for each in (policy, offloaded(policy)):
        with each(model):
            cache = model(**text, position_ids=places).past_key_values
            outputs = [step(model, cache, torch.tensor([[5], [6]])) for _ in range(3)]
            twin = copy.deepcopy(cache)
            twin.reorder_cache(torch.tensor([1, 0]))
            outputs += [step(model, twin, torch.tensor([[7], [8]])).flip(0)]
            outputs += [step(model, cache, torch.tensor([[8], [7]]))]
            assert torch.allclose(outputs[-1], outputs[-2], atol=1e-9)
            # Tokens that are away already, too.
            cache.crop(-9)
            if each.offload:
                assert all(layer.far is None or layer.far.size <= layer.size for layer in cache.layers)
            outputs += [step(model, cache, torch.tensor([[9], [10]]))]
            caches.append(outputs)
            if each.offload:
                check_staging(cache)
    for one, two in zip(*caches, strict=True):
        assert torch.allclose(one, two, atol=1e-9)


@every_policy
@torch.no_grad()
def test_a_further_turn_brings_everything_back(policy, few_stay):
    model = tiny.model(dtype=torch.float64)
    first, second = tiny.prompts((40,))["input_ids"], tiny.prompts((9,), seed=5)["input_ids"]
    outputs = []
    for each in (policy, offloaded(policy)):
        with each(model):
            cache = model(first).past_key_values
            model(torch.tensor([[5]]), past_key_values=cache)
            outputs.append(model(second, past_key_values=cache).logits)
            outputs.append(model(torch.tensor([[6]]), past_key_values=cache).logits)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-9) and torch.allclose(outputs[1], outputs[3], atol=1e-9)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype, few_stay):
    model = tiny.model(dtype=dtype)
    inputs = tiny.prompts((40, 29))
    for policy in POLICIES[-2:]:
        with policy(model):
            wanted = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        with offloaded(policy)(model):
            assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=20), wanted)


def test_two_threads_with_a_cache_each(few_stay):
    import threading

    model = tiny.model()
    policy = offloaded(POLICIES[4])
    prompts = [tiny.prompts((60,), seed=seed)["input_ids"] for seed in (1, 2)]
    with policy(model):
        wanted = [model.generate(ids, do_sample=False, max_new_tokens=20) for ids in prompts]
    got = [None, None]

    def run(number):
        with policy(model):
            got[number] = model.generate(prompts[number], do_sample=False, max_new_tokens=20)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, two) for one, two in zip(got, wanted, strict=True))


def test_it_is_written_in_the_text_form_and_refused_where_it_cannot_be():
    assert method("icecache:offload=true").offload and str(IceCache(offload=True)) == "icecache:offload=true"
    with pytest.raises(BadParameter, match="offload"):
        IceCache(offload=True, bits=8)
    with pytest.raises(BadParameter, match="offload"):
        method("h2o:offload=true")
    assert not hasattr(H2O(), "offload")

"""Quantised storage: older keys and values in codes of 8 or 4 bits, under any policy."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from tests import tiny
from tests.kvcache import test_engine as evicting
from tests.kvcache import test_engine_retrieval as retrieving
from tokenry.errors import BadParameter, UnsupportedModel
from tokenry.kvcache import FASA, H2O, IceCache, Keyformer, Oracle, SentenceKV, Sinks, TreeKV
from tokenry.methods import method
from tokenry.models import TokenLayer
from tokenry.models.storage import dequantised, quantised

EVICT = (
    partial(H2O, bits=8, residual=5),
    partial(Sinks, bits=4, residual=8),
    partial(Keyformer, bits=8, residual=3),
    partial(TreeKV, sinks=2, block=4, bits=4, residual=4),
)
RETRIEVE = (
    FASA(budget=12, dense_layers=0, bits=8, residual=5),
    Oracle(budget=12, bits=4, residual=8),
    SentenceKV(budget=12, start=1, recent=2, window=4, kernel=3, ends=tuple(range(3, 20)), bits=8, residual=4),
    IceCache(budget=24, page=4, sink_pages=1, dense_layers=1, bits=8, residual=6),
)
name = {"ids": lambda made: str(made(budget=12)) if isinstance(made, partial) else str(made)}
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.mark.parametrize("size", (8, 64, 96, 128))
@pytest.mark.parametrize("bits", (4, 8))
def test_codes_are_within_half_a_step(bits, size):
    tensor = torch.randn(2, 3, 20, size, generator=torch.Generator().manual_seed(0)) * 3
    tensor[0, 0, 0] = 1.25  # a group of equal numbers
    coded = quantised(tensor, bits)
    back = dequantised(**coded, bits=bits, dtype=tensor.dtype)
    group = 64 if size % 64 == 0 else size
    assert coded["codes"].dtype == torch.uint8 and coded["codes"].shape[-1] == size * bits // 8
    assert coded["scale"].shape == coded["low"].shape == (2, 3, 20, size // group)
    groups = tensor.unflatten(-1, (-1, group))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    assert bool(((back - tensor).unflatten(-1, (-1, group)).abs() <= step[..., None] * 0.5001 + 1e-6).all())
    assert torch.equal(back[0, 0, 0], tensor[0, 0, 0])
    # A slot's codes do not depend on its neighbours, so that slots may be moved.
    alone = quantised(tensor[:, :, 7:8], bits)
    assert all(torch.equal(alone[part], coded[part][:, :, 7:8]) for part in coded)


def recorded(monkeypatch):
    """Keys and values of every layer as they came, ``{layer: [(keys, values), ...]}``."""
    came = {}
    update = TokenLayer.update

    def recording(self, key_states, value_states, *args, **kwargs):
        came.setdefault(self.number, []).append((key_states.clone(), value_states.clone()))
        return update(self, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(TokenLayer, "update", recording)
    return came


def as_read(layer, came, bits):
    """What every slot must read as: as it came, or coded once, by its position."""
    parts = []
    positions = layer.slots.places(1, layer.device).expand(1, 2, -1)
    seen = int(layer.cache.seen[0])
    start = seen - seen % layer._residual
    for part in zip(*came, strict=True):
        whole = torch.cat(part, 2)
        coded = dequantised(**quantised(whole, bits), bits=bits, dtype=whole.dtype)
        read = torch.where((torch.arange(whole.shape[2]) >= start)[:, None], whole, coded)
        parts.append(read.gather(2, positions[..., None].expand(-1, -1, -1, read.shape[-1])))
    return parts


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("policy", (*EVICT, *RETRIEVE), **name)
@torch.no_grad()
def test_every_slot_is_coded_once_whatever_is_dropped(policy, dtype, monkeypatch):
    model = tiny.model(dtype=dtype)
    policies = [policy(budget=11, compact_every=every) for every in (1, 4)] if isinstance(policy, partial) else [policy]
    for each in policies:
        came = recorded(monkeypatch)
        with each(model):
            model(tiny.prompts((3,))["input_ids"])
            came.clear()  # what tried and calibrated the model
            cache = model(tiny.prompts((30,))["input_ids"]).past_key_values
            for step in range(25):
                model(torch.tensor([[5 + 3 * step]]), past_key_values=cache)
                for layer in cache.layers:
                    for got, wanted in zip(layer.held(), as_read(layer, came[layer.number], each.bits), strict=True):
                        assert torch.equal(got, wanted)
                    slots = torch.arange(layer.size).flip(0).expand(1, 2, 1, -1)
                    for got, wanted in zip(layer.fetch(slots), layer.held(), strict=True):
                        assert torch.equal(got[:, :, 0].flip(2), wanted)
        monkeypatch.undo()


@pytest.mark.parametrize("policy", EVICT, **name)
@pytest.mark.parametrize("kind", ("llama", "gemma2"))
def test_row_of_a_padded_batch_equals_the_row_alone(policy, kind):
    evicting.test_row_of_a_padded_batch_equals_the_row_alone(policy, kind)


@pytest.mark.parametrize("policy", RETRIEVE, **name)
def test_row_of_a_padded_batch_equals_the_row_alone_where_steps_retrieve(policy):
    model = tiny.model()
    with policy(model):
        for lengths in ((40, 29), (6, 40)):
            inputs = tiny.prompts(lengths)
            both = model.generate(**inputs, **GREEDY)
            for row, length in enumerate(lengths):
                alone = model.generate(inputs["input_ids"][row : row + 1, -length:], **GREEDY)
                assert torch.equal(both[row, -24:], alone[0, -24:])


@pytest.mark.parametrize("policy", EVICT, **name)
def test_fork_reorder_and_select_carry_the_codes(policy):
    evicting.test_fork_reorder_and_select_carry_the_state(policy)


@pytest.mark.parametrize("policy", RETRIEVE[:2], **name)
def test_fork_reorder_select_and_crop_carry_the_codes(policy):
    retrieving.test_reorder_fork_and_select_carry_the_index(policy)


@pytest.mark.parametrize("policy", (*EVICT, *RETRIEVE), **name)
def test_a_drafter_inside_equals_the_policy_alone(policy):
    from tokenry.speculation import TokenRecycling

    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((60, 47))
    inputs["input_ids"][:, -16:-8] = inputs["input_ids"][:, -8:]
    policy = policy(budget=24, compact_every=6) if isinstance(policy, partial) else policy
    with policy(model):
        wanted = model.generate(**inputs, do_sample=False, max_new_tokens=40)
        got = model.generate(**inputs, do_sample=False, max_new_tokens=40, custom_generate=TokenRecycling())
    assert torch.equal(got, wanted)
    assert not torch.equal(wanted[:1], model.generate(inputs["input_ids"][:1], do_sample=False, max_new_tokens=40))


@torch.no_grad()
def test_what_is_not_coded_yet_is_exact_and_beams_run():
    model = tiny.model()
    inputs = tiny.prompts((40, 29))
    for options in (GREEDY, GREEDY | {"num_beams": 3}):
        wanted = model.generate(**inputs, **options)
        for policy in (H2O(budget=128, bits=4), Oracle(budget=128, bits=4)):
            with policy(model):
                assert torch.equal(model.generate(**inputs, **options), wanted)
        with H2O(budget=16, bits=8, residual=8)(model):
            assert model.generate(**inputs, **options).shape == wanted.shape


@torch.no_grad()
def test_tokens_behind_a_crop_are_read_as_they_are():
    model, ids = tiny.model(dtype=torch.float64), tiny.prompts((60,))["input_ids"]
    with Oracle(budget=200, bits=8, residual=16)(model):
        cache = model(ids[:, :40]).past_key_values
        for place in range(40, 52):
            model(ids[:, place : place + 1], past_key_values=cache)
        layer = cache.layers[1]
        cache.crop(-9)
        coded = layer.held()[0].clone()
        model(ids[:, 43:47], past_key_values=cache)
        keys, near = layer.held()[0], layer._near()[0]
        assert torch.equal(keys[:, :, :43], coded)
        assert torch.equal(keys[:, :, 43:], near[:, :, 43 - layer._base :])


@torch.no_grad()
def test_codes_of_8_bits_change_outputs_less_than_codes_of_4():
    model = tiny.model(dtype=torch.float64)
    text, more = tiny.prompts((64,))["input_ids"], tiny.prompts((20,), seed=4)["input_ids"]
    plain = model(torch.cat([text, more], 1)).logits[:, 64:]
    errors = {}
    for bits in (8, 4):
        with Sinks(budget=128, bits=bits, residual=16)(model):
            cache = model(text).past_key_values
            steps = [model(token, past_key_values=cache).logits for token in more.split(1, 1)]
        errors[bits] = float((torch.cat(steps, 1) - plain).abs().mean())
    # Steps are 17 times as wide; which way roundings go leaves room for a factor of 4 around it.
    assert 0 < 4 * errors[8] < errors[4]


@torch.no_grad()
def test_bytes_are_those_of_codes_and_of_the_newest_tokens():
    model = tiny.model()
    slot = 3 * 2 * 2  # layers, KV heads, keys and values
    for bits, code in ((8, 8), (4, 4)):
        with H2O(budget=32, bits=bits, residual=16)(model):
            cache = model(tiny.prompts((100,))["input_ids"]).past_key_values
            for step in range(40):
                # Codes of 8 numbers with a scale and a lowest value; those since the last multiple of 16 as they came.
                exact = (100 + step) % 16
                assert cache.nbytes() == slot * (32 * (code + 4 + 4) + exact * 8 * 4)
                model(torch.tensor([[3 + step]]), past_key_values=cache)
    # A head of 128 numbers in bfloat16: 256 bytes, or 64 and 16 for two groups.
    coded = quantised(torch.randn(1, 1, 1, 128).bfloat16(), 4)
    assert sum(part.numel() * part.element_size() for part in coded.values()) == 80


@torch.no_grad()
def test_a_fork_does_not_share_codes():
    model = tiny.model()
    with H2O(budget=12, bits=8, residual=4)(model):
        cache = model(tiny.prompts((30,))["input_ids"]).past_key_values
        twin = copy.deepcopy(cache)
        before = [layer.held()[0].clone() for layer in twin.layers]
        for token in range(5, 15):
            model(torch.tensor([[token]]), past_key_values=cache)
        assert all(torch.equal(layer.held()[0], keys) for layer, keys in zip(twin.layers, before, strict=True))


def test_it_is_written_in_the_text_form_and_refused_where_it_cannot_be():
    assert method("h2o:bits=8").bits == 8 and str(H2O(bits=4, residual=32)) == "h2o:bits=4;residual=32"
    for wrong in ({"bits": 3}, {"residual": 0}, {"bits": 8, "positions": "rolling"}):
        with pytest.raises(BadParameter):
            H2O(**wrong)
    with pytest.raises(UnsupportedModel, match="use bits=8"):
        quantised(torch.zeros(1, 1, 1, 5), 4)

"""The retrieve kind: nothing is dropped, and each decode step attends to slots of its choice."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import tiny
from tokenry.errors import CacheMisuse
from tokenry.kvcache import FASA, Oracle
from tokenry.models import TokenCache, attached

POLICIES = (FASA(budget=8), FASA(budget=8, per="kv", recent=2), Oracle(budget=8), Oracle(budget=8, per="kv"))
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)
GREEDY = {"do_sample": False, "max_new_tokens": 20}


@pytest.mark.parametrize("kind", [k for k in tiny.SERVED if k != "mistral"])
@pytest.mark.parametrize("policy", (FASA, Oracle))
def test_budget_above_the_length_equals_the_plain_model(policy, kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((40, 29))
    for options in (GREEDY, GREEDY | {"num_beams": 3}):
        wanted = model.generate(**inputs, **options)
        with policy(budget=64)(model):
            assert torch.equal(model.generate(**inputs, **options), wanted)


@every_policy
@pytest.mark.parametrize("kind", ("llama", "gemma2", "gpt2"))
def test_row_of_a_padded_batch_equals_the_row_alone_and_chunks_the_whole(policy, kind):
    model = tiny.model(kind)
    free = model.generate(tiny.prompts((40,))["input_ids"], **GREEDY)
    with policy(model):
        for lengths in ((40, 29), (6, 40)):
            inputs = tiny.prompts(lengths)
            both = model.generate(**inputs, **GREEDY)
            for row, length in enumerate(lengths):
                ids = inputs["input_ids"][row : row + 1, -length:]
                alone = model.generate(ids, **GREEDY)
                assert torch.equal(both[row, -20:], alone[0, -20:])
                assert torch.equal(alone, model.generate(ids, **GREEDY, prefill_chunk_size=16))
        if kind != "gemma2":  # whose one full-attention layer decides no token here
            assert not torch.equal(free, model.generate(tiny.prompts((40,))["input_ids"], **GREEDY))


@every_policy
@torch.no_grad()
def test_reorder_fork_and_select_carry_the_index(policy):
    model = tiny.model(dtype=torch.float64)
    with policy(model):
        cache = model(**tiny.prompts((40, 33))).past_key_values
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 0]))
        token = torch.tensor([[5], [6]])
        for _ in range(8):
            mask = torch.ones(2, cache.total + 1, dtype=torch.long)
            one = model(token, attention_mask=mask, past_key_values=cache, position_ids=cache.seen[:, None])
            two = model(token.flip(0), attention_mask=mask, past_key_values=twin, position_ids=twin.seen[:, None])
            assert torch.allclose(one.logits, two.logits.flip(0), atol=1e-9)
        fewer = copy.deepcopy(cache)
        fewer.crop(-3)
        again = model(token, attention_mask=mask[:, :-2], past_key_values=fewer, position_ids=fewer.seen[:, None])
        assert torch.isfinite(again.logits).all()


@every_policy
def test_assisted_generation_is_refused_where_its_drafts_would_see_everything(policy):
    model, assistant = tiny.model(), tiny.model(seed=1)
    ids = tiny.prompts((40,))["input_ids"]
    with policy(model), pytest.raises(CacheMisuse, match="attended to everything"):
        model.generate(ids, **GREEDY, assistant_model=assistant)
    with policy(model), torch.no_grad():
        cache = model(ids).past_key_values
        model(ids[:, :6], past_key_values=cache)
        twin = cache.fork()
        twin.crop(-6)
        twin.crop(-2)
        assert twin.length == 38
        with pytest.raises(CacheMisuse, match="take back the whole turn"):
            cache.crop(-2)


def test_known_bytes_count_what_layers_share_once():
    model = tiny.model()
    with Oracle(budget=12)(model), torch.no_grad():
        cache = model(**tiny.prompts((40, 29))).past_key_values
    assert cache.state_nbytes() == 2 * 40 * (1 + 8)


@every_policy
@torch.no_grad()
def test_every_row_of_drafts_retrieves_as_a_single_step(policy):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((30, 24))
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with attached(model):
        single, block = TokenCache(model, policy), TokenCache(model, policy)
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        for cache in (single, block):
            model(**inputs, past_key_values=cache, position_ids=places)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
        steps = [
            model(
                tokens[:, i : i + 1], attention_mask=mask[:, : 31 + i], past_key_values=single,
                position_ids=single.seen[:, None],
            ).logits[:, -1]
            for i in range(3)
        ]  # fmt: skip
        # Root, a false second token, the true one, its successor.
        relation = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], dtype=torch.bool)
        block.stage(relation=relation, deferred=True)
        fed = torch.stack([tokens[:, 0], tokens[:, 0] + 20, tokens[:, 1], tokens[:, 2]], 1)
        depth = relation.sum(-1) - 1
        tree = model(fed, past_key_values=block, position_ids=block.seen[:, None] + depth).logits
        assert torch.allclose(tree[:, [0, 2, 3]], torch.stack(steps, 1), atol=1e-9)
        # The rows keep unequal numbers, and go on.
        block.commit(torch.tensor([[0, 2, 3], [0, 2, 0]]), torch.tensor([3, 2]))
        assert block.seen.tolist() == [33, 26]
        more = model(torch.tensor([[11], [10]]), past_key_values=block, position_ids=block.seen[:, None]).logits[:, -1]
        assert torch.allclose(more[1], steps[2][1], atol=1e-9)
        end = model(torch.tensor([[11], [11]]), past_key_values=single, position_ids=single.seen[:, None])
        assert torch.allclose(more[0], end.logits[0, -1], atol=1e-9)


@torch.no_grad()
def test_nothing_is_dropped_and_reads_are_counted():
    model = tiny.model()
    with Oracle(budget=8)(model):
        cache = model(tiny.prompts((40,))["input_ids"]).past_key_values
        assert cache.attended_share() == 1.0
        for token in (5, 6, 7, 8):
            model(torch.tensor([[token]]), past_key_values=cache)
    assert all(layer.size == 44 and layer.reads == [32, 41 + 42 + 43 + 44] for layer in cache.layers)
    assert cache.attended_share() == 32 / 170
    assert cache.room() is None
    slot = 2 * 8 * 2 * 3 * 4  # keys and values, head size, KV heads, layers, bytes of a float32
    assert cache.nbytes() == 44 * slot

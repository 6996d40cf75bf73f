"""IceCache's own invariants, as on its card: the lifted metric, pages, what a step attends to, insertion."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from tests import tiny
from tests.kvcache import test_engine_retrieval as engine
from tokenry.errors import BadParameter, BudgetTooSmall
from tokenry.kvcache import IceCache
from tokenry.kvcache.icecache import _lift, interleaved
from tokenry.methods import parameters
from tokenry.models import TokenCache, attached

SMALL = {"page": 4, "sink_pages": 1, "dense_layers": 0}
POLICIES = (
    IceCache(budget=20, cells=2, **SMALL),
    IceCache(budget=18, search="exact", **SMALL | {"window_pages": 1}),
    IceCache(budget=0.5, cells=1, reuse=2, **SMALL | {"sink_pages": 0}),
)
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


def watched(policy):
    """The policy, and what its steps chose: layer, query, keys, slots, which count."""
    chosen = []

    class Watching(IceCache):
        def retrieve(self, layer, query, visible):
            found = super().retrieve(layer, query, visible)
            if found is not None:
                chosen.append((layer, query, layer.held()[0].clone(), *found))
            return found

    return Watching(**{name: getattr(policy, name) for name in parameters(IceCache)}), chosen


def check_pages(layer, policy, length):
    """Every token between the first and the newest pages stands in exactly one page, and pages obey their rules."""
    state = layer.state
    first = policy.sink_pages * policy.page
    until = max(first, policy.page * (length // policy.page - (policy.window_pages - 1)))
    assert int(state["until"][0]) == until
    for pages, along, cells, centres in zip(
        state["pages"][0], state["along"][0], state["cell"][0], state["centres"][0], strict=True
    ):
        assert sorted(pages[pages >= 0].tolist()) == list(range(first, until))
        assert pages.shape[-1] == policy.page
        ranges = {}
        for page, at, cell in zip(pages, along, cells.tolist(), strict=True):
            used = page >= 0
            assert used.any() == (cell >= 0), "there are no empty pages"
            assert bool(used.int().diff().le(0).all()) and bool((at[used].diff() >= 0).all())
            if cell >= 0:
                ranges.setdefault(cell, []).append((float(at[used][0]), float(at[used][-1])))
        count = int(state["count"][0])
        assert set(ranges) == set(range(count)), "every centre has its cell"
        assert centres.shape[0] >= count
        for spans in ranges.values():
            for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
                assert end <= start, "pages of a cell do not overlap along the direction"


def test_lifted_keys_are_equally_long_and_ordered_by_the_product():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 50, 8, generator=generator, dtype=torch.float64)
    norms = keys.square().sum(-1)
    reach = norms.amax(-1)
    lifted = torch.cat([keys, _lift(norms, reach)[..., None]], -1)
    assert torch.allclose(lifted.square().sum(-1), reach[..., None].expand_as(norms))
    for _ in range(20):
        query = torch.randn(8, generator=generator, dtype=torch.float64)
        away = lifted - torch.cat([query / query.norm(), torch.zeros(1, dtype=torch.float64)])
        assert torch.equal(away.norm(dim=-1).argsort(-1), (-(keys @ query)).argsort(-1))


def test_heads_take_turns():
    score = torch.tensor([[9.0, 8, 7, 0, 1], [0, 9, 1, 8, 7]])[None, None, :, None]
    # First of each: 0, 1; second of each: 1 again, 3; third of each: 2, 4.
    assert interleaved(score).flatten().tolist() == [0, 1, 3, 2, 4]


@pytest.mark.parametrize("kind", [k for k in tiny.SERVED if k != "mistral"])
def test_budget_above_the_length_equals_the_plain_model(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((40, 29))
    for options in (engine.GREEDY, engine.GREEDY | {"num_beams": 3}):
        wanted = model.generate(**inputs, **options)
        with IceCache(budget=64, **SMALL)(model):
            assert torch.equal(model.generate(**inputs, **options), wanted)


@torch.no_grad()
def test_a_row_that_fits_into_the_budget_sees_all_of_itself_beside_a_longer_one():
    """The choice itself comes to all tokens where they are few, whatever the cells."""
    model = tiny.model(dtype=torch.float64)
    policy, chosen = watched(IceCache(budget=40, cells=1, **SMALL))
    with policy(model):
        cache = model(**tiny.prompts((60, 30)), position_ids=None).past_key_values
        for step in range(10):
            chosen.clear()
            mask = torch.cat([tiny.prompts((60, 30))["attention_mask"], torch.ones(2, step + 1, dtype=torch.long)], 1)
            token = torch.tensor([[5 + step], [6 + step]])
            model(token, attention_mask=mask, past_key_values=cache, position_ids=cache.seen[:, None])
            assert len(chosen) == 3
            for _, _, _, slots, counts in chosen:
                for head in range(2):
                    assert sorted(slots[1, head, 0][counts[1, head, 0]].tolist()) == list(range(30, 61 + step))
                    assert len(set(slots[0, head, 0][counts[0, head, 0]].tolist())) == int(counts[0, head].sum()) == 40


@every_policy
@pytest.mark.parametrize("kind", ("llama", "gemma2", "gpt2"))
def test_row_of_a_padded_batch_equals_the_row_alone_and_chunks_the_whole(policy, kind):
    engine.test_row_of_a_padded_batch_equals_the_row_alone_and_chunks_the_whole(policy, kind)


@pytest.mark.parametrize("policy", POLICIES[:2], ids=str)
@torch.no_grad()
def test_pages_hold_every_token_once_after_any_number_of_insertions(policy):
    model = tiny.model(dtype=torch.float64)
    for prompt in (2, 70):
        with policy(model):
            cache = model(tiny.prompts((prompt,))["input_ids"]).past_key_values
            for step in range(60):
                # Likes and unlikes: runs of one token fill one cell until its pages split.
                token = 7 if step % 20 < 12 else 10 + step
                model(torch.tensor([[token]]), past_key_values=cache)
                for layer in cache.layers:
                    if "pages" in layer.state:
                        check_pages(layer, policy, prompt + step + 1)
        assert all(int(layer.state["count"][0]) ** 2 >= 40 for layer in cache.layers)


@torch.no_grad()
def test_cells_are_those_of_the_nearest_centres():
    model = tiny.model(dtype=torch.float64)
    policy = POLICIES[0]
    with policy(model):
        cache = model(tiny.prompts((90,))["input_ids"]).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache)
    for layer in cache.layers:
        keys, state = layer.held()[0][0], layer.state
        for head in range(2):
            inside = keys[head, 4:84]
            assert torch.equal(state["centres"][0, head], inside[::9]), "evenly spread, about the root of 80"
            reach = float(inside.square().sum(-1).max())
            lifted = torch.cat([inside, (reach - inside.square().sum(-1)).clamp(min=0).sqrt()[:, None]], -1)
            nearest = torch.cdist(lifted, lifted[::9]).argmin(-1)
            for page, cell in zip(state["pages"][0, head], state["cell"][0, head].tolist(), strict=True):
                assert all(int(nearest[slot - 4]) == cell for slot in page[page >= 0])


@torch.no_grad()
def test_the_best_token_is_always_found_by_exact_search_and_recall_grows_with_the_budget():
    model = tiny.model(dtype=torch.float64)
    text = tiny.prompts((100,), seed=3)["input_ids"]
    recalled = []
    for budget in (16, 24, 40, 64):
        policy, chosen = watched(IceCache(budget=budget, search="exact", **SMALL))
        hits = []
        with policy(model):
            cache = model(text).past_key_values
            for step in range(6):
                chosen.clear()
                model(torch.tensor([[9 + 7 * step]]), past_key_values=cache)
                # The first layer's queries do not depend on the budget.
                for _, query, keys, slots, counts in chosen[:1]:
                    logits = torch.einsum("hgd,hsd->hgs", query[0, :, 0].view(2, 2, -1), keys[0])
                    until = int(cache.layers[0].state["until"][0])
                    for head in range(2):
                        got = set(slots[0, head, 0][counts[0, head, 0]].tolist())
                        assert len(got) == budget == int(counts[0, head].sum())
                        # The first head's best comes first.
                        assert int(logits[head, 0, 4:until].argmax()) + 4 in got
                        hits += [slot in got for slot in logits[head].sum(0).topk(12).indices.tolist()]
        recalled.append(sum(hits) / len(hits))
    assert recalled == sorted(recalled) and recalled[-1] > recalled[0]


@torch.no_grad()
def test_all_cells_equal_exact_search():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((90, 71))
    found = {}
    for name, options in (("exact", {"search": "exact"}), ("all", {"cells": 99}), ("few", {"cells": 1})):
        with IceCache(budget=20, **SMALL | options)(model):
            found[name] = model.generate(**inputs, **engine.GREEDY, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(torch.stack(found["all"].logits), torch.stack(found["exact"].logits))
    assert not torch.equal(torch.stack(found["few"].logits), torch.stack(found["exact"].logits))


@torch.no_grad()
def test_reused_layers_attend_to_the_choice_of_the_first():
    model = tiny.model(dtype=torch.float64)
    policy, chosen = watched(IceCache(budget=20, cells=2, reuse=2, **SMALL))
    with policy(model):
        cache = model(tiny.prompts((60,))["input_ids"]).past_key_values
        for step in range(9):
            chosen.clear()
            model(torch.tensor([[5 + step]]), past_key_values=cache)
            first, second, third = ((slots, counts) for _, _, _, slots, counts in chosen)
            assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
            assert not torch.equal(first[0], third[0])
    assert not cache.layers[1].state


@torch.no_grad()
def test_generated_tokens_are_found_again():
    model = tiny.model(dtype=torch.float64)
    policy, chosen = watched(IceCache(budget=20, cells=3, **SMALL))
    with policy(model):
        cache = model(tiny.prompts((30,))["input_ids"]).past_key_values
        early = set()
        for step in range(60):
            chosen.clear()
            model(torch.tensor([[30 + step]]), past_key_values=cache)
            for _, _, _, slots, counts in chosen:
                early |= {slot for slot in slots[counts].tolist() if 30 <= slot < 30 + step - 12}
    assert early


@every_policy
@torch.no_grad()
def test_reorder_fork_select_and_crop_carry_the_pages(policy):
    model = tiny.model(dtype=torch.float64)
    text = tiny.prompts((40, 33))
    with policy(model):
        cache = model(**text, position_ids=(text["attention_mask"].cumsum(-1) - 1).clamp(min=0)).past_key_values
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 0]))

        def step(past, ids):
            mask = torch.ones(2, past.total + ids.shape[1], dtype=torch.long)
            return model(ids, attention_mask=mask, past_key_values=past, position_ids=past.seen[:, None]).logits[:, -1]

        for start in range(12):
            token = torch.tensor([[5 + 2 * start], [40 - 3 * start]])
            assert torch.allclose(step(cache, token), step(twin, token.flip(0)).flip(0), atol=1e-9)
        # What is left after tokens were taken back goes on as a cache that never held them.
        fewer = copy.deepcopy(cache)
        step(fewer, torch.tensor([[7], [8]]))
        fewer.crop(-3)
        again = copy.deepcopy(cache)
        again.crop(-2)
        more = torch.tensor([[11], [12]])
        assert torch.allclose(step(fewer, more), step(again, more), atol=1e-9)


@pytest.mark.parametrize("policy", (*POLICIES, IceCache(budget=20, cells=2, **SMALL | {"page": 2})), ids=str)
@torch.no_grad()
def test_every_row_of_drafts_retrieves_as_a_single_step(policy):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((41, 33))
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with attached(model):
        single, block = TokenCache(model, policy), TokenCache(model, policy)
        for cache in (single, block):
            model(**inputs, past_key_values=cache, position_ids=places)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
        steps = [
            model(
                tokens[:, i : i + 1], attention_mask=mask[:, : 42 + i], past_key_values=single,
                position_ids=single.seen[:, None],
            ).logits[:, -1]
            for i in range(3)
        ]  # fmt: skip
        room = block.room().tolist()
        assert room == [policy.page - 41 % policy.page, policy.page - 33 % policy.page]
        relation = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], dtype=torch.bool)
        block.stage(relation=relation, deferred=True)
        fed = torch.stack([tokens[:, 0], tokens[:, 0] + 20, tokens[:, 1], tokens[:, 2]], 1)
        depth = relation.sum(-1) - 1
        tree = model(fed, past_key_values=block, position_ids=block.seen[:, None] + depth).logits
        for number, path in enumerate((0, 2, 3)):
            if number < min(room):
                assert torch.allclose(tree[:, path], steps[number], atol=1e-9)
        counts = torch.tensor([min(3, room[0]), min(2, room[1])])
        block.commit(torch.tensor([[0, 2, 3], [0, 2, 0]]), counts)
        more = model(torch.tensor([[6], [10]]), past_key_values=block, position_ids=block.seen[:, None]).logits[:, -1]
        if int(counts[1]) == 2:
            assert torch.allclose(more[1], steps[2][1], atol=1e-9)
        else:
            assert torch.allclose(more[0], steps[1][0], atol=1e-9)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    model = tiny.model(dtype=dtype)
    with POLICIES[0](model):
        assert model.generate(**tiny.prompts((40, 29)), **engine.GREEDY).shape == (2, 60)


def test_first_layers_attend_to_everything_by_default():
    model = tiny.model()
    with IceCache(budget=80, sink_pages=1)(model):
        out = model.generate(tiny.prompts((120,))["input_ids"], **engine.GREEDY, return_dict_in_generate=True)
    first, second, third = out.past_key_values.layers
    assert first.reads[0] == first.reads[1] and second.reads[0] == second.reads[1] and third.reads[0] < third.reads[1]


def test_misuse_is_refused():
    with pytest.raises(BudgetTooSmall, match="at least 65"):
        IceCache(budget=64)
    for wrong in ({"page": 0}, {"window_pages": 0}, {"cells": 0}, {"reuse": 0}, {"search": "tree"}):
        with pytest.raises(BadParameter):
            IceCache(**wrong)

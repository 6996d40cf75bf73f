"""The attention function and the switch to it: same outputs as the model's own, and nothing left behind."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from tokenry.errors import CacheMisuse, UnsupportedModel
from tokenry.kvcache import H2O
from tokenry.models import TokenCache, attached
from tokenry.models.attention import _fused
from tokenry.models.slots import Block, Slots


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_padded_batch_generates_as_on_the_models_own_attention(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((24, 13))
    before = model.config._attn_implementation
    options = {
        "max_new_tokens": 16,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    wanted = model.generate(**inputs, **options)
    with attached(model):
        got = model.generate(**inputs, past_key_values=TokenCache(model), **options)
    assert torch.equal(got.sequences, wanted.sequences)
    assert torch.allclose(torch.stack(got.logits), torch.stack(wanted.logits), atol=2e-3, rtol=1e-4)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("kind", ("llama", "gemma2"))
def test_padding_over_whole_chunks_of_a_prompt_leads_its_row(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((40, 9, 24))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    wanted = model.generate(**inputs, **options)
    with attached(model):
        cache = TokenCache(model)
        got = model.generate(**inputs, **options, prefill_chunk_size=8, past_key_values=cache)
    assert torch.equal(got.sequences, wanted.sequences)
    assert cache._lead.tolist() == [0, 31, 16] and not cache._ragged
    real = torch.cat([inputs["attention_mask"].bool(), torch.ones(3, 5, dtype=torch.bool)], 1)
    for mine, own in zip(cache.to_dynamic().layers, wanted.past_key_values.layers, strict=True):
        assert mine.keys.shape == own.keys.shape
        for row, columns in enumerate(real[:, -own.keys.shape[2] :]):
            for one, two in ((mine.keys, own.keys), (mine.values, own.values)):
                assert torch.allclose(one[row][:, columns], two[row][:, columns], atol=1e-4)


@torch.no_grad()
def test_padding_over_a_whole_chunk_on_the_models_own_attention_leads_its_row():
    model = tiny.model()
    inputs = tiny.prompts((20, 9))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = TokenCache(model)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache, position_ids=places[:, :8])
    with attached(model):
        model(ids[:, 8:], attention_mask=mask, past_key_values=cache, position_ids=places[:, 8:])
    assert cache._lead.tolist() == [0, 11] and cache.seen.tolist() == [20, 9]


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_tree_nodes_see_their_ancestors_alone(kind):
    model = tiny.model(kind, torch.float64)
    prefix = tiny.prompts((21,))["input_ids"]
    # Two branches from one root: 0 -> 1 -> 3 and 0 -> 2 -> 4, deep enough to cross the window of the sliding layers.
    parents = [-1, 0, 0, 1, 2]
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    relation = torch.eye(5, dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        relation[node] |= relation[parent]
    with attached(model), torch.no_grad():
        cache = TokenCache(model)
        model(prefix, past_key_values=cache)
        cache.stage(relation=relation[None], deferred=True)
        depth = relation.sum(-1) - 1
        logits = model(tokens, past_key_values=cache, position_ids=21 + depth[None]).logits[0]
        for leaf in (3, 4):
            path = relation[leaf].nonzero()[:, 0]
            wanted = model(torch.cat([prefix, tokens[:, path]], 1), use_cache=False).logits[0, -len(path) :]
            assert torch.allclose(logits[path], wanted, atol=1e-5)
        cache.commit(torch.tensor([[0, 2, 4]]), torch.tensor([3]))
        after = model(torch.tensor([[11]]), past_key_values=cache, position_ids=torch.tensor([[24]])).logits[0, -1]
        whole = torch.cat([prefix, tokens[:, [0, 2, 4]], torch.tensor([[11]])], 1)
        assert torch.allclose(after, model(whole, use_cache=False).logits[0, -1], atol=1e-5)


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_rows_of_unequal_progress_equal_each_row_alone(kind):
    model = tiny.model(kind, torch.float64 if kind != "gemma2" else torch.float32)
    rows = [tiny.prompts((length,), seed=length)["input_ids"][0] for length in (9, 14)]
    blocks = [torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])]
    kept = (3, 1)
    inputs = tiny.prompts((9, 14))
    for row, ids in enumerate(rows):
        inputs["input_ids"][row, -len(ids) :] = ids
    with attached(model), torch.no_grad():
        cache = TokenCache(model)
        mask = inputs["attention_mask"].bool()
        cache.stage(valid=mask)
        model(inputs["input_ids"], past_key_values=cache, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        cache.stage(deferred=True)
        model(torch.stack(blocks), past_key_values=cache, position_ids=cache.seen[:, None] + torch.arange(3))
        cache.commit(torch.arange(3).expand(2, 3), torch.tensor(kept))
        assert cache.seen.tolist() == [12, 15]
        logits = model(torch.tensor([[10], [11]]), past_key_values=cache, position_ids=cache.seen[:, None]).logits[
            :, -1
        ]
        for row, last in enumerate((10, 11)):
            whole = torch.cat([rows[row], blocks[row][: kept[row]], torch.tensor([last])])[None]
            assert torch.allclose(logits[row], model(whole, use_cache=False).logits[0, -1], atol=1e-4)
        cache.compact()
        dynamic = cache.to_dynamic()
    # Five columns of padding, nine tokens, three committed and one more.
    assert dynamic.get_seq_length() == 18


def test_forward_of_another_cache_is_untouched_inside_the_block():
    for own in ("sdpa", "eager"):
        model = tiny.model()
        model.set_attn_implementation(own)
        inputs = tiny.prompts((12, 7))
        wanted = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
        with attached(model):
            got = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
            free = model(**inputs, use_cache=False).logits
        real = inputs["attention_mask"].bool()
        assert torch.allclose(got[real], wanted[real], atol=1e-5)
        assert torch.allclose(free[real], wanted[real], atol=1e-5)
        assert model.config._attn_implementation == own


@pytest.mark.parametrize("kind", tiny.REFUSED)
def test_models_that_cannot_be_served_are_refused_by_name(kind):
    model = tiny.model(kind)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=type(model).__name__), attached(model):
        pass
    assert model.config._attn_implementation == before


def test_the_setting_returns_after_an_error_and_after_nested_blocks():
    model = tiny.model()
    with pytest.raises(ZeroDivisionError), attached(model), attached(model):
        assert model.config._attn_implementation == "tokenry"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not model.base_model._forward_hooks and not model.base_model._forward_pre_hooks


def test_two_threads_with_different_policies_do_not_disturb_each_other():
    model = tiny.model()
    inputs = tiny.prompts((60,))
    policies = (H2O(budget=12), H2O(budget=40), None)

    def run(policy):
        if policy is None:
            return model.generate(**inputs, max_new_tokens=30, do_sample=False)
        with policy(model):
            return model.generate(**inputs, max_new_tokens=30, do_sample=False)

    alone = [run(policy) for policy in policies]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(4):
                results[number].append(run(policies[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(alone[0], alone[2])
    for number, wanted in enumerate(alone):
        assert len(results[number]) == 4
        assert all(torch.equal(got, wanted) for got in results[number])
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_filled_on_the_models_own_attention_goes_on_inside_a_block():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    with torch.no_grad():
        cache = TokenCache(model)
        first = model(**inputs, past_key_values=cache)
        assert first.past_key_values is cache
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        positions = inputs["attention_mask"].sum(-1, keepdim=True)
        token = torch.tensor([[5], [6]])
        twin = cache.fork()
        wanted = model(token, attention_mask=mask, past_key_values=twin, position_ids=positions).logits
        with attached(model):
            got = model(token, attention_mask=mask, past_key_values=cache, position_ids=positions).logits
    assert torch.allclose(got, wanted, atol=1e-9)


def test_block_must_be_closed_before_the_next_forward():
    model = tiny.model()
    with attached(model), torch.no_grad():
        cache = TokenCache(model)
        model(tiny.prompts((5,))["input_ids"], past_key_values=cache)
        cache.stage(deferred=True)
        model(torch.tensor([[4]]), past_key_values=cache)
        with pytest.raises(CacheMisuse, match="commit"):
            cache.stage()


def test_every_part_of_the_model_is_as_before():
    model = tiny.model()
    model.model.layers[1].train()
    with attached(model):
        assert not model.model.layers[0].training
    assert model.model.layers[1].training and not model.model.layers[0].training


def test_models_that_share_a_configuration_are_not_mixed_up():
    one = tiny.model()
    two = type(one)(one.config).eval()
    ids = tiny.prompts((8,))["input_ids"]
    wanted = two(ids).logits
    with attached(one):
        with pytest.raises(UnsupportedModel, match="shares its configuration"), attached(two):
            pass
        assert torch.allclose(two(ids).logits, wanted, atol=1e-5)
    assert one.config._attn_implementation == "sdpa"
    with attached(two):
        pass


def test_a_block_that_ends_between_two_layers_of_another_thread_changes_nothing():
    model = tiny.model("gemma2")
    assert model.config._attn_implementation == "eager"
    ids = tiny.prompts((12,))["input_ids"]
    wanted = model(ids, use_cache=False).logits
    block = attached(model)
    block.__enter__()

    def leave(module, args, kwargs):
        handle.remove()
        block.__exit__(None, None, None)

    # The hook stands between the choice of the function and its call, as another thread may.
    attention = model.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(leave, with_kwargs=True)
    assert torch.allclose(model(ids, use_cache=False).logits, wanted, atol=1e-5)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("mark", ({"is_quantized": True}, {"hf_device_map": {"a": 0, "b": 1}}, {"peft_config": {}}))
def test_forms_that_are_not_tested_are_refused(mark):
    model = tiny.model()
    for name, value in mark.items():
        setattr(model, name, value)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"), attached(model):
        pass


@pytest.mark.parametrize(
    ("error", "raised"), [(torch.OutOfMemoryError, torch.OutOfMemoryError), (RuntimeError, UnsupportedModel)]
)
def test_a_fault_while_a_model_is_tried_is_not_held_against_it(error, raised):
    model = tiny.model()

    def fault(module, args):
        raise error("fault")

    hook = model.model.layers[0].register_forward_pre_hook(fault)
    with pytest.raises(raised, match="fault"), attached(model):
        pass
    hook.remove()
    with attached(model):
        assert torch.isfinite(model(torch.tensor([[3, 5]])).logits).all()


@torch.no_grad()
def test_a_cache_may_be_given_by_position():
    model = tiny.model()
    ids = tiny.prompts((30,))["input_ids"]
    with H2O(budget=12)(model):
        wanted = model(ids)
        cache = H2O(budget=12).cache(model)
        assert torch.equal(model(ids, None, None, cache).logits, wanted.logits)
        assert cache.length == 12 and model(ids, None, None, DynamicCache()).past_key_values.length == 12
        # A forward that names none of its arguments is left as it is.
        own = model.forward
        model.forward = lambda *args, **kwargs: own(*args, **kwargs)
        assert torch.equal(model(ids, torch.ones_like(ids)).logits, wanted.logits)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_mask_is_packed_once_for_the_layers_that_share_it(groups):
    block = Block(4, None, torch.rand(1, 4, 4) > 0.5, False)
    slots = Slots()
    slots.append(5, None, None, 1, torch.device("cpu"))
    shared, causal = block.mask(slots, None, torch.device("cpu"))
    assert shared is not None and not causal
    block.masks[None] = shared, causal
    packed = block.packed(shared, groups, torch.float32)
    assert packed.shape == (1, 1, groups * 4, 9)
    assert torch.equal(packed == 0, shared.repeat(1, 1, groups, 1))
    assert bool((packed[packed != 0] == -torch.inf).all())
    assert block.packed(shared, groups, torch.float32) is packed
    assert block.packed(shared, groups, torch.bfloat16).dtype == torch.bfloat16
    # A layer whose slots are its own has a mask of its own, of which nothing is kept.
    own = ~shared
    assert torch.equal(block.packed(own, groups, torch.float32) == 0, own.repeat(1, 1, groups, 1))
    assert block.packed(own, groups, torch.float32) is not block.packed(own, groups, torch.float32)


@pytest.mark.parametrize("heads", [1, 2], ids=["one mask", "a mask a head"])
@pytest.mark.parametrize("new", [5, 60])  # fewer and more than there are numbers in the keys and values of a slot
@pytest.mark.parametrize("groups", [1, 3])
def test_masked_attention_is_that_of_repeated_heads(groups, new, heads):
    torch.manual_seed(0)
    slots = new + 9
    query = torch.randn(2, 2 * groups, new, 8, dtype=torch.float64)
    key = torch.randn(2, 2, slots, 8, dtype=torch.float64)
    value = torch.randn(2, 2, slots, 5, dtype=torch.float64)  # values may be narrower
    allowed = torch.rand(2, heads, new, slots) > 0.4
    allowed[..., 0] = True
    got = _fused(Block(new, None, None, False), query, key, value, allowed, False, 0.3)
    keys, values, mask = (each.repeat_interleave(2 * groups // each.shape[1], 1) for each in (key, value, allowed))
    weights = (query @ keys.mT * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(got, weights @ values)

"""The engine of the evict kind: budgets, masks, batches, restoration. Every policy here runs through the same tests."""

from __future__ import annotations

import copy
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests import tiny
from tokenry.errors import BadParameter, BudgetTooSmall, CacheMisuse, UnsupportedModel
from tokenry.kvcache import (
    H2O,
    DapQ,
    FastKV,
    KeyDiff,
    Keyformer,
    LazyLLM,
    Oracle,
    Random,
    Sinks,
    SnapKV,
    SpAtten,
    TreeKV,
)
from tokenry.models import AttentionRows, TokenCache, active_policy, attached

POLICIES = (H2O, Sinks, Random)
GREEDY = {"do_sample": False, "max_new_tokens": 24}
BY_ATTENTION = (H2O, Keyformer, partial(TreeKV, sinks=2, block=4), partial(SnapKV, window=4), partial(DapQ, recent=2))
BY_THEMSELVES = (Sinks, Random, partial(KeyDiff, recent=3))


def _slug(made):
    return getattr(made, "func", made).slug


every_policy = pytest.mark.parametrize("policy", BY_ATTENTION + BY_THEMSELVES, ids=_slug)


@pytest.mark.parametrize("kind", [k for k in tiny.SERVED if k != "mistral"])
@pytest.mark.parametrize("policy", POLICIES)
def test_budget_above_the_length_equals_the_plain_model(policy, kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((40, 29))
    for options in (GREEDY, GREEDY | {"num_beams": 3}, GREEDY | {"prefill_chunk_size": 16}):
        wanted = model.generate(**inputs, **options)
        with policy(budget=64)(model):
            assert torch.equal(model.generate(**inputs, **options), wanted)


@pytest.mark.parametrize("kind", [k for k in tiny.SERVED if k != "mistral"])
@pytest.mark.parametrize("policy", POLICIES)
def test_row_of_a_padded_batch_equals_the_row_alone(policy, kind):
    model = tiny.model(kind)
    for every in (1, 4):
        with policy(budget=12, compact_every=every)(model):
            for lengths in ((40, 29), (29, 40), (9, 40)):
                inputs = tiny.prompts(lengths)
                both = model.generate(**inputs, **GREEDY)
                for row, length in enumerate(lengths):
                    alone = model.generate(inputs["input_ids"][row : row + 1, -length:], **GREEDY)
                    assert torch.equal(both[row, -24:], alone[0, -24:])


@pytest.mark.parametrize("every", (1, 5))
@pytest.mark.parametrize("budget", (6, 17))
@pytest.mark.parametrize("policy", POLICIES)
def test_every_layer_keeps_its_budget_after_every_forward(policy, budget, every):
    model = tiny.model()
    with policy(budget=budget, compact_every=every)(model), torch.no_grad():
        out = model(tiny.prompts((41,))["input_ids"])
        cache = out.past_key_values
        for step in range(2 * budget):
            assert all(layer.size <= budget + every - 1 for layer in cache.layers)
            for kept in cache.kept_positions():
                assert bool((kept.diff(dim=-1) > 0).all()), "positions are sorted and unique"
                assert bool((kept[..., -1] == 40 + step).all()), "the newest token is held"
            assert cache.get_seq_length() == 41 + step
            cache = model(torch.tensor([[5 + step]]), past_key_values=cache).past_key_values


@every_policy
def test_budgets_hold_for_prompts_of_one_to_three_times_their_length(policy):
    model = tiny.model()
    budget = 11
    for length in random.Random(0).sample(range(budget, 3 * budget + 1), 6):
        with policy(budget=budget)(model), torch.no_grad():
            cache = model(tiny.prompts((length,), seed=length)["input_ids"]).past_key_values
            for step in range(budget):
                assert all(layer.size == budget for layer in cache.layers)
                assert all(bool((kept[..., -1] == length - 1 + step).all()) for kept in cache.kept_positions())
                cache = model(torch.tensor([[5 + step]]), past_key_values=cache).past_key_values


@pytest.mark.parametrize("policy", (*BY_ATTENTION, *BY_THEMSELVES, partial(SpAtten, dense=1)), ids=_slug)
@torch.no_grad()
def test_after_keep_all_everything_is_added_until_reset(policy):
    model = tiny.model()
    ids = tiny.prompts((52,))["input_ids"]
    with policy(budget=12)(model):
        cache = model(ids[:, :40]).past_key_values
        sizes = [layer.size for layer in cache.layers]
        assert min(sizes) < 40
        cache.keep_all()
        model(ids[:, 40:50], past_key_values=cache)
        for place in (50, 51):
            model(ids[:, place : place + 1], past_key_values=cache)
        assert [layer.size for layer in cache.layers] == [size + 12 for size in sizes]
        cache.reset()
        model(ids[:, :40], past_key_values=cache)
        assert [layer.size for layer in cache.layers] == sizes


@pytest.mark.parametrize("positions", ("original", "rolling"))
@every_policy
def test_protected_slots_are_held_after_long_decoding(policy, positions):
    model, budget = tiny.model(), 16
    made = policy(budget=budget)
    if hasattr(made, "positions"):
        made = policy(budget=budget, positions=positions)
    elif positions == "rolling":
        pytest.skip("positions of this policy are the original ones")
    sinks = getattr(made, "sinks", 0)
    recent = budget - sinks if isinstance(made, Sinks) else made.protected() - sinks
    assert sinks + recent >= 2, "something must be protected in this test"
    with made(model):
        out = model.generate(
            tiny.prompts((40,))["input_ids"], do_sample=False, max_new_tokens=80, return_dict_in_generate=True
        )
    length = out.past_key_values.get_seq_length()
    wanted = {*range(sinks), *range(length - recent, length)}
    for kept in out.past_key_values.kept_positions():
        for head in kept.expand(1, 2, -1)[0].tolist():
            assert len(head) == budget and wanted <= set(head)


@pytest.mark.parametrize("policy", (*BY_ATTENTION, *BY_THEMSELVES, Oracle), ids=_slug)
def test_assisted_generation_with_room_for_everything_equals_the_plain_model(policy):
    model, assistant = tiny.model(), tiny.model(seed=1)
    ids = tiny.prompts((40,))["input_ids"]
    wanted = model.generate(ids, **GREEDY)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        with policy(budget=128)(model):
            assert torch.equal(model.generate(ids, **GREEDY, **options), wanted)


def test_positions_count_tokens_seen_not_slots_held():
    model = tiny.model("gpt2")
    seen = []
    model.transformer.wpe.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten().tolist()[-1]))
    with H2O(budget=8)(model):
        model.generate(tiny.prompts((30,))["input_ids"], do_sample=False, max_new_tokens=5)
    assert seen[-5:] == [29, 30, 31, 32, 33]


@pytest.mark.parametrize("policy", POLICIES)
def test_physical_eviction_equals_masking(policy):
    """Dropping slots gives the outputs of a full cache in which the same slots are hidden."""
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((30,))["input_ids"]
    more = torch.randint(3, tiny.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    with policy(budget=9)(model), torch.no_grad():
        cache = model(ids).past_key_values
        held = [cache.kept_positions()]
        logits = []
        for token in more[0]:
            out = model(token.view(1, 1), past_key_values=cache)
            logits.append(out.logits[0, -1])
            held.append(cache.kept_positions())
    simulated = _masked(model, torch.cat([ids, more], 1), held, prompt=30)
    assert torch.allclose(torch.stack(logits), simulated[30:], atol=1e-9)
    plain = model(torch.cat([ids, more], 1)).logits[0, 30:]
    assert not torch.allclose(torch.stack(logits), plain, atol=1e-3), "the budget must matter in this test"


def _masked(model, ids, held, prompt):
    """Logits of a dense run in which row t of each layer and head sees only what was held before it, and itself."""
    length = ids.shape[1]
    masks = []
    for layer in range(len(held[0])):
        heads = held[0][layer].shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(heads, 1, 1)
        for step, kept in enumerate(held[:-1]):
            row = prompt + step
            mask[:, row] = False
            mask[:, row].scatter_(1, kept[layer][0], True)
            mask[:, row, row] = True
        masks.append(mask)
    from transformers import AttentionInterface

    def masked(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        allowed = masks[module.layer_idx].repeat_interleave(groups, 0)[None]
        logits = (query @ key.transpose(-1, -2) * scaling).masked_fill(~allowed, float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("simulated", masked)
    own = model.config._attn_implementation
    model.set_attn_implementation("simulated")
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(own)


@pytest.mark.parametrize("causal", (True, False))
def test_column_sums_equal_the_full_matrix(causal):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 700 if causal else 5, 8, generator=generator)
    key = torch.randn(2, 2, 700, 8, generator=generator)
    valid = torch.rand(2, query.shape[2], generator=generator) > 0.3
    rows = AttentionRows(query, key, None, causal, 0.3, valid=valid)
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1)) * 0.3
    if causal:
        logits = logits.masked_fill(~torch.ones(700, 700, dtype=torch.bool).tril(), float("-inf"))
    full = logits.softmax(-1) * valid[:, None, :, None]
    wanted = full.sum(2).view(2, 2, 2, 700).sum(2)
    assert torch.allclose(rows.column_sums(), wanted, atol=1e-4)
    weights = torch.rand(2, query.shape[2], generator=generator)
    weighted = (full * weights[:, None, :, None]).sum(2).view(2, 2, 2, 700).sum(2)
    assert torch.allclose(rows.column_sums(weights), weighted, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_fork_reorder_and_select_carry_the_state(policy):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((40, 33))
    with policy(budget=10)(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 0]))
        token = torch.tensor([[5], [6]])
        for _ in range(15):
            mask = torch.ones(2, cache.total + 1, dtype=torch.long)
            one = model(token, attention_mask=mask, past_key_values=cache, position_ids=cache.seen[:, None])
            two = model(token.flip(0), attention_mask=mask, past_key_values=twin, position_ids=twin.seen[:, None])
            assert torch.allclose(one.logits, two.logits.flip(0), atol=1e-9)


def test_a_second_turn_goes_on_from_the_kept_tokens():
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    with H2O(budget=16)(model), torch.no_grad():
        first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, tiny.prompts((5,), seed=3)["input_ids"]], 1)
        second = model.generate(turn, past_key_values=first.past_key_values, **GREEDY, return_dict_in_generate=True)
    assert second.past_key_values.get_seq_length() == second.sequences.shape[1] - 1
    assert all(layer.size <= 16 for layer in second.past_key_values.layers)


def test_explicit_cache_lives_without_a_block():
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    policy = H2O(budget=16)
    with policy(model):
        wanted = model.generate(ids, **GREEDY)
    cache = policy.cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), wanted)
    assert cache.length == 16
    del cache
    assert model.config._attn_implementation == "sdpa"


def test_misuse_is_refused_and_the_model_restored():
    model = tiny.model()
    ids = tiny.prompts((20,))["input_ids"]
    policy = H2O(budget=8)
    with policy(model):
        out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    with pytest.raises(CacheMisuse, match="outside its block"):
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2)
    filled = model(ids).past_key_values
    with pytest.raises(CacheMisuse, match="already holds 20 tokens"), policy(model):
        model.generate(torch.cat([ids, ids], 1), past_key_values=filled, max_new_tokens=2)
    other = H2O(budget=30).cache(model)
    with pytest.raises(CacheMisuse, match="another policy"), policy(model):
        model.generate(ids, past_key_values=other, max_new_tokens=2)
    assert other.get_seq_length() == 0
    del other
    with pytest.raises(CacheMisuse, match="StaticCache"), policy(model):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(CacheMisuse, match="use_cache"), policy(model):
        model(ids, use_cache=False)
    with pytest.raises(BadParameter, match="with H2O"):
        model.generate(ids, custom_generate=policy, max_new_tokens=2)
    with pytest.raises(UnsupportedModel, match="sliding window"), policy(sliding := tiny.model("mistral")):
        sliding(ids)
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks and not model.base_model._forward_pre_hooks


def test_a_cache_that_is_offloaded_and_a_copy_made_inside_a_block_are_refused_by_name():
    model = tiny.model()
    ids = tiny.prompts((20,))["input_ids"]
    with H2O(budget=8)(model):
        with pytest.raises(CacheMisuse, match="cache that is offloaded"):
            model.generate(ids, cache_implementation="offloaded", max_new_tokens=2)
        twin = copy.deepcopy(model)
    for enter in (H2O(budget=8), H2O(budget=8).cache):
        with pytest.raises(UnsupportedModel, match="copy the model outside the block"), enter(twin):
            pass


@pytest.mark.parametrize("policy", (H2O, Random, Keyformer))
def test_protected_shares_are_rounded_as_budgets_are(policy):
    for hundredths in range(5, 100):
        assert policy(budget=100, recent=hundredths / 100).protected() == hundredths
        assert policy(budget=hundredths / 100).slots(hundredths / 100, 100) == hundredths


@pytest.mark.parametrize("positions", ("original", "rolling"))
@pytest.mark.parametrize("policy", (H2O, Sinks))
def test_forwards_outside_no_grad_keep_the_same(policy, positions):
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    kept, logits = [], []
    for grad in (False, True):
        with policy(budget=12, positions=positions)(model), torch.set_grad_enabled(grad):
            cache = model(ids).past_key_values
            for token in range(5, 12):
                out = model(torch.tensor([[token]]), past_key_values=cache).logits
        kept.append(torch.stack(cache.kept_positions()))
        logits.append(out.detach())
    assert torch.equal(*kept) and torch.equal(*logits)


def test_blocks_do_not_nest_and_may_be_entered_again():
    model, other = tiny.model(), tiny.model(seed=1)
    ids = tiny.prompts((20,))["input_ids"]
    policy = H2O(budget=8)
    block = policy(model)
    with block:
        wanted = model.generate(ids, **GREEDY)
        for inner in (block, policy(model), Sinks(budget=8)(model), policy(other)):
            with (
                pytest.raises(CacheMisuse, match=r"inside the block of h2o:budget=8: cache policies do not nest"),
                inner,
            ):
                pass
        # The refusal has not ended the block.
        assert active_policy(model) is policy
        assert torch.equal(model.generate(ids, **GREEDY), wanted)
    for each in (model, other):
        assert active_policy(each) is None and each.config._attn_implementation == "sdpa"
        assert not each._forward_pre_hooks and not each.base_model._forward_pre_hooks
    with block:
        assert torch.equal(model.generate(ids, **GREEDY), wanted)
    with pytest.raises(RuntimeError, match="fault"), block:
        raise RuntimeError("fault")
    assert active_policy(model) is None and model.config._attn_implementation == "sdpa"


def test_one_block_serves_several_threads():
    model = tiny.model()
    ids = tiny.prompts((20,))["input_ids"]
    block = H2O(budget=8)(model)
    both = threading.Barrier(2)

    def run(_):
        with block:
            both.wait(timeout=30)
            tokens = model.generate(ids, **GREEDY)
            both.wait(timeout=30)
        return tokens

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(run, range(2))
    assert torch.equal(one, two) and not torch.equal(one, model.generate(ids, **GREEDY))
    assert model.config._attn_implementation == "sdpa"


def test_budgets_below_the_protected_tokens_are_refused():
    with pytest.raises(BudgetTooSmall, match="at least 5"):
        Sinks(budget=4)
    with pytest.raises(BadParameter, match="recent"):
        H2O(recent=1.5)
    with pytest.raises(BadParameter, match="compact_every"):
        H2O(compact_every=0)


def test_bytes_stay_flat_while_decoding():
    model = tiny.model()
    with H2O(budget=32)(model), torch.no_grad():
        cache = model(tiny.prompts((100,))["input_ids"]).past_key_values
        held = cache.nbytes()
        slot = 2 * 8 * 2 * 3 * 4  # keys and values, head size, KV heads, layers, bytes of a float32
        assert held == 32 * slot
        # Layers drop one after the other: at most one of the three holds the whole prompt.
        assert cache.peak_nbytes == (100 + 2 * 32) * slot // 3
        for step in range(40):
            cache = model(torch.tensor([[3 + step]]), past_key_values=cache).past_key_values
            assert cache.nbytes() == held


def test_crop_before_anything_was_dropped_and_not_after():
    model = tiny.model()
    with Sinks(budget=32)(model), torch.no_grad():
        cache = TokenCache(model, Sinks(budget=32))
        model(tiny.prompts((20,))["input_ids"], past_key_values=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 17 and cache.length == 17
        model(tiny.prompts((40,))["input_ids"], past_key_values=cache)
        with pytest.raises(CacheMisuse, match="cannot go back"):
            cache.crop(-1)


@torch.no_grad()
@pytest.mark.parametrize("policy", BY_ATTENTION, ids=_slug)
def test_after_a_crop_nothing_is_dropped_by_scores_that_count_what_is_gone(policy):
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((60,))["input_ids"]
    made = policy(budget=48)
    with attached(model):
        cache, fresh = TokenCache(model, made), TokenCache(model, made)
        model(ids[:, :40], past_key_values=cache)
        for token in (5, 6, 7):
            model(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-3)
        # While all fits it goes on as any cache.
        got = model(ids[:, 40:48], past_key_values=cache).logits
        assert torch.allclose(got, model(ids[:, :48], use_cache=False).logits[:, 40:], atol=1e-9)
        with pytest.raises(CacheMisuse, match=r"taken back .* with crop, and .*budget=48.* cache\.reset\(\)"):
            model(ids[:, 48:49], past_key_values=cache)
        cache.reset()
        for each in (cache, fresh):
            model(ids, past_key_values=each)
    for one, two in zip(cache.kept_positions(), fresh.kept_positions(), strict=True):
        assert one.shape[-1] == 48 and torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("policy", BY_THEMSELVES, ids=_slug)
def test_after_a_crop_policies_without_attention_drop_as_if_nothing_had_been_there(policy):
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((60,))["input_ids"]
    with attached(model):
        cache, fresh = (TokenCache(model, policy(budget=48)) for _ in range(2))
        model(ids[:, :43], past_key_values=cache)
        cache.crop(-3)
        model(ids[:, :40], past_key_values=fresh)
        for each in (cache, fresh):
            model(ids[:, 40:], past_key_values=each)
    for one, two in zip(cache.kept_positions(), fresh.kept_positions(), strict=True):
        assert one.shape[-1] == 48 and torch.equal(one, two)


@torch.no_grad()
def test_after_a_crop_padding_may_still_be_dropped():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((36, 16))
    with attached(model):
        cache = TokenCache(model, H2O(budget=36))
        model(**inputs, past_key_values=cache)
        cache.crop(-2)
        cache.select(torch.tensor([1]))
        for token in range(5, 13):
            model(torch.tensor([[token]]), past_key_values=cache, position_ids=cache.seen[:, None])
    for layer, kept in zip(cache.layers, cache.kept_positions(), strict=True):
        assert layer.size == 36 and torch.equal(kept[0, 0][kept[0, 0] >= 0], torch.arange(22))


# A keyboard interrupt ends a forward past the hooks that torch always calls.
@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize("after", (0, 1))
def test_a_cache_whose_forward_failed_halfway_is_refused_until_it_is_reset(after, error):
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    token = torch.tensor([[5]])
    fails = [False]

    def fault(module, args):
        if fails[0]:
            raise error("fault")

    with H2O(budget=16)(model), torch.no_grad():
        cache = model(ids).past_key_values
        peak = cache.peak_nbytes
        wanted = model(token, past_key_values=cache.fork()).logits
        # Nothing was written yet when a forward fails before its first layer.
        hook = model.model.embed_tokens.register_forward_pre_hook(fault)
        fails[0] = True
        with pytest.raises(error, match="fault"):
            model(token, past_key_values=cache)
        fails[0] = False
        hook.remove()
        assert torch.equal(model(token, past_key_values=cache.fork()).logits, wanted)
        model.model.layers[after].mlp.register_forward_pre_hook(fault)
        fails[0] = True
        with pytest.raises(error, match="fault"):
            model(token, past_key_values=cache)
        fails[0] = False
        for each in (copy.deepcopy(cache), cache):
            with pytest.raises(CacheMisuse, match=r"failed halfway.*cache\.reset\(\)"):
                model(token, past_key_values=each)
        cache.reset()
        assert cache.peak_nbytes == 0
        model(ids, past_key_values=cache)
        assert cache.peak_nbytes == peak
        assert torch.equal(model(token, past_key_values=cache).logits, wanted)


@pytest.mark.parametrize(
    "policy",
    (SpAtten(budget=0.5, dense=0), SpAtten(budget=0.5, dense=0, skip=False), FastKV(layer=0), LazyLLM(layers=(0,))),
    ids=str,
)
@pytest.mark.parametrize("after", (0, 1, 2))
def test_a_prompt_interrupted_between_layers_leaves_nothing_behind_a_reset(policy, after):
    model = tiny.model(dtype=torch.float64)
    first, second = tiny.prompts((40,))["input_ids"], tiny.prompts((33,), seed=1)["input_ids"]

    def fault(module, args):
        raise KeyboardInterrupt

    with policy(model), torch.no_grad():
        cache, fresh = policy.cache(model), policy.cache(model)
        hook = model.model.layers[after].mlp.register_forward_pre_hook(fault)
        with pytest.raises(KeyboardInterrupt):
            model(first, past_key_values=cache)
        hook.remove()
        cache.reset()
        for tokens in (second, torch.tensor([[5]]), torch.tensor([[6]])):
            one, two = (model(tokens, past_key_values=each).logits[:, -1] for each in (cache, fresh))
            assert torch.equal(one, two)


@torch.no_grad()
def test_reset_forgets_drafts_that_were_never_committed():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    policy = Keyformer(budget=64, rise=5)
    with attached(model):
        cache, fresh = TokenCache(model, policy), TokenCache(model, policy)
        model(ids, past_key_values=cache)
        cache.stage(deferred=True)
        model(ids[:, :4], past_key_values=cache)
        cache.reset()
        for each in (cache, fresh):
            model(ids, past_key_values=each)
    for one, two in zip(cache.layers, fresh.layers, strict=True):
        assert one.pending is None
        for name in ("mass", "step"):
            assert torch.equal(one.state[name], two.state[name])


@pytest.mark.parametrize(
    "policy",
    (
        None,
        H2O(budget=16),
        H2O(budget=16, positions="rolling"),
        Sinks(budget=16, bits=8, residual=4),
        Oracle(budget=12, bits=4, residual=4),
        Oracle(budget=12, offload=True),
    ),
    ids=str,
)
def test_a_cache_filled_in_inference_mode_goes_on_outside(policy):
    model = tiny.model()
    ids = tiny.prompts((160,))["input_ids"]
    results = []
    for inside in (torch.no_grad, torch.inference_mode):
        with policy(model) if policy else attached(model):
            cache = TokenCache(model, policy)
            with inside():
                model(ids[:, :150], past_key_values=cache)
                for place in range(150, 153):
                    model(ids[:, place : place + 1], past_key_values=cache)
            results.append(model.generate(ids[:, :154], past_key_values=cache, do_sample=False, max_new_tokens=140))
    assert torch.equal(*results)


def test_a_copy_of_an_explicit_cache_outlives_it():
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    token = torch.tensor([[5]])
    cache = H2O(budget=16).cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        twin, other = copy.deepcopy(cache), cache.fork()
        wanted = model(token, past_key_values=cache).logits
        del cache
        gc.collect()
        assert torch.equal(model(token, past_key_values=twin).logits, wanted)
        del twin
        assert torch.equal(model(token, past_key_values=other).logits, wanted)
        del other
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks


@torch.no_grad()
def test_rolling_positions_are_as_exact_far_out_as_at_the_start():
    model = tiny.model()
    with attached(model):
        near = TokenCache(model, H2O(budget=12, positions="rolling"))
        model(tiny.prompts((30,))["input_ids"], past_key_values=near)
        far = near.fork()
        # Keys stand as at position 0, so only the counts of what was read differ.
        far._seen = far.seen + 10_000_000
        for slots in (far.slots, *(layer.slots for layer in far.layers)):
            slots.positions = slots.places(1, far.device) + 10_000_000
        logits = [
            model(torch.tensor([[5]]), past_key_values=each, position_ids=each.seen[:, None]).logits
            for each in (near, far)
        ]
    assert torch.allclose(*logits, atol=1e-3)


@torch.no_grad()
def test_a_callers_cache_goes_on_inside_the_block():
    """The loop of `c = DynamicCache(); model(ids, past_key_values=c); model(token, past_key_values=c)`."""
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((21,))["input_ids"]
    given = DynamicCache(config=model.config)
    with H2O(budget=64)(model):
        model(ids[:, :20], past_key_values=given)
        got = model(ids[:, 20:], past_key_values=given, position_ids=torch.tensor([[20]])).logits[0, -1]
    assert torch.allclose(got, model(ids, use_cache=False).logits[0, -1], atol=1e-9)


@torch.no_grad()
def test_sliding_window_layers_keep_their_window():
    model = tiny.model("gemma2")
    for policy in (None, Sinks(budget=10)):
        with policy(model) if policy else attached(model):
            cache = TokenCache(model, policy)
            model(tiny.prompts((300,))["input_ids"], past_key_values=cache)
            for step in range(100):
                model(torch.tensor([[3 + step % 90]]), past_key_values=cache)
        for layer in cache.layers:
            assert layer.size <= (8 + 32 + 64 if layer.window else (10 if policy else 400))
    assert cache.nbytes() == sum(t.numel() * 4 for layer in cache.layers for t in layer.held())


@torch.no_grad()
def test_crop_of_a_padded_cache_filled_on_the_models_own_attention():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    cache = TokenCache(model)
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(**inputs, past_key_values=cache, position_ids=places)
    cache.crop(-2)
    mask = torch.cat([inputs["attention_mask"][:, :10], torch.ones(2, 1, dtype=torch.long)], 1)
    positions = mask.cumsum(-1)[:, -1:] - 1
    token = torch.tensor([[5], [6]])
    with attached(model):
        got = model(token, attention_mask=mask, past_key_values=cache, position_ids=positions).logits[:, -1]
    for row, length in enumerate((12, 7)):
        ids = torch.cat([inputs["input_ids"][row, -length:-2], token[row]])[None]
        assert torch.allclose(got[row], model(ids, use_cache=False).logits[0, -1], atol=1e-9)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


@torch.no_grad()
def test_masks_of_ones_own_and_forwards_into_an_open_block_are_refused():
    model = tiny.model()
    ids = tiny.prompts((6,))["input_ids"]
    with attached(model):
        with pytest.raises(CacheMisuse, match="4 dimensions"):
            model(ids, past_key_values=TokenCache(model), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
        cache = TokenCache(model)
        model(ids, past_key_values=cache)
        cache.stage(deferred=True)
        model(ids[:, :2], past_key_values=cache)
        with pytest.raises(CacheMisuse, match="still open"):
            model(ids[:, :2], past_key_values=cache)
        cache.commit(torch.tensor([[0]]), torch.tensor([1]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ("llama", "mistral", "gemma2"))
def test_realigned_rows_go_on_as_before(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((30, 17, 24))
    token = torch.tensor([[5], [6], [7]])
    with attached(model):
        cache = TokenCache(model)
        mask = inputs["attention_mask"].bool()
        cache.stage(valid=mask)
        model(inputs["input_ids"], past_key_values=cache, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        for step in range(12):
            cache.stage(deferred=True)
            block = torch.randint(3, 90, (3, 4), generator=torch.Generator().manual_seed(step))
            model(block, past_key_values=cache, position_ids=cache.seen[:, None] + torch.arange(4))
            counts = torch.tensor([1 + step % 4, 4 - step % 4, 1 + (step + 2) % 4])
            cache.commit(torch.arange(4).expand(3, 4), counts)
        twin = cache.fork()
        twin.realign()
        assert twin.slots.size == int((cache.seen + torch.tensor([0, 13, 6])).max()) < cache.slots.size
        assert torch.equal(twin.seen, cache.seen)
        one, two = (
            model(token, past_key_values=each, position_ids=each.seen[:, None]).logits for each in (cache, twin)
        )
    assert torch.allclose(one, two, atol=1e-4)
    if kind == "llama":
        with pytest.raises(CacheMisuse, match="gaps"):
            model(token, past_key_values=cache)

"""FastKV's own invariants, as on its card, and what the engine promises where layers do not run for all tokens."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from tests import tiny
from tests.kvcache import test_engine as engine
from tests.kvcache.test_h2o import _eager
from tokenry.errors import BadParameter, BudgetTooSmall, CacheMisuse
from tokenry.kvcache import FastKV, SnapKV
from tokenry.models import TokenCache, attached

GREEDY = {"do_sample": False, "max_new_tokens": 8}
SERVED = [kind for kind in tiny.SERVED if kind != "mistral"]
SMALL = FastKV(budget=0.25, propagated=0.5, layer=1, window=4, kernel=3)


def _hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _masked(model, ids, layer, chosen):
    """Logits of the last token where the layers behind `layer` hide all tokens that are not in `chosen`; hidden rows
    run as well, and nobody sees them."""
    hidden = torch.ones(ids.shape[1], dtype=torch.bool)
    hidden[chosen] = False
    late = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    handles = []
    for number, block in enumerate(model.model.layers):
        mask = late if number <= layer else late | (hidden & ~torch.eye(ids.shape[1], dtype=torch.bool))
        bias = torch.zeros(1, 1, *mask.shape, dtype=model.dtype).masked_fill_(mask, float("-inf"))

        def give(module, args, kwargs, bias=bias):
            return args, kwargs | {"attention_mask": bias}

        handles.append(block.register_forward_pre_hook(give, with_kwargs=True))
    out = model(ids, use_cache=True)
    for handle in handles:
        handle.remove()
    return out


@torch.no_grad()
def test_later_layers_equal_a_model_that_hides_the_other_tokens():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    with SMALL(model):
        out = model(ids)
    cache = out.past_key_values
    assert cache.get_seq_length() == 40 and [layer.ran for layer in cache.layers] == [40, 40, 20]
    assert cache.computed_share() == pytest.approx(100 / 120)
    assert cache.layers[2].products == 20 * 20 and cache.layers[1].products == 40 * 40
    went = ~out.logits[0].isnan().any(-1)
    chosen = went.nonzero()[:, 0]
    assert chosen.numel() == 20 and bool(went[-4:].all())
    wanted = _masked(model, ids, 1, chosen)
    assert torch.allclose(out.logits[0, chosen], wanted.logits[0, chosen], atol=1e-9)
    full = model(ids, use_cache=True).past_key_values
    kept = cache.kept_positions()
    for layer, positions, one, other in zip(
        cache.layers, kept, full.layers, wanted.past_key_values.layers, strict=True
    ):
        assert positions.shape == (1, 2, 10) and bool((positions[..., -4:] == torch.arange(36, 40)).all())
        assert bool((positions.diff(dim=-1) > 0).all())
        reference = other if layer.number == 2 else one
        picks = positions[..., None].expand(-1, -1, -1, 8)
        assert torch.allclose(layer.keys, reference.keys.gather(2, picks), atol=1e-9)
        assert torch.allclose(layer.values, reference.values.gather(2, picks), atol=1e-9)
    assert set(kept[2].flatten().tolist()) <= set(chosen.tolist())


@torch.no_grad()
@pytest.mark.parametrize("pooling", ("max", "mean"))
def test_what_goes_on_is_what_the_window_attends_to(pooling):
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    policy = FastKV(budget=0.25, propagated=0.5, layer=1, window=4, kernel=3, pooling=pooling)
    with policy(model):
        out = model(ids)
    attention = _eager(model, ids)[1][0, :, -4:, :36].sum(1)  # [heads, 36]
    pool = torch.nn.functional.max_pool1d if pooling == "max" else torch.nn.functional.avg_pool1d
    pooled = pool(attention, 3, stride=1, padding=1)
    wanted = pooled.sum(0).topk(16).indices.sort().values.tolist()
    chosen = (~out.logits[0].isnan().any(-1)).nonzero()[:, 0].tolist()
    assert chosen == [*wanted, *range(36, 40)]
    for head, group in enumerate(pooled.view(2, 2, 36).sum(1)):
        kept = out.past_key_values.kept_positions()[1][0, head].tolist()
        assert kept == [*group.topk(6).indices.sort().values.tolist(), *range(36, 40)]


@torch.no_grad()
def test_all_tokens_going_on_is_snapkv():
    model = tiny.model()
    inputs = tiny.prompts((40, 29))
    options = {"budget": 12, "window": 4, "kernel": 3, "pooling": "mean"}
    with SnapKV(**options)(model):
        wanted = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    for policy in (FastKV(**options, propagated=40), FastKV(**options, propagated=1.0)):
        with policy(model):
            got = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert torch.equal(got.sequences, wanted.sequences)
        for one, two in zip(got.past_key_values.kept_positions(), wanted.past_key_values.kept_positions(), strict=True):
            assert torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("kind", SERVED)
def test_cutting_behind_the_last_layer_leaves_the_first_token(kind):
    model = tiny.model(kind, torch.float64)
    inputs = tiny.prompts((40, 29))
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    full = [number for number, layer in enumerate(TokenCache(model).layers) if layer.window is None]
    with FastKV(budget=0.25, propagated=0.3, window=4, layer=full[-1])(model):
        got = model(**inputs, position_ids=places).logits
    wanted = model(**inputs, position_ids=places).logits
    if full[-1] == 2:
        assert torch.allclose(got[:, -4:], wanted[:, -4:], atol=1e-9)
        assert (~got.isnan().any(-1)).sum(-1).tolist() == [12, 8]
    else:
        # A sliding-window layer behind it sees less of its window.
        assert not torch.allclose(got[:, -1], wanted[:, -1], atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", SERVED)
def test_a_row_of_a_padded_batch_equals_the_row_alone(kind):
    model = tiny.model(kind)
    policy = FastKV(budget=0.25, propagated=0.5, window=4, kernel=3)
    for lengths in ((40, 29), (29, 40), (5, 40)):
        inputs = tiny.prompts(lengths)
        with policy(model):
            both = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            for row, length in enumerate(lengths):
                ids = inputs["input_ids"][row : row + 1, -length:]
                alone = model.generate(ids, **GREEDY, return_dict_in_generate=True)
                assert torch.equal(both.sequences[row, -8:], alone.sequences[0, -8:])
                pairs = zip(both.past_key_values.kept_positions(), alone.past_key_values.kept_positions(), strict=True)
                for one, two in pairs:
                    heads = max(one.shape[1], two.shape[1])
                    for head in range(heads):
                        mine, own = one[row, head % one.shape[1]], two[0, head % two.shape[1]]
                        assert mine[mine >= 0].tolist() == own[own >= 0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    model = tiny.model(dtype=dtype)
    with SMALL(model):
        out = model.generate(**tiny.prompts((40, 29)), **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert all(bool(logits.isfinite().all()) for logits in out.logits)
    assert all(layer.keys.dtype == dtype for layer in out.past_key_values.layers)


@torch.no_grad()
def test_only_the_first_forward_of_several_tokens_is_cut():
    model = tiny.model()
    ids = tiny.prompts((60,))["input_ids"]
    with SMALL(model):
        cache = model(ids[:, :40]).past_key_values
        turn = model(ids[:, 40:], past_key_values=cache)
    assert bool(turn.logits.isfinite().all())
    assert [layer.ran for layer in cache.layers] == [60, 60, 40]
    assert cache.get_seq_length() == 60 and all(layer.size == 15 for layer in cache.layers)


@torch.no_grad()
def test_later_layers_read_what_they_keep():
    """Where fewer than the budget would go on, as many as the budget do."""
    model = tiny.model()
    for policy in (FastKV(budget=0.5, layer=1, window=4), FastKV(budget=20, propagated=9, layer=1, window=4)):
        with policy(model):
            cache = model(tiny.prompts((40,))["input_ids"]).past_key_values
        assert [layer.ran for layer in cache.layers] == [40, 40, 20] and all(layer.size == 20 for layer in cache.layers)


def test_the_prompt_that_fits_runs_in_full():
    model = tiny.model()
    with FastKV(budget=40, propagated=40, window=4)(model):
        out = model(tiny.prompts((40, 12))["input_ids"])
    assert out.past_key_values.computed_share() == 1 and bool(out.logits.isfinite().all())


@pytest.mark.parametrize(
    "check",
    (
        partial(engine.test_every_layer_keeps_its_budget_after_every_forward, budget=17, every=5),
        engine.test_fork_reorder_and_select_carry_the_state,
    ),
    ids=("budget", "fork"),
)
def test_what_the_engine_promises(check):
    check(partial(FastKV, window=4))


def test_the_model_is_left_as_it_was():
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    before = _hooks(model), [dict(vars(layer)).keys() for layer in model.model.layers]
    wanted = model(ids).logits
    with SMALL(model):
        assert _hooks(model) > before[0]
        with pytest.raises(IndexError):
            model(ids + 1000)
        # A failed forward leaves nothing behind that the next would trip over.
        assert model(ids).past_key_values.computed_share() < 1
    assert (_hooks(model), [dict(vars(layer)).keys() for layer in model.model.layers]) == before
    cache = SMALL.cache(model)
    model(ids, past_key_values=cache)
    assert cache.computed_share() < 1
    # Another cache of the model, and none at all, are not touched.
    assert torch.allclose(model(ids, use_cache=False).logits, wanted, atol=1e-5)
    assert torch.allclose(model(ids, past_key_values=TokenCache(model)).logits, wanted, atol=1e-5)
    del cache
    assert _hooks(model) == before[0] and torch.equal(model(ids).logits, wanted)


def test_threads_do_not_meet():
    model = tiny.model()
    prompts = [tiny.prompts((length,), seed=length)["input_ids"] for length in (40, 33)]
    policies = [SMALL, None, FastKV(budget=0.3, propagated=0.3, layer=0, window=4)]

    def run(policy, ids):
        if policy is None:
            return model.generate(ids, **GREEDY)
        with policy(model):
            return model.generate(ids, **GREEDY)

    jobs = [(policy, ids) for policy in policies for ids in prompts]
    wanted = [run(*job) for job in jobs]
    got: list[list[torch.Tensor]] = [[] for _ in jobs]
    gate = threading.Barrier(len(jobs))

    def work(number):
        gate.wait()
        for _ in range(3):
            got[number].append(run(*jobs[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, right in zip(got, wanted, strict=True):
        assert len(found) == 3 and all(torch.equal(one, right) for one in found)


def test_misuse_is_refused():
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    with attached(model), pytest.raises(CacheMisuse, match="inside `with policy"):
        model(ids, past_key_values=TokenCache(model, SMALL))
    with FastKV(budget=0.25, layer=7)(model), pytest.raises(BadParameter, match="0, 1, 2"):
        model(ids)
    gemma = tiny.model("gemma2")
    sliding = next(n for n, layer in enumerate(TokenCache(gemma).layers) if layer.window is not None)
    with FastKV(budget=0.25, layer=sliding)(gemma), pytest.raises(BadParameter, match="attend in full"):
        gemma(ids)
    with pytest.raises(BudgetTooSmall, match="at least 9"):
        FastKV(budget=8)
    for options in ({"propagated": 0}, {"propagated": 1.5}, {"layer": -1}, {"kernel": 4}):
        with pytest.raises(BadParameter, match=next(iter(options))):
            FastKV(**options)


def test_the_papers_share_of_the_work():
    """Half of the layers in full and a fifth of the prompt behind them: 60 % (section 4.1)."""
    model = tiny.model()
    with torch.no_grad(), FastKV(layer=0)(model):
        cache = model(tiny.prompts((200,))["input_ids"]).past_key_values
    assert cache.computed_share() == pytest.approx(1 / 3 + 2 / 3 * 0.2)
    assert FastKV().cut_layer(cache) == 0

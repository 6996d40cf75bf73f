"""SpAtten's own invariants, as on its card: cascade, accumulated scores, heads, values, bits."""

from __future__ import annotations

import itertools
import types
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.kvcache import test_engine as engine
from tests.kvcache.test_h2o import _eager
from tokenry.errors import BadParameter, BudgetTooSmall
from tokenry.kvcache import SpAtten
from tokenry.kvcache.spatten import _rounded
from tokenry.models import AttentionRows, Slots

GREEDY = {"do_sample": False, "max_new_tokens": 12}
SERVED = [kind for kind in tiny.SERVED if kind != "mistral"]
SMALL = SpAtten(budget=0.5, dense=0)


def _sets(cache):
    """The positions that each layer holds, the same in all its heads."""
    kept = [positions[0] for positions in cache.kept_positions()]
    assert all(bool((positions == positions[:1]).all()) for positions in kept)
    return [positions[0].tolist() for positions in kept]


@torch.no_grad()
def test_accumulated_attention_decides_and_sets_are_nested():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    for recent in (0.0, 0.3, 0.5):
        policy = SpAtten(budget=0.5, dense=0, skip=False, recent=recent)
        with policy(model):
            kept = _sets(model(ids).past_key_values)
        assert [len(positions) for positions in kept] == [30, 20, 10]
        score, there = 0, set(range(40))
        for attention, found in zip(_eager(model, ids), kept, strict=True):
            score = score + attention[0].sum((0, 1))
            newest = set(range(40 - max(1, int(recent * len(found))), 40))
            free = sorted(there - newest, key=lambda place: (-score[place].item(), place))
            there = {*free[: len(found) - len(newest)], *newest}
            assert found == sorted(there)


@torch.no_grad()
def test_scores_sum_to_the_heads_and_rows_of_all_layers_so_far():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    sums = []

    class Listening(SpAtten):
        def observe(self, layer, rows):
            super().observe(layer, rows)
            sums.append(layer.cache.handed["tokens"].sum().item())

    for options in ({"skip": False}, {}, {"heads": 0.5}):
        sums.clear()
        with Listening(budget=0.5, dense=0, **options)(model):
            cache = model(ids).past_key_values
        # Rows of each layer, and heads that live in it.
        rows = [40, 40, 40] if options.get("skip") is False else [40, 30, 20]
        heads = [4, 3, 2] if "heads" in options else [4, 4, 4]
        wanted = [sum(a * b for a, b in zip(rows[:n], heads[:n], strict=True)) for n in (1, 2, 3)]
        assert sums == pytest.approx(wanted)
        assert [layer.ran for layer in cache.layers] == rows


@torch.no_grad()
def test_padding_collects_nothing():
    model = tiny.model(dtype=torch.float64)
    with SpAtten(budget=64, dense=0, spread=0.0)(model):
        cache = model(**tiny.prompts((40, 21))).past_key_values
    for layer in cache.layers:
        assert bool((layer.state["mass"][1, :, :19] == 0).all()) and bool((layer.state["mass"][1, :, 19:] > 0).all())


def _hidden_behind(model, ids, kept):
    """The last token's logits where each layer hides what layers before it have dropped; all rows run."""
    handles, late = [], torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    present = torch.ones(ids.shape[1], dtype=torch.bool)
    for block, found in zip(model.model.layers, kept, strict=True):
        mask = late | (~present & ~torch.eye(ids.shape[1], dtype=torch.bool))
        bias = torch.zeros(1, 1, *mask.shape, dtype=model.dtype).masked_fill_(mask, float("-inf"))

        def give(module, args, kwargs, bias=bias):
            return args, kwargs | {"attention_mask": bias}

        handles.append(block.register_forward_pre_hook(give, with_kwargs=True))
        present = torch.zeros_like(present)
        present[found] = True
    logits = model(ids, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


@torch.no_grad()
def test_running_for_fewer_tokens_equals_hiding_them():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    with SMALL(model):
        out = model(ids)
    kept = _sets(out.past_key_values)
    went = (~out.logits[0].isnan().any(-1)).nonzero()[:, 0].tolist()
    assert [len(found) for found in kept] == [30, 20, 10] and went == kept[1]
    assert torch.allclose(out.logits[0, went], _hidden_behind(model, ids, kept)[went], atol=1e-9)
    assert not torch.allclose(out.logits[0, -1], model(ids).logits[0, -1], atol=1e-3)
    assert out.past_key_values.computed_share() == pytest.approx((40 + 30 + 20) / 120)
    assert [layer.products for layer in out.past_key_values.layers] == [1600, 900, 400]


@torch.no_grad()
@pytest.mark.parametrize("every", (1, 5))
def test_decoding_keeps_each_layers_budget_in_cascade(every):
    model = tiny.model()
    policy = SpAtten(budget=12, dense=0, compact_every=every)
    assert [policy.slots(share, 41) for share in policy._schedule(3)] == [18, 12, 6]
    with policy(model):
        cache = model(tiny.prompts((41,))["input_ids"]).past_key_values
        for step in range(20):
            cache = model(torch.tensor([[3 + 7 * step % 90]]), past_key_values=cache).past_key_values
            kept = _sets(cache)
            limits = [bound + every - 1 for bound in (18, 12, 6)]
            assert all(len(found) <= limit for found, limit in zip(kept, limits, strict=True))
            assert all(set(later) <= set(one) for one, later in itertools.pairwise(kept))
            assert all(found[-1] == 41 + step for found in kept)


def test_schedules():
    """Linear with the budget as mean; 15 % of the layers, at least 3, are left alone, as in the paper."""
    shares = SpAtten()._schedule(9)
    assert sum(shares) / 9 == pytest.approx(0.45) and shares[0] == pytest.approx(0.675)
    assert all(one - two == pytest.approx((shares[0] - shares[8]) / 8) for one, two in itertools.pairwise(shares))
    assert SpAtten(budget=0.9)._schedule(3) == pytest.approx([1.0, 0.9, 0.8])
    counted = SpAtten(budget=64, spread=0.25)
    assert [counted.slots(share, 400) for share in counted._schedule(5)] == [80, 72, 64, 56, 48]
    assert SpAtten()._schedule(1) == [0.45] and counted._schedule(1) == [1]
    config = tiny.config("llama")
    for layers, dense, heads in ((24, 4, 8), (12, 3, 4), (6, 3, 2), (3, 1, 1)):
        config.num_hidden_layers = layers
        plan = SpAtten(heads=0.5).prepare(AutoModelForCausalLM.from_config(config))
        assert sorted(plan.budgets) == list(range(dense, layers))
        assert sorted(plan.heads) == list(range(heads, layers)) and plan.heads[layers - 1] == 2
        assert list(plan.heads.values()) == sorted(plan.heads.values(), reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("layers", (4, 8))
def test_a_counted_budget_is_the_mean_of_the_layers_whatever_the_prompt(layers):
    """Below the first layer's count the schedule is narrowed, as that of a share is; counts are rounded."""
    config = tiny.config("llama")
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with SpAtten(budget=32, dense=0)(model):
        for length in (20, 32, 33, 40, 47, 48, 100):
            sizes = [layer.size for layer in model(tiny.prompts((length,))["input_ids"]).past_key_values.layers]
            assert sum(sizes) / layers == pytest.approx(min(length, 32), abs=0.5 / layers)
            assert sizes == sorted(sizes, reverse=True) and sizes[0] == min(length, 48)
        # Each row of a batch as it is alone.
        cache = model(**tiny.prompts((100, 40))).past_key_values
        assert [layer.budgets() for layer in (cache.layers[0], cache.layers[-1])] == [[48, 40], [16, 24]]


def test_a_model_whose_layers_would_all_stay_dense_is_refused():
    for model in (tiny.model(), tiny.model("gemma2")):
        with pytest.raises(BadParameter, match=r"dense=9.*attends in full"), SpAtten(dense=9)(model):
            model(tiny.prompts((10,))["input_ids"])


@torch.no_grad()
def test_silenced_heads_equal_a_model_without_them():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    with SpAtten(budget=64, dense=0, heads=0.5)(model):
        out = model(ids)
    alive = [layer.beside.get("heads") for layer in out.past_key_values.layers]
    assert alive[0] is None and alive[1].sum().item() == 3 and alive[2].sum().item() == 2
    assert bool((alive[1] | ~alive[2]).all()), "heads leave in cascade"
    sums, handles = [torch.zeros(4, dtype=torch.float64)], []
    for number, block in enumerate(model.model.layers):

        def silence(module, args, number=number):
            parts = args[0].view(1, 40, 4, 8)
            live = torch.ones(4, dtype=torch.bool)
            if number:
                order = sums[-1].masked_fill(~lives[-1], -1).argsort(descending=True, stable=True)
                live = torch.zeros(4, dtype=torch.bool).index_fill_(0, order[: 4 - number], True)
            lives.append(live)
            parts = parts * live[:, None]
            sums.append(sums[-1] + parts.abs().sum((0, 1, 3)))
            return (parts.reshape(1, 40, 32),)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(silence))
    lives: list[torch.Tensor] = []
    wanted = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert torch.allclose(out.logits, wanted, atol=1e-9)
    assert [live.tolist() for live in lives[1:]] == [alive[1][0].tolist(), alive[2][0].tolist()]
    assert SpAtten(heads=0.5).traffic(out.past_key_values)["heads"] == pytest.approx((1 + 0.75 + 0.5) / 3)


def _step(policy, rows, value):
    """A decode step's output in a layer that keeps account."""
    beside: dict[str, torch.Tensor] = {}
    layer = types.SimpleNamespace(beside=beside, lay=beside.__setitem__, slots=Slots())
    return policy._read_little(layer, rows, value), beside["traffic"]


@pytest.mark.parametrize("masked", (False, True))
def test_few_values_lose_at_most_the_dropped_mass(masked):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, rows, 8, generator=generator) for heads, rows in ((4, 3), (2, 50), (2, 50))
    )
    mask = torch.rand(2, 1, 3, 50, generator=generator) > 0.3 if masked else None
    exact = AttentionRows(query, key, mask, False, 1.0).attend(value)
    for share in (1.0, 0.5, 0.2):
        rows = AttentionRows(query, key, mask, False, 1.0)
        got, traffic = _step(SpAtten(values=share, msb=0), rows, value)
        weights = AttentionRows(query, key, mask, False, 1.0).logits().softmax(-1)
        seen = torch.full((2, 1, 3), 50) if mask is None else mask.sum(-1)
        kept = (seen * share - 1e-6).ceil().long()[:, :, None, :, None]
        ranked = weights.sort(dim=-1, descending=True).values
        dropped = ranked.masked_fill(torch.arange(50) < kept, 0).sum(-1)
        bound = (dropped * value.norm(dim=-1).amax(-1)[:, :, None, None]).flatten(1, 2)
        assert bool(((got - exact).norm(dim=-1) <= bound + 1e-5).all())
        # The other probabilities stay as they were: what is given is not more than what was not dropped.
        ones, _ = _step(SpAtten(values=share), AttentionRows(query, key, mask, False, 1.0), torch.ones_like(value))
        assert torch.allclose(ones[..., 0], 1 - dropped.flatten(1, 2), atol=1e-5)
        assert traffic[:, 2].sum().item() == kept.sum().item() * 4
        # Importance is taken from all probabilities.
        assert torch.allclose(rows.column_sums(), weights.sum((2, 3)), atol=1e-5)


def test_low_bits_are_read_where_no_probability_is_large():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, rows, 8, generator=generator) for heads, rows in ((4, 2), (2, 40), (2, 40))
    )
    query[:, :2] *= 6  # peaked in two heads, flat in the others
    rows = AttentionRows(query, key, None, False, 0.5)

    def attend(msb, lsb, hidden):
        parts = [_rounded(part, msb + lsb, hidden) for part in (query, key)]
        return AttentionRows(*parts, None, False, 0.5).attend(value)

    exact = rows.attend(value)
    for threshold, share in ((0.0, 0), (1.0, 1)):
        got, traffic = _step(
            SpAtten(msb=4, lsb=6, threshold=threshold), AttentionRows(query, key, None, False, 0.5), value
        )
        assert torch.allclose(got, attend(4, 6, 6 * (1 - share)), atol=1e-6)
        assert traffic[0, 1] == share * traffic[0, 0] == share * 8
    assert (attend(4, 6, 0) - exact).abs().max() < 0.1 * (attend(4, 6, 6) - exact).abs().max()
    assert torch.allclose(attend(16, 6, 0), exact, atol=1e-4)
    got, traffic = _step(SpAtten(msb=4, lsb=6, threshold=0.5), AttentionRows(query, key, None, False, 0.5), value)
    largest = (
        AttentionRows(*(_rounded(part, 10, 6) for part in (query, key)), None, False, 0.5).logits().softmax(-1).amax(-1)
    )
    assert traffic[0, 1] == (largest < 0.5).sum() and 0 < traffic[0, 1] < traffic[0, 0]


def test_rounding():
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = x.abs().amax(-1, keepdim=True) / 31
    assert bool(((_rounded(x, 6, 0) - x).abs() <= step / 2 + 1e-12).all())
    # Half of the four steps that two bits tell apart, and half a step of rounding.
    assert bool(((_rounded(x, 6, 2) - x).abs() <= 2 * step + 1e-12).all())
    assert bool((_rounded(torch.zeros(2, 8), 6, 0) == 0).all())


@torch.no_grad()
@pytest.mark.parametrize("kind", SERVED)
def test_a_row_of_a_padded_batch_equals_the_row_alone(kind):
    model = tiny.model(kind)
    for options in ({}, {"heads": 0.5, "values": 0.5, "msb": 6}):
        policy = SpAtten(budget=0.4, dense=0, **options)
        for lengths in ((40, 29), (9, 40)):
            inputs = tiny.prompts(lengths)
            with policy(model):
                both = model.generate(**inputs, **GREEDY)
                for row, length in enumerate(lengths):
                    alone = model.generate(inputs["input_ids"][row : row + 1, -length:], **GREEDY)
                    assert torch.equal(both[row, -12:], alone[0, -12:])


@torch.no_grad()
def test_chunks_and_turns_drop_in_cascade_too():
    model = tiny.model()
    ids = tiny.prompts((60,))["input_ids"]
    with SpAtten(budget=12, dense=0)(model):
        cache = model(ids[:, :40]).past_key_values
        turn = model(ids[:, 40:], past_key_values=cache)
    kept = _sets(cache)
    assert [len(found) for found in kept] == [18, 12, 6] and set(kept[2]) <= set(kept[1]) <= set(kept[0])
    assert bool(turn.logits[0, -1].isfinite().all()) and cache.layers[0].ran == 60 > cache.layers[2].ran


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    model = tiny.model(dtype=dtype)
    for options in ({}, {"heads": 0.5, "values": 0.5, "msb": 6}):
        with SpAtten(budget=0.3, dense=0, **options)(model):
            out = model.generate(**tiny.prompts((40, 29)), **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert all(bool(logits.isfinite().all()) for logits in out.logits)


@pytest.mark.parametrize(
    "check",
    (
        partial(engine.test_every_layer_keeps_its_budget_after_every_forward, budget=17, every=5),
        engine.test_fork_reorder_and_select_carry_the_state,
        engine.test_physical_eviction_equals_masking,
    ),
    ids=("budget", "fork", "masking"),
)
@pytest.mark.parametrize("options", ({}, {"heads": 0.5}))
def test_what_the_engine_promises(check, options):
    if options and check is engine.test_physical_eviction_equals_masking:
        pytest.skip("the masked run has all its heads")
    # The masked run reads the prompt in full.
    check(partial(SpAtten, dense=0, spread=0.0, skip=False, **options))


def test_misuse_is_refused():
    for options in ({"spread": 1.0}, {"dense": -1}, {"heads": 0.0}, {"values": 1.5}, {"msb": 1}, {"lsb": 17},
                    {"threshold": 2.0}, {"recent": 1.0}):  # fmt: skip
        with pytest.raises(BadParameter, match=next(iter(options))):
            SpAtten(**options)
    with pytest.raises(BudgetTooSmall, match="at least 2"):
        SpAtten(budget=1)

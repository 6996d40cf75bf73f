"""TreeKV's own invariants, as on its card."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.kvcache.test_h2o import _eager
from tests.kvcache.test_keyformer import fed
from tokenry.errors import BadParameter, BudgetTooSmall
from tokenry.kvcache import TreeKV
from tokenry.kvcache.treekv import sweep
from tokenry.models import TokenCache, attached

# Sixteen slots after 80 tokens, where the newer of two always wins.
TREE = [15, 31, 39, 47, 51, 55, 59, 63, 65, 67, 69, 71, 73, 75, 77, 79]


def reference(entries, worth, size, gone=0, stride=1):
    """The algorithm as printed: an entry at a time comes in on the right, the lesser of the scoped pair goes."""
    region = []
    for entry in entries:
        region.append(entry)
        if len(region) > size:
            place = gone * stride % size
            del region[place if worth[region[place]] <= worth[region[place + 1]] else place + 1]
            gone += 1
    return region


def number(*values):
    return torch.tensor(values).view(1, -1, 1)


def test_equal_worth_leaves_the_tree():
    assert reference(range(80), [0] * 80, 16) == TREE
    lost = sweep(torch.zeros(1, 1, 80), 16, number(64), number(0), 64)
    assert (~lost[0, 0]).nonzero()[:, 0].tolist() == TREE
    gaps = torch.tensor(TREE).diff().flip(0).tolist()
    assert gaps == [2] * 8 + [4] * 4 + [8] * 2 + [16]


@torch.no_grad()
@pytest.mark.parametrize("stride", (1, 2))
def test_a_model_fed_token_by_token_leaves_the_tree(stride):
    model = tiny.model()
    policy = TreeKV(budget=16, sinks=0, recent=0.0, guided=False, stride=stride)
    with attached(model):
        cache = fed(model, policy, *tiny.prompts((80,))["input_ids"].split(1, 1))
    wanted = TREE if stride == 1 else reference(range(80), [0] * 80, 16, stride=2)
    assert all(kept[0, 0].tolist() == kept[0, 1].tolist() == wanted for kept in cache.kept_positions())


@pytest.mark.parametrize("stride", (1, 2))
def test_sweep_equals_the_printed_algorithm(stride):
    """Many drops at once, rows and heads at different scopes, against one drop at a time."""
    generator = torch.Generator().manual_seed(0)
    for size, entries in ((1, 6), (5, 6), (5, 40), (16, 70), (7, 50)):
        worth = torch.rand(2, 3, entries + 4, generator=generator)
        gone = torch.tensor([0, size - 1, 3, 1, 100, 7]).view(2, 3, 1)
        drops = torch.tensor([0, 1, entries - size, 0, entries - size, 1]).view(2, 3, 1)
        lost = sweep(worth, size, drops, gone, entries - size, stride)
        for row in range(2):
            for head in range(3):
                count = int(drops[row, head])
                # What lies behind the tree's entries is not its own.
                wanted = reference(range(size + count), worth[row, head], size, int(gone[row, head]), stride)
                got = (~lost[row, head]).nonzero()[:, 0].tolist()
                assert got == [*wanted, *range(size + count, entries + 4)]


def test_a_sweep_empties_no_region():
    """Whatever the worth, one of each two neighbours stays; the largest sums would leave the first half empty."""
    worth = torch.cat([torch.full((32,), 0.01), torch.ones(32)]).view(1, 1, -1)
    lost = sweep(worth, 32, number(32), number(0), 32)
    assert bool((lost.view(32, 2).sum(-1) == 1).all())
    assert bool((worth[0, 0].topk(32).indices >= 32).all())


@torch.no_grad()
def test_each_step_drops_the_lesser_of_the_scoped_pair():
    model = tiny.model(dtype=torch.float64)
    policy = TreeKV(budget=17, sinks=2, recent=0.3)
    size = 17 - 2 - 5
    tokens = tiny.prompts((60,))["input_ids"].split(1, 1)
    attentions = 0
    with attached(model):
        cache = fed(model, policy, *tokens[:17])
        for step, token in enumerate(tokens[17:]):
            layer = cache.layers[1]
            held, mass, count = (
                t[0].clone()
                for t in (cache.kept_positions()[1].expand(-1, 2, -1), layer.state["mass"], layer.state["count"])
            )
            model(token, past_key_values=cache, position_ids=torch.tensor([[17 + step]]))
            kept = cache.kept_positions()[1][0]
            for head in range(2):
                before, after = [*held[head].tolist(), 17 + step], kept[head].tolist()
                (gone,) = set(before) - set(after)
                tree = [p for p in before if p >= 2 and p <= 17 + step - 5]
                place = step % size
                pair = tree[place : place + 2]
                assert gone in pair and after[:2] == [0, 1] and after[-5:] == [*range(13 + step, 18 + step)]
                # The survivor of the pair tells its new mean; that of the lost one cannot have been above it.
                other = pair[1 - pair.index(gone)]
                mean = (layer.state["mass"] / layer.state["count"])[0, head, after.index(other)]
                least = mass[head, before.index(gone)] / (count[head, before.index(gone)] + 1)
                assert least <= mean
                attentions += 1
                assert 0 <= float(mean) <= 1
    assert attentions == 86
    _, positions = layer.slots.materialise(1, layer.device)
    assert torch.equal(layer.state["count"], (60 - positions).to(layer.state["count"].dtype))


@torch.no_grad()
def test_a_prompt_is_judged_by_its_last_queries_and_swept_by_blocks():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((200,))["input_ids"]
    policy = TreeKV(budget=46, sinks=4, recent=0.3, block=5)
    size = 46 - 4 - 13  # 29 tokens: five blocks and four tokens
    probabilities = _eager(model, ids)
    with attached(model):
        cache = fed(model, policy, ids)
        loose = fed(model, TreeKV(budget=256, block=5), ids)
    for index, kept in enumerate(cache.kept_positions()):
        last = probabilities[index][0].view(2, 2, 200, 200)[:, :, -5:].sum((1, 2)) / 2
        seen = (200 - torch.arange(200)).clamp(max=5)
        # Eager attention takes its softmax in float32.
        assert torch.allclose(loose.layers[index].state["mass"][0], last, atol=1e-6)
        last = loose.layers[index].state["mass"][0]
        assert torch.equal(loose.layers[index].state["count"][0, 0], seen.to(torch.float32))
        for head in range(2):
            mean = last[head] / seen
            tree = torch.arange(4, 187)
            blocks = mean[tree][:180].view(36, 5).mean(-1).tolist()
            drops = (183 - size) // 5
            chosen = reference(range(size // 5 + drops), blocks, size // 5)
            left = [p for b in [*chosen, *range(size // 5 + drops, 36)] for p in range(4 + 5 * b, 9 + 5 * b)]
            left = [*left, 184, 185, 186]
            assert 0 < len(left) - size < 5
            wanted = reference(left, mean.tolist(), size, gone=drops * 5)
            assert kept[0, head].tolist() == [*range(4), *wanted, *range(187, 200)]


@torch.no_grad()
def test_heads_keep_leaves_of_their_own_unless_shared():
    model = tiny.model()
    runs = tiny.prompts((90,))["input_ids"].split([60, *[1] * 30], 1)
    with attached(model):
        own, shared = (
            fed(model, TreeKV(budget=20, sinks=1, shared=shared), *runs).kept_positions() for shared in (False, True)
        )
    assert not all(torch.equal(kept[:, 0], kept[:, 1]) for kept in own)
    assert all(torch.equal(kept[:, 0], kept[:, 1]) for kept in shared)


@torch.no_grad()
def test_compacting_later_drops_as_many():
    model = tiny.model()
    ids = tiny.prompts((75,))["input_ids"]
    with attached(model):
        cache = TokenCache(model, TreeKV(budget=16, sinks=2, compact_every=6))
        for position, token in enumerate(ids.split(1, 1)):
            model(token, past_key_values=cache, position_ids=torch.tensor([[position]]))
            seen = position + 1
            # Once the tokens seen are a multiple of six, the budget holds; until then what came since is held too.
            assert cache.layers[0].size == (min(seen, 16) if seen % 6 == 0 else min(seen, 16 + seen % 6, 21))
            if seen >= 18:
                kept = cache.kept_positions()[0][0]
                assert bool((kept[:, :2] == torch.arange(2)).all()) and bool((kept.diff(dim=-1) > 0).all())


@torch.no_grad()
def test_rolling_positions_count_what_is_held():
    """One layer fed token by token: the last output is that of a dense run over the held tokens alone."""
    config = tiny.config("llama")
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    ids = tiny.prompts((40,))["input_ids"]
    with attached(model):
        cache = fed(model, TreeKV(budget=12, sinks=1, shared=True, positions="rolling"), *ids.split(1, 1))
        held = cache.kept_positions()[0][0, 0]
        assert held.numel() == 12 and int(held.diff().max()) > 2
        logits = model(torch.tensor([[5]]), past_key_values=cache, position_ids=torch.tensor([[40]])).logits[0, -1]
    wanted = model(torch.cat([ids[:, held], torch.tensor([[5]])], 1), use_cache=False).logits[0, -1]
    assert torch.allclose(logits, wanted, atol=1e-6)


def test_bad_values_are_refused():
    with pytest.raises(BudgetTooSmall, match="at least 8"):
        TreeKV(budget=7)
    assert TreeKV(budget=8).protected() == 7
    for options in ({"recent": 1.0}, {"sinks": -1}, {"block": 0}):
        with pytest.raises(BadParameter, match=next(iter(options))):
            TreeKV(**options)

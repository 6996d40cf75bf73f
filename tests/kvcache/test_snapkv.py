"""The SnapKV-style window's own invariants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.kvcache.test_h2o import _eager
from tests.kvcache.test_keyformer import fed
from tokenry.errors import BadParameter, BudgetTooSmall
from tokenry.kvcache import SnapKV
from tokenry.models import TokenCache, attached


def observed(probabilities, rows):
    """Mean attention of rows over the query heads of each of two KV heads, summed over the rows: ``[2, slots]``."""
    length = probabilities.shape[-1]
    return probabilities[0].view(2, 2, length, length)[:, :, rows].sum(2).mean(1)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ("mean", "max"))
@pytest.mark.parametrize("kernel", (1, 5))
def test_a_prompt_is_judged_by_its_window_pooled(kernel, pooling):
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((50,))["input_ids"]
    pool = F.avg_pool1d if pooling == "mean" else F.max_pool1d
    attentions = _eager(model, ids)
    with attached(model):
        cache = fed(model, SnapKV(budget=64, window=8, kernel=kernel, pooling=pooling), ids)
        small = fed(model, SnapKV(budget=20, window=8, kernel=kernel, pooling=pooling), ids)
    for layer, kept, probabilities in zip(cache.layers, small.kept_positions(), attentions, strict=True):
        mean = observed(probabilities, slice(42, 50))[:, :42] / 8
        wanted = pool(mean, kernel, stride=1, padding=kernel // 2)
        assert torch.allclose(layer.state["mean"][0, :, :42], wanted, atol=1e-6)
        if kernel == 1:
            # Equal maxima of the pooling leave the choice open elsewhere.
            for head in range(2):
                best = wanted[head].topk(12).indices.sort().values.tolist()
                assert kept[0, head].tolist() == [*best, *range(42, 50)]
        assert bool((kept[0, :, -8:] == torch.arange(42, 50)).all())


@torch.no_grad()
def test_later_queries_take_part_in_a_running_mean():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((44,))["input_ids"]
    attentions = _eager(model, ids)
    policy = SnapKV(budget=64, window=8, kernel=1)
    with attached(model):
        single = fed(model, policy, *ids.split([40, 1, 1, 1, 1], 1))
        turn = fed(model, policy, *ids.split([40, 4], 1))
        block = fed(model, policy, ids[:, :40])
        block.stage(deferred=True)
        model(ids[:, 40:], past_key_values=block, position_ids=torch.arange(40, 44)[None])
        block.commit(torch.arange(4)[None], torch.tensor([4]))
    for index, probabilities in enumerate(attentions):
        mean = observed(probabilities, slice(32, 40)) / 8
        short = mean / 2 + observed(probabilities, slice(40, 44)) / 8
        for row in range(40, 44):
            mean = mean * 7 / 8 + observed(probabilities, slice(row, row + 1)) / 8
        assert torch.allclose(single.layers[index].state["mean"][0], mean, atol=1e-6)
        assert torch.allclose(block.layers[index].state["mean"][0], mean, atol=1e-6)
        assert torch.allclose(turn.layers[index].state["mean"][0], short, atol=1e-6)


@torch.no_grad()
def test_rows_shorter_than_the_window_and_padding():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((37, 5))
    with attached(model):
        both = TokenCache(model, SnapKV(budget=64, window=8))
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**inputs, past_key_values=both, position_ids=places)
        for row, length in enumerate((37, 5)):
            alone = fed(model, SnapKV(budget=64, window=8), inputs["input_ids"][row : row + 1, -length:])
            for one, two in zip(both.layers, alone.layers, strict=True):
                assert torch.allclose(one.state["mean"][row, :, -length:], two.state["mean"][0], atol=1e-9)


def test_bad_values_are_refused():
    with pytest.raises(BudgetTooSmall, match="at least 33"):
        SnapKV(budget=32)
    for options in ({"window": 0}, {"kernel": 4}, {"pooling": "sum"}):
        with pytest.raises(BadParameter, match=next(iter(options))):
            SnapKV(**options)

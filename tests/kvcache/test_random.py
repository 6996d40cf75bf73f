"""The random baseline: a spread sample, another one in each layer and head, and the same in every run and batch."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tokenry.errors import BadParameter
from tokenry.kvcache import Random

PROMPT, BUDGET = 400, 40


@torch.no_grad()
def kept(model, inputs, steps=0, **options):
    """Positions that each layer holds of the first row behind a prompt and some steps, ``[kv_heads, slots]``."""
    with Random(**{"budget": BUDGET} | options)(model):
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        cache = model(**inputs, position_ids=places).past_key_values
        for step in range(steps):
            token = torch.full((len(places), 1), 5 + step % 90)
            mask = torch.ones(len(places), cache.total + 1, dtype=torch.long)
            model(token, attention_mask=mask, past_key_values=cache, position_ids=cache.seen[:, None])
    return [positions[0] for positions in cache.kept_positions()]


@pytest.mark.parametrize("steps", (0, 100))
def test_what_is_old_is_a_uniform_sample_and_another_in_each_layer_and_head(steps):
    """20 of the old tokens in each of 3 layers, 2 heads and 4 seeds. The mean of their positions has a standard
    deviation of 1.3 % of the length, and the share of each quarter one of 2 %; bounds are 4 of them wide or more, so
    that a sound sample fails one with a probability below 0.001. Seeds are fixed."""
    model, inputs = tiny.model(), tiny.prompts((PROMPT,))
    length = PROMPT + steps
    sets = []
    for seed in range(4):
        for positions in kept(model, inputs, steps, seed=seed):
            assert torch.equal(positions[:, -20:], torch.arange(length - 20, length).expand(2, -1))
            sets += list(positions[:, :-20])
    found = torch.stack(sets).double()
    old = length - 20
    assert abs(found.mean() / old - 0.5) < 0.06
    quarters = torch.histc(found / old, 4, 0, 1) / found.numel()
    assert float((quarters - 0.25).abs().max()) < 0.08
    # Two sets of 20 have about one token in common, and 10 of them once in a million runs.
    for number, one in enumerate(sets):
        for other in sets[:number]:
            assert int(torch.isin(one, other).sum()) < 10


def test_a_seed_says_which_tokens_stay():
    model, inputs = tiny.model(), tiny.prompts((120,))
    once, again, other = (kept(model, inputs, 20, seed=seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, once, again)) and not any(map(torch.equal, once, other))
    for large in (2**70, -1, 2**63):
        assert all(positions.shape == (2, BUDGET) for positions in kept(model, inputs, 2, seed=large))


@pytest.mark.parametrize("steps", (0, 30))
def test_a_row_of_a_padded_batch_keeps_what_the_row_alone_keeps(steps):
    model, inputs = tiny.model(), tiny.prompts((75, 120))
    alone = {name: tensor[:1, -75:] for name, tensor in inputs.items()}
    for one, two in zip(kept(model, inputs, steps), kept(model, alone, steps), strict=True):
        assert torch.equal(one, two)


def test_bad_values_are_refused():
    with pytest.raises(BadParameter, match="recent"):
        Random(recent=1.5)

"""Budgets as a share of the prompt, by layer and by head."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests import tiny
from tests.kvcache.test_engine import _masked
from tokenry.errors import BudgetTooSmall
from tokenry.kvcache import FASA, H2O, DapQ, Oracle, Random, Sinks
from tokenry.methods import method
from tokenry.models import TokenCache, attached

GREEDY = {"do_sample": False, "max_new_tokens": 16}


def test_text_form_tells_a_share_from_a_count():
    assert str(H2O(budget=0.25)) == "h2o:budget=0.25" and method("h2o:budget=0.25") == H2O(budget=0.25)
    assert method("h2o:budget=64") == H2O(budget=64) and type(method("h2o:budget=64").budget) is int
    for share in (0.0, 1.0, 1.5, -0.5):
        with pytest.raises(BudgetTooSmall, match="share"):
            H2O(budget=share)


@pytest.mark.parametrize("every", (1, 4))
@pytest.mark.parametrize("policy", (H2O, Sinks, Random))
def test_share_counts_each_rows_prompt_and_stays(policy, every):
    model = tiny.model()
    inputs = tiny.prompts((40, 24))
    with policy(budget=0.25, compact_every=every)(model):
        both = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        alone = [model.generate(inputs["input_ids"][row : row + 1, -n:], **GREEDY) for row, n in enumerate((40, 24))]
    with policy(budget=10, compact_every=every)(model):
        count = model.generate(inputs["input_ids"][:1], **GREEDY)
    assert torch.equal(alone[0], count), "a quarter of 40 tokens are 10 slots"
    for row in (0, 1):
        assert torch.equal(both.sequences[row, -16:], alone[row][0, -16:])
    for kept in both.past_key_values.kept_positions():
        held = (kept >= 0).sum(-1)
        assert bool(((held[0] >= 10) & (held[0] < 10 + every)).all())
        assert bool(((held[1] >= 6) & (held[1] < 6 + every)).all())


@pytest.mark.parametrize("policy", (Sinks, DapQ), ids=lambda policy: policy.slug)
def test_share_of_a_prompt_in_chunks_is_that_of_the_whole_in_the_end(policy):
    model = tiny.model()
    with policy(budget=0.25)(model):
        result = model.generate(
            tiny.prompts((40,))["input_ids"], **GREEDY, prefill_chunk_size=16, return_dict_in_generate=True
        )
    assert all(layer.size == 10 for layer in result.past_key_values.layers)
    with Sinks(budget=0.01)(model), torch.no_grad():
        assert model(tiny.prompts((40,))["input_ids"]).past_key_values.length == Sinks().least()


@torch.no_grad()
@pytest.mark.parametrize("policy", (FASA, Oracle))
def test_share_of_a_policy_that_retrieves(policy):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((40, 24))
    with policy(budget=0.25)(model):
        both = model.generate(**inputs, **GREEDY)
    for row, length in enumerate((40, 24)):
        for budget in (0.25, length // 4):
            with policy(budget=budget)(model):
                alone = model.generate(inputs["input_ids"][row : row + 1, -length:], **GREEDY)
            assert torch.equal(both[row, -16:], alone[0, -16:])


@dataclass(frozen=True, kw_only=True)
class Pyramid(Sinks):
    def layer_budget(self, layer):
        return self.budget + 4 * layer.number


@dataclass(frozen=True, kw_only=True)
class Uneven(Sinks):
    """The second head keeps four slots more than the first."""

    def keep(self, layer):
        if layer.size <= self.budget:
            return None
        scores = self._masked_score(layer)
        rank = scores.argsort(-1, descending=True).argsort(-1)
        return rank < self.budget + 4 * torch.arange(scores.shape[1])[:, None]

    ordered = True


@torch.no_grad()
def test_layers_with_budgets_of_their_own():
    model = tiny.model()
    with Pyramid(budget=8)(model):
        cache = model(tiny.prompts((40,))["input_ids"]).past_key_values
        for token in (5, 6, 7):
            model(torch.tensor([[token]]), past_key_values=cache)
            assert [layer.size for layer in cache.layers] == [8, 12, 16]


@torch.no_grad()
def test_heads_with_unequal_slots_equal_the_mask_simulation():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((30,))["input_ids"]
    more = torch.randint(3, tiny.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    with attached(model):
        cache = TokenCache(model, Uneven(budget=7))
        model(ids, past_key_values=cache)
        held, logits = [], []
        for token in more[0]:
            kept = cache.kept_positions()
            assert all((part >= 0).sum(-1).tolist() == [[7, 11]] for part in kept)
            # What stands in a slot without a token is any token that is held.
            held.append([torch.where(part >= 0, part, part.amax(-1, keepdim=True)) for part in kept])
            logits.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
    simulated = _masked(model, torch.cat([ids, more], 1), [*held, held[-1]], prompt=30)
    assert torch.allclose(torch.stack(logits), simulated[30:], atol=1e-9)

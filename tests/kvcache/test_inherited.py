"""What the engine promises for every policy of the evict kind, asked of the further ones at budgets of a few slots."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests import tiny
from tests.kvcache import test_engine as engine
from tokenry.kvcache import DapQ, Keyformer, SnapKV, TreeKV

POLICIES = [
    partial(Keyformer), partial(TreeKV, sinks=2, block=4), partial(SnapKV, window=4), partial(DapQ, recent=2)
]  # fmt: skip
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda made: made.func.slug)


@every_policy
@pytest.mark.parametrize("kind", ("llama",))
def test_budget_above_the_length_equals_the_plain_model(policy, kind):
    engine.test_budget_above_the_length_equals_the_plain_model(policy, kind)


@every_policy
@pytest.mark.parametrize("kind", ("llama", "gemma2"))
def test_row_of_a_padded_batch_equals_the_row_alone(policy, kind):
    engine.test_row_of_a_padded_batch_equals_the_row_alone(policy, kind)


@every_policy
def test_every_layer_keeps_its_budget_after_every_forward(policy):
    for budget, every in ((6, 1), (17, 5)):
        engine.test_every_layer_keeps_its_budget_after_every_forward(policy, budget, every)


@every_policy
def test_physical_eviction_equals_masking(policy):
    engine.test_physical_eviction_equals_masking(policy)


@every_policy
def test_fork_reorder_and_select_carry_the_state(policy):
    engine.test_fork_reorder_and_select_carry_the_state(policy)


@every_policy
def test_beams_and_a_second_turn_stay_in_the_budget(policy):
    model = tiny.model()
    inputs = tiny.prompts((40, 31))
    with policy(budget=10)(model):
        result = model.generate(**inputs, do_sample=False, num_beams=3, max_new_tokens=12, return_dict_in_generate=True)
        assert all(layer.size == 10 for layer in result.past_key_values.layers)
        first = model.generate(
            inputs["input_ids"][:1], do_sample=False, max_new_tokens=12, return_dict_in_generate=True
        )
        turn = torch.cat([first.sequences, tiny.prompts((5,), seed=3)["input_ids"]], 1)
        second = model.generate(
            turn, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=12,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert second.past_key_values.get_seq_length() == turn.shape[1] + 11
    assert all(layer.size == 10 for layer in second.past_key_values.layers)


@every_policy
def test_a_share_of_the_prompt_is_each_rows_own(policy):
    model = tiny.model()
    inputs = tiny.prompts((60, 33))
    with policy(budget=0.3)(model):
        both = model.generate(**inputs, do_sample=False, max_new_tokens=12, return_dict_in_generate=True)
        for row, length in enumerate((60, 33)):
            ids = inputs["input_ids"][row : row + 1, -length:]
            alone = model.generate(ids, do_sample=False, max_new_tokens=12, return_dict_in_generate=True)
            assert torch.equal(both.sequences[row, -12:], alone.sequences[0, -12:])
            for layer, kept in zip(alone.past_key_values.layers, both.past_key_values.kept_positions(), strict=True):
                assert layer.size == int(0.3 * length)
                assert bool(((kept[row] >= 0).sum(-1) == layer.size).all())

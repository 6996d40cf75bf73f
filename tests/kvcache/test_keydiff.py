"""KeyDiff: what is kept is what the keys alone say."""

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tokenry.kvcache import KeyDiff
from tokenry.speculation import TokenRecycling


@pytest.mark.parametrize("recent", [0, 5])
def test_the_prompt_keeps_the_keys_unlike_the_others(recent):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((40, 27))
    with torch.no_grad():
        full = model(**inputs, use_cache=True).past_key_values
        with KeyDiff(budget=12, recent=recent)(model):
            held = model(**inputs, use_cache=True).past_key_values
    mask = inputs["attention_mask"].bool()
    for number, kept in enumerate(held.kept_positions()):
        for row in range(2):
            keys = F.normalize(full.layers[number].keys[row][:, mask[row]].float(), dim=-1)
            score = -F.cosine_similarity(keys, keys.mean(1, keepdim=True), dim=-1)
            if recent:
                score[:, -recent:] = torch.inf
            for head in range(keys.shape[0]):
                wanted = score[head].topk(12).indices.sort().values
                assert torch.equal(kept[row, head], wanted)


def test_room_for_everything_is_plain_and_a_row_is_the_row_alone():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((30, 12))
    options = {"max_new_tokens": 16, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with KeyDiff(budget=64)(model):
        assert torch.equal(model.generate(**inputs, **options), plain)
    short = {name: tensor[1:, -12:] for name, tensor in inputs.items()}
    with KeyDiff(budget=8)(model):
        both, alone = model.generate(**inputs, **options), model.generate(**short, **options)
    assert torch.equal(both[1, 30:], alone[0, 12:]) and not torch.equal(both, plain)


@pytest.mark.parametrize("policy", [KeyDiff(budget=1, compact_every=4), KeyDiff(budget=0.5, compact_every=4)], ids=str)
def test_equal_scores_are_not_left_to_rounding(policy):
    """Two keys are as far from their mean as each other, alone and behind drafts."""
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((1, 3, 2, 9, 40, 4, 5, 1))
    with policy(model):
        plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        for drafter in (TokenRecycling(), TokenRecycling(template="auto")):
            ours = model.generate(**inputs, max_new_tokens=40, do_sample=False, custom_generate=drafter)
            assert torch.equal(ours, plain)

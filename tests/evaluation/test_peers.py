"""Peers generate what transformers generates, and their passes are counted."""

import pytest
import torch

from tests.evaluation import tiny_text
from tokenry.errors import BadParameter, ResourceError
from tokenry.evaluation import TransformersAssisted, TransformersGenerate, TransformersPromptLookup

MODEL, DRAFT = tiny_text.model(), tiny_text.model(seed=1, layers=1)
IDS = torch.tensor([list(range(50, 70))])
MASK = torch.ones_like(IDS)
OPTIONS = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 400}
PLAIN = MODEL.generate(input_ids=IDS, attention_mask=MASK, **OPTIONS)


def test_plain_takes_one_pass_a_token():
    result = TransformersGenerate().run(MODEL, IDS, MASK, **OPTIONS)
    assert torch.equal(result.sequences, PLAIN)
    assert (result.stats.forwards, result.draft_forwards) == (20, 0)
    assert result.stats.steps == result.stats.drafted == 0 and result.drafter_seconds is None
    # Two layers, keys and values, two heads of eight float32 for every token but the last.
    assert result.stats.kv_bytes == result.stats.kv_peak_bytes == 39 * 2 * 2 * 2 * 8 * 4


def test_prompt_lookup_gives_plains_tokens_in_fewer_passes_where_text_repeats():
    ids = torch.cat([PLAIN, PLAIN[:, :20]], 1)
    mask = torch.ones_like(ids)
    plain = MODEL.generate(input_ids=ids, attention_mask=mask, **OPTIONS)
    result = TransformersPromptLookup(tokens=5).run(MODEL, ids, mask, **OPTIONS)
    stats = result.stats
    assert torch.equal(result.sequences, plain)
    assert stats.forwards <= 20 and stats.kv_peak_bytes >= stats.kv_bytes
    assert stats.verified == 20 and stats.steps == stats.forwards


def test_steps_are_counted_as_the_candidates_were(monkeypatch):
    """Against the library's own candidates: how many it handed over, and how many of them the text went on with."""
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    handed, get = [], PromptLookupCandidateGenerator.get_candidates

    def noted(self, ids):
        found = get(self, ids)
        handed.append((ids.shape[1], found[0][0].tolist()))
        return found

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", noted)
    ids = torch.cat([PLAIN, PLAIN[:, :20]], 1)
    result = TransformersPromptLookup(tokens=5).run(MODEL, ids, torch.ones_like(ids), **OPTIONS)
    text = result.sequences[0].tolist()
    drafted, accepted = [], []
    for (start, candidate), end in zip(handed, [*(start for start, _ in handed[1:]), len(text)], strict=True):
        right = [a == b for a, b in zip(candidate[start:], text[start:], strict=False)]
        drafted.append(len(candidate) - start)
        accepted.append(min([*right, False].index(False), end - start - 1))
    stats = result.stats
    assert stats.drafted == sum(drafted) > 0 and stats.accepted == sum(accepted) > 0
    assert stats.drafted_to == [sum(n >= depth for n in drafted) for depth in range(1, max(drafted) + 1)]
    assert stats.accepted_to == [sum(n >= depth for n in accepted) for depth in range(1, max(drafted) + 1)]


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assisted_counts_both_models_and_leaves_the_draft_as_it_was(schedule):
    before = DRAFT.generation_config
    assisted = TransformersAssisted(tokens=4, schedule=schedule, confidence=0)
    result = assisted.run(MODEL, IDS, MASK, resources={"draft": DRAFT}, **OPTIONS)
    again = assisted.run(MODEL, IDS, MASK, resources={"draft": DRAFT}, **OPTIONS)
    assert torch.equal(result.sequences, PLAIN)
    assert 0 < result.stats.forwards <= 20 and result.draft_forwards > 0
    assert (result.stats, result.draft_forwards) == (again.stats, again.draft_forwards)
    # Every drafted token took the draft one pass.
    assert result.stats.drafted <= result.draft_forwards and result.drafter_seconds > 0
    assert "generate" not in vars(DRAFT)
    assert DRAFT.generation_config is before and before.num_assistant_tokens != 4


def test_a_model_that_drafts_for_itself_is_always_right():
    result = TransformersAssisted(tokens=4, confidence=0).run(MODEL, IDS, MASK, resources={"draft": MODEL}, **OPTIONS)
    assert torch.equal(result.sequences, PLAIN)
    assert result.stats.steps == 0 and "generate" not in vars(MODEL)  # its own passes cannot be told from its drafts'


def test_assisted_refuses_a_draft_of_another_vocabulary():
    other = tiny_text.model()
    other.resize_token_embeddings(300)
    with pytest.raises(ResourceError, match="300 tokens and the model 259"):
        TransformersAssisted().run(MODEL, IDS, MASK, resources={"draft": other}, **OPTIONS)


def test_one_prompt_at_a_time():
    ids, mask = IDS.expand(2, -1), MASK.expand(2, -1)
    assert TransformersGenerate().run(MODEL, ids, mask, **OPTIONS).sequences.shape[0] == 2
    with pytest.raises(BadParameter, match="one prompt at a time"):
        TransformersPromptLookup().run(MODEL, ids, mask, **OPTIONS)


def test_hooks_are_removed_after_an_error():
    with pytest.raises(ValueError):
        TransformersGenerate().run(MODEL, IDS, MASK, max_new_tokens=-1)
    assert not MODEL._forward_hooks


@pytest.mark.parametrize(
    "make", [lambda: TransformersPromptLookup(tokens=0), lambda: TransformersAssisted(confidence=2)]
)
def test_bad_values_are_refused(make):
    with pytest.raises(BadParameter):
        make()

"""Greedy output equals transformers' own, token for token, whatever is drafted."""

import math

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import StoppingCriteria

from tests import tiny
from tests.speculation.toys import Junk, Mixed, Oracle
from tokenry.generation import NO_SOURCE, Options, Session, Source
from tokenry.models import TokenCache
from tokenry.speculation import TreeShape

LENGTHS = {1: (8,), 4: (8, 3, 6, 1), 16: tuple(1 + (5 * i) % 9 for i in range(16))}
RECORDS = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def run(model, inputs, drafter=None, truth=None, **options):
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True} | options
    if drafter is not None:
        resources = {"truth": truth, "never": tiny.VOCABULARY - 1}
        options |= {"custom_generate": drafter, "tokenry_options": Options(resources=resources)}
    return model.generate(**inputs, **options)


def free_run(model, inputs, **options):
    """What plain decoding would write if nothing stopped it."""
    return run(model, inputs, **({"max_new_tokens": 40, "eos_token_id": None} | options)).sequences


def test_shapes():
    shape = TreeShape.of((-1, 0, 0, 1, 3))
    assert shape.depth.tolist() == [[0, 1, 1, 2, 3]] and shape.deepest == 3 and not shape.is_chain
    assert shape.ancestors[0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1],
    ]  # fmt: skip
    assert shape.shallow(1).size == 3 and shape.shallow(9) is shape
    part = shape.select(torch.tensor([0, 1, 3, 4]))
    assert part.parents.tolist() == [[-1, 0, 1, 2]] and part.is_chain
    assert TreeShape.chain(3).is_chain and TreeShape.of((-1, 0, 0)) is TreeShape.of([-1, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch", LENGTHS)
def test_random_trees_are_lossless(batch, shared, dtype):
    model, inputs = tiny.model(dtype=dtype), tiny.prompts(LENGTHS[batch])
    truth = free_run(model, inputs)
    ours = run(model, inputs, Mixed(shared=shared), truth)
    assert torch.equal(ours.sequences, run(model, inputs).sequences)
    assert ours.stats.accepted > 0 and ours.stats.tokens_per_step > 1.2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma", "opt", "gpt_neox"])
def test_trees_on_other_architectures(kind):
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts((8, 3))
    ours = run(model, inputs, Mixed(), free_run(model, inputs))
    assert torch.equal(ours.sequences, run(model, inputs).sequences)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_chains_on_sliding_windows(kind):
    # One row: transformers' own loop goes wrong where a row's padding is wider than the window.
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts((12,))
    ours = run(model, inputs, Oracle(), free_run(model, inputs))
    assert torch.equal(ours.sequences, run(model, inputs).sequences) and ours.stats.tokens_per_step > 4


def test_a_ragged_batch_holds_no_more_than_its_longest_row_needs(monkeypatch):
    """Rows accept differently long runs; what that leaves empty in the cache is closed."""
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8, 3, 6, 1, 7, 5, 4, 2))
    truth = free_run(model, inputs, max_new_tokens=160)
    sizes, calls = [], []
    accept, realign = Session.accept, TokenCache.realign

    def watched(self, commit):
        accept(self, commit)
        sizes.append((self.cache.slots.size, max(self.lengths)))

    monkeypatch.setattr(Session, "accept", watched)
    monkeypatch.setattr(TokenCache, "realign", lambda self: (calls.append(self.slots.size), realign(self)))
    ours = run(model, inputs, Mixed(), truth, max_new_tokens=160)
    assert torch.equal(ours.sequences, truth)
    assert calls and all(size <= max(1.25 * longest, longest + 32) for size, longest in sizes)
    assert len(calls) < 12, "closing gaps copies the cache, so it must be rare"


def test_rows_equal_each_row_alone():
    model = tiny.model()
    inputs = tiny.prompts(LENGTHS[4])
    truth = free_run(model, inputs)
    together = run(model, inputs, Mixed(), truth, eos_token_id=[5, 9, 30], pad_token_id=0).new_tokens
    for row, length in enumerate(LENGTHS[4]):
        alone = {name: tensor[row : row + 1, -length:] for name, tensor in inputs.items()}
        own = truth[row : row + 1, truth.shape[1] - 40 - length :]
        assert run(model, alone, Mixed(), own, eos_token_id=[5, 9, 30], pad_token_id=0).new_tokens[0] == together[row]


@pytest.mark.parametrize("depth", [1, 3, 4, 50])
def test_an_oracle_needs_the_fewest_forwards_and_junk_as_many_as_plain(depth):
    model, inputs = tiny.model(), tiny.prompts((8,))
    truth = free_run(model, inputs)
    best = run(model, inputs, Oracle(depth=depth), truth)
    # The prefill gives the first token.
    assert best.stats.forwards == 1 + math.ceil(23 / (depth + 1))
    worst = run(model, inputs, Junk(), truth)
    assert worst.stats.forwards == 24 and worst.stats.accepted == 0
    assert torch.equal(best.sequences, truth[:, :32]) and torch.equal(worst.sequences, truth[:, :32])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 12, "eos_token_id": [5, 9, 30, 31]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 12, "eos_token_id": [5, 9, 30, 31]},
        {"suppress_tokens": [7, 8, 9]},
        {"bad_words_ids": [[7, 8], [9]], "forced_eos_token_id": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(8,), (8, 3, 6)], ids=str)
def test_processors(options, lengths):
    options = {"eos_token_id": None, "pad_token_id": 0} | options
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    truth = free_run(model, inputs, **options | {"eos_token_id": None, "min_new_tokens": None})
    plain = run(model, inputs, **options, **RECORDS | {})
    ours = run(model, inputs, Mixed(), truth, **options, **RECORDS | {})
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.stats.accepted > 0
    for records, wanted in ((ours.scores, plain.scores), (ours.logits, plain.logits)):
        assert len(records) == len(wanted)
        for row, new in enumerate(ours.new_tokens):
            for step in range(len(new)):
                assert torch.allclose(records[step][row], wanted[step][row], atol=1e-5)


def test_end_tokens_inside_an_accepted_run():
    model, inputs = tiny.model(), tiny.prompts((8, 5))
    truth = free_run(model, inputs)
    for place in range(9, 16):
        options = {"eos_token_id": [int(truth[0, place]), int(truth[1, place + 3])], "pad_token_id": 0}
        plain, ours = run(model, inputs, **options), run(model, inputs, Oracle(depth=6), truth, **options)
        assert torch.equal(ours.sequences, plain.sequences)
        assert ((ours.sources == NO_SOURCE) == (torch.arange(ours.sources.shape[1]) < 8) | _behind(ours)).all()


def _behind(result):
    ends = torch.tensor([result.prompt_length + len(new) for new in result.new_tokens])
    return torch.arange(result.sequences.shape[1]) >= ends[:, None]


class _Pair(StoppingCriteria):
    def __init__(self, pair):
        self.pair = torch.as_tensor(pair)

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2:] == self.pair).all(1)


@pytest.mark.parametrize("lengths", [(8,), (8, 5)], ids=str)
def test_other_criteria_inside_an_accepted_run(lengths):
    model, inputs = tiny.model(), tiny.prompts(lengths)
    truth = free_run(model, inputs)
    for place in range(10, 16):
        options = {"eos_token_id": 2, "pad_token_id": 0, "stopping_criteria": [_Pair(truth[-1, place : place + 2])]}
        plain, ours = run(model, inputs, **options), run(model, inputs, Oracle(depth=6), truth, **options)
        assert torch.equal(ours.sequences, plain.sequences)


class _Least(StoppingCriteria):
    """Ends a row whose scores at the last three places are all below a bound."""

    def __init__(self, bound):
        self.bound = bound

    def __call__(self, input_ids, scores, **kwargs):
        if len(scores) < 3:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)
        return (torch.stack(scores[-3:]).amax(-1) < self.bound).all(0)


@pytest.mark.parametrize("lengths", [(8,), (8, 5)], ids=str)
def test_criteria_read_the_scores_of_every_token_of_an_accepted_run(lengths):
    model, inputs = tiny.model(), tiny.prompts(lengths)
    truth = free_run(model, inputs)
    best = torch.stack(run(model, inputs, output_scores=True, eos_token_id=2).scores).amax(-1)
    lasting = best.unfold(0, 3, 1).amax(-1)
    bound = float(lasting[12:20, -1].min()) + 1e-4
    ends = int((lasting[:, -1] < bound).nonzero()[0]) + 3
    options = {"eos_token_id": 2, "pad_token_id": 0, "output_scores": True, "stopping_criteria": [_Least(bound)]}
    plain, ours = run(model, inputs, **options), run(model, inputs, Oracle(depth=6), truth, **options)
    assert torch.equal(ours.sequences, plain.sequences) and (len(lengths) > 1 or len(plain.scores) == ends)


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_the_length_limit_holds(new):
    model, inputs = tiny.model(), tiny.prompts((8, 5))
    truth = free_run(model, inputs)
    ours = run(model, inputs, Oracle(depth=4), truth, max_new_tokens=new)
    assert torch.equal(ours.sequences, truth[:, : 8 + new])


def test_sources_tell_drafts_from_the_targets_own_tokens():
    model, inputs = tiny.model(), tiny.prompts((8,))
    result = run(model, inputs, Oracle(depth=3), free_run(model, inputs), max_new_tokens=11)
    draft, bonus = Source.DRAFT, Source.BONUS
    # The last step may commit two tokens only.
    assert result.new_sources[0] == [Source.PLAIN, *[draft, draft, draft, bonus] * 2, draft, bonus]
    assert result.stats.accepted == 7 and result.stats.verified == 10 and result.stats.steps == 3
    assert result.stats.drafted == 3 + 3 + 1


@pytest.mark.parametrize("drafter", [Oracle(), Mixed(), Junk()], ids=str)
@pytest.mark.parametrize("lengths", [(8,), (8, 5)], ids=str)
def test_the_cache_is_as_plain_leaves_it_and_can_be_continued(drafter, lengths):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    truth = free_run(model, inputs)
    options = {"eos_token_id": int(truth[0, 20]), "pad_token_id": 0}
    plain = run(model, inputs, **options)
    passed = DynamicCache(config=model.config)
    ours = run(model, inputs, drafter, truth, past_key_values=passed, **options)
    assert ours.past_key_values is passed
    assert passed.get_seq_length() == ours.sequences.shape[1] - 1
    real = torch.cat([inputs["attention_mask"].bool(), ~_behind(ours)[:, 8:]], 1)[:, :-1]
    for mine, theirs in zip(passed.layers, plain.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            a, b = (getattr(layer, name).transpose(1, 2)[real] for layer in (mine, theirs))
            assert torch.allclose(a, b, atol=1e-9)

    more = torch.cat([ours.sequences, torch.full((len(lengths), 2), 20)], 1)
    mask = torch.cat([inputs["attention_mask"], (~_behind(ours)[:, 8:]).long(), torch.ones(len(lengths), 2).long()], 1)
    if not bool(mask[:, 8:].all()):
        return  # a gap between turns is for the caller to re-pad
    going = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(more, past_key_values=plain.past_key_values, **going)
    assert torch.equal(model.generate(more, custom_generate=Junk(), past_key_values=passed, tokenry_options=Options(
        resources={"never": tiny.VOCABULARY - 1}), **going), wanted)  # fmt: skip


def test_several_sequences_of_one_prompt():
    model, inputs = tiny.model(), tiny.prompts((6,))
    truth = free_run(model, inputs).repeat(3, 1)
    torch.manual_seed(2)
    result = run(model, inputs, Mixed(), truth, do_sample=True, num_return_sequences=3, top_k=5, temperature=0.7)
    assert result.sequences.shape == (3, 30)
    assert len({tuple(row) for row in result.new_tokens}) == 3


def test_sampling_draws_from_the_targets_law():
    """Chi-square of the second and third token of 4,000 rows that draft a chain of two, against the plain loop's exact
    law over the 2 tokens that top-k leaves at each place: 3 degrees of freedom, false alarm below 1e-5 and the seed is
    fixed."""
    model = tiny.model()
    rows = 4000
    inputs = {name: tensor.repeat(rows, 1) for name, tensor in tiny.prompts((4,)).items()}
    truth = free_run(model, tiny.prompts((4,)), max_new_tokens=4).repeat(rows, 1)
    options = {"do_sample": True, "top_k": 2, "temperature": 3.0, "max_new_tokens": 3}
    torch.manual_seed(0)
    result = run(model, inputs, Oracle(depth=2), truth, **options)
    seen = {}
    for row in result.new_tokens:
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    law = _law(model, tiny.prompts((4,))["input_ids"], 3)
    assert set(seen) <= set(law)
    chi = sum((seen.get(text, 0) - rows * p) ** 2 / (rows * p) for text, p in law.items())
    assert chi < 36.8 + 4  # 7 degrees of freedom


def _law(model, ids, depth):
    if depth == 0:
        return {(): 1.0}
    with torch.no_grad():
        top = (model(ids).logits[0, -1].double() / 3.0).topk(2)
    law = {}
    for p, token in zip(top.values.softmax(-1).tolist(), top.indices.tolist(), strict=True):
        rest = _law(model, torch.cat([ids, torch.tensor([[token]])], 1), depth - 1)
        law |= {(token, *text): p * q for text, q in rest.items()}
    return law


class Early(Mixed):
    """Trees that are drafted before the prompt was read."""

    early = True


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "opt"])
def test_a_draft_before_the_prompt_was_read_saves_its_pass(kind):
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts((8,))
    truth = free_run(model, inputs)
    wanted = run(model, inputs, **RECORDS)
    late, early = (run(model, inputs, cls(), truth, **RECORDS) for cls in (Mixed, Early))
    assert torch.equal(early.sequences, wanted.sequences)
    assert early.stats.accepted > 0 and early.stats.forwards <= late.stats.forwards
    for name in ("logits", "scores"):
        assert torch.allclose(torch.stack(getattr(early, name)), torch.stack(getattr(wanted, name)), atol=1e-9)
    # The first step reads the prompt, so no pass is without a verified token of its own.
    assert early.stats.forwards == early.stats.steps and late.stats.forwards == late.stats.steps + 1
    going_on = {"input_ids": torch.cat([early.sequences, inputs["input_ids"]], 1), "max_new_tokens": 6}
    caches = [result.past_key_values for result in (early, wanted)]
    texts = [model.generate(**going_on, past_key_values=cache, do_sample=False) for cache in caches]
    assert torch.equal(*texts)


@pytest.mark.parametrize("options", [{"max_new_tokens": 1}, {"do_sample": True}, {"repetition_penalty": 1.3}], ids=str)
def test_early_drafts_under_other_options(options):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8,))
    truth = free_run(model, inputs, **{name: value for name, value in options.items() if "penalty" in name})
    found = []
    for cls in (Mixed, Early):
        resources = {"truth": truth, "never": tiny.VOCABULARY - 1}
        given = {"max_new_tokens": 24, "do_sample": False} | options
        seeded = Options(seed=5, resources=resources)
        found.append(model.generate(**inputs, **given, custom_generate=cls(), tokenry_options=seeded))
    assert torch.equal(*found)


def test_an_end_token_in_the_first_run_of_an_early_draft():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8,))
    truth = free_run(model, inputs)
    for place in range(3):
        end = {"eos_token_id": int(truth[0, 8 + place])}
        assert torch.equal(run(model, inputs, Early(), truth, **end).sequences, run(model, inputs, **end).sequences)


@pytest.mark.parametrize("lengths", [(8, 3), (1,)], ids=str)
def test_batches_and_single_tokens_are_read_first(lengths):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    ours = run(model, inputs, Early(), free_run(model, inputs))
    assert torch.equal(ours.sequences, run(model, inputs).sequences)


def test_an_error_leaves_the_model_as_it_was():
    model = tiny.model()
    before = model.config._attn_implementation
    with pytest.raises(KeyError):
        model.generate(**tiny.prompts((5,)), custom_generate=Oracle(), max_new_tokens=5)
    assert model.config._attn_implementation == before

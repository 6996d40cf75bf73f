import pytest
import torch

from tests import tiny
from tokenry.errors import BadParameter
from tokenry.generation import Options
from tokenry.speculation import PromptLookup


class Text:
    """As much of a session as the drafter reads."""

    device = torch.device("cpu")

    def __init__(self, *rows):
        width = max(map(len, rows))
        self.batch, self.max_length, self.alive = len(rows), width + 5, [True] * len(rows)
        self.ids = torch.tensor([[0] * (width - len(row)) + list(row) + [0] * 5 for row in rows])
        self.lengths = [width] * len(rows)
        self.length = torch.tensor(self.lengths)
        self.first = torch.tensor([width - len(row) for row in rows])
        self.active = torch.ones(len(rows), dtype=torch.bool)
        self.anchor = self.ids[:, width - 1]


def drafted(*rows, room=99, **options):
    lookup, session = PromptLookup(**options), Text(*rows)
    tree = lookup.propose(session, lookup.start(session), room)
    valid = torch.ones_like(tree.tokens, dtype=torch.bool) if tree.valid is None else tree.valid
    return [ids[real].tolist()[1:] for ids, real in zip(tree.tokens, valid, strict=True)]


def test_the_longest_ngram_wins_then_the_first_or_last_match():
    text = [1, 2, 3, 7, 9, 3, 8, 2, 3, 6, 5, 2, 3]
    assert drafted(text, tokens=2) == [[7, 9]]
    assert drafted(text, tokens=2, match="last") == [[6, 5]]
    assert drafted(text, tokens=2, ngram=1) == [[7, 9]]
    assert drafted([*text[:-2], 9, 3], tokens=2) == [[8, 2]]
    assert drafted([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], tokens=1) == [[4]]
    assert drafted([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], tokens=1, ngram=2, match="last") == [[5]]


def test_no_match_drafts_nothing():
    assert drafted([1, 2, 3]) == [[]]
    assert drafted([4]) == [[]]


def test_a_short_period_is_drafted_in_full():
    assert drafted([9, 1, 2, 1, 2], tokens=5) == [[1, 2, 1, 2, 1]]
    assert drafted([5, 5], tokens=3) == [[5, 5, 5]]
    assert drafted([9, 1, 2, 1, 2], tokens=5, room=2) == [[1, 2]]


def test_rows_of_a_batch_are_looked_up_on_their_own_and_without_their_padding():
    rows = [[1, 2, 3, 1, 2], [4, 5], [0, 7, 0]]
    assert drafted(*rows, tokens=2) == [drafted(row, tokens=2)[0] for row in rows] == [[3, 1], [], [7, 0]]


@pytest.mark.parametrize("options", [{}, {"match": "last"}, {"tokens": 3, "ngram": 1}, {"tokens": "auto"}], ids=str)
@pytest.mark.parametrize("lengths", [(12,), (12, 1, 7)], ids=str)
def test_greedy_is_lossless(options, lengths):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    inputs["input_ids"][:, 8:] = inputs["input_ids"][:, 8:] % 5 + 3
    wanted = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    ours = model.generate(
        **inputs,
        max_new_tokens=40,
        do_sample=False,
        return_dict_in_generate=True,
        custom_generate=PromptLookup(**options),
    )
    assert torch.equal(ours.sequences, wanted) and ours.stats.accepted > 0


@pytest.mark.parametrize("seed", range(4))
def test_it_needs_no_more_passes_than_transformers(seed):
    """On random models, whose greedy text falls into loops, where the last match is the one to copy; drafts of both
    are 10 long."""
    model, inputs = tiny.model(seed=seed), tiny.prompts((20,), seed)
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generate(**inputs, max_new_tokens=60, do_sample=False, prompt_lookup_num_tokens=10)
    theirs = len(calls)
    hook.remove()
    ours = model.generate(
        **inputs,
        max_new_tokens=60,
        do_sample=False,
        custom_generate=PromptLookup(match="last"),
        return_dict_in_generate=True,
    )
    assert ours.stats.forwards <= theirs


def test_bad_values():
    for bad in ({"tokens": 0}, {"tokens": "most"}, {"ngram": 0}, {"match": "best"}):
        with pytest.raises(BadParameter):
            PromptLookup(**bad)


def test_seeded_samples_do_not_depend_on_drafts():
    model, inputs = tiny.model(), tiny.prompts((12, 5))
    texts = [
        model.generate(
            **inputs, max_new_tokens=30, do_sample=True, temperature=0.3, custom_generate=PromptLookup(tokens=tokens),
            tokenry_options=Options(seed=1),
        )
        for tokens in (1, 10)
    ]  # fmt: skip
    assert torch.equal(*texts)

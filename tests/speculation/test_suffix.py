"""Suffix decoding: the longest match, and how far it is copied."""

import pickle

import pytest
import torch

from tests import tiny
from tests.speculation.drafts import costing
from tests.speculation.test_prompt_lookup import Text
from tokenry.errors import BadParameter
from tokenry.generation import Options, Stats
from tokenry.methods import method
from tokenry.speculation import PromptLookup
from tokenry.speculation.budget import Growth, RunCounts, best_size, least_slopes
from tokenry.speculation.suffix import Suffix


def drafted(*rows, room=99, **options):
    drafter, session = Suffix(**{"tokens": 99, "factor": 100.0} | options), Text(*rows)
    tree = drafter.propose(session, drafter.start(session), room)
    valid = torch.ones_like(tree.tokens, dtype=torch.bool) if tree.valid is None else tree.valid
    return [ids[real].tolist()[1:] for ids, real in zip(tree.tokens, valid, strict=True)]


def test_the_longest_match_wins_wherever_it_stands():
    text = [1, 2, 3, 4, 7, 9, 3, 4, 8, 6, 1, 2, 3, 4]
    assert drafted(text, tokens=2) == [[7, 9]]
    # Counted over two tokens, both occurrences of 3 4 are as long, and the newer one is copied.
    assert drafted(text, tokens=2, longest=2) == [[8, 6]]
    assert drafted([1, 2, 3]) == drafted([4]) == [[]]


def test_of_several_longest_the_way_of_most_is_gone():
    assert drafted([3, 5, 3, 5, 3, 8, 0, 3], tokens=1) == [[5]]
    assert drafted([3, 5, 3, 8, 0, 3], tokens=1) == [[8]]
    # The newest of those that go the common way.
    assert drafted([3, 5, 1, 3, 5, 2, 3, 8, 0, 3], tokens=2) == [[5, 2]]


def test_longer_matches_draft_more():
    text = [*range(20), 30, 2, 3, 4, 5]
    assert drafted(text, factor=1.0) == [[6, 7, 8, 9]]
    assert drafted(text, factor=2.0) == [[6, 7, 8, 9, 10, 11, 12, 13]]
    assert drafted(text, factor=2.0, tokens=3) == drafted(text, factor=2.0, room=3) == [[6, 7, 8]]
    assert drafted(text, factor=0.1) == [[6]]


def test_rows_draft_on_their_own():
    rows = [[1, 2, 3, 1, 2], [4, 5], [0, 7, 0]]
    alone = [drafted(row, factor=1.0)[0] for row in rows]
    assert drafted(*rows, factor=1.0) == alone == [[3, 1], [], [7]]


@pytest.mark.parametrize("options", [{}, {"tokens": 8}, {"tokens": 30, "factor": 4.0}, {"longest": 1}], ids=str)
@pytest.mark.parametrize("lengths", [(12,), (12, 1, 7)], ids=str)
def test_greedy_is_lossless(options, lengths):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    inputs["input_ids"][:, 8:] = inputs["input_ids"][:, 8:] % 5 + 3
    costing(model, 0.02, len(lengths))
    for stops in ({}, {"eos_token_id": [5, 9], "pad_token_id": 0}):
        settings = {"max_new_tokens": 40, "do_sample": False} | stops
        ours = model.generate(**inputs, **settings, custom_generate=Suffix(**options), return_dict_in_generate=True)
        assert torch.equal(ours.sequences, model.generate(**inputs, **settings))
        assert stops or ours.stats.accepted > 0


@pytest.mark.parametrize("cls", [Suffix, PromptLookup])
def test_the_measured_length_follows_the_cost_of_a_forward(cls):
    model, inputs = tiny.model(), tiny.prompts((24,))
    inputs["input_ids"] = inputs["input_ids"] % 4 + 3
    counts = {}
    for slope in (0.0, 0.05, 5.0):
        costing(model, slope)
        stats = model.generate(
            **inputs, max_new_tokens=40, do_sample=False, custom_generate=cls(tokens="auto"),
            return_dict_in_generate=True,
        ).stats  # fmt: skip
        counts[slope] = stats.drafted / stats.steps
    # A forward that costs as much a token as in all drafts nothing, a flat one all that has a fair chance.
    assert 0 <= counts[5.0] < 0.5 < counts[0.05] < counts[0.0]


def test_what_is_not_drafted_is_counted_all_the_same():
    """The copy is compared with the target's own token too, so a length of 0 finds back to drafting."""

    class Walked:
        tokens, counts = torch.tensor([[3, 1]]), torch.tensor([2])

    drafter, session = Suffix(), Text([1, 2, 3, 1, 2])
    session.model, session.stats = costing(tiny.model(), 5.0), Stats()
    state = drafter.start(session)
    tree = drafter.propose(session, state, 10)
    assert tree.tokens.tolist() == [[2]]
    before = list(state.counts.chances)
    drafter.observe(session, state, tree, None, Walked)
    # Behind two tokens that agree 3 was right, and behind three 1 was.
    risen = [now > then for now, then in zip(state.counts.chances, before, strict=True)]
    assert risen[:4] == [False, True, True, False]


def test_counts_stop_at_the_first_token_that_differs():
    counts = RunCounts()
    before = list(counts.chances)
    counts.learn(1, [4, 5, 6, 7], [4, 5, 9])
    changes = [(now > then) - (now < then) for now, then in zip(counts.chances, before, strict=True)]
    assert changes[:5] == [1, 1, -1, 0, 0]
    for _ in range(3000):
        counts.add(0, True)
    # Certainty would draft without end.
    assert counts.chances[0] == 0.99


def test_reach_multiplies_the_chances_of_growing_matches():
    counts = RunCounts()
    reach = counts.reach(2, 3)
    assert reach == pytest.approx([1, 0.5, 0.5 * 0.6, 0.5 * 0.6 * 0.65])
    # The longest kind goes on for ever, as long as it is likely enough.
    assert counts.reach(30, 5)[-1] == pytest.approx(0.9**5)
    assert len(counts.reach(30, 500)) < 60


def test_the_best_size_is_the_best_of_all_sizes():
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 3):
        for _ in range(40):
            reaches = [
                [1.0, *torch.rand(int(torch.randint(0, 9, (1,), generator=generator)), generator=generator)
                 .sort(descending=True).values.tolist()]
                for _ in range(rows)
            ]  # fmt: skip
            costs = [1.0, *(1 + torch.rand(7, generator=generator).cumsum(0)).tolist()]
            longest = min(len(costs) - 1, max(map(len, reaches)))
            rates = [sum(sum(row[:size]) for row in reaches) / costs[size] for size in range(1, longest + 1)]
            assert rates[best_size(reaches, costs) - 1] == max(rates)


def test_a_tree_that_grows_is_the_best_of_all_trees():
    """Against all chains and branchings of a small tree whose nodes have given chances."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        chances = torch.rand(3, 3, generator=generator).tolist()
        costs = [1.0, *(1 + torch.rand(8, generator=generator).cumsum(0)).tolist()]

        def children(depth, least, chances=chances):
            return [(chance, depth + 1) for chance in sorted(chances[depth], reverse=True)] if depth < 3 else []

        grown = Growth(0, children, costs, least_slopes(costs), deepest=2)
        # Every node down to depth 2, by the chance that it is reached.
        reach = sorted([1.0, *chances[0], *(a * b for a in chances[0] for b in chances[1])], reverse=True)
        best = max(sum(reach[:size]) / costs[size] for size in range(1, len(costs)))
        size = best_size([grown.reach], costs)
        assert sum(grown.reach[:size]) / costs[size] == pytest.approx(best)
        assert grown.reach == pytest.approx(reach[: len(grown.reach)])
        assert all(parent < node for node, parent in enumerate(grown.parents))


def test_seeded_samples_do_not_depend_on_drafts():
    model, inputs = tiny.model(), tiny.prompts((12, 5))
    texts = [
        model.generate(
            **inputs, max_new_tokens=30, do_sample=True, temperature=0.3, custom_generate=decoder,
            tokenry_options=Options(seed=1),
        )
        for decoder in (Suffix(), Suffix(tokens=9), PromptLookup(tokens=1))
    ]  # fmt: skip
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[2])


def test_text_form_and_values():
    for text in ("suffix", "suffix:tokens=8;factor=2.0", "suffix:longest=64"):
        assert str(method(text)) == text and pickle.loads(pickle.dumps(method(text))) == method(text)
    for bad in ({"tokens": 0}, {"tokens": "most"}, {"longest": 0}, {"factor": 0.0}):
        with pytest.raises(BadParameter):
            Suffix(**bad)

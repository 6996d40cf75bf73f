"""Goose's own invariants, as on its card."""

import itertools
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from tests import tiny
from tests.speculation.drafts import costing
from tokenry.errors import BadParameter
from tokenry.generation import Options, generate
from tokenry.kvcache import Sinks
from tokenry.methods import method
from tokenry.speculation import PromptLookup, Suffix
from tokenry.speculation.goose import Goose, _Branches, harmonic_split
from tokenry.speculation.recycling import Tree
from tokenry.speculation.sources import Text

# Candidates of a table that knows everything: ten ids, none of them below 1000, whose scores fall slowly.
SCORES = (0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.03, 0.02, 0.01)


def everything(context):
    return [(1000 + 17 * (context[-1] % 50) + place, score) for place, score in enumerate(SCORES)]


def nothing(context):
    return []


def build(chain, confidence, rate, successors=everything, **options):
    return Goose(**options).build((3, 7), chain, confidence, rate, successors)


def broods(tree):
    """Tokens of each node's children."""
    found = [[] for _ in tree.tokens]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        found[parent].append(token)
    return found


def text(*ids, reach=5):
    made = Text(512, reach)
    made.append(ids)
    return made


# --- the copied chain -----------------------------------------------------------------------------


def test_the_longest_ngram_and_its_first_occurrence_are_copied():
    goose = Goose()
    # 2 3 4 stands twice before, 1 2 3 4 once: the longer one wins although it is the later.
    chain, run, consensus = goose.copy(text(2, 3, 4, 8, 1, 2, 3, 4, 9, 5, 1, 2, 3, 4))
    assert (chain, run, consensus) == ([9, 5, 1, 2, 3, 4], 4, False)
    chain, _, consensus = goose.copy(text(2, 3, 4, 8, 6, 2, 3, 4, 9, 5, 2, 3, 4))
    assert (chain[:2], consensus) == ([8, 6], False)
    # n-grams below three are not looked up, and the text's own end is no occurrence.
    assert goose.copy(text(3, 4, 8, 6, 3, 4)) == ([], 0, False)
    assert goose.copy(text(2, 3, 4)) == ([], 0, False)
    assert Goose(ngrams=(2,)).copy(text(3, 4, 8, 6, 3, 4))[0] == [8, 6, 3, 4]
    assert len(goose.copy(text(*range(40), 0, 1, 2))[0]) == 20


def test_consensus_needs_two_occurrences_that_go_on_alike():
    goose = Goose()
    assert goose.copy(text(2, 3, 4, 8, 1, 2, 3, 4, 8, 5, 2, 3, 4))[2]
    assert not goose.copy(text(2, 3, 4, 8, 1, 2, 3, 4))[2]
    assert not goose.copy(text(2, 3, 4, 8, 1, 2, 3, 4, 9, 5, 2, 3, 4))[2]
    # Only occurrences of the longest n that is found count: one of four tokens makes none, whatever three say.
    assert not goose.copy(text(2, 3, 4, 8, 1, 2, 3, 4, 8, 5, 1, 2, 3, 4))[2]
    # Beyond the longest n-gram no occurrence is longer than another.
    assert Goose(ngrams=(3,)).copy(text(2, 3, 4, 8, 1, 2, 3, 4, 8, 5, 1, 2, 3, 4))[2]


def test_confidence_in_a_chain():
    trust = Goose().trust
    assert trust(0, False) == trust(0, True) == 0
    assert trust(3, True) == trust(20, True) == 1
    assert trust(5, False) == pytest.approx(0.375)
    assert trust(8, False) == pytest.approx(0.7)
    assert trust(12, False) == pytest.approx(0.7667, abs=1e-4)
    assert trust(20, False) == trust(40, False) == pytest.approx(0.9)
    assert Goose(long_match=4).trust(4, False) == pytest.approx(0.7)


def test_a_confident_chain_is_extended_from_its_own_end():
    goose = Goose()
    made = text(*range(100), 0, 1, 2)
    chain, _, consensus = goose.copy(made)
    assert (chain, consensus) == (list(range(3, 23)), False)
    assert goose.extend(made, chain, 0.9) == list(range(3, 93))
    # Full confidence goes on only as long as each piece has it; the first that has not is still taken.
    assert goose.extend(made, chain, 1.0) == list(range(3, 43))
    twice = text(*range(60), 200, *range(60), 201, 0, 1, 2)
    chain, _, consensus = goose.copy(twice)
    assert consensus and chain == list(range(3, 23))
    assert goose.extend(twice, chain, 1.0) == [*range(3, 60), 200, *range(22)]


# --- the tree -------------------------------------------------------------------------------------


def test_a_long_trusted_chain_as_worked_on_the_card():
    """Chain of 12, no consensus, rate 0.5: budget 90, spine 12, 38 for the spine's branches and 39 for the root's."""
    chain = list(range(100, 112))
    tree, spine = build(chain, Goose().trust(12, False), 0.5)
    assert spine == 12 and len(tree) == 90
    assert harmonic_split(38, 12) == [12, 6, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1]
    assert tree.tokens[1:13] == chain and tree.parents[1:13] == list(range(12))
    children = broods(tree)
    # The root has all its candidates, the spine what its shares allow, of ten candidates at most; the last spine node
    # has no next spine token among its children.
    assert children[0][0] == 100 and len(children[0]) == 11
    assert [len(brood) - 1 for brood in children[1:12]] == [10, 6, 4, 3, 2, 2, 1, 1, 1, 1, 1]
    assert len(children[12]) == 1


def test_a_short_chain_of_low_rate_as_worked_on_the_card():
    """Chain of 5, rate 0.1: confidence 0.375, budget 75, spine 5, 34 for the spine's branches and 35 for the root's."""
    tree, spine = build(list(range(100, 105)), Goose().trust(5, False), 0.1)
    assert spine == 5 and len(tree) == 75
    assert harmonic_split(34, 5) == [14, 7, 4, 3, 2]
    assert [len(brood) - 1 for brood in broods(tree)[1:5]] == [10, 7, 4, 3]


def test_the_rate_decides_how_long_the_spine_may_be():
    chain = list(range(100, 200))
    spines = [build(chain, 0.0, rate)[1] for rate in (0.1, 0.2, 0.39, 0.4, 0.9)]
    assert spines == [9, 18, 18, 30, 30]
    # Confidence takes the rest of the budget, which it enlarges: r = 0.3 + 0.5 (1 - 0.3), b = 60 + 20.
    assert build(chain, 0.5, 0.3)[1] == 52


def test_full_confidence_is_the_bypass():
    tree, spine = build(list(range(100, 200)), 1.0, 0.1)
    assert (spine, len(tree)) == (100, 101)
    assert tree.parents == list(range(-1, 100))
    # What the spine leaves goes to branches.
    tree, spine = build(list(range(100, 110)), 1.0, 0.1)
    assert (spine, len(tree)) == (10, 100)


def test_next_spine_tokens_are_not_drafted_again():
    chain = [1000 + 17 * 7, 1000 + 17 * (1119 % 50), 5]
    assert everything((3, 7))[0][0] == chain[0] and everything((7, chain[0]))[0][0] == chain[1]
    tree, spine = build(chain, 0.375, 0.5)
    assert spine == 3
    children = broods(tree)
    assert children[0].count(chain[0]) == children[1].count(chain[1]) == 1
    assert len(children[0]) == 10


def test_nothing_known_builds_no_branches():
    assert [len(build([], 0.0, 0.5, nothing)[0]), len(build([4, 5], 0.0, 0.5, nothing)[0])] == [1, 3]


def test_no_chain_is_a_tree_of_branches_alone():
    tree, spine = build([], 0.0, 0.5)
    assert spine == 0 and len(tree) == 60 and len(broods(tree)[0]) == 10
    # Width by score: 49 nodes are left, of which the best candidate takes ceil(0.3 * 49) = 15, cut to K // depth = 10.
    assert [len(brood) for brood in broods(tree)[1:5]] == [10, 8, 5, 3]


def test_one_candidate_a_token_makes_chains():
    def one(context):
        return everything(context)[:1]

    tree, _ = build([], 0.0, 0.5, one)
    assert tree.parents == list(range(-1, 6))
    tree, _ = build([500, 501], 0.0, 0.5, one)
    assert all(len(brood) <= 2 for brood in broods(tree)) and max(tree.depths) == 6


def test_branches_know_the_token_before():
    seen = set()

    def watched(context):
        seen.add(context)
        return everything(context)

    tree, _ = build([100, 101], 0.0, 0.5, watched)
    pairs = {(tree.tokens[parent], token) for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True)}
    assert (3, 7) in seen and (7, 100) in seen and (100, 101) in seen
    assert seen - {(3, 7)} <= pairs


def random_table(generator, vocab=12):
    """Candidates of random length and scores for every token, the same for a pair at every call."""
    rows = {}
    for token in range(vocab):
        ids = torch.randperm(vocab, generator=generator).tolist()
        scores = torch.rand(vocab, generator=generator).sort(descending=True).values.tolist()
        rows[token] = list(zip(ids, scores, strict=True))[: int(torch.randint(0, 10, (1,), generator=generator))]
    return lambda context: rows[context[-1]]


@pytest.mark.parametrize("seed", range(40))
def test_every_tree_is_well_formed(seed):
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(0, 30, (1,), generator=generator))
    chain = torch.randint(0, 12, (length,), generator=generator).tolist()
    confidence, rate = torch.rand(2, generator=generator).tolist()
    goose = Goose(size=int(torch.randint(2, 70, (1,), generator=generator)), depth=4)
    successors = random_table(generator)
    tree, spine = goose.build((3, 7), chain, confidence, rate, successors)
    budget = goose.size + int(goose.extra * confidence + 1e-9)
    assert len(tree) <= budget + (spine >= budget)
    assert tree.tokens[: spine + 1] == [7, *chain[:spine]] and tree.parents[1 : spine + 1] == list(range(spine))
    for brood in broods(tree):
        assert len(set(brood)) == len(brood)
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert 0 <= parent < node and tree.depths[node] == tree.depths[parent] + 1
        if node > spine:
            before = tree.tokens[tree.parents[parent]] if parent else 3
            assert tree.tokens[node] in [token for token, _ in successors((before, tree.tokens[parent]))]
            # A branch may leave the spine at any depth, but does not go on below the limit.
            assert tree.depths[node] <= 4 or parent <= spine
    control = goose.build_isotropic((3, 7), confidence, successors)
    assert len(control) <= budget and max(control.depths) <= 4
    assert all(len(brood) <= 3 for brood in broods(control))


def test_the_isotropic_control_fills_the_same_budget_evenly():
    control = Goose().build_isotropic((3, 7), 0.5, everything)
    assert len(control) == 80
    # Breadth first: 1 + 3 + 9 + 27 nodes are full levels, the rest hangs on the fourth.
    assert [control.depths.count(depth) for depth in range(5)] == [1, 3, 9, 27, 40]


@pytest.mark.parametrize("share", range(0, 60, 7))
def test_the_split_falls_and_stays_within_its_share(share):
    for count in range(0, 30, 3):
        given = harmonic_split(share, count)
        assert len(given) == count and given == sorted(given, reverse=True)
        # Rounding down leaves less than one node a place.
        assert max(0, share - count) <= sum(given) <= share or count == 0


# --- whole runs -----------------------------------------------------------------------------------


def run(model, inputs, decoder=None, table=None, **options):
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True} | options
    if decoder is not None:
        options["custom_generate"] = decoder
        options["tokenry_options"] = Options(resources={} if table is None else {"table": table})
    return model.generate(**inputs, **options)


def repeating(lengths, seed=0):
    """Prompts of few different tokens, so that there is something to copy."""
    inputs = tiny.prompts(lengths, seed)
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 4 + 3, 0)
    return inputs


@pytest.mark.parametrize("batch", [(24,), (24, 3, 11)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"sources": "spine"}, {"sources": "branches"}, {"tree": "isotropic"}, {"confidence": False}, {"bigrams": 0},
     {"size": 9, "extra": 0}, {"size": 1, "extra": 0}, {"size": "auto"}, {"size": "auto", "sources": "spine"},
     {"size": "auto", "sources": "branches"}, {"k": 1}, {"harvest_prompt": False}, {"ngrams": (2, 1)}],
    ids=str,
)  # fmt: skip
def test_greedy_is_lossless(options, batch):
    model, inputs = tiny.model(dtype=torch.float64), repeating(batch)
    stops = {"eos_token_id": [5, 9], "pad_token_id": 0, "max_new_tokens": 30}
    for extra in ({}, stops):
        ours = run(model, inputs, Goose(**options), **extra)
        assert torch.equal(ours.sequences, run(model, inputs, **extra).sequences)
        assert not extra or options.get("size") != 1 or ours.stats.drafted == 0


@dataclass(frozen=True, kw_only=True)
class Watched(Goose):
    """Checks each step's table and rate against the card's rules, from what the step drafted and got."""

    slug: ClassVar[str] = "watched"

    def observe(self, session, state, tree, logits, walk):
        deepest = tree.shape.deepest
        rows = [(row.rate, min(row.spine, deepest), list(row.chain)) for row in state.rows]
        proposed = state.recycler.waits
        super().observe(session, state, tree, logits, walk)
        real = torch.ones_like(tree.tokens, dtype=torch.bool) if tree.valid is None else tree.valid
        last, pairs = {}, {}
        for row in range(session.batch):
            if not session.alive[row]:
                assert state.rows[row].rate == rows[row][0]
                continue
            parents = tree.shape.parents.expand_as(tree.tokens)[row]
            for node in range(tree.tokens.shape[1]):
                if real[row, node]:
                    token = int(tree.tokens[row, node])
                    last[token] = logits[row, node]
                    if node:
                        pairs[int(tree.tokens[row, parents[node]]), token] = logits[row, node]
            accepted, (rate, spine, chain) = walk.tokens[row, : walk.counts[row] - 1].tolist(), rows[row]
            if spine and proposed:
                copied = 0
                while copied < min(spine, len(accepted)) and accepted[copied] == chain[copied]:
                    copied += 1
                assert state.rows[row].rate == pytest.approx(0.3 * copied / spine + 0.7 * rate)
            else:
                assert state.rows[row].rate == rate
        for token, best in last.items():
            assert state.recycler.table.ids[token].tolist() == best.topk(10).indices.tolist()
        # 97 * 97 pairs have a row each.
        for (previous, token), best in pairs.items():
            wanted = best.topk(10)
            assert state.recycler.table.row((previous, token))[1] == 2
            found = state.recycler.table.successors((previous, token))
            assert [each for each, _ in found] == wanted.indices.tolist()
            assert [score for _, score in found] == pytest.approx(wanted.values.softmax(-1).tolist(), abs=2e-3)


@pytest.mark.parametrize("batch", [(24,), (24, 3, 11)], ids=str)
def test_a_pass_teaches_the_table_every_node_and_the_rate_its_spine(batch):
    result = run(tiny.model(), repeating(batch), Watched(), eos_token_id=[5, 9], pad_token_id=0)
    assert result.stats.steps > 5 and result.stats.accepted > 0


def test_the_prompt_teaches_tokens_and_pairs_and_padding_neither():
    model, inputs = tiny.model(), tiny.prompts((9, 5))
    table = Goose().new_table()
    run(model, inputs, Goose(), table, max_new_tokens=1)
    with torch.no_grad():
        logits = model(**inputs).logits
    mask = inputs["attention_mask"].bool()
    wanted = {}
    for row in range(2):
        ids = inputs["input_ids"][row][mask[row]].tolist()
        for place, token in enumerate(ids):
            best = logits[row][mask[row]][place].topk(10).indices.tolist()
            wanted[-1, token] = best
            if place:
                wanted[ids[place - 1], token] = best
    for (previous, token), best in wanted.items():
        context = (token,) if previous < 0 else (previous, token)
        assert [found for found, _ in table.successors(context)] == best
    assert int((table.keys > 0).sum()) == len([pair for pair in wanted if pair[0] >= 0])
    assert int(table.seen[: tiny.VOCABULARY].sum()) == len({token for _, token in wanted})
    none = Goose().new_table()
    run(model, inputs, Goose(harvest_prompt=False), none, max_new_tokens=1)
    assert none.is_cold


def test_a_prompt_in_pieces_teaches_what_it_teaches_whole():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((23, 14))
    # No token comes twice, so that the order of the pieces does not matter.
    inputs["input_ids"] = (torch.arange(3, 49).view(2, 23)) * inputs["attention_mask"]
    tables = []
    for chunk in (None, 5):
        tables.append(Goose().new_table())
        run(model, inputs, Goose(), tables[-1], max_new_tokens=1, prefill_chunk_size=chunk)
    assert torch.equal(tables[0].keys, tables[1].keys) and torch.equal(tables[0].seen, tables[1].seen)
    assert torch.equal(tables[0].ids, tables[1].ids)


@pytest.mark.parametrize("options", [{}, {"size": "auto"}], ids=str)
def test_a_copy_is_drafted_before_the_prompt_is_read_and_teaches_no_less(options):
    model = tiny.model()
    ids = tiny.prompts((9,))["input_ids"].repeat(1, 3)[:, :-2]
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    tables, results = [], []
    for patient in (False, True):
        decoder = Goose(**options)
        tables.append(decoder.new_table())
        resources = {"table": tables[-1]}
        chunk = {"prefill_chunk_size": ids.shape[1] - 1} if patient else {}
        results.append(
            generate(model, None, ids, method=decoder, resources=resources, max_new_tokens=12, do_sample=False, **chunk)
        )
        assert torch.equal(results[-1].sequences, wanted)
        prompt = decoder.new_table()
        generate(model, None, ids, method=decoder, resources={"table": prompt}, max_new_tokens=1, **chunk)
        tables.append(prompt)
    early, late = results
    # The first pass reads the prompt and what was copied behind it; otherwise two pieces of the prompt come first, and
    # their last token gives the first of the output.
    assert early.stats.drafted > 0
    assert (early.stats.forwards - early.stats.steps, late.stats.forwards - late.stats.steps) == (0, 2)
    assert torch.equal(tables[1].ids, tables[3].ids) and torch.equal(tables[1].keys, tables[3].keys)


@dataclass(frozen=True, kw_only=True)
class Recorded(Goose):
    slug: ClassVar[str] = "recorded"

    def propose(self, session, state, room):
        tree = super().propose(session, state, room)
        trees = session.stats.extra.setdefault("trees", [])
        trees.append((session.lengths[0], tree.tokens.tolist(), tree.shape.parents.tolist()))
        return tree


def test_pairs_of_the_root_are_taught_by_chains_and_single_steps_alone():
    model, inputs = tiny.model(seed=2), tiny.prompts((20,), 2)
    for options, taught in (({"size": 1, "extra": 0}, True), ({}, False)):
        table = Goose().new_table()
        decoder = Goose(harvest_prompt=False, **options)
        text = run(model, inputs, decoder, table, max_new_tokens=12).sequences[0].tolist()
        # The first anchor is unknown; no copy is at hand, so its pass drafts nothing.
        known = [table.row(pair)[1] == 2 for pair in itertools.pairwise(text[19:])]
        assert known[0] and all(known[:-2]) == taught


def test_inside_a_policy_that_leaves_no_room_it_drafts_nothing():
    model, inputs = tiny.model(), repeating((24,))
    for decoder in (Goose(), Goose(size="auto")):
        with Sinks(budget=16)(model):
            plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
            ours = run(model, inputs, decoder, max_new_tokens=20)
        assert torch.equal(ours.sequences, plain) and ours.stats.drafted == 0


def test_without_repetitions_the_tree_is_that_of_branches_alone():
    """n-grams of 39 tokens do not come back, so there is no spine in either."""
    model, inputs = tiny.model(), tiny.prompts((12,))
    trees = [
        run(model, inputs, Recorded(sources=sources, ngrams=(39,))).stats.extra["trees"]
        for sources in ("both", "branches")
    ]
    assert trees[0] == trees[1] and max(len(tokens[0]) for _, tokens, _ in trees[0]) > 20


def test_without_a_table_it_is_prompt_lookup():
    """Chains alone: what followed the first occurrence of the last 5, 4 or 3 tokens, 20 at most."""
    # A model whose greedy text falls into a loop.
    model, inputs = tiny.model(seed=2), tiny.prompts((20,), 2)
    result = run(model, inputs, Recorded(sources="spine"), max_new_tokens=100)
    sequence = result.sequences[0].tolist()
    drafted = 0
    for length, tokens, parents in result.stats.extra["trees"]:
        text = sequence[:length]
        found = [
            text[at + n : at + n + 20] for n in (5, 4, 3) for at in range(length - n) if text[at : at + n] == text[-n:]
        ]
        assert tokens == [[text[-1], *(found[0] if found else [])]]
        assert parents == [list(range(-1, len(tokens[0]) - 1))]
        drafted += len(tokens[0]) - 1
    assert drafted > 0


def test_a_chain_alone_is_no_longer_than_a_tree_may_be():
    model, inputs = tiny.model(seed=2), tiny.prompts((20,), 2)
    result = run(model, inputs, Recorded(sources="spine", size=4, extra=2), max_new_tokens=60)
    sizes = [len(tokens[0]) for _, tokens, _ in result.stats.extra["trees"]]
    assert max(sizes) == 6


def cheap(model):
    """The model, for which a pass over more tokens costs nothing more; so trees do not hang on the machine."""
    return costing(model, 0.0, 1, 3)


def test_the_measured_size_follows_the_cost_of_a_forward():
    inputs = repeating((24,))
    drafted = {}
    for slope in (0.0, 1.0):
        # A new model each: a second call of one process drafts copies alone.
        stats = run(costing(tiny.model(), slope), inputs, Goose(size="auto")).stats
        drafted[slope] = stats.drafted / stats.steps
    assert drafted[1.0] < 4 < 20 < drafted[0.0]


def branched(model, inputs, decoder=None, table=None, **options):
    """Whether a call drafted trees with branches; its output is plain's."""
    result = run(model, inputs, decoder or Recorded(size="auto"), table, **options)
    assert torch.equal(result.sequences, run(model, inputs, **options).sequences)
    trees = [parents[0] for _, _, parents in result.stats.extra["trees"]]
    found = any(len(set(parents)) < len(parents) for parents in trees)
    assert result.stats.extra.get("branches", True) == found
    return found


@pytest.mark.parametrize("batch", [(24,), (24, 3, 11)], ids=str)
def test_calls_for_which_branches_do_not_pay_draft_the_copy_alone(batch, monkeypatch):
    model, inputs = cheap(tiny.model(dtype=torch.float64)), repeating(batch)
    ways = []
    monkeypatch.setattr(_Branches, "pay", property(lambda self: False))
    ways += [branched(model, inputs) for _ in range(9)]
    monkeypatch.setattr(_Branches, "pay", property(lambda self: True))
    ways += [branched(model, inputs) for _ in range(8)]
    # Both ways once, then the faster one, and every eighth call the other.
    assert ways == [True, *[False] * 7, True, *[True] * 7, False]


def test_calls_that_time_nothing_do_not_count():
    model, inputs = cheap(tiny.model()), repeating((24,))
    for _ in range(3):
        assert run(model, inputs, Goose(size="auto"), max_new_tokens=1).stats.extra == {"branches": True}
        with pytest.raises(BadParameter, match="k=500"):
            run(model, inputs, Goose(size="auto", k=500))
    ways = [run(model, inputs, Goose(size="auto")).stats.extra["branches"] for _ in range(2)]
    assert ways == [True, False]
    # Nor does what was timed elsewhere.
    assert run(model, inputs, Goose(size="auto"), do_sample=True, temperature=0.5).stats.extra["branches"]
    with Sinks(budget=24, compact_every=4)(model):
        assert run(model, inputs, Goose(size="auto")).stats.extra["branches"]


def test_branches_that_were_asked_for_are_always_drafted(monkeypatch, tmp_path):
    monkeypatch.setattr(_Branches, "pay", property(lambda self: False))
    model, inputs = cheap(tiny.model()), repeating((24,))
    hot = Recorded(size="auto").new_table()
    run(model, inputs, Recorded(size="auto"), hot)
    hot.save(tmp_path / "hot")
    for decoder, table in (
        (Recorded(size="auto"), hot), (Recorded(size="auto", table=str(tmp_path / "hot")), None), (Recorded(), None),
        (Recorded(size="auto", sources="branches"), None),
    ):  # fmt: skip
        assert all(branched(model, inputs, decoder, table) for _ in range(3))
    # Other options and other models are not judged by what was measured of these.
    assert branched(model, inputs) and branched(model, inputs, Recorded(size="auto", k=4))
    assert branched(cheap(tiny.model()), inputs) and not branched(model, inputs)


def test_a_call_that_copies_alone_drafts_as_suffix_does():
    model, inputs = cheap(tiny.model()), repeating((24,))
    run(model, inputs, Goose(size="auto"))
    ours, theirs = (run(model, inputs, drafter).stats for drafter in (Goose(size="auto"), Suffix()))
    assert ours.drafted > 0 and (ours.forwards, ours.accepted) == (theirs.forwards, theirs.accepted)


def test_branches_pay_when_their_tokens_are_worth_their_time():
    def costs(*last):
        return SimpleNamespace(last=last or None, forward=lambda nodes: 1 + nodes / 10)

    branches = _Branches()
    assert branches.pay  # nothing is known
    branches.time(_Branches.TREES, costs(3.0, 2.0))
    branches.count(costs(), (3, 10), (2, 5))
    assert branches.pay  # steps that copy alone were not timed
    branches.time(_Branches.COPIES, costs())
    assert branches.pay  # nor is one that had no drafts
    branches.time(_Branches.COPIES, costs(1.5, 1.5))
    assert not branches.pay  # 3 / (2 * 1.5) against 2 / 1.5
    for _ in range(3):
        branches.count(costs(), (9, 10), (2, 5))
    assert branches.pay
    # Forwards were measured on a busy machine, as three times what they take now.
    busy = _Branches()
    busy.time(_Branches.TREES, costs(0.6, 2.0))
    busy.time(_Branches.COPIES, costs(0.5, 1.5))
    busy.count(costs(), (3, 10), (2, 1))
    assert not busy.pay  # 3 / (2 * 0.3) against 2 / (1.1 / 3)


def test_a_hot_table_helps():
    model, inputs = tiny.model(), tiny.prompts((8,))
    table = Goose().new_table()
    cold, hot = (run(model, inputs, Goose(sources="branches"), table).stats for _ in range(2))
    assert hot.forwards < cold.forwards


def test_samples_with_a_seed_are_plains():
    model, inputs = tiny.model(), repeating((12, 5))
    options = {"do_sample": True, "temperature": 0.3, "return_dict_in_generate": False}
    texts = [
        model.generate(**inputs, max_new_tokens=30, custom_generate=decoder, tokenry_options=Options(seed=1), **options)
        for decoder in (Goose(), Goose(size="auto"), PromptLookup(tokens=1))
    ]
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[2])


def test_text_form_and_values():
    for text in ("goose", "goose:size=auto", "goose:sources=branches;ngrams=(4,2)", "goose:size=30;tree=isotropic"):
        assert str(method(text)) == text and pickle.loads(pickle.dumps(method(text))) == method(text)
    for bad in (
        {"size": 0}, {"size": "all"}, {"ngrams": ()}, {"ngrams": (3, 5)}, {"ngrams": (2, 0)}, {"spine_share": 1.5},
        {"k": 0}, {"depth": 0}, {"bigrams": -1}, {"tree": "isotropic", "size": "auto"},
        {"tree": "isotropic", "sources": "spine"}, {"decay": -0.1},
    ):  # fmt: skip
        with pytest.raises(BadParameter):
            Goose(**bad)


def test_a_prefix_of_a_tree_is_a_tree():
    tree = Tree(1)
    for parent in (0, 0, 1, 3):
        tree.add(9, parent)
    assert tree.prefix(3).parents == [-1, 0, 0] and len(tree.prefix(3)) == 3

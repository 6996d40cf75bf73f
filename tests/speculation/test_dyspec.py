"""DySpec's trees are those of the paper's algorithms, as good as any of their size, and lossless."""

import heapq
import itertools
import math

import pytest
import torch

from tests import tiny
from tests.speculation.drafts import ScriptedDraws, Tabulated, Toy, near, run, trees
from tests.speculation.test_law import assert_lossless, table
from tokenry.errors import BadParameter
from tokenry.methods import method
from tokenry.speculation.draft_model import DraftModel
from tokenry.speculation.dyspec import DySpec, _State

VOCAB, DEEPEST = 6, 4
NONE = torch.tensor([], dtype=torch.long)


class Table(dict):
    """Random distributions `[vocab]`, some of them sharp, made when they are asked for."""

    def __init__(self, seed, vocab=VOCAB):
        self.vocab, self.generator = vocab, torch.Generator().manual_seed(seed)

    def __missing__(self, path):
        sharpness = 4 * torch.rand(1, generator=self.generator, dtype=torch.float64)
        weights = torch.randn(self.vocab, generator=self.generator, dtype=torch.float64) * sharpness
        self[path] = weights.softmax(-1)
        return self[path]


class Race:
    """Draws on fixed noise, one for each depth; without noise, the most probable tokens."""

    coupled = False

    def __init__(self, noise=None):
        self.noise, self.sampled = noise, noise is not None

    def order(self, session, probs, ahead, count):
        clocks = self.noise[ahead] if self.sampled else 1
        tokens = (probs / clocks).topk(count, -1).indices
        return tokens, probs.gather(-1, tokens)

    def ordered(self, table, path):
        """All draws behind a path with their probabilities, as plain numbers."""
        tokens, likely = self.order(None, table[path], len(path), table.vocab)
        return list(zip(tokens.tolist(), likely.tolist(), strict=True))


def noise(seed, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(DEEPEST, vocab, dtype=torch.float64).exponential_(generator=generator)


def grown(drafter, table, draws, deepest=DEEPEST):
    """Paths of the tree's nodes in order, the root left out, and the forwards that it took."""
    companion = Tabulated(table)
    session = Toy([])
    session.vocab = table.vocab
    state = _State(companion, draws, NONE, None)
    # At draft temperature 1 the tabulated distributions are taken as they are.
    tree = drafter.propose(session, state, deepest)
    paths = [()]
    for node in range(1, tree.shape.size):
        paths.append((*paths[int(tree.shape.parents[0, node])], int(tree.tokens[0, node])))
    return paths[1:], companion.levels


def heap(table, draws, size, deepest=DEEPEST):
    """The paper's algorithm 1, one draw at a time: paths and the value at which each was drawn."""
    order, queue, found = itertools.count(1), [(-1.0, 0, (), 0)], []
    while queue and len(found) < size:
        value, _, path, place = heapq.heappop(queue)
        left = draws.ordered(table, path)[place:]
        token, likely = left[0]
        found.append(((*path, token), -value))
        chance = likely / sum(probability for _, probability in left)
        if len(left) > 1:
            heapq.heappush(queue, (value * (1 - chance), next(order), path, place + 1))
        if len(path) + 1 < deepest:
            heapq.heappush(queue, (value * chance, next(order), (*path, token), 0))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1, 2, 5, 17, 40])
def test_the_tree_is_that_of_the_papers_heap(size, seed):
    law, draws = Table(seed), Race(noise(seed))
    wanted = heap(law, draws, size)
    values = [value for _, value in wanted]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))
    for path, value in wanted:
        product = math.prod(float(law[path[:i]][token]) for i, token in enumerate(path[:-1]))
        elders = itertools.takewhile(lambda drawn, path=path: drawn[0] != path[-1], draws.ordered(law, path[:-1]))
        assert value == pytest.approx(product * (1 - sum(likely for _, likely in elders)))
    paths, forwards = grown(DySpec(size=size, draft_temperature=1.0), law, draws)
    assert set(paths) == {path for path, _ in wanted}
    # Siblings stand in the order they were drawn, levels ascend, and one forward makes a level.
    for parent in {path[:-1] for path in paths}:
        drawn = [token for token, _ in draws.ordered(law, parent)]
        brood = [path[-1] for path in paths if path[:-1] == parent]
        assert brood == drawn[: len(brood)]
    assert [len(path) for path in paths] == sorted(len(path) for path in paths)
    assert forwards <= min(DEEPEST, max(map(len, paths)) + 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1, 5, 17, 40])
def test_layers_with_the_heaps_last_value_are_the_same_tree(size, seed):
    law, draws = Table(seed), Race(noise(seed))
    wanted = heap(law, draws, size)
    layered = DySpec(size=99, mode="layered", threshold=wanted[-1][1] * (1 - 1e-5), draft_temperature=1.0)
    assert set(grown(layered, law, draws)[0]) == {path for path, _ in wanted}


def test_layers_stop_at_their_size_and_serve_the_best_of_a_level_first():
    law, draws = Table(1), Race(noise(1))
    everything = heap(law, draws, 400)
    threshold = 0.01
    fits = [(path, value) for path, value in everything if value >= threshold]
    full = grown(DySpec(size=999, mode="layered", threshold=threshold, draft_temperature=1.0), law, draws)[0]
    assert set(full) == {path for path, _ in fits} and len(full) > 10
    size = 1 + sum(len(path) == 1 for path in full) + sum(len(path) == 2 for path in full) // 2
    some = grown(DySpec(size=size, mode="layered", threshold=threshold, draft_temperature=1.0), law, draws)[0]
    second = sorted((-value, path) for path, value in fits if len(path) == 2)[: size - sum(len(p) == 1 for p in full)]
    assert set(some) == {path for path in full if len(path) == 1} | {path for _, path in second}


def closed_sets(size, first, opened):
    """All sets of `size` draws, each with those it rests on: `opened(draw)` gives what a draw makes possible."""
    level = {frozenset([draw]) for draw in first}
    for _ in range(size - 1):
        level = {
            taken | {draw}
            for taken in level
            for draw in [*first, *(new for old in taken for new in opened(old))]
            if draw not in taken
        }
    return level


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_tree_of_its_size_is_expected_to_have_more_accepted(size, seed):
    """Deterministic drafts: against all trees of up to three levels over three tokens."""
    law = Table(seed, vocab=3)

    def chance(path):
        return math.prod(float(law[path[:i]][token]) for i, token in enumerate(path))

    def children(path):
        return [(*path, token) for token in range(3)] if len(path) < 3 else []

    best = max(sum(map(chance, tree)) for tree in closed_sets(size, children(()), children))
    paths, _ = grown(DySpec(size=size, draft_temperature=1.0), law, Race(), deepest=3)
    assert len(paths) == size and sum(map(chance, paths)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [2, 3, 5])
def test_no_tree_of_its_size_is_expected_to_make_more_of_its_draws(size, seed):
    """Sampled drafts: a draw counts with the chance that verification gets to it."""
    law, draws = Table(seed, vocab=3), Race(noise(seed, 3))
    values = {path: value for path, value in heap(law, draws, 999, deepest=3)}

    def opened(path):
        drawn = [token for token, _ in draws.ordered(law, path[:-1])]
        younger = drawn[drawn.index(path[-1]) + 1 :][:1]
        new = [(*path[:-1], token) for token in younger]
        return new + ([(*path, draws.ordered(law, path)[0][0])] if len(path) < 3 else [])

    first = [(draws.ordered(law, ())[0][0],)]
    best = max(sum(values[path] for path in tree) for tree in closed_sets(size, first, opened))
    paths, _ = grown(DySpec(size=size, draft_temperature=1.0), law, draws, deepest=3)
    assert len(paths) == size and sum(values[path] for path in paths) == pytest.approx(best)


def test_an_exhausted_distribution_ends_its_node():
    law = Table(0)
    law[()] = torch.tensor([0.7, 0.3, 0, 0, 0, 0], dtype=torch.float64)
    paths, _ = grown(DySpec(size=30, max_depth=1), law, Race(noise(2)))
    assert sorted(paths) == [(0,), (1,)]


@pytest.mark.parametrize(
    "drafter",
    [
        DySpec(size=2, draft_temperature=1.0),
        DySpec(size=3, max_depth=1),
        DySpec(size=2, mode="layered", threshold=0.3),
        DySpec(size=2, mode="layered", threshold=0.05, draft_temperature=1.0),
    ],
    ids=str,
)
def test_sampled_trees_keep_the_targets_law_exactly(drafter):
    """All draws and all decisions of the verifier, enumerated over 4 tokens; what is drawn shapes the tree."""
    proposal = table(21)

    def propose(session):
        return drafter.propose(session, _State(Tabulated(proposal), ScriptedDraws(), NONE, None), 2)

    found = trees(propose)
    assert sum(chance for _, chance in found) == pytest.approx(1)
    assert_lossless(table(22), found)


@pytest.mark.parametrize("lengths", [(8,), (8, 3, 6, 1)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_greedy_is_lossless_with_any_draft(kind, lengths):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    options = {"eos_token_id": [5, 9, 30], "pad_token_id": 0}
    wanted = run(model, inputs, **options).sequences
    for draft in (near(), tiny.model(kind, torch.float64, seed=1)):
        for text in ("dyspec:size=20", "dyspec:size=7;mode=layered", "dyspec:size=5;max_depth=2", "dyspec:size=auto"):
            assert torch.equal(run(model, inputs, method(text), draft, **options).sequences, wanted)


def test_one_node_is_a_chain_of_one():
    model, draft, inputs = tiny.model(dtype=torch.float64), near(), tiny.prompts((8,))
    one, chain = (run(model, inputs, each, draft).stats for each in (DySpec(size=1), DraftModel(tokens=1)))
    for name in ("steps", "drafted", "accepted", "extra"):
        assert getattr(one, name) == getattr(chain, name)


@pytest.mark.parametrize("size", [3, 7])
def test_a_confident_draft_makes_a_chain(size):
    """At a draft temperature near 0 the tree of the target itself is the chain that it accepts whole."""
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8,))
    stats = run(model, inputs, DySpec(size=size, draft_temperature=0.001), model).stats
    assert stats.forwards == 1 + math.ceil(23 / (size + 1)) and stats.accepted == stats.drafted
    assert stats.extra["draft_forwards"] == stats.drafted


def test_it_reads_the_draft_once_a_level():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8, 3))
    for mode in ("heap", "layered"):
        stats = run(model, inputs, DySpec(size=20, mode=mode, max_depth=4), near()).stats
        assert stats.extra["draft_forwards"] <= 4 * (stats.forwards - 1)


def test_parameters():
    assert str(DySpec()) == "dyspec" and DySpec().size == 64 and DySpec().draft_temperature == 0.6
    assert method("dyspec:size=auto;mode=layered") == DySpec(size="auto", mode="layered")
    for bad in ({"size": 0}, {"threshold": 0.1}, {"threshold": 0.0, "mode": "layered"}, {"draft_temperature": 0},
                {"max_depth": 0}, {"size": "most"}):  # fmt: skip
        with pytest.raises(BadParameter):
            DySpec(**bad)

"""Sampling is lossless: the law of what a verify step commits is the target's, by exact enumeration.

The model is a table: logits depend on the tokens since the anchor. All decisions of the real walk are enumerated with
their probabilities, so the law is exact up to rounding.
"""

import itertools
from collections import defaultdict

import pytest
import torch

from tests.speculation.toys import outcomes
from tokenry.speculation import DraftTree, TreeShape, rejection
from tokenry.speculation.engine import walk

VOCAB = 4


def table(seed):
    """Distributions after no, one and two tokens, float64 by context."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [c for n in range(3) for c in itertools.product(range(VOCAB), repeat=n)]
    weights = [torch.rand(VOCAB, generator=generator, dtype=torch.float64) ** 2 + 0.01 for _ in contexts]
    return {context: w / w.sum() for context, w in zip(contexts, weights, strict=True)}


def law(target, trees, **options):
    """The law of the first two tokens, where a step that commits one is followed by plain sampling."""
    found = defaultdict(float)
    for tree, chance in trees:
        paths = [()]
        for node in range(1, tree.shape.size):
            paths.append((*paths[int(tree.shape.parents[0, node])], int(tree.tokens[0, node])))
        logits = torch.stack([target[path].log() for path in paths])[None]
        for tokens, probability in outcomes(
            lambda session, tree=tree, logits=logits: _committed(session, tree, logits, options.get("at_once")),
            context_free=options.get("at_once", False),
        ):
            weight = chance * probability
            if len(tokens) >= 2:
                found[tokens[:2]] += weight
            else:
                for second in range(VOCAB):
                    found[(tokens[0], second)] += weight * float(target[tokens[:1]][second])
    return found


def _committed(session, tree, logits, at_once):
    walked = walk(session, tree, logits, [9], at_once)
    return tuple(walked.tokens[0, : int(walked.counts[0])].tolist())


def assert_lossless(target, trees, **options):
    found = law(target, trees, **options)
    for first, second in itertools.product(range(VOCAB), repeat=2):
        wanted = float(target[()][first] * target[(first,)][second])
        assert abs(found[(first, second)] - wanted) < 1e-12


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("parents", "tokens"),
    [
        ((-1,), (0,)),
        ((-1, 0, 1), (0, 2, 1)),
        ((-1, 0, 0, 1), (0, 1, 3, 2)),
        ((-1, 0, 0, 0), (0, 1, 1, 3)),
        # The same token twice, with drafts behind the second only, or behind both.
        ((-1, 0, 0, 2), (0, 1, 1, 2)),
        ((-1, 0, 0, 1, 2), (0, 1, 1, 3, 2)),
    ],
    ids=str,
)
def test_deterministic_drafts(parents, tokens, at_once):
    tree = DraftTree(torch.tensor([tokens]), TreeShape.of(parents))
    assert_lossless(table(1), [(tree, 1.0)], at_once=at_once)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_repeated_draft_counts_where_its_elder_is_not_real(at_once):
    valid = torch.tensor([[True, False, True, True]])
    tree = DraftTree(torch.tensor([[0, 1, 1, 2]]), TreeShape.of((-1, 0, 0, 2)), valid)
    assert_lossless(table(1), [(tree, 1.0)], at_once=at_once)
    logits = torch.zeros(1, 4, VOCAB, dtype=torch.float64)
    found = outcomes(lambda session: _committed(session, tree, logits, at_once), context_free=at_once)
    assert any(len(tokens) == 3 for tokens, _ in found)


def drawn(q, count, replacement):
    """All ordered draws of `count` tokens with their probability."""
    for draw in itertools.product(range(VOCAB), repeat=count):
        chance, left = 1.0, q.clone()
        for token in draw:
            chance *= float(left[token] / left.sum()) if left.sum() > 0 else 0.0
            if not replacement:
                left[token] = 0
        if chance > 0:
            yield draw, chance


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_sampled_drafts_at_one_node(drafts, replacement):
    target, proposal = table(2), table(3)
    shape = TreeShape.of((-1, *[0] * drafts))
    q = torch.zeros(1, drafts + 1, VOCAB, dtype=torch.float64)
    q[0, 0] = proposal[()]
    trees = [
        (DraftTree(torch.tensor([[0, *draw]]), shape, q=q, replacement=replacement), chance)
        for draw, chance in drawn(proposal[()], drafts, replacement)
    ]
    assert_lossless(target, trees)


@pytest.mark.parametrize("replacement", [True, False])
def test_sampled_drafts_two_deep(replacement):
    """Two children, and a grandchild under the first of them."""
    target, proposal = table(4), table(5)
    shape = TreeShape.of((-1, 0, 0, 1))
    trees = []
    for draw, chance in drawn(proposal[()], 2, replacement):
        for deeper, further in drawn(proposal[(draw[0],)], 1, replacement):
            q = torch.zeros(1, 4, VOCAB, dtype=torch.float64)
            q[0, 0], q[0, 1] = proposal[()], proposal[(draw[0],)]
            tokens = torch.tensor([[0, *draw, *deeper]])
            trees.append((DraftTree(tokens, shape, q=q, replacement=replacement), chance * further))
    assert_lossless(target, trees)


def test_a_proposal_that_misses_tokens_and_one_that_equals_the_target():
    target = table(6)
    for q in (torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64), target[()]):
        for replacement in (True, False):
            full = torch.zeros(1, 4, VOCAB, dtype=torch.float64)
            full[0, 0] = q
            trees = [
                (DraftTree(torch.tensor([[0, *draw]]), TreeShape.of((-1, *[0] * len(draw))), q=full[:, : len(draw) + 1],
                           replacement=replacement), chance)
                for draw, chance in drawn(q, 2, replacement)
            ]  # fmt: skip
            assert_lossless(target, trees)


def test_without_replacement_accepts_more_often():
    """Mean acceptance with 3 drafts over 5 tokens, Dirichlet(1) target and proposal: about 0.82 against 0.71."""
    torch.manual_seed(0)
    law = torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64))
    means = {}
    for replacement in (True, False):
        total = 0.0
        for _ in range(300):
            target, q = law.sample(), law.sample()
            draft = torch.multinomial(q, 3, replacement=replacement).tolist()
            rejected = 1.0
            for chance in rejection(target, q, draft, replacement)[0]:
                rejected *= 1 - chance
            total += 1 - rejected
        means[replacement] = total / 300
    assert abs(means[False] - 0.82) < 0.05 and abs(means[True] - 0.707) < 0.05


def test_an_accepted_step_never_passes_its_limit():
    target = table(7)
    tree = DraftTree(torch.tensor([[0, 1, 2]]), TreeShape.chain(3))
    logits = torch.stack([target[()].log(), target[(1,)].log(), target[(1, 2)].log()])[None]
    for at_once in (True, False):
        lengths = {
            len(tokens)
            for tokens, _ in outcomes(
                lambda session, at_once=at_once: (lambda w: tuple(w.tokens[0, : int(w.counts[0])].tolist()))(
                    walk(session, tree, logits, [2], at_once)
                ),
                context_free=at_once,
            )
        }
        assert lengths == {1, 2}

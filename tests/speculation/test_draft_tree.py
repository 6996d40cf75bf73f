"""A tree of fixed shape from a second model: its nodes, its law, and what the draft is asked."""

import pytest
import torch

from tests import tiny
from tests.speculation.drafts import ScriptedDraws, Tabulated, check_logits, near, run, trees
from tests.speculation.test_law import assert_lossless, table
from tokenry.errors import BadParameter
from tokenry.speculation import engine
from tokenry.speculation.draft_model import DraftModel
from tokenry.speculation.draft_tree import FixedDraftTree, _State


@pytest.mark.parametrize(("size", "children"), [(1, 2), (5, 2), (14, 2), (11, 3), (4, 4)])
def test_nodes_are_the_drafts_best_breadth_first(size, children, monkeypatch):
    model, draft, inputs = tiny.model(dtype=torch.float64), near(), tiny.prompts((8,))
    drafted, walk = [], engine.walk

    def noted(session, tree, logits, limits):
        drafted.append((session.ids[0, : session.lengths[0]].clone(), tree))
        return walk(session, tree, logits, limits)

    monkeypatch.setattr(engine, "walk", noted)
    run(model, inputs, FixedDraftTree(size=size, children=children), draft)
    text, tree = drafted[0]
    paths = [text]
    for node in range(1, size + 1):
        parent = (node - 1) // children
        best = draft(paths[parent][None], use_cache=False).logits[0, -1].topk(children).indices
        paths.append(torch.cat([paths[parent], best[(node - 1) % children][None]]))
    assert tree.tokens[0].tolist() == [int(path[-1]) for path in paths]
    assert tree.shape.parents[0].tolist() == [-1, *((node - 1) // children for node in range(1, size + 1))]


@pytest.mark.parametrize(("size", "children"), [(3, 2), (2, 3), (3, 1)])
def test_sampled_drafts_keep_the_targets_law_exactly(size, children):
    """All draws and all decisions of the verifier, enumerated."""
    drafter, proposal = FixedDraftTree(size=size, children=children), table(11)
    found = trees(lambda session: drafter.propose(session, _State(Tabulated(proposal), ScriptedDraws()), 2))
    assert sum(chance for _, chance in found) == pytest.approx(1)
    assert_lossless(table(12), found)


def test_what_the_draft_says_is_what_it_says_of_the_whole_text(monkeypatch):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((12, 5, 9))
    checked = check_logits(monkeypatch)
    result = run(model, inputs, FixedDraftTree(size=9), near(), max_new_tokens=14)
    assert len(checked) > 30 and result.stats.accepted > 0
    assert torch.equal(result.sequences, run(model, inputs, max_new_tokens=14).sequences)


def test_with_one_child_it_is_the_chain():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8,))
    chain = DraftModel(tokens=5, confidence=0)
    one, other = (run(model, inputs, each, near()).stats for each in (FixedDraftTree(size=5, children=1), chain))
    for name in ("forwards", "drafted", "accepted", "drafted_to", "accepted_to"):
        assert getattr(one, name) == getattr(other, name)
    assert one.extra["draft_forwards"] == other.extra["draft_forwards"]


@pytest.mark.parametrize("options", [{"size": 0}, {"children": 0}])
def test_bad_values_are_refused(options):
    with pytest.raises(BadParameter, match="at least 1"):
        FixedDraftTree(**options)

"""Acceptance by depth: counted from what was drafted and where each walk went."""

import pytest
import torch

from tests import tiny
from tests.speculation.toys import Mixed, Oracle
from tokenry.generation import Stats
from tokenry.generation.engine import Options
from tokenry.speculation import engine


@pytest.mark.parametrize("method", [Oracle(depth=4), Mixed(), Mixed(shared=True, holes=False)], ids=str)
@pytest.mark.parametrize("lengths", [(24,), (24, 13, 18)], ids=["one", "batch"])
def test_depths_are_those_of_the_trees_and_walks(method, lengths, monkeypatch):
    seen, walk = [], engine.walk

    def noted(session, tree, logits, limits):
        found = walk(session, tree, logits, limits)
        depth = tree.shape.depth.expand_as(tree.tokens)
        real = torch.ones_like(depth, dtype=torch.bool) if tree.valid is None else tree.valid
        for row, alive in enumerate(session.alive):
            if alive:
                deepest = max(d for d, there in zip(depth[row].tolist(), real[row].tolist(), strict=True) if there)
                seen.append((min(deepest, limits[row] - 1), int(found.counts[row]) - 1))
        return found

    monkeypatch.setattr(engine, "walk", noted)
    model, inputs = tiny.model(), tiny.prompts(lengths)
    settings = {"max_new_tokens": 20, "do_sample": False}
    options = Options(resources={"truth": model.generate(**inputs, **settings)})
    stats = model.generate(
        **inputs, custom_generate=method, return_dict_in_generate=True, tokenry_options=options, **settings
    ).stats
    deepest = max(drafted for drafted, _ in seen)
    assert deepest > 1 and any(accepted for _, accepted in seen)
    assert stats.steps == len(seen)
    assert stats.drafted_to == [sum(drafted >= d for drafted, _ in seen) for d in range(1, deepest + 1)]
    assert stats.accepted_to == [sum(accepted >= d for _, accepted in seen) for d in range(1, deepest + 1)]
    assert stats.acceptance == [a / d for a, d in zip(stats.accepted_to, stats.drafted_to, strict=True)]
    if isinstance(method, Oracle):
        assert set(stats.acceptance) == {1.0}


def test_a_total_adds_counts_and_keeps_the_largest_bytes():
    one = Stats(forwards=3, passes=3, committed=5, kv_bytes=10, kv_peak_bytes=30, drafted_to=[4, 2], accepted_to=[3, 0])
    two = Stats(forwards=2, passes=4, committed=4, kv_bytes=20, kv_peak_bytes=20, drafted_to=[1], accepted_to=[1])
    total = Stats.total([one, two])
    assert (total.forwards, total.passes, total.committed) == (5, 7, 9)
    assert (total.kv_bytes, total.kv_peak_bytes) == (20, 30)
    assert (total.drafted_to, total.accepted_to) == ([5, 2], [4, 0])
    assert Stats.total([]) == Stats() and Stats().acceptance == []


def test_a_step_without_drafts_counts_at_no_depth():
    stats = Stats()
    stats.note_walk(torch.tensor([0, 2]), torch.tensor([0, 0]))
    stats.note_walk(torch.tensor([0, 0]), torch.tensor([0, 0]))
    stats.settle()
    stats.settle()
    assert (stats.drafted_to, stats.accepted_to) == ([1, 1], [0, 0])

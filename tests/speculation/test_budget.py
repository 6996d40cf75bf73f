import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.speculation.drafts import costing
from tokenry.generation import Stats
from tokenry.speculation import TokenRecycling, budget
from tokenry.speculation.budget import Growth, StepCosts, _filled, best_size, forward_costs, least_slopes


def test_costs_are_filled_in_between():
    assert _filled((1, 2, 4), (1.0, 2.0, 6.0)) == [1.0, 1.0, 2.0, 4.0, 6.0]


def test_the_best_tree_is_the_best_of_all_trees():
    children = {0: [(0.6, 1), (0.2, 2)], 1: [(0.5, 3), (0.3, 4)], 2: [(0.5, 5)], 3: [(0.7, 6)]}
    parents = {child: node for node, brood in children.items() for _, child in brood}
    chances = {child: chance for brood in children.values() for chance, child in brood}
    for slope in (0.01, 0.1, 0.2, 0.5, 2.0):
        costs = [1 + slope * n for n in range(9)]
        reach = {0: 1.0}
        for node in range(1, 7):
            reach[node] = reach[parents[node]] * chances[node]
        trees = [
            nodes
            for count in range(7)
            for nodes in itertools.combinations(range(1, 7), count)
            if all(parents[n] == 0 or parents[n] in nodes for n in nodes)
        ]
        rates = [(1 + sum(reach[n] for n in nodes)) / costs[len(nodes) + 1] for nodes in trees]
        grown = Growth(0, lambda node, least: children.get(node, []), costs, least_slopes(costs), 9)
        chosen = grown.nodes[: best_size([grown.reach], costs)]
        assert chosen[0] == 0
        rate = sum(reach[n] for n in chosen) / costs[len(chosen)]
        assert rate == pytest.approx(max(rates))


@pytest.mark.parametrize("seed", range(5))
def test_the_least_slopes_are_those_of_brute_force(seed):
    costs = torch.rand(12, generator=torch.Generator().manual_seed(seed)).cumsum(0).tolist()
    slopes = least_slopes(costs)
    for n in range(11):
        every = [(costs[m] - costs[k]) / (m - k) for k in range(n, 11) for m in range(k + 1, 12)]
        assert slopes[n] == pytest.approx(min(every))
    assert slopes[11] == float("inf")


def test_costs_are_measured_once():
    model = tiny.model()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = tiny.prompts((6,))

    def run():
        calls.clear()
        model.generate(**inputs, max_new_tokens=2, custom_generate=TokenRecycling(template="auto"))
        return len(calls)

    assert run() > 10
    assert run() == 2


class _Model:
    dtype = torch.float32


def _timed(monkeypatch, forwards, steps):
    """Costs after steps `(size, seconds, passes)`, and what `last` was when each began."""
    now, last = [0.0], []
    monkeypatch.setattr(budget, "forward_costs", lambda session: forwards)
    monkeypatch.setattr(budget, "_clock", lambda: now[0])
    session = SimpleNamespace(stats=Stats(), model=_Model(), batch=1, device=torch.device("cpu"))
    costs = StepCosts(session)
    for size, seconds, passes in [*steps, (0, 0.0, 1)]:
        costs.begin()
        last.append(costs.last)
        costs.take(size)
        now[0] += seconds
        session.stats.forwards += passes
    # The next call begins with what this one learned.
    assert StepCosts(session).seconds == costs.seconds
    return costs, last


def test_steps_tell_how_sizes_stand_to_each_other(monkeypatch):
    forwards = [1.0, 1.0, 2.0, 3.0, 4.0]
    # The first step reads the prompt; a step that notes no size is not timed, nor is one with another pass behind it.
    steps = [(4, 50.0, 1), *[(4, 3.0, 1), (1, 1.5, 1), (0, 70.0, 1), (2, 90.0, 2)] * 200]
    costs, last = _timed(monkeypatch, forwards, steps)
    assert costs.forward(4) == 4.0
    # Of the step before, if it had drafts.
    assert last[2:6] == [(3.0, 4.0), None, None, None]
    assert costs.seconds[4] / costs.seconds[1] == pytest.approx(2.0, rel=0.1)
    assert costs.seconds == sorted(costs.seconds) and costs.floors == least_slopes(costs.seconds)


def test_what_all_sizes_have_in_common_changes_nothing(monkeypatch):
    for pace in (0.01, 1.5, 5.0):
        forwards = [1.0, 1.0, 2.0, 3.0, 4.0]
        costs, _ = _timed(monkeypatch, forwards, [(size, pace * forwards[size], 1) for size in (1, 2, 3, 4)] * 20)
        assert costs.seconds == pytest.approx(forwards)


def test_a_hiccup_is_not_held_against_one_size(monkeypatch):
    forwards = [1.0, 1.0, 2.0, 3.0, 4.0]
    steps = [(size, forwards[size], 1) for size in (1, 2, 3, 4)] * 20
    costs, last = _timed(monkeypatch, forwards, [*steps, (2, 500.0, 1), *steps])
    assert costs.seconds == pytest.approx(forwards, rel=0.15)
    assert max(took for took, _ in filter(None, last)) < 5
    # Nor is one before the pace is known.
    costs, _ = _timed(monkeypatch, forwards, [(1, 1.0, 1), (2, 500.0, 1), *steps, *steps])
    assert [each / costs.seconds[1] for each in costs.seconds] == pytest.approx(forwards, rel=0.05)


def _short():
    """A GPT-2 that has 64 positions."""
    config = tiny.config("gpt2")
    config.n_positions = 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def test_costs_stop_at_the_models_context():
    model, inputs = _short(), tiny.prompts((6,))
    costs = forward_costs(type("S", (), {"model": model, "batch": 1, "device": torch.device("cpu")}))
    assert len(costs) == 65
    got = model.generate(**inputs, max_new_tokens=20, custom_generate=TokenRecycling(template="auto"))
    assert torch.equal(got, model.generate(**inputs, max_new_tokens=20, do_sample=False))
    # Trees of nodes that are all worth drafting end there too.
    assert best_size([[0.99] * 80], [1.0] * 65) == 64


@pytest.mark.parametrize("template", ["2.2.2", "auto"])
def test_a_batch_may_fill_the_models_context(template):
    """Rows that are done, or nearly, wait for the others without asking for positions that the model lacks."""
    model, inputs = _short(), tiny.prompts((8, 8, 8))
    got = model.generate(**inputs, max_new_tokens=56, custom_generate=TokenRecycling(template=template))
    assert torch.equal(got, model.generate(**inputs, max_new_tokens=56, do_sample=False))


def test_a_costly_forward_gets_a_small_tree_and_a_flat_one_the_whole():
    model, inputs = tiny.model(), tiny.prompts((6,))
    drafted = {}
    for slope in (0.0, 1.0):
        costing(model, slope)
        result = model.generate(
            **inputs, max_new_tokens=30, custom_generate=TokenRecycling(template="auto"), return_dict_in_generate=True
        )
        drafted[slope] = result.stats.drafted / result.stats.steps
    assert drafted[1.0] < 2 < 20 < drafted[0.0]

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tokenry.speculation import TokenRecycling
from tokenry.speculation.budget import RankCounts, _filled, best_nodes, forward_costs


def test_costs_are_filled_in_between():
    assert _filled((1, 2, 4), (1.0, 2.0, 6.0)) == [1.0, 1.0, 2.0, 4.0, 6.0]


def test_the_best_tree_is_the_best_of_all_trees():
    parents, ranks = [-1, 0, 0, 1, 1, 2, 3], [0, 0, 1, 0, 1, 0, 0]
    depths = [0, 1, 1, 2, 2, 2, 3]
    chances = [[0.6, 0.2], [0.5, 0.3], [0.7, 0.1]]
    for slope in (0.01, 0.1, 0.2, 0.5, 2.0):
        costs = [1 + slope * n for n in range(9)]
        reach = [1.0]
        for node in range(1, 7):
            reach.append(reach[parents[node]] * chances[depths[node] - 1][ranks[node]])
        trees = [
            nodes
            for count in range(7)
            for nodes in itertools.combinations(range(1, 7), count)
            if all(parents[n] == 0 or parents[n] in nodes for n in nodes)
        ]
        rates = [(1 + sum(reach[n] for n in nodes)) / costs[len(nodes) + 1] for nodes in trees]
        chosen = best_nodes(parents, ranks, depths, chances, costs)
        assert chosen[0] == 0
        rate = sum(reach[n] for n in chosen) / costs[len(chosen)]
        assert rate == pytest.approx(max(rates))


def test_counts_move_from_the_prior_to_what_was_seen():
    counts = RankCounts(3, (0.5, 0.1), weight=8)
    assert counts.chances() == [[0.5, 0.1]] * 3
    for _ in range(2000):
        counts.add(0, 1)
        counts.add(1, None)
    chances = counts.chances()
    assert chances[0][1] > 0.99 and chances[1][1] < 0.01 and chances[1][0] < 0.01
    assert chances[2] == chances[1]  # nothing was counted there
    counts.add(9, 0)


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
    parents, ranks, depths = [-1, *range(79)], [0] * 80, list(range(80))
    assert len(best_nodes(parents, ranks, depths, [[0.99]] * 80, [1.0] * 65)) == 64


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
        _pretend(model, [1.0 + slope * n for n in range(82)])
        result = model.generate(
            **inputs, max_new_tokens=30, custom_generate=TokenRecycling(template="auto"), return_dict_in_generate=True
        )
        drafted[slope] = result.stats.drafted / result.stats.steps
    assert drafted[1.0] < 2 < 20 < drafted[0.0]


def _pretend(model, costs):
    from tokenry.speculation import budget

    budget._costs[model] = {(1, model.device, model.dtype, budget._SIZES): costs}
    assert forward_costs(type("S", (), {"model": model, "batch": 1, "device": torch.device("cpu")})) == costs

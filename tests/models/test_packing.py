"""Linear maps over packed weights: what they give, when they serve, and that nothing is left behind."""

import copy
import pickle
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import tiny
from tokenry.models import is_packed, packed, packing
from tokenry.speculation import PromptLookup, budget

pytestmark = pytest.mark.skipif(packing._kernels() is None, reason="this build of torch cannot multiply packed weights")


def maps(model):
    return [module for module in model.modules() if type(module) is nn.Linear]


def some(model, bias=False):
    """A map of the model, and one of another shape."""
    if bias:
        for each in maps(model):
            each.bias = nn.Parameter(torch.randn(each.out_features))
    return maps(model)[0], next(each for each in maps(model) if each.weight.shape != maps(model)[0].weight.shape)


def inputs(linear, *rows, dtype=torch.float32):
    return torch.randn(*rows, linear.in_features, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def products(monkeypatch):
    """How many rows each product with a packed weight had."""
    pack, multiply = packing._kernels()
    rows = []

    def counted(input, *rest):
        rows.append(input.numel() // input.shape[-1])
        return multiply(input, *rest)

    monkeypatch.setattr(packing, "_kernels", lambda: (pack, counted))
    return rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(2,), (1, 11), (4, 16), (1, 128)])
def test_outputs_are_the_models_own_but_for_rounding(bias, rows, products):
    model = tiny.model()
    with torch.no_grad():
        for linear in some(model, bias):
            wanted = F.linear(inputs(linear, *rows), linear.weight, linear.bias)
            with packed(model):
                got = linear(inputs(linear, *rows))
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert len(products) == 2


def test_one_row_and_many_rows_are_multiplied_as_before(products):
    model = tiny.model()
    linear, _ = some(model)
    with torch.no_grad(), packed(model):
        for rows in ((1,), (1, 1), (129,), (2, 65), (0,)):
            assert torch.equal(linear(inputs(linear, *rows)), F.linear(inputs(linear, *rows), linear.weight))
    assert products == []


def test_gradients_and_autocast_are_untouched(products):
    model = tiny.model()
    linear, _ = some(model)
    with packed(model):
        linear(inputs(linear, 4)).sum().backward()
        assert linear.weight.grad is not None and bool(linear.weight.grad.any())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert linear(inputs(linear, 4)).dtype is torch.bfloat16
    assert products == []


@pytest.mark.parametrize("change", ["in place", "data", "replaced", "loaded"])
def test_weights_that_change_between_calls_are_packed_anew(change, products):
    model = tiny.model()
    linear, other = some(model)
    rows = inputs(linear, 5)
    with torch.no_grad():
        with packed(model):
            linear(rows)
        kept = packing._packs[other].weight
        if change == "in place":
            linear.weight[0, 0] += 1
        elif change == "data":
            linear.weight.data[-1].mul_(-1)
        elif change == "replaced":
            linear.weight = nn.Parameter(linear.weight.flip(0))
        else:
            linear.load_state_dict({"weight": linear.weight * 2})
        with packed(model):
            torch.testing.assert_close(linear(rows), rows @ linear.weight.T, atol=1e-5, rtol=1e-5)
    assert len(products) == 2
    assert packing._packs[other].weight is kept


def test_nothing_is_left_after_an_error_and_after_nested_blocks():
    model = tiny.model()
    before = [dict(each.__dict__) for each in maps(model)]
    with pytest.raises(KeyError), packed(model):
        raise KeyError
    with packed(model):
        with packed(model):
            pass
        assert is_packed(model) and "forward" in maps(model)[0].__dict__
    assert not is_packed(model)
    assert [each.__dict__.keys() for each in maps(model)] == [each.keys() for each in before]


def test_an_interrupt_while_a_block_is_entered_leaves_nothing(monkeypatch):
    model = tiny.model()
    last = maps(model)[-1]

    def interrupted(function, linear):
        if linear is last:
            raise KeyboardInterrupt
        return types.MethodType(function, linear)

    monkeypatch.setattr(packing, "types", types.SimpleNamespace(MethodType=interrupted))
    with pytest.raises(KeyboardInterrupt), packed(model):
        pass
    assert not is_packed(model) and "forward" not in maps(model)[0].__dict__


def test_threads_share_the_packed_weights():
    model = tiny.model()
    linear, _ = some(model)
    rows, inside, out = inputs(linear, 6), threading.Event(), threading.Event()
    wanted, got = F.linear(rows, linear.weight), []

    def other():
        with torch.no_grad(), packed(model):
            inside.set()
            out.wait(10)
            got.append(linear(rows))

    thread = threading.Thread(target=other)
    with packed(model):
        thread.start()
        assert inside.wait(10)
    # The first block is left, the other still stands.
    assert is_packed(model)
    out.set()
    thread.join()
    torch.testing.assert_close(got[0], wanted, atol=1e-5, rtol=1e-5)
    assert not is_packed(model) and "forward" not in linear.__dict__


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_runs_on_its_own_weights(duplicate, products):
    model = tiny.model()
    linear, _ = some(model)
    with torch.no_grad(), packed(model):
        twin = duplicate(model)
        own, _ = some(twin)
        own.weight.zero_()
        assert not bool(own(inputs(linear, 3)).any()) and products == []
        assert bool(linear(inputs(linear, 3)).any())
        with packed(twin):
            assert not bool(own(inputs(linear, 3)).any()) and len(products) == 2
    assert "forward" not in own.__dict__


def test_what_cannot_or_need_not_be_packed_is_left_alone(monkeypatch):
    half = tiny.model(dtype=torch.bfloat16)
    with packed(half):
        assert not is_packed(half)
    large = tiny.model()
    with monkeypatch.context() as limit:
        limit.setattr(packing, "_MOST_BYTES", 100)
        with packed(large):
            assert not is_packed(large)
    slow = tiny.model()
    with monkeypatch.context() as timed:
        timed.setattr(packing, "_pay", lambda maps: False)
        with packed(slow):
            assert not is_packed(slow) and "forward" not in maps(slow)[0].__dict__
    hooked = tiny.model()
    taken = maps(hooked)[0]
    taken.forward = forward = lambda input: input
    with packed(hooked):
        assert taken.forward is forward and "forward" in maps(hooked)[1].__dict__
    assert taken.forward is forward


def test_packing_is_kept_only_where_it_is_faster(monkeypatch):
    monkeypatch.undo()
    model = tiny.model()
    for factor, verdict in ((1, False), (-1, True)):
        # Every other span, those of packed weights, takes longer or shorter.
        readings = iter([second for turn in range(99) for second in (4 * turn, 4 * turn + 2 + factor * (turn % 2))])
        monkeypatch.setattr(packing.time, "perf_counter", lambda readings=readings: next(readings))
        assert packing._pay(maps(model)) is verdict
        assert (maps(model)[0] in packing._packs) is verdict


@pytest.mark.parametrize("wanted", [True, False])
def test_drafters_verify_over_packed_weights_unless_told_otherwise(wanted, products):
    model = tiny.model()
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    method = PromptLookup(tokens="auto", packed=wanted)
    out = model.generate(ids, custom_generate=method, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=8, do_sample=False))
    assert bool(products) is wanted
    assert not is_packed(model)
    # Sizes are measured as they will be forwarded.
    assert [key[3] for key in budget._costs[model]] == [wanted]

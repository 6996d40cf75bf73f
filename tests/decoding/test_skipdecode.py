"""Layers by a schedule: what runs, what the cache holds, that decoding is the parallel form, and its training."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch

import tokenry
from tests import tiny
from tests.evaluation import tiny_text
from tokenry.decoding import SkipDecode
from tokenry.decoding.skipdecode import JaggedCache, SkipSchedule, skipping
from tokenry.decoding.skipdecode.training import SkipDecodeTrainer, SkipObjective, losses_by_index, scheduled
from tokenry.errors import BadParameter, CacheMisuse, UnsupportedModel
from tokenry.models import TokenCache, anatomy, load
from tokenry.objectives import Context
from tokenry.objectives.trainable import run

# Fast enough for the budget to fall to its end in a tiny test.
FALLING = SkipDecode(last=2, horizon=6)
VARIANTS = (
    FALLING,
    SkipDecode(last=1, warmup=0, horizon=8),
    SkipDecode(first=2, last=1, warmup=0, horizon=4),
    SkipDecode(last=1, exit="early", horizon=8),
    SkipDecode(last=2, shape="power", alpha=0.8),
)


def generate(method, model, inputs, **options):
    settings = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(**inputs, custom_generate=method, **settings)


def schedules(count=200):
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for number in range(count):
        layers = draw(2, 12)
        warmup = draw(0, layers - 1)
        leave = ("skip", "early")[number % 2]
        last = draw(warmup + 1 if leave == "skip" else 1, layers)
        yield SkipSchedule(
            layers=layers, first=draw(last, layers), last=last, warmup=warmup, horizon=draw(1, 20), exit=leave,
            shape=("linear", "power")[number // 2 % 2], alpha=0.9,
        )  # fmt: skip


# --- the schedule -------------------------------------------------------------------------------


def test_active_layers_are_as_many_as_the_budget_and_nested():
    for schedule in schedules():
        before = set(range(schedule.layers))
        for index in range(30):
            active = schedule.active(index)
            assert len(active) == schedule.budget(index) and list(active) == sorted(set(active))
            assert set(active) <= before
            if schedule.exit == "skip":
                assert set(range(schedule.warmup)) <= set(active) and schedule.layers - 1 in active
            else:
                assert active == tuple(range(len(active)))
            before = set(active)
        assert schedule.budget(0) == schedule.first or schedule.horizon == 1
        if schedule.shape == "linear":
            assert schedule.budget(schedule.horizon - 1 if schedule.horizon > 1 else 1) == schedule.last
            assert schedule.budget(1000) == schedule.last


def test_reach_is_where_each_layer_ran():
    for schedule in schedules(60):
        for prompt, length in ((1, 9), (4, 4), (5, 17)):
            ran = [schedule.active(max(0, position - prompt + 1)) for position in range(length)]
            wanted = [sum(layer in active for active in ran) for layer in range(schedule.layers)]
            assert list(schedule.reach(prompt, length)) == wanted


def test_speedup_is_layers_by_their_mean():
    schedule = SkipSchedule(layers=24, first=16, last=8, horizon=101)
    assert schedule.average() == pytest.approx(12, abs=0.1) and schedule.speedup() == pytest.approx(2, abs=0.02)
    assert SkipSchedule(layers=8, first=4, last=4).speedup() == 2


@pytest.mark.parametrize(
    "options", [{"first": 3, "last": 4}, {"first": 9}, {"last": 1}, {"horizon": 0}, {"alpha": 0.0}, {"warmup": -1}]
)
def test_schedules_that_would_miss_keys_or_do_nothing_are_refused(options):
    with pytest.raises(BadParameter, match="not allowed"):
        SkipSchedule(**{"layers": 8, "first": 8, "last": 4} | options)


# --- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", tiny.SERVED)
def test_decoding_is_the_parallel_form(kind, method):
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts((11, 11))
    result = generate(method, model, inputs, output_logits=True)
    with torch.no_grad():
        whole = scheduled(model, result.sequences, 11, method.schedule(3, 14))
        full = model(result.sequences).logits
    got = torch.stack(result.logits, 1)
    assert torch.allclose(got, whole[:, 10:-1].float(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[:, -1], full[:, -1], atol=1e-2), "the schedule must matter in this test"


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma2"))
def test_a_padded_batch_is_each_row_alone_and_rows_end_by_themselves(kind, method):
    model = tiny.model(kind, torch.float64)
    inputs = tiny.prompts((13, 6, 9))
    free = generate(method, model, inputs).sequences
    options = {"eos_token_id": [int(free[1, 13 + 4])], "pad_token_id": 0}
    for extra in ({}, options):
        batch = generate(method, model, inputs, **extra)
        for row, length in enumerate((13, 6, 9)):
            alone = generate(method, model, {"input_ids": inputs["input_ids"][row : row + 1, 13 - length :]}, **extra)
            assert batch.new_tokens[row] == alone.new_tokens[0]
    assert len(batch.new_tokens[1]) <= 5


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_every_layer_runs_when_it_is_active_and_holds_what_ran_through_it(method, monkeypatch):
    model, caches = tiny.model(), []
    made = JaggedCache.of.__func__
    monkeypatch.setattr(
        JaggedCache, "of", classmethod(lambda cls, *args: caches.append(made(cls, *args)) or caches[-1])
    )
    calls = [0, 0, 0]
    generate(method, model, tiny.prompts((10,)), max_new_tokens=1)  # whatever is tried once is done
    caches.clear()
    hooks = []
    for number, module in enumerate(anatomy(model).attention):

        def count(*args, number=number):
            calls[number] += 1

        hooks.append(module.register_forward_hook(count))
    result = generate(method, model, tiny.prompts((10, 7)))
    for hook in hooks:
        hook.remove()
    schedule = method.schedule(3, 14)
    ran = [schedule.active(index) for index in range(14)]  # the prompt and 13 tokens that were fed
    assert calls == [sum(layer in active for active in ran) for layer in range(3)]
    assert result.stats.extra["active_layers"] == [len(active) for active in ran[1:]]
    assert result.stats.extra["layer_speedup"] == pytest.approx(3 * 13 / sum(map(len, ran[1:])))
    (cache,) = caches
    assert [layer.size for layer in cache.layers] == [
        10 * (layer in ran[0]) + sum(layer in active for active in ran[1:]) for layer in range(3)
    ]
    assert result.stats.kv_bytes == sum(2 * 2 * 2 * 8 * 4 * layer.size for layer in cache.layers)
    # Nothing of the block stays behind.
    assert not any("forward" in vars(layer) for layer in anatomy(model).layers)


def part(model, kept):
    """The model of some of the layers alone."""
    model = copy.deepcopy(model)
    model.model.layers = torch.nn.ModuleList([model.model.layers[number] for number in kept])
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(kept)
    return model


def test_a_constant_budget_is_a_smaller_model():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((9, 5))
    for count in (1, 2):
        top = part(model, range(3 - count, 3)).generate(**inputs, do_sample=False, max_new_tokens=14)
        skip = generate(SkipDecode(first=count, last=count, warmup=0), model, inputs)
        assert torch.equal(skip.sequences, top)
        bottom = part(model, range(count)).generate(**inputs, do_sample=False, max_new_tokens=14)
        assert torch.equal(generate(SkipDecode(first=count, last=count, exit="early"), model, inputs).sequences, bottom)


@pytest.mark.parametrize("kind", ("llama", "mistral", "gpt2"))
def test_plain_decoding_goes_on_from_what_all_layers_have_read(kind):
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts((11,))
    result = generate(SkipDecode(last=2, horizon=12), model, inputs)
    held = result.past_key_values.get_seq_length()
    assert 11 < held < result.sequences.shape[1] - 1
    more = torch.cat([result.sequences, tiny.prompts((4,), seed=3)["input_ids"]], 1)
    options = {"attention_mask": torch.ones_like(more), "do_sample": False, "max_new_tokens": 8}
    fresh = model.generate(more, **options)
    again = model.generate(more, past_key_values=result.past_key_values, **options)
    assert torch.equal(again, fresh)
    nothing = generate(SkipDecode(first=2, last=2), model, inputs).past_key_values
    assert nothing.get_seq_length() == 0


def test_it_goes_on_from_a_filled_cache():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((11, 8))
    said = model.generate(**inputs, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    whole = {"input_ids": said.sequences, "attention_mask": mask}
    fresh = generate(FALLING, model, whole)
    again = generate(FALLING, model, whole, past_key_values=said.past_key_values)
    assert torch.equal(again.sequences, fresh.sequences)
    with pytest.raises(CacheMisuse, match="DynamicCache"):
        generate(FALLING, model, inputs, past_key_values=TokenCache(model))


def test_other_threads_run_all_layers():
    model, ids = tiny.model(), tiny.prompts((9,))["input_ids"]
    wanted, found = model(ids).logits, []
    with torch.no_grad(), skipping(model) as depth:
        depth.only([0])
        assert not torch.allclose(model(ids).logits, wanted)
        thread = threading.Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
        with skipping(model):
            assert torch.equal(model(ids).logits, wanted)
        assert not torch.allclose(model(ids).logits, wanted)
    assert torch.equal(found[0], wanted) and torch.equal(model(ids).logits, wanted)


def test_what_does_not_fit_is_refused():
    model, inputs = tiny.model(), tiny.prompts((8,))
    for bad in ({"last": 3, "first": 2}, {"warmup": -1}, {"horizon": 0}, {"alpha": 1.5}, {"first": 0}):
        with pytest.raises(BadParameter):
            SkipDecode(**bad)
    for deep in (SkipDecode(first=4), SkipDecode(warmup=3)):
        with pytest.raises(BadParameter, match="3 layers"):
            generate(deep, model, inputs)
    with pytest.raises(UnsupportedModel):
        generate(FALLING, tiny.model("mamba"), inputs)
    assert tokenry.method("skipdecode:last=2;exit=early") == SkipDecode(last=2, exit="early")


# --- training -----------------------------------------------------------------------------------


def test_losses_are_those_of_the_predicted_tokens():
    model = tiny.model(dtype=torch.float64)
    ids = torch.randint(3, tiny.VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))
    schedule = FALLING.schedule(3, 8)
    for own in (None, schedule):
        with torch.no_grad():
            logits = model(ids).logits if own is None else scheduled(model, ids, 4, own)
        wanted = torch.nn.functional.cross_entropy(
            logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten(), reduction="none"
        ).view(5, 8)
        assert torch.allclose(losses_by_index(model, ids, 4, own, batch=2), wanted.mean(0))


def test_the_objective_learns_outputs_alone_and_unused_layers_get_no_gradient():
    model = tiny.model(dtype=torch.float64)
    schedule = SkipSchedule(layers=3, first=2, last=2, horizon=6)
    objective = SkipObjective(schedule)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    prompts = set()
    for step in range(30):
        context = Context(step=step, max_steps=30, seed=0, rank=0, processes=1, bundle=None)
        (batch,) = objective.prepare([{"input_ids": ids, "labels": ids}], context)
        prompt = batch["prompt"]
        prompts.add(prompt)
        assert bool((batch["labels"][:, :prompt] == -100).all()) and torch.equal(
            batch["labels"][:, prompt:], ids[:, prompt:]
        )
    assert prompts == set(range(1, 7)) and torch.equal(ids, batch["input_ids"])
    terms, _ = objective.terms(model, None, batch, context)
    loss = terms["output"] / objective.counts(batch)["output"]
    assert float(loss) == pytest.approx(float(losses_by_index(model, ids, batch["prompt"], schedule).mean()), rel=1e-5)
    loss.backward()
    grads = [any(p.grad is not None for p in layer.parameters()) for layer in model.model.layers]
    assert grads == [True, False, True]


def test_annealing_ends_in_the_schedule():
    schedule = SkipSchedule(layers=8, first=8, last=4)
    objective = SkipObjective(schedule, anneal=True)
    lasts = [objective.at(progress / 10).last for progress in range(11)]
    assert lasts[0] == 8 and lasts == sorted(lasts, reverse=True) and set(lasts[5:]) == {4}
    assert SkipObjective(schedule).at(0) == schedule


def test_layers_that_are_dropped_at_random_are_refused(tmp_path):
    model = tiny.model("opt")
    model.config.layerdrop = 0.1
    with pytest.raises(UnsupportedModel, match="layerdrop to 0"):
        SkipDecodeTrainer().train(model, tiny.tokenizer(), ["w1 w2"], tmp_path, steps=1, seed=0)


def test_the_trained_model_writes_better_under_its_schedule(tmp_path):
    pytest.importorskip("accelerate")
    model, tokenizer = tiny_text.model(layers=4), tiny_text.tokenizer()
    texts = [f"def f{n % 10}(a, b):\n    return a + b\n" for n in range(200)]
    made = SkipDecodeTrainer(last=2, horizon=16, length=32, batch=8, lr=3e-3)
    note = run(made, model, tokenizer, texts, tmp_path / "out", steps=25, seed=0)
    assert note == json.loads((tmp_path / "out" / "training.json").read_text())
    assert note["loss"]["after"] < note["loss"]["before"] - 0.5
    assert note["layer_speedup"] == pytest.approx(made.method().schedule(4, 16).speedup(), abs=1e-4)
    tuned, its = load(tmp_path / "out")
    result = tokenry.generate(tuned, its, "def f1(", method=note["use"], max_new_tokens=16, do_sample=False)
    active = result.stats.extra["active_layers"]
    assert active == [made.method().schedule(4, 16).budget(index + 1) for index in range(len(active))] and active
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModel, match="checkpointing"):
        run(made, model, tokenizer, texts, tmp_path / "no", steps=1, seed=0)

"""KV Prediction: what must hold of the predicted cache, of its training and of its folder."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
from torch import nn

from tests import tiny
from tests.kvcache.predictors import identical, strange
from tokenry.errors import BadParameter, BadPrompt, CacheMisuse, PromptTooLong, ResourceError, UnsupportedModel
from tokenry.kvcache import KVPrediction
from tokenry.kvcache.kv_prediction.predictor import (
    KVPredictor,
    check_map,
    contiguous_map,
    pruned,
    retained_layers,
)
from tokenry.kvcache.kv_prediction.projections import Placement, remember, replaced
from tokenry.kvcache.kv_prediction.training import KVPredictionObjective, KVPredictionTrainer, continuation_losses
from tokenry.models import TokenCache, anatomy, attached, loaded_name, trained_folder
from tokenry.objectives import Bundle, Context, ObjectiveTrainer, TokenRows, fit
from tokenry.objectives.trainable import run

GREEDY = {"do_sample": False, "max_new_tokens": 8}
# Every layout of the maps: apart, one for all with or without heads side by side; norms, windows, learned positions.
KINDS = ("llama", "qwen3", "gemma", "gemma2", "opt", "gpt2", "gpt_neox")


def counted(modules):
    """Columns that run through each of modules, summed, in a list that grows; and the hooks to remove."""
    seen = [0] * len(modules)

    def note(number):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[number] += hidden.shape[1]

        return hook

    hooks = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in enumerate(modules)]
    return seen, hooks


# --- which layer feeds which --------------------------------------------------------------------


def test_layer_maps_are_the_papers():
    assert contiguous_map(16, 28) == tuple(sorted([*range(12), *range(16)]))
    assert contiguous_map(20, 28) == tuple(sorted([*range(8), *range(20)]))
    assert contiguous_map(16, 36) == tuple(sorted([*range(16), *range(16), *range(4)]))
    assert retained_layers(8, 0.75) == (0, 1, 2, 4, 5, 6)
    assert retained_layers(8, 0.5) == (0, 2, 4, 6) and retained_layers(9, 0.25) == (0, 4, 8)
    assert retained_layers(3, 0.1) == (0,)
    model = tiny.model()
    with pytest.raises(BadParameter, match="only 3 layers"):
        KVPredictionTrainer(share=0.75)._start(model, None)
    assert KVPredictionTrainer(share=0.5)._start(model, None)[1:] == ((0, 0, 1), (0, 2))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_copy_is_the_model_without_the_other_layers(kind):
    model = tiny.model(kind)
    ids = tiny.prompts((9,))["input_ids"]
    copied, kept = pruned(model, 0.5)
    assert kept == (0, 2) and copied.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 3
    # The middle layer as a layer that does nothing.
    middle = anatomy(model).layers[1]
    hook = middle.register_forward_hook(lambda module, args, kwargs, output: args[0], with_kwargs=True)
    wanted = model(ids, use_cache=False).logits
    hook.remove()
    assert torch.allclose(copied(ids, use_cache=False).logits, wanted, atol=1e-5)


# --- the identity case --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_identity_maps_from_a_copy_give_the_models_own_cache_and_text(kind):
    model = tiny.model(kind, torch.float64)
    inputs = tiny.prompts((30, 17))
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    predictor = identical(model)
    predictor.serve(model)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    plain = TokenCache(model)
    with attached(model):
        # A model's own attention makes NaN of padding in windows.
        own = model.generate(**inputs, past_key_values=TokenCache(model), **options)
        model(**inputs, position_ids=places, past_key_values=plain)
    with KVPrediction()(model):
        got = model.generate(**inputs, **options)
        cache = model(**inputs, position_ids=places).past_key_values
    assert torch.equal(got.sequences, own.sequences)
    for one, two in zip(got.logits, own.logits, strict=True):
        assert torch.allclose(one, two, atol=1e-8)
    assert cache.get_seq_length() == 30 and [layer.ran for layer in cache.layers] == [1, 1, 1]
    real = inputs["attention_mask"].bool()[:, None, :, None]
    for mine, other in zip(cache.layers, plain.layers, strict=True):
        for one, two in zip(mine.held(), other.held(), strict=True):
            assert torch.allclose(one * real, two * real, atol=1e-9)
    assert torch.equal(cache.seen, plain.seen)
    for one, two in zip(cache.kept_positions(), plain.kept_positions(), strict=True):
        assert torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_identity_maps_train_on_the_models_own_logits(kind):
    model = tiny.model(kind, torch.float64)
    ids = tiny.prompts((20, 20))["input_ids"]
    predictor = identical(model)
    known, _ = remember(predictor.auxiliary, whole=True, input_ids=ids)
    wanted = model(ids, use_cache=False).logits
    with replaced(model, predictor.maps(known)):
        assert torch.allclose(model(ids, use_cache=False).logits, wanted, atol=1e-8)
    with replaced(model, [(k + 1, v) for k, v in predictor.maps(known)]):
        shifted = model(ids, use_cache=False).logits
    assert torch.equal(model(ids, use_cache=False).logits, wanted)
    # One number added to the whole key of a token shifts all of its logits where keys are not turned.
    assert torch.allclose(shifted, wanted, atol=1e-8) == (kind in ("opt", "gpt2"))


# --- what runs ----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_model_runs_for_one_token_and_the_auxiliary_for_the_others():
    model = tiny.model()
    predictor = strange(model)
    predictor.serve(model)
    inputs = tiny.prompts((30, 17))
    with attached(predictor.auxiliary), attached(model):
        pass  # tries each model once
    own, hooks = counted(list(model.model.layers))
    aux, more = counted(list(predictor.auxiliary.model.layers))
    with KVPrediction()(model):
        out = model(**inputs)
        assert own == [1, 1, 1]
        # The last layer of the auxiliary model is left once its keys and values are known.
        assert aux == [29, 29]
        cache = out.past_key_values
        assert cache.get_seq_length() == 30 and all(layer.size == 30 for layer in cache.layers)
        assert cache.computed_share() == pytest.approx(1 / 30)
        assert bool(out.logits[:, -1].isfinite().all()) and bool(out.logits[:, :-1].isnan().all())
        step = model(inputs["input_ids"][:, :1], past_key_values=cache, attention_mask=torch.ones(2, 31))
        assert own == [2, 2, 2] and aux == [29, 29]
        turn = model(inputs["input_ids"][:, :5], past_key_values=cache, attention_mask=torch.ones(2, 36))
        assert own == [7, 7, 7] and aux == [29, 29]
        assert bool(step.logits.isfinite().all()) and bool(turn.logits.isfinite().all())
        assert cache.get_seq_length() == 36 and cache.computed_share() == pytest.approx(7 / 36)
        # A prompt of one token has nothing to predict.
        one = model(inputs["input_ids"][:1, :1])
        assert aux == [29, 29] and one.past_key_values.computed_share() == 1
    for hook in (*hooks, *more):
        hook.remove()
    alone = model(inputs["input_ids"][:1, :1], use_cache=False).logits
    assert torch.allclose(one.logits, alone, atol=1e-5)


@torch.no_grad()
def test_the_auxiliary_model_stops_at_its_last_keys_and_values():
    model = tiny.model()
    predictor = strange(model)
    last = predictor.auxiliary.model.layers[-1]
    seen, hooks = counted([last.self_attn.o_proj, last.mlp, predictor.auxiliary.lm_head])
    stopped, _ = remember(predictor.auxiliary, input_ids=torch.tensor([[3, 4, 5]]))
    assert seen == [0, 0, 0]
    run_out, output = remember(predictor.auxiliary, whole=True, input_ids=torch.tensor([[3, 4, 5]]))
    assert seen == [3, 3, 3] and output.logits.shape == (1, 3, tiny.VOCABULARY)
    for hook in hooks:
        hook.remove()
    for one, two in zip(stopped, run_out, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@torch.no_grad()
def test_predicted_entries_depend_on_the_tokens_before_them_alone():
    model = tiny.model(dtype=torch.float64)
    strange(model).serve(model)
    ids = tiny.prompts((20,))["input_ids"]

    def held(changed):
        with KVPrediction()(model):
            return [layer.held()[0] for layer in model(changed).past_key_values.layers]

    before = held(ids)
    last, first = ids.clone(), ids.clone()
    last[0, -1], first[0, 0] = 5, 6
    for one, two in zip(before, held(last), strict=True):
        assert torch.equal(one[:, :, :-1], two[:, :, :-1]) and not torch.equal(one[:, :, -1], two[:, :, -1])
    changed = [(one != two).any(-1).all(1)[0].tolist() for one, two in zip(before, held(first), strict=True)]
    # The first layer of the auxiliary model, which feeds two layers, makes keys of single tokens.
    assert changed[0][:19] == changed[1][:19] == [True] + [False] * 18 and changed[2] == [True] * 20


@torch.no_grad()
@pytest.mark.parametrize("kind", ("llama", "gemma2", "qwen3", "gpt_neox"))
def test_a_row_of_a_padded_batch_equals_the_row_alone(kind):
    model = tiny.model(kind, torch.float64)
    strange(model, kind, layers=3).serve(model)
    # A row of one token has nothing but padding before it.
    lengths = (25, 13, 1)
    inputs = tiny.prompts(lengths)
    with KVPrediction()(model):
        both = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        for row, length in enumerate(lengths):
            ids = inputs["input_ids"][row : row + 1, -length:]
            alone = model.generate(ids, **GREEDY, return_dict_in_generate=True, output_logits=True)
            assert torch.equal(both.sequences[row, -8:], alone.sequences[0, -8:])
            for one, two in zip(both.logits, alone.logits, strict=True):
                assert torch.allclose(one[row], two[0], atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    model = tiny.model(dtype=dtype)
    strange(model).serve(model)
    with KVPrediction()(model):
        out = model.generate(**tiny.prompts((30, 17)), **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert all(bool(logits.isfinite().all()) for logits in out.logits)
    assert all(layer.keys.dtype == dtype for layer in out.past_key_values.layers)


@torch.no_grad()
def test_beams_chunks_and_both_doors_run_on_one_predicted_prompt():
    model = tiny.model(dtype=torch.float64)
    predictor = strange(model)
    predictor.serve(model)
    ids = tiny.prompts((24,))["input_ids"]
    policy = KVPrediction()
    with policy(model):
        wanted = model.generate(ids, **GREEDY)
        beams = model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False)
        chunks = model.generate(ids, prefill_chunk_size=10, **GREEDY, return_dict_in_generate=True)
    assert beams.shape == wanted.shape
    cache = policy.cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), wanted)
    assert torch.equal(model(ids, past_key_values=policy.cache(model)).logits[0, -1].argmax(), wanted[0, 24])
    # Of a prompt in chunks, the first alone is predicted.
    assert chunks.past_key_values.layers[0].ran == 1 + 14 + 7
    del cache
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks


@torch.no_grad()
def test_transformers_assisted_generation_is_refused_and_other_first_forwards_are_not():
    """Its first forward carries prompt and drafts, and a prediction has outputs for the last of them alone."""
    from tokenry.speculation import PromptLookup, TokenRecycling

    model = tiny.model(dtype=torch.float64)
    identical(model).serve(model)
    ids = tiny.prompts((40,))["input_ids"]
    ids[:, 30:] = ids[:, 20:30]  # something to look up
    wanted = model.generate(ids, **GREEDY)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny.model(dtype=torch.float64)}):
        with KVPrediction()(model), pytest.raises(CacheMisuse, match="Tokenry's drafters"):
            model.generate(ids, **options, **GREEDY)
    with KVPrediction()(model):
        assert torch.equal(model.generate(ids, **GREEDY), wanted)
        for drafter in (PromptLookup(), TokenRecycling()):
            assert torch.equal(model.generate(ids, custom_generate=drafter, **GREEDY), wanted)
        for options in ({}, {"logits_to_keep": 0}, {"logits_to_keep": 1}):
            assert int(model(ids, **options).logits[0, -1].argmax()) == int(wanted[0, 40])


@torch.no_grad()
def test_drafters_learn_from_the_end_of_a_long_prompt(monkeypatch):
    """Tokenry's own loop asks for several rows of logits, and takes those that are numbers."""
    from tokenry.generation import session
    from tokenry.speculation import TokenRecycling

    monkeypatch.setattr(session, "_PROMPT_LOGITS", 1)
    model = tiny.model(dtype=torch.float64)
    identical(model).serve(model)
    ids = tiny.prompts((90,))["input_ids"]
    with KVPrediction()(model):
        wanted = model.generate(ids, **GREEDY)
        kept = []
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: kept.append(kwargs.get("logits_to_keep")), with_kwargs=True
        )
        assert torch.equal(model.generate(ids, custom_generate=TokenRecycling(), **GREEDY), wanted)
        hook.remove()
    assert kept[0] == 64


@torch.no_grad()
@pytest.mark.parametrize("lengths", ((40, 12), (40, 29, 1), (33, 17), (33, 16)))
def test_rows_of_a_padded_prompt_in_chunks_equal_the_rows_alone(lengths):
    """Rows may be padding up to the end of the first chunk, and further."""
    model = tiny.model(dtype=torch.float64)
    identical(model).serve(model)
    inputs = tiny.prompts(lengths)
    with KVPrediction()(model):
        both = model.generate(**inputs, **GREEDY, prefill_chunk_size=16)
        for row, length in enumerate(lengths):
            ids = inputs["input_ids"][row : row + 1, -length:]
            assert torch.equal(both[row, -8:], model.generate(ids, **GREEDY, prefill_chunk_size=16)[0, -8:])


def test_threads_with_predictors_of_their_own_do_not_meet():
    models = [tiny.model(seed=seed) for seed in (0, 1)]
    shared = strange(models[0])
    for model in models:
        shared.serve(model)
    prompts = [tiny.prompts((length,), seed=length)["input_ids"] for length in (40, 33, 21)]

    def generated(model, ids):
        with KVPrediction()(model):
            return model.generate(ids, **GREEDY)

    jobs = [(model, ids) for model in models for ids in prompts]
    wanted = [generated(*job) for job in jobs]
    got = [[] for _ in jobs]
    gate = threading.Barrier(len(jobs))

    def work(number):
        gate.wait()
        for _ in range(3):
            got[number].append(generated(*jobs[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, right in zip(got, wanted, strict=True):
        assert len(found) == 3 and all(torch.equal(one, right) for one in found)


def test_a_failed_forward_leaves_nothing_behind():
    model = tiny.model()
    predictor = strange(model)
    predictor.serve(model)
    ids = tiny.prompts((12,))["input_ids"]
    with KVPrediction()(model):
        wanted = model(ids).logits[:, -1]
        with pytest.raises(IndexError):
            model(ids + 1000)
        with pytest.raises(IndexError):  # the last token alone is none of the model's
            model(torch.cat([ids, torch.tensor([[1000]])], 1))
        assert torch.equal(model(ids).logits[:, -1], wanted)
    projections = [layer.self_attn.k_proj for layer in (*model.model.layers, *predictor.auxiliary.model.layers)]
    assert not any(module._forward_hooks for module in projections)


# --- counting -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_counted_operations_are_those_that_run(kind):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.model(kind)
    predictor = strange(model, kind)
    predictor.serve(model)
    for each in (model, predictor.auxiliary):
        each.set_attn_implementation("eager")  # whose products the counter knows
    ids = tiny.prompts((33,))["input_ids"]
    found = predictor.operations(model, 33)

    def ran(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() // 2  # a multiplication and an addition each

    # Eager attention multiplies the hidden half of the matrix, too.
    half = 2 * 4 * 8 * (33 * 33 - 33 * 34 // 2)
    whole = ran(lambda: model(ids, use_cache=True, logits_to_keep=1))
    assert whole == found.full + 3 * half
    known, _ = remember(predictor.auxiliary, input_ids=ids[:, :-1])
    read = ran(lambda: remember(predictor.auxiliary, input_ids=ids[:, :-1]))
    half = 2 * 4 * 8 * (32 * 32 - 32 * 33 // 2)
    assert read == found.auxiliary + half
    assert ran(lambda: predictor.maps(known)) == found.maps
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    step = ran(lambda: model(ids[:, -1:], past_key_values=cache, logits_to_keep=1))
    assert step == found.base
    assert found.share == pytest.approx((found.auxiliary + found.maps + found.base) / found.full)
    assert KVPrediction().operations(model, 33) == found


def test_windows_bound_what_attention_costs():
    from tokenry.kvcache.kv_prediction.predictor import _attention

    model = tiny.model("gemma2")  # windows of 8 in some layers
    for length, rows in ((5, 5), (20, 20), (20, 1), (20, 15), (8, 3)):
        pairs = 0
        for window in anatomy(model).windows:
            for token in range(length - rows + 1, length + 1):
                pairs += token if window is None else min(token, window)
        assert _attention(model, length, rows) == 2 * 4 * 8 * pairs


# --- training -----------------------------------------------------------------------------------


def bundle_of(model, auxiliary, layer_map, **options):
    objective = KVPredictionObjective(model, layer_map, **options)
    return Bundle(auxiliary, objective), objective


def context(bundle):
    return Context(step=0, max_steps=1, seed=0, rank=0, processes=1, bundle=bundle)


def test_gradients_reach_maps_and_auxiliary_model_through_a_frozen_base():
    model, auxiliary = tiny.model(), tiny.model(seed=1)
    before = copy.deepcopy(model.state_dict())
    bundle, objective = bundle_of(model, auxiliary, (0, 1, 2))
    ids = tiny.prompts((16, 16))["input_ids"]
    for term, reached in (("base", True), ("keys", True), ("values", True)):
        bundle.zero_grad()
        terms, _, _ = bundle({"input_ids": ids, "labels": ids}, context(bundle))
        terms[term].backward()
        maps = bundle.extra["maps"]
        parts = {"base": (maps.keys, maps.values), "keys": (maps.keys,), "values": (maps.values,)}[term]
        assert all(bool(p.grad.abs().sum() > 0) == reached for part in parts for p in part.parameters())
    bundle.zero_grad()
    terms, _, _ = bundle({"input_ids": ids, "labels": ids}, context(bundle))
    factors = objective.weights(context(bundle))
    sum(factors.get(name, 1.0) * term for name, term in terms.items()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in bundle.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_terms_are_the_papers():
    """Cross entropies, distances and z by their definitions, on the model's own forwards."""
    model, auxiliary = tiny.model("qwen3", torch.float64), tiny.model("qwen3", torch.float64, seed=1)
    bundle, objective = bundle_of(model, auxiliary, (0, 0, 2))
    bundle.double()
    ids = tiny.prompts((16, 16))["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        terms, _, _ = bundle({"input_ids": ids, "labels": labels}, context(bundle))
        counts = objective.counts({"input_ids": ids, "labels": labels})
        assert [int(counts[name]) for name in ("base", "auxiliary", "z", "keys", "values")] == [26, 26, 26, 32, 32]
        known, out = remember(auxiliary, whole=True, input_ids=ids)
        predicted = bundle.extra["maps"](known)
        true, _ = remember(model, input_ids=ids)
        with replaced(model, predicted):
            logits = model(ids, use_cache=False).logits
        z = 0.0
        for name, given in (("base", logits), ("auxiliary", out.logits)):
            wanted = nn.functional.cross_entropy(given[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            assert terms[name] / 26 == pytest.approx(float(wanted))
            z += float(given[:, 2:-1].logsumexp(-1).square().sum())
        assert float(terms["z"]) == pytest.approx(z)
        norms = [layer.self_attn.k_norm for layer in model.model.layers]
        keys = sum(
            (norm(one.unflatten(-1, (2, 8))) - norm(two.unflatten(-1, (2, 8)))).abs().mean()
            for norm, (one, _), (two, _) in zip(norms, predicted, true, strict=True)
        )
        values = sum((one - two).abs().mean() for (_, one), (_, two) in zip(predicted, true, strict=True))
        assert float(terms["keys"] / 32) == pytest.approx(float(keys))
        assert float(terms["values"] / 32) == pytest.approx(float(values))
    third = pytest.approx(1 / 3)
    assert objective.weights(context(bundle)) == {"keys": third, "values": third, "z": 1e-4}
    assert KVPredictionObjective(model, (0, 1, 2), consistency=1.0).weights(context(bundle))["keys"] == 1


def test_padding_counts_for_nothing():
    model, auxiliary = tiny.model(dtype=torch.float64), tiny.model(dtype=torch.float64, seed=1)
    bundle, objective = bundle_of(model, auxiliary, (0, 1, 2))
    bundle.double()
    ids = tiny.prompts((12,))["input_ids"]
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    labels = padded.masked_fill(padded == 0, -100)
    mask = (padded != 0).long()
    with torch.no_grad():
        plain, _, _ = bundle({"input_ids": ids, "labels": ids}, context(bundle))
        batch = {"input_ids": padded, "labels": labels, "attention_mask": mask}
        got, _, _ = bundle(batch, context(bundle))
    one, two = objective.counts({"input_ids": ids, "labels": ids}), objective.counts(batch)
    for name in plain:
        assert float(got[name]) == pytest.approx(float(plain[name])) and int(one[name]) == int(two[name])


def test_the_distance_alone_brings_a_noised_copy_to_the_true_cache(tmp_path):
    """From a copy with noise and maps that begin as the identity, the distance falls to less than a quarter."""
    model = tiny.model()
    auxiliary = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in auxiliary.parameters():
            parameter += 0.02 * torch.randn_like(parameter)

    class Distance(KVPredictionObjective):
        def weights(self, ctx):
            return super().weights(ctx) | {"base": 0.0, "auxiliary": 0.0}

    ids = torch.cat([tiny.prompts((24,), seed=seed)["input_ids"] for seed in range(8)])
    objective = Distance(model, (0, 1, 2), same=(0, 1, 2), consistency=1.0, z_loss=0.0)
    first = Bundle(copy.deepcopy(auxiliary), objective)
    with torch.no_grad():
        before = sum(float(first({"input_ids": ids, "labels": ids}, context(first))[0][n]) for n in ("keys", "values"))
    bundle = fit(auxiliary, objective, TokenRows(ids), None, steps=120, lr=3e-3, batch=8, schedule="cosine")
    with torch.no_grad():
        terms = bundle({"input_ids": ids, "labels": ids}, context(bundle))[0]
    assert float(terms["keys"] + terms["values"]) < before / 4


def test_trainer_makes_a_predictor_that_the_policy_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = tiny.tokenizer()
    place = tmp_path / "model"
    tiny.model().save_pretrained(place)
    tokenizer.save_pretrained(place)
    import tokenry

    model, _ = tokenry.load(place, dtype=torch.float32)
    texts = [" ".join(f"w{(7 * i + j * j) % 80}" for j in range(120)) for i in range(12)]
    with pytest.raises(ResourceError, match="tokenry train kv-prediction"), KVPrediction()(model):
        model(torch.tensor([[3, 4, 5]]))
    trainer = KVPredictionTrainer(length=32, batch=4, precision="float32")
    out = trained_folder("kv-prediction", loaded_name(model))
    note = run(trainer, model, tokenizer, texts, out, steps=4, seed=0)
    assert note["use"] == f"kv-prediction:predictor={out}" and set(note["loss"]) == {"full", "predicted", "auxiliary"}
    assert 0 < note["prefill_share"] < 1 and not (out / "run").exists()
    ids = tiny.prompts((20,))["input_ids"]
    wanted = {}
    for dtype in (torch.float32, torch.bfloat16):
        fresh, _ = tokenry.load(place, dtype=dtype)
        for policy in (KVPrediction(), tokenry.method(note["use"])):
            with policy(fresh):
                wanted.setdefault(dtype, []).append(fresh.generate(ids, **GREEDY))
        assert torch.equal(*wanted[dtype])
    # The folder is of this model alone.
    with pytest.raises(ResourceError, match="other weights"), KVPrediction(predictor=str(out))(tiny.model(seed=3)) as m:
        m(ids)
    with pytest.raises(ResourceError, match="no predictor"):
        KVPredictor.load(tmp_path / "nothing", fresh)
    # Continuation losses are of the inference form: what the policy's own logits say.
    predictor = KVPredictor.load(out, model)
    found = continuation_losses(model, predictor, ids, 12)
    with torch.no_grad(), KVPrediction(predictor=str(out))(model):
        cache, total = None, 0.0
        for step in range(11, 19):
            fed = ids[:, :12] if cache is None else ids[:, step : step + 1]
            done = model(fed, past_key_values=cache, use_cache=True)
            cache = done.past_key_values
            total -= float(done.logits[0, -1].log_softmax(-1)[ids[0, step + 1]])
    assert found["predicted"] == pytest.approx(total / 8, rel=1e-4)


def test_trainer_says_what_it_would_not_heed(tmp_path):
    with pytest.raises(BadParameter, match=r"share=0\.25 .* left out beside auxiliary"):
        KVPredictionTrainer(auxiliary="x", share=0.25)
    assert KVPredictionTrainer(auxiliary="x").share == 0.5
    texts = [" ".join(f"w{(7 * i + j * j) % 80}" for j in range(120)) for i in range(12)]
    trainer = KVPredictionTrainer(length=32, batch=4, precision="float32")
    with pytest.raises(BadParameter, match="steps=0"):
        run(trainer, tiny.model(), tiny.tokenizer(), texts, tmp_path, steps=0, seed=0)


def test_a_predictor_is_refused_by_other_weights_in_every_precision(tmp_path):
    model = tiny.model()
    strange(model).save(tmp_path, model)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert KVPredictor.load(tmp_path, tiny.model().to(dtype)).auxiliary.dtype == dtype
        with pytest.raises(ResourceError, match="other weights"):
            KVPredictor.load(tmp_path, tiny.model(seed=5).to(dtype))


def test_a_note_that_lacks_something_is_refused_by_what_it_lacks(tmp_path):
    model = tiny.model()
    strange(model).save(tmp_path, model)
    file = tmp_path / "predictor.json"
    note = json.loads(file.read_text())
    for change, lacks in (
        ({"base": None}, "lacks base:"), ({"base": {}}, "lacks base.class, base.name, base.weights:"),
        ({"layer_map": None}, "lacks layer_map:"), ({"layer_map": ["a"]}, "lacks layer_map:"),
        ({"kind": "other"}, "does not describe"),
    ):  # fmt: skip
        file.write_text(json.dumps(note | change))
        with pytest.raises(ResourceError, match=lacks):
            KVPredictor.load(tmp_path, model)
    file.write_text("[]")
    with pytest.raises(ResourceError, match="does not describe"):
        KVPredictor.load(tmp_path, model)


def test_trainer_resumes_to_the_same_weights(tmp_path):
    model = tiny.model()
    rows = TokenRows(tiny.prompts((16,) * 6)["input_ids"])

    def trained(folder, steps=6, **options):
        auxiliary, kept = pruned(model, 0.5)
        objective = KVPredictionObjective(model, (0, 0, 1), kept)
        return fit(auxiliary, objective, rows, folder, steps=steps, lr=1e-3, batch=2, save_every=3, **options)

    whole = trained(tmp_path / "whole").state_dict()

    class Stop(Exception):
        pass

    original = ObjectiveTrainer.compute_loss
    calls = []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise Stop
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectiveTrainer, "compute_loss", stopped)
        with pytest.raises(Stop):
            trained(tmp_path / "parts")
    for name, tensor in trained(tmp_path / "parts").state_dict().items():
        assert torch.equal(tensor, whole[name])


# --- refusals -----------------------------------------------------------------------------------


def test_what_cannot_be_served_is_refused():
    model = tiny.model()
    predictor = strange(model)
    ids = tiny.prompts((12,))["input_ids"]
    with pytest.raises(ResourceError, match="itself"):
        KVPredictor(model, model)
    other = tiny.config("llama")
    other.vocab_size = 50
    with pytest.raises(ResourceError, match="resize_token_embeddings"):
        KVPredictor(model, type(model)(other))
    with pytest.raises(BadParameter, match="layer_map"):
        check_map(model, predictor.auxiliary, (0, 1, 2))
    with pytest.raises(ResourceError, match="float64"):
        predictor.serve(tiny.model(dtype=torch.float64))
    predictor.serve(model)
    with KVPrediction()(model):
        with pytest.raises(BadPrompt, match="left"):
            model(ids.expand(2, -1), attention_mask=torch.tensor([[1] * 12, [1] * 9 + [0] * 3]))
        with pytest.raises(CacheMisuse, match="input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        cache = TokenCache(model, KVPrediction())
        cache.stage(relation=torch.ones(1, 12, 12, dtype=torch.bool).tril(), deferred=True)
        with pytest.raises(CacheMisuse, match="tree"):
            model(ids, past_key_values=cache)
    predictor.auxiliary.config.max_position_embeddings = 8
    with KVPrediction()(model), pytest.raises(PromptTooLong, match="reads 8"):
        model(ids)
    for options in ({"share": 1.0}, {"consistency": -1.0}, {"length": 3}, {"batch": 0}, {"lr": 0.0}, {"z_loss": -1.0}):
        with pytest.raises(BadParameter, match=next(iter(options))):
            KVPredictionTrainer(**options)


def test_a_model_that_makes_its_keys_otherwise_is_refused():
    model = tiny.model()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.k_norm = nn.LayerNorm(8)  # a norm by name that the model does not run
        nn.init.constant_(attention.k_norm.weight, 3.0)
    with pytest.raises(UnsupportedModel, match="way of its own"):
        Placement(model)
    with pytest.raises(UnsupportedModel):
        Placement(tiny.model("bloom"))

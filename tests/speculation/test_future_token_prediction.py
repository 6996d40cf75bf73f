from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests import tiny
from tokenry.errors import BadParameter, ResourceError, UnsupportedModel
from tokenry.generation import Options, Source
from tokenry.methods import trainer
from tokenry.models import load
from tokenry.speculation.future_token_prediction import FTPConfig, FTPDecoder, FTPForCausalLM, FutureTokenPrediction
from tokenry.speculation.future_token_prediction.measure import bench_states, future_losses, smoothness
from tokenry.speculation.future_token_prediction.model import config_for

SMALL = {"num_future_tokens": 4, "pseudo_len": 3, "decoder_layers": 2, "initializer_range": 0.3}


def built(kind="llama", dtype=torch.float64, seed=0, **settings) -> FTPForCausalLM:
    """A whole model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    encoder = settings.pop("encoder_config", None) or tiny.config(kind)
    model = FTPForCausalLM(FTPConfig(encoder_config=encoder, **(SMALL | settings))).to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ids_of(*shape, seed=0):
    return torch.randint(3, tiny.VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ("bos", "token"))
@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma"))
def test_a_position_sees_its_past_through_one_vector_and_the_future_through_its_inputs(kind, start):
    model, ids = built(kind, start=start), ids_of(2, 14)
    states = model.state_vectors(ids)
    changed = ids.clone()
    changed[:, 8:] = ids_of(2, 6, seed=1)
    assert torch.equal(model.state_vectors(changed)[:, :8], states[:, :8])

    where = torch.tensor([[7], [7]])
    logits = model.future_logits(states, ids, where)[:, 0]
    # A table of states in the encoder's place: only position 7's matters, and it does.
    table = torch.randn_like(states)
    table[:, 7] = states[:, 7]
    assert torch.equal(model.future_logits(table, ids, where)[:, 0], logits)
    table[:, 7] += 1
    assert not torch.allclose(model.future_logits(table, ids, where)[:, 0], logits)
    for offset in range(4):
        other = ids.clone()
        other[:, 7 + offset] = (other[:, 7 + offset] - 2) % 90 + 3
        moved = (model.future_logits(states, other, where)[:, 0] - logits).abs().amax((0, 2)) > 1e-9
        # The input of offset j is the token at offset j - 1; that of offset 1 is the learned vector, or the token.
        reads = [offset <= j and (offset > 0 or start == "token") for j in range(4)]
        assert moved.tolist() == reads


def test_offset_one_is_what_the_model_returns_with_or_without_a_cache():
    model, inputs = built(start="token"), tiny.prompts((12, 7))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(**inputs, output_future_logits=True, output_hidden_states=True)
    assert torch.allclose(whole.future_logits[:, :, 0], whole.logits)
    assert torch.equal(whole.hidden_states[-1], model.state_vectors(ids, mask))
    assert torch.allclose(model(**inputs, logits_to_keep=2).logits, whole.logits[:, -2:])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first = model(ids[:, :9], attention_mask=mask[:, :9], position_ids=positions[:, :9], use_cache=True)
    rest = model(ids[:, 9:], attention_mask=mask, position_ids=positions[:, 9:], past_key_values=first.past_key_values)
    assert torch.allclose(rest.logits, whole.logits[:, 9:])
    # Padding changes nothing.
    alone = model.state_vectors(ids[1:, 5:])
    assert torch.allclose(model.state_vectors(ids, mask)[1, 5:], alone[0])
    right = F.pad(ids[1:, 5:], (0, 3))
    assert torch.allclose(model.state_vectors(right, (right > 0).long())[:, :7], alone)


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_one_token_one_position_and_no_decoder_is_a_gpt(kind):
    gpt = tiny.model(kind, torch.float64)
    model = FTPForCausalLM.around(gpt, num_future_tokens=1, pseudo_len=1, decoder_layers=0)
    width = model.config.width
    with torch.no_grad():
        model.future.expand.weight.copy_(torch.eye(width))
        model.future.expand.bias.zero_()
        model.future.slots.zero_()
    ids = ids_of(3, 12)
    assert torch.allclose(model(ids).logits, gpt(ids).logits)
    labels = ids.clone()
    labels[0, 4:7] = -100
    assert torch.allclose(model(ids, labels=labels).loss, gpt(ids, labels=labels).loss.double())


def test_the_loss_is_the_weighted_mean_over_all_positions_and_offsets():
    model, ids = built(gamma=0.7), ids_of(2, 9)
    ids[0, 4] = 2  # the end of a document
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[1, 3] = -100
    mask[1, :2] = 0
    states = model.state_vectors(ids, mask)
    total = weights = 0.0
    sums, counts = [0.0] * 4, [0] * 4
    for row in range(2):
        for t in range(9):
            for j in range(1, 5):
                between = ids[row, t : t + j].tolist()  # an end at or after t, before the target, cuts
                if t + j >= 9 or labels[row, t + j] == -100 or mask[row, t] == 0 or mask[row, t + j] == 0:
                    continue
                if 2 in between:
                    continue
                logits = model.future_logits(states, ids, torch.full((2, 1), t))[row, 0, j - 1]
                loss = F.cross_entropy(logits, ids[row, t + j]).item()
                total, weights = total + 0.7 ** (j - 1) * loss, weights + 0.7 ** (j - 1)
                sums[j - 1], counts[j - 1] = sums[j - 1] + loss, counts[j - 1] + 1
    output = model(ids, attention_mask=mask, labels=labels)
    assert output.loss.item() == pytest.approx(total / weights, rel=1e-9)
    assert output.offset_losses.tolist() == pytest.approx([s / c for s, c in zip(sums, counts, strict=True)], rel=1e-9)


def test_gamma_zero_trains_the_next_token_alone():
    model, ids = built(gamma=0.0), ids_of(2, 9)
    wanted = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = model(ids, labels=ids).loss
    assert torch.allclose(loss, wanted)
    loss.backward()
    # Inputs of later offsets take no part.
    assert not model.future.positions.grad[1:].any() and model.future.positions.grad[0].any()


def test_drawn_positions_stand_for_all():
    model = built()
    ids = ids_of(3, 11)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    targets = model.targets(ids, ids, mask)
    real = (targets != -100).any(-1)
    states = model.state_vectors(ids, mask)

    def gradient(positions, scale):
        model.zero_grad()
        sums = model.offset_sums(states.detach(), ids, targets, positions, scale)
        (model.offset_weights(sums) * sums).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.future.parameters() if p.grad is not None])

    whole = gradient(*model.draw(targets, None))
    # Every draw counts as many positions as its row has, evenly; and over draws of one, each position in turn, the mean
    # of the gradients is the whole one. So an even draw is unbiased, exactly.
    for count in (1, 4, 9):
        positions, scale = model.draw(targets, count)
        assert torch.allclose(scale.sum(1), real.sum(1).double())
        assert bool((real.gather(1, positions) | (scale == 0)).all())
        assert all(len(set(row.tolist())) == count for row in positions)
    parts = []
    for row in range(3):
        for column in real[row].nonzero()[:, 0]:
            scale = torch.zeros(3, 1, dtype=torch.float64)
            scale[row] = real[row].sum()
            parts.append(gradient(column.expand(3, 1), scale) / real[row].sum())
    assert torch.allclose(torch.stack(parts).sum(0), whole)
    # The draw is even: 3,000 draws of 4 from 10 positions; chi-square with 9 degrees of freedom above 40 has a chance
    # below 1e-5, and dependence within a draw only narrows it.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([model.draw(targets, 4, generator)[0][0] for _ in range(3000)])
    seen = torch.bincount(drawn, minlength=11)[:10].double()
    assert len(drawn) == seen.sum()
    assert float(((seen - 1200) ** 2 / 1200).sum()) < 40


@pytest.mark.parametrize("tied", (True, False))
def test_saved_and_loaded_it_is_the_same(tmp_path, tied):
    model, ids = built("gpt2", torch.float32, tie_word_embeddings=tied), ids_of(1, 9)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    for again in (FTPForCausalLM.from_pretrained(tmp_path), load(tmp_path)[0]):
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
        assert again.config.to_diff_dict() == model.config.to_diff_dict()
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    model.future.save_pretrained(tmp_path / "decoder")
    alone = FTPDecoder.from_pretrained(tmp_path / "decoder")
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, model.future.state_dict()[name])


def test_a_resized_vocabulary_keeps_the_head():
    model, ids = built(dtype=torch.float32), ids_of(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(tiny.VOCABULARY + 3)
    assert torch.allclose(model(ids).logits[..., : tiny.VOCABULARY], before, atol=1e-5)
    assert model(ids).logits.shape[-1] == tiny.VOCABULARY + 3


def test_around_a_model_nothing_is_copied_or_changed():
    gpt, ids = tiny.model(), ids_of(1, 9)
    before = gpt(ids).logits
    model = FTPForCausalLM.around(gpt, **SMALL)
    assert model.encoder is gpt.base_model and model.lm_head.weight is gpt.lm_head.weight
    # A new decoder knows nothing, and is not sure of it.
    assert model(ids, labels=ids).loss < math.log(tiny.VOCABULARY) + 1.5
    assert torch.equal(gpt(ids).logits, before) and gpt.config._attn_implementation == "sdpa"
    assert torch.equal(model.state_vectors(ids), gpt(ids, output_hidden_states=True).hidden_states[-1])
    gpt.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCABULARY))
    with pytest.raises(UnsupportedModel, match="bias"):
        FTPForCausalLM.around(gpt)


def test_bad_values():
    for bad in (
        {"num_future_tokens": 0}, {"pseudo_len": 0}, {"gamma": 1.5}, {"start": "eos"}, {"positions_per_sequence": 0},
        {"decoder_layers": 0, "pseudo_len": 3, "num_future_tokens": 2},
    ):  # fmt: skip
        with pytest.raises(BadParameter, match="not allowed"):
            FTPConfig(encoder_config=tiny.config("llama"), **bad)
    with pytest.raises(BadParameter, match="encoder_config"):
        FTPForCausalLM(FTPConfig())
    with pytest.raises(BadParameter, match="decoder_heads"):
        built(decoder_heads=5)
    for bad in ({"tokens_per_step": 0}, {"choice": "top", "lossless": False}, {"choice": "best"}):
        with pytest.raises(BadParameter):
            FutureTokenPrediction(**bad)


# --- the three ways to generate -------------------------------------------------------------------


def generate(model, inputs, method, seed=None, resources=None, **options):
    extra = Options(seed=seed, resources=resources or {})
    settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(**inputs, custom_generate=method, tokenry_options=extra, **settings)


@pytest.fixture(scope="module")
def counting():
    """A model that has learned to count: after each token comes the next one, so that everything ahead is known."""
    torch.manual_seed(0)
    encoder = tiny.config("llama")
    encoder.num_hidden_layers, encoder.initializer_range = 1, 0.1
    settings = {"num_future_tokens": 4, "pseudo_len": 2, "decoder_layers": 1, "initializer_range": 0.1}
    model = FTPForCausalLM(FTPConfig(encoder_config=encoder, gamma=1.0, positions_per_sequence=8, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(250):
        ids = (torch.randint(0, 40, (16, 1)) + torch.arange(14)) % 40 + 3
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def test_known_futures_come_in_whole_blocks(counting):
    inputs = {"input_ids": torch.arange(5, 13)[None]}
    truth = torch.arange(13, 34)[None]
    for size in (1, 2, 4, None):
        method = FutureTokenPrediction(tokens_per_step=size)
        result = generate(counting, inputs, method, max_new_tokens=21)
        assert torch.equal(result.sequences[:, 8:], truth)
        # The prefill gives the first token, and every step as many as it may.
        assert result.stats.forwards == 1 + -(-20 // (size or 4))
        believed = generate(
            counting, inputs, FutureTokenPrediction(tokens_per_step=size, lossless=False), max_new_tokens=21
        )
        assert torch.equal(believed.sequences, result.sequences)
        assert believed.stats.forwards == result.stats.forwards


@pytest.mark.parametrize(("kind", "start"), (("llama", "bos"), ("gpt2", "token"), ("qwen3", "bos")))
def test_greedy_drafts_give_transformers_greedy_text(kind, start):
    model, inputs = built(kind, start=start), tiny.prompts((12, 5, 9))
    for options in ({}, {"repetition_penalty": 1.3}):
        wanted = model.generate(**inputs, do_sample=False, max_new_tokens=14, **options)
        for settings in ({}, {"tokens_per_step": 2}, {"tokens_per_step": 1, "lossless": False}):
            method = FutureTokenPrediction(**settings)
            assert torch.equal(generate(model, inputs, method, max_new_tokens=14, **options).sequences, wanted)


def test_drafts_are_the_decoders_own_rollout():
    """Unverified blocks by hand: from the state of the token before, N tokens, each fed back."""
    model, ids = built(), ids_of(1, 7)
    result = generate(
        model, {"input_ids": ids}, FutureTokenPrediction(lossless=False), max_new_tokens=13, output_logits=True
    )
    text = ids
    while text.shape[1] < 20:
        state = model.state_vectors(text)[:, -1:]
        block = text[:, -1:]
        for offset in range(min(4, 20 - text.shape[1])):
            padded = F.pad(block, (0, 4))
            logits = model.future_logits(state, padded, torch.zeros(1, 1, dtype=torch.long))[:, 0, offset]
            assert torch.allclose(logits, result.logits[text.shape[1] - 7 + offset])
            block = torch.cat([block, logits.argmax(-1, keepdim=True)], 1)
        text = torch.cat([text, block[:, 1:]], 1)
    assert torch.equal(result.sequences, text)


def test_unverified_blocks_end_at_end_tokens_and_keep_rows_apart():
    model, inputs = built(), tiny.prompts((12, 5))
    method = FutureTokenPrediction(lossless=False)
    free = generate(model, inputs, method).sequences[:, 12:]
    end = int(free[0, 6])
    result = generate(model, inputs, method, eos_token_id=end, pad_token_id=0)
    # Nothing was verified, and the result says so.
    assert result.stats.extra["lossless"] is False and result.stats.drafted == result.stats.accepted == 0
    assert not bool((result.sources == Source.DRAFT).any())
    got = result.sequences[:, 12:]
    for row in range(2):
        where = (free[row] == end).nonzero()
        stop = int(where[0]) + 1 if len(where) else 20
        assert torch.equal(got[row, :stop], free[row, :stop]) and not got[row, stop:].any()
    alone = generate(model, {"input_ids": inputs["input_ids"][1:, 7:]}, method).sequences
    assert torch.equal(alone[0, 5:], free[1])


def test_seeded_samples_do_not_depend_on_drafts():
    model, inputs = built(), tiny.prompts((12, 5))
    options = {"do_sample": True, "temperature": 0.5, "top_k": 20, "seed": 3}
    texts = [
        generate(model, inputs, FutureTokenPrediction(**settings), **options).sequences
        for settings in (
            {},
            {"choice": "top"},
            {"tokens_per_step": 1},
            {"tokens_per_step": 2},
            {"tokens_per_step": 1, "lossless": False},
        )
    ]
    assert all(torch.equal(texts[0], other) for other in texts[1:])


@pytest.mark.parametrize(("seed", "choice"), ((None, "auto"), (5, "auto"), (5, "sampled")))
def test_sampled_drafts_have_plains_distribution(seed, choice):
    """The second and third token of 2,000 texts over 4 tokens against their exact law: chi-square of 15 degrees of
    freedom above 50 has a chance of 1.2e-5."""
    encoder = tiny.config("llama")
    encoder.vocab_size, encoder.num_hidden_layers = 4, 1
    encoder.pad_token_id = encoder.bos_token_id = encoder.eos_token_id = None
    model = built(encoder_config=encoder, num_future_tokens=3, decoder_layers=1)
    prompt = torch.tensor([[1, 3, 0]])
    torch.manual_seed(0)
    method = FutureTokenPrediction(choice=choice)
    rows = 2000
    inputs = {"input_ids": prompt.repeat(rows, 1), "attention_mask": torch.ones(rows, 3, dtype=torch.long)}
    result = generate(model, inputs, method, seed, do_sample=True, max_new_tokens=3, top_k=0, temperature=5.0)
    new = result.sequences[:, 3:]
    exact = torch.zeros(4, 4, dtype=torch.float64)
    for first in range(4):
        start = torch.cat([prompt, torch.tensor([[first]])], 1)
        p = (model(prompt).logits[0, -1] / 5).softmax(-1)[first]
        nexts = (model(start).logits[0, -1] / 5).softmax(-1)
        for second in range(4):
            text = torch.cat([start, torch.tensor([[second]])], 1)
            exact[second] += (p * nexts[second] * (model(text).logits[0, -1] / 5).softmax(-1)).detach()
    seen = torch.bincount(new[:, 1] * 4 + new[:, 2], minlength=16).double()
    expected = exact.flatten() * rows
    assert float(expected.min()) > 5
    assert float(((seen - expected) ** 2 / expected).sum()) < 50
    assert 0 < result.stats.accepted < result.stats.drafted


def test_a_decoder_on_a_model_that_is_there(counting):
    """The same states and the same decoder behind another head: drafts are accepted, the text is the model's own."""
    gpt = tiny.model(dtype=torch.float32)
    decoder = FTPDecoder(config_for(gpt, **SMALL)).eval()
    inputs = tiny.prompts((12, 5))
    wanted = gpt.generate(**inputs, do_sample=False, max_new_tokens=20)
    result = generate(gpt, inputs, FutureTokenPrediction(), resources={"weights": decoder})
    assert torch.equal(result.sequences, wanted) and result.stats.drafted > 0
    # A decoder handed over goes before the target's own.
    own = generate(counting, {"input_ids": torch.arange(5, 13)[None]}, FutureTokenPrediction())
    other = FTPDecoder(counting.config)
    handed = generate(
        counting, {"input_ids": torch.arange(5, 13)[None]}, FutureTokenPrediction(), resources={"weights": other}
    )
    assert torch.equal(own.sequences, handed.sequences)
    assert handed.stats.accepted < own.stats.accepted


def test_what_is_missing_or_does_not_fit_is_refused(tmp_path):
    gpt, inputs = tiny.model(), tiny.prompts((8,))
    with pytest.raises(ResourceError, match="tokenry train ftp"):
        generate(gpt, inputs, FutureTokenPrediction())
    with pytest.raises(ResourceError, match="no future decoder"):
        generate(gpt, inputs, FutureTokenPrediction(weights=str(tmp_path)))
    built(dtype=torch.float32).save_pretrained(tmp_path / "whole")
    with pytest.raises(ResourceError, match="loaded as the model"):
        generate(gpt, inputs, FutureTokenPrediction(weights=str(tmp_path / "whole")))
    wide = copy.deepcopy(gpt.config)
    wide.hidden_size = 64
    decoder = FTPDecoder(FTPConfig(encoder_config=wide, **SMALL))
    with pytest.raises(ResourceError, match="width 64"):
        generate(gpt, inputs, FutureTokenPrediction(), resources={"weights": decoder})
    decoder = FTPDecoder(config_for(gpt, **SMALL))
    with pytest.raises(ResourceError, match="float64"):
        generate(gpt, inputs, FutureTokenPrediction(), resources={"weights": copy.deepcopy(decoder).double()})
    with pytest.raises(BadParameter, match="knows 4"):
        generate(gpt, inputs, FutureTokenPrediction(tokens_per_step=5), resources={"weights": decoder})


# --- training and measuring -----------------------------------------------------------------------


def test_the_gap_is_what_states_tell(counting):
    rows = (torch.randint(0, 40, (8, 1), generator=torch.Generator().manual_seed(1)) + torch.arange(14)) % 40 + 3
    found = future_losses(counting, rows)
    assert json.loads(json.dumps(found)) == found
    assert found["positions"] == 8 * 13
    # The first token comes from the state alone; those after it the decoder counts on to from the token before.
    assert found["gap"][0] > 1 and found["loss"][0] < 0.1
    assert found["block_loss"]["2"] == pytest.approx(sum(found["loss"][:2]) / 2)
    with torch.no_grad():
        deaf = copy.deepcopy(counting)
        for layer in deaf.future.layers:
            layer.memory_out.weight.zero_()
    assert future_losses(deaf, rows)["gap"] == pytest.approx([0] * 4, abs=1e-6)


def test_smoothness_tells_a_common_direction_from_neighbours():
    model = tiny.model()
    found = smoothness(model, ids_of(6, 20))
    assert set(found) == {"cosine", "centred_cosine", "shuffled_cosine"}
    assert abs(found["shuffled_cosine"]) < 0.3
    states = {"last_hidden_state": None}

    class Body(torch.nn.Module):
        device = torch.device("cpu")

        @property
        def base_model(self):
            return lambda input_ids: type("Output", (), states)

    # All states share a direction; beyond it, each equals its neighbour or is unrelated to it.
    noise = torch.randn(6, 1, 8).expand(-1, 20, -1)
    states["last_hidden_state"] = noise + 10
    held = smoothness(Body(), ids_of(6, 20))
    states["last_hidden_state"] = torch.randn(6, 20, 8) + 10
    free = smoothness(Body(), ids_of(6, 20))
    assert held["cosine"] > 0.9 and free["cosine"] > 0.9
    assert held["centred_cosine"] == pytest.approx(1, abs=1e-4) and abs(free["centred_cosine"]) < 0.3


@pytest.mark.parametrize("encoder", ("frozen", "tuned", "scratch"))
def test_trained_from_texts_it_drafts_by_path(tmp_path, encoder):
    tokenizer, gpt = tiny.tokenizer(), tiny.model()
    texts = [" ".join(f"w{(start + step) % 20}" for step in range(40)) for start in range(20)]
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    options = {"encoder": encoder, "future_tokens": "3", "pseudo_len": "2", "decoder_layers": "1", "length": "16"}
    learner = trainer("ftp", options | {"batch": "8", "positions": "4"})
    found = learner.train(gpt, tokenizer, texts, tmp_path, steps=30, seed=0)
    assert json.loads(json.dumps(found)) == found and len(found["future"]["gap"]) == 3
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["term/future"] for line in log if "term/future" in line]
    assert sum(losses[-2:]) < sum(losses[:2]) and any("metric/offset_3" in line for line in log)
    inputs = tiny.prompts((12, 5))
    weights = {"weights": tmp_path} if encoder == "frozen" else {}
    if encoder == "frozen":
        assert all(torch.equal(tensor, before[name]) for name, tensor in gpt.state_dict().items())
        target, method = gpt, FutureTokenPrediction(weights=str(tmp_path))
    else:
        target, method = load(tmp_path)[0], FutureTokenPrediction()
        assert isinstance(target, FTPForCausalLM)
    measured = bench_states(target, tokenizer, texts, rows=4, length=16, **weights)
    assert measured["rows"] == 4 and len(measured["future"]["loss"]) == 3
    assert "future" not in bench_states(tiny.model(), tokenizer, texts, rows=4, length=16)
    target.generation_config.eos_token_id = None
    wanted = target.generate(**inputs, do_sample=False, max_new_tokens=20)
    result = generate(target, inputs, method)
    assert torch.equal(result.sequences, wanted) and result.stats.drafted > 0

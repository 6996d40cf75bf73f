"""CNTP's invariants, as on its card."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny
from tokenry.decoding import CNTP
from tokenry.decoding.cntp import _precision, punctuation_ids
from tokenry.errors import BadParameter, ResourceError
from tokenry.generation import Session, Source, engine
from tokenry.generation.engine import Options
from tokenry.kvcache import H2O
from tokenry.sampling import Noise

MARKS = tuple(range(3, 20))


def test_number_of_trials_follows_the_rules():
    entropy = torch.tensor([0.0, 0.01, 0.20, 0.43, 0.92, 1.2, 1.5, 9.0])
    assert CNTP().trials(entropy).tolist() == [1, 1, 2, 3, 6, 8, 10, 10]
    assert CNTP(rule="paper").trials(entropy).tolist() == [1, 1, 1, 2, 6, 7, 10, 10]
    assert CNTP(rule="fixed").trials(entropy).tolist() == [1, 1, 6, 6, 6, 6, 6, 6]
    assert CNTP(rule="fixed", fixed_trials=3, max_trials=2).trials(entropy).tolist() == [1] * 6 + [3, 3]
    assert CNTP(rule="inverted").trials(entropy).tolist() == [10, 10, 9, 8, 5, 3, 1, 1]
    many = torch.linspace(0, 3, 1000)
    for rule in ("released", "paper", "fixed"):
        assert bool((CNTP(rule=rule).trials(many).diff() >= 0).all())


def test_bad_parameters_are_refused():
    with pytest.raises(BadParameter, match="max_trials"):
        CNTP(max_trials=0)
    with pytest.raises(BadParameter, match="entropy_high"):
        CNTP(entropy_low=2.0)
    with pytest.raises(BadParameter, match="fixed_trials must be at least 2"):
        CNTP(rule="fixed", fixed_trials=1)
    with pytest.raises(BadParameter, match="punctuation"):
        CNTP(punctuation=(4, -1))
    for ids in ((tiny.VOCABULARY,), (4, 10**6)):
        with pytest.raises(BadParameter, match=f"punctuation.* below {tiny.VOCABULARY}"):
            tiny.model().generate(
                **tiny.prompts((5,)), custom_generate=CNTP(punctuation=ids), do_sample=True, max_new_tokens=3
            )


@pytest.mark.parametrize("options", ({}, {"do_sample": False}))
def test_a_greedy_call_is_plain_and_says_so_once(options, caplog, monkeypatch):
    monkeypatch.setattr(engine, "_warned", set())
    model, inputs = tiny.model(), tiny.prompts((5,))
    with caplog.at_level("WARNING", "tokenry"):
        for _ in range(2):
            out = model.generate(**inputs, custom_generate=CNTP(punctuation=MARKS), max_new_tokens=9, **options)
    assert [record.message for record in caplog.records if "do_sample=True" in record.message] == [
        "cntp chooses among samples, and do_sample is off: it decodes as plain does; say do_sample=True"
    ]
    assert torch.equal(out, model.generate(**inputs, do_sample=False, max_new_tokens=9))


@pytest.mark.parametrize("options", ({"max_trials": 1}, {"entropy_low": 9.0, "entropy_high": 10.0}))
def test_one_trial_everywhere_is_plain_sampling(options):
    method = CNTP(punctuation=MARKS, **options)
    model = tiny.model()
    inputs = tiny.prompts((12, 7))
    torch.manual_seed(5)
    wanted = model.generate(**inputs, do_sample=True, max_new_tokens=20)
    torch.manual_seed(5)
    got = model.generate(**inputs, do_sample=True, max_new_tokens=20, custom_generate=method)
    assert torch.equal(got, wanted)


def test_no_entropy_is_greedy():
    model = tiny.model()
    inputs = tiny.prompts((12, 7))
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    method = CNTP(punctuation=MARKS)
    assert torch.equal(
        model.generate(**inputs, do_sample=True, top_k=1, max_new_tokens=20, custom_generate=method), wanted
    )
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=20, custom_generate=method), wanted)


def _run(model, inputs, seed=0, new=24, **options):
    return model.generate(
        **inputs, do_sample=True, max_new_tokens=new, custom_generate=CNTP(punctuation=MARKS),
        return_dict_in_generate=True, tokenry_options=Options(seed=seed), **options,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", ((12,), (12, 7, 15)))
def test_the_kept_trial_has_the_least_perplexity_and_its_recomputed_value(lengths):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts(lengths)
    result = _run(model, inputs, temperature=0.9, top_p=0.95, top_k=0)
    segments = result.stats.extra["segments"]
    assert any(len(set(segment["lengths"])) > 1 for segment in segments), "trials of unequal length must occur"
    width = inputs["input_ids"].shape[1]
    for segment in segments:
        assert segment["kept"] == segment["perplexities"].index(min(segment["perplexities"]))
        row, start, length = segment["row"], segment["position"], segment["lengths"][segment["kept"]]
        ids = result.sequences[row, width - lengths[row] : width + start + length][None]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, -length - 1 : -1].float() / 0.9
        logs = _top_p(logits, 0.95).log_softmax(-1).gather(1, ids[0, -length:, None])
        assert math.isclose(segment["perplexities"][segment["kept"]], math.exp(-float(logs.mean())), rel_tol=1e-4)
        body = result.sequences[row, width + start : width + start + length].tolist()
        assert all(token not in MARKS for token in body[:-1]), "a trial ends at its first mark"
        sources = result.sources[row, width + start : width + start + length]
        assert bool((sources == Source.TRIAL).all())


def test_entropy_and_perplexity_of_the_models_own_distribution():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    method = CNTP(punctuation=MARKS, distribution="raw")
    options = {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 0, "max_new_tokens": 16}
    result = model.generate(
        **inputs, custom_generate=method, return_dict_in_generate=True, tokenry_options=Options(seed=0), **options
    )
    segments = result.stats.extra["segments"]
    assert len(segments) > 3
    for segment in segments:
        length = segment["lengths"][segment["kept"]]
        ids = result.sequences[segment["row"], 12 - (12, 7)[segment["row"]] : 12 + segment["position"] + length][None]
        with torch.no_grad():
            logs = model(ids, use_cache=False).logits[0, -length - 1 : -1].float().log_softmax(-1)
        assert math.isclose(segment["entropy"], -float((logs[0].exp() * logs[0]).sum()), rel_tol=1e-4)
        mean = logs.gather(1, ids[0, -length:, None]).mean()
        assert math.isclose(segment["perplexities"][segment["kept"]], math.exp(-float(mean)), rel_tol=1e-4)
        assert segment["kept"] == segment["perplexities"].index(min(segment["perplexities"]))


def test_entropy_near_its_lower_bound_is_taken_in_float32():
    """In bfloat16 a probability of 0.999 is 1, and an entropy near 0.01 says nothing."""
    model, inputs = tiny.model(dtype=torch.bfloat16), tiny.prompts((12,))
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -1].double()
    for aim in (0.011, 0.0134, 0.0151, 0.0187):
        low, high = 1e-3, 10.0
        for _ in range(80):
            middle = (low * high) ** 0.5
            entropy = float(torch.distributions.Categorical(logits=logits / middle).entropy())
            low, high = (middle, high) if entropy < aim else (low, middle)
        method = CNTP(punctuation=MARKS, entropy_low=0.01, entropy_high=0.02, min_trials=2)
        result = model.generate(
            **inputs, custom_generate=method, do_sample=True, max_new_tokens=2, temperature=low, top_k=0,
            return_dict_in_generate=True, tokenry_options=Options(seed=0),
        )  # fmt: skip
        first = result.stats.extra["segments"][0]
        assert first["position"] == 0 and first["entropy"] == pytest.approx(aim, rel=1e-3)
        assert first["trials"] == 2 + int(8 * (aim - 0.01) / 0.01)


@pytest.mark.parametrize("rule", ("fixed", "inverted"))
def test_rules_of_the_ablation_run_their_numbers_of_trials(rule):
    method = CNTP(punctuation=MARKS, rule=rule)
    result = tiny.model().generate(
        **tiny.prompts((12, 7)), do_sample=True, max_new_tokens=12, custom_generate=method,
        return_dict_in_generate=True, tokenry_options=Options(seed=0), temperature=0.3,
    )  # fmt: skip
    segments = result.stats.extra["segments"]
    assert segments
    for segment in segments:
        assert segment["trials"] == int(method.trials(torch.tensor(segment["entropy"])))
        assert rule != "fixed" or segment["trials"] == 6


def _top_p(logits, top_p):
    ordered, index = logits.sort(descending=False)
    remove = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    remove[..., -1:] = False
    return logits.masked_fill(remove.scatter(1, index, remove), float("-inf"))


@pytest.mark.parametrize("lengths", ((12,), (12, 7)))
def test_the_adopted_cache_continues_as_a_fresh_forward(lengths):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts(lengths)
    result = _run(model, inputs, output_logits=True)
    pad = inputs["input_ids"].shape[1]
    for row, length in enumerate(lengths):
        ids = result.sequences[row, pad - length :][None]
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits[0, length - 1 : -1].float()
        got = torch.stack([step[row] for step in result.logits])
        assert torch.allclose(got, wanted, atol=1e-4)
    assert result.past_key_values.get_seq_length() == result.sequences.shape[1] - 1
    assert result.sequences.shape[1] == pad + 24
    if len(lengths) == 1:
        assert result.stats.kv_bytes == (pad + 23) * 2 * 8 * 2 * 3 * 8, "no trial leaves anything in the cache"


def test_rows_of_a_batch_do_not_depend_on_each_other():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    both = _run(model, inputs).sequences
    # With a seed the noise is a row's own; the first row alone is row 0 again.
    alone = _run(model, {key: value[:1] for key, value in inputs.items()}).sequences
    assert torch.equal(both[:1], alone)


def test_a_row_that_does_not_hesitate_samples_as_if_alone():
    """Rows that run no trials beside rows that do. A seed's noise is a row's own, so every row comes first once."""
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7, 9))
    method = CNTP(entropy_low=2.0, entropy_high=4.0, max_trials=4, punctuation=MARKS)
    options = {"do_sample": True, "max_new_tokens": 5, "custom_generate": method, "return_dict_in_generate": True}
    mixed = 0
    for seed in range(10):
        extra = options | {"tokenry_options": Options(seed=seed)}
        for row in range(3):
            together = model.generate(**{k: v.roll(-row, 0) for k, v in inputs.items()}, **extra)
            alone = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **extra)
            assert torch.equal(together.sequences[:1], alone.sequences)
            positions = [segment["position"] for segment in together.stats.extra["segments"]]
            mixed += sum(0 < positions.count(place) < 3 for place in range(5))
    assert mixed > 50


@pytest.mark.parametrize("lengths", ((12,), (12, 7, 15)))
def test_no_two_tokens_share_noise(lengths, monkeypatch):
    """Trials that were not kept have used noise of positions that later trials reach again."""
    seen, alive = [], []
    choose, sample = Session.choose, Noise.sample

    def watched(self, scores, ahead=0):
        # Rows that are done are drawn for as well; nothing comes of it.
        alive.append(self.alive)
        return choose(self, scores, ahead)

    def noted(self, probs, *keys):
        seen.extend(key for key, own in zip(zip(*keys, strict=True), alive[-1], strict=True) if own)
        return sample(self, probs, *keys)

    monkeypatch.setattr(Session, "choose", watched)
    monkeypatch.setattr(Noise, "sample", noted)
    model, inputs = tiny.model(), tiny.prompts(lengths)
    method = CNTP(max_trials=4, punctuation=MARKS)
    options = {"do_sample": True, "max_new_tokens": 24, "custom_generate": method, "return_dict_in_generate": True}
    result = model.generate(**inputs, **options, tokenry_options=Options(seed=1))
    assert any(max(segment["lengths"]) > 3 for segment in result.stats.extra["segments"])
    assert len(set(seen)) == len(seen) > 40


def test_a_stop_inside_a_trial_ends_the_row_there():
    model = tiny.model()
    inputs = tiny.prompts((12, 7))
    free = _run(model, inputs, new=40).sequences[:, 12:]
    stop = int(free[0, 10])
    cut = _run(model, inputs, new=40, eos_token_id=[stop], pad_token_id=0)
    for row in range(2):
        new = cut.new_tokens[row]
        assert stop not in new[:-1]
        assert len(new) == 40 or new[-1] == stop


def test_runs_inside_a_budgeted_cache():
    model = tiny.model()
    inputs = tiny.prompts((40, 30))
    with H2O(budget=12)(model):
        result = _run(model, inputs)
    assert result.sequences.shape[1] == 64
    assert all(layer.size <= 12 for layer in result.past_key_values.layers)
    assert model.config._attn_implementation == "sdpa"


def test_law_of_the_committed_segment():
    """A trial that produces s with probability q(s) is committed with P(s) = q(s) sum_i F_gt^i F_ge^(N-1-i)."""
    vocabulary, mark, count, runs = 4, 3, 3, 6000
    model = _markov(vocabulary)
    start = torch.tensor([[1]])
    with torch.no_grad():
        rows = model(torch.arange(vocabulary)[:, None], use_cache=False).logits[:, -1].softmax(-1)
    law = _segments(rows.double(), mark, longest=3)
    shorter = {s: -sum(map(math.log, ps)) / len(ps) for s, ps in law.items()}
    mass = {s: math.prod(ps) for s, ps in law.items()}
    assert math.isclose(sum(mass.values()), 1, abs_tol=1e-6)
    wanted = {}
    for s, q in mass.items():
        above = sum(m for t, m in mass.items() if shorter[t] > shorter[s] + 1e-9)
        level = sum(m for t, m in mass.items() if shorter[t] >= shorter[s] - 1e-9)
        wanted[s] = q * sum(above**i * level ** (count - 1 - i) for i in range(count))
    assert math.isclose(sum(wanted.values()), 1, abs_tol=1e-6)
    # Every first entropy is high enough for exactly three trials.
    method = CNTP(min_trials=count, max_trials=count, punctuation=(mark,))
    torch.manual_seed(0)
    seen = dict.fromkeys(wanted, 0)
    batch = 500
    for _ in range(runs // batch):
        out = model.generate(
            start.expand(batch, -1), do_sample=True, max_new_tokens=3, custom_generate=method, top_k=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        first = [segment for segment in out.stats.extra["segments"] if segment["position"] == 0]
        assert len(first) == batch
        for segment in first:
            length = segment["lengths"][segment["kept"]]
            seen[tuple(out.sequences[segment["row"], 1 : 1 + length].tolist())] += 1
    cells = [s for s in wanted if wanted[s] * runs >= 5]
    rest = runs - sum(seen[s] for s in cells)
    expected_rest = runs * (1 - sum(wanted[s] for s in cells))
    chi = sum((seen[s] - runs * wanted[s]) ** 2 / (runs * wanted[s]) for s in cells)
    chi += (rest - expected_rest) ** 2 / max(expected_rest, 1e-9) if expected_rest > 5 else 0
    freedom = len(cells) - (0 if expected_rest > 5 else 1)
    # Wilson-Hilferty: chi-square above this happens by chance once in about 10,000 runs.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < bound, (chi, bound)
    # The test can tell: plain sampling's law is far away.
    plain = sum((runs * mass[s] - runs * wanted[s]) ** 2 / (runs * wanted[s]) for s in cells)
    assert plain > 2 * bound


def _markov(vocabulary):
    """A Llama whose logits hang on the last token almost alone."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            initializer_range=0.8, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    ).double().eval()  # fmt: skip
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    model.generation_config.eos_token_id = None
    return model


def _segments(rows, mark, longest):
    """All trials from token 1 with their token probabilities: up to the mark, or to the length limit."""
    found = {}
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(len(rows)), repeat=length):
            ended = tokens[-1] == mark
            if mark in tokens[:-1] or not (ended or length == longest):
                continue
            found[tokens] = [float(rows[a, b]) for a, b in zip((1, *tokens[:-1]), tokens, strict=True)]
    return found


def test_punctuation_of_a_byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["a", ".", ",", ")", "),", "Ġ.", "Ċ", "ĠĊ", ".Ċ", "x)", "Ġ"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert punctuation_ids(fast, "surface") == (1, 2, 3, 4, 5, 6, 7, 8)
    assert set(punctuation_ids(fast, "released")) >= {1, 2, 3}


def test_without_a_tokenizer_the_ids_must_be_given():
    with pytest.raises(ResourceError, match="punctuation"):
        tiny.model().generate(**tiny.prompts((5,)), custom_generate=CNTP(), do_sample=True, max_new_tokens=3)


def test_a_models_tokenizer_is_read_once(monkeypatch):
    from transformers import AutoTokenizer

    loaded = []

    def load(name):
        loaded.append(name)
        return tiny.tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    model, inputs = tiny.model(), tiny.prompts((5,))

    def run(**options):
        model.generate(**inputs, custom_generate=CNTP(**options), do_sample=True, max_new_tokens=3)
        return loaded

    model.name_or_path = "one"
    assert run() == run() == ["one"]
    assert run(punctuation="released") == run(punctuation="released") == ["one", "one"]
    model.name_or_path = "two"
    assert run() == run() == ["one", "one", "two"]


def test_devices_without_float64_add_up_in_float32():
    for device, dtype, wanted in (
        ("cpu", torch.float32, torch.float64),
        ("mps", torch.float32, torch.float32),
        ("mps", torch.float64, torch.float64),
    ):
        assert _precision(SimpleNamespace(device=torch.device(device), dtype=dtype)) == wanted

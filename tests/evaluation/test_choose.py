"""`choose`: the taxonomy is complete and honest, filters hold, and what is recommended follows from the figures."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from tests.evaluation import tiny_text
from tokenry import cli
from tokenry.catalogue import BY_SLUG, CACHE, EXACTNESS, ROWS, TRAINING, TRAITS, WAYS
from tokenry.errors import BadParameter, UnsupportedModel
from tokenry.evaluation import Allowed, Spread, choose, compare, family_pages
from tokenry.evaluation.choose import _choice, _standings, candidates, recommendation, taxonomy
from tokenry.evaluation.running import Runner
from tokenry.methods import load_class, method
from tokenry.workloads import Example

MODEL, TOKENIZER = tiny_text.model(), tiny_text.tokenizer()
PROMPTS = [Example("a b a b a b a b", "a b", lambda text: 1.0), "x = 1\nx = 1\n"]
FAMILIES = ("generation", "decoding", "speculation", "kvcache", "peers")
QUICK = {"max_new_tokens": 8, "repeats": 1, "progress": False}


# --- the taxonomy -------------------------------------------------------------------------------


def test_every_way_to_generate_has_its_place_once():
    placed = {form.partition(":")[0] for form in TRAITS}
    able = {row.slug for row in ROWS if row.available and row.family in FAMILIES}
    others = {slug for slug in able if load_class(slug).role in ("trainer", "chooser")}
    assert able - others <= placed
    assert placed <= {row.slug for row in ROWS if row.family in FAMILIES}
    for form, traits in TRAITS.items():
        assert traits.way in WAYS and traits.exactness in EXACTNESS
        assert traits.training in TRAINING and traits.cache in CACHE
        if BY_SLUG[form.partition(":")[0]].available:
            assert str(method(form)) == form


@pytest.mark.parametrize("form", [form for form in TRAITS if BY_SLUG[form.partition(":")[0]].available])
def test_a_place_agrees_with_the_class(form):
    made, traits = method(form), TRAITS[form]
    if made.role == "decoder" and made.slug != "plain":
        promises = bool(getattr(made, "drafts", False)) and getattr(made, "lossless", True) is True
        assert promises == (traits.exactness == "distribution")
    if made.role == "policy":
        assert traits.exactness == "approximate" and traits.way in ("memory", "control")
    if made.role == "peer":
        assert traits.batches == type(made).batches
    if {"draft", "small"} & set(type(made).resources):
        assert traits.second_model


def test_filters_never_let_through_what_may_not_change():
    for weights, distribution, second, sampled, batch in product([False, True], repeat=5):
        allowed = Allowed(
            weights=weights, distribution=distribution, second_model=second, sampled=sampled, batch_size=1 + batch
        )
        kept, out = candidates(allowed)
        assert "plain" in kept and not set(kept) & set(out)
        for form in kept:
            traits = TRAITS[form]
            assert distribution or traits.exactness == "distribution" or (traits.exactness == "greedy" and not sampled)
            assert weights or traits.training in ("none", "table")
            assert second or not traits.second_model
            assert traits.samples or not sampled
            assert traits.batches or not batch
        assert all(out.values())
    # Whoever may change more has no fewer candidates.
    strict, free = Allowed(), Allowed(weights=True, distribution=True, second_model=True)
    assert set(candidates(strict)[0]) < set(candidates(free)[0])
    assert "no second model" in candidates(strict)[1]["draft-model"]
    assert "weights" in candidates(strict)[1]["gated-lora-mtp"]
    assert "output" in candidates(strict)[1]["h2o"]


def test_docs_hold_the_taxonomy():
    page = Path(__file__).parents[2] / "docs" / "decoding.md"
    assert taxonomy("generation", "decoding", "speculation") in page.read_text(encoding="utf-8")


# --- measuring ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen():
    return choose(MODEL, TOKENIZER, PROMPTS, **QUICK)


def test_all_that_remains_is_measured_in_one_comparison_and_the_rest_has_a_reason(chosen):
    kept, out = candidates(Allowed())
    ran = {standing.method.partition(":")[0] for standing in chosen.standings}
    assert {form.partition(":")[0] for form in kept} <= ran | {form.partition(":")[0] for form in chosen.left_out}
    assert set(out) <= set(chosen.left_out)
    assert {"plain", "transformers", "prompt-lookup", "token-recycling", "goose", "suffix"} <= ran
    assert {row.label for row in chosen.comparison.rows} == {standing.label for standing in chosen.standings}
    assert all(row.lossless in (None, "yes") for row in chosen.comparison.rows)


def test_json_has_every_figure_and_text_the_sentence(chosen):
    data = json.loads(chosen.to_json())
    assert data["kind"] == "choice" and data["recommended"] == chosen.method
    assert len(data["comparison"]["rows"]) == len(chosen.comparison.rows)
    assert {"speed", "kv_bytes", "quality", "pairs"} <= set(data["comparison"]["rows"][0])
    assert data["left_out"] == chosen.left_out and data["comparison"]["machine"]
    text = str(chosen)
    assert chosen.reason.split()[0] in text and "left out h2o" in text
    method(data["recommended"])


def test_a_second_model_that_does_not_fit_and_other_errors_are_left_out_with_the_reason():
    found = choose(
        MODEL, TOKENIZER, PROMPTS, allowed=Allowed(second_model=True), draft="./no-such-model", methods=["cntp"],
        **QUICK,
    )  # fmt: skip
    assert "no-such-model" in found.left_out["draft-model"]
    # What was asked for by name is measured beside, and it cannot slip into a choice that it does not fit.
    assert any(standing.label == "cntp (sampled)" for standing in found.standings)


@pytest.mark.parametrize("options", [{"goal": "fame"}, {"loss": 2.0}, {"budget": 0.0}])
def test_what_is_not_allowed_is_refused(options):
    with pytest.raises(BadParameter):
        choose(MODEL, TOKENIZER, PROMPTS, **QUICK, **options)


def test_a_page_tells_what_was_recommended_and_not_by_speeds_of_few_pairs(chosen, tmp_path):
    data = json.loads(chosen.to_json())
    path = tmp_path / "choice.json"
    path.write_text(json.dumps(data))
    pages = family_pages([path])
    assert {"decoding", "speculation"} <= set(pages)
    assert "most tokens per second, where nothing may change: fewer than 7" in pages["decoding"]
    assert "### parallel-generation-survey" in pages["decoding"] and chosen.reason not in pages["decoding"]
    for standing in data["standings"]:
        standing["speed"]["count"] = 7
    data["allowed"]["second_model"] = True
    assert recommendation(data).endswith(
        f"where second model may change, recommends `{chosen.recommended}` among {len(chosen.standings)} ways: "
        f"{chosen.reason}."
    )


def test_a_model_that_tokenrys_loop_does_not_serve_is_left_to_transformers():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = choose(model, TOKENIZER, PROMPTS, **QUICK)
    assert found.method == found.recommended == "transformers"
    refused = found.left_out["plain"]
    assert "key-value cache" in refused and refused in found.reason and "token-recycling" in found.left_out
    assert all(standing.method.startswith("transformers") for standing in found.standings)
    data = json.loads(found.to_json())
    assert data["recommended"] == "transformers" and data["left_out"]["plain"] == refused


def test_where_nothing_runs_the_reason_is_plains(monkeypatch):
    def refuse(self, variant, *rest):
        raise UnsupportedModel(f"{variant.method} is not for this model")

    monkeypatch.setattr(Runner, "run", refuse)
    with pytest.raises(UnsupportedModel, match=r"plain is not for this model.*transformers is not for this model"):
        choose(MODEL, TOKENIZER, PROMPTS, **QUICK)


# --- from figures to a choice -------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return compare(MODEL, TOKENIZER, PROMPTS, ["plain", "prompt-lookup", "sinks:budget=16"], **QUICK)


def test_faster_than_transformers_is_not_enough_where_plain_is_faster_still(measured):
    figures = {"prompt-lookup": speed(1.1, 1.1, 1.2), "sinks": speed(0.5, 0.5, 0.5)}
    assert decided(measured, plain=speed(1.0, 1.0, 1.0), **figures).method == "prompt-lookup"
    assert decided(measured, plain=speed(1.3, 1.3, 1.3), **figures).method == "plain"


def decided(measured, goal="speed", loss=0.0, answers=100, **changed):
    """The choice from a comparison whose rows are given other figures."""
    changed.setdefault("plain", {})
    changed["plain"] = {**speed(1.0, 1.0, 1.0), **changed["plain"]}
    rows = tuple(replace(row, **{"quality": 0.5, **changed.get(row.method.partition(":")[0], {})})
                 for row in measured.rows)  # fmt: skip
    found = replace(measured, rows=rows)
    standings = _standings(found, {"sinks:budget=16": "sinks"}, {"prompts": answers}, loss)
    return _choice(standings, found, goal, Allowed(distribution=True), {})


def speed(*pairs):
    return {"pairs": pairs, "speed": Spread.of(pairs)}


def test_the_fastest_is_chosen_if_it_is_faster_beyond_the_spread(measured):
    fast, unsure, slow = speed(1.4, 1.5, 1.6), speed(0.7, 0.8, 1.6, 1.7, 1.8), speed(0.5, 0.5, 0.6)
    found = decided(measured, **{"prompt-lookup": fast, "sinks": slow})
    assert found.method == "prompt-lookup" and "1.50×" in found.reason and "plain's own output" in found.reason
    assert "too few" in found.reason
    assert decided(measured, **{"prompt-lookup": unsure, "sinks": slow}).method == "plain"
    assert "beyond the spread" in decided(measured, **{"prompt-lookup": unsure, "sinks": slow}).reason


def test_what_is_broken_or_answers_worse_is_not_chosen_however_fast(measured):
    fast, faster = speed(1.4, 1.5, 1.6), speed(3.0, 3.0, 3.0)
    broken = decided(measured, **{"prompt-lookup": {**faster, "broken": 1}, "sinks": fast})
    assert broken.method == "sinks:budget=16" and "another output" in broken.reason
    worse = {"prompt-lookup": fast, "sinks": {**faster, "quality": 0.4}}
    assert decided(measured, **worse).method == "prompt-lookup"
    assert decided(measured, loss=0.2, **worse).method == "sinks:budget=16"
    # Where plain knows nothing, knowing nothing is no merit.
    blind = {"prompt-lookup": {**fast, "quality": 0.0}, "sinks": {**faster, "quality": 0.0}, "plain": {"quality": 0.0}}
    assert decided(measured, **blind).method == "prompt-lookup"
    unknown = decided(measured, **{"prompt-lookup": fast, "sinks": {**faster, "quality": None}})
    assert unknown.method == "prompt-lookup"
    assert any(standing.against and "cannot be judged" in standing.against for standing in unknown.standings)


def test_goals_of_memory_and_quality(measured):
    light = {"kv_bytes": 1}
    found = decided(measured, "memory", sinks=light)
    assert found.method == "sinks:budget=16" and "1 B of keys and values" in found.reason
    heavy = {"kv_bytes": 10**9}
    assert decided(measured, "memory", **{"sinks": heavy, "prompt-lookup": heavy}).method == "plain"
    assert decided(measured, "quality", sinks={"quality": 0.9}).method == "sinks:budget=16"
    # A tenth more of ten answers is luck: two standard errors are 0.44.
    assert decided(measured, "quality", answers=10, sinks={"quality": 0.6}).method == "plain"


# --- the command --------------------------------------------------------------------------------


def test_command_on_a_folder(capsys, tmp_path):
    folder = tiny_text.folder(tmp_path / "tiny")
    prompts = tmp_path / "my.jsonl"
    prompts.write_text('{"prompt": "a b a b", "answer": "a"}\n"def f(x):"\n')
    out = tmp_path / "choice.json"
    arguments = ["choose", "--model", str(folder), "--prompts", str(prompts), "--max-new-tokens", "6", "--repeats", "1",
                 "--distribution", "--goal", "memory", "--json", str(out), "--quiet"]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    data = json.loads(out.read_text())
    assert data["allowed"]["distribution"] and not data["allowed"]["weights"]
    assert any(standing["method"].startswith("h2o") for standing in data["standings"])
    assert data["label"] in printed and "goal: fewest bytes" in printed


def test_a_terminal_is_asked_for_what_is_not_given(monkeypatch):
    from tokenry import evaluation

    asked, given = [], {}

    def run(model, tokenizer, prompts, **options):
        given.update(options, prompts=prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "choose", run)
    monkeypatch.setattr(cli.comparing, "load_model", lambda model, *rest: asked.append(model) or (model, None))
    monkeypatch.setattr(cli.comparing.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli.comparing.sys.stdout, "isatty", lambda: True, raising=False)
    replies = {"Model": "./mine", "Prompts (a JSONL file) or workloads": "code,edit"}
    monkeypatch.setattr(cli.comparing.typer, "prompt", lambda text, default: asked.append(text) or replies[text])
    monkeypatch.setattr(cli.comparing.typer, "confirm", lambda text, default: asked.append(text) or "second" in text)
    assert cli.main(["choose", "--weights"]) == 130
    assert asked[:2] == list(replies) and asked[-1] == "./mine"
    assert given["workloads"] == ["code", "edit"] and given["prompts"] is None
    assert given["allowed"] == Allowed(weights=True, second_model=True)
    assert not any("Weights" in text for text in asked)

"""Comparisons over a tiny random model: rows, JSON, HTML, partial results, refusals."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import tokenry
from tests.evaluation import tiny_text
from tokenry.errors import BadParameter, BadPrompt, MethodNotFound, PromptTooLong, ResourceError
from tokenry.evaluation import Comparison, bench_model, comparison
from tokenry.evaluation.running import Runner, Setting, Variant
from tokenry.workloads import Example

MODEL, TOKENIZER = tiny_text.model(), tiny_text.tokenizer()
DRAFT = tiny_text.model(seed=1, layers=1)
PROMPTS = ["def f(x):", "a b a b a b a b", "x = 1\nx = 1\n"]
METHODS = (
    "plain", "prompt-lookup", "token-recycling", "h2o:budget=16", "sinks:budget=16",
    "transformers-prompt-lookup", "transformers-assisted", "prompt-lookup+sinks:budget=16;compact_every=8", "cntp",
)  # fmt: skip


def compare(prompts=PROMPTS, methods=METHODS, **options) -> Comparison:
    options = {"max_new_tokens": 16, "repeats": 2, "resources": {"draft": DRAFT}, **options}
    return tokenry.compare(MODEL, TOKENIZER, prompts, methods, **options)


@pytest.fixture(scope="module")
def result() -> Comparison:
    return compare(trace=True, text="some text to read " * 4)


def test_every_method_has_a_row_and_the_reference_leads(result):
    assert [row.label for row in result.rows] == [
        "transformers", *METHODS[:-1], "transformers (sampled)", "plain (sampled)", "cntp (sampled)",
    ]  # fmt: skip
    assert not result.partial


def test_speed_is_a_ratio_to_the_reference_of_the_same_pair(result):
    reference = result.row("transformers")
    assert reference.pairs == (1.0, 1.0) and reference.speed.median == 1
    for row in result.rows:
        assert len(row.pairs) == row.speed.count == 2
        assert row.speed.lower <= row.speed.median <= row.speed.upper
        assert row.tokens_per_second.median > 0


def test_counts(result):
    plain = result.row("plain")
    assert plain.forwards == plain.tokens and plain.tokens_per_pass == plain.forwards_per_token == 1
    assert result.row("transformers").forwards == plain.forwards
    for label in ("prompt-lookup", "token-recycling"):
        row = result.row(label)
        assert row.forwards <= row.tokens and row.tokens_per_pass >= 1 and row.drafted >= row.accepted >= 0
    assert result.row("transformers-assisted").draft_forwards > 0
    for row in result.rows:
        # Each verify step commits what it accepted and one token of the model's own, but where an end cut it.
        assert row.accepted <= row.drafted and row.tokens <= row.accepted + row.passes
        assert len(row.drafted_to) == len(row.accepted_to) == len(row.acceptance)
        assert all(mine <= its for mine, its in zip(row.accepted_to, row.drafted_to, strict=True)), row.label
        assert list(row.drafted_to) == sorted(row.drafted_to, reverse=True)
        assert row.accepted <= sum(row.accepted_to)
        assert (row.drafter_seconds is None) == (row.method in ("transformers-prompt-lookup", "transformers"))
        assert not row.drafter_seconds or row.drafter_seconds < row.seconds
        assert len(row.tokens_per_pass_by_batch) == len(PROMPTS)
    assert result.row("token-recycling").drafted_to and result.row("transformers-assisted").drafted_to
    assert not plain.drafted_to and not result.row("transformers").drafted_to
    for label in ("h2o:budget=16", "sinks:budget=16"):
        assert 0 < result.row(label).kv_bytes < plain.kv_bytes


def test_lossless_is_claimed_only_of_methods_that_promise_it(result):
    for row in result.rows:
        promised = row.family in ("generation", "speculation", "peers") and not row.seeds
        promised &= row.label != "transformers"
        assert row.lossless == ("yes" if promised else None), row.label
        assert row.broken == row.near_ties == 0
        assert (row.agreement is None) == bool(row.seeds)
    assert result.row("token-recycling").agreement == 1


def test_bits_per_byte_of_plain_and_policies(result):
    plain = result.row("plain").bits_per_byte
    assert plain > 0 and result.row("plain (sampled)").bits_per_byte == plain
    assert result.row("h2o:budget=16").bits_per_byte not in (None, plain)
    assert result.row("token-recycling").bits_per_byte is None


def test_prints_as_tables(result):
    text = str(result)
    assert "prompts · 3 prompts" in text and "token-recycling" in text and "Fewer than 7 pairs" in text
    assert "sampled at temperature 1" in text and "\x1b" not in text
    # Every column must fit where nothing limits the width.
    assert "…" not in text


def test_json_holds_what_a_reader_needs(result, tmp_path):
    data = json.loads(result.to_json(tmp_path / "deep" / "r.json"))
    assert data == json.loads((tmp_path / "deep" / "r.json").read_text())
    assert data["schema_version"] == 1 and data["kind"] == "comparison" and data["partial"] is False
    assert set(data) == {
        "schema_version", "kind", "partial", "created", "model", "resources", "machine", "versions", "settings",
        "workloads", "rows", "samples",
    }  # fmt: skip
    assert set(data["rows"][0]) == {
        "workload", "method", "label", "family", "setting", "speed", "tokens_per_second", "pairs", "tokens",
        "forwards", "passes", "draft_forwards", "seconds", "drafter_seconds", "steps", "drafted", "accepted",
        "drafted_to", "accepted_to", "forwards_per_token", "tokens_per_pass", "tokens_per_pass_by_batch",
        "tokens_per_step", "kv_bytes", "kv_peak_bytes", "quality", "quality_sd", "seeds", "agreement", "lossless",
        "near_ties", "broken", "bits_per_byte",
    }  # fmt: skip
    assert data["rows"][0]["speed"] == {"median": 1.0, "lower": 1.0, "upper": 1.0, "count": 2}
    assert {"torch", "transformers", "tokenry", "python"} <= set(data["versions"])
    assert {"cpu", "cores", "threads"} <= set(data["machine"])
    assert data["model"]["dtype"] == "float32" and re.fullmatch(r"[0-9a-f]{12,}", data["model"]["weights_hash"])
    assert data["resources"][0]["method"] == "transformers-assisted"
    assert data["workloads"][0]["prompts"] == 3
    # Text forms read back.
    assert [str(tokenry.method(row["method"])) for row in data["rows"]] == [row["method"] for row in data["rows"]]


def test_html_is_one_file_with_all_rows(result, tmp_path):
    page = result.to_html(tmp_path / "report.html")
    assert page == (tmp_path / "report.html").read_text()
    assert not re.search(r"(https?:)?//|<link|<script|src=|@import|url\(", page)
    for row in result.rows:
        assert page.count(row.label) >= 3, row.label
    assert page.count("<svg") >= 2 and "prefers-color-scheme: dark" in page
    assert "closes a verify step" in page and "Cached at the end" in page
    assert "nan" not in page.split("</style>")[1].split("Token by token")[0].lower()


def test_html_can_be_made_from_the_json_alone(result):
    from tokenry.evaluation.report import render

    assert render(json.loads(result.to_json())) == result.to_html()


def test_samples_show_sources_and_kept_tokens(result):
    by_label = {sample.label: sample for sample in result.samples}
    drafted = by_label["token-recycling"]
    assert {source for _, source in drafted.tokens} <= {"draft", "bonus", "plain"}
    assert {source for _, source in by_label["transformers"].tokens} == {""}
    assert by_label["plain"].kept is None
    kept = by_label["sinks:budget=16"].kept
    assert len(kept["prefill"]) == len(PROMPTS[0]) + 1 and len(kept["end"]) == len(PROMPTS[0]) + 16
    assert sum(kept["end"]) <= 16 + 1e-3 and kept["end"][0] == 1
    assert "".join(by_label["sinks:budget=16"].prompt_tokens) == PROMPTS[0]


def test_same_seed_same_tokens_and_callers_generator_untouched():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second = (compare(methods=["cntp"], seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [sample.tokens for sample in first.samples] == [sample.tokens for sample in second.samples]
    other = compare(methods=["cntp"], seed=4)
    assert [sample.tokens for sample in first.samples] != [sample.tokens for sample in other.samples]


def test_everything_sampled_or_greedy_on_request():
    assert {row.seeds for row in compare(methods=["prompt-lookup"], sample=True, seeds=2).rows} == {2}
    assert {row.seeds for row in compare(methods=["cntp"], sample=False).rows} == {0}


def test_answers_are_scored_and_new_tokens_follow_them():
    examples = [Example("abc", "x" * 90, lambda output: float(len(output) > 0)), Example("d", "y", lambda output: 0.0)]
    found = tokenry.compare(MODEL, TOKENIZER, {"mine": examples}, ["plain"], repeats=1)
    assert found.row("plain").quality == 0.5
    assert found.about["workloads"][0]["max_new_tokens"] == 94
    sampled = tokenry.compare(
        MODEL, TOKENIZER, {"mine": examples}, ["plain"], repeats=1, sample=True, seeds=3, max_new_tokens=4
    ).row("plain (sampled)")
    assert sampled.quality == 0.5 and sampled.quality_sd == 0 and sampled.seeds == 3


def test_batches_are_measured_and_compared_as_batches():
    found = compare(methods=["plain", "token-recycling"], batch_size=2)
    assert [row.lossless for row in found.rows] == [None, "yes", "yes"]
    plain = found.row("plain")
    assert plain.tokens_per_pass == 1 and plain.forwards < plain.tokens
    with pytest.raises(BadParameter, match="one prompt at a time"):
        compare(methods=["transformers-prompt-lookup"], batch_size=2)


def test_half_precision_runs():
    model = tiny_text.model(dtype=torch.bfloat16)
    found = tokenry.compare(model, TOKENIZER, PROMPTS, ["token-recycling"], repeats=1, max_new_tokens=12)
    assert found.row("token-recycling").lossless.startswith("yes")
    assert found.about["model"]["dtype"] == "bfloat16"


def test_ignore_eos_gives_equal_lengths_and_tail_short_prompts():
    found = compare(methods=["plain"], ignore_eos=True, tail=4)
    assert found.row("plain").tokens == found.row("transformers").tokens == 3 * 16
    assert found.about["workloads"][0]["prompt_tokens"] == 4


def test_a_lone_prompt_and_a_lone_method_are_taken():
    assert compare(prompts="hello", methods="plain").row("plain").tokens > 0


def test_interruption_returns_complete_pairs(monkeypatch):
    run, calls = Runner.run, []

    def interrupted(self, variant, *args):
        calls.append(variant.label)
        if len(calls) == 2 + 2 * 3 + 1:  # warm-ups, one pair of three prompts, one run more
            raise KeyboardInterrupt
        return run(self, variant, *args)

    monkeypatch.setattr(Runner, "run", interrupted)
    found = compare(methods=["plain"], prompts=PROMPTS * 7, repeats=7)
    assert found.partial and [row.speed.count for row in found.rows] == [1, 1]
    assert "Interrupted" in str(found) and json.loads(found.to_json())["partial"] is True
    page = found.to_html()
    assert "Interrupted" in page and "1 interleaved pair," in page and "Fewer than 7 pairs" in page


def test_interruption_before_the_first_pair_still_returns(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", interrupted)
    found = compare()
    assert found.partial and found.rows == () and "nothing was measured" in str(found)
    assert "Nothing was measured" in found.to_html()


def test_interruption_of_the_checks_keeps_the_rows(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "check_lossless", interrupted)
    found = compare(methods=["plain"])
    assert found.partial and found.row("plain").lossless is None and found.row("plain").speed.count == 2


def test_order_rotates(monkeypatch):
    run, calls = Runner.run, []

    def noted(self, variant, *args):
        calls.append(variant.label)
        return run(self, variant, *args)

    monkeypatch.setattr(Runner, "run", noted)
    compare(methods=["plain", "prompt-lookup"], prompts=["a"], repeats=3)
    names = ["transformers", "plain", "prompt-lookup"]
    assert calls == names + names + names[1:] + names[:1] + names[2:] + names[:2]


@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"methods": ["token-recyling"]}, MethodNotFound, "did you mean token-recycling"),
        ({"methods": ["sinks:budget=-1"]}, BadParameter, "budget"),
        ({"prompts": ["fine", "  "]}, BadPrompt, "prompt 2 is empty"),
        ({"prompts": []}, BadPrompt, "no prompts"),
        ({"prompts": [3]}, BadPrompt, "not int"),
        ({"prompts": ["x" * 250]}, PromptTooLong, "250 tokens.*context of 256"),
        ({"prompts": None, "workloads": ["cod"]}, BadParameter, "no workload 'cod'"),
        ({"prompts": "missing.jsonl"}, BadPrompt, "no prompt file"),
        ({"repeats": 0}, BadParameter, "at least 1"),
        ({"batch_size": 0}, BadParameter, "batch_size=0"),
        ({"temperature": 0.0}, BadParameter, "temperature"),
        ({"temperature": math.nan}, BadParameter, "temperature"),
        ({"text": " \n"}, BadPrompt, "bits per byte on is empty"),
        ({"resources": {"drafd": DRAFT}}, BadParameter, "'drafd' is no resource of any method; there are .*draft"),
        ({"top_p": 1.5}, BadParameter, "top_p"),
        ({"methods": []}, BadParameter, "no methods"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        compare(**options)
    assert not MODEL._forward_hooks and not MODEL._forward_pre_hooks


def test_row_is_found_by_label_and_workload(result):
    assert result.row("plain", "prompts").label == "plain"
    with pytest.raises(BadParameter, match="no row for 'x'"):
        result.row("x")


def test_a_policys_label_names_its_budget_even_where_it_is_the_default():
    def label(text):
        return Variant(tokenry.method(text), Setting()).label

    assert label("h2o") == "h2o:budget=256" and label("h2o:budget=9") == "h2o:budget=9"
    assert label("prompt-lookup+h2o:compact_every=8") == "prompt-lookup+h2o:budget=256;compact_every=8"
    assert label("token-recycling") == "token-recycling"


def test_settings_say_themselves():
    assert str(Setting()) == "greedy"
    assert str(Setting(True, 0.7, 0.9, 40)) == "sampled at temperature 0.7, top-p 0.9, top-k 40"


def test_json_has_no_nan():
    assert comparison.Comparison(rows=()).to_dict()["rows"] == []
    assert math.isnan(comparison.Spread.of([]).median)


def test_a_row_is_named_after_what_ran():
    asked, ran = "token-recycling+h2o:budget=16", "token-recycling+h2o:budget=16;compact_every=16"
    found = compare(methods=[asked, "h2o:budget=16"], text="some text to read " * 8)
    row = found.row(ran)
    assert row.method == row.label == ran and found.row(asked) is row
    assert row.bits_per_byte != found.row("h2o:budget=16").bits_per_byte


def test_prompts_without_an_answer_are_not_scored():
    examples = [Example("abc", "x", lambda output: 0.0), Example("d", "", lambda output: 1.0)]
    found = tokenry.compare(MODEL, TOKENIZER, {"mine": examples}, ["plain"], repeats=1, max_new_tokens=4)
    assert found.row("plain").quality == 0
    assert compare(methods=["plain"]).row("plain").quality is None


def test_half_a_character_is_refused():
    with pytest.raises(BadPrompt, match="half of a character"):
        compare(prompts=["abc", "\ud83d x"])


def test_a_path_is_never_a_workloads_name(tmp_path):
    with pytest.raises(BadPrompt, match="no prompt file"):
        compare(prompts=Path("arithmetic"))
    with pytest.raises(BadPrompt, match="is a folder"):
        compare(prompts=tmp_path)


def test_every_batch_size_is_warmed_up(monkeypatch):
    run, calls = Runner.run, []

    def noted(self, variant, batch, max_new_tokens, seed):
        calls.append((variant.label, len(batch.examples), max_new_tokens))
        return run(self, variant, batch, max_new_tokens, seed)

    monkeypatch.setattr(Runner, "run", noted)
    compare(methods=["plain"], batch_size=2, repeats=1)
    assert calls[:4] == [("transformers", 2, 8), ("plain", 2, 8), ("transformers", 1, 8), ("plain", 1, 8)]
    assert len(calls) == 8 and {tokens for *_, tokens in calls[4:]} == {16}


def test_a_draft_of_another_vocabulary_is_refused():
    draft = tiny_text.model(layers=1)
    draft.resize_token_embeddings(300)
    with pytest.raises(ResourceError, match="300 tokens"):
        bench_model(MODEL, TOKENIZER, draft=draft)

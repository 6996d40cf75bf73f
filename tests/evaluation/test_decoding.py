"""The bench of the decoders: what it counts, what it checks, and what it says of that which cannot run."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.decoding import byte_tokenizers as kinds
from tests.evaluation import tiny_text
from tokenry import cli
from tokenry.decoding import ByteEnsemble
from tokenry.errors import BadParameter
from tokenry.evaluation import bench_decoding, family_pages
from tokenry.evaluation.decoding import (
    PARTS,
    PROMISES,
    DecodingBench,
    Figure,
    Promise,
    byte_view,
    cntp,
    navigation,
    ordered,
    superposed,
)
from tokenry.evaluation.decoding.results import SPEED
from tokenry.generation import generate
from tokenry.models import load
from tokenry.workloads import examples

MODEL, TOKENIZER = tiny_text.model(context=4096), tiny_text.tokenizer()


def figure(way, *values, part="cntp", name="right answers"):
    return Figure(part=part, way=way, figure=name, values=values, forwards_per_token=1.0, seconds=0.0)


def promise(**options):
    known = {"name": "a-b", "part": "cntp", "statement": "a above b", "figure": "right answers", "ahead": "a",
             "behind": "b", "otherwise": "too small"}  # fmt: skip
    return Promise(**known | options)


# --- checks -------------------------------------------------------------------------------------


def test_an_ordering_is_judged_by_means_and_its_spread_seed_by_seed():
    figures = [figure("a", 0.5, 0.6, 0.7), figure("b", 0.4, 0.5, 0.6)]
    (check,) = ordered(figures, [promise(strict=True)])
    assert check.passed and check.clear and check.reason == ""
    assert check.difference.median == pytest.approx(0.1) and check.difference.count == 3
    (check,) = ordered(figures, [promise(ahead="b", behind="a")])
    assert not check.passed and check.clear and check.reason == "possibly because too small"
    (check,) = ordered(figures, [promise(ahead="b", behind="a", smaller=True)])
    assert check.passed and check.difference.median == pytest.approx(0.1)
    (check,) = ordered([figure("a", 0.0, 0.9, 0.5), figure("b", 0.5, 0.3, 0.5)], [promise()])
    assert check.passed and not check.clear


def test_equality_is_enough_unless_strict_and_one_side_alone_is_no_check():
    same = [figure("a", 0.5, 0.5), figure("b", 0.5, 0.5)]
    assert ordered(same, [promise()])[0].passed and not ordered(same, [promise(strict=True)])[0].passed
    assert ordered(same, [promise(strict=True)])[0].reason == "both are equal"
    assert ordered(same[:1], [promise()]) == []
    assert ordered([figure("a", 1.0, name="other"), same[1]], [promise()]) == []


def test_promises_are_named_once_and_belong_to_a_part():
    assert len({each.name for each in PROMISES}) == len(PROMISES)
    assert {each.part for each in PROMISES} == set(PARTS)


# --- counting -----------------------------------------------------------------------------------


def test_log_probabilities_and_nats_are_the_models_own():
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "output_scores": True}
    result = generate(MODEL, TOKENIZER, ["ab", "xy"], seed=0, **options)
    expected = []
    for row, new in zip(result.sequences, result.new_tokens, strict=True):
        ids = [*row[:2].tolist(), *new]
        with torch.no_grad():
            logs = MODEL(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logs[place - 1, ids[place]]) for place in range(2, len(ids))) / len(new))
    assert cntp.mean_log_probs(result) == pytest.approx(expected, abs=1e-4)
    assert superposed.nats(MODEL, result) == pytest.approx([-each for each in expected], abs=1e-4)


def test_votes_overlaps_and_matches():
    texts = ["answer 3.", "x; answer 5.", "nothing", "y; answer 5."]
    assert cntp.vote(texts) == "answer 5."
    assert cntp.vote(["nothing", "either"]) == "nothing"
    assert superposed.overlaps([[1, 2], [1, 3], [1, 2]], 3) == [pytest.approx((0.5 + 1 + 0.5) / 3)]
    assert byte_view.matched(["b)\nmore", "c"], ["b)", "b)"]) == 0.5


def test_lines_are_cut_at_every_byte_behind_their_indentation():
    line = byte_view.Line("def f():\n", "    ab = 1", "    return ab")
    assert line.cuts == [("def f():\n    " + "ab = 1"[:cut], "ab = 1"[cut:]) for cut in range(1, 6)]
    for each in byte_view.lines(3):
        assert len(each.text.strip()) <= 40
        assert all(before.endswith(each.text[: -len(rest)]) for before, rest in each.cuts)


def test_a_context_is_what_stands_before_the_question_with_the_names_of_its_constants():
    (example,) = examples("recall", 1, keys=20, length=2400)
    context, names = navigation.planted(example.prompt)
    assert len(names) == 20 and example.prompt.startswith(context) and "# recall" not in context
    assert all(f'KEY_{name} = "' in context for name in names)


# --- the bench ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    small = str(tiny_text.folder(tmp_path_factory.mktemp("small") / "one", layers=1))
    monkey = pytest.MonkeyPatch()
    # A random model never ends; what is measured of it is how it is counted.
    monkey.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkey.setattr(navigation, "LISTS", dict(list(navigation.LISTS.items())[:2]))
    found = bench_decoding(
        MODEL, TOKENIZER, parts=["r2r", "skipdecode", "superposed", "navigation"], limit=2, seeds=2, small=small,
        progress=False,
    )  # fmt: skip
    monkey.undo()
    return found


def test_every_part_gives_a_value_a_seed_with_its_costs(measured):
    assert {each.part for each in measured.figures} == {"r2r", "skipdecode", "superposed", "navigation"}
    assert all(len(each.values) == 2 and each.seconds >= 0 for each in measured.figures)
    ways = {each.way: each for each in measured.figures}
    # A pass a token: what plain takes.
    assert ways["plain"].forwards_per_token == pytest.approx(1)
    assert ways["r2r:rule=random;threshold=2.0"].note == "share of the model 0%"
    assert ways["plain"].note == "share of the model 100%"
    assert "skip" in ways and "early exit" in ways and ways["all layers"].mean > 0
    assert "best of the drafts" not in ways and "nucleus" in ways


def test_what_cannot_run_says_what_to_train(measured):
    assert "tokenry train router" in measured.skipped["r2r:share=0.1"]
    assert "tokenry train ngram" in measured.skipped["superposed-decoding"]
    assert "early" in measured.skipped["early exit, tuned"] and "skip, tuned" in measured.skipped
    assert "skipped r2r:share=0.1" in str(measured)


def test_json_has_figures_and_checks(measured):
    data = json.loads(measured.to_json())
    assert data["kind"] == "decoding" and len(data["figures"]) == len(measured.figures)
    assert data["figures"][0]["mean"] == pytest.approx(measured.figures[0].mean)
    assert {check["name"] for check in data["checks"]} == {check.name for check in measured.checks}
    assert "navigation-above-ranking" in {check.name for check in measured.checks}
    assert data["beside"]["small"]["weights_hash"] != data["model"]["weights_hash"]


def test_parts_and_numbers_are_checked():
    for options in ({"parts": ["cn"]}, {"seeds": 1}, {"limit": 0}):
        with pytest.raises(BadParameter):
            bench_decoding(MODEL, TOKENIZER, **options)


def test_ctrl_c_keeps_what_is_measured(monkeypatch):
    def stopped(bench):
        raise KeyboardInterrupt

    monkeypatch.setattr(navigation, "measure", stopped)
    assert bench_decoding(MODEL, TOKENIZER, parts=["navigation"], progress=False).partial


def test_command(capsys, tmp_path):
    path = tmp_path / "tiny"
    tiny_text.model(context=1024).save_pretrained(path)
    tiny_text.tokenizer().save_pretrained(path)
    arguments = ["bench", "decoding", "--model", str(path), "--part", "skipdecode", "--limit", "1", "--seeds", "2"]
    assert cli.main([*arguments, "--json", str(tmp_path / "d.json"), "--quiet"]) == 0
    assert json.loads((tmp_path / "d.json").read_text())["settings"]["seeds"] == 2
    assert "Fewer than 5 seeds" in capsys.readouterr().out


# --- the byte view ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked():
    """A pair whose tokenizer has merges and the marks of fill-in-the-middle, and another with neither."""
    tokenizer = kinds.trained()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"]})
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def test_lines_are_completed_and_filled_in_side_by_side_and_members_read_alone(marked, tmp_path, monkeypatch):
    partner = tmp_path / "partner"
    MODEL.save_pretrained(partner)
    TOKENIZER.save_pretrained(partner)
    short = [byte_view.Line("def f(x):\n    y = x\n", "    return y", "\n")] * 4
    monkeypatch.setattr(byte_view, "lines", lambda count: short[:count])
    monkeypatch.setattr(byte_view, "_LINE", 4)
    found = bench_decoding(*marked, parts=["bytes"], limit=2, seeds=2, partner=str(partner), progress=False)
    assert not found.skipped
    scores = {each.way: each for each in found.figures if each.figure == "exact match"}
    ways = ("plain", "exact-byte-probabilities", "exact-byte-probabilities:unit=token")
    assert {f"{way}, {task}" for way in ways for task in ("completion", "infill")} < set(scores)
    speeds = [each for each in found.figures if each.figure == SPEED]
    assert len(speeds) == 5 and all(len(each.values) == 2 and min(each.values) > 0 for each in speeds)
    bits = {each.way: each.values for each in found.figures if each.figure == "bits per byte"}
    text = short[0].before + short[0].text + "\n" + short[0].after
    for name, pair in (("member 1", marked), ("member 2", load(partner))):
        alone = ByteEnsemble([pair], paths="fast").bits_per_byte(text)
        assert bits[name] == pytest.approx([alone, alone], rel=1e-5)
    # The logarithm is concave.
    assert all(both <= mean for both, mean in zip(bits["ensemble"], bits["mean of the members"], strict=True))
    assert {check.name for check in found.checks} >= {"bytes-ensemble", "bytes-above-tokens-infill"}
    assert found.to_dict()["beside"]["partner"]["parameters"] > 0
    page = family_pages([written(tmp_path / "r.json", found)])["decoding"]
    # Two pairs bear out no speed, two seeds no ordering.
    assert "exact match" in page and f"| {SPEED} |" not in page and "#### Checks" not in page


# --- pages --------------------------------------------------------------------------------------


def written(path, bench):
    path.write_text(bench.to_json())
    return path


def bench_of(count, measured):
    """A bench of `count` seeds with the facts of a measured one."""
    figures = (
        figure("cntp", *[0.75] * count), figure("plain (sampled)", *[0.5] * count),
        figure("plain, completion", *[0.25] * count, part="bytes", name="exact match"),
        figure("cntp, speed", *[1.5] * count, part="bytes", name=SPEED),
    )  # fmt: skip
    checks = tuple(ordered(figures, [promise(name="cntp-x", ahead="cntp", behind="plain (sampled)", strict=True)]))
    return DecodingBench(figures=figures, checks=checks, skipped={"r2r": "no router"}, about=measured.about)


def test_pages_say_what_was_measured_and_claim_only_what_seeds_and_pairs_bear_out(measured, tmp_path):
    page = family_pages([written(tmp_path / "five.json", bench_of(5, measured))])["decoding"]
    assert "right answers (five.json:" in page and "`cntp` 0.750 ± 0.000, `plain (sampled)` 0.500 ± 0.000." in page
    assert "### exact-byte-probabilities" in page and "**Claimed:**" in page
    assert "#### Checks" in page and "| a above b |" in page and "- Skipped `r2r`: no router" in page
    assert "1.500" not in page and "- small: " in page
    assert "1.500" in family_pages([written(tmp_path / "seven.json", bench_of(7, measured))])["decoding"]
    few = family_pages([written(tmp_path / "four.json", bench_of(4, measured))])["decoding"]
    assert "#### Checks" not in few and "fewer than 5: no ordering should be claimed" in few

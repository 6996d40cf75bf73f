"""The bench of the decoders: what it counts, what it checks, and what it says of that which cannot run."""

import json

import pytest
import torch

from tests.evaluation import tiny_text
from tokenry import cli
from tokenry.errors import BadParameter
from tokenry.evaluation import bench_decoding, decoding
from tokenry.evaluation.decoding import PROMISES, Figure, Promise, ordered
from tokenry.generation import generate

MODEL, TOKENIZER = tiny_text.model(context=1024), tiny_text.tokenizer()


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
    assert {each.part for each in PROMISES} == set(decoding.PARTS)


# --- counting -----------------------------------------------------------------------------------


def test_log_probabilities_and_nats_are_the_models_own():
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "output_scores": True}
    result = generate(MODEL, TOKENIZER, ["ab", "xy"], seed=0, **options)
    bench = decoding._Bench(MODEL, TOKENIZER, 1, 2, "", None, None, None, 2, print, {})
    expected = []
    for row, new in zip(result.sequences, result.new_tokens, strict=True):
        ids = [*row[:2].tolist(), *new]
        with torch.no_grad():
            logs = MODEL(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logs[place - 1, ids[place]]) for place in range(2, len(ids))) / len(new))
    assert decoding._mean_log_probs(result) == pytest.approx(expected, abs=1e-4)
    assert bench._nats(result) == pytest.approx([-each for each in expected], abs=1e-4)


def test_votes_overlaps_and_matches():
    texts = ["answer 3.", "x; answer 5.", "nothing", "y; answer 5."]
    assert decoding._vote(texts) == "answer 5."
    assert decoding._vote(["nothing", "either"]) == "nothing"
    assert decoding._overlaps([[1, 2], [1, 3], [1, 2]], 3) == [pytest.approx((0.5 + 1 + 0.5) / 3)]
    assert decoding._matched(["b)\nmore", "c"], ["b)", "b)"]) == 0.5


def test_lines_are_cut_at_every_byte_behind_their_indentation():
    line = decoding._Line("def f():\n", "    ab = 1", "    return ab")
    assert line.cuts == [("def f():\n    " + "ab = 1"[:cut], "ab = 1"[cut:]) for cut in range(1, 6)]
    for each in decoding._lines(3):
        assert len(each.text.strip()) <= decoding._LINE and all(b.endswith(t[: -len(r)]) for (b, r), t in
                                                                [(cut, each.text) for cut in each.cuts])  # fmt: skip


# --- the bench ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    small = str(tiny_text.folder(tmp_path_factory.mktemp("small") / "one", layers=1))
    monkey = pytest.MonkeyPatch()
    # A random model never ends; what is measured of it is how it is counted.
    monkey.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkey.setattr(decoding, "_VOTES", 2)
    monkey.setattr(decoding, "LISTS", dict(list(decoding.LISTS.items())[:2]))
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


def test_parts_and_numbers_are_checked():
    for options in ({"parts": ["cn"]}, {"seeds": 1}, {"limit": 0}):
        with pytest.raises(BadParameter):
            bench_decoding(MODEL, TOKENIZER, **options)


def test_ctrl_c_keeps_what_is_measured(monkeypatch):
    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding._Bench, "navigation", stopped)
    assert bench_decoding(MODEL, TOKENIZER, parts=["navigation"], progress=False).partial


def test_command(capsys, tmp_path):
    path = tmp_path / "tiny"
    tiny_text.model(context=1024).save_pretrained(path)
    tiny_text.tokenizer().save_pretrained(path)
    arguments = ["bench", "decoding", "--model", str(path), "--part", "skipdecode", "--limit", "1", "--seeds", "2"]
    assert cli.main([*arguments, "--json", str(tmp_path / "d.json"), "--quiet"]) == 0
    assert json.loads((tmp_path / "d.json").read_text())["settings"]["seeds"] == 2
    assert "Fewer than 5 seeds" in capsys.readouterr().out

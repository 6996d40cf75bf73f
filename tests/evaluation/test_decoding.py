"""The bench of the decoders: what it counts, what it checks, and what it says of that which cannot run."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.decoding import byte_tokenizers as kinds
from tests.evaluation import tiny_text
from tokenry import cli
from tokenry.decoding import ByteEnsemble, InContextNavigation, SkipDecode, Superposed
from tokenry.decoding.skipdecode.training import SkipDecodeTrainer, losses_by_index
from tokenry.errors import BadParameter, ResourceError
from tokenry.evaluation import bench_decoding, family_pages
from tokenry.evaluation.decoding import (
    PARTS,
    PROMISES,
    DecodingBench,
    Figure,
    Promise,
    byte_view,
    cntp,
    engine,
    named,
    navigation,
    ordered,
    r2r,
    skipdecode,
    superposed,
)
from tokenry.evaluation.decoding import bench as bench_module
from tokenry.evaluation.decoding.results import SPEED
from tokenry.generation import generate
from tokenry.models import load
from tokenry.workloads import examples, functions

# Of two layers, one that always runs and one above it, no schedule could skip any.
MODEL, TOKENIZER = tiny_text.model(context=4096, layers=3), tiny_text.tokenizer()


def few_functions(split):
    """Enough functions for what is asked of them here; to read all takes seconds."""
    return functions(split)[:150]


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    for part in (skipdecode, superposed):
        monkeypatch.setattr(part, "functions", few_functions)


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
    assert not check.passed and check.clear
    assert check.reason == "it held in 0 of 3; possibly because too small"
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
    monkey.setattr(navigation, "_LENGTH", 900)
    for part in (skipdecode, superposed):
        monkey.setattr(part, "functions", few_functions)
    monkey.setattr(skipdecode, "SkipDecodeTrainer", lambda: SkipDecodeTrainer(horizon=8))
    found = bench_decoding(
        MODEL, TOKENIZER, parts=["r2r", "skipdecode", "superposed", "navigation"], limit=2, seeds=2, small=small,
        progress=False,
    )  # fmt: skip
    monkey.undo()
    return found


def test_every_part_gives_a_value_a_seed_with_its_costs(measured):
    assert {each.part for each in measured.figures} == {"r2r", "skipdecode", "superposed", "navigation"}
    assert all(len(each.values) == (7 if each.figure == SPEED else 2) for each in measured.figures)
    assert all(each.seconds >= 0 for each in measured.figures)
    ways = {each.way: each for each in measured.figures if each.figure != "forwards a prompt"}
    # A pass a token: what plain takes.
    assert ways["plain"].forwards_per_token == pytest.approx(1)
    assert "skip" in ways and "early exit" in ways and ways["all layers"].mean > 0
    assert "best of the drafts" not in ways and "nucleus" in ways and "best of as many separate drafts" in ways


def test_r2r_says_what_share_and_what_small_model_stand_behind_its_answers(measured):
    found = {(each.way, each.figure): each for each in measured.figures if each.part == "r2r"}
    small = sum(each.numel() for each in tiny_text.model(layers=1).parameters()) / 1e6
    large = sum(each.numel() for each in MODEL.parameters()) / 1e6
    for way, share, size in (
        ("plain", 1.0, large), ("r2r:rule=random;threshold=2.0", 0.0, small),
        ("r2r:rule=random;share=1.0", 1.0, small + large),
    ):  # fmt: skip
        assert found[way, "share of the model"].values == pytest.approx((share, share))
        assert found[way, "million parameters a token"].values == pytest.approx((size, size))
        forwards = 0 if way == "plain" else 1
        note = f"share of the model {share:.1%}, {forwards:.2f} forwards of the small model a token, {size:.2f}M"
        assert found[way, "right answers"].note.startswith(note)
    (check,) = [check for check in measured.checks if check.name == "r2r-all"]
    assert check.passed and check.measured == {"r2r:rule=random;share=1.0": 1.0, "plain": 1.0}


def test_separate_drafts_are_all_paid_for(measured):
    (cost,) = [each for each in measured.figures if each.figure == "forwards a prompt"]
    # Three drafts of up to ten tokens, a forward for each.
    assert cost.way == "best of as many separate drafts" and all(20 < each <= 30 for each in cost.values)
    (best,) = [each for each in measured.figures if (each.way, each.figure) == (cost.way, "perplexity")]
    (one,) = [each for each in measured.figures if (each.part, each.way) == ("superposed", "nucleus")]
    assert best.mean < one.mean


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
    names = {check.name for check in measured.checks}
    assert {"navigation-above-ranking", "navigation-above-sampling", "navigation-lose-names"} < names
    assert {"navigation-lose-contexts", "navigation-gain-contexts"} < names
    assert {"navigation-vote", "navigation-vote-of-ranking"} < names
    assert all(check.reason or check.passed for check in measured.checks)
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


def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(skipdecode, "SkipDecodeTrainer", lambda: SkipDecodeTrainer(horizon=8))
    path = tmp_path / "tiny"
    tiny_text.model(context=1024, layers=3).save_pretrained(path)
    tiny_text.tokenizer().save_pretrained(path)
    arguments = ["bench", "decoding", "--model", str(path), "--part", "skipdecode", "--limit", "1", "--seeds", "2"]
    assert cli.main([*arguments, "--json", str(tmp_path / "d.json"), "--quiet"]) == 0
    assert json.loads((tmp_path / "d.json").read_text())["settings"]["seeds"] == 2
    assert "Fewer than 5 seeds" in capsys.readouterr().out
    # What must hold and does not: everything is shown and written, and the code is 1.
    both = {"part": "skipdecode", "figure": "layers a new token", "ahead": "skip", "behind": "all layers"}
    monkeypatch.setattr(bench_module, "PROMISES", (promise(**both, must=True),))
    assert cli.main([*arguments, "--json", str(tmp_path / "e.json"), "--quiet"]) == 1
    assert json.loads((tmp_path / "e.json").read_text())["checks"][0]["must"]
    assert "FAILED, it must hold" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["small", "tuned", "tuned_early", "partner"])
def test_what_is_named_must_be_there_before_anything_is_measured(option, monkeypatch):
    monkeypatch.setattr(navigation, "measure", lambda bench: pytest.fail("it was measured"))
    for name in ("./nope", ""):
        with pytest.raises((BadParameter, ResourceError), match=option):
            bench_decoding(MODEL, TOKENIZER, parts=["navigation"], **{option: name}, progress=False)


def test_command_refuses_a_misspelt_name(tmp_path, capsys):
    path = tiny_text.folder(tmp_path / "tiny")
    arguments = ["bench", "decoding", "--model", str(path), "--part", "cntp", "--quiet", "--small", "./nope"]
    assert cli.main(arguments) == 2
    assert "small: no model in './nope'" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["skipdecode", "superposed", "bytes"])
def test_more_texts_than_there_are_are_refused_with_the_largest_limit(part, monkeypatch):
    monkeypatch.setattr(PARTS[part], "measure", lambda bench: None)
    with pytest.raises(BadParameter, match=f"{part} has texts for a limit of") as error:
        bench_decoding(MODEL, TOKENIZER, parts=[part], limit=10**6, seeds=5, progress=False)
    most = int(re.search(r"limit of (\d+)", str(error.value))[1])
    bench_decoding(MODEL, TOKENIZER, parts=[part], limit=most, seeds=5, progress=False)
    with pytest.raises(BadParameter):
        bench_decoding(MODEL, TOKENIZER, parts=[part], limit=most + 1, seeds=5, progress=False)


# --- the parts ----------------------------------------------------------------------------------


def tuned_folder(path, use, seed=1):
    tiny_text.folder(path, seed=seed, layers=3)
    (path / "training.json").write_text(json.dumps({"use": use}))
    return str(path)


def test_skipdecode_is_measured_under_the_schedule_that_was_trained(tmp_path):
    folders = {
        "tuned": tuned_folder(tmp_path / "skip", "skipdecode:first=3;last=2;horizon=5"),
        "tuned_early": tuned_folder(tmp_path / "early", "skipdecode:first=3;last=2;exit=early;horizon=5", seed=2),
    }
    found = bench_decoding(
        MODEL, TOKENIZER, parts=["skipdecode"], limit=1, seeds=2, **folders, progress=False
    )  # fmt: skip
    assert not found.skipped
    losses = {each.way: each for each in found.figures if each.figure == "nats a token"}
    assert losses.keys() == {"all layers", "skip", "early exit", "all layers, tuned for skip", "skip, tuned",
                             "early exit, tuned"}  # fmt: skip
    # 3 layers for the prompt, then 2.75 rounded, 2.5 rounded, 2.25 rounded, 2 and 2.
    assert losses["skip, tuned"].note == "2.40 of 3 layers a new token, skipdecode:first=3;last=2;horizon=5"
    model = load(folders["tuned"])[0]
    schedule = SkipDecode(first=3, last=2, horizon=5).schedule(3, 5)
    text = torch.tensor(TOKENIZER("\n\n".join(few_functions("test")), add_special_tokens=False)["input_ids"])
    rows = text[: len(text) // 69 * 69].view(-1, 69)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    for way, which in (("skip, tuned", schedule), ("all layers, tuned for skip", None)):
        expected = [float(losses_by_index(model, rows[[seed]], 64, which).mean()) for seed in range(2)]
        assert losses[way].values == pytest.approx(expected)
    layers = {each.way: each.mean for each in found.figures if each.figure == "layers a new token"}
    assert layers["all layers"] == 3 and 2 <= layers["skip"] == layers["early exit"] < 3
    speeds = [each for each in found.figures if each.figure == SPEED]
    assert {each.way for each in speeds} == {"skip", "early exit"}
    assert all(len(each.values) == 7 and each.forwards_per_token == pytest.approx(1) for each in speeds)


@pytest.mark.parametrize(
    ("option", "use", "said"),
    [
        ("tuned", "skipdecode:last=2;exit=early;horizon=5", "--exit skip"),
        ("tuned_early", "skipdecode:last=2;horizon=5", "--exit early"),
        ("tuned", "skipdecode:last=3;horizon=5", "skips none of 3 layers"),
        ("tuned", "skipdecode:last=2", "not allowed"),
        ("tuned", "plain", "not allowed"),
    ],
)
def test_what_was_trained_for_another_schedule_is_refused(option, use, said, tmp_path):
    folder = tuned_folder(tmp_path / "tuned", use)
    with pytest.raises(BadParameter, match=said):
        named.resolve(
            MODEL, TOKENIZER, **dict.fromkeys(("small", "tuned", "tuned_early", "partner")) | {option: folder}
        )
    (tmp_path / "tuned" / "training.json").unlink()
    with pytest.raises(BadParameter, match=r"no training\.json"):
        named.tuned_model(folder, "skip", MODEL, TOKENIZER)


def test_early_exit_of_other_budgets_is_refused(tmp_path):
    skip = tuned_folder(tmp_path / "skip", "skipdecode:last=2;horizon=5")
    early = tuned_folder(tmp_path / "early", "skipdecode:last=1;exit=early;horizon=5")
    with pytest.raises(BadParameter, match="train both with the same"):
        named.resolve(MODEL, TOKENIZER, small=None, tuned=skip, tuned_early=early, partner=None)


def test_cntp_stands_beside_greedy_and_the_authors_ablation_with_its_forwards(monkeypatch):
    class Task:
        prompt, answer = "1+1=", "2."

        def check(self, text):
            return 1.0

    monkeypatch.setattr(cntp, "examples", lambda name, count: [Task()] * count)
    found = bench_decoding(MODEL, TOKENIZER, parts=["cntp"], limit=2, seeds=2, progress=False)
    right = {each.way: each for each in found.figures if each.figure == "right answers"}
    assert right.keys() >= {"plain (greedy)", "cntp:rule=fixed", "cntp:rule=inverted", "cntp", "plain (sampled)"}
    forwards = {each.way: each.values for each in found.figures if each.figure == "forwards an answer"}
    # Ten tokens at most; the surest of five pays for all five.
    assert all(each <= 10 for each in forwards["plain (sampled)"])
    assert all(a > 3 * b for a, b in zip(forwards["plain, surest of 5"], forwards["plain (sampled)"], strict=True))
    checks = {check.name: check for check in found.checks}
    assert checks["cntp-cheaper-than-whole"].measured["cntp"] == pytest.approx(sum(forwards["cntp"]) / 2)
    assert {"cntp-above-greedy", "cntp-proportional", "cntp-above-inverted"} < checks.keys()


def test_superposed_drafts_stand_beside_separate_ones_in_pairs(monkeypatch):
    # Without a table, which only a share of 0 can do without.
    monkeypatch.setattr(superposed, "Superposed", lambda: Superposed(alpha=0))
    found = bench_decoding(MODEL, TOKENIZER, parts=["superposed"], limit=1, seeds=2, progress=False)
    forwards = {each.way: each.mean for each in found.figures if each.figure == "forwards a prompt"}
    assert forwards["best of the drafts"] <= 10 < forwards["best of as many separate drafts"]
    (speed,) = [each for each in found.figures if each.figure == SPEED]
    assert speed.way == "superposed-decoding" and len(speed.values) == 7
    assert next(check for check in found.checks if check.name == "superposed-cheaper").passed


def bench_on(**options):
    beside = named.Named("", None, None, None, "")
    return engine.Bench(MODEL, TOKENIZER, 1, 2, beside, 4, lambda what: None, options)


def test_a_list_moves_the_ranking_by_what_the_model_says():
    method = InContextNavigation(rounds=2, per_round=2, header="", item="{answer},", cue="+", end=",")
    answers = [[{"text": text, "first": TOKENIZER(text)["input_ids"][0], "round": number, "capped": False}
                for number, texts in enumerate((("ab", "cd"), ("ef", "gh"))) for text in texts]]  # fmt: skip
    lost, gained = navigation._shift(bench_on(), [("say", frozenset({"ab", "xy"}))], answers, method)
    with torch.no_grad():
        before, after = (MODEL(torch.tensor([TOKENIZER(text)["input_ids"]])).logits[0, -1].log_softmax(-1)
                         for text in ("say+", "sayab,cd,+"))  # fmt: skip
    a, c, x = (TOKENIZER(each)["input_ids"][0] for each in "acx")
    assert lost == [pytest.approx(float(before[a] - after[a] + before[c] - after[c]) / 2, abs=1e-4)]
    ranks = [int((logs > logs[x]).sum()) for logs in (before, after)]
    assert gained == [ranks[0] - ranks[1]]


@pytest.mark.parametrize(("router", "entropy", "passed"), [(0.9, 0.7, [True, True]), (0.4, 0.45, [False, False])])
def test_the_routers_auc_is_read_where_its_trainer_left_it(router, entropy, passed, tmp_path):
    note = {"auc": {"router": router, "entropy": entropy}, "positions": 70, "divergent": 0.1}
    (tmp_path / "training.json").write_text(json.dumps(note))
    bench = bench_on(router=str(tmp_path))
    r2r._told_apart(bench)
    assert [check.passed for check in bench.checks] == passed
    assert [check.measured for check in bench.checks] == [
        {"router": router, "entropy": entropy}, {"entropy": entropy, "chance": 0.5}
    ]  # fmt: skip
    assert passed[0] or "positions: 70" in bench.checks[0].reason


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
    monkeypatch.setattr(byte_view, "lines", lambda count=None: short[:count])
    monkeypatch.setattr(byte_view, "_LINE", 4)
    monkeypatch.setattr(byte_view, "_TIMED", 1)
    sizes = set()

    def run(model, tokenizer, prompts, **options):
        sizes.add(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(engine, "generate", run)
    found = bench_decoding(
        *marked, parts=["bytes"], limit=2, seeds=2, batch_size=2, partner=str(partner), progress=False
    )
    assert not found.skipped
    scores = {each.way: each for each in found.figures if each.figure == "exact match"}
    ways = ("plain", "exact-byte-probabilities", "exact-byte-probabilities:unit=token")
    assert {f"{way}, {task}" for way in ways for task in ("completion", "infill")} < set(scores)
    # Two seeds, and still pairs enough for a speed: three ways complete, two fill in, and the ensemble.
    speeds = {each.way: each for each in found.figures if each.figure == SPEED}
    assert len(speeds) == 6 and all(len(each.values) == 7 and min(each.values) > 0 for each in speeds.values())
    assert speeds["ensemble"].forwards_per_token > 0
    # transformers heals one prompt at a time, and so does plain beside it.
    assert all("one prompt at a time, plain as well" in each.note for each in speeds.values())
    assert sizes == {2, 1}
    bits = {each.way: each.values for each in found.figures if each.figure == "bits per byte"}
    text = short[0].before + short[0].text + "\n" + short[0].after
    for name, pair in (("member 1", marked), ("member 2", load(partner))):
        alone = ByteEnsemble([pair], paths="fast").bits_per_byte(text)
        assert bits[name] == pytest.approx([alone, alone], rel=1e-5)
    # The logarithm is concave.
    assert all(both <= mean for both, mean in zip(bits["ensemble"], bits["mean of the members"], strict=True))
    checks = {check.name: check for check in found.checks}
    assert checks.keys() >= {"bytes-ensemble", "bytes-above-tokens-infill"}
    assert checks["bytes-ensemble"].must and checks["bytes-ensemble"].passed
    assert all(checks[f"bytes-above-tokens-{task}"].must for task in ("completion", "infill"))
    assert found.to_dict()["beside"]["partner"]["parameters"] > 0
    page = family_pages([written(tmp_path / "r.json", found)])["decoding"]
    # Two seeds bear out no ordering, seven pairs a speed.
    assert "exact match" in page and f"| {SPEED} |" in page and "#### Checks" not in page


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

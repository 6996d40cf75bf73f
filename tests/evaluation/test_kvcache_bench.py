"""The bench of the cache policies: what is measured is what it says, on tiny random models; kvpress by its protocol."""

import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.evaluation import tiny_text
from tokenry import cli
from tokenry.errors import BadParameter, PromptTooLong, ResourceError
from tokenry.evaluation import bench_kvcache, family_pages
from tokenry.evaluation.kvcache import bits, checks, quality, timing
from tokenry.evaluation.kvcache.engine import Bench, said, way
from tokenry.evaluation.kvcache.results import Figure, pivots
from tokenry.evaluation.kvpress import KVPress, peers_python
from tokenry.generation import generate
from tokenry.methods import method
from tokenry.workloads import Example

TOKENIZER = tiny_text.tokenizer()
MODEL = tiny_text.model(context=1024)
PEERS = Path(__file__).parents[2] / ".venv-peers"


def bench(**changed):
    given = {
        "model": MODEL, "tokenizer": TOKENIZER, "methods": [], "workloads": ["recall"], "shares": (0.5,), "tokens": 300,
        "limit": 1, "seeds": 2, "batch_size": 3, "bits_tokens": 40, "bits_prompt": 0,
        "lengths": (64, 128), "prefill": 96, "budget": 16,
        "repeats": 2, "resources": {}, "python": None, "presses": (), "expect": lambda count: None,
        "tick": lambda what: None,
    }  # fmt: skip
    return Bench(**given | changed)


def asked(*contexts: str, question: str = "\n\n# recall K\nK = "):
    """Prompts whose questions have equally many tokens."""
    found = []
    for context in contexts:
        ids, asking = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (context, question))
        found.append(quality.Asked(Example(context + question, "1", lambda out: 1.0), 0, ids + asking, len(asking)))
    return found


PROMPTS = asked("abc = 1\n" * 12, "xyz = 2 + abc\n" * 9, "nothing at all, or nearly so " * 7)


# --- quality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("text", [None, "h2o:budget=4000", "oracle:budget=4000", "sinks:budget=4000"])
def test_reading_in_pieces_with_room_for_everything_answers_as_plain_does(text, aware):
    found = quality.answers(bench(), text and method(text), PROMPTS, aware, 8, line=False)
    for each, answer in zip(PROMPTS, found.texts, strict=True):
        plain = generate(MODEL, TOKENIZER, each.ids, max_new_tokens=8, do_sample=False)
        assert answer == TOKENIZER.decode(plain.new_tokens[0], skip_special_tokens=True)
    assert found.kept == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("text", ["h2o:budget=0.25", "snapkv:budget=0.4;window=4", "oracle:budget=0.25"])
def test_a_prompt_in_a_batch_answers_as_it_does_alone_from_its_share(text, aware):
    policy = method(text)
    # Before a question a batch has one share of its contexts, for the mean of their lengths.
    even = asked(*(f"{name} = 1\n" * 12 for name in ("abc", "xyz", "nop")))
    prompts = PROMPTS if aware or not policy.drops else even
    found = quality.answers(bench(), policy, prompts, aware, 6, line=False)
    alone = [quality.answers(bench(), policy, [each], aware, 6, line=False) for each in prompts]
    assert found.texts == [each.texts[0] for each in alone]
    if policy.drops:
        assert found.kept == pytest.approx([each.kept[0] for each in alone])
        assert all(policy.budget - 0.02 < kept <= policy.budget for kept in found.kept)
    else:
        # While it writes the text grows, of which it attends to as many as before.
        assert all(policy.budget - 0.03 < kept <= policy.budget for kept in found.kept)


def test_an_answer_of_a_line_ends_with_it():
    (text,) = quality.answers(bench(), None, PROMPTS[:1], True, 40, line=True).texts
    assert "\n" not in text[:-1]


def test_prompts_have_about_as_many_tokens_as_are_asked_for_and_must_fit():
    task = quality.prepared(bench(tokens=500, limit=3), "ruler-words")
    assert [each.seed for batch in task.batches for each in batch] == [0, 0, 0, 1, 1, 1]
    for each in (each for batch in task.batches for each in batch):
        assert 450 < len(each.ids) < 600
        assert TOKENIZER.decode(each.ids, skip_special_tokens=True) == each.example.prompt
    assert not task.line and quality.prepared(bench(), "ruler-single").line
    with pytest.raises(PromptTooLong, match="ask for fewer tokens"):
        quality.prepared(bench(tokens=1020), "recall")


# --- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [0, 1, 21])
@pytest.mark.parametrize("text", [None, "h2o:budget=4000", "fastkv:budget=4000"])
def test_bits_token_by_token_are_those_of_the_whole_text(text, prompt):
    ids = torch.randint(3, 259, (3, 30), generator=torch.Generator().manual_seed(0))
    found = bits.stepwise_nats(MODEL, ids, text and method(text), prompt)
    with torch.no_grad():
        logs = MODEL(ids).logits.log_softmax(-1)
    wanted = -logs[:, :-1].gather(-1, ids[:, 1:, None])[:, max(0, prompt - 1) :, 0].sum(-1)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)


def test_texts_are_as_long_as_they_say_in_tokens_and_bytes():
    ids, sizes = bits.texts(bench(seeds=3, bits_tokens=64))
    assert ids.shape == (3, 64) and len({tuple(row) for row in ids.tolist()}) == 3
    # A byte a token; the first token is not scored, nor is a prompt.
    assert sizes.tolist() == [63, 63, 63]
    assert bits.texts(bench(seeds=3, bits_tokens=64, bits_prompt=20))[1].tolist() == [44, 44, 44]


def test_every_method_that_a_check_names_exists():
    pairs = (*checks._ABOVE, *checks._TIGHT, *checks._PAIRS_OF_BITS)
    labels = {label for one, other, *_ in pairs for label in (one, other) if not label.startswith("kvpress: ")}
    assert "treekv:positions=rolling" in labels and all(way(method(label)) == label for label in labels)


def test_texts_are_longer_than_the_context_only_where_positions_go_on():
    one = bench(seeds=2)
    limit = tiny.config("gpt2").n_positions
    one.bits_tokens = limit + 8
    one.model = tiny.model("gpt2")
    with pytest.raises(PromptTooLong, match=f"{limit + 8} tokens exceed the model's context of {limit}"):
        bits.texts(one)
    one.model = tiny.model()
    one.model.config.max_position_embeddings = limit
    assert bits.texts(one)[0].shape == (2, limit + 8)


# --- time ---------------------------------------------------------------------------------------


def test_operations_are_those_of_the_products():
    config, length = MODEL.config, 48
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    layer = 2 * hidden * (hidden + 2 * 2 * dim + hidden) + 2 * 3 * hidden * inner
    attention = 4 * length * length * hidden // 2
    head = 2 * hidden * config.vocab_size
    wanted = config.num_hidden_layers * (length * layer + attention) + head
    operations, share = timing.counted(MODEL, None, timing._text(MODEL, length))
    # Rotary angles are a product, too.
    assert operations == pytest.approx(wanted, rel=0.01) and share is None


def test_a_policy_that_skips_layers_has_fewer_operations_and_one_that_watches_more():
    ids = timing._text(MODEL, 128)
    plain, _ = timing.counted(MODEL, None, ids)
    skipping, share = timing.counted(MODEL, method("fastkv:layer=0;propagated=0.2;budget=0.1"), ids)
    watching, whole = timing.counted(MODEL, method("h2o:budget=16"), ids)
    assert share == pytest.approx((1 + 25 / 128) / 2, abs=0.01) and whole == 1
    assert skipping < 0.8 * plain and watching >= plain


def test_time_notes_what_is_held_and_breaks_where_it_is_more_than_the_budget(monkeypatch):
    one = bench(methods=[method("sinks"), method("h2o"), method("oracle")])
    timing.measure(one)
    held = {(each.way, each.column): each.values[0] for each in one.figures if each.group == timing.HELD}
    slot = 2 * 2 * 8 * 4 * 2  # keys and values, heads, size, bytes, layers
    for way_ in ("sinks", "h2o"):
        assert held[way_, "64"] == held[way_, "128"] == 16 * slot
    assert held["plain", "128"] > 128 * slot and held["oracle", "128"] >= 128 * slot
    known = {(each.way, each.column): each.values[0] for each in one.figures if each.group == timing.KNOWN}
    # Two layers and heads: a position of eight bytes for each slot, and with h2o a score of four.
    assert known["sinks", "128"] == 2 * 16 * 2 * 8 and known["h2o", "128"] == 2 * 16 * 2 * (8 + 4)
    ratios = [each for each in one.figures if each.group == timing.FASTER]
    assert {len(each.values) for each in ratios} == {2} and {each.way for each in ratios} == {"sinks", "h2o", "oracle"}
    assert not one.broken and not one.skipped
    real = timing._started

    def greedy(*given):
        running = real(*given)
        running.held = lambda: 17 * slot
        return running

    monkeypatch.setattr(timing, "_started", greedy)
    two = bench(methods=[method("sinks")], lengths=(64,))
    timing.measure(two)
    assert len(two.broken) == 1 and "sinks held" in two.broken[0]


def test_prefill_counts_and_times_in_pairs_an_untrained_predictor_too():
    one = bench(methods=[method("fastkv"), method("kv-prediction"), method("sinks")])
    timing.measure_prefill(one)
    found = {(each.way, each.column): each.values for each in one.figures}
    assert {name for name, _ in found} == {"fastkv", "kv-prediction"} and not one.skipped
    assert found["kv-prediction", timing.OPERATIONS][0] < 1
    assert len(found["fastkv", timing.TIME]) == 2 and min(found["fastkv", timing.TIME]) > 0


# --- checks -------------------------------------------------------------------------------------


def figure(way_, *values, group=quality.AGNOSTIC, budget="", column=quality.AVERAGE, part="quality", form="score"):
    return Figure(part=part, group=group, way=way_, budget=budget, column=column, form=form, values=values)


def averaged(way_, *values, kept=0.25):
    over = figure(way_, *values, group=f"{quality.AGNOSTIC}, over all shares")
    share = figure(way_, kept, group=f"{quality.AGNOSTIC}, share kept", budget="25%", column="recall", form="share")
    return [over, share]


def test_ours_against_kvpress_takes_the_best_that_hold_their_share():
    figures = [
        *averaged("kvpress: TOVA", 0.2, 0.4), *averaged("kvpress: KeyDiff", 0.5, 0.7), *averaged("h2o", 0.4, 0.5),
        *averaged("sinks", 0.1, 0.2), *averaged("fasa", 0.8, 0.9), *averaged("spatten", 0.9, 0.9, kept=0.6),
        *averaged("oracle", 1.0, 1.0), *averaged("plain", 1.0, 1.0), *averaged("keydiff", 0.6, 0.7),
        *averaged("oracle:per=kv", 1.0, 1.0),
    ]  # fmt: skip
    found = {check.name: check for check in checks.checked(figures)}
    mine = found["ours-above-kvpress, question-agnostic"]
    assert mine.measured == {"h2o": 0.45, "kvpress: KeyDiff": pytest.approx(0.6)} and not mine.passed and mine.reason
    beside = found["ours-above-kvpress-with-baselines, question-agnostic"]
    assert beside.passed and set(beside.measured) == {"keydiff", "kvpress: KeyDiff"}
    others = found["ours-above-kvpress-with-all, question-agnostic"]
    assert others.passed and set(others.measured) == {"spatten", "kvpress: KeyDiff"}
    assert found["h2o-above-sinks, question-agnostic"].passed
    assert found["oracle-above-fasa, question-agnostic"].passed
    assert found["plain-above-all, question-agnostic"].measured == {"plain": 1.0, "oracle": 1.0}
    assert "h2o-above-random, question-agnostic" not in found


def test_steps_must_be_flat_and_fast_at_the_longest_context():
    def timed(way_, group, column, *values):
        return figure(way_, *values, part="time", group=group, column=column, form="milliseconds")

    figures = [
        timed("h2o", timing.STEP, "4,096", 5.0, 5.0, 5.0), timed("h2o", timing.STEP, "32,768", 5.5, 6.1, 5.9),
        timed("sinks", timing.STEP, "4,096", 4.0, 4.0), timed("sinks", timing.STEP, "32,768", 8.0, 8.2),
        timed("h2o", timing.FASTER, "32,768", 2.0, 2.5, 2.2), timed("sinks", timing.FASTER, "32,768", 3.1, 3.4),
        timed("oracle", timing.STEP, "4,096", 4.0),
    ]  # fmt: skip
    found = {check.name: check for check in checks.checked(figures)}
    assert {name: check.passed for name, check in found.items()} == {
        "h2o-flat": True, "h2o-faster": False, "sinks-flat": False, "sinks-faster": True,
    }  # fmt: skip
    assert not found["h2o-flat"].clear or found["h2o-flat"].difference.lower >= 0


def test_prefill_must_save_operations_and_time():
    group = "prompts of 96 tokens, over the full prompt's"
    figures = [
        figure("fastkv", 0.6, part="prefill", group=group, column=timing.OPERATIONS, form="ratio"),
        figure("fastkv", 1.2, 1.3, part="prefill", group=group, column=timing.TIME, form="ratio"),
        figure("h2o", 1.1, part="prefill", group=group, column=timing.OPERATIONS, form="ratio"),
    ]
    found = {check.name: check for check in checks.checked(figures)}
    assert {name: check.passed for name, check in found.items()} == {
        "fastkv-saves-operations": True, "fastkv-saves-time": False,
    }  # fmt: skip
    assert found["fastkv-saves-time"].reason


# --- the whole ----------------------------------------------------------------------------------


def run(**changed):
    given = {"tokens": 220, "limit": 1, "seeds": 2, "shares": (0.5,), "workloads": ["ruler-single"], "presses": ()}
    return bench_kvcache(MODEL, TOKENIZER, progress=False, **given | changed)


def test_a_bench_prints_itself_and_becomes_a_page(tmp_path):
    methods = ["h2o", "oracle", "sentencekv:start=200", "fastkv"]
    found = run(parts=["quality", "bits", "prefill"], methods=methods, bits_tokens=30, prefill=48, repeats=1)
    data = json.loads(found.to_json())
    assert data["kind"] == "kvcache" and not data["broken"] and not data["partial"]
    ways = {(each["way"], each["budget"]) for each in data["figures"] if each["part"] == "quality"}
    assert {("plain", ""), ("h2o", "50%"), ("oracle", "50%"), ("h2o", "")} <= ways
    # Its budget cannot be had of so short a text, which is said once.
    assert any(name.startswith("sentencekv") for name in found.skipped)
    text = str(found)
    assert "question-agnostic" in text and "Fewer than 5 seeds" in text and "Fewer than 7 rounds" in text
    (tmp_path / "r.json").write_text(found.to_json())
    page = family_pages([tmp_path])["kvcache"]
    assert "### h2o" in page and "ruler-single" in page
    assert "operations to read prompts of 48 tokens " in page
    # Two seeds and one round are too few to claim anything from; operations are counted.
    assert "fastkv reads a prompt with fewer operations" in page
    assert "fastkv reads a prompt in less time" not in page and f"| {timing.TIME} |" not in page
    assert "the full cache answers no worse" in text and "the full cache answers no worse" not in page
    assert all(len(row) == len(headers) for _, headers, rows in pivots(data["figures"]) for row in rows)


@pytest.mark.parametrize(
    ("changed", "said_"),
    [
        ({"parts": ["none"]}, "no part 'none'"),
        ({"workloads": ["code"]}, "no workload 'code'"),
        ({"presses": ["Best"]}, "no press 'Best'"),
        ({"methods": ["token-recycling"]}, "no cache policy"),
        ({"shares": (1.5,)}, "between 0 and 1"),
        ({"seeds": 1}, "at least 2"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(changed, said_):
    with pytest.raises(BadParameter, match=said_):
        run(**changed)


def test_names_of_methods_and_budgets():
    assert way(method("h2o:budget=0.25;recent=0.3")) == "h2o:recent=0.3"
    assert way(method("kv-prediction")) == "kv-prediction"
    assert [said(each) for each in (0.125, 0.5, 4096)] == ["12.5%", "50%", "4,096"]


def test_the_command_refuses_bad_input_and_fails_where_a_promise_of_construction_is_broken(monkeypatch, capsys):
    assert cli.main(["bench", "kvcache", "--lengths", "many"]) == 2
    assert cli.main(["bench", "kvcache", "--part", "none"]) == 2
    assert "no part 'none'" in capsys.readouterr().err
    found = run(parts=["bits"], methods=["sinks"], bits_tokens=20)
    monkeypatch.setattr("tokenry.evaluation.bench_kvcache", lambda *given, **options: found)
    assert cli.main(["bench", "kvcache", "--quiet"]) == 0
    object.__setattr__(found, "broken", ("sinks held too much",))
    assert cli.main(["bench", "kvcache", "--quiet"]) == 1
    assert "sinks held too much" in capsys.readouterr().out


# --- kvpress ------------------------------------------------------------------------------------

FAKE = """#!{python}
import json, sys
log = open({log!r}, "a")
for line in sys.stdin:
    request = json.loads(line)
    log.write(line)
    log.flush()
    if request["do"] == "load":
        answer = {{"versions": {{"kvpress": "0"}}}}
    elif request["do"] == "tokens":
        answer = {tokens}
    elif request["do"] == "answer":
        answer = {{"tokens": [5], "kept": request["keep"]}}
    else:
        sys.exit("it is out of order")
    print(json.dumps(answer), flush=True)
"""
BYTES = '{"ids": [[3 + table[byte] for byte in text.encode()] for text in request["texts"]]}'


def fake(tmp_path, tokens):
    python, log = tmp_path / "python", tmp_path / "log"
    text = FAKE.format(python=sys.executable, log=str(log), tokens=tokens)
    vocabulary = [TOKENIZER(chr(byte), add_special_tokens=False)["input_ids"][0] - 3 for byte in range(128)]
    python.write_text(text.replace("import json, sys", f"import json, sys\ntable = {vocabulary}"))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python, log


def test_kvpress_holds_as_many_slots_when_the_answer_begins(tmp_path):
    python, log = fake(tmp_path, BYTES)
    found = run(parts=["quality"], methods=["h2o"], presses=("SnapKV",), peers=python)
    assert not found.broken and not found.skipped
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    answers = [each for each in requests if each["do"] == "answer" and each["press"] == "SnapKV"]
    agnostic, aware = answers[:2], answers[2:]
    for each in (*agnostic, *aware):
        before = len(each["ids"]) - 1
        # A batch's rows get one share of their contexts, for the mean of their lengths.
        assert abs(each["keep"] + before - each["split"] - 0.5 * before) <= 1
    assert all(each["split"] == len(each["ids"]) - 1 for each in aware)
    assert all(each["split"] < len(each["ids"]) - 10 for each in agnostic)
    assert found.about["peers"] == {"kvpress": "0"}
    kept = [each for each in found.figures if each.way == "kvpress: SnapKV" and each.form == "share"]
    assert all(0.48 < each.mean <= 0.5 for each in kept)
    ours = [each for each in found.figures if each.way == "h2o" and each.form == "share"]
    assert [each.mean for each in ours] == pytest.approx([each.mean for each in kept], abs=1e-6)


def test_prompts_that_kvpress_reads_otherwise_are_broken(tmp_path):
    python, _ = fake(tmp_path, '{"ids": [[7] for text in request["texts"]]}')
    found = run(parts=["quality"], methods=["h2o"], presses=("SnapKV",), peers=python)
    assert found.broken == ("kvpress divides the prompts of ruler-single into other tokens",)


def test_a_process_that_ends_says_why(tmp_path):
    python, _ = fake(tmp_path, "{}")
    with KVPress(MODEL, python, TOKENIZER) as peer, pytest.raises(ResourceError, match="out of order"):
        peer.ask("open")
    with pytest.raises(ResourceError, match="no interpreter"):
        peers_python(tmp_path / "nowhere")


@pytest.mark.skipif(not (PEERS / ".installed").is_file(), reason="kvpress is not set up: make peers")
def test_kvpress_itself_answers_as_plain_does_without_a_press_and_keeps_what_is_asked_for():
    (each,) = PROMPTS[:1]
    plain = generate(MODEL, TOKENIZER, each.ids, max_new_tokens=5, do_sample=False)
    split = len(each.ids) - each.question
    with KVPress(MODEL, PEERS / "bin" / "python", TOKENIZER) as peer:
        request = {"ids": each.ids, "split": split, "new": 5, "stop": []}
        assert peer.ask("answer", press="none", keep=split, **request)["tokens"] == plain.new_tokens[0]
        for press in ("KeyDiff", "ObservedAttention", "TOVA", "ExpectedAttention"):
            assert peer.ask("answer", press=press, keep=31, **request)["kept"] == 31
        with pytest.raises(ResourceError, match="greater than the window size"):
            peer.ask("answer", press="SnapKV", keep=9, **request | {"split": 60})

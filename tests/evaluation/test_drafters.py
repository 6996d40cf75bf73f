"""The bench of the trained drafters: what it counts, what its checks notice, what is skipped, its page and command."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokenry
from tokenry import cli
from tokenry.errors import BadParameter, ResourceError
from tokenry.evaluation import bench_drafters, drafters, family_pages
from tokenry.evaluation.drafters import adaspec, mtp
from tokenry.evaluation.drafters.engine import Bench
from tokenry.objectives import TokenRows
from tokenry.objectives.engine import Context
from tokenry.speculation import adaspec as distillation
from tokenry.speculation.adaspec import SelectiveDistillation, Taught, compare_distillation
from tokenry.speculation.any_subset import any_subset
from tokenry.speculation.future_token_prediction import FTPForCausalLM
from tokenry.speculation.gated_lora_mtp import Adapters, gated
from tokenry.speculation.hamburger import HamburgerModel

pytest.importorskip("accelerate")
TOKENIZER = tokenry.load("tokenry/code-draft")[1]
SMALL = {"limit": 2, "max_new_tokens": 8, "repeats": 1, "progress": False}


def built(seed=0, layers=2):
    """A random model of the bundled tokenizer, with weights large enough that outputs differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3,
        pad_token_id=TOKENIZER.pad_token_id, bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def saved(model, path):
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tokenry.load(saved(built(), tmp_path_factory.mktemp("models") / "target"))[0]


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """What the trainers write, untrained."""
    place = tmp_path_factory.mktemp("trained")
    torch.manual_seed(1)
    adapters = Adapters(model, k=3, r=4, alpha=8.0)
    for up in adapters.up:
        torch.nn.init.normal_(up, std=0.3)
    adapters.save(place / "mtp", model, training={"accuracy_by_mask": [0.5, 0.3, 0.4], "loss_by_mask": [1.0, 2.0, 3.0]})
    note = {"trainer": "mtp", "steps": 3, "seed": 0, "out": str(place), "model": str(place)}
    (place / "mtp" / "training.json").write_text(json.dumps(note))
    settings = {"num_future_tokens": 3, "pseudo_len": 2, "decoder_layers": 1}
    FTPForCausalLM.around(model, **settings).future.save_pretrained(place / "ftp")
    saved(FTPForCausalLM.around(built(3), **settings), place / "ftp-tuned")
    HamburgerModel(copy.deepcopy(model), micro_layers=1).save(place / "hamburger", TOKENIZER)
    saved(any_subset(built(4), TOKENIZER.mask_token_id), place / "any-order")
    saved(built(5, layers=1), place / "draft")
    return place


@pytest.fixture(scope="module", autouse=True)
def small():
    monkey = pytest.MonkeyPatch()
    for name, value in {"_ROWS": 60, "_LENGTH": 12, "_MEASURED": 4, "_PROMPT": 4}.items():
        monkey.setattr(adaspec, name, value)
    monkey.setattr(drafters.ftp, "_ROWS", 4)
    monkey.setattr(drafters.ftp, "_LENGTH", 16)
    yield
    monkey.undo()


@pytest.fixture(scope="module")
def measured(model, trained):
    return bench_drafters(
        model, TOKENIZER, trained=trained, draft=str(trained / "draft"), steps=2, seeds=2, controls=True, **SMALL
    )


def check(found, name):
    return next(each for each in found.checks if each.name == name)


def table(found, start):
    return next(each for each in found.tables if each.title.startswith(start)).rows


# --- what is measured ---------------------------------------------------------------------------


def test_every_part_is_measured_and_what_must_hold_holds(measured):
    assert not measured.skipped and not measured.partial and measured.broken == 0
    assert {each.part for each in measured.tables} == set(drafters.PARTS)
    ran = [{row.method for row in run.rows} for run in measured.runs]
    assert {"gated-lora-mtp", "gated-lora-mtp:mode=linear", "gated-lora-mtp:mode=auto"} < ran[0]
    assert "future-token-prediction" in ran[1] and {"hamburger", "hamburger:lossless=true"} < ran[2]
    must = (
        "lossless", "mtp-gate-closed", "hamburger-one-token:code", "hamburger-one-token:arithmetic",
        "assd-calls:greedy", "assd-calls:sampled at temperature 1", "assd-same-filling",
    )  # fmt: skip
    for name in must:
        assert check(measured, name).passed and check(measured, name).reason == ""
    failed = [each for each in measured.checks if not each.passed]
    # Nothing was trained, so something that training must bring about is missing, with a reason.
    assert failed and all(each.reason for each in failed if not each.name.startswith("not-slower"))
    assert check(measured, "mtp-two-tokens-a-pass") in failed


def test_masks_are_read_from_training_and_from_the_run(measured):
    rows = table(measured, "gated-lora-mtp")
    assert [row["accuracy in training"] for row in rows] == [0.5, 0.3, 0.4]
    assert check(measured, "mtp-falls-with-depth").measured == {"gated-lora-mtp": 1}
    row = measured.runs[0].row("gated-lora-mtp")
    assert rows[0]["accepted, quadratic"] == row.acceptance[0]
    assert measured.about["trained"]["mtp"]["steps"] == 3 and "out" not in measured.about["trained"]["mtp"]


def test_groups_are_counted_by_confidence(measured):
    rows = table(measured, "hamburger, by confidence · arithmetic")
    assert rows[1]["confidence"] == "1"
    assert rows[1]["tokens a step"] == rows[1]["cache entries a token"] == 1
    assert rows[1]["tokens in larger groups"] == 0 and rows[1]["agreement"] == 1
    for row in rows[1:]:
        tokens = sum(size * row[f"groups of {size}"] for size in range(1, 5))
        steps = sum(row[f"groups of {size}"] for size in range(1, 5))
        assert row["tokens a step"] == pytest.approx(tokens / steps)
    assert rows[0]["score"] == measured.runs[2].row("plain", "arithmetic").quality


def test_filling_one_by_one_takes_a_call_a_token(measured):
    one, own, _ = table(measured, "any-subset-speculative-decoding · greedy")
    assert one["calls a token"] == one["most in a text"] == 1 and one["filled otherwise"] == 0
    fewer = check(measured, "assd-fewer-calls:greedy")
    assert fewer.ratio.count == 6 and fewer.passed == (own["calls a token"] < 1)


def test_states_of_a_tuned_model_stand_beside(measured):
    by_offset = table(measured, "future-token-prediction, by offset")
    assert [row["offset"] for row in by_offset] == [1, 2, 3] and by_offset[0]["accepted"] is None
    assert by_offset[1]["gap, tuned on the task"] != by_offset[1]["gap"]
    mine, tuned = table(measured, "smoothness")
    assert check(measured, "ftp-smoother").passed == (tuned["centred"] > mine["centred"])
    flat = sum(row["gap"] <= 0 for row in by_offset[1:])
    assert check(measured, "ftp-states-know-ahead").measured["future-token-prediction"] == flat


def test_the_next_token_loss_is_the_models_own(model):
    ids = torch.randint(40, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss.item()
    assert drafters.ftp._next_token_loss(_bench(model), ids) == pytest.approx(wanted, rel=1e-5)


def test_a_gate_that_leaks_is_noticed(model, trained, monkeypatch):
    monkeypatch.setattr(mtp, "gated", lambda model, adapters, first, rows: gated(model, adapters, 0, rows))
    found = bench_drafters(model, TOKENIZER, parts=["mtp"], trained=trained, **SMALL)
    leak = check(found, "mtp-gate-closed")
    assert not leak.passed and leak.reason == "the gate leaks"
    assert leak.measured["gate closed"] > 0 and leak.measured["after drafting"] == 0


def test_sampled_runs_check_nothing_that_is_greedy(model, trained):
    found = bench_drafters(model, TOKENIZER, parts=["mtp", "hamburger"], trained=trained, temperature=0.6, **SMALL)
    assert {row.setting for run in found.runs for row in run.rows} == {"sampled at temperature 0.6"}
    assert not {"lossless", "mtp-two-tokens-a-pass"} & {each.name for each in found.checks}


# --- distillation -------------------------------------------------------------------------------


def test_both_distillations_and_controls_stand_side_by_side(measured):
    rows = table(measured, "adaspec")
    assert [row["draft"] for row in rows] == [
        "before", "plain distillation", "plain, all compute", "adaspec, equal steps", "adaspec",
        "adaspec, random tokens", "adaspec, smallest gaps",
    ]  # fmt: skip
    plain, selective = rows[1], rows[4]
    assert plain["over plain"] == 0 and plain["tokens learned"] == selective["tokens learned"]
    assert all(row["tokens per pass"] >= 1 and 0 < row["acceptance"] < 1 for row in rows)
    above = check(measured, "adaspec-above-plain")
    assert above.ratio.count == 2
    assert above.passed == (selective["acceptance"] > plain["acceptance"])


def token_rows(count=10, length=8, seed=0):
    return TokenRows(torch.randint(40, 400, (count, length), generator=torch.Generator().manual_seed(seed)))


def test_rows_that_are_taught_give_what_the_models_give():
    target, reference, draft = built(0), built(6, 1), built(5, 1)
    rows = token_rows()
    rows.labels = rows.ids.clone()
    rows.labels[:, :3] = -100
    objective = SelectiveDistillation(target, reference, keep=0.4)
    ctx = Context(step=0, max_steps=1, seed=0, rank=0, processes=1, bundle=None)
    known = Taught(rows, target, batch=3).beside(reference)
    assert "reference" not in Taught(rows, target)[0]  # what one seed's reference says is not another's
    plain = torch.utils.data.default_collate([rows[index] for index in (1, 4, 9)])
    asked = objective.terms(draft, None, plain, ctx)
    told = objective.terms(draft, None, torch.utils.data.default_collate([known[index] for index in (1, 4, 9)]), ctx)
    assert told[0]["kl"].item() == pytest.approx(asked[0]["kl"].item(), rel=1e-5)
    assert told[1]["kept"][0] == asked[1]["kept"][0] and asked[1]["kept"][1] == 15


def test_a_target_too_large_to_keep_is_asked_at_every_step(monkeypatch):
    target, draft, rows = built(0), built(5, 1), token_rows()
    options = {"arms": ["equal tokens"], "seeds": 1, "steps": 2, "batch": 2, "progress": False}
    kept = compare_distillation(target, draft, rows, **options)
    monkeypatch.setattr(distillation, "_STORED", 0)
    asked = compare_distillation(target, draft, rows, **options)
    assert set(asked["arms"]) == {"plain", "equal tokens"}
    for arm in asked["arms"]:
        assert kept["arms"][arm]["acceptance"] == pytest.approx(asked["arms"][arm]["acceptance"], abs=1e-5)


def test_distillation_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    target, draft, rows = built(0), built(5, 1), token_rows()
    options = {"arms": ["equal tokens"], "seeds": 2, "steps": 2, "batch": 2, "progress": False}
    whole = compare_distillation(target, draft, rows, measure=lambda each: {"one": 1.0}, **options)
    calls = []

    def stopped(each):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"one": 1.0}

    with pytest.raises(KeyboardInterrupt):
        compare_distillation(target, draft, rows, measure=stopped, folder=tmp_path, **options)
    steps = []
    trainer = distillation.fit.__globals__["ObjectiveTrainer"]
    train = trainer.train
    monkeypatch.setattr(trainer, "train", lambda self, **rest: (steps.append(1), train(self, **rest))[1])
    found = compare_distillation(
        target, draft, rows, measure=lambda each: {"one": 1.0}, folder=tmp_path, **options
    )  # fmt: skip
    # The third call of `measure` was that of the second seed's plain draft, whose run was complete.
    assert found == whole and len(steps) == 1


def test_an_unknown_arm_is_refused():
    with pytest.raises(BadParameter, match="no arm 'largest'"):
        compare_distillation(built(), built(5, 1), token_rows(), arms=["largest"])


# --- checks -------------------------------------------------------------------------------------


def _bench(model=None):
    return Bench(model, TOKENIZER, None, {}, 1, 1, 1, 0.0, "", None, 1, 1, False, 0, False)


def test_a_ratio_is_judged_by_its_figures_and_clear_by_its_quartiles():
    bench = _bench()
    bench.ratio("a", "s", "u", {"one": 2.0, "two": 1.0}, [2.0, 2.0], least=2.0, reason="why")
    bench.ratio("b", "s", "u", {"one": 1.0, "two": 1.0}, [1.0], strict=True, reason="why")
    bench.ratio("c", "s", "u", {"one": 3.0, "two": 2.0}, [0.5, 0.5, 3.0], reason="why")
    first, second, third = bench.checks
    assert first.passed and first.clear and first.reason == ""
    assert not second.passed and second.reason == "why"
    assert third.passed and not third.clear


# --- what cannot run ----------------------------------------------------------------------------


def test_what_is_not_trained_is_skipped_and_says_how_to_train_it(model, tmp_path, monkeypatch):
    found = bench_drafters(model, TOKENIZER, trained=tmp_path, parts=["mtp", "ftp", "hamburger", "any-subset"], **SMALL)
    reasons = {each["method"]: each["reason"] for each in found.skipped}
    assert set(reasons) == {"mtp", "ftp", "hamburger", "any-subset"} and not found.runs and not found.tables
    assert all("FOLDER" in reason and str(tmp_path) not in reason for reason in reasons.values())
    for part, trainer in {"mtp": "mtp", "ftp": "ftp", "hamburger": "hamburger", "any-subset": "any-order"}.items():
        assert f"tokenry train {trainer}" in reasons[part]
    assert "skipped mtp" in str(found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (skipped,) = bench_drafters(model, TOKENIZER, parts=["hamburger"], **SMALL).skipped
    assert "tokenry train hamburger" in skipped["reason"]


def test_a_draft_of_another_tokenizer_is_an_error_where_its_part_is_asked_for(model, tmp_path):
    from tests.evaluation import tiny_text

    foreign = tiny_text.folder(tmp_path / "foreign")
    options = {"trained": tmp_path, "draft": str(foreign), **SMALL}
    with pytest.raises(ResourceError, match="another tokenizer"):
        bench_drafters(model, TOKENIZER, parts=["adaspec"], **options)
    skipped = {each["method"]: each["reason"] for each in bench_drafters(model, TOKENIZER, **options).skipped}
    assert "another tokenizer" in skipped["adaspec"] and "there are no weights" in skipped["mtp"]


@pytest.mark.parametrize(
    "options,words",
    [
        ({"parts": ["mpt"]}, "no part 'mpt'"),
        ({"limit": 0}, "limit=0"),
        ({"steps": 0}, "steps=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"trained": "no-such-folder"}, "no folder"),
    ],
)
def test_refusals(model, options, words):
    with pytest.raises(BadParameter, match=words):
        bench_drafters(model, TOKENIZER, **{**SMALL, **options})


def test_ctrl_c_keeps_what_is_measured(model, trained, monkeypatch):
    def stopped(bench):
        raise KeyboardInterrupt

    monkeypatch.setitem(drafters.PARTS, "adaspec", stopped)
    found = bench_drafters(model, TOKENIZER, parts=["any-subset", "adaspec"], trained=trained, **SMALL)
    assert found.partial and {each.part for each in found.tables} == {"any-subset"}


# --- page and command ---------------------------------------------------------------------------


def test_a_page_shows_tables_checks_and_claims_of_the_file_alone(measured, tmp_path, trained):
    (tmp_path / "d.json").write_text(measured.to_json())
    text = family_pages([tmp_path])["speculation"]
    assert str(trained) not in text.replace(str(trained / "draft"), "")
    assert "### adaspec" in text and "### any-subset-speculative-decoding" in text and "### gated-lora-mtp" in text
    for each in measured.tables:
        assert f"#### {each.title}" in text and each.note in text
    for each in measured.checks:
        assert each.statement in text and each.reason in text
    assert "- mtp: weights_hash" in text and "steps 3" in text
    data = json.loads((tmp_path / "d.json").read_text())
    row = next(each for each in data["tables"] if each["part"] == "adaspec")["rows"][4]
    row["acceptance"] = 0.12345
    (tmp_path / "d.json").write_text(json.dumps(data))
    # In its table and beside the claim.
    assert family_pages([tmp_path])["speculation"].count("0.123") == text.count("0.123") + 2


def test_figures_as_text():
    assert [drafters.cell(value) for value in (None, 0.12345, 1234.5, 12345, "x")] == [
        "–",
        "0.123",
        "1234",
        "12,345",
        "x",
    ]
    assert drafters.headers([{"a": 1}, {"a": 1, "b": 2}]) == ["a", "b"]


def test_the_command(capsys, model, trained, tmp_path):
    arguments = [
        "bench", "drafters", "--model", model.name_or_path, "--trained", trained, "--part", "mtp,any-subset",
        "--limit", "1", "--max-new-tokens", "4", "--repeats", "1", "--json", tmp_path / "runs" / "d.json", "-q",
    ]  # fmt: skip
    assert cli.main([str(argument) for argument in arguments]) == 0
    out = capsys.readouterr().out
    assert "gated-lora-mtp, by mask" in out and "the gate" in out
    data = json.loads((tmp_path / "runs" / "d.json").read_text())
    assert data["kind"] == "drafters" and data["settings"]["parts"] == ["mtp", "any-subset"]
    assert all("samples" not in run for run in data["runs"])
    assert cli.main(["results", str(tmp_path / "runs"), "--out", str(tmp_path / "docs")]) == 0
    assert "by mask" in (tmp_path / "docs" / "speculation.md").read_text()
    for bad in (["--part", "mpt"], ["--text", "no-such-text"], ["--workload", "cod"], ["--trained", "nowhere"]):
        assert cli.main(["bench", "drafters", "--model", model.name_or_path, *bad]) == 2

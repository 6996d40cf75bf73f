"""The bench of the drafters: tasks, what runs and what is skipped, checks, pages of results."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from tests.evaluation import tiny_text
from tokenry import cli
from tokenry.catalogue import BY_SLUG, ROWS
from tokenry.errors import BadParameter, PromptTooLong, ResourceError
from tokenry.evaluation import bench_speculation, family_pages, speculation, write_pages
from tokenry.evaluation.checks import Ordering, lossless_check, not_slower_checks, ordering_checks
from tokenry.evaluation.claims import CLAIMS
from tokenry.evaluation.metrics import Spread
from tokenry.evaluation.speculation import automatic
from tokenry.evaluation.tables import check_cells
from tokenry.methods import method
from tokenry.speculation import PromptLookup
from tokenry.workloads import Example

MODEL, TOKENIZER = tiny_text.model(), tiny_text.tokenizer()
DRAFT = tiny_text.model(seed=1, layers=1)
TASKS = {"copying": ["a b a b a b a b", "x = 1\nx = 1\n"], "prose": ["def f(x):", "once upon"]}
METHODS = (
    "plain",
    "prompt-lookup",
    "token-recycling:template=20",
    "transformers-assisted",
    "transformers-prompt-lookup",
)


def bench(prompts=TASKS, methods=METHODS, **options):
    options = {"max_new_tokens": 12, "repeats": 2, "resources": {"draft": DRAFT}, **options}
    return bench_speculation(MODEL, TOKENIZER, prompts, methods=methods, **options)


@pytest.fixture(scope="module")
def measured():
    return bench(batch_sizes=(1, 2))


# --- tasks --------------------------------------------------------------------------------------


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_a_files_categories_are_its_tasks_and_mt_benchs_count_as_one(tmp_path):
    records = [
        {"question_id": 81, "category": "writing", "turns": ["w1", "then"]},
        {"question_id": 101, "category": "reasoning", "turns": ["r1"]},
        {"question_id": 300, "category": "reasoning", "turns": ["not of MT-Bench"]},
        {"category": "qa", "turns": ["q1"]},
        {"prompt": "no category"},
    ]
    found = speculation._tasks(lines(tmp_path / "mine.jsonl", *records), None, None, 0)
    assert {name: [example.prompt for example in group] for name, group in found.items()} == {
        "mt-bench": ["w1", "r1"], "reasoning": ["not of MT-Bench"], "qa": ["q1"], "mine": ["no category"],
    }  # fmt: skip


def test_prompts_of_a_task_are_spread_over_it(tmp_path):
    records = [{"category": "qa", "turns": [f"q{number}"]} for number in range(10)]
    path = lines(tmp_path / "mine.jsonl", *records)
    prompts = [example.prompt for example in speculation._tasks(path, None, 4, 0)["qa"]]
    assert prompts == ["q0", "q2", "q5", "q7"]
    assert len(speculation._tasks(path, None, 99, 0)["qa"]) == 10


def test_workloads_are_tasks_and_stand_beside_prompts():
    found = speculation._tasks(["mine"], ["arithmetic"], 3, 0)
    assert {name: len(group) for name, group in found.items()} == {"prompts": 1, "arithmetic": 3}
    assert set(speculation._tasks(None, None, 1, 0)) == {"code", "recall", "arithmetic", "edit"}


# --- what runs ----------------------------------------------------------------------------------


def test_automatic_sizes_are_found_and_resources_left_alone():
    assert str(automatic(method("token-recycling"))) == "token-recycling:template=auto"
    assert str(automatic(method("draft-model"))) == "draft-model:tokens=auto"
    assert str(automatic(method("dyspec"))) == "dyspec:size=auto"
    assert automatic(method("plain")) is None and automatic(method("draft-tree")) is None
    assert not speculation._chooses_size(method("draft-tree")) and speculation._chooses_size(method("suffix"))


def test_every_drafter_that_can_runs_by_default_and_the_rest_is_skipped_with_a_reason(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Untrained(PromptLookup):
        slug: ClassVar[str] = "suffix"

        def start(self, session):
            raise ResourceError(f"there are no weights in {Path.home()}/weights: tokenry train suffix")

    load = speculation.load_class
    monkeypatch.setattr(speculation, "load_class", lambda slug: Untrained if slug == "suffix" else load(slug))
    read = speculation.read_method
    monkeypatch.setattr(speculation, "read_method", lambda text: Untrained() if text == "suffix" else read(text))
    found = bench(["a b a b a b"], None, repeats=1, max_new_tokens=6)
    ran = {row.method for row in found.runs[0].rows}
    skipped = {each["method"]: each["reason"] for each in found.skipped}
    assert {"plain", *speculation.PEERS} <= ran
    expected = {row.slug for row in ROWS if row.family == "speculation" and getattr(_class(row), "drafts", False)}
    assert {text.partition(":")[0] for text in [*ran, *skipped]} >= expected
    assert {"prompt-lookup:tokens=auto", "token-recycling:template=auto", "draft-model:tokens=auto"} <= ran
    assert skipped["suffix"] == "there are no weights in ~/weights: tokenry train suffix"
    assert "skipped suffix: there are no weights in ~" in str(found)
    # What the checks compare at one size is there too, and each check names what was measured.
    assert {check.name for check in found.checks} >= {order.name for order in speculation.ORDERINGS}


def _class(row):
    return speculation.load_class(row.slug) if row.available else None


def test_methods_that_take_one_prompt_are_left_out_of_batches(measured):
    one, two = measured.runs
    assert {"transformers-assisted", "transformers-prompt-lookup"} <= {row.method for row in one.rows}
    assert not any(row.method.startswith("transformers-") for row in two.rows)
    reasons = {(each["method"], each["batch_size"]): each["reason"] for each in measured.skipped}
    assert reasons["transformers-assisted", 2] == "takes one prompt at a time, not 2"
    assert len(reasons) == 2


def test_what_is_measured_is_not_lost_where_no_method_serves_a_batch():
    model, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    found = speculation.bench_speculation(
        model, tokenizer, ["def f(x):", "a b a b"], methods=["transformers-prompt-lookup"], batch_sizes=(1, 2),
        max_new_tokens=4, repeats=1, progress=False,
    )  # fmt: skip
    assert len(found.runs) == 1 and [each["batch_size"] for each in found.skipped] == [2]
    with pytest.raises(BadParameter, match="takes one prompt at a time, and batches of 2, 3 are asked for"):
        speculation.bench_speculation(
            model, tokenizer, ["a b"], methods=["transformers-prompt-lookup"], batch_sizes=(2, 3), progress=False
        )


def test_a_draft_that_was_named_and_is_not_there_is_an_error():
    with pytest.raises(ResourceError, match="no model in"):
        speculation.bench_speculation(tiny_text.model(), tiny_text.tokenizer(), ["a b"], draft="./none")


def test_the_draft_is_that_of_all_default_methods_that_take_one():
    found = speculation._with_draft(method("draft-model"), "./mine")
    assert str(found) == "draft-model:draft=./mine"
    assert speculation._with_draft(method("prompt-lookup"), "./mine") == method("prompt-lookup")


def test_rows_say_what_the_issue_of_drafting_is(measured):
    run = measured.runs[0]
    assert {row.workload for row in run.rows} == set(TASKS)
    drafted = run.row("prompt-lookup", "copying")
    assert drafted.tokens_per_pass >= 1 and drafted.drafted_to and drafted.drafter_seconds > 0
    assert run.row("transformers-assisted", "copying").drafted_to
    assert measured.broken == 0 and not measured.partial
    text = str(measured)
    assert "copying · 2 prompts" in text and "ms/step" in text and "…" not in text
    assert "batch size 2" in text


def test_sampled_runs_sample_every_method():
    found = bench(methods=["prompt-lookup"], temperature=0.8)
    assert {row.setting for row in found.runs[0].rows} == {"sampled at temperature 0.8"}
    assert [check.name for check in found.checks] == []


@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"per_task": 0}, BadParameter, "per_task=0"),
        ({"temperature": -1.0}, BadParameter, "temperature"),
        ({"max_new_tokens": 256}, PromptTooLong, "context of 256"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        bench(**options)


# --- checks -------------------------------------------------------------------------------------


def test_an_ordering_is_judged_by_tokens_over_passes_of_all_prompts(measured):
    run = measured.runs[0]
    order = Ordering(name="o", statement="s", method="prompt-lookup", other="plain")
    (check,) = ordering_checks(run, [order])
    rows = [run.row("prompt-lookup", task) for task in TASKS]
    assert check.measured["prompt-lookup"] == sum(row.tokens for row in rows) / sum(row.passes for row in rows)
    assert check.measured["plain"] == 1 and check.ratio.count == 4
    assert check.by_task == {task: run.row("prompt-lookup", task).tokens_per_pass for task in TASKS}
    assert check.passed == (check.measured["prompt-lookup"] >= 1)
    # The same two the other way round: as good is enough unless it must be better.
    same = Ordering(name="o", statement="s", method="plain", other="plain")
    (equal,) = ordering_checks(run, [same])
    assert equal.passed and equal.clear
    (strict,) = ordering_checks(run, [replace(same, strict=True)])
    assert not strict.passed
    assert ordering_checks(run, [Ordering(name="o", statement="s", method="plain", other="absent")]) == []


def test_losslessness_counts_outputs_that_differ(measured):
    (check,) = lossless_check(measured.runs[0])
    assert check.passed and set(check.measured) == set(METHODS) and not any(check.measured.values())
    assert check.by_task == dict.fromkeys(TASKS, 0)


def test_not_slower_means_that_the_upper_quartile_reaches_1_on_every_task(measured):
    run = measured.runs[0]
    (check,) = not_slower_checks(run, ["prompt-lookup", "absent"])
    assert check.passed == all(run.row("prompt-lookup", task).speed.upper >= 1 for task in TASKS)
    assert check.ratio.count == 2 * len(TASKS)
    # Two pairs are too few to judge a speed by.
    shown = asdict(check)
    assert check_cells(shown)[-1] == "not judged: fewer than 7 pairs"
    assert check_cells(shown | {"ratio": shown["ratio"] | {"count": 7 * len(TASKS)}})[-1].startswith(("yes", "no"))
    (reference,) = not_slower_checks(run, ["transformers"])
    assert reference.passed and reference.clear and reference.ratio.median == 1
    # Against another method the ratio is taken pair by pair.
    (beside,) = not_slower_checks(run, ["prompt-lookup", "plain"], than="plain")
    ratios = {
        task: [a / b for a, b in zip(run.row("prompt-lookup", task).pairs, run.row("plain", task).pairs, strict=True)]
        for task in TASKS
    }
    assert beside.by_task == pytest.approx({task: Spread.of(pairs).median for task, pairs in ratios.items()})
    assert beside.passed == all(Spread.of(pairs).upper >= 1 for pairs in ratios.values())
    assert not not_slower_checks(run, ["prompt-lookup"], than="absent")


def test_tasks_of_one_name_are_refused():
    twice = {"code": ["def f(x):"]}
    with pytest.raises(BadParameter, match="two tasks named 'code'"):
        bench(prompts=twice, workloads=["code"])


# --- pages --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(measured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "bench.json").write_text(measured.to_json())
    (folder / "figures.json").write_text('{"kind": "model"}')
    return folder


def test_json_has_runs_checks_and_no_samples(measured):
    data = json.loads(measured.to_json())
    assert data["kind"] == "speculation" and data["schema_version"] == 1 and data["prompts"] is None
    assert [run["settings"]["batch_size"] for run in data["runs"]] == [1, 2]
    assert all("samples" not in run for run in data["runs"])
    names = [(check["name"], check["batch_size"]) for check in data["checks"]]
    lookup = ("not-slower:prompt-lookup:transformers-prompt-lookup", 1)  # it takes one prompt at a time
    assert names == [("lossless", 1), ("not-slower:plain", 1), lookup, ("lossless", 2), ("not-slower:plain", 2)]
    assert len(data["skipped"]) == 2


def test_a_page_shows_the_figures_of_its_files(measured, folder, tmp_path):
    (page,) = write_pages([folder], tmp_path / "docs")
    text = page.read_text()
    assert page.name == "speculation.md" and write_pages([folder / "bench.json"], tmp_path / "docs") == [page]
    assert page.read_text() == text
    for run, suffix in zip(measured.runs, ("", " · batch size 2"), strict=True):
        for row in run.rows:
            section = next(part for part in text.split("\n#### ")[1:] if _is(part, row.workload, suffix))
            (line,) = [line for line in section.splitlines() if line.startswith(f"| `{row.label}` |")]
            # So few pairs say nothing of speed.
            assert f"| {row.tokens_per_pass:.2f} |" in line and row.speed.count < 7 and "×" not in line
    assert CLAIMS["token-recycling"].claim in text and CLAIMS["prompt-lookup"].why in text
    assert "outputs that differ otherwise: 0 of each of 5 methods" in text and "Skipped `transformers-assisted`" in text
    assert "plain" not in re.findall(r"^### (\S+)$", text, re.M)


def _is(section, workload, suffix):
    title = section.splitlines()[0]
    return title.startswith(f"{workload} ·") and title.endswith("new" + suffix)


def test_a_page_changes_with_the_file_alone(folder, tmp_path):
    data = json.loads((folder / "bench.json").read_text())
    row = next(row for row in data["runs"][0]["rows"] if row["method"] == "prompt-lookup")
    row["tokens_per_pass"], row["speed"]["median"] = 77.25, 66.5
    for each in data["runs"][0]["rows"]:
        each["speed"]["count"] = 7
    (tmp_path / "changed.json").write_text(json.dumps(data))
    text = family_pages([tmp_path / "changed.json"])["speculation"]
    assert text.count("77.25") == 2 and text.count("66.50×") == 2  # in its table and beside the claim
    assert "77.25" not in family_pages([folder])["speculation"]


def test_comparisons_give_the_pages_of_their_families(tmp_path):
    from tokenry.evaluation import compare

    found = compare(
        MODEL, TOKENIZER, {"mine": [Example("abc", "x", lambda output: 0.5)]},
        ["token-recycling+h2o:budget=16", "h2o:budget=16", "prompt-lookup", "cntp"],
        max_new_tokens=8, repeats=1,
    )  # fmt: skip
    found.to_json(tmp_path / "c.json")
    pages = family_pages([tmp_path])
    assert set(pages) == {"decoding", "speculation", "kvcache"}
    assert "`cntp (sampled)`" in pages["decoding"] and "h2o" not in pages["decoding"]
    assert "`plain (sampled)`" in pages["decoding"]
    assert "token-recycling+h2o" in pages["kvcache"] and "`prompt-lookup`" not in pages["kvcache"]
    assert "of plain's bytes" in pages["kvcache"] and "Fewer than 7 pairs" in pages["kvcache"]
    assert "`prompt-lookup`" in pages["speculation"] and "cntp" not in pages["speculation"]


@pytest.mark.parametrize(
    "content,words",
    [
        (None, "no result file"),
        ("{", "as JSON"),
        ('{"kind": "model"}', "no result of"),
        ('{"kind": "comparison", "schema_version": 99}', "schema version 99"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(BadParameter, match=words):
        family_pages([tmp_path / "x.json"])


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(BadParameter, match="no results of any family"):
        family_pages([tmp_path])


def test_every_available_paper_of_these_families_has_its_claim():
    families = {"speculation", "decoding", "kvcache"}
    papers = {row.slug for row in ROWS if row.family in families and row.kind == "paper" and row.available}
    assert papers <= set(CLAIMS) <= set(BY_SLUG)
    for claim in CLAIMS.values():
        assert all(text.rstrip().endswith(".") for text in (claim.claim, claim.setting, claim.why))


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_what_the_page_is_made_of(capsys, tmp_path):
    model = tiny_text.folder(tmp_path / "model")
    prompts = lines(tmp_path / "tasks.jsonl", *({"category": "qa", "turns": [text]} for text in ("a b a b", "c", "d")))
    arguments = [
        "bench", "speculation", "--model", model, "--prompts", prompts, "--methods", "plain,prompt-lookup",
        "--per-task", "2", "--max-new-tokens", "6", "--repeats", "1", "--json", tmp_path / "runs" / "r.json", "-q",
    ]  # fmt: skip
    assert cli.main([str(argument) for argument in arguments]) == 0
    data = json.loads((tmp_path / "runs" / "r.json").read_text())
    assert data["prompts"]["file"] == "tasks.jsonl" and str(tmp_path) not in json.dumps(data["prompts"])
    assert data["runs"][0]["workloads"][0] == {**data["runs"][0]["workloads"][0], "name": "qa", "prompts": 2}
    capsys.readouterr()
    assert cli.main(["results", str(tmp_path / "runs"), "--out", str(tmp_path / "docs")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "docs" / "speculation.md")
    assert "tasks.jsonl, SHA-256" in (tmp_path / "docs" / "speculation.md").read_text()
    assert cli.main(["results", str(tmp_path / "nothing")]) == 2

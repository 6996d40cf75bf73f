"""The command: help, exit codes, one line of error, pure JSON, no heavy imports where none are needed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation import tiny_text
from tokenry import __version__, cli
from tokenry.catalogue import TRAINERS
from tokenry.cli import shared
from tokenry.errors import CacheMisuse

TINY = ("--max-new-tokens", "8", "--repeats", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_text.folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return str(tiny_text.folder(tmp_path_factory.mktemp("models") / "bare", with_tokenizer=False))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text('"def f(x):"\n{"prompt": "a b a b a b"}\n{"turns": ["one", "two"]}\n')
    return str(path)


def loading(monkeypatch, replaced):
    """Have the commands call something else where they load a model."""
    for module in (cli.benches, cli.comparing, cli.generating, cli.training):
        monkeypatch.setattr(module, "load_model", replaced)


def fails(capsys, code, *arguments):
    """Run, check the exit code and that the error is one line; return the line."""
    assert cli.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenry: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


# --- help and lists -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        *("", "compare", "choose", "generate", "methods", "results", "train"),
        *("bench", "bench model", "bench speculation", "bench drafters", "bench decoding", "bench kvcache"),
    ],
)
def test_help_shows_a_real_example(capsys, command):
    assert cli.main([*command.split(), "--help"]) == 0
    assert f"tokenry {command}".strip() in capsys.readouterr().out.partition("Example")[2]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["methods"], ["methods", "--all", "--json"]], ids=" ".join
)
def test_light_commands_import_neither_torch_nor_transformers(arguments):
    code = (
        "import sys\nfrom tokenry.cli import main\n"
        f"assert main({arguments!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tokenry {__version__}\n"


def test_methods_lists_what_is_available_and_with_all_the_73(capsys):
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "token-recycling" in out and "reagent" not in out and "\x1b" not in out
    assert cli.main(["methods", "--all"]) == 0
    out = capsys.readouterr().out
    assert "reagent" in out and "(not available yet)" in out
    assert " of 73 papers available; " in out and "baselines and peers" in out
    assert cli.main(["methods", "--all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(row["kind"] == "paper" for row in found) == 73
    assert {row["slug"]: row["available"] for row in found}["h2o"] is True


def test_methods_of_a_family_and_by_name(capsys):
    assert cli.main(["methods", "--family", "kvcache", "--json"]) == 0
    assert {row["family"] for row in json.loads(capsys.readouterr().out)} == {"kvcache"}
    assert cli.main(["methods", "--family", "tokenization"]) == 0
    out = capsys.readouterr().out
    # Whether a family has a method yet changes with time.
    assert "available" in out and "--all lists" in out
    assert cli.main(["methods", "h2o"]) == 0
    assert "budget=256" in capsys.readouterr().out
    assert "no family" in fails(capsys, 2, "methods", "--family", "kv")
    assert "did you mean h2o" in fails(capsys, 2, "methods", "h20")


def test_train_lists_trainers_and_recipes(capsys):
    assert cli.main(["train", "--json"]) == 0
    found = {recipe["name"]: recipe["summary"] for recipe in json.loads(capsys.readouterr().out)}
    assert {"code", *TRAINERS} <= set(found)
    assert found["adaspec"].startswith("Distil a draft model") and all(found.values())
    assert cli.main(["train"]) == 0
    out = capsys.readouterr().out
    assert "adaspec" in out and "\ncode " in out
    assert cli.main(["methods", "adaspec"]) == 0
    assert "tokenry train adaspec" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "more"], "nothing called 'nothing' can be trained"),
        (["adaspek"], "did you mean adaspec?"),
        (["cod"], "did you mean code?"),
        (["adaspec", "--kep", "0.4"], "adaspec has no option --kep (did you mean keep?)"),
        (["adaspec", "--keep", "much"], "--keep much is not allowed; it must be a number"),
        (["adaspec", "--keep", "0"], "keep=0.0 is not allowed"),
        (["adaspec", "--keep"], "--keep has no value"),
        (["adaspec", "--keep", "1", "--keep=1"], "--keep is given twice"),
        (["adaspec", "keep", "1"], "cannot read 'keep'"),
        (["adaspec", "--text", "no-such-folder"], "no text at 'no-such-folder'"),
        (["adaspec", "--out", __file__], "is a file; name a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_says_in_one_line_what_is_wrong(capsys, arguments, message):
    assert message in fails(capsys, 2, "train", *arguments)


def test_train_refuses_models_and_texts_that_cannot_serve(capsys, bare, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    shared = ["train", "adaspec", "--out", tmp_path / "out", "--draft", folder]
    assert "holds no text files" in fails(capsys, 2, *shared, "--text", empty, "--model", folder)
    assert "has no tokenizer" in fails(capsys, 2, *shared, "--text", text, "--model", bare)
    assert "has no tokenizer" in fails(capsys, 2, *shared[:-1], bare, "--text", text, "--model", folder)
    assert "fewer than one row" in fails(capsys, 2, *shared, "--text", text, "--model", folder)
    assert "no model in './nowhere'" in fails(capsys, 2, *shared, "--text", text, "--model", "./nowhere")


def test_train_makes_a_draft_and_says_how_to_use_it(capsys, folder, tmp_path):
    pytest.importorskip("accelerate")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{n}(a):\n    return a * {n}\n"}) + "\n" for n in range(40)))
    out = tmp_path / "a (new) draft"
    options = ["--length", "16", "--batch=2", "--draft", folder, "--keep", "0.5"]
    command = ["train", "adaspec", "--model", folder, "--text", text, "--out", out, "--steps", "2", "--seed", "1"]
    assert cli.main([str(part) for part in [*command, *options, "--json"]]) == 0
    note = json.loads(capsys.readouterr().out)
    assert note["seed"] == 1 and "keep=0.5" in note["trainer"] and set(note["acceptance"]) > {"before", "after"}
    assert note["acceptance"]["before"] == pytest.approx(1.0)  # the draft began as the model itself
    draft = str(out)
    assert cli.main(["generate", "def f1(", "--model", folder, "--method", note["use"], "--max-new-tokens", "4"]) == 0
    assert (out / "model.safetensors").is_file() and draft in note["use"]


def test_a_trainer_does_not_generate(capsys, folder, prompts):
    message = fails(capsys, 2, "generate", "x", "--model", folder, "--method", "adaspec")
    assert "adaspec does not generate (it is a trainer)" in message
    assert "trainer" in fails(capsys, 2, "generate", "x", "--model", folder, "--method", "adaspec+h2o")
    compared = ["compare", "--model", folder, "--prompts", prompts, "--methods", "plain,adaspec", *TINY]
    assert "adaspec does not generate" in fails(capsys, 2, *compared)


def test_train_runs_the_steps_of_a_recipe_until_one_fails(monkeypatch):
    ran = []

    def run(command, check):
        ran.append(tuple(command[2:]))
        return subprocess.CompletedProcess(command, 3 if len(ran) == 2 else 0)

    monkeypatch.setattr(cli.training.subprocess, "run", run)
    assert cli.main(["train", "code"]) == 3
    assert ran == [("corpus",), ("train", "code")]
    assert cli.main(["train", "code", "--", "train", "code-draft", "--steps", "5"]) == 0
    assert ran[2] == ("train", "code-draft", "--steps", "5")
    assert cli.main(["train", "code", "train", "code", "--steps", "5"]) == 0
    assert ran[3] == ("train", "code", "--steps", "5")


# --- compare ------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_writes_json_and_html(capsys, folder, prompts, tmp_path):
    methods = "plain,token-recycling,h2o(budget=16, recent=0.5)"
    arguments = ["compare", "--model", folder, "--prompts", prompts, "--methods", methods, "--trace", *TINY]
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    code = cli.main([*arguments, "--methods", "sinks:budget=16", *files])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "token-recycling" in out and "h2o:budget=16" in out and "my · 3 prompts" in out and "\x1b" not in out
    data = json.loads((tmp_path / "r.json").read_text())
    assert [row["label"] for row in data["rows"]] == [
        "transformers", "plain", "token-recycling", "h2o:budget=16", "sinks:budget=16",
    ]  # fmt: skip
    assert "<svg" in (tmp_path / "r.html").read_text()
    assert err == f"report: {tmp_path / 'r.html'}\n"


@pytest.mark.parametrize("form", [["--json", "-"], ["--json"]], ids=["dash", "bare"])
def test_json_on_standard_output_is_pure(capsys, folder, prompts, form):
    assert cli.main(["compare", *form, "--model", folder, "--prompts", prompts, "--methods", "plain", *TINY]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema_version"] == 1
    assert "plain" in err


def test_compare_on_a_bundled_workload(capsys, folder):
    arguments = ["compare", "--model", folder, "--workload", "arithmetic", "--methods", "plain", "--limit", "2", *TINY]
    assert cli.main(arguments) == 0
    assert "arithmetic · 2 prompts" in capsys.readouterr().out


def test_the_demo_names_methods_and_workloads_that_exist():
    from tokenry.methods import method
    from tokenry.workloads import examples

    assert [str(method(text)).partition(":")[0] for text in cli.comparing.DEMO_METHODS] == [
        text.partition(":")[0] for text in cli.comparing.DEMO_METHODS
    ]
    for name, options in cli.comparing.DEMO_WORKLOADS.items():
        assert examples(name, 1, **options)


def test_an_interrupted_comparison_prints_what_it_has(capsys, folder, prompts, monkeypatch):
    from tokenry.evaluation.running import Runner

    run, calls = Runner.run, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 2 + 2 + 1:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(Runner, "run", interrupted)
    arguments = ["compare", "--model", folder, "--prompts", prompts, "--methods", "plain", "--max-new-tokens", "8"]
    assert cli.main([*arguments, "--repeats", "3"]) == 130
    assert "Interrupted" in capsys.readouterr().out


def test_ctrl_c_elsewhere(capsys, folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    loading(monkeypatch, interrupted)
    assert fails(capsys, 130, "generate", "x", "--model", folder) == "tokenry: interrupted\n"


def test_ctrl_c_while_text_streams_leaves_the_message_a_line_of_its_own(capsys, folder, monkeypatch):
    from tokenry import generation

    def interrupted(*args, stream, **options):
        if stream:
            stream("so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate", interrupted)
    assert cli.main(["generate", "x", "--model", folder]) == 130
    assert capsys.readouterr() == ("so far\n", "tokenry: interrupted\n")
    assert cli.main(["generate", "x", "--model", folder, "--json"]) == 130
    assert capsys.readouterr() == ("", "tokenry: interrupted\n")


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "methods,words",
    [
        ("token-recyling", "did you mean token-recycling?"),
        ("reagent", "not available yet"),
        ("h2o:budgt=4", "did you mean budget?"),
        ("h2o:budget=many", "budget must be an integer"),
        ("sinks:budget=3", "budget must be at least 5"),
        ("h2o+sinks", "cannot be combined"),
        ("plain,,h2o", "empty place"),
    ],
)
def test_bad_methods(capsys, folder, prompts, methods, words):
    error = fails(capsys, 2, "compare", "--model", folder, "--prompts", prompts, "--methods", methods)
    assert words in error


def test_bad_prompts(capsys, folder, tmp_path):
    def compare(path):
        return fails(capsys, 2, "compare", "--model", folder, "--prompts", path, "--methods", "plain", *TINY)

    assert "no prompt file" in compare(tmp_path / "missing.jsonl")
    path = tmp_path / "bad.jsonl"
    path.write_text('"fine"\n{"prompt": \n')
    assert "bad.jsonl, line 2 is not JSON" in compare(path)
    path.write_text('"fine"\n"fine"\n{"nothing": 1}\n')
    assert "line 3 has no prompt" in compare(path)
    path.write_text('"fine"\n""\n')
    assert "line 2 has no prompt" in compare(path)
    path.write_text("")
    assert "holds no prompts" in compare(path)
    path.write_text(json.dumps("x" * 300))
    assert "300 tokens" in compare(path)


def test_bad_prompts_of_generate(capsys, folder, monkeypatch):
    assert "the prompt is empty" in fails(capsys, 2, "generate", "  ", "--model", folder)
    assert "context is 256" in fails(capsys, 2, "generate", "x" * 300, "--model", folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "the prompt is empty" in fails(capsys, 2, "generate", "-", "--model", folder)


def test_bad_models(capsys, folder, bare, prompts, tmp_path):
    assert "has no tokenizer" in fails(capsys, 2, "generate", "x", "--model", bare)
    assert "no model in" in fails(capsys, 2, "generate", "x", "--model", tmp_path / "missing")
    assert "no bundled model" in fails(capsys, 2, "generate", "x", "--model", "tokenry/cod")
    assert "--dtype int8" in fails(capsys, 2, "generate", "x", "--model", folder, "--dtype", "int8")
    assert "--device" in fails(capsys, 2, "generate", "x", "--model", folder, "--device", "nowhere")


def test_a_model_that_a_method_cannot_serve(capsys, prompts, tmp_path):
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    tiny_text.tokenizer().save_pretrained(tmp_path)
    error = fails(
        capsys, 2, "compare", "--model", tmp_path, "--prompts", prompts, "--methods", "h2o:budget=16", "-q", *TINY
    )
    assert "Bloom" in error


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["comprae"], "No such command"),
        (["compare", "--nothing"], "No such option"),
        (["compare", "--repeats", "0"], "--repeats"),
        (["choose", "--loss", "2"], "--loss"),
        (["bench", "decoding", "--seeds", "1"], "--seeds"),
        (["compare", "--workload", "cod", "--methods", "plain"], "no workload 'cod'"),
        (["generate"], "PROMPT"),
        (["generate", "x", "--top-p", "1.5"], "--top-p"),
        (["generate", "x", "--top-k", "-1"], "--top-k"),
        (["compare", "--top-p", "1.5"], "--top-p"),
        (["compare", "--limit", "0"], "--limit"),
        (["compare", "--seed", "99999999999999999999"], "--seed"),
        (["compare", "--workload", ""], "'' has an empty place"),
        (["compare", "--workload", "code,,edit"], "'code,,edit' has an empty place"),
        (["compare", "--temperature", "1e-300"], "it must be at least 1e-6"),
        (["generate", "x", "--device", "meta"], "--device meta cannot be used here"),
        (["generate", "x", "--model", ""], "no model in ''"),
        (["generate", "x", "--method", "plain,h2o"], "cannot read 'plain,h2o' as a method"),
        (["methods", "h2o:budget=3"], "write tokenry methods h2o"),
        (["methods", "token-recycling+h2o"], "write tokenry methods token-recycling"),
        (["results", "missing"], "no result file or folder at 'missing'"),
    ],
)
def test_misuse_of_the_command_line(capsys, folder, arguments, words):
    arguments = [*arguments, "--model", folder] if "--workload" in arguments else arguments
    assert words in fails(capsys, 2, *arguments)


def test_a_misused_cache_exits_with_1(capsys, folder, monkeypatch):
    def misused(*_, **__):
        raise CacheMisuse("the cache was used outside its block")

    monkeypatch.setattr("tokenry.generation.generate", misused)
    assert "outside its block" in fails(capsys, 1, "generate", "def", "--model", folder)


def test_limits_of_sampling_need_sampling(capsys, folder):
    for option in (["--top-p", "0.5"], ["--top-k", "5"]):
        assert "--temperature" in fails(capsys, 2, "generate", "def", "--model", folder, *option)


def test_debug_alone_shows_the_help(capsys):
    assert cli.main(["--debug"]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err


def test_other_failures_exit_with_1_and_debug_shows_the_traceback(capsys, folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    loading(monkeypatch, broken)
    error = fails(capsys, 1, "generate", "x", "--model", folder)
    assert error == "tokenry: RuntimeError: first line second line (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="first line"):
        cli.main(["generate", "x", "--model", folder, "--debug"])


# --- generate -----------------------------------------------------------------------------------


def test_generate_streams_the_same_text_for_lossless_methods(capsys, folder):
    outputs = []
    for method in ("plain", "token-recycling", "prompt-lookup"):
        assert cli.main(["generate", "def f(", "--model", folder, "--method", method, "--max-new-tokens", "20"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0].endswith("\n")


def test_generate_json(capsys, folder):
    arguments = ["generate", "def f(", "--model", folder, "--method", "token-recycling+sinks:budget=16;compact_every=4"]
    assert cli.main([*arguments, "--max-new-tokens", "9", "--json", "--stats"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert len(data["tokens"]) == len(data["sources"]) <= 9
    assert data["method"] == arguments[-1] and data["setting"] == "greedy" and data["stats"]["forwards"] > 0
    assert "passes" in err


def test_generate_json_names_what_ran(capsys, folder):
    arguments = ["generate", "def f(", "--model", folder, "--method", "prompt-lookup+h2o:budget=16", "--json"]
    assert cli.main([*arguments, "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["method"] == "prompt-lookup+h2o:budget=16;compact_every=16"
    assert "method: prompt-lookup+h2o:budget=16;compact_every=16 (drafts need" in err
    arguments[arguments.index("--method") + 1] += ";compact_every=4"
    assert cli.main([*arguments, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["superposed-decoding:k=3;alpha=0", "in-context-navigation:rounds=2;per_round=2"])
def test_generate_shows_all_texts_of_a_method_that_writes_several(capsys, folder, method):
    arguments = ["generate", "def f(", "--model", folder, "--method", method, "--max-new-tokens", "4"]
    assert cli.main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    count = 3 if method.startswith("superposed") else 4
    assert len(data["texts"]) == count and len(set(data["texts"])) > 1 and data["text"] == data["texts"][0]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed == "".join(f"{number}: {text}\n" for number, text in enumerate(data["texts"], 1))
    # One text streams as ever, and stands in the list alone.
    one = [*arguments[:-3], "superposed-decoding:k=1;alpha=0", *arguments[-2:]]
    assert cli.main([*one, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["texts"] == [data["text"]]
    assert cli.main(one) == 0
    assert capsys.readouterr().out == data["text"] + "\n"


def test_generate_samples_with_a_seed(capsys, folder):
    found = []
    for seed in (1, 1, 2):
        arguments = ["generate", "ab", "--model", folder, "--temperature", "1", "--seed", str(seed), "--json"]
        assert cli.main([*arguments, "--max-new-tokens", "12"]) == 0
        found.append(json.loads(capsys.readouterr().out)["tokens"])
    assert found[0] == found[1] != found[2]


def test_generate_samples_by_default_where_the_method_samples(capsys, folder):
    assert cli.main(["generate", "ab", "--model", folder, "--method", "cntp", "--json", "--max-new-tokens", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["setting"] == "sampled at temperature 1"


# --- bench --------------------------------------------------------------------------------------


def test_bench_speculation_checks_and_reports(capsys, folder, prompts, tmp_path):
    arguments = [
        "bench",
        "speculation",
        "--model",
        folder,
        "--prompts",
        prompts,
        "--batch-size",
        "1",
        "--batch-size",
        "2",
    ]
    code = cli.main(
        [*arguments, "--max-new-tokens", "8", "--tail", "4", "--repeats", "1", "--json", str(tmp_path / "r")]
    )
    err = capsys.readouterr().err
    assert code == 0, err
    runs = json.loads((tmp_path / "r").read_text())["runs"]
    assert [run["settings"]["batch_size"] for run in runs] == [1, 2]
    assert all(row["lossless"] == "yes" for run in runs for row in run["rows"][1:])


def test_bench_speculation_fails_where_outputs_differ(capsys, folder, prompts, monkeypatch):
    from tokenry.evaluation import comparison
    from tokenry.evaluation.metrics import Lossless

    monkeypatch.setattr(comparison, "check_lossless", lambda *args, **options: Lossless(1, 0, 1))
    arguments = ["bench", "speculation", "--model", folder, "--prompts", prompts, "--methods", "prompt-lookup", *TINY]
    assert cli.main(arguments) == 1
    assert "no (3 of 3)" in capsys.readouterr().out


def test_bench_model(capsys, tmp_path):
    path = tmp_path / "long"
    tiny_text.model(context=8192).save_pretrained(path)
    tiny_text.tokenizer().save_pretrained(path)
    arguments = ["bench", "model", "--model", str(path), "--draft", "none", "--bytes", "2000", "--limit", "2", "--json"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert set(data["bits_per_byte"]) == {"model", "gzip", "xz"} and data["bits_per_byte"]["model"] > 1
    assert set(data["recall"]) >= {"all", "0.1"} and 0 <= data["edit"] <= 1
    assert "recall at 1500 tokens" in err


def test_bench_model_has_a_draft_only_beside_the_bundled_model(capsys, monkeypatch):
    from tokenry import evaluation, models

    asked = []
    loading(monkeypatch, lambda *args: (object(), object()))
    monkeypatch.setattr(models, "resource", lambda name, model: asked.append(name))

    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "bench_model", stopped)
    for arguments in ([], ["--model", "./mine"], ["--model", "./mine", "--draft", "./small"], ["--draft", "none"]):
        assert cli.main(["bench", "model", *arguments]) == 130
    assert asked == ["tokenry/code-draft", "./small"]


# --- output files and exit codes ----------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [["compare"], ["choose"], ["bench", "model"], ["bench", "speculation"], ["bench", "decoding"]],
    ids=" ".join,
)
def test_output_paths_are_checked_before_anything_is_loaded(capsys, monkeypatch, tmp_path, command):
    def loaded(*args):
        raise AssertionError("a model was loaded")

    loading(monkeypatch, loaded)
    (tmp_path / "file").write_text("")
    assert "is a folder" in fails(capsys, 2, *command, "--json", tmp_path)
    assert "cannot be written" in fails(capsys, 2, *command, "--json", tmp_path / "file" / "r.json")
    if command == ["compare"]:
        assert "--html" in fails(capsys, 2, *command, "--html", tmp_path)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in fails(capsys, 2, *command, "--json", tmp_path / "r.json")


def test_a_check_of_an_output_leaves_nothing_behind(tmp_path):
    shared.check_output("--json", tmp_path / "new" / "r.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old").write_text("old")
    shared.check_output("--json", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    os.mkfifo(tmp_path / "pipe")
    shared.check_output("--json", tmp_path / "pipe")  # a pipe without a reader would block


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[1]", "is no result"),
        ('{"kind": "comparison"}', "schema version None"),
        ('{"kind": "comparison", "schema_version": 1, "rows": 3}', "is not whole"),
        ('{"kind": "speculation", "schema_version": 1, "runs": []}', "is not whole"),
    ],
)
def test_results_that_cannot_be_read(capsys, tmp_path, text, words):
    (tmp_path / "r.json").write_text(text)
    assert words in fails(capsys, 2, "results", tmp_path / "r.json", "--out", tmp_path / "out")


def test_a_file_that_may_not_be_read_is_named(capsys, monkeypatch, folder):
    def denied(*args):
        raise PermissionError(13, "Permission denied", "my.jsonl")

    loading(monkeypatch, denied)
    error = fails(capsys, 2, "generate", "x", "--model", folder)
    assert error == "tokenry: my.jsonl cannot be used: Permission denied\n"


def test_prompts_of_windows_and_of_all_scripts(capsys, folder, tmp_path):
    lines = '"def f(x):"\r\n\r\n{"prompt": "h\u00e9llo \U0001f600"}\r\n'
    (tmp_path / "my.jsonl").write_bytes(lines.encode("utf-8-sig"))
    arguments = ["compare", "--model", folder, "--prompts", str(tmp_path / "my.jsonl"), "--methods", " plain ", *TINY]
    assert cli.main(arguments) == 0
    assert "my · 2 prompts" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_figures_of_a_file_that_cannot_be_written_are_printed(capsys, folder, prompts):
    arguments = ["compare", "--model", folder, "--prompts", prompts, "--methods", "plain", *TINY]
    assert cli.main([*arguments, "--json", "/dev/full", "--html", "/dev/full"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["schema_version"] == 1
    line = err.splitlines()[-1]
    assert line.startswith("tokenry: --json /dev/full could not be written (No space left") and "--html" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_standard_output_is_one_line_of_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tokenry", "methods"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--temperature", "0"], "temperature=0.0 is not allowed"),
        (["compare", "--temperature", "nan"], "temperature=nan is not allowed"),
        (["choose", "--temperature", "nan"], "--temperature"),
        (["bench", "speculation", "--temperature", "inf"], "temperature=inf is not allowed"),
        (["generate", "x", "--temperature", "nan"], "--temperature"),
        (["generate", "x", "--temperature", "inf"], "temperature=inf is not allowed"),
        (["generate", "x\udcff"], "half of a character"),
        (["compare", "--bits", "EMPTY"], "is empty; give a file with text"),
        (["compare", "--bits", "MISSING"], "cannot read"),
        (["compare", "--prompts", "MISSING"], "no prompt file"),
        (["choose", "--workload", "cod"], "no workload 'cod'"),
        (["choose", "--goal", "fame"], "goal='fame' is not allowed"),
        (["choose", "--budget", "0"], "budget=0.0 is not allowed"),
        (["choose", "--draft", "x", "--no-second-model"], "--draft and --no-second-model exclude each other"),
        (["bench", "decoding", "--part", "cntp,cn"], "no part 'cn'; there are cntp, r2r"),
        (["bench", "speculation", "--prompts", "EMPTY"], "holds no prompts"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_options_and_inputs_are_checked_before_anything_is_loaded(capsys, monkeypatch, tmp_path, arguments, words):
    def loaded(*args):
        raise AssertionError("a model was loaded")

    loading(monkeypatch, loaded)
    (tmp_path / "empty").write_text("")
    names = {"EMPTY": str(tmp_path / "empty"), "MISSING": str(tmp_path / "missing")}
    assert words in fails(capsys, 2, *(names.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize("arguments", [[], ["bench"]], ids=["root", "bench"])
def test_without_arguments_the_help_is_all_that_is_said(capsys, arguments):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Usage" in out + err and "tokenry: " not in err


def test_the_module_exits_with_the_commands_code():
    done = subprocess.run(
        [sys.executable, "-m", "tokenry", "methods", "h20"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 2 and "did you mean h2o" in done.stderr

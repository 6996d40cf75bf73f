"""Exact means however a batch is split, resume to the bit, what is saved, what is logged, what is frozen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests import tiny
from tokenry.errors import BadMethod, BadParameter, ResourceError, UnsupportedModel
from tokenry.objectives import Objective, ObjectiveTrainer, TrainingDiverged, fit, label_count, mixed, shifted_ce

pytest.importorskip("accelerate")

TOO_MANY = 0.05  # learning rate at which differences of gradients show in the weights


class NextToken(Objective):
    """Next-token prediction, and the token after it by a head of its own: two terms with different counts."""

    def __init__(self, weight=0.5, head=True):
        self.weight, self.head, self.steps, self.draws = weight, head, 0, []

    def modules(self, model):
        return {"head": nn.Linear(32, tiny.VOCABULARY, dtype=model.dtype)} if self.head else {}

    def prepare(self, window, ctx):
        if ctx.training:
            self.steps += 1
            self.draws.append(torch.rand((), generator=ctx.generator(7)).item())
        return window

    def counts(self, batch):
        return {"next": label_count(batch["labels"]), "after": label_count(batch["labels"], 2)}

    def terms(self, model, extra, batch, ctx):
        out = model(input_ids=batch["input_ids"], output_hidden_states=True, use_cache=False)
        terms = {"next": shifted_ce(out.logits, batch["labels"])}
        if self.head:
            terms["after"] = shifted_ce(out.hidden_states[-1], batch["labels"], 2, head=extra["head"])
        return terms, out.logits.detach()

    def weights(self, ctx):
        return {"after": self.weight}

    def metrics(self, batch, outputs):
        kept = batch["labels"][:, 1:] != -100
        return {"accuracy": ((outputs[:, :-1].argmax(-1) == batch["labels"][:, 1:])[kept].sum(), kept.sum())}

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def rows(count=8, length=12, seed=0):
    """Rows of random tokens, learned from the position of their number on: from nearly all to two."""
    ids = torch.randint(3, tiny.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(count):
        labels[row, : row + 3] = -100
    return [{"input_ids": i, "labels": one} for i, one in zip(ids, labels, strict=True)]


def weights(bundle):
    return torch.cat([p.detach().flatten() for p in bundle.parameters()])


def trained(folder=None, objective=None, dtype=torch.float64, data=None, **options):
    defaults = {"steps": 1, "lr": TOO_MANY, "batch": 8, "progress": False}
    return fit(tiny.model(dtype=dtype), objective or NextToken(), data or rows(), folder, **defaults | options)


# --- exact means ---------------------------------------------------------------------------------


def test_splitting_a_batch_changes_nothing():
    whole = weights(trained(steps=3))
    for batch, accumulate in ((4, 2), (2, 4), (1, 8)):
        split = weights(trained(steps=3, batch=batch, accumulate=accumulate))
        assert (split - whole).abs().max() < 1e-9
    # The mean of the micro-batches' own means is something else: the test can fail.
    assert (weights(trained(steps=3, objective=_MeanOfMeans(), batch=1, accumulate=8)) - whole).abs().max() > 1e-3


class _MeanOfMeans(NextToken):
    def counts(self, batch):
        return {"next": 1.0, "after": 1.0}

    def terms(self, model, extra, batch, ctx):
        terms, out = super().terms(model, extra, batch, ctx)
        n = super().counts(batch)
        return {name: total / n[name].clamp(min=1) for name, total in terms.items()}, out


class _Plain(NextToken):
    def __init__(self):
        super().__init__(head=False)


def test_next_token_prediction_is_the_stock_trainer(tmp_path):
    ours = trained(objective=_Plain(), steps=3, batch=4, accumulate=2, max_grad_norm=1.0)
    model = tiny.model(dtype=torch.float64)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=TOO_MANY, lr_scheduler_type="constant", use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows()).train()
    # transformers' own loss is taken in float32 here, ours in float64.
    for one, two in zip(ours.model.parameters(), model.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-4
    assert (weights(ours) - weights(tiny.model(dtype=torch.float64))).abs().max() > 1e-2


def test_weights_of_terms_and_a_term_switched_off():
    off = trained(objective=NextToken(weight=0.0), steps=2).model
    plain = trained(objective=_Plain(), steps=2).model
    on = trained(steps=2).model
    assert (weights(off) - weights(plain)).abs().max() < 1e-12
    assert (weights(on) - weights(plain)).abs().max() > 1e-4


def test_rows_without_targets_are_no_division_by_zero():
    empty = [{"input_ids": row["input_ids"], "labels": torch.full_like(row["labels"], -100)} for row in rows(4)]
    start = trained(objective=_Plain(), steps=1, lr=1e-12)
    nothing = trained(objective=_Plain(), data=empty, steps=2, batch=2)
    assert torch.isfinite(weights(nothing)).all()
    assert (weights(nothing) - weights(start)).abs().max() < 1e-9
    mixed = trained(objective=_Plain(), data=[*empty, *rows(4)], steps=1, batch=1, accumulate=8)
    alone = trained(objective=_Plain(), data=rows(4), steps=1, batch=4)
    assert (weights(mixed) - weights(alone)).abs().max() < 1e-9


def test_two_processes_equal_one(tmp_path):
    one = weights(trained(steps=2, batch=8, dtype=torch.float32))
    code = (
        "import torch\nfrom tests.objectives.test_engine import *\n"
        f"bundle = trained({str(tmp_path / 'run')!r}, steps=2, batch=4, dtype=torch.float32)\n"
        f"torch.save(weights(bundle), {str(tmp_path)!r} + '/' + os.environ['RANK'] + '.pt')\n"
        # Its threads would end the process with an abort once in a while.
        "torch.distributed.destroy_process_group()\n"
    )
    root = str(Path(__file__).parents[2])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared["PYTHONPATH"] = os.pathsep.join([root, *(path for path in sys.path if path)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    for rank in range(2):
        assert (torch.load(tmp_path / f"{rank}.pt") - one).abs().max() < 1e-4


def _free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# --- evaluation and the log ----------------------------------------------------------------------


def _trainer(tmp_path, batch=3, objective=None):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=batch, use_cpu=True, report_to="none", disable_tqdm=True
    )
    model = tiny.model(dtype=torch.float64)
    torch.manual_seed(0)
    return ObjectiveTrainer(model, objective or NextToken(), arguments, eval_dataset=rows())


def test_evaluation_does_not_depend_on_the_batch(tmp_path):
    found = [_trainer(tmp_path, batch).evaluate() for batch in (1, 3, 8)]
    names = ["eval_loss", "eval_term/next", "eval_term/after", "eval_metric/accuracy"]
    for name in names:
        values = [each[name] for each in found]
        assert max(values) - min(values) < 1e-9
    means = [found[0][name] for name in names]
    assert means[0] == pytest.approx(means[1] + 0.5 * means[2])
    model, data = tiny.model(dtype=torch.float64), torch.utils.data.default_collate(rows())
    logits = model(data["input_ids"]).logits
    right = shifted_ce(logits, data["labels"]) / label_count(data["labels"])
    assert means[1] == pytest.approx(right.item())


def test_the_log_holds_the_terms_that_make_up_the_loss(tmp_path):
    trained(tmp_path / "run", steps=4, batch=4, accumulate=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    for line in logged:
        assert line["loss"] == pytest.approx(line["term/next"] + 0.5 * line["term/after"])
        assert 0 <= line["metric/accuracy"] <= 1 and line["seconds"] >= 0
    # All rows are one step, so the first line is the mean at the start.
    assert logged[0]["term/next"] == pytest.approx(_trainer(tmp_path / "other").evaluate()["eval_term/next"])


def test_a_diverged_run_ends_with_an_error(tmp_path):
    class Diverges(_Plain):
        def terms(self, model, extra, batch, ctx):
            terms, out = super().terms(model, extra, batch, ctx)
            return {name: total * (float("nan") if ctx.step == 2 else 1) for name, total in terms.items()}, out

    with pytest.raises(TrainingDiverged, match="at step 3"):
        trained(tmp_path, objective=Diverges(), steps=6, save_every=3)
    assert not list(tmp_path.glob("checkpoint-*"))


# --- stopped and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "mixed"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, dtype):
    options = {"steps": 6, "batch": 2, "accumulate": 2, "save_every": 2, "schedule": "cosine", "warmup": 2}
    options |= {"dtype": dtype, "lr": 1e-2, "groups": {"extra.": 3.0}}

    def run(folder, stop_at=None):
        model = tiny.model(seed=5)
        objective, calls = NextToken(), []

        def interrupt(module, args, kwargs):
            calls.append(None)
            if len(calls) == stop_at:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(interrupt, with_kwargs=True)
        return fit(model, objective, rows(), folder, progress=False, **options), objective

    whole, one = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=10)
    assert sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (tmp_path / "parts" / "checkpoint-9").mkdir()  # what a kill while saving leaves
    resumed, two = run(tmp_path / "parts")
    assert torch.equal(weights(whole), weights(resumed))
    assert one.steps == two.steps == 6
    # The draws of the steps that were done again are those of the whole run.
    assert two.draws == one.draws[4:]
    # A finished run is read back, not run again.
    again, three = run(tmp_path / "parts", stop_at=1)
    assert torch.equal(weights(again), weights(whole)) and three.steps == 6


def test_a_folder_of_another_run_is_refused(tmp_path):
    trained(tmp_path, steps=2, save_every=1)
    with pytest.raises(ResourceError, match=r"differs in lr, steps; remove"):
        trained(tmp_path, steps=3, lr=0.1)
    with pytest.raises(ResourceError, match="differs in settings"):
        trained(tmp_path, steps=2, settings="x")


def test_the_same_seed_gives_the_same_run_and_another_another():
    one, two, other = (weights(trained(steps=2, batch=2, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_processes_and_steps_draw_apart(tmp_path):
    ctx = _trainer(tmp_path).context()
    draws = set()
    for change in ({}, {"rank": 1}, {"step": 1}, {"seed": 1}):
        other = type(ctx)(**{**vars(ctx), **change})
        for key in ((), (1,)):
            draws.add(torch.rand((), generator=other.generator(*key)).item())
    assert len(draws) == 8


# --- what is trained and what is saved -----------------------------------------------------------


def test_what_is_saved_loads_as_an_ordinary_model(tmp_path):
    bundle = trained(dtype=torch.float32)
    bundle.save(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors", "objective.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one, two in zip(model.parameters(), bundle.model.parameters(), strict=True):
        assert torch.equal(one, two)
    fresh = trained(dtype=torch.float32, steps=2, seed=9)
    fresh.load(tmp_path)
    assert torch.equal(weights(fresh), weights(bundle))


def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path):
    model = tiny.model("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    bundle = fit(model, _Plain(), rows(), tmp_path / "run", steps=2, lr=1e-2, progress=False)
    bundle.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, bundle.model.lm_head.weight)
    again = fit(tiny.model("gemma"), _Plain(), rows(), tmp_path / "run", steps=2, lr=1e-2, progress=False)
    assert torch.equal(weights(again), weights(bundle))
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight


def test_a_frozen_model_is_untouched_and_not_saved(tmp_path):
    class HeadOnly(NextToken):
        def modules(self, model):
            model.requires_grad_(False)
            return super().modules(model)

        def terms(self, model, extra, batch, ctx):
            terms, out = super().terms(model, extra, batch, ctx)
            return {"after": terms["after"]}, out

    bundle = trained(tmp_path / "run", objective=HeadOnly(), steps=2, save_every=1, weight_decay=0.1)
    for one, two in zip(bundle.model.parameters(), tiny.model(dtype=torch.float64).parameters(), strict=True):
        assert torch.equal(one, two)
    saved = {path.name for path in (tmp_path / "run" / "checkpoint-2").glob("*.safetensors")}
    assert saved == {"objective.safetensors"}
    again = trained(tmp_path / "run", objective=HeadOnly(), steps=2, weight_decay=0.1)
    assert torch.equal(weights(again), weights(bundle))


def test_learning_rates_by_prefix():
    start = trained(steps=1, lr=1e-12)
    bundle = trained(steps=1, lr=1e-3, groups={"extra.": 10.0, "model.lm_head": 0.0}, max_grad_norm=1e9)
    moved = {
        name: (one - two).abs().max().item()
        for (name, one), two in zip(bundle.named_parameters(), start.parameters(), strict=True)
    }
    # The first step of Adam moves by the learning rate.
    assert moved["extra.head.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["model.lm_head.weight"] < 1e-9
    assert moved["model.model.norm.weight"] == pytest.approx(1e-3, rel=1e-3)


def test_half_precision_weights_are_trained_in_float32():
    bundle = trained(dtype=torch.bfloat16, steps=2, lr=1e-5)
    assert {p.dtype for p in bundle.parameters()} == {torch.float32}
    assert (weights(bundle.model) - weights(tiny.model(dtype=torch.bfloat16).float())).abs().max() > 0
    # Mixed precision ends with the run, and differs from none.
    half = fit(tiny.model(), _Plain(), rows(), None, steps=2, lr=1e-3, dtype=torch.bfloat16, progress=False)
    exact = fit(tiny.model(), _Plain(), rows(), None, steps=2, lr=1e-3, progress=False)
    assert {p.dtype for p in half.parameters()} == {torch.float32} and "forward" not in vars(half)
    assert 0 < (weights(half) - weights(exact)).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({"amx_bf16": False}, None),
        ({}, None),
    ],
)
def test_automatic_precision_follows_the_instructions(found, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **found}, raising=False)
    cpu = torch.device("cpu")
    assert mixed("auto", cpu) == chosen
    assert mixed("bfloat16", cpu) == torch.bfloat16 and mixed("float32", cpu) is None


def test_automatic_precision_of_a_torch_that_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert mixed("auto", torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, BadParameter, "steps=0"),
        ({"batch": 0}, BadParameter, "batch=0"),
        ({"data": []}, BadParameter, "empty"),
        ({"groups": {"extra.hed": 2.0}}, BadParameter, "extra.hed"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    data = options.pop("data", rows())
    with pytest.raises(error, match=message):
        fit(tiny.model(), NextToken(), data, None, **{"steps": 1, "lr": 1e-3, "progress": False} | options)


def test_a_frozen_model_without_extras_and_foreign_modules_are_refused():
    frozen = tiny.model().requires_grad_(False)
    with pytest.raises(BadParameter, match="nothing is trained"):
        fit(frozen, _Plain(), rows(), None, steps=1, lr=1e-3, progress=False)
    with pytest.raises(UnsupportedModel, match="Linear"):
        ObjectiveTrainer(nn.Linear(2, 2), _Plain(), TrainingArguments(output_dir="unused", use_cpu=True))


def test_a_term_without_a_count_is_named():
    class Forgets(_Plain):
        def counts(self, batch):
            return {}

    with pytest.raises(BadMethod, match=r"Forgets\.terms gives next"):
        trained(objective=Forgets())

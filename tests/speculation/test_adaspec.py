"""Selection by the gap to a reference: what is kept, what it equals at its ends, what it never touches."""

from __future__ import annotations

import copy
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.evaluation import tiny_text
from tokenry.errors import BadParameter, ResourceError
from tokenry.models import load
from tokenry.objectives import Context, TokenRows, fit
from tokenry.objectives.trainable import RUN, run
from tokenry.speculation.adaspec import (
    AdaSpecTrainer,
    SelectiveDistillation,
    acceptance,
    compare_distillation,
    largest,
    sampled,
)

pytest.importorskip("accelerate")

CONTEXT = Context(step=0, max_steps=1, seed=0, rank=0, processes=1, bundle=None)
EVALUATION = Context(step=0, max_steps=1, seed=0, rank=0, processes=1, bundle=None, training=False)


def batch(rows=4, length=9, ignored=True):
    ids = torch.randint(3, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if ignored:
        labels[0, 2:6] = labels[1, :4] = labels[3] = -100
    return {"input_ids": ids, "labels": labels}


def models(dtype=torch.float64):
    """Target, draft and reference, all different."""
    return (tiny.model(dtype=dtype, seed=seed) for seed in (0, 1, 2))


def loss_and_gradient(objective, draft, given, ctx=CONTEXT):
    terms, found = objective.terms(draft, None, given, ctx)
    loss = terms["kl"] / objective.counts(given)["kl"]
    return loss, torch.autograd.grad(loss, list(draft.parameters())), found


def close(one, two):
    return all(torch.allclose(a, b, atol=1e-12, rtol=1e-9) for a, b in zip(one, two, strict=True))


def per_token(target, draft, given):
    learned = given["labels"][:, 1:] != -100
    p, q = (m(given["input_ids"]).logits[:, :-1][learned].log_softmax(-1) for m in (target, draft))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


# --- which tokens are kept -----------------------------------------------------------------------


def test_kept_is_what_is_at_least_the_quantile():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 10, 11, 257):
        gap = torch.randn(n, generator=generator)
        for keep in (1e-6, 0.1, 0.25, 0.4, 0.5, 0.6, 0.9, 1.0):
            kept = largest(gap, keep)
            assert kept.sum() == n - math.ceil(round((1 - keep) * (n - 1), 6))
            assert gap[kept].min() >= gap[~kept].max() if (~kept).any() else keep == 1 or n == 1
            # torch.quantile interpolates in float32; a rank that it meets exactly may fall to its rounding.
            if abs((1 - keep) * (n - 1) - round((1 - keep) * (n - 1))) > 1e-3:
                assert torch.equal(kept, gap >= torch.quantile(gap, 1 - keep))


def test_equal_gaps_at_the_threshold_are_all_kept_and_none_is_lost():
    assert largest(torch.zeros(7), 0.4).all()
    assert largest(torch.tensor([1.0, 2, 2, 2, 3]), 0.5).tolist() == [False, True, True, True, True]
    assert largest(torch.tensor([1.0, 5, 3]), 1e-9).tolist() == [False, True, False]
    assert largest(torch.empty(0), 0.4).shape == (0,)
    # Differences that half precision cannot hold still decide.
    near = torch.tensor([1.0, 1.0001, 1.0002, 1.0003, 1.0004])
    assert largest(near, 0.5).sum() == 3 and largest(near.bfloat16(), 0.5).sum() == 5


@pytest.mark.parametrize("normaliser", ["all", "kept"])
def test_everything_kept_is_plain_distillation(normaliser):
    target, draft, reference = models()
    given = batch()
    losses = per_token(target, draft, given)
    right = torch.autograd.grad(losses.mean(), list(draft.parameters()))
    plain = SelectiveDistillation(target)
    whole = SelectiveDistillation(target, reference, keep=1.0, normaliser=normaliser)
    for objective in (plain, whole):
        loss, grad, found = loss_and_gradient(objective, draft, given)
        assert torch.allclose(loss, losses.mean()) and close(grad, right)
        assert found["kept"] == (len(losses), len(losses))
    # A reference that is the draft leaves no gap: every token ties at the threshold.
    same = SelectiveDistillation(target, copy.deepcopy(draft), keep=0.4, normaliser=normaliser)
    loss, grad, _ = loss_and_gradient(same, draft, given)
    assert torch.allclose(loss, losses.mean()) and close(grad, right)


@pytest.mark.parametrize("normaliser", ["all", "kept"])
def test_the_largest_gaps_are_kept_and_the_reference_changes_nothing_else(normaliser):
    target, draft, reference = models()
    given = batch()
    losses, theirs = per_token(target, draft, given), per_token(target, reference, given)
    kept = largest((losses - theirs).detach(), 0.4)
    assert 0 < kept.sum() < len(kept)
    objective = SelectiveDistillation(target, reference, keep=0.4, normaliser=normaliser)
    loss, grad, found = loss_and_gradient(objective, draft, given)
    right = losses[kept].sum() / (len(losses) if normaliser == "all" else kept.sum())
    assert torch.allclose(loss, right)
    assert close(grad, torch.autograd.grad(right, list(draft.parameters())))
    assert found["kept"] == (kept.sum(), len(kept)) and torch.allclose(found["kl"][0], losses.sum())
    # Another reference selects other tokens, whose losses are what they were.
    other = SelectiveDistillation(target, tiny.model(dtype=torch.float64, seed=7), keep=0.4, normaliser=normaliser)
    moved, _, found = loss_and_gradient(other, draft, given)
    assert not torch.allclose(moved, loss) and torch.allclose(found["kl"][0], losses.sum())
    # Keeping one token keeps the one with the largest gap.
    one, _, found = loss_and_gradient(
        SelectiveDistillation(target, reference, keep=1e-9, normaliser="kept"), draft, given
    )
    assert found["kept"][0] == 1 and torch.allclose(one, losses[(losses - theirs).argmax()])


def test_controls_keep_the_smallest_or_random_tokens():
    target, draft, reference = models()
    given = batch(ignored=False)
    losses, theirs = per_token(target, draft, given), per_token(target, reference, given)
    count = largest(losses, 0.4).sum()
    sums = {}
    for kept in ("largest", "smallest", "random"):
        objective = SelectiveDistillation(target, reference, keep=0.4, kept=kept)
        terms, found = objective.terms(draft, None, given, CONTEXT)
        assert found["kept"][0] == count
        sums[kept] = terms["kl"]
    smallest = losses[(losses - theirs).argsort()[:count]].sum()
    assert torch.allclose(sums["smallest"], smallest)
    assert len({round(total.item(), 6) for total in sums.values()}) == 3


def test_tokens_beyond_the_drafts_capacity_are_dropped():
    """60% of the tokens follow from the one before, 40% need the one before that, which neither draft nor reference
    sees: trained, the reference is right on the first and as lost as the draft on the others."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, length = 8, 2001
    ids = torch.randint(0, vocabulary, (1, length), generator=generator)
    easy = torch.rand(1, length, generator=generator) < 0.6
    target = torch.zeros(1, length, vocabulary)
    target[easy] = 12.0 * F.one_hot(ids[easy], vocabulary).float()
    hard = torch.roll(ids, 1, 1)[~easy]
    target[~easy] = 12.0 * F.one_hot(hard, vocabulary).float()
    reference = torch.where(easy[..., None], target, 0.01 * torch.randn(target.shape, generator=generator))
    draft = 0.01 * torch.randn(target.shape, generator=generator)

    def table(logits):
        made = types.SimpleNamespace(logits=logits)
        model = torch.nn.Module()
        model.forward = lambda **_: made
        return model

    draft.requires_grad_(True)
    objective = SelectiveDistillation(table(target), table(reference), keep=0.6)
    terms, _ = objective.terms(table(draft), None, {"input_ids": ids, "labels": ids}, CONTEXT)
    terms["kl"].backward()
    taught = draft.grad.abs().sum(-1)[:, :-1] > 0
    # The share of easy tokens is 0.6 +- 0.011 (a standard deviation of 2,000 draws), and so nearly all that is kept.
    assert easy[:, :-1][taught].float().mean() > 0.95
    assert taught[easy[:, :-1]].float().mean() > 0.95


# --- what it must not see or touch ---------------------------------------------------------------


def test_no_gradient_reaches_target_or_reference():
    target, draft, reference = models()
    before = [copy.deepcopy(m.state_dict()) for m in (target, reference)]
    terms, _ = SelectiveDistillation(target, reference, keep=0.4).terms(draft, None, batch(), CONTEXT)
    terms["kl"].backward()
    assert all(p.grad is None for m in (target, reference) for p in m.parameters())
    assert any(p.grad is not None and p.grad.any() for p in draft.parameters())
    data = TokenRows(batch()["input_ids"])
    objective = SelectiveDistillation(target, reference, keep=0.4)
    fit(draft, objective, data, None, steps=2, batch=2, lr=1e-2, weight_decay=0.1, progress=False)
    for model, state in zip((target, reference), before, strict=True):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_ignored_and_padded_positions_count_for_nothing():
    target, draft, reference = models()
    given = batch(rows=2, ignored=False)
    objective = SelectiveDistillation(target, reference, keep=0.4)
    loss, grad, found = loss_and_gradient(objective, draft, given)
    padded = {
        "input_ids": F.pad(given["input_ids"], (0, 5)),
        "labels": F.pad(given["labels"], (0, 5), value=-100),
        "attention_mask": F.pad(torch.ones_like(given["input_ids"]), (0, 5)),
    }
    empty = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in padded.items()}
    empty["labels"][2] = -100
    for other in (padded, empty):
        again, grad_again, found_again = loss_and_gradient(objective, draft, other)
        assert torch.allclose(again, loss) and close(grad_again, grad) and found_again["kept"] == found["kept"]


@pytest.mark.parametrize("normaliser", ["all", "kept"])
def test_a_micro_batch_without_targets_is_zero(normaliser):
    target, draft, reference = models()
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    objective = SelectiveDistillation(target, reference, keep=0.4, normaliser=normaliser)
    terms, found = objective.terms(draft, None, given, EVALUATION)
    assert terms["kl"] == 0 and objective.counts(given)["kl"] == 0
    assert all(total == 0 and count == 0 for total, count in found.values())
    data = [{name: tensor[row] for name, tensor in given.items()} for row in range(4)]
    start = copy.deepcopy(draft.state_dict())
    trained = fit(draft, objective, data, None, steps=1, batch=2, lr=1e-2, progress=False).model
    assert all(torch.equal(trained.state_dict()[name], tensor) for name, tensor in start.items())


def test_ids_of_one_model_alone_are_cut_before_the_softmax():
    def wider(model):
        torch.manual_seed(3)
        model.resize_token_embeddings(tiny.VOCABULARY + 6, mean_resizing=False)
        model.get_output_embeddings().weight.data[-6:] += 3
        return model

    given = batch()
    rows = TokenRows(given["input_ids"])

    def measured(target, draft, reference):
        objective = SelectiveDistillation(target, reference, keep=0.4)
        return loss_and_gradient(objective, draft, given)[0].item(), acceptance(draft, target, rows)

    target, draft, reference = models()
    right = measured(target, draft, reference)
    assert measured(wider(target), draft, reference) == pytest.approx(right)
    target, draft, reference = models()
    assert measured(target, wider(draft), wider(reference)) == pytest.approx(right)


# --- acceptance ----------------------------------------------------------------------------------


def test_acceptance_is_the_mean_overlap_of_the_distributions():
    target, draft, _ = models()
    given = batch()
    rows = [{name: tensor[row] for name, tensor in given.items()} for row in range(4)]
    learned = given["labels"][:, 1:] != -100
    p, q = (m(given["input_ids"]).logits[:, :-1][learned].softmax(-1) for m in (target, draft))
    right = sum(
        min(a, b) for one, two in zip(p.tolist(), q.tolist(), strict=True) for a, b in zip(one, two, strict=True)
    )
    for size in (1, 3):
        assert acceptance(draft, target, rows, size) == pytest.approx(right / learned.sum().item())
    assert acceptance(target, target, rows) == pytest.approx(1.0)
    _, found = SelectiveDistillation(target).terms(draft, None, given, EVALUATION)
    assert found["acceptance"][0].item() == pytest.approx(right)
    with pytest.raises(BadParameter, match="no labels"):
        acceptance(draft, target, rows[3:])


def test_sampled_rows_are_the_targets_own_text():
    target = tiny.model()
    rows = TokenRows(batch(rows=5, length=12)["input_ids"])
    made = sampled(target, rows, prompt=4, seed=1, batch=2)
    assert made.ids.shape == (5, 12)
    assert torch.equal(made.ids[:, :4], rows.ids[:, :4]) and not torch.equal(made.ids, rows.ids)
    assert (made.labels[:, :4] == -100).all() and torch.equal(made.labels[:, 4:], made.ids[:, 4:])
    assert torch.equal(sampled(target, rows, prompt=4, seed=1, batch=2).ids, made.ids)
    assert not torch.equal(sampled(target, rows, prompt=4, seed=2, batch=2).ids, made.ids)
    with pytest.raises(BadParameter, match="prompt=12"):
        sampled(target, rows, prompt=12)


# --- the trainer ---------------------------------------------------------------------------------

TEXTS = [f"def f{number}(a, b):\n    return a * {number} + b\n" for number in range(40)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(tiny_text.folder(tmp_path_factory.mktemp("models") / "draft", seed=5, layers=1))


def trainer(small, **options):
    return AdaSpecTrainer(**{"draft": small, "length": 32, "batch": 4, "lr": 3e-3} | options)


def test_the_result_is_an_ordinary_draft_that_the_target_accepts_more(small, tmp_path):
    target, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    note = run(trainer(small), target, tokenizer, TEXTS, tmp_path / "out", steps=30, seed=0)
    assert note == json.loads((tmp_path / "out" / "training.json").read_text())
    assert note["acceptance"]["after"] > note["acceptance"]["before"] + 0.01
    assert set(note["acceptance"]) == {"before", "reference", "after"}
    assert not (tmp_path / "out" / RUN).exists()
    draft, its = load(tmp_path / "out")
    assert its.get_vocab() == tokenizer.get_vocab()
    # The reported figure is that of the folder, but for the dtype it is saved in.
    ids = its("def f7(a, b):\n    return a", return_tensors="pt")["input_ids"]
    assert draft(ids).logits.shape[-1] == 259
    start, _ = load(small)
    assert draft.dtype == start.dtype and not torch.equal(draft.lm_head.weight, start.lm_head.weight)


def test_output_with_the_draft_is_the_targets_own(small, tmp_path):
    import tokenry

    target, tokenizer = tiny_text.model(dtype=torch.float64), tiny_text.tokenizer()
    run(trainer(small, keep=1.0), target, tokenizer, TEXTS, tmp_path, steps=2, seed=0)
    ids = tokenizer("def f7(", return_tensors="pt")["input_ids"]
    plain = target.generate(ids, max_new_tokens=24, do_sample=False)
    method = f'draft-model:draft="{tmp_path}"'
    result = tokenry.generate(target, tokenizer, "def f7(", method=method, max_new_tokens=24, do_sample=False)
    assert result.sequences[0].tolist() == plain[0].tolist()


def test_keeping_all_is_distillspec_and_needs_no_reference(small, tmp_path):
    target, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    note = run(trainer(small, keep=1.0), target, tokenizer, TEXTS, tmp_path / "one", steps=4, seed=3)
    other = run(
        trainer(small, keep=1.0, normaliser="kept"), target, tokenizer, TEXTS, tmp_path / "two", steps=4, seed=3
    )
    assert set(note["acceptance"]) == {"before", "after"} and note["acceptance"] == other["acceptance"]
    one, two = (load(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_training_that_was_stopped_goes_on_in_its_second_stage(small, tmp_path, monkeypatch):
    target, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    made = trainer(small)
    run(made, target, tokenizer, TEXTS, tmp_path / "whole", steps=4, seed=0)
    original, steps = SelectiveDistillation.terms, []

    def stopping(self, model, extra, batch, ctx):
        if self.reference is not None and ctx.step == 2:
            raise KeyboardInterrupt
        return original(self, model, extra, batch, ctx)

    monkeypatch.setattr(SelectiveDistillation, "terms", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(made, target, tokenizer, TEXTS, tmp_path / "parts", steps=4, seed=0)

    def counting(self, model, extra, batch, ctx):
        steps.append(self.reference is not None)
        return original(self, model, extra, batch, ctx)

    monkeypatch.setattr(SelectiveDistillation, "terms", counting)
    run(made, target, tokenizer, TEXTS, tmp_path / "parts", steps=4, seed=0)
    assert steps and all(steps)  # the first stage is not run again
    one, two = (load(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep=0.0 is not allowed; keep must be above 0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"length": 1}, "length=1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"normaliser": "some"}, "normaliser='some'"),
        ({"reference_steps": 0}, "reference_steps=0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(BadParameter, match=message):
        AdaSpecTrainer(**options)


def test_a_draft_that_does_not_fit_is_refused(small, tmp_path):
    target, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    foreign = tmp_path / "foreign"
    tiny.model().save_pretrained(foreign)
    tiny.tokenizer().save_pretrained(foreign)
    with pytest.raises(ResourceError, match="another tokenizer"):
        run(trainer(str(foreign)), target, tokenizer, TEXTS, tmp_path / "out", steps=1)
    narrow = tmp_path / "narrow"
    shrunk = tiny_text.model(layers=1)
    shrunk.resize_token_embeddings(250)
    shrunk.save_pretrained(narrow)
    tokenizer.save_pretrained(narrow)
    with pytest.raises(ResourceError, match="only 250"):
        run(trainer(str(narrow)), target, tokenizer, TEXTS, tmp_path / "out", steps=1)
    with pytest.raises(BadParameter, match="length must be at most 256"):
        run(trainer(small, length=300), target, tokenizer, TEXTS, tmp_path / "out", steps=1)


# --- against plain distillation ------------------------------------------------------------------


def test_comparison_is_at_equal_steps_and_at_equal_tokens(tmp_path):
    target, draft = tiny.model(), tiny.model(seed=3)
    before = copy.deepcopy(draft.state_dict())
    rows = TokenRows(batch(rows=24, length=10)["input_ids"])
    found = compare_distillation(target, draft, rows, seeds=2, steps=4, batch=4, keep=0.4, lr=1e-2, progress=False)
    assert json.loads(json.dumps(found)) == found
    assert all(torch.equal(draft.state_dict()[name], tensor) for name, tensor in before.items())
    assert found["settings"]["rows"] == 21 and found["settings"]["held_out"] == 3
    arms = found["arms"]
    assert set(arms) == {
        "plain", "plain, all compute", "equal steps", "equal tokens", "random tokens", "smallest gaps",
    }  # fmt: skip
    assert arms["plain"]["over_plain"] == [0.0, 0.0]
    assert arms["equal tokens"]["tokens_learned"] == arms["plain"]["tokens_learned"] == 4 * 4 * 10
    assert arms["equal steps"]["tokens_learned"] == round(0.4 * 160)
    assert arms["equal tokens"]["tokens_read"] == {"draft": 560, "target": 560, "reference": 400}
    assert arms["plain, all compute"]["tokens_read"] == {"draft": 560, "target": 560, "reference": 0}
    for arm in arms.values():
        assert len(arm["acceptance"]) == 2 and all(0 < value < 1 for value in arm["acceptance"])
        assert arm["mean"] == pytest.approx(sum(arm["acceptance"]) / 2)
    # Seeds differ, and the same seed is the same run.
    assert arms["plain"]["acceptance"][0] != arms["plain"]["acceptance"][1]

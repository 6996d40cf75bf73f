"""Losses against their definitions, over chunks, with ignored labels and nothing left, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenry.objectives import entropy, kl, label_count, log_probs, losses, shifted_ce


@pytest.fixture(params=[2**22, 20], ids=["at once", "in chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", request.param)


def _case(dtype=torch.float64):
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 11, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, 2:5] = losses.IGNORED
    labels[2] = losses.IGNORED
    return logits, labels


@pytest.mark.parametrize("k", [1, 3])
def test_shifted_ce_is_torchs_cross_entropy_with_its_gradient(chunk, k):
    logits, labels = _case()
    ours = shifted_ce(logits, labels, k)
    (grad,) = torch.autograd.grad(ours, logits)
    theirs = F.cross_entropy(logits[:, :-k].reshape(-1, 11), labels[:, k:].reshape(-1), reduction="sum")
    assert torch.allclose(ours, theirs)
    assert torch.allclose(grad, torch.autograd.grad(theirs, logits)[0])
    assert label_count(labels, k) == (labels[:, k:] != -100).sum()


def test_a_head_gives_the_same_loss_and_gradient_as_its_logits(chunk):
    logits, labels = _case()
    head = torch.nn.Linear(11, 23, bias=False).double()
    labels = torch.where(labels == -100, labels, labels + 12)
    weights = torch.rand(3, 7, dtype=torch.float64)
    by_head = shifted_ce(logits, labels, head=head, weights=weights)
    grads = torch.autograd.grad(by_head, [logits, head.weight])
    by_logits = shifted_ce(head(logits), labels, weights=weights)
    for one, two in zip(grads, torch.autograd.grad(by_logits, [logits, head.weight]), strict=True):
        assert torch.allclose(one, two)
    per_token = F.cross_entropy(head(logits)[:, :-1].mT, labels[:, 1:], reduction="none")
    assert torch.allclose(by_logits, (per_token * weights[:, 1:]).sum())


def test_nothing_to_learn_is_zero_and_still_belongs_to_the_graph(chunk):
    logits, labels = _case()
    for nothing in (shifted_ce(logits, torch.full_like(labels, -100)), shifted_ce(logits[:, :1], labels[:, :1])):
        assert nothing == 0
        (grad,) = torch.autograd.grad(nothing, logits, retain_graph=True)
        assert not grad.any()


def test_divergences_and_entropy_by_their_sums(chunk):
    p, q = (torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = p.softmax(-1), q.softmax(-1)
    forward, backward = kl(p, q), kl(p, q, reverse=True)
    assert torch.allclose(forward, (a * (a.log() - b.log())).sum(-1))
    assert torch.allclose(backward, (b * (b.log() - a.log())).sum(-1))
    assert torch.allclose(entropy(p), -(a * a.log()).sum(-1))
    assert torch.allclose(losses.overlap(p, q), torch.minimum(a, b).sum(-1))
    for divergence in (forward, backward):
        divergence.sum().backward()
        assert p.grad is None and q.grad.any()
    # KL(p || q) has the gradient q - p in q's logits.
    q.grad = None
    kl(p, q).sum().backward()
    assert torch.allclose(q.grad, (b - a).detach())


def test_a_teacher_that_excludes_tokens_gives_no_nan():
    p = torch.tensor([[0.0, 1.0, -torch.inf]])
    q = torch.zeros(1, 3, requires_grad=True)
    kl(p, q).sum().backward()
    assert torch.isfinite(q.grad).all()


def test_half_precision_is_summed_in_float32():
    logits = torch.randn(4, 300).to(torch.bfloat16)
    tokens = torch.arange(4)
    found = log_probs(logits, tokens)
    assert found.dtype == torch.float32
    assert torch.allclose(found, logits.float().log_softmax(-1)[torch.arange(4), tokens], atol=1e-5)

"""Attention and its statistics in blocks of rows, against the full matrix of probabilities."""

from __future__ import annotations

import pytest
import torch

from tokenry.models import AttentionRows


@pytest.mark.parametrize("count", (1, 5, 300))
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("softcap", (None, 2.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_output_rows_and_sums_equal_the_full_matrix(count, padded, softcap, dtype):
    generator = torch.Generator().manual_seed(0)
    slots = count + 7 if count < 300 else count
    query = torch.randn(2, 6, count, 8, generator=generator).to(dtype)
    key, value = (torch.randn(2, 2, slots, 8, generator=generator).to(dtype) for _ in range(2))
    allowed = torch.ones(slots, slots, dtype=torch.bool).tril()[None, None, slots - count :]
    mask = valid = None
    if padded:
        valid = torch.ones(2, count, dtype=torch.bool)
        if count > 1:
            valid[1, : count // 2] = False
        keys = torch.cat([torch.ones(2, slots - count, dtype=torch.bool), valid], 1)
        own = torch.arange(slots) == torch.arange(slots - count, slots)[:, None]
        mask = (allowed & keys[:, None, None]) | own
        allowed = mask
    elif count < 300:
        mask = allowed
    rows = AttentionRows(query, key, mask, mask is None, 0.4, softcap, valid)
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(3, 1)) * 0.4
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    full = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    close = {"atol": 1e-5 if dtype == torch.float32 else 1e-10, "rtol": 1e-5 if dtype == torch.float32 else 1e-10}
    weights = torch.rand(2, count, generator=generator).to(dtype)
    # What is asked before the output is the same as what is asked after it.
    before = rows.column_sums(), rows.column_sums(weights), rows.rows(count // 2)
    assert torch.allclose(rows.attend(value), full @ value.repeat_interleave(3, 1), **close)
    if valid is not None:
        full = full * valid[:, None, :, None]
    grouped = full.view(2, 2, 3, count, slots).sum(2)
    for sums, weighted, some in (before, (rows.column_sums(), rows.column_sums(weights), rows.rows(count // 2))):
        assert torch.allclose(sums, grouped.sum(2), **close)
        assert torch.allclose(weighted, (grouped * weights[:, None, :, None]).sum(2), **close)
        assert torch.allclose(some, grouped[:, :, count // 2 :], **close)


@pytest.mark.parametrize("count", (1, 40, 300))
def test_products_too_large_for_float16_before_they_are_scaled_are_not_lost(count):
    generator = torch.Generator().manual_seed(0)
    # Products of about 80,000, of which an eighth counts and of that the differences between keys.
    common = torch.full((64,), 36.0)
    query = (common + torch.randn(1, 4, count, 64, generator=generator)).half()
    key = (common + 0.05 * torch.randn(1, 2, 300, 64, generator=generator)).half()
    value = torch.randn(1, 2, 300, 64, generator=generator).half()
    wide = [states.double().repeat_interleave(4 // states.shape[1], 1) for states in (query, key, value)]
    assert float((wide[0] @ wide[1].transpose(-1, -2)).min()) > 65504
    rows = AttentionRows(query, key, None, count > 1, 0.125)
    output = rows.attend(value)
    assert bool(torch.isfinite(output).all()) and bool(torch.isfinite(rows.column_sums()).all())
    assert torch.allclose(rows.column_sums().sum(-1), torch.tensor(2.0 * count), rtol=1e-2)


@pytest.mark.parametrize("scaling", (0.125, 0.3, 1.0))
def test_float16_logits_are_rounded_no_more_than_the_product(scaling):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 20, 64, generator=generator).half() for heads in (4, 2))
    logits = AttentionRows(query, key, torch.ones(1, 1, 20, 20, dtype=torch.bool), False, scaling).logits()
    exact = (query.double() @ key.double().repeat_interleave(2, 1).transpose(-1, -2) * scaling).view(1, 2, 2, 20, 20)
    assert float(((logits - exact).abs() / exact.abs().clamp(min=scaling)).max()) <= 2**-11 * 1.01


def test_half_precision_sums_keep_the_mass():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 400, 16, generator=generator).bfloat16() for heads in (4, 2))
    rows = AttentionRows(query, key, None, True, 0.25)
    rows.attend(key)
    assert rows.column_sums().dtype == torch.float32
    assert torch.allclose(rows.column_sums().sum(-1), torch.tensor(800.0), atol=1e-2)

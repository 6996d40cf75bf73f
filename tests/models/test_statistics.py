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


def test_half_precision_sums_keep_the_mass():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 400, 16, generator=generator).bfloat16() for heads in (4, 2))
    rows = AttentionRows(query, key, None, True, 0.25)
    rows.attend(key)
    assert rows.column_sums().dtype == torch.float32
    assert torch.allclose(rows.column_sums().sum(-1), torch.tensor(800.0), atol=1e-2)

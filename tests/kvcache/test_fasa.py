"""FASA's own invariants, as on its card: the agreement of planes, and plans."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tokenry
from tests import tiny
from tokenry.errors import BadPrompt, ResourceError
from tokenry.evaluation.kvcache.bits import stepwise_nats
from tokenry.kvcache import FASA, FASAPlan
from tokenry.kvcache.fasa import _calibrated, _Calibration
from tokenry.models import AttentionRows, TokenCache, attached, planes
from tokenry.workloads import library_files


def test_agreement_is_the_share_of_common_tokens():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 40, 8, generator=generator) for heads in (4, 2))
    dims = planes(tiny.model(), 8)
    layer = SimpleNamespace(state={})
    collector = _Calibration(k=5, steps=10, planes=tuple(dims.flatten().tolist()))
    collector.observe(layer, AttentionRows(query, key, None, True, 0.3))
    for head in range(4):
        for number, plane in enumerate(dims.tolist()):
            common = 0
            for row in range(30, 40):
                whole = (key[0, head // 2, : row + 1] @ query[0, head, row]).topk(5).indices.tolist()
                part = (key[0, head // 2, : row + 1, plane] @ query[0, head, row, plane]).topk(5).indices.tolist()
                common += len(set(whole) & set(part))
            assert layer.state["agreement"][0, head, number].item() == pytest.approx(common / 50)


def test_calibration_is_repeatable_and_bounded():
    model = tiny.model()
    ids = tiny.prompts((200,))["input_ids"]
    one, two = (FASAPlan.calibrate(model, ids, k=20, steps=30) for _ in range(2))
    assert torch.equal(one.agreement, two.agreement) and one.agreement.shape == (3, 4, 4)
    assert bool(((one.agreement >= 0) & (one.agreement <= 1)).all())
    # A plane ranks better than chance: 20 of 200 tokens in common would be a tenth.
    assert one.agreement.mean() > 0.15
    assert one.dominant(0.5).shape == (3, 4, 2) and one.dominant(0.01).shape == (3, 4, 1)
    best = one.agreement.gather(-1, one.dominant(0.5)).min(-1).values
    assert bool((best >= one.agreement.median(-1).values).all())
    with pytest.raises(BadPrompt, match="too few"):
        FASAPlan.calibrate(model, ids, k=50, steps=30)


def test_plans_are_saved_and_refused_for_other_models(tmp_path):
    model = tiny.model()
    plan = FASAPlan.calibrate(model, tiny.prompts((200,))["input_ids"], k=20, steps=30, layout="adjacent")
    plan.save(tmp_path / "plan.safetensors")
    read = FASAPlan.load(tmp_path / "plan.safetensors", model)
    assert torch.equal(read.agreement, plan.agreement) and read.planes.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    policy = FASA(budget=8, plan=str(tmp_path / "plan.safetensors"))
    with policy(model):
        model.generate(tiny.prompts((30,))["input_ids"], max_new_tokens=4)
    with pytest.raises(ResourceError, match="was made for"), policy(other := tiny.model("qwen3")):
        other.generate(tiny.prompts((30,))["input_ids"], max_new_tokens=4)
    # Another precision has the same weights, and another training has not.
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        FASAPlan.load(tmp_path / "plan.safetensors", tiny.model().to(dtype))
    for wrong in (tiny.model(seed=5), tiny.model(seed=5).half()):
        with pytest.raises(ResourceError, match="other weights"):
            FASAPlan.load(tmp_path / "plan.safetensors", wrong)
    facts = json.loads(plan.model)
    del facts["weights"]
    FASAPlan(plan.agreement, plan.planes, json.dumps(facts)).save(tmp_path / "older.safetensors")
    with pytest.raises(ResourceError, match="does not say what weights"):
        FASAPlan.load(tmp_path / "older.safetensors", model)
    with pytest.raises(ResourceError, match="cannot read"), FASA(plan=str(tmp_path / "none"))(model):
        model.generate(tiny.prompts((30,))["input_ids"], max_new_tokens=4)


@torch.no_grad()
@pytest.mark.parametrize("per", ("query", "kv"))
def test_chosen_tokens_are_the_largest_sums_of_dominant_planes(per):
    model = tiny.model(dtype=torch.float64)
    policy = FASA(budget=6, planes=0.5, per=per)
    chosen = {}

    class Watching(FASA):
        def retrieve(self, layer, query, visible):
            found = super().retrieve(layer, query, visible)
            if found is not None:
                chosen[layer.number] = query, layer.held()[0].clone(), found[0]
            return found

    with attached(model):
        cache = TokenCache(model, Watching(budget=6, planes=0.5, per=per))
        model(tiny.prompts((30,))["input_ids"], past_key_values=cache)
        model(torch.tensor([[5]]), past_key_values=cache)
    assert sorted(chosen) == [1, 2], "the first layer attends to everything"
    plan = _calibrated(model)
    for number, (query, keys, slots) in chosen.items():
        score = torch.zeros(4, 31, dtype=torch.float64)
        for head in range(4):
            for plane in plan.planes[plan.dominant(0.5)[number, head]].tolist():
                score[head] += keys[0, head // 2][:, plane] @ query[0, head, 0, plane]
        score = score.view(2, 2, 31).sum(1) if per == "kv" else score
        assert torch.equal(slots[0, :, 0].sort(-1).values, score.topk(6, -1).indices.sort(-1).values)
    assert policy.resources == ("plan",)


@torch.no_grad()
def test_recent_tokens_are_always_among_the_chosen():
    model = tiny.model()
    seen = []

    class Watching(FASA):
        def retrieve(self, layer, query, visible):
            found = super().retrieve(layer, query, visible)
            seen.extend([] if found is None else [found[0]])
            return found

    with attached(model):
        cache = TokenCache(model, Watching(budget=6, recent=3))
        model(tiny.prompts((30,))["input_ids"], past_key_values=cache)
        model(torch.tensor([[5]]), past_key_values=cache)
    for slots in seen:
        assert all({28, 29, 30} <= set(row) for row in slots[0, :, 0].tolist())


def test_calibrated_planes_lose_less_than_random_ones_on_real_text(tmp_path):
    model, tokenizer = tokenry.load("tokenry/code", dtype="float32")
    files = [file.read_text() for file in library_files()[5:600:60]]
    rows = [tokenizer(text[:4000], return_tensors="pt").input_ids[:, :220] for text in files]
    ids = torch.cat([row for row in rows if row.shape[1] == 220][:4])
    plan, texts = FASAPlan.calibrate(model, ids[:1], k=20, steps=40), ids[1:]

    def lost(policy):
        return float((stepwise_nats(model, texts, policy, 160) - whole).mean())

    def planned(name, agreement):
        replace(plan, agreement=agreement).save(tmp_path / name)
        return FASA(budget=20, plan=str(tmp_path / name))

    whole = stepwise_nats(model, texts, None, 160)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    random = [lost(planned(str(n), torch.rand(plan.agreement.shape, generator=g))) for n, g in enumerate(generators)]
    assert lost(planned("calibrated", plan.agreement)) < min(random)
    # Without a plan, planes are calibrated on random tokens that repeat.
    assert lost(FASA(budget=20)) < min(random)

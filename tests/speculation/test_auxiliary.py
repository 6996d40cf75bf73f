"""Rows beside the tree change nothing of what is verified, and are gone from the cache."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tests import tiny
from tests.speculation.test_engine import LENGTHS, free_run, run
from tests.speculation.toys import Mixed
from tokenry.generation import Options
from tokenry.generation.auxiliary import Auxiliary
from tokenry.kvcache import H2O
from tokenry.models import weights_hash
from tokenry.speculation import DraftTree

M = 5


@dataclass(frozen=True, kw_only=True)
class Beside(Mixed):
    """Random trees with random rows beside them, at random depths, that see what they like."""

    slug: ClassVar[str] = "beside"
    resources: ClassVar[tuple[str, ...]] = ("truth", "never", "around")

    def start(self, session: Any) -> torch.Generator:
        generator = super().start(session)
        session.beside_prompt = self._rows(session, generator, torch.ones(1, 1, 1, dtype=torch.bool))
        return generator

    def beside(self, session: Any, state: torch.Generator, tree: DraftTree) -> Auxiliary:
        if session.stats.forwards == 1 and session.hidden is not None:
            assert session.hidden.shape[:2] == (session.batch, 1 + M)
        return self._rows(session, state, tree.shape.ancestors)

    def observe(self, session: Any, state: Any, tree: DraftTree, logits: Any, walk: Any) -> None:
        assert session.hidden.shape[:2] == (session.batch, tree.shape.size + M)
        assert torch.isfinite(session.hidden).all()
        # The head read the nodes' states, and theirs alone; some models bound its logits afterwards.
        wanted = session.model.get_output_embeddings()(session.hidden[:, : tree.shape.size])
        bound = getattr(session.model.config, "final_logit_softcapping", None)
        wanted = wanted if bound is None else bound * torch.tanh(wanted / bound)
        assert torch.allclose(wanted.float(), logits, atol=1e-4)

    def _rows(self, session: Any, generator: torch.Generator, ancestors: torch.Tensor) -> Auxiliary:
        width = session.model.get_input_embeddings().weight.shape[1]
        embeddings = torch.randn(session.batch, M, width, generator=generator, dtype=session.model.dtype)
        nodes = ancestors[:, torch.randint(ancestors.shape[1], (M,), generator=generator)]
        among = (torch.rand(1, M, M, generator=generator) < 0.5).tril() | torch.eye(M, dtype=torch.bool)
        depth = torch.randint(1, 9, (1, M), generator=generator)
        return Auxiliary(embeddings, depth, nodes, among, session.resources["around"])


def beside(model, inputs, truth, **options):
    """Generate with rows beside, and what was entered around the forwards."""
    entered = []

    @contextlib.contextmanager
    def around(before, rows):
        entered.append((before, rows))
        yield

    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True} | options
    extra = Options(resources={"truth": truth, "around": around})
    return model.generate(**inputs, custom_generate=Beside(), tokenry_options=extra, **options), entered


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma"])
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_output_and_cache_are_plains(kind, batch):
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts(LENGTHS[batch])
    truth = free_run(model, inputs)
    ours, entered = beside(model, inputs, truth)
    bare = run(model, inputs, Mixed(), truth)
    assert torch.equal(ours.sequences, run(model, inputs).sequences) and ours.stats.accepted > 0
    assert len(entered) == ours.stats.forwards and all(rows - before == M for before, rows in entered)
    assert entered[0] == (8, 8 + M)
    assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1
    columns = inputs["attention_mask"].bool()
    for mine, theirs in zip(ours.past_key_values.layers, bare.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert a.shape == b.shape
            real = torch.cat([columns, torch.ones(batch, a.shape[2] - 8, dtype=torch.bool)], 1)
            assert torch.allclose(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-9)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_windows_hold_beside_too(kind):
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts((150,))
    truth = free_run(model, inputs)
    wanted = run(model, inputs).sequences
    assert torch.equal(beside(model, inputs, truth)[0].sequences, wanted)
    assert torch.equal(run(model, inputs, Mixed(), truth).sequences, wanted)


def test_a_long_prompt_is_cut_so_that_its_mask_stays_small(monkeypatch):
    from tokenry.generation import session

    monkeypatch.setattr(session, "_PROMPT_BESIDE", 16)
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((40, 20))
    truth = free_run(model, inputs)
    ours, entered = beside(model, inputs, truth)
    assert torch.equal(ours.sequences, run(model, inputs).sequences)
    assert entered[0] == (16, 16 + M) and len(entered) == ours.stats.forwards - 1


def test_a_policy_neither_sees_them_nor_counts_them():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((60, 47))
    with H2O(budget=24, compact_every=8)(model):
        wanted = run(model, inputs, max_new_tokens=32)
        truth = torch.cat([wanted.sequences, wanted.sequences[:, -8:]], 1)
        ours, entered = beside(model, inputs, truth, max_new_tokens=32)
    assert torch.equal(ours.sequences, wanted.sequences) and ours.stats.accepted > 0
    # The prefill goes without, since what it holds is evicted at once.
    assert len(entered) == ours.stats.forwards - 1
    assert all(layer.size <= 31 for layer in ours.past_key_values.layers)


def test_an_error_around_the_forward_leaves_the_model_as_it_was():
    model, inputs = tiny.model(), tiny.prompts((8,))
    before = weights_hash(model)

    @contextlib.contextmanager
    def around(before, rows):
        raise KeyError("stop")
        yield

    with pytest.raises(KeyError):
        model.generate(
            **inputs, custom_generate=Beside(), tokenry_options=Options(resources={"around": around}), max_new_tokens=4
        )
    assert weights_hash(model) == before and model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@dataclass(frozen=True, kw_only=True)
class Listening(Mixed):
    """Random trees whose hidden states are asked for, without rows beside."""

    slug: ClassVar[str] = "listening"

    def start(self, session: Any) -> torch.Generator:
        session.want_hidden = True
        return super().start(session)

    def propose(self, session: Any, state: torch.Generator, room: int) -> DraftTree:
        if session.stats.steps == 0:
            chosen = session.model.get_output_embeddings()(session.hidden)
            assert torch.equal(chosen.argmax(-1)[:, 0], session.anchor)
        return super().propose(session, state, room)

    def observe(self, session: Any, state: Any, tree: DraftTree, logits: Any, walk: Any) -> None:
        wanted = session.model.get_output_embeddings()(session.hidden)
        assert torch.allclose(wanted.float(), logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_states_are_left_where_they_are_asked_for(kind):
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts((8, 3))
    truth = free_run(model, inputs)
    assert torch.equal(run(model, inputs, Listening(), truth).sequences, run(model, inputs).sequences)

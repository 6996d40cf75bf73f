"""The model behind a budgeted cache drafts for itself: lossless with every policy, and the policy keeps its budget."""

import dataclasses
import math

import pytest
import torch

from tests import tiny
from tests.contracts.registered import at_hand, registered
from tests.contracts.test_policies import small
from tests.speculation.drafts import ScriptedDraws, Tabulated, run, sized, trees
from tests.speculation.test_law import assert_lossless, table
from tokenry.errors import BadParameter, BudgetTooSmall, MethodNotFound, UnsupportedModel
from tokenry.generation import Plain
from tokenry.kvcache import H2O, SnapKV
from tokenry.methods import method, parameters
from tokenry.speculation.draft_model import DraftModel
from tokenry.speculation.draft_model import _State as ChainState
from tokenry.speculation.self_draft import Behind, SelfDraft, _State

POLICIES = registered("policy")
ONE, THREE = (60,), (60, 47, 33)
RUNS = [(cls, 1, lengths) for cls in POLICIES for lengths in (ONE, THREE)]
# Those that drop or choose tokens at certain positions only, where they are told so.
RUNS += [(cls, 6, THREE) for cls in POLICIES if "compact_every" in parameters(cls)]
# One of each kind, and those with state of their own.
KINDS = [cls for cls in POLICIES if cls.slug in ("h2o", "dapq", "fastkv", "spatten", "sentencekv", "lazyllm")]


def watch(monkeypatch):
    """Note the drafting cache and its copy after each forward: `(cache, is copy)`."""
    seen, catch_up, feed = [], Behind.catch_up, Behind.feed

    def caught_up(self, *args, **options):
        logits = catch_up(self, *args, **options)
        seen.append((self.cache, False))
        check(self.cache)
        return logits

    def fed(self, *args):
        logits = feed(self, *args)
        seen.append((self.drafting, True))
        check(self.drafting)
        return logits

    def check(cache):
        if cache.policy.drops:
            for layer in cache.layers:
                if layer.window is None:
                    assert layer.size <= max(layer.budgets()) + cache.policy.compact_every - 1

    monkeypatch.setattr(Behind, "catch_up", caught_up)
    monkeypatch.setattr(Behind, "feed", fed)
    return seen


@pytest.mark.parametrize(("cls", "every", "lengths"), RUNS, ids=lambda value: getattr(value, "slug", str(value)))
def test_greedy_is_plain_and_the_budget_holds_with_every_policy(cls, every, lengths, monkeypatch):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    at_hand(cls, model)
    seen = watch(monkeypatch)
    ends = run(model, inputs).sequences[-1, 75:77].tolist()
    options = {"eos_token_id": ends, "pad_token_id": 0}
    result = run(model, inputs, SelfDraft(policy=small(cls, compact_every=every)), **options)
    assert torch.equal(result.sequences, run(model, inputs, **options).sequences)
    stats = result.stats
    assert stats.accepted < stats.drafted, "the policy must matter in this test"
    # A predictor that nobody trained predicts nonsense.
    assert stats.accepted > 0 or len(lengths) == 1 or cls.slug == "kv-prediction"
    assert stats.extra["draft_forwards"] > 0 and stats.extra["draft_kv_bytes"] > 0
    assert any(copy for _, copy in seen)


@pytest.mark.parametrize("cls", POLICIES, ids=lambda cls: cls.slug)
def test_a_budget_above_the_length_has_every_draft_accepted(cls):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((20, 13))
    at_hand(cls, model, exact=True)
    result = run(model, inputs, SelfDraft(policy=small(cls, budget=128), tokens=3))
    stats = result.stats
    assert torch.equal(result.sequences, run(model, inputs).sequences)
    assert stats.accepted == stats.drafted > 0
    assert stats.forwards == 1 + math.ceil(23 / 4)


@pytest.mark.parametrize("kind", [kind for kind in tiny.SERVED if kind != "mistral"])
def test_every_architecture(kind):
    model, inputs = tiny.model(kind), tiny.prompts((40, 21, 33))
    result = run(model, inputs, SelfDraft(policy="sinks", budget=12))
    assert torch.equal(result.sequences, run(model, inputs).sequences)
    assert 0 < result.stats.accepted < result.stats.drafted


@pytest.mark.parametrize("cls", POLICIES, ids=lambda cls: cls.slug)
def test_the_policy_keeps_of_the_text_what_it_keeps_alone(cls, monkeypatch):
    """Drafts leave no trace: where the policy drops after every sixth token, its cache holds after each step what a
    call under the policy holds at that length. Prompt and first token come to it together."""
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((60,))
    at_hand(cls, model)
    policy = small(cls, compact_every=6)
    kept, catch_up = [], Behind.catch_up

    def caught_up(self, session, *args, **options):
        logits = catch_up(self, session, *args, **options)
        kept.append((session.ids[:, : session.lengths[0]].clone(), self.cache.kept_positions(), logits))
        return logits

    monkeypatch.setattr(Behind, "catch_up", caught_up)
    run(model, inputs, SelfDraft(policy=policy), max_new_tokens=30)
    assert len(kept) > 5
    text, alone, at = kept[-1][0], policy.cache(model), 61
    steps = {ids.shape[1]: (positions, logits) for ids, positions, logits in kept}
    logits = model(text[:, :at], past_key_values=alone).logits
    for length in range(at, text.shape[1] + 1):
        if length > at:
            logits = model(text[:, length - 1 : length], past_key_values=alone).logits
        if length in steps:
            positions, said = steps[length]
            assert torch.allclose(said, logits[:, -1].float(), atol=1e-4), f"after {length} tokens"
            for one, other in zip(positions, alone.kept_positions(), strict=True):
                assert torch.equal(one, other), f"after {length} tokens"


@pytest.mark.parametrize(("tokens", "confidence"), [(1, 0.0), (2, 0.4)])
def test_sampled_drafts_keep_the_targets_law_exactly(tokens, confidence):
    """All draws and all decisions of the verifier, enumerated."""
    made, proposal = SelfDraft(tokens=tokens, confidence=confidence), table(11)
    chain = DraftModel(tokens=tokens, confidence=confidence)

    def propose(session):
        drafted = ChainState(Tabulated(proposal), ScriptedDraws(), torch.tensor([], dtype=torch.long), None)
        return made.propose(session, _State(drafted.companion, chain, drafted), 2)

    found = trees(propose)
    assert sum(chance for _, chance in found) == pytest.approx(1)
    assert_lossless(table(12), found)


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.slug)
def test_a_seed_gives_the_tokens_of_plain_sampling(cls):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((60, 47))
    at_hand(cls, model)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}
    result = run(model, inputs, SelfDraft(policy=small(cls)), **options)
    assert torch.equal(result.sequences, run(model, inputs, Plain(), **options).sequences)
    assert result.stats.accepted > 0


def test_without_a_seed_drafts_are_drawn_and_rejected():
    model, inputs = tiny.model(), tiny.prompts((60, 47))
    torch.manual_seed(0)
    result = run(model, inputs, SelfDraft(policy="h2o", budget=24), do_sample=True, temperature=2.0)
    assert result.sequences.shape == (2, 84) and 0 < result.stats.accepted < result.stats.drafted


@pytest.mark.parametrize("chunk", [None, 16])
def test_prompts_in_chunks_and_a_share_of_the_prompt(chunk, monkeypatch):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((60, 40))
    seen = watch(monkeypatch)
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    result = run(model, inputs, SelfDraft(policy="h2o", budget=0.25), **options)
    assert torch.equal(result.sequences, run(model, inputs, **options).sequences)
    # A share is that of the prompt, the first token included, and does not grow with the text.
    assert {tuple(cache.layers[0].budgets()) for cache, _ in seen} == {(15, 10)}


def test_nothing_is_drafted_behind_the_models_context():
    model, inputs = sized("gpt2", n_positions=32), tiny.prompts((12, 7))
    result = run(model, inputs, SelfDraft(policy="sinks", budget=8), max_new_tokens=20)
    assert torch.equal(result.sequences, run(model, inputs, max_new_tokens=20).sequences)
    assert result.stats.drafted > 0


@pytest.mark.parametrize("policy", [H2O(budget=32, compact_every=4), SnapKV(budget=32, window=8, compact_every=4)])
def test_inside_a_policy_it_gives_what_that_policy_gives(policy):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((60, 47))
    with policy(model):
        result = run(model, inputs, SelfDraft(policy="sinks", budget=16))
        assert torch.equal(result.sequences, run(model, inputs).sequences)
    assert result.stats.accepted > 0


@pytest.mark.parametrize("slug", ["h2o", "sentencekv", "lazyllm"])
def test_the_model_is_left_as_it_was(slug):
    model, cls = tiny.model(), type(method(slug))

    def fail(ids, scores, **kwargs):
        if ids.shape[1] > 66:
            raise KeyboardInterrupt
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt) as held:  # with the traceback, which holds the caches
        run(model, tiny.prompts((60,)), SelfDraft(policy=small(cls)), stopping_criteria=[fail])
    assert held.tb and model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_where_no_layer_is_ruled_it_is_refused():
    with pytest.raises(UnsupportedModel, match="MistralForCausalLM has a sliding window"):
        run(tiny.model("mistral"), tiny.prompts((8,)), SelfDraft())


def test_parameters():
    assert str(SelfDraft()) == "self-draft"
    made = method("self-draft:policy=h2o;budget=256;tokens=4")
    assert made.ruling() == H2O(budget=256) and made == SelfDraft(policy="h2o", budget=256, tokens=4)
    # A policy itself is its text.
    own = H2O(budget=64, recent=0.25, compact_every=4)
    made = SelfDraft(policy=own)
    assert made.policy == str(own) and made.ruling() == own
    assert method(str(made)) == made and dataclasses.replace(made, tokens=2).ruling() == own
    assert SelfDraft(policy=own, budget=0.5).ruling() == dataclasses.replace(own, budget=0.5)
    for bad in ("plain", "token-recycling", "draft-model+h2o"):
        with pytest.raises(BadParameter, match=f"policy='{bad}'.*one cache policy".replace("+", r"\+")):
            SelfDraft(policy=bad)
    with pytest.raises(BadParameter, match=r"self-draft: budget=8.*kv-prediction has no budget"):
        SelfDraft(policy="kv-prediction", budget=8)
    with pytest.raises(BudgetTooSmall, match="snapkv"):
        SelfDraft(budget=8)
    with pytest.raises(MethodNotFound, match="did you mean h2o"):
        SelfDraft(policy="h20")
    for options in ({"tokens": 0}, {"confidence": 1.5}, {"choice": "best"}, {"tokens": "auto"}):
        with pytest.raises(BadParameter):
            SelfDraft(**options)
    assert SelfDraft.resources == ()

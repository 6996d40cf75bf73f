"""A chain from a second model: lossless, few forwards, caches that stay right, and the second model itself."""

import math
import threading
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tokenry
from tests import tiny
from tests.speculation.drafts import ScriptedDraws, Tabulated, Toy, check_logits, near, run, sized, trees
from tests.speculation.test_law import assert_lossless, table
from tokenry.errors import BadParameter, ResourceError, UnsupportedModel
from tokenry.generation import Plain, Source
from tokenry.methods import method
from tokenry.speculation import companion, sizing
from tokenry.speculation.draft_model import DraftModel, _State
from tokenry.speculation.dyspec import DySpec
from tokenry.speculation.sizing import Sizing

LENGTHS = (8, 3, 6, 1)
BOTH = [DraftModel(tokens=6), DySpec(size=9)]


@pytest.mark.parametrize("lengths", [(8,), LENGTHS], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_greedy_is_lossless_with_any_draft(kind, lengths):
    """A draft of the target's kind that is often right, and one that knows nothing."""
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    options = {"eos_token_id": [5, 9, 30], "pad_token_id": 0}
    wanted = run(model, inputs, **options).sequences
    for draft in (near(), tiny.model(kind, torch.float64, seed=1)):
        for drafter in (DraftModel(), DraftModel(tokens=3, confidence=0), DraftModel(tokens="auto")):
            assert torch.equal(run(model, inputs, drafter, draft, **options).sequences, wanted)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_draft_that_is_the_target_has_every_token_accepted(count):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8,))
    result = run(model, inputs, DraftModel(tokens=count, confidence=0), model)
    steps = math.ceil(23 / (count + 1))
    assert result.stats.forwards == 1 + steps and result.stats.accepted == result.stats.drafted
    # One forward for each draft, and none for what was accepted before.
    assert result.stats.extra["draft_forwards"] == result.stats.drafted


@pytest.mark.parametrize("drafter", BOTH, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_what_the_draft_says_is_what_it_says_of_the_whole_text(kind, drafter, monkeypatch):
    """In a padded batch whose rows accept runs of unequal length, after each of its forwards."""
    model, inputs = tiny.model(kind, torch.float64), tiny.prompts((12, 5, 9))
    checked = check_logits(monkeypatch)
    result = run(model, inputs, drafter, near(kind), max_new_tokens=14)
    assert len(checked) > 30 and result.stats.accepted > 0


@pytest.mark.parametrize("drafter", BOTH, ids=str)
def test_rows_of_a_batch_accept_what_each_accepts_alone(drafter):
    model, draft, inputs = tiny.model(dtype=torch.float64), near(), tiny.prompts(LENGTHS)
    together = run(model, inputs, drafter, draft, max_new_tokens=60).stats
    rows = [{name: t[i : i + 1, -n:] for name, t in inputs.items()} for i, n in enumerate(LENGTHS)]
    alone = [run(model, row, drafter, draft, max_new_tokens=60).stats for row in rows]
    assert together.steps == sum(stats.steps for stats in alone)
    assert together.accepted == sum(stats.accepted for stats in alone) > 0


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("confidence", [0.0, 0.4])
def test_sampled_drafts_keep_the_targets_law_exactly(tokens, confidence):
    """All draws and all decisions of the verifier, enumerated; a draft that ends early depends on what was drawn."""
    drafter, proposal = DraftModel(tokens=tokens, confidence=confidence), table(11)
    assert any(float(law.max()) > 0.4 > float(law.min()) for law in proposal.values())

    def propose(session: Toy):
        state = _State(Tabulated(proposal), ScriptedDraws(), torch.tensor([], dtype=torch.long), None)
        return drafter.propose(session, state, 2)

    found = trees(propose)
    assert sum(chance for _, chance in found) == pytest.approx(1)
    assert_lossless(table(12), found)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("drafter", [DraftModel(tokens=2, choice="sampled"), DySpec(size=4, choice="sampled")], ids=str)
def test_sampling_draws_from_the_targets_law(drafter, seed):
    """Chi-square of four tokens of 2,000 rows against the exact law over the 16 texts that top-k leaves: 15 degrees of
    freedom, false alarm below 1e-6, and the seeds are fixed."""
    model, rows = tiny.model(), 2000
    ids = tiny.prompts((4,))["input_ids"]
    options = {"do_sample": True, "top_k": 2, "temperature": 3.0, "max_new_tokens": 4}
    torch.manual_seed(0)
    result = run(model, {"input_ids": ids.repeat(rows, 1)}, drafter, near(scale=0.02, dtype=torch.float32), seed=seed,
                 **options)  # fmt: skip
    assert 0 < result.stats.accepted < result.stats.drafted
    law = _law(model, ids, 4)
    seen = [tuple(row) for row in result.new_tokens]
    assert set(seen) <= set(law)
    assert sum((seen.count(text) - rows * p) ** 2 / (rows * p) for text, p in law.items()) < 58


def _law(model, ids, depth):
    if depth == 0:
        return {(): 1.0}
    with torch.no_grad():
        top = (model(ids).logits[0, -1].double() / 3.0).topk(2)
    law = {}
    for p, token in zip(top.values.softmax(-1).tolist(), top.indices.tolist(), strict=True):
        rest = _law(model, torch.cat([ids, torch.tensor([[token]])], 1), depth - 1)
        law |= {(token, *text): p * q for text, q in rest.items()}
    return law


@pytest.mark.parametrize("choice", ["auto", "top"])
@pytest.mark.parametrize("cls", [DraftModel, DySpec])
def test_a_seed_gives_the_tokens_of_plain_sampling(cls, choice):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((12, 7))
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}
    result = run(model, inputs, cls(choice=choice), near(), **options)
    assert torch.equal(result.sequences, run(model, inputs, Plain(), **options).sequences)
    assert result.stats.accepted > 0


def test_with_a_seed_a_draft_that_is_the_target_draws_as_the_target_will():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8,))
    result = run(model, inputs, DraftModel(tokens=3, confidence=0), model, do_sample=True, seed=5)
    assert result.stats.accepted == result.stats.drafted == 17
    result = run(model, inputs, DraftModel(tokens=3, confidence=0, choice="top"), model, do_sample=True, seed=5)
    assert result.stats.accepted < result.stats.drafted


@pytest.mark.parametrize("drafter", [DraftModel(confidence=0), DySpec(size=12)], ids=str)
def test_nothing_is_drafted_behind_an_end_token(drafter, monkeypatch):
    model, inputs, found = tiny.model(dtype=torch.float64), tiny.prompts((8,)), []
    ends = run(model, inputs).sequences[0, 10:12].tolist()
    original = type(drafter).propose

    def propose(self, session, state, room):
        tree = original(self, session, state, room)
        found.append((tree.tokens[0].tolist(), tree.shape.parents[0].tolist()))
        return tree

    monkeypatch.setattr(type(drafter), "propose", propose)
    run(model, inputs, drafter, model, eos_token_id=ends, pad_token_id=0)
    drafted = [(tokens, parents, node) for tokens, parents in found for node in range(1, len(tokens))]
    assert any(tokens[node] in ends for tokens, _, node in drafted)
    assert all(tokens[parents[node]] not in ends for tokens, parents, node in drafted if parents[node] > 0)


@pytest.mark.parametrize("drafter", BOTH, ids=str)
def test_behind_the_drafts_own_context_nothing_is_drafted(drafter):
    model, draft, inputs = tiny.model(dtype=torch.float64), sized("gpt2", n_positions=24), tiny.prompts((12, 7))
    result = run(model, inputs, drafter, draft, max_new_tokens=30)
    assert torch.equal(result.sequences, run(model, inputs, max_new_tokens=30).sequences)
    assert result.stats.drafted > 0 and not bool((result.sources[:, 24:] == Source.DRAFT).any())


def test_vocabularies_must_be_one_and_may_differ_in_padding():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8, 3))
    words = {"tokenizer": tiny.tokenizer()}
    wide, narrow = sized("llama", vocab_size=101), sized("llama", vocab_size=90)
    for draft, resources, reason in ((wide, {}, "no tokenizer"), (narrow, {}, "no tok"), (narrow, words, "97 tokens")):
        with pytest.raises(ResourceError, match=f"share one tokenizer.*{reason}.*draft-model:draft=PATH"):
            run(model, inputs, DraftModel(), draft, resources=resources)
    for target, draft in ((model, wide), (wide, model)):
        wanted = run(target, inputs).sequences
        for drafter in BOTH:
            assert torch.equal(run(target, inputs, drafter, draft, resources=words).sequences, wanted)


def test_a_draft_is_named_by_path_or_handed_over(tmp_path):
    model, inputs = tiny.model(), tiny.prompts((8,))
    near(dtype=torch.float32).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    named = run(model, inputs, method(f"draft-model:draft={tmp_path};tokens=4"))
    given = run(model, inputs, DraftModel(tokens=4), near(dtype=torch.float32))
    assert named.stats.accepted == given.stats.accepted > 0
    with pytest.raises(ResourceError, match="no model in"):
        run(model, inputs, DraftModel(draft="./none"))
    with pytest.raises(ResourceError, match="must be a loaded model, not str"):
        run(model, inputs, DraftModel(), "tokenry/code-draft")
    with pytest.raises(ResourceError, match="4096 tokens in its vocabulary and the model 97"):
        run(model, inputs, DraftModel())


def test_a_draft_of_another_tokenizer_is_refused(tmp_path):
    """Its tokens mean other texts: it would draft in vain, and nobody would know."""
    model, inputs = tiny.model(), tiny.prompts((8,))
    near(dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    other = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words[::-1])}, words[0]))
    PreTrainedTokenizerFast(tokenizer_object=other).save_pretrained(tmp_path)
    drafter = method(f"draft-model:draft={tmp_path}")
    with pytest.raises(ResourceError, match="another tokenizer than the model"):
        run(model, inputs, drafter, resources={"tokenizer": tokenizer})
    # Without the call's own there is nothing to compare.
    assert torch.equal(run(model, inputs, drafter).sequences, run(model, inputs).sequences)


@pytest.mark.parametrize("kind", tiny.REFUSED)
def test_a_draft_that_cannot_be_served_is_refused_by_name(kind):
    draft = tiny.model(kind)
    with pytest.raises(UnsupportedModel, match=type(draft).__name__):
        run(tiny.model(), tiny.prompts((8,)), DraftModel(), draft)


def test_both_models_are_left_as_they_were():
    model, draft = tiny.model(), near(dtype=torch.float32)

    def fail(ids, scores, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tiny.prompts((8,)), DraftModel(), draft, stopping_criteria=[fail])
    for each in (model, draft):
        assert each.config._attn_implementation == "sdpa"
        assert not each._forward_pre_hooks and not each.base_model._forward_pre_hooks


def test_threads_share_both_models():
    model, draft, found = tiny.model(dtype=torch.float64), near(), {}

    def work(seed):
        found[seed] = run(model, tiny.prompts((9, 4), seed), DraftModel(tokens=4), draft).sequences

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(found[seed], run(model, tiny.prompts((9, 4), seed)).sequences)


def test_the_bundled_pair():
    model, tokenizer = tokenry.load("tokenry/code", dtype=torch.float32)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = tokenry.generate(model, tokenizer, "def load(path):\n", **options)
    for text in ("draft-model", "dyspec:size=8"):
        result = tokenry.generate(model, tokenizer, "def load(path):\n", method=text, **options)
        assert torch.equal(result.sequences, plain.sequences)
        assert result.stats.accepted > 0


# --- size by what pays ----------------------------------------------------------------------------


def _pretend(monkeypatch, model, verify, draft):
    costs = {True: verify, False: draft}
    monkeypatch.setattr(sizing, "forward_costs", lambda session: costs[session.model is model])
    monkeypatch.setattr(sizing, "_clock", lambda: 0.0)  # what is pretended is not to be held against real time


def test_a_step_tells_what_every_smaller_size_would_have_given(monkeypatch):
    model = object()
    _pretend(monkeypatch, model, [0.0] + [10.0 + n for n in range(20)], [0.0] + [1.0 + 0.1 * n for n in range(20)])
    session = SimpleNamespace(model=model, batch=1, device=torch.device("cpu"))
    chooser = Sizing(session, object(), (0, 1, 2, 4, 8, 99), 4)
    assert chooser.sizes == [0, 1, 2, 4, 8] and chooser.next() == 4
    # Nodes by worth: a child, its child, a sibling of the first, a grandchild; the walk took the first two.
    chooser.count(torch.tensor([[1, 2, 1, 3]]), torch.tensor([[True, True, False, False]]))
    assert chooser.tokens == [1, 2, 3, 3, 0]
    # Widths by depth: 1; 1, 1; 2, 1, 1. The anchor is fed alone.
    draft = [0, 1.0, 1.0 + 1.0, 1.0 + 1.1 + 1.0]
    assert chooser.seconds == pytest.approx([10 + n + d for n, d in zip((0, 1, 2, 4), draft, strict=True)] + [0])
    assert chooser.best() == 2


def test_time_between_the_forwards_counts(monkeypatch):
    model, now = object(), [0.0]
    _pretend(monkeypatch, model, [0.0] + [1.0] * 20, [0.0] + [0.1] * 20)
    monkeypatch.setattr(sizing, "_clock", lambda: now[0])
    session = SimpleNamespace(model=model, batch=1, device=torch.device("cpu"))
    chooser = Sizing(session, object(), (0, 1, 2), 2)
    for _ in range(8):
        drafted = chooser.next()
        if drafted:
            chooser.count(torch.tensor([[1, 2]])[:, :drafted], torch.tensor([[True, False]])[:, :drafted])
        # By their forwards alone two tokens in 1.1 would beat one in 1.0.
        now[0] += 1.0 if drafted == 0 else 3.0
    assert chooser.best() == 0 and chooser.next() <= 1


@pytest.mark.parametrize("cls", [DraftModel, DySpec])
def test_a_costly_draft_is_hardly_asked_and_a_free_one_drafts_much(cls, monkeypatch):
    model, draft, inputs = tiny.model(dtype=torch.float64), near(scale=0), tiny.prompts((8,))
    drafter = DraftModel(tokens="auto", confidence=0) if cls is DraftModel else DySpec(size="auto")
    wanted, drafted = run(model, inputs, max_new_tokens=120).sequences, {}
    for cost in (0.01, 10.0):
        _pretend(monkeypatch, model, [1.0 + 0.01 * n for n in range(82)], [cost] * 82)
        result = run(model, inputs, drafter, draft, max_new_tokens=120)
        assert torch.equal(result.sequences, wanted)
        drafted[cost] = result.stats.drafted / result.stats.steps
    assert drafted[10.0] < 1 < 6 < drafted[0.01]


def test_parameters():
    assert str(DraftModel()) == "draft-model" and method("draft-model:tokens=auto") == DraftModel(tokens="auto")
    for bad in ({"tokens": 0}, {"confidence": 1.5}, {"choice": "best"}, {"tokens": "many"}):
        with pytest.raises(BadParameter):
            DraftModel(**bad)
    assert companion.CompanionDrafter.resources == DraftModel.resources == ("draft",)

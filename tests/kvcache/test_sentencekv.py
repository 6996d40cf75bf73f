"""SentenceKV's own invariants, as on its card: sentences, their means, and what a step attends to."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests import tiny
from tests.contracts.registered import at_hand, registered
from tests.contracts.test_policies import small
from tests.kvcache import test_engine_retrieval as engine
from tokenry.errors import BadParameter, BudgetTooSmall, CacheMisuse, ResourceError
from tokenry.kvcache import SentenceKV, sentencekv
from tokenry.kvcache.sentencekv import sentence_ends
from tokenry.methods import parameters
from tokenry.models import TokenCache, attached

ENDS = tuple(range(3, 20))  # about one token in six
SMALL = {"start": 1, "recent": 2, "window": 4, "kernel": 3, "ends": ENDS}
POLICIES = (
    SentenceKV(budget=8, **SMALL),
    SentenceKV(budget=12, factor=2, **SMALL | {"max_sentence": 3, "start": 3}),
    SentenceKV(budget=0.3, factor=1.5, **SMALL | {"recent": 4}),
)
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


def watched(policy):
    """The policy, and what its steps chose: layer, query, keys, slots, which count."""
    chosen = []

    class Watching(SentenceKV):
        def retrieve(self, layer, query, visible):
            found = super().retrieve(layer, query, visible)
            if found is not None:
                chosen.append((layer, query, layer.held()[0].clone(), *found))
            return found

    return Watching(**{name: getattr(policy, name) for name in parameters(SentenceKV)}), chosen


@pytest.mark.parametrize("kind", [k for k in tiny.SERVED if k != "mistral"])
def test_budget_above_the_length_equals_the_plain_model(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((40, 29))
    for options in (engine.GREEDY, engine.GREEDY | {"num_beams": 3}):
        wanted = model.generate(**inputs, **options)
        with SentenceKV(budget=66, ends=ENDS)(model):
            assert torch.equal(model.generate(**inputs, **options), wanted)


@every_policy
@pytest.mark.parametrize("kind", ("llama", "gemma2", "gpt2"))
def test_row_of_a_padded_batch_equals_the_row_alone_and_chunks_the_whole(policy, kind):
    engine.test_row_of_a_padded_batch_equals_the_row_alone_and_chunks_the_whole(policy, kind)


@torch.no_grad()
def test_every_slot_of_a_budget_that_holds_all_is_chosen():
    """Where tokens are few, the choice itself, not a shortcut, comes to all of them: rows of drafts rely on it."""
    model = tiny.model(dtype=torch.float64)
    policy, chosen = watched(SentenceKV(budget=40, **SMALL))
    with policy(model):
        cache = model(tiny.prompts((30,))["input_ids"]).past_key_values
        for token in range(40, 52):
            model(torch.tensor([[token]]), past_key_values=cache)
    assert len(chosen) == 3 * 2  # only the two last steps, of 41 and 42 tokens, have to choose
    for _, _, _, slots, counts in chosen:
        for row, used in zip(slots[0, :, 0].tolist(), counts[0, :, 0].tolist(), strict=True):
            assert len({slot for slot, use in zip(row, used, strict=True) if use}) == 40


def reference(query, keys, ids, prompt, policy, kept, queries):
    """The slots that one KV head of a step attends to, one token at a time; ``queries`` since the prompt's end."""
    current = len(ids) - 1
    groups, open_tokens = [], []
    since = 0
    for place, token in enumerate(ids):
        if place == prompt:
            groups, open_tokens, since = [*groups, open_tokens], [], 0
        open_tokens.append(place)
        since += 1
        mark = token in policy.ends
        if place < current and (mark or since % policy.max_sentence == 0):
            groups, open_tokens, since = [*groups, open_tokens], [], 0 if mark else since
    mean_query = torch.stack([queries[place] for place in open_tokens]).mean(0)
    groups = [[p for p in group if p in kept or p >= prompt] for group in [*groups, open_tokens]]
    worth = [float(torch.stack([keys[p] for p in g]).mean(0) @ mean_query) if g else -1e9 for g in groups]
    recent = set(range(current + 1 - policy.recent, current + 1))
    always = set(range(policy.start)) | recent
    taken = []
    for number in sorted(range(len(groups)), key=lambda n: -worth[n]):
        taken += [p for p in groups[number] if p not in always]
    return always | set(taken[: policy.budget - policy.start - policy.recent])


@pytest.mark.parametrize("policy", POLICIES[:2], ids=str)
@torch.no_grad()
def test_chosen_tokens_are_those_of_the_closest_sentences(policy):
    model = tiny.model(dtype=torch.float64)
    prompt = 50
    text = tiny.prompts((75,), seed=4)["input_ids"]
    policy, chosen = watched(policy)
    with policy(model):
        cache = model(text[:, :prompt]).past_key_values
        kept = [[set(row.tolist()) for row in layer.state["listed"][0]] for layer in cache.layers]
        asked = [{} for _ in cache.layers]
        for step in range(prompt, text.shape[1]):
            chosen.clear()
            model(text[:, step : step + 1], past_key_values=cache)
            for number, (layer, query, keys, slots, counts) in enumerate(chosen):
                assert layer.number == number
                asked[number][step] = query[0, :, 0].view(2, 2, -1).mean(1)
                for head in range(2):
                    queries = {place: vectors[head] for place, vectors in asked[number].items()}
                    wanted = reference(query, keys[0, head], text[0, : step + 1].tolist(), prompt, policy,
                                       kept[number][head], queries)  # fmt: skip
                    used = slots[0, head, 0][counts[0, head, 0]].tolist()
                    assert len(used) == len(set(used)) <= policy.budget
                    assert set(used) == wanted
    # The prompt's candidates: as many as the factor allows, the last queries' tokens and the first among them.
    for layer in kept:
        for row in layer:
            assert len(row) == int(policy.factor * policy.budget)
            assert set(range(policy.start)) | set(range(prompt - 4, prompt)) <= row


@torch.no_grad()
@pytest.mark.parametrize("kind", ("llama", "gemma2"))
def test_candidates_and_means_are_those_of_the_last_queries(kind):
    """Bounded logits judge, too, where the model bounds them."""
    model = tiny.model(kind, torch.float64)
    bound = 1.0 if kind == "gemma2" else None
    for module in model.modules():
        if bound is not None and hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = bound
    policy = SentenceKV(budget=8, **SMALL)
    text = tiny.prompts((60,), seed=2)["input_ids"]
    with policy(model):
        cache = model(text).past_key_values
    ruled = [layer for layer in cache.layers if layer.window is None]
    assert ruled
    for layer in ruled:
        keys, _ = layer.held()
        queries = layer.state["window"]
        logits = torch.einsum("hwd,hsd->hws", queries[0], keys[0].repeat_interleave(2, 0)) * layer.scaling
        logits = logits if bound is None else bound * torch.tanh(logits / bound)
        late = torch.arange(60) > torch.arange(56, 60)[:, None]
        worth = logits.masked_fill(late, float("-inf")).softmax(-1).sum(1).view(2, 2, 60).sum(1)
        ids = text[0].tolist()
        for head in range(2):
            far = worth[head, :56].tolist()
            pooled = [max(far[max(0, place - 1) : place + 2]) for place in range(56)]
            # The first token stays anyway.
            best = sorted(range(1, 56), key=lambda place: -pooled[place])[: 24 - 4 - 1]
            wanted = sorted([0, *best, *range(56, 60)])
            got = layer.state["listed"][0, head].tolist()
            # Tokens under one maximum tie; which of them come last is left open.
            assert sorted(pooled[p] for p in got[1:] if p < 56) == sorted(pooled[p] for p in best)
            assert len(got) == len(wanted) and got == sorted(got)
            starts = layer.state["starts"][0, head].tolist()
            assert starts[-1] == len(got), "every candidate is in exactly one sentence"
            sentences = [sum(token in ENDS for token in ids[:place]) for place in got]
            for number, (low, high) in enumerate(itertools.pairwise(starts)):
                assert all(sentence == number for sentence in sentences[low:high])
                if high > low:
                    mean = keys[0, head, got[low:high]].mean(0)
                    assert torch.allclose(layer.state["means"][0, head, number], mean, atol=1e-12)


@every_policy
@torch.no_grad()
def test_reorder_fork_and_select_carry_the_sentences(policy):
    model = tiny.model(dtype=torch.float64)
    with policy(model):
        cache = model(**tiny.prompts((40, 33))).past_key_values
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 0]))
        for start in range(12):
            token = torch.tensor([[5 + 2 * start], [40 - 3 * start]])
            mask = torch.ones(2, cache.total + 1, dtype=torch.long)
            one = model(token, attention_mask=mask, past_key_values=cache, position_ids=cache.seen[:, None])
            two = model(token.flip(0), attention_mask=mask, past_key_values=twin, position_ids=twin.seen[:, None])
            assert torch.allclose(one.logits, two.logits.flip(0), atol=1e-9)
        # What is left after tokens were taken back goes on as a cache that never held them.
        fewer = copy.deepcopy(cache)
        fewer.crop(-3)
        again = copy.deepcopy(cache)
        again.crop(-2)
        again.crop(-1)
        mask = torch.ones(2, fewer.total + 1, dtype=torch.long)
        token = torch.tensor([[7], [8]])
        one, two = (
            model(token, attention_mask=mask, past_key_values=each, position_ids=each.seen[:, None]).logits
            for each in (fewer, again)
        )
        assert torch.isfinite(one).all() and torch.allclose(one, two, atol=1e-9)
        with pytest.raises(CacheMisuse, match="taken back"):
            cache.crop(-30)


@every_policy
@torch.no_grad()
def test_every_row_of_drafts_retrieves_as_a_single_step(policy):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((30, 24))
    # Sentences end on the true path and on the false one, and one of them before the block.
    before = torch.tensor([[40, 5, 41, 42], [5, 40, 41, 42]])
    tokens = torch.tensor([[43, 6, 44, 45, 46, 47], [48, 49, 10, 50, 51, 52]])
    with policy(model):
        single = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 20, dtype=torch.long)], 1)

        def step(cache, ids):
            output = model(ids, attention_mask=mask[:, : cache.total + ids.shape[1]], past_key_values=cache,
                           position_ids=cache.seen[:, None] + torch.arange(ids.shape[1]))  # fmt: skip
            return output.logits[:, -1]

        for number in range(4):
            step(single, before[:, number : number + 1])
        block = copy.deepcopy(single)
        steps = [step(single, tokens[:, number : number + 1]) for number in range(6)]
        # The false second token ends a sentence and has a successor.
        parents = [-1, 0, 0, 2, 3, 4, 5, 1]
        relation = torch.eye(8, dtype=torch.bool)
        for number, parent in enumerate(parents[1:], 1):
            relation[number] |= relation[parent]
        block.stage(relation=relation[None], deferred=True)
        false = torch.tensor([[7, 60], [61, 8]])
        fed = torch.cat([tokens[:, :1], false[:, :1], tokens[:, 1:], false[:, 1:]], 1)
        depth = relation.sum(-1) - 1
        tree = model(fed, past_key_values=block, position_ids=block.seen[:, None] + depth).logits
        assert torch.allclose(tree[:, [0, 2, 3, 4, 5, 6]], torch.stack(steps, 1), atol=1e-9)
        # The rows keep unequal numbers, and go on.
        block.commit(torch.tensor([[0, 2, 3, 4, 5, 6], [0, 2, 3, 0, 0, 0]]), torch.tensor([6, 3]))
        assert block.seen.tolist() == [40, 31]
        more = model(torch.tensor([[11], [50]]), past_key_values=block, position_ids=block.seen[:, None]).logits[:, -1]
        assert torch.allclose(more[1], steps[3][1], atol=1e-9)
        end = step(single, torch.tensor([[11], [11]]))
        assert torch.allclose(more[0], end[0], atol=1e-9)


@torch.no_grad()
def test_generated_sentences_are_found_again():
    model = tiny.model(dtype=torch.float64)
    policy, chosen = watched(SentenceKV(budget=8, **SMALL))
    with policy(model):
        cache = model(tiny.prompts((30,))["input_ids"]).past_key_values
        generated = set()
        for step in range(60):
            chosen.clear()
            model(torch.tensor([[5 if step % 6 == 5 else 30 + step]]), past_key_values=cache)
            for _, _, _, slots, counts in chosen:
                generated |= {slot for slot in slots[counts].tolist() if 30 <= slot <= 30 + step - 2}
    assert generated
    for layer in cache.layers:
        assert int(layer.state["starts"][0, 0, -1]) == 24 + 60, "every generated token is a candidate"


@torch.no_grad()
def test_one_token_a_sentence_is_retrieval_by_token():
    model = tiny.model(dtype=torch.float64)
    policy, chosen = watched(SentenceKV(budget=8, **SMALL | {"ends": tuple(range(97)), "factor": 100}))
    with policy(model):
        cache = model(tiny.prompts((30,))["input_ids"]).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache)
    for _, query, keys, slots, counts in chosen:
        score = torch.einsum("hd,hsd->hs", query[0, :, 0].view(2, 2, -1).mean(1), keys[0])
        for head in range(2):
            best = set((score[head, 1:29].topk(5).indices + 1).tolist()) | {0, 29, 30}
            assert set(slots[0, head, 0][counts[0, head, 0]].tolist()) == best


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    model = tiny.model(dtype=dtype)
    with POLICIES[0](model):
        assert model.generate(**tiny.prompts((40, 29)), **engine.GREEDY).shape == (2, 60)


def test_ends_are_read_from_the_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [
        ".",
        "!",
        '."',
        ".)",
        "\u0120a",
        "3",
        ".\u010a",
        "\u010a\u010a",
        "\u010a",
        "\u00e3\u0122\u0124",
        ".a",
        "?\u0120",
    ]
    built = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(letters)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    assert sentence_ends(tokenizer) == (0, 1, 2, 3, 6, 7, 9, 11)
    tokenizer.save_pretrained(tmp_path)
    model = tiny.model()
    ends = SentenceKV(tokenizer=str(tmp_path)).prepare(model)
    assert ends.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6, 7, 9, 11]
    # The vocabulary is spelled once, until the folder has another tokenizer, and no model is kept for it.
    again = tiny.model(seed=1)
    known = weakref.ref(again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencekv, "sentence_ends", lambda tokenizer: (7,))
        assert torch.equal(SentenceKV(tokenizer=str(tmp_path)).prepare(again), ends)
        os.utime(tmp_path / "tokenizer.json", ns=(1, 2**62))
        assert SentenceKV(tokenizer=str(tmp_path)).prepare(again).nonzero().tolist() == [[7]]
    sentencekv._ends_of.cache_clear()
    del again
    gc.collect()
    assert known() is None
    with pytest.raises(ResourceError, match="needs a tokenizer"), SentenceKV()(model):
        model.generate(tiny.prompts((10,))["input_ids"], max_new_tokens=2)
    with pytest.raises(ResourceError, match="none that loads"):
        SentenceKV(tokenizer=str(tmp_path / "none")).prepare(model)


def test_misuse_is_refused():
    model = tiny.model()
    with pytest.raises(CacheMisuse, match="reads the ids"), attached(model):
        model(tiny.prompts((10,))["input_ids"], past_key_values=TokenCache(model, POLICIES[0]))
    with pytest.raises(BudgetTooSmall, match="at least 65"):
        SentenceKV(budget=64)
    for wrong in ({"kernel": 4}, {"factor": 0.5}, {"max_sentence": 0}, {"ends": (-1,)}):
        with pytest.raises(BadParameter):
            SentenceKV(**wrong)


@torch.no_grad()
def test_an_explicit_cache_reads_ids_and_lets_go_of_the_model():
    model = tiny.model()
    inputs = tiny.prompts((40,))
    with POLICIES[0](model):
        wanted = model.generate(**inputs, **engine.GREEDY)
    cache = POLICIES[0].cache(model)
    assert torch.equal(model.generate(**inputs, **engine.GREEDY, past_key_values=cache), wanted)
    del cache
    assert not model.get_input_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("cls", registered("policy"), ids=lambda cls: cls.slug)
def test_every_policys_block_is_entered_again_and_by_several_threads(cls):
    """One block of each policy, SentenceKV's with its hooks among them."""
    model = tiny.model()
    at_hand(cls, model)
    ids = tiny.prompts((40,))["input_ids"]
    block = small(cls, compact_every=1)(model)
    gate = threading.Barrier(2)

    def generated(_=None):
        with block:
            return model.generate(ids, **engine.GREEDY)

    def run(number):
        with block:
            gate.wait(timeout=60)
            tokens = model.generate(ids, **engine.GREEDY)
            gate.wait(timeout=60)
        # One thread leaves while the other is inside.
        return tokens, *(generated() for _ in range(1 + number))

    wanted = generated()
    assert torch.equal(generated(), wanted)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(run, range(2)):
            assert all(torch.equal(tokens, wanted) for tokens in found)
    assert torch.equal(generated(), wanted)
    for module in (model, model.base_model, model.get_input_embeddings()):
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert model.config._attn_implementation == "sdpa"


def test_an_interrupted_forward_leaves_no_thread_inside():
    """Torch runs no hook behind what is not an Exception."""
    model = tiny.model()
    ids = tiny.prompts((20,))["input_ids"]

    def interrupt(module, args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), POLICIES[0](model):
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        model(ids)
    hook.remove()
    assert sentencekv._thread.depth == 0 and sentencekv._thread.ids is None
    with pytest.raises(CacheMisuse, match="reads the ids"), attached(model):
        model(ids, past_key_values=TokenCache(model, POLICIES[0]))


@torch.no_grad()
@pytest.mark.parametrize("lengths", ((300,), (300, 140)))
def test_an_offloaded_prompt_is_judged_before_it_goes(lengths):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts(lengths)
    caches = []
    for offload in (False, True):
        with dataclasses.replace(POLICIES[0], offload=offload)(model):
            caches.append(model(**inputs).past_key_values)
    assert caches[1].copied_slots() == 0 and caches[1].offloaded_nbytes() > 0
    for one, two in zip(*(cache.layers for cache in caches), strict=True):
        assert one.state.keys() == two.state.keys()
        assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)

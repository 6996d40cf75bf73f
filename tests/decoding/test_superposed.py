"""Superposed Decoding's invariants, as on its card."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from transformers.generation import LogitsProcessor, StoppingCriteria

from tests import tiny
from tokenry.decoding.superposed import NgramTable, Superposed, linearity
from tokenry.decoding.superposed.decoder import Drafts, mixed
from tokenry.errors import BadParameter, CacheMisuse, ResourceError
from tokenry.generation.engine import Options
from tokenry.kvcache import H2O

PLAIN = {"alpha": 0.0}


def run(model, inputs, method, **options):
    settings = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True} | options
    extra = Options(resources=settings.pop("resources", {}), seed=settings.pop("seed", None))
    return model.generate(**inputs, custom_generate=method, tokenry_options=extra, **settings)


def table(seed: int = 0, tokens: int = 4000, order: int = 6) -> NgramTable:
    """Counts of a random text over few ids, so that long contexts repeat."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCABULARY, (tokens,), generator=generator)
    return NgramTable.build(ids.view(4, -1).tolist(), tiny.VOCABULARY, order)


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_one_draft_without_a_table_is_greedy(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((24, 13, 18))
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert torch.equal(run(model, inputs, Superposed(k=1, alpha=0.0), max_new_tokens=12).sequences, wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", tiny.SERVED)
def test_the_first_tokens_are_the_best_of_the_true_distribution(kind, dtype):
    model = tiny.model(kind, dtype)
    inputs = tiny.prompts((14, 9))
    result = run(model, inputs, Superposed(k=3, temperature=1.0, **PLAIN), max_new_tokens=1)
    assert result.sequences.shape == (6, 15)
    with torch.no_grad():
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1].float()
    top = logits.topk(9).values.log_softmax(-1)[:, :3]
    got = logits.gather(1, result.sequences[:, -1].view(2, 3))
    # In half precision equal logits may change places.
    assert torch.allclose(got, logits.topk(3).values, atol=1e-5 if dtype == torch.float32 else 0.2)
    assert torch.allclose(torch.tensor(result.stats.extra["scores"]), top, atol=1e-4 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", ("llama", "gemma"))
def test_half_precision_over_several_tokens(kind, dtype):
    """Of one draft the mixture is its token, so it is plain; several are read as the float64 model reads them."""
    model, inputs = tiny.model(kind, dtype), tiny.prompts((24, 13))
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=10)
    assert torch.equal(run(model, inputs, Superposed(k=1, **PLAIN)).sequences, wanted)
    exact, embed = copy.deepcopy(model).to(torch.float64), model.get_input_embeddings()
    method, row = Superposed(k=3, temperature=1.0, **PLAIN), {"input_ids": inputs["input_ids"][:1]}
    context, best = exact.get_input_embeddings()(row["input_ids"]), torch.zeros(1)
    said = run(model, row, method, max_new_tokens=6, output_logits=True).logits
    for length, logits in enumerate(said):
        with torch.no_grad():
            wanted = exact(inputs_embeds=context, use_cache=False).logits[0, -1].float()
        # Logits have a deviation of 2.
        assert float((logits[0] - wanted).abs().mean()) < (0.2 if dtype == torch.bfloat16 else 0.02)
        best = (best[:, None] + logits[0].topk(9).values.log_softmax(-1)).flatten().topk(3).values
        drafts = run(model, row, method, max_new_tokens=length + 1)
        scores = torch.tensor(drafts.stats.extra["scores"][0])
        assert torch.allclose(scores, best, atol=1e-4)
        last = embed(drafts.sequences[:, -1]).double()
        context = torch.cat([context, (scores.softmax(-1).double()[:, None] * last).sum(0)[None, None]], 1)


def reference(model, row, method, counts, new, ends=()):
    """The algorithm of the card for one prompt, in plain Python and with a full forward a step."""
    embed = model.get_input_embeddings()
    context = embed(row[None])
    drafts, pool = [([], 0.0)], []
    prompt = row.tolist()
    for _ in range(new):
        with torch.no_grad():
            logits = model(inputs_embeds=context, use_cache=False).logits[0, -1].float()
        kept = logits.topk(method.tokens or 3 * method.k)
        near = (kept.values / method.temperature).log_softmax(-1)
        found = []
        for ids, score in drafts:
            text = [*prompt, *ids]
            options = []
            for token, own in zip(kept.indices.tolist(), near.tolist(), strict=True):
                if counts is None:
                    options.append((token, own, True))
                    continue
                g = sum(
                    weight * counts.get((*text[len(text) - n :], token), 0) / followed(counts, tuple(text[-n:]))
                    for n, weight in enumerate(method.weights, 1)
                    if n <= len(text) and followed(counts, tuple(text[-n:]))
                )
                added = method.alpha * math.log(g) if g else -200
                options.append((token, (1 - method.alpha) * own + added, g > 0))
            # Where the table has none of the kept tokens, they stand with those of other drafts that it has.
            none = not any(supported for _, _, supported in options)
            found += [([*ids, token], score + added, supported or none) for token, added, supported in options]
        # Unsupported tokens of a draft that has supported ones come last.
        found = sorted(found, key=lambda draft: (not draft[2], -draft[1]))
        found = [(ids, score) for ids, score, _ in found[: method.k * (1 + max(1, len(ends)))]]
        pool += [draft for draft in found if draft[0][-1] in ends]
        pool = sorted(pool, key=lambda draft: -draft[1] / len(draft[0]))[: method.k]
        drafts = [draft for draft in found if draft[0][-1] not in ends][: method.k]
        weights = torch.tensor([score for _, score in drafts]).softmax(-1)
        last = embed(torch.tensor([ids[-1] for ids, _ in drafts]))
        context = torch.cat([context, (weights[:, None] * last).sum(0)[None, None]], 1)
    return sorted([*drafts, *pool], key=lambda draft: -draft[1] / len(draft[0]))[: method.k]


def followed(counts, context):
    cache = counts.setdefault("followed", {})
    if not cache:
        for gram, count in list(counts.items()):
            if isinstance(gram, tuple):
                cache[gram[:-1]] = cache.get(gram[:-1], 0) + count
    return cache.get(context, 0)


def direct_counts(documents, order):
    found: dict = {}
    for document in documents:
        for n, start in itertools.product(range(1, order + 1), range(len(document))):
            gram = tuple(document[start : start + n])
            if len(gram) == n:
                found[gram] = found.get(gram, 0) + 1
    return found


@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma"))
@pytest.mark.parametrize("ends", ((), "often"))
@pytest.mark.parametrize("counted", (False, True))
def test_drafts_scores_and_ended_ones_are_those_of_the_algorithm(kind, ends, counted):
    model = tiny.model(kind, torch.float64)
    inputs = tiny.prompts((12, 7, 10))
    generator = torch.Generator().manual_seed(1)
    documents = torch.randint(3, tiny.VOCABULARY, (30, 25), generator=generator).tolist()
    counts = direct_counts(documents, 4) if counted else None
    built = NgramTable.build(documents, tiny.VOCABULARY, 4) if counted else None
    method = Superposed(k=3, alpha=0.55 if counted else 0.0, temperature=2.0, tokens=12, weights=(0.01, 0.04, 0.15))
    # Ids that end a text here are likely ones, so that drafts end at every length.
    closing = list(range(3, 45)) if ends else []
    options = {"eos_token_id": closing, "pad_token_id": 0} if closing else {}
    result = run(model, inputs, method, max_new_tokens=7, resources={"table": built}, **options)
    assert result.sequences.shape[0] == 9
    early = 0
    for row, length in enumerate((12, 7, 10)):
        prompt = inputs["input_ids"][row, 12 - length :]
        wanted = reference(model, prompt, method, counts, 7, closing)
        assert result.new_tokens[3 * row : 3 * row + 3] == [ids for ids, _ in wanted]
        scores = torch.tensor([score for _, score in wanted])
        assert torch.allclose(torch.tensor(result.stats.extra["scores"][row]), scores, rtol=1e-4, atol=1e-4)
        early += sum(len(ids) < 7 for ids, _ in wanted)
        assert torch.equal(result.sequences[3 * row : 3 * row + 3, :12], inputs["input_ids"][[row] * 3])
    assert (early > 0) == bool(ends)
    if counted and not ends:
        fell = [score for row in result.stats.extra["scores"] for score in row]
        assert len({round(score / 200) for score in fell}) > 1, "drafts with and without support must occur"


def test_one_forward_a_token_whatever_k():
    model = tiny.model()
    for k in (1, 2, 5):
        for reset in (None, 4):
            stats = run(model, tiny.prompts((12, 7)), Superposed(k=k, reset=reset, **PLAIN)).stats
            assert stats.forwards == 10 and stats.passes == 20 and stats.committed == 2 * k * 10


def test_weights_are_a_shifted_softmax_and_scores_fall():
    model = tiny.model()
    result = run(model, tiny.prompts((12, 7)), Superposed(k=3, temperature=0.5, **PLAIN))
    weights = torch.tensor(result.stats.extra["weights"])
    assert weights.shape == (2, 9, 3) and torch.allclose(weights.sum(-1), torch.ones(2, 9))
    assert bool((weights[..., :-1] >= weights[..., 1:]).all())
    shorter = run(model, tiny.prompts((12, 7)), Superposed(k=3, temperature=0.5, **PLAIN), max_new_tokens=9)
    # Without a table every score only falls: the best of ten tokens is below the best of nine.
    best, before = (max(row) for row in result.stats.extra["scores"]), [max(r) for r in shorter.stats.extra["scores"]]
    assert all(a <= b for a, b in zip(best, before, strict=True))
    drafts = Drafts.none(torch.tensor([True]), 3, 1, None)
    drafts.scores = torch.tensor([[-1e4, -1e4 - 1, -torch.inf]])
    wanted = torch.tensor([[0.0, -1.0, -torch.inf]]).softmax(-1)
    assert torch.allclose(drafts.weights, wanted)


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_a_mixture_of_one_token_is_the_token(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((9,))["input_ids"]
    token = torch.tensor([[7, 7, 11]])
    embedded = mixed(model, token, torch.tensor([[0.3, 0.7, 0.0]]))
    whole = torch.cat([model.get_input_embeddings()(inputs), embedded], 1)
    with torch.no_grad():
        got = model(inputs_embeds=whole, use_cache=False).logits[:, -1]
        wanted = model(torch.cat([inputs, token[:, :1]], 1), use_cache=False).logits[:, -1]
    assert torch.allclose(got, wanted, atol=1e-4)


def test_rows_of_a_batch_do_not_depend_on_each_other():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    method = Superposed(k=3)
    resources = {"table": table()}
    ends = {"eos_token_id": list(range(3, 12)), "pad_token_id": 0}
    both = run(model, inputs, method, resources=resources, **ends)
    alone = [
        run(model, {key: value[row : row + 1] for key, value in inputs.items()}, method, resources=resources, **ends)
        for row in range(2)
    ]
    assert both.new_tokens == [*alone[0].new_tokens, *alone[1].new_tokens]


class Even(LogitsProcessor):
    """Forbids the token before last: it reads each draft's own text."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:], -torch.inf)


class Doublet(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2:].sum(-1) % 5 == 0) & (input_ids[:, -2] > 20)


def test_processors_and_criteria_see_every_draft_by_itself():
    model = tiny.model()
    inputs = tiny.prompts((12, 7))
    method = Superposed(k=3, temperature=1.0, **PLAIN)
    result = run(model, inputs, method, logits_processor=[Even()], max_new_tokens=14)
    for row in result.new_tokens:
        assert all(token not in row[max(0, i - 2) : i] for i, token in enumerate(row))
    free = run(model, inputs, method, max_new_tokens=14)
    assert any(token in row[max(0, i - 2) : i] for row in free.new_tokens for i, token in enumerate(row))
    stopped = run(model, inputs, method, stopping_criteria=[Doublet()], pad_token_id=0, max_new_tokens=14)
    criterion, early = Doublet(), 0
    for row, ids in enumerate(stopped.new_tokens):
        text = torch.tensor([*inputs["input_ids"][row // 3].tolist(), *ids])
        held = [bool(criterion(text[None, : 12 + n], None)) for n in range(1, len(ids) + 1)]
        assert not any(held[:-1]) and (held[-1] or len(ids) == 14)
        early += held[-1]
    assert early


def test_records_follow_the_drafts():
    model = tiny.model(dtype=torch.float64)
    result = run(
        model, tiny.prompts((12, 7)), Superposed(k=3, temperature=1.5, tokens=tiny.VOCABULARY, **PLAIN),
        output_logits=True, output_scores=True, repetition_penalty=1.2, max_new_tokens=6,
    )  # fmt: skip
    assert len(result.logits) == len(result.scores) == 6 and result.scores[0].shape == (6, tiny.VOCABULARY)
    total = sum(
        (step / 1.5).log_softmax(-1).gather(1, result.sequences[:, 12 + i, None])[:, 0]
        for i, step in enumerate(result.scores)
    )
    assert torch.allclose(total.view(2, 3), torch.tensor(result.stats.extra["scores"]), atol=1e-3)
    assert result.past_key_values is None and result.sources.shape == result.sequences.shape


def test_a_reset_goes_on_as_fresh_drafts_from_the_best_one():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12,))
    whole = run(model, inputs, Superposed(k=3, reset=4, temperature=1.0, **PLAIN), max_new_tokens=8)
    first = run(model, inputs, Superposed(k=3, temperature=1.0, **PLAIN), max_new_tokens=4)
    longer = first.sequences[:1]
    second = run(
        model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)},
        Superposed(k=3, temperature=1.0, **PLAIN), max_new_tokens=4,
    )  # fmt: skip
    assert torch.equal(whole.sequences, second.sequences)


def test_a_sampled_prefix_is_plains_and_gives_other_drafts():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    method = Superposed(k=2, prefix=3, **PLAIN)
    result = run(model, inputs, method, do_sample=True, seed=3, num_return_sequences=2, top_k=0)
    from tokenry.generation import Plain

    plain = run(model, inputs, Plain(), do_sample=True, seed=3, num_return_sequences=2, top_k=0, max_new_tokens=3)
    assert result.sequences.shape == (8, 22)
    assert torch.equal(result.sequences[:, :15], plain.sequences.repeat_interleave(2, 0))
    assert result.stats.forwards == 10


def test_every_draft_is_another_text():
    model = tiny.model()
    result = run(model, tiny.prompts((12,)), Superposed(k=5), resources={"table": table()})
    assert len({tuple(row) for row in result.new_tokens}) == 5


def test_it_runs_inside_a_policy():
    model = tiny.model()
    with H2O(budget=16)(model):
        result = run(model, tiny.prompts((30, 20)), Superposed(k=3, **PLAIN))
    assert result.sequences.shape == (6, 40)
    with H2O(budget=16)(model), pytest.raises(BadParameter, match="reset"):
        run(model, tiny.prompts((30,)), Superposed(k=3, reset=4, **PLAIN))


def test_a_saved_table_is_found_by_its_path(tmp_path):
    model = tiny.model()
    table().save(tmp_path / "ngram.safetensors")
    inputs = tiny.prompts((12,))
    given = run(model, inputs, Superposed(), resources={"table": table()})
    named = run(model, inputs, Superposed(table=str(tmp_path)))
    assert torch.equal(given.sequences, named.sequences)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    model, inputs = tiny.model(), tiny.prompts((8,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ResourceError, match="tokenry train ngram"):
        run(model, inputs, Superposed())
    with pytest.raises(ResourceError, match="97"):
        run(model, inputs, Superposed(), resources={"table": NgramTable.build([[1, 2, 3]], 50)})
    with pytest.raises(ResourceError, match="go to 4"):
        run(model, inputs, Superposed(), resources={"table": table(order=4)})
    with pytest.raises(BadParameter, match="do_sample"):
        run(model, inputs, Superposed(**PLAIN), do_sample=True)
    with pytest.raises(CacheMisuse, match="past_key_values"):
        from transformers import DynamicCache

        run(model, inputs, Superposed(**PLAIN), past_key_values=DynamicCache(config=model.config))
    for bad in ({"k": 0}, {"alpha": 1.0}, {"temperature": 0.0}, {"tokens": 4}, {"reset": 0}, {"weights": (0.0,)}):
        with pytest.raises(BadParameter, match=next(iter(bad))):
            Superposed(**bad)


def test_linearity_is_one_for_one_beam_and_falls_short_for_more():
    model = tiny.model("qwen3")
    inputs = tiny.prompts((12, 7))
    one = linearity(model, **inputs, k=1, steps=4)
    assert one.shape == (4, 2) and torch.allclose(one, torch.ones(4, 2), atol=1e-4)
    three = linearity(model, **inputs, k=3, steps=4)
    assert bool((three < 0.9999).any()) and bool((three > -1.0001).all())

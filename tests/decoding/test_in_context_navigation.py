"""In-Context Navigation's invariants, as on its card."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tokenry.decoding.in_context_navigation import (
    Answer,
    Clusters,
    InContextNavigation,
    KeySpace,
    chain_of_thought,
    correlation,
    navigate,
)
from tokenry.decoding.in_context_navigation.asking import digits, letter, mean_precision, vote
from tokenry.decoding.in_context_navigation.decoder import surfaces
from tokenry.decoding.in_context_navigation.key_space import kmeans
from tokenry.errors import BadParameter, PromptTooLong
from tokenry.generation import generate
from tokenry.generation.engine import Options

TOKENIZER = tiny.tokenizer()
# The tiny tokenizer splits at blanks and knows w0, w1, ... and a few marks.
TEXTS = {"header": " w5 : ", "item": " w{number} : {answer} ; ", "cue": " w{number} :", "end": "."}


def method(**options) -> InContextNavigation:
    return InContextNavigation(**({"rounds": 3, "per_round": 4} | TEXTS | options))


def run(model, inputs, chosen, **options):
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True} | options
    extra = Options(resources={"tokenizer": TOKENIZER}, seed=settings.pop("seed", None))
    return model.generate(**inputs, custom_generate=chosen, tokenry_options=extra, **settings)


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def ranking(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def greedy(model, ids, ends, new):
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=new
    )
    found = out[0, len(ids) :].tolist()
    stop = next((place + 1 for place, token in enumerate(found) if bool(ends[token])), len(found))
    return found[:stop]


@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma2", "mistral"))
@pytest.mark.parametrize("original", (True, False))
def test_rounds_are_those_of_the_algorithm_for_a_padded_batch(kind, original):
    model = tiny.model(kind, torch.float64)
    inputs = tiny.prompts((12, 7))
    chosen = method(original=original, end="1")
    result = run(model, inputs, chosen)
    looks = surfaces(TOKENIZER, "1", tiny.VOCABULARY, torch.device("cpu"))
    closed = {0, 1, 2}
    assert set(looks.closed.nonzero()[:, 0].tolist()) == closed
    lengths = set()
    for row, length in enumerate((12, 7)):
        prompt = inputs["input_ids"][row, 12 - length :].tolist()
        first = [*prompt, *encode(TEXTS["header"] + " w1 :")]
        tried, listed, wanted = set(closed), [], []
        for number in range(3):
            lines = "".join(f" w{i} : {text} ; " for i, text in enumerate(listed, 1))
            asked = [*prompt, *encode(TEXTS["header"] + lines + f" w{len(listed) + 1} :")]
            scores = ranking(model, asked)
            order = scores.argsort(descending=True).tolist()
            new = [token for token in order if token not in tried][:4]
            tried |= set(new)
            for token in new:
                ids = [token]
                if not bool(looks.ends[token]):
                    ids += greedy(model, [*(first if original else asked), token], looks.ends, 5)
                wanted.append((ids, order.index(token) + 1, number))
            listed = [TOKENIZER.decode(ids, skip_special_tokens=True).partition("1")[0] for ids, _, _ in wanted]
        about = result.stats.extra["answers"][row]
        got = result.new_tokens[12 * row : 12 * row + 12]
        assert got == [ids for ids, _, _ in wanted]
        assert [(a["rank"], a["round"]) for a in about] == [(rank, number) for _, rank, number in wanted]
        assert [a["text"] for a in about] == listed
        lengths |= {len(ids) for ids in got}
    assert len(lengths) > 1, "answers of unequal length must occur"
    assert result.sequences.shape[0] == 24
    assert torch.equal(result.sequences[:, :12], inputs["input_ids"].repeat_interleave(12, 0))


def test_no_first_text_comes_twice_and_one_round_is_the_baseline():
    model = tiny.model()
    inputs = tiny.prompts((12, 7))
    for navigating in (True, False):
        result = run(model, inputs, method(rounds=5, per_round=6, navigate=navigating))
        for row in result.stats.extra["answers"]:
            assert len({TOKENIZER.decode([answer["first"]]) for answer in row}) == len(row) == 30
        assert result.sequences.shape[0] == 60
    one = [run(model, inputs, method(rounds=1, per_round=12, navigate=own)).sequences for own in (True, False)]
    assert torch.equal(*one)
    # The fixed ranking walked down in rounds is the fixed ranking.
    walked = run(model, inputs, method(rounds=3, per_round=4, navigate=False)).sequences
    assert torch.equal(walked, one[0])


def test_answers_do_not_depend_on_the_list():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12,))
    listed = run(model, inputs, method())
    fixed = run(model, inputs, method(rounds=1, per_round=94, navigate=False))
    texts = {ids[0]: ids for ids in fixed.new_tokens}
    assert all(texts[ids[0]] == ids for ids in listed.new_tokens)
    free = run(model, inputs, method(original=False))
    assert any(texts[ids[0]] != ids for ids in free.new_tokens)


def test_ids_of_one_text_are_one_first_token():
    alike = torch.arange(tiny.VOCABULARY)
    alike[[40, 50]] = 30
    scores = torch.zeros(1, tiny.VOCABULARY)
    scores[0, [50, 60, 30, 40]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    tried = torch.zeros(1, tiny.VOCABULARY, dtype=torch.bool)
    firsts, ranks = method(per_round=2)._firsts(scores, tried, alike)
    assert firsts.tolist() == [[50, 60]] and ranks.tolist() == [[1, 2]]
    assert tried[0].nonzero()[:, 0].tolist() == [30, 40, 50, 60]
    _, ranks = method(per_round=1)._firsts(scores, tried, alike)
    assert ranks.tolist() == [[5]], "the rank counts what was tried before"
    with pytest.raises(BadParameter, match="rounds"):
        method(per_round=2, pool=4)._firsts(scores, tried, alike)


def test_a_list_beyond_the_context_loses_its_oldest_answers():
    model = tiny.model()
    model.config.max_position_embeddings = 60
    inputs = tiny.prompts((12,))
    result = run(model, inputs, method(rounds=4, per_round=4, end=""))
    capped = [answer["capped"] for answer in result.stats.extra["answers"][0]]
    assert not any(capped[:8]) and all(capped[12:])
    model.config.max_position_embeddings = 20
    with pytest.raises(PromptTooLong, match="header"):
        run(model, inputs, method(end=""))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_runs(dtype):
    result = run(tiny.model(dtype=dtype), tiny.prompts((12, 7)), method())
    assert result.sequences.shape[0] == 24


def test_records_and_stop_tokens_are_each_answers_own():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    closing = {"eos_token_id": list(range(20, 40)), "pad_token_id": 0}
    result = run(model, inputs, method(), output_scores=True, repetition_penalty=1.2, **closing)
    width = result.sequences.shape[1] - 12
    assert len(result.scores) == width
    early = 0
    for row, ids in enumerate(result.new_tokens):
        assert not set(ids[:-1]) & set(range(20, 40))
        early += len(ids) < width
        for place, token in enumerate(ids[1:], 1):
            assert int(result.scores[place][row].argmax()) == token
    assert early
    assert result.past_key_values is None


def test_navigate_judges_each_text_once_and_the_empty_one_is_wrong():
    model, asked = tiny.model(), []

    def judge(text: str) -> bool:
        asked.append(text)
        return "w1" in text

    answers = navigate(model, TOKENIZER, "w3 w9 w4", method=method(end="1"), judge=judge, max_new_tokens=5)
    assert len(answers) == 12 and len(asked) == len(set(asked))
    assert all(answer.correct == bool(answer.text.strip() and "w1" in answer.text) for answer in answers)
    assert "" not in asked and "<eos>" not in asked
    assert navigate(model, TOKENIZER, "w3 w9", method=method(rounds=1))[0].correct is None


def test_chain_of_thought_votes_over_ways_with_other_first_tokens():
    model = tiny.model()
    chosen = method(rounds=4, per_round=1, pool=40, end=";")
    found = chain_of_thought(model, TOKENIZER, "w3 w9 w4", method=chosen, suffix=" w7 :", max_new_tokens=6)
    assert len(found.paths) == len(found.answers) == 4 and len(set(found.paths)) > 1
    texts = [f"w3 w9 w4 w5 :  w1 :{path} w7 :" for path in found.paths]
    ends = generate(model, TOKENIZER, texts, max_new_tokens=8, do_sample=False).texts()
    assert found.answers == [digits(text) for text in ends]
    assert found.vote == vote(found.answers)
    assert vote(["", "7", "3", "3"]) == "3" and vote(["", ""]) == "" and vote(["2", "5"]) == "2"
    assert digits("so 1,204.") == "1204" and letter("(B) or C") == "B" and letter("none") == ""


def test_mean_precision_is_the_mean_of_running_precisions():
    assert mean_precision([True, False, True]) == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)


@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma2", "opt"))
def test_query_times_keys_are_the_models_logits(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((12, 7))
    space = KeySpace(model)
    for row, length in enumerate((12, 7)):
        wanted = ranking(model, inputs["input_ids"][row, 12 - length :].tolist())
        got = space.logits(space.query(**inputs))[row]
        assert torch.allclose(got, wanted, atol=1e-4)
    if kind == "gemma2":
        assert space.cap is not None


def test_clusters_are_those_of_points_that_lie_apart():
    generator = torch.Generator().manual_seed(0)
    middles = 20 * torch.randn(5, 8, generator=generator)
    truth = torch.arange(5).repeat_interleave(40)
    points = middles[truth] + torch.randn(200, 8, generator=generator)
    numbers, centres = kmeans(points, 5, seed=3)
    assert all(len(set(numbers[truth == c].tolist())) == 1 for c in range(5)) and len(set(numbers.tolist())) == 5
    assert torch.allclose(centres[numbers[0]], points[:40].mean(0), atol=1e-4)
    again, _ = kmeans(points, 5, seed=3)
    assert torch.equal(numbers, again)
    clusters = KeySpace(tiny.model()).clusters(9, tokenizer=TOKENIZER)
    assert clusters.ids[:3].tolist() == [-1] * 3 and set(clusters.ids[3:].tolist()) == set(range(9))
    same, _ = kmeans(torch.ones(6, 2), 3)
    assert len(same) == 6, "equal points leave clusters empty"
    with pytest.raises(BadParameter, match="count"):
        KeySpace(tiny.model()).clusters(98)


def test_the_diagnostic_tells_neighbours_of_top_ranks_from_others():
    # Ids 0..9 rank first and fill clusters 0 and 1; of the others in those clusters none is right, outside all are.
    ids = torch.tensor([0, 1] * 20 + [2, 3] * 20)
    answers = [Answer(str(i), first, i + 1, 0, correct=i < 10 or first >= 40) for i, first in enumerate(_order())]
    found = correlation(answers, Clusters(ids, torch.zeros(4, 2)), main=10)
    assert found["top"] == 1 and found["in_cluster"]["correctness"] == 0 and found["out_of_cluster"]["correctness"] == 1
    assert found["in_cluster"]["count"] + found["out_of_cluster"]["count"] == 70
    assert found["in_cluster"]["rank"] < found["out_of_cluster"]["rank"]
    with pytest.raises(BadParameter, match="judge"):
        correlation([Answer("a", 1, 1, 0), Answer("b", 2, 2, 0)], Clusters(ids, torch.zeros(4, 2)), main=1)


def _order() -> list[int]:
    return [*range(0, 40), *range(40, 80)]


def test_without_clusters_the_groups_do_not_differ():
    """Permuted clusters: the difference of the groups is noise. Over 200 permutations its mean has a standard error
    below 0.01; a false alarm at 0.04 has a chance below 1e-4."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(80) % 16
    right = torch.rand(80, generator=generator) < 0.5
    answers = [Answer(str(i), i, i + 1, 0, correct=bool(right[i])) for i in range(80)]
    differences = []
    for _ in range(200):
        shuffled = Clusters(ids[torch.randperm(80, generator=generator)], torch.zeros(16, 2))
        found = correlation(answers, shuffled, main=10)
        differences.append(found["in_cluster"]["correctness"] - found["out_of_cluster"]["correctness"])
    assert abs(sum(differences) / 200) < 0.04


def test_bad_parameters_are_refused():
    for bad in ({"rounds": 0}, {"per_round": 0}, {"pool": 3}, {"item": "no place"}):
        with pytest.raises(BadParameter, match=next(iter(bad))):
            method(**bad)
    assert InContextNavigation(item="", rounds=1).item == ""

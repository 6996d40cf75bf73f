"""`tokenry train token-recycling`: a table that knows a kind of text before the first prompt."""

import pytest
import torch

import tokenry
from tests.evaluation import tiny_text
from tokenry.errors import BadParameter, ResourceError
from tokenry.methods import method
from tokenry.objectives import token_rows
from tokenry.objectives.trainable import run
from tokenry.speculation import RecyclingTable
from tokenry.speculation.hot_start import HotStart
from tokenry.speculation.sources import TABLE_FILE

TEXTS = [f"def f{n}(a, b):\n    return a * {n} + b\n" for n in range(60)]
PROMPT = "def f7(a, b):\n"
DRAFTERS = ("token-recycling", "token-recycling:template=auto", "goose", "goose:size=auto")


@pytest.fixture(scope="module")
def model():
    return tiny_text.model(dtype=torch.float64)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_hot_drafter_needs_fewer_passes_for_what_plain_writes(tmp_path, drafter):
    model, tokenizer = tokenry.load("tokenry/code", dtype=torch.float32)
    # The model's own answer is a text that the table fits.
    wanted = tokenry.generate(model, tokenizer, PROMPT, method="plain", max_new_tokens=48)
    text = tokenizer.decode(wanted.sequences[0])
    note = run(HotStart(drafter=drafter, tokens=64, length=64), model, tokenizer, [text * 3], tmp_path)
    assert note["tokens"] == 64
    assert note["use"] == str(method(f"{drafter}{';' if ':' in drafter else ':'}table={tmp_path}"))
    hot = tokenry.generate(model, tokenizer, PROMPT, method=note["use"], max_new_tokens=48)
    cold = tokenry.generate(model, tokenizer, PROMPT, method=drafter, max_new_tokens=48)
    assert hot.new_tokens == cold.new_tokens == wanted.new_tokens
    assert hot.stats.forwards < cold.stats.forwards


def test_the_table_holds_what_the_model_wants_in_the_texts(model, tmp_path):
    tokenizer = tiny_text.tokenizer()
    run(
        HotStart(drafter="token-recycling:k=3;template=((0,),)", tokens=256, length=64),
        model,
        tokenizer,
        TEXTS,
        tmp_path,
    )
    table = RecyclingTable.load(tmp_path / TABLE_FILE)
    rows = token_rows(TEXTS, tokenizer, 64, rows=4).ids
    wanted = {}
    with torch.no_grad():
        for row in rows:
            for token, scores in zip(row.tolist(), model(row[None]).logits[0], strict=True):
                wanted[token] = scores.topk(3).indices.tolist()
    assert table.seen.nonzero()[:, 0].tolist() == sorted(wanted)
    assert {token: table.ids[token].tolist() for token in wanted} == wanted
    assert table.tokenizer


def test_what_cannot_be_made_or_used_is_named(model, tmp_path):
    tokenizer = tiny_text.tokenizer()
    with pytest.raises(BadParameter, match="token-recycling or goose, because it must keep a table"):
        HotStart(drafter="suffix")
    with pytest.raises(BadParameter, match="token-recycling or goose"):
        HotStart(drafter="token-recycling+h2o:budget=64")
    with pytest.raises(BadParameter, match="say tokens=5"):
        run(HotStart(), model, tokenizer, TEXTS, tmp_path, steps=5)
    with pytest.raises(BadParameter, match="fewer than one row"):
        run(HotStart(), model, tokenizer, ["short"], tmp_path)
    with pytest.raises(ResourceError, match="cannot read a recycling table"):
        tokenry.generate(model, tokenizer, PROMPT, method=f"goose:table={tmp_path}", max_new_tokens=4)
    run(HotStart(tokens=64, length=64), model, tokenizer, TEXTS, tmp_path)
    with pytest.raises(ResourceError, match="this one has k=8, order=4"):
        tokenry.generate(model, tokenizer, PROMPT, method=f"token-recycling:table={tmp_path}", max_new_tokens=4)

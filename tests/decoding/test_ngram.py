"""The n-gram table agrees with counting by hand, and its trainer writes what the decoder reads."""

from __future__ import annotations

import random

import pytest
import torch

from tests import tiny
from tests.decoding.test_superposed import direct_counts, followed
from tokenry.decoding.superposed.ngram import NgramTable, NgramTrainer, encode
from tokenry.errors import BadParameter, ResourceError
from tokenry.objectives.trainable import run

VOCABULARY = 7
WEIGHTS = (0.1, 0.2, 0.3)


def documents(seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 40))] for _ in range(12)]


def test_every_n_gram_has_its_count_and_no_other_is_there():
    texts = documents()
    counts = direct_counts(texts, 4)
    table = NgramTable.build(texts, VOCABULARY, 4)
    assert len(table) == len(counts)
    assert table.sizes == [sum(len(gram) == n for gram in counts) for n in range(1, 5)]
    assert bool((table.keys[1:] > table.keys[:-1]).all())
    for gram, count in list(counts.items()):
        node = torch.tensor(0)
        for token in gram:
            node = table.child(node, torch.tensor(token))
        assert int(table.counts[node - 1]) == count
        if len(gram) < 4:
            assert int(table.followed[node]) == followed(counts, gram)


@pytest.mark.parametrize("context", ([], [3], [0, 1], [2, 2, 2], [5, 1, 4, 0, 6]))
def test_probabilities_are_weighted_relative_frequencies_without_back_off(context):
    texts = documents(1)
    counts = direct_counts(texts, 4)
    table = NgramTable.build(texts, VOCABULARY, 4)
    wanted = [
        sum(
            weight * counts.get((*context[len(context) - n :], token), 0) / followed(counts, tuple(context[-n:]))
            for n, weight in enumerate(WEIGHTS, 1)
            if n <= len(context) and followed(counts, tuple(context[-n:]))
        )
        for token in range(VOCABULARY)
    ]
    got = table.prob(torch.tensor(context, dtype=torch.long), torch.arange(VOCABULARY), WEIGHTS)
    assert torch.allclose(got, torch.tensor(wanted, dtype=torch.float32), atol=1e-6)


def test_nothing_reaches_over_the_end_of_a_document_and_unseen_contexts_add_nothing():
    table = NgramTable.build([[1, 2], [3, 4]], VOCABULARY, 3)
    some = torch.arange(VOCABULARY)
    assert not table.prob(torch.tensor([2]), some, (1.0, 1.0)).any(), "2 ends a document"
    assert not table.prob(torch.tensor([6]), some, (1.0, 1.0)).any(), "6 was never seen"
    assert table.prob(torch.tensor([0, 1]), some, (1.0, 1.0)).tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert int(table.child(torch.tensor(0), torch.tensor(VOCABULARY + 1))) == -1, "an id of no token is no other's"


def test_a_state_moves_on_and_leaves_padding_out():
    texts = documents(2)
    table = NgramTable.build(texts, VOCABULARY, 4)
    text = torch.tensor(texts[3])
    state = table.start(text[:1])
    for end in range(2, len(text) + 1):
        state = table.advance(state, text[end - 1])
        assert torch.equal(state, table.start(text[:end]))
    padded = torch.tensor([[0, 0, 0, 5], [0, 2, 3, 1]])
    valid = torch.tensor([[False, False, False, True], [False, True, True, True]])
    both = table.start(padded, valid)
    assert torch.equal(both[0], table.start(torch.tensor([5])))
    assert torch.equal(both[1], table.start(torch.tensor([2, 3, 1])))


def test_a_file_holds_the_table_and_other_files_are_refused(tmp_path):
    table = NgramTable.build(documents(), VOCABULARY, 3)
    table.save(tmp_path / "ngram.safetensors")
    again = NgramTable.load(tmp_path)
    assert torch.equal(again.keys, table.keys) and torch.equal(again.counts, table.counts)
    assert torch.equal(again.followed, table.followed) and (again.vocab, again.order) == (VOCABULARY, 3)
    with pytest.raises(ResourceError, match="tokenry train ngram"):
        NgramTable.load(tmp_path / "nothing")
    (tmp_path / "other").write_text("text")
    with pytest.raises(ResourceError, match="other"):
        NgramTable.load(tmp_path / "other")
    with pytest.raises(BadParameter, match="outside"):
        NgramTable.build([[9]], VOCABULARY)
    with pytest.raises(BadParameter, match="no tokens"):
        NgramTable.build([[]], VOCABULARY)
    with pytest.raises(BadParameter, match="3 weights"):
        table.prob(torch.tensor([1]), torch.tensor([1]), WEIGHTS)


def test_the_trainer_counts_texts_between_first_and_last_token(tmp_path):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    texts = ["w1 w2 w3 w1 w2", "w5 . w6"]
    note = run(NgramTrainer(order=3), model, tokenizer, texts, tmp_path)
    encoded = [[1, *tokenizer(text)["input_ids"], 2] for text in texts]
    assert [ids.tolist() for ids in encode(tokenizer, texts)] == encoded
    wanted = NgramTable.build(encoded, tiny.VOCABULARY, 3)
    got = NgramTable.load(tmp_path)
    assert torch.equal(got.keys, wanted.keys) and torch.equal(got.counts, wanted.counts)
    assert note["tokens"] == 12 and note["ngrams"] == wanted.sizes
    assert note["use"] == f"superposed-decoding:weights=(0.01,0.04);table={tmp_path}"
    with pytest.raises(BadParameter, match="steps"):
        run(NgramTrainer(), model, tokenizer, texts, tmp_path, steps=3)

"""The recipe's parts: what is kept out of the corpus, blocks that repeat, a run that resumes exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry.training.corpus import Documents, source_files, train_tokenizer, write_blocks

pytest.importorskip("accelerate")

LINES = [f"value_{number} = {number} * scale + offset" for number in range(40)]


def _tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_held_out_text_is_kept_away(tmp_path):
    held = tmp_path / "held.py"
    held.write_text("\n".join(LINES))
    packages = _tree(
        tmp_path / "packages",
        {
            "one/plain.py": "x = 1\n",
            "one/copy.py": "x = 1\n",
            "two/borrows.py": "# head\n\n" + "\n\n".join("    " + line for line in LINES[5:18]),
            "two/quotes.py": "\n".join(LINES[5:17]),
            "pip/_vendor/rich/console.py": "y = 2\n",
            "click/core.py": "z = 3\n",
        },
    )
    texts, counts = source_files([packages], [held])
    assert sorted(texts) == sorted(["x = 1\n", "\n".join(LINES[5:17])])
    assert counts["held out"] == 2 and counts["shares lines"] == 1 and counts["duplicate"] == 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"def function_{n}(a, b):\n    c = a + {n} * b\n    return c\n" * 4 for n in range(60)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocabulary=400, context=64)
    return folder, texts, tokenizer


def test_tokenizer_has_the_reserved_ids_and_loses_nothing(corpus):
    _, texts, tokenizer = corpus
    names = ["<pad>", "<bos>", "<eos>", "<mask>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(7))
    assert tokenizer.convert_tokens_to_ids("<unused-31>") == 38
    for text in (texts[0], "tabs\tand\r\n  é — 漢字 \x00 12345", "  \n\n   x"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_unigram_tokenizer_spells_by_bytes_what_it_has_no_piece_for(corpus, tmp_path):
    _, texts, _ = corpus
    # Pieces are found in what several words share.
    words = "returns returned returning unreturned"
    tokenizer = train_tokenizer([*texts, words, "été"], tmp_path, vocabulary=460, context=64, kind="unigram")
    names = ["<pad>", "<bos>", "<eos>", "<mask>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(7)) and len(tokenizer) <= 460
    for text in (texts[0], "tabs\tand\r\n  é — 漢字 \x00 12345", "  \n\n   x", "<0x41>"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1 and tokenizer.convert_tokens_to_ids("<unk>") not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer(words)["input_ids"]) < len(words)
    # What is trained on it are blocks of its ids.
    blocks = write_blocks(texts, tokenizer, tmp_path, blocks=1, size=512, lengths=(64,), seed=0, copying=(0, 0))
    assert np.load(blocks).max() < len(tokenizer)


def test_infilled_documents_hold_the_whole_text(corpus):
    _, texts, tokenizer = corpus
    documents = Documents(texts, tokenizer, seed=0)
    stream = documents.code()
    found = [next(stream) for _ in range(60)]
    infilled = [ids for ids in found if 4 in ids]
    assert 15 < len(infilled) < 45
    originals = set(texts)
    for ids in found:
        assert ids[0] == 1 and ids[-1] == 2
        if 4 in ids:
            left, rest = ids[2 : ids.index(6)], ids[ids.index(6) + 1 : -1]
            right, middle = rest[: rest.index(5)], rest[rest.index(5) + 1 :]
            # Pieces are decoded apart: they were cut at characters and encoded apart.
            text = "".join(tokenizer.decode(part) for part in (left, middle, right))
        else:
            text = tokenizer.decode(ids[1:-1])
        assert text in originals


def test_blocks_repeat_and_hold_whole_rows(corpus, tmp_path):
    _, texts, tokenizer = corpus
    plan = {"blocks": 4, "size": 1024, "lengths": (256, 512), "seed": 3, "copying": (0, 0)}
    one = np.load(write_blocks(texts, tokenizer, tmp_path, **plan)).copy()
    (tmp_path / "blocks.json").unlink()
    two = np.load(write_blocks(texts, tokenizer, tmp_path, **plan))
    assert one.shape == (4, 1024) and np.array_equal(one, two)
    assert one.max() < 400


def test_a_stretch_of_blocks_teaches_copying(corpus, tmp_path):
    _, texts, tokenizer = corpus
    plan = {"blocks": 40, "size": 1024, "lengths": (128,), "seed": 3}
    array = np.load(write_blocks(texts, tokenizer, tmp_path, **plan, copying=(10, 30)))

    def repeats(row):
        return any(np.array_equal(row[period:], row[:-period]) for period in range(8, 65))

    share = np.array([[repeats(row) for row in block.reshape(8, 128)] for block in array]).mean(1)
    assert 0.35 < share[10:30].mean() < 0.65  # 160 rows of chance 1/2: four standard deviations
    assert np.concatenate([share[:10], share[30:]]).mean() < 0.1


def test_the_mixture_of_examples_fills_rows_with_answers(corpus, tmp_path):
    _, texts, tokenizer = corpus
    plan = {"blocks": 30, "size": 1024, "lengths": (1024,), "seed": 3, "copying": (0, 0)}
    answers = {}
    for mixture in ("source", "examples"):
        (tmp_path / mixture).mkdir()
        array = np.load(write_blocks(texts, tokenizer, tmp_path / mixture, **plan, mixture=mixture))
        text = "".join(tokenizer.decode(block) for block in array)
        answers[mixture] = text.count("# recall KEY_"), text.count("# renamed\n")
    assert all(more > less > 0 for more, less in zip(answers["examples"], answers["source"], strict=True))


def test_a_stopped_run_resumes_to_the_same_weights(corpus, tmp_path):
    from tokenry.training.pretrain import pretrain

    _, texts, tokenizer = corpus
    blocks = write_blocks(texts, tokenizer, tmp_path, blocks=6, size=512, lengths=(64,), seed=0, copying=(0, 2))

    def run(name, stop_at=None):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=400, **shape))
        calls = []

        def interrupt(module, args):
            calls.append(None)
            if len(calls) == stop_at:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(interrupt)
        return pretrain(model, blocks, tmp_path / name, lengths=(64,), steps=6, save_every=3)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop_at=5)
    resumed = run("parts")
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)

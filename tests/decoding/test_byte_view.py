"""The byte view against enumeration, as on its card."""

from __future__ import annotations

import codecs
import functools
import itertools
import math

import pytest
import torch

import tokenry
from tests import tiny
from tests.decoding import byte_tokenizers as kinds
from tokenry.decoding import ByteEnsemble, ByteView, next_byte_distribution
from tokenry.decoding.byte_view.covers import Covers, Row
from tokenry.errors import BadParameter, BadPrompt, PromptTooLong, UnsupportedModel
from tokenry.training.corpus import train_tokenizer
from tokenry.vocabulary import ByteVocabulary, token_bytes

MERGES = [("a", "a"), ("a", "b"), ("aa", "b"), ("b", "c"), ("ab", "c"), ("c", "c")]


class Enumeration:
    """Probabilities of texts by going through all token sequences, one uncached forward for each prefix."""

    def __init__(self, model, tokenizer, canonical: bool) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.canonical = canonical
        self.spelled = token_bytes(tokenizer)
        self.specials = [i for i, spelled in enumerate(self.spelled) if not spelled]
        self.next = functools.cache(self._next)

    def _is_canonical(self, ids: tuple[int, ...]) -> bool:
        data = b"".join(self.spelled[i] for i in ids)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            # The toy vocabularies merge no bytes of characters, so any unfinished character will do.
            try:
                whole = codecs.getincrementaldecoder("utf-8")().decode(data).encode()
            except UnicodeDecodeError:
                return False
            count = len(ids) - (len(data) - len(whole))
            head = ids[:count]
            return b"".join(self.spelled[i] for i in head) == whole and self._is_canonical(head)
        if self.tokenizer("a", add_special_tokens=False)["input_ids"] != [self.tokenizer.get_vocab().get("a")]:
            # SentencePiece puts a blank before the text, which the bytes have already.
            if text in ("", " "):
                return ids == tuple(self.tokenizer.get_vocab()["\u2581"] for _ in text)
            if not text.startswith(" "):
                return False
            text = text[1:]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] == list(ids)

    def _next(self, ids: tuple[int, ...]) -> torch.Tensor:
        context = torch.tensor([[self.tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            logits = self.model(context).logits[0, -1, : len(self.spelled)].clone()
        if self.canonical:
            for number, spelled in enumerate(self.spelled):
                if spelled and not self._is_canonical((*ids, number)):
                    logits[number] = -math.inf
        return logits.softmax(-1)

    def probability(self, data: bytes, ids: tuple[int, ...] = ()) -> float:
        """P(text begins with data), by the sum over all sequences whose last token reaches its end."""
        done = sum(len(self.spelled[i]) for i in ids)
        if done >= len(data):
            return 1.0
        rest = data[done:]
        total = 0.0
        for number, spelled in enumerate(self.spelled):
            if spelled and (spelled.startswith(rest) or rest.startswith(spelled)):
                share = float(self.next(ids)[number])
                if share:
                    total += share * self.probability(data, (*ids, number))
        return total


def strings(letters: str, longest: int):
    for length in range(1, longest + 1):
        yield from ("".join(own).encode() for own in itertools.product(letters, repeat=length))


@pytest.mark.parametrize("canonical", (True, False))
def test_every_string_has_the_probability_of_enumeration(canonical):
    tokenizer = kinds.byte_level(MERGES)
    model = kinds.model(tokenizer, more=5)
    known = Enumeration(model, tokenizer, canonical)
    view = ByteView(model, tokenizer, canonical=canonical)
    longer = [b"aabcaab", b"ccabcba", b"aaaaaaa", b"abcabca"] if canonical else [b"aabcc", b"abcab"]
    for data in [*strings("abc", 3 if canonical else 2), *longer]:
        assert math.exp(view.log_prob(data)) == pytest.approx(known.probability(data), rel=1e-10)
        state = view.start(data)
        after = state.log_probs().exp()
        assert float(after.sum()) == pytest.approx(1, abs=1e-12)
        whole = known.probability(data)
        for byte in b"abc":
            assert float(after[byte]) == pytest.approx(known.probability(data + bytes([byte])) / whole, abs=1e-10)
        rest = sorted(set(range(256)) - set(b"abc"))
        assert float(after[rest].sum()) == 0


@pytest.mark.parametrize("text", ("ab ca", "bé a", "a\n", "ca€b"))
@pytest.mark.parametrize("kind", ("byte-level", "sentence-piece", "unigram"))
def test_blanks_and_characters_of_several_bytes(kind, text):
    """SentencePiece spells "é" by three fallback bytes, byte-level BPE by bytes too; "a" as <0x61> is no encoding."""
    if kind == "byte-level":
        from tokenizers import pre_tokenizers

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = kinds.byte_level([*MERGES, ("Ġ", "a"), ("Ġ", "c")], letters)
        lead = b""
    elif kind == "unigram":
        letters = {"\u2581": -3.0, "\n": -5.0, "a": -2.5, "b": -3.5, "c": -3.2}
        tokenizer = kinds.unigram(letters | {"ab": -5.5, "bc": -4.0, "\u2581a": -4.5, "b\u2581c": -8.0, "ca": -6.5})
        lead = b""
    else:
        tokenizer = kinds.sentence_piece([*MERGES, ("\u2581", "a"), ("\u2581", "b")])
        lead = b" "
    model = kinds.model(tokenizer)
    known = Enumeration(model, tokenizer, True)
    view = ByteView(model, tokenizer)
    assert view.vocabulary.lead == lead
    data = text.encode()
    before = known.probability(lead)
    for end in range(1, len(data) + 1):
        wanted = known.probability(lead + data[:end]) / before
        assert math.exp(view.log_prob(data[:end])) == pytest.approx(wanted, rel=1e-10)
        state = view.start(data[: end - 1])
        assert float(state.log_probs().exp()[data[end - 1]]) == pytest.approx(
            wanted / (known.probability(lead + data[: end - 1]) / before), rel=1e-9
        )


class Chain(Covers):
    """A model that is a table: the exact token model of a Markov chain over A and B cut into A, B and AA."""

    A, B = 0.7, 0.4

    def ask(self, extra=None):
        letters = {spelled: number for number, spelled in enumerate(self.vocabulary.bytes_of) if spelled}
        a, b = self.A, self.B
        rules = {
            b"B": {b"B": 1 - b, b"AA": b * a, b"A": b * (1 - a)},
            b"AA": {b"AA": a * a, b"A": a * (1 - a), b"B": 1 - a},
            b"A": {b"B": 1.0},
        }
        for number, row in enumerate(self.rows):
            for prefix in extra[number] if extra else row.unasked():
                last = self.vocabulary.bytes_of[[*row.read, *prefix.tokens][-1]] or b"B"
                logits = torch.full((len(self.vocabulary.bytes_of),), -math.inf, dtype=torch.float64)
                for spelled, share in rules[last].items():
                    logits[letters[spelled]] = math.log(share)
                self.give(number, prefix, logits)


def test_the_markov_chain_behind_a_tokenizer_comes_back():
    """Token by token, "A" behind "BA" has probability 0; byte by byte the chain's own."""
    tokenizer = kinds.byte_level([("A", "A")], "AB")
    shell = kinds.model(tokenizer)
    vocabulary = ByteVocabulary(tokenizer)
    chain = {ord("A"): {ord("A"): Chain.A, ord("B"): 1 - Chain.A}, ord("B"): {ord("A"): Chain.B, ord("B"): 1 - Chain.B}}
    for data in strings("AB", 7):
        covers = Chain(shell, vocabulary, [Row(vocabulary, [1], 0, 1, "fast")], None)
        last, total, wanted = ord("B"), 0.0, 0.0
        for byte in data:
            covers.ask()
            logs = covers.outcome(0)
            for outcome in chain[last]:
                assert float(logs[outcome].exp()) == pytest.approx(chain[last][outcome], abs=1e-12)
            total += float(logs[byte])
            wanted += math.log(chain[last][byte])
            covers.append(0, byte)
            covers.rows[0].settle()
            last = byte
        assert total == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("paths", ("canonical", "fast"))
def test_the_state_after_appending_is_the_fresh_one(paths):
    """On words that look ahead behind blanks, every byte of a text; the tokenizer's own encoding is always covered."""
    tokenizer = kinds.trained()
    model = kinds.model(tokenizer)
    view = ByteView(model, tokenizer, paths=paths)
    text = "value):\n   x   été" if paths == "fast" else "return  value\n  é"
    data = text.encode()
    state = view.start(data[:1])
    for end in range(2, len(data) + 1):
        state.append(data[end - 1])
        fresh = view.start(data[:end])
        # In fast mode a fresh state has checked the covers' last tokens no more than an old one has.
        assert torch.allclose(state.log_probs().exp(), fresh.log_probs().exp(), atol=1e-10)
        mine, theirs = ({(*s.settled, *own): log for own, log in s.covers.items()} for s in (state, fresh))
        assert mine.keys() == theirs.keys()
        shift = next(mine[own] - theirs[own] for own in mine)
        for own in mine:
            assert math.isinf(mine[own]) or mine[own] - theirs[own] == pytest.approx(shift, abs=1e-8)
        whole = data[:end].decode(errors="ignore").encode()
        if whole == data[:end]:
            assert (1, *view.vocabulary.encode(whole)) in mine


def test_reading_at_once_is_reading_byte_by_byte():
    tokenizer = kinds.trained()
    view = ByteView(kinds.model(tokenizer), tokenizer, paths="fast")
    data = (kinds.TEXT[1] * 2).encode()[:150]
    state = view.start("def")
    logs = []
    for byte in data:
        logs.append(state.log_probs()[byte])
        state.append(byte)
    once = view.start("def")
    assert torch.allclose(once.read(data), torch.stack(logs), atol=1e-9)
    assert torch.allclose(once.log_probs(), state.log_probs(), atol=1e-9)
    assert once.forwards <= 6 and state.forwards_per_byte <= 1.01
    assert view.bits_per_byte(data, "def") == pytest.approx(-float(sum(logs)) / 150 / math.log(2))


def test_one_byte_an_id_is_the_model_itself():
    tokenizer = kinds.byte_level([])
    model = kinds.model(tokenizer)
    found = next_byte_distribution(model, tokenizer, "abcab")
    ids = torch.tensor([[1, *tokenizer("abcab")["input_ids"]]])
    wanted = model(ids).logits[0, -1].softmax(-1)
    assert torch.allclose(found[list(b"abc")], wanted[[3, 4, 5]], atol=1e-12)
    assert torch.allclose(found[256:], wanted[:3], atol=1e-12)


@pytest.mark.parametrize("paths", ("fast", "canonical"))
def test_a_prompt_that_ends_on_a_boundary_has_the_marginal_of_the_next_token(paths):
    """Where no token extends the last one; where one does, the marginal is another distribution."""
    tokenizer = kinds.byte_level([("a", "b"), ("c", "a")])
    model = kinds.model(tokenizer)
    view = ByteView(model, tokenizer, paths=paths)
    for text, bound in (("abab", True), ("caab", True), ("ba", False)):
        ids = [1, *tokenizer(text)["input_ids"]]
        shares = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        if paths == "canonical":
            known = Enumeration(model, tokenizer, True)
            shares = known.next(tuple(ids[1:]))
        marginal = torch.zeros(256 + 3, dtype=torch.float64)
        for number, spelled in enumerate(view.vocabulary.bytes_of):
            marginal[spelled[0] if spelled else 256 + number] += shares[number]
        found = view.start(text).log_probs().exp()
        assert torch.allclose(found, marginal, atol=1e-12) == bound


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
def test_tokenizers_of_the_repositorys_own_recipes(kind, tmp_path):
    """Every cut of a line: distributions of one process, whose product is the sum over all covers of the line."""
    if kind == "bpe":
        tokenizer = tokenry.load("tokenry/code")[1]
    else:
        texts = [*kinds.TEXT, *(f"def f{n}(x):\n    return x * {n}\n" for n in range(200))]
        tokenizer = train_tokenizer(texts, tmp_path, vocabulary=420, context=256, kind="unigram")
    model = kinds.model(tokenizer)
    view = ByteView(model, tokenizer)
    line = "  return é(12)"
    data = line.encode()
    state, total = view.start(data[:5]), 0.0
    for end in range(5, len(data)):
        logs = state.log_probs()
        assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-9)
        total += float(logs[data[end]])
        state.append(data[end])
    assert total == pytest.approx(view.log_prob(data[5:], data[:5]), abs=1e-9)
    ids = tokenizer(line)["input_ids"]
    assert tuple(ids) in {(*state.settled, *own) for own in state.covers}
    assert view.vocabulary.spelled(ids) == data


def test_what_is_pruned_is_told_and_bounds_the_error():
    tokenizer = kinds.trained()
    model = kinds.model(tokenizer)
    exact, pruned = (ByteView(model, tokenizer, paths="fast", prune=prune) for prune in (0.0, 0.05))
    one, two = exact.start("def ret"), pruned.start("def ret")
    for byte in b"urns(value":
        one.append(byte)
        two.append(byte)
    assert 0 < two.kept < 1 and one.kept == 1
    assert two.forwards < one.forwards
    # Whatever the share, the likeliest cover stays, so that generation always goes on.
    coarse = ByteView(model, tokenizer, paths="fast", prune=0.9).start("def ret")
    assert len(coarse.generate(max_bytes=12, temperature=0).data) == 12
    with pytest.raises(BadPrompt, match="lower prune"):
        ByteView(model, tokenizer, paths="fast", prune=0.9).start("def ret").read(b"urns(value)\n\nclass" * 3)


def test_half_precision_and_windows():
    tokenizer = kinds.trained(size=270)
    model = kinds.model(tokenizer, torch.bfloat16)
    assert float(next_byte_distribution(model, tokenizer, "return va").sum()) == pytest.approx(1, abs=1e-9)
    # Tree forwards over sliding windows equal one forward without a cache.
    letters = [chr(0x21 + i) for i in range(94)]
    sliding = tiny.model("mistral", torch.float64)
    single = kinds.byte_level([], letters)
    text = "".join(letters[i % 94] for i in range(0, 300, 7))
    ids = torch.tensor([[1, *single(text)["input_ids"]]])
    found = ByteView(sliding, single, paths="fast").start(text[:5])
    found.read(text[5:].encode())
    wanted = sliding(ids).logits[0, -1].softmax(-1)
    assert torch.allclose(found.log_probs().exp()[0x21 : 0x21 + 94], wanted[3:], atol=1e-4)


# --- ensembles ----------------------------------------------------------------------------------


def members():
    one, two = kinds.trained(), kinds.trained(None, 400)
    return (kinds.model(one), one), (kinds.model(two, seed=3), two)


def test_an_ensemble_is_the_mean_of_its_members():
    first, second = members()
    both = ByteEnsemble([first, second], paths="fast")
    views = [ByteView(*member, paths="fast") for member in (first, second)]
    text = "return value # naïve"
    state = both.start(text)
    logs = state.log_probs()
    assert logs.shape == (257,) and float(logs.exp().sum()) == pytest.approx(1, abs=1e-12)
    singles = [ByteEnsemble([view]) for view in views]
    mean = sum(own.start(text).log_probs().exp() for own in singles) / 2
    assert torch.allclose(logs.exp(), mean, atol=1e-12)
    # The logarithm is concave, so this holds for every text.
    bits = [own.bits_per_byte(text, "def f():\n    ") for own in singles]
    assert both.bits_per_byte(text, "def f():\n    ") <= sum(bits) / 2 + 1e-12
    joint, parts = both.start("def f():\n    ").read_members(text.encode())
    assert float(joint.sum()) == pytest.approx(both.log_prob(text, "def f():\n    "), rel=1e-12)
    for part, own in zip(parts, singles, strict=True):
        assert float(part.sum()) == pytest.approx(own.log_prob(text, "def f():\n    "), rel=1e-12)
    twice = ByteEnsemble([first, first], weights=[1, 3], paths="fast")
    assert twice.bits_per_byte(text) == pytest.approx(singles[0].bits_per_byte(text), abs=1e-10)


def test_generated_bytes_are_those_of_the_distribution():
    first, second = members()
    both = ByteEnsemble([first, second], paths="fast")
    result = both.generate("return val", max_bytes=12, temperature=0)
    state = both.start("return val")
    for byte in result.data:
        assert int(state.log_probs().argmax()) == byte
        state.append(byte)
    assert result.ended or len(result.data) == 12
    assert all(rate <= 1 for rate in result.forwards_per_byte) and len(result.forwards) == 2
    one, same, other = (both.generate("x", max_bytes=10, seed=seed).data for seed in (1, 1, 2))
    assert one == same != other
    streamed = []
    stopped = both.generate("x", max_bytes=40, seed=1, stop=[one[3:5]], stream=streamed.append)
    assert stopped.data == one[:5] == b"".join(streamed)
    # A text alone is one mark, not one a letter.
    for mark in (one[3:5], bytearray(one[3:5])):
        assert both.generate("x", max_bytes=40, seed=1, stop=mark).data == one[:5]
    assert b"e" in both.generate("return val", max_bytes=12, temperature=0, stop="never").data[:-1]
    stops = [{"stop": stop} for stop in ("", b"", [""], ["a", 10])]
    for bad in ({"max_bytes": 0}, {"temperature": -1}, {"top_p": 0}, *stops):
        with pytest.raises(BadParameter, match=next(iter(bad))):
            both.generate("x", **bad)


def test_what_is_refused_leaves_the_state_as_it_was():
    tokenizer = kinds.byte_level(MERGES)
    view = ByteView(kinds.model(tokenizer), tokenizer)
    state, same = view.start("ab"), view.start("ab")
    for refused, kind in ((ord("x"), BadPrompt), (300, BadParameter), (-1, BadParameter), ("a", BadParameter)):
        with pytest.raises(kind):
            state.append(refused)
        assert state.text == b"ab"
        assert torch.equal(state.log_probs(), same.log_probs())
    with pytest.raises(BadPrompt):
        state.read(b"cax")
    with pytest.raises(BadPrompt, match="neither"):
        state.read(5)
    assert state.text == b"ab"
    for own in (state, same):
        own.read("ca")
        own.append(ord("a"))
    assert torch.equal(state.log_probs(), same.log_probs())
    assert state.text == b"abcaa" and state.covers == same.covers
    # A read that is refused behind its first forward tells how far it came.
    with pytest.raises(BadPrompt):
        same.read(b"ab" * 40 + b"x")
    assert same.text == b"abcaa" + b"ab" * 32
    state.read(b"ab" * 32)
    assert torch.allclose(state.log_probs(), same.log_probs(), atol=1e-12)


def test_an_ensemble_stays_in_step_where_one_member_refuses():
    wide, narrow = kinds.byte_level([], "abcx"), kinds.byte_level(MERGES)
    both = ByteEnsemble([(kinds.model(wide), wide), (kinds.model(narrow), narrow)])
    state, same = both.start("ab"), both.start("ab")
    with pytest.raises(BadPrompt):
        state.append(ord("x"))
    with pytest.raises(BadPrompt):
        state.read(b"cx")
    for own in (state, same):
        own.append(ord("c"))
    assert [each.text for each in state.states] == [b"abc", b"abc"]
    assert torch.equal(state.log_probs(), same.log_probs())


@pytest.mark.parametrize("context", ("abc", [999], [-1], ["a"], [1.0], [True], 1))
def test_a_context_that_is_no_ids_is_explained(context):
    tokenizer = kinds.byte_level(MERGES)
    with pytest.raises(BadPrompt, match="from 0 to"):
        ByteView(kinds.model(tokenizer), tokenizer).start("a", context=context)


def test_a_context_may_be_a_tensor():
    tokenizer = kinds.byte_level(MERGES)
    view = ByteView(kinds.model(tokenizer), tokenizer)
    wanted = view.start("a", [1, 3, 4]).log_probs()
    assert torch.equal(view.start("a", torch.tensor([1, 3, 4])).log_probs(), wanted)


def test_infilling_moves_what_a_token_could_cross_behind_the_mark():
    tokenizer = kinds.trained()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"]})
    view = ByteView(kinds.model(tokenizer), tokenizer, paths="fast")
    state = view.infill("def returns(value):\n    ret", "\n    pass")
    pre, suf, mid = (tokenizer.convert_tokens_to_ids(f"<fim-{name}>") for name in ("prefix", "suffix", "middle"))
    settled = state.settled
    assert settled[:2] == [1, pre] and settled.index(suf) < settled.index(mid)
    before = view.vocabulary.spelled(settled[2 : settled.index(suf)])
    assert (before + bytes(state.text)) == b"def returns(value):\n    ret" and state.text.endswith(b"ret")
    assert view.vocabulary.spelled(settled[settled.index(suf) + 1 : settled.index(mid)]) == b"\n    pass"
    assert len(state.generate(max_bytes=5, temperature=0).data) <= 5
    # As a prompt the same place is the same ids, and what the view chooses there is what `generate` chooses.
    prompts = [view.infill_ids(f"def returns(value):\n    {cut}", "\n    pass") for cut in ("ret", "return va")]
    for prompt, cut in zip(prompts, ("ret", "return va"), strict=True):
        begin = prompt.index(mid) + 1
        assert prompt[:2] == [1, pre]
        before = prompt[2 : prompt.index(suf)] + prompt[begin:]
        assert view.vocabulary.spelled(before) == f"def returns(value):\n    {cut}".encode()
    options = {"do_sample": False, "max_new_tokens": 6}
    result = tokenry.generate(view.model, tokenizer, prompts, method="exact-byte-probabilities", **options)
    spelled = token_bytes(tokenizer)
    for cut, new in zip(("ret", "return va"), result.new_tokens, strict=True):
        data = b"".join(spelled[number] for number in new)
        made = view.infill(f"def returns(value):\n    {cut}", "\n    pass").generate(max_bytes=len(data), temperature=0)
        assert made.data == data or (made.ended and data.startswith(made.data))
    with pytest.raises(BadParameter, match="marks"):
        ByteView(*members()[0]).infill("a", "b")


# --- the vocabulary -----------------------------------------------------------------------------


def test_settled_ids_begin_every_cover():
    """Against all canonical encodings of a text and its ends, on words that look ahead and on none."""
    for tokenizer in (kinds.trained(), kinds.trained(None)):
        vocabulary = ByteVocabulary(tokenizer)
        text = kinds.TEXT[0] + kinds.TEXT[1][:40]
        for end in range(5, len(text), 3):
            own = vocabulary.encode(text[:end].encode())
            count, _ = vocabulary.settled([1, *own])
            kept = own[: count - 1]
            for start in range(max(0, end - vocabulary.longest), end):
                left = vocabulary.encode(text[:start].encode())
                low, _, high = vocabulary.narrow(text[start:end].encode())
                ids = [[*left, number] for number in vocabulary.ids[low:high].tolist()]
                for cover, fits in zip(ids, vocabulary.canonical(ids), strict=True):
                    assert not fits or cover[: len(kept)] == kept


def test_what_may_follow_depends_on_the_last_words_alone():
    vocabulary = ByteVocabulary(kinds.trained())
    whole = vocabulary.encode(kinds.TEXT[0].encode())
    for end in range(6, len(whole), 5):
        wanted = vocabulary.canonical([[*whole[:end], number] for number in vocabulary.ids.tolist()])
        assert vocabulary.continuations(whole[:end]).tolist() == wanted
        assert wanted[vocabulary.place_of[whole[end]]]


def test_digits_that_are_grouped_from_their_end_are_refused():
    grouped = kinds.trained(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|[^\p{N}]+")
    with pytest.raises(UnsupportedModel, match="digits"):
        ByteView(kinds.model(grouped), grouped)
    with pytest.raises(UnsupportedModel, match="digits"):
        tokenry.generate(kinds.model(grouped), grouped, "x 12", method="exact-byte-probabilities", max_new_tokens=2)
    assert float(ByteView(kinds.model(grouped), grouped, canonical=False).start("1").log_probs().exp().sum()) > 0.999
    # Groups from the front, and whole numbers, are served.
    for pattern in (r"\p{N}{1,3}|[^\p{N}]+", r"\p{N}+|[^\p{N}]+", r"\p{N}|[^\p{N}]+"):
        kept = kinds.trained(pattern)
        ByteView(kinds.model(kept), kept)


def test_word_pieces_are_refused_and_bad_calls_explained(monkeypatch):
    monkeypatch.setattr("tokenry.decoding.byte_view.covers._MOST", 32)
    tokenizer = kinds.word_piece()
    with pytest.raises(UnsupportedModel, match="byte-level"):
        ByteView(kinds.model(tokenizer), tokenizer)
    tokenizer = kinds.byte_level(MERGES)
    model = kinds.model(tokenizer)
    with pytest.raises(BadPrompt, match="reads"):
        next_byte_distribution(model, tokenizer, "abx")
    with pytest.raises(BadPrompt, match="UTF-8"):
        next_byte_distribution(model, tokenizer, b"ab\xff\xff")
    with pytest.raises(BadParameter, match="prune"):
        ByteView(model, tokenizer, prune=1)
    with pytest.raises(BadParameter, match="canonical"):
        ByteView(model, tokenizer, paths="fast", canonical=False)
    with pytest.raises(PromptTooLong, match="256"):
        ByteView(model, tokenizer).start("abc" * 300)
    with pytest.raises(BadPrompt, match="context"):
        ByteView(model, tokenizer).start("a", context=[])
    with pytest.raises(UnsupportedModel, match="belong"):
        ByteView(model, kinds.trained()).start("a")
    with pytest.raises(BadParameter, match="prune above 0"):
        ByteView(model, tokenizer, canonical=False).start("aab" * 12)

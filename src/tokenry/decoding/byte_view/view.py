"""A tokenized model seen as a model of bytes: next-byte distributions, probabilities of texts, generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.decoding.byte_view.covers import Covers, Paths, Row
from tokenry.errors import BadParameter, BadPrompt, PromptTooLong
from tokenry.generation.full import check_unicode
from tokenry.models import TokenCache, attached, context_length
from tokenry.vocabulary import ByteVocabulary

if TYPE_CHECKING:
    from tokenry.decoding.byte_view.ensemble import ByteResult

T = TypeVar("T")

# Texts are read so many bytes at a time: one forward each.
_CHUNK = 64
# Names of the marks before prefix, suffix and middle, model by model.
_MARKS = (
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
)


class ByteView:
    """A model and its tokenizer as an exact model of bytes.

    P(text begins with x) is the sum over the covers of x of the model's probabilities (arXiv 2410.09303, the
    byte-token representation lemma); next-byte probabilities are ratios of two such sums. Byte-level BPE and
    SentencePiece tokenizers are served.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        paths: Which token sequences count. ``"canonical"``: those that the tokenizer makes, the model's probabilities
            renormalised over them at every token; one consistent process. ``"fast"``: canonical but for the last token,
            nothing renormalised but the result; the authors' choice for generation. ``"all"``: every sequence, from the
            context on; exponentially many, so give most of a text as `context`, or prune.
        canonical: False is ``paths="all"``.
        prune: Covers whose share of probability falls below this are dropped; `ByteState.kept` has the share that is
            left. It saves forwards: what is dropped is not asked about. It suits generation; a given text, or another
            member of an ensemble, may go on with a byte that only dropped covers spell, which is refused.

    Raises:
        UnsupportedModel: The tokenizer or the model is of a kind that is not served.
        BadParameter: `prune` is not a probability below 1, or `paths` and `canonical` contradict each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        paths: Paths = "canonical",
        canonical: bool = True,
        prune: float = 0.0,
    ) -> None:
        if paths not in ("canonical", "fast", "all"):
            raise BadParameter(f'paths={paths!r} is not allowed; it must be "canonical", "fast" or "all"')
        if not canonical and paths == "fast":
            raise BadParameter('canonical=False counts all sequences, and paths="fast" does not; leave one of them out')
        if not 0 <= prune < 1:
            raise BadParameter(f"prune={prune} is not allowed; it must be at least 0 and below 1")
        self.model = model
        self.tokenizer = tokenizer
        self.paths: Paths = paths if canonical else "all"
        self.prune = prune
        self.vocabulary = ByteVocabulary.of(tokenizer)
        if self.paths != "all":
            self.vocabulary.check_canonical()

    @property
    def ends(self) -> list[int]:
        """Outcomes, numbered from 256, that are end-of-text tokens of the model or the tokenizer."""
        config = self.model.generation_config
        given: Any = config.eos_token_id if config is not None else None
        ids = {given} if isinstance(given, int) else set(given or ())
        ids.add(getattr(self.tokenizer, "eos_token_id", None))
        return [256 + i for i, symbol in enumerate(self.vocabulary.symbols) if symbol in ids]

    def start(self, text: str | bytes = b"", context: Sequence[int] | None = None) -> ByteState:
        """The state behind a text.

        Args:
            text: A text, or bytes that may end within a character.
            context: Ids that stand before the text, such as an instruction or the marks of fill-in-the-middle; None:
                what the tokenizer puts before a text, or its beginning-of-text token.

        Raises:
            BadPrompt: The text cannot be spelled, or nothing stands before it.
            PromptTooLong: Context and text exceed the model's context.
        """
        data = as_bytes(text)
        begins = context is None
        ids = self.begin if context is None else self._checked(context)
        if begins:
            data = self.vocabulary.lead + data
        return ByteState(self, ids, data)

    def _checked(self, context: Sequence[int]) -> list[int]:
        """Ids of a caller as a list.

        Raises:
            BadPrompt: There are none, or they are no ids of the tokenizer and the model.
        """
        given: Any = context.tolist() if hasattr(context, "tolist") else context
        embeddings: Any = self.model.get_input_embeddings()
        count = min(len(self.vocabulary.bytes_of), embeddings.weight.shape[0])
        ids = [] if isinstance(given, str | bytes | int) else [i.item() if hasattr(i, "item") else i for i in given]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count for i in ids):
            shown = repr(given) if len(repr(given)) <= 60 else repr(given)[:60] + "..."
            raise BadPrompt(
                f"context={shown} is not allowed; give at least one id, each from 0 to {count - 1}, such as the "
                "beginning-of-text token; what is text goes into `text`"
            )
        return ids

    def infill(self, prefix: str | bytes, suffix: str | bytes, marks: tuple[int, int, int] | None = None) -> ByteState:
        """The state in front of what belongs between two texts, for models trained to fill in the middle.

        The end of the prefix that a token across the cut could change stands behind the middle's mark, where the
        model spells it again: so a cut within a word costs nothing.

        Args:
            prefix: What comes before the hole.
            suffix: What comes after it.
            marks: Ids of the marks before prefix, suffix and middle; None: found by the names in use.

        Raises:
            BadParameter: The tokenizer has no such marks.
        """
        return ByteState(self, *self._hole(prefix, suffix, marks))

    def infill_ids(
        self, prefix: str | bytes, suffix: str | bytes, marks: tuple[int, int, int] | None = None
    ) -> list[int]:
        """The same place as a prompt for `generate` with `exact-byte-probabilities`, which takes many of them at once.

        Arguments are those of `infill`.
        """
        context, data = self._hole(prefix, suffix, marks)
        return [*context, *self.vocabulary.spell(data)]

    def _hole(
        self, prefix: str | bytes, suffix: str | bytes, marks: tuple[int, int, int] | None
    ) -> tuple[list[int], bytes]:
        """The ids before a hole, and the bytes of the prefix that are spelled anew behind them."""
        before, after = as_bytes(prefix), as_bytes(suffix)
        first, second, third = self.marks if marks is None else self._checked(marks)
        whole = _whole_characters(before)
        ids = self.vocabulary.encode(before[:whole])
        count = self.vocabulary.settled([first, *ids])[0] - 1
        context = [*self.begin, first, *ids[:count], second, *self.vocabulary.encode(after), third]
        return context, self.vocabulary.spelled(ids[count:]) + before[whole:]

    @property
    def marks(self) -> tuple[int, int, int]:
        """Ids of the marks before prefix, suffix and middle of a text to be filled in.

        Raises:
            BadParameter: The tokenizer has none of the names in use.
        """
        known: dict[str, int] = self.tokenizer.get_vocab()
        for form in _MARKS:
            if all(name in known for name in form):
                return known[form[0]], known[form[1]], known[form[2]]
        raise BadParameter("the tokenizer has no marks for filling in the middle that are known; give `marks`")

    @property
    def begin(self) -> list[int]:
        """Ids before a text without a context: what the tokenizer puts there, or its beginning-of-text token.

        Raises:
            BadPrompt: It has neither.
        """
        own: list[int] = list(self.tokenizer("a")["input_ids"])
        count = next((i for i, number in enumerate(own) if number in self.vocabulary.place_of), 0)
        bos, eos = (getattr(self.tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos"))
        first = bos if bos is not None else eos
        if count:
            return own[:count]
        if first is None:
            raise BadPrompt("the tokenizer has no token that begins a text; give ids as `context`")
        return [first]

    def log_prob(self, text: str | bytes, after: str | bytes = b"", context: Sequence[int] | None = None) -> float:
        """Log-probability in nats that a text follows another."""
        state = self.start(after, context)
        return float(state.read(as_bytes(text)).sum())

    def bits_per_byte(self, text: str | bytes, after: str | bytes = b"", context: Sequence[int] | None = None) -> float:
        """Bits per byte of a text that follows another.

        Raises:
            BadPrompt: The text is empty.
        """
        count = len(as_bytes(text))
        if not count:
            raise BadPrompt("the text is empty; bits per byte need at least one byte")
        return -self.log_prob(text, after, context) / count / float(torch.log(torch.tensor(2.0, dtype=torch.float64)))


class ByteState:
    """The byte view of one model behind one text; `append` moves it on in place.

    Attributes:
        text: The bytes so far, context left out.
    """

    def __init__(self, view: ByteView, context: list[int], data: bytes) -> None:
        self.view = view
        self.text = bytearray()
        vocabulary = view.vocabulary
        ids, count, window, rest = context, len(context), len(context), data
        if view.paths != "all" and data:
            whole = _whole_characters(data)
            ids = [*context, *vocabulary.encode(data[:whole])]
            count, window = vocabulary.settled(ids)
            count, window = max(count, len(context)), max(window, len(context))
            rest = vocabulary.spelled(ids[count:]) + data[whole:]
        self._limit = limit = context_length(view.model)
        if limit is not None and len(ids) > limit:
            raise PromptTooLong(
                f"context and text have {len(ids)} tokens, but the model's context is {limit}; shorten them"
            )
        device = view.model.device
        row = Row(vocabulary, ids[:count], 0, window, view.paths)
        with attached(view.model), torch.no_grad():
            cache = TokenCache(view.model)
            logits = view.model(
                torch.tensor([ids[:count]], device=device), past_key_values=cache, use_cache=True
            ).logits[0, -1]
        self._covers = Covers(view.model, vocabulary, [row], cache, prune=view.prune)
        self._covers.asked = 1
        self._row = row
        self._offered = b""
        self._take_back = row.mark()
        self._covers.give(0, row.covers[0].prefix, logits)
        self._counted = 0
        self._advance(rest, None)
        self.text = bytearray(data)
        self._asked_before, self._counted = self._covers.asked, 0

    @property
    def forwards(self) -> int:
        """Forwards so far, that of the context included."""
        return self._covers.asked

    @property
    def forwards_per_byte(self) -> float:
        """Forwards behind the first text, for each byte behind it."""
        return (self.forwards - self._asked_before) / self._counted if self._counted else 0.0

    @property
    def kept(self) -> float:
        """The share of probability that was not pruned."""
        return float(torch.tensor(self._row.lost, dtype=torch.float64).exp())

    @property
    def covers(self) -> dict[tuple[int, ...], float]:
        """The covers of the text and their log-probabilities, up to a constant; each the ids behind those that all of
        them share, and only what ends within the text where its last token is free."""
        self._ask()
        found = {}
        for cover, weights in zip(self._row.covers, self._covers.weights(0), strict=True):
            prefix = cover.prefix
            if self._row.is_end(cover):
                assert prefix.mass is not None
                found[prefix.tokens] = float(prefix.mass)
            else:
                for number, weight in zip(
                    self.view.vocabulary.ids[cover.low : cover.high].tolist(), weights.tolist(), strict=True
                ):
                    found[(*prefix.tokens, number)] = weight
        return found

    @property
    def settled(self) -> list[int]:
        """The ids that all covers begin with, the context first."""
        return list(self._row.read)

    def log_probs(self) -> Tensor:
        """Log-probabilities of the next byte, `[256 + symbols]`: bytes, then special tokens as in
        `ByteView.vocabulary.symbols`."""
        self._ask()
        return self._covers.outcome(0)

    def append(self, byte: int) -> None:
        """Add a byte.

        Raises:
            BadParameter: It is no byte.
            BadPrompt: The model gives it no probability, or nothing spells it; the state stays as it was.
        """
        together([self], functools.partial(ByteState.offer, byte=byte))

    def offer(self, byte: int) -> None:
        """Add a byte that `take_back` can still take away, until `settle` is called. Raises as `append` does."""
        self._take_back = self._row.mark()
        self._offered = bytes([check_byte(byte)])
        self._ask()
        self._covers.append(0, byte)

    def take_back(self) -> None:
        """Take away what was offered and not settled."""
        self._take_back()
        self._offered = b""

    def settle(self) -> None:
        """Keep what was offered."""
        self._row.settle()
        self._covers.close()
        self.text += self._offered
        self._counted += len(self._offered)
        self._offered = b""

    def generate(self, **options: Any) -> ByteResult:
        """Continue the text; options are those of `EnsembleState.generate`."""
        from tokenry.decoding.byte_view.ensemble import EnsembleState

        return EnsembleState([self]).generate(**options)

    def read(self, data: bytes, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Add bytes and return the log-probability of each, `[bytes]`: a forward for every 64 of them.

        Args:
            data: The bytes.
            change: Applied to the log-probabilities `[bytes, 256 + symbols]` before those of the bytes are taken.

        Raises:
            BadPrompt: A byte has no probability, or cannot be spelled. `text` tells how far the state has read, a
                whole number of forwards.
        """
        return self._advance(as_bytes(data), change or _same)

    def _advance(self, data: bytes, measure: Callable[[Tensor], Tensor] | None) -> Tensor:
        found = [torch.zeros(0, dtype=self._covers.dtype, device=self.view.model.device)]
        for begin in range(0, len(data), self.most):
            part = data[begin : begin + self.most]
            found += together([self], functools.partial(ByteState.offer_text, data=part, measure=measure))
        return torch.cat(found)

    @property
    def most(self) -> int:
        """Bytes of a text that one forward reads."""
        # Pruning looks at probabilities after every byte, and so needs them.
        return 1 if self.view.prune or self.view.paths == "all" else _CHUNK

    def offer_text(self, data: bytes, measure: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Add up to `most` bytes as `offer` adds one, and return what `read` does."""
        row, covers = self._row, self._covers
        start = len(row.text)
        self._take_back = row.mark()
        self._offered = data
        born, passed = row.feed(data)
        self._check_room()
        if born:
            with attached(self.view.model):
                covers.ask([born])
        found = torch.zeros(0, dtype=covers.dtype, device=self.view.model.device)
        if measure is not None:
            logs = measure(torch.stack([covers.outcome(0, own, start + i) for i, own in enumerate(passed)]))
            found = logs.gather(1, torch.tensor(list(data), device=logs.device)[:, None])[:, 0]
        covers.drop(0)
        return found

    def _check_room(self) -> None:
        longest = max(len(cover.prefix.tokens) for cover in self._row.covers)
        if self._limit is not None and len(self._row.read) + longest > self._limit:
            raise PromptTooLong(
                f"context and text have more than the {self._limit} tokens of the model's context; shorten them"
            )

    def _ask(self) -> None:
        self._check_room()
        if self._row.unasked():
            with attached(self.view.model):
                self._covers.ask()


def together(states: Sequence[ByteState], step: Callable[[ByteState], T]) -> list[T]:
    """Take a step that offers something in every state, or, where one of them refuses it, in none."""
    begun, found = [], []
    try:
        for state in states:
            begun.append(state)
            found.append(step(state))
    except BaseException:
        for state in begun:
            state.take_back()
        raise
    for state in states:
        state.settle()
    return found


def as_bytes(text: str | bytes) -> bytes:
    """A text as bytes.

    Raises:
        BadPrompt: It is neither, or no whole Unicode.
    """
    if isinstance(text, str):
        check_unicode(text)
        return text.encode()
    if not isinstance(text, bytes | bytearray | memoryview):
        raise BadPrompt(f"{text!r} is neither str nor bytes; give a text, or its bytes")
    return bytes(text)


def check_byte(byte: int) -> int:
    """The byte.

    Raises:
        BadParameter: It is none.
    """
    if not isinstance(byte, int) or isinstance(byte, bool) or not 0 <= byte < 256:
        raise BadParameter(f"byte={byte!r} is not allowed; it must be an integer from 0 to 255; `read` takes texts")
    return byte


def _same(logs: Tensor) -> Tensor:
    return logs


def _whole_characters(data: bytes) -> int:
    """Length of the part of bytes that ends on a whole character."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return error.start
    return len(data)


def next_byte_distribution(
    model: PreTrainedModel,
    tokenizer: Any,
    prefix: str | bytes,
    *,
    context: Sequence[int] | None = None,
    paths: Paths = "canonical",
    prune: float = 0.0,
) -> Tensor:
    """Probabilities of what follows a text, `[256 + symbols]`: the bytes, then the special tokens in ascending order of
    their ids. Arguments are those of :class:`ByteView` and `ByteView.start`."""
    return ByteView(model, tokenizer, paths=paths, prune=prune).start(prefix, context).log_probs().exp()

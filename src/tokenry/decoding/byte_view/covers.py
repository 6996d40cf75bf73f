"""The covers of a text: the token sequences that spell it and whose last token reaches its end.

All covers of one text share most of their tokens. What is kept is the *prefixes* that they leave when their last token
is taken off: a prefix together with a range of the byte-sorted vocabulary stands for all covers that end in one of the
ids of that range. A further byte narrows the ranges, and where it completes an id, that id becomes the end of a new
prefix, which the model has to be asked about. So the structure follows from the tokenizer alone, and the model fills in
the numbers: one forward for all prefixes that are new, as a tree over the one cache of the tokens that are settled.

Read this first; `view.py` asks for distributions, `decoder.py` generates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, BadPrompt, UnsupportedModel
from tokenry.models import TokenCache, context_length
from tokenry.vocabulary import ByteVocabulary

Paths = Literal["fast", "canonical", "all"]
"""Which token sequences count: canonical ones, whatever their last token ("fast"); canonical ones alone, the model's
probabilities renormalised over them at every token ("canonical"); or all ("all")."""

# A window of canonical checks is shortened once it spells more than this.
_WINDOW = 192
# More prefixes than this are a sign that all sequences of a long text were asked for.
_MOST = 4096


class Prefix:
    """A token prefix of covers.

    Attributes:
        tokens: Its tokens behind the row's settled ones.
        start: Where in the row's text its next token begins.
        parent: The prefix without its last token, until `mass` is known, and the column of that token in its scores.
        mass: Log-probability up to a constant of the row, float64 `[]`.
        scores: Log-probabilities of what comes next, `[places + symbols]`; None: the model was not asked yet.
        raw: The logits and processed logits that each of `tokens` was chosen from, where the caller wants them.
    """

    __slots__ = ("mass", "parent", "raw", "scores", "start", "tokens")

    def __init__(self, tokens: tuple[int, ...], start: int, parent: tuple[Prefix, int] | None = None) -> None:
        self.tokens = tokens
        self.start = start
        self.parent = parent
        self.mass: Tensor | None = None
        self.scores: Tensor | None = None
        self.raw: list[tuple[Tensor, Tensor]] = []


@dataclass(frozen=True)
class Cover:
    """All covers that end behind one prefix: its next token is one of the places `low` to `high`."""

    prefix: Prefix
    low: int
    high: int


class Row:
    """One text and its covers.

    Attributes:
        read: Tokens that all covers share, the ones before the text included.
        uncached: How many of the last of them the cache lacks.
        window: Index of the token from which canonical checks encode.
        text: Bytes behind the tokens that were settled at the start.
        given: How much of the text is not for the model to choose.
        covers: The covers of the text.
        lost: Log of the share of probability that was not pruned; 0 if nothing was.
        active: Whether the model is asked about it.
    """

    def __init__(self, vocabulary: ByteVocabulary, read: Sequence[int], uncached: int, window: int, paths: Paths):
        self.vocabulary = vocabulary
        self.paths = paths
        self.read = list(read)
        self.uncached = uncached
        self.window = window
        self.text = bytearray()
        self.given = 0
        self.covers = [Cover(Prefix((), 0), 0, len(vocabulary))]
        self.lost = 0.0
        self.active = True
        self._stray = False

    def is_end(self, cover: Cover) -> bool:
        """Whether a prefix spells the whole text, so that anything may follow it, a special token included."""
        return cover.prefix.start == len(self.text)

    def unasked(self) -> list[Prefix]:
        """Prefixes that the model was not asked about, shorter ones first."""
        return sorted((c.prefix for c in self.covers if c.prefix.scores is None), key=lambda p: len(p.tokens))

    def mark(self) -> Callable[[], None]:
        """What takes back all bytes that come in from here on, until tokens are settled."""
        length, covers, lost, stray = len(self.text), self.covers, self.lost, self._stray

        def take_back() -> None:
            del self.text[length:]
            self.covers, self.lost, self._stray = covers, lost, stray

        return take_back

    def append(self, byte: int) -> None:
        """Narrow the covers to those of the text with one more byte.

        Raises:
            BadPrompt: No token sequence spells it.
        """
        self.text.append(byte)
        kept: list[Cover] = []
        born: list[Prefix] = []
        for cover in self.covers:
            low, exact, high = self.vocabulary.narrow(bytes(self.text[cover.prefix.start :]), cover.low, cover.high)
            if low < exact:
                ids = self.vocabulary.ids[low:exact].tolist()
                born += [self._child(cover.prefix, low + i, number) for i, number in enumerate(ids)]
            if exact < high:
                kept.append(Cover(cover.prefix, exact, high))
        if self.paths != "all" and born:
            own = self.read[self.window :]
            fit = self.vocabulary.canonical([[*own, *prefix.tokens] for prefix in born])
            canonical = [prefix for prefix, fits in zip(born, fit, strict=True) if fits]
            if canonical or self.paths == "canonical":
                born = canonical
            elif not kept or not self.vocabulary.begins_text([*own, *born[0].tokens]):
                # No tokenizer makes this text, which is not UTF-8; or processors or pruning took away the sequence that
                # it would make. The longest match goes on in its place.
                self._stray = True
                born = [max(born, key=lambda prefix: len(self.vocabulary.bytes_of[prefix.tokens[-1]]))]
            else:
                born = []
        self.covers = kept + [Cover(prefix, 0, len(self.vocabulary)) for prefix in born]
        if not self.covers:
            raise BadPrompt(
                f"no token sequence spells {bytes(self.text[-16:])!r}: the tokenizer lacks a byte of it, or writes "
                "such texts in another way, or pruning has dropped what would spell it (lower prune)"
            )
        if len(self.covers) > _MOST:
            raise BadParameter(
                f"more than {_MOST} token sequences spell the text: set prune above 0, hand over most of it as "
                "`context` ids, or count canonical sequences alone"
            )

    def feed(self, data: bytes) -> tuple[list[Prefix], list[list[Cover]]]:
        """Add bytes before the model is asked.

        Returns:
            The prefixes that it has to be asked about for the probabilities of these bytes, shorter ones first, and the
            covers before each byte.
        """
        wanted: list[Prefix] = []
        passed: list[list[Cover]] = []
        for byte in data:
            wanted += self.unasked() if not passed else [c.prefix for c in self.covers if self.is_end(c)]
            passed.append(self.covers)
            self.append(byte)
        return wanted, passed

    def _child(self, parent: Prefix, place: int, number: int) -> Prefix:
        return Prefix((*parent.tokens, number), len(self.text), (parent, place))

    def take(self, cover: Cover, column: int, number: int) -> None:
        """Go on with one cover alone: a prefix and its next token, special or not."""
        child = Prefix((*cover.prefix.tokens, number), len(self.text), (cover.prefix, column))
        self.text += self.vocabulary.bytes_of[number][len(self.text) - cover.prefix.start :]
        child.start = len(self.text)
        self.covers = [Cover(child, 0, len(self.vocabulary))]

    def settle(self) -> list[tuple[int, tuple[Tensor, Tensor] | None]]:
        """Move the tokens that all covers share from the prefixes to the row, and return them."""
        tokens = [cover.prefix.tokens for cover in self.covers]
        first = min(tokens, key=len)
        shared = next((i for i, number in enumerate(first) if any(own[i] != number for own in tokens)), len(first))
        if not shared:
            return []
        raw = self.covers[0].prefix.raw
        settled = [(number, raw[i] if raw else None) for i, number in enumerate(first[:shared])]
        for cover in self.covers:
            cover.prefix.tokens = cover.prefix.tokens[shared:]
            cover.prefix.raw = cover.prefix.raw[shared:]
        self.read += first[:shared]
        self.uncached += shared
        places = self.vocabulary.place_of
        special = [i for i in range(len(self.read) - shared, len(self.read)) if self.read[i] not in places]
        if special:
            self.window = special[-1] + 1
        if self._stray and all(not cover.prefix.tokens for cover in self.covers):
            self.window, self._stray = len(self.read), False
        self._shorten()
        return settled

    def _shorten(self) -> None:
        """Let the window begin at a later word where it has grown long."""
        own = self.read[self.window :]
        if len(own) < 8 or len(self.vocabulary.spelled(own)) < _WINDOW:
            return
        place, start = self.vocabulary.settled([self.read[self.window - 1], *own])
        if place > 1 and start > 1:
            self.window += start - 1


class Covers:
    """The covers of several texts under one model, and the cache of what is settled of them.

    Attributes:
        rows: One for each text.
        asked: Forwards so far.
        want_raw: Whether prefixes are to keep the logits of their tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: ByteVocabulary,
        rows: Sequence[Row],
        cache: TokenCache,
        *,
        prune: float = 0.0,
        process: Callable[[int, Sequence[int], Tensor], Tensor] | None = None,
    ) -> None:
        """`process` makes scores `[vocab]` of a row's number, the ids of a prefix and its float logits `[vocab]`."""
        self.model = model
        self.vocabulary = vocabulary
        self.rows = list(rows)
        self.cache = cache
        self.prune = prune
        self.process = process
        self.asked = 0
        self.want_raw = False
        self.dtype = _precision(model.device)
        self._context = context_length(model)
        device = model.device
        self._ids = torch.cat([vocabulary.ids, torch.tensor(vocabulary.symbols, dtype=torch.long)]).to(device)
        if int(self._ids.max()) >= _width(model):
            raise UnsupportedModel(
                f"the tokenizer has ids up to {int(self._ids.max())} and the model's logits end at {_width(model)}: "
                "they do not belong together"
            )
        self._letters = vocabulary.letters.to(device)
        symbols = torch.arange(256, 256 + len(vocabulary.symbols), device=device)
        self._first = torch.cat([self._letters[:, 0].long(), symbols])
        for row in self.rows:
            row.covers[0].prefix.mass = torch.zeros((), dtype=self.dtype, device=device)
        # The trees of the open block.
        self._trees: list[_Tree] | None = None

    @property
    def outcomes(self) -> int:
        """The bytes and the special tokens."""
        return 256 + len(self.vocabulary.symbols)

    # The model -------------------------------------------------------------------------------------
    def give(self, row: int, prefix: Prefix, logits: Tensor) -> None:
        """Take logits `[vocab]` for what follows a prefix."""
        logits = logits.to(self.dtype if logits.dtype == torch.float64 else torch.float32)
        own = self.rows[row]
        processed = logits
        # Top-k and the like choose what comes next; they have no say about a text that is given.
        if self.process is not None and prefix.start >= own.given:
            processed = self.process(row, [*own.read, *prefix.tokens], logits)
        scores = processed[self._ids].to(self.dtype)
        if own.paths == "canonical":
            fit = self.vocabulary.continuations([*own.read[own.window :], *prefix.tokens]).to(scores.device)
            scores[: len(fit)] = scores[: len(fit)].masked_fill(~fit, -torch.inf)
        prefix.scores = scores.log_softmax(-1)
        if prefix.mass is None:
            self._weigh(prefix)
        if self.want_raw:
            prefix.raw = [*prefix.raw, (logits, processed)]

    def _weigh(self, prefix: Prefix) -> None:
        assert prefix.parent is not None
        parent, column = prefix.parent
        assert parent.mass is not None and parent.scores is not None
        prefix.mass = parent.mass + parent.scores[column]
        prefix.raw = parent.raw
        # The scores of settled prefixes must not live on in their descendants.
        prefix.parent = None

    def ask(self, extra: Sequence[Sequence[Prefix]] | None = None) -> None:
        """Ask the model about every prefix that it was not asked about, in one forward.

        Args:
            extra: Prefixes to ask about besides, for each row; shorter ones first.
        """
        wanted = [
            (list(extra[number]) if extra else row.unasked()) if row.active else []
            for number, row in enumerate(self.rows)
        ]
        if not any(wanted):
            return
        self.close()
        trees = [_Tree(row, own) for row, own in zip(self.rows, wanted, strict=True)]
        logits = self._forward(trees)
        self._trees = trees
        for number, (tree, own) in enumerate(zip(trees, wanted, strict=True)):
            for prefix in own:
                self.give(number, prefix, logits[number, tree.nodes[prefix.tokens]])

    def _forward(self, trees: Sequence[_Tree]) -> Tensor:
        device = self.model.device
        width = max(1, *(len(tree.tokens) for tree in trees))
        tokens = torch.zeros(len(trees), width, dtype=torch.long)
        depth = torch.zeros(len(trees), width, dtype=torch.long)
        valid = torch.zeros(len(trees), width, dtype=torch.bool)
        relation = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
        for number, tree in enumerate(trees):
            count = len(tree.tokens)
            tokens[number, :count] = torch.tensor(tree.tokens, dtype=torch.long)
            depth[number, :count] = torch.tensor(tree.depth, dtype=torch.long)
            valid[number, :count] = True
            for node, parent in enumerate(tree.parents):
                if parent >= 0:
                    relation[number, node] |= relation[number, parent]
        positions = self.cache.seen[:, None] + depth.to(device)
        if self._context is not None:
            # Prefixes that run past the end of the model's context are asked about, but never used.
            positions = positions.clamp(max=self._context - 1)
        self.cache.stage(None if bool(valid.all()) else valid.to(device), relation.to(device), deferred=True)
        self.asked += 1
        with torch.no_grad():
            return self.model(
                input_ids=tokens.to(device), position_ids=positions, past_key_values=self.cache, use_cache=True,
                return_dict=True,
            ).logits  # fmt: skip

    def number(self, column: int) -> int:
        """The id in a column of scores."""
        places = len(self.vocabulary)
        return int(self.vocabulary.ids[column]) if column < places else self.vocabulary.symbols[column - places]

    # Distributions ---------------------------------------------------------------------------------
    def weights(self, row: int, covers: Sequence[Cover] | None = None, end: int | None = None) -> list[Tensor]:
        """For each cover the log-probabilities of its last tokens, symbols behind them where the text ends."""
        own = self.rows[row]
        end = len(own.text) if end is None else end
        found = []
        for cover in own.covers if covers is None else covers:
            prefix = cover.prefix
            assert prefix.scores is not None and prefix.mass is not None
            own_scores = prefix.scores if prefix.start == end else prefix.scores[cover.low : cover.high]
            found.append(prefix.mass + own_scores)
        return found

    def outcome(self, row: int, covers: Sequence[Cover] | None = None, end: int | None = None) -> Tensor:
        """Log-probabilities of the next byte, and of the special tokens behind it, `[256 + symbols]`.

        Args:
            row: Which text.
            covers: The covers of a part of the text, where it is not the whole.
            end: Length of that part.
        """
        own = self.rows[row]
        covers = own.covers if covers is None else covers
        end = len(own.text) if end is None else end
        weights = torch.cat(self.weights(row, covers, end))
        columns = [
            self._first if c.prefix.start == end else self._letters[c.low : c.high, end - c.prefix.start].long()
            for c in covers
        ]
        top = weights.max()
        shares = (weights - top).exp()
        bins = torch.zeros(self.outcomes, dtype=weights.dtype, device=weights.device)
        bins = bins.index_add_(0, torch.cat(columns), shares)
        return bins.log() - bins.sum().log()

    def drop(self, row: int) -> None:
        """Drop covers without probability, and those whose share is below `prune`, after a byte came in.

        Raises:
            BadPrompt: None of them has any.
        """
        own = self.rows[row]
        logs = []
        for cover in own.covers:
            prefix = cover.prefix
            if prefix.mass is None:
                self._weigh(prefix)
            assert prefix.mass is not None
            if prefix.scores is None:
                logs.append(prefix.mass)
            else:
                logs.append(prefix.mass + prefix.scores[cover.low : cover.high].logsumexp(-1))
        joint = torch.stack(logs)
        total = joint.logsumexp(-1)
        shares = (joint - total).exp()
        # The likeliest stays, however many share the rest.
        kept = (joint > -torch.inf) & ((shares >= self.prune) | (joint == joint.max()))
        keep = kept.tolist()
        if not any(keep):
            raise BadPrompt(f"{bytes(own.text[-16:])!r} has probability 0 under the model and its processors")
        if not all(keep):
            if self.prune:
                own.lost += float(shares[kept].sum().log())
            own.covers = [cover for cover, keeps in zip(own.covers, keep, strict=True) if keeps]

    # Progress --------------------------------------------------------------------------------------
    def append(self, row: int, byte: int) -> None:
        """Add a byte to a text, after the model was asked about its prefixes."""
        self.rows[row].append(byte)
        self.drop(row)

    def close(self, most: Sequence[int] | None = None) -> list[int]:
        """Close the block of the last forward, and cache settled tokens that it holds, but each row's last.

        Args:
            most: Tokens that each row may cache; None: all that can be.

        Returns:
            How many tokens each row cached.
        """
        if self._trees is None:
            return [0] * len(self.rows)
        paths = []
        for number, (row, tree) in enumerate(zip(self.rows, self._trees, strict=True)):
            behind = row.read[len(row.read) - row.uncached :]
            room = len(behind) - 1 if row.active else len(behind)
            path = tree.along(behind[: max(0, room if most is None else min(room, most[number]))])
            row.uncached -= len(path)
            paths.append(path)
        self._trees = None
        counts = [len(path) for path in paths]
        device = self.model.device
        slots = torch.zeros(len(paths), max(counts), dtype=torch.long)
        for number, path in enumerate(paths):
            slots[number, : len(path)] = torch.tensor(path, dtype=torch.long)
        self.cache.commit(slots.to(device), torch.tensor(counts, device=device))
        return counts


class _Tree:
    """A row's uncached tokens and the prefixes to ask about, as nodes of one forward.

    `nodes` has the node of each prefix by its tokens, as they were when the forward ran.
    """

    def __init__(self, row: Row, wanted: Sequence[Prefix]) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depth: list[int] = []
        chain = row.read[len(row.read) - row.uncached :] if wanted or not row.active else []
        self.nodes: dict[tuple[int, ...], int] = {}
        self.chain = len(chain)
        root = -1
        for number in chain:
            root = self._add(number, root)
        self.nodes[()] = root
        for prefix in wanted:
            node = root
            for length in range(1, len(prefix.tokens) + 1):
                path = prefix.tokens[:length]
                if path not in self.nodes:
                    self.nodes[path] = self._add(path[-1], node)
                node = self.nodes[path]

    def along(self, tokens: Sequence[int]) -> list[int]:
        """The nodes of uncached tokens, as many of them as there are."""
        path = list(range(min(self.chain, len(tokens))))
        behind = tuple(tokens[self.chain :])
        for length in range(1, len(behind) + 1):
            if behind[:length] not in self.nodes:
                break
            path.append(self.nodes[behind[:length]])
        return path

    def _add(self, number: int, parent: int) -> int:
        self.tokens.append(number)
        self.parents.append(parent)
        self.depth.append(0 if parent < 0 else self.depth[parent] + 1)
        return len(self.tokens) - 1


def _width(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    return int(head.weight.shape[0]) if head is not None else int(model.config.get_text_config().vocab_size)


def _precision(device: torch.device) -> torch.dtype:
    """In which probabilities add up: float64, but for devices that have none."""
    return torch.float32 if device.type == "mps" else torch.float64

"""Token blocks for pretraining: sources found, held-out text kept away, documents formed and packed."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from tokenry.workloads import WORKLOADS, held_out_files, is_held_out

SHARED_LINES = 13
"""A file that shares this many consecutive lines with a held-out file is dropped."""
SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>")
MIXTURES = {
    "source": {"short": (0.12, 0.20, 0.25), "long": (0.45, 0.20, 0.05)},
    "examples": {"short": (0.10, 0.40, 0.15), "long": (0.45, 0.30, 0.05)},
}
"""Shares of rows that hold examples of recall, edit and arithmetic, for rows up to 1,024 tokens and longer ones:
``"source"`` teaches the language first, ``"examples"`` brings a model that knows it to exact answers."""
UNUSED = tuple(f"<unused-{index}>" for index in range(32))
# Letters with one leading mark or space, single digits, runs of symbols, and line ends with the indentation that
# follows: in source code the indentation belongs to the line break.
PATTERN = r"[^\r\n\p{L}\p{N}_]?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+|\s*\n[ \t]*|\s+"


def _windows(text: str) -> set[bytes]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    blocks = ("\n".join(lines[start : start + SHARED_LINES]) for start in range(len(lines) - SHARED_LINES + 1))
    return {hashlib.blake2b(block.encode(), digest_size=8).digest() for block in blocks}


def source_files(roots: list[Path], held_out: list[Path] | None = None) -> tuple[list[str], dict[str, int]]:
    """The texts of all Python files below ``roots`` that a model may be trained on, and how many were left out.

    Files of held-out packages, files that share :data:`SHARED_LINES` consecutive lines with one, duplicates,
    files over 200,000 characters and files that are not UTF-8 are left out.

    Args:
        roots: Folders, searched in order; files below each come in sorted order.
        held_out: Files whose text must not be trained on; by default those of the installed held-out packages.
    """
    forbidden: set[bytes] = set()
    for path in held_out_files() if held_out is None else held_out:
        forbidden |= _windows(path.read_text(encoding="utf-8", errors="ignore"))
    texts: list[str] = []
    seen: set[bytes] = set()
    counts = {"kept": 0, "held out": 0, "shares lines": 0, "duplicate": 0, "too long": 0, "not UTF-8": 0}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if "site-packages" in relative.parts:
                continue
            if is_held_out(relative):
                counts["held out"] += 1
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                counts["not UTF-8"] += 1
                continue
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            reason = (
                "duplicate" if digest in seen or not text.strip()
                else "too long" if len(text) > 200_000
                else "shares lines" if not forbidden.isdisjoint(_windows(text))
                else "kept"
            )  # fmt: skip
            seen.add(digest)
            counts[reason] += 1
            if reason == "kept":
                texts.append(text)
    return texts, counts


def train_tokenizer(texts: list[str], folder: Path, *, vocabulary: int, context: int, kind: str = "bpe") -> Any:
    """Train a tokenizer with the special ids of the design and save it to ``folder``.

    Args:
        texts: What it is trained on.
        folder: Where it is saved.
        vocabulary: Ids, the special ones included.
        context: Tokens that its model reads at most.
        kind: ``"bpe"``, byte-level BPE; or ``"unigram"``, SentencePiece's unigram model with bytes for what has no
            piece.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = TOKENIZERS[kind](texts, vocabulary)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        extra_special_tokens=list(SPECIAL[4:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
    fast.save_pretrained(folder)
    return fast


def _byte_level(texts: list[str], vocabulary: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *UNUSED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(texts: list[str], vocabulary: int) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special, fallback = [*SPECIAL, *UNUSED, "<unk>"], [f"<0x{byte:02X}>" for byte in range(256)]
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
        ]
    )
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = cut
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary - len(special) - len(fallback),
        initial_alphabet=["\t", "\n", *map(chr, range(32, 127))],
        show_progress=False,
    )
    # The trainer keeps every letter that it meets; what is not ASCII is left to the bytes.
    learner.train_from_iterator((text for text in texts if text.isascii()), trainer)
    pieces = json.loads(learner.to_str())["model"]["vocab"]
    # No text is to be read as the name of a byte: six letters always score higher.
    scores = [(piece, 0.0) for piece in special] + [(piece, -1000.0) for piece in fallback]
    known = {piece for piece, _ in scores}
    scores += [(piece, score) for piece, score in pieces if piece not in known]
    tokenizer = Tokenizer(models.Unigram(scores, special.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


TOKENIZERS: dict[str, Callable[[list[str], int], Any]] = {"bpe": _byte_level, "unigram": _unigram}


class Documents:
    """Encoded documents: code (half of it in fill-in-the-middle form), the workloads' training examples, repeats."""

    def __init__(self, texts: list[str], tokenizer: Any, seed: int, mixture: str = "source") -> None:
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.texts = list(texts)
        self.rng.shuffle(self.texts)
        self.id = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
        self.examples = {name: WORKLOADS[name](seed, "train") for name in ("arithmetic", "edit")}
        self.recall = {}
        for length, keys in ((600, 3), (1100, 6), (3000, 8), (5400, 12)):
            questions = keys if mixture == "examples" else 1
            stream = WORKLOADS["recall"](seed + length, "train", length=length, keys=keys, questions=questions)
            self.recall[length] = stream

    def encode(self, text: str) -> list[int]:
        return self.tokenizer._tokenizer.encode(text, add_special_tokens=False).ids

    def code(self) -> Iterator[list[int]]:
        """Code documents, again and again in the same order, half of them cut at two characters for infilling."""
        for text in itertools.cycle(self.texts):
            # A long file is taken in pieces, so that one file does not fill several rows of a batch.
            for start in range(0, len(text), 12_000):
                piece = text[start : start + 12_000]
                if len(piece) > 20 and self.rng.random() < 0.5:
                    left, right = sorted(self.rng.sample(range(len(piece) + 1), 2))
                    parts = [
                        [self.id["<fim-prefix>"], *self.encode(piece[:left])],
                        [self.id["<fim-suffix>"], *self.encode(piece[right:])],
                        [self.id["<fim-middle>"], *self.encode(piece[left:right])],
                    ]
                    body = [token for part in parts for token in part]
                else:
                    body = self.encode(piece)
                yield [self.id["<bos>"], *body, self.id["<eos>"]]

    def example(self, stream: Iterator[Any]) -> list[int]:
        item = next(stream)
        # Prompt and answer are encoded apart, as they are when the prompt alone is given to the model.
        ids = [*self.encode(item.prompt), *self.encode(item.answer)]
        return [self.id["<bos>"], *ids, self.id["<eos>"]]

    def repeat(self, length: int) -> list[int]:
        """A run of random ordinary tokens, repeated to ``length``: what comes next can only be copied."""
        period = round(8 * (length / 16) ** self.rng.random())
        first, size = len(SPECIAL) + len(UNUSED), self.tokenizer.vocab_size
        run = [self.rng.randrange(first, size) for _ in range(period)]
        return (run * (length // period + 1))[:length]

    def rows(self, length: int, copying: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
        """Rows of ``length`` tokens; a share of them begin with workload examples, code fills the rest.

        Args:
            length: Tokens of a row.
            copying: Whether every second row is to be a repeat now; otherwise one in fifty is.
        """
        code = self.code()
        carry: list[int] = []
        # Only long rows can teach what lies far back.
        long = length > 1024
        recall = [self.recall[3000], self.recall[5400]] if long else [self.recall[600], self.recall[1100]]
        shares = MIXTURES[self.mixture]["long" if long else "short"]
        edits = length if self.mixture == "examples" else 600 if long else 1
        while True:
            if self.rng.random() < (0.5 if copying() else 0.05 if long else 0.02):
                yield self.repeat(length)
                continue
            row: list[int] = []
            draw = self.rng.random()
            if draw < shares[0]:
                row += self.example(self.rng.choice(recall))
            elif draw < shares[0] + shares[1]:
                while len(row) < edits:
                    row += self.example(self.examples["edit"])
            elif draw < sum(shares):
                while len(row) < 300:
                    row += self.example(self.examples["arithmetic"])
            while len(row) + len(carry) < length:
                row += carry
                carry = next(code)
            room = max(length - len(row), 0)
            row, carry = (row + carry[:room])[:length], carry[room:]
            yield row


def write_blocks(
    texts: list[str],
    tokenizer: Any,
    folder: Path,
    *,
    blocks: int,
    size: int,
    lengths: tuple[int, ...],
    seed: int,
    copying: tuple[int, int],
    mixture: str = "source",
) -> Path:
    """Write ``blocks`` blocks of ``size`` tokens to ``folder/blocks.npy`` (uint16) unless they are there.

    Block ``i`` holds rows of ``lengths[i % len(lengths)]`` tokens, so long and short rows take turns at any number
    of steps. In the blocks from ``copying[0]`` to ``copying[1]`` every second row is a repeat of random tokens:
    a model whose embeddings have settled learns from them within a hundred steps to copy from its context, which
    source code alone teaches late.
    """
    path = folder / "blocks.npy"
    plan: dict[str, Any] = {"blocks": blocks, "size": size, "lengths": list(lengths), "seed": seed, "texts": len(texts)}
    plan |= {"copying": list(copying), "mixture": mixture}
    note = folder / "blocks.json"
    if note.is_file() and json.loads(note.read_text()) == plan:
        return path
    documents = Documents(texts, tokenizer, seed, mixture)
    index = 0
    rows = {length: documents.rows(length, lambda: copying[0] <= index < copying[1]) for length in set(lengths)}
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(blocks, size))
    with Progress(transient=True) as progress:
        for index in progress.track(range(blocks), description="packing tokens"):
            length = lengths[index % len(lengths)]
            array[index] = np.concatenate([next(rows[length]) for _ in range(size // length)])
    array.flush()
    note.write_text(json.dumps(plan))
    return path

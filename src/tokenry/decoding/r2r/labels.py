"""Which tokens of a small model change the path of a large one: labels without a reader's hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.generation.auxiliary import listening
from tokenry.objectives.losses import IGNORED
from tokenry.sampling import entropy

# Rows that are generated, or read, together.
_TOGETHER, _READ = 64, 8
_MARKS = ".?!)]}"


@dataclass(frozen=True)
class Case:
    """A place where the small model would have written another token, as a judge sees it: lists of ids.

    Attributes:
        common: All that stands before the sentence, prompt included, and of the sentence what both share.
        reference: The rest of the large model's sentence, its end included.
        candidate: The small model's token and how the large model ends the sentence behind it.
        after_reference: What the large model wrote behind its sentence, as far as it is known.
        after_candidate: Likewise behind the candidate.
    """

    common: list[int]
    reference: list[int]
    candidate: list[int]
    after_reference: list[int]
    after_candidate: list[int]


Judge = Callable[[Case], int]
"""1: the path differs, 0: it does not, -1: cannot be told, and the position is left out."""


def rejoins(case: Case) -> int:
    """Whether the large model comes back to what it wrote: behind both sentences the same tokens follow.

    The paper asks a large model; this asks the large model's own continuation, and needs no reader.
    """
    known = min(len(case.after_reference), len(case.after_candidate))
    if known == 0:
        # Behind both the text ends, or behind one of them, or nothing is known.
        if case.reference[-1] == case.candidate[-1]:
            return int(case.reference != case.candidate) if case.after_reference == case.after_candidate else -1
        return -1
    return int(case.after_reference[:known] != case.after_candidate[:known])


def same_text(tokenizer: Any) -> Judge:
    """A judge that takes two sentences for one if their texts differ in white space and capitals alone."""

    def judge(case: Case) -> int:
        one, other = (
            "".join(tokenizer.decode(ids, skip_special_tokens=True).split()).casefold()
            for ids in (case.reference, case.candidate)
        )
        return int(one != other)

    return judge


@dataclass
class Positions:
    """What the small model says of positions of the large model's text, and their labels; `n` positions.

    Each is the position that PREDICTS a token: its hidden state and logits are what the small model has when it
    chooses.

    Attributes:
        hidden: What the small model's head read, float32 `[n, hidden]`.
        token: The token that it would choose, `[n]`.
        top: Its largest logits, descending, float32 `[n, topk]`.
        entropy: Of its distribution in nats, `[n]`.
        label: 1 divergent, 0 not, -1 cannot be told, `[n]`.
        mismatch: Whether the large model wrote another token, bool `[n]`.
        row: Row of the text, `[n]`.
        column: Column of the token that is predicted, `[n]`.
    """

    hidden: Tensor
    token: Tensor
    top: Tensor
    entropy: Tensor
    label: Tensor
    mismatch: Tensor
    row: Tensor
    column: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, chosen: Tensor) -> Positions:
        return Positions(**{name: tensor[chosen] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def write_answers(model: PreTrainedModel, prompts: Tensor, length: int) -> Tensor:
    """What a model writes greedily behind prompts `[rows, prompt]`, up to `length` tokens in all: ids `[rows, length]`,
    -100 behind an end of text."""
    parts = [list(row) for row in prompts.tolist()]
    found = torch.full((len(parts), length), IGNORED)
    found[:, : prompts.shape[1]] = prompts.cpu()
    new = _continued(model, parts, length - prompts.shape[1], "the large model writes")
    for row, ids in enumerate(new):
        found[row, prompts.shape[1] : prompts.shape[1] + len(ids)] = torch.tensor(ids, dtype=torch.long)
    return found


def sentence_ends(tokenizer: Any) -> frozenset[int]:
    """Ids that end a sentence: those that hold a line break, or spell only full stops, question and exclamation marks
    and closing brackets; and the end of text."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
    ends = {i for i, text in enumerate(texts) if "\n" in text or (text.strip() and not set(text.strip()) - set(_MARKS))}
    return frozenset(ends | ({tokenizer.eos_token_id} - {None}))


@torch.no_grad()
def label_positions(
    large: PreTrainedModel,
    small: PreTrainedModel,
    ids: Tensor,
    prompt: int,
    ends: frozenset[int],
    judge: Judge = rejoins,
    *,
    topk: int = 100,
    sentence: int = 32,
    after: int = 8,
) -> Positions:
    """Label every position of the large model's answers (R2R, arXiv 2505.21600, without its judge).

    Where the small model would choose another token, the large one goes on greedily from that token to the end of the
    sentence, and the judge compares. All other positions are not divergent.

    Args:
        large: The model whose answers they are.
        small: The small model.
        ids: Answers as `write_answers` gives them, `[rows, length]`.
        prompt: Tokens of the prompt in each.
        ends: Ids that end a sentence.
        judge: Decides each mismatch.
        topk: Logits that are kept.
        sentence: Most tokens of a candidate's sentence; a longer one cannot be told.
        after: Tokens behind a sentence that the judge sees.
    """
    found = _read(small, ids, prompt, topk)
    places = found.mismatch.nonzero()[:, 0].tolist()
    texts = [[token for token in row if token != IGNORED] for row in ids.tolist()]
    rows, columns, tokens = (getattr(found, name).tolist() for name in ("row", "column", "token"))
    starts = [[*texts[rows[place]][: columns[place]], tokens[place]] for place in places]
    endings = _continued(large, starts, sentence + after, "candidates are followed")
    for place, start, ending in zip(places, starts, endings, strict=True):
        common, own = start[:-1], texts[rows[place]][len(start) - 1 :]
        reference, known = _sentence(own, ends)
        candidate, other = _sentence([start[-1], *ending], ends)
        if not reference or not candidate:
            found.label[place] = -1
            continue
        found.label[place] = judge(Case(common, reference, candidate, known[:after], other[:after]))
    return found


def _sentence(ids: list[int], ends: frozenset[int]) -> tuple[list[int], list[int]]:
    """The ids up to the first that ends a sentence, and the rest; nothing, if none does."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1], ids[place + 1 :]
    return [], ids


def _read(small: PreTrainedModel, ids: Tensor, prompt: int, topk: int) -> Positions:
    """All positions that predict a token of an answer, labelled 0."""
    parts: list[Positions] = []
    small = small.eval()
    for start in range(0, len(ids), _READ):
        part = ids[start : start + _READ]
        inputs = part.clamp(min=0).to(small.device)
        with listening(small, slice(prompt - 1, part.shape[1] - 1)) as heard:
            logits = small(input_ids=inputs, use_cache=False).logits.float()
        assert heard.hidden is not None
        hidden = heard.hidden[:, prompt - 1 : -1].float().cpu()
        wanted = part[:, prompt:]
        chosen = logits.argmax(-1).cpu()
        real = wanted != IGNORED
        row, column = real.nonzero().unbind(1)
        parts.append(
            Positions(
                hidden=hidden[real],
                token=chosen[real],
                top=logits.topk(min(topk, logits.shape[-1]), -1).values.cpu()[real],
                entropy=entropy(logits).cpu()[real],
                label=torch.zeros(len(row), dtype=torch.long),
                mismatch=(chosen != wanted)[real],
                row=row + start,
                column=column + prompt,
            )
        )
    names = [each.name for each in fields(Positions)]
    return Positions(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _continued(model: PreTrainedModel, starts: Sequence[list[int]], new: int, doing: str) -> list[list[int]]:
    """What a model writes greedily behind texts of any lengths, up to `new` tokens and an end of text."""
    found: list[list[int]] = [[] for _ in starts]
    # Texts of like length go together, so that little is padded.
    order = sorted(range(len(starts)), key=lambda place: len(starts[place]))
    ends = _ends(model)
    generator: Any = model
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for begin in bar.track(range(0, len(order), _TOGETHER), description=doing):
            part = order[begin : begin + _TOGETHER]
            width = max(len(starts[place]) for place in part)
            padded = [[0] * (width - len(starts[place])) + starts[place] for place in part]
            real = [[0] * (width - len(starts[place])) + [1] * len(starts[place]) for place in part]
            out = generator.generate(
                torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(real, device=model.device),
                max_new_tokens=new,
                do_sample=False,
                num_beams=1,
                pad_token_id=ends[0] if ends else 0,
            )[:, width:].tolist()
            for place, ids in zip(part, out, strict=True):
                last = next((number + 1 for number, token in enumerate(ids) if token in ends), len(ids))
                found[place] = ids[:last]
    return found


def _ends(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]

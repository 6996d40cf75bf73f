"""Figures of a model, and speculation against its promises: what `tokenry bench` prints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.text import Text

from tokenry.errors import BadPrompt, PromptTooLong, ResourceError
from tokenry.methods import Combination, Method
from tokenry.methods import method as read_method
from tokenry.models import context_length
from tokenry.workloads import Example, examples, held_out_files

from .comparison import PAIRS, compare
from .environment import describe_model, machine, versions
from .metrics import bits_per_byte, compressed_bits_per_byte
from .results import Comparison
from .running import Prompts, Setting, Variant, prepare, run, run_options

SPECULATION_METHODS = ("plain", "prompt-lookup", "token-recycling")
RECALL_TOKENS = 1500
"""Tokens of context at which recall is measured."""


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """What a small code model can do on held-out text and on the workloads' test examples.

    Args:
        model: Name, size, dtype and weights hash.
        text_bytes: Bytes of held-out source that the bits per byte are of.
        bits_per_byte: By reader: the model, the draft if one was given, gzip and xz.
        recall: Exact recall at 1,500 tokens of context, overall and by depth of the key.
        arithmetic: Share of greedily worked chains with the right answer.
        edit: Share of functions repeated exactly with one name changed.
        examples: Examples of each workload.
    """

    model: dict[str, Any]
    text_bytes: int
    bits_per_byte: dict[str, float]
    recall: dict[str, float]
    arithmetic: float
    edit: float
    examples: int

    def __str__(self) -> str:
        """The figures, one a line."""
        lines = [
            f"{self.model['name']}: {self.model['parameters'] / 1e6:.1f}M parameters, {self.model['dtype']}",
            f"held-out source, bits per byte of {self.text_bytes:,} bytes: "
            + ", ".join(f"{name} {value:.3f}" for name, value in self.bits_per_byte.items()),
            f"recall at {RECALL_TOKENS} tokens: "
            + ", ".join(f"{name} {value:.1%}" for name, value in self.recall.items()),
            f"arithmetic, greedy: {self.arithmetic:.1%}",
            f"edit, exact: {self.edit:.1%}",
            f"({self.examples} examples of each workload)",
        ]
        return "\n".join(lines)

    def __rich__(self) -> Text:
        return Text(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data with machine and versions."""
        place = machine(torch.device(self.model["device"]))
        return {"schema_version": 1, "kind": "model", **asdict(self), "machine": place, "versions": versions()}


def bench_model(
    model: Any,
    tokenizer: Any,
    *,
    draft: Any = None,
    text_bytes: int = 1_000_000,
    count: int = 200,
    batch_size: int = 8,
    seed: int = 0,
) -> ModelFigures:
    """Measure a code model on held-out packages and on the workloads.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        draft: A second model with the same tokenizer, whose bits per byte stand beside.
        text_bytes: About how many bytes of the held-out packages to read: whole files, evenly chosen.
        count: Examples of each workload.
        batch_size: Examples that run together.
        seed: Seed of the workloads.

    Raises:
        BadPrompt: No held-out package is installed.
        PromptTooLong: The model's context is too short for a workload.
        ResourceError: The draft's vocabulary has another size than the model's.
    """
    if draft is not None:
        mine, its = (each.config.get_text_config().vocab_size for each in (model, draft))
        if mine != its:
            raise ResourceError(
                f"the draft has {its} tokens in its vocabulary and the model {mine}; "
                "give a draft with the model's tokenizer, or none"
            )
    texts = held_out_texts(text_bytes)
    bits = {"model": bits_per_byte(model, tokenizer, texts)}
    if draft is not None:
        bits["draft"] = bits_per_byte(draft, tokenizer, texts)
    bits |= compressed_bits_per_byte(texts)
    # Characters are what the workload counts; tokens are what the figure is named after.
    sample = examples("recall", 1, seed=seed)[0].prompt
    length = int(RECALL_TOKENS * len(sample) / len(tokenizer(sample)["input_ids"]))
    recall = examples("recall", count, seed=seed, length=length)
    scores = _scores(model, tokenizer, "recall", recall, 12, batch_size)
    depths: dict[str, list[float]] = {"all": scores}
    for example, score in zip(recall, scores, strict=True):
        depths.setdefault(str(example.meta["depth"]), []).append(score)
    arithmetic = _scores(model, tokenizer, "arithmetic", examples("arithmetic", count, seed=seed), None, batch_size)
    edit = _scores(model, tokenizer, "edit", examples("edit", count, seed=seed), None, batch_size)
    return ModelFigures(
        model=describe_model(model),
        text_bytes=sum(len(text.encode()) for text in texts),
        bits_per_byte=bits,
        recall={name: sum(group) / len(group) for name, group in sorted(depths.items())},
        arithmetic=sum(arithmetic) / len(arithmetic),
        edit=sum(edit) / len(edit),
        examples=count,
    )


def held_out_texts(text_bytes: int) -> list[str]:
    """Return whole files of the held-out packages, evenly chosen, of about so many bytes.

    Raises:
        BadPrompt: None of the packages is installed.
    """
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in held_out_files()]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise BadPrompt("no held-out package is installed: pip install rich typer click hypothesis pytest")
    every = max(1, round(sum(map(len, texts)) / text_bytes))
    return texts[::every]


def _scores(
    model: Any, tokenizer: Any, name: str, group: list[Example], new: int | None, batch_size: int
) -> list[float]:
    """Score greedy outputs of transformers' plain `generate`."""
    task = prepare(name, group, model, tokenizer, max_new_tokens=new, batch_size=batch_size, tail=None)
    plain = Variant(read_method("transformers"), Setting())
    options = {**run_options(model, tokenizer, False), "max_new_tokens": task.max_new_tokens}
    scores = []
    for batch in task.batches:
        rows = run(plain, model, tokenizer, batch, options, seed=0).tokens
        for example, row in zip(batch.examples, rows, strict=True):
            scores.append(example.check(tokenizer.decode(row, skip_special_tokens=True)))
    return scores


def bench_speculation(
    model: Any,
    tokenizer: Any,
    prompts: Prompts | None = None,
    *,
    methods: Sequence[str | Method | Combination] = SPECULATION_METHODS,
    workloads: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: int = 64,
    tail: int | None = None,
    repeats: int = PAIRS,
    limit: int = 14,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Comparison]:
    """Check that drafters change nothing but the number of passes: yields one comparison for each batch size.

    Every output is compared with transformers' plain `generate` over the same batch; `Row.broken` counts
    those that differ otherwise than from a near tie on.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        prompts: Texts, or the path of a JSONL file such as Spec-Bench's.
        methods: Drafters, as text.
        workloads: Bundled workloads; by default all four if there are no prompts.
        batch_sizes: Prompts that run together, one comparison for each.
        max_new_tokens: New tokens a prompt.
        tail: Keep only the last so many tokens of each prompt.
        repeats: Interleaved pairs over which the prompts are dealt.
        limit: Examples of each named workload.
        seed: Seed of the workloads.
        progress: Show progress on a terminal.

    Raises:
        BadPrompt, PromptTooLong, BadParameter, MethodNotFound: As `compare` does.
    """
    if tail is None and (context := context_length(model)):
        tail = context - max_new_tokens
        if tail < 1:
            raise PromptTooLong(
                f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of {context}; "
                "ask for fewer new tokens"
            )
    for size in batch_sizes:
        yield compare(
            model, tokenizer, prompts, methods, workloads=workloads, max_new_tokens=max_new_tokens, tail=tail,
            repeats=repeats, limit=limit, batch_size=size, seed=seed, sample=False, progress=progress,
        )  # fmt: skip

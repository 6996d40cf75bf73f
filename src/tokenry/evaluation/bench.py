"""Figures of a model: what `tokenry bench model` prints."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.text import Text

from tokenry.errors import BadPrompt, ResourceError
from tokenry.methods import method as read_method
from tokenry.workloads import examples, held_out_files

from .environment import describe_model, machine, versions
from .metrics import bits_per_byte, compressed_bits_per_byte
from .running import Runner, Setting, Task, Variant

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
    runner = Runner(model, tokenizer)

    def prepared(name: str, new: int | None, **options: Any) -> Task:
        group = examples(name, count, seed=seed, **options)
        return runner.prepare(name, group, max_new_tokens=new, batch_size=batch_size)

    # Characters are what the workload counts; tokens are what the figure is named after.
    sample = examples("recall", 1, seed=seed)[0].prompt
    length = int(RECALL_TOKENS * len(sample) / len(tokenizer(sample)["input_ids"]))
    # A context that is too short is found before anything is measured.
    tasks = [prepared("recall", 12, length=length), prepared("arithmetic", None), prepared("edit", None)]
    texts = held_out_texts(text_bytes)
    bits = {"model": bits_per_byte(model, tokenizer, texts)}
    if draft is not None:
        bits["draft"] = bits_per_byte(draft, tokenizer, texts)
    bits |= compressed_bits_per_byte(texts)
    recall, arithmetic, edit = (_scores(runner, tokenizer, task) for task in tasks)
    depths: dict[str, list[float]] = {"all": recall}
    asked = (example for batch in tasks[0].batches for example in batch.examples)
    for example, score in zip(asked, recall, strict=True):
        depths.setdefault(str(example.meta["depth"]), []).append(score)
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


def _scores(runner: Runner, tokenizer: Any, task: Task) -> list[float]:
    """Score greedy outputs of transformers' plain `generate`."""
    plain = Variant(read_method("transformers"), Setting())
    scores = []
    for batch in task.batches:
        rows = runner.run(plain, batch, task.max_new_tokens).tokens
        for example, row in zip(batch.examples, rows, strict=True):
            scores.append(example.check(tokenizer.decode(row, skip_special_tokens=True)))
    return scores

"""Pretraining of a small causal model on token blocks, with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from tokenry.objectives import mixed


class Blocks(Dataset):
    """Blocks written by :func:`~tokenry.training.corpus.write_blocks`, each one batch ``[rows, length]``."""

    def __init__(self, path: Path, lengths: tuple[int, ...], count: int) -> None:
        self.tokens = np.load(path, mmap_mode="r")
        self.lengths = lengths
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        # A run longer than the corpus goes through it again.
        index %= len(self.tokens)
        block = torch.from_numpy(self.tokens[index].astype(np.int64))
        return block.view(-1, self.lengths[index % len(self.lengths)])


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for embeddings and norms, as one optimizer.

    Args:
        model: Model whose parameters are trained.
        lr: Learning rate of the matrices, Muon's update being scaled to AdamW's root mean square.
        embedding_lr: Learning rate of embeddings and norms.
        weight_decay: Decay of the matrices.
    """

    def __init__(self, model: torch.nn.Module, lr: float, embedding_lr: float, weight_decay: float) -> None:
        embedding = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in embedding]
        others = [p for p in trained if p.ndim != 2 or id(p) in embedding]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=embedding_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([*matrices, *others], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # Loading replaces the groups' dictionaries, which the learning-rate schedule writes to.
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class _Pretrainer(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        # Blocks were shuffled when they were written; the order must not change when a run is resumed.
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def _collate(blocks: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    (tokens,) = blocks
    return {"input_ids": tokens, "labels": tokens}


def pretrain(
    model: PreTrainedModel,
    blocks: Path,
    folder: Path,
    *,
    lengths: tuple[int, ...],
    steps: int,
    lr: float = 3e-3,
    embedding_lr: float = 1e-2,
    decay: float = 0.3,
    weight_decay: float = 0.1,
    seed: int = 0,
    save_every: int = 100,
) -> PreTrainedModel:
    """Train ``model`` for ``steps`` blocks and return it; a run that was stopped goes on from its last checkpoint.

    The learning rate warms up over 50 steps, stays, and falls linearly to zero over the last ``decay`` of the steps,
    so a longer run can go on from any checkpoint before the fall.

    Args:
        model: A freshly initialised causal model.
        blocks: File written by ``write_blocks``.
        folder: Where checkpoints and the log go.
        lengths: Row lengths of the blocks, as given to ``write_blocks``.
        steps: Optimizer steps, one block each.
    """
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=lr,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": max(1, int(decay * steps)),
            "min_lr_ratio": 0.0,
            "decay_type": "linear",
        },
        warmup_steps=min(50, steps // 10),
        max_grad_norm=1.0,
        bf16=mixed("auto", torch.device("cuda" if cuda else "cpu")) is not None,
        use_cpu=not cuda,
        save_steps=save_every,
        save_total_limit=3,
        logging_steps=10,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        seed=seed,
    )
    trainer = _Pretrainer(
        model=model,
        args=arguments,
        train_dataset=Blocks(blocks, lengths, steps),
        data_collator=_collate,
        optimizers=(MuonAdamW(model, lr, embedding_lr, weight_decay), None),
    )
    resumable = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resumable or None)
    return model

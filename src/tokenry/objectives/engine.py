"""An objective says what is learned; the engine says how: windows, exact means, checkpoints, resume, progress.

A step of the optimizer sees a window of micro-batches. An objective gives each loss term of a micro-batch as a sum,
and its count before anything is computed; the engine divides by the counts of the whole window over all processes.
So neither how a batch is split nor how rows are padded changes what is learned.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from tokenry.errors import BadMethod, BadParameter, ResourceError, TokenryError, UnsupportedModel
from tokenry.models import weights_hash

Batch = dict[str, Any]
Schedule = Literal["constant", "linear", "cosine"]
EXTRA = "objective.safetensors"
"""The file of a checkpoint or saved bundle that holds the extras' weights."""
_STATE = "objective.pt"
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class TrainingDiverged(TokenryError, ArithmeticError):
    """The loss of a training run is no longer a finite number."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a run stands, as an objective sees it.

    Attributes:
        step: Steps of the optimizer that are done.
        max_steps: Steps of the whole run.
        seed: Seed of the run.
        rank: Number of this process, of `processes`.
        bundle: The model and its extras, not wrapped for parallel training; for work outside of `terms`.
        training: False in evaluation.
    """

    step: int
    max_steps: int
    seed: int
    rank: int
    processes: int
    bundle: Bundle
    training: bool = True

    @property
    def progress(self) -> float:
        """Share of the run that is done, from 0 to 1."""
        return self.step / max(self.max_steps, 1)

    def generator(self, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers that depend on seed, step, rank and `key` alone, so a resumed run draws the same."""
        named = repr((self.seed, self.step if self.training else -1, self.rank, *key)).encode()
        seed = int.from_bytes(hashlib.blake2b(named, digest_size=7).digest(), "big")
        return torch.Generator(device).manual_seed(seed)


class Objective:
    """What is learned. It holds no trained weights itself: those are the model's, or its `modules`.

    Frozen second models (teachers, references) are attributes of the objective, in evaluation mode and without
    gradients; they are neither saved nor moved by the engine.
    """

    def modules(self, model: PreTrainedModel) -> Mapping[str, nn.Module]:
        """What is trained or kept beside `model`, by name; freeze here what of `model` is not to be trained."""
        return {}

    def collate(self, features: Sequence[Any]) -> Batch:
        """A micro-batch of the dataset's items; by default dictionaries of equally shaped tensors are stacked."""
        return default_collate(list(features))

    def prepare(self, window: list[Batch], ctx: Context) -> list[Batch]:
        """Change or add to the micro-batches of one optimizer step, before any is computed; runs without gradient.

        Draw random numbers from `ctx.generator`. What is added lives until the step is done: no `[.., vocabulary]`.
        """
        return window

    def counts(self, batch: Batch) -> Mapping[str, Tensor | float]:
        """What each term of a prepared micro-batch is divided by, summed over the window (tokens, rows, weights)."""
        raise NotImplementedError

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Batch, ctx: Context
    ) -> tuple[Mapping[str, Tensor], Any]:
        """The SUM of each loss term over a micro-batch, float32, and whatever `metrics` needs."""
        raise NotImplementedError

    def weights(self, ctx: Context) -> Mapping[str, float]:
        """Factors of the terms in the loss; a term that is not named has 1."""
        return {}

    def metrics(self, batch: Batch, outputs: Any) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        """Name -> (sum, count) of what is logged beside the terms, from what `terms` returned second."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State that must survive a resume (moving averages, histories), as `torch.save` of plain values takes it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Bundle(nn.Module):
    """A model and an objective's extras as the one module that is trained, saved by prefix.

    Attributes:
        model: The model, `model.` in the names of parameters.
        extra: The objective's modules, `extra.` in the names of parameters.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModel(
                f"cannot train a {type(model).__name__}; give a transformers model itself, without adapters, "
                "not compiled or wrapped"
            )
        self.model = model
        self.extra = nn.ModuleDict(dict(objective.modules(model)))
        # In a list, so that an objective that is a module is not saved with the model.
        self._objective = [objective]

    def forward(
        self, batch: Batch, ctx: Context, touch: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        """Terms, metrics, and a zero, which depends on all that is trained where that is asked for or nothing else
        does: parallel processes and batches without targets need a gradient of everything."""
        (objective,) = self._objective
        terms, outputs = objective.terms(self.model, self.extra, batch, ctx)
        with torch.no_grad():
            metrics = objective.metrics(batch, outputs)
        zero = torch.zeros((), device=self.model.device)
        if touch or not any(term.requires_grad for term in terms.values()):
            zero = sum((p.flatten()[:1].sum() * 0 for p in self.parameters() if p.requires_grad), zero)
        return dict(terms), dict(metrics), zero

    def trains_model(self) -> bool:
        """Whether any of the model's own parameters is trained."""
        apart = {id(parameter) for parameter in self.extra.parameters()}
        return any(p.requires_grad and id(p) not in apart for p in self.model.parameters())

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the model by `save_pretrained`, if it is trained, and the extras to `objective.safetensors`."""
        state = self.state_dict() if state is None else state
        folder.mkdir(parents=True, exist_ok=True)
        if self.trains_model():
            self.model.save_pretrained(folder, state_dict=_below("model.", state))
        # Clones, because one tensor under two names is refused.
        if extra := {name: tensor.detach().clone().contiguous() for name, tensor in _below("extra.", state).items()}:
            save_file(extra, folder / EXTRA)

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        if self.trains_model():
            saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())
        if len(self.extra):
            self.extra.load_state_dict(load_file(folder / EXTRA))


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


class ObjectiveTrainer(Trainer):
    """transformers' Trainer for an objective: exact means over accumulation and processes, terms in the log.

    Args:
        model: The model, trained in place.
        objective: What is learned.
        args: Arguments of the run; `remove_unused_columns` is switched off.
        groups: Multiples of the learning rate by prefix of the Bundle's parameter names (`extra.head`); the longest
            prefix counts.
        options: Further arguments of `Trainer`.
    """

    # `compute_loss` divides by the counts of the whole window.
    loss_is_scaled_for_ga = True
    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        args: TrainingArguments,
        *,
        groups: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        args.remove_unused_columns = False
        # Several devices in one process would average sums; they are used by one process each.
        if args.n_gpu > 1:
            args._n_gpu = 1
        self.objective = objective
        self.groups = dict(groups or {})
        bundle = Bundle(model, objective)
        super().__init__(model=bundle, args=args, data_collator=objective.collate, **options)
        self._bundle = bundle
        self._totals: dict[str, float] = {}
        self._sums: dict[str, list[Any]] = {}
        self._windows = 0

    def context(self, *, training: bool = True) -> Context:
        """Where the run stands now."""
        return Context(
            step=self.state.global_step,
            max_steps=self.state.max_steps or self.args.max_steps,
            seed=self.args.seed,
            rank=self.args.process_index,
            processes=self.args.world_size,
            bundle=self._bundle,
            training=training,
        )

    # --- training -------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        window = list(itertools.islice(epoch_iterator, num_batches))
        if window:
            window = self._prepared(window, self.context())
            self._totals = self._reduced(_counts(self.objective, window))
            self._windows += 1
        return window, None

    def _prepared(self, window: list[Batch], ctx: Context) -> list[Batch]:
        with torch.no_grad():
            return self.objective.prepare([self._prepare_inputs(batch) for batch in window], ctx)

    def _reduced(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Sums over all processes, which must name the same."""
        names = sorted(sums)
        if not names:
            return {}
        total = torch.stack([torch.as_tensor(sums[name]).detach().cpu().double() for name in names])
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total.to(self.args.device), "sum")
        return dict(zip(names, total.tolist(), strict=True))

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any) -> Any:  # type: ignore[override]
        ctx = self.context()
        touch = ctx.processes > 1 or not any(self._totals.values())
        terms, metrics, zero = model(inputs, ctx, touch)
        _check_names(self.objective, terms, self._totals)
        factors = self.objective.weights(ctx)
        loss: Tensor = zero
        for name, total in terms.items():
            if self._totals[name]:
                mean = total / self._totals[name]
                loss = loss + factors.get(name, 1.0) * mean
                self._add(f"term/{name}", mean.detach(), 0)
        for name, (total, count) in metrics.items():
            self._add(f"metric/{name}", total, count)
        loss = loss * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def _add(self, name: str, total: Any, count: Any) -> None:
        seen = self._sums.setdefault(name, [0.0, 0.0])
        seen[0] = seen[0] + total
        seen[1] = seen[1] + count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            totals = self._reduced({name: total for name, (total, _) in self._sums.items()})
            counts = self._reduced({name: count for name, (_, count) in self._sums.items()})
            for name, total in totals.items():
                # A term's mean of each window is exact already; a metric is a mean over all that was counted.
                count = self._windows if name.startswith("term/") else counts[name]
                logs[name] = total / count if count else math.nan
            self._sums, self._windows = {}, 0
            if not math.isfinite(logs["loss"]):
                raise TrainingDiverged(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; lower the learning rate"
                )
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self._bundle if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            found: dict[tuple[float, bool], list[nn.Parameter]] = {}
            used = set()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    prefix = max((p for p in self.groups if name.startswith(p)), key=len, default="")
                    used.add(prefix)
                    found.setdefault((self.groups.get(prefix, 1.0), name in decayed), []).append(parameter)
            if unused := set(self.groups) - used:
                raise BadParameter(
                    f"no trained parameter's name begins with {', '.join(sorted(unused))}; names begin with "
                    "model. or extra."
                )
            groups = [
                {
                    "params": parameters,
                    "lr": multiple * self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for (multiple, decay), parameters in found.items()
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # --- evaluation -----------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader: Any, description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Means over all that is counted: they depend neither on the batch size nor on padding."""
        model = self._wrap_model(self.model, training=False)  # type: ignore[arg-type]
        if not self.accelerator._models:  # without a training before it
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = self._bundle.training
        model.eval()
        counts: dict[str, Any] = {}
        sums: dict[str, Any] = {}
        rows = 0
        ctx = self.context(training=False)
        with torch.no_grad():
            for batch in dataloader:
                (batch,) = self._prepared([batch], ctx)
                rows += _rows(batch)
                terms, metrics, _zero = model(batch, ctx)
                seen = _counts(self.objective, [batch])
                _check_names(self.objective, terms, seen)
                for name, total in terms.items():
                    sums[f"term/{name}"] = sums.get(f"term/{name}", 0.0) + total
                    counts[f"term/{name}"] = counts.get(f"term/{name}", 0.0) + seen[name]
                for name, (total, count) in metrics.items():
                    sums[f"metric/{name}"] = sums.get(f"metric/{name}", 0.0) + total
                    counts[f"metric/{name}"] = counts.get(f"metric/{name}", 0.0) + count
        self._bundle.train(was_training)
        totals, numbers = self._reduced(sums), self._reduced(counts)
        means = {name: totals[name] / numbers[name] for name in totals if numbers[name]}
        factors = self.objective.weights(ctx)
        loss = sum(factors.get(name[5:], 1.0) * mean for name, mean in means.items() if name.startswith("term/"))
        found = {f"{metric_key_prefix}_loss": float(loss)}
        found |= {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=found, num_samples=rows)  # type: ignore[arg-type]

    # --- checkpoints ----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            self._bundle.save(folder, state_dict)
            torch.save(self.objective.state_dict(), folder / _STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._bundle.load(folder)
        self.objective.load_state_dict(torch.load(folder / _STATE, weights_only=True))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _counts(objective: Objective, window: Iterable[Batch]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for batch in window:
        for name, count in objective.counts(batch).items():
            found[name] = found.get(name, 0.0) + count
    return found


def _check_names(objective: Objective, terms: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    if missing := set(terms) - set(counts):
        raise BadMethod(
            f"{type(objective).__name__}.terms gives {', '.join(sorted(missing))} that its counts does not name; "
            "count every term"
        )


def _rows(batch: Batch) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)


# --- a run ---------------------------------------------------------------------------------------


def fit(
    model: PreTrainedModel,
    objective: Objective,
    dataset: Dataset | Sequence[Any],
    folder: str | Path | None,
    *,
    steps: int,
    lr: float,
    batch: int = 8,
    accumulate: int = 1,
    seed: int = 0,
    warmup: int = 0,
    schedule: Schedule = "constant",
    groups: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    save_every: int = 200,
    dtype: torch.dtype | None = None,
    settings: str = "",
    progress: bool = True,
) -> Bundle:
    """Train `model` in place for `steps` and return it with the objective's extras, in evaluation mode.

    A run that was stopped goes on from its last checkpoint in `folder`, to the same weights; a finished one is read
    back at once. Weights in half precision are widened to float32. The log is `folder/log.jsonl`.

    Args:
        model: The model; of its parameters those that require gradients are trained.
        dataset: Items that `objective.collate` takes, a fixed number of them.
        folder: Checkpoints and log, of this run alone; None keeps neither.
        steps: Steps of the optimizer; the dataset is read again where it is too short.
        lr: Highest learning rate (AdamW).
        batch: Items of a micro-batch.
        accumulate: Micro-batches of a step.
        warmup: Steps over which the learning rate rises to `lr`.
        schedule: What it does then; linear and cosine fall to zero at the last step.
        groups: Multiples of the learning rate by prefix of the Bundle's parameter names (`extra.head`).
        save_every: Steps between checkpoints, of which the last two are kept.
        dtype: bfloat16 or float16 for mixed precision, None for none.
        settings: Whatever else tells this run from others; a folder of another run is refused.

    Raises:
        ResourceError: `folder` holds the run of other settings, or accelerate is not installed.
        TrainingDiverged: The loss is no longer finite.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ResourceError("training needs accelerate; install it with pip install 'tokenry[train]'")
    _check_run(dataset, steps=steps, batch=batch, accumulate=accumulate, save_every=save_every, dtype=dtype)
    plan = {
        "objective": type(objective).__name__, "settings": settings, "weights": weights_hash(model),
        "rows": len(dataset), "steps": steps, "lr": lr, "batch": batch, "accumulate": accumulate, "seed": seed,  # type: ignore[arg-type]
        "warmup": warmup, "schedule": schedule, "groups": dict(groups or {}), "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm, "dtype": str(dtype),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        last = _last_checkpoint(place, plan)
        _widen(model)
        set_seed(seed)  # for the extras' first weights
        arguments = TrainingArguments(
            output_dir=str(place),
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            learning_rate=lr,
            lr_scheduler_type=_SCHEDULES[schedule],
            warmup_steps=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=model.device.type == "cpu",
            save_strategy="no" if folder is None else "steps",
            save_steps=save_every,
            save_total_limit=2,
            logging_steps=max(1, min(10, steps // 10)),
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=model.device.type == "cuda",
            seed=seed,
        )
        console = Console(stderr=True)
        shown = progress and console.is_terminal
        bar = stack.enter_context(Progress(console=console, transient=True, disable=not shown))
        report = _Report(bar, place)
        trainer = ObjectiveTrainer(
            model, objective, arguments, groups=groups, train_dataset=dataset, callbacks=[report]
        )
        trainer.remove_callback(PrinterCallback)
        _widen(trainer._bundle)
        if not any(parameter.requires_grad for parameter in trainer._bundle.parameters()):
            raise BadParameter("nothing is trained: no parameter of the model or the extras requires gradients")
        if last is not None and _steps(last) >= steps:
            trainer._load_from_checkpoint(str(last))
        else:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    bundle = trainer._bundle
    # What prepared it for mixed precision belongs to the run.
    vars(bundle).pop("forward", None)
    return bundle.eval()


def _check_run(dataset: Any, *, dtype: torch.dtype | None, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise BadParameter(f"{name}={number} is not allowed; {name} must be at least 1")
    if len(dataset) == 0:
        raise BadParameter("the dataset is empty; give at least one item to train on")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise BadParameter(f"dtype={dtype} is not allowed; dtype must be torch.bfloat16, torch.float16 or None")


def _widen(module: nn.Module) -> None:
    """Half precision to float32: small steps of the optimizer would be lost in it."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters()):
        module.float()


def _last_checkpoint(folder: Path, plan: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint of the planned run; a folder of another run is refused."""
    note = folder / "plan.json"
    found = sorted((path for path in folder.glob("checkpoint-*")), key=_steps)
    # The state is written last.
    for path in [path for path in found if not (path / "trainer_state.json").is_file()]:
        shutil.rmtree(path)
        found.remove(path)
    if found:
        known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if changed := sorted(name for name in {*plan, *known} if plan.get(name) != known.get(name)):
            raise ResourceError(
                f"{str(folder)!r} holds an unfinished run that differs in {', '.join(changed)}; "
                "remove the folder or name another"
            )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    return found[-1] if found else None


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _Report(TrainerCallback):
    """Progress on the terminal and a line of JSON for each entry of the log."""

    def __init__(self, bar: Progress, folder: Path) -> None:
        self.bar = bar
        self.path = folder / "log.jsonl"
        self.start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        # A diverged run is noticed before it is saved.
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if logs and "loss" in logs:
            self.bar.update(self.task, description=f"training, loss {logs['loss']:.4g}")
        line = {"step": state.global_step, "seconds": round(time.perf_counter() - self.start, 3), **(logs or {})}
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

"""SkipDecode: loss on functions of held-out packages behind a prompt, as decoding under the schedule reads them."""

import time
from typing import Any

import torch

from tokenry.decoding.skipdecode.training import losses_by_index
from tokenry.errors import BadParameter
from tokenry.methods import method as read_method
from tokenry.models import anatomy, load, loaded_name, trained_folder
from tokenry.workloads import functions

from .engine import Bench, Tally, promised

_PROMPT, _HORIZON = 64, 64
_LOSS = "nats a token"
_FULL, _TUNED, _EARLY, _RAW, _RAW_EARLY = "all layers", "skip, tuned", "early exit, tuned", "skip", "early exit"

PROMISES = (
    promised("skipdecode-below-full", "all layers lose no more than SkipDecode", _LOSS, _FULL, _TUNED, smaller=True,
             otherwise="fine-tuning on this text also teaches the text"),
    promised("skipdecode-above-early", "SkipDecode loses no more than early exit of the same budget", _LOSS, _TUNED,
             _EARLY, smaller=True, otherwise="few layers leave little between the bottom ones and the top ones"),
    promised("skipdecode-above-raw", "early exit after training loses no more than without", _LOSS, _EARLY, _RAW_EARLY,
             smaller=True),
    promised("skipdecode-tuned-above-raw", "SkipDecode after training loses less than without", _LOSS, _TUNED, _RAW,
             smaller=True, strict=True),
)  # fmt: skip


def measure(bench: Bench) -> None:
    """Loss with all layers, and under both schedules before and after fine-tuning."""
    text = "\n\n".join(functions("test"))
    ids = torch.tensor(bench.tokenizer(text, add_special_tokens=False)["input_ids"])
    width = _PROMPT + _HORIZON
    rows = ids[: len(ids) // width * width].view(-1, width)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    default = str(trained_folder("skipdecode", loaded_name(bench.model)))

    def lose(way: str, folder: str | None, exit: str | None) -> None:
        if folder is None:
            # Of early exit there is no place by default: both runs would overwrite each other.
            raise BadParameter("name the folder of `tokenry train skipdecode --exit early --out FOLDER` (tuned_early)")
        model: Any = load(folder, dtype=bench.model.dtype, device=bench.model.device)[0] if folder else bench.model
        if folder:
            bench.note(way, model)
        method: Any = read_method("skipdecode" if exit is None else f"skipdecode:exit={exit}")
        schedule = None if exit is None else method.schedule(len(anatomy(model).layers), _HORIZON)
        tally = Tally()
        begin = time.perf_counter()
        for seed in range(bench.seeds):
            part = rows[seed * bench.limit : (seed + 1) * bench.limit]
            if len(part):
                tally.values.append(float(losses_by_index(model, part, _PROMPT, schedule).mean()))
        tally.seconds = time.perf_counter() - begin
        note = "" if schedule is None else f"{schedule.speedup():.2f} times fewer layers"
        bench.add("skipdecode", way, _LOSS, tally, note)

    bench.attempt(_FULL, lambda: lose(_FULL, "", None))
    bench.attempt(_RAW, lambda: lose(_RAW, "", "skip"))
    bench.attempt(_RAW_EARLY, lambda: lose(_RAW_EARLY, "", "early"))
    bench.attempt(_TUNED, lambda: lose(_TUNED, bench.tuned or default, "skip"))
    bench.attempt(_EARLY, lambda: lose(_EARLY, bench.tuned_early, "early"))

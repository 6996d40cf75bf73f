"""CNTP on worked arithmetic, sampled: answers right by one draw, by vote, and by the surest whole answer."""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenry.generation import GenerationResult
from tokenry.workloads import examples

from .engine import ACCURACY, SMALL_TASK, Bench, Tally, longest, promised

VOTES = 5
"""Answers of a vote, and whole answers that the best is chosen from."""

_SAMPLED, _VOTED, _WHOLE = "plain (sampled)", f"plain, vote of {VOTES}", f"plain, surest of {VOTES}"
_GREEDY = "plain (greedy)"
_CNTP, _CNTP_VOTED = "cntp", f"cntp, vote of {VOTES}"
# The ablation of the authors: the same hesitations with another number of trials.
_FIXED, _INVERTED = "cntp:rule=fixed", "cntp:rule=inverted"
_FORWARDS = "forwards an answer"

PROMISES = (
    promised("cntp-above-sampling", "CNTP answers better than sampling at its temperature", ACCURACY, _CNTP, _SAMPLED,
             strict=True, otherwise=SMALL_TASK),
    promised("cntp-above-greedy", "CNTP answers better than greedy decoding", ACCURACY, _CNTP, _GREEDY, strict=True,
             otherwise="where greedy answers are mostly right, sampling at temperature 1 loses more than trials win"),
    promised("cntp-vote", "a vote of CNTP's answers is at least as good as a vote of sampled ones", ACCURACY,
             _CNTP_VOTED, _VOTED, otherwise="a vote has little left to gain where most answers are right already"),
    promised("cntp-above-whole", "choosing clause by clause beats choosing among whole answers by perplexity", ACCURACY,
             _CNTP, _WHOLE, strict=True, otherwise=SMALL_TASK),
    promised("cntp-cheaper-than-whole", f"CNTP takes fewer forwards than the surest of {VOTES} whole answers",
             _FORWARDS, _CNTP, _WHOLE, smaller=True, strict=True,
             otherwise="a model that hesitates at most tokens runs trials at most of them"),
    promised("cntp-proportional", "trials by entropy are at least as good as six wherever it hesitates", ACCURACY,
             _CNTP, _FIXED, otherwise="six where two would do cost more trials and may buy something with them"),
    promised("cntp-above-inverted", "trials by entropy are at least as good as more of them where it is surer",
             ACCURACY, _CNTP, _INVERTED, otherwise="trials at nearly every token cost far more and may buy something"),
)  # fmt: skip


def measure(bench: Bench) -> None:
    """Answers of `VOTES` draws for each seed, of plain sampling and of CNTP, and greedy ones."""
    tasks = examples("arithmetic", bench.limit)
    prompts = [task.prompt for task in tasks]
    most = longest(bench.tokenizer, tasks)

    def draw(tally: Tally, way: str, seed: int) -> tuple[list[str], list[float]]:
        texts: list[str] = []
        sure: list[float] = []
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        options |= {"max_new_tokens": most, "output_scores": True}
        for result in bench.run(tally, prompts, way, seed=seed * 1_000_003, **options):
            texts += result.texts(bench.tokenizer)
            sure += mean_log_probs(result)
        return texts, sure

    def right(texts: Sequence[str]) -> float:
        return statistics.fmean(task.check(text) for task, text in zip(tasks, texts, strict=True))

    def greedily() -> None:
        tally, texts = Tally(), list[str]()
        for result in bench.run(tally, prompts, "plain", do_sample=False, max_new_tokens=most):
            texts += result.texts(bench.tokenizer)
        tally.values = [right(texts)] * bench.seeds
        bench.add("cntp", _GREEDY, ACCURACY, tally, "one run: no seed changes it")

    def answer(way: str, one: str, voted: str | None, surest: str | None) -> None:
        single, several, whole = Tally(), Tally(), Tally()
        forwards: dict[str, list[float]] = {name: [] for name in (one, surest) if name}
        for seed in range(bench.seeds):
            draws = []
            before = single.passes, whole.passes
            for number in range(VOTES if voted else 1):
                tally = Tally()
                draws.append(draw(tally, way, seed * VOTES + number))
                for each in (single,) * (number == 0) + (several, whole):
                    # A vote pays for all of its draws and has the tokens of one answer.
                    tokens = tally.tokens if each is single or number == 0 else 0
                    each.count(tally.passes, tokens, tally.seconds)
            for name, tally, passes in zip(forwards, (single, whole), before, strict=False):
                forwards[name].append((tally.passes - passes) / len(tasks))
            single.values.append(right(draws[0][0]))
            if voted:
                texts = [vote([each[0][row] for each in draws]) for row in range(len(tasks))]
                several.values.append(right(texts))
                texts = [max(draws, key=lambda each: each[1][row])[0][row] for row in range(len(tasks))]
                whole.values.append(right(texts))
        bench.add("cntp", one, ACCURACY, single)
        if voted:
            bench.add("cntp", voted, ACCURACY, several)
        if surest:
            bench.add("cntp", surest, ACCURACY, whole)
        for name, tally in zip(forwards, (single, whole), strict=False):
            bench.add("cntp", name, _FORWARDS, Tally(forwards[name], tally.passes, tally.tokens, tally.seconds))

    bench.attempt(_SAMPLED, lambda: answer("plain", _SAMPLED, _VOTED, _WHOLE))
    bench.attempt(_CNTP, lambda: answer("cntp", _CNTP, _CNTP_VOTED, None))
    for way in (_FIXED, _INVERTED):
        bench.attempt(way, lambda way=way: answer(way, way, None, None))  # type: ignore[misc]
    bench.attempt(_GREEDY, greedily)


def mean_log_probs(result: GenerationResult) -> list[float]:
    """Mean log-probability of each row's new tokens under the distribution that they were sampled from."""
    assert result.sources is not None and result.prompt_length is not None and result.scores is not None
    ids: Any = result.sequences
    new = ids[:, result.prompt_length :]
    logs = torch.stack([
        step.log_softmax(-1).gather(1, new[:, column, None])[:, 0] for column, step in enumerate(result.scores)
    ], 1)  # fmt: skip
    real = (result.sources[:, result.prompt_length :] >= 0).to(logs.device)
    total: Tensor = logs.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)
    return total.tolist()


_ANSWER = re.compile(r"answer (-?\d+)\.")


def vote(texts: Sequence[str]) -> str:
    """The answer that most texts have, the earliest of several; the first text where none has one."""
    read = [found.group(0) if (found := _ANSWER.search(text)) else "" for text in texts]
    counts = Counter(answer for answer in read if answer)
    return counts.most_common(1)[0][0] if counts else texts[0]

"""kvpress in an environment of its own: a request in JSON on each line of standard input, an answer on standard output.

Run by the interpreter that `make peers` set up; it imports nothing of Tokenry, and Tokenry never imports it.

load    {"model": folder, "dtype": "bfloat16", "threads": 2}            -> {"versions": {...}}
tokens  {"texts": [...], "special": true}                               -> {"ids": [[...], ...]}
answer  {"press": "SnapKV", "ids": [...], "split": 700, "keep": 175, "new": 12, "stop": [...]}
                                                                        -> {"tokens": [...], "kept": 175}
open    {"press": "SnapKV", "ids": [...], "keep": 512}                  -> {"handle": 0, "seconds": 1.5, "bytes": 1024}
steps   {"handle": 0, "count": 4}                                       -> {"seconds": 0.02, "bytes": 1024}
close   {"handle": 0}                                                   -> {}

The press is applied to `ids[:split]`, which is read in one forward; what follows is read, and answered greedily, with
the positions that it has in the whole text, as kvpress's own pipeline does. Without a press ("none") everything stays.
"""

import contextlib
import importlib.metadata
import json
import sys
import time
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, KeyDiffPress, ObservedAttentionPress, SnapKVPress, TOVAPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "ObservedAttention": ObservedAttentionPress,
    "SnapKV": SnapKVPress,
    "TOVA": TOVAPress,
    "KeyDiff": KeyDiffPress,
    "ExpectedAttention": ExpectedAttentionPress,
}


class Peer:
    """A model, its tokenizer, and the caches that are open."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.open: dict[int, tuple[Any, Any, int, Any]] = {}
        self.handles = 0

    def load(self, model: str, dtype: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.folder, self.dtype = model, getattr(torch, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._model("sdpa")
        return {"versions": {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}}

    def _model(self, attention: str) -> Any:
        if attention not in self.models:
            loaded = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, attn_implementation=attention)
            self.models[attention] = loaded.eval()
        return self.models[attention]

    def tokens(self, texts: list[str], special: bool) -> dict[str, Any]:
        return {"ids": [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]}

    def _read(self, press: str, ids: list[int], keep: int) -> tuple[Any, Any]:
        # ObservedAttention needs the probabilities, which only this implementation gives.
        model = self._model("eager" if press == "ObservedAttention" else "sdpa")
        cache = DynamicCache()
        context = contextlib.nullcontext()
        if press != "none":
            # kvpress keeps int(n * (1 - ratio)); the half keeps that at the wanted number.
            context = PRESSES[press](compression_ratio=1 - (keep + 0.5) / len(ids))(model)
        with context:
            model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
        return model, cache

    def answer(self, press: str, ids: list[int], split: int, keep: int, new: int, stop: list[int]) -> dict[str, Any]:
        model, cache = self._read(press, ids[:split], keep)
        kept = {layer.keys.shape[2] for layer in cache.layers}
        ends = model.generation_config.eos_token_id
        stops = {*stop, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        given, place = ids[split:], split
        tokens: list[int] = []
        while len(tokens) < new:
            positions = torch.arange(place, place + len(given))[None]
            logits = model(
                input_ids=torch.tensor([given]), past_key_values=cache, position_ids=positions, logits_to_keep=1
            ).logits
            place += len(given)
            tokens.append(int(logits[0, -1].argmax()))
            given = tokens[-1:]
            if tokens[-1] in stops:
                break
        return {"tokens": tokens, "kept": max(kept)}

    def open_(self, press: str, ids: list[int], keep: int) -> dict[str, Any]:
        start = time.perf_counter()
        model, cache = self._read(press, ids, keep)
        seconds = time.perf_counter() - start
        handle, self.handles = self.handles, self.handles + 1
        self.open[handle] = (model, cache, len(ids), torch.tensor([ids[-1:]]))
        return {"handle": handle, "seconds": seconds, "bytes": _nbytes(cache)}

    def steps(self, handle: int, count: int) -> dict[str, Any]:
        model, cache, place, token = self.open[handle]
        start = time.perf_counter()
        for _ in range(count):
            logits = model(input_ids=token, past_key_values=cache, position_ids=torch.tensor([[place]])).logits
            token, place = logits[:, -1:].argmax(-1), place + 1
        seconds = time.perf_counter() - start
        self.open[handle] = (model, cache, place, token)
        return {"seconds": seconds, "bytes": _nbytes(cache)}

    def close(self, handle: int) -> dict[str, Any]:
        del self.open[handle]
        return {}


def _nbytes(cache: Any) -> int:
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


@torch.inference_mode()
def main() -> None:
    """Answer requests until standard input ends."""
    # What libraries print would be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            reply = getattr(peer, "open_" if name == "open" else name)(**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()

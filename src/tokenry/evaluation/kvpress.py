"""kvpress as a second process, in the environment that `make peers` sets up: its releases ask for another transformers.

The script that runs there is `kvpress_peer.py`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from tokenry.errors import ResourceError
from tokenry.models import bundled, loaded_name, path

PRESSES = ("ObservedAttention", "SnapKV", "TOVA", "KeyDiff", "ExpectedAttention")
"""The presses of kvpress that are measured."""

_SCRIPT = Path(__file__).with_name("kvpress_peer.py")
_PLACE = Path(".venv-peers", "bin", "python")


def peers_python(given: str | Path | None = None) -> Path:
    """The interpreter of the peers' environment: the one given, or that of `make peers` here or in the checkout.

    Raises:
        ResourceError: There is none.
    """
    places = [Path(given)] if given else [Path.cwd() / _PLACE, Path(__file__).resolve().parents[3] / _PLACE]
    for place in places:
        if place.is_file():
            return place
    if given:
        raise ResourceError(f"no interpreter at {str(given)!r}; name the python of an environment with kvpress")
    raise ResourceError("kvpress is not set up; run `make peers` in a checkout")


class KVPress:
    """A process that runs kvpress on a model, to be used as a context manager.

    Args:
        model: A causal model; kvpress reads its weights from the folder it was loaded from, or from a temporary copy.
        python: Interpreter of the peers' environment.
        tokenizer: Saved beside the weights where a copy is made.

    Raises:
        ResourceError: The process does not start, or cannot load the model.
    """

    def __init__(self, model: Any, python: Path, tokenizer: Any) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        name = loaded_name(model)
        if name in bundled():
            folder = str(path(name))
        elif name and Path(name).is_dir():
            folder = name
        else:
            self._copy = tempfile.TemporaryDirectory()
            folder = self._copy.name
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        try:
            # -P: modules beside the script, this one among them, must not hide those of the environment.
            self._process = subprocess.Popen(
                [str(python), "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            raise ResourceError(f"{python} does not start: {error}") from error
        dtype = str(model.dtype).removeprefix("torch.")
        try:
            loaded = self.ask("load", model=str(Path(folder).resolve()), dtype=dtype, threads=torch.get_num_threads())
        except ResourceError:
            self.close()
            raise
        self.versions: dict[str, str] = loaded["versions"]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            ResourceError: kvpress failed, or its process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().split("\n")
            raise ResourceError(f"kvpress's process has ended: {said[-1] or 'it said nothing'}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ResourceError(f"kvpress failed: {' '.join(reply['error'].split())}")
        return reply

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        if self._copy is not None:
            self._copy.cleanup()

    def __enter__(self) -> KVPress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

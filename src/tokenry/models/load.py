"""Models by name: the bundled ones, folders, hub ids, loaded ones."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tokenry.errors import MissingTokenizer, ResourceError

_BUNDLED = Path(__file__).parent / "bundled"
# A tokenizer with fewer ids than this share of the model's is one that transformers made up; paddings are far smaller.
_LEAST_IDS = 0.1
# One of them lies in every folder with a tokenizer; without, transformers makes up an empty one for some models.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "spiece*", "*.model", "*.tiktoken")


def bundled() -> list[str]:
    """Names of the bundled models."""
    return sorted(f"tokenry/{folder.name}" for folder in _BUNDLED.glob("*") if (folder / "config.json").is_file())


def path(name: str) -> Path:
    """The folder of a bundled model.

    Raises:
        ResourceError: No bundled model has that name.
    """
    folder = _BUNDLED / name.removeprefix("tokenry/")
    if not name.startswith("tokenry/") or not (folder / "config.json").is_file():
        raise ResourceError(f"no bundled model {name!r}: there are {', '.join(bundled()) or 'none'}")
    return folder


def _locate(name: str | Path) -> str:
    """Bundled names win over hub ids; anything else is left to transformers."""
    name = os.path.expanduser(name)
    return str(path(name)) if name.startswith("tokenry/") else name


def load(
    name: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal model and its tokenizer, the model in evaluation mode.

    Args:
        name: A bundled name such as ``tokenry/code``, a folder, a hub id, or a loaded model. A folder whose name looks
            like a bundled one is written with ``./``.
        dtype: As ``from_pretrained`` takes it; None: the dtype of the weights.
        device: Where the model goes; None: the CPU.
        attn_implementation: As ``from_pretrained`` takes it.
        revision: Revision of a hub id.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ResourceError: There is no such bundled model or folder.
        MissingTokenizer: The model comes without a tokenizer.
    """
    if isinstance(name, PreTrainedModel):
        if not name.name_or_path:
            raise MissingTokenizer(
                f"this {type(name).__name__} was not loaded from a folder, so its tokenizer is not known: hand over "
                "the tokenizer yourself, as in tokenry.generate(model, tokenizer, ...), or save both into one folder "
                "with save_pretrained and load that"
            )
        return name, _fitting(_tokenizer(str(name.name_or_path), revision, trust_remote_code), name)
    where = _locate(name)
    if where.startswith((".", "/")) and not (Path(where) / "config.json").is_file():
        raise ResourceError(f"no model in {where!r}: the folder has no config.json")
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    # The tokenizer first: a folder without one is refused before its weights are read.
    tokenizer = _tokenizer(where, revision, trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype or "auto", revision=revision, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        raise ResourceError(f"cannot load a causal model from {str(name)!r}: {_first_line(error)}") from error
    tokenizer = _fitting(tokenizer, model)
    model.to(torch.device(device or "cpu"))  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _tokenizer(where: str, revision: str | None, trust_remote_code: bool) -> Any:
    folder = Path(where)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise MissingTokenizer(
            f"{where!r} has no tokenizer: save one into the folder with tokenizer.save_pretrained(folder)"
        )
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if not Path(where).is_dir():
            raise ResourceError(f"cannot load {where!r}: {_first_line(error)}") from error
        raise MissingTokenizer(
            f"{where!r} has no tokenizer that loads ({_first_line(error)}): save one into the folder with "
            "tokenizer.save_pretrained(folder)"
        ) from error


def _fitting(tokenizer: Any, model: PreTrainedModel) -> Any:
    """The tokenizer, unless it is the empty one that transformers makes up where files are missing."""
    embeddings: Any = model.get_input_embeddings()
    ids = embeddings.weight.shape[0]
    if len(tokenizer) < _LEAST_IDS * ids:
        raise MissingTokenizer(
            f"{str(model.name_or_path)!r} has no tokenizer of its own: what loads has {len(tokenizer)} ids and the "
            f"model {ids}; save the model's tokenizer into the folder with tokenizer.save_pretrained(folder)"
        )
    return tokenizer


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


@functools.lru_cache(maxsize=8)
def _shared(where: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    return load(where, dtype=dtype, device=device)[0]


def resource(name: str | Path | PreTrainedModel, beside: PreTrainedModel) -> PreTrainedModel:
    """A second model in the dtype and on the device of ``beside``, loaded once for each path, dtype and device."""
    if isinstance(name, PreTrainedModel):
        return name
    return _shared(_locate(name), beside.dtype, beside.device)


def loaded_name(model: PreTrainedModel) -> str:
    """The name a model was loaded by: its bundled name, path or id; empty if it has none."""
    place = str(getattr(model, "name_or_path", "") or "")
    return next((name for name in bundled() if str(path(name)) == place), place)


def trained_folder(name: str, model: str) -> Path:
    """Where `tokenry train NAME` writes for a model unless it is told: in the user's cache folder."""
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    readable = "".join(c if c.isalnum() or c in "._-" else "-" for c in model.strip("./~")).strip("-") or "model"
    return home / "tokenry" / name / readable


def weights_hash(model: PreTrainedModel) -> str:
    """Twelve hexadecimal digits that change with any weight of the model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]

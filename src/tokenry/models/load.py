"""Models by name: the bundled ones, folders, hub ids, loaded ones."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tokenry.errors import MissingTokenizer, ResourceError

_BUNDLED = Path(__file__).parent / "bundled"
# A tokenizer with fewer ids than this share of the model's is one that transformers made up; paddings are far smaller.
_LEAST_IDS = 0.1
# One of them lies in every folder with a tokenizer; without, transformers makes up an empty one for some models.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "spiece*", "*.model", "*.tiktoken")
# Seconds that the hub may take to say whether it has a model; transformers alone would retry for minutes.
_HUB_SECONDS = 5.0


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

    The hub is asked once whether it has an id, without retries; where it does not answer, a copy that was downloaded
    before serves.

    Raises:
        ResourceError: There is no such bundled model, folder or hub id, or what is there does not load.
        MissingTokenizer: The model comes without a tokenizer.
    """
    if isinstance(name, PreTrainedModel):
        if not name.name_or_path:
            raise MissingTokenizer(
                f"this {type(name).__name__} was not loaded from a folder, so its tokenizer is not known: hand over "
                "the tokenizer yourself, as in tokenry.generate(model, tokenizer, ...), or save both into one folder "
                "with save_pretrained and load that"
            )
        place = str(name.name_or_path)
        hub = {} if Path(place).is_dir() else _ask_hub(place, revision)
        return name, _fitting(_tokenizer(place, revision, trust_remote_code, hub), name)
    where = _locate(name)
    local = _is_local(where, isinstance(name, Path))
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    # The tokenizer first: a folder without one is refused before its weights are read.
    hub = {} if local else _ask_hub(where, revision)
    tokenizer = _tokenizer(where, revision, trust_remote_code, hub)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype or "auto", revision=revision, trust_remote_code=trust_remote_code, **hub, **options
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ResourceError(f"cannot load a causal model from {str(name)!r}: {_first_line(error)}") from error
    tokenizer = _fitting(tokenizer, model)
    model.to(torch.device(device or "cpu"))  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _is_local(where: str, folder: bool) -> bool:
    """Whether a name is a folder with a model; raise where it can be nothing else and is none.

    Args:
        where: A path or a hub id.
        folder: Whether it is known to be a path.
    """
    place = Path(where)
    try:
        if (place / "config.json").is_file():
            # Otherwise the tokenizer, which reads it first, would be blamed.
            json.loads((place / "config.json").read_text(encoding="utf-8"))
            return True
        inside, file = place.is_dir(), place.is_file()
    except OSError as error:  # no permission, or a name too long
        raise ResourceError(f"the model {where!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ResourceError(f"the config.json of {where!r} is not JSON: {error}") from error
    if file:
        raise ResourceError(f"{where!r} is a file: give the folder that holds the model's config.json")
    if folder or inside or where.startswith((".", "/")) or not where:
        why = "the folder has no config.json" if inside and where else "there is no such folder"
        raise ResourceError(f"no model in {where!r}: {why}; give a bundled name ({', '.join(bundled())}) or a folder")
    return False


def _ask_hub(name: str, revision: str | None) -> dict[str, Any]:
    """What ``from_pretrained`` is to be told about a hub id, which the hub is asked for once."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        raise ResourceError(_unknown(name, "nor can it be a hub id")) from None
    cause: Exception
    try:
        HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS)
        return {}
    except GatedRepoError:
        return {}  # transformers says how to get access
    except RevisionNotFoundError as error:
        raise ResourceError(f"the hub's {name!r} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        fault, cause = "and the hub has none of that name (a private one needs a login)", error
    except Exception as error:  # whatever keeps a client from an answer: no network, a proxy, offline mode
        fault, cause = f"and the hub does not answer ({_first_line(error)})", error
    if cached:
        return {"local_files_only": True}
    raise ResourceError(_unknown(name, fault)) from cause


def _unknown(name: str, fault: str) -> str:
    names = {short: full for full in bundled() for short in (full, full.removeprefix("tokenry/"))}
    near = difflib.get_close_matches(name.lower(), names, n=1)
    guess = f" (did you mean {names[near[0]]}?)" if near else ""
    return (
        f"no model {name!r}{guess}: it is no folder and no bundled model ({', '.join(bundled()) or 'there are none'}), "
        f"{fault}; give a bundled name, a folder such as ./my-model, or a hub id such as owner/name"
    )


def _tokenizer(where: str, revision: str | None, trust_remote_code: bool, hub: dict[str, Any]) -> Any:
    folder = Path(where)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise MissingTokenizer(
            f"{where!r} has no tokenizer: save one into the folder with tokenizer.save_pretrained(folder)"
        )
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code, **hub)
    except Exception as error:  # tokenizers raises nothing more special for a broken file
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


@functools.lru_cache(maxsize=8)
def _shared_tokenizer(where: str) -> Any:
    try:
        return _tokenizer(where, None, False, {})
    except MissingTokenizer:
        return None


def own_tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer in the folder that a model was loaded from; None where it came from elsewhere or has none."""
    place = str(getattr(model, "name_or_path", "") or "")
    return _shared_tokenizer(place) if place and Path(place).is_dir() else None


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

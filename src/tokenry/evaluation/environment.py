"""What a measurement was made on: machine, package versions, model."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from tokenry.models import context_length, loaded_name, weights_hash

_PACKAGES = ("tokenry", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the processor, its cores, torch's threads, the accelerator in use and the system."""
    found = {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "mps":
        found["accelerator"] = "Apple GPU"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "tokenry":  # run from a checkout that is not installed
                from tokenry import __version__

                found[name] = __version__
    return found


def model_name(model: Any) -> str:
    """Return the name a model was loaded by: its bundled name, path or id; its class if it has none."""
    return loaded_name(model) or type(model).__name__


def describe_model(model: Any) -> dict[str, Any]:
    """Return what identifies a model and decides its speed."""
    return {
        "name": model_name(model),
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "context": context_length(model),
        "weights_hash": weights_hash(model),
    }

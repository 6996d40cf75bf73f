"""The wheel, installed outside the checkout, carries the bundled pair and runs without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenry.models import bundled

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 40e6, "the pair is at most 40 MB"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def _python(site: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    # -P keeps the working directory off the path; the package must come from the wheel.
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=site.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pair_loads_from_the_wheel(site):
    assert set(bundled()) >= {"tokenry/code", "tokenry/code-draft"}
    code = f"""
import tokenry
assert tokenry.__file__.startswith({str(site)!r}), tokenry.__file__
for name in ("tokenry/code", "tokenry/code-draft"):
    model, tokenizer = tokenry.load(name)
    result = tokenry.generate(model, tokenizer, "def add(a, b):", method="token-recycling", max_new_tokens=4)
    assert result.new_tokens[0] and (tokenry.path(name) / "README.md").is_file()
    print(name)
"""
    assert _python(site, "-c", code).split() == ["tokenry/code", "tokenry/code-draft"]


def test_the_command_runs_from_the_wheel(site):
    assert "token-recycling" in _python(site, "-m", "tokenry", "methods")

"""A package outside the repository adds a drafter and a cache policy by entry points; both pass the contracts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SOURCE = '''
from dataclasses import dataclass

import torch

from tokenry.kvcache import CachePolicy
from tokenry.speculation import Drafter, DraftTree, TreeShape


@dataclass(frozen=True, kw_only=True)
class Repeat(Drafter):
    """Draft the last token again and again."""

    tokens: int = 3

    def propose(self, session, state, room):
        count = min(self.tokens, room) + 1
        return DraftTree(session.anchor[:, None].repeat(1, count), TreeShape.chain(count, session.device))


@dataclass(frozen=True, kw_only=True)
class Stride(CachePolicy):
    """Keep the newest token and every other one, the latest first."""

    def protected(self):
        return 1

    def score(self, layer):
        _, positions = layer.slots.materialise(layer.cache.batch, layer.device)
        newest = layer.cache.seen_after[:, None, None] - 1
        return (positions - 1000 * (positions % 2)).float().masked_fill(positions == newest, float("inf"))
'''


@pytest.fixture
def package(tmp_path):
    (tmp_path / "elsewhere.py").write_text(SOURCE)
    about = tmp_path / "elsewhere-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[tokenry.methods]\nrepeat = elsewhere:Repeat\nstride = elsewhere:Stride\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def _run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_both_are_listed(package):
    listed = _run(["tokenry", "methods"], package)
    assert listed.returncode == 0, listed.stderr
    assert "repeat" in listed.stdout and "stride" in listed.stdout


def test_both_pass_the_contracts(package):
    others = ("gpt_neox", "gpt2", "opt", "gemma", "qwen3", "mistral")
    selected = " and not ".join(["(repeat or stride)", *others])
    # With -rA every test that passed is named.
    ran = _run(["pytest", "tests/contracts", "-k", selected, "-p", "no:cacheprovider", "-rA"], package)
    assert ran.returncode == 0, ran.stdout[-3000:]
    for contract in (
        "test_greedy_is_transformers_greedy_for_a_padded_batch[repeat-llama]",
        "test_budget_above_the_length_is_plain[stride-llama]",
        "test_a_drafter_inside_equals_the_policy_alone[stride-defaults-repeat-llama-(60, 47)]",
        "test_a_drafter_inside_equals_the_policy_alone[h2o-defaults-repeat-llama-(60,)]",
    ):
        assert contract in ran.stdout

"""The examples run as they are, from any folder."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import grip_env
from tests.fakes import FakeTask, FakeVLM

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(tmp_path: Path, name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_quickstart_plays_an_episode_and_draws_it(tmp_path: Path) -> None:
    out = run(tmp_path, "quickstart.py")
    assert "144 visual tokens and may keep 14" in out
    assert re.search(r"question: .+\?", out)
    assert re.search(r"reward: -?\d+\.\d+, answered correctly: (True|False)", out)
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.png"]
    assert np.asarray(Image.open(tmp_path / "quickstart.png")).std() > 10


@pytest.mark.slow
def test_own_policy_trains_and_is_compared(tmp_path: Path) -> None:
    out = run(tmp_path, "own_policy.py", "2")
    assert re.search(r"^step 0: reward -?\d+\.\d+$", out, re.MULTILINE)
    for method in ("my policy", "random", "oracle", "all tokens"):
        assert re.search(rf"^\| {method} \|( -?\d+\.\d+ \|){{3}}$", out, re.MULTILINE)
    assert "96 examples of the validation split" in out


@pytest.mark.slow
def test_ppo_in_a_single_file_trains_and_is_compared(tmp_path: Path) -> None:
    small = ["--iterations", "2", "--num-envs", "4", "--num-steps", "3", "--budget", "0.02", "--examples", "6"]
    out = run(tmp_path, "ppo_single_file.py", *small)
    for iteration in (0, 1):
        line = rf"^iteration {iteration}: log-likelihood -\d+\.\d+, accuracy [01]\.\d+, entropy 4\.\d+, "
        assert re.search(line, out, re.MULTILINE), "at first, any of 144 tokens is nearly as likely as another"
    for method in ("PPO", "random", "oracle", "all tokens"):
        assert len(re.findall(rf"^\| {method} \| -?\d+\.\d+ \|$", out, re.MULTILINE)) == 2
    assert "6 examples of the validation split" in out


def test_ppo_in_a_single_file_learns_where_a_step_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grip_env, "load_vlm", lambda name: FakeVLM())
    monkeypatch.setattr(grip_env, "SceneTask", FakeTask)

    def train(budget: float) -> dict[str, float]:
        options = {"budget": budget, "num-envs": 32, "num-steps": 4, "iterations": 9, "examples": 10}
        monkeypatch.setattr(sys, "argv", ["ppo", *(f"--{name}={value}" for name, value in options.items())])
        runpy.run_path(str(EXAMPLES / "ppo_single_file.py"))
        found = re.findall(r"^\| ([\w ]+) \| (-?\d+\.\d+) \|$", capsys.readouterr().out, re.MULTILINE)
        return {name: float(value) for name, value in found[:4]}  # log-likelihoods

    one = train(1 / 16)
    assert one["PPO"] == pytest.approx(one["oracle"], abs=0.02), "the coloured cell, in each of ten pictures"
    two = train(2 / 16)
    assert two["PPO"] > two["random"] + 0.35

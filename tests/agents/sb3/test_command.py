"""The algorithms of Stable-Baselines3 from the command line, with a random model and settings that take seconds."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from grip_env import evaluate
from grip_env.train import parse, train


def arguments(vlm: Path, runs: Path, name: str, *more: str) -> list[str]:
    sizes = {"steps": 2, "num-envs": 4, "n-steps": 2, "examples": 8, "warmup-steps": 2, "instances": 4, "pool": 6}
    sizes |= {"max-budget": 0.05} | ({} if name == "a2c" else {"batch-size": 4})
    tiny = [part for key, value in sizes.items() for part in (f"--{name}.{key}", str(value))]
    common = ["--algo", name, "--vlm", str(vlm), "--runs", str(runs), "--name", name, "--no-progress"]
    return [*common, "--examples", "0", "--device", "cpu", *tiny, *more]


@pytest.mark.parametrize("name", ["ppo", "a2c", "maskable-ppo"])
def test_train_and_evaluate_know_them_by_name(name: str, vlm_folder: Path, tmp_path: Path) -> None:
    more = {"ppo": ["--ppo.action-mode", "scores"], "maskable-ppo": ["--maskable-ppo.steps", "4"]}.get(name, [])
    run = train(parse(arguments(vlm_folder, tmp_path, name, *more)))
    with (run / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows][-1] == (3 if name == "maskable-ppo" else 1)
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    saved = json.loads((run / "config.json").read_text())["config"]
    assert saved[name.replace("-", "_")]["num_envs"] == 4
    files = {path.name for path in (run / "agent").iterdir()}
    assert files == {"scorer.json", "scorer.safetensors", "training.safetensors"}
    if name == "a2c":
        return  # which has nothing that ppo has not
    comparison = evaluate.evaluate(evaluate.Config((run,), examples=6, budgets=(0.05,), device="cpu", progress=False))
    assert {"this agent", "its warm-up", "random"} <= set(comparison.cells)
    assert (run / "test-6" / "report.json").is_file()


def test_faults_are_said_in_one_line_and_leave_no_folder(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, more, message in (
        ("ppo", ["--ppo.batch-size", "3"], "batch_size must divide num_envs * n_steps = 4 * 2 = 8; got 3"),
        ("maskable-ppo", [], "pip install 'grip-env[contrib]'"),
    ):
        if name == "maskable-ppo":
            monkeypatch.setitem(sys.modules, "sb3_contrib", None)
        with pytest.raises(SystemExit) as stop:
            train(parse(arguments(vlm_folder, tmp_path, name, *more)))
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1
        assert message in said
        assert not (tmp_path / name).exists()


def test_an_example_without_room_stops_with_one_line_and_leaves_the_agent(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train(parse(arguments(vlm_folder, tmp_path, "ppo", "--ppo.max-question-tokens", "1")))
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: stopped in warmup at step 1: example ")
    assert "pass max_question_tokens=" in said
    assert (tmp_path / "ppo" / "agent" / "scorer.safetensors").is_file()

"""Runs that were killed go on with --resume, and end as runs that were not."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.agent import ScorerAgent
from grip_env.common.errors import CommandError
from grip_env.run_folder.config import Config
from grip_env.train import parse, train

OPTIONS = [
    *("--algo", "grpo", "--threads", "1", "--examples", "6", "--picture-every", "2", "--no-progress"),
    *("--grpo.steps", "6", "--grpo.warmup-steps", "3", "--grpo.pool", "12", "--grpo.instances", "4"),
    *("--grpo.candidates", "1", "--grpo.group", "2", "--grpo.reuse", "2"),
]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "agent" / "scorer.safetensors").read_bytes()).hexdigest()


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), {"scalars": 0, "images": 0})
    events.Reload()
    found = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    found = {tag: points for tag, points in found.items() if "seconds" not in tag}
    return found | {tag: [(picture.step, 0.0) for picture in events.Images(tag)] for tag in events.Tags()["images"]}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


@pytest.fixture(scope="module")
def whole(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("whole")
    return train(parse([*OPTIONS, "--vlm", str(vlm_folder), "--runs", str(runs), "--name", "run"]))


KILLED = """
import os, sys
from grip_env.reports.live_run import LiveRun
from grip_env.train import main

steps = int(sys.argv.pop(1))
log = LiveRun.learn

def until(self, shown):
    inner = self.agent.learn()
    def some():
        for number, metrics in enumerate(inner, 1):
            yield metrics
            if number == steps:
                os._exit(9)
    self.agent.learn = some
    log(self, shown)

LiveRun.learn = until
main()
"""


def killed(vlm: Path, runs: Path, steps: int) -> Path:
    """Return a run that was killed after some steps, without a chance to save anything."""
    command = [*OPTIONS, "--vlm", str(vlm), "--runs", str(runs), "--name", "run"]
    said = subprocess.run([sys.executable, "-c", KILLED, str(steps), *command], capture_output=True, timeout=300)
    assert said.returncode == 9, said.stderr
    return runs / "run"


@pytest.mark.parametrize("steps", [3, 5, 6, 9])
def test_a_killed_run_goes_on_bit_for_bit(
    whole: Path, vlm_folder: Path, steps: int, tmp_path: Path, capsys: Any
) -> None:
    run = killed(vlm_folder, tmp_path, steps)
    assert json.loads((run / "status.json").read_text())["state"] == "running"
    train(parse(["--resume", str(run)]))
    assert "resumed at" in capsys.readouterr().out
    assert json.loads((run / "status.json").read_text()) == json.loads((whole / "status.json").read_text())
    assert digest(run) == digest(whole)
    for name in ("warmup.csv", "grpo.csv"):
        assert table(run / name) == table(whole / name)
    assert curves(run) == curves(whole)
    cells = [json.loads((folder / "report.json").read_text())["cells"] for folder in (run, whole)]
    assert cells[0]["this agent"] == cells[1]["this agent"]
    config = json.loads((run / "config.json").read_text())
    assert config["config"] | {"runs": ""} == json.loads((whole / "config.json").read_text())["config"] | {"runs": ""}
    assert len(config["resumed"]) == 1
    assert len(list((run / "snapshots").iterdir())) == 2


def test_a_finished_run_takes_more_steps(whole: Path, vlm_folder: Path, tmp_path: Path) -> None:
    run = train(parse([*OPTIONS, "--vlm", str(vlm_folder), "--runs", str(tmp_path), "--name", "run"]))
    train(parse(["--resume", str(run), "--grpo.steps", "8", "--examples", "0"]))
    assert [int(row["step"]) for row in table(run / "grpo.csv")] == list(range(8))
    assert table(run / "grpo.csv")[:6] == table(whole / "grpo.csv")
    assert json.loads((run / "config.json").read_text())["config"]["grpo"]["steps"] == 8
    # the newest snapshot is damaged: the one before is used, and steps are taken again
    newest = max((run / "snapshots").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    before = digest(run)
    train(parse(["--resume", str(run), "--examples", "0"]))
    assert digest(run) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], "--seed is 0 in .*, and cannot become 1: leave it out, or train anew"),
        (["--grpo.learning-rate", "1"], r"--grpo\.learning-rate is .* cannot become 1"),
        (["--grpo.steps", "2"], r"--grpo\.steps is 6 in .* cannot become 2"),
        (["--seed", "2", "--reward", "agreement"], r"--reward is log_likelihood .* \(and 1 more\)"),
        (["--algo", "rloo"], "--algo is grpo in .* cannot become rloo"),
    ],
)
def test_changed_settings_are_refused_by_name(whole: Path, more: list[str], message: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(CommandError, match=message):
        parse(["--resume", str(whole), *more])
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_folders_that_cannot_be_resumed_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--resume: .* is not a run: expected a folder with config\.json"):
        parse(["--resume", str(tmp_path)])
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    shutil.rmtree(other / "snapshots")
    with pytest.raises(CommandError, match=r"there is no snapshot in .*other to resume from: train anew"):
        train(parse(["--resume", str(other)]))
    shutil.copytree(whole / "snapshots", other / "snapshots")
    config = json.loads((other / "config.json").read_text())
    config["vlm"]["checksum"] = "0" * len(config["vlm"]["checksum"])
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CommandError, match=r"the vision-language model is not the one that .* was trained on"):
        train(parse(["--resume", str(other)]))


@pytest.mark.parametrize("key", ["algo", "reward"])
def test_code_that_a_run_names_runs_only_if_it_is_named_again(
    whole: Path, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's files may come from anyone."""
    (tmp_path / f"theirs_{key}.py").write_text("open('ran', 'w').close()\n\ndef reward(scores, full):\n    return 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(whole, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["config"][key] = f"theirs_{key}:reward"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for named in ((), (f"--{key}", "other:thing")):
        with pytest.raises(
            CommandError, match=f"needs the code of .* if you trust it, give --{key} theirs_{key}:reward"
        ):
            parse(["--resume", "other", *named])
        assert not (tmp_path / "ran").exists()
    with contextlib.suppress(CommandError):  # a function is no algorithm, as its import shows
        train(parse(["--resume", "other", f"--{key}", f"theirs_{key}:reward", "--examples", "0"]))
    assert (tmp_path / "ran").exists()


def test_python_is_held_to_the_run_as_the_command_is(whole: Path) -> None:
    with pytest.raises(CommandError, match=r"--seed is 0 in .*, and cannot become 1"):
        train(dataclasses.replace(parse(["--resume", str(whole)]), seed=1))
    with pytest.raises(CommandError, match="cannot become"):
        train(Config(resume=whole))


def test_a_snapshot_that_cannot_be_restored_leaves_the_run_as_it_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(ScorerAgent, "restore", lambda self, snapshot: snapshot.part("nothing"))
    with pytest.raises(
        CommandError, match=r"the snapshot in .* cannot be restored \(KeyError: 'nothing'\): train anew"
    ):
        train(parse(["--resume", str(run)]))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_rows_that_were_cut_are_left_out(whole: Path, vlm_folder: Path, tmp_path: Path) -> None:
    run = killed(vlm_folder, tmp_path, 6)
    with (run / "grpo.csv").open("a") as file:
        file.write("4,0.12\n5,0.")
    train(parse(["--resume", str(run), "--examples", "0"]))
    assert table(run / "grpo.csv") == table(whole / "grpo.csv")


@pytest.mark.slow
def test_as_a_user_types_it(vlm_folder: Path, tmp_path: Path) -> None:
    run = killed(vlm_folder, tmp_path, 5)
    said = subprocess.run(
        [sys.executable, "-m", "grip_env.train", "--resume", str(run), "--no-progress"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert "resumed at step 2 of 6 of grpo" in said.stdout

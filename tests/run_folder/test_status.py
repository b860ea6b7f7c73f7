"""What commands make of runs that have not finished, and of run folders with damage."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agents.grpo import GRPOConfig
from agents.pruner import Pruner
from agents.scorer import Scorer
from grip_env import cli, evaluate, probe
from grip_env.common import stopping
from grip_env.common.errors import CommandError
from grip_env.reports import plots
from grip_env.reports.comparison import Comparison
from grip_env.reports.saved_runs import load_run, read_log
from grip_env.run_folder import folder as run_folder
from grip_env.run_folder.config import Config
from grip_env.run_folder.status import RunStatus, read_status, unfinished
from grip_env.train import train


@pytest.fixture(scope="module", autouse=True)
def no_galleries() -> Iterator[None]:
    """They take most of the time, and nothing here looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_gallery", lambda *_, **__: np.zeros((8, 8, 3), np.uint8))
        yield


@pytest.fixture(scope="module")
def done(no_galleries: None, vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = GRPOConfig(steps=2, instances=4, candidates=1, group=2, warmup_steps=1, pool=4)
    return train(
        Config(
            vlm=str(vlm_folder), runs=tmp_path_factory.mktemp("runs"), name="done", progress=False,
            options=options, examples=0,
        )
    )  # fmt: skip


def stopped(done: Path, folder: Path, status: RunStatus) -> Path:
    shutil.copytree(done, folder)
    status.write(folder)
    return folder


KILLED = RunStatus("running", "grpo", 1, 2)
CUT = RunStatus("interrupted", "grpo", 1, 2, "SIGINT")
FAILED = RunStatus("failed", "warmup", 1, 1, "ValueError: mine")
UNTRAINED = RunStatus("running")


@pytest.mark.parametrize(
    ("status", "mark", "note"),
    [
        (RunStatus("done", "grpo", 2, 2), "", None),
        (KILLED, "unfinished at step 1 of 2 of grpo", "it has not finished: it is still training, or was killed; its "),
        (CUT, "interrupted at step 1 of 2 of grpo", "it was interrupted (SIGINT); its agent is that of step 1 of 2"),
        (FAILED, "failed at step 1 of 1 of the warm-up", "it failed (ValueError: mine); its agent is that of step 1"),
        (UNTRAINED, "unfinished, untrained", "it is still training, or was killed; its agent is untrained"),
        (RunStatus("interrupted"), "interrupted, untrained", "it was interrupted; its agent is untrained"),
    ],
)
def test_states_are_written_read_and_told(tmp_path: Path, status: RunStatus, mark: str, note: str | None) -> None:
    status.write(tmp_path)
    assert read_status(tmp_path) == status
    assert status.mark == mark
    (tmp_path / "agent").mkdir()
    for folder in (tmp_path, tmp_path / "agent"):
        told = unfinished(folder)
        assert told is None if note is None else told is not None and note in told and str(tmp_path) in told


def test_a_finished_run_says_so_and_one_from_before_there_were_states_says_nothing(done: Path, tmp_path: Path) -> None:
    assert read_status(done) == RunStatus("done", "grpo", 2, 2)
    old = tmp_path / "old"
    shutil.copytree(done, old)
    (old / "status.json").unlink()
    assert load_run(old).mark == ""
    assert load_run(old).label == load_run(done).label
    assert load_run(old).training_cost() == load_run(done).training_cost() is not None
    assert unfinished(old) is None


def test_one_run_that_was_killed_is_marked_in_the_tables(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = stopped(done, tmp_path / "killed", KILLED)
    found = evaluate.evaluate(evaluate.Config((killed,), examples=2, budgets=(0.1,), progress=False))
    name = "this agent (unfinished at step 1 of 2 of grpo)"
    assert name in found.cells
    shown = capsys.readouterr()
    assert f"| {name} |" in shown.out
    assert "closed by this agent" in shown.out
    assert f"note: about {killed}: it has not finished" in shown.err
    assert name in json.loads((killed / "test-2" / "report.json").read_text())["cells"]


def test_several_runs_tell_the_finished_from_the_others_and_what_their_training_took(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = stopped(done, tmp_path / "killed", KILLED)
    config = json.loads((killed / "config.json").read_text())
    config["config"]["seed"] = 1  # without its state it would pass for one more seed
    (killed / "config.json").write_text(json.dumps(config))
    silent = tmp_path / "silent"  # as of an agent that logs neither seconds nor forwards
    shutil.copytree(done, silent)
    for log in silent.glob("*.csv"):
        log.write_text("step,reward\n0,1\n")
    found = evaluate.evaluate(
        evaluate.Config((done, killed, silent), "random", examples=2, budgets=(0.1,), progress=False)
    )
    marked = "grpo (unfinished at step 1 of 2 of grpo)"
    assert list(found.training) == ["grpo", marked, "grpo [silent]"]
    assert found.training["grpo"]["seconds"] > 0
    assert found.training[marked] == found.training["grpo [silent]"] == {}
    shown = capsys.readouterr().out
    assert f"| {marked} | - | - |" in shown
    assert "| grpo [silent] | - | - |" in shown
    assert "-: not known, as the training has not finished, or its log has no seconds and forwards." in shown


def test_answering_with_an_agent_that_was_interrupted_warns(
    done: Path, tmp_path: Path, vlm_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = stopped(done, tmp_path / "cut", CUT)
    with pytest.warns(UserWarning, match=r"it was interrupted \(SIGINT\); its agent is that of step 1 of 2 of grpo"):
        Pruner.load(vlm_folder, cut / "agent")
    monkeypatch.setattr(sys, "argv", ["probe", "--vlm", str(vlm_folder), str(cut), "--examples", "2", "--no-progress"])
    with pytest.raises(SystemExit) as end:
        probe.main()
    assert end.value.code == 1  # two steps of training do not lose by being misled
    assert f"note: about {cut}: it was interrupted" in capsys.readouterr().err


def test_rows_that_are_cut_or_damaged_are_left_out(done: Path, tmp_path: Path) -> None:
    log = tmp_path / "grpo.csv"
    log.write_text("step,seconds,forwards\r\n0,0.5,100\r\n1,0.25,200\r\n2,0.5,30")
    assert read_log(log) == [
        {"step": 0, "seconds": 0.5, "forwards": 100},
        {"step": 1, "seconds": 0.25, "forwards": 200},
    ]
    log.write_bytes(b"step,seconds,forwards\n0,0.5,100\n1,0.\xff25,200\n2,0.5\n3,a,b\n4\x00,1,300\n5,1,400,7\n")
    assert read_log(log) == [
        {"step": 0, "seconds": 0.5, "forwards": 100},
        {"step": 4, "seconds": 1, "forwards": 300},
    ]
    assert read_log(tmp_path / "none.csv") == []
    run = tmp_path / "run"
    shutil.copytree(done, run)
    whole = load_run(run).training_cost()
    with (run / "grpo.csv").open("a") as file:
        file.write("2,0.1")
    assert load_run(run).training_cost() == whole


def test_an_interrupt_after_the_files_were_written_does_not_say_that_nothing_was(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Comparison.save

    def interrupted(self: Comparison, folder: Path) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)
        save(self, folder)

    monkeypatch.setattr(Comparison, "save", interrupted)
    monkeypatch.setattr(
        sys, "argv", ["evaluate", str(done), "--examples", "2", "--budgets", "0.1", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 143
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md", "report.json", "report.safetensors", "pareto.png", "kept_tokens.png",
    }  # fmt: skip
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"interrupted; {tmp_path / 'out' / 'report.md'}, ")
    assert said.endswith("kept_tokens.png had been written.")


def test_a_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, cli.writing(tmp_path / "report.md"):
        raise OSError(28, "No space left on device")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: cannot write {tmp_path / 'report.md'}: No space left on device\n"
    stopping.check()


def short(vlm: Path, runs: Path, reward: str = "log_likelihood") -> Config:
    """Return the configuration of a training that takes a second."""
    options = GRPOConfig(steps=3, instances=4, candidates=1, group=2, warmup_steps=1, pool=4)
    return Config(
        vlm=str(vlm), runs=runs, name="run", progress=False, options=options, examples=0, picture_every=1, reward=reward
    )


@pytest.mark.parametrize("room", [True, False], ids=["room elsewhere", "no room anywhere"])
def test_a_disk_that_fills_up_leaves_a_status_and_no_half_agent(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: bool
) -> None:
    replace, saves = run_folder.replace_folder, [0]

    def full(new: Path, folder: Path) -> None:
        saves[0] += folder.parent == tmp_path / "run"
        if saves[0] > 4 and folder.parent == tmp_path / "run":
            raise OSError(28, "No space left on device")
        replace(new, folder)

    def spare(prefix: str) -> str:
        if not room:
            raise FileNotFoundError(2, "No usable temporary directory found")
        (tmp_path / "spare").mkdir()
        return str(tmp_path / "spare")

    monkeypatch.setattr(run_folder, "replace_folder", full)
    monkeypatch.setattr(tempfile, "mkdtemp", spare)
    with pytest.raises(SystemExit) as stop:
        train(short(vlm_folder, tmp_path))
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "stopped in grpo at step" in said
    found = read_status(tmp_path / "run")
    assert found is not None
    assert (found.state, found.phase, found.step) == ("failed", "grpo", 1)
    assert found.reason == "OSError: [Errno 28] No space left on device"
    assert not (tmp_path / "run" / "agent.new").exists()
    Scorer.load(tmp_path / "run" / "agent")
    if room:
        assert f"the agent so far is saved in {tmp_path / 'spare'}" in said
        saved = read_status(tmp_path / "spare")
        assert saved is not None
        assert (saved.state, saved.step) == ("failed", 2)
    else:
        assert f"the one in {tmp_path / 'run'} is that of step 1 of 3 of grpo" in said


@pytest.mark.parametrize("code", ["0", "", "3", "'enough'"])
def test_an_exit_in_a_reward_is_an_error_as_any_other(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    (tmp_path / "leaving.py").write_text(f"import sys\n\n\ndef reward(*_):\n    sys.exit({code})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "leaving", raising=False)
    with pytest.raises(SystemExit) as stop:
        train(short(vlm_folder, tmp_path, "leaving:reward"))
    assert stop.value.code == 1
    reason = f"SystemExit: {code}".strip("': ").replace("'", "")
    assert f"error: stopped in warmup at step 0: {reason}; the agent so far is in" in capsys.readouterr().err
    found = read_status(tmp_path / "run")
    assert found is not None
    assert (found.state, found.reason) == ("failed", reason)


def test_a_command_that_has_said_why_it_ends_says_it_once(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, refusals = Scorer.save, ["there is no such thing"]

    def refused(self: Scorer, folder: Path) -> None:
        while refusals:
            raise CommandError(refusals.pop())
        save(self, folder)

    monkeypatch.setattr(Scorer, "save", refused)
    with pytest.raises(CommandError) as stop:
        train(short(vlm_folder, tmp_path))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: there is no such thing\n"


def test_an_exit_in_a_policy_of_ones_own_is_an_error(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quitting.py").write_text("class Quit:\n    def select(self, *_):\n        raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CommandError) as stop:
        evaluate.evaluate(evaluate.Config(policies="quitting:Quit", vlm=str(vlm_folder), examples=2, out=tmp_path))
    assert stop.value.code == 2
    assert "--policies quitting:Quit fails on the first example with one token to keep: SystemExit: 0" in (
        capsys.readouterr().err
    )

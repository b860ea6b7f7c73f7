"""Signals, errors and kills: what is saved, what is said, and that it ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.learning import Metrics
from agents.scorer import Scorer
from grip_env import cli
from grip_env.common import atomic_files, stopping
from grip_env.common.atomic_files import folder_on_disk, replace_folder, write_atomically
from grip_env.reports import plots
from grip_env.run_folder.config import Config
from grip_env.run_folder.folder import RunFolder
from grip_env.run_folder.status import RunStatus, read_status
from grip_env.train import train

HERE = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
    """Let signals do what they do by default: tests that run in the background may have been told to ignore some."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


# -- where signals interrupt, and where they wait --------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_raise_once_wait_for_what_is_held_and_leave_handlers_as_they_were(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    done = []

    def work() -> None:
        with stopping.handled():
            with stopping.held():
                for _ in range(50):
                    send(number)
                done.append("held")
            done.append("never")

    with pytest.raises(stopping.Stopped) as stop:
        work()
    assert (done, stop.value.code, str(stop.value)) == (["held"], 128 + number, number.name)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before

    def wait() -> None:
        send(number)
        signal.pause()

    with stopping.handled():
        with pytest.raises(stopping.Stopped):
            wait()
        for _ in range(50):
            send(number)  # on the way out further ones change nothing
        stopping.acknowledge()


def test_a_step_has_time_to_end_and_what_does_not_end_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def step() -> int:
        send()
        send()
        done.append("step")

        return 7

    with pytest.raises(stopping.Stopped), stopping.handled(), stopping.held():
        assert stopping.patiently(step) == 7  # whose result is not lost
    assert done == ["step"]

    monkeypatch.setattr(stopping, "GRACE", 0.05)

    def endless() -> None:
        send()
        while True:
            try:
                signal.pause()
            except BaseException:  # a stop that is swallowed comes again
                done.append("swallowed")
                if done.count("swallowed") == 3:
                    raise

    with pytest.raises(stopping.Stopped), stopping.handled(), stopping.held():
        stopping.patiently(endless)
    assert done.count("swallowed") == 3


def test_a_step_of_an_optimiser_comes_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE", 0.02)
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for weight in weights:
                with torch.no_grad():
                    weight += 1
                send()
                threading.Event().wait(0.1)  # longer than patience

    optimizer = Slow(weights)
    with pytest.raises(stopping.Stopped), stopping.handled(), stopping.held(), stopping.whole_updates() as updating:
        stopping.patiently(optimizer.step)
    assert [weight.tolist() for weight in weights] == [[1, 1], [1, 1]]
    assert not updating()


def test_ignored_signals_stay_ignored_and_other_handlers_are_left_alone() -> None:
    heard = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with stopping.handled():
            send(signal.SIGHUP)
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert heard == [1]


def test_a_thread_has_no_signals_and_a_forked_child_obeys_its_parents() -> None:
    def work() -> int:
        with stopping.handled(), stopping.held():
            return stopping.patiently(lambda: 7)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == 7
    code = """
import multiprocessing, time
from grip_env.common import stopping
with stopping.handled(), stopping.held():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(30)
    print(child.exitcode)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout == "-15\n"


@pytest.mark.parametrize("module", ["train", "evaluate", "answer", "probe", "landscape", "benchmark", "pretrain_vlm"])
def test_ctrl_c_while_a_command_imports_is_one_line(module: str, tmp_path: Path) -> None:
    """Sent by the first import of tyro, which all of them begin with."""
    (tmp_path / "tyro.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-m", f"grip_env.{module}"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.strip() == "interrupted before it began; nothing was written."


def test_saves_survive_signals_and_kills() -> None:
    """A few; ``make interruptions`` does many, and interrupts whole trainings."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.interruptions", "--saves", "8", "--double", "0", "--kills", "0"],
        cwd=HERE, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("none lost") == 8


# -- files and folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # as on other systems
        monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)
    folder, new = tmp_path / "agent", tmp_path / "agent.new"
    for step in range(3):
        new.mkdir()
        (new / f"file{step}").write_text(str(step))
        replace_folder(new, folder)
        assert [path.name for path in folder.iterdir()] == [f"file{step}"]
        assert [path.name for path in tmp_path.iterdir()] == ["agent"]


def test_a_folder_is_found_wherever_its_replacement_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)
    rename = os.replace
    for stop_at in range(2):
        place = tmp_path / str(stop_at)
        folder, new = place / "agent", place / "agent.new"
        for path, text in ((folder, "old"), (new, "new")):
            path.mkdir(parents=True)
            (path / "file").write_text(text)
        calls = iter(range(10))

        def replace(*names: Any, calls: Iterator[int] = calls, stop_at: int = stop_at) -> None:
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            rename(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                replace_folder(new, folder)
        assert (folder_on_disk(folder) / "file").read_text() == ("old", "new")[stop_at]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_atomically(path, "old")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["old"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("there", [False, True])
def test_of_many_runs_of_one_name_at_once_one_gets_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    if there:
        (tmp_path / "run").mkdir()
    ready = threading.Barrier(16)

    def claim(unique: bool) -> str | None:
        ready.wait()
        try:
            return RunFolder(tmp_path / "run", unique=unique).path.name
        except cli.CommandError:
            return None

    with ThreadPoolExecutor(16) as pool:
        assert sorted(map(str, pool.map(claim, [False] * 16))) == ["None"] * 15 + ["run"]
        names = list(pool.map(claim, [True] * 16))
    assert set(names) == {f"run-{count}" for count in range(2, 18)}
    assert "already exists: choose another --name" in capsys.readouterr().err


# -- trainings that end before their end ------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_galleries(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and nothing here looks at them."""
    monkeypatch.setattr(plots, "draw_gallery", lambda *_, **__: np.zeros((8, 8, 3), np.uint8))


class Counting:
    """An agent of a user's own whose one weight counts its steps; tests tell it what to do at the third."""

    trouble: Any = None
    phases = {"count": 5}  # noqa: RUF012

    def __init__(self, setting: Any, options: Any) -> None:
        self.steps = 0

    def learn(self) -> Iterator[Metrics]:
        for step in range(5):
            if step == 2 and Counting.trouble is not None:
                Counting.trouble()
            self.steps += 1
            yield Metrics("count", step, {"reward": 0.0})

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "steps").write_text(str(self.steps))

    @classmethod
    def load(cls, folder: Path, vlm: Any) -> Counting:
        agent = cls(None, None)
        agent.steps = int((folder / "steps").read_text())
        return agent

    def __call__(self, vlm: Any, encoded: Any, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        order = torch.arange(encoded.token_mask.shape[1])
        return (order < kept[:, None]) & encoded.token_mask


def count(vlm_folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, trouble: Any, name: str = "run") -> Any:
    """Train the counting agent and return how it ended."""
    monkeypatch.setattr(Counting, "trouble", staticmethod(trouble))
    algo = f"{__name__}:Counting"
    config = Config(algo=algo, vlm=str(vlm_folder), runs=runs, name=name, progress=False, examples=0, picture_every=100)
    with pytest.raises(SystemExit) as stop:
        train(config)
    return stop.value


def steps_saved(run: Path) -> int:
    return int((run / "agent" / "steps").read_text())


def raises(error: BaseException) -> Any:
    def trouble() -> None:
        raise error

    return trouble


@pytest.mark.parametrize(
    ("trouble", "code", "said", "state"),
    [
        (lambda: send(signal.SIGTERM), 143, "interrupted (SIGTERM) in count at step 2; the agent so far is in", 3),
        (lambda: send(signal.SIGHUP), 129, "interrupted (SIGHUP) in count at step 2; the agent so far is in", 3),
        (lambda: [send() for _ in range(20)], 130, "interrupted in count at step 2; the agent so far is in", 3),
        (raises(ZeroDivisionError("mine")), 1, "error: stopped in count at step 1: ZeroDivisionError: mine; the", 2),
        (raises(MemoryError()), 1, "error: stopped in count at step 1: MemoryError; the agent so far is in", 2),
        (raises(OSError(28, "No space left")), 1, "OSError: [Errno 28] No space left; the agent so far is in", 2),
    ],
)
def test_whatever_ends_a_training_leaves_its_agent_and_one_true_line(
    vlm_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: Any,
    code: int,
    said: str,
    state: int,
) -> None:
    stop = count(vlm_folder, tmp_path, monkeypatch, trouble)
    shown = capsys.readouterr()
    lines = [line for line in (shown.out + shown.err).splitlines() if said in line]
    assert (stop.code, len(lines)) == (code, 1)
    assert str(tmp_path / "run") in lines[0]
    assert steps_saved(tmp_path / "run") == state
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.phase, status.step) == ("failed" if code == 1 else "interrupted", "count", state)
    assert status.steps == 5
    if code == 1:
        assert "in trouble" in (tmp_path / "run" / "traceback.txt").read_text()
        assert "traceback.txt" in lines[0]
        assert len(shown.err.strip().splitlines()) == 1


def test_a_run_folder_that_vanished_is_there_again(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = count(vlm_folder, tmp_path, monkeypatch, lambda: shutil.move(tmp_path / "run", tmp_path / "moved"))
    assert stop.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: stopped in count at step 2: FileNotFoundError")
    assert len(error.strip().splitlines()) == 1
    assert steps_saved(tmp_path / "run") == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["name"] == "run"


def test_an_agent_that_cannot_be_written_to_its_run_is_saved_elsewhere(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill() -> None:  # a file in the way: nothing can be written into the folder any more
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("full")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stop = count(vlm_folder, tmp_path, monkeypatch, fill)
    assert stop.code == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run'} cannot be written" in error
    (spare,) = tmp_path.glob("grip_env-*")
    assert f"so the agent so far is saved in {spare}" in error
    assert steps_saved(spare) == 3
    assert {"config.json", "status.json"} <= {path.name for path in spare.iterdir()}


def test_an_agent_that_cannot_be_saved_leaves_the_earlier_one(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Counting.save

    def broken(self: Counting, folder: Path) -> None:
        save(self, folder)
        if self.steps:
            raise RuntimeError("half of it")

    monkeypatch.setattr(Counting, "save", broken)
    stop = count(vlm_folder, tmp_path, monkeypatch, send)
    assert stop.code == 130
    said = capsys.readouterr().out
    assert f"could not be saved (half of it): the one in {tmp_path / 'run'} is untrained" in said
    assert steps_saved(tmp_path / "run") == 0
    status = read_status(tmp_path / "run")
    assert status == RunStatus("interrupted", reason="SIGINT")


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200, "a\0b", "a\nb", "-x", "..", ".", "a/b", "\udc80", "\x1b[31m"])
def test_names_that_no_folder_can_have_are_refused_in_one_line(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        train(Config(vlm=str(vlm_folder), runs=tmp_path, name=name))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: --name ")
    assert len(error.strip().splitlines()) == 1
    assert len(error) < 250
    assert not list(tmp_path.iterdir())


def test_sb3_agents_survive_an_interrupt_in_the_librarys_update(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from agents.sb3.agents import PPOAgent, PPOOptions

    options = PPOOptions(steps=3, num_envs=2, n_steps=2, batch_size=4, epochs=1, warmup_steps=0, instances=4, pool=4)
    learn = PPOAgent.learn

    def interrupted(self: Any) -> Iterator[Metrics]:
        def update() -> None:
            send()
            train_once()

        train_once = self.model.train
        self.model.train = update
        return learn(self)

    monkeypatch.setattr(PPOAgent, "learn", interrupted)
    monkeypatch.setattr(stopping, "GRACE", 600.0)  # however slow the machine
    with pytest.raises(SystemExit) as stop:
        train(Config(algo="ppo", vlm=str(vlm_folder), runs=tmp_path, name="run", progress=False, options=options))
    assert stop.value.code == 130
    assert "interrupted in ppo at step 0; the agent so far is in" in capsys.readouterr().out
    Scorer.load(tmp_path / "run" / "agent")
    PPOAgent.load(tmp_path / "run" / "agent", _Wide())


class _Wide:
    width, name = 128, "wide"

"""Stop saves and trainings at random moments: ``python -m tests.interruptions``, or ``make interruptions``.

A forked process saves an agent over and over until a signal stops it; then the agent on disk must load, be that of one
single save, and be no older than what the run's status says. Whole trainings get Ctrl-C twice; then they must end soon,
with the exit code of the shell, in one line that is true. Killed trainings are resumed, and must end as if they had not
been.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from agents.agent import ScorerAgent
from agents.scorer import Scorer, ScorerConfig
from grip_env.common import stopping
from grip_env.common.atomic_files import folder_on_disk
from grip_env.run_folder.folder import RunFolder
from grip_env.run_folder.status import RunStatus, read_status

__all__ = ["Config", "double", "main", "resumed", "saves"]

PARTS = 4


@dataclass
class Config:
    """Stop saves and trainings at random moments, and look at what is left."""

    saves: int = 200
    """Saves stopped by each of SIGINT, SIGTERM, SIGHUP and SIGKILL."""
    double: int = 20
    """Trainings that get Ctrl-C twice."""
    kills: int = 20
    """Times that each of three trainings is killed and resumed."""
    seed: int = 0
    """Decides the moments."""


class Parts:
    """An agent of a user's own, whose files all have to be of one save."""

    def __init__(self) -> None:
        self.step = 0

    def save(self, folder: Path) -> None:
        folder.mkdir()
        for part in range(PARTS):
            (folder / f"part{part}").write_text(str(self.step) * 5000)

    @staticmethod
    def load(folder: Path) -> int:
        texts = [(folder / f"part{part}").read_text() for part in range(PARTS)]
        step = int(texts[0][: len(texts[0]) // 5000])
        assert texts == [str(step) * 5000] * PARTS, "files of several saves"
        return step


class Weights:
    """A scorer, with the number of the save in its weights."""

    def __init__(self) -> None:
        self.scorer = Scorer(ScorerConfig(width=32, blocks=1))
        self.step = 0

    def save(self, folder: Path) -> None:
        with torch.no_grad():
            self.scorer.out[1].bias.fill_(self.step)  # type: ignore[index, union-attr]
        ScorerAgent.save(self, folder)  # type: ignore[arg-type]

    @staticmethod
    def load(folder: Path) -> int:
        return int(Scorer.load(folder).out[1].bias.item())  # type: ignore[index, union-attr, operator]


def _save_for_ever(run: RunFolder, agent: Parts | Weights, ready: int) -> None:
    """Save until a signal comes, as training does."""
    code = 1
    try:
        with stopping.handled(), stopping.held():
            while True:
                agent.step += 1
                run.keep(agent, RunStatus("running", "own", agent.step))
                if agent.step == 1:
                    os.write(ready, b"1")
                stopping.check()
    except stopping.Stopped as stop:
        code = stop.code
    finally:
        os._exit(code)


def saves(count: int, number: signal.Signals, kind: Callable[[], Parts | Weights], folder: Path, seed: int) -> int:
    """Stop ``count`` processes that save, and return how many saves they had finished.

    Raises:
        AssertionError: If one leaves no agent that loads, one of several saves, or an older one than it says.
    """
    chance, finished = random.Random(seed), 0
    for index in range(count):
        run = RunFolder(folder / f"{kind.__name__}-{number.name}-{index}")
        run._config = "{}"
        heard, ready = os.pipe()
        child = os.fork()
        if child == 0:
            for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
            _save_for_ever(run, kind(), ready)
        os.close(ready)
        assert os.read(heard, 1) == b"1"
        os.close(heard)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, number)
        _, left = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(left)
        assert code == (-9 if number == signal.SIGKILL else 128 + number), f"exit code {code}"
        status = read_status(run.path)
        step = kind().load(folder_on_disk(run.path / "agent"))
        assert status is not None
        assert status.step <= step <= status.step + (number == signal.SIGKILL), f"{status} and an agent of {step}"
        finished += step
    return finished


def double(index: int, after: float, between: float, folder: Path) -> str:
    """Start a training, send it SIGINT twice, and return what it said.

    Raises:
        AssertionError: If it goes on for more than 10 s, says something false, or leaves an agent that does not load.
    """
    name = f"double{index}"
    options = "--examples 6 --picture-every 3 --no-progress --grpo.steps 100000 --grpo.instances 6 "
    options += "--grpo.candidates 1 --grpo.group 2 --grpo.warmup-steps 20 --grpo.pool 8"
    command = [sys.executable, "-m", "grip_env.train", "--runs", str(folder), "--name", name, *options.split()]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        time.sleep(between)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 130, (process.returncode, out, err)
    assert "Traceback" not in out + err, err
    said = [line for line in out.splitlines() if line.startswith("interrupted")]
    assert len(said) == 1, out
    check_line(said[0], folder / name)
    return said[0]


def check_line(said: str, run: Path) -> None:
    """Raise AssertionError if what a training said of its end is not so."""
    if "nothing was written" in said:
        assert not run.exists(), said
        return
    status = read_status(run)
    assert status is not None
    Scorer.load(folder_on_disk(run / "agent"))
    if "first step" in said:
        assert (status.state, status.phase) == ("interrupted", "")
    elif "trained and saved" in said:
        assert status.state == "done"
    else:
        found = re.search(r"in (\w+) at step (\d+); the agent so far is in (\S+):", said)
        assert found is not None, said
        assert (status.state, status.phase, status.step) == ("interrupted", found[1], int(found[2]) + 1), (said, status)
        assert Path(found[3]) == run
        rows = (run / f"{found[1]}.csv").read_text().splitlines()
        assert len(rows) == status.step + 1
        assert json.loads((run / "config.json").read_text())["config"]["algo"] == "grpo"


RESUMED = {
    "grpo": "--grpo.steps 400",
    "grpo with KL": "--grpo.steps 400 --grpo.no-in-turn --grpo.kl-weight 0.05",
    "soft-top-k": "--soft-top-k.steps 300",
}
"""Trainings that are killed and resumed, and options of each."""


def resumed(name: str, kills: int, folder: Path, seed: int) -> str:
    """Kill a training and resume it, over and over, and return how often, and what its weights are.

    Raises:
        AssertionError: If the weights in the end are not those of the same training in one piece.
    """
    algo = name.split()[0]
    small = "warmup-steps 30", "instances 6", "pool 48", "reuse 2"
    options = [f"--algo {algo} --threads 1 --examples 0 --no-progress --checkpoint-minutes 0.005 --picture-every 1000"]
    options += [f"--{algo}.{option}" for option in small] + [RESUMED[name]]
    options += ["--grpo.candidates 1 --grpo.group 4"] * (algo == "grpo")
    command = [sys.executable, "-m", "grip_env.train", "--runs", str(folder), *" ".join(options).split(), "--name"]
    whole, cut = (folder / f"{name.replace(' ', '-')}-{kind}" for kind in ("whole", "cut"))
    subprocess.run([*command, whole.name], check=True, capture_output=True)
    chance, done = random.Random(f"{seed} {name}"), 0
    again = [*command, cut.name]
    while done < kills:
        process = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=chance.uniform(1, 16))
        except subprocess.TimeoutExpired:
            process.kill()
        _, said = process.communicate()
        if process.returncode == 0:
            break  # it ended before it was killed as often as asked
        assert process.returncode == -signal.SIGKILL, said
        done += 1
        if any((cut / "snapshots").glob("*.safetensors")):
            again = [*command[:3], "--resume", str(cut), "--no-progress"]
        else:
            shutil.rmtree(cut, ignore_errors=True)  # killed before the first snapshot: it begins anew
    if process.returncode:
        subprocess.run(again, check=True, capture_output=True)
    weights = [hashlib.sha256((run / "agent" / "scorer.safetensors").read_bytes()).hexdigest() for run in (whole, cut)]
    assert weights[0] == weights[1], f"{name} ends elsewhere after {done} kills"
    logs = [(run / "warmup.csv").read_text().splitlines() for run in (whole, cut)]
    assert [row.split(",")[:3] for row in logs[0]] == [row.split(",")[:3] for row in logs[1]]
    return f"{name}: killed and resumed {done} times, weights {weights[0][:12]} as in one piece"


def main() -> None:
    """Run the command."""
    config = tyro.cli(Config, description=Config.__doc__, prog="python -m tests.interruptions")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
            for kind in (Parts, Weights):
                finished = saves(config.saves // 2, number, kind, folder, config.seed)
                print(f"{config.saves // 2} x {number.name} while saving {kind.__name__}: none lost, {finished} saves")
        for name in RESUMED if config.kills else ():
            print(resumed(name, config.kills, folder, config.seed), flush=True)
        chance = random.Random(config.seed)
        for index in range(config.double):
            after, between = chance.uniform(0.1, 20), chance.choice([0, 0.01, 0.1, 0.5, 1]) * chance.random()
            print(
                f"Ctrl-C after {after:.2f} s and {between:.3f} s: {double(index, after, between, folder)}", flush=True
            )


if __name__ == "__main__":
    main()

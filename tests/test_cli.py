"""What every command takes from its command line."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from grip_env import cli, evaluate, probe
from grip_env.__main__ import COMMANDS
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.train import parse


@dataclass
class Inner:
    """Options within options."""

    noisy: bool = True
    """Whether."""
    widths: tuple[int, ...] = (1,)
    """How wide."""


@dataclass
class Options:
    """Options of every kind."""

    progress: bool = True
    """Whether."""
    budgets: tuple[float, ...] = (0.1,)
    """Shares."""
    policies: str = ""
    """Names."""
    inner: Inner = field(default_factory=Inner)
    """More."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", Options()),
        ("--progress false", Options(progress=False)),
        ("--progress True", Options()),
        ("--no-progress", Options(progress=False)),
        ("--budgets 0.1 0.2", Options(budgets=(0.1, 0.2))),
        ("--budgets 0.1,0.2", Options(budgets=(0.1, 0.2))),
        ("--budgets 0.1, 0.2", Options(budgets=(0.1, 0.2))),
        ("--policies a,b", Options(policies="a,b")),
        ("--policies a b --progress false", Options(policies="a,b", progress=False)),
        ("--policies a, b", Options(policies="a,b")),
        ("--policies false", Options(policies="false")),
        ("--inner.noisy false --inner.widths 2,3", Options(inner=Inner(False, (2, 3)))),
    ],
)
def test_arguments_are_read_the_same_way_everywhere(given: str, expected: Options) -> None:
    assert cli.parsed(Options, "prog", given.split(), lists=("policies",)) == expected


def test_booleans_and_lists_of_the_commands_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not parse(["--progress", "false", "--grpo.in-turn", "false"]).options.in_turn
    assert not parse(["--progress", "false"]).progress
    seen: list[evaluate.Config] = []
    monkeypatch.setattr(evaluate, "evaluate", seen.append)
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "runs/a", "runs/b", "--policies", "random", "oracle", "--budgets", ".1,.2"]
    )
    evaluate.main()
    assert seen[0].runs == (Path("runs/a"), Path("runs/b"))
    assert (seen[0].policies, seen[0].budgets) == ("random,oracle", (0.1, 0.2))


@pytest.mark.parametrize("values", [[True, True], [True, False]])
def test_a_missed_statement_is_an_exit_code(values: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    code = 0
    try:
        with cli.interruptible("stopped"):
            cli.print_verdicts([(f"statement {value}", value) for value in values])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == (not all(values))
    assert ("MISSED" in capsys.readouterr().out) == (not all(values))


@dataclasses.dataclass
class Shown:
    """Show."""

    progress: bool = True
    """Whether."""


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [("", "a table\n", "a note\n"), ("--quiet", "", "a note\n"), ("--json", '{\n  "k": 1\n}\n', "a table\na note\n")],
)
def test_what_is_printed_for_people_and_for_programs(
    options: str, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with cli.interruptible("stopped"):
        config = cli.parsed(Shown, "prog", options.split())
        print("a table")
        cli.say("a note", error=True)
        cli.print_result({"k": 1})
    print("afterwards")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{out}afterwards\n", err)
    assert config.progress == (options != "--quiet")


def test_python_m_grip_env_lists_every_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "grip_env"], capture_output=True, text=True, check=True).stdout
    folder = Path(cli.__file__).parent
    commands = {path.stem for path in folder.glob("*.py") if "__name__ == " in path.read_text()} - {"__main__"}
    assert commands == {name.split()[0] for name in COMMANDS}
    for name, said in COMMANDS.items():
        assert f"python -m grip_env.{name} " in shown
        assert said in shown


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in COMMANDS}))
def test_every_command_tells_versions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = importlib.import_module(f"grip_env.{name}").Config
    assert dataclasses.is_dataclass(config)
    with pytest.raises(SystemExit) as end:
        cli.parsed(config, name, ["--version"])
    assert not end.value.code
    assert "torch " in capsys.readouterr().out


def test_the_run_is_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    given = cli.parsed(probe.Config, "probe", ["runs/a", "--examples", "4"])
    assert given.run == Path("runs/a")


LONG = "n" * 300
COMMAND_MODULES = [f"grip_env.{name}" for name in sorted({name.split()[0] for name in COMMANDS})]
COMMAND_MODULES += ["grip_env.bench.speed", "grip_env.bench.latency"]


@pytest.mark.parametrize("name", COMMAND_MODULES)
def test_paths_that_are_too_long_are_refused_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All options of all commands that are paths, whether behind an option or in front."""
    config = importlib.import_module(name).Config
    needed = ["--image", "red.png", "--question", "is it red? " * 44] if name == "grip_env.answer" else []
    cli.parsed(config, name, needed)
    paths = [one.name for one in dataclasses.fields(config) if "Path" in str(one.type)]
    assert paths
    for path in paths:
        in_front = path == "run" or (path, name) == ("runs", "grip_env.evaluate")
        given = [LONG] if in_front else [f"--{path}", LONG]
        with pytest.raises(CommandError) as stop:
            cli.parsed(config, name, [*given, *needed] if in_front else [*needed, *given])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.count("\n") == 1
        assert said.startswith(f"error: {'the run' if in_front else f'--{path}'}: 'nnn")
        assert "cannot be used as a path (File name too long)" in said


def test_a_name_that_is_too_long_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(["--examples", "0", "--name", LONG])
    with pytest.raises(CommandError):
        cli.check_name(config.name)
    assert capsys.readouterr().err.startswith("error: --name must have at most 255 bytes; got 300: 'nnn")


@pytest.mark.parametrize("command", COMMANDS)
def test_too_many_threads_are_refused_before_anything_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *more = command.split()
    more += {"evaluate": ["--policies", "random"], "answer": ["--image", "a.png", "--question", "q?"]}.get(command, [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command, *more, "--threads", "99999999999"])
    found = importlib.import_module(f"grip_env.{module}")
    with pytest.raises(SystemExit) as stop:
        found.main(*([cli.parsed(found.Config, module)] if module == "pretrain_vlm" else []))
    assert stop.value.code == 2
    assert re.fullmatch(r"error: --threads must be at most [\d,]+; got 99999999999\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_threads_are_set_unless_there_is_no_number() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(2)
        assert torch.get_num_threads() == 2
        set_threads(0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

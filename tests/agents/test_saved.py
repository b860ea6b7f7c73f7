"""Runs that anybody may have written: their code runs where the user names it, and is found where it lay."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agents.agent import find_algorithm
from agents.pruner import Pruner, load_agent
from agents.saved import folder_of
from grip_env import answer, evaluate, probe, train
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.test_commands import finish, refusal, start

ROOT = Path(__file__).parent.parent.parent
OWN = '''
from pathlib import Path
import numpy as np
from agents.base import keep_best
from agents.learning import Metrics

(Path(__file__).parent / "was imported").touch()


class Left:
    """Keeps what is on the left."""

    sign = -1

    def __init__(self, setting, options):
        self.phases = {"warmup": 1, "rest": 1}

    def select(self, observation):
        return keep_best(self.sign * observation["positions"][:, 1], observation)

    def learn(self):
        yield Metrics("warmup", 0, {"reward": 0.0})
        yield Metrics("rest", 0, {"reward": 0.0})

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "left").touch()

    @classmethod
    def load(cls, folder, vlm):
        if not (folder / "left").is_file():
            raise KeyError("left")
        return cls(None, None)
'''
NAME = "his_agent:Left"


@pytest.fixture(scope="module")
def trained(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of a class of one's own, with a warm-up, and the folder with its module."""
    here = tmp_path_factory.mktemp("code")
    (here / "his_agent.py").write_text(OWN)
    run = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        about = ["--vlm", str(vlm_folder), "--runs", str(run), "--name", "his", "--no-progress"]
        made = train.train(train.parse(["--algo", NAME, *about, "--examples", "2"]))
    assert "its warm-up" in json.loads((made / "report.json").read_text())["cells"]
    return made, here


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in another folder than its module, which nothing has imported yet."""
    shutil.copytree(trained[0], tmp_path / "his")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delitem(sys.modules, "his_agent", raising=False)
    (trained[1] / "was imported").unlink(missing_ok=True)
    return tmp_path / "his"


def changed(run: Path, **config: Any) -> None:
    saved = json.loads((run / "config.json").read_text())
    saved["config"] |= config
    (run / "config.json").write_text(json.dumps(saved))


def doors(vlm: Path, run: Path, *more: str) -> dict[str, tuple[Any, list[str]]]:
    picture = Path("picture.png")
    Image.new("RGB", (96, 96), "red").save(picture)
    few = [str(run), "--vlm", str(vlm), *more]
    return {
        "evaluate": (evaluate, [str(run), "--examples", "2", "--policies", "random", "--no-progress", *more]),
        "probe": (probe, [*few, "--examples", "2", "--no-progress"]),
        "answer": (answer, [*few, "--image", str(picture), "--question", "what?"]),
    }


@pytest.mark.parametrize("door", ["evaluate", "probe", "answer"])
def test_commands_run_the_code_of_a_run_only_if_it_is_named_again(
    door: str,
    run: Path,
    trained: tuple[Path, Path],
    vlm_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for named in ([], ["--algo", "his_agent:Right"], ["--algo", "grpo"]):
        module, options = doors(vlm_folder, run, *named)[door]
        monkeypatch.setattr(sys, "argv", [door, *options])
        with pytest.raises(SystemExit) as stop:
            module.main()
        said = refusal(stop.value, capsys)
        assert NAME in said
        if not (named and door == "evaluate"):  # which says that no run is of the other
            assert f"in {trained[1]} when it was trained" in said
            assert f"--algo {NAME}" in said
        assert "his_agent" not in sys.modules
        assert not (trained[1] / "was imported").exists()
    module, options = doors(vlm_folder, run, "--algo", NAME)[door]
    monkeypatch.setattr(sys, "argv", [door, *options])
    code: Any = 0
    try:
        module.main()
    except SystemExit as end:
        code = end.code
    assert code == (door == "probe")  # 1: it chooses the same whatever it is shown
    assert (trained[1] / "was imported").exists()
    assert str(trained[1]) not in sys.path


def test_python_runs_it_only_if_it_is_named(run: Path, trained: tuple[Path, Path], random_vlm: HuggingFaceVLM) -> None:
    with pytest.raises(ValueError, match=r"in Python: algorithm='his_agent:Left'"):
        load_agent(random_vlm, "random", run)
    with pytest.raises(ValueError, match="which is not 'os:system'"):
        Pruner.wrap(random_vlm.model, random_vlm.processor, run, algorithm="os:system")
    assert not (trained[1] / "was imported").exists()
    by_name = Pruner.wrap(random_vlm.model, random_vlm.processor, run, algorithm=NAME)
    assert (trained[1] / "was imported").exists()
    Left = find_algorithm(NAME)  # imported by now
    by_class = Pruner.wrap(random_vlm.model, random_vlm.processor, run, algorithm=Left)
    image = Image.new("RGB", (96, 96))
    for pruner in (by_name, by_class):
        kept = pruner(image, "what?", 0.5).kept.reshape(12, 12)
        assert kept[:, :6].all()
        assert not kept[:, 6:].any()


def test_a_class_or_name_that_an_agent_does_not_need_is_refused(random_vlm: HuggingFaceVLM, run: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run with config\.json, but a scorer: leave out the algorithm"):
        load_agent(random_vlm, "tiny", algorithm=NAME)
    changed(run, algo="grpo", grpo={})
    with pytest.raises(ValueError, match=r"trained with 'grpo', and not with 'his_agent:Left': leave it out"):
        load_agent(random_vlm, "random", run, algorithm=NAME)
    changed(run, algo=NAME)
    with pytest.raises(ValueError, match="cannot load an agent: give the class that trained it"):
        load_agent(random_vlm, "random", run, algorithm=int)


def test_the_module_of_here_goes_first_with_a_word_about_the_other(
    run: Path, random_vlm: HuggingFaceVLM, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here = Path("his_agent.py")
    here.write_text(OWN.replace("sign = -1", "sign = 1"))
    agent = load_agent(random_vlm, "random", run, NAME)
    assert agent.policy.sign == 1  # type: ignore[attr-defined]
    note = capsys.readouterr().err
    assert note == f"note: {NAME} is read from {here.absolute()}, and was {trained[1] / 'his_agent.py'} in training\n"
    del sys.modules["his_agent"]
    here.write_text(OWN)  # a copy is no other
    load_agent(random_vlm, "random", run, NAME)
    assert capsys.readouterr().err == ""


def test_a_module_that_is_gone_is_asked_for(run: Path, random_vlm: HuggingFaceVLM, tmp_path: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    for place in (str(tmp_path / "gone"), "relative", ""):
        (run / "config.json").write_text(json.dumps(saved | {"algorithm": {"folder": place}}))
        with pytest.raises(ValueError, match=r"no module 'his_agent'.*set PYTHONPATH to its folder"):
            load_agent(random_vlm, "random", run, NAME)
    del saved["algorithm"]
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="cannot import the algorithm 'his_agent:Left'"):
        load_agent(random_vlm, "random", run, NAME)


def test_relative_folders_are_not_looked_into(run: Path, random_vlm: HuggingFaceVLM) -> None:
    """A run folder that comes with code beside its files, and points to it."""
    (Path("code")).mkdir()
    Path("code", "his_agent.py").write_text(OWN)
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"algorithm": {"folder": "code"}}))
    with pytest.raises(ValueError, match="there is no module"):
        load_agent(random_vlm, "random", run, NAME)
    assert not Path("code", "was imported").exists()


def test_whatever_a_class_raises_on_loading_ends_in_one_line(run: Path, random_vlm: HuggingFaceVLM) -> None:
    (run / "agent" / "left").unlink()
    with pytest.raises(ValueError, match=r"his_agent:Left cannot load .*agent \(KeyError: 'left'\)"):
        load_agent(random_vlm, "random", run, NAME)


def test_several_runs_of_own_classes_are_named_together(
    run: Path, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    changed(other, algo="her_agent:Left", seed=1)
    few: Any = {"examples": 2, "budgets": (0.5,), "policies": "random", "progress": False, "out": tmp_path / "out"}
    with pytest.raises(SystemExit) as stop:
        evaluate.evaluate(evaluate.Config((run, other), **few))
    assert "give --algo his_agent:Left,her_agent:Left" in refusal(stop.value, capsys)
    Path("her_agent.py").write_text(OWN)
    both = evaluate.Config((run, other), algo="his_agent:Left, her_agent:Left", **few)
    assert {"his_agent:Left", "her_agent:Left"} <= set(evaluate.evaluate(both).cells)
    with pytest.raises(SystemExit) as stop:
        evaluate.evaluate(evaluate.Config(policies="random", examples=2, algo=NAME))
    assert f"--algo {NAME} was not used by any of the runs: no run is given" in capsys.readouterr().err


def test_folders_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    for folder in (tmp_path / "outer", tmp_path / "outer" / "inner"):
        (folder / "__init__.py").write_text("class A: ...\n")
    (tmp_path / "outer" / "inner" / "last.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    import outer.inner.last  # type: ignore[import-not-found] # noqa: F401

    for name in ("outer:A", "outer.inner:A", "outer.inner.last:A"):
        assert folder_of(name) == str(tmp_path)
    assert folder_of("grpo") is folder_of("no.such.module:A") is folder_of("sys:A") is None


def test_modules_of_the_current_folder_are_not_run_by_reading_a_run(
    run: Path, vlm_folder: Path, tmp_path: Path
) -> None:
    """As a user starts it, where Python is told not to look in the current folder by itself (``-P``)."""
    if sys.version_info < (3, 11):
        pytest.skip("Python has -P from 3.11 on")
    for name in ("his_agent", "tyro", "torch", "agents", "grip_env", "numpy"):
        Path(f"{name}.py").write_text("import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()\n" + OWN)
    command = ("-P", "-m", "grip_env.evaluate", run, "--examples", "2", "--policies", "random", "--no-progress")
    code, _, err = finish(start(*command, cwd=Path.cwd(), PYTHONPATH=str(ROOT)))
    assert code == 2, err
    assert f"give --algo {NAME}" in err
    assert not list(Path.cwd().glob("*.ran"))


# -- other packages and modules of the same name ----------------------------------------------------------


COMMANDS = ("train", "evaluate", "probe", "answer", "landscape", "benchmark", "pretrain_vlm")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["module", "package"])
def test_ones_own_agents_in_the_current_folder_is_named_with_what_to_do(tmp_path: Path, kind: str) -> None:
    theirs = tmp_path / ("agents.py" if kind == "module" else "agents")
    if kind == "package":
        theirs.mkdir()
    # as Latin-1, which no reader of UTF-8 takes
    (theirs if kind == "module" else theirs / "__init__.py").write_bytes(
        "# -*- coding: latin-1 -*-\n# é".encode("latin-1")
    )
    options = {"answer": ["--image", "x.png", "--question", "what?"]}
    for name in COMMANDS if kind == "module" else ("evaluate",):
        command = ("-m", f"grip_env.{name}", *options.get(name, []))
        code, out, err = finish(start(*command, cwd=tmp_path, PYTHONPATH=str(ROOT)))
        assert (code, out) == (2, ""), (name, err)
        assert err == (
            f"error: the {kind} 'agents' at {theirs} shadows the package of grip_env: start the command in another "
            f"folder, or rename {theirs}\n"
        ), name


def test_ones_own_agents_on_pythonpath_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "agents.py").write_text("")
    path = os.pathsep.join([str(tmp_path / "lib"), str(ROOT)])
    code, _, err = finish(start("-m", "grip_env.evaluate", "run", cwd=tmp_path, PYTHONPATH=path))
    assert code == 2
    assert f"take {tmp_path / 'lib'} out of PYTHONPATH, or rename {tmp_path / 'lib' / 'agents.py'}" in err


def test_a_folder_without_code_does_not_shadow(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    code, _, err = finish(start("-m", "grip_env.evaluate", "run", cwd=tmp_path, PYTHONPATH=str(ROOT)))
    assert code == 2
    assert "run is not a run" in err


def test_a_distribution_is_blamed_for_its_own_files_only(tmp_path: Path) -> None:
    """openai-agents is installed, and yet what shadows is the user's own."""
    site, here = tmp_path / "site", tmp_path / "here"
    record = site / "openai_agents-0.1.dist-info"
    for folder in (record, site / "agents", here):
        folder.mkdir(parents=True)
    (site / "agents" / "__init__.py").touch()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: openai-agents\nVersion: 0.1\n")
    (record / "top_level.txt").write_text("agents\n")
    (record / "RECORD").write_text("agents/__init__.py,,\n")
    command = [sys.executable, "-m", "grip_env.evaluate", "run"]
    path = os.pathsep.join([str(site), str(ROOT)])
    for own in (False, True):
        if own:
            (here / "agents.py").touch()
        done = subprocess.run(command, cwd=here, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 2
        assert ("pip uninstall openai-agents" in done.stderr) != own
        assert (f"rename {here / 'agents.py'}" in done.stderr) == own


@pytest.mark.slow
def test_the_checkout_may_be_the_current_folder() -> None:
    for folder in (ROOT, ROOT / "examples", ROOT / "grip_env"):
        done = subprocess.run(
            [sys.executable, "-m", "grip_env.evaluate", "no/run"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert "error: no/run is not a run" in done.stderr, done.stderr

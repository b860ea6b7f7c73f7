"""Algorithms by name, plugged in from outside, and methods of all kinds in one comparison."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.agent import SCORERS, Agent, Setting, as_selector, find_algorithm, register
from agents.base import PolicySelector
from agents.heuristics import random_tokens
from agents.learning import Metrics
from agents.pruner import Pruner
from grip_env import evaluate, train
from grip_env.common.errors import CommandError
from grip_env.reports.comparison import Comparison, compare
from grip_env.reports.saved_runs import Run, group_runs
from grip_env.rewards.terms import AnswerLogLikelihood
from grip_env.tasks.scenes import SceneTask
from tests.fakes import FakeTask, FakeVLM
from tests.vlms import tiny_models

PHASES = ("warmup", "grpo")
TINY = "--steps=2 --instances=6 --pool=8"
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


class First:
    """Keeps the first tokens; learns nothing."""

    def __init__(self, setting: Any, options: Any) -> None:
        self.setting = setting

    def learn(self) -> Iterator[Metrics]:
        yield Metrics("nothing", 0, {"reward": 0.0})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "here").write_text("saved")

    @classmethod
    def load(cls, folder: Path, vlm: Any) -> First:
        if not (folder / "here").is_file():
            raise FileNotFoundError(f"nothing in {folder}")
        return cls(None, None)

    def select(self, observation: Any) -> np.ndarray:
        mask = np.zeros(len(observation["token_mask"]), dtype=bool)
        mask[: round(float(observation["budget"][0]) * len(mask))] = True
        return mask


class Failing(First):
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("no such luck")


class Nothing:
    """No policy at all."""


class Short:
    """Chooses too few tokens to be true."""

    def select(self, observation: Any) -> np.ndarray:
        return np.ones(2, dtype=bool)


class Dumb:
    """Has everything but a way to choose."""

    learn = save = load = print


def test_names_are_looked_up_registered_or_imported() -> None:
    assert find_algorithm("tests.agents.test_agent:First") is First
    assert register("first-one")(First) is First
    assert find_algorithm("first-one") is First
    assert issubclass(First, Agent)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grop", "there is no algorithm 'grop': choose from a2c, first-one, grpo|there is no algorithm 'grop'"),
        ("nowhere.at.all:X", "cannot import the algorithm"),
        (".relative:X", "cannot import the algorithm"),
        (":X", "cannot import the algorithm"),
        ("tests.agents.test_agent:Missing", "cannot import the algorithm"),
        ("json:dumps", "is no algorithm: it needs to be a class with the methods learn, save and load"),
        ("json:JSONEncoder", "lacks learn, save, load"),
        ("tests.agents.test_agent:Dumb", "cannot choose tokens: give it select"),
    ],
)
def test_what_is_no_algorithm_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_algorithm(name)


@pytest.mark.parametrize("name", ["Upper", "with space", "", "7up", "a_b"])
def test_names_that_no_option_could_have_are_refused(name: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        register(name)


def test_a_name_belongs_to_one_class() -> None:
    register("taken")(First)
    with pytest.raises(ValueError, match=r"the name 'taken' is taken by tests\.agents\.test_agent\.First"):
        register("taken")(Dumb)


def test_a_setting_makes_environments_of_the_training_split() -> None:
    setting = Setting(FakeVLM(), FakeTask(), AnswerLogLikelihood())
    envs = setting.make_vec(num_envs=3, budget=0.25)
    _, infos = envs.reset(seed=0)
    assert envs.unwrapped.rules.split == "train"
    assert infos["k"].tolist() == [4] * 3


def test_policies_and_selectors_choose_alike() -> None:
    assert isinstance(as_selector(First(None, None)), PolicySelector)
    assert as_selector(random_tokens) is random_tokens


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_every_algorithm_trains_saves_and_is_evaluated_from_the_command_line(
    name: str, vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name}.{option[2:]}" for option in TINY.split()]
    options += ["--grpo.candidates=1"] if name == "grpo" else []
    if name != "imitation":
        options.append(f"--{name}.warmup-steps=1")
    about = ["--vlm", str(vlm_folder), "--runs", str(tmp_path), "--name", "run", "--no-progress"]
    run = train.train(train.parse(["--algo", name, *about, "--examples", "0", *options]))
    saved = json.loads((run / "config.json").read_text())["config"]
    assert saved["algo"] == name
    assert saved[name.replace("-", "_")]["steps"] == 2
    assert None not in saved[name.replace("-", "_")].values(), "what a preset decides is saved as well"
    phase = {"gumbel-top-k": "gumbel", "sigmoid-gates": "sigmoid", "soft-top-k": "soft_top_k"}.get(name, name)
    lines = (run / f"{phase}.csv").read_text().splitlines()
    assert len(lines) == 3
    assert {"forwards", "seconds"} <= set(lines[0].split(","))
    comparison = evaluate.evaluate(evaluate.Config((run,), examples=4, policies="random", progress=False))
    assert {"random", "this agent"} <= set(comparison.cells)
    assert "What this agent gains" in capsys.readouterr().out


def test_an_agent_of_ones_own_goes_through_the_commands(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES)  # where own_agent.py lies
    about = ["--vlm", str(vlm_folder), "--runs", str(tmp_path), "--name", "mine", "--no-progress"]
    config = train.parse(["--algo=own_agent:Matcher", *about, "--examples=4", "--agent.steps=2", "--agent.num-envs=4"])
    run = train.train(config)
    assert json.loads((run / "config.json").read_text())["config"]["agent"]["num_envs"] == 4
    assert len((run / "reinforce.csv").read_text().splitlines()) == 3
    trained = torch.load(run / "agent" / "matcher.pt", weights_only=True)
    again = evaluate.Config((run,), examples=4, policies="random", algo="own_agent:Matcher", progress=False)
    comparison = evaluate.evaluate(again)
    assert "this agent" in comparison.cells
    assert trained["token.weight"].shape == (32, 128)
    pruner = Pruner.load(vlm_folder, run, algorithm="own_agent:Matcher")
    scenes = [SceneTask().example("test", index) for index in range(2)]
    kept = pruner.select(pruner.encode([one.image for one in scenes], [one.question for one in scenes]), budget=0.1)
    assert kept.sum(1).tolist() == [14, 14]
    assert "wrote" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_that_differ_by_their_seed_share_a_row(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name, seed in (("grpo", 0), ("grpo", 1), ("imitation", 0)):
        options = [f"--{name}.{option[2:]}" for option in TINY.split()]
        options += ["--grpo.warmup-steps=1", "--grpo.candidates=1"] if name == "grpo" else []
        about = ["--vlm", str(vlm_folder), "--runs", str(tmp_path), "--name", f"{name}{seed}", "--no-progress"]
        arguments = ["--algo", name, "--seed", str(seed), *about, "--examples", "0", *options]
        runs.append(train.train(train.parse(arguments)))
    few: Any = {"examples": 5, "budgets": (0.1, 0.6), "progress": False}
    together = evaluate.evaluate(evaluate.Config(tuple(runs), policies="random,fastv", **few))
    assert list(together.cells) == ["random", "FastV", "grpo, 2 seeds", "imitation", "all tokens"]
    assert list(together.cells["FastV"]) == [0.6]
    cell = together.cells["grpo, 2 seeds"][0.1]
    alone = [evaluate.evaluate(evaluate.Config((run,), policies="random", **few)) for run in runs[:2]]
    values = [one.value("this agent", 0.1) for one in alone]
    assert cell["log_likelihood"] == pytest.approx(np.mean(values), abs=1e-5)
    assert cell["log_likelihood_sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
    out = capsys.readouterr().out
    assert "What grpo, 2 seeds gains" in out
    assert re.search(r"Left out: FastV at 10% \(FastV cannot keep this budget", out)
    assert (tmp_path / "comparison-test-5" / "report.json").is_file()
    # what training took is that of warm-up and rewards together, means over the seeds
    logs = [np.genfromtxt(run / f"{phase}.csv", delimiter=",", names=True) for run in runs[:2] for phase in PHASES]
    cost = together.training["grpo, 2 seeds"]
    assert cost["seconds"] == pytest.approx(sum(log["seconds"].sum() for log in logs) / 2)
    assert cost["forwards"] == np.mean([np.atleast_1d(log["forwards"])[-1] for log in logs[1::2]])
    assert f"| grpo, 2 seeds | {cost['seconds']:,.0f} | {cost['forwards']:,.0f} |" in out
    # of an algorithm that does not count it is said that nobody knows
    (runs[2] / "imitation.csv").write_text("step,loss\n0,1.5\n")
    again = evaluate.evaluate(evaluate.Config(tuple(runs), policies="random", **few))
    assert list(again.training) == ["grpo, 2 seeds", "imitation"]
    assert "| imitation | - | - |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (evaluate.Config(), "nothing to compare: give a run, or --policies"),
        (evaluate.Config(policies="fastervlm"), "there is no method 'fastervlm': choose from random"),
        (evaluate.Config(policies="random", budgets=(0.1, 1.5)), "--budgets are shares of the visual tokens"),
        (evaluate.Config(policies="nowhere:Own"), "--policies nowhere:Own: No module named 'nowhere'"),
        (evaluate.Config((Path("no/run"),)), "no/run is not a run"),
        (evaluate.Config(policies=":X"), "--policies :X: invalid format: ':X'"),
        (evaluate.Config(policies=f"{__name__}:Failing"), "Failing: no such luck; give package.module:Class"),
        (evaluate.Config(policies=f"{__name__}:Nothing"), "Nothing fails on the first example with one token to keep"),
        (evaluate.Config(policies=f"{__name__}:Short"), "Short fails on the first example with one token to keep"),
    ],
)
def test_comparisons_that_cannot_be_stop_with_one_line(
    config: evaluate.Config, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CommandError):
        evaluate.evaluate(dataclasses.replace(config, out=Path("nowhere")))
    assert message in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_rows_of_runs() -> None:
    def run(name: str, seed: int = 0, algo: str = "grpo", **options: Any) -> Run:
        content = {"seed": seed, "algo": algo, algo: options}
        return Run(Path("runs") / name, {"config": content})

    runs = [run("a", 0), run("b", 1), run("c", 1), run("d", 0, steps=3), run("e", algo="rloo", preset="rloo")]
    runs += [run("f", preset="dapo", in_turn=False), run("g", 1, preset="dapo", in_turn=False)]
    runs += [run("h", preset="default", in_turn=True), run("i", preset="default", in_turn=False)]
    runs += [run("j", algo="sigmoid", in_turn=False), run("k", algo="sigmoid", in_turn=True)]
    runs += [run("l", preset="dapo", in_turn=True), run("m", preset="grpo", in_turn=False)]
    runs += [run("n", algo="rloo", preset="default", in_turn=True), run("o", 5, preset="default")]
    assert group_runs(runs) == {
        "grpo, 2 seeds": ["runs/a", "runs/b"],
        "grpo [c]": ["runs/c"],  # a seed again is none more
        "grpo [d]": ["runs/d"],
        "rloo": ["runs/e"],
        "grpo (dapo), 2 seeds": ["runs/f", "runs/g"],
        "grpo [h]": ["runs/h"],  # the usual choice of this preset
        "grpo (at once)": ["runs/i"],
        "sigmoid": ["runs/j"],
        "sigmoid (in turn)": ["runs/k"],
        "grpo (dapo, in turn)": ["runs/l"],
        "grpo (grpo)": ["runs/m"],
        "rloo (default)": ["runs/n"],
        "grpo (at once) [o]": ["runs/o"],  # from before there was a choice, and not read from a folder
    }


def test_runs_that_cannot_be_compared_are_refused(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(vlm_folder.parent)
    runs = []
    for policy in ("original", "reindex"):
        about = ["--vlm", vlm_folder.name, "--runs", str(tmp_path), "--name", policy, "--no-progress"]
        options = ["--imitation.steps=1", "--imitation.instances=2", "--imitation.pool=4"]
        arguments = ["--algo=imitation", *about, "--examples=0", "--position-policy", policy, *options]
        runs.append(train.train(train.parse(arguments)))
    monkeypatch.chdir(tmp_path)  # a model's relative path is that of where the training was started
    for given, message in (
        (runs, "reindex was trained with --position-policy reindex, and"),
        ([runs[0], tmp_path / "." / "original"], "a run is named twice"),
    ):
        with pytest.raises(CommandError):
            evaluate.evaluate(evaluate.Config(tuple(given), policies="random", examples=2, progress=False))
        assert message in capsys.readouterr().err


def test_models_that_an_algorithm_cannot_train_on_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_models.save("paligemma", tmp_path / "model")
    config = train.parse(["--algo=soft-top-k", "--vlm", str(tmp_path / "model"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(CommandError):
        train.train(config)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "gates on attention" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["seed", "runs"])
def test_an_algorithm_cannot_have_the_name_of_an_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    register(name)(First)
    with pytest.raises(CommandError):
        train.parse(["--algo", name])
    assert f"{name!r} is also an option of this command" in capsys.readouterr().err


def test_margins_are_paired_and_seeds_averaged() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(size=400).astype(np.float32)  # what makes an example hard for both
    ours = np.stack([hard + 0.10, hard + 0.20])
    theirs = hard[None] + generator.normal(scale=0.1, size=(1, 400)).astype(np.float32)
    whole = Comparison("test", 400, 16, {}, {"ours": {0.1: ours}, "theirs": {0.1: theirs}})
    margin = whole.margin("ours", "theirs", 0.1)
    gains = ours.mean(0) - theirs[0]
    assert margin.mean == pytest.approx(gains.mean(), abs=1e-6)
    assert margin.interval == pytest.approx(1.96 * gains.std(ddof=1) / 20, rel=1e-5)
    assert margin.interval < 0.02, "the spread of the examples cancels out"
    assert margin.worst == pytest.approx((ours[0] - theirs[0]).mean(), abs=1e-6)
    assert margin.clear


def test_what_else_is_compared_changes_no_number() -> None:
    vlm, task = FakeVLM(), FakeTask()
    alone = compare(vlm, task, {"random": random_tokens}, "train", 8, (0.25, 0.5), progress=False)
    both = compare(
        vlm, task, {"other": random_tokens, "random": random_tokens}, "train", 8, (0.25, 0.5), progress=False
    )
    assert alone.cells["random"] == both.cells["random"]
    assert alone.cells["random"] != both.cells["other"]

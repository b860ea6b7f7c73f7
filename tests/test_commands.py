"""The commands, as a library and as a user starts them, with a random model and settings that take seconds."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.grpo import GRPOConfig
from agents.heuristics import BASELINES
from agents.heuristics.inside_llm import FastV, PyramidDrop
from agents.scorer import Scorer, ScorerConfig
from grip_env import benchmark, cli, evaluate
from grip_env import train as train_module
from grip_env.reports.comparison import compare
from grip_env.run_folder.config import Config
from grip_env.run_folder.folder import RunFolder
from grip_env.tasks.scenes import SceneTask
from grip_env.train import train
from grip_env.vlms import load_vlm

TIMES = {"seconds", "scoring_seconds"}


def settings(vlm: Path, runs: Path, name: str = "run", /, **changes: Any) -> Config:
    grpo = GRPOConfig(steps=3, instances=6, candidates=1, group=2, warmup_steps=2, pool=8)
    for key in set(changes) & {field.name for field in dataclasses.fields(GRPOConfig)}:
        grpo = dataclasses.replace(grpo, **{key: changes.pop(key)})
    options: dict[str, Any] = {"vlm": str(vlm), "name": name, "runs": runs, "progress": False, "options": grpo}
    return Config(**(options | {"examples": 0} | changes))


@pytest.fixture(scope="module")
def run(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a report."""
    return train(settings(vlm_folder, tmp_path_factory.mktemp("runs"), examples=6, picture_every=2))


def start(*command: str | Path, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores interrupts, and so do its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def rows(run: Path, phase: str) -> list[dict[str, str]]:
    with (run / f"{phase}.csv").open() as file:
        return list(csv.DictReader(file))


def refusal(stop: SystemExit, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that refused printed: one line on standard error, and nothing else."""
    assert stop.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert one_line(shown.err), shown.err
    return shown.err


def one_line(text: str) -> bool:
    return text.startswith("error: ") and len(text.strip().splitlines()) == 1


# -- what a run leaves behind ----------------------------------------------------------------------------


def test_run_folder_holds_all_there_is_to_know(run: Path, vlm_folder: Path) -> None:
    names = {path.name for path in run.iterdir()}
    expected = {"config.json", "status.json", "warmup.csv", "grpo.csv", "agent", "warmup"}
    expected |= {"report.md", "report.json", "report.safetensors", "pareto.png", "kept_tokens.png"}
    assert expected <= names
    assert len(names - expected) == 1
    assert (names - expected).pop().startswith("events.out.tfevents")
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["seed"] == 0
    assert config["config"]["grpo"]["steps"] == 3
    assert config["config"]["vlm"] == str(vlm_folder)
    assert torch.__version__.startswith(config["versions"]["torch"].split("+")[0])
    assert {"python", "transformers", "gymnasium", "grip-env"} <= set(config["versions"])
    assert "not installed" not in config["versions"].values()
    assert config["command"][1:] == sys.argv
    assert len(config["vlm"]["checksum"]) == 64
    assert json.loads((run / "agent" / "scorer.json").read_text())["token_width"] == 128


def test_metrics_are_complete(run: Path) -> None:
    warmup, grpo = rows(run, "warmup"), rows(run, "grpo")
    assert [row["step"] for row in warmup] == ["0", "1"]
    assert [row["step"] for row in grpo] == ["0", "1", "2"]
    assert {"reward", "log_likelihood", "accuracy", "entropy_per_token", "flat_groups", *TIMES} <= set(grpo[0])
    assert all(np.isfinite(float(value)) for row in warmup + grpo for value in row.values())
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    scalars = {f"{phase}/{key}" for phase, row in (("grpo", grpo[0]), ("warmup", warmup[0])) for key in row}
    scalars -= {"grpo/step", "warmup/step"}
    assert set(events.Tags()["scalars"]) == scalars
    assert [event.step for event in events.Scalars("grpo/reward")] == [0, 1, 2]
    assert events.Scalars("grpo/reward")[1].value == pytest.approx(float(grpo[1]["reward"]), rel=1e-4)
    assert [event.step for event in events.Images("kept tokens")] == [0, 2, 3]


def test_report_compares_the_agent_with_every_baseline(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    methods = ["random", "uniform grid", "CLS attention", "max-min diversity", "oracle", "its warm-up", "this agent"]
    assert list(report["cells"]) == [*methods, "all tokens"]
    assert (report["split"], report["examples"], report["tokens"]) == ("test", 6, 144)
    for row in report["cells"].values():
        assert list(row) == ["0.03", "0.05", "0.1", "0.2", "0.3", "0.5"]
        for cell in row.values():
            assert cell["log_likelihood"] < 0
            assert 0 <= cell["accuracy"] <= 1
            families = cell["families"].values()
            assert len(families) == 6
            assert np.mean([part["log_likelihood"] for part in families]) == pytest.approx(cell["log_likelihood"])
    table = (run / "report.md").read_text()
    assert all(f"| {method} |" in table for method in methods)
    assert f"{report['cells']['this agent']['0.1']['log_likelihood']:.3f}" in table
    for name in ("pareto.png", "kept_tokens.png"):
        picture = np.asarray(Image.open(run / name).convert("RGB"))
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 10


def test_nothing_is_pickled(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "tfevents" not in path.name} == {
        ".json",
        ".csv",
        ".md",
        ".png",
        ".safetensors",
    }
    for path in files:
        head = path.read_bytes()[:2]
        assert head != b"PK", f"{path} is a zip archive, as torch.save writes it"
        assert not (head[:1] == b"\x80" and head[1] in range(2, 6)), f"{path} is a pickle"


def test_agent_and_warmup_are_two_scorers_that_load(run: Path) -> None:
    agent, warmup = Scorer.load(run / "agent").state_dict(), Scorer.load(run / "warmup").state_dict()
    assert any(not value.equal(warmup[key]) for key, value in agent.items())
    assert agent["out.1.weight"].abs().sum() > 0


def test_the_warmup_is_the_agent_before_its_first_reward(vlm_folder: Path, tmp_path: Path) -> None:
    none, one = (train(settings(vlm_folder, tmp_path, f"steps{steps}", steps=steps)) for steps in (0, 1))
    untouched = (none / "agent" / "scorer.safetensors").read_bytes()
    assert (none / "warmup" / "scorer.safetensors").read_bytes() == untouched
    assert (one / "warmup" / "scorer.safetensors").read_bytes() == untouched
    assert (one / "agent" / "scorer.safetensors").read_bytes() != untouched


# -- reproducibility -------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_metrics_and_weights(run: Path, vlm_folder: Path, tmp_path: Path) -> None:
    again = train(settings(vlm_folder, tmp_path, "again"))
    other = train(settings(vlm_folder, tmp_path, "other", seed=1))
    for phase in ("warmup", "grpo"):
        one, two, three = (
            [{key: value for key, value in row.items() if key not in TIMES} for row in rows(folder, phase)]
            for folder in (run, again, other)
        )
        assert one == two
        assert one != three
    weights = "agent/scorer.safetensors"
    assert (run / weights).read_bytes() == (again / weights).read_bytes() != (other / weights).read_bytes()


def test_evaluate_gives_the_numbers_of_the_report(run: Path, tmp_path: Path) -> None:
    command = ("-m", "grip_env.evaluate", run, "--examples", "6", "--out", tmp_path / "again")
    code, out, err = finish(start(*command, cwd=tmp_path))
    assert code == 0, err
    assert "Traceback" not in err
    assert "note:" not in out  # the model is the one it was trained with
    assert "| this agent |" in out
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (run, tmp_path / "again"))
    assert list(one["cells"]) == list(two["cells"])
    for method, row in one["cells"].items():
        for budget, cell in row.items():
            other = two["cells"][method][budget]
            assert other["log_likelihood"] == pytest.approx(cell["log_likelihood"], abs=1e-4), method
            assert other["accuracy"] == cell["accuracy"], method
    assert (tmp_path / "again" / "pareto.png").is_file()


@pytest.mark.slow
def test_cache_is_filled_by_one_run_and_read_by_the_next(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    plain = train(settings(vlm_folder, tmp_path, "plain", examples=6))
    first, second = (
        train(settings(vlm_folder, tmp_path, name, examples=6, cache=cache)) for name in ("first", "second")
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("image cache")]
    assert len(lines) == 2
    assert " 0 misses" not in lines[0]
    assert " 0 misses (100% hits)" in lines[1]
    reports = [json.loads((run / "report.json").read_text())["cells"] for run in (plain, first, second)]
    for report in reports[1:]:
        for method, row in reports[0].items():
            for budget, cell in row.items():
                found = report[method][budget]["log_likelihood"]
                assert found == pytest.approx(cell["log_likelihood"], abs=1e-3), (method, budget)
    evaluate.evaluate(evaluate.Config((second,), examples=6))  # the run remembers its cache
    with pytest.raises(SystemExit):
        train(settings(vlm_folder, tmp_path, "broken", cache=cache, cache_gib=0.0))
    assert "--cache-gib must be above 0 and at most 1,048,576; got 0" in capsys.readouterr().err


@pytest.mark.parametrize("size", [math.inf, -math.inf, math.nan, -1.0, 1e300, 1e-12])
def test_a_cache_of_impossible_size_is_refused(size: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(SystemExit) as caught:
            cli.load_model(cli.ModelConfig(cache=cache, cache_gib=size))
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith(
            f"error: --cache-gib must be above 0 and at most 1,048,576; got {size:g}"
        )
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_reward_can_be_a_sum_or_imported_and_is_remembered_as_it_was_written(vlm_folder: Path, tmp_path: Path) -> None:
    """As a user starts it: the module is found in the folder the command is started in."""
    (tmp_path / "mine.py").write_text(
        "from grip_env import AgreementWithFull, KeptFraction\n\n\n"
        "def make():\n    return AgreementWithFull() / 2 + 0.25 * KeptFraction()\n"
    )
    tiny = "--grpo.steps 3 --grpo.instances 6 --grpo.candidates 1 --grpo.group 2 --grpo.warmup-steps 2 --grpo.pool 8 "
    tiny += "--examples 0"
    command = ["-m", "grip_env.train", "--vlm", vlm_folder, "--runs", tmp_path, "--no-progress", *tiny.split()]
    command += ["--name", "imported", "--reward", "mine:make"]
    code, _, err = finish(start(*command, cwd=tmp_path, PYTHONPATH=str(Path(__file__).parent.parent)))
    assert code == 0, err
    text = "0.5 * agreement + kept_fraction / 4"
    train(settings(vlm_folder, tmp_path, "sum", reward=text))
    for name, reward in (("sum", text), ("imported", "mine:make")):
        assert json.loads((tmp_path / name / "config.json").read_text())["config"]["reward"] == reward
    one, two = ([float(row["reward"]) for row in rows(tmp_path / name, "grpo")] for name in ("sum", "imported"))
    assert one == pytest.approx(two, abs=1e-4)
    evaluate.evaluate(evaluate.Config((tmp_path / "imported",), examples=6))  # where there is no such module
    assert (tmp_path / "imported" / "test-6" / "report.json").is_file()


# -- interrupts ------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_agent(vlm_folder: Path, tmp_path: Path) -> None:
    command = f"-m grip_env.train --vlm {vlm_folder} --runs {tmp_path} --name cut --examples 0 --no-progress"
    tiny = (
        "--grpo.steps 100000 --grpo.instances 6 --grpo.candidates 1 --grpo.group 2 --grpo.warmup-steps 1 --grpo.pool 8"
    )
    process = start(*command.split(), *tiny.split(), cwd=tmp_path)
    metrics = tmp_path / "cut" / "grpo.csv"
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, finish(process)[2]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    assert "interrupted in grpo at step" in out
    assert f"python -m grip_env.evaluate {tmp_path / 'cut'}" in out
    agent, warmup = (Scorer.load(tmp_path / "cut" / name).state_dict() for name in ("agent", "warmup"))
    assert any(not value.equal(warmup[key]) for key, value in agent.items())
    assert len({len(row) for row in csv.reader(metrics.open())}) == 1


def test_interrupt_in_the_warmup_keeps_the_agent(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Any, phase: str, step: int, values: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "log", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(settings(vlm_folder, tmp_path))
    assert stop.value.code == 130
    assert "interrupted in warmup at step 0" in capsys.readouterr().out
    assert Scorer.load(tmp_path / "run" / "agent").state_dict()["out.1.weight"].abs().sum() > 0


def test_interrupt_in_the_report_keeps_the_agent(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "report", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(settings(vlm_folder, tmp_path, examples=6))
    assert stop.value.code == 130
    shown = capsys.readouterr().out
    assert "interrupted in the report at step 3" in shown
    assert f"python -m grip_env.evaluate {tmp_path / 'run'}" in shown
    assert Scorer.load(tmp_path / "run" / "agent").state_dict()["out.1.weight"].abs().sum() > 0


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"vlm": "/no/such/folder"}, ["cannot load the vision-language model '/no/such/folder'", "save_pretrained"]),
        ({"group": 1}, ["at least 2 subsets", "group=1"]),
        ({"min_budget": 0.9}, ["0 < min_budget <= max_budget <= 1", "0.9, 0.5"]),
        ({"pool": 0}, ["size=0"]),
        ({"pool": 10**20}, ["a pool holds its examples in memory, 10,000,000 at most; got 1000"]),
        ({"group": 10**20}, ["group must be below 2**31; got 1000"]),
        ({"pool": 4}, ["instances=6", "pool=4"]),
        ({"task": "photos"}, ["unknown task 'photos'", "scenes"]),
        ({"min_budget": 0.0}, ["0 < min_budget <= max_budget <= 1", "0.0, 0.5"]),
        ({"max_budget": 1.5}, ["0 < min_budget <= max_budget <= 1", "0.03, 1.5"]),
        ({"instances": 0}, ["instances must be at least 1; got 0"]),
        ({"steps": -1}, ["steps must be at least 0; got -1"]),
        ({"learning_rate": 0.0}, ["learning_rate", "must be above 0; got 0.0"]),
        ({"picture_every": 0}, ["--picture-every must be at least 1; got 0"]),
        ({"examples": -1}, ["--examples must be at least 0; got -1"]),
        ({"seed": -1}, ["--seed must be at least 0; got -1"]),
        ({"name": "../elsewhere"}, ["--name is the name of a folder", "../elsewhere"]),
        ({"name": ".."}, ["--name is the name of a folder", "got '..'"]),
        ({"seed": 2**64}, ["--seed must be below"]),
        ({"std_floor": 0.0}, ["std_floor must be above 0; got 0.0"]),
        ({"clip_low": -0.1}, ["clip_low must not be negative; got -0.1"]),
        ({"reward": "bleu"}, ["--reward: ", "no reward 'bleu'", "log_likelihood, probability, exact_match, agreement"]),
        ({"reward": "agreement ** 2"}, ["--reward: ", "'agreement ** 2' is not a name"]),
        (
            {"reward": "no_such_module:mine"},
            ["--reward: ", "No module named 'no_such_module'", "package.module:object"],
        ),
    ],
)
def test_impossible_settings_stop_with_one_line_and_leave_no_folder(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], parts: list[str]
) -> None:
    config = settings(vlm_folder, tmp_path, **changes)
    with pytest.raises(SystemExit) as stop:
        train(config)
    message = refusal(stop.value, capsys)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def test_existing_runs_are_never_written_to(run: Path, vlm_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        train(settings(vlm_folder, run.parent, run.name))
    assert f"{run} already exists: choose another --name" in refusal(stop.value, capsys)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_runs_path_that_cannot_be_written_stops_with_one_line(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        train(settings(vlm_folder, tmp_path / "file"))
    assert f"cannot write to {tmp_path / 'file' / 'run'}" in refusal(stop.value, capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_evaluating_what_is_no_run_stops_with_one_line(tmp_path: Path) -> None:
    code, out, err = finish(start("-m", "grip_env.evaluate", tmp_path, cwd=tmp_path))
    assert code == 2
    assert out == ""
    assert one_line(err)
    assert f"{tmp_path} is not a run: expected a folder with config.json" in err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("agent", "has no trained agent yet"),
        ("truncated", "is damaged (the file cannot be read)"),
        ("other sizes", "is damaged (scorer.json is not the one that was written with the weights)"),
        ("other width", "was made for visual tokens of width 64, and those of"),
        ("settings", "scorer.json"),
        ("vlm", "cannot load the vision-language model '/moved/away'"),
        ("config", "config.json is not as grip_env.train wrote it"),
        ("other model", "was trained on a vision-language model with other weights than"),
        ("warmup", "warmup is damaged (the file cannot be read)"),
        ("out", "cannot write to"),
        ("examples", "--examples must be at least 1; got 0"),
    ],
)
def test_evaluating_an_incomplete_run_stops_with_one_line(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
    message: str,
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in copy.glob("*.*"):
        if path.name != "config.json":
            path.unlink()
    agent = copy / "agent"
    if broken == "agent":
        shutil.rmtree(agent)
    elif broken == "truncated":
        truncate(agent / "scorer.safetensors")
    elif broken == "other sizes":
        Scorer(ScorerConfig(width=48)).save(tmp_path)
        shutil.copy(tmp_path / "scorer.safetensors", agent)
    elif broken == "other width":
        Scorer(ScorerConfig(token_width=64)).save(agent)
    elif broken == "settings":
        (agent / "scorer.json").unlink()
    elif broken == "vlm":
        config = json.loads((copy / "config.json").read_text())
        config["config"]["vlm"] = "/moved/away"
        (copy / "config.json").write_text(json.dumps(config))
    elif broken == "config":
        truncate(copy / "config.json")
    elif broken == "other model":
        config = json.loads((copy / "config.json").read_text())
        config["vlm"]["checksum"] = "0" * 64
        (copy / "config.json").write_text(json.dumps(config))
    elif broken == "warmup":
        truncate(copy / "warmup" / "scorer.safetensors")
    elif broken == "out":
        (copy / "test-6").write_text("in the way")
    before = sorted(copy.rglob("*"))
    count = "0" if broken == "examples" else "6"
    monkeypatch.setattr(sys, "argv", ["evaluate", str(copy), "--examples", count])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert message in refusal(stop.value, capsys)
    assert sorted(copy.rglob("*")) == before


def test_unknown_algorithms_are_refused_with_the_choices(tmp_path: Path) -> None:
    code, out, err = finish(start("-m", "grip_env.train", "--algo", "alphazero", cwd=tmp_path))
    assert code == 2
    assert out == ""
    assert "alphazero" in err
    assert "grpo" in err
    assert not list(tmp_path.iterdir())


# -- the benchmark ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_benchmark_trains_once_compares_and_refuses_other_settings(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"steps": 2, "warmup-steps": 1, "instances": 6, "candidates": 1, "group": 2, "pool": 8}
    extra = ("--vlm", str(vlm_folder), "--examples", "6", "--no-progress")
    extra += tuple(f"--grpo.{key}={value}" for key, value in tiny.items())
    config = benchmark.Config(seeds=(5, 6), runs=tmp_path, examples=12, drawing=False, extra=extra)
    unfinished = tmp_path / "benchmark-seed5"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")

    reports = []
    for seed in config.seeds:
        report, minutes = benchmark.run_seed(config, seed)
        assert minutes is not None
        assert report["examples"] == 12
        reports.append(report)
    assert "benchmark-seed5 has not finished: starting it again" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train", lambda _: pytest.fail("a finished run was trained again"))
        shown = tuple(option for option in extra if option != "--no-progress")  # how it is shown changes no result
        again, minutes = benchmark.run_seed(dataclasses.replace(config, extra=shown), 5)
    assert minutes is None
    assert again["cells"] == reports[0]["cells"]

    margin, interval = benchmark.paired(reports, "this agent", "random", "0.05")
    agent, chance = (
        sum(report["single"][f"{name}@0.05"].astype(np.float64) for report in reports) / 2
        for name in ("this agent", "random")
    )
    gains = agent - chance
    assert gains.shape == (12,)
    assert margin == pytest.approx(gains.mean())
    assert interval == pytest.approx(1.96 * gains.std(ddof=1) / 12**0.5)
    table = benchmark.summary(reports)
    means = [table[name]["0.05"]["log_likelihood"][0] for name in ("this agent", "random")]
    assert margin == pytest.approx(means[0] - means[1], abs=1e-5)
    assert not all(holds for _, holds in benchmark.promises(reports, ratio=1.6))  # too slow a step is a miss

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        benchmark.run_seed(dataclasses.replace(config, extra=(*extra, "--reward", "probability")), 5)
    assert "was made with other settings of reward: choose another --runs" in refusal(stop.value, capsys)


def test_what_else_is_compared_does_not_change_a_methods_numbers(vlm_folder: Path) -> None:
    vlm, task = load_vlm(vlm_folder), SceneTask()
    alone = compare(vlm, task, {"random": BASELINES["random"]}, examples=6, budgets=(0.1, 0.2), progress=False)
    beside = compare(vlm, task, BASELINES, examples=6, budgets=(0.2, 0.1), progress=False)
    for budget in (0.1, 0.2):
        assert alone.value("random", budget) == pytest.approx(beside.value("random", budget), abs=1e-5)


def test_tables_say_which_positions_every_row_has(vlm_folder: Path, tmp_path: Path) -> None:
    vlm, task = load_vlm(vlm_folder), SceneTask()
    alike = {"random": BASELINES["random"], "FastV": FastV(budget_of="kept")}
    both = alike | {"PyramidDrop": PyramidDrop(budget_of="kept")}
    options: dict[str, Any] = {"examples": 4, "budgets": (0.2,), "progress": False}
    assert "`original` (as in the full sequence): every method." in compare(vlm, task, alike, **options).markdown()
    comparison = compare(vlm, task, both, **options).merged({"fast": ["FastV"]})
    assert "`original` (as in the full sequence): random, fast, all tokens;" in comparison.markdown()
    assert "`reindex` (renumbered without gaps): PyramidDrop." in comparison.markdown()
    comparison.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["positions"]["PyramidDrop"] == "reindex"
    renumbering = load_vlm(vlm_folder, position_policy="reindex")
    assert compare(renumbering, task, alike, **options).positions == {
        "random": "reindex", "FastV": "original", "all tokens": "reindex"
    }  # fmt: skip


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("owned", [False, True])
def test_another_package_called_agents_is_named_with_the_remedy(tmp_path: Path, command: str, owned: bool) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("class Agent: ...\n")
    if owned:
        record = tmp_path / "openai_agents-0.1.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: openai-agents\nVersion: 0.1\n")
        (record / "top_level.txt").write_text("agents\n")
    code, out, err = finish(start("-m", f"grip_env.{command}", tmp_path / "x", cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert code == 2
    assert out == ""
    assert one_line(err), err
    assert f"the package 'agents' at {tmp_path / 'agents'}" in err
    assert "shadows the package of grip_env" in err
    rename = f"start the command in another folder, or rename {tmp_path / 'agents'}"
    assert ("`pip uninstall openai-agents` and reinstall grip-env" if owned else rename) in err
    assert ("of the distribution openai-agents" in err) == owned


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (
            train_module,
            [
                "--algo",
                "--vlm",
                "--data",
                "--skip-bad",
                "--seed",
                "--grpo.std-floor",
                "--grpo.kl-weight",
                "--examples",
            ],
        ),
        (evaluate, ["Folders of runs", "--policies", "--budgets", "--split", "--examples", "--data", "--out"]),
    ],
)
def test_help_lists_every_option(
    module: Any, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options)
    assert f"python -m {module.__name__}" in shown


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    code = """
import sys
from grip_env.cli import interruptible
with interruptible("interrupted"):
    sys.stdin.read()  # until the reader of the output has gone
    print("x" * 100000)
"""
    command = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert command.stdout is not None
    command.stdout.close()
    _, errors = command.communicate(b"")
    assert errors == b""
    assert command.returncode == 141

"""The commands on the user's own data: what is refused before anything is written, and what a run remembers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agents.scorer import Scorer
from grip_env import benchmark, cli, evaluate
from grip_env import train as train_module
from grip_env.run_folder.folder import RunFolder
from grip_env.tasks.files import FileTask
from grip_env.train import train
from tests.test_commands import one_line, settings

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "gray", "pink")


def write_data(folder: Path, splits: tuple[str | None, ...] = ("train", "train", "validation", "test")) -> Path:
    """Write two questions about each of ten plain pictures; ``splits`` are given in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 30), colour).save(folder / f"{index}.png")
        row: dict[str, Any] = {"image": f"{index}.png", "split": splits[index % len(splits)]}
        lines += [row | {"question": "what color is it?", "answer": colour, "family": "color"}]
        lines += [row | {"question": "is it a picture?", "answer": "yes", "family": "existence"}]
    path = folder / "pets.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(vlm_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the data, with a report."""
    return train(settings(vlm_folder, tmp_path_factory.mktemp("runs"), data=data, examples=50))


def stops(call: Any, *arguments: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2


# -- training --------------------------------------------------------------------------------------------


def test_a_run_remembers_its_data(run: Path, data: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    task = FileTask(data)
    assert config["config"]["data"] == str(data)
    assert config["config"]["skip_bad"] is False
    assert config["data"] == {
        "fingerprint": task.fingerprint,
        "sizes": {"train": 12, "validation": 4, "test": 4},
    }
    assert Scorer.load(run / "agent").state_dict()["out.1.weight"].abs().sum() > 0


def test_the_report_is_on_the_test_split_without_an_oracle(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert (report["split"], report["examples"], report["tokens"]) == ("test", 4, 144)
    assert list(report["cells"]) == [
        "random",
        "uniform grid",
        "CLS attention",
        "max-min diversity",
        "its warm-up",
        "this agent",
        "all tokens",
    ]
    assert set(report["cells"]["this agent"]["0.1"]["families"]) == {"color", "existence"}
    assert "oracle" not in (run / "report.md").read_text()
    assert np.asarray(Image.open(run / "kept_tokens.png")).std() > 10


def test_relative_data_are_found_again_from_elsewhere(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    folder = train(settings(vlm_folder, tmp_path / "runs", "", data=Path("pets.jsonl"), steps=0))
    assert folder.name.startswith("grpo-pets-seed0-")
    assert "data: pets: 20 questions about 10 different images (train 12" in capsys.readouterr().out
    monkeypatch.chdir("/")
    comparison = evaluate.evaluate(evaluate.Config((folder,), examples=2))
    assert comparison.examples == 2
    assert "oracle" not in comparison.cells
    assert "note:" not in capsys.readouterr().err


def test_bad_data_stop_before_the_model_is_loaded_and_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_data(tmp_path / "data")
    lines = path.read_text().splitlines()
    lines[3:5] = ['{"image": "none.png", "question": "q", "answer": "a"}', '{"image": "0.png", "question": "q"}']
    path.write_text("\n".join(lines))
    monkeypatch.setattr("grip_env.vlms.load_vlm", lambda _: pytest.fail("the model was loaded"))
    arguments = ["train", "--data", str(path), "--runs", str(tmp_path / "runs"), "--name", "run"]
    monkeypatch.setattr(sys, "argv", arguments)
    stops(train_module.main)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {path} has 2 faults:\n")
    assert "pets.jsonl:4: the image 'none.png' does not exist" in shown.err
    assert "pets.jsonl:5: \"answer\" is missing (the row has 'image', 'question')" in shown.err
    assert "--skip-bad" in shown.err
    assert not (tmp_path / "runs").exists()


def test_texts_that_the_model_cannot_be_given_stop_a_run_before_its_first_step(
    vlm_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grip_env.vlms.families.base.Family.marker", "orange")  # as if it stood for the image
    config = settings(vlm_folder, tmp_path / "runs", data=data)
    monkeypatch.setattr("grip_env.vlms.huggingface.HuggingFaceVLM._try_processor", lambda self: None)
    stops(train, config)
    shown = capsys.readouterr()
    assert f"error: {data} has 1 fault:\n" in shown.err
    assert "pets.jsonl:11: \"answer\" holds 'orange', which stands for an image" in shown.err
    assert not (tmp_path / "runs").exists()
    _, task = cli.load_model_and_task(config, "scenes", data, skip_bad=True, splits=("train",))
    assert sum(map(task.size, task.splits)) == 19
    assert "skipped 1 row of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Path("/no/such/pets.jsonl")}, "/no/such/pets.jsonl does not exist: expected a .jsonl file"),
        ({"data": Path("/dev/null")}, "/dev/null is not a regular file"),
        ({"skip_bad": True}, "--skip-bad is about the rows of --data"),
        ({"data": "good", "teacher": "relevance"}, "--grpo.teacher relevance needs the ground truth"),
        ({"data": "good", "vlm": "/no/such/folder"}, "cannot load the vision-language model '/no/such/folder'"),
    ],
)
def test_impossible_settings_stop_with_one_line(
    vlm_folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    changes = {key: data if value == "good" else value for key, value in changes.items()}
    stops(train, settings(vlm_folder, tmp_path / "runs", **changes))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert one_line(shown.err), shown.err
    assert message in shown.err
    assert not (tmp_path / "runs").exists()


def test_skipped_rows_are_listed_on_standard_error(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_data(tmp_path / "data")
    with path.open("a") as file:
        file.write('{"image": "0.png", "question": ""}\n' + "{\n" * 30)
    folder = train(settings(vlm_folder, tmp_path / "runs", data=path, skip_bad=True, steps=0))
    listed = capsys.readouterr().err
    assert f"skipped 31 rows of {path}:\n" in listed
    assert 'pets.jsonl:21: "question" is empty' in listed
    assert listed.count("  pets.jsonl:") == 32, "all of them are listed"
    assert json.loads((folder / "config.json").read_text())["config"]["skip_bad"] is True
    # evaluate leaves out what training left out
    assert evaluate.evaluate(evaluate.Config((folder,), examples=2)).examples == 2
    assert "skipped 31 rows" in capsys.readouterr().err


def test_a_split_is_needed_only_where_it_is_used(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_data(tmp_path / "data", ("train",))
    stops(train, settings(vlm_folder, tmp_path / "runs", data=path, examples=6))
    told = capsys.readouterr().err
    assert one_line(told)
    assert "the test split has no examples: pets: 20 questions about 10 different images (train 20, " in told
    assert '"split"' in told
    assert "--examples 0" in told
    assert not (tmp_path / "runs").exists()

    folder = train(settings(vlm_folder, tmp_path / "runs", data=path, steps=0))
    capsys.readouterr()
    stops(evaluate.evaluate, evaluate.Config((folder,), split="validation"))
    told = capsys.readouterr().err
    assert "the validation split has no examples" in told
    assert "--examples" not in told
    assert evaluate.evaluate(evaluate.Config((folder,), split="train", examples=3)).examples == 3

    stops(train, settings(vlm_folder, tmp_path / "runs", "other", data=write_data(tmp_path / "none", ("test",))))
    assert "the train split has no examples" in capsys.readouterr().err


def test_an_image_that_changes_during_training_ends_it_and_keeps_the_agent(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_data(tmp_path / "data")
    log = RunFolder.log

    def change(self: RunFolder, phase: str, step: int, values: Any) -> None:
        for image in path.parent.glob("*.png"):
            image.write_bytes(b"junk")
        log(self, phase, step, values)

    monkeypatch.setattr(RunFolder, "log", change)
    stops(train, settings(vlm_folder, tmp_path / "runs", data=path, reuse=1))
    told = capsys.readouterr().err
    assert one_line(told)
    assert "stopped in warmup at step 0: pets.jsonl:" in told
    assert "since the data were checked, the image is not an image" in told
    assert f"the agent so far is in {tmp_path / 'runs' / 'run'}" in told
    assert Scorer.load(tmp_path / "runs" / "run" / "agent").state_dict()["out.1.weight"].abs().sum() > 0


# -- comparing -------------------------------------------------------------------------------------------


def test_evaluate_gives_the_numbers_of_the_report_on_the_runs_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = evaluate.evaluate(evaluate.Config((run,), examples=50, out=tmp_path))
    report = json.loads((run / "report.json").read_text())
    for method, cells in report["cells"].items():
        for budget, cell in cells.items():
            found = comparison.value(method, float(budget))
            assert found == pytest.approx(cell["log_likelihood"], abs=1e-4), method
    assert capsys.readouterr().err.count("note:") == 0


def test_changed_data_are_noted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = write_data(tmp_path / "data", ("test",))
    config = json.loads((copy / "config.json").read_text())
    config["config"]["data"] = str(path)
    (copy / "config.json").write_text(json.dumps(config))
    evaluate.evaluate(evaluate.Config((copy,), examples=2, out=tmp_path / "out"))
    assert f"note: {path} has changed since this agent was trained on it: pets: 20 questions" in capsys.readouterr().err


def test_data_that_went_away_stop_with_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    gone = config["config"] | {"data": "/gone/pets.jsonl"}
    (copy / "config.json").write_text(json.dumps(config | {"config": gone}))
    stops(evaluate.evaluate, evaluate.Config((copy,)))
    told = capsys.readouterr().err
    assert one_line(told)
    assert "/gone/pets.jsonl does not exist" in told
    del config["data"]
    (copy / "config.json").write_text(json.dumps(config))
    stops(evaluate.evaluate, evaluate.Config((copy,)))
    assert "is not as grip_env.train wrote it" in capsys.readouterr().err


def test_an_agent_of_the_scenes_can_be_compared_on_data(
    vlm_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(settings(vlm_folder, tmp_path, steps=0))
    stops(evaluate.evaluate, evaluate.Config((folder,), skip_bad=True))
    assert "--skip-bad is about the rows of --data" in capsys.readouterr().err
    comparison = evaluate.evaluate(evaluate.Config((folder,), data=data))
    assert comparison.examples == 4
    assert (folder / "pets-test-480" / "report.json").is_file()
    assert "note:" not in capsys.readouterr().err


def test_the_benchmark_is_about_the_scenes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stops(benchmark.run_seed, benchmark.Config(runs=tmp_path / "runs", extra=("--data", str(data))), 0)
    assert "leave out --data" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

"""The command that answers one question, as a user starts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grip_env.answer import Config, answer
from grip_env.common.errors import CommandError
from grip_env.tasks.scenes import SceneTask
from tests.test_commands import finish, start


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    Image.fromarray(SceneTask().example("test", 1).image).save(path)
    return path


def test_command_prints_both_answers_and_draws_what_was_kept(picture: Path, tmp_path: Path) -> None:
    example = SceneTask().example("test", 1)
    process = start(
        "-m", "grip_env.answer", "--image", picture, "--question", example.question, "--budget", "0.2", cwd=tmp_path
    )
    code, out, err = finish(process)
    assert code == 0, err
    assert re.search(r"29 of 144 tokens +all tokens", out)
    assert re.search(rf"answer +{example.answer} +{example.answer}\n", out)
    for line in ("likelihood per token", "encode, ms", "select, ms", "prefill, ms", "decode, ms", "in all, ms"):
        assert re.search(rf"{line} +[\d.]+ +[\d.]+\n", out), line
    drawn = np.array(Image.open(tmp_path / "answer.png"))
    assert drawn.ndim == 3
    assert drawn.std() > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.0}, r"--budget is a share .* got 0"),
        ({"budget": 1.01}, r"--budget is a share .* got 1.01"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"image": Path("/no/such.png")}, "--image /no/such.png does not exist"),
        ({"image": Path(__file__)}, "is not an image"),
        ({"run": Path("/no/such/run")}, "no scorer in /no/such/run"),
        ({"device": "gpu"}, "cannot use --device 'gpu' .*: choose cpu"),
        ({"vlm": "/no/such/model"}, "cannot load the vision-language model '/no/such/model'"),
        ({"question": "what is <image>?"}, "exactly one image placeholder"),
        ({"out": Path(__file__)}, "--out .*test_answer.py is not a folder; choose another folder"),
    ],
)
def test_wrong_options_end_with_one_line(
    picture: Path, tmp_path: Path, changes: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, object] = {"image": picture, "question": "is there a red ring?", "out": tmp_path / "new"}
    with pytest.raises(CommandError) as stop:
        answer(Config(**(options | changes)))  # type: ignore[arg-type]
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_json_alone_goes_to_standard_output(picture: Path, tmp_path: Path) -> None:
    example = SceneTask().example("test", 1)
    process = start(
        "-m", "grip_env.answer", "--image", picture, "--question", example.question, "--out", "new/deep", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    code, out, err = finish(process)
    assert code == 0, err
    told = json.loads(out)
    assert (told["dense"]["text"], len(told["pruned"]["kept"]), told["pruned"]["of"]) == (example.answer, 14, 144)
    assert told["picture"] == "new/deep/answer.png"
    assert (tmp_path / told["picture"]).is_file()
    assert "likelihood per token" in err

"""Saved models are read whole or refused: no weight is ever made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grip_env import vlms
from grip_env.vlms import load_vlm

WEIGHTS = "model.safetensors"
PROJECTOR = "multi_modal_projector.linear_1.weight"


def projector(names: Iterable[str]) -> str:
    return next(name for name in names if name.endswith(PROJECTOR))


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights[projector(weights)]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def reshape_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = projector(weights)
    weights[name] = weights[name][1:].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
    "truncated weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000]),
        "deserializing header",
    ),
    "a tensor missing": (drop_a_tensor, f"{PROJECTOR} for one"),
    "a tensor of another shape": (reshape_a_tensor, f"{PROJECTOR} for one"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "image processor"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json' is not a valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_incomplete_model_is_refused_in_one_line(vlm_folder: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm_folder, folder)
    load_vlm(folder)
    breaking, reason = FAULTS[fault]
    breaking(folder)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_vlm(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert reason in message
    assert message.endswith("save it again")
    assert "\n" not in message


def test_a_name_that_is_no_folder_says_what_to_give() -> None:
    with pytest.raises(
        ValueError, match=r"no-such/model cannot be read \(.*\): give a folder that save_pretrained wrote"
    ):
        load_vlm("no-such/model")


def test_an_embedded_model_that_did_not_come_along_says_reinstall(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(vlm_folder, folder)
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(vlms, "TINY", folder)
    with pytest.raises(FileNotFoundError, match=r"the embedded model is missing or damaged, .*: reinstall grip-env"):
        load_vlm()
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"the embedded model is missing or damaged, .*: reinstall grip-env"):
        load_vlm("tiny")

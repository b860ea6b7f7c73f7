"""Files of agents: what was damaged on the way is not loaded, and what cannot be written leaves what was there."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agents.pruner import PRETRAINED
from agents.sb3.checkpoint import TrainingState
from agents.scorer import Scorer, ScorerConfig
from grip_env.common.finite import NonFiniteError

FILES = ("scorer.safetensors", "scorer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Scorer(ScorerConfig(token_width=8, width=8, blocks=1, heads=1)).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    places = random.Random(0).sample(range(8 * len(whole)), min(300, 8 * len(whole)))
    for place in [*range(0, 512, 7), *places, 8 * len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged .*train it again or copy it anew"):
            Scorer.load(folder)
    path.write_bytes(whole)
    Scorer.load(folder)


def test_a_flipped_bit_in_the_state_of_a_training_is_found(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2)
    path = tmp_path / "training.safetensors"
    TrainingState.of(network, torch.optim.AdamW(network.parameters()), {"step": 3}).write(path)
    assert TrainingState.read(path).about == {"step": 3}
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            TrainingState.read(path)


def test_an_agent_without_its_digest_is_not_loaded(folder: Path) -> None:
    weights = load_file(folder / "scorer.safetensors")
    save_file(weights, folder / "scorer.safetensors")
    with pytest.raises(ValueError, match="it has no digest"):
        Scorer.load(folder)


def test_configuration_and_weights_of_two_agents_do_not_mix(folder: Path, tmp_path: Path) -> None:
    text = (folder / "scorer.json").read_text()
    (folder / "scorer.json").write_text(text.replace('"use_question": true', '"use_question": false'))
    with pytest.raises(ValueError, match=r"scorer\.json is not the one that was written with the weights"):
        Scorer.load(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(folder: Path, number: float) -> None:
    before = {name: (folder / name).read_bytes() for name in FILES}
    scorer = Scorer.load(folder)
    with torch.no_grad():
        next(scorer.parameters()).view(-1)[0] = number
    with pytest.raises(NonFiniteError, match="the scorer has NaN or infinite numbers in"):
        scorer.save(folder)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    network = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(network.weight, number)
    with pytest.raises(NonFiniteError, match="in weight"):
        TrainingState.of(network, torch.optim.AdamW(network.parameters()), {}).write(folder / "state")
    assert not (folder / "state").exists()


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_user_chose_for_files(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        Scorer(ScorerConfig(token_width=8, width=8, blocks=1, heads=1)).save(tmp_path / "agent")
        network = torch.nn.Linear(2, 2)
        TrainingState.of(network, torch.optim.AdamW(network.parameters()), {}).write(tmp_path / "agent" / "state")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "agent").iterdir()} == {mode}


def test_a_disk_without_room_leaves_the_agent_that_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    other = Scorer(ScorerConfig(token_width=8, width=8, blocks=1, heads=1))
    with pytest.raises(OSError, match="No space left"):
        other.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_agent_of_the_package_is_whole() -> None:
    assert Scorer.load(PRETRAINED / "tiny").config.in_turn


def test_the_same_agent_is_the_same_file(tmp_path: Path) -> None:
    scorer = Scorer(ScorerConfig(width=32, blocks=1))
    for attempt in range(8):
        scorer.save(tmp_path / str(attempt))
    assert len({(tmp_path / str(attempt) / "scorer.safetensors").read_bytes() for attempt in range(8)}) == 1

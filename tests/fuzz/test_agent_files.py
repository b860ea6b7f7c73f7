"""Files of agents with random damage, and files that were written whole but by somebody else."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.agent import find_algorithm
from agents.sb3.checkpoint import SEAL as STATE_SEAL
from agents.sb3.checkpoint import TrainingState
from agents.sb3.set_policy import SetNetwork
from agents.scorer import SEAL, Scorer, ScorerConfig
from grip_env.common.sealed_files import seal
from tests.fakes import WIDTH, FakeVLM
from tests.fuzz import fuzzed

CONFIG = ScorerConfig(token_width=WIDTH, width=8, blocks=1, heads=1, in_turn=True, pair_width=2)
SIZES = ("token_width", "width", "blocks", "heads", "pair_width")


@functools.cache
def scorer() -> Scorer:
    torch.manual_seed(0)
    return Scorer(CONFIG)


@functools.cache
def state() -> TrainingState:
    torch.manual_seed(0)
    network = SetNetwork(ScorerConfig(token_width=WIDTH, width=8, blocks=1, heads=1))
    about = {"algorithm": "maskable-ppo", "scorer": asdict(network.scorer.config)}
    whole = TrainingState.of(network, torch.optim.AdamW(network.parameters()), about)
    weights = {f"features_extractor.network.{name}": value for name, value in whole.weights.items()}
    return whole._replace(weights=weights)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agent")
    scorer().save(folder)
    state().write(folder / "training.safetensors")
    return folder


def outcome(load: Callable[[Path], Any], folder: Path) -> Any:
    """What was loaded, or what was said about why not."""
    try:
        return load(folder)
    except ValueError as error:
        return str(error)


def same(one: Scorer, other: Scorer) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return one.config == other.config and all(value.equal(theirs[name]) for name, value in ours.items())


DOORS: dict[str, Callable[[Path], Any]] = {
    "scorer": Scorer.load,
    "grpo": lambda folder: find_algorithm("grpo").load(folder, FakeVLM()),
    "maskable-ppo": lambda folder: find_algorithm("maskable-ppo").load(folder, FakeVLM()),
    "training": lambda folder: TrainingState.read(folder / "training.safetensors"),
}


def test_whole_files_are_loaded(whole: Path) -> None:
    for load in DOORS.values():
        load(whole)


@fuzzed
@given(data=st.data(), name=st.sampled_from(["scorer.json", "scorer.safetensors", "training.safetensors"]))
def test_damaged_files(data: st.DataObject, name: str, whole: Path) -> None:
    content = bytearray((whole / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # the header is where damage has the most ways to be something else
        place = data.draw(st.integers(0, min(400, len(content))) | st.integers(0, len(content)))
        end = min(len(content), place + data.draw(st.sampled_from([0, 1, 1, 8, 100, 10**6])))
        content[place:end] = data.draw(st.binary(max_size=8))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        Path(folder, name).write_bytes(content)
        for load in DOORS.values():
            found = outcome(load, Path(folder))
            assert not isinstance(found, str) or "damaged" in found
            if isinstance(found, Scorer):
                assert same(found, scorer())


VALUES = st.none() | st.booleans() | st.integers(-3, 20) | st.sampled_from([10**9, 10**400, 1.5, "8", [8], {}])


@fuzzed
@given(changes=st.dictionaries(st.sampled_from([*asdict(CONFIG), "other"]), VALUES, max_size=3), top=VALUES)
def test_configurations_that_do_not_fit_their_weights(changes: dict[str, Any], top: Any) -> None:
    """With a digest that is right, as whoever writes the file can give it; above all, nothing large is made."""
    for config in (asdict(CONFIG) | changes, top):
        text = json.dumps(config)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "scorer.json").write_text(text)
            Path(folder, "scorer.safetensors").write_bytes(seal(SEAL, scorer().state_dict(), {"config": text}))
            found = outcome(Scorer.load, Path(folder))
            assert "damaged" in found if isinstance(found, str) else asdict(found.config) == asdict(CONFIG) | config
            about = state().about | {"scorer": config}
            state()._replace(about=about).write(Path(folder, "training.safetensors"))
            found = outcome(DOORS["maskable-ppo"], Path(folder))
            assert not isinstance(found, str) or "was not written by maskable-ppo" in found


@pytest.mark.parametrize("about", ["[]", "3", '{"algorithm": 3}', '{"algorithm": "maskable-ppo", "scorer": []}', "{"])
def test_states_that_say_something_else(about: str, tmp_path: Path) -> None:
    content = seal(STATE_SEAL, {"weights/a": torch.ones(1), "moments/0/b": torch.ones(1)}, {"about": about})
    (tmp_path / "training.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"was not written by maskable-ppo|is damaged"):
        DOORS["maskable-ppo"](tmp_path)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_beyond_all_memory_are_refused_at_once(size: str, tmp_path: Path) -> None:
    text = json.dumps(asdict(CONFIG) | {size: 10**12})
    (tmp_path / "scorer.json").write_text(text)
    (tmp_path / "scorer.safetensors").write_bytes(seal(SEAL, scorer().state_dict(), {"config": text}))
    with pytest.raises(ValueError, match="its configuration does not fit its weights"):
        Scorer.load(tmp_path)

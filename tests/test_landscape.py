"""The landscape command with a random model, two blocks of six and few instances; its statistics are tested apart."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from agents.heuristics import BASELINES
from grip_env import landscape
from grip_env.common.errors import CommandError
from grip_env.exact.reward_table import RewardTable, score_subsets
from grip_env.exact.ruggedness import Terrain, explore
from grip_env.landscape import Config
from grip_env.rewards.parsing import resolve_reward
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms import load_vlm
from grip_env.vlms.blocks import BlockVLM
from tests.fakes import FakeTask, FakeVLM
from tests.test_commands import refusal


def settings(vlm: Path, folder: Path, /, **changes: Any) -> Config:
    options: dict[str, Any] = {"vlm": str(vlm), "rows": 2, "columns": 3, "k": (3, 2), "examples": 7}
    options |= {"table_cache": str(folder / "tables"), "out": folder / "out", "progress": False}
    return Config(**(options | changes))


@pytest.fixture(scope="module")
def explored(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[Terrain]]:
    config = settings(vlm_folder, tmp_path_factory.mktemp("landscape"))
    return config, landscape.landscape(config)


def content(config: Config) -> dict[str, Any]:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} in the file")

    return json.loads((config.out / "landscape.json").read_text(), parse_constant=refuse)


def test_files_hold_all_there_is_to_know(explored: tuple[Config, list[Terrain]]) -> None:
    config, terrains = explored
    assert {path.name for path in config.out.iterdir()} == {"landscape.md", "landscape.json", "landscape.png"}
    saved = content(config)
    assert saved["config"]["k"] == [3, 2]
    assert len(saved["vlm"]["checksum"]) == 64
    assert torch.__version__.startswith(saved["versions"]["torch"].split("+")[0])
    assert saved["instances"] == [terrain.plain() for terrain in terrains]
    assert [(one["index"], one["k"]) for one in saved["instances"]] == [(i, k) for i in range(7) for k in (3, 2)]
    families = [SceneTask().example("validation", index).family for index in range(7)]
    assert [one["family"] for one in saved["instances"][::2]] == families
    picture = np.asarray(Image.open(config.out / "landscape.png").convert("RGB"))
    assert picture.shape[1] > picture.shape[0] > 600  # two rows of three
    assert picture.std() > 10


def test_methods_are_held_against_the_optimum(explored: tuple[Config, list[Terrain]]) -> None:
    config, terrains = explored
    vlm, task = BlockVLM(load_vlm(config.vlm), 2, 3), SceneTask()
    for terrain in terrains[:4]:
        encoded = vlm.encode([task.example("validation", terrain.index)])
        table = RewardTable.enumerate(vlm, encoded, terrain.k)
        assert terrain.optimal_reward == pytest.approx(table.optimal_reward, abs=1e-4)
        assert set(terrain.methods) == {*BASELINES, "greedy forward", "swap ascent"}
        kept = torch.tensor([terrain.k])
        for name in ("uniform grid", "CLS attention", "max-min diversity"):
            chosen = BASELINES[name](vlm, encoded, kept, torch.Generator())[0].numpy()
            found = terrain.methods[name]
            assert found.gap == pytest.approx(table.optimality_gap(chosen), abs=1e-4)
            assert found.percentile == pytest.approx(table.percentile(chosen), abs=1e-6)
        assert terrain.methods["random"].gap == pytest.approx(table.optimal_reward - table.rewards.mean(), abs=1e-4)
        grades = encoded.relevance()
        assert grades is not None
        relevant = set(grades[0].nonzero().flatten().tolist())
        if len(relevant) <= terrain.k:  # the oracle fills up at random: a mean over selections that hold all of these
            holding = [row for row in range(len(table)) if relevant <= set(np.flatnonzero(table.selection(row)))]
            gaps = table.optimal_reward - table.rewards[holding]
            error = 4 * gaps.std() / math.sqrt(landscape.ORACLE_DRAWS)
            assert terrain.methods["oracle"].gap == pytest.approx(gaps.mean(), abs=error + 1e-4)


def test_tables_show_the_means(explored: tuple[Config, list[Terrain]]) -> None:
    config, terrains = explored
    text = (config.out / "landscape.md").read_text()
    three, two = text.split("**Keeping 2 of 6 blocks** (15 selections each)")
    assert three.startswith("**Keeping 3 of 6 blocks** (20 selections each)")
    for part, k in ((three, 3), (two, 2)):
        here = [terrain for terrain in terrains if terrain.k == k]
        rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in part.splitlines()}
        assert rows["instances"] == ["7", "2", *"11111"]  # seven instances of six families
        assert rows["landscape"] == ["all", *dict.fromkeys(terrain.family for terrain in here)]
        assert rows["local optima"][0] == f"{np.mean([terrain.local_optima for terrain in here]):.2f}"
        assert rows["submodularity violated"][0] == f"{np.mean([t.curvature.violations for t in here]):.2f}"
        place, optimal, gap, *_ = rows["greedy forward"]
        standing = [terrain.methods["greedy forward"] for terrain in here]
        assert place == f"{np.mean([one.percentile for one in standing]):.4f}"
        assert optimal == f"{np.mean([one.optimal for one in standing]):.2f}"
        assert gap == f"{np.mean([one.gap for one in standing]):.3f}"
        assert rows["random"][0] == "0.5000"
    assert "-0.000" not in text
    assert "nan" not in text


def test_scores_are_read_from_disk_by_the_next_run(
    explored: tuple[Config, list[Terrain]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, terrains = explored
    sizes: list[int] = []
    score = BlockVLM.score
    monkeypatch.setattr(BlockVLM, "score", lambda *given: sizes.append(given[2].shape[1]) or score(*given))
    again = landscape.landscape(dataclasses.replace(config, out=tmp_path, examples=6, k=(2, 3, 3)))
    assert set(sizes) == {1}  # nothing but the whole images
    assert [terrain.plain() for terrain in again[::2]] == [terrain.plain() for terrain in terrains[1:12:2]]
    assert len(again) == 12
    shown = capsys.readouterr().out
    assert "6 instances of the validation split" in shown
    assert f"wrote {tmp_path / 'landscape.png'}" in shown


def test_any_reward_and_no_folder_of_tables(vlm_folder: Path, tmp_path: Path) -> None:
    config = settings(vlm_folder, tmp_path, reward="probability", table_cache="none", examples=1, k=(2,))
    (terrain,) = landscape.landscape(config)
    assert not (tmp_path / "tables").exists()
    vlm = BlockVLM(load_vlm(vlm_folder), 2, 3)
    scores = score_subsets(vlm, vlm.encode([SceneTask().example("validation", 0)]), 2)
    assert terrain.optimal_reward == pytest.approx(float(scores.log_likelihood.exp().max()), rel=1e-3)


def test_what_a_model_or_task_lacks_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    class Blind(FakeVLM):
        def attention(self, *given: Any) -> torch.Tensor:
            raise NotImplementedError("fake has no attention")

    few = BlockVLM(Blind(count=lambda example: 16 if "number 1" in example.question else 2), 4, 4)
    config = Config(k=(2,), examples=3, split="test")
    done: list[int] = []
    terrains = landscape.survey(
        few, FakeTask(relevance=False), config, resolve_reward("probability"), None, done.append
    )
    assert [terrain.index for terrain in terrains] == [1]  # the others have no more than two blocks
    assert done == [1, 16, 120]
    assert not {"oracle", "CLS attention"} & set(terrains[0].methods)
    assert "left out of the comparison: fake has no attention" in capsys.readouterr().out


def test_pictures_are_drawn_of_one_instance_and_of_flat_rewards(tmp_path: Path) -> None:
    masks = BlockVLM(FakeVLM(), 2, 2)
    encoded = masks.encode([FakeTask().example("test", 0)])

    def flat(scores: Any, full: Any) -> torch.Tensor:
        return torch.zeros_like(scores.log_likelihood)

    tables = [RewardTable.enumerate(masks, encoded, size, flat) for size in range(3)]
    terrain = explore(tables, 0, "one")
    assert terrain.local_optima == 6
    landscape.draw([terrain], 4, tmp_path / "flat.png")
    assert np.asarray(Image.open(tmp_path / "flat.png")).std() > 1
    table = landscape.markdown([terrain], 4)
    assert "| landscape | all |" in table  # no columns for a single family


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (1,)}, "--k must be numbers from 2 to 5, of 6 blocks; got 1"),
        ({"k": (2, 6)}, "--k must be numbers from 2 to 5, of 6 blocks; got 2 6"),
        ({"k": ()}, "got nothing"),
        ({"rows": 0}, "--rows must be at least 1; got 0"),
        ({"examples": 0}, "--examples must be at least 1; got 0"),
        ({"rows": 4, "columns": 6, "k": (6,)}, "C(24, 6) = 134,596"),
        ({"rows": 9, "columns": 9}, "at most 64 can be listed; got 81"),
        ({"reward": "kl"}, "there is no reward 'kl'"),
        ({"vlm": "/no/such/folder"}, "cannot load the vision-language model"),
        ({"table_cache": "/etc/hostname"}, "is a file: give a folder"),
        ({"out": Path("/etc/hostname/out")}, "cannot write to /etc/hostname/out"),
        ({"threads": -1}, "--threads must be at least 0; got -1"),
    ],
)
def test_impossible_settings_stop_with_one_line(
    vlm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        landscape.landscape(settings(vlm_folder, tmp_path, **changes))
    assert message in refusal(stop.value, capsys)
    assert not (tmp_path / "out").exists()


def test_images_with_too_few_blocks_stop_with_one_line(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(landscape, "survey", lambda *given: [])
    with pytest.raises(SystemExit) as stop:
        landscape.landscape(settings(vlm_folder, tmp_path))
    assert "no image has more than 3 blocks that hold tokens" in refusal(stop.value, capsys)


def test_the_command_checks_lists_options_and_can_be_interrupted(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["landscape", "--help"])
    with pytest.raises(SystemExit) as stop:
        landscape.main()
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m grip_env.landscape" in shown
    options = ("--k", "--rows", "--columns", "--examples", "--split", "--reward", "--table-cache", "--vlm", "--data")
    assert all(option in shown for option in options)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["--vlm", str(vlm_folder), "--out", str(tmp_path / "out"), "--table-cache", "none", "--no-progress"]
    monkeypatch.setattr(sys, "argv", ["landscape", *arguments])
    monkeypatch.setattr(landscape, "survey", interrupted)
    with pytest.raises(SystemExit) as stop:
        landscape.main()
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().out

    def shadowed() -> None:
        raise CommandError("another package")

    monkeypatch.setattr(landscape, "check_agents_package", shadowed)
    with pytest.raises(SystemExit) as stop:
        landscape.main()
    assert "another package" in refusal(stop.value, capsys)

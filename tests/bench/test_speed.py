"""The speed benchmark: what is compared gives the same numbers, and is shown; never how long it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from grip_env import benchmark
from grip_env.bench import speed
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.test_commands import refusal


def test_masking_what_is_dropped_scores_as_dropping_it(random_vlm: HuggingFaceVLM) -> None:
    encoded = random_vlm.encode([SceneTask().example("train", index) for index in range(8)])
    selection = torch.rand(encoded.token_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    masked = speed.masked_log_likelihood(random_vlm, encoded, selection)
    exact = random_vlm.log_likelihood(encoded, selection[:, None])[:, 0]
    torch.testing.assert_close(masked, exact, atol=1e-4, rtol=0)
    assert exact.std() > 1e-3


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"vector": [12.0, 12.0], "SyncVectorEnv": [120.0, 120.0]}, ["throughput"]),
        ({"SyncVectorEnv": [70.0, 85.0]}, ["SyncVectorEnv"]),
        ({"masked": [39.0, 39.0]}, ["masking"]),
        ({"k-subset N=144": [15.0, 16.0]}, ["k-subset"]),
    ],
)
def test_bars_are_held_against_medians_of_ratios(change: dict[str, list[float]], missed: list[str]) -> None:
    times = {
        "raw": [10.0, 10.0],
        "raw, one by one": [80.0, 85.0],
        "vector": [10.0, 11.0],
        "SyncVectorEnv": [90.0, 99.0],
        "kept only": [10.0, 10.0],
        "masked": [41.0, 41.0],
        "k-subset N=144": [5.0, 5.0],
        "GRPO step": [100.0, 100.0],
    }
    bars = speed.Measured(times | change, {}).bars()
    assert len(bars) == 4
    assert [text for text, holds in bars if not holds] == [
        text for text, _ in bars if any(word in text for word in missed)
    ]
    assert sum(not holds for _, holds in bars) == len(missed)


@pytest.mark.slow
def test_the_command_measures_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "SIDES", (48,))
    monkeypatch.setattr(speed, "SUBSETS", (144,))
    monkeypatch.setattr(speed, "BUDGETS", (0.1,))
    out = tmp_path
    size = ["--num-envs", "2", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark", "speed", *size])
    code = 0
    try:
        benchmark.main()
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr().out
    assert code == ("MISSED" in printed)
    saved = json.loads((out / "speed.json").read_text())
    assert sum(line.startswith(("holds   ", "MISSED  ")) for line in printed.splitlines()) == 4
    assert all(len(times) == 1 and times[0] > 0 for times in saved["times"].values())
    assert saved["counts"]["reward against raw"] < 1e-4
    assert saved["counts"]["masked against kept only"] < 1e-4
    few, many = (saved["counts"][f"MB held after {episodes} episodes of 8 images"] for episodes in (16, 400))
    # some text is padded a little further when it first meets a longer one
    assert 0 < many < 1.1 * few, "memory grows with distinct images, not with episodes"
    assert (out / "speed.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--num-envs 0", "--num-envs must be at least 1; got 0"),
        ("--rounds 1", "--rounds must be at least 2; got 1"),
        ("--budget 2", "--budget is a share of the visual tokens in (0, 1]; got 2"),
        (f"--out {__file__}", "is not a folder; choose another folder"),
    ],
)
def test_bad_options_end_with_one_line(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "speed", *options.split()])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert said in refusal(stop.value, capsys)

"""Agents that look for evidence lose by the probes, agents that do not are found out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.base import budget_to_count, top_k
from agents.heuristics import oracle, uniform_grid
from grip_env import probe
from grip_env.vlms.base import Encoded, FrozenVLM
from tests.fakes import FakeTask, FakeVLM
from tests.test_commands import refusal


def brightest(vlm: FrozenVLM, encoded: Encoded, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Looks at the image, and not at the question: the coloured cell of FakeTask is the brightest."""
    return top_k(encoded.tokens[..., 0], kept, encoded.token_mask)


def values(selector: Any, **options: Any) -> dict[str, dict[float, np.ndarray]]:
    return probe.probe(FakeVLM(), FakeTask(40, **options), selector, "test", 40, (0.1, 0.25))


def test_each_probe_costs_an_agent_that_looks_at_the_image() -> None:
    found = values(brightest)
    assert set(found) == {probe.HONEST, *probe.PROBES, probe.RANDOM}
    holds = {text.split(", ")[1].split(" (")[0]: ok for text, ok in probe.verdicts(found) if text.startswith("10%")}
    assert holds == {"shuffled question": False, "swapped image": True, "without the evidence": True}
    assert (found["shuffled question"][0.1] == found[probe.HONEST][0.1]).all()


def test_an_agent_that_looks_at_nothing_loses_nothing() -> None:
    found = values(uniform_grid)
    for name in ("shuffled question", "swapped image"):
        assert probe.loss(found, name, 0.1)[0] == 0
    assert not any(holds for text, holds in probe.verdicts(found) if "evidence" not in text)


def test_losses_are_means_of_paired_differences() -> None:
    found = values(brightest)
    lost = found[probe.HONEST][0.25] - found["swapped image"][0.25]
    cost, interval = probe.loss(found, "swapped image", 0.25)
    assert cost == pytest.approx(sum(lost) / 40, abs=1e-6)
    assert interval == pytest.approx(1.96 * np.sqrt(np.sum((lost - lost.mean()) ** 2) / 39 / 40), rel=1e-5)
    lines = probe.table(found).splitlines()
    assert len(lines) == 2 + len(found)
    assert f"{found[probe.RANDOM][0.1].mean():.3f}" in lines[-1]


def test_choices_are_made_on_what_the_agent_was_shown() -> None:
    vlm, task = FakeVLM(), FakeTask(6)
    encoded = vlm.encode([task.example("test", index) for index in range(6)])
    kept = budget_to_count(encoded, 0.1)
    chosen = probe.selections(vlm, encoded, oracle, kept, torch.Generator().manual_seed(0))
    assert not (chosen["without the evidence"] & (encoded.relevance() > 0)).any()  # type: ignore[operator]
    seen = probe.selections(vlm, encoded, brightest, kept, torch.Generator())
    honest = brightest(vlm, encoded, kept, torch.Generator())
    assert seen["swapped image"].equal(honest[[1, 2, 3, 4, 5, 0]])
    assert all(bool((mask.sum(1) <= kept).all()) for mask in chosen.values())


def test_without_the_truth_its_probe_is_left_out() -> None:
    assert "without the evidence" not in values(brightest, relevance=False)


def test_examples_that_are_all_alike_mislead_nobody() -> None:
    with pytest.raises(ValueError, match="at least two different examples"):
        probe.partners(["same", "same"])


def test_images_of_different_size_are_refused() -> None:
    vlm, task = FakeVLM(count=lambda example: 12 + int(example.key[-1]) % 2), FakeTask()
    with pytest.raises(ValueError, match="same number of visual tokens"):
        probe.probe(vlm, task, brightest, "test", 4, (0.1,))


def test_the_command_prints_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    options = ["--examples", "24", "--budgets", "0.05", "--no-progress", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["probe", *options])
    probe.main()
    printed = capsys.readouterr().out
    saved = json.loads((out / "probe.json").read_text())
    assert [verdict["text"] in printed for verdict in saved["verdicts"]] == [True] * 3
    assert [verdict["holds"] for verdict in saved["verdicts"]] == [True] * 3
    assert len(saved["values"][probe.HONEST]["0.05"]) == 24


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--budgets 0", "--budgets are shares of the visual tokens in (0, 1]; got 0"),
        ("--budgets", "got nothing"),
        ("--examples 1", "--examples must be at least 2; got 1"),
        (f"--out {__file__}", "is not a folder; choose another folder"),
        ("missing", "no scorer in missing"),
    ],
)
def test_bad_options_end_with_one_line(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["probe", *options.split()])
    with pytest.raises(SystemExit) as stop:
        probe.main()
    assert said in refusal(stop.value, capsys)

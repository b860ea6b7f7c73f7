"""Presets decide what was not given; what was given stands; what contradicts itself is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from typing import Any

import pytest
import torch
import tyro

from agents.grpo import GRPO, PRESETS, RLOO, GRPOConfig, Objective, Reinforce
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from agents.training.grpo_config import ReinforceConfig, RLOOConfig
from tests.fakes import WIDTH, FakeTask, FakeVLM

SMALL: dict[str, Any] = {
    "steps": 2,
    "instances": 6,
    "group": 3,
    "warmup_steps": 1,
    "pool": 24,
    "probes": 2,
    "teacher": "relevance",
}


def build(config: GRPOConfig, kind: type[GRPO] = GRPO, vlm: FakeVLM | None = None) -> GRPO:
    torch.manual_seed(0)
    scorer = Scorer(ScorerConfig(token_width=WIDTH, width=32, blocks=1, heads=2))
    vlm = FakeVLM() if vlm is None else vlm
    return kind(vlm, ExamplePool(vlm, FakeTask(40), size=config.pool, reuse=config.reuse), scorer, config)


def options(help_text: str) -> dict[str, str]:
    """The help of each option, on one line."""
    flat = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", help_text))
    return {part.split()[0]: part for part in re.split(r" --(?=[a-z])", flat)[1:]}


def test_without_a_preset_nothing_is_decided_anew() -> None:
    resolved = GRPOConfig().resolved()
    assert resolved.objective() == PRESETS["default"] == Objective()
    assert (resolved.baseline, resolved.scale, resolved.std_floor) == ("group_mean", "batch", 0.1)
    assert (resolved.clip_low, resolved.clip_high, resolved.epochs) == (0.2, 0.28, 1)
    assert (resolved.kl_weight, resolved.entropy_weight, resolved.drop_flat) == (0.0, 0.0, False)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_fill_in_what_was_not_given_and_nothing_else(preset: Any) -> None:
    for field in dataclasses.fields(Objective):
        mine: dict[str, Any] = {
            "baseline": "group_mean",
            "scale": "batch",
            "drop_flat": True,
            "epochs": 3,
            "candidates": 2,
        }
        value = mine.get(field.name, 0.77)
        resolved = GRPOConfig(preset=preset, **{field.name: value}).resolved()
        assert resolved.objective() == dataclasses.replace(PRESETS[preset], **{field.name: value})
    for field in dataclasses.fields(Objective):  # what equals the usual default is given all the same
        usual = getattr(PRESETS["default"], field.name)
        assert getattr(GRPOConfig(preset=preset, **{field.name: usual}).resolved(), field.name) == usual
    whole = GRPOConfig(preset=preset).resolved()
    assert whole.objective() == PRESETS[preset]
    assert {f.name for f in dataclasses.fields(whole) if getattr(whole, f.name) is None} == set()
    assert whole.resolved() == whole
    assert GRPOConfig(**json.loads(json.dumps(dataclasses.asdict(whole)))) == whole  # what config.json keeps
    for field in dataclasses.fields(GRPOConfig):
        if field.name not in {f.name for f in dataclasses.fields(Objective)} | {"preset"}:
            assert getattr(whole, field.name) == getattr(GRPOConfig(), field.name)


def test_config_given_is_left_as_it_was() -> None:
    config = GRPOConfig(preset="dapo", **SMALL)
    algorithm = build(config)
    assert config.drop_flat is None
    assert algorithm.config.drop_flat is True
    assert dataclasses.replace(config, preset="grpo").resolved().kl_weight == 0.04


def test_command_line_knows_presets_and_what_each_decides(capsys: pytest.CaptureFixture[str]) -> None:
    config = tyro.cli(GRPOConfig, args=["--preset", "dr-grpo", "--clip-high", "0.5", "--std-floor", "0.1"])
    assert config == GRPOConfig(preset="dr-grpo", clip_high=0.5, std_floor=0.1)
    assert tyro.cli(GRPOConfig, args=["--preset", "dapo", "--no-drop-flat"]).resolved().drop_flat is False
    with pytest.raises(SystemExit):
        tyro.cli(GRPOConfig, args=["--scale", "None"])  # a default, and never an argument
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tyro.cli(GRPOConfig, args=["--help"])
    help_of = options(capsys.readouterr().out)
    assert "(by the preset: 0.0 with default, dr-grpo, dapo, rloo, reinforce; 0.04 with grpo)" in help_of["kl-weight"]
    by_preset = "(by the preset: batch with default; group with grpo, dapo; none with dr-grpo, rloo, reinforce)"
    assert by_preset in help_of["scale"]
    assert "None" not in help_of["baseline"]
    assert "(default: 0.2)" in help_of["clip-low"]


def test_every_option_of_the_algorithm_names_its_paper() -> None:
    bases = [base for base in reversed(GRPOConfig.__mro__) if base is not object]
    source = "\n".join(map(inspect.getsource, bases))
    help_of = dict(re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL))
    plain = {"steps", "instances", "min_budget", "max_budget", "pool", "reuse", "temperature", "teacher_cells"}
    plain |= {"budget_tilt", "probes", "on_nan"}
    plain |= {"warmup_steps", "warmup_learning_rate", "teacher"}  # of this project, or told of in ImitationConfig
    assert set(help_of) == {field.name for field in dataclasses.fields(GRPOConfig)}
    for name in set(help_of) - plain:
        assert re.search(r"[A-Z]\w+.* (19|20)\d\d", help_of[name], re.DOTALL), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"group": 1, "scale": "group"},
            r"baseline='group_mean' and scale='group': a group needs at least 2 .*got group=1.*reinforce",
        ),
        ({"group": 1, "preset": "dapo"}, r"baseline='group_mean' and scale='group' and drop_flat=True: a group"),
        ({"group": 1, "preset": "rloo"}, r"^baseline='leave_one_out': a group"),
        ({"group": 1, "preset": "reinforce", "scale": "group"}, r"^scale='group': a group"),
        ({"group": 0, "preset": "reinforce"}, r"group must be at least 1; got 0"),
        ({"preset": "ppo"}, r"'ppo': choose one of default, grpo, dr-grpo, dapo, rloo, reinforce"),
        ({"baseline": "median"}, r"unknown baseline 'median': choose group_mean, leave_one_out or learned"),
        ({"temperature": 0.0}, r"temperature must be above 0; got 0.0"),
        ({"std_floor": 0.0}, r"std_floor must be above 0; got 0.0"),
        ({"kl_weight": -1.0}, r"kl_weight must not be negative; got -1.0"),
        ({"entropy_weight": float("nan")}, r"entropy_weight must be finite; got nan"),
        ({"entropy_weight": float("inf")}, r"entropy_weight must be finite; got inf"),
        ({"candidates": 0}, r"candidates must be at least 1; got 0"),
        ({"candidates": 2, "probes": 1}, r"at least 2 probes, fewer than a group; got probes=1 and group=\d"),
        ({"candidates": 2, "probes": 4, "group": 4}, r"got probes=4 and group=4"),
        ({"budget_tilt": 0.0}, r"budget_tilt must be above 0; got 0.0"),
        ({"epochs": 0}, r"epochs must be at least 1; got 0"),
        ({"value_learning_rate": math.nan}, r"value_learning_rate must be above 0; got nan"),
        ({"flat_below": -0.1}, r"flat_below must not be negative; got -0.1"),
        ({"warmup_steps": -1}, r"^warmup_steps must be at least 0; got -1"),
        ({"teacher": "leave_one_out", "teacher_cells": 1}, r"cells must be 0 .* or at least 2"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(GRPOConfig(**(SMALL | changes)))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_trains_over_several_epochs_and_logs_numbers(preset: Any) -> None:
    config = GRPOConfig(preset=preset, epochs=2, **SMALL)
    metrics = [m.values for m in build(config).train() if m.phase == "grpo"]
    assert len(metrics) == 2
    assert all(math.isfinite(value) for values in metrics for value in values.values())
    assert ("value_loss" in metrics[0]) == (preset == "reinforce")
    assert metrics[0]["gradient_norm"] > 0


def test_single_subset_per_example_is_enough_with_a_learned_baseline() -> None:
    metrics = list(build(ReinforceConfig(**(SMALL | {"group": 1})), Reinforce).train())
    assert [m.phase for m in metrics] == ["warmup", "reinforce", "reinforce"]
    values = metrics[-1].values
    assert all(math.isfinite(value) for value in values.values())
    assert not {"group_std", "flat_groups"} & set(values)  # a single reward has no spread


@pytest.mark.parametrize(
    ("kind", "config", "preset"), [(RLOO, RLOOConfig, "rloo"), (Reinforce, ReinforceConfig, "reinforce")]
)
def test_relatives_are_grpo_with_their_preset(kind: Any, config: Any, preset: Any) -> None:
    named, plain = build(config(**SMALL), kind), build(GRPOConfig(preset=preset, **SMALL))
    for one, other in zip(named.train(), plain.train(), strict=True):
        assert one.values["gradient_norm"] == other.values["gradient_norm"]
        assert one.phase == (kind.phase if other.phase == "grpo" else "warmup")
    assert kind.phase == preset
    assert tyro.cli(config, args=["--group", "5"]) == config(group=5)


def test_higher_temperature_explores_more_and_keeps_what_is_best() -> None:
    entropies = []
    for temperature in (1.0, 5.0):
        changes = {"temperature": temperature, "warmup_steps": 30, "warmup_learning_rate": 3e-3, "steps": 1}
        algorithm = build(GRPOConfig(**(SMALL | changes)))
        *_, last = algorithm.train()
        entropies.append(last.values["entropy_per_token"])
    assert entropies[1] > entropies[0] + 0.1


def test_flat_groups_are_those_below_the_bound() -> None:
    for bound, share in ((0.0, 0.0), (100.0, 1.0)):
        *_, last = build(GRPOConfig(flat_below=bound, **SMALL)).train()
        assert last.values["flat_groups"] == share
    frozen = build(GRPOConfig(flat_below=100.0, drop_flat=True, **(SMALL | {"warmup_steps": 0})))
    assert [m.values["gradient_norm"] for m in frozen.train()] == [0.0, 0.0]

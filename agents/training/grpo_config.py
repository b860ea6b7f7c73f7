"""Options of GRPO, and presets named after the papers they come from.

A preset sets the options that were not given: ``GRPOConfig(preset="dapo", clip_high=0.4)`` is DAPO with a wider clip.
Options that a preset may set are ``None`` until :meth:`GRPOConfig.resolved` fills them in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import tyro

from agents.training.options import OnNaNOptions, WarmUpOptions, check_budgets, check_numbers, check_on_nan

__all__ = ["PRESETS", "GRPOConfig", "Objective", "PresetName", "RLOOConfig", "ReinforceConfig"]

Baseline = Literal["group_mean", "leave_one_out", "learned"]
Scale = Literal["group", "batch", "none"]
PresetName = Literal["default", "grpo", "dr-grpo", "dapo", "rloo", "reinforce"]


@dataclass(frozen=True)
class Objective:
    """Options of GRPO's objective, which presets set; :class:`GRPOConfig` describes them."""

    in_turn: bool = True
    candidates: int = 4
    baseline: Baseline = "group_mean"
    scale: Scale = "batch"
    std_floor: float = 0.1
    clip_low: float = 0.2
    clip_high: float = 0.28
    epochs: int = 1
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    drop_flat: bool = False


PRESETS: dict[str, Objective] = {
    "default": Objective(),
    "grpo": Objective(in_turn=False, candidates=1, scale="group", std_floor=1e-4, clip_high=0.2, kl_weight=0.04),
    "dr-grpo": Objective(in_turn=False, candidates=1, scale="none", clip_high=0.2),
    "dapo": Objective(in_turn=False, scale="group", std_floor=1e-4, drop_flat=True),
    "rloo": Objective(in_turn=False, candidates=1, baseline="leave_one_out", scale="none", clip_high=0.2),
    "reinforce": Objective(in_turn=False, candidates=1, baseline="learned", scale="none", clip_high=0.2),
}
"""Objectives by name. The papers do not specify a floor of the standard deviation, which continuous rewards need; 1e-4
is next to no floor. Candidates make a step more expensive; apart from that, presets cost the same."""


def _decided(name: str, kind: Any) -> Any:
    """Return how the command line parses and describes an option that presets set.

    ``None`` is its default, and is not accepted as an argument.
    """
    values = {preset: getattr(objective, name) for preset, objective in PRESETS.items()}
    having = {value: [preset for preset, its in values.items() if its == value] for value in values.values()}
    listed = "; ".join(f"{value} with {', '.join(presets)}" for value, presets in having.items())
    hint = f"(by the preset: {listed})" if len(having) > 1 else f"(default: {values['default']})"
    return tyro.conf.arg(constructor_factory=lambda: kind, help_behavior_hint=hint)


@dataclass
class _Updates:
    """Options of GRPO beyond its warm-up."""

    preset: PresetName = "default"
    """Named settings for the options that are not given: "grpo" (Shao et al. 2024), "dr-grpo" (no scaling; Liu et al.
    2025), "dapo" (wider upper clip, flat groups dropped; Yu et al. 2025), "rloo" (leave-one-out baseline; Ahmadian et
    al. 2024), "reinforce" (learned baseline; Williams 1992). "default" is this project's own: tokens chosen one after
    another, candidates, advantages divided by their root mean square in the batch, no KL."""
    steps: int = 400
    """Policy updates with rewards."""
    group: int = 16
    """Subsets drawn for each example (G; GRPO, Shao et al. 2024, arXiv 2402.03300); 1 needs the learned baseline."""
    candidates: Annotated[int | None, _decided("candidates", int)] = None
    """Candidate examples for each example trained on. With several, each candidate gets a few probe subsets, and the
    ones whose rewards differ most get the rest of a group. Based on the dynamic sampling of DAPO (Yu et al. 2025),
    which draws whole groups until enough of them differ; here a flat group costs only its probes. The candidates left
    out would teach next to nothing, but choosing by rewards biases the gradient a little; 1 keeps it unbiased."""
    in_turn: Annotated[bool | None, _decided("in_turn", bool)] = None
    """Choose tokens one after another: each choice lowers the scores of nearby and similar tokens by a learnt amount
    (Luce 1959, Plackett 1975; see agents.ordered_subset). Takes memory for each pair of tokens of an image. Otherwise
    tokens are chosen jointly: scores do not depend on choices, and the k-subset distribution is exact."""
    probes: int = 4
    """Subsets of the group drawn for each candidate, if there are several; no effect otherwise."""
    budget_tilt: float = 2.0
    """Above 1, small budgets are drawn more often; they cost less, and choices matter more. A budget is
    min_budget * (max_budget / min_budget) ** (u ** budget_tilt) with u uniform in [0, 1); 1 is log-uniform."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW (Loshchilov & Hutter, ICLR 2019); decays to 2% of it along a cosine."""
    temperature: float = 1.0
    """Divides the scores of the policy in training; above 1, it explores more. Subsets are drawn from this same policy,
    so gradients stay unbiased. The selections of a trained agent do not depend on it."""
    baseline: Annotated[Baseline | None, _decided("baseline", Baseline)] = None
    """Baseline of rewards: the group's mean (GRPO, Shao et al. 2024), the mean of the others in the group (RLOO; Kool
    et al. 2019, Ahmadian et al. 2024, arXiv 2402.14740), or a network's prediction from the example and the budget
    (REINFORCE with a baseline, Williams 1992)."""
    scale: Annotated[Scale | None, _decided("scale", Scale)] = None
    """Divisor of advantages: their root mean square in the group (GRPO, Shao et al. 2024) or in the batch (Andrychowicz
    et al., ICLR 2021, for PPO), or none (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783)."""
    std_floor: Annotated[float | None, _decided("std_floor", float)] = None
    """Added to that root mean square, which can be tiny with continuous rewards and would then amplify noise. 1e-4 is
    next to no floor, as in GRPO (Shao et al. 2024), whose rewards are far apart. No effect without scaling."""
    clip_low: Annotated[float | None, _decided("clip_low", float)] = None
    """Lower clip: probability ratios below 1 - clip_low earn nothing more (PPO, Schulman et al. 2017, arXiv
    1707.06347). Takes effect from the second epoch on."""
    clip_high: Annotated[float | None, _decided("clip_high", float)] = None
    """Upper clip: probability ratios above 1 + clip_high earn nothing more (larger than the lower clip in DAPO, Yu et
    al. 2025, arXiv 2503.14476). Takes effect from the second epoch on."""
    epochs: Annotated[int | None, _decided("epochs", int)] = None
    """Updates per batch of rewards (PPO, Schulman et al. 2017). With one epoch, a group's baseline and no KL, the value
    of the surrogate is always 0, but its gradient is not: watch the reward instead."""
    kl_weight: Annotated[float | None, _decided("kl_weight", float)] = None
    """Weight of KL(policy || warmed-up policy), exact, in nats per subset (GRPO, Shao et al. 2024, who estimate it);
    must be 0 with in_turn."""
    entropy_weight: Annotated[float | None, _decided("entropy_weight", float)] = None
    """Weight of an entropy bonus, in nats per kept token (A3C, Mnih et al. 2016; exact here); must be 0 with
    in_turn."""
    drop_flat: Annotated[bool | None, _decided("drop_flat", bool)] = None
    """Leave out groups whose rewards have a standard deviation below flat_below (dynamic sampling; DAPO, Yu et al.
    2025, who draw other groups instead; here the mean is over the remaining groups, at no extra cost)."""
    flat_below: float = 0.01
    """Standard deviation of rewards, in their units, below which a group counts as flat (DAPO, Yu et al. 2025: 0)."""
    value_learning_rate: float = 1e-3
    """Peak learning rate of the learned baseline (Williams 1992); decays like the scorer's."""


@dataclass
class GRPOConfig(OnNaNOptions, WarmUpOptions, _Updates):
    """Group-relative policy optimisation (GRPO)."""

    instances: int = 24
    """Examples per step (B)."""
    pool: int = 1024
    """Encoded training examples held in memory."""
    reuse: int = 12
    """Approximate number of uses of an example before a new one replaces it."""

    def objective(self) -> Objective:
        """Return the objective: the options given, and the preset's values for the others.

        Raises:
            ValueError: If there is no such preset.
        """
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}: choose one of {', '.join(PRESETS)}")
        names = [field.name for field in dataclasses.fields(Objective)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(PRESETS[self.preset], **given)

    def resolved(self) -> GRPOConfig:
        """Return a checked copy with every option filled in, as used for training.

        Raises:
            ValueError: If a setting is impossible, or settings contradict each other.
        """
        whole = dataclasses.replace(self, **dataclasses.asdict(self.objective()))
        check_budgets(whole.min_budget, whole.max_budget, whole.budget_tilt)
        check_on_nan(whole.on_nan)
        check_numbers(
            whole,
            {"instances": 1, "candidates": 1, "group": 1, "epochs": 1, "steps": 0, "warmup_steps": 0},
            # a floor of 0 would divide by 0 in every group of equal rewards
            above_0=(
                *("learning_rate", "warmup_learning_rate", "value_learning_rate"),
                *("max_gradient_norm", "std_floor", "temperature"),
            ),
            not_negative=("clip_low", "clip_high", "kl_weight", "flat_below"),
            finite=("entropy_weight",),
        )
        for name, kind, what in (("scale", Scale, "advantage scale"), ("baseline", Baseline, "baseline")):
            choices = get_args(kind)
            if getattr(whole, name) not in choices:
                listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f"unknown {what} {getattr(whole, name)!r}: choose {listed}")
        if whole.group == 1:
            lone = [
                text
                for wrong, text in (
                    (whole.baseline != "learned", f"baseline={whole.baseline!r}"),
                    (whole.scale == "group", "scale='group'"),
                    (whole.drop_flat, "drop_flat=True"),
                )
                if wrong
            ]
            if lone:
                raise ValueError(
                    f"{' and '.join(lone)}: a group needs at least 2 subsets to compare; got group=1: draw more, or "
                    "choose preset='reinforce', whose baseline is learned"
                )
        if self.objective().candidates > 1 and not 2 <= whole.probes < whole.group:
            raise ValueError(
                f"of several candidates each gets at least 2 probes, fewer than a group; got probes={whole.probes} and "
                f"group={whole.group}: change one, or set candidates to 1"
            )
        return whole


@dataclass
class RLOOConfig(GRPOConfig):
    """REINFORCE whose baseline is the mean reward of the other subsets in the group (RLOO)."""

    preset: PresetName = "rloo"
    """Named settings for the options that are not given; see `--algo grpo --help`."""
    instances: int = 32
    """Examples per step (B)."""


@dataclass
class ReinforceConfig(GRPOConfig):
    """REINFORCE with a learned baseline: G independent subsets of each example; G may be 1."""

    preset: PresetName = "reinforce"
    """Named settings for the options that are not given; see `--algo grpo --help`."""
    instances: int = 32
    """Examples per step (B)."""

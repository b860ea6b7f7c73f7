"""Options of GRPO, and named sets of them after the papers they come from.

A preset decides the options that were not given: ``GRPOConfig(preset="dapo", clip_high=0.4)`` is DAPO with a wider
clip. Options that a preset may decide are ``None`` until :meth:`GRPOConfig.resolved` fills them in.
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
    """What GRPO maximises, and on what: the options that presets decide. :class:`GRPOConfig` says what each is."""

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
"""Objectives by name. Papers leave the floor of the standard deviation open, which continuous rewards need: 1e-4 stands
for none. Candidates make a step dearer; otherwise presets cost the same."""


def _decided(name: str, kind: Any) -> Any:
    """Describe an option that presets decide to the command line: ``None`` is its default, and never an argument."""
    values = {preset: getattr(objective, name) for preset, objective in PRESETS.items()}
    having = {value: [preset for preset, its in values.items() if its == value] for value in values.values()}
    listed = "; ".join(f"{value} with {', '.join(presets)}" for value, presets in having.items())
    hint = f"(by the preset: {listed})" if len(having) > 1 else f"(default: {values['default']})"
    return tyro.conf.arg(constructor_factory=lambda: kind, help_behavior_hint=hint)


@dataclass
class _Updates:
    """What GRPO has beyond its warm-up."""

    preset: PresetName = "default"
    """Decides the options that are not given: "grpo" (Shao et al. 2024), "dr-grpo" (no scaling; Liu et al. 2025),
    "dapo" (wider clip upwards, groups that teach nothing left out; Yu et al. 2025), "rloo" (leave-one-out baseline;
    Ahmadian et al. 2024), "reinforce" (learned baseline; Williams 1992); "default" is this project's own: choosing
    in turn, candidates, advantages over the batch's deviation, no KL."""
    steps: int = 400
    """Policy updates with rewards."""
    group: int = 16
    """Subsets drawn for each example (G; GRPO, Shao et al. 2024, arXiv 2402.03300); 1 needs the learned baseline."""
    candidates: Annotated[int | None, _decided("candidates", int)] = None
    """Examples looked at for each one trained on: of several, each gets a few subsets, and those whose rewards differ
    most get the rest of a group. After the dynamic sampling of DAPO (Yu et al. 2025), which draws whole groups until
    enough of them differ; here a flat group costs its probes only. What is left out would have taught next to nothing,
    but choosing by rewards biases the gradient a little: 1 for one that is unbiased."""
    in_turn: Annotated[bool | None, _decided("in_turn", bool)] = None
    """Choose tokens one after another, each choice taking something from the scores of those near it and like it, and
    learn how much (Luce 1959, Plackett 1975; see agents.ordered_subset); otherwise scores do not depend on choices, and
    the k-subset law of the scores is exact. In turn takes memory for each pair of tokens of an image."""
    probes: int = 4
    """Subsets, of the group's, that each of several candidates gets; without effect for one."""
    budget_tilt: float = 2.0
    """Above 1 draws small budgets more often, which cost less and where choices matter more: a budget is
    min_budget * (max_budget / min_budget) ** (u ** budget_tilt) with u uniform in [0, 1); 1 is log-uniform."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW (Loshchilov & Hutter, ICLR 2019); decays to 2% of it along a cosine."""
    temperature: float = 1.0
    """The policy trained is that of the scores divided by this: above 1 it explores more. Subsets are drawn from the
    policy itself, so gradients stay unbiased; what a trained agent keeps does not depend on it."""
    baseline: Annotated[Baseline | None, _decided("baseline", Baseline)] = None
    """What rewards are compared with: the group's mean (GRPO, Shao et al. 2024), the mean of the others in the group
    (RLOO; Kool et al. 2019, Ahmadian et al. 2024, arXiv 2402.14740), or a network's prediction from the example and
    the budget (REINFORCE with a baseline, Williams 1992)."""
    scale: Annotated[Scale | None, _decided("scale", Scale)] = None
    """What advantages are divided by: their root mean square in the group (GRPO, Shao et al. 2024) or in the batch
    (Andrychowicz et al., ICLR 2021, for PPO), or nothing (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783)."""
    std_floor: Annotated[float | None, _decided("std_floor", float)] = None
    """Added to that root mean square: continuous rewards make tiny ones, which would blow noise up (1e-4 stands for
    none, as in GRPO, Shao et al. 2024, whose rewards are far apart). Without scaling it has no effect."""
    clip_low: Annotated[float | None, _decided("clip_low", float)] = None
    """Ratios below 1 - clip_low earn nothing more (PPO, Schulman et al. 2017, arXiv 1707.06347); acts from the second
    epoch on."""
    clip_high: Annotated[float | None, _decided("clip_high", float)] = None
    """Ratios above 1 + clip_high earn nothing more (a larger bound upwards: DAPO, Yu et al. 2025, arXiv 2503.14476);
    acts from the second epoch on."""
    epochs: Annotated[int | None, _decided("epochs", int)] = None
    """Updates per batch of rewards (PPO, Schulman et al. 2017). With one epoch, a group's
    baseline and no KL the surrogate's value is 0 whatever is learnt, though its gradient is not: watch the reward."""
    kl_weight: Annotated[float | None, _decided("kl_weight", float)] = None
    """Weight of KL(policy || warmed-up policy), exact, in nats per subset (GRPO, Shao et al. 2024, who estimate it);
    0 where tokens are chosen in turn."""
    entropy_weight: Annotated[float | None, _decided("entropy_weight", float)] = None
    """Weight of an entropy bonus, in nats per kept token (A3C, Mnih et al. 2016; exact here); 0 where tokens are
    chosen in turn."""
    drop_flat: Annotated[bool | None, _decided("drop_flat", bool)] = None
    """Leave groups out whose rewards' standard deviation is below flat_below (dynamic sampling: DAPO, Yu et al. 2025,
    who draw others in their place; here the mean is over the rest, at no further cost)."""
    flat_below: float = 0.01
    """Standard deviation of rewards, in their units, below which a group counts as flat (DAPO, Yu et al. 2025: 0)."""
    value_learning_rate: float = 1e-3
    """Peak learning rate of the learned baseline (Williams 1992); decays as that of the scorer."""


@dataclass
class GRPOConfig(OnNaNOptions, WarmUpOptions, _Updates):
    """Group-relative policy optimisation (GRPO)."""

    instances: int = 24
    """Examples per step (B)."""
    pool: int = 1024
    """Encoded training examples held in memory."""
    reuse: int = 12
    """About how often each is used before a new one takes its place."""

    def objective(self) -> Objective:
        """Return what is maximised: the options given, and those of the preset for the others.

        Raises:
            ValueError: If there is no such preset.
        """
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}: choose one of {', '.join(PRESETS)}")
        names = [field.name for field in dataclasses.fields(Objective)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(PRESETS[self.preset], **given)

    def resolved(self) -> GRPOConfig:
        """Return the same with every option filled in; what a run was trained with.

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
    """Decides the options that are not given, as `--algo grpo --help` tells."""
    instances: int = 32
    """Examples per step (B)."""


@dataclass
class ReinforceConfig(GRPOConfig):
    """REINFORCE with a learned baseline: G independent subsets of each example, of which one is enough."""

    preset: PresetName = "reinforce"
    """Decides the options that are not given, as `--algo grpo --help` tells."""
    instances: int = 32
    """Examples per step (B)."""

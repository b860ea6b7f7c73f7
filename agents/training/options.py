"""Options of the algorithms that train a scorer, and what they may be; nothing here needs PyTorch."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "OPTIONS",
    "GumbelTopKConfig",
    "ImitationConfig",
    "OnNaN",
    "OnNaNOptions",
    "RelaxedConfig",
    "SharedOptions",
    "SigmoidGatesConfig",
    "SoftTopKConfig",
    "TeacherName",
    "WarmUpOptions",
    "check_batch",
    "check_budgets",
    "check_numbers",
    "check_on_nan",
    "options_of",
]

OPTIONS: dict[str, str] = {
    "grpo": "agents.training.grpo_config:GRPOConfig",
    "rloo": "agents.training.grpo_config:RLOOConfig",
    "reinforce": "agents.training.grpo_config:ReinforceConfig",
    "imitation": "agents.training.options:ImitationConfig",
    "gumbel-top-k": "agents.training.options:GumbelTopKConfig",
    "sigmoid-gates": "agents.training.options:SigmoidGatesConfig",
    "soft-top-k": "agents.training.options:SoftTopKConfig",
    "ppo": "agents.sb3.options:PPOOptions",
    "a2c": "agents.sb3.options:A2COptions",
    "maskable-ppo": "agents.sb3.options:MaskablePPOOptions",
}
"""Where the options of each algorithm that comes with the package are, so that a command can show them at once."""


def options_of(name: str) -> type | None:
    """Return the dataclass of an algorithm's options; ``None`` where it does not come with the package."""
    return pkgutil.resolve_name(OPTIONS[name]) if name in OPTIONS else None


TeacherName: TypeAlias = Literal["gradient", "attention", "relevance", "leave_one_out"]
"""Whose choices a scorer imitates: see :class:`ImitationConfig`."""

OnNaN: TypeAlias = Literal["stop", "skip"]
"""What becomes of examples whose scores, rewards or gradients are NaN or infinite."""


def check_budgets(low: float, high: float, tilt: float = 1.0) -> None:
    """Raise ValueError unless two numbers are a range of shares of the tokens, and the tilt is above 0."""
    if not 0 < low <= high <= 1:
        raise ValueError(f"budgets must satisfy 0 < min_budget <= max_budget <= 1; got {low}, {high}")
    if not 0 < tilt < math.inf:
        raise ValueError(f"budget_tilt must be above 0; got {tilt}")


def check_numbers(
    options: object,
    at_least: Mapping[str, int],
    above_0: Sequence[str],
    not_negative: Sequence[str] = (),
    finite: Sequence[str] = (),
) -> None:
    """Raise ValueError, naming the option, unless all options of an algorithm that are listed are finite and in range.

    Args:
        options: Has the options as attributes.
        at_least: The least value allowed, by name.
        above_0: Names of those that must be above 0.
        not_negative: Names of those that may be 0.
        finite: Names of those that may have either sign.
    """
    for name, least in at_least.items():
        if not least <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be at least {least}; got {getattr(options, name)}")
    for name in above_0:
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be above 0; got {getattr(options, name)}")
    for name in not_negative:
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must not be negative; got {getattr(options, name)}")
    for name in finite:
        if not math.isfinite(getattr(options, name)):
            raise ValueError(f"{name} must be finite; got {getattr(options, name)}")


def check_on_nan(on_nan: str) -> None:
    """Raise ValueError unless it is one of :data:`OnNaN`."""
    if on_nan not in ("stop", "skip"):
        raise ValueError(f"on_nan must be 'stop' or 'skip'; got {on_nan!r}")


def check_batch(instances: int, pool: int, candidates: int = 1) -> None:
    """Raise ValueError unless a pool of this size has as many examples as a step needs: candidates for each."""
    if instances * candidates > pool:
        each = f" of {candidates} candidates each" if candidates > 1 else ""
        raise ValueError(
            f"a step needs as many examples as the pool holds, at most; got instances={instances}{each} and "
            f"pool={pool}: choose a larger pool"
        )


@dataclass
class OnNaNOptions:
    """What becomes of numbers that are none."""

    on_nan: OnNaN = "stop"
    """What becomes of examples whose scores, rewards or gradients are NaN or infinite: "stop" ends the training and
    names the first, "skip" leaves them out of the step and counts them ("skipped" in the log)."""


@dataclass
class SharedOptions:
    """Options of every algorithm that imitates a teacher, in its warm-up or altogether."""

    instances: int = 32
    """Examples per step (B)."""
    min_budget: float = 0.03
    """Smallest share of tokens kept in training; budgets differ within a batch."""
    max_budget: float = 0.5
    """Largest share of tokens kept in training."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm (Pascanu et al., ICML 2013)."""
    teacher: TeacherName = "gradient"
    """Whose choices are imitated: gradient x token (Shrikumar et al. 2016; 3 forwards per example), the vision tower's
    CLS attention (no forwards), the ground truth where there is one, or the drop in log-likelihood when a token is
    taken out (Zeiler & Fergus 2014; a forward for each cell of the image)."""
    teacher_cells: int = 6
    """Rows and columns of the grid whose cells leave_one_out takes out, one at a time; 0 takes out single tokens."""
    pool: int = 768
    """Encoded training examples held in memory."""
    reuse: int = 4
    """About how often each is used before a new one takes its place."""


@dataclass
class WarmUpOptions(SharedOptions):
    """Options of every algorithm that begins with a supervised warm-up."""

    warmup_steps: int = 120
    """Supervised steps before the first reward; 0 starts from uniform sampling."""
    warmup_learning_rate: float = 1e-3
    """Learning rate of the warm-up."""


@dataclass
class _Imitation:
    """What imitation has of its own."""

    steps: int = 520
    """Supervised steps; the default is as many as GRPO takes with its warm-up."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW (Loshchilov & Hutter, ICLR 2019)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Whether the learning rate decays to 2% of its peak along a cosine (Loshchilov & Hutter, ICLR 2017)."""


@dataclass
class ImitationConfig(OnNaNOptions, SharedOptions, _Imitation):
    """Supervised imitation of a teacher's choices (behaviour cloning; Pomerleau, "ALVINN", NeurIPS 1988)."""


@dataclass
class _Relaxed:
    """What relaxations have beyond their warm-up."""

    steps: int = 740
    """Updates by back-propagation; the default takes about as long as GRPO's, with the embedded model on a CPU. As many
    forward-equivalents as GRPO's would be 2,600."""
    samples: int = 1
    """Sets of gates drawn for each example; their gradients are averaged."""
    budget_tilt: float = 2.0
    """Above 1 draws small budgets more often; see GRPOConfig."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; decays to 2% of it along a cosine."""
    temperature: float = 1.0
    """How soft the relaxation is at first (Jang et al. 2017; Maddison et al. 2017)."""
    final_temperature: float = 1.0
    """How soft it is in the end; in between, the logarithm falls evenly (annealing: Jang et al. 2017)."""
    noisy: bool = True
    """Draw gates at random; otherwise they follow from the scores."""
    hard: bool = True
    """Use gates of 0 and 1 in the forward pass, and soft ones for the gradient only (straight-through: Bengio et al.
    2013)."""
    leak: float = 0.03
    """What a closed gate lets through at first. At 0 the forward pass is that of the pruned model, but slopes are
    extreme."""
    final_leak: float = 0.0
    """What it lets through in the end; in between, evenly less."""
    in_turn: bool = False
    """Choose tokens one after another once trained, as GRPO's agent does (see agents.ordered_subset). No gradient
    reaches what a choice takes from the scores of others: it stays as it was at first."""


@dataclass
class RelaxedConfig(OnNaNOptions, WarmUpOptions, _Relaxed):
    """What all relaxations have in common."""

    warmup_steps: int = 120
    """Supervised steps before the first gate, as many as GRPO's; 0 starts from equal scores."""


@dataclass
class GumbelTopKConfig(RelaxedConfig):
    """Straight-through Gumbel top-k (Jang et al. 2017; Maddison et al. 2017; Kool et al. 2019; Xie & Ermon 2019)."""


@dataclass
class SigmoidGatesConfig(RelaxedConfig):
    """Sigmoid gates with a budget penalty (hard concrete; Louizos et al. 2018)."""

    penalty: float = 1.0
    """Weight of the penalty for opening more or fewer gates than the budget has room for."""


@dataclass
class SoftTopKConfig(RelaxedConfig):
    """Soft top-k through the marginals of the k-subset distribution (SIMPLE; Ahmed et al. 2023)."""

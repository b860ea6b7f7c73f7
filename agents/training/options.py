"""Options of the algorithms that train a scorer, and checks of them; needs no PyTorch."""

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
"""Location of the options of each built-in algorithm, so that a command can show them without loading the algorithm."""


def options_of(name: str) -> type | None:
    """Return the dataclass of a built-in algorithm's options; ``None`` for other names."""
    return pkgutil.resolve_name(OPTIONS[name]) if name in OPTIONS else None


TeacherName: TypeAlias = Literal["gradient", "attention", "relevance", "leave_one_out"]
"""Names of the teachers that a scorer may imitate; see :class:`SharedOptions`."""

OnNaN: TypeAlias = Literal["stop", "skip"]
"""Handling of examples whose scores, rewards or gradients are NaN or infinite."""


def check_budgets(low: float, high: float, tilt: float = 1.0) -> None:
    """Raise ValueError unless the budgets are a range of shares and the tilt is above 0."""
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
    """Raise ValueError, naming the option, unless all listed options are finite and in range.

    Args:
        options: Object with the options as attributes.
        at_least: Smallest value allowed, by name.
        above_0: Names of options that must be above 0.
        not_negative: Names of options that must be 0 or above.
        finite: Names of options that may have either sign.
    """
    for name, least in at_least.items():
        if not least <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be at least {least}; got {getattr(options, name)}")
        if getattr(options, name) >= 2**31:  # PyTorch and Stable-Baselines3 fail on such numbers
            raise ValueError(f"{name} must be below 2**31; got {getattr(options, name)}")
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
    """Raise ValueError unless ``on_nan`` is one of :data:`OnNaN`."""
    if on_nan not in ("stop", "skip"):
        raise ValueError(f"on_nan must be 'stop' or 'skip'; got {on_nan!r}")


def check_batch(instances: int, pool: int, candidates: int = 1) -> None:
    """Raise ValueError unless a pool of this size has enough examples for a step.

    A step needs ``candidates`` examples for each of its ``instances``.
    """
    if instances * candidates > pool:
        each = f" of {candidates} candidates each" if candidates > 1 else ""
        raise ValueError(
            f"a step needs as many examples as the pool holds, at most; got instances={instances}{each} and "
            f"pool={pool}: choose a larger pool"
        )


@dataclass
class OnNaNOptions:
    """Handling of non-finite numbers."""

    on_nan: OnNaN = "stop"
    """Handling of examples whose scores, rewards or gradients are NaN or infinite: "stop" ends the training and names
    the first one, "skip" leaves them out of the step and counts them ("skipped" in the log)."""


@dataclass
class SharedOptions:
    """Options of every algorithm that imitates a teacher, for its warm-up or throughout."""

    instances: int = 32
    """Examples per step (B)."""
    min_budget: float = 0.03
    """Smallest share of tokens kept in training; budgets differ within a batch."""
    max_budget: float = 0.5
    """Largest share of tokens kept in training."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm (Pascanu et al., ICML 2013)."""
    teacher: TeacherName = "gradient"
    """Teacher to imitate: gradient x token (Shrikumar et al. 2016; 3 forward passes per example), the vision tower's
    CLS attention (no forward passes), the ground truth if there is one, or the drop in log-likelihood when a token is
    removed (Zeiler & Fergus 2014; one forward pass for each cell of the image)."""
    teacher_cells: int = 6
    """Rows and columns of the grid whose cells leave_one_out removes, one at a time; 0 removes single tokens."""
    pool: int = 768
    """Encoded training examples held in memory."""
    reuse: int = 4
    """Approximate number of uses of an example before a new one replaces it."""


@dataclass
class WarmUpOptions(SharedOptions):
    """Options of every algorithm that begins with a supervised warm-up."""

    warmup_steps: int = 120
    """Supervised steps before the first reward; 0 starts from uniform sampling."""
    warmup_learning_rate: float = 1e-3
    """Learning rate of the warm-up."""


@dataclass
class _Imitation:
    """Options of imitation alone."""

    steps: int = 520
    """Supervised steps; the default is as many as GRPO takes with its warm-up."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW (Loshchilov & Hutter, ICLR 2019)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule of the learning rate; "cosine" decays to 2% of the peak (Loshchilov & Hutter, ICLR 2017)."""


@dataclass
class ImitationConfig(OnNaNOptions, SharedOptions, _Imitation):
    """Supervised imitation of a teacher's choices.

    Also known as behaviour cloning (Pomerleau, "ALVINN", NeurIPS 1988).
    """


@dataclass
class _Relaxed:
    """Options of relaxations beyond their warm-up."""

    steps: int = 740
    """Updates by back-propagation. The default takes about as long as GRPO's, with the embedded model on a CPU; 2,600
    would take as many forward-equivalents as GRPO's."""
    samples: int = 1
    """Sets of gates drawn for each example; their gradients are averaged."""
    budget_tilt: float = 2.0
    """Above 1, small budgets are drawn more often; see GRPOConfig."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; decays to 2% of it along a cosine."""
    temperature: float = 1.0
    """Initial temperature of the relaxation (Jang et al. 2017; Maddison et al. 2017)."""
    final_temperature: float = 1.0
    """Final temperature; in between, its logarithm changes linearly (annealing; Jang et al. 2017)."""
    noisy: bool = True
    """Draw gates at random; otherwise the scores determine them."""
    hard: bool = True
    """Use gates of 0 and 1 in the forward pass, and soft ones for the gradient only (straight-through; Bengio et al.
    2013)."""
    leak: float = 0.03
    """Initial opening of a closed gate. At 0, the forward pass equals the pruned model's, but gradients are extreme."""
    final_leak: float = 0.0
    """Final opening of a closed gate; in between, it changes linearly."""
    in_turn: bool = False
    """Choose tokens one after another after training, as GRPO's agent does (see agents.ordered_subset). The amount by
    which a choice lowers the scores of other tokens gets no gradient and keeps its initial value."""


@dataclass
class RelaxedConfig(OnNaNOptions, WarmUpOptions, _Relaxed):
    """Options common to all relaxations."""

    warmup_steps: int = 120
    """Supervised steps before training with gates, as many as GRPO's; 0 starts from equal scores."""


@dataclass
class GumbelTopKConfig(RelaxedConfig):
    """Straight-through Gumbel top-k.

    After Jang et al. 2017, Maddison et al. 2017, Kool et al. 2019, and Xie & Ermon 2019.
    """


@dataclass
class SigmoidGatesConfig(RelaxedConfig):
    """Sigmoid gates with a budget penalty (hard concrete; Louizos et al. 2018)."""

    penalty: float = 1.0
    """Weight of the penalty for opening more or fewer gates than the budget allows."""


@dataclass
class SoftTopKConfig(RelaxedConfig):
    """Soft top-k by the marginals of the k-subset distribution (SIMPLE; Ahmed et al. 2023)."""

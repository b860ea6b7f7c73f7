"""Algorithms of ``python -m grip_env.train --algo NAME``, built-in or user-defined.

An algorithm is a class that implements :class:`Agent`. It is given by its registered name or by its import path, as in
``--algo my_package.my_module:MyAgent``. The fields of its ``Options`` become options of the command.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import torch

from agents.base import Policy, PolicySelector, Selector
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerSelector
from agents.training.options import OPTIONS, options_of
from agents.training.snapshot import Snapshot
from grip_env.rewards.terms import Reward
from grip_env.tasks.base import Task
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = [
    "ALGORITHMS",
    "SCORERS",
    "Agent",
    "NoOptions",
    "ScorerAgent",
    "Setting",
    "as_selector",
    "device_of",
    "find_algorithm",
    "register",
]

SCORERS = {
    "grpo": "agents.grpo:GRPO",
    "rloo": "agents.grpo:RLOO",
    "reinforce": "agents.grpo:Reinforce",
    "imitation": "agents.training.imitation:Imitation",
    "gumbel-top-k": "agents.training.relaxations:GumbelTopK",
    "sigmoid-gates": "agents.training.relaxations:SigmoidGates",
    "soft-top-k": "agents.training.relaxations:SoftTopK",
}
"""Import paths of the algorithms that train a scorer, by name."""

ALGORITHMS = tuple(OPTIONS)
"""Names of the built-in algorithms."""

_registered: dict[str, type[Agent]] = {}
_Class = TypeVar("_Class", bound=type)


@dataclass
class Setting:
    """Model, task and reward that an agent is trained on."""

    vlm: FrozenVLM
    """The frozen model."""
    task: Task
    """Source of images, questions and answers."""
    reward: Reward
    """Reward of a selection."""
    split: str = "train"
    """Split of the task to train on."""
    seed: int = 0
    """Seed of all randomness."""
    progress: bool = False
    """Show a progress bar while examples are encoded before the first step."""

    def pool(self, size: int = 768, reuse: int = 4) -> ExamplePool:
        """Return a pool of encoded training examples; see :class:`~agents.pool.ExamplePool`."""
        return ExamplePool(self.vlm, self.task, self.split, size, reuse, self.seed, self.progress)

    def make_vec(self, name: str = "GRIP/TokenSelection-v0", num_envs: int = 16, **options: Any) -> Any:
        """Return a vector environment on the training examples.

        Args:
            name: Id of the environment.
            num_envs: Number of environments.
            options: Further arguments of the environment, such as ``budget``.
        """
        import gymnasium

        import grip_env  # noqa: F401 (registers the environments)

        about: dict[str, Any] = {"vlm": self.vlm, "task": self.task, "split": self.split, "reward": self.reward}
        return gymnasium.make_vec(name, num_envs, **(about | options))


@dataclass
class NoOptions:
    """Options of an algorithm without hyperparameters."""


@runtime_checkable
class Agent(Protocol):
    """Interface of an agent that learns to choose tokens.

    An agent also has ``select``, like a :class:`~agents.base.Policy`, or can be called with batches of encoded
    examples, like a :class:`~agents.base.Selector`. It may have ``Options``, a dataclass of hyperparameters with a
    docstring under each, and ``phases``, the number of steps of each phase of :meth:`learn`.
    """

    def __init__(self, setting: Setting, options: Any) -> None:
        """Create an untrained agent.

        Args:
            setting: Model, task and reward to train on.
            options: An instance of ``Options``, or of :class:`NoOptions` if the class has none.

        Raises:
            ValueError: If an option is invalid.
        """

    def learn(self) -> Iterator[Any]:
        """Train, yielding :class:`~agents.learning.Metrics` after each step.

        The agent can be used and saved after any step.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the agent into ``folder`` for :meth:`load`, replacing an earlier one."""
        ...

    @classmethod
    def load(cls, folder: Path, vlm: FrozenVLM) -> Policy | Selector:
        """Load the agent that :meth:`save` wrote, ready to choose tokens.

        Raises:
            FileNotFoundError: If there is no agent in ``folder``.
            ValueError: If the agent is damaged or was made for another model.
        """
        ...


def register(name: str) -> Callable[[_Class], _Class]:
    """Return a class decorator that registers an algorithm under a name for ``--algo``.

    The name is known once the module of the class has been imported. The command imports the built-in algorithms only
    and takes any other class as ``package.module:Class``, so that a registered name is of use in programs that call
    :func:`grip_env.train.parse` themselves.

    Raises:
        ValueError: If the name is taken by another class or is not a valid option name.
    """
    if not name.replace("-", "").isalnum() or name != name.lower() or not name[0].isalpha():
        raise ValueError(f"an algorithm's name has small letters, digits and '-', a letter first; got {name!r}")

    def remember(cls: _Class) -> _Class:
        known = _registered.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {name!r} is taken by {known.__module__}.{known.__qualname__}: choose another")
        _registered[name] = cls
        return cls

    return remember


def find_algorithm(name: str) -> type[Agent]:
    """Return the class of an algorithm.

    Args:
        name: A registered name, or "package.module:Class".

    Raises:
        ValueError: If there is no such algorithm, or it is not a class that implements :class:`Agent`.
    """
    if ":" in name:
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"cannot import the algorithm {name!r} ({error}): give package.module:Class, importable from here"
            ) from None
    else:
        if name in ALGORITHMS and name not in _registered:
            _register_own(name)
        if name not in _registered:
            known = ", ".join(sorted(set(ALGORITHMS) | set(_registered)))
            raise ValueError(f"there is no algorithm {name!r}: choose from {known}, or give package.module:Class")
        found = _registered[name]
    missing = [part for part in ("learn", "save", "load") if not callable(getattr(found, part, None))]
    if not isinstance(found, type) or missing:
        raise ValueError(
            f"{name!r} is no algorithm: it needs to be a class with the methods learn, save and load (see "
            f"agents.agent.Agent){' and lacks ' + ', '.join(missing) if missing else ''}"
        )
    if not callable(getattr(found, "select", None)) and not _is_selector(found):
        raise ValueError(f"{name!r} cannot choose tokens: give it select(observation), as agents.base.Policy has it")
    return cast("type[Agent]", found)


def _register_own(name: str) -> None:
    """Register a built-in algorithm."""
    if name not in SCORERS:
        importlib.import_module("agents.sb3.agents")
        return
    algorithm, options = pkgutil.resolve_name(SCORERS[name]), options_of(name)
    said = f"A scorer trained by :class:`~{algorithm.__module__}.{algorithm.__name__}`."
    parts = {"Algorithm": algorithm, "Options": options, "__doc__": said, "__module__": __name__}
    register(name)(type(f"{algorithm.__name__}Agent", (ScorerAgent,), parts))


def _is_selector(found: type) -> bool:
    return "__call__" in vars(found) or any("__call__" in vars(base) for base in found.__mro__[1:-1])


def as_selector(chooser: Policy | Selector) -> Selector:
    """Return a policy as a selector, and a selector as it is.

    An object with ``select`` counts as a policy even if it can be called, as a ``torch.nn.Module`` can.
    """
    return PolicySelector(chooser) if isinstance(chooser, Policy) else chooser


class ScorerAgent:
    """Agent that consists of one trained :class:`~agents.scorer.Scorer`.

    A subclass sets the algorithm: a class called as ``Algorithm(vlm, pool, scorer, options, reward, seed)``, with the
    attribute ``phase`` (a name) and the method ``train()``, which yields metrics.
    """

    Options: ClassVar[type]
    """Dataclass of hyperparameters; has at least ``pool`` and ``reuse``, see :class:`~agents.pool.ExamplePool`."""
    Algorithm: ClassVar[Any]

    def __init__(self, setting: Setting, options: Any) -> None:
        config = ScorerConfig(token_width=setting.vlm.width, in_turn=self.chooses_in_turn(options))
        self.scorer = Scorer(config).to(device_of(setting.vlm))
        pool = setting.pool(options.pool, options.reuse)
        self._algorithm = self.Algorithm(setting.vlm, pool, self.scorer, options, setting.reward, setting.seed)
        self.phases = {"warmup": getattr(options, "warmup_steps", 0), self.Algorithm.phase: options.steps}
        """Number of steps of each phase."""

    @classmethod
    def chooses_in_turn(cls, options: Any) -> bool:
        """Return whether the scorer chooses tokens one after another; see ScorerConfig."""
        decided = options.objective() if hasattr(options, "objective") else options  # a preset may decide
        return bool(getattr(decided, "in_turn", False))

    def learn(self) -> Iterator[Any]:
        """Train; see :class:`Agent`."""
        return cast(Iterator[Any], self._algorithm.train())

    def snapshot(self) -> Snapshot:
        """Return the state of the training after its last step."""
        return cast(Snapshot, self._algorithm.snapshot())

    def restore(self, snapshot: Snapshot) -> None:
        """Continue a training where :meth:`snapshot` was taken.

        :meth:`learn` then yields the steps that follow.

        Raises:
            ValueError: If it is of another training.
        """
        self._algorithm.restore(snapshot)

    def save(self, folder: Path) -> None:
        """Save the scorer; see :class:`Agent`."""
        self.scorer.save(folder)

    @classmethod
    def load(cls, folder: Path, vlm: FrozenVLM) -> ScorerSelector:
        """Load a scorer; see :class:`Agent`."""
        scorer = Scorer.load(folder)
        scorer.check_width(vlm.width, folder, vlm.name)
        return ScorerSelector(scorer.to(device_of(vlm)))

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens with the scorer; see :class:`agents.base.Selector`."""
        return ScorerSelector(self.scorer)(vlm, encoded, counts, generator)


def device_of(vlm: FrozenVLM) -> torch.device:
    """Return the device of a model, or the CPU if it has no ``device``."""
    return getattr(vlm, "device", torch.device("cpu"))

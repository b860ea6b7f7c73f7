"""What ``python -m grip_env.train --algo NAME`` can train, and how others plug in.

An algorithm is a class that follows :class:`Agent`. It is named by what it was registered as, or by where to import it
from, as in ``--algo my_package.my_module:MyAgent``; the fields of its ``Options`` become options of the command.
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
"""What trains a scorer, by name."""

ALGORITHMS = tuple(OPTIONS)
"""The algorithms that come with the package."""

_registered: dict[str, type[Agent]] = {}
_Class = TypeVar("_Class", bound=type)


@dataclass
class Setting:
    """What an agent is trained on."""

    vlm: FrozenVLM
    """The frozen model."""
    task: Task
    """Where images, questions and answers come from."""
    reward: Reward
    """What a selection is worth."""
    split: str = "train"
    """The part of the task that training may look at."""
    seed: int = 0
    """Decides everything random."""
    progress: bool = False
    """Show a progress bar while examples are encoded before the first step."""

    def pool(self, size: int = 768, reuse: int = 4) -> ExamplePool:
        """Return encoded training examples in batches, see :class:`~agents.pool.ExamplePool`."""
        return ExamplePool(self.vlm, self.task, self.split, size, reuse, self.seed, self.progress)

    def make_vec(self, name: str = "GRIP/TokenSelection-v0", num_envs: int = 16, **options: Any) -> Any:
        """Return a vector environment on the training examples.

        Args:
            name: Which environment.
            num_envs: How many instances.
            options: Other arguments of the environment, such as ``budget``.
        """
        import gymnasium

        import grip_env  # noqa: F401 (registers the environments)

        about: dict[str, Any] = {"vlm": self.vlm, "task": self.task, "split": self.split, "reward": self.reward}
        return gymnasium.make_vec(name, num_envs, **(about | options))


@dataclass
class NoOptions:
    """An algorithm without hyperparameters."""


@runtime_checkable
class Agent(Protocol):
    """Something that learns to choose tokens.

    Beside what is listed here it has ``select``, as a :class:`~agents.base.Policy` has, or is called with batches of
    encoded examples, as a :class:`~agents.base.Selector` is. A class may also have ``Options``, a dataclass of
    hyperparameters with a docstring under each, and ``phases``, the number of steps of each phase of :meth:`learn`.
    """

    def __init__(self, setting: Setting, options: Any) -> None:
        """Begin untrained.

        Args:
            setting: What to train on.
            options: An ``Options``; :class:`NoOptions` where the class has none.

        Raises:
            ValueError: If an option is wrong.
        """

    def learn(self) -> Iterator[Any]:
        """Train, yielding :class:`~agents.learning.Metrics` after each step; the agent is usable at any of them."""
        ...

    def save(self, folder: Path) -> None:
        """Write what :meth:`load` needs into ``folder``; what an earlier call wrote there is replaced."""
        ...

    @classmethod
    def load(cls, folder: Path, vlm: FrozenVLM) -> Policy | Selector:
        """Return what :meth:`save` wrote, ready to choose.

        Raises:
            FileNotFoundError: If there is nothing.
            ValueError: If it is damaged, or was made for another model.
        """
        ...


def register(name: str) -> Callable[[_Class], _Class]:
    """Give an algorithm a name for ``--algo``, once its module has been imported: a decorator of its class.

    The command imports the project's own algorithms only; to it, a class elsewhere is ``package.module:Class``. A name
    serves those who call :func:`grip_env.train.parse` from a program of theirs.

    Raises:
        ValueError: If the name is taken by another class, or is not one that an option could have.
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
        ValueError: If there is none, or it is no class of the kind :class:`Agent` describes.
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
    """Register an algorithm that comes with the package."""
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

    A policy that is also a ``torch.nn.Module`` can be called for other reasons: ``select`` goes first.
    """
    return PolicySelector(chooser) if isinstance(chooser, Policy) else chooser


class ScorerAgent:
    """An agent that is one trained :class:`~agents.scorer.Scorer`, whatever algorithm trains it.

    A subclass names the algorithm: a class made as ``Algorithm(vlm, pool, scorer, options, reward, seed)``, with a name
    of its ``phase`` and a method ``train()`` that yields metrics.
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
        """How many steps each phase has."""

    @classmethod
    def chooses_in_turn(cls, options: Any) -> bool:
        """Return whether the scorer is one that chooses tokens one after another; see ScorerConfig."""
        decided = options.objective() if hasattr(options, "objective") else options  # where a preset may decide
        return bool(getattr(decided, "in_turn", False))

    def learn(self) -> Iterator[Any]:
        """Train; see :class:`Agent`."""
        return cast(Iterator[Any], self._algorithm.train())

    def save(self, folder: Path) -> None:
        """Write the scorer; see :class:`Agent`."""
        self.scorer.save(folder)

    @classmethod
    def load(cls, folder: Path, vlm: FrozenVLM) -> ScorerSelector:
        """Read a scorer; see :class:`Agent`."""
        scorer = Scorer.load(folder)
        scorer.check_width(vlm.width, folder, vlm.name)
        return ScorerSelector(scorer.to(device_of(vlm)))

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens as the scorer would; see :class:`agents.base.Selector`."""
        return ScorerSelector(self.scorer)(vlm, encoded, counts, generator)


def device_of(vlm: FrozenVLM) -> torch.device:
    """Return where a model runs; the CPU where it does not say."""
    return getattr(vlm, "device", torch.device("cpu"))

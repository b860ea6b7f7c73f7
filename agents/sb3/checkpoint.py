"""Saved weights and optimiser state of a training, in one file and without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from agents.training.snapshot import Snapshot
from grip_env.common.atomic_files import write_atomically
from grip_env.common.finite import check_finite
from grip_env.common.sealed_files import seal, unseal

__all__ = ["TrainingState"]

SEAL = "training state"


class TrainingState(NamedTuple):
    """State of a network and its optimiser."""

    about: dict[str, Any]
    """Further information, stored as JSON."""
    weights: dict[str, torch.Tensor]
    """Weights by the names of ``named_parameters``."""
    moments: dict[str, torch.Tensor]
    """State of the optimiser by "index/name": the index of a parameter and the name of an entry of its state."""

    @classmethod
    def of(cls, network: nn.Module, optimizer: torch.optim.Optimizer, about: Mapping[str, Any]) -> TrainingState:
        """Return the state of a network and of an optimiser of all its parameters.

        The tensors share memory with them.
        """
        weights = {name: value.detach() for name, value in network.named_parameters()}
        return cls(dict(about), weights, Snapshot.of_optimizer(optimizer).tensors)

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer, source: str) -> None:
        """Load the state into a network and an optimiser of the same kind.

        The optimiser keeps its learning rate.

        Raises:
            ValueError: If the network has other parameters; nothing is changed then. The message names ``source``.
        """
        own = dict(network.named_parameters())
        ours, theirs = ({name: tuple(value.shape) for name, value in part.items()} for part in (own, self.weights))
        if ours != theirs:
            names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ValueError(
                f"{source} was written by a network of another kind ({names[0]} has shape {theirs.get(names[0])} there "
                f"and {ours.get(names[0])} here): give the options it was trained with"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(self.weights[name])
        Snapshot(self.moments, {}).load_into_optimizer(optimizer)

    def write(self, path: Path) -> None:
        """Write the state to a file, and create its folder if needed.

        A crash while writing leaves the previous file intact.

        Raises:
            NonFiniteError: If a weight is NaN or infinite; nothing is written then.
            OSError: If the file cannot be written.
        """
        check_finite(self.weights, "the agent")
        tensors = {f"weights/{name}": value for name, value in self.weights.items()}
        tensors |= {f"moments/{name}": value for name, value in self.moments.items()}
        write_atomically(path, seal(SEAL, tensors, {"about": json.dumps(self.about)}))

    @classmethod
    def read(cls, path: Path) -> TrainingState:
        """Read a file that :meth:`write` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read, or its contents have changed.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no training state in {path.parent}: expected {path.name}")
        try:
            tensors, texts = unseal(SEAL, path.read_bytes())
            about = json.loads(texts["about"])
            if not isinstance(about, dict):
                raise ValueError("it says nothing about the training")
            parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "moments": {}}
            for key, tensor in tensors.items():
                kind, _, name = key.partition("/")
                parts[kind][name] = tensor
            check_finite(parts["weights"], "it")
        except (ValueError, TypeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
            raise ValueError(f"{path} is damaged ({reason}): train again or copy it anew") from error
        return cls(about, parts["weights"], parts["moments"])

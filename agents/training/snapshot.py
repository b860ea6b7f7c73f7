"""Snapshots of a training between two steps, from which it continues bit for bit.

A snapshot holds what cannot be computed again: weights, moments of optimisers, states of random generators, positions
in the data, scores. Encoded images are encoded again when it is restored, in batches of the same examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from grip_env.common.atomic_files import write_atomically
from grip_env.common.finite import check_finite
from grip_env.common.sealed_files import seal, unseal

__all__ = ["Snapshot"]

SEAL = "training snapshot"


class Snapshot(NamedTuple):
    """Tensors and plain values by name.

    Parts of a training have names of their own, as in "pool/generator".
    """

    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]
    """Values that JSON can hold, nested by part."""

    @classmethod
    def join(cls, parts: Mapping[str, Snapshot | None], **about: Any) -> Snapshot:
        """Return the snapshot of a whole from those of its parts; ``None`` leaves a part out."""
        known = {name: part for name, part in parts.items() if part is not None}
        tensors = {f"{name}/{key}": value for name, part in known.items() for key, value in part.tensors.items()}
        return cls(tensors, about | {name: part.about for name, part in known.items()})

    def part(self, name: str) -> Snapshot:
        """Return the snapshot of a part.

        Raises:
            KeyError: If there is none.
        """
        start = f"{name}/"
        tensors = {key[len(start) :]: value for key, value in self.tensors.items() if key.startswith(start)}
        return Snapshot(tensors, self.about[name])

    @classmethod
    def of_module(cls, module: nn.Module) -> Snapshot:
        """Return the weights and buffers of a module, which share memory with it."""
        return cls(module.state_dict(), {})

    def load_into(self, module: nn.Module) -> None:
        """Copy weights and buffers into a module.

        Raises:
            ValueError: If the module has others.
        """
        try:
            module.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise ValueError("it is of a network of another kind") from error

    @classmethod
    def of_optimizer(cls, optimizer: torch.optim.Optimizer) -> Snapshot:
        """Return the moments of an optimiser; its learning rate follows from the step."""
        return cls(
            {
                f"{index}/{name}": torch.as_tensor(value)
                for index, held in optimizer.state_dict()["state"].items()
                for name, value in held.items()
            },
            {},
        )

    def load_into_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy the moments into an optimiser of the same parameters."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in self.tensors.items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    @classmethod
    def of_generator(cls, generator: torch.Generator) -> Snapshot:
        """Return the state of a source of random numbers."""
        return cls({"state": generator.get_state()}, {})

    def load_into_generator(self, generator: torch.Generator) -> None:
        """Set the state of a source of random numbers."""
        generator.set_state(self.tensors["state"])

    def write(self, path: Path) -> None:
        """Write the snapshot to a file, whole or not at all.

        Raises:
            NonFiniteError: If a weight is NaN or infinite; nothing is written then.
            OSError: If the file cannot be written.
        """
        check_finite({key: value for key, value in self.tensors.items() if value.is_floating_point()}, "the training")
        write_atomically(path, seal(SEAL, self.tensors, {"about": json.dumps(self.about)}), durable=True)

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        """Read a file that :meth:`write` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read, or its contents have changed.
        """
        try:
            tensors, texts = unseal(SEAL, path.read_bytes())
            about = json.loads(texts["about"])
            if not isinstance(about, dict):
                raise ValueError("it says nothing about the training")
        except (ValueError, TypeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
            raise ValueError(f"{path} is damaged ({reason})") from error
        return cls(tensors, about)

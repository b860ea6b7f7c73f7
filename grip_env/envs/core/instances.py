"""Encoded examples, loaded and scored in batches, with the recent ones kept in memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from grip_env.common.lru import LRU
from grip_env.envs.core.features import Features
from grip_env.rewards.judging import RewardScorer
from grip_env.tasks.base import Example, Task
from grip_env.vlms.base import Encoded, Scores

__all__ = ["Instance", "InstanceStore", "RoomError", "fit", "read_only", "to_array"]


class RoomError(ValueError):
    """Error for an example with more tokens than the observation space has room for."""


@dataclass
class Instance:
    """One encoded example, its observation, and its scores with every token kept."""

    index: int
    encoded: Encoded
    """Batch of one row."""
    real: np.ndarray
    """Mask of the tokens that are not padding, bool (N,)."""
    positions: np.ndarray
    """Row and column of each token, float32 (N, 2), 0 for padding."""
    cells: np.ndarray | None
    """Height and width of the area each token shows, float32 (N, 2); ``None`` where all areas are equal."""
    observed: dict[str, np.ndarray]
    """Part of an observation that is the same at every step and budget, in read-only arrays."""
    full: Scores | None = None
    """Scores with every token kept, fields of shape (1, 1); ``None`` until they are needed."""

    @property
    def example(self) -> Example:
        """The example itself."""
        return self.encoded.examples[0]

    @cached_property
    def count(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.real.sum())

    @cached_property
    def candidates(self) -> np.ndarray:
        """Indices of the tokens that are not padding, long (count,), ascending."""
        return np.flatnonzero(self.real)

    @cached_property
    def nothing(self) -> np.ndarray:
        """Empty selection, bool (N,), read-only."""
        empty = np.zeros_like(self.real)
        empty.setflags(write=False)
        return empty

    @cached_property  # read at every step
    def full_log_likelihood(self) -> float:
        """Log-likelihood of the answer with every token kept, nats per answer token."""
        assert self.full is not None
        return float(self.full.log_likelihood)

    @cached_property
    def relevant(self) -> np.ndarray | None:
        """Mask of the tokens that decide the answer, bool (N,), read-only; ``None`` if unknown."""
        grades = self.example.token_relevance(self.positions)
        if grades is None:
            return None
        relevant = self.real & (grades > 0)
        relevant.setflags(write=False)
        return relevant


class InstanceStore:
    """The instances of one split.

    Args:
        rewards: The frozen model and the reward of its scores. If the reward needs agreement, each instance holds
            another V float32 numbers, where V is the size of the vocabulary.
        task: Where examples come from.
        split: Name of the split.
        max_tokens: N, the most visual tokens an instance may have; ``None`` takes the number of the first example.
        max_question_tokens: Q, the most question tokens an instance may have; ``None`` allows any number.
        cache_size: Number of instances to keep in memory; the least recently used are dropped first.
        features: Conversion of tokens and words for the observation; the model's own features by default.
    """

    def __init__(
        self,
        rewards: RewardScorer,
        task: Task,
        split: str,
        max_tokens: int | None,
        max_question_tokens: int | None,
        cache_size: int,
        features: Features | None = None,
    ) -> None:
        self.rewards = rewards
        self.vlm = rewards.vlm
        self.features = Features(self.vlm.width) if features is None else features
        self.task = task
        self.split = split
        if max_tokens is None:
            max_tokens = self.vlm.encode([task.example(split, 0)]).token_mask.shape[1]
        self.max_tokens = max_tokens
        self.max_question_tokens = max_question_tokens
        self._recent: LRU[int, Instance] = LRU(cache_size)
        self._parts: list[Encoded] = []
        self._batch: Encoded | None = None

    def load(self, indices: Iterable[int]) -> dict[int, Instance]:
        """Return instances by index; encode those that are not in memory together.

        Raises:
            RoomError: If an instance has more visual or question tokens than there is room for.
        """
        wanted = list(dict.fromkeys(indices))
        held = {index: self._recent.get(index) for index in wanted}
        found = {index: instance for index, instance in held.items() if instance is not None}
        missing = [index for index in wanted if index not in found]
        if missing:
            encoded = self.vlm.encode([self.task.example(self.split, index) for index in missing])
            found |= {index: self._instance(index, encoded[[row]]) for row, index in enumerate(missing)}
        for index in wanted:
            self._recent.put(index, found[index])
        return found

    def instances(self) -> list[Instance]:
        """Return the instances in memory, the least recently used first."""
        return self._recent.values()

    def score(self, jobs: Sequence[tuple[Instance, np.ndarray]], full: Scores | None = None) -> Scores:
        """Score one selection of each of R instances in a single call of the model.

        Args:
            jobs: R instances with a selection each, bool (N,).
            full: Their scores with every token kept, (R, 1), as :meth:`RewardScorer.score` takes them.

        Returns:
            Scores with fields of shape (R, 1).
        """
        batch = self.collate([instance for instance, _ in jobs])
        length = batch.token_mask.shape[1]
        chosen = torch.from_numpy(fit(np.stack([selection for _, selection in jobs], 1), length).T)[:, None]
        with torch.no_grad():
            return self.rewards.score(batch, chosen.to(batch.token_mask.device), full).cpu()

    def collate(self, instances: Sequence[Instance]) -> Encoded:
        """Return instances as one batch.

        The last batch is remembered, as all steps of an episode use the same instances.
        """
        parts = [instance.encoded for instance in instances]
        if len(parts) != len(self._parts) or any(map(operator.is_not, parts, self._parts)):
            self._batch = Encoded.concatenate(parts)
            self._level(self._batch, instances)
            self._parts = [instance.encoded for instance in instances]
        assert self._batch is not None
        return self._batch

    @staticmethod
    def _level(batch: Encoded, instances: Sequence[Instance]) -> None:
        """Store the texts of instances as padded in ``batch``.

        Concatenating texts of different lengths takes three times as long as of equal ones; this way it happens once.
        """
        text = {name: getattr(batch, name) for name in ("input_ids", "position_ids", "question", "question_mask")}
        text = {name: tensor for name, tensor in text.items() if tensor is not None}
        for row, instance in enumerate(instances):
            longer = {
                name: tensor[[row]]
                for name, tensor in text.items()
                if getattr(instance.encoded, name).shape[1] < tensor.shape[1]
            }
            if longer:
                instance.encoded = replace(instance.encoded, **longer)

    def _instance(self, index: int, encoded: Encoded) -> Instance:
        mask = encoded.token_mask[0].cpu().numpy()
        real = fit(mask, self.max_tokens)
        self._check_room(index, "visual", int(mask.sum()), int(real.sum()), "max_tokens")
        words = int(encoded.question_mask[0].sum())
        room = words if self.max_question_tokens is None else self.max_question_tokens
        self._check_room(index, "question", words, room, "max_question_tokens")
        positions = np.clip(fit(to_array(encoded.positions[0]), self.max_tokens) * real[:, None], 0.0, 1.0)
        cells = None if encoded.cells is None else fit(to_array(encoded.cells[0]), self.max_tokens)
        tokens = to_array(encoded.tokens[0])
        if len(tokens) != self.max_tokens:
            tokens = fit(tokens, self.max_tokens)
        # where nothing changes, these are the model's own tokens, which take no memory of their own
        observed = {
            "tokens": self.features(tokens),
            "token_mask": real.astype(np.int8),
            "positions": positions,
        }
        if self.max_question_tokens is not None:
            observed["question"] = self.features(fit(to_array(encoded.question[0]), room))
            observed["question_mask"] = fit(encoded.question_mask[0].cpu().numpy(), room).astype(np.int8)
        for value in observed.values():
            value.setflags(write=False)
        return Instance(index, encoded, real, positions, cells, observed)

    def _check_room(self, index: int, kind: str, count: int, room: int, argument: str) -> None:
        if count > room:
            raise RoomError(
                f"example {index} of split {self.split!r} has {count} {kind} tokens, but the observation "
                f"space has room for {getattr(self, argument)}: pass {argument}={count} or more"
            )


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a float32 array."""
    return tensor.detach().float().cpu().numpy()


def read_only(array: np.ndarray) -> np.ndarray:
    """Return a view of an array that cannot be written to."""
    view = array.view()
    if view.flags.writeable:
        view.setflags(write=False)
    return view


def fit(rows: np.ndarray, length: int) -> np.ndarray:
    """Return a copy of ``rows`` cut or zero-padded to ``length``."""
    fitted = np.zeros((length, *rows.shape[1:]), dtype=rows.dtype)
    fitted[: len(rows)] = rows[:length]
    return fitted

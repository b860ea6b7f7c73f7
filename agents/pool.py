"""A moving window over a task's training examples: each is encoded once and used several times."""

from __future__ import annotations

import torch
from tqdm import tqdm

from grip_env.rewards.judging import full_scores
from grip_env.tasks.base import Task
from grip_env.vlms.base import Encoded, FrozenVLM, Scores

__all__ = ["BACKWARD", "ExamplePool", "ForwardCounter"]


BACKWARD = 3
"""Forward passes that one forward and backward pass together are worth: the backward pass computes two products of
matrices for each one of the forward pass (Kaplan et al., "Scaling laws for neural language models", 2020, section 2.1).
"""


class ForwardCounter:
    """Counts forward-equivalents: how often a language model has read one selection of one example.

    One selection scored counts 1, whatever it keeps, and so does the full image, by which an example enters the pool.
    One read forwards and backwards, as for a gradient with respect to the visual tokens, counts :data:`BACKWARD`. What
    runs once per image in every algorithm, the vision encoder, is not counted, and neither is the scorer's own work:
    ``seconds`` in the logs has them.

    >>> compute = ForwardCounter()
    >>> compute.add(32)  # 32 selections scored
    >>> compute.add(8, backward=True)  # 8 gradients
    >>> compute.forwards
    56
    """

    def __init__(self) -> None:
        self.forwards = 0
        """Forward-equivalents so far."""

    def add(self, count: int, backward: bool = False) -> None:
        """Count selections that the language model has read.

        Args:
            count: How many, B * G for a batch.
            backward: Whether a gradient was computed through the language model as well.

        Raises:
            ValueError: If there are fewer than 0.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0; got {count}")
        self.forwards += count * (BACKWARD if backward else 1)


PART = 128  # examples encoded or scored in one go


class ExamplePool:
    """Encoded examples for training.

    Args:
        vlm: The frozen model.
        task: Where examples come from.
        split: Which split of it.
        size: Examples held at a time.
        reuse: About how often each is used before it makes room for a new one.
        seed: Decides the order of examples.
        progress: Show a progress bar while the first ``size`` examples are encoded.

    The scores with all tokens kept are held as well; with their first tokens' distributions, which :meth:`batch` has to
    be asked for, that is another V float32 numbers for each example, with V the size of the vocabulary.

    Every ``reuse`` calls of :meth:`batch` replace the oldest examples by as many new ones as a batch holds.
    """

    def __init__(
        self,
        vlm: FrozenVLM,
        task: Task,
        split: str = "train",
        size: int = 768,
        reuse: int = 4,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if size < 1 or reuse < 1:
            raise ValueError(f"size and reuse must be at least 1; got size={size}, reuse={reuse}")
        self.vlm, self.task, self.split, self.size, self.reuse = vlm, task, split, size, reuse
        self._progress = progress
        self.compute = ForwardCounter()
        """What all who train on this pool have spent, the pool included: 1 for each example scored with all tokens."""
        self._generator = torch.Generator().manual_seed(seed)
        self._held: Encoded | None = None
        self._calls = 0
        self._full: Scores | None = None  # with all tokens, (size, 1)
        self._first_token = False

    def _score(self, encoded: Encoded) -> Scores:
        self.compute.add(len(encoded))
        return full_scores(self.vlm, encoded, self._first_token)

    def _draw(self, count: int) -> tuple[Encoded, Scores]:
        indices = torch.randint(self.task.size(self.split), (count,), generator=self._generator)
        parts, full = [], []
        bar = tqdm(
            indices.split(PART),
            desc="encoding examples",
            leave=False,
            dynamic_ncols=True,
            disable=not self._progress or self._held is not None,
        )
        for rows in bar:
            encoded = self.vlm.encode([self.task.example(self.split, int(index)) for index in rows])
            full.append(self._score(encoded))
            parts.append(encoded)
        return Encoded.concatenate(parts), Scores.concatenate(full)

    def batch(self, count: int, first_token: bool = False) -> tuple[Encoded, Scores]:
        """Return ``count`` examples, and their scores with all tokens, (count, 1).

        Args:
            count: How many, no more than the pool holds.
            first_token: Fill in ``first_token`` of the scores, (count, 1, V), from now on. What is held is scored again
                if it was scored without.
        """
        self._first_token |= first_token
        if self._held is None or self._full is None:
            self._held, self._full = self._draw(self.size)
        elif first_token and self._full.first_token is None:
            parts = [self._held[slice(start, start + PART)] for start in range(0, len(self._held), PART)]
            self._full = Scores.concatenate([self._score(part) for part in parts])
        if self._calls and self._calls % self.reuse == 0:
            fresh = min(count, self.size)  # all at once: encoding and moving a batch costs little more than one example
            new, full = self._draw(fresh)
            self._held = Encoded.concatenate([self._held[slice(fresh, None)], new])
            self._full = Scores.concatenate([self._full[slice(fresh, None)], full])
        self._calls += 1
        rows = torch.randperm(len(self._held), generator=self._generator)[:count]
        return self._held[rows], self._full[rows]

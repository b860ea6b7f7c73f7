"""Moving window over training examples: each is encoded once and used several times."""

from __future__ import annotations

import torch
from tqdm import tqdm

from grip_env.rewards.judging import full_scores
from grip_env.tasks.base import Task
from grip_env.vlms.base import Encoded, FrozenVLM, Scores

__all__ = ["BACKWARD", "ExamplePool", "ForwardCounter"]


BACKWARD = 3
"""Cost of one forward and backward pass together, in forward passes: for each matrix product of the forward pass, the
backward pass computes two (Kaplan et al., "Scaling laws for neural language models", 2020, section 2.1).
"""


class ForwardCounter:
    """Counter of forward-equivalents, the runs of the language model on one selection.

    Scoring one selection of one example counts 1, whatever it keeps, and so does scoring the full image when an example
    enters the pool. A forward and backward pass, as for a gradient with respect to the visual tokens, counts
    :data:`BACKWARD`. The vision encoder, which runs once per image in every algorithm, and the scorer itself are not
    counted; ``seconds`` in the logs includes them.

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
        """Add selections that the language model has processed.

        Args:
            count: Number of selections, B * G for a batch.
            backward: True if a gradient through the language model was computed as well.

        Raises:
            ValueError: If ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0; got {count}")
        self.forwards += count * (BACKWARD if backward else 1)


PART = 128  # examples encoded or scored per call


class ExamplePool:
    """Pool of encoded training examples.

    Args:
        vlm: The frozen model.
        task: Source of the examples.
        split: Split of the task.
        size: Number of examples held at a time.
        reuse: Approximate number of times that each example is used before a new one replaces it.
        seed: Seed of the order of examples.
        progress: Show a progress bar while the first ``size`` examples are encoded.

    The pool also holds the scores with all tokens kept. If :meth:`batch` is called with ``first_token``, these include
    the distribution of the first token: V float32 numbers per example, with V the size of the vocabulary.

    After every ``reuse`` calls of :meth:`batch`, one batch of new examples replaces the oldest ones.
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
        """Forward-equivalents of all training on this pool, including 1 for each example scored with all tokens."""
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
        """Return ``count`` random examples and their scores with all tokens, (count, 1).

        Args:
            count: Number of examples, at most ``size``.
            first_token: Fill in ``first_token`` of the scores, (count, 1, V), from now on. Examples that were scored
                without it are scored again.
        """
        self._first_token |= first_token
        if self._held is None or self._full is None:
            self._held, self._full = self._draw(self.size)
        elif first_token and self._full.first_token is None:
            parts = [self._held[slice(start, start + PART)] for start in range(0, len(self._held), PART)]
            self._full = Scores.concatenate([self._score(part) for part in parts])
        if self._calls and self._calls % self.reuse == 0:
            fresh = min(count, self.size)  # together: encoding and moving a batch costs little more than one example
            new, full = self._draw(fresh)
            self._held = Encoded.concatenate([self._held[slice(fresh, None)], new])
            self._full = Scores.concatenate([self._full[slice(fresh, None)], full])
        self._calls += 1
        rows = torch.randperm(len(self._held), generator=self._generator)[:count]
        return self._held[rows], self._full[rows]

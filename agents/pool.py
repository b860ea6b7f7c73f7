"""Moving window over training examples: each is encoded once and used several times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from agents.training.snapshot import Snapshot
from grip_env.rewards.judging import full_scores
from grip_env.tasks.base import Example, Task
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
MOST = 10_000_000  # examples that a pool may hold; each takes kilobytes of memory


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
        if size > MOST:
            raise ValueError(
                f"a pool holds its examples in memory, {MOST:,} at most; got {size}: choose a smaller pool"
            )
        self.vlm, self.task, self.split, self.size, self.reuse = vlm, task, split, size, reuse
        self._progress = progress
        self.compute = ForwardCounter()
        """Forward-equivalents of all training on this pool, including 1 for each example scored with all tokens."""
        self._generator = torch.Generator().manual_seed(seed)
        self._held: Encoded | None = None
        self._calls = 0
        self._full: Scores | None = None  # with all tokens, (size, 1)
        self._first_token = False
        self._groups: list[torch.Tensor] = []  # indices of the examples that were encoded together, oldest first
        self._dropped = 0  # examples of the first group that are not held any more

    @property
    def examples(self) -> list[Example]:
        """The examples that are held, the oldest first."""
        return [] if self._held is None else self._held.examples

    def snapshot(self) -> Snapshot:
        """Return the examples that the pool holds and their scores, without features."""
        about: dict[str, Any] = {"calls": self._calls, "dropped": self._dropped, "first_token": self._first_token}
        tensors = {f"groups/{index}": group for index, group in enumerate(self._groups)}
        if self._held is not None and self._full is not None:
            about["widths"] = self._held.widths()
            tensors |= {f"full/{name}": value for name, value in vars(self._full).items() if value is not None}
        tensors["generator"] = self._generator.get_state()
        return Snapshot(tensors, about | {"forwards": self.compute.forwards})

    def restore(self, snapshot: Snapshot) -> None:
        """Hold the examples again that were held when :meth:`snapshot` was called."""
        tensors, about = snapshot
        self._generator.set_state(tensors["generator"])
        self._calls, self._dropped, self._first_token = about["calls"], about["dropped"], about["first_token"]
        self.compute.forwards = about["forwards"]
        self._groups = [
            tensors[f"groups/{index}"] for index in range(sum(key.startswith("groups/") for key in tensors))
        ]
        if self._groups:
            # together as before: what else is in a batch may change the last bits of features
            encoded = Encoded.concatenate([self._encode(group) for group in self._bar(self._groups)])
            self._held = encoded[slice(self._dropped, None)].widened(about["widths"])
            full = {key.removeprefix("full/"): value for key, value in tensors.items() if key.startswith("full/")}
            self._full = Scores(**{name: value.to(encoded.tokens.device) for name, value in full.items()})

    def _bar(self, groups: Sequence[torch.Tensor]) -> tqdm[torch.Tensor]:
        shown = self._progress and self._held is None
        return tqdm(groups, desc="encoding examples", leave=False, dynamic_ncols=True, disable=not shown)

    def _encode(self, group: torch.Tensor) -> Encoded:
        return self.vlm.encode([self.task.example(self.split, int(index)) for index in group])

    def _score(self, encoded: Encoded) -> Scores:
        self.compute.add(len(encoded))
        return full_scores(self.vlm, encoded, self._first_token)

    def _draw(self, count: int) -> tuple[Encoded, Scores]:
        indices = torch.randint(self.task.size(self.split), (count,), generator=self._generator)
        parts, full = [], []
        for group in self._bar(indices.split(PART)):
            encoded = self._encode(group)
            full.append(self._score(encoded))
            parts.append(encoded)
            self._groups.append(group.clone())
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
            self._dropped += fresh
            while self._dropped >= len(self._groups[0]):
                self._dropped -= len(self._groups.pop(0))
        self._calls += 1
        rows = torch.randperm(len(self._held), generator=self._generator)[:count]
        return self._held[rows], self._full[rows]

"""Teachers, which score tokens, and the loss with which a scorer learns to imitate one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch

from agents.base import top_k
from agents.pool import ForwardCounter
from agents.scorer import Scorer
from agents.subset import KSubset
from agents.training.snapshot import Snapshot
from grip_env.common.lru import LRU
from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = [
    "TEACHERS",
    "LeaveOneOut",
    "Remembered",
    "Teacher",
    "attention_teacher",
    "gradient_saliency",
    "make_teacher",
    "relevance_teacher",
    "warmup_loss",
]


class Teacher(Protocol):
    """Interface of functions that score the visual tokens of a batch.

    A teacher may use the answers.
    """

    def __call__(self, vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
        """Score tokens.

        Args:
            vlm: The model the examples were encoded with.
            encoded: B examples.
            compute: Counter to which the cost is added, if given.

        Returns:
            float (B, N); the tokens with the highest scores are the ones to keep. Padding may have any value.
        """
        ...


def gradient_saliency(vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
    """Score tokens by |gradient x token| of the answer's log-likelihood, (B, N).

    Uses the answer, so this is a teacher and not a pruner. Costs one forward and backward pass per example, 3
    forward-equivalents.
    Source: Simonyan et al., "Deep inside convolutional networks", 2013, in the gradient-times-input form of Shrikumar
    et al., 2016.
    """
    tokens = encoded.tokens.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = vlm.log_likelihood(encoded, encoded.full_selection(), tokens).sum()
        (gradient,) = torch.autograd.grad(total, tokens)
    if compute is not None:
        compute.add(len(encoded), backward=True)
    return (gradient * tokens.detach()).sum(-1).abs()


def attention_teacher(vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
    """Score tokens by the attention they get from the vision tower's CLS token, (B, N).

    Uses neither question nor answer, and no forward pass of the language model.
    """
    return vlm.attention(encoded, "cls")


def relevance_teacher(vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
    """Score tokens by the ground truth, (B, N).

    Only for tasks that have one. Costs nothing.
    """
    relevance = encoded.relevance()
    if relevance is None:
        raise ValueError("the relevance teacher needs a task with ground truth: choose another teacher")
    return relevance


class LeaveOneOut:
    """Teacher that scores tokens by the drop in log-likelihood when they are removed.

    Tokens are removed from the full image, and the log-likelihood is the answer's. Unlike a gradient, this measures a
    real change of the input. Like a gradient, it misses redundant tokens, as each of them can be removed while the
    others stay. Uses the answer.

    Args:
        cells: Rows and columns of a grid over the image. A whole cell is removed at a time, so its tokens share one
            score. 0 removes single tokens.

    Raises:
        ValueError: If ``cells`` is 1, which would leave no tokens, or negative.

    The cost per example is one forward pass for each cell with tokens in it, or for each token: for the 12 x 12 tokens
    of the embedded model, 144 with single tokens and 36 with the default of 6, where the gradient costs 3. Each pass
    reads nearly the whole image, so it takes longer than a pass over a small selection in GRPO, which counts the same.
    Source: Zeiler & Fergus, "Visualizing and understanding convolutional networks", ECCV 2014 (occlusion).
    """

    def __init__(self, cells: int = 6) -> None:
        if cells < 0 or cells == 1:
            raise ValueError(f"cells must be 0 (token by token) or at least 2 rows and columns; got {cells}")
        self.cells = cells

    @torch.no_grad()
    def __call__(self, vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
        """Return minus the log-likelihood without each token, (B, N).

        This is the drop up to a constant for each example.
        """
        part = self._parts(encoded)  # (B, N)
        out = part[:, None] == torch.arange(int(part.max()) + 1, device=part.device)[:, None]  # (B, G, N)
        if compute is not None:
            compute.add(out.shape[0] * out.shape[1])
        return -vlm.log_likelihood(encoded, encoded.full_selection() & ~out).gather(1, part)

    def _parts(self, encoded: Encoded) -> torch.Tensor:
        """Return the index of the part with which each token is removed, without gaps, long (B, N)."""
        if not self.cells:
            return torch.arange(encoded.token_mask.shape[1], device=encoded.tokens.device).repeat(len(encoded), 1)
        row, column = (encoded.positions * self.cells).long().clamp(0, self.cells - 1).unbind(-1)
        cell = row * self.cells + column
        used = cell[encoded.token_mask].unique()
        # padding may be in any part: it has no token to remove, and its score is not used
        return torch.searchsorted(used, cell).clamp_max(len(used) - 1)


TEACHERS: dict[str, Teacher] = {
    "gradient": gradient_saliency,
    "attention": attention_teacher,
    "relevance": relevance_teacher,
    "leave_one_out": LeaveOneOut(),
}
"""Teachers by name."""


class Remembered:
    """Cache of the scores of an expensive teacher, which runs once for each example.

    Args:
        teacher: The teacher.
        size: Number of examples whose scores are held; the least recently used are dropped.
    """

    def __init__(self, teacher: Teacher, size: int) -> None:
        self.teacher = teacher
        # by id, which is unique while the example itself is held; its key is a name for logs and may be empty
        self._known: LRU[int, tuple[Example, torch.Tensor]] = LRU(size)

    def __call__(self, vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
        """Return the teacher's scores, (B, N); see :class:`Teacher`."""
        held = {id(example): self._known.get(id(example)) for example in encoded.examples}
        known = {key: value for key, value in held.items() if value is not None}
        new = [row for row, example in enumerate(encoded.examples) if id(example) not in known]
        if new:
            asked = encoded[new]
            for row, scores in enumerate(self.teacher(vlm, asked, compute)):
                example = asked.examples[row]
                known[id(example)] = example, scores[asked.token_mask[row]]
        result = torch.zeros(encoded.token_mask.shape, device=encoded.tokens.device)
        for row, example in enumerate(encoded.examples):
            result[row, encoded.token_mask[row]] = known[id(example)][1].float()
        for key, value in known.items():
            self._known.put(key, value)
        return result

    def snapshot(self, held: Sequence[Example]) -> Snapshot:
        """Return what is remembered of the examples ``held``, the least recently used first."""
        rows = {id(example): row for row, example in enumerate(held)}
        kept = [(rows.get(id(example), -1), scores) for example, scores in self._known.values()]
        tensors = {str(place): scores for place, (row, scores) in enumerate(kept) if row >= 0}
        return Snapshot(tensors, {"rows": [row for row, _ in kept]})

    def restore(self, snapshot: Snapshot, held: Sequence[Example]) -> None:
        """Remember the examples ``held`` again; others only take up room, as they did before."""
        for place, row in enumerate(snapshot.about["rows"]):
            example = held[row] if row >= 0 else copy.copy(held[0])  # a stranger
            scores = snapshot.tensors[str(place)] if row >= 0 else torch.empty(0)
            self._known.put(id(example), (example, scores))


def make_teacher(name: str, cells: int, remember: int) -> Teacher:
    """Return a teacher by its name.

    Args:
        name: One of :data:`TEACHERS`.
        cells: For "leave_one_out"; see :class:`LeaveOneOut`.
        remember: Number of examples whose scores "leave_one_out" caches; the other teachers are cheap enough to run
            each time.

    Raises:
        ValueError: If there is no such teacher, or the number of cells is invalid.
    """
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}: choose one of {', '.join(TEACHERS)}")
    return Remembered(LeaveOneOut(cells), remember) if name == "leave_one_out" else TEACHERS[name]


def warmup_loss(scorer: Scorer, encoded: Encoded, teacher: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood, per kept token, of the teacher's top-k subset.

    Args:
        scorer: The scorer that is trained.
        encoded: B examples.
        teacher: The teacher's scores, (B, N).
        counts: Subset sizes, long (B,).
    """
    target = top_k(teacher, counts, encoded.token_mask)
    policy = KSubset(scorer.score(encoded, counts), counts, mask=encoded.token_mask, validate_args=False)
    return -(policy.log_prob(target) / counts).mean()

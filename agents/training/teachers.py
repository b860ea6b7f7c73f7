"""Teachers, and the loss by which a scorer learns to pick what one of them would."""

from __future__ import annotations

from typing import Protocol

import torch

from agents.base import top_k
from agents.pool import ForwardCounter
from agents.scorer import Scorer
from agents.subset import KSubset
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
    """Anything that scores the visual tokens of a batch, with or without looking at the answers."""

    def __call__(self, vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
        """Score tokens.

        Args:
            vlm: The model the examples were encoded with.
            encoded: B examples.
            compute: Told what this costs, if given.

        Returns:
            float (B, N); the tokens with the highest scores are those to keep. Padding has any value.
        """
        ...


def gradient_saliency(vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
    """Score tokens by how strongly the answer's log-likelihood depends on them: |gradient x token|, (B, N).

    Uses the answer: a teacher, not a pruner. Costs one forward and backward pass per example, 3 forward-equivalents.
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

    Knows neither question nor answer, and costs no forward pass of the language model.
    """
    return vlm.attention(encoded, "cls")


def relevance_teacher(vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
    """Score tokens by the ground truth, (B, N). Only for tasks that have one; costs nothing."""
    relevance = encoded.relevance()
    if relevance is None:
        raise ValueError("the relevance teacher needs a task with ground truth: choose another teacher")
    return relevance


class LeaveOneOut:
    """Scores tokens by how far the answer's log-likelihood drops when they are taken out of the full image.

    Unlike a gradient, this is a real change of the input; like one, it is blind to tokens that stand in for each
    other, as each of them can go while the others stay. Uses the answer.

    Args:
        cells: Take out a whole cell of a grid of ``cells`` rows and columns laid over the image at a time, so that its
            tokens get one score; 0 takes out token by token.

    Raises:
        ValueError: If there is a single cell, without which nothing would be left.

    It costs as many forward passes per example as there are cells with tokens in them, or tokens: for the 12 x 12
    tokens of the embedded model 144 by token and 36 with the default of 6, where the gradient costs 3. All of them read
    nearly the whole image, so that they take longer than the small selections of GRPO that count the same.
    Source: Zeiler & Fergus, "Visualizing and understanding convolutional networks", ECCV 2014 (occlusion).
    """

    def __init__(self, cells: int = 6) -> None:
        if cells < 0 or cells == 1:
            raise ValueError(f"cells must be 0 (token by token) or at least 2 rows and columns; got {cells}")
        self.cells = cells

    @torch.no_grad()
    def __call__(self, vlm: FrozenVLM, encoded: Encoded, compute: ForwardCounter | None = None) -> torch.Tensor:
        """Return minus the log-likelihood without each token, (B, N): a constant per example less than the drop."""
        part = self._parts(encoded)  # (B, N)
        out = part[:, None] == torch.arange(int(part.max()) + 1, device=part.device)[:, None]  # (B, G, N)
        if compute is not None:
            compute.add(out.shape[0] * out.shape[1])
        return -vlm.log_likelihood(encoded, encoded.full_selection() & ~out).gather(1, part)

    def _parts(self, encoded: Encoded) -> torch.Tensor:
        """Return which part of the image each token is taken out with, numbered without gaps, long (B, N)."""
        if not self.cells:
            return torch.arange(encoded.token_mask.shape[1], device=encoded.tokens.device).repeat(len(encoded), 1)
        row, column = (encoded.positions * self.cells).long().clamp(0, self.cells - 1).unbind(-1)
        cell = row * self.cells + column
        used = cell[encoded.token_mask].unique()
        # padding goes with any part: it has no token to take out, and nobody reads its score
        return torch.searchsorted(used, cell).clamp_max(len(used) - 1)


TEACHERS: dict[str, Teacher] = {
    "gradient": gradient_saliency,
    "attention": attention_teacher,
    "relevance": relevance_teacher,
    "leave_one_out": LeaveOneOut(),
}
"""Teachers by name."""


class Remembered:
    """Asks a teacher once for each example, for teachers that cost much.

    Args:
        teacher: The one asked.
        size: Examples whose scores are held; those asked about the longest ago make room.
    """

    def __init__(self, teacher: Teacher, size: int) -> None:
        self.teacher = teacher
        # by identity, which holds while the example itself is held; keys are names for logs and may be empty
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


def make_teacher(name: str, cells: int, remember: int) -> Teacher:
    """Return a teacher by its name.

    Args:
        name: One of :data:`TEACHERS`.
        cells: For "leave_one_out"; see :class:`LeaveOneOut`.
        remember: Examples whose scores "leave_one_out" remembers; the others are cheap enough to be asked each time.

    Raises:
        ValueError: If there is no such teacher, or no such grid of cells.
    """
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}: choose one of {', '.join(TEACHERS)}")
    return Remembered(LeaveOneOut(cells), remember) if name == "leave_one_out" else TEACHERS[name]


def warmup_loss(scorer: Scorer, encoded: Encoded, teacher: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood, per kept token, of the teacher's top-k subset.

    Args:
        scorer: What is trained.
        encoded: B examples.
        teacher: The teacher's scores, (B, N).
        counts: Subset sizes, long (B,).
    """
    target = top_k(teacher, counts, encoded.token_mask)
    policy = KSubset(scorer.score(encoded, counts), counts, mask=encoded.token_mask, validate_args=False)
    return -(policy.log_prob(target) / counts).mean()

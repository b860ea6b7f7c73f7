"""Interfaces of agents: policies on single observations and selectors on batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from grip_env.envs.core.sampling import check_budget, tokens_in_budget
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["Policy", "PolicySelector", "Selector", "budget_to_count", "keep_best", "observations", "top_k"]


@runtime_checkable
class Policy(Protocol):
    """Interface of a policy, which chooses tokens from one observation of the environment."""

    def select(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a bool mask over the visual tokens, (N,)."""
        ...


@runtime_checkable
class Selector(Protocol):
    """Interface of a selector, which chooses tokens for a batch of encoded examples."""

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens.

        Args:
            vlm: The model that encoded the examples.
            encoded: B examples.
            counts: Number of tokens to keep of each example, long (B,).
            generator: Source of any randomness, on the CPU.

        Returns:
            bool (B, N) with at most ``counts`` True in each row.
        """
        ...


def budget_to_count(encoded: Encoded, budget: float | Sequence[float]) -> torch.Tensor:
    """Return k = max(1, round(budget * real tokens)) for each example, long (B,).

    Args:
        encoded: B examples.
        budget: Share of the tokens to keep, one for all examples or one for each.

    Raises:
        ValueError: If a budget is outside (0, 1], or the number of budgets does not match the examples.
    """
    totals = encoded.token_mask.sum(1).tolist()
    try:
        budgets = np.asarray(budget, dtype=float).reshape(-1).tolist()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"a budget is a share of the visual tokens, in (0, 1], or a list of such; got {budget!r}"
        ) from None
    budgets = budgets * len(totals) if np.ndim(budget) == 0 else budgets
    if len(budgets) != len(totals):
        raise ValueError(f"{len(budgets)} budgets for {len(totals)} images: give one for all, or one for each")
    for share in budgets:
        check_budget(share)
    counts = [tokens_in_budget(share, count) for share, count in zip(budgets, totals, strict=True)]
    return torch.tensor(counts, device=encoded.token_mask.device)


def top_k(scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Select the tokens with the highest scores; ties go to the lower index.

    Args:
        scores: float (B, N).
        counts: Number of tokens to keep, long (B,).
        mask: True where a token is real, bool (B, N).

    Returns:
        bool (B, N).

    Raises:
        ValueError: If the score of a real token is NaN. Infinite scores are valid.

    >>> top_k(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([1]), torch.ones(1, 3, dtype=torch.bool))
    tensor([[False,  True, False]])
    """
    if bool((scores.isnan() & mask).any()):
        raise ValueError(f"scores must be numbers; got NaN for {int((scores.isnan() & mask).sum())} tokens")
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return (rank < counts[:, None]) & mask


def observations(encoded: Encoded, counts: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Return the environment's observation of each example for the given counts."""
    shares = counts / encoded.token_mask.sum(1)
    return [
        {
            "tokens": encoded.tokens[row].float().cpu().numpy().copy(),
            "token_mask": encoded.token_mask[row].to(torch.int8).cpu().numpy().copy(),
            "positions": encoded.positions[row].float().cpu().numpy().copy(),
            "question": encoded.question[row].float().cpu().numpy().copy(),
            "question_mask": encoded.question_mask[row].to(torch.int8).cpu().numpy().copy(),
            "budget": np.array([float(shares[row])], dtype=np.float32),
        }
        for row in range(len(encoded))
    ]


def keep_best(scores: np.ndarray, observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """Select the best-scoring tokens within an observation's budget, as a policy returns them.

    Args:
        scores: One score for each visual token, (N,).
        observation: An observation of the environment; padding, as marked by ``token_mask``, is never kept.

    Returns:
        bool (N,).

    >>> keep_best(np.array([3.0, 1.0, 9.0]), {"token_mask": np.array([1, 1, 0]), "budget": np.array([0.5])})
    array([ True, False, False])
    """
    mask = torch.as_tensor(observation["token_mask"], dtype=torch.bool)
    k = tokens_in_budget(float(observation["budget"][0]), int(mask.sum()))
    return top_k(torch.as_tensor(scores)[None], torch.tensor([k]), mask[None])[0].numpy()


class PolicySelector:
    """Adapter that turns a policy into a selector, for example for comparison tables.

    Args:
        policy: The policy; it receives one observation at a time.

    If a mask has more tokens than the budget allows, a random subset of them is kept, as in the environment.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens one example at a time; see :class:`Selector`."""
        rows: list[Any] = []
        for observation in observations(encoded, counts):
            mask = np.asarray(self.policy.select(observation))
            if mask.shape != observation["token_mask"].shape or mask.dtype != bool:
                raise ValueError(
                    f"select must return a bool mask of shape {observation['token_mask'].shape}; "
                    f"got {mask.dtype} of shape {mask.shape}"
                )
            rows.append(torch.from_numpy(mask))
        chosen = torch.stack(rows).to(encoded.token_mask.device)
        luck = torch.rand(chosen.shape, generator=generator).to(chosen.device)
        return top_k(luck, counts, chosen & encoded.token_mask)

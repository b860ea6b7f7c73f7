"""Tables with the reward of every selection of k of an instance's visual tokens."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from grip_env.rewards.judging import RewardScorer
from grip_env.rewards.parsing import resolve_reward
from grip_env.rewards.terms import Reward
from grip_env.vlms.base import Encoded, FrozenVLM, Scores
from grip_env.vlms.cache.tables import TableCache

__all__ = ["MAX_SUBSETS", "RewardTable", "count_subsets", "score_subsets", "subset_masks"]

MAX_SUBSETS = 50_000
"""Largest number of subsets in a table."""
MAX_TOKENS = 64  # bits of a mask
BATCH = 2048  # subsets per call of the model, which may split them further


def count_subsets(count: int, k: int) -> int:
    """Return C(count, k), the number of ways to keep k of ``count`` tokens.

    Raises:
        ValueError: If k is outside 0 to ``count``, ``count`` is above 64, or there are more than MAX_SUBSETS ways.

    >>> count_subsets(16, 4), count_subsets(24, 5)
    (1820, 42504)
    """
    if not 0 <= k <= count:
        raise ValueError(f"cannot keep {k} of {count}: choose k from 0 to {count}")
    if count > MAX_TOKENS:
        raise ValueError(f"selections of at most {MAX_TOKENS} can be listed; got {count}: choose fewer blocks")
    subsets = math.comb(count, k)
    if subsets > MAX_SUBSETS:
        largest = max(size for size in range(count // 2 + 1) if math.comb(count, size) <= MAX_SUBSETS)
        raise ValueError(
            f"there are C({count}, {k}) = {subsets:,} ways to keep {k} of {count}, too many to score each (at most "
            f"{MAX_SUBSETS:,}): choose k up to {largest} (C({count}, {largest}) = {math.comb(count, largest):,}), or "
            "fewer blocks"
        )
    return subsets


def subset_masks(tokens: Sequence[int], k: int) -> np.ndarray:
    """Return every subset of k tokens as a bitmask, in lexicographic order.

    Bit i stands for token i.

    Args:
        tokens: Indices below 64, ascending.
        k: Size of the subsets.

    Returns:
        uint64 (S,).

    Raises:
        ValueError: As :func:`count_subsets`, or if an index is 64 or more.

    >>> [bin(mask) for mask in subset_masks([0, 1, 3], 2)]
    ['0b11', '0b1001', '0b1010']
    """
    count = count_subsets(len(tokens), k)
    if len(tokens) and max(tokens) >= MAX_TOKENS:
        raise ValueError(f"tokens must have indices below {MAX_TOKENS}; got {max(tokens)}: choose fewer blocks")
    chosen = np.fromiter(itertools.chain.from_iterable(itertools.combinations(tokens, k)), np.uint64, count * k)
    return np.bitwise_or.reduce(np.uint64(1) << chosen.reshape(count, k), axis=1, dtype=np.uint64)


def as_selections(masks: np.ndarray, count: int) -> np.ndarray:
    """Return bitmasks (S,) as selections, bool (S, count)."""
    return (masks[:, None] >> np.arange(count, dtype=np.uint64) & np.uint64(1)).astype(bool)


def score_subsets(
    vlm: FrozenVLM,
    encoded: Encoded,
    k: int,
    cache: TableCache | None = None,
    reference: torch.Tensor | None = None,
) -> Scores:
    """Score every subset of k of an example's visual tokens.

    The order is that of :func:`subset_masks`.

    Args:
        vlm: The frozen model.
        encoded: One example.
        k: Size of the subsets.
        cache: Cache of scores on disk.
        reference: See :meth:`~grip_env.vlms.base.FrozenVLM.score`.

    Returns:
        Scores with fields of shape (1, S), on the CPU; with ``agreement`` if there is a reference.

    Raises:
        ValueError: If there is not exactly one example, or as :func:`subset_masks`.
    """
    if len(encoded) != 1:
        raise ValueError(f"a table is of one example; got a batch of {len(encoded)}: choose one with encoded[[row]]")
    masks = subset_masks(encoded.token_mask[0].nonzero().flatten().tolist(), k)
    key = None if cache is None else cache.key(vlm, encoded, k)
    if cache is not None and key is not None:
        found = cache.get(key, len(masks))
        if found is not None and (reference is None or found.agreement is not None):
            return found
    chosen = torch.from_numpy(as_selections(masks, encoded.token_mask.shape[1]))[None]  # (1, S, N)
    with torch.no_grad():
        parts = [
            vlm.score(encoded, part.to(encoded.token_mask.device), reference=reference)
            for part in chosen.split(BATCH, 1)
        ]
    fields = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(Scores)}
    known = {name: torch.cat(values, 1).cpu() for name, values in fields.items() if values[0] is not None}
    scores = Scores(**known)
    if cache is not None and key is not None:
        cache.put(key, scores)
    return scores


class RewardTable:
    """Table of the reward of every selection of exactly k of an instance's visual tokens.

    Args:
        masks: The selections as bitmasks, bit i for token i, uint64 (S,).
        rewards: Their rewards, float (S,), finite.
        count: N, the length of a selection, padding included; at most 64.

    Raises:
        ValueError: If the shapes of masks and rewards differ, or a reward is not finite.

    The model's scores are float32: rewards scored in another batch may differ from those here by rounding (1e-4 in
    log-likelihood). All results of a table refer to the rewards in it.
    """

    def __init__(self, masks: np.ndarray, rewards: np.ndarray, count: int) -> None:
        rewards = np.asarray(rewards, dtype=np.float64)
        if not len(masks) or rewards.shape != masks.shape:
            raise ValueError(
                f"a table needs one reward for each selection; got {rewards.shape} rewards, {masks.shape} masks"
            )
        if not np.isfinite(rewards).all():
            raise ValueError(
                f"{(~np.isfinite(rewards)).sum()} of {len(rewards)} rewards are not finite: check the reward"
            )
        self.masks = masks
        self.rewards = rewards
        self.count = count
        self.k = int(masks[0]).bit_count()

    @classmethod
    def enumerate(
        cls,
        vlm: FrozenVLM,
        encoded: Encoded,
        k: int,
        reward: Reward | str = "log_likelihood",
        full: Scores | None = None,
        cache: TableCache | None = None,
    ) -> RewardTable:
        """Score every selection of k tokens of an example.

        Args:
            vlm: The frozen model; a :class:`~grip_env.vlms.blocks.BlockVLM` has few enough tokens.
            encoded: One example.
            k: Number of tokens to keep, from 0 to the number of real ones.
            reward: A name or an object.
            full: The example's scores with every token kept, fields of shape (1, 1); scored if not given.
            cache: Cache on disk of scores, not rewards, so that an entry serves any reward.

        Raises:
            ValueError: If there are more than MAX_SUBSETS selections, or the reward is not finite.

        The default instance (4 of 16 blocks of the embedded model: 1,820 selections) takes about four seconds of one
        CPU core, 8 of 16 (12,870) about a minute; reading it back takes a millisecond.
        """
        own = RewardScorer(vlm, resolve_reward(reward))
        if full is None or (own.agreement and full.first_token is None):
            with torch.no_grad():
                full = own.full(encoded)
        scores = score_subsets(vlm, encoded, k, cache, full.first_token if own.agreement else None)
        rewards = own.judge(scores, full.cpu(), examples=encoded.examples)
        masks = subset_masks(encoded.token_mask[0].nonzero().flatten().tolist(), k)
        return cls(masks, rewards[0].double().numpy(), encoded.token_mask.shape[1])

    def __len__(self) -> int:
        return len(self.masks)

    # -- the optimum -----------------------------------------------------------------------------------------

    @property
    def optimal_reward(self) -> float:
        """Largest reward in the table."""
        return float(self.rewards.max())

    @property
    def optimal(self) -> np.ndarray:
        """Selection with the largest reward, bool (N,).

        If there are several, it is the first in the order of the table.
        """
        return self.selection(int(self.rewards.argmax()))

    def selection(self, row: int) -> np.ndarray:
        """Return the selection in a row of the table, bool (N,)."""
        return as_selections(self.masks[[row]], self.count)[0]

    # -- rank of a selection ---------------------------------------------------------------------------------

    def rows(self, selections: np.ndarray) -> np.ndarray:
        """Return the row numbers of selections, bool (R, N), in the table, int64 (R,).

        Raises:
            ValueError: If a selection is not in the table.
        """
        given = np.asarray(selections)
        if given.dtype != bool or given.shape[1:] != (self.count,):
            raise ValueError(
                f"a selection is bool of shape ({self.count},); got {given.dtype} of shape {given.shape[1:]}"
            )
        bits = np.uint64(1) << np.arange(self.count, dtype=np.uint64)
        return self.find(np.bitwise_or.reduce(np.where(given, bits, np.uint64(0)), axis=1, dtype=np.uint64))

    def find(self, masks: np.ndarray) -> np.ndarray:
        """Return the row numbers of bitmasks, uint64 (R,), in the table, int64 (R,).

        Raises:
            ValueError: If a bitmask is not in the table.
        """
        place = np.minimum(np.searchsorted(self.masks, masks, sorter=self._order), len(self) - 1)
        rows = self._order[place]
        wrong = np.flatnonzero(self.masks[rows] != masks)
        if len(wrong):
            given = np.flatnonzero(as_selections(masks[wrong[:1]], self.count)[0]).tolist()
            raise ValueError(f"this table is of selections of exactly {self.k} real tokens; got {given}")
        return rows

    def reward(self, selection: np.ndarray) -> float:
        """Return the reward of a selection, bool (N,).

        Raises:
            ValueError: If the selection is not in the table.
        """
        return float(self.rewards[self.rows(np.asarray(selection)[None])[0]])

    def optimality_gap(self, selection: np.ndarray) -> float:
        """Return the largest reward minus a selection's reward, 0 for the best."""
        return self.optimal_reward - self.reward(selection)

    def percentile(self, selection: np.ndarray) -> float:
        """Return the percentile of a selection's reward, in (0, 1).

        This is the share of selections with a smaller reward plus half of those with the same reward, itself included,
        so that the mean over all selections is 1/2.
        """
        return float(self.percentiles(self.rows(np.asarray(selection)[None]))[0])

    def percentiles(self, rows: np.ndarray) -> np.ndarray:
        """Return the percentiles of rows of the table, float64 (R,)."""
        smaller, no_larger = (np.searchsorted(self._sorted, self.rewards[rows], side) for side in ("left", "right"))
        return (smaller + no_larger) / 2 / len(self)

    def rank(self, selection: np.ndarray) -> int:
        """Return the rank of a selection: 1 plus the number of selections with a larger reward."""
        return 1 + int((self.rewards > self.reward(selection)).sum())

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.masks)

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.sort(self.rewards)

"""Random, greedy forward and backward, and swap searches, and exact enumeration."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import torch

from agents.base import Selector, top_k
from agents.search.base import ScoredCandidates, Search, SearchResult, check_batch, leading
from grip_env.exact.reward_table import MAX_SUBSETS, RewardTable, count_subsets, score_subsets, subset_masks
from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = [
    "ExactEnumeration",
    "GreedyBackward",
    "GreedyForward",
    "RandomSearch",
    "SwapSearch",
    "removal_plan",
]

DRAWN_AT_ONCE = 256  # random selections of each example in a round; bounds memory


def _luck(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return uniform draws of the shape of ``like``, from a generator on the CPU."""
    return torch.rand(like.shape, generator=generator).to(like.device)


def _single(indices: torch.Tensor, count: int) -> torch.Tensor:
    """Return indices, long (B, G), as selections of one token, bool (B, G, count)."""
    none = torch.zeros(*indices.shape, count, dtype=torch.bool, device=indices.device)
    return none.scatter_(2, indices[..., None], True)


@dataclass(frozen=True)
class RandomSearch(Search):
    """Best of ``calls`` uniformly random selections (uses the answer).

    The baseline for every other search.
    """

    title: ClassVar[str] = "random search"
    finish: ClassVar[str] = "budget"

    def _run(self, trials: ScoredCandidates, generator: torch.Generator) -> torch.Tensor:
        while trials.left.any():
            valid = leading(trials.left.clamp_max(DRAWN_AT_ONCE))  # (B, G)
            mask = trials.mask[:, None].expand(-1, valid.shape[1], -1)  # (B, G, N)
            counts = trials.counts[:, None].expand_as(valid)
            drawn = top_k(_luck(mask, generator).flatten(0, 1), counts.flatten(), mask.flatten(0, 1))
            trials.score(drawn.view(mask.shape), valid)
        return torch.zeros_like(trials.forced)


@dataclass(frozen=True)
class GreedyForward(Search):
    """Greedy forward selection: add the best token until k are chosen (uses the answer).

    Each round scores the set with each free token added to it: N + (N - 1) + ... calls for k rounds. If the budget is
    too small for this, each round scores only a random sample of the free tokens, as many as its equal share of the
    calls left, as in the stochastic greedy algorithm. With fewer than two calls for each round, the first tokens are
    chosen at random and not scored, so that every later round chooses between at least two tokens (or a single call is
    spent on a random set).

    Sources: Nemhauser, Wolsey and Fisher, "An analysis of approximations for maximizing submodular set functions",
    Mathematical Programming 1978; Mirzasoleiman et al., "Lazier than lazy greedy", AAAI 2015.
    """

    title: ClassVar[str] = "greedy forward"
    finish: ClassVar[str] = "complete"

    def _run(self, trials: ScoredCandidates, generator: torch.Generator) -> torch.Tensor:
        mask, batch = trials.mask, torch.arange(len(trials.counts), device=trials.mask.device)
        rounds = trials.counts.minimum((trials.left // 2).clamp_min(1)).masked_fill(trials.forced, 0)  # (B,)
        chosen = top_k(_luck(mask, generator), trials.counts - rounds, mask)  # (B, N)
        complete = rounds == trials.counts
        for step in range(int(rounds.max())):
            going = (rounds - step).clamp_min(0)  # rounds left, including this one, (B,)
            free = mask & ~chosen
            count = free.sum(1).minimum(trials.left // going.clamp_min(1)).masked_fill(going == 0, 0)
            complete &= (count == free.sum(1)) | (going == 0)
            sample = top_k(_luck(mask, generator), count, free)
            valid = leading(count)  # (B, G)
            place = (~sample).to(torch.uint8).argsort(dim=1, stable=True)[:, : valid.shape[1]]  # (B, G), ascending
            values = trials.score(chosen[:, None] | _single(place, mask.shape[1]), valid)
            chosen[batch, place[batch, values.argmax(1)]] |= going > 0
        return complete


def removal_plan(count: int, k: int, calls: int) -> tuple[int, list[int]]:
    """Return the rounds of a greedy backward elimination from ``count`` to k tokens.

    A round that starts with n tokens takes n calls and removes a fixed share of them, rounded up, but leaves at least
    k. Scoring the final set takes one more call, unless the last round has scored it.

    Args:
        count: Tokens at the beginning.
        k: Tokens at the end, 1 to ``count``.
        calls: The budget, at least 1.

    Returns:
        The number of tokens the first round starts with, and the number that each round removes. The share is the
        smallest that the budget allows; with enough calls, a round removes one token. If the budget is too small even
        for a single round, the round starts with as many tokens as it allows.

    >>> removal_plan(8, 4, 26), removal_plan(8, 4, 16), removal_plan(8, 4, 7)
    ((8, [1, 1, 1, 1]), (8, [2, 2]), (6, [2]))
    """
    whole = count

    def rounds(share: int) -> list[int]:
        left, removed = count, []
        while left > k:
            removed.append(min(left - k, max(1, -(-share * left // whole))))
            left -= removed[-1]
        return removed

    def affordable(share: int) -> bool:
        removed, left, cost = rounds(share), count, 0
        for some in removed:
            cost, left = cost + left, left - some
        return cost + (removed[-1:] != [1]) <= calls

    while count > k and not affordable(whole):
        count -= 1
    return count, rounds(bisect_left(range(whole + 1), True, key=affordable))


@dataclass(frozen=True)
class GreedyBackward(Search):
    """Greedy backward elimination: remove the worst tokens until k are left (uses the answer).

    Each round scores the set without each of its tokens and removes the tokens without which it scores best. One token
    per round would take N + (N - 1) + ... calls, 10,000 for 144 tokens, so a round removes a share of the tokens: the
    smallest that the budget allows, see :func:`removal_plan`. Interactions between tokens that are removed together are
    ignored. With fewer than N + 1 calls, tokens are removed at random until the budget allows a single round.

    The sequences are long, so each call takes more time than in the other searches.

    Source: the stepwise elimination of Marill and Green, "On the effectiveness of receptors in recognition systems",
    IEEE Transactions on Information Theory 1963.
    """

    title: ClassVar[str] = "greedy backward"
    finish: ClassVar[str] = "complete"

    def _run(self, trials: ScoredCandidates, generator: torch.Generator) -> torch.Tensor:
        mask = trials.mask
        sizes = zip(mask.sum(1).tolist(), trials.counts.tolist(), trials.left.tolist(), strict=True)
        plans = [removal_plan(count, k, calls) if calls else (count, []) for count, k, calls in sizes]
        start = torch.tensor([count for count, _ in plans], device=mask.device)
        chosen = top_k(_luck(mask, generator), start, mask)  # (B, N)
        index = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        for step in range(max(len(plan) for _, plan in plans)):
            removed = torch.tensor([plan[step] if step < len(plan) else 0 for _, plan in plans], device=mask.device)
            size = chosen.sum(1)
            valid = leading(size * (removed > 0))  # (B, G)
            # from the highest index down: among ties, the first is removed, so the lower index is kept
            place = (chosen * index).argsort(dim=1, descending=True)[:, : valid.shape[1]]  # (B, G)
            values = trials.score(chosen[:, None] & ~_single(place, mask.shape[1]), valid)
            missed = torch.zeros(mask.shape, device=mask.device)
            missed.scatter_(1, place, -values.masked_fill(~valid, 0))
            chosen = top_k(missed, size - removed, chosen)
        unknown = trials.value == -torch.inf
        trials.score(chosen[:, None], unknown[:, None])
        single = [count == int(real) for (count, _), real in zip(plans, mask.sum(1), strict=True)]
        return torch.tensor([one and set(plan) <= {1} for one, (_, plan) in zip(single, plans, strict=True)])


@dataclass(frozen=True)
class SwapSearch(Search):
    """Local search: swap a kept token for another one as long as that helps (uses the answer).

    The k * (N - k) swaps of a set are tried in random order, ``group`` in a round. If any swap of a round improves the
    set, the best one is made, and the swaps of the new set are tried in a new random order. A set that no swap improves
    is a local optimum and ends the search, if the budget lasts: to check this alone takes 959 calls for 7 of 144
    tokens. ``group=1`` is first-improvement ascent; a group as large as the number of swaps is best-improvement ascent.

    Args:
        start: Selector of the first set. A set that is too small is filled up at random, and one that is too large is
            cut at random. If it is a search, its calls are part of the budget. ``None``: greedy forward with half of
            the calls.
        group: Swaps tried in a round.

    Source: the interchange heuristic of Teitz and Bart, "Heuristic methods for estimating the generalized vertex
    median of a weighted graph", Operations Research 1968.
    """

    start: Selector | None = None
    group: int = 32

    title: ClassVar[str] = "swap search"
    finish: ClassVar[str] = "local optimum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"a round tries at least 1 swap; got group={self.group}")

    def _least(self) -> int:
        once = super()._least()  # the first set is scored again, even if a search has found it
        return once + (self.start.calls if isinstance(self.start, Search) else once if self.start is None else 0)

    def _run(self, trials: ScoredCandidates, generator: torch.Generator) -> torch.Tensor:
        rows = (~trials.forced).nonzero().flatten().tolist()
        if not rows:
            return ~trials.forced
        self._begin(trials, rows, generator)
        untried = {row: self._swaps(trials, row, generator) for row in rows}
        while True:
            counts = torch.zeros_like(trials.counts)
            for row, left in zip(rows, trials.left[rows].tolist(), strict=True):
                counts[row] = min(self.group, left, len(untried[row]))
            if not counts.any():
                return torch.tensor([row in untried and not len(untried[row]) for row in range(len(counts))])
            valid = leading(counts)  # (B, G)
            candidates = trials.best[:, None].repeat(1, valid.shape[1], 1)  # (B, G, N)
            for row, count in zip(rows, counts[rows].tolist(), strict=True):
                tried, untried[row] = untried[row][:count].sort().values, untried[row][count:]
                kept, free = (side.nonzero().flatten() for side in (trials.best[row], self._free(trials, row)))
                place = torch.arange(count, device=kept.device)
                candidates[row, place, kept[tried // len(free)]] = False
                candidates[row, place, free[tried % len(free)]] = True
            before = trials.value.clone()
            trials.score(candidates, valid)
            for row in (trials.value > before).nonzero().flatten().tolist():
                untried[row] = self._swaps(trials, row, generator)

    def _begin(self, trials: ScoredCandidates, rows: list[int], generator: torch.Generator) -> None:
        """Score the first selection of each of some examples."""
        part, counts = trials.encoded[rows], trials.counts[rows]
        start = GreedyForward(self.calls // 2, self.reward) if self.start is None else self.start
        if isinstance(start, Search):
            found = start.search(trials.vlm, part, counts, generator)
            trials.used[rows] += found.calls
            given = found.selection
        else:
            given = start(trials.vlm, part, counts, generator)
        begin = torch.zeros_like(trials.mask)
        begin[rows] = top_k(_luck(given, generator) + given, counts, part.token_mask)
        trials.score(begin[:, None], ~trials.forced[:, None])

    @staticmethod
    def _free(trials: ScoredCandidates, row: int) -> torch.Tensor:
        return trials.mask[row] & ~trials.best[row]

    def _swaps(self, trials: ScoredCandidates, row: int, generator: torch.Generator) -> torch.Tensor:
        """Return all swaps of the best set of an example in random order.

        A swap is a number: index among the kept tokens * number of free tokens + index among the free tokens.
        """
        count = int(trials.counts[row]) * int(self._free(trials, row).sum())
        return torch.randperm(count, generator=generator).to(trials.mask.device)


@dataclass(frozen=True)
class ExactEnumeration(Search):
    """Exact enumeration: score every selection of k tokens, for small N (uses the answer).

    Examples are scored one after another, as by :class:`~grip_env.exact.reward_table.RewardTable`: use a
    :class:`~grip_env.vlms.blocks.BlockVLM`. The default budget is the maximum size of a table.

    Raises:
        ValueError: As for every search, and, before anything is scored, if an example has more selections than the
            budget has calls, or more than 64 tokens.
    """

    calls: int = MAX_SUBSETS

    title: ClassVar[str] = "exact enumeration"
    finish: ClassVar[str] = "optimum"

    def search(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> SearchResult:
        """Search, and return the result and its cost.

        The arguments are the same as of a :class:`~agents.base.Selector`.
        """
        totals = encoded.token_mask.sum(1).tolist()
        for row, (count, k) in enumerate(zip(totals, check_batch(encoded, counts).tolist(), strict=True)):
            subsets = count_subsets(count, k)
            if subsets + self._overhead() > self.calls:
                full = " and the full image" * self._overhead()
                raise ValueError(
                    f"example {row} of the batch has C({count}, {k}) = {subsets:,} selections{full} to score, more "
                    f"than the budget of {self.calls:,} calls: raise calls (to at most {MAX_SUBSETS:,}), or lower k"
                )
        return super().search(vlm, encoded, counts, generator)

    def _run(self, trials: ScoredCandidates, generator: torch.Generator) -> torch.Tensor:
        for row in (~trials.forced).nonzero().flatten().tolist():
            index, k = torch.tensor([row]), int(trials.counts[row])
            alone = trials.encoded[index]
            scores = score_subsets(trials.vlm, alone, k, reference=trials.reference(index))
            masks = subset_masks(alone.token_mask[0].nonzero().flatten().tolist(), k)
            table = RewardTable(masks, trials.judge(scores, index)[0].numpy(), alone.token_mask.shape[1])
            trials.record(row, torch.from_numpy(table.optimal), table.optimal_reward, len(table))
        return torch.ones_like(trials.forced)

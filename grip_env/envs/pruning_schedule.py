"""Arithmetic of pruning in stages: the number of visual tokens allowed in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

from grip_env.envs.core.sampling import Budget, check_budget, tokens_in_budget

__all__ = ["PruningSchedule", "total_budget"]


class PruningSchedule:
    """Stages, each before a decoder layer, at which tokens can be dropped permanently.

    A token takes one *slot* in each layer where it is present. All n tokens of an image are present before the first
    stage; in the ``spans[t]`` layers from stage t to the next, those that survived stage t.

    - With ``shares``, max(1, round(share * n)) tokens may survive each stage.
    - Without, an episode's budget holds for the mean over all layers: k tokens on average, k * layers slots in total. A
      stage may keep as many tokens as the remaining slots allow while leaving at least one for every later layer.

    Args:
        stages: Decoder layers that come right after a stage, strictly increasing; 0 is the first layer.
        layers: Number of decoder layers of the model.
        shares: Share of the tokens for each stage, in (0, 1] and not increasing.

    Raises:
        ValueError: If stages or shares are invalid.

    >>> schedule = PruningSchedule((0, 1, 2), layers=4)
    >>> schedule.allowance(144, 14, [])  # of 4 x 14 slots, 3 must be left for the 3 layers after it
    53
    >>> schedule.allowance(144, 14, [30]), schedule.allowance(144, 14, [30, 20])
    (24, 3)
    """

    def __init__(self, stages: Sequence[int], layers: int, shares: Sequence[float] | None = None) -> None:
        given = tuple(stages) if isinstance(stages, Sequence) else ()
        if not given or any(isinstance(stage, bool) or not isinstance(stage, Integral) for stage in given):
            raise ValueError(f"stages are indices of decoder layers, such as (0, 1, 2); got {stages!r}")
        self.layers = layers
        self.stages = tuple(int(stage) for stage in given)
        if any(later <= earlier for earlier, later in pairwise(self.stages)):
            raise ValueError(f"stages must be strictly increasing; got {self.stages}")
        if self.stages[0] < 0 or self.stages[-1] >= layers:
            raise ValueError(
                f"stages must be layers from 0 to {layers - 1}, as the language model has {layers}; got {self.stages}"
            )
        self.spans = tuple(
            end - start for start, end in zip(self.stages, (*self.stages[1:], layers), strict=True)
        )  # (T,)
        self.shares = None if shares is None else self._check_shares(shares)

    def _check_shares(self, shares: Sequence[float]) -> tuple[float, ...]:
        if not isinstance(shares, Sequence) or isinstance(shares, str) or len(shares) != len(self.stages):
            raise ValueError(
                f"stage_budgets must have one share for each of the {len(self.stages)} stages {self.stages}; got "
                f"{shares!r}"
            )
        checked = check_budget(list(shares))
        assert isinstance(checked, list)
        if any(later > earlier for earlier, later in pairwise(checked)):
            raise ValueError(
                f"stage_budgets must not increase, since a dropped token never comes back; got {tuple(checked)}"
            )
        return tuple(checked)

    def __len__(self) -> int:
        return len(self.stages)

    def check_total(self, total: int, count: int) -> None:
        """Raise ValueError if a total is exceeded even with one token from the first stage on.

        Args:
            total: k, average number of tokens per layer.
            count: n, number of tokens of the image.

        Raises:
            ValueError: With the calculation and the smallest possible budget.
        """
        first = self.stages[0]
        least = first * count + self.layers - first
        if self.shares is not None or self.layers * total >= least:
            return
        enough = -(-least // self.layers)
        raise ValueError(
            f"a budget of {total} of {count} visual tokens, on average over {self.layers} layers, has {self.layers} x "
            f"{total} = {self.layers * total} slots, but with the first stage at layer {first} all tokens take "
            f"{first} x {count} = {first * count} before it, and one token in each of the {self.layers - first} layers "
            f"after it makes {least}: begin earlier or give a budget of {enough / count:.4g} or more"
        )

    def spent(self, count: int, kept_per_stage: Sequence[int]) -> int:
        """Return the number of slots taken before the next stage, or in total after the last.

        Args:
            count: n, number of tokens of the image.
            kept_per_stage: Number of tokens that survived each stage so far.
        """
        return self.stages[0] * count + sum(
            span * number for span, number in zip(self.spans, kept_per_stage, strict=False)
        )

    def slots(self, count: int, total: int) -> int:
        """Return the total number of slots that may be taken."""
        if self.shares is None:
            return self.layers * total
        return self.spent(count, [tokens_in_budget(share, count) for share in self.shares])

    def allowance(self, count: int, total: int, kept_per_stage: Sequence[int]) -> int:
        """Return the number of tokens that may survive the next stage.

        It never exceeds the number of surviving tokens.

        Args:
            count: n, number of tokens of the image.
            total: k, average number of tokens per layer; ignored if each stage has a share.
            kept_per_stage: Number of tokens that survived each stage so far.
        """
        stage = len(kept_per_stage)
        alive = kept_per_stage[-1] if kept_per_stage else count
        if self.shares is not None:
            return min(alive, tokens_in_budget(self.shares[stage], count))
        later = self.layers - self.stages[stage] - self.spans[stage]
        return min(alive, (self.layers * total - self.spent(count, kept_per_stage) - later) // self.spans[stage])

    def remaining(self, count: int, total: int, kept_per_stage: Sequence[int]) -> float:
        """Return the remaining share of the slots in the remaining layers, in [0, 1].

        Slots that may still be taken are divided by those that all n tokens would take; 0 after the last stage.
        """
        if len(kept_per_stage) == len(self):
            return 0.0
        ahead = count * (self.layers - self.stages[len(kept_per_stage)])
        return min(1.0, (self.slots(count, total) - self.spent(count, kept_per_stage)) / ahead)

    def lengths(self, words: int, count: int, kept_per_stage: Sequence[int]) -> list[tuple[int, int]]:
        """Return (layers, sequence length) pairs for :func:`grip_env.vlms.flops.staged_flops`."""
        return [
            (self.stages[0], words + count),
            *((span, words + number) for span, number in zip(self.spans, kept_per_stage, strict=True)),
        ]


def total_budget(budget: Budget | None, shares: Sequence[float] | None) -> Budget:
    """Return the budget that episodes are drawn with, 0.1 by default.

    It has no effect if stages have shares.

    Raises:
        ValueError: If both are given.
    """
    if shares is None:
        return 0.1 if budget is None else budget
    if budget is not None:
        raise ValueError(
            f"budget={budget!r} and stage_budgets={shares!r} both say how many tokens may survive: give one"
        )
    return 1.0

"""Distribution over ordered selections: k tokens chosen one after another.

The k-subset distribution (:mod:`agents.subset`) has one score per token and no interactions: if two tokens show the
same object and both score high, it keeps both. Here, each chosen token lowers the scores of the others before the next
choice. Without interactions this is the Plackett-Luce distribution. Log-probabilities of orders are exact; the
probability of a *set* would be a sum over k! orders.

Sources: Luce, "Individual choice behavior", 1959; Plackett, "The analysis of permutations", Applied Statistics 24(2),
1975. Penalising tokens that resemble those already chosen is the idea of maximal marginal relevance (Carbonell &
Goldstein, SIGIR 1998) and of determinantal point processes (Kulesza & Taskar, 2012, arXiv 1207.6083).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

__all__ = ["OrderedSubset", "as_subsets"]

LARGE = 2**16
"""Steps times tokens of a row above which gradients recompute the row instead of storing it (checkpointing)."""


def as_subsets(orders: Tensor, tokens: int) -> Tensor:
    """Return orders as subsets, bool (..., N).

    Args:
        orders: Token indices, long (..., K), where -1 stands for no token.
        tokens: Number of tokens N.

    >>> as_subsets(torch.tensor([[2, 0], [1, -1]]), 3).int().tolist()
    [[1, 0, 1], [0, 1, 0]]
    """
    marked = torch.zeros(*orders.shape[:-1], tokens + 1, dtype=torch.bool, device=orders.device)
    return marked.scatter_(-1, orders.masked_fill(orders < 0, tokens), True)[..., :tokens]


class OrderedSubset:
    """Distribution of k tokens chosen one after another, by softmax over the tokens left.

    The logits of a row start as its scores. Each choice j then subtracts ``interaction[i, j]`` from the logit of i.

    Args:
        scores: float (B, N).
        interaction: float (B, N, N); negative values make it likelier that i follows j. The diagonal has no effect.
        k: Number of tokens to choose in each row, long (B,).
        mask: True where a token is real, bool (B, N).

    Raises:
        ValueError: If k is below 1 or above the number of real tokens of its row, or if the score of a real token or an
            interaction is NaN or infinite.

    Orders are long (..., B, K), K = max(k), padded with -1 after the k tokens of a row.

    >>> interaction = torch.tensor([[[0.0, 3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])  # 0 and 1 are alike
    >>> law = OrderedSubset(torch.tensor([[2.0, 1.9, 1.0]]), interaction, torch.tensor([2]), torch.ones(1, 3).bool())
    >>> law.order.tolist(), law.mode.tolist()
    ([[0, 2]], [[True, False, True]])
    >>> round(float(law.log_prob(law.order)), 3)
    -0.936
    """

    def __init__(self, scores: Tensor, interaction: Tensor, k: Tensor, mask: Tensor) -> None:
        if bool(((k < 1) | (k > mask.sum(-1))).any()):
            real = mask.sum(-1).tolist()
            raise ValueError(f"k must be from 1 to the number of real tokens; got k = {k.tolist()} of {real} tokens")
        # the sum is finite only if all values are, and needs no extra memory
        if not bool((scores.detach().masked_fill(~mask, 0.0).sum() + interaction.detach().sum()).isfinite()):
            raise ValueError("scores and interactions must be finite; got NaN or infinities: mask padding tokens")
        self.scores, self.interaction, self.k, self.mask = scores, interaction, k, mask

    @torch.no_grad()
    def _choose(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return ``count`` orders per row, (count, B, K); without a generator, greedy ones."""
        rows, tokens = self.scores.shape
        first = self.k.argsort(descending=True, stable=True)  # finished rows come last and are left out
        counts = self.k.tolist()
        choosing = [sum(count > turn for count in counts) for turn in range(max(counts))]
        left = self.mask[first].repeat(count, 1, 1)
        logits = self.scores[first].repeat(count, 1, 1)
        takes = self.interaction.transpose(1, 2)  # row j: what choosing j subtracts
        orders = torch.full((count, rows, len(choosing)), -1, device=logits.device)
        for turn, busy in enumerate(choosing):
            left, logits, row = left[:, :busy], logits[:, :busy], first[:busy]
            open_logits = logits.masked_fill(~left, -torch.inf)
            if generator is None:
                choice = open_logits.argmax(-1)
            else:
                share = open_logits.softmax(-1).cumsum(-1)
                # one number per row, finished or not, so that the draws of a row do not depend on the k of others
                luck = torch.rand((count, rows, 1), generator=generator).to(share.device)
                point = luck[:, row] * share[..., -1:]
                choice = (share <= point).sum(-1)
                # by rounding, the sum may end in tokens with probability 0
                choice = torch.where(choice < tokens, choice, open_logits.argmax(-1))
            orders[:, row, turn] = choice
            left.scatter_(-1, choice[..., None], False)
            logits -= takes[row, choice]
        return orders

    def sample(self, sample_shape: Any, *, generator: torch.Generator) -> Tensor:
        """Draw orders, long (*sample_shape, B, K), with a generator on the CPU."""
        shape = torch.Size(sample_shape)
        return self._choose(shape.numel(), generator).reshape(*shape, *self.scores.shape[:1], -1)

    def log_prob(self, orders: Tensor) -> Tensor:
        """Return the log-probability of orders (..., B, K), in nats, (..., B); differentiable."""
        flat = orders.flatten(0, -3) if orders.dim() > 2 else orders[None]
        found = []
        for row, count in enumerate(self.k.tolist()):
            large = torch.is_grad_enabled() and count * self.scores.shape[1] > LARGE
            given = (self.scores[row], self.interaction[row], self.mask[row], flat[:, row, :count])
            found.append(checkpoint(_log_prob, *given, use_reentrant=False) if large else _log_prob(*given))
        return torch.stack(found, -1).reshape(orders.shape[:-1])

    @cached_property
    def order(self) -> Tensor:
        """Greedy order, long (B, K); ties go to the lower index."""
        return self._choose(1, None)[0]

    @property
    def mode(self) -> Tensor:
        """Tokens of :attr:`order`, bool (B, N).

        It is a likely set, but not always the likeliest, which is hard to find.
        """
        return as_subsets(self.order, self.scores.shape[1])


def _log_prob(scores: Tensor, interaction: Tensor, mask: Tensor, orders: Tensor) -> Tensor:
    """Return the log-probability of orders (G, k) of one row with scores (N,): float (G,)."""
    # (G, k, N): what each choice subtracts; an embedding, as the gradient of indexing has a race between threads
    taken = embedding(orders, interaction.T)
    taken = taken.cumsum(1) - taken  # subtracted by the choices before it
    turns = torch.arange(orders.shape[1], device=orders.device)
    chosen = torch.full((len(orders), len(scores)), len(turns), device=orders.device)  # (G, N), the turn of each token
    chosen.scatter_(1, orders, turns.expand_as(orders))
    gone = (chosen[:, None] < turns[:, None]) | ~mask
    logits = (scores - taken).masked_fill(gone, -torch.inf)
    return logits.log_softmax(-1).gather(2, orders[..., None])[..., 0].sum(1)

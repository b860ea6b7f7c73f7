"""A distribution over the orders in which k tokens are chosen, one after another, each choice knowing of those before.

The k-subset law (:mod:`agents.subset`) has one score for each token, so that nothing it draws depends on what else is
drawn: of two tokens that show the same object, both are kept if both score high. Here each token that is chosen takes
something from the scores of the others before the next is chosen. Without such interactions this is the law of Plackett
and Luce. Its log-probabilities are exact as well; the probability of a *set* would be a sum over k! orders.

Sources: Luce, "Individual choice behavior", 1959; Plackett, "The analysis of permutations", Applied Statistics 24(2),
1975. That what was chosen should count against its like is the idea of maximal marginal relevance (Carbonell &
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
"""Steps times tokens of one row above which a gradient computes the row again rather than remember it."""


def as_subsets(orders: Tensor, tokens: int) -> Tensor:
    """Return the sets of the tokens in orders: bool (..., N) of indices, long (..., K), where -1 stands for none.

    >>> as_subsets(torch.tensor([[2, 0], [1, -1]]), 3).int().tolist()
    [[1, 0, 1], [0, 1, 0]]
    """
    marked = torch.zeros(*orders.shape[:-1], tokens + 1, dtype=torch.bool, device=orders.device)
    return marked.scatter_(-1, orders.masked_fill(orders < 0, tokens), True)[..., :tokens]


class OrderedSubset:
    """Chooses k tokens in turn, each from a softmax over those that are left.

    A row's logits are its scores at first; each choice j then takes ``interaction[i, j]`` from the logit of token i.

    Args:
        scores: float (B, N).
        interaction: float (B, N, N); negative numbers make it likelier that i follows j. The diagonal has no effect.
        k: Tokens to choose in each row, long (B,).
        mask: True where a token is real, bool (B, N).

    Raises:
        ValueError: If a row has no tokens to choose, or fewer than it has to, or if the score of a real token or an
            interaction is NaN or infinite.

    Orders are long (..., B, K), K = max(k), and -1 behind the k tokens of a row.

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
        # a sum is finite where all numbers are, and takes no memory
        if not bool((scores.detach().masked_fill(~mask, 0.0).sum() + interaction.detach().sum()).isfinite()):
            raise ValueError("scores and interactions must be finite; got NaN or infinities: mask what is no token")
        self.scores, self.interaction, self.k, self.mask = scores, interaction, k, mask

    @torch.no_grad()
    def _choose(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return ``count`` orders per row, (count, B, K): draws, or without a generator the best choice each time."""
        rows, tokens = self.scores.shape
        first = self.k.argsort(descending=True, stable=True)  # rows that are done are the last ones, and left out
        counts = self.k.tolist()
        choosing = [sum(count > turn for count in counts) for turn in range(max(counts))]
        left = self.mask[first].repeat(count, 1, 1)
        logits = self.scores[first].repeat(count, 1, 1)
        takes = self.interaction.transpose(1, 2)  # row j: what choosing j takes
        orders = torch.full((count, rows, len(choosing)), -1, device=logits.device)
        for turn, busy in enumerate(choosing):
            left, logits, row = left[:, :busy], logits[:, :busy], first[:busy]
            open_logits = logits.masked_fill(~left, -torch.inf)
            if generator is None:
                choice = open_logits.argmax(-1)
            else:
                share = open_logits.softmax(-1).cumsum(-1)
                # one number for each row, also for those that are done: what is drawn for one depends on no other's k
                luck = torch.rand((count, rows, 1), generator=generator).to(share.device)
                point = luck[:, row] * share[..., -1:]
                choice = (share <= point).sum(-1)
                # rounding: the sum may end in tokens of no probability
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
        """The order in which the best token left is chosen each time, long (B, K); of equals, the lower index."""
        return self._choose(1, None)[0]

    @property
    def mode(self) -> Tensor:
        """The tokens of :attr:`order`, bool (B, N): likely, if not the likeliest set, which is hard to find."""
        return as_subsets(self.order, self.scores.shape[1])


def _log_prob(scores: Tensor, interaction: Tensor, mask: Tensor, orders: Tensor) -> Tensor:
    """Return the log-probability of orders (G, k) of one row with scores (N,): float (G,)."""
    # (G, k, N): what each choice takes; as an embedding, since threads that add to the gradient of an index race
    taken = embedding(orders, interaction.T)
    taken = taken.cumsum(1) - taken  # what those before it took
    turns = torch.arange(orders.shape[1], device=orders.device)
    chosen = torch.full((len(orders), len(scores)), len(turns), device=orders.device)  # (G, N), the turn of each token
    chosen.scatter_(1, orders, turns.expand_as(orders))
    gone = (chosen[:, None] < turns[:, None]) | ~mask
    logits = (scores - taken).masked_fill(gone, -torch.inf)
    return logits.log_softmax(-1).gather(2, orders[..., None])[..., 0].sum(1)

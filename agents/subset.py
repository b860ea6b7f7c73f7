"""Exact distribution over the k-subsets of scored tokens.

Give every token i an independent coin that keeps it with probability p_i = sigmoid(theta_i + c). Conditioned
on k kept tokens in all, the kept set has the k-subset distribution for any constant c ("conditional Bernoulli").
With c such that the expected count is k, log p(S) = log-likelihood of the coins - log P(count = k), which only
needs the count distribution of prefixes,

    f_j(i) = (1 - p_i) f_j(i-1) + p_i f_{j-1}(i-1).

This is the recurrence of the elementary symmetric polynomials, rescaled to sums of positive terms in [0, 1],
with no logarithm in the loop. P(count = k) is never small at that c, so an entry that underflows is a state
visited with probability below 1e-37. Everything else comes from the ratios

    R_j(i) = p_i f_{j-1}(i-1) / f_j(i) = P(token i kept | j kept among the first i),

which define a Markov chain from (N, k) down to (0, 0): samples are its paths, marginals are sums of its state
probabilities, and covariances (the gradient of the marginals) are expectations along it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl
from torch.nn.functional import logsigmoid

# Tilted score of a masked token: its sigmoid is exactly 0, even in float64, and it is finite, so 0 times it is 0.
_NEVER = -1e4


class _Chain:
    """Markov chain of a batch of conditional Bernoulli distributions, given by the ratios R.

    It has values only, no autograd. Tables are laid out (N, K, B) with K = max(k) + 1, so that one step of a loop
    reads contiguous memory.
    """

    def __init__(self, tilted: Tensor, k: Tensor) -> None:
        self.shape = tilted.shape
        n_tokens = tilted.shape[-1]
        flat = tilted.detach().reshape(-1, n_tokens).T.contiguous()  # (N, B)
        self.k = k.reshape(-1)  # (B,)
        self.row = torch.arange(len(self.k), device=flat.device)  # (B,)
        keep, drop = flat.sigmoid(), (-flat).sigmoid()
        # Row 0 of axis 1 represents a count of -1 and stays zero.
        f = flat.new_zeros(n_tokens + 1, int(self.k.max()) + 2, len(self.k))
        f[0, 1] = 1
        here, below = f[:, 1:].unbind(0), f[:, :-1].unbind(0)
        for i, (p, q) in enumerate(zip(keep.unbind(0), drop.unbind(0), strict=True)):
            torch.mul(here[i], q, out=here[i + 1]).addcmul_(below[i], p)
        self.log_pmf = f[-1, self.k + 1, self.row].log().reshape(self.shape[:-1])  # log P(count = k), (B...)
        # 0 / 0 marks a state that is never visited: the ratios that lead to it are exactly 0 or 1.
        ratio = keep.unsqueeze(1) * f[:-1, :-1]
        self.ratio = ratio.div_(f[1:, 1:]).nan_to_num_(0.0).clamp_(max=1.0)  # (N, K, B)

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return ``count`` exact draws per row, bool (count, B, N)."""
        n_rows, like = len(self.k), self.ratio
        source = like.device if generator is None else generator.device  # on the CPU: same draws on all devices
        u = torch.rand(len(like), count, n_rows, generator=generator, dtype=like.dtype, device=source).to(like.device)
        kept = torch.empty(u.shape, dtype=torch.bool, device=u.device)  # (N, count, B)
        state = (self.k * n_rows + self.row).repeat(count, 1)  # (count, B): where r holds (tokens left, row)
        for r, u_i, kept_i in zip(*(reversed(x.unbind(0)) for x in (self.ratio, u, kept)), strict=True):
            torch.lt(u_i, r.take(state), out=kept_i)
            state.sub_(kept_i.long(), alpha=n_rows)
        return kept.permute(1, 2, 0).contiguous()

    @cached_property
    def states(self) -> Tensor:
        """P(j kept among the first i), (N+1, K, B)."""
        states = self.ratio.new_zeros(len(self.ratio) + 1, *self.ratio.shape[1:])
        states[-1, self.k, self.row] = 1
        at = states.unbind(0)
        for i in range(len(self.ratio) - 1, -1, -1):
            kept = at[i + 1] * self.ratio[i]
            torch.sub(at[i + 1], kept, out=at[i])
            at[i][:-1].add_(kept[1:])
        return states

    @cached_property
    def joint(self) -> Tensor:
        """P(token i is kept and is the j-th kept one), (N, K, B)."""
        return self.states[1:] * self.ratio

    @cached_property
    def marginals(self) -> Tensor:
        """P(token i is kept), (B..., N)."""
        return self.joint.sum(1).T.reshape(self.shape).clamp(max=1.0)

    def covariance_product(self, v: Tensor) -> Tensor:
        """Return the covariance matrix of the kept indicators x times v, (B..., N).

        Entry i is E[x_i * y], with y = sum of v_l * (x_l - m_l) and m the marginals. It is split into the terms
        of y up to token i (``prefix``, given the state) and after it (``suffix``, times the probability of the
        state). The count is fixed, so v may be shifted by a constant; the shift and m keep the sums small, which
        preserves float32 precision.
        """
        spread = self.marginals * (1 - self.marginals)
        v = v - ((v * spread).sum(-1) / spread.sum(-1).clamp(min=1e-9)).unsqueeze(-1)
        v, m = (x.reshape(-1, self.shape[-1]).T for x in (v, self.marginals))  # (N, B)
        if_kept, if_not = (v * (1 - m)).contiguous(), (-v * m).contiguous()
        n_tokens, n_states, n_rows = self.ratio.shape
        prefix = self.ratio.new_zeros(n_tokens + 1, n_states + 1, n_rows)  # (N+1, K+1, B), padded like f
        here, below = prefix[:, 1:].unbind(0), prefix[:, :-1].unbind(0)
        for i, (r, v_i, if_not_i) in enumerate(zip(self.ratio, v.contiguous(), if_not, strict=True)):
            gain = (below[i] - here[i]).add_(v_i)
            torch.addcmul(here[i], r, gain, out=here[i + 1]).add_(if_not_i)
        expected = self.joint * prefix[:-1, :-1]
        dropped = self.states[1:] - self.joint
        suffix = torch.zeros_like(self.ratio[0])  # (K, B)
        for i in range(n_tokens - 1, -1, -1):
            kept = suffix * self.ratio[i]
            suffix.sub_(kept).addcmul_(dropped[i], if_not[i])
            kept.addcmul_(self.joint[i], if_kept[i])
            suffix[:-1].add_(kept[1:])
            expected[i].add_(kept)
        return expected.sum(1).T.reshape(self.shape)


class _LogPmf(torch.autograd.Function):
    """log P(count = k) as an autograd function of the tilted scores.

    Its gradient is marginals - sigmoid(tilted).
    """

    @staticmethod
    def forward(ctx: Any, tilted: Tensor, chain: _Chain) -> Tensor:
        ctx.save_for_backward(tilted)
        ctx.chain = chain
        return chain.log_pmf.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (tilted,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * (_Marginals.apply(tilted, ctx.chain) - tilted.sigmoid()), None


class _Marginals(torch.autograd.Function):
    """Marginals as an autograd function of the tilted scores.

    Their Jacobian is the covariance matrix.
    """

    @staticmethod
    def forward(ctx: Any, tilted: Tensor, chain: _Chain) -> Tensor:
        ctx.chain = chain
        return chain.marginals.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.chain.covariance_product(grads[0]), None


class _KSubsets(constraints.Constraint):
    """Constraint to 0/1 vectors with exactly k ones, none of them on a masked token."""

    is_discrete = True
    event_dim = 1

    def __init__(self, k: Tensor, mask: Tensor) -> None:
        self.k, self.mask = k, mask

    def check(self, value: Tensor) -> Tensor:
        binary = ((value == 0) | (value == 1)).all(-1)
        return binary & ((value != 0).sum(-1) == self.k) & ~((value != 0) & ~self.mask).any(-1)


class KSubset(Distribution):
    """Distribution over the subsets of exactly k tokens.

    The probability of a subset S is p(S) = exp(sum of theta over S) / e_k(exp theta), with e_k the elementary
    symmetric polynomial. Log-probabilities, entropies and divergences are in nats, exact and differentiable in
    theta. One (N, max(k) + 1, B) table, built on first use, serves every method. In float32 with thousands of
    tokens, entropies lose digits if k is near N or scores span hundreds.

    Args:
        theta: Scores, float (B..., N); half precision is converted to float32. A score of -inf masks its token.
        k: Number of tokens kept, an int or an integer tensor that broadcasts with the batch shape (one k per row).
        mask: True where a token is real, bool (B..., N); the others are never kept. Default: all real.
        validate_args: See :class:`torch.distributions.Distribution`.

    Raises:
        ValueError: If theta has no token axis or contains NaN or +inf, or if k is not an integer, is negative, or
            exceeds the number of real tokens of its row.

    Sources: Chen, Dempster & Liu (1994), "Weighted finite population sampling to maximize entropy",
    Biometrika 81(3); Ahmed, Zeng, Niepert & Van den Broeck (2023), "SIMPLE: a gradient estimator for k-subset
    sampling", ICLR.

    Example:
        >>> dist = KSubset(torch.tensor([1.0, 2.0, 3.0]).log(), k=2)  # e_2 = 1*2 + 1*3 + 2*3
        >>> round(dist.log_partition.exp().item(), 4)
        11.0
        >>> round(dist.log_prob(torch.tensor([False, True, True])).exp().item(), 4)  # 6 / 11
        0.5455
        >>> [round(m, 4) for m in dist.marginals.tolist()]  # 5/11, 8/11, 9/11
        [0.4545, 0.7273, 0.8182]
        >>> dist.sample((4,)).sum(-1).tolist()
        [2, 2, 2, 2]
    """

    arg_constraints = {"theta": constraints.real_vector, "k": constraints.nonnegative_integer}  # noqa: RUF012

    def __init__(
        self, theta: Tensor, k: int | Tensor, mask: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        if theta.dim() == 0 or theta.shape[-1] == 0:
            raise ValueError(f"theta must be (..., N) with N >= 1 tokens; got shape {tuple(theta.shape)}")
        if theta.dtype not in (torch.float32, torch.float64):
            theta = theta.float()
        k = torch.as_tensor(k, device=theta.device)
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise ValueError(f"k must be an integer or an integer tensor; got dtype {k.dtype}")
        mask = torch.ones_like(theta, dtype=torch.bool) if mask is None else mask.to(theta.device, torch.bool)
        rows = torch.broadcast_shapes(theta.shape[:-1], k.shape, mask.shape[:-1])
        self.theta = theta.expand(*rows, -1)  # (B..., N)
        self.k = k.long().expand(rows)  # (B...)
        if (theta.isnan() | (theta == torch.inf)).any():
            raise ValueError("theta has NaN or +inf; every score must be finite, or -inf to mask its token")
        self.mask = mask.expand(self.theta.shape) & (self.theta != -torch.inf)  # (B..., N)
        real = self.mask.sum(-1)
        bad = ((self.k < 0) | (self.k > real)).nonzero()
        if len(bad):
            row = tuple(bad[0].tolist())
            raise ValueError(
                f"row {row} has k = {self.k[row].item()} but {real[row].item()} real tokens of "
                f"{theta.shape[-1]}; expected 0 <= k <= real tokens: lower k or widen the mask"
            )
        super().__init__(rows, theta.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KSubset:
        """Return this distribution with its batch shape broadcast to ``batch_shape``."""
        new = self._get_checked_instance(KSubset, _instance)
        rows = torch.Size(batch_shape)
        theta, mask = (x.expand(rows + self.event_shape) for x in (self.theta, self.mask))
        KSubset.__init__(new, theta, self.k.expand(rows), mask, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """The 0/1 vectors with k ones on real tokens."""
        return _KSubsets(self.k, self.mask)

    @cached_property
    def _shift(self) -> Tensor:
        """The constant c of the module docstring, (B...).

        It sets the expected count to within a quarter of a token of k; results do not depend on it.
        """
        theta = self.theta.detach().masked_fill(~self.mask, -torch.inf)
        real, k = self.mask.sum(-1), self.k
        ranked = theta.sort(-1, descending=True).values
        # Bracket from the k-th and (k+1)-th largest scores: it holds c and is about their gap wide.
        lo = -ranked.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1) - (2 * (real - k + 1)).log()
        hi = -ranked.gather(-1, torch.minimum(k, real - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        hi = hi + (2 * k.clamp(min=1)).log()
        target = torch.minimum(k.clamp(min=0.5), (real - 0.5).clamp(min=0.5)).to(theta.dtype)
        mid = (lo + hi) / 2
        for _ in range(64):
            excess = (theta + mid.unsqueeze(-1)).sigmoid().sum(-1) - target
            if (excess.abs() < 0.25).all():
                break
            lo, hi = torch.where(excess < 0, mid, lo), torch.where(excess < 0, hi, mid)
            mid = (lo + hi) / 2
        return torch.where(real > 0, mid, torch.zeros_like(mid))

    @cached_property
    def _chain(self) -> _Chain:
        with torch.no_grad():
            return _Chain(self._tilted(), self.k)

    # Rebuilt for every quantity, so that each can be back-propagated separately.
    def _tilted(self) -> Tensor:
        return (self.theta + self._shift.unsqueeze(-1)).masked_fill(~self.mask, _NEVER)

    @property
    def log_partition(self) -> Tensor:
        """log e_k(exp theta), (B...); its gradient is ``marginals``."""
        tilted = self._tilted()
        return _LogPmf.apply(tilted, self._chain) - logsigmoid(-tilted).sum(-1) - self.k * self._shift

    @property
    def marginals(self) -> Tensor:
        """P(token i is kept), (B..., N), summing to k; differentiable once in theta."""
        return _Marginals.apply(self._tilted(), self._chain)

    @property
    def mean(self) -> Tensor:
        """The marginals, (B..., N)."""
        return self.marginals

    @property
    def variance(self) -> Tensor:
        """Variance of each token's kept indicator, (B..., N)."""
        marginals = self.marginals
        return marginals * (1 - marginals)

    @property
    def mode(self) -> Tensor:
        """The k best tokens, bool (B..., N); ties go to the lower index."""
        scores = self.theta.detach().masked_fill(~self.mask, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        best = torch.arange(order.shape[-1], device=order.device) < self.k.unsqueeze(-1)
        return torch.zeros_like(self.mask).scatter(-1, order, best)

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw exact samples, bool (*sample_shape, B..., N).

        Args:
            sample_shape: Leading shape of the draws; all of them share one pass over the tokens.
            generator: Source of randomness, on any device; by default the global one of theta's device.
        """
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            return self._chain.draw(shape.numel(), generator).reshape(self._extended_shape(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of selections, (S..., B...).

        Args:
            value: Selections, bool (or 0/1 of any dtype), (S..., B..., N).

        Raises:
            ValueError: If the last axis is not N, or, with validate_args, if a selection does not keep exactly k
                tokens or keeps a masked one; without validate_args, its log-probability is -inf.
        """
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"value must be (..., {self.event_shape[0]}); got shape {tuple(value.shape)}")
        valid = self.support.check(value)
        if self._validate_args and not valid.all():
            row = tuple((~valid).nonzero()[0].tolist())
            kept = (value != 0).expand(*valid.shape, -1)
            count, masked = kept[row].sum().item(), (kept & ~self.mask)[row].sum().item()
            raise ValueError(
                f"selection {row} keeps {count} tokens, {masked} of them masked; expected a 0/1 vector with "
                f"k = {self.k.expand(valid.shape)[row].item()} real tokens (validate_args=False: -inf)"
            )
        tilted = self._tilted()
        coins = torch.where(value != 0, logsigmoid(tilted), logsigmoid(-tilted)).sum(-1)
        return (coins - _LogPmf.apply(tilted, self._chain)).masked_fill(~valid, -torch.inf)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, (B...): log_partition - sum(marginals * theta)."""
        tilted = self._tilted()
        per_token = logsigmoid(-tilted) + self.marginals * tilted
        return _LogPmf.apply(tilted, self._chain) - per_token.sum(-1)


@register_kl(KSubset, KSubset)
def _kl_ksubset_ksubset(p: KSubset, q: KSubset) -> Tensor:
    """Return KL(p || q) in nats, (B...); +inf where q masks a token that p can keep."""
    if p.event_shape != q.event_shape or (p.k != q.k).any():
        raise ValueError(
            f"KL needs the same N and k in both; got N = {p.event_shape[0]}, k = {p.k.tolist()} and "
            f"N = {q.event_shape[0]}, k = {q.k.tolist()}"
        )
    tilted_p, tilted_q = p._tilted(), q._tilted()
    per_token = p.marginals * (tilted_p - tilted_q) + logsigmoid(-tilted_p) - logsigmoid(-tilted_q)
    log_pmf = _LogPmf.apply(tilted_p, p._chain) - _LogPmf.apply(tilted_q, q._chain)
    outside = (p.mask & ~q.mask).any(-1) & (p.k > 0)
    return (per_token.sum(-1) - log_pmf).masked_fill(outside, torch.inf)

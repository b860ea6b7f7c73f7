import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import kl_divergence

from agents.subset import KSubset


def all_subsets(n: int, k: int) -> Tensor:
    rows = [[i in chosen for i in range(n)] for chosen in itertools.combinations(range(n), k)]
    return torch.tensor(rows, dtype=torch.bool)  # (C, N)


def brute(theta: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The subsets (C, N) and their log-probabilities (C,), by enumeration in float64."""
    subsets = all_subsets(len(theta), k)
    return subsets, torch.where(subsets, theta.double(), 0.0).sum(-1).log_softmax(0)


def scores(*shape: int, seed: int = 0, scale: float = 2.0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    theta = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return theta.requires_grad_(grad)


SIZES = [(1, 0), (1, 1), (2, 1), (5, 0), (5, 5), (6, 2), (8, 7), (9, 4), (10, 5)]


@pytest.mark.parametrize("scale", [0.0, 2.0, 40.0])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_quantity_matches_enumeration(n: int, k: int, scale: float) -> None:
    theta, other = scores(n, seed=n, scale=scale), scores(n, seed=n + 1)
    subsets, log_p = brute(theta, k)
    _, log_q = brute(other, k)
    p = log_p.exp()
    dist = KSubset(theta, k)
    torch.testing.assert_close(dist.log_prob(subsets), log_p, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dist.log_prob(subsets).logsumexp(0), torch.zeros(()).double(), atol=1e-10, rtol=0)
    log_z = torch.where(subsets, theta, 0.0).sum(-1).logsumexp(0)
    torch.testing.assert_close(dist.log_partition, log_z, rtol=1e-10, atol=1e-10)
    marginals = p @ subsets.double()
    torch.testing.assert_close(dist.marginals, marginals, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dist.mean, marginals, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dist.variance, marginals * (1 - marginals), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dist.entropy(), -(p * log_p).sum(), rtol=1e-10, atol=1e-10)
    kl = kl_divergence(dist, KSubset(other, k))
    torch.testing.assert_close(kl, (p * (log_p - log_q)).sum(), rtol=1e-10, atol=1e-10)
    best = dist.log_prob(dist.mode)
    torch.testing.assert_close(best, log_p.max(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "k", "seed"), [(5, 2, 0), (6, 3, 1), (8, 1, 2), (8, 7, 3)])
def test_sample_frequencies_follow_the_probabilities(n: int, k: int, seed: int) -> None:
    theta = scores(n, seed=seed, scale=1.0)
    draws = 20_000
    x = KSubset(theta, k).sample((draws,), generator=torch.Generator().manual_seed(seed))
    subsets, log_p = brute(theta, k)
    counts = (x.unsqueeze(1) == subsets).all(-1).sum(0).double()
    assert counts.sum() == draws
    expected = draws * log_p.exp()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(subsets) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_sampling_is_reproducible_independent_and_shaped() -> None:
    dist = KSubset(scores(2, 3, 7).float(), 3)

    def draw(seed: int) -> Tensor:
        return dist.sample((4, 5), generator=torch.Generator().manual_seed(seed))

    assert draw(0).shape == (4, 5, 2, 3, 7)
    assert draw(0).dtype == torch.bool
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert dist.sample().shape == (2, 3, 7)
    assert dist.sample((0,)).shape == (0, 2, 3, 7)
    pairs = KSubset(torch.zeros(2, 2), 1).sample((4000,), generator=torch.Generator().manual_seed(0))
    agree = (pairs[:, 0] == pairs[:, 1]).all(-1).double().mean().item()
    assert abs(agree - 0.5) < 0.04  # rows share no randomness


def test_mode_breaks_ties_by_index() -> None:
    theta = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert KSubset(theta, 3).mode.tolist() == [True, True, False, True, False]
    assert KSubset(torch.zeros(300), 7).mode.nonzero().squeeze(-1).tolist() == list(range(7))
    mask = torch.tensor([False, True, True, False, True])
    assert KSubset(theta, 2, mask).mode.tolist() == [False, True, True, False, False]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    n = draw(st.integers(1, 12))
    values = draw(st.lists(st.floats(-30, 30), min_size=n, max_size=n))
    return torch.tensor(values, dtype=torch.float64), draw(st.integers(0, n))


quick = settings(max_examples=40, deadline=None, derandomize=True)


@quick
@given(cases(), st.floats(-1e3, 1e3))
def test_adding_a_constant_changes_only_the_partition(case: tuple[Tensor, int], shift: float) -> None:
    theta, k = case
    a, b = KSubset(theta, k), KSubset(theta + shift, k)
    x = a.sample((3,))
    torch.testing.assert_close(a.log_prob(x), b.log_prob(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.marginals, b.marginals, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.entropy(), b.entropy(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.log_partition + k * shift, b.log_partition, rtol=1e-9, atol=1e-9)


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_permuting_the_tokens_permutes_the_law(case: tuple[Tensor, int], random: object) -> None:
    theta, k = case
    order = list(range(len(theta)))
    random.shuffle(order)  # type: ignore[attr-defined]
    a, b = KSubset(theta, k), KSubset(theta[order], k)
    x = a.sample((3,))
    torch.testing.assert_close(a.log_prob(x), b.log_prob(x[:, order]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.marginals[order], b.marginals, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.entropy(), b.entropy(), rtol=1e-9, atol=1e-9)


@quick
@given(cases())
def test_bounds_hold(case: tuple[Tensor, int]) -> None:
    theta, k = case
    for dist in (KSubset(theta, k), KSubset(theta.float(), k)):
        x = dist.sample((5,))
        assert (x.sum(-1) == k).all()
        tolerance = 1e-9 if dist.theta.dtype == torch.float64 else 1e-4
        assert (dist.log_prob(x) <= tolerance).all()
        assert ((dist.marginals >= 0) & (dist.marginals <= 1)).all()
        assert abs(dist.marginals.sum().item() - k) <= tolerance
        assert -tolerance <= dist.entropy().item() <= math.log(math.comb(len(theta), k)) + tolerance


@quick
@given(cases())
def test_one_token_is_a_softmax_and_all_tokens_are_certain(case: tuple[Tensor, int]) -> None:
    theta, n = case[0], len(case[0])
    one, every = KSubset(theta, 1), KSubset(theta, n)
    torch.testing.assert_close(one.marginals, theta.softmax(-1), rtol=1e-9, atol=1e-12)
    chosen = torch.eye(n, dtype=torch.bool)
    torch.testing.assert_close(one.log_prob(chosen), theta.log_softmax(-1), rtol=1e-9, atol=1e-9)
    assert every.sample().all()
    torch.testing.assert_close(every.marginals, torch.ones_like(theta))
    assert abs(every.log_prob(torch.ones(n)).item()) < 1e-9
    assert abs(every.entropy().item()) < 1e-9


def test_gradients_of_every_quantity() -> None:
    k = torch.tensor([3, 1, 6])
    mask = torch.tensor([[True] * 6, [True, False] * 3, [True] * 6])
    theta, other = scores(3, 6, grad=True), scores(3, 6, seed=1, grad=True)
    x = KSubset(theta, k, mask).sample((2,))
    for f in (
        lambda t: KSubset(t, k, mask).log_partition,
        lambda t: KSubset(t, k, mask).log_prob(x),
        lambda t: KSubset(t, k, mask).marginals,
        lambda t: KSubset(t, k, mask).entropy(),
    ):
        assert torch.autograd.gradcheck(f, (theta,))
    assert torch.autograd.gradcheck(
        lambda s, t: kl_divergence(KSubset(s, k, mask), KSubset(t, k, mask)), (theta, other)
    )
    assert torch.autograd.gradgradcheck(lambda t: KSubset(t, k, mask).log_partition, (theta,))
    assert torch.autograd.gradgradcheck(lambda t: KSubset(t, k, mask).log_prob(x), (theta,))


def test_the_gradient_of_log_partition_is_the_marginals() -> None:
    theta = scores(4, 9, grad=True)
    dist = KSubset(theta, 4)
    (grad,) = torch.autograd.grad(dist.log_partition.sum(), theta)
    torch.testing.assert_close(grad, dist.marginals)


def test_quantities_of_one_distribution_back_propagate_separately() -> None:
    theta = scores(2, 5, grad=True)
    dist = KSubset(theta, 2)
    x = dist.sample()
    dist.log_prob(x).sum().backward()
    dist.entropy().sum().backward()  # without retain_graph: the two graphs share no node
    apart = theta.grad
    both = KSubset(theta, 2)
    (together,) = torch.autograd.grad((both.log_prob(x) + both.entropy()).sum(), theta)
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize(("scale", "offset"), [(0.5, 0.0), (1.0, 50.0), (1.0, -50.0), (15.0, 0.0)])
@pytest.mark.parametrize("k", [40, 2048])
def test_float32_is_stable_at_4096_tokens(k: int, scale: float, offset: float) -> None:
    theta = (scores(4096, scale=scale) + offset).float()
    single = KSubset(theta.clone().requires_grad_(), k)
    exact = KSubset(theta.double().requires_grad_(), k)
    x = single.sample((2,), generator=torch.Generator().manual_seed(0))
    assert (x.sum(-1) == k).all()
    a, b = single.log_prob(x), exact.log_prob(x)
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(single.log_partition.double(), exact.log_partition, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(single.marginals.double(), exact.marginals, rtol=0, atol=1e-4)
    (grad,) = torch.autograd.grad(a.sum(), single.theta)
    (grad_exact,) = torch.autograd.grad(b.sum(), exact.theta)
    torch.testing.assert_close(grad.double(), grad_exact, rtol=0, atol=2e-4)


def test_the_partition_at_4096_tokens_agrees_with_the_log_space_recurrence() -> None:
    theta, k = scores(4096, scale=3.0), 40
    table = torch.full((k + 1,), -torch.inf, dtype=torch.float64)
    table[0] = 0
    for score in theta:
        table[1:] = torch.logaddexp(table[1:], score + table[:-1])
    torch.testing.assert_close(KSubset(theta, k).log_partition, table[k], rtol=1e-12, atol=0)


def test_a_huge_spread_gives_no_nan() -> None:
    theta = torch.tensor([1000.0, 0.0, -1000.0, 0.0, 5e4, -5e4]).requires_grad_()
    for k in range(7):
        dist = KSubset(theta, k)
        x = dist.sample((8,))
        assert (x.sum(-1) == k).all()
        values = (dist.log_prob(x).sum(), dist.entropy(), dist.log_partition)
        for value in values:
            (grad,) = torch.autograd.grad(value, theta)
            assert value.isfinite()
            assert grad.isfinite().all()
        log_p = brute(theta.detach(), k)[1].float()
        torch.testing.assert_close(dist.log_prob(all_subsets(6, k)), log_p, rtol=1e-6, atol=1e-5)


def test_per_row_k_equals_separate_distributions() -> None:
    theta, k = scores(5, 8), torch.tensor([0, 1, 3, 7, 8])
    batch = KSubset(theta, k)
    x = batch.sample((6,))
    assert (x.sum(-1) == k).all()
    for row in range(5):
        alone = KSubset(theta[row], int(k[row]))
        torch.testing.assert_close(batch.log_prob(x)[:, row], alone.log_prob(x[:, row]))
        torch.testing.assert_close(batch.marginals[row], alone.marginals)
        torch.testing.assert_close(batch.entropy()[row], alone.entropy())
        assert torch.equal(batch.mode[row], alone.mode)


@pytest.mark.parametrize("how", ["mask", "score of -inf"])
def test_masking_equals_removing_tokens(how: str) -> None:
    theta, other = scores(9), scores(9, seed=1)
    mask = torch.tensor([True, False, True, True, False, True, True, False, True])
    padded, padded_other = (
        KSubset(t, 3, mask) if how == "mask" else KSubset(t.masked_fill(~mask, -torch.inf), 3) for t in (theta, other)
    )
    removed = KSubset(theta[mask], 3)
    x = padded.sample((50,))
    assert not x[:, ~mask].any()
    torch.testing.assert_close(padded.log_prob(x), removed.log_prob(x[:, mask]))
    torch.testing.assert_close(padded.marginals[mask], removed.marginals)
    assert (padded.marginals[~mask] == 0).all()
    torch.testing.assert_close(padded.entropy(), removed.entropy())
    torch.testing.assert_close(padded.log_partition, removed.log_partition)
    kl = kl_divergence(padded, padded_other)
    torch.testing.assert_close(kl, kl_divergence(removed, KSubset(other[mask], 3)))
    assert torch.equal(padded.mode[mask], removed.mode)


def test_masked_scores_get_zero_gradient() -> None:
    theta = torch.tensor([1.0, -torch.inf, 0.5, 2.0], requires_grad=True)
    dist = KSubset(theta, 2)
    kl = kl_divergence(dist, KSubset(torch.zeros(4), 2))
    (dist.log_prob(dist.mode) + dist.entropy() + dist.log_partition + kl).backward()
    assert theta.grad is not None
    assert theta.grad.isfinite().all()
    assert theta.grad[1] == 0


def test_kl_is_infinite_where_only_the_second_masks() -> None:
    mask = torch.tensor([True, True, True, False])
    p, q = KSubset(torch.zeros(4), 2), KSubset(torch.zeros(4), 2, mask)
    assert kl_divergence(p, q) == torch.inf
    assert abs(kl_divergence(q, p).item() - math.log(6 / 3)) < 1e-6


def test_log_prob_outside_the_support() -> None:
    mask = torch.tensor([True, True, True, False])
    values = torch.tensor([[True, True, False, False], [True, False, False, False], [True, False, False, True]])
    theta = torch.zeros(4, requires_grad=True)
    log_p = KSubset(theta, 2, mask, validate_args=False).log_prob(values)
    torch.testing.assert_close(log_p.exp(), torch.tensor([1 / 3, 0, 0]))
    log_p[0].backward()
    assert theta.grad is not None
    assert theta.grad.isfinite().all()
    dist = KSubset(theta, 2, mask, validate_args=True)
    with pytest.raises(ValueError, match=r"selection \(1,\) keeps 1 tokens, 0 of them masked.*k = 2"):
        dist.log_prob(values)
    with pytest.raises(ValueError, match="keeps 2 tokens, 1 of them masked"):
        dist.log_prob(values[2])
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 4\); got shape \(3,\)"):
        dist.log_prob(torch.ones(3))


def test_bad_arguments_are_explained() -> None:
    theta = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"row \(1,\) has k = 4 but 3 real tokens of 3"):
        KSubset(theta, torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"row \(0,\) has k = 2 but 1 real tokens of 3"):
        KSubset(theta, 2, torch.tensor([[True, False, False], [True, True, True]]))
    with pytest.raises(ValueError, match=r"row \(0,\) has k = -1"):
        KSubset(theta, -1)
    with pytest.raises(ValueError, match="k must be an integer"):
        KSubset(theta, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        KSubset(torch.tensor([0.0, torch.nan]), 1)
    with pytest.raises(ValueError, match="N >= 1"):
        KSubset(torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match=r"k = \[1, 1\].*k = \[2, 2\]"):
        kl_divergence(KSubset(theta, 1), KSubset(theta, 2))


def test_shapes_and_expand() -> None:
    dist = KSubset(scores(1, 6), torch.tensor([[1], [4]]))
    assert dist.batch_shape == (2, 1)
    assert dist.event_shape == (6,)
    wide = dist.expand((3, 2, 5))
    assert wide.batch_shape == (3, 2, 5)
    x = wide.sample((4,))
    assert x.shape == (4, 3, 2, 5, 6)
    assert wide.support.check(x).all()
    assert wide.log_prob(x).shape == (4, 3, 2, 5)
    torch.testing.assert_close(wide.entropy(), dist.entropy().expand(3, 2, 5))
    half = KSubset(torch.zeros(4, dtype=torch.bfloat16), 2)
    assert half.log_partition.dtype == torch.float32

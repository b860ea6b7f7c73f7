"""Relaxations: laws and gradients on problems small enough to enumerate, and whether they learn."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

import agents.training.relaxations as relaxed
import grip_env
from agents.base import budget_to_count, top_k
from agents.grpo import GRPO, GRPOConfig
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerSelector
from agents.training.options import GumbelTopKConfig, RelaxedConfig, SigmoidGatesConfig, SoftTopKConfig
from agents.training.relaxations import GumbelTopK, Relaxation, SigmoidGates, SoftTopK
from agents.training.soft_gates import binary_gates, budget_penalty, gumbel_noise, relaxed_top_k
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms.base import Encoded
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import WIDTH, FakeTask, FakeVLM

SMALL = ScorerConfig(token_width=WIDTH, width=32, blocks=1, heads=2)
KINDS: dict[type[Relaxation], type[RelaxedConfig]] = {
    GumbelTopK: GumbelTopKConfig,
    SigmoidGates: SigmoidGatesConfig,
    SoftTopK: SoftTopKConfig,
}
KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.phase)


def fake_likelihood(vlm: Any, encoded: Encoded, gates: torch.Tensor) -> torch.Tensor:
    """What :class:`FakeVLM` answers, gates in place of selections."""
    rows = [
        example.token_relevance(place.numpy())
        for example, place in zip(encoded.examples, encoded.positions, strict=True)
    ]
    relevant = torch.stack([torch.from_numpy(row) > 0 for row in rows])[:, None]  # type: ignore[arg-type]
    share = (gates * relevant).sum(-1) / relevant.sum(-1)
    return -2.0 + 1.9 * share - 0.001 * (gates * ~relevant).sum(-1)


@pytest.fixture
def on_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let relaxations learn on the fake model, whose likelihood is known at any gates."""
    monkeypatch.setattr(relaxed, "check_gates", lambda vlm: vlm)
    monkeypatch.setattr(relaxed, "gated_log_likelihood", fake_likelihood)


def trainer(kind: type[Relaxation], seed: int = 0, reward: Any = "log_likelihood", **changes: Any) -> Relaxation:
    vlm = FakeVLM()
    torch.manual_seed(seed)
    small: dict[str, Any] = {"steps": 3, "instances": 8, "warmup_steps": 2, "pool": 16, "min_budget": 0.06}
    config = KINDS[kind](**(small | {"teacher": "relevance"} | changes))
    pool = ExamplePool(vlm, FakeTask(40), "train", config.pool, config.reuse, seed)
    return kind(vlm, pool, Scorer(SMALL), config, reward, seed)


def drawn(algorithm: Relaxation, temperature: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Scores (B, N) that need gradients, counts, mask, and gates drawn for them."""
    scores = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    kept = torch.tensor([1, 3, 6, 2])
    mask = torch.arange(12) < torch.tensor([12, 12, 12, 8])[:, None]
    gates, cost = algorithm.gates(scores, kept, mask, temperature)
    return scores, kept, mask, gates, cost


# -- estimators ------------------------------------------------------------------------------------------


def test_the_best_with_gumbel_noise_follow_the_plackett_luce_law() -> None:
    """Probabilities of all pairs of five tokens by enumerating both orders; chi-square with nine degrees of freedom."""
    scores, draws = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0]]), 20_000
    weight = scores[0].exp().tolist()
    expected = {
        pair: sum(weight[i] / sum(weight) * weight[j] / (sum(weight) - weight[i]) for i, j in (pair, pair[::-1]))
        for pair in itertools.combinations(range(5), 2)
    }
    assert sum(expected.values()) == pytest.approx(1)
    noise = gumbel_noise(scores, draws, torch.Generator().manual_seed(0))[:, 0]
    chosen = top_k(scores + noise, torch.full((draws,), 2), torch.ones(draws, 5, dtype=torch.bool))
    counts = {pair: int(chosen[:, pair].all(1).sum()) for pair in expected}
    assert sum(counts.values()) == draws
    square = sum((counts[pair] - draws * p) ** 2 / (draws * p) for pair, p in expected.items())
    assert square < 33.7  # exceeded once in ten thousand by chance


def test_relaxed_top_k_sums_to_k_and_hardens_as_temperature_falls() -> None:
    scores = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0)) * 2
    kept, mask = torch.tensor([1, 3, 6, 8]), torch.arange(12) < torch.tensor([12, 12, 9, 8])[:, None]
    for temperature in (0.05, 1.0, 20.0):
        soft = relaxed_top_k(scores, kept, mask, temperature)
        torch.testing.assert_close(soft.sum(-1), kept.float().expand(3, -1), atol=1e-4, rtol=0)
        assert (soft >= 0).all()
        assert not soft[:, ~mask].any()
    hard = torch.stack([top_k(part, kept, mask) for part in scores])
    assert (relaxed_top_k(scores, kept, mask, 0.002) - hard.float()).abs().mean() < 0.01


def test_relaxed_top_k_has_the_gradient_of_its_values() -> None:
    scores = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept, mask = torch.tensor([2, 4]), torch.tensor([[True] * 6, [True] * 5 + [False]])
    assert torch.autograd.gradcheck(lambda x: relaxed_top_k(x, kept, mask, 0.7), scores)
    peaked = (100 * scores.detach()).requires_grad_()
    relaxed_top_k(peaked, kept, mask, 0.1).square().sum().backward()
    assert peaked.grad is not None
    assert peaked.grad.isfinite().all()


def test_binary_gates_open_with_the_probability_of_their_logit() -> None:
    """Integrated over a fine grid of the noise."""
    logits = torch.tensor([-2.0, 0.0, 1.5])
    uniform = ((torch.arange(100_000) + 0.5) / 100_000)[:, None].expand(-1, 3)
    for temperature in (0.3, 1.0):
        soft = binary_gates(logits, uniform, temperature, stretch=False)
        assert ((soft >= 0) & (soft <= 1)).all()
        assert ((soft > 0.1) & (soft < 0.9)).any()
        torch.testing.assert_close((soft > 0.5).float().mean(0), logits.sigmoid(), atol=1e-4, rtol=0)
        stretched = binary_gates(logits, uniform, temperature, stretch=True)
        torch.testing.assert_close((stretched > 0.5).float().mean(0), logits.sigmoid(), atol=1e-4, rtol=0)
        # Louizos et al. 2018, equation 12
        not_closed = (logits - temperature * math.log(0.1 / 1.1)).sigmoid()
        torch.testing.assert_close((stretched > 0).float().mean(0), not_closed, atol=1e-4, rtol=0)
        assert (stretched == 1).any(0).all()


def test_penalty_drives_the_expected_number_of_open_gates_to_the_budget() -> None:
    kept, mask = torch.tensor([1, 3, 6, 8]), torch.arange(12) < torch.tensor([12, 12, 12, 10])[:, None]
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    by_hand = [
        math.log(sum(row[:n].sigmoid().tolist()) / k) ** 2
        for row, n, k in zip(logits.detach(), (12, 12, 12, 10), (1, 3, 6, 8), strict=True)
    ]
    torch.testing.assert_close(budget_penalty(logits, kept, mask).detach(), torch.tensor(by_hand))
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        budget_penalty(logits, kept, mask).sum().backward()
        optimizer.step()
    expected = (logits.detach().sigmoid() * mask).sum(1)
    torch.testing.assert_close(expected, kept.float(), atol=0, rtol=0.02)


def brute_marginals(scores: torch.Tensor, k: int) -> torch.Tensor:
    """P(token in S) under p(S) ~ exp(sum of scores in S), by enumeration; differentiable."""
    subsets = list(itertools.combinations(range(len(scores)), k))
    mass = torch.stack([scores[list(subset)].sum() for subset in subsets]).softmax(0)
    inside = torch.tensor([[float(token in subset) for token in range(len(scores))] for subset in subsets])
    return mass @ inside.to(mass.dtype)


@pytest.mark.parametrize("hard", [True, False])
def test_gradient_of_soft_top_k_is_that_of_enumerated_marginals(on_the_fake: None, hard: bool) -> None:
    algorithm = trainer(SoftTopK, hard=hard, samples=2)
    scores, kept, mask, gates, cost = drawn(algorithm, temperature=0.8)
    weight = torch.randn(gates.shape, generator=torch.Generator().manual_seed(1))
    (gates * weight).sum().backward()
    other = scores.detach().double().requires_grad_()
    for row, (k, n) in enumerate(zip(kept.tolist(), mask.sum(1).tolist(), strict=True)):
        (brute_marginals(other[row, :n] / 0.8, k) * weight[:, row, :n].double()).sum().backward()
    assert scores.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(scores.grad, other.grad.float(), atol=1e-5, rtol=1e-4)
    assert not cost.any()


@pytest.mark.parametrize("noisy", [True, False])
@KIND
def test_hard_gates_are_zeros_and_ones_and_learn_by_soft_ones(
    on_the_fake: None, kind: type[Relaxation], noisy: bool
) -> None:
    algorithm = trainer(kind, noisy=noisy, hard=True, samples=3)
    scores, kept, mask, gates, _ = drawn(algorithm)
    assert gates.shape == (3 if noisy else 1, 4, 12)
    values = gates.detach()
    assert torch.minimum(values.abs(), (values - 1).abs()).max() < 1e-6
    assert not values[:, ~mask].any()
    if kind is not SigmoidGates:  # which opens as many as it likes
        assert (values.sum(-1).round() == kept).all()
        if not noisy:
            assert values[0].round().bool().equal(top_k(scores.detach(), kept, mask))
    (gates * torch.randn(gates.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert scores.grad is not None
    assert (scores.grad[mask] != 0).all()
    assert not scores.grad[~mask].any()


@KIND
def test_soft_gates_lie_between_closed_and_open(on_the_fake: None, kind: type[Relaxation]) -> None:
    *_, mask, gates, _ = drawn(trainer(kind, hard=False))
    assert ((gates >= 0) & (gates <= 1)).all()
    assert ((gates > 0.05) & (gates < 0.95))[:, mask].any()
    assert not gates[:, ~mask].any()


def test_sigmoid_gates_begin_within_the_budget(on_the_fake: None) -> None:
    """Whatever the warm-up left as the mean of the scores."""
    algorithm = trainer(SigmoidGates, samples=2000)
    scores = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) - 7
    kept, mask = torch.tensor([1, 3, 6, 2]), torch.ones(4, 12, dtype=torch.bool)
    gates, _ = algorithm.gates(scores, kept, mask, 1.0)
    assert float((gates.sum(-1) / kept).mean()) == pytest.approx(1, abs=0.05)


# -- learning --------------------------------------------------------------------------------------------


def gained(algorithm: Relaxation, budget: float) -> float:
    """Share of the relevant tokens that the scorer keeps on held-out examples."""
    task = FakeTask(40)
    encoded = algorithm.vlm.encode([task.example("test", index) for index in range(40)])
    kept = budget_to_count(encoded, budget)
    chosen = ScorerSelector(algorithm.scorer.eval())(algorithm.vlm, encoded, kept, torch.Generator())
    return (float(algorithm.vlm.score(encoded, chosen[:, None]).log_likelihood.mean()) + 2) / 1.9


@KIND
def test_relaxations_learn_which_tokens_pay_at_every_budget(on_the_fake: None, kind: type[Relaxation]) -> None:
    algorithm = trainer(kind, steps=60, instances=24, warmup_steps=0, pool=48, learning_rate=5e-3)
    before = gained(algorithm, 3 / 16), gained(algorithm, 0.5)
    metrics = list(algorithm.train())
    start, end = (sum(m.values["reward"] for m in part) / 10 for part in (metrics[:10], metrics[-10:]))
    assert end > start + 0.1
    assert gained(algorithm, 3 / 16) > before[0] + 0.2
    assert gained(algorithm, 0.5) > before[1] + 0.1


class Table(torch.nn.Module):
    """A scorer that learns scores of single examples by heart."""

    def __init__(self, encoded: Encoded) -> None:
        super().__init__()
        self.row = {example.key: row for row, example in enumerate(encoded.examples)}
        self.scores = torch.nn.Parameter(torch.zeros(encoded.token_mask.shape))

    def score(self, encoded: Encoded, kept: torch.Tensor) -> torch.Tensor:
        return self.scores[[self.row[example.key] for example in encoded.examples]]


@KIND
def test_gradients_through_the_embedded_model_make_answers_likelier(kind: type[Relaxation]) -> None:
    """Within a few steps, with one score for each token of four examples; chance would take thousands."""
    vlm: Any = grip_env.load_vlm("tiny")
    pool = ExamplePool(vlm, SceneTask(), "train", size=4, reuse=1000)
    encoded, full = pool.batch(4)
    kept = budget_to_count(encoded, 0.06)
    luck = torch.rand(encoded.token_mask.shape, generator=torch.Generator().manual_seed(0))
    table: Any = Table(encoded)

    def likelihood(scores: torch.Tensor) -> float:
        chosen = top_k(scores, kept, encoded.token_mask)
        return float(vlm.score(encoded, chosen[:, None]).log_likelihood.mean())

    at_random, dense, weights = likelihood(luck), float(full.log_likelihood.mean()), vlm.checksum()
    config = KINDS[kind](
        steps=12, instances=4, warmup_steps=0, pool=4, learning_rate=0.5, min_budget=0.06, max_budget=0.06
    )
    for _ in kind(vlm, pool, table, config).train():
        pass
    assert likelihood(table.scores.detach()) > at_random + 0.6 * (dense - at_random)
    assert vlm.checksum() == weights


@KIND
@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_weights_follow_from_the_seed(on_the_fake: None, kind: type[Relaxation], seed: int, same: bool) -> None:
    states = []
    for one in (0, seed):
        algorithm = trainer(kind, one, samples=2, temperature=2.0, final_temperature=0.5)
        values = [m.values["reward"] for m in algorithm.train() if m.phase == kind.phase]
        states.append((algorithm.scorer.state_dict(), values))
    assert all(value.equal(states[1][0][key]) for key, value in states[0][0].items()) == same
    assert (states[0][1] == states[1][1]) == same


@KIND
def test_choosing_in_turn_changes_nothing_in_training(on_the_fake: None, kind: type[Relaxation]) -> None:
    """Gates follow from the scores alone: the interaction stays as it was made, and the rest does not know of it."""
    weights = []
    for in_turn in (False, True):
        torch.manual_seed(0)
        scorer = Scorer(dataclasses.replace(SMALL, in_turn=in_turn))
        before = {name: value.clone() for name, value in scorer.state_dict().items()}
        config = KINDS[kind](steps=3, instances=8, warmup_steps=2, pool=16, teacher="relevance", in_turn=in_turn)
        for _ in kind(FakeVLM(), ExamplePool(FakeVLM(), FakeTask(40), size=16), scorer, config).train():  # type: ignore[arg-type]
            pass
        weights.append(scorer.state_dict())
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    extra = weights[1].keys() - weights[0].keys()
    assert extra
    assert all(weights[1][name].equal(before[name]) for name in extra)
    with pytest.raises(ValueError, match="in_turn=True, and the scorer was made with in_turn=False"):
        kind(FakeVLM(), ExamplePool(FakeVLM(), FakeTask(40), size=16), Scorer(SMALL), config)  # type: ignore[arg-type]


@KIND
def test_warm_up_is_that_of_grpo(on_the_fake: None, kind: type[Relaxation]) -> None:
    algorithm = trainer(kind, steps=0, warmup_steps=4)
    torch.manual_seed(0)
    vlm = FakeVLM()
    options: dict[str, Any] = {"instances": 8, "candidates": 1, "pool": 16, "min_budget": 0.06, "teacher": "relevance"}
    config = GRPOConfig(steps=0, warmup_steps=4, **options)
    other = GRPO(vlm, ExamplePool(vlm, FakeTask(40), "train", 16, 4, 0), Scorer(SMALL), config)
    assert [m.phase for m in algorithm.train()] == [m.phase for m in other.train()] == ["warmup"] * 4
    expected = other.scorer.state_dict()
    assert all(value.equal(expected[key]) for key, value in algorithm.scorer.state_dict().items())


def test_metrics_count_forwards_and_seconds(on_the_fake: None) -> None:
    metrics = list(trainer(SoftTopK, samples=2).train())
    assert [(m.phase, m.step) for m in metrics[1:4]] == [("warmup", 1), ("soft_top_k", 0), ("soft_top_k", 1)]
    # 16 full images enter the pool; the relevance teacher runs no model; then 8 examples, 2 sets of gates, forwards and
    # backwards; after 4 batches 8 new images enter
    assert [m.values["forwards"] for m in metrics] == [16, 16, 64, 112, 168]
    assert all(m.values["seconds"] > 0 for m in metrics)
    assert all(math.isfinite(value) for m in metrics for value in m.values.values())


def test_gates_leak_and_temperatures_anneal(on_the_fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(vlm: Any, encoded: Encoded, gates: torch.Tensor) -> torch.Tensor:
        seen.append(gates.detach())
        return fake_likelihood(vlm, encoded, gates)

    monkeypatch.setattr(relaxed, "gated_log_likelihood", spy)
    algorithm = trainer(
        GumbelTopK, steps=3, warmup_steps=0, leak=0.25, final_leak=0.05, temperature=4.0, final_temperature=0.25
    )
    metrics = list(algorithm.train())
    assert [m.values["temperature"] for m in metrics] == pytest.approx([4.0, 1.0, 0.25])
    for leak, gates in zip((0.25, 0.15, 0.05), seen, strict=True):
        assert {round(float(value), 4) for value in gates.flatten()} == {leak, 1.0}


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"final_temperature": -1.0}, "final_temperature must be above 0; got -1.0"),
        ({"leak": 1.0}, "leak must be at least 0 and below 1; got 1.0"),
        ({"final_leak": -0.1}, "final_leak must be at least 0"),
        ({"penalty": -1.0}, "penalty must not be negative; got -1.0"),
        ({"min_budget": 0.0}, "0 < min_budget <= max_budget <= 1"),
        ({"instances": 20}, r"instances=20 .* pool=16"),
        ({"teacher": "guess"}, "unknown teacher 'guess'"),
        ({"reward": "agreement"}, "SigmoidGates learns by gradients .* reward 'agreement': choose log_likelihood"),
        ({"reward": "2 * log_likelihood"}, "choose log_likelihood"),
        ({"reward": "bleu"}, "'bleu'"),
    ],
)
def test_impossible_settings_are_refused_with_the_numbers(
    on_the_fake: None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(SigmoidGates, **changes)


@KIND
def test_models_without_gates_are_refused_before_anything_is_trained(kind: type[Relaxation]) -> None:
    with pytest.raises(NotImplementedError, match=r"gates on attention .*'fake' is a FakeVLM"):
        trainer(kind)


def test_reindexing_models_are_refused(random_vlm: HuggingFaceVLM) -> None:
    vlm = HuggingFaceVLM(random_vlm.model, random_vlm.processor, position_policy="reindex")
    pool = ExamplePool(vlm, SceneTask(), size=32)
    with pytest.raises(ValueError, match="position_policy 'reindex'"):
        SoftTopK(vlm, pool, Scorer(ScorerConfig(token_width=vlm.width)), SoftTopKConfig())


@KIND
def test_every_option_of_grpo_that_is_shared_has_its_default(kind: type[Relaxation]) -> None:
    """Rivals differ in how they learn, and not in what they learn from."""
    mine, theirs = (dataclasses.asdict(options) for options in (KINDS[kind](), GRPOConfig()))
    for name in ("min_budget", "max_budget", "budget_tilt", "learning_rate", "max_gradient_norm", "teacher"):
        assert mine[name] == theirs[name]
    assert (mine["warmup_steps"], mine["warmup_learning_rate"]) == (
        theirs["warmup_steps"],
        theirs["warmup_learning_rate"],
    )

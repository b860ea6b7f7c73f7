"""GRPO by hand and on a model that costs nothing; the warm-up; the scorer's symmetries and files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import grpo
from agents.base import budget_to_count, top_k
from agents.grpo import GRPO, GRPOConfig, Metrics, advantages, surrogate
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerSelector
from agents.training.teachers import TEACHERS, warmup_loss
from grip_env.vlms.base import Encoded, Scores
from tests.agents.batches import encode
from tests.fakes import WIDTH, FakeTask, FakeVLM

SMALL = ScorerConfig(token_width=WIDTH, width=32, blocks=1, heads=2)


def config(**changes: Any) -> GRPOConfig:
    small: dict[str, Any] = {"steps": 3, "instances": 8, "group": 4, "warmup_steps": 2, "pool": 16, "reuse": 4}
    plain: dict[str, Any] = {"candidates": 1, "scale": "group", "budget_tilt": 1.0, "learning_rate": 5e-4}
    return GRPOConfig(**(small | plain | {"teacher": "relevance", "min_budget": 0.06} | changes))


def trainer(seed: int = 0, reward: str = "log_likelihood", **changes: Any) -> GRPO:
    vlm = FakeVLM()
    torch.manual_seed(seed)
    settings = config(**changes)
    pool = ExamplePool(vlm, FakeTask(40), "train", settings.pool, settings.reuse, seed)
    return GRPO(vlm, pool, Scorer(SMALL), settings, reward, seed)


def random_scorer(**changes: Any) -> Scorer:
    """A scorer whose last layer is not zero, as it is before training."""
    torch.manual_seed(0)
    scorer = Scorer(dataclasses.replace(SMALL, **changes)).eval()
    torch.nn.init.normal_(scorer.out[1].weight)
    return scorer


# -- advantages and surrogate ----------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0], [0.0, 0.0], [-4.0, 4.0]])
    centred = [[-1.0, 1.0], [0.0, 0.0], [-4.0, 4.0]]
    torch.testing.assert_close(advantages(rewards, "none"), torch.tensor(centred))
    group = [[-1 / 1.1, 1 / 1.1], [0.0, 0.0], [-4 / 4.1, 4 / 4.1]]  # standard deviations 1, 0 and 4
    torch.testing.assert_close(advantages(rewards, "group", 0.1), torch.tensor(group))
    deviation = math.sqrt((1 + 1 + 0 + 0 + 16 + 16) / 6) + 0.5
    torch.testing.assert_close(advantages(rewards, "batch", 0.5), torch.tensor(centred) / deviation)
    with pytest.raises(ValueError, match=r"'rank': choose group, batch or none"):
        advantages(rewards, "rank")


def test_floor_keeps_rounding_noise_small() -> None:
    noise = torch.tensor([[0.5, 0.5 + 1e-6, 0.5 - 1e-6]])
    assert advantages(noise, "group", 0.0).abs().max() > 1
    assert advantages(noise, "group", 0.1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "moves"),
    [
        (1.0, 2.0, 2.0, True),
        (1.5, 2.0, 2.0 * 1.3, False),  # good and already likelier: nothing more to earn
        (1.5, -2.0, -2.0 * 1.5, True),  # bad and likelier: no bound
        (0.5, 2.0, 2.0 * 0.5, True),  # good and less likely: no bound
        (0.5, -2.0, -2.0 * 0.8, False),  # bad and already less likely
        (1.25, 2.0, 2.0 * 1.25, True),
        (0.85, -2.0, -2.0 * 0.85, True),
    ],
)
def test_surrogate_clips_by_hand_numbers(ratio: float, advantage: float, value: float, moves: bool) -> None:
    old = torch.tensor(-3.0)
    log_prob = (old + math.log(ratio)).requires_grad_()
    objective = surrogate(log_prob, old, torch.tensor(advantage), clip_low=0.2, clip_high=0.3)
    assert float(objective.detach()) == pytest.approx(value, rel=1e-5)
    objective.backward()
    slope = ratio * advantage if moves else 0.0
    assert float(log_prob.grad) == pytest.approx(slope, rel=1e-5)  # type: ignore[arg-type]


# -- learning --------------------------------------------------------------------------------------------


def expected_share(vlm: FakeVLM, scorer: Scorer, budget: float) -> float:
    """Mean log-likelihood of what the trained scorer keeps on held-out examples."""
    task = FakeTask(40)
    encoded = vlm.encode([task.example("test", index) for index in range(40)])
    kept = budget_to_count(encoded, budget)
    chosen = ScorerSelector(scorer.eval())(vlm, encoded, kept, torch.Generator())
    return float(vlm.score(encoded, chosen[:, None]).log_likelihood.mean())


def test_grpo_without_warmup_learns_which_tokens_pay_at_every_budget() -> None:
    algorithm = trainer(steps=300, instances=32, group=8, warmup_steps=0, pool=64, learning_rate=3e-3)
    metrics = list(algorithm.train())
    start, end = (sum(m.values["reward"] for m in part) / 20 for part in (metrics[:20], metrics[-20:]))
    # with everything kept the reward is 0; at random it is about -1.9 * (1 - budget)
    assert start < -1.1
    assert end > -0.6
    entropy = [m.values["entropy_per_token"] for m in metrics]
    assert entropy[-1] < 0.7 * entropy[0]
    for budget, random_share, enough in ((1 / 16, 1 / 16, 0.4), (3 / 16, 3 / 16, 0.6), (0.5, 0.5, 0.8)):
        gained = (expected_share(algorithm.vlm, algorithm.scorer, budget) + 2) / 1.9  # type: ignore[arg-type]
        assert gained > enough > 1.5 * random_share, f"budget {budget:.3f}: {gained:.2f}"


def test_reward_decides_what_is_learnt() -> None:
    """A reward of the opposite sign teaches to avoid the tokens that pay."""
    algorithm = trainer(steps=60, instances=24, group=8, warmup_steps=0, pool=64, learning_rate=2e-3)
    algorithm.reward = lambda scores, full: -scores.log_likelihood
    for _ in algorithm.train():
        pass
    assert (expected_share(algorithm.vlm, algorithm.scorer, 0.5) + 2) / 1.9 < 0.3  # type: ignore[arg-type]


def test_warmup_imitates_the_teacher() -> None:
    algorithm = trainer(steps=0, instances=32, warmup_steps=150, pool=64, warmup_learning_rate=3e-3)
    metrics = list(algorithm.train())
    assert {m.phase for m in metrics} == {"warmup"}
    losses = [m.values["loss"] for m in metrics]
    assert sum(losses[-10:]) < 0.65 * sum(losses[:10])
    task = FakeTask(40)
    encoded = algorithm.vlm.encode([task.example("test", index) for index in range(20)])
    teacher = TEACHERS["relevance"](algorithm.vlm, encoded)
    for count, enough in ((1, 0.9), (2, 0.4)):
        kept = torch.full((20,), count)
        chosen = ScorerSelector(algorithm.scorer.eval())(algorithm.vlm, encoded, kept, torch.Generator())
        shared = (chosen & top_k(teacher, kept, encoded.token_mask)).sum() / kept.sum()
        assert shared > enough > 2.5 * count / 16  # count / 16 by chance


def test_warmup_loss_is_the_likelihood_of_the_teachers_subset() -> None:
    """The untrained scorer is uniform over subsets: log C(16, k) / k nats per kept token."""
    encoded = encode()
    scorer = Scorer(SMALL)
    kept = torch.tensor([1, 2, 3, 8, 16])
    loss = warmup_loss(scorer, encoded, encoded.tokens.sum(-1), kept)
    expected = sum(math.log(math.comb(16, int(k))) / int(k) for k in kept) / 5
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_weights_follow_from_the_seed(seed: int, same: bool) -> None:
    states = []
    for one in (0, seed):
        algorithm = trainer(one, epochs=2, kl_weight=0.1, entropy_weight=0.01, teacher="attention")
        values = [m.values["reward"] for m in algorithm.train() if m.phase == "grpo"]
        states.append((algorithm.scorer.state_dict(), values))
    equal = all(value.equal(states[1][0][key]) for key, value in states[0][0].items())
    assert equal == same
    assert (states[0][1] == states[1][1]) == same


def test_budgets_are_log_uniform_between_the_bounds_and_differ_in_a_batch() -> None:
    algorithm = trainer(min_budget=0.125, max_budget=0.5)
    encoded = algorithm.pool.batch(16)[0]
    counts = torch.cat([algorithm.draw_counts(encoded) for _ in range(200)]).float()
    assert counts.unique().tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert (counts <= 4).float().mean().item() == pytest.approx(math.log(4.5 / 2) / math.log(4), abs=0.03)


def test_a_tilt_draws_small_budgets_more_often() -> None:
    algorithm = trainer(min_budget=0.125, max_budget=0.5, budget_tilt=2.0)
    encoded = algorithm.pool.batch(16)[0]
    counts = torch.cat([algorithm.draw_counts(encoded) for _ in range(200)]).float()
    assert counts.min() == 2
    assert counts.max() == 8
    # u ** 2 < x where u < sqrt(x)
    assert (counts <= 4).float().mean().item() == pytest.approx(math.sqrt(math.log(4.5 / 2) / math.log(4)), abs=0.03)


class Recording(FakeVLM):
    """Keeps what it was asked to score, and what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Encoded, torch.Tensor, torch.Tensor]] = []

    def score(self, encoded: Encoded, selection: torch.Tensor, **options: Any) -> Scores:
        scores = super().score(encoded, selection, **options)
        self.asked.append((encoded, selection, scores.log_likelihood))
        return scores


def test_of_several_candidates_those_whose_rewards_differ_most_are_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = Recording()
    settings = config(steps=1, warmup_steps=0, instances=3, candidates=4, probes=2, group=5, pool=32, scale="none")
    algorithm = GRPO(vlm, ExamplePool(vlm, FakeTask(40), size=32), Scorer(SMALL), settings)
    seen: list[torch.Tensor] = []
    real = grpo.advantages

    def recorded(rewards: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(rewards)
        return real(rewards, *rest)

    monkeypatch.setattr(grpo, "advantages", recorded)
    (metrics,) = algorithm.train()
    *_, (candidates, probes, first), (chosen, more, then) = vlm.asked
    assert probes.shape[:2] == (12, 2)
    assert more.shape[:2] == (3, 3)
    spread = first.std(1)
    best = spread.argsort(descending=True, stable=True)[:3].sort().values
    assert [example.key for example in chosen.examples] == [candidates.examples[int(row)].key for row in best]
    assert more.sum(2).eq(probes.sum(2)[best, :1]).all()  # budgets go with their examples
    both = torch.cat([first[best], then], 1)  # the reward is this less the full image's, one number per example
    torch.testing.assert_close(seen[0] - seen[0].mean(1, keepdim=True), both - both.mean(1, keepdim=True))
    # the log is of all candidates, so that it can be compared with that of one
    assert metrics.values["log_likelihood"] == pytest.approx(float(first.mean()), rel=1e-5)
    assert metrics.values["group_std"] == pytest.approx(float(spread.mean()), rel=1e-5)
    assert metrics.values["forwards"] == 32 + 12 * 2 + 3 * 3


@pytest.mark.slow
def test_candidates_learn_too() -> None:
    changes: dict[str, Any] = {"instances": 12, "candidates": 3, "probes": 3, "group": 8, "pool": 64, "scale": "batch"}
    algorithm = trainer(steps=250, warmup_steps=0, learning_rate=3e-3, **changes)
    before = expected_share(algorithm.vlm, algorithm.scorer, 3 / 16)  # type: ignore[arg-type]
    for _ in algorithm.train():
        pass
    gained = expected_share(algorithm.vlm, algorithm.scorer, 3 / 16) - before  # type: ignore[arg-type]
    assert gained > 0.7  # of 1.9 times 13/16 at most


def test_kl_weight_holds_the_policy_where_the_warmup_left_it() -> None:
    moved = {}
    for weight in (0.0, 30.0):
        algorithm = trainer(steps=25, warmup_steps=3, kl_weight=weight, instances=16)
        before: dict[str, torch.Tensor] = {}
        encoded = encode()
        kept = torch.full((5,), 4)
        for metrics in algorithm.train():
            if metrics.phase == "warmup":
                with torch.no_grad():
                    before["scores"] = algorithm.scorer.score(encoded, kept).softmax(1)
        with torch.no_grad():
            after = algorithm.scorer.score(encoded, kept).softmax(1)
        moved[weight] = float((after - before["scores"]).abs().sum(1).mean())
    assert moved[30.0] < 0.6 * moved[0.0]


def test_entropy_bonus_keeps_the_policy_broad() -> None:
    entropies = []
    for weight in (0.0, 1.0):
        *_, last = trainer(steps=40, warmup_steps=0, entropy_weight=weight, instances=16, learning_rate=2e-3).train()
        entropies.append(last.values["entropy_per_token"])
    assert entropies[1] > entropies[0] + 0.02


def test_every_step_reports_finite_numbers() -> None:
    metrics = list(trainer().train())
    assert [(m.phase, m.step) for m in metrics] == [("warmup", 0), ("warmup", 1), ("grpo", 0), ("grpo", 1), ("grpo", 2)]
    assert all(math.isfinite(value) for m in metrics for value in m.values.values())
    assert len({tuple(m.values) for m in metrics if m.phase == "grpo"}) == 1
    assert Metrics("grpo", 0).values == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_budget": 0.0}, r"0 < min_budget <= max_budget <= 1; got 0.0, 0.5"),
        ({"min_budget": 0.6}, r"got 0.6, 0.5"),
        ({"max_budget": 1.5}, r"got 0.06, 1.5"),
        ({"group": 1}, r"at least 2 subsets .* got group=1"),
        ({"teacher": "guess"}, r"unknown teacher 'guess': choose one of gradient, attention, relevance"),
        ({"pool": 0}, r"size=0"),
        ({"reuse": 0}, r"reuse=0"),
        ({"scale": "rank"}, r"unknown advantage scale 'rank'"),
    ],
)
def test_impossible_settings_are_refused_with_the_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(trainer(**changes).train())


def test_unknown_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="'bleu'"):
        trainer(reward="bleu")


# -- the pool --------------------------------------------------------------------------------------------


def test_pool_encodes_each_example_once_and_uses_it_about_as_often_as_asked() -> None:
    vlm = FakeVLM()
    pool = ExamplePool(vlm, FakeTask(10_000), "train", size=32, reuse=4, seed=0)
    for _ in range(50):
        encoded, full = pool.batch(16)
        assert len({example.key for example in encoded.examples}) == 16
        torch.testing.assert_close(full.log_likelihood, vlm.score(encoded, encoded.full_selection()).log_likelihood)
    assert sum(vlm.encode_calls) - 32 == 16 * (49 // 4)  # a batch of new examples for every four batches used


def test_pool_order_follows_the_seed() -> None:
    def keys(seed: int) -> list[str]:
        pool = ExamplePool(FakeVLM(), FakeTask(1000), "train", size=8, reuse=2, seed=seed)
        return [example.key for _ in range(3) for example in pool.batch(4)[0].examples]

    assert keys(0) == keys(0)
    assert keys(0) != keys(1)


def test_batches_are_never_cut_to_the_pool() -> None:
    with pytest.raises(ValueError, match=r"instances=20 .* pool=16"):
        trainer(instances=20)


# -- the scorer ------------------------------------------------------------------------------------------


def test_scores_move_with_the_tokens() -> None:
    scorer, encoded = random_scorer(), encode()
    kept = torch.tensor([1, 2, 3, 4, 5])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(encoded, tokens=encoded.tokens[:, order], positions=encoded.positions[:, order])
    with torch.no_grad():
        scores = scorer.score(encoded, kept)
        torch.testing.assert_close(scorer.score(shuffled, kept), scores[:, order], atol=1e-5, rtol=1e-4)
        moved = dataclasses.replace(encoded, positions=encoded.positions[:, order])
        assert (scorer.score(moved, kept) - scores).abs().max() > 1e-2
    assert (scores.std(1) > 1e-2).all()


def test_padding_changes_no_score() -> None:
    scorer, encoded = random_scorer(), encode(padded=True)
    kept = torch.tensor([4, 4, 3, 2, 2])
    with torch.no_grad():
        scores = scorer.score(encoded, kept)
        for row, count in enumerate(encoded.token_mask.sum(1).tolist()):
            alone = encoded[[row]]
            for field in ("tokens", "token_mask", "positions"):
                setattr(alone, field, getattr(alone, field)[:, :count])
            words = int(alone.question_mask.sum())
            alone.question, alone.question_mask = alone.question[:, :words], alone.question_mask[:, :words]
            torch.testing.assert_close(scorer.score(alone, kept[[row]])[0], scores[row, :count], atol=1e-5, rtol=1e-4)
        garbage = dataclasses.replace(encoded, tokens=encoded.tokens.masked_fill(~encoded.token_mask[..., None], 9.0))
        torch.testing.assert_close(scorer.score(garbage, kept), scores, atol=1e-5, rtol=1e-4)
    assert not scores[~encoded.token_mask].any()


def test_budget_changes_scores_and_untrained_scorers_are_uniform() -> None:
    scorer, encoded = random_scorer(), encode()
    with torch.no_grad():
        few, many = (scorer.score(encoded, torch.full((5,), kept)) for kept in (1, 12))
        assert ((few - few.mean(1, keepdim=True)) - (many - many.mean(1, keepdim=True))).abs().max() > 1e-3
        fresh = Scorer(SMALL).score(encoded, torch.full((5,), 3))
    assert (fresh == fresh[:, :1]).all()


@pytest.mark.parametrize("use_question", [True, False])
def test_question_is_read_only_where_asked_for(use_question: bool) -> None:
    scorer, encoded = random_scorer(use_question=use_question), encode()
    other = dataclasses.replace(encoded, question=encoded.question.flip(0).neg())
    with torch.no_grad():
        one, two = (scorer.score(part, torch.full((5,), 3)) for part in (encoded, other))
        longer = dataclasses.replace(
            encoded,
            question=torch.nn.functional.pad(encoded.question, (0, 0, 0, 90)),
            question_mask=torch.nn.functional.pad(encoded.question_mask, (0, 90)),
        )
        torch.testing.assert_close(scorer.score(longer, torch.full((5,), 3)), one, atol=1e-5, rtol=1e-4)
    assert one.equal(two) != use_question


def test_empty_questions_give_numbers() -> None:
    scorer, encoded = random_scorer(), encode()
    silent = dataclasses.replace(encoded, question_mask=torch.zeros_like(encoded.question_mask))
    with torch.no_grad():
        assert scorer.score(silent, torch.full((5,), 3)).isfinite().all()


def test_saved_scorer_loads_as_it_was(tmp_path: Path) -> None:
    scorer, encoded = random_scorer(use_question=False, blocks=2), encode()
    scorer.save(tmp_path / "agent")
    scorer.save(tmp_path / "agent")  # again, over the first
    assert sorted(path.name for path in (tmp_path / "agent").iterdir()) == ["scorer.json", "scorer.safetensors"]
    loaded = Scorer.load(tmp_path / "agent")
    assert loaded.config == scorer.config
    assert not loaded.training
    kept = torch.full((5,), 3)
    with torch.no_grad():
        assert loaded.score(encoded, kept).equal(scorer.score(encoded, kept))
    assert json.loads((tmp_path / "agent" / "scorer.json").read_text())["blocks"] == 2


def test_missing_scorer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no scorer in .*: expected scorer.json and scorer.safetensors"):
        Scorer.load(tmp_path)
    random_scorer().save(tmp_path)
    (tmp_path / "scorer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no scorer in"):
        Scorer.load(tmp_path)

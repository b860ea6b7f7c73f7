"""Imitation, its teachers, and the warm-up that is a short one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from agents.base import top_k
from agents.grpo import GRPO, GRPOConfig
from agents.pool import ExamplePool, ForwardCounter
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerSelector
from agents.training.imitation import Imitation
from agents.training.options import ImitationConfig
from agents.training.teachers import TEACHERS, LeaveOneOut, Remembered, gradient_saliency, warmup_loss
from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import WIDTH, FakeTask, FakeVLM


def build(vlm: FakeVLM, seed: int = 0, **changes: Any) -> Imitation:
    options: dict[str, Any] = {"steps": 3, "instances": 8, "pool": 16, "teacher": "relevance", "min_budget": 0.06}
    config = ImitationConfig(**(options | changes))
    torch.manual_seed(seed)
    scorer = Scorer(ScorerConfig(token_width=WIDTH, width=32, blocks=1, heads=2))
    pool = ExamplePool(vlm, FakeTask(40), size=config.pool, reuse=config.reuse, seed=seed)
    return Imitation(vlm, pool, scorer, config, seed=seed)


def encode(vlm: FakeVLM, count: int = 4) -> Encoded:
    return vlm.encode([FakeTask(40).example("train", index) for index in range(count)])


class CountedVLM(FakeVLM):
    """Counts, by itself, the selections it was asked about."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked = 0

    def log_likelihood(self, encoded: Encoded, selection: torch.Tensor, tokens: Any = None) -> torch.Tensor:
        self.asked += selection.shape[0] * selection.shape[1]
        return super().log_likelihood(encoded, selection, tokens)


class LinearVLM(FakeVLM):
    """Answers by a linear function of the tokens it sees, for a teacher that asks for gradients."""

    def log_likelihood(self, encoded: Encoded, selection: torch.Tensor, tokens: Any = None) -> torch.Tensor:
        seen = encoded.tokens if tokens is None else tokens
        return (selection[..., None] * seen[:, None]).sum((2, 3)) / 16 - 2


# -- teachers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_leave_one_out_by_token_orders_tokens_by_the_drop(ragged: bool) -> None:
    vlm = FakeVLM(count=(lambda example: 16 - 3 * (len(example.key) % 2)) if ragged else None)
    encoded = vlm.encode([FakeTask(40).example("train", index) for index in (8, 9, 10, 11)])
    assert (encoded.token_mask.sum(1).unique().numel() == 2) == ragged
    found = LeaveOneOut(0)(vlm, encoded)
    full = vlm.log_likelihood(encoded, encoded.full_selection())[:, 0]
    for row in range(4):
        for token in range(int(encoded.token_mask[row].sum())):
            without = encoded.token_mask[row].clone()
            without[token] = False
            alone = encoded[[row]]
            drop = full[row] - vlm.log_likelihood(alone, without[None, None])[0, 0]
            torch.testing.assert_close(found[row, token] + full[row], drop)


@pytest.mark.parametrize("cells", [2, 3, 4])
def test_leave_one_out_by_cell_takes_whole_cells_out(cells: int) -> None:
    vlm = CountedVLM(count=lambda example: 16 if example.key.endswith(("0", "2")) else 9)
    encoded = encode(vlm)
    compute = ForwardCounter()
    vlm.asked = 0
    found = LeaveOneOut(cells)(vlm, encoded, compute)
    assert compute.forwards == vlm.asked == 4 * cells**2
    for row in range(4):
        places, mask = encoded.positions[row], encoded.token_mask[row]
        cell = (places * cells).long().clamp_max(cells - 1)
        for token in mask.nonzero().flatten().tolist():
            without = mask & ~(cell == cell[token]).all(1)
            assert bool(without.any())
            drop = -vlm.log_likelihood(encoded[[row]], without[None, None])[0, 0]
            torch.testing.assert_close(found[row, token], drop)


def test_leave_one_out_finds_what_the_answer_hangs_on(random_vlm: HuggingFaceVLM, scene_examples: Any) -> None:
    """On a real model, with a real grid: the best cell's tokens are those whose absence hurts the most."""
    encoded = random_vlm.encode(scene_examples[:2])
    compute = ForwardCounter()
    found = LeaveOneOut(3)(random_vlm, encoded, compute)
    assert compute.forwards == 2 * 9
    for row in range(2):
        assert len(found[row].unique()) <= 9
        worst = found[row] == found[row].max()
        assert int(worst.sum()) == 16  # a cell of 4 x 4 tokens
        left = random_vlm.log_likelihood(encoded[[row]], (encoded.token_mask[row] & ~worst)[None, None])
        torch.testing.assert_close(-found[row].max(), left[0, 0], atol=1e-4, rtol=1e-4)


def test_one_cell_would_leave_nothing() -> None:
    with pytest.raises(ValueError, match=r"0 \(token by token\) or at least 2 rows and columns; got 1"):
        LeaveOneOut(1)


def test_teachers_cost_what_they_say() -> None:
    vlm = LinearVLM()
    encoded = encode(vlm, 5)
    for name, expected in (("gradient", 3 * 5), ("attention", 0), ("relevance", 0), ("leave_one_out", 16 * 5)):
        compute = ForwardCounter()
        scores = TEACHERS[name](vlm, encoded, compute)
        assert scores.shape == (5, 16)
        assert compute.forwards == expected, name
        torch.testing.assert_close(TEACHERS[name](vlm, encoded), scores)
    assert gradient_saliency(vlm, encoded).equal((encoded.tokens / 16).sum(-1).abs())


def test_costly_teachers_are_asked_once_for_each_example() -> None:
    vlm = CountedVLM(count=lambda example: 16 if example.key.endswith("3") else 12)
    teacher, compute = Remembered(LeaveOneOut(0), size=6), ForwardCounter()
    encoded = encode(vlm, 6)
    first = teacher(vlm, encoded, compute)
    asked, vlm.asked = vlm.asked, 0
    order = [5, 1, 3]
    again = teacher(vlm, encoded[order], compute)
    assert (vlm.asked, compute.forwards) == (0, asked)
    mask = encoded.token_mask
    assert torch.where(mask, first, 0.0)[order].equal(again)
    torch.testing.assert_close(first[mask], LeaveOneOut(0)(vlm, encoded)[mask])
    nameless = [Example(e.image, e.question, e.answer, relevance=e.relevance) for e in encoded.examples[:4]]
    strangers = vlm.encode(nameless)  # all have the key ""
    torch.testing.assert_close(teacher(vlm, strangers, compute), LeaveOneOut(0)(vlm, strangers))
    for rows, forgotten in (([3, 1], False), ([0], True)):  # of 6 places, the 4 strangers left 2 to the last asked
        vlm.asked = 0
        teacher(vlm, encoded[rows], compute)
        assert (vlm.asked > 0) == forgotten


def test_more_examples_than_are_remembered_are_scored_all_the_same() -> None:
    vlm = FakeVLM()
    encoded = encode(vlm, 6)
    torch.testing.assert_close(Remembered(LeaveOneOut(0), size=2)(vlm, encoded), LeaveOneOut(0)(vlm, encoded))


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["gradient", "attention", "relevance", "leave_one_out"])
def test_every_teacher_is_imitated(teacher: str) -> None:
    vlm = LinearVLM() if teacher == "gradient" else FakeVLM()
    options = {"steps": 70, "instances": 24, "pool": 40, "learning_rate": 3e-3, "teacher": teacher}
    algorithm = build(vlm, teacher_cells=0, **options)
    losses = [m.values["loss"] for m in algorithm.train()]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    encoded = vlm.encode([FakeTask(40).example("test", index) for index in range(20)])
    scores, kept = TEACHERS[teacher](vlm, encoded), torch.full((20,), 2)
    if teacher == "leave_one_out":
        scores = LeaveOneOut(0)(vlm, encoded)
    chosen = ScorerSelector(algorithm.scorer.eval())(vlm, encoded, kept, torch.Generator())
    shared = float((chosen & top_k(scores, kept, encoded.token_mask)).sum() / kept.sum())
    assert shared > 0.35 > 2.5 * 2 / 16  # 2 / 16 by chance


def test_loss_is_that_of_the_teachers_subset_before_the_step() -> None:
    vlm = FakeVLM()
    algorithm, twin = build(vlm), build(vlm)
    first = next(algorithm.train())
    encoded, _ = twin.pool.batch(8)
    from agents.learning import draw_counts

    kept = draw_counts(encoded, 0.06, 0.5, twin.generator)
    loss = warmup_loss(twin.scorer, encoded, TEACHERS["relevance"](vlm, encoded), kept)
    assert first.values["loss"] == float(loss.detach())
    assert (first.phase, first.step) == ("imitation", 0)


def test_learning_rate_decays_to_2_percent_or_stays() -> None:
    for schedule, halfway, last in (("cosine", 0.51, 0.02), ("constant", 1.0, 1.0)):
        rates = [m.values["learning_rate"] for m in build(FakeVLM(), steps=40, schedule=schedule).train()]
        assert rates[0] == 1e-3
        assert rates[20] == pytest.approx(halfway * 1e-3)
        assert rates[-1] == pytest.approx(last * 1e-3, rel=0.1)
        assert rates == sorted(rates, reverse=True)


def test_warmup_of_grpo_is_an_imitation_at_a_constant_rate() -> None:
    vlm = FakeVLM()
    imitation = build(vlm, steps=4, schedule="constant", learning_rate=2e-3)
    torch.manual_seed(0)
    scorer = Scorer(imitation.scorer.config)
    options: dict[str, Any] = {
        "steps": 0,
        "warmup_steps": 4,
        "instances": 8,
        "candidates": 1,
        "pool": 16,
        "min_budget": 0.06,
    }
    config = GRPOConfig(teacher="relevance", warmup_learning_rate=2e-3, **options)
    grpo = GRPO(vlm, ExamplePool(vlm, FakeTask(40), size=16), scorer, config)
    for one, other in zip(imitation.train(), grpo.train(), strict=True):
        assert (one.phase, other.phase) == ("imitation", "warmup")
        for key in ("loss", "gradient_norm", "forwards"):
            assert one.values[key] == other.values[key]
    for name, value in scorer.state_dict().items():
        assert value.equal(imitation.scorer.state_dict()[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_budget": 0.6}, r"0 < min_budget <= max_budget <= 1; got 0.6, 0.5"),
        ({"steps": -1}, r"steps must be at least 0; got -1"),
        ({"learning_rate": 0.0}, r"learning_rate must be above 0; got 0.0"),
        ({"instances": 20}, r"instances=20 and pool=16: choose a larger pool"),
        ({"schedule": "linear"}, r"unknown schedule 'linear': choose cosine or constant"),
        ({"teacher": "me"}, r"unknown teacher 'me': choose one of gradient, attention, relevance, leave_one_out"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(FakeVLM(), **changes)


def test_unknown_rewards_are_refused_though_none_is_asked_for() -> None:
    algorithm = build(FakeVLM())
    with pytest.raises(ValueError, match="'bleu'"):
        Imitation(algorithm.vlm, algorithm.pool, algorithm.scorer, algorithm.config, "bleu")
    steps = list(Imitation(algorithm.vlm, algorithm.pool, algorithm.scorer, algorithm.config, "agreement").train())
    assert algorithm.pool.batch(8)[1].first_token is None  # nor is anything held for it
    assert all(math.isfinite(value) for m in steps for value in m.values.values())

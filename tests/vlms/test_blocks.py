from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from agents.base import budget_to_count
from agents.grpo import GRPO, GRPOConfig
from agents.heuristics import BASELINES
from agents.pool import ExamplePool
from agents.scorer import Scorer, ScorerConfig
from grip_env.reports.comparison import compare
from grip_env.tasks.base import Example
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms.base import Encoded
from grip_env.vlms.blocks import BlockEncoded, BlockVLM
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import WIDTH, FakeTask, FakeVLM


def examples(count: int) -> list[Example]:
    return [FakeTask().example("train", index) for index in range(count)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def laid_out(blocks: torch.Tensor, rows: int, columns: int, side: int = 12) -> torch.Tensor:
    """Blocks (..., rows * columns) as the tokens of a square grid that are in them, (..., side * side)."""
    grid = blocks.unflatten(-1, (rows, columns))
    grid = grid.repeat_interleave(side // rows, -2).repeat_interleave(side // columns, -1)
    return grid.flatten(-2)


# -- what a block is -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 6), (1, 3)])
def test_blocks_are_means_of_their_rectangle_of_tokens(rows: int, columns: int) -> None:
    encoded = BlockVLM(FakeVLM(12), rows, columns).encode(examples(3))
    whole = FakeVLM(12).encode(examples(3))
    cells = whole.tokens.reshape(3, rows, 12 // rows, columns, 12 // columns, WIDTH)
    torch.testing.assert_close(encoded.tokens, cells.mean((2, 4)).reshape(3, -1, WIDTH))
    assert encoded.token_mask.all()
    places = whole.positions.reshape(3, rows, 12 // rows, columns, 12 // columns, 2)
    torch.testing.assert_close(encoded.positions, places.mean((2, 4)).reshape(3, -1, 2))
    torch.testing.assert_close(encoded.question, whole.question)


def test_blocks_without_tokens_are_padding() -> None:
    vlm = BlockVLM(FakeVLM(4, count=lambda example: 10), 4, 4)
    encoded = vlm.encode(examples(2))
    assert encoded.token_mask.tolist() == [[True] * 10 + [False] * 6] * 2
    assert (encoded.tokens[:, 10:] == 0).all()
    assert (encoded.positions[:, 10:] == 0).all()
    everything = torch.ones(2, 1, 16, dtype=torch.bool)
    assert vlm.score(encoded, everything).log_likelihood.equal(
        vlm.score(encoded, encoded.full_selection()).log_likelihood
    )


def test_padding_belongs_to_no_block() -> None:
    counts = {"what is number 0 of train?": 16, "what is number 1 of train?": 3}
    vlm = BlockVLM(FakeVLM(4, count=lambda example: counts[example.question]), 2, 2)
    together, alone = vlm.encode(examples(2)), vlm.encode(examples(2)[1:])
    assert together.token_mask[1].tolist() == [True, True, False, False]  # tokens 0 and 1, and token 2
    torch.testing.assert_close(together.tokens[1], alone.tokens[0])
    chosen = torch.tensor([True, False, False, False]).expand(2, 1, 4)
    assert together.expand(chosen)[1, 0].nonzero().flatten().tolist() == [0, 1]


def test_a_block_is_as_relevant_as_its_most_relevant_token() -> None:
    task = SceneTask()
    scenes = [task.example("validation", index) for index in range(12)]
    encoded = BlockVLM(FakeVLM(12), 4, 6).encode(scenes)
    whole = FakeVLM(12).encode(scenes)
    grades, inside = encoded.relevance(), whole.relevance()
    assert grades is not None
    assert inside is not None
    expected = inside.reshape(12, 4, 3, 6, 2).amax((2, 4)).reshape(12, 24)
    torch.testing.assert_close(grades, expected)
    assert encoded.whole.examples == scenes
    assert BlockVLM(FakeVLM(), 2, 2).encode([FakeTask(relevance=False).example("train", 0)]).relevance() is None


# -- the model behind them -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 6)])
def test_scores_and_answers_are_those_of_the_tokens_in_the_chosen_blocks(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example], rows: int, columns: int
) -> None:
    vlm = BlockVLM(random_vlm, rows, columns)
    encoded, whole = vlm.encode(scene_examples[:3]), random_vlm.encode(scene_examples[:3])
    chosen = drawn(3, 5, rows * columns)
    tokens = laid_out(chosen, rows, columns)
    found, expected = vlm.score(encoded, chosen), random_vlm.score(whole, tokens)
    assert found.log_likelihood.equal(expected.log_likelihood)
    assert found.correct.equal(expected.correct)
    assert found.log_likelihood.std(1).min() > 0.01  # they differ by what is kept
    assert vlm.log_likelihood(encoded, chosen).equal(expected.log_likelihood)
    assert vlm.generate(encoded, chosen, 3) == random_vlm.generate(whole, tokens, 3)
    full = vlm.score(encoded, encoded.full_selection()).log_likelihood
    assert full.equal(random_vlm.score(whole, whole.full_selection()).log_likelihood)


def test_attention_is_the_mean_over_a_block(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    vlm = BlockVLM(random_vlm, 4, 6)
    found = vlm.attention(vlm.encode(scene_examples[:2]))
    inside = random_vlm.attention(random_vlm.encode(scene_examples[:2]))
    torch.testing.assert_close(found, inside.reshape(2, 4, 3, 6, 2).mean((2, 4)).reshape(2, 24))


def test_stand_ins_move_all_tokens_of_a_block(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    vlm = BlockVLM(random_vlm, 4, 4)
    encoded, whole = vlm.encode(scene_examples[:2]), random_vlm.encode(scene_examples[:2])
    chosen = drawn(2, 3, 16)
    same = vlm.log_likelihood(encoded, chosen, encoded.tokens)
    torch.testing.assert_close(same, vlm.log_likelihood(encoded, chosen), atol=1e-6, rtol=0)

    blocks = encoded.tokens.clone().requires_grad_()
    (found,) = torch.autograd.grad(vlm.log_likelihood(encoded, chosen, blocks).sum(), blocks)
    tokens = whole.tokens.clone().requires_grad_()
    scored = random_vlm.log_likelihood(whole, laid_out(chosen, 4, 4), tokens)
    (inside,) = torch.autograd.grad(scored.sum(), tokens)
    expected = inside.reshape(2, 4, 3, 4, 3, -1).sum((2, 4)).reshape(2, 16, -1)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


# -- batches ---------------------------------------------------------------------------------------------


def test_rows_taken_apart_and_joined_score_as_before() -> None:
    vlm = BlockVLM(FakeVLM(4, count=lambda example: 16 - 3 * (len(example.answer + example.question) % 3)), 2, 4)
    batch = examples(6)
    encoded, chosen = vlm.encode(batch), drawn(6, 4, 8)
    expected = vlm.log_likelihood(encoded, chosen)
    alone = [vlm.encode([example]) for example in batch]
    joined = Encoded.concatenate(alone)
    assert isinstance(joined, BlockEncoded)
    assert len(joined.whole) == len(joined) == 6
    assert vlm.log_likelihood(joined, chosen).equal(expected)
    order = torch.tensor([5, 0, 0, 3])
    part = joined[order]
    assert isinstance(part, BlockEncoded)
    assert [example.key for example in part.whole.examples] == [batch[row].key for row in order.tolist()]
    assert vlm.log_likelihood(part, chosen[order]).equal(expected[order])
    assert vlm.log_likelihood(encoded[1:3], chosen[1:3]).equal(expected[1:3])


def test_nothing_is_scored_that_does_not_fit() -> None:
    vlm = BlockVLM(FakeVLM(), 2, 2)
    encoded = vlm.encode(examples(2))
    for wrong in (torch.ones(2, 1, 16, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 1, 4)):
        with pytest.raises(ValueError, match=r"bool of shape \(2, G, 4\); got .*mask over the blocks"):
            vlm.score(encoded, wrong)
    with pytest.raises(TypeError, match="BlockEncoded; got Encoded"):
        vlm.score(FakeVLM().encode(examples(1)), torch.ones(1, 1, 4, dtype=torch.bool))
    for grid in ((0, 4), (4, -1)):
        with pytest.raises(ValueError, match=f"at least one row and one column; got {grid[0]} x {grid[1]}"):
            BlockVLM(FakeVLM(), *grid)
    with pytest.raises(NotImplementedError, match="fake has no fingerprint"):
        vlm.fingerprint()


def test_a_model_is_never_copied() -> None:
    vlm = BlockVLM(FakeVLM())
    assert copy.deepcopy({"vlm": vlm})["vlm"] is vlm


# -- all that runs on a frozen model runs on blocks ------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_heuristics_run_on_blocks(random_vlm: HuggingFaceVLM, scene_examples: list[Example], name: str) -> None:
    vlm = BlockVLM(random_vlm, 4, 4)
    encoded = vlm.encode(scene_examples)
    chosen = BASELINES[name](vlm, encoded, budget_to_count(encoded, 0.25), torch.Generator().manual_seed(0))
    assert chosen.shape == (6, 16)
    assert chosen.sum(1).tolist() == [4] * 6
    if name == "oracle":
        for row, example in zip(chosen, scene_examples, strict=True):
            assert example.relevance is not None
            best = np.unravel_index(example.relevance.argmax(), example.relevance.shape)
            assert row[int(best[0]) // 3 * 4 + int(best[1]) // 3]


def test_grpo_and_reports_run_on_blocks(random_vlm: HuggingFaceVLM) -> None:
    vlm, task = BlockVLM(random_vlm, 4, 4), SceneTask()
    config = GRPOConfig(steps=1, instances=4, candidates=1, group=2, warmup_steps=1, pool=4, min_budget=0.1)
    scorer = Scorer(ScorerConfig(token_width=vlm.width))
    before = {key: value.clone() for key, value in scorer.state_dict().items()}
    metrics = list(GRPO(vlm, ExamplePool(vlm, task, size=4), scorer, config).train())
    assert [(one.phase, one.step) for one in metrics] == [("warmup", 0), ("grpo", 0)]
    assert all(np.isfinite(value) for one in metrics for value in one.values.values())
    assert any(not value.equal(before[key]) for key, value in scorer.state_dict().items())
    methods: dict[str, Any] = {name: BASELINES[name] for name in ("random", "oracle")}
    comparison = compare(vlm, task, methods, "validation", 6, budgets=(0.25,), progress=False)
    assert comparison.tokens == 16
    assert np.isfinite(comparison.value("oracle", 0.25))

"""FastV and PyramidDrop inside the language model, against the model's own attention with what was dropped hidden."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from agents.base import budget_to_count
from agents.heuristics.inside_llm import FastV, InsidePruner, InsideScores, PyramidDrop
from agents.methods import METHODS
from grip_env.vlms.base import Encoded
from grip_env.vlms.flops import prefill_flops, staged_flops
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeTask, FakeVLM
from tests.vlms.decoder.test_staged_forward import build, full_run
from tests.vlms.families.test_known import answer_ids, examples

INSIDE_PRUNERS = {one.title: one.run for one in METHODS.values() if isinstance(one.run, InsidePruner)}

LAYERS = 4


@pytest.fixture(scope="module", params=["llava", "llava_onevision"])
def vlm(request: pytest.FixtureRequest) -> HuggingFaceVLM:
    return build(str(request.param), LAYERS)


@pytest.fixture(scope="module")
def encoded(vlm: HuggingFaceVLM) -> Encoded:
    return vlm.encode(examples())


def run(pruner: InsidePruner, vlm: HuggingFaceVLM, encoded: Encoded, kept: torch.Tensor) -> InsideScores:
    return pruner.score(vlm, encoded, kept, torch.Generator().manual_seed(0))


def slow_drops(
    vlm: HuggingFaceVLM, encoded: Encoded, row: int, stages: list[tuple[int, int, int]], reindex: bool
) -> dict[int, torch.Tensor]:
    """Say what is left from which layer on, by the model's own attention over its full sequence.

    Args:
        vlm: The model.
        encoded: The examples.
        row: Which of them.
        stages: Of each drop: before which layer, the attention of which layer counts, and how many tokens stay.
        reindex: Whether what stays is renumbered at each drop.
    """
    drops: dict[int, torch.Tensor] = {}
    alive = encoded.token_mask[row]
    for layer, looked, stay in stages:
        seen = full_run(vlm, encoded, row, drops, attend=True, reindex=reindex).attention[looked].tolist()
        left = [token for token in range(len(seen)) if alive[token]]
        best = sorted(left, key=lambda token: (-seen[token], token))[:stay]
        alive = torch.zeros_like(alive).scatter(0, torch.tensor(best), True)
        drops[layer] = alive
    return drops


def check(
    vlm: HuggingFaceVLM,
    encoded: Encoded,
    found: InsideScores,
    row: int,
    stages: list[tuple[int, int, int]],
    reindex: bool = False,
) -> None:
    before = vlm.model.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation("eager")
    try:
        drops = slow_drops(vlm, encoded, row, stages, reindex)
        reference = full_run(vlm, encoded, row, drops, reindex=reindex)
    finally:
        vlm.model.set_attn_implementation(before)
    answer = answer_ids(encoded, row)
    assert found.selection[row].equal(drops[stages[-1][0]])
    assert float(found.scores.log_likelihood[row, 0]) == pytest.approx(reference.log_likelihood(answer), abs=1e-4)
    assert bool(found.scores.correct[row, 0]) == reference.correct(answer)
    # what it cost, counted layer by layer
    count = int(encoded.token_mask[row].sum())
    prompt = int(encoded.lengths[row] - encoded.answer_lengths[row])
    present = [int(drops[max(at for at in drops if at <= layer)].sum()) if layer >= min(drops) else count
               for layer in range(LAYERS)]  # fmt: skip
    assert float(found.layer_average[row]) == pytest.approx(sum(present) / LAYERS, rel=1e-6)
    assert float(found.scores.kept[row, 0]) == pytest.approx(sum(present) / LAYERS / count, rel=1e-6)
    assert int(found.kept[row]) == present[-1]
    spent = staged_flops(vlm.model.config, [(1, prompt - count + tokens) for tokens in present])
    assert float(found.flops[row]) == pytest.approx(spent / prefill_flops(vlm.model.config, prompt), rel=1e-6)


# -- the methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fastv_keeps_what_the_layer_before_attended_to(vlm: HuggingFaceVLM, encoded: Encoded, layer: int) -> None:
    kept = torch.tensor([1, 5, 20, 33])
    found = run(FastV(layer, budget_of="kept"), vlm, encoded, kept)
    assert found.kept.equal(kept)
    for row in range(4):
        check(vlm, encoded, found, row, [(layer, layer - 1, int(kept[row]))])


def test_pyramid_drop_ranks_again_before_each_layer(vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    counts = encoded.token_mask.sum(1)
    found = run(PyramidDrop(ratios=(0.5, 0.25, 0.125)), vlm, encoded, counts // 2)
    for row in range(4):
        count = int(counts[row])
        check(vlm, encoded, found, row, [(1, 1, count // 2), (2, 2, count // 4), (3, 3, count // 8)], reindex=True)


def test_pyramid_drop_takes_layers_and_fits_ratios(vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    kept = torch.tensor([2, 9, 16, 4])
    pruner = PyramidDrop(layers=(1, 3), budget_of="kept")
    found = run(pruner, vlm, encoded, kept)
    assert found.kept.equal(kept)
    for row, count in enumerate(encoded.token_mask.sum(1).tolist()):
        first, last = pruner.plan(LAYERS, count, int(kept[row]))
        assert last == kept[row]
        assert abs(first - (count * last) ** 0.5) < 1, "both drops leave the same share"
        check(vlm, encoded, found, row, [(1, 1, first), (3, 3, last)], reindex=True)


def test_positions_are_a_choice_of_each_method(vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    """PyramidDrop's code renumbers at every drop and FastV's does not, whatever the model's own policy is."""
    kept = torch.tensor([4, 9, 16, 4])
    other = HuggingFaceVLM(vlm.model, vlm.processor, position_policy="reindex")
    for pruner in INSIDE_PRUNERS.values():
        one, two = (run(pruner, model, encoded, encoded.token_mask.sum(1) - 1) for model in (vlm, other))
        assert torch.equal(one.scores.log_likelihood, two.scores.log_likelihood)
    first = PyramidDrop(layers=(1,), budget_of="kept", position_policy="original")
    fast = FastV(1, budget_of="kept", position_policy="reindex")
    for row in range(4):
        check(vlm, encoded, run(first, vlm, encoded, kept), row, [(1, 1, int(kept[row]))])
        check(vlm, encoded, run(fast, vlm, encoded, kept), row, [(1, 0, int(kept[row]))], reindex=True)
    with pytest.raises(ValueError, match="position_policy must be 'original' or 'reindex', not 'kept'"):
        run(FastV(position_policy="kept"), vlm, encoded, kept)  # type: ignore[arg-type]


def test_dropping_nothing_is_the_dense_model(vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    dense = vlm.score(encoded, encoded.full_selection())
    for pruner in INSIDE_PRUNERS.values():
        found = run(pruner, vlm, encoded, encoded.token_mask.sum(1))
        assert found.selection.equal(encoded.token_mask)
        torch.testing.assert_close(found.scores.log_likelihood, dense.log_likelihood, atol=1e-4, rtol=0)
        assert found.flops.tolist() == [1.0] * 4
        assert found.layer_average.equal(encoded.token_mask.sum(1).float())


@pytest.mark.parametrize("name", INSIDE_PRUNERS)
def test_batches_and_chance_and_the_answer_change_nothing(name: str, vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    pruner, kept = INSIDE_PRUNERS[name], budget_to_count(encoded, 0.6)
    assert isinstance(pruner, InsidePruner)
    found = run(pruner, vlm, encoded, kept)
    again = pruner.score(vlm, encoded, kept, torch.Generator().manual_seed(7))
    assert again.selection.equal(found.selection)
    assert again.scores.log_likelihood.equal(found.scores.log_likelihood)
    other = [dataclasses.replace(example, answer="three blue circles, no red") for example in encoded.examples]
    changed = run(pruner, vlm, vlm.encode(other), kept)
    assert changed.selection.equal(found.selection)
    assert changed.flops.equal(found.flops), "the answer is no part of the cost"
    for row, example in enumerate(encoded.examples):
        alone = run(pruner, vlm, vlm.encode([example]), kept[[row]])
        assert alone.selection[0].equal(found.selection[row, : alone.selection.shape[1]])
        torch.testing.assert_close(alone.scores.log_likelihood[0], found.scores.log_likelihood[row], atol=1e-4, rtol=0)
        assert float(alone.flops[0]) == float(found.flops[row])


def test_identical_tokens_give_numbers(vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    same = dataclasses.replace(encoded, tokens=torch.zeros_like(encoded.tokens))
    for pruner in INSIDE_PRUNERS.values():
        found = run(pruner, vlm, same, budget_to_count(encoded, 0.6))
        assert found.scores.log_likelihood.isfinite().all()


# -- budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4, 28, 32])
@pytest.mark.parametrize("pruner", [FastV(1), FastV(), PyramidDrop(), PyramidDrop((1,)), PyramidDrop((1, 2))], ids=str)
def test_a_budget_of_layers_is_used_up_and_never_exceeded(pruner: FastV | PyramidDrop, depth: int) -> None:
    stages = (pruner.layer,) if isinstance(pruner, FastV) else pruner.stages(depth)
    if stages[-1] >= depth:
        with pytest.raises(ValueError, match=f"can drop before the layers 1 to {depth - 1} of .* of {depth}"):
            pruner.plan(depth, 100, 100)
        return
    reachable = 0
    for count in (1, 7, 64, 576):
        for kept in sorted({1, max(1, count // 9), max(1, count // 3), max(1, count // 2), count - 1, count} - {0}):
            before = stages[0] * count
            if depth * kept < before + depth - stages[0]:  # not even one token might stay
                with pytest.raises(ValueError, match=f"budget of {kept} of {count} .*or more; or count .*='kept'"):
                    pruner.plan(depth, count, kept)
                continue
            reachable += 1
            plan = pruner.plan(depth, count, kept)
            assert len(plan) == len(stages)
            assert list(plan) == sorted(plan, reverse=True)
            assert 1 <= plan[-1] <= plan[0] <= count
            present = [count] * depth
            for stage, stay in zip(stages, plan, strict=True):
                present[stage:] = [stay] * (depth - stage)
            assert sum(present) <= depth * kept
            more = [min(count, stay + 1) for stay in plan]
            richer = [count] * depth
            for stage, stay in zip(stages, more, strict=True):
                richer[stage:] = [stay] * (depth - stage)
            assert sum(richer) > depth * kept or list(plan) == [count] * len(plan), "a token more would fit everywhere"
    assert reachable


def test_published_settings_at_the_published_depth() -> None:
    assert PyramidDrop().stages(32) == (8, 16, 24)
    assert PyramidDrop(ratios=(0.5, 0.25, 0.125)).plan(32, 576, 270) == (288, 144, 72)
    with pytest.raises(ValueError, match=r"\(8, 16, 24\) of 32 has 270 of 576 .* more than the budget of 269"):
        PyramidDrop(ratios=(0.5, 0.25, 0.125)).plan(32, 576, 269)
    with pytest.raises(ValueError, match="leaves 72 of 576 visual tokens, more than the budget of 71"):
        PyramidDrop(ratios=(0.5, 0.25, 0.125), budget_of="kept").plan(32, 576, 71)
    # 2 x 576 + 30 x 98 places are 128 x 32 - 4
    assert FastV().plan(32, 576, 128) == (98,)


def test_what_is_kept_at_the_end_costs_more_than_its_number(vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    kept = budget_to_count(encoded, 0.6)
    for kind in (FastV, PyramidDrop):
        mean, end = run(kind(), vlm, encoded, kept), run(kind(budget_of="kept"), vlm, encoded, kept)
        assert end.kept.equal(kept)
        assert (end.layer_average > kept).all()
        assert (mean.layer_average <= kept).all()
        assert (mean.layer_average > kept - 1).all()
        assert (mean.flops < end.flops).all()


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INSIDE_PRUNERS)
def test_other_models_are_refused_by_name(name: str) -> None:
    fake = FakeVLM()
    encoded = fake.encode([FakeTask().example("train", 0)])
    with pytest.raises(NotImplementedError, match=rf"{name.split()[0]}: running the layers .* 'fake' is a FakeVLM"):
        INSIDE_PRUNERS[name].score(fake, encoded, torch.tensor([3]), torch.Generator())


def test_budgets_that_cannot_be_kept_are_refused_with_the_arithmetic(vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    counts = encoded.token_mask.sum(1)
    count = int(counts[0])
    with pytest.raises(
        ValueError, match=rf"FastV cannot keep this budget: .* 4 x 3 = 12 slots.* 2 x {count} = {2 * count}"
    ):
        run(FastV(), vlm, encoded, torch.full_like(counts, 3))
    with pytest.raises(ValueError, match=rf"PyramidDrop cannot keep this budget: .* 4 x 3 = 12 slots.* 1 x {count}"):
        run(PyramidDrop(), vlm, encoded, torch.full_like(counts, 3))


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (FastV(0), r"FastV can drop before the layers 1 to 31 of a language model of 32.*got \(0,\)"),
        (FastV(32), r"got \(32,\)"),
        (FastV(budget_of="tokens"), "'layers' or 'kept', not 'tokens'"),  # type: ignore[arg-type]
        (PyramidDrop(budget_of="tokens"), "'layers' or 'kept', not 'tokens'"),  # type: ignore[arg-type]
        (PyramidDrop((8, 8)), r"layers \(8, 8\) and ratios None: .*strictly increasing"),
        (PyramidDrop(ratios=(0.5, 0.25)), r"one share for each of the 3 stages"),
        (PyramidDrop(ratios=(0.1, 0.25, 0.5)), "must not increase"),
        (PyramidDrop(ratios=(1.5, 0.25, 0.1)), r"in \(0, 1\]; got 1.5"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(pruner: FastV | PyramidDrop, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner.plan(32, 576, 500)

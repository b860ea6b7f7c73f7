"""Gates on attention: hard ones are real pruning, and gradients are slopes of the likelihood."""

from __future__ import annotations

import pytest
import torch

from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded
from grip_env.vlms.decoder.supported import STAGED_FAMILIES
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.gated import check_gates, gated_log_likelihood
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeVLM
from tests.vlms.families.test_known import examples, make, subsets


@pytest.fixture(scope="module")
def encoded(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> Encoded:
    return random_vlm.encode(scene_examples[:3])


def some_gates(encoded: Encoded, group: int = 1, low: float = 0.05, seed: int = 0) -> torch.Tensor:
    shape = (len(encoded), group, encoded.token_mask.shape[1])
    return low + (1 - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", sorted(STAGED_FAMILIES))
def test_hard_gates_give_what_pruning_gives(kind: str, attention: str) -> None:
    """Pictures of several sizes, answers of several lengths, budgets from nothing to everything."""
    vlm = make(kind)
    vlm.model.set_attn_implementation(attention)
    encoded = vlm.encode(examples())
    selection = subsets(encoded)
    gated = gated_log_likelihood(vlm, encoded, selection.float())
    torch.testing.assert_close(gated, vlm.log_likelihood(encoded, selection), atol=1e-4, rtol=0)
    assert (gated[:, 0] - gated[:, -1]).abs().max() > 1e-3  # tokens matter, so that the above says something


def test_hard_gates_of_the_embedded_model_give_what_pruning_gives(random_vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    selection = subsets(encoded, (1, 4, 14, 72))
    gated = gated_log_likelihood(random_vlm, encoded, selection.float())
    torch.testing.assert_close(gated, random_vlm.log_likelihood(encoded, selection), atol=1e-4, rtol=0)


def test_padding_has_no_gate() -> None:
    vlm = make("llava_next")
    encoded = vlm.encode(examples())
    assert not encoded.token_mask.all()
    gates = some_gates(encoded).requires_grad_()
    value = gated_log_likelihood(vlm, encoded, gates)
    value.sum().backward()
    other = torch.where(encoded.token_mask[:, None], gates.detach(), 0.0)
    torch.testing.assert_close(gated_log_likelihood(vlm, encoded, other), value.detach())
    assert gates.grad is not None
    assert not gates.grad[~encoded.token_mask[:, None]].any()
    assert (gates.grad[encoded.token_mask[:, None]] != 0).all()


def test_gradients_are_finite_differences(random_vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    """Along single tokens that matter most, and along random directions."""
    gates = some_gates(encoded, low=0.3) * 0.9
    leaf = gates.clone().requires_grad_()
    gated_log_likelihood(random_vlm, encoded, leaf).sum().backward()
    assert leaf.grad is not None
    slopes = leaf.grad
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(gates.shape, generator=generator).sign() * 0.3 for _ in range(3)]
    for row, token in enumerate(slopes[:, 0].abs().argmax(1).tolist()):
        single = torch.zeros_like(gates)
        single[row, 0, token] = 3.0
        directions.append(single)
    for direction in directions:
        step = 1e-2
        up, down = (gated_log_likelihood(random_vlm, encoded, gates + side * step * direction) for side in (1, -1))
        measured = (up - down)[:, 0] / (2 * step)
        expected = (slopes * direction).sum(-1)[:, 0]
        torch.testing.assert_close(expected, measured, atol=3e-4, rtol=2e-2)


def test_closed_gates_have_finite_slopes(random_vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    """The slope of a closed gate is what the smallest opening brings, and nothing is NaN where all are closed."""
    gates = subsets(encoded, (0, 5))[:, :2].float()
    leaf = gates.clone().requires_grad_()
    gated_log_likelihood(random_vlm, encoded, leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    opened = 1e-3 * (gates == 0)
    measured = gated_log_likelihood(random_vlm, encoded, gates + opened) - gated_log_likelihood(
        random_vlm, encoded, gates
    )
    torch.testing.assert_close((leaf.grad * opened).sum(-1), measured, atol=2e-4, rtol=0.2)


@pytest.mark.parametrize("token_budget", [1, 400])
def test_micro_batches_change_neither_values_nor_gradients(
    random_vlm: HuggingFaceVLM, encoded: Encoded, token_budget: int
) -> None:
    results = []
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
    for budget in (random_vlm.token_budget, token_budget):
        vlm = HuggingFaceVLM(random_vlm.model, random_vlm.processor, token_budget=budget)
        gates = some_gates(encoded, 2).requires_grad_()
        value = gated_log_likelihood(vlm, encoded, gates)
        (value * weight).sum().backward()
        assert gates.grad is not None
        results.append((value.detach(), gates.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not results[0][1][2, 0].any()  # weighted 0


def test_no_graph_is_kept_where_none_is_asked_for(random_vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    gates = some_gates(encoded)
    assert not gated_log_likelihood(random_vlm, encoded, gates).requires_grad
    with torch.no_grad():
        assert not gated_log_likelihood(random_vlm, encoded, gates.requires_grad_()).requires_grad
    assert all(parameter.grad is None for parameter in random_vlm.model.parameters())


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - set(STAGED_FAMILIES)))
def test_other_families_are_refused_by_name(kind: str) -> None:
    with pytest.raises(NotImplementedError, match=f"gates on attention .* is of family '{kind}'"):
        check_gates(make(kind))


def test_misuse_is_refused(random_vlm: HuggingFaceVLM, encoded: Encoded, scene_examples: list[Example]) -> None:
    with pytest.raises(NotImplementedError, match=r"gates on attention .*'fake' is a FakeVLM"):
        check_gates(FakeVLM())
    for gates in (torch.ones(3, 144), torch.ones(3, 1, 143), torch.ones(3, 1, 144, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"floats of shape \(3, G, 144\); got .*give one number"):
            gated_log_likelihood(random_vlm, encoded, gates)
    reindexed = HuggingFaceVLM(random_vlm.model, random_vlm.processor, position_policy="reindex")
    with pytest.raises(ValueError, match="position_policy 'reindex', which renumbers"):
        gated_log_likelihood(reindexed, encoded, torch.ones(3, 1, 144))
    silent = random_vlm.encode(scene_examples[:1], with_answers=False)
    with pytest.raises(ValueError, match="no answers"):
        gated_log_likelihood(random_vlm, silent, torch.ones(1, 1, 144))

"""Baselines, and what every agent shares: counts, ties and the selectors around policies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents.base import Policy, PolicySelector, Selector, budget_to_count, keep_best, observations, top_k
from agents.heuristics import BASELINES, all_tokens
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerPolicy, ScorerSelector
from grip_env.envs.selection import TokenSelectionEnv
from grip_env.vlms.base import Encoded
from tests.fakes import WIDTH, FakeTask, FakeVLM


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encode(
    count: int = 6, side: int = 4, padded: bool = False, task: FakeTask | None = None
) -> tuple[FakeVLM, Encoded]:
    """Examples with random tokens; ``padded`` ones differ in how many they have."""
    task = task or FakeTask()
    examples = [task.example("train", index) for index in range(count)]
    sizes = {example.key: 16 - 2 * index for index, example in enumerate(examples)}
    vlm = FakeVLM(side, (lambda example: sizes[example.key]) if padded else None)
    encoded = vlm.encode(examples)
    encoded.tokens = torch.randn(encoded.tokens.shape, generator=generator(7)) * encoded.token_mask[..., None]
    return vlm, encoded


# -- counts and ties -------------------------------------------------------------------------------------


def test_budget_is_a_share_of_the_real_tokens() -> None:
    _, encoded = encode(padded=True)
    assert encoded.token_mask.sum(1).tolist() == [16, 14, 12, 10, 8, 6]
    assert budget_to_count(encoded, 0.25).tolist() == [4, 4, 3, 2, 2, 2]
    assert budget_to_count(encoded, 1.0).tolist() == [16, 14, 12, 10, 8, 6]
    assert budget_to_count(encoded, 0.001).tolist() == [1] * 6
    for budget in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"in \(0, 1\]; got"):
            budget_to_count(encoded, budget)


@pytest.mark.parametrize("budget", [0.03, 0.05, 0.1, 0.2, 0.3, 0.35, 0.45, 0.5, 0.55, 0.7, 0.9])
def test_reports_and_the_environment_keep_equally_many(budget: float) -> None:
    encoded = encode(2)[1]
    for count in range(1, 600):
        encoded.token_mask = torch.ones(2, count, dtype=torch.bool)
        assert budget_to_count(encoded, budget).tolist() == [max(1, round(budget * count))] * 2, count


def test_top_k_keeps_the_best_and_of_equals_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-1.0, -5.0, 9.0, 9.0, -2.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]).bool()
    chosen = top_k(scores, torch.tensor([2, 3, 2]), mask)
    assert chosen.int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 1]]


def test_top_k_handles_none_and_more_than_there_are() -> None:
    scores, mask = torch.randn(2, 5, generator=generator()), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert not top_k(scores, torch.tensor([0, 0]), mask).any()
    assert top_k(scores, torch.tensor([5, 9]), mask).equal(mask)


# -- baselines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_keeps_exactly_k_real_tokens(name: str, padded: bool) -> None:
    vlm, encoded = encode(padded=padded)
    selector = BASELINES[name]
    assert isinstance(selector, Selector)
    real = encoded.token_mask.sum(1)
    for kept in (torch.ones(6, dtype=torch.long), torch.tensor([1, 2, 3, 4, 5, 6]), real // 2, real):
        chosen = selector(vlm, encoded, kept, generator())
        assert chosen.dtype == torch.bool
        assert chosen.sum(1).equal(kept)
        assert not (chosen & ~encoded.token_mask).any()


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_depend_on_the_generator_only_where_they_draw(name: str) -> None:
    vlm, encoded = encode()
    kept = torch.full((6,), 5)
    one, same, other = (BASELINES[name](vlm, encoded, kept, generator(seed)) for seed in (0, 0, 1))
    assert one.equal(same)
    assert one.equal(other) == (name not in ("random", "oracle"))


@pytest.mark.parametrize("name", ["uniform grid", "CLS attention", "max-min diversity"])
def test_padding_changes_no_choice(name: str) -> None:
    vlm, encoded = encode(padded=True)
    kept = budget_to_count(encoded, 0.4)
    together = BASELINES[name](vlm, encoded, kept, generator())
    for row, count in enumerate(encoded.token_mask.sum(1).tolist()):
        alone = encoded[[row]]
        for field in ("tokens", "token_mask", "positions"):
            setattr(alone, field, getattr(alone, field)[:, :count])
        chosen = BASELINES[name](vlm, alone, kept[[row]], generator())
        assert chosen[0].equal(together[row, :count])


def test_random_tokens_are_uniform() -> None:
    vlm, encoded = encode()
    source = generator(3)
    drawn = torch.stack([BASELINES["random"](vlm, encoded, torch.full((6,), 4), source) for _ in range(500)])
    share = drawn.float().mean((0, 1))  # (N,), 3000 draws each
    torch.testing.assert_close(share, torch.full((16,), 0.25), atol=0.04, rtol=0)


@pytest.mark.parametrize(("kept", "parts"), [(1, 1), (4, 2), (9, 3), (16, 4), (36, 6)])
def test_uniform_grid_puts_one_token_in_each_part_of_the_picture(kept: int, parts: int) -> None:
    vlm, encoded = encode(1, side=12)
    chosen = BASELINES["uniform grid"](vlm, encoded, torch.tensor([kept]), generator())[0].view(12, 12)
    size = 12 // parts
    blocks = chosen.view(parts, size, parts, size).sum((1, 3))
    assert (blocks == 1).all()


@pytest.mark.parametrize("kept", [2, 3, 5, 7, 14, 29, 43, 72, 100, 143])
def test_uniform_grid_leaves_no_side_of_the_picture_out(kept: int) -> None:
    vlm, encoded = encode(1, side=12)
    chosen = BASELINES["uniform grid"](vlm, encoded, torch.tensor([kept]), generator())[0]
    centre = encoded.positions[0, chosen].mean(0)
    assert (centre - 0.5).abs().max() < 0.13
    if kept >= 14:
        halves = chosen.view(2, 6, 2, 6).sum((1, 3)).float()
        assert halves.max() <= 1.6 * halves.min()


def naive_max_min(tokens: np.ndarray, kept: int) -> set[int]:
    """DivPrune in words: the most isolated token, then ever the one whose nearest chosen one is farthest."""

    def distance(one: int, other: int) -> float:
        a, b = tokens[one], tokens[other]
        return 1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))

    everyone = range(len(tokens))
    chosen = [max(everyone, key=lambda i: min(distance(i, j) for j in everyone if j != i))]
    while len(chosen) < kept:
        left = [i for i in everyone if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance(i, j) for j in chosen)))
    return set(chosen)


def test_max_min_diversity_equals_a_naive_implementation() -> None:
    vlm, encoded = encode(padded=True)
    kept = torch.tensor([1, 2, 5, 9, 3, 6])
    chosen = BASELINES["max-min diversity"](vlm, encoded, kept, generator())
    for row, count in enumerate(kept.tolist()):
        tokens = encoded.tokens[row][encoded.token_mask[row]].double().numpy()
        assert set(chosen[row].nonzero().flatten().tolist()) == naive_max_min(tokens, count)


def test_cls_attention_keeps_what_is_attended_to_most() -> None:
    vlm, encoded = encode()
    chosen = BASELINES["CLS attention"](vlm, encoded, torch.full((6,), 3), generator())
    score = vlm.attention(encoded)
    assert (score.masked_fill(~chosen, torch.inf).amin(1) > score.masked_fill(chosen, -torch.inf).amax(1)).all()


def test_oracle_keeps_the_relevant_first_and_best_first() -> None:
    vlm, encoded = encode()
    relevance = encoded.relevance()
    assert relevance is not None
    counts = (relevance > 0).sum(1)
    assert counts.unique().tolist() == [2, 3]
    for kept in (1, 2, 3, 6):
        chosen = BASELINES["oracle"](vlm, encoded, torch.full((6,), kept), generator())
        assert ((chosen & (relevance > 0)).sum(1) == counts.clamp_max(kept)).all()
        best = relevance.sort(1, descending=True).values[:, :kept].sum(1)
        torch.testing.assert_close((relevance * chosen).sum(1), best)


def test_oracle_without_ground_truth_says_what_it_needs() -> None:
    vlm, encoded = encode(task=FakeTask(relevance=False))
    with pytest.raises(ValueError, match="ground-truth relevance"):
        BASELINES["oracle"](vlm, encoded, torch.ones(6, dtype=torch.long), generator())


def test_all_tokens_keeps_everything_in_memory_of_its_own() -> None:
    vlm, encoded = encode(padded=True)
    chosen = all_tokens(vlm, encoded, torch.ones(6, dtype=torch.long), generator())
    assert chosen.equal(encoded.token_mask)
    chosen[:] = False
    assert encoded.token_mask.any()


# -- policies as selectors -------------------------------------------------------------------------------


class Fixed:
    """Returns what it is told to."""

    def __init__(self, mask: Any) -> None:
        self.mask = mask
        self.seen: list[Any] = []

    def select(self, observation: Any) -> Any:
        self.seen.append(observation)
        return self.mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(16, dtype=np.int8), r"bool mask of shape \(16,\); got int8 of shape \(16,\)"),
        (np.ones(15, dtype=bool), r"\(16,\); got bool of shape \(15,\)"),
        (np.ones((1, 16), dtype=bool), r"\(16,\); got bool of shape \(1, 16\)"),
    ],
)
def test_masks_of_another_kind_are_refused(mask: np.ndarray, message: str) -> None:
    vlm, encoded = encode(1)
    with pytest.raises(ValueError, match=message):
        PolicySelector(Fixed(mask))(vlm, encoded, torch.tensor([4]), generator())


def test_masks_over_budget_are_cut_to_a_random_part_of_them() -> None:
    vlm, encoded = encode(1, padded=True)
    mask = np.arange(16) < 6
    policy = Fixed(mask)
    assert isinstance(policy, Policy)
    cut = [PolicySelector(policy)(vlm, encoded, torch.tensor([4]), generator(seed)) for seed in (0, 0, 1, 2, 3)]
    for chosen in cut:
        assert chosen.sum() == 4
        assert not (chosen[0] & ~torch.from_numpy(mask)).any()
    assert cut[0].equal(cut[1])
    assert len({tuple(chosen[0].tolist()) for chosen in cut}) > 1
    fewer = PolicySelector(policy)(vlm, encoded, torch.tensor([9]), generator())
    assert fewer[0].equal(torch.from_numpy(mask))


def test_policies_never_keep_padding() -> None:
    vlm, encoded = encode(4, padded=True)
    chosen = PolicySelector(Fixed(np.ones(16, dtype=bool)))(vlm, encoded, torch.full((4,), 16), generator())
    assert chosen.equal(encoded.token_mask)


def test_keep_best_fills_the_budget_of_the_real_tokens_and_nothing_else() -> None:
    task, vlm = FakeTask(), FakeVLM()
    env = TokenSelectionEnv(vlm=vlm, task=task, split="train", max_tokens=20, budget=(0.05, 1.0))
    rng = np.random.default_rng(0)
    for _ in range(30):
        observation, info = env.reset()
        scores = rng.normal(size=20)
        scores[16:] += 100  # padding, however tempting
        kept = keep_best(scores, observation)
        assert (kept.dtype, kept.shape) == (np.dtype(bool), (20,))
        assert sorted(np.flatnonzero(kept)) == sorted(np.argsort(-scores[:16])[: info["k"]])


def test_policies_see_in_reports_what_the_environment_shows() -> None:
    task = FakeTask()
    vlm = FakeVLM()
    env = TokenSelectionEnv(vlm=vlm, task=task, split="train", budget=0.3)
    for index in range(3):
        expected, info = env.reset(options={"index": index})
        encoded = vlm.encode([task.example("train", index)])
        (seen,) = observations(encoded, torch.tensor([info["k"]]))
        assert set(seen) == set(expected)
        words = int(seen["question_mask"].sum())  # the environment pads questions to one length
        for key, value in seen.items():
            assert value.dtype == expected[key].dtype, key
            other = expected[key][:words] if key.startswith("question") else expected[key]
            np.testing.assert_allclose(value, other, atol=1e-6, err_msg=key)
    seen["tokens"][:] = 0
    assert encoded.tokens.any()


def test_scorer_chooses_alike_in_reports_and_in_the_environment() -> None:
    vlm, encoded = encode(padded=True)
    torch.manual_seed(0)
    scorer = Scorer(ScorerConfig(token_width=WIDTH, width=16, heads=2)).eval()
    torch.nn.init.normal_(scorer.out[1].weight)
    kept = torch.tensor([1, 3, 5, 7, 2, 6])
    batched = ScorerSelector(scorer)(vlm, encoded, kept, generator())
    single = PolicySelector(ScorerPolicy(scorer))(vlm, encoded, kept, generator())
    assert batched.sum(1).equal(kept)
    assert batched.equal(single)

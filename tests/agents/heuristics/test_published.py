"""Published pruners that select tokens, each against a slow account of its description, and what holds for all."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agents.base import Selector
from agents.heuristics import (
    CDPruner,
    VisPruner,
    cls_attention,
    feature_norm,
    max_min_diversity,
    received_attention,
    uniform_grid,
)
from agents.methods import METHODS
from grip_env.vlms.base import Encoded
from tests.agents.batches import AttentiveVLM, random_batch, random_counts
from tests.fakes import FakeVLM

VLM = AttentiveVLM()

SELECTORS: dict[str, Selector] = {
    name: method.run
    for name, method in METHODS.items()
    if not method.replaces and not {"ground truth", "answer", "decoder layers"} & set(method.needs)
} | {  # type: ignore[dict-item]
    "cdpruner, least relevant": CDPruner(sign=-1),
    "vispruner, 3/4": VisPruner(ratio=0.75),
    "vispruner, diverse only": VisPruner(ratio=0.0, pace=1),
    "vispruner, received": VisPruner(kind="received"),
}
DRAWING = ("random",)
ROUND = 9
"""Decimals of a cosine that count."""


def choose(selector: Selector, encoded: Encoded, kept: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return selector(VLM, encoded, kept, torch.Generator().manual_seed(seed))


def indices(chosen: torch.Tensor) -> set[int]:
    return set(chosen.nonzero().flatten().tolist())


# -- one example at a time, in plain words ---------------------------------------------------------------


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    norms = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return round(product / norms, ROUND) if norms else 0.0


class Slow:
    """One example: its real tokens by their index in the padded row."""

    def __init__(self, encoded: Encoded, row: int) -> None:
        real = [index for index, there in enumerate(encoded.token_mask[row].tolist()) if there]
        values = encoded.tokens[row].double().tolist()
        self.tokens = {index: values[index] for index in real}
        words = zip(encoded.question[row].double().tolist(), encoded.question_mask[row].tolist(), strict=True)
        self.words = [word for word, there in words if there]

    def best(self, score: dict[int, float], count: int) -> list[int]:
        return sorted(score, key=lambda index: (-score[index], index))[:count]

    def norm(self, count: int) -> list[int]:
        return self.best({i: float(np.float32(np.linalg.norm(t))) for i, t in self.tokens.items()}, count)

    def attention(self, count: int, column: int = 0) -> list[int]:
        return self.best({i: token[column] for i, token in self.tokens.items()}, count)

    def divprune(self, count: int) -> list[int]:
        def distance(i: int, j: int) -> float:
            return 1 - cosine(self.tokens[i], self.tokens[j])

        chosen: list[int] = []
        while len(chosen) < count:
            left = [i for i in self.tokens if i not in chosen]
            others = {i: chosen or [j for j in self.tokens if j != i] for i in left}
            nearest = {i: min((distance(i, j) for j in others[i]), default=math.inf) for i in left}
            chosen.append(self.best(nearest, 1)[0])
        return chosen

    def vispruner(self, count: int, ratio: float, pace: int, column: int = 0) -> list[int]:
        important = math.floor(count * ratio)
        chosen = self.attention(important, column)
        left = [index for index in self.tokens if index not in chosen]
        listed = sorted(left, key=lambda index: (self.tokens[index][column], index), reverse=True)
        wanted = count - important
        while len(listed) > wanted and wanted:
            odd = [listed[place] for place in range(1, len(listed), 2)]
            closeness = []
            for place in range(0, len(listed), 2):
                token = self.tokens[listed[place]]
                closeness.append((-max(cosine(token, self.tokens[other]) for other in odd), place))
            gone = {place for _, place in sorted(closeness)[: min(pace, len(listed) - wanted)]}
            # those that stay of the even places, most similar first; then the odd ones
            listed = [listed[place] for _, place in sorted(closeness) if place not in gone] + odd
        return chosen + (listed if wanted else [])

    def relevance(self, sign: int) -> dict[int, float]:
        match = {
            i: round(sign * sum(cosine(token, word) for word in self.words) / max(1, len(self.words)), ROUND)
            for i, token in self.tokens.items()
        }
        low, high = min(match.values()), max(match.values())
        return {i: (value - low) / (high - low) if high > low else 1.0 for i, value in match.items()}

    def cdpruner(self, count: int, sign: int) -> list[int]:
        """By what a token adds to the determinant: the Schur complement of those chosen before it."""
        weight = self.relevance(sign)

        def kernel(rows: list[int], columns: list[int]) -> np.ndarray:
            return np.array(
                [[weight[i] * cosine(self.tokens[i], self.tokens[j]) * weight[j] for j in columns] for i in rows]
            ).reshape(len(rows), len(columns))

        chosen: list[int] = []
        spanning: list[int] = []  # those that added volume
        while len(chosen) < count:
            gain: dict[int, float] = {}
            for i in self.tokens:
                if i in chosen:
                    continue
                gain[i] = float(kernel([i], [i])[0, 0])
                if spanning:
                    across = kernel(spanning, [i])
                    gain[i] -= float((across.T @ np.linalg.solve(kernel(spanning, spanning), across))[0, 0])
            pick = self.best({i: round(value, ROUND) for i, value in gain.items()}, 1)[0]
            if gain[pick] > 1e-6:
                spanning.append(pick)
            else:  # as good as a combination of those chosen: the most relevant
                pick = self.best({i: round(weight[i], ROUND) for i in gain}, 1)[0]
            chosen.append(pick)
        return chosen


REFERENCES: dict[str, tuple[Selector, Callable[[Slow, int], list[int]]]] = {
    "norm": (feature_norm, lambda slow, count: slow.norm(count)),
    "cls attention": (cls_attention, lambda slow, count: slow.attention(count)),
    "received attention": (received_attention, lambda slow, count: slow.attention(count, 1)),
    "divprune": (max_min_diversity, lambda slow, count: slow.divprune(count)),
    "vispruner": (VisPruner(), lambda slow, count: slow.vispruner(count, 0.5, 8)),
    "vispruner, 3/4, received": (VisPruner(0.75, 3, "received"), lambda slow, k: slow.vispruner(k, 0.75, 3, 1)),
    "vispruner, one at a time": (VisPruner(0.25, 1), lambda slow, count: slow.vispruner(count, 0.25, 1)),
    "vispruner, important only": (VisPruner(1.0), lambda slow, count: slow.vispruner(count, 1.0, 8)),
    "cdpruner": (CDPruner(), lambda slow, count: slow.cdpruner(count, 1)),
    "cdpruner, least relevant": (CDPruner(-1), lambda slow, count: slow.cdpruner(count, -1)),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_pruners_do_what_their_descriptions_say(name: str, ties: bool) -> None:
    selector, reference = REFERENCES[name]
    for seed in range(4):
        encoded = random_batch(seed, batch=5, tokens=26, ties=ties)
        for kept in (random_counts(encoded, seed), torch.ones(5, dtype=torch.long), encoded.token_mask.sum(1)):
            chosen = choose(selector, encoded, kept)
            for row, count in enumerate(kept.tolist()):
                expected = reference(Slow(encoded, row), count)
                assert len(set(expected)) == count
                assert indices(chosen[row]) == set(expected), (seed, row, count)


def test_vispruner_keeps_what_its_authors_code_keeps() -> None:
    """Two to four rounds: what is at an even place in the second depends on how the first leaves the list."""
    cases = json.loads((Path(__file__).parent / "vispruner.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        features, attention = torch.tensor(case["features"]), torch.tensor(case["attention"])
        encoded = random_batch(0, batch=1, tokens=len(features))
        encoded.token_mask[:] = True

        class Looking(FakeVLM):
            def attention(self, encoded: Encoded, kind: str = "cls") -> torch.Tensor:
                return attention.mean(0, keepdim=True)  # noqa: B023 (called in this turn of the loop)

            def tower_features(self, encoded: Encoded) -> torch.Tensor:
                return features[None]  # noqa: B023

        pruner = VisPruner(case["important_ratio"])
        chosen = pruner(Looking(), encoded, torch.tensor([case["k"]]), torch.Generator())
        assert chosen[0].nonzero().flatten().tolist() == case["kept"]


def test_a_determinantal_process_keeps_the_set_of_largest_volume_among_pairs() -> None:
    """With orthogonal tokens, nothing but relevance counts; with a duplicate, the second of a pair adds nothing."""
    encoded = random_batch(0, batch=1, tokens=5, words=1)
    encoded.token_mask[:] = True
    encoded.question_mask[:] = True
    encoded.tokens[0] = torch.eye(8)[[0, 0, 1, 2, 3]]
    encoded.question[0, 0] = torch.tensor([5.0, 3.0, 2.0, 1.0, 0, 0, 0, 0])
    for count, expected in ((1, {0}), (2, {0, 2}), (3, {0, 2, 3}), (4, {0, 1, 2, 3}), (5, {0, 1, 2, 3, 4})):
        assert indices(choose(CDPruner(), encoded, torch.tensor([count]))[0]) == expected
    assert indices(choose(CDPruner(sign=-1), encoded, torch.tensor([2]))[0]) == {3, 4}


def test_without_a_question_only_diversity_counts() -> None:
    encoded = random_batch(3, batch=4, tokens=12)
    encoded.question_mask[:] = False
    kept = random_counts(encoded, 0)
    chosen = choose(CDPruner(), encoded, kept)
    assert chosen.equal(choose(CDPruner(sign=-1), encoded, kept))
    assert chosen.sum(1).equal(kept)


def test_options_out_of_range_are_refused() -> None:
    for ratio in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\]"):
            VisPruner(ratio)
    with pytest.raises(ValueError, match="pace must be at least 1; got 0"):
        VisPruner(pace=0)
    with pytest.raises(ValueError, match="sign must be 1 or -1; got 0"):
        CDPruner(sign=0)  # type: ignore[arg-type]


# -- what holds for all ----------------------------------------------------------------------------------

BATCHES = st.builds(
    random_batch,
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 20),
    words=st.integers(1, 4),
    ties=st.booleans(),
)


@pytest.mark.parametrize("name", SELECTORS)
@settings(max_examples=25, deadline=None)
@given(encoded=BATCHES, seed=st.integers(0, 10**6))
def test_exactly_k_real_tokens_are_kept(name: str, encoded: Encoded, seed: int) -> None:
    kept = random_counts(encoded, seed)
    before = {key: value.clone() for key, value in vars(encoded).items() if isinstance(value, torch.Tensor)}
    chosen = choose(SELECTORS[name], encoded, kept, seed)
    assert chosen.dtype == torch.bool
    assert chosen.sum(1).equal(kept)
    assert not (chosen & ~encoded.token_mask).any()
    assert chosen.equal(choose(SELECTORS[name], encoded, kept, seed))
    assert all(value.equal(getattr(encoded, key)) for key, value in before.items()), "the batch was changed"


@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in DRAWING])
@settings(max_examples=25, deadline=None)
@given(encoded=BATCHES, seed=st.integers(0, 10**6))
def test_an_example_alone_is_pruned_as_in_a_batch(name: str, encoded: Encoded, seed: int) -> None:
    kept = random_counts(encoded, seed)
    together = choose(SELECTORS[name], encoded, kept)
    for row in range(len(encoded)):
        real = encoded.token_mask[row]
        alone = encoded[[row]]
        for field in ("tokens", "token_mask", "positions"):
            setattr(alone, field, getattr(alone, field)[:, real])
        assert choose(SELECTORS[name], alone, kept[[row]])[0].equal(together[row, real])


def tied_first_pick(slow: Slow) -> bool:
    """Whether the two most isolated tokens are each other's nearest, and so equally isolated."""
    isolation = {
        i: min((1 - cosine(one, other) for j, other in slow.tokens.items() if j != i), default=math.inf)
        for i, one in slow.tokens.items()
    }
    first, *others = sorted(isolation.values(), reverse=True)
    return bool(others) and others[0] == first


@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in (*DRAWING, "uniform-grid")])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 20))
def test_the_choice_moves_with_the_tokens(name: str, seed: int, tokens: int) -> None:
    """But for ties, which random numbers hardly have; the lattice of a uniform grid lies where it lies."""
    encoded = random_batch(seed, 3, tokens)
    kept = random_counts(encoded, seed)
    if name == "divprune":
        assume(not any(tied_first_pick(Slow(encoded, row)) for row in range(3)))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    moved = dataclasses.replace(
        encoded,
        tokens=encoded.tokens[:, order],
        token_mask=encoded.token_mask[:, order],
        positions=encoded.positions[:, order],
    )
    chosen, after = (choose(SELECTORS[name], one, kept) for one in (encoded, moved))
    assert after.equal(chosen[:, order])


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zero", "equal"])
def test_tokens_all_alike_are_no_trouble(name: str, value: float) -> None:
    encoded = random_batch(1, batch=4, tokens=15)
    encoded.tokens = torch.full_like(encoded.tokens, value) * encoded.token_mask[..., None]
    real = encoded.token_mask.sum(1)
    for kept in (torch.ones_like(real), (real + 1) // 2, real):
        chosen = choose(SELECTORS[name], encoded, kept)
        assert chosen.sum(1).equal(kept)
        assert not (chosen & ~encoded.token_mask).any()


@pytest.mark.parametrize("name", ["norm", "cls-attention", "received-attention", "divprune", "cdpruner"])
def test_of_equal_tokens_the_first_are_kept(name: str) -> None:
    encoded = random_batch(1, batch=4, tokens=15)
    encoded.tokens = torch.ones_like(encoded.tokens) * encoded.token_mask[..., None]
    kept = random_counts(encoded, 2)
    first = encoded.token_mask & (encoded.token_mask.cumsum(1) <= kept[:, None])
    assert choose(SELECTORS[name], encoded, kept).equal(first)


@pytest.mark.parametrize("name", SELECTORS)
def test_none_and_more_than_there_are_can_be_asked_for(name: str) -> None:
    encoded = random_batch(5, batch=3, tokens=10)
    assert not choose(SELECTORS[name], encoded, torch.zeros(3, dtype=torch.long)).any()
    assert choose(SELECTORS[name], encoded, torch.full((3,), 99)).equal(encoded.token_mask)


def test_a_lattice_point_between_tokens_goes_to_the_first_of_them() -> None:
    """The middle of a 12 x 12 grid is as far from four tokens, wherever in the batch it is worked out."""
    centres = (torch.arange(12) + 0.5) / 12
    encoded = random_batch(0, batch=1, tokens=144)
    encoded.token_mask[:] = True
    encoded.positions = torch.cartesian_prod(centres, centres)[None]
    assert indices(choose(uniform_grid, encoded, torch.tensor([1]))[0]) == {5 * 12 + 5}
    quarters = {row * 12 + column for row in (2, 8) for column in (2, 8)}
    assert indices(choose(uniform_grid, encoded, torch.tensor([4]))[0]) == quarters

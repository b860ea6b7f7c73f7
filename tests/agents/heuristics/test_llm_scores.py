"""Scores from inside the language model against slow ones made of what the model itself returns for each prompt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from agents.base import Selector, budget_to_count
from agents.heuristics.llm_scores import DARTScore, FastVScore, SparseVLMScore, text_raters
from agents.methods import METHODS
from grip_env.vlms.base import Encoded
from grip_env.vlms.decoder.staged_forward import StagedForward
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeTask, FakeVLM
from tests.vlms.decoder.test_staged_forward import build
from tests.vlms.families.test_known import examples
from tests.vlms.plain import Prompt, run_prompt

LANGUAGE_SCORES: dict[str, Any] = {
    METHODS[name].title: METHODS[name].run for name in ("fastv-score", "sparsevlm-score", "dart-score")
}

FAMILIES = ("llava", "llava_onevision")  # one with as many tokens for each picture, one with tiles


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> HuggingFaceVLM:
    return build(str(request.param))


@pytest.fixture(scope="module")
def encoded(vlm: HuggingFaceVLM) -> Encoded:
    return vlm.encode(examples())


@pytest.fixture(scope="module")
def prompts(vlm: HuggingFaceVLM, encoded: Encoded) -> list[Prompt]:
    return [run_prompt(vlm, example) for example in encoded.examples]


def choose(selector: Selector, vlm: HuggingFaceVLM, encoded: Encoded, kept: torch.Tensor | int) -> torch.Tensor:
    counts = torch.full((len(encoded),), kept) if isinstance(kept, int) else kept
    return selector(vlm, encoded, counts, torch.Generator().manual_seed(0))


def best(scores: list[float], kept: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:kept])


# -- the same, slowly ------------------------------------------------------------------------------------


def slow_fastv(vlm: HuggingFaceVLM, prompt: Prompt, kept: int, layer: int = 2) -> set[int]:
    heads = prompt.attention[layer - 1].numpy()
    scores = [sum(float(head[-1, column]) for head in heads) / len(heads) for column in prompt.visual]
    return best(scores, kept)


def slow_raters(prompt: Prompt) -> list[int]:
    """Columns of the words whose mean share of the tokens' softmax is above the average."""
    states = prompt.hidden[0].double().numpy()
    relevance = [0.0] * len(prompt.words)
    for column in prompt.visual:
        products = [float(states[column] @ states[word]) for word in prompt.words]
        powers = [math.exp(product - max(products)) for product in products]
        for word, power in enumerate(powers):
            relevance[word] += power / sum(powers) / len(prompt.visual)
    average = sum(relevance) / len(relevance)
    return [column for column, share in zip(prompt.words, relevance, strict=True) if share > average]


def slow_sparsevlm(vlm: HuggingFaceVLM, prompt: Prompt, kept: int, layer: int = 2) -> set[int]:
    raters, heads = slow_raters(prompt), prompt.attention[layer].numpy()
    scores = []
    for column in prompt.visual:
        seen = [float(head[rater, column]) for head in heads for rater in raters]
        scores.append(sum(seen) / len(seen))
    return best(scores, kept)


def slow_dart(
    vlm: HuggingFaceVLM, prompt: Prompt, kept: int, layer: int = 2, token_pivots: int = 4, word_pivots: int = 4
) -> set[int]:
    keys = prompt.keys[layer - 1].double().numpy()  # (heads, L, head width)
    (norm,) = [module for name, module in vlm.model.named_modules() if name.endswith("language_model.norm")]
    states = prompt.hidden[layer].double().numpy()
    states = states / np.sqrt((states**2).mean(-1, keepdims=True) + norm.variance_epsilon)
    states = states * norm.weight.double().numpy()

    def size(column: int) -> float:
        return sum(abs(float(number)) for head in keys for number in head[column])

    def alike(one: int, other: int) -> float:
        a, b = states[one], states[other]
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    tokens = sorted(prompt.visual, key=lambda column: (-size(column), column))[: min(token_pivots, kept)]
    words = sorted(prompt.words, key=lambda column: (-size(column), column))[:word_pivots]
    chosen, rest, pivots = set(tokens), kept - len(tokens), [*tokens, *words]
    for turn, pivot in enumerate(pivots):
        quota = rest // len(pivots) + (1 if turn < rest % len(pivots) else 0)
        left = [column for column in prompt.visual if column not in chosen]
        chosen |= set(sorted(left, key=lambda column: (alike(pivot, column), column))[:quota])
    return {prompt.visual.index(column) for column in chosen}


@pytest.mark.parametrize("kept", [1, 4, 5, 20])
@pytest.mark.parametrize(
    ("selector", "slow"),
    [
        (FastVScore(), slow_fastv),
        (FastVScore(1), lambda *args: slow_fastv(*args, layer=1)),
        (SparseVLMScore(), slow_sparsevlm),
        (SparseVLMScore(0), lambda *args: slow_sparsevlm(*args, layer=0)),
        (DARTScore(), slow_dart),
        (DARTScore(1, 2, 1), lambda *args: slow_dart(*args, 1, 2, 1)),
        (DARTScore(2, 0, 40), lambda *args: slow_dart(*args, 2, 0, 40)),  # more pivots than there are words
    ],
    ids=["FastV", "FastV 1", "SparseVLM", "SparseVLM 0", "DART", "DART few pivots", "DART of words"],
)
def test_scores_equal_slow_ones(
    vlm: HuggingFaceVLM,
    encoded: Encoded,
    prompts: list[Prompt],
    selector: Selector,
    slow: Callable[[HuggingFaceVLM, Prompt, int], set[int]],
    kept: int,
) -> None:
    chosen = choose(selector, vlm, encoded, kept)
    for row, prompt in enumerate(prompts):
        assert set(chosen[row].nonzero().flatten().tolist()) == slow(vlm, prompt, kept), f"row {row}"


def test_raters_are_some_of_the_words_and_not_all(encoded: Encoded, vlm: HuggingFaceVLM, prompts: list[Prompt]) -> None:
    run = StagedForward(vlm, encoded)
    raters = text_raters(run.hidden(), run.hidden("words"), encoded.token_mask, run.words)
    for row, prompt in enumerate(prompts):
        columns = [prompt.words[word] for word in raters[row].nonzero().flatten().tolist()]
        assert columns == slow_raters(prompt)
        assert 0 < len(columns) < len(prompt.words)


def test_where_no_word_stands_out_all_real_ones_rate() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    raters = text_raters(torch.ones(2, 4, 8), torch.ones(2, 3, 8), torch.ones(2, 4, dtype=torch.bool), mask)
    assert raters.equal(mask)


# -- invariants ------------------------------------------------------------------------------------------


@pytest.fixture(params=list(LANGUAGE_SCORES))
def selector(request: pytest.FixtureRequest) -> Selector:
    return LANGUAGE_SCORES[request.param]


def test_exactly_k_real_tokens_are_kept(selector: Selector, vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    real = encoded.token_mask.sum(1)
    for kept in (torch.tensor([1, 2, 7, 30]), budget_to_count(encoded, 0.1), real - 1, real):
        chosen = choose(selector, vlm, encoded, kept)
        assert (chosen.dtype, chosen.shape) == (torch.bool, encoded.token_mask.shape)
        assert chosen.sum(1).equal(kept)
        assert not (chosen & ~encoded.token_mask).any()


def test_neither_batches_nor_chance_nor_the_answer_change_a_choice(
    selector: Selector, vlm: HuggingFaceVLM, encoded: Encoded
) -> None:
    kept = budget_to_count(encoded, 0.3)
    chosen = choose(selector, vlm, encoded, kept)
    assert selector(vlm, encoded, kept, torch.Generator().manual_seed(9)).equal(chosen)
    other = [dataclasses.replace(example, answer="three blue circles, no red") for example in encoded.examples]
    assert choose(selector, vlm, vlm.encode(other), kept).equal(chosen)
    assert choose(selector, vlm, vlm.encode(other, with_answers=False), kept).equal(chosen)
    for row, example in enumerate(encoded.examples):
        alone = choose(selector, vlm, vlm.encode([example]), kept[[row]])
        assert alone[0].equal(chosen[row, : alone.shape[1]])
    few = HuggingFaceVLM(vlm.model, vlm.processor, token_budget=100)
    assert choose(selector, few, encoded, kept).equal(chosen)


def test_the_question_changes_the_choice(selector: Selector, vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    other = [dataclasses.replace(example, question="how many are left of it?") for example in encoded.examples]
    kept = budget_to_count(encoded, 0.3)
    assert not choose(selector, vlm, vlm.encode(other), kept).equal(choose(selector, vlm, encoded, kept))


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_identical_tokens_give_exactly_k_and_no_nan(
    selector: Selector, vlm: HuggingFaceVLM, encoded: Encoded, fill: float
) -> None:
    same = dataclasses.replace(encoded, tokens=torch.full_like(encoded.tokens, fill))
    for kept in (1, 6, 30):
        assert choose(selector, vlm, same, kept).sum(1).tolist() == [kept] * 4


def test_of_equals_the_first_are_kept(
    selector: Selector, vlm: HuggingFaceVLM, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alike(run: StagedForward, part: str = "tokens", normed: bool = False) -> torch.Tensor:
        return torch.ones(*(run.alive if part == "tokens" else run.words).shape, 4)

    monkeypatch.setattr(StagedForward, "attention", lambda run, raters=None: torch.ones(run.alive.shape))
    monkeypatch.setattr(StagedForward, "keys", alike)
    monkeypatch.setattr(StagedForward, "hidden", alike)
    chosen = choose(selector, vlm, encoded, 9)
    assert chosen.equal((torch.arange(chosen.shape[1]) < 9).expand_as(chosen))


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE_SCORES)
def test_other_models_are_refused_by_name(name: str) -> None:
    fake = FakeVLM()
    encoded = fake.encode([FakeTask().example("train", 0)])
    with pytest.raises(NotImplementedError, match=f"{name}: running the layers .* 'fake' is a FakeVLM"):
        LANGUAGE_SCORES[name](fake, encoded, torch.tensor([3]), torch.Generator())


def test_layers_that_are_not_there_are_refused(vlm: HuggingFaceVLM, encoded: Encoded) -> None:
    bad: tuple[Selector, ...] = (FastVScore(4), FastVScore(0), SparseVLMScore(3), DARTScore(4))
    for selector, layer in zip(bad, (3, -1, 3, 3), strict=True):
        with pytest.raises(ValueError, match=f"score would look into layer {layer}, and .* the layers 0 to 2: give"):
            choose(selector, vlm, encoded, 3)


@pytest.mark.parametrize("name", LANGUAGE_SCORES)
def test_what_needs_a_question_says_so(name: str, vlm: HuggingFaceVLM) -> None:
    first, *others = examples(3)
    silent = vlm.encode([first, *(dataclasses.replace(example, question="") for example in others)])
    if name == "FastV score":  # the prompt has a last token all the same
        assert choose(LANGUAGE_SCORES[name], vlm, silent, 3).sum(1).tolist() == [3, 3, 3]
        return
    with pytest.raises(ValueError, match=rf"{name} needs a question .* the examples \[1, 2\] have none"):
        choose(LANGUAGE_SCORES[name], vlm, silent, 3)

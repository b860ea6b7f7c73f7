"""The embedded model: small, whole, and with the landscape that makes choosing tokens a problem."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from agents.base import Selector, budget_to_count
from agents.heuristics import BASELINES, all_tokens
from grip_env.tasks.scenes import FAMILIES, SceneTask
from grip_env.vlms import TINY, load_vlm
from grip_env.vlms.base import Encoded
from grip_env.vlms.huggingface import HuggingFaceVLM

EXAMPLES = 240


@pytest.fixture(scope="module")
def tiny() -> HuggingFaceVLM:
    return load_vlm("tiny")


@pytest.fixture(scope="module")
def encoded(tiny: HuggingFaceVLM) -> Encoded:
    task = SceneTask()
    return tiny.encode([task.example("validation", index) for index in range(EXAMPLES)])


@pytest.fixture(scope="module")
def right(tiny: HuggingFaceVLM, encoded: Encoded) -> Callable[[Selector, float], torch.Tensor]:
    """Which examples are answered right, bool (EXAMPLES,), when a selector keeps a share of the tokens."""

    def measure(selector: Selector, budget: float) -> torch.Tensor:
        kept = budget_to_count(encoded, budget)
        selection = selector(tiny, encoded, kept, torch.Generator().manual_seed(0))
        return tiny.score(encoded, selection[:, None]).correct[:, 0]

    return measure


def test_folder_is_small_and_holds_what_transformers_loads() -> None:
    files = {path.name: path.stat().st_size for path in TINY.iterdir() if path.is_file()}
    assert sum(files.values()) < 10_000_000
    needed = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja"}
    assert needed | {"MODEL_CARD.md"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert json.loads((TINY / "config.json").read_text())["model_type"] == "llava"


def test_is_a_frozen_llava_in_float32(tiny: HuggingFaceVLM, encoded: Encoded) -> None:
    assert type(tiny.model) is LlavaForConditionalGeneration
    assert tiny.name == "tiny"
    assert {weight.dtype for weight in tiny.model.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in tiny.model.parameters())
    assert not tiny.model.training
    assert encoded.tokens.shape == (EXAMPLES, 144, tiny.width)
    assert tiny.checksum() == load_vlm().checksum()


def test_answers_well_with_all_tokens(right: Callable[[Selector, float], torch.Tensor], encoded: Encoded) -> None:
    correct = right(all_tokens, 1.0)
    assert correct.float().mean() >= 0.9
    for family in FAMILIES:
        rows = [row for row, example in enumerate(encoded.examples) if example.family == family]
        assert correct[rows].float().mean() >= 0.7, family


def test_choosing_tokens_is_a_problem_with_a_solution(right: Callable[[Selector, float], torch.Tensor]) -> None:
    dense = float(right(all_tokens, 1.0).float().mean())
    chance, diverse, oracle = (
        float(right(BASELINES[name], 0.1).float().mean()) for name in ("random", "max-min diversity", "oracle")
    )
    assert chance <= dense - 0.15  # dropping blindly costs
    assert chance + 0.05 <= diverse <= dense - 0.02  # spreading over the picture helps, and is not enough
    assert oracle >= 0.93 * dense  # a tenth of the tokens can be enough


def test_answers_in_words_are_those_it_scores_best(tiny: HuggingFaceVLM, encoded: Encoded) -> None:
    part = encoded[slice(0, 24)]
    selection = torch.cat([part.full_selection(), torch.zeros_like(part.full_selection())], 1)
    correct = tiny.score(part, selection).correct
    for example, texts, row in zip(part.examples, tiny.generate(part, selection), correct.tolist(), strict=True):
        # more tokens are allowed than it needs: it must stop by itself
        assert [text == example.answer for text in texts] == row


def test_without_tokens_it_does_not_claim_to_know(tiny: HuggingFaceVLM, encoded: Encoded) -> None:
    nothing = torch.zeros_like(encoded.full_selection())
    blind = tiny.score(encoded, nothing)
    assert blind.correct.float().mean() < 0.5
    assert blind.log_likelihood.mean() < tiny.score(encoded, encoded.full_selection()).log_likelihood.mean() - 0.5

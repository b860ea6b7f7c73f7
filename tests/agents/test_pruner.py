"""Model and agent together answer as each of them would; the agent that comes with the package is a good one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agents.base import budget_to_count
from agents.heuristics import BASELINES
from agents.pruner import PRETRAINED, Pruner, load_agent
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerSelector
from grip_env.tasks.scenes import SceneTask
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.vlms import tiny_models


@pytest.fixture(scope="module")
def pruner() -> Pruner:
    return Pruner.load()


def test_packaged_agent_is_small_and_beats_what_needs_no_training(pruner: Pruner) -> None:
    files = [path for path in (PRETRAINED / "tiny").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    task = SceneTask()
    encoded = pruner.vlm.encode([task.example("validation", index) for index in range(120)])
    kept = budget_to_count(encoded, 0.05)
    generator = torch.Generator().manual_seed(0)
    values = {
        name: pruner.vlm.score(encoded, selector(pruner.vlm, encoded, kept, generator)[:, None]).log_likelihood.mean()
        for name, selector in {"agent": pruner.selector, **BASELINES}.items()
    }
    assert values["agent"] > values["max-min diversity"] + 0.2
    assert values["agent"] > values["CLS attention"] + 0.2


def test_answers_are_those_of_the_model_on_what_the_agent_keeps(pruner: Pruner) -> None:
    task = SceneTask()
    examples = [task.example("validation", index) for index in range(12)]
    images, questions = [one.image for one in examples], [one.question for one in examples]
    encoded = pruner.vlm.encode(examples)
    for budget in (0.04, 0.3, 1.0):
        kept = budget_to_count(encoded, budget)
        selection = pruner.selector(pruner.vlm, encoded, kept, torch.Generator())
        expected = [texts[0] for texts in pruner.vlm.generate(encoded, selection[:, None])]
        assert pruner.answers(images, questions, budget) == expected
        single = [pruner(image, question, budget) for image, question in zip(images, questions, strict=True)]
        assert [one.text for one in single] == expected
        assert [one.kept.tolist() for one in single] == selection.tolist()
        # how sure it is of its answer is what scoring that answer gives
        said = [dataclasses.replace(one, answer=text) for one, text in zip(examples, expected, strict=True)]
        scores = pruner.vlm.score(pruner.vlm.encode(said), selection[:, None]).log_likelihood[:, 0]
        found = torch.tensor([one.log_likelihood for one in single])
        torch.testing.assert_close(found, scores, atol=1e-4, rtol=0)
        assert all(set(one.seconds) == {"encode", "select", "prefill", "decode"} for one in single)
        assert all(min(one.seconds.values()) >= 0 for one in single)


def test_pillow_images_of_any_mode_are_taken(pruner: Pruner) -> None:
    example = SceneTask().example("validation", 0)
    image = Image.fromarray(example.image)
    expected = pruner.answers([example.image], [example.question])
    assert pruner.answers([image], [example.question]) == expected
    assert pruner.answers([image.convert("RGBA")], [example.question]) == expected


def test_one_agent_serves_pictures_of_several_sizes() -> None:
    vlm = HuggingFaceVLM(*tiny_models.build("qwen2_vl"))
    torch.manual_seed(0)
    scorer = Scorer(ScorerConfig(token_width=vlm.width, width=16, heads=2))
    torch.nn.init.normal_(scorer.out[1].weight)
    pruner = Pruner(vlm, ScorerSelector(scorer))
    images = [np.random.default_rng(size).integers(0, 256, (size, 60, 3), dtype=np.uint8) for size in (40, 90)]
    together = pruner.answers(images, ["what is it?"] * 2, budget=0.5, max_new_tokens=3)
    alone = [pruner(image, "what is it?", 0.5, 3) for image in images]
    assert [one.text for one in alone] == together
    assert len({len(one.kept) for one in alone}) == 2
    assert all(one.kept.sum() == round(0.5 * len(one.kept)) for one in alone)


def test_an_empty_question_is_taken(pruner: Pruner) -> None:
    example = SceneTask().example("validation", 0)
    assert pruner(example.image, "", budget=0.1).kept.sum() == 14
    assert len(pruner.answers([example.image] * 2, ["", ""])) == 2


def test_misuse_is_refused(pruner: Pruner, tmp_path: Path) -> None:
    image = np.zeros((96, 96, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="1 images and 2 questions"):
        pruner.answers([image], ["a?", "b?"])
    with pytest.raises(ValueError, match="has values of float64"):
        pruner.answers([image.astype(float)], ["a?"])
    with pytest.raises(ValueError, match="share"):
        pruner.answers([image], ["a?"], budget=1.5)
    encoded = pruner.encode([image, image], ["a?", "b?"])
    with pytest.raises(ValueError, match="no answers to score"):
        pruner.vlm.score(encoded, encoded.full_selection())
    with pytest.raises(ValueError, match="one selection of one example, got 1 of 2"):
        pruner.vlm.answer(encoded, encoded.full_selection())
    with pytest.raises(FileNotFoundError, match=r"no trained agent for 'models/big' .* --vlm models/big"):
        load_agent(pruner.vlm, "models/big")
    with pytest.raises(FileNotFoundError, match="no scorer in"):
        load_agent(pruner.vlm, "tiny", tmp_path)
    Scorer(ScorerConfig(token_width=64)).save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"width 64, and those of 'tiny' have 128: train an agent for this model"):
        load_agent(pruner.vlm, "tiny", tmp_path)

"""The second embedded model: its scenes, its words, and the weights it starts from."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from grip_env.pretraining.embedded_models import (
    SIZES,
    build_model,
    build_processor,
    build_tokenizer,
    start_from,
)
from grip_env.pretraining.language_stage import LanguageStage, QuestionPacker
from grip_env.pretraining.vision_stage import DenseBatch, dense_labels, draw_scenes
from grip_env.tasks.scene_levels import COLOURS, HARD, STANDARD
from grip_env.tasks.scenes import SceneTask
from grip_env.tasks.sprites import SHAPES
from grip_env.vlms import load_vlm
from grip_env.vlms.huggingface import HuggingFaceVLM

SMALL = SIZES["small"]


@pytest.fixture(scope="module")
def small() -> HuggingFaceVLM:
    processor = build_processor(SMALL)
    return HuggingFaceVLM(build_model(processor.tokenizer, size=SMALL), processor)


def test_it_is_small_and_its_answers_have_the_tokens_they_should(small: HuggingFaceVLM) -> None:
    assert sum(value.numel() for value in small.model.parameters()) * 2 < 12 * 2**20  # bytes in half precision
    tokenizer = small.processor.tokenizer
    single = {answer for family in set(HARD.families) - {"number"} for answer in HARD.choices[family]}
    assert {len(tokenizer.encode(f" {answer}")) for answer in single} == {1}
    assert {len(tokenizer.encode(f" {number}")) for number in HARD.choices["number"]} == {2}
    task = SceneTask(level="hard")
    encoded = small.encode([task.example("train", index) for index in range(12)])
    assert encoded.tokens.shape[:2] == (12, 256)
    assert encoded.answer_lengths.tolist() == [1 + (example.family == "number") for example in encoded.examples]
    scenes = draw_scenes(8, 0, level=HARD)
    asked = [question.text for scene in scenes for family in HARD.families for question in scene.questions(family)]
    words = {word.strip("?,") for text in asked for word in text.split()[1:]}  # the first follows the end of a line
    assert [word for word in sorted(words) if len(tokenizer.encode(f" {word}")) > 1] == []


def test_a_deeper_model_starts_out_answering_as_the_one_it_starts_from() -> None:
    tiny = load_vlm("tiny")
    size = dataclasses.replace(SMALL, level=STANDARD)  # pictures of the same size
    processor = build_processor(size)
    model = build_model(processor.tokenizer, seed=3, size=size)
    start_from(model, processor.tokenizer, tiny.model, tiny.processor.tokenizer)
    examples = [SceneTask().example("validation", index) for index in range(12)]
    found, expected = (
        vlm.log_likelihood(encoded, encoded.full_selection())
        for vlm in (HuggingFaceVLM(model, processor), tiny)
        for encoded in [vlm.encode(examples)]
    )
    # the other model has words more, whose embeddings are random: they take a little of the probability
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    tokens = [vlm.encode(examples).tokens for vlm in (HuggingFaceVLM(model, processor), tiny)]
    torch.testing.assert_close(*tokens, atol=1e-4, rtol=1e-4)


def test_plates_show_their_first_digit_left_of_their_second() -> None:
    seen = 0
    for scene in draw_scenes(10, 3, level=HARD):
        kinds, colours, anchors = (part.reshape(16, 16) for part in dense_labels(scene))
        signs = [thing for thing in scene.things if thing.number is not None]
        shapes = [thing for thing in scene.things if thing.is_shape]
        assert anchors.sum() in range(len(signs) + 2 + len(shapes) - 2, len(signs) + 2 + len(shapes) + 1)
        for plate in (thing for thing in signs if thing.kind == "plate"):
            row = int(plate.centre[0] // 8)
            columns = (int((plate.left + 6) // 8), int((plate.left + plate.width - 7) // 8))
            digits = [int(kinds[row, column]) - len(SHAPES) for column in columns]
            assert digits == list(divmod(plate.number or 0, 10))
            assert all(colours[row, column] == COLOURS.index(plate.colour) for column in columns)
            seen += 1
    assert seen == 20


def test_training_scenes_have_every_family_with_both_answers() -> None:
    scenes = draw_scenes(200, 1, level=HARD)
    assert [scene.things for scene in scenes[:3]] == [scene.things for scene in draw_scenes(3, 1, level=HARD)]
    rng, packer = random.Random(0), QuestionPacker(build_tokenizer(SMALL))
    asked = [question for scene in scenes for question in packer.sample(scene, 12, rng)]
    for family in HARD.families:
        answers = [question.answer for question in asked if question.family == family]
        assert len(answers) > 30, family
        if set(HARD.choices[family]) == {"yes", "no"}:
            assert 0.4 < answers.count("yes") / len(answers) < 0.6, family


def test_a_step_of_each_stage_learns_and_follows_from_its_number(small: HuggingFaceVLM) -> None:
    model = build_model(small.processor.tokenizer, seed=1, size=SMALL)
    model.model.vision_tower.requires_grad_(False)
    stages = [LanguageStage(model, small.processor.tokenizer, batch=4, chunk=16, level=HARD) for _ in range(2)]
    for step in (0, 700):
        one, two = (stage.loss(step)["loss"] for stage in stages)
        assert one.item() == two.item()
        assert np.isfinite(one.item())
        one.backward()
    assert model.model.language_model.layers[7].self_attn.o_proj.weight.grad.abs().sum() > 0
    batch = DenseBatch.draw(2, 0, level=HARD)
    assert batch.pixels.shape == (2, 3, 128, 128)
    assert batch.kinds.shape == (2, 256)

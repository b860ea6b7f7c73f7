"""Pre-training: packed questions against separate ones, true captions, and stages that resume exactly."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from grip_env.pretraining.embedded_models import build_tokenizer, task_words
from grip_env.pretraining.language_stage import (
    EncodedScenes,
    LanguageStage,
    QuestionPacker,
    captions,
    forward_packed,
    random_subset,
)
from grip_env.pretraining.training_loop import run_stage
from grip_env.pretraining.vision_stage import DenseBatch, dense_labels, draw_scenes, normalise, vision_tokens
from grip_env.tasks.base import Example
from grip_env.tasks.scenes import CHOICES, FAMILIES, GRID, Question, Scene, SceneTask, plural
from grip_env.vlms.huggingface import HuggingFaceVLM


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return draw_scenes(3, seed=5)


@pytest.fixture(scope="module")
def pool(random_vlm: HuggingFaceVLM) -> EncodedScenes:
    return EncodedScenes.draw(random_vlm.model, 12, seed=5)


def examples_of(scene: Scene, questions: list[Question]) -> list[Example]:
    return [Example(scene.draw(), question.text, question.answer, question.family) for question in questions]


@pytest.mark.parametrize("kept_count", [None, 1, 20])
def test_packed_questions_score_as_separate_sequences_do(
    random_vlm: HuggingFaceVLM, scenes: list[Scene], kept_count: int | None
) -> None:
    """The trainer's shortcut against the adapter, which knows nothing of it."""
    rng = random.Random(0)
    packer = QuestionPacker(random_vlm.processor.tokenizer)
    asked = [packer.sample(scene, count, rng) for scene, count in zip(scenes, (6, 4, 5), strict=True)]
    text = packer.pack(asked)
    kept = None
    if kept_count is not None:
        generator = torch.Generator().manual_seed(1)
        kept = torch.stack([torch.randperm(144, generator=generator)[:kept_count].sort().values for _ in scenes])
    pixels = normalise(np.stack([scene.draw() for scene in scenes]))
    with torch.no_grad():
        features, _ = vision_tokens(random_vlm.model, pixels)
        logits, targets = forward_packed(random_vlm.model, features, text, packer.bos, kept)
    log_p = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert len(log_p) == 2 * sum(len(row) for row in asked)  # the answer's one token, and the end
    found = log_p[targets != packer.eos]
    expected = []
    for row, (scene, questions) in enumerate(zip(scenes, asked, strict=True)):
        encoded = random_vlm.encode(examples_of(scene, questions))
        selection = encoded.full_selection()
        if kept is not None:
            selection = torch.zeros_like(selection)
            selection[:, :, kept[row]] = True
        expected.append(random_vlm.log_likelihood(encoded, selection)[:, 0])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=0)
    assert found.std() > 0.1


def test_packed_questions_do_not_see_each_other(random_vlm: HuggingFaceVLM, scenes: list[Scene]) -> None:
    packer = QuestionPacker(random_vlm.processor.tokenizer)
    one, two = packer.sample(scenes[0], 2, random.Random(1))
    other = dataclasses.replace(one, text="what digit is on the pink card?", answer="7")
    with torch.no_grad():
        features, _ = vision_tokens(random_vlm.model, normalise(scenes[0].draw()[None]))
        rows = [
            forward_packed(random_vlm.model, features, packer.pack([asked]), packer.bos)[0][-2:]
            for asked in ([one, two], [other, two], [two])
        ]
    torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[0], rows[2], atol=1e-5, rtol=0)


def test_prompts_are_those_of_the_processor(random_vlm: HuggingFaceVLM, scenes: list[Scene]) -> None:
    """What training shows the model is, id for id, what the adapter shows it."""
    packer = QuestionPacker(random_vlm.processor.tokenizer)
    questions = [question for family in FAMILIES for question in scenes[0].questions(family)[:2]]
    encoded = random_vlm.encode(examples_of(scenes[0], questions))
    for row, question in enumerate(questions):
        ids, start = packer.encode(question)
        whole = encoded.input_ids[row, : encoded.lengths[row]].tolist()
        assert whole == [packer.bos] + [random_vlm.model.config.image_token_id] * 144 + ids[:-1]
        assert len(ids) - 1 - start == encoded.answer_lengths[row] == 1
        assert ids[-1] == random_vlm.processor.tokenizer.eos_token_id


def test_captions_are_true_of_the_scene() -> None:
    rng = random.Random(3)
    kinds = set()
    for scene in draw_scenes(40, seed=8):
        for caption in captions(scene, 6, rng):
            subject, answer, things = caption.text.strip(), caption.answer, scene.things
            if subject.startswith("left or right "):
                (thing,) = (t for t in things if t.kind == subject.removeprefix("left or right "))
                assert answer == ("left" if thing.left + thing.size / 2 < 48 else "right")
                kinds.add("half")
            elif subject.endswith(" card"):
                digits = [t.number for t in things if t.kind == "card" and t.colour == subject.removesuffix(" card")]
                assert [str(digit) for digit in digits] == [answer]
                kinds.add("card")
            elif answer in CHOICES["color"]:
                assert [t.colour for t in things if t.kind == subject] == [answer]
                kinds.add("colour")
            elif answer in CHOICES["shape"]:
                assert [t.kind for t in things if t.colour == subject] == [answer]
                kinds.add("shape")
            else:
                assert str(sum(plural(t.kind) == subject for t in things)) == answer
                kinds.add("count")
            assert caption.family == "caption"
            assert caption.text.startswith(" ")
    assert kinds == {"card", "colour", "shape", "count", "half"}


def test_normalised_pictures_are_the_processors_pixel_values(random_vlm: HuggingFaceVLM) -> None:
    images = np.stack([SceneTask().example("train", index).image for index in range(3)])
    expected = random_vlm.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalise(images), expected, atol=1e-5, rtol=0)


def test_tower_features_become_the_adapters_tokens(random_vlm: HuggingFaceVLM, scene_examples: list[Example]) -> None:
    pixels = normalise(np.stack([example.image for example in scene_examples]))
    with torch.no_grad():
        features, _ = vision_tokens(random_vlm.model, pixels)
        tokens = random_vlm.model.model.multi_modal_projector(features)
    torch.testing.assert_close(tokens, random_vlm.encode(scene_examples).tokens, atol=1e-5, rtol=1e-5)


def test_every_word_of_the_task_is_one_token_and_any_text_encodes() -> None:
    tokenizer = build_tokenizer()
    words = [f" {answer}" for answers in CHOICES.values() for answer in answers]
    words += [word for group in task_words().values() for word in group]
    words += [f" {plural(shape)}" for shape in CHOICES["shape"]]
    for word in words:
        assert len(tokenizer.encode(word)) == 1, word
    assert len({tokenizer.encode(word)[0] for word in words}) == len(set(words))
    for text in ("Über 3 Äpfel?\n", "何色ですか", "is there a red circle?"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_dense_labels_say_what_covers_each_patch(scenes: list[Scene]) -> None:
    shapes, colours = list(CHOICES["shape"]), list(CHOICES["color"])
    for scene in scenes:
        kinds, shades, anchors = (part.reshape(GRID, GRID) for part in dense_labels(scene))
        objects = [thing for thing in scene.things if thing.is_shape or thing.kind == "card"]
        assert anchors.sum() == len(objects)
        for thing in objects:
            row, column = (int(place // 8) for place in thing.centre)
            if thing.kind == "ring":
                continue  # its centre is a hole
            kind = shapes.index(thing.kind) if thing.is_shape else 6 + int(thing.number or 0)
            assert kinds[row, column] == kind
            assert shades[row, column] == colours.index(thing.colour)
        empty = np.max([scene.coverage(index) for index in range(len(scene.things))], axis=0) == 0
        assert (kinds[empty] == 16).all()
        assert (shades[empty] == 8).all()
        assert empty.any()


def test_drawn_batches_follow_their_seed_and_split() -> None:
    one, two, other = (DenseBatch.draw(2, seed) for seed in (4, 4, 5))
    for field in dataclasses.fields(DenseBatch):
        assert getattr(one, field.name).equal(getattr(two, field.name))
    assert not one.pixels.equal(other.pixels)
    assert not one.pixels.equal(DenseBatch.draw(2, 4, "validation").pixels)


@pytest.mark.parametrize("kind", ["uniform", "objects", "anchors"])
@pytest.mark.parametrize("kept", [1, 14, 120])
def test_random_subsets_have_the_size_asked_for(pool: EncodedScenes, kind: str, kept: int) -> None:
    rows = torch.tensor([0, 3, 7])
    draws = [random_subset(pool, rows, kept, kind, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].shape == (3, kept)
    assert (draws[0].diff(dim=1) > 0).all()
    assert draws[0].min() >= 0
    assert draws[0].max() < 144
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


def test_biased_subsets_show_what_they_promise(pool: EncodedScenes) -> None:
    rows = torch.arange(12)
    generator = torch.Generator().manual_seed(0)
    share = {}
    for kind in ("uniform", "objects", "anchors"):
        chosen = random_subset(pool, rows, 14, kind, generator)
        share[kind] = float((pool.owners.gather(1, chosen) >= 0).float().mean())
    assert share["objects"] > 0.95  # things before empty patches
    assert share["uniform"] < 0.6
    anchors = random_subset(pool, rows, 14, "anchors", generator)
    best = pool.grades > 0.5 + 0.5 / 1.5  # beats any other patch however lucky that is
    assert best.any(1).all()
    picked = torch.zeros_like(best).scatter(1, anchors, True)
    assert (picked | ~best).all()


def test_steps_of_the_language_stage_follow_from_their_number(random_vlm: HuggingFaceVLM) -> None:
    def stage() -> LanguageStage:
        sizes = {"batch": 2, "questions": 3, "captions": 1, "chunk": 4, "reuse": 2, "easy_steps": 2}
        return LanguageStage(random_vlm.model, random_vlm.processor.tokenizer, **sizes)

    in_order, jumping = stage(), stage()
    with torch.no_grad():
        losses = [float(in_order.loss(step)["loss"]) for step in range(6)]
        again = {step: float(jumping.loss(step)["loss"]) for step in (5, 0, 3)}
    assert again == {step: losses[step] for step in (5, 0, 3)}
    assert len(set(losses)) == 6
    assert all(np.isfinite(losses))


# -- stages that resume ----------------------------------------------------------------------------------


def run(folder: Path, stop_at: int | None = None, steps: int = 24) -> tuple[dict[str, torch.Tensor], list[int]]:
    torch.manual_seed(0)
    modules = {"one": torch.nn.Linear(4, 8), "two": torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))}
    modules["two"][0].requires_grad_(False)
    ran: list[int] = []

    def loss(step: int) -> dict[str, torch.Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        ran.append(step)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return {"loss": (modules["two"](modules["one"](x))[:, 0] - x.sum(1)).square().mean()}

    try:
        run_stage("toy", steps, loss, modules, folder, learning_rate=0.05, save_every=5)
    except KeyboardInterrupt:
        assert stop_at is not None
    weights = {f"{name}/{key}": v for name, part in modules.items() for key, v in part.state_dict().items()}
    return {key: value.clone() for key, value in weights.items()}, ran


def test_resumed_stage_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, ran = run(tmp_path / "straight")
    assert ran == list(range(24))
    broken, _ = run(tmp_path / "broken", stop_at=13)
    _, ran = run(tmp_path / "broken", stop_at=21)
    assert ran == list(range(10, 21))  # from the last checkpoint
    resumed, ran = run(tmp_path / "broken")
    assert ran == list(range(20, 24))
    for key, value in straight.items():
        assert value.equal(resumed[key]), key
    assert not straight["one/weight"].equal(broken["one/weight"])


def test_finished_stage_is_loaded_and_not_run_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    again, ran = run(tmp_path)
    assert ran == []
    assert all(first[key].equal(again[key]) for key in first)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.safetensors"]


def test_probes_are_logged(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1, 1)
    options = {"learning_rate": 0.1, "probe": lambda step: f"seen {step}", "probe_every": 2}
    run_stage(
        "toy", 5, lambda step: {"loss": layer(torch.ones(1)).square().sum()}, {"layer": layer}, tmp_path, **options
    )
    assert (tmp_path / "toy.log").read_text() == "step 2: seen 1\nstep 4: seen 3\nstep 5: seen 4\n"

"""Methods that make new tokens: merged ones and smaller images, against slow accounts of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from agents.base import budget_to_count
from agents.heuristics import Replacement, Replacer, VisionZip, downsampled_image
from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded
from grip_env.vlms.blocks import BlockVLM
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeTask, FakeVLM
from tests.vlms.families.test_known import examples, make
from tests.vlms.families.test_tower import SHRINKING, weights_by_hand

REPLACERS: dict[str, Replacer] = {"visionzip": VisionZip(), "downsampled": downsampled_image}


@pytest.fixture(scope="module")
def llava() -> HuggingFaceVLM:
    return make("llava")


def replace(replacer: Replacer, vlm: Any, encoded: Encoded, kept: list[int]) -> Replacement:
    return replacer(vlm, encoded, torch.tensor(kept), torch.Generator().manual_seed(0))


def likelihood_by_hand(vlm: HuggingFaceVLM, example: Example, tokens: torch.Tensor, places: torch.Tensor) -> float:
    """Run the language model on embeddings put together here: text, the given visual tokens, text."""
    tokenizer = vlm.processor.tokenizer
    before, after = vlm.prompt(example.question).split("<image>")
    ids = [tokenizer.bos_token_id, *tokenizer.encode(before.removeprefix("<s>"), add_special_tokens=False)]
    rest = tokenizer.encode(f"{after} {example.answer}", add_special_tokens=False)
    answer = len(rest) - len(tokenizer.encode(after, add_special_tokens=False))
    embed = vlm.model.get_input_embeddings()
    with torch.no_grad():
        row = torch.cat([embed(torch.tensor(ids)), tokens, embed(torch.tensor(rest))])[None]
        mask = torch.ones(row.shape[:2], dtype=torch.long)
        logits = vlm.model(inputs_embeds=row, attention_mask=mask, position_ids=places[None]).logits[0]
    predicted = logits[-1 - answer : -1].log_softmax(-1)
    return float(predicted.gather(1, torch.tensor(rest[-answer:])[:, None]).mean())


# -- VisionZip -------------------------------------------------------------------------------------------


def zipped_by_hand(vlm: HuggingFaceVLM, image: np.ndarray, count: int, merged: float) -> tuple[list[Any], list[int]]:
    """Return the features of the new tokens, one example and one token at a time, and the patch each stands at."""
    weights, keys = (part.double().numpy() for part in weights_by_hand(vlm, -2, image))
    tower = vlm.model.model.vision_tower
    pixels = vlm.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][0].double().numpy()
    patches = len(features) - 1
    contextual = min(round(count * merged), count - 1)
    attention = [np.mean([head[0, 1 + patch] for head in weights]) for patch in range(patches)]
    dominant = sorted(sorted(range(patches), key=lambda i: (-attention[i], i))[: count - contextual - 1])
    new, at = [features[0]], [0]
    for patch in dominant:
        new.append(features[1 + patch])
        at.append(patch)
    left = [patch for patch in range(patches) if patch not in dominant]
    if contextual:
        step = max(1, len(left) // contextual)
        targets = [left[place] for place in range(0, len(left), step)][:contextual]

        def key(patch: int) -> np.ndarray:
            mean = np.mean([head[1 + patch] for head in keys], axis=0)
            return mean / np.linalg.norm(mean)

        groups: dict[int, list[int]] = {target: [] for target in targets}
        for patch in left:
            if patch not in groups:
                groups[max(targets, key=lambda target: key(target) @ key(patch))].append(patch)
        for target in targets:
            members = [features[1 + patch] for patch in groups[target]]
            new.append(features[1 + target] + (np.mean(members, axis=0) if members else 0))
            at.append(target)
    return new, at


@pytest.mark.parametrize("merged", [10 / 64, 0.0, 0.5])
def test_visionzip_does_what_its_description_says(llava: HuggingFaceVLM, merged: float) -> None:
    shown = examples(4)
    encoded = llava.encode(shown)
    for kept in ([1, 2, 3, 6], [10, 20, 35, 36]):
        result = replace(VisionZip(merged), llava, encoded, kept)
        assert result.selection.sum(1).tolist() == kept
        assert result.selection.equal(result.encoded.token_mask)
        scores = llava.score(result.encoded, result.selection[:, None])
        for row, (example, count) in enumerate(zip(shown, kept, strict=True)):
            features, at = zipped_by_hand(llava, example.image, count, merged)
            with torch.no_grad():
                tokens = llava.model.model.multi_modal_projector(torch.tensor(np.stack(features)).float()[None])[0]
            torch.testing.assert_close(result.encoded.tokens[row, :count], tokens, atol=1e-4, rtol=1e-4)
            assert not result.encoded.tokens[row, count:].any()
            torch.testing.assert_close(
                result.encoded.positions[row, 1:count], encoded.positions[row, torch.tensor(at[1:], dtype=torch.long)]
            )
            assert result.encoded.positions[row, 0].tolist() == [0.5, 0.5]
            # text before the image, the places of the patches, text after it where it was
            length = int(encoded.lengths[row])
            start = int((encoded.input_ids[row] == llava.family.image_token_id).nonzero()[0])
            places = torch.tensor([*range(start), *(start + patch for patch in at), *range(start + 36, length)])
            by_hand = likelihood_by_hand(llava, example, tokens, places)
            assert float(scores.log_likelihood[row, 0]) == pytest.approx(by_hand, abs=1e-4)


def test_new_tokens_are_renumbered_where_the_policy_says_so() -> None:
    vlm = make("llava", position_policy="reindex")
    (example,) = examples(1)
    result = replace(VisionZip(), vlm, vlm.encode([example]), [7])
    by_hand = likelihood_by_hand(vlm, example, result.encoded.tokens[0], torch.arange(int(result.encoded.lengths[0])))
    found = vlm.log_likelihood(result.encoded, result.selection[:, None])
    assert float(found) == pytest.approx(by_hand, abs=1e-4)


def test_a_share_of_merged_tokens_out_of_range_is_refused() -> None:
    for merged in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"merged must be in \[0, 1\)"):
            VisionZip(merged)


# -- smaller images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHRINKING)
def test_a_smaller_image_is_asked_about_as_if_it_had_been_small(kind: str) -> None:
    """All of the batch, ids, places and all, is that of encoding smaller images from the start."""
    vlm = make(kind)
    shown = examples(3)
    encoded = vlm.encode(shown)
    full = encoded.token_mask.sum(1).tolist()
    kept = [full[0], 5, 1]
    result = replace(downsampled_image, vlm, encoded, kept)
    small = vlm.family.shrunk([example.image for example in shown], kept)
    assert result.selection.sum(1).tolist() == [len(picture.tokens) for picture in small]
    assert (result.selection.sum(1) <= torch.tensor(kept)).all()
    pictures = iter(small)
    vlm.family.pictures = lambda images: [next(pictures) for _ in images]  # type: ignore[method-assign]
    expected = vlm.encode(shown)
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert value.equal(getattr(result.encoded, name)), name
    scores = vlm.score(result.encoded, result.selection[:, None])
    assert torch.isfinite(scores.log_likelihood).all()
    alone = vlm.score(encoded[:1], encoded[:1].full_selection())  # an image that is not made smaller
    torch.testing.assert_close(scores.log_likelihood[:1], alone.log_likelihood, atol=1e-4, rtol=0)


# -- what holds for both ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPLACERS)
def test_replacers_are_deterministic_batch_free_and_leave_the_batch_alone(name: str, llava: HuggingFaceVLM) -> None:
    replacer = REPLACERS[name]
    assert isinstance(replacer, Replacer)
    shown = examples(4)
    encoded = llava.encode(shown)
    before = {key: value.clone() for key, value in vars(encoded).items() if isinstance(value, torch.Tensor)}
    kept = [4, 9, 1, 30]
    together = replace(replacer, llava, encoded, kept)
    assert together.encoded.tokens.equal(replace(replacer, llava, encoded, kept).encoded.tokens)
    assert all(value.equal(getattr(encoded, key)) for key, value in before.items())
    scores = llava.score(together.encoded, together.selection[:, None])
    for row, count in enumerate(kept):
        alone = replace(replacer, llava, encoded[[row]], [count])
        used = int(alone.selection.sum())
        assert used == int(together.selection[row].sum()) <= count
        torch.testing.assert_close(together.encoded.tokens[row, :used], alone.encoded.tokens[0], atol=1e-4, rtol=1e-4)
        single = llava.score(alone.encoded, alone.selection[:, None])
        torch.testing.assert_close(scores.log_likelihood[row], single.log_likelihood[0], atol=1e-4, rtol=0)
    assert llava.generate(together.encoded, together.selection[:, None], 2)
    assert scores.correct.dtype == torch.bool
    assert scores.kept.tolist() == [[1.0]] * 4


@pytest.mark.parametrize("name", REPLACERS)
def test_flat_images_make_no_nans(name: str, random_vlm: HuggingFaceVLM) -> None:
    shown = [Example(np.full((96, 96, 3), value, np.uint8), "is there a red ring?", "no") for value in (0, 255)]
    encoded = random_vlm.encode(shown)
    for kept in ([1, 2], [14, 72], [144, 143]):
        result = replace(REPLACERS[name], random_vlm, encoded, kept)
        assert torch.isfinite(result.encoded.tokens).all()
        assert torch.isfinite(random_vlm.score(result.encoded, result.selection[:, None]).log_likelihood).all()


@pytest.mark.parametrize("name", REPLACERS)
def test_replacers_work_without_answers(name: str, llava: HuggingFaceVLM) -> None:
    encoded = llava.encode(examples(2), with_answers=False)
    result = replace(REPLACERS[name], llava, encoded, [3, 5])
    assert not result.encoded.answer_lengths.any()
    assert len(llava.generate(result.encoded, result.selection[:, None], 2)) == 2


@pytest.mark.parametrize("name", REPLACERS)
def test_counts_out_of_range_and_unknown_images_are_refused(name: str, llava: HuggingFaceVLM) -> None:
    encoded = llava.encode(examples(2))
    for kept in ([0, 3], [3, 37]):
        with pytest.raises(ValueError, match=rf"cannot make \[{kept[0]}, {kept[1]}\] tokens of images with \[36, 36\]"):
            replace(REPLACERS[name], llava, encoded, kept)
    blind = dataclasses.replace(
        encoded, examples=[dataclasses.replace(one, image=np.zeros((0, 0, 3), np.uint8)) for one in encoded.examples]
    )
    with pytest.raises(ValueError, match="on the images again"):
        replace(REPLACERS[name], llava, blind, [1, 1])


@pytest.mark.parametrize("name", REPLACERS)
def test_models_that_take_no_new_tokens_are_refused(name: str, random_vlm: HuggingFaceVLM) -> None:
    task = FakeTask()
    for vlm in (FakeVLM(), BlockVLM(random_vlm)):
        encoded = vlm.encode([task.example("train", 0)])
        with pytest.raises(NotImplementedError, match=rf"takes a HuggingFaceVLM; got a {type(vlm).__name__}"):
            replace(REPLACERS[name], vlm, encoded, [1])


def test_visionzip_needs_a_cls_token() -> None:
    vlm = make("qwen2_vl")
    with pytest.raises(NotImplementedError, match="qwen2_vl has no CLS attention"):
        replace(VisionZip(), vlm, vlm.encode(examples(1)), [2])


def test_budgets_of_the_embedded_model_are_used_up_but_for_whole_rows(
    random_vlm: HuggingFaceVLM, scene_examples: list[Example]
) -> None:
    encoded = random_vlm.encode(scene_examples[:1])
    used = {}
    for budget in (0.03, 0.05, 0.1, 0.2, 0.5, 1.0):
        kept = budget_to_count(encoded, budget)
        result = downsampled_image(random_vlm, encoded, kept, torch.Generator())
        used[int(kept)] = int(result.selection.sum())
    assert used == {4: 4, 7: 6, 14: 12, 29: 25, 72: 72, 144: 144}
    assert all(count >= math.isqrt(kept) ** 2 for kept, count in used.items())

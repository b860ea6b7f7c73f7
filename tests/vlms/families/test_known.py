"""Every family against its own processor and its own full sequence, on tiny models of all of them."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grip_env.tasks.base import Example
from grip_env.vlms import load_vlm
from grip_env.vlms.base import Encoded
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.vlms import tiny_models

SIZES = ((40, 64), (90, 50))
KEPT = (0, 1, 5, 12)
QUESTIONS = ("is there a red circle?", "what color is the square?")
ANSWERS = ("yes", "it is blue", "left", "no three")


def make(kind: str, **options: Any) -> HuggingFaceVLM:
    model, processor = tiny_models.build(kind)
    if kind == "gemma3":
        model.config.text_config.sliding_window = 1000  # what dropping does within a short one is tested below
    return HuggingFaceVLM(model, processor, kind, **options)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def vlm(request: pytest.FixtureRequest) -> HuggingFaceVLM:
    return make(str(request.param))


def image(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(sum(size) + seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def examples(count: int = 4) -> list[Example]:
    """Pictures of both sizes in turn, questions and answers of several lengths."""
    return [Example(image(SIZES[row % 2], row // 2), QUESTIONS[row % 2], ANSWERS[row % 4]) for row in range(count)]


def subsets(encoded: Encoded, sizes: tuple[int, ...] = KEPT, seed: int = 0) -> torch.Tensor:
    """Random selections of the given sizes, and all tokens: bool (B, len(sizes) + 1, N)."""
    batch, tokens = encoded.token_mask.shape
    luck = torch.rand(batch, len(sizes), tokens, generator=torch.Generator().manual_seed(seed))
    rank = luck.masked_fill(~encoded.token_mask[:, None], 2).argsort(-1).argsort(-1)
    return torch.cat([rank < torch.tensor(sizes)[:, None], encoded.full_selection()], 1)


def process(vlm: HuggingFaceVLM, example: Example) -> dict[str, torch.Tensor]:
    """Return what the family's own processor makes of an example's image and question."""
    text = tiny_models.prompt(vlm.processor, example.question)
    bos = vlm.processor.tokenizer.bos_token
    special = bos is None or not text.startswith(bos)
    with tiny_models.stand_ins(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # of PaliGemma's labels
        inputs = vlm.processor(text=text, images=example.image, return_tensors="pt", add_special_tokens=special)
    return {key: value for key, value in inputs.items() if key != "labels"}


def full_sequence(
    vlm: HuggingFaceVLM, example: Example, more: list[int], keep: torch.Tensor | None = None, reindex: bool = False
) -> torch.Tensor:
    """Run processor and model on the whole sequence, dropped tokens hidden from attention: logits (L, V).

    Args:
        vlm: The model.
        example: Its image and question.
        more: Ids after the prompt.
        keep: Which visual tokens attention may see; ``None`` leaves everything to the model.
        reindex: Positions count what may be seen.
    """
    inputs = process(vlm, example)
    tail = torch.tensor([more], dtype=torch.long)
    inputs["input_ids"] = ids = torch.cat([inputs["input_ids"], tail], 1)
    kind = vlm.model.config.model_type
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            # PaliGemma: the answer, type 1, sees only what came before it
            inputs[key] = torch.cat([inputs[key], torch.full_like(tail, int(kind == "paligemma"))], 1)
    inputs["attention_mask"] = torch.ones_like(ids)
    if keep is not None:
        inputs["attention_mask"][ids == vlm.model.config.image_token_id] = keep.long()
        if kind.startswith("qwen"):
            places, _ = vlm.model.model.get_rope_index(
                ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
            )
        else:
            count = inputs["attention_mask"] if reindex else torch.ones_like(ids)
            places = count.cumsum(1) - int(kind != "paligemma")
        inputs["position_ids"] = places.clamp_min(0)
    with torch.no_grad():
        return vlm.model(**inputs, use_cache=False).logits[0]


def answer_logits(vlm: HuggingFaceVLM, encoded: Encoded, selection: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits that predict the answer under each selection: B * G tensors (T, V)."""
    found: dict[int, torch.Tensor] = {}
    for rows, logits, targets in vlm._answers(encoded, selection, encoded.tokens):
        for row, values, real in zip(rows.tolist(), logits, targets != -100, strict=True):
            found[row] = values[real]
    return [found[row] for row in range(len(found))]


def answer_ids(encoded: Encoded, row: int) -> list[int]:
    end = int(encoded.lengths[row])
    return encoded.input_ids[row, end - int(encoded.answer_lengths[row]) : end].tolist()


# -- what goes in ----------------------------------------------------------------------------------------


def test_prompts_and_tokens_are_those_of_the_familys_own_processor(vlm: HuggingFaceVLM) -> None:
    batch = examples()
    encoded = vlm.encode(batch)
    names = inspect.signature(vlm.model.model.get_image_features).parameters
    for row, example in enumerate(batch):
        inputs = process(vlm, example)
        prompt = encoded.input_ids[row, : int(encoded.lengths[row] - encoded.answer_lengths[row])]
        assert prompt.tolist() == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            output = vlm.model.model.get_image_features(
                **{key: value for key, value in inputs.items() if key in names}, return_dict=True
            )
        pooled = output.pooler_output
        expected = pooled.flatten(0, 1) if isinstance(pooled, torch.Tensor) else torch.cat(list(pooled))
        assert int(encoded.token_mask[row].sum()) == len(expected)
        torch.testing.assert_close(encoded.tokens[row, : len(expected)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_lit_patch_lights_the_token_of_its_place(kind: str) -> None:
    """Of all tokens, the one that changes most is where the picture changed (or as near as its grid allows)."""
    vlm = make(kind)
    with torch.no_grad():  # layers that hardly move anything from place to place
        for name, weight in vlm.model.model.named_parameters():
            if "vision" in name or "visual" in name:
                weight.mul_(0.05 if "layers." in name or "blocks." in name else 1.0)
    for height, width in ((48, 48), (48, 96), (96, 48)):
        dark = np.full((height, width, 3), 90, dtype=np.uint8)
        places = [(row, column) for row in (0.17, 0.5, 0.83) for column in (0.17, 0.5, 0.83)]
        if kind == "llava":  # which sees the middle square only
            middle = min(height, width)
            places = [
                (0.5 + (row - 0.5) * middle / height, 0.5 + (column - 0.5) * middle / width) for row, column in places
            ]
        lit = []
        for row, column in places:
            picture = dark.copy()
            top, left = round(row * height), round(column * width)
            picture[top - 4 : top + 4, left - 4 : left + 4] = 255
            lit.append(picture)
        encoded = vlm.encode([Example(picture, "what is it?", "yes") for picture in [dark, *lit]])
        change = (encoded.tokens[1:] - encoded.tokens[0]).norm(dim=-1)  # (places, N)
        found = encoded.positions[0, change.argmax(-1)]
        gap = (found - torch.tensor(places)).abs().amax()
        assert gap <= 0.17, f"{(height, width)}: {list(zip(places, found.tolist(), strict=True))}"


def test_positions_fill_the_picture_and_newlines_are_at_its_rim(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples(2))
    for row in range(2):
        places = encoded.positions[row, encoded.token_mask[row]]
        assert places.min() >= 0
        assert places.max() <= 1
        assert len({tuple(place) for place in places.round(decimals=4).tolist()}) > len(places) / 2
        if vlm.model.config.model_type != "llava":
            assert (places.mean(0) - 0.5).abs().max() < 0.12


# -- the oracle ------------------------------------------------------------------------------------------


def test_dropping_tokens_equals_masking_them_in_the_full_sequence(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    selection = subsets(encoded)
    found = answer_logits(vlm, encoded, selection)
    differences = []
    for row, example in enumerate(encoded.examples):
        more = answer_ids(encoded, row)
        for column in range(selection.shape[1]):
            keep = selection[row, column, encoded.token_mask[row]]
            logits = full_sequence(vlm, example, more, keep)[-1 - len(more) : -1]
            torch.testing.assert_close(found[row * selection.shape[1] + column], logits, atol=1e-4, rtol=0)
        differences.append((found[row * selection.shape[1]] - found[(row + 1) * selection.shape[1] - 1]).abs().max())
    assert min(differences) > 0.01, "selections must matter, or this shows nothing"


def test_first_token_is_what_the_masked_prompt_predicts_whatever_the_answer(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    selection = subsets(encoded)
    found = vlm.score(encoded, selection, first_token=True).first_token
    assert found is not None
    for row, example in enumerate(encoded.examples):
        for column in range(selection.shape[1]):
            prompt = full_sequence(vlm, example, [], selection[row, column, encoded.token_mask[row]])
            torch.testing.assert_close(found[row, column], prompt[-1].log_softmax(-1), atol=1e-4, rtol=0)


def test_keeping_everything_equals_the_untouched_model(vlm: HuggingFaceVLM) -> None:
    for example in examples():
        encoded = vlm.encode([example])
        more = answer_ids(encoded, 0)
        (found,) = answer_logits(vlm, encoded, encoded.full_selection())
        expected = full_sequence(vlm, example, more)[-1 - len(more) : -1]
        # not to the last bit: the whole sequence has the answer's last id as well, whose column nothing is read from
        torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-6)


def test_reindexed_positions_count_what_is_kept(vlm: HuggingFaceVLM) -> None:
    kind = vlm.model.config.model_type
    if kind.startswith("qwen"):
        with pytest.raises(ValueError, match=f"'reindex' has no meaning for {kind}"):
            HuggingFaceVLM(vlm.model, vlm.processor, position_policy="reindex")
        return
    other = HuggingFaceVLM(vlm.model, vlm.processor, position_policy="reindex")
    encoded = other.encode(examples(2))
    selection = subsets(encoded, (6,))
    found = answer_logits(other, encoded, selection)
    for row, example in enumerate(encoded.examples):
        more = answer_ids(encoded, row)
        keep = selection[row, 0, encoded.token_mask[row]]
        logits = full_sequence(vlm, example, more, keep, reindex=True)[-1 - len(more) : -1]
        torch.testing.assert_close(found[2 * row], logits, atol=1e-4, rtol=0)
    assert other.generate(encoded, encoded.full_selection(), 4) == vlm.generate(encoded, encoded.full_selection(), 4)


def test_generation_equals_decoding_step_by_step(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples(2))
    selection = subsets(encoded, (0, 7))
    ends = vlm.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    longest = 0
    for row, texts in enumerate(vlm.generate(encoded, selection, max_new_tokens=4)):
        for column, text in enumerate(texts):
            keep = selection[row, column, encoded.token_mask[row]]
            new: list[int] = []
            while len(new) < 4 and not (new and new[-1] in [*ends, vlm.family.image_token_id]):
                new.append(int(full_sequence(vlm, encoded.examples[row], new, keep)[-1].argmax()))
            longest = max(longest, len(new))
            expected = vlm.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
            if new[-1] == vlm.family.image_token_id:  # random weights may say it; the full sequence cannot go on then
                assert text.startswith(expected)
            else:
                assert text == expected
    assert longest > 1


# -- batches ---------------------------------------------------------------------------------------------


def test_mixed_pictures_and_budgets_score_as_each_would_alone(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    selection = subsets(encoded)
    together = vlm.score(encoded, selection)
    few = HuggingFaceVLM(vlm.model, vlm.processor, token_budget=150).score(encoded, selection)
    torch.testing.assert_close(few.log_likelihood, together.log_likelihood, atol=1e-4, rtol=0)
    for row, example in enumerate(encoded.examples):
        alone = vlm.encode([example])
        count = alone.tokens.shape[1]
        torch.testing.assert_close(alone.tokens[0], encoded.tokens[row, :count], atol=1e-4, rtol=0)
        for column in range(selection.shape[1]):
            one = vlm.score(alone, selection[row : row + 1, column : column + 1, :count])
            torch.testing.assert_close(
                one.log_likelihood[0, 0], together.log_likelihood[row, column], atol=1e-4, rtol=0
            )


def test_batches_can_be_cut_and_joined(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples())
    parts = [vlm.encode(encoded.examples[:2]), vlm.encode(encoded.examples[2:])]
    joined = Encoded.concatenate(parts)
    selection = subsets(encoded)
    expected = vlm.score(encoded, selection).log_likelihood
    for other in (joined, encoded[[3, 2, 1, 0]][[3, 2, 1, 0]]):
        found = vlm.score(other, selection).log_likelihood
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_gradients_reach_the_tokens(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples(2))
    tokens = encoded.tokens.clone().requires_grad_()
    selection = subsets(encoded, (7,))[:, :1]
    vlm.log_likelihood(encoded, selection, tokens).sum().backward()
    assert tokens.grad is not None
    reached = tokens.grad.abs().sum(-1) > 0
    assert reached.equal(selection[:, 0])


# -- from a folder, and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_saved_model_loads_by_its_path_and_scores_alike(kind: str, tmp_path: Path) -> None:
    vlm = load_vlm(tiny_models.save(kind, tmp_path / kind))
    expected = HuggingFaceVLM(*tiny_models.build(kind))
    for one in (vlm, expected):
        if kind == "gemma3":
            one.model.config.text_config.sliding_window = 1000
    encoded = vlm.encode(examples(2))
    assert encoded.input_ids.equal(expected.encode(examples(2)).input_ids)
    selection = subsets(encoded)
    found = vlm.score(encoded, selection).log_likelihood
    torch.testing.assert_close(
        found, expected.score(expected.encode(examples(2)), selection).log_likelihood, atol=1e-5, rtol=0
    )


def test_questions_with_placeholders_are_refused(vlm: HuggingFaceVLM) -> None:
    (example,) = examples(1)
    for question in (f"what is {vlm.family.marker}?", f"{vlm.family.marker}{vlm.family.marker}"):
        with pytest.raises(ValueError, match=r"exactly one image placeholder .* ask about one image"):
            vlm.encode([dataclasses.replace(example, question=question)])
    with pytest.raises(ValueError, match="holds an image placeholder: give an answer in words"):
        vlm.encode([dataclasses.replace(example, answer=f"a {vlm.family.image_token}")])


def test_sequences_longer_than_a_sliding_window_are_refused() -> None:
    vlm = HuggingFaceVLM(*tiny_models.build("gemma3"))
    with pytest.raises(ValueError, match=r"have \d+ tokens, more than the sliding window of 16"):
        vlm.encode(examples(1))


def test_cls_attention_is_there_or_refused(vlm: HuggingFaceVLM) -> None:
    encoded = vlm.encode(examples(2))
    if vlm.model.config.model_type == "llava":
        scores = vlm.attention(encoded)
        assert scores.shape == encoded.token_mask.shape
        assert (scores > 0).all()
    else:
        with pytest.raises(NotImplementedError, match=f"{vlm.model.config.model_type} has no CLS attention"):
            vlm.attention(encoded)


def test_texts_that_hold_what_stands_for_an_image_are_refused(vlm: HuggingFaceVLM) -> None:
    for marker in {vlm.family.marker, vlm.family.image_token}:
        with pytest.raises(ValueError, match=r"holds '.*', which stands for an image in this model's prompts"):
            vlm.family.check_text(f"what is {marker}?")
        with pytest.raises(ValueError, match="image placeholder"):  # why it is checked beforehand
            vlm.encode([dataclasses.replace(examples(1)[0], question=f"what is {marker}?")])
    vlm.family.check_text("what is an image?")

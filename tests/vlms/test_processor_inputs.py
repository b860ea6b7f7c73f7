"""``generate`` on what a family's own processor made: as the model's own, and as the pruner's other calls."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from agents.pruner import Pruner
from agents.scorer import Scorer, ScorerConfig
from agents.selectors import ScorerSelector
from grip_env.tasks.base import Example
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.processor_inputs import encode_inputs, split_inputs
from tests.vlms import tiny_models
from tests.vlms.families.test_known import examples, make

NEW = 5


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pruner(request: pytest.FixtureRequest) -> Pruner:
    vlm = make(str(request.param))
    torch.manual_seed(0)
    scorer = Scorer(ScorerConfig(token_width=vlm.width, width=16, heads=2)).eval()
    torch.nn.init.normal_(scorer.out[1].weight)  # type: ignore[arg-type]
    return Pruner(vlm, ScorerSelector(scorer))


def process(pruner: Pruner, batch: list[Example], **options: Any) -> dict[str, Any]:
    """Return what the family's processor makes of several images and questions, padded on the left."""
    processor = pruner.vlm.processor
    texts = [tiny_models.prompt(processor, example.question) for example in batch]
    bos = processor.tokenizer.bos_token
    images: Any = [example.image for example in batch]
    if pruner.vlm.model.config.model_type in ("smolvlm", "idefics3", "gemma3"):
        images = [[image] for image in images]
    with tiny_models.stand_ins(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        inputs = processor(
            text=texts,
            images=images,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=bos is None or not texts[0].startswith(bos),
            **options,
        )
    return dict(inputs)


def sizes(batch: list[Example]) -> list[tuple[int, int]]:
    return [(example.image.shape[0], example.image.shape[1]) for example in batch]


def test_a_full_budget_generates_what_the_model_does(pruner: Pruner) -> None:
    batch = examples(2)
    inputs = process(pruner, batch)
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [pruner.vlm.family.image_token_id]}
    with torch.no_grad():
        expected = pruner.vlm.model.generate(**inputs, **options)
    found = pruner.generate(**inputs, **options, budget=1.0, sizes=sizes(batch))
    assert found.tolist() == expected.tolist()
    assert found.shape[1] > inputs["input_ids"].shape[1]


def test_questions_places_and_tokens_are_those_of_images_and_texts(pruner: Pruner) -> None:
    batch = examples(2)
    text, images, rest = split_inputs(process(pruner, batch))
    assert not rest
    found = encode_inputs(pruner.vlm, text, images, sizes(batch))
    expected = pruner.vlm.encode(batch, with_answers=False)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert [example.question for example in found.examples] == [example.question for example in batch]
    torch.testing.assert_close(found.question, expected.question)
    torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.positions, expected.positions)
    if found.cells is not None and expected.cells is not None:
        torch.testing.assert_close(found.cells, expected.cells)


def test_mixed_budgets_in_a_padded_batch_generate_as_each_prompt_alone(pruner: Pruner) -> None:
    batch, budgets = examples(3), [0.6, 0.2, 0.4]
    inputs = process(pruner, batch)
    options = {"max_new_tokens": NEW, "do_sample": False}
    together = pruner.generate(**inputs, **options, budget=budgets, sizes=sizes(batch))
    length = inputs["input_ids"].shape[1]
    assert together[:, :length].equal(inputs["input_ids"]), "the prompts come back as they were given"
    decode = pruner.vlm.processor.tokenizer.batch_decode
    texts = [text.strip() for text in decode(together[:, length:], skip_special_tokens=True)]
    for row, example in enumerate(batch):
        single = process(pruner, [example])
        alone = pruner.generate(**single, **options, budget=budgets[row], sizes=sizes([example]))
        (text,) = decode(alone[:, single["input_ids"].shape[1] :], skip_special_tokens=True)
        assert texts[row] == text.strip()
        selection = pruner.select(encode_inputs(pruner.vlm, *split_inputs(single)[:2], sizes([example])), budgets[row])
        assert int(selection.sum()) == round(budgets[row] * selection.shape[1])
        encoded = pruner.vlm.encode([example], with_answers=False)
        assert pruner.vlm.generate(encoded, selection[:, None], NEW) == [[text.strip()]]


def test_options_of_generate_pass_through(pruner: Pruner) -> None:
    batch = examples(1)
    inputs = process(pruner, batch)
    length = inputs["input_ids"].shape[1]
    common = {"budget": 0.3, "sizes": sizes(batch), "do_sample": False, "min_new_tokens": 2}
    plain = pruner.generate(**inputs, **common, max_new_tokens=3)
    assert pruner.generate(**inputs, **common, max_length=length + 3).equal(plain)
    full = pruner.generate(**inputs, **common, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert full.sequences.equal(plain)
    assert len(full.logits) == plain.shape[1] - length
    torch.manual_seed(0)
    sampled = [pruner.generate(**inputs, **common | {"do_sample": True}, max_new_tokens=3) for _ in range(8)]
    assert len({tuple(row[0].tolist()) for row in sampled}) > 1


def test_misuse_is_refused(pruner: Pruner) -> None:
    batch = examples(2)
    inputs = process(pruner, batch)
    known = sizes(batch)
    for change, message in (
        ({"pixel_values": None}, "pixel_values is missing"),
        ({"pixel_values_videos": torch.zeros(1)}, "videos are not supported"),
        ({"num_beams": 2}, "num_beams=2 is not supported"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2 is not supported"),
        ({"generation_config": GenerationConfig(num_return_sequences=3, do_sample=True)}, "num_return_sequences=3"),
        ({"attention_mask": None}, "prompts are padded: give attention_mask"),
        ({"max_new_tokens": None, "max_length": 5}, "max_length=5 leaves no room after a prompt of"),
        ({"budget": 0.0}, "share of the visual tokens"),
        ({"budget": [0.1]}, "1 budgets for 2 images"),
        ({"budget": np.array([0.1, 0.2, 0.3])}, "3 budgets for 2 images"),
        ({"sizes": known[:1]}, "1 sizes for 2 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner.generate(**{"sizes": known, "max_new_tokens": 1, **inputs, **change})


def test_two_images_in_a_prompt_are_refused() -> None:
    vlm = make("llava")
    inputs = {
        "input_ids": torch.full((1, 72), vlm.family.image_token_id),
        "pixel_values": torch.zeros(2, 3, 48, 48),
    }
    pruner = Pruner(vlm, ScorerSelector(Scorer(ScorerConfig(token_width=vlm.width))))
    with pytest.raises(ValueError, match=r"visual tokens and the images \[36, 36\]: give exactly one image"):
        pruner.generate(**inputs, max_new_tokens=1)
    with pytest.raises(ValueError, match="2 images and 1 sizes"):
        pruner.generate(**inputs, sizes=[(48, 48)], max_new_tokens=1)


def test_prompts_with_two_images_or_none_are_refused(pruner: Pruner) -> None:
    (example,) = examples(1)
    text, images, _ = split_inputs(process(pruner, [example]))
    ids = text["input_ids"]
    twice = torch.cat([ids, ids], 1)
    without = ids[ids != pruner.vlm.family.image_token_id][None]
    if pruner.vlm.model.config.model_type in ("smolvlm", "idefics3"):
        without = without[:, -3:]
    for changed, count in ((twice, 2), (without, 0)):
        with pytest.raises(ValueError, match=rf"the prompts have \[{count}\] images: give exactly one image"):
            encode_inputs(pruner.vlm, {"input_ids": changed}, images, sizes([example]))


def test_lengths_count_the_prompt_as_it_was_given(pruner: Pruner) -> None:
    batch = examples(1)
    inputs = process(pruner, batch)
    length = inputs["input_ids"].shape[1]
    family = pruner.vlm.family
    common = {"sizes": sizes(batch), "do_sample": False, "suppress_tokens": [family.image_token_id]}
    for budget in (0.2, 1.0):
        config = GenerationConfig(
            max_length=length + 4, min_length=length + 4, pad_token_id=family.tokenizer.pad_token_id
        )
        for options in ({"max_length": length + 4, "min_length": length + 4}, {"generation_config": config}):
            found = pruner.generate(**inputs, **common, **options, budget=budget)
            assert found.shape[1] == length + 4


def test_what_stands_before_the_image_is_no_question(pruner: Pruner) -> None:
    """Instructions before the image are the same whatever is asked; a prompt without question is taken too."""
    vlm = pruner.vlm
    (example,) = examples(1)
    inputs = process(pruner, [example])
    ids = inputs["input_ids"]
    first = int((ids[0] == vlm.family.image_token_id).nonzero()[0])
    words = torch.tensor([vlm.family.tokenizer.encode("what is it?", add_special_tokens=False)])
    images = split_inputs(inputs)[1]
    other = torch.cat([ids[:, : min(first, 1)], words, ids[:, min(first, 1) :]], 1)
    assert encode_inputs(vlm, {"input_ids": other}, images, sizes([example])).examples[0].question == example.question
    silent = process(pruner, [Example(example.image, "", "")])
    found = pruner.generate(**silent, sizes=sizes([example]), budget=0.2, max_new_tokens=2)
    assert found.shape[1] > silent["input_ids"].shape[1]
    assert pruner(example.image, "", budget=0.2, max_new_tokens=2).kept.sum() >= 1


def test_beams_of_the_models_own_settings_do_not_mix_up_pictures(pruner: Pruner) -> None:
    batch = examples(2)
    images, questions = [one.image for one in batch], [one.question for one in batch]
    expected = pruner.answers(images, questions, 0.5, 3)
    settings = pruner.vlm.model.generation_config
    settings.num_beams = 2
    try:
        assert pruner.answers(images, questions, 0.5, 3) == expected
        assert pruner(images[0], questions[0], 0.5, 3).text == expected[0]
        with pytest.raises(ValueError, match="num_beams=2 is not supported: pass num_beams=1"):
            pruner.generate(**process(pruner, batch), sizes=sizes(batch), max_new_tokens=1)
    finally:
        settings.num_beams = 1


def test_tiles_of_internvl_need_the_size_of_the_image() -> None:
    vlm = make("internvl")
    pruner = Pruner(vlm, ScorerSelector(Scorer(ScorerConfig(token_width=vlm.width))))
    (example,) = [one for one in examples(2) if one.image.shape[0] == 90]
    with pytest.raises(ValueError, match=r"does not tell how the \d+ tiles .* sizes=\[\(height, width\)\]"):
        pruner.generate(**process(pruner, [example]), max_new_tokens=1)


def test_attention_of_unknown_images_is_refused() -> None:
    vlm = make("llava")
    pruner = Pruner(vlm, ScorerSelector(Scorer(ScorerConfig(token_width=vlm.width))))
    text, images, _ = split_inputs(process(pruner, examples(1)))
    with pytest.raises(ValueError, match="on the images again"):
        vlm.attention(encode_inputs(vlm, text, images))


def test_the_picture_is_covered_by_the_cells_of_each_view(pruner: Pruner) -> None:
    """What tokens show adds up to whole pictures: one for the whole image, one for its tiles."""
    encoded = pruner.vlm.encode(examples(2))
    tiled = pruner.vlm.model.config.model_type in (
        "llava_next",
        "llava_onevision",
        "smolvlm",
        "idefics3",
        "internvl",
    )
    assert (encoded.cells is not None) == tiled
    if encoded.cells is None:
        return
    for row in range(2):
        real = encoded.token_mask[row]
        cells, centres = encoded.cells[row][real], encoded.positions[row][real]
        shown = np.zeros((240, 240))
        for (height, width), (down, right) in zip(cells.tolist(), centres.tolist(), strict=True):
            top, left = round((down - height / 2) * 240), round((right - width / 2) * 240)
            shown[max(top, 0) : round((down + height / 2) * 240), max(left, 0) : round((right + width / 2) * 240)] += 1
        inner = shown[24:-24, 24:-24]
        views = 2 if len({tuple(cell) for cell in cells[cells.prod(1) > 0].round(decimals=4).tolist()}) > 1 else 1
        assert abs(inner.mean() - views) < 0.1

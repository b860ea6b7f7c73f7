"""The question in a chat of several turns: the user's last, in all families and with the embedded model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from agents.pruner import Pruner
from grip_env.tasks.base import Example
from grip_env.vlms import load_vlm
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.huggingface import HuggingFaceVLM
from grip_env.vlms.processor_inputs import encode_inputs, split_inputs
from tests.vlms import tiny_models
from tests.vlms.families.test_known import examples, make

CHATTY = sorted(set(FAMILIES) - {"paligemma"})
FIRST, ANSWER, LAST = "is there a circle?", "yes, red", "how many squares are left of it?"


def chat(vlm: HuggingFaceVLM, turns: list[tuple[str, str]], image: int = 0, image_last: bool = False) -> str:
    """Write a chat with the image in the given turn, before the turn's text or behind it."""
    messages: list[dict[str, Any]] = []
    for number, (role, text) in enumerate(turns):
        parts = [{"type": "text", "text": text}] if text else []
        if number == image:
            parts = [*parts, {"type": "image"}] if image_last else [{"type": "image"}, *parts]
        messages.append({"role": role, "content": parts})
    text = vlm.processor.tokenizer.apply_chat_template(
        messages, chat_template=vlm.processor.chat_template, add_generation_prompt=True, tokenize=False
    )
    return str(text)


def asked(vlm: HuggingFaceVLM, text: str, example: Example) -> tuple[str, torch.Tensor]:
    """Return the question that is seen in a prompt, and its embeddings."""
    if not callable(vlm.processor):  # as models are loaded: parts alone
        runs = text.replace(vlm.family.image_token, vlm.family.image_token * 144)
        ids = vlm.family.tokenizer(runs, add_special_tokens=False, return_tensors="pt")["input_ids"]
        encoded = encode_inputs(vlm, {"input_ids": ids}, vlm.family.pixels([example.image]))
        return encoded.examples[0].question, encoded.question
    images: Any = [example.image]
    if vlm.model.config.model_type in ("smolvlm", "idefics3", "gemma3"):
        images = [images]
    with tiny_models.stand_ins(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        bos = vlm.processor.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        inputs = vlm.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=special)
    parts = split_inputs({key: value for key, value in inputs.items() if key != "labels"})
    encoded = encode_inputs(vlm, *parts[:2], [example.image.shape[:2]])  # type: ignore[list-item]
    return encoded.examples[0].question, encoded.question


@pytest.fixture(scope="module", params=CHATTY)
def vlm(request: pytest.FixtureRequest) -> HuggingFaceVLM:
    return make(str(request.param))


def expected(vlm: HuggingFaceVLM, question: str, example: Example) -> torch.Tensor:
    return vlm.encode([Example(example.image, question, "")], with_answers=False).question


def test_the_question_is_the_users_last_turn(vlm: HuggingFaceVLM) -> None:
    (example,) = examples(1)
    long = [("user", FIRST), ("assistant", ANSWER), ("user", "and a blue one?"), ("assistant", "no"), ("user", LAST)]
    for turns, image in (
        ([("user", LAST)], 0),
        ([("user", FIRST), ("assistant", ANSWER), ("user", LAST)], 0),
        ([("user", ""), ("assistant", ANSWER), ("user", LAST)], 0),
        ([("user", FIRST), ("assistant", ANSWER), ("user", LAST)], 2),
        (long, 0),
        (long, 2),
        (long, 4),
        ([("system", "you are a helpful assistant"), ("user", FIRST), ("assistant", ANSWER), ("user", LAST)], 1),
    ):
        question, embedded = asked(vlm, chat(vlm, turns, image), example)
        assert question == LAST, turns
        torch.testing.assert_close(embedded, expected(vlm, LAST, example), atol=0, rtol=0)


def test_an_image_behind_the_last_text_does_not_hide_it(vlm: HuggingFaceVLM) -> None:
    (example,) = examples(1)
    turns = [("user", FIRST), ("assistant", ANSWER), ("user", LAST)]
    assert asked(vlm, chat(vlm, turns, 2, image_last=True), example)[0] == LAST


def test_two_turns_of_the_user_on_end_have_the_last_as_question(vlm: HuggingFaceVLM) -> None:
    (example,) = examples(1)
    assert asked(vlm, chat(vlm, [("user", FIRST), ("user", LAST)]), example)[0] == LAST


def test_an_answer_that_has_begun_is_no_question(vlm: HuggingFaceVLM) -> None:
    (example,) = examples(1)
    for turns in ([("user", LAST)], [("user", FIRST), ("assistant", ANSWER), ("user", LAST)]):
        assert asked(vlm, chat(vlm, turns) + "there are two", example)[0] == LAST


def test_the_embedded_model_sees_the_last_turn_too() -> None:
    tiny = load_vlm("tiny")
    assert isinstance(tiny, HuggingFaceVLM)
    (example,) = examples(1)
    turns = [("user", FIRST), ("assistant", ANSWER), ("user", LAST)]
    assert asked(tiny, chat(tiny, turns), example)[0] == LAST
    odd = "what answer: is there?"
    assert asked(tiny, chat(tiny, [("user", odd)]), example)[0] == odd, "one turn is one question, whatever it says"


def test_an_agent_chooses_by_the_last_turn() -> None:
    pruner = Pruner.load("tiny")
    (example,) = examples(1)
    (alone,) = pruner.select(pruner.encode([example.image], [LAST]), 0.1)
    text = chat(pruner.vlm, [("user", FIRST), ("assistant", ANSWER), ("user", LAST)])
    inputs = pruner.vlm.processor.tokenizer(
        text.replace("<image>", "<image>" * 144), add_special_tokens=False, return_tensors="pt"
    )
    images = pruner.vlm.family.pixels([example.image])
    encoded = encode_inputs(pruner.vlm, {"input_ids": inputs["input_ids"]}, images)
    assert pruner.select(encoded, 0.1)[0].equal(alone)


@pytest.mark.parametrize("end", [False, True])
def test_an_end_within_a_prompt_is_no_padding(end: bool) -> None:
    """Llama-type tokenizers pad with the token that ends turns."""
    vlm = make("llava_next")
    (example,) = examples(1)
    tokenizer = vlm.processor.tokenizer
    usual = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    try:
        text = chat(vlm, [("user", FIRST), ("assistant", ANSWER), ("user", LAST)])
        text += tokenizer.eos_token * end
        images = vlm.family.pixels([example.image])
        with tiny_models.stand_ins():
            inputs = dict(vlm.processor(text=[text], images=[example.image], return_tensors="pt"))
        ids = inputs["input_ids"]
        assert (ids == tokenizer.pad_token_id).any()
        whole = encode_inputs(vlm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, inputs)
        assert encode_inputs(vlm, {"input_ids": ids}, inputs).input_ids.equal(whole.input_ids)
        twice = {key: torch.cat([value, value]) for key, value in inputs.items()}
        assert len(encode_inputs(vlm, {"input_ids": twice["input_ids"]}, twice)) == 2
        for padding in ((2, 0), (0, 2)):
            padded = torch.nn.functional.pad(ids, padding, value=tokenizer.pad_token_id)
            with pytest.raises(ValueError, match="prompts are padded: give attention_mask"):
                encode_inputs(vlm, {"input_ids": padded}, images)
        rows = torch.cat(
            [torch.nn.functional.pad(ids, (1, 0), value=tokenizer.pad_token_id), ids[:, [0, *range(ids.shape[1])]]]
        )
        with pytest.raises(ValueError, match="prompts are padded: give attention_mask"):
            encode_inputs(vlm, {"input_ids": rows}, twice)
    finally:
        tokenizer.pad_token = usual


def test_flash_attention_never_gets_a_mask_of_ones_for_one_row() -> None:
    """Which it drops, to read gaps between positions as packed sequences; tested on the mask, as it needs a GPU."""
    vlm = make("llava")
    (example,) = examples(1)
    encoded = vlm.encode([example])
    selection = encoded.full_selection()
    selection[:, :, ::2] = False
    stays, rows, _ = vlm._sequences(encoded, selection, encoded.lengths)
    plain = vlm._compact(encoded, stays, rows)
    assert bool(plain[1].all())
    text = vlm.model.config.get_text_config()
    usual = text._attn_implementation
    text._attn_implementation_internal = "flash_attention_2"
    try:
        for left in (False, True):
            ids, mask, places = vlm._compact(encoded, stays, rows, left)
            assert mask.sum() == mask.numel() - 1 == plain[1].numel()
            assert ids[mask].equal(plain[0][plain[1]])
            assert places[mask].equal(plain[2][plain[1]])
    finally:
        text._attn_implementation_internal = usual

"""Invented options and tensors for pruned generation: it ends right or says what is wrong."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from agents.pruner import Pruner
from tests.fuzz import fuzzed
from tests.vlms.families.test_known import examples
from tests.vlms.generation.test_decoding import pruner_of
from tests.vlms.test_processor_inputs import process

NAMES = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))
ARGUMENTS = ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "generation_config"]
OTHERS = [
    "tokenizer",
    "assistant_model",
    "past_key_values",
    "cache",
    "custom_generate",
    "position_ids",
    "beams",
    "budget",
]
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 30),
        st.sampled_from([10**9, 2**70, 0.0, 0.5, 1.0, 1.5, -1.0, float("nan"), float("inf"), "", "a", "static", "all"]),
        st.builds(object),
        st.builds(lambda: torch.ones(2)),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
OPTIONS = st.dictionaries(st.sampled_from([*NAMES, *ARGUMENTS, *OTHERS]), VALUES, max_size=3)
TENSORS = ["input_ids", "attention_mask", "pixel_values"]


@cache
def pruner() -> tuple[Pruner, dict[str, Any]]:
    found = pruner_of("llava")
    return found, process(found, examples(1))


def attempt(**changed: Any) -> None:
    found, inputs = pruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            output = found.generate(**{"budget": 0.2, "max_new_tokens": 3, **inputs, **changed})
        except ValueError:
            return
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    ids = changed.get("input_ids", inputs["input_ids"])
    assert sequences[:, : ids.shape[1]].equal(ids.to(sequences.dtype))


@fuzzed
@given(OPTIONS)
def test_options(options: dict[str, Any]) -> None:
    attempt(**options)


@fuzzed
@given(OPTIONS)
def test_saved_options(options: dict[str, Any]) -> None:
    found, _ = pruner()
    usual = found.vlm.model.generation_config
    saved = GenerationConfig(**usual.to_diff_dict())
    for name, value in options.items():
        if name in NAMES and name not in ("pad_token_id", "eos_token_id", "bos_token_id"):
            setattr(saved, name, value)
    found.vlm.model.generation_config = saved
    try:
        attempt()
        (example,) = examples(1)
        before = found(example.image, example.question, 0.2, 3).text
    finally:
        found.vlm.model.generation_config = usual
    assert found(example.image, example.question, 0.2, 3).text == before


@fuzzed
@given(st.one_of(VALUES, st.floats()))
def test_budgets(budget: Any) -> None:
    attempt(budget=budget)


@fuzzed
@given(st.sampled_from(TENSORS), st.data())
def test_tensors(name: str, data: st.DataObject) -> None:
    _, inputs = pruner()
    value: torch.Tensor = inputs[name]
    change = data.draw(st.sampled_from(["cut", "twice", "flat", "type", "values", "empty", "other", "longer"]))
    if change == "cut":
        axis = data.draw(st.integers(0, value.dim() - 1))
        value = value.narrow(axis, 0, data.draw(st.integers(0, value.shape[axis])))
    elif change in ("twice", "longer"):
        value = torch.cat([value, value], 0 if change == "twice" else -1)
    elif change == "flat":
        value = value.flatten() if data.draw(st.booleans()) else value[None]
    elif change == "type":
        value = value.to(
            data.draw(st.sampled_from([torch.int8, torch.int32, torch.float16, torch.float64, torch.bool]))
        )
    elif change == "values":
        value = value.clone()
        value.view(-1)[data.draw(st.integers(0, value.numel() - 1))] = data.draw(st.integers(-5, 500))
    elif change == "empty":
        value = value[:0]
    attempt(**{name: data.draw(VALUES) if change == "other" else value})


@fuzzed
@given(st.lists(st.integers(0, 340), min_size=1, max_size=12), st.integers(0, 12))
def test_prompts(words: list[int], place: int) -> None:
    found, _ = pruner()
    words = [word for word in words if word != found.vlm.family.image_token_id]
    ids = [*words[:place], *[found.vlm.family.image_token_id] * 36, *words[place:]]
    attempt(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
    attempt(input_ids=torch.tensor([ids]), attention_mask=None)

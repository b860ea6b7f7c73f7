"""The tiny models are what they claim to be: whole on disk, consistent with their processors, hard where it counts."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

from tests.vlms.tiny_models import FAMILIES, build, prompt, save, stand_ins

SIZES = ((40, 64), (90, 50))
TOKENS = {  # visual tokens, newlines included, of an image of each size
    "gemma3": (25, 25),
    "idefics3": (63, 63),  # 2 x 3 or 3 x 2 tiles and the whole image, 9 each
    "internvl": (63, 27),  # 2 x 3 or 2 x 1 tiles and a thumbnail, 9 each
    "llava": (36, 36),
    "llava_next": (16 + 6 * (8 + 1), 16 + 12 * (6 + 1)),
    "llava_onevision": (16 + 6 * (8 + 1), 16 + 9 * (4 + 1)),  # the second from 12 x 6
    "paligemma": (36, 36),
    "qwen2_5_vl": (4 * 6, 6 * 3),
    "qwen2_vl": (4 * 6, 6 * 3),
    "qwen3_vl": (4 * 6, 6 * 3),
    "smolvlm": (63, 63),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(kind: str) -> tuple[Any, Any]:
    """A model and its processor."""
    return build(kind)


def picture(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)


def ask(processor: Any, size: tuple[int, int], question: str = "is there a red circle?") -> dict[str, torch.Tensor]:
    """Return what the processor makes of a picture and a question."""
    text, bos = prompt(processor, question), processor.tokenizer.bos_token
    special = bos is None or not text.startswith(bos)
    with warnings.catch_warnings():  # transformers 5.23 makes PaliGemma's labels in a way that numpy 2 deprecates
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return dict(processor(text=text, images=picture(size), return_tensors="pt", add_special_tokens=special))


def features(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """Return what the model makes of the picture, given what the processor made of it."""
    names = inspect.signature(model.model.get_image_features).parameters
    with torch.no_grad():
        return model.model.get_image_features(
            **{name: value for name, value in inputs.items() if name in names}, return_dict=True
        )


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_saved_model_and_processor_come_back_without_a_warning(
    kind: str, pair: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = pair
    folder = save(kind, tmp_path / kind)
    caplog.set_level(logging.WARNING)
    transformers_logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with stand_ins():
                again = AutoProcessor.from_pretrained(folder)
            if is_torchvision_available():  # then it is what resizes, and to slightly other pixels
                again.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            loaded: Any = AutoModelForImageTextToText.from_pretrained(folder)
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.messages
    assert type(again) is type(processor)
    assert type(again.image_processor) is type(processor.image_processor)
    assert type(loaded) is type(model)
    assert loaded.config.model_type == kind
    inputs, expected = ask(again, SIZES[0]), ask(processor, SIZES[0])
    assert inputs.keys() == expected.keys()
    assert all(inputs[name].equal(expected[name]) for name in inputs)
    torch.testing.assert_close(run(loaded, inputs), run(model, expected), atol=1e-6, rtol=0)


def test_equal_seeds_give_equal_weights(kind: str, pair: tuple[Any, Any]) -> None:
    state = torch.random.get_rng_state()
    same, other = (build(kind, seed)[0].state_dict() for seed in (0, 1))
    assert torch.random.get_rng_state().equal(state)
    weights = pair[0].state_dict()
    assert all(weights[name].equal(same[name]) for name in weights)
    assert all(not weights[name].equal(other[name]) for name in weights)


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_placeholders_are_as_many_as_features(kind: str, pair: tuple[Any, Any], index: int) -> None:
    model, processor = pair
    inputs = ask(processor, SIZES[index])
    logits = run(model, inputs)
    assert logits.isfinite().all()
    pooled = features(model, inputs).pooler_output
    rows = sum(part.shape[:-1].numel() for part in ([pooled] if isinstance(pooled, torch.Tensor) else pooled))
    assert rows == (inputs["input_ids"] == model.config.image_token_id).sum() == TOKENS[kind][index]


def test_what_is_seen_and_asked_changes_what_is_said(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    here = run(model, ask(processor, SIZES[0]))[0, -1]
    assert (run(model, ask(processor, SIZES[1]))[0, -1] - here).abs().max() > 0.1
    assert (run(model, ask(processor, SIZES[0], "what color is it?"))[0, -1] - here).abs().max() > 0.1


def test_features_can_stand_for_pixels(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    for size in SIZES:
        inputs = ask(processor, size)
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        found = run(model, {**rest, "mm_encoder_outputs": {"image": features(model, inputs)}})
        torch.testing.assert_close(found, run(model, inputs), atol=1e-5, rtol=0)


# -- what makes a family hard ----------------------------------------------------------------------------------


def _no_newlines(model: Any, inputs: dict[str, Any]) -> None:
    model.model.image_newline.data.zero_()


def _positions_in_a_row(model: Any, inputs: dict[str, Any]) -> None:
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]


def _no_windows(model: Any, inputs: dict[str, Any]) -> None:
    model.model.visual.fullatt_block_indexes = [0, 1]


def _no_deepstack(layer: int) -> Callable[[Any, dict[str, Any]], None]:
    def change(model: Any, inputs: dict[str, Any]) -> None:
        last = model.model.visual.deepstack_merger_list[layer].linear_fc2
        last.weight.data.zero_()
        last.bias.data.zero_()

    return change


def _no_token_types(model: Any, inputs: dict[str, Any]) -> None:
    del inputs["token_type_ids"]


def _no_prefix(model: Any, inputs: dict[str, Any]) -> None:
    # without token types, what PaliGemma does depends on the implementation of attention
    inputs["token_type_ids"] = torch.ones_like(inputs["token_type_ids"])


def _no_sliding_window(model: Any, inputs: dict[str, Any]) -> None:
    model.config.text_config.sliding_window = 1000


@pytest.mark.parametrize(
    ("family", "change"),
    [
        pytest.param("llava_next", _no_newlines, id="llava_next-newlines"),
        pytest.param("llava_onevision", _no_newlines, id="llava_onevision-newlines"),
        pytest.param("qwen2_vl", _positions_in_a_row, id="qwen2_vl-positions"),
        pytest.param("qwen2_5_vl", _positions_in_a_row, id="qwen2_5_vl-positions"),
        pytest.param("qwen2_5_vl", _no_windows, id="qwen2_5_vl-windows"),
        pytest.param("qwen3_vl", _positions_in_a_row, id="qwen3_vl-positions"),
        pytest.param("qwen3_vl", _no_deepstack(0), id="qwen3_vl-deepstack-0"),
        pytest.param("qwen3_vl", _no_deepstack(1), id="qwen3_vl-deepstack-1"),
        pytest.param("paligemma", _no_prefix, id="paligemma-prefix"),
        pytest.param("gemma3", _no_token_types, id="gemma3-image-attention"),
        pytest.param("gemma3", _no_sliding_window, id="gemma3-sliding-window"),
    ],
)
def test_what_is_hard_matters(family: str, change: Callable[[Any, dict[str, Any]], None]) -> None:
    model, processor = build(family)
    inputs = ask(processor, SIZES[0])
    before = run(model, inputs)[0, -1]
    changed, changed_inputs = copy.deepcopy(model), dict(inputs)
    change(changed, changed_inputs)
    assert (run(changed, changed_inputs)[0, -1] - before).abs().max() > 0.02

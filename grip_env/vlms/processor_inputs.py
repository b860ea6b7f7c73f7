"""Conversion of a processor's outputs for images and text to encoded examples.

This serves programs that call ``model.generate(**inputs)`` and want to do so with fewer visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from grip_env.tasks.base import Example
from grip_env.vlms.chat_turns import last_turn

if TYPE_CHECKING:
    from grip_env.vlms.base import Encoded
    from grip_env.vlms.families.base import Family, Picture
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["encode_inputs", "split_inputs"]

TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
IMAGES = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images")
REFUSED = {
    "pixel_values_videos": "videos are not supported",
    "inputs_embeds": "give input_ids",
    "position_ids": "positions follow from input_ids",
    "mm_encoder_outputs": "give pixel_values",
}


UNUSED = ("labels",)
"""Outputs of processors that are for training; ``generate`` does not read them either."""


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Split inputs into those about text, those about images, and options of ``generate``.

    Raises:
        ValueError: If an input is missing or not supported.
    """
    for name, remedy in REFUSED.items():
        if inputs.get(name) is not None:
            raise ValueError(f"cannot prune with {name} given: {remedy}")
    for name in ("input_ids", "pixel_values"):
        if inputs.get(name) is None:
            raise ValueError(f"{name} is missing: give all that the processor returned for images and text")
    text = {name: inputs[name] for name in TEXT if inputs.get(name) is not None}
    images = {name: inputs[name] for name in IMAGES if inputs.get(name) is not None}
    return text, images, {name: value for name, value in inputs.items() if name not in (*TEXT, *IMAGES, *UNUSED)}


@torch.no_grad()
def encode_inputs(
    vlm: HuggingFaceVLM,
    text: Mapping[str, torch.Tensor],
    images: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Encoded:
    """Run the vision encoder on the outputs of a processor.

    Args:
        vlm: The model.
        text: "input_ids", long (B, L), with one image in each row, and "attention_mask" (B, L) if rows are padded.
        images: The processor's other tensors.
        sizes: Height and width of each image, if the tensors do not contain them. Without them, InternVL's tiles cannot
            be placed, and for models that see a square of each image, positions are relative to that square.

    Returns:
        B examples without answers or images. The question is the user's last turn in the chat: the text after the
        image, or before it if there is none after it, without the end that the chat template adds to every prompt. Of
        long questions, the scorers of this project read the first 64 tokens.

    Raises:
        ValueError: If a row does not have exactly one image, rows and images do not match, or a tensor has the wrong
            form.
    """
    family, device = vlm.family, vlm.device
    _check_text(text, vlm.model.get_input_embeddings().weight.shape[0])
    ids = text["input_ids"].to(device)
    mask = text.get("attention_mask")
    if mask is None and _is_padded(family, ids):
        raise ValueError("the prompts are padded: give attention_mask, too, as the processor returned it")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(device).bool()
    rows = [row[keep] for row, keep in zip(ids, real, strict=True)]
    shown = [family.count_images(row) for row in rows]
    if any(count != 1 for count in shown):
        raise ValueError(f"the prompts have {shown} images: give exactly one image for each prompt")
    if sizes is not None and len(sizes) != len(rows):
        raise ValueError(f"{len(sizes)} sizes for {len(rows)} prompts: give height and width of each image")
    here = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in images.items()}
    pictures = _see(family, here, rows, sizes)
    visual = [int((row == family.image_token_id).sum()) for row in rows]
    counts = [len(picture.tokens) for picture in pictures]
    if counts != visual:
        raise ValueError(
            f"the prompts have {visual} visual tokens and the images {counts}: give exactly one image for each prompt, "
            "and all that the processor returned"
        )
    embed = vlm.model.get_input_embeddings()
    questions = [_question(vlm, row, picture) for row, picture in zip(rows, pictures, strict=True)]
    return vlm.assemble(
        [Example(np.zeros((0, 0, 3), np.uint8), family.tokenizer.decode(row), "") for row in questions],
        pictures,
        rows,
        [0] * len(rows),
        [embed(row) for row in questions],
    )


def _check_text(text: Mapping[str, Any], vocabulary: int) -> None:
    """Raise ValueError if tensors do not have the form of a processor's outputs for texts."""
    ids, mask = text["input_ids"], text.get("attention_mask")
    if (
        not isinstance(ids, torch.Tensor)
        or ids.dtype not in (torch.long, torch.int)
        or ids.dim() != 2
        or not ids.numel()
    ):
        raise ValueError(f"input_ids must be long (B, L), a row of ids for each prompt; got {_form(ids)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"input_ids must be in [0, {vocabulary}), the tokens the model knows; got {int(ids.max())}")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"attention_mask must be 0 or 1, of the shape of input_ids; got {_form(mask)}")
    if not bool(mask.bool().any(1).all()):
        raise ValueError("attention_mask leaves nothing of a prompt: give it as the processor returned it")


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _is_padded(family: Family, ids: torch.Tensor) -> bool:
    """Return whether prompts (B, L) are padded at either end.

    If the padding token also begins or ends texts, one of it at the same end of every prompt is not padding.
    """
    tokenizer = family.tokenizer
    if tokenizer.pad_token_id is None:
        return False
    pads = ids == tokenizer.pad_token_id
    for run, own in (
        (pads.int().cumprod(1).sum(1), tokenizer.bos_token_id),
        (pads.flip(1).int().cumprod(1).sum(1), tokenizer.eos_token_id),
    ):
        usual = 1 if own == tokenizer.pad_token_id and bool((run == 1).all()) else 0
        if bool((run > usual).any()):
            return True
    return False


def _see(
    family: Family, images: dict[str, Any], rows: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]] | None
) -> list[Picture]:
    """Run the vision encoder on a processor's tensors, or raise ValueError if they do not fit."""
    if not isinstance(images["pixel_values"], torch.Tensor) or not images["pixel_values"].is_floating_point():
        raise ValueError(
            f"pixel_values must be as the processor returned them with return_tensors='pt'; got "
            f"{_form(images['pixel_values'])}"
        )
    try:
        return family.see(family.complete(images, rows), sizes)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"the tensors of the images do not fit the model ({reason}): "
            "give all that the processor returned, as it returned it, and sizes as (height, width)"
        ) from error


def _question(vlm: HuggingFaceVLM, ids: torch.Tensor, picture: Picture) -> torch.Tensor:
    """Return the ids of the question: the text after the image, without the template's end.

    If there is no text after the image, the question is before it. In a chat of several turns, the question is the last
    turn of the user, tokenized by itself.
    """
    family = vlm.family
    tokenizer, hidden = family.tokenizer, set(family.tokenizer.all_special_ids)

    def parts(prompt: list[int]) -> tuple[list[int], list[int]]:
        """Return the ids before and after the image tokens."""
        visual = [place for place, token in enumerate(prompt) if token == family.image_token_id]
        return prompt[: visual[0]], prompt[visual[-1] + 1 :]

    frame = family.prompt("").replace(family.marker, picture.text)
    empty = tokenizer(frame, add_special_tokens=family.adds_special_tokens(frame))["input_ids"]
    asked: list[int] = []
    # after the image first: before it there may be instructions that are the same for all questions
    for words, known in reversed(list(zip(parts(ids.tolist()), parts(empty), strict=True))):
        turn = last_turn(family, words, known)
        if turn is not None:
            asked = [token for token in tokenizer(turn, add_special_tokens=False)["input_ids"] if token not in hidden]
            if asked:
                break
        start = _shared(words, known)
        stop = len(words) - _shared(words[start:][::-1], known[start:][::-1])
        asked = [token for token in words[start:stop] if token not in hidden]
        # line ends before a word and at the end of a text are different tokens
        while asked and not tokenizer.decode(asked[:1]).strip():
            asked = asked[1:]
        if asked:
            break
    return torch.tensor(asked, dtype=torch.long, device=ids.device)


def _shared(left: list[int], right: list[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count

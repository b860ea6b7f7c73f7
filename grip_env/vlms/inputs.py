"""What a model's own processor makes of images and text, read as encoded examples.

For those who call ``model.generate(**inputs)`` today and want to go on so, with fewer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from grip_env.tasks.base import Example

if TYPE_CHECKING:
    from grip_env.vlms.base import Encoded
    from grip_env.vlms.family import Picture
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


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return what is text, what is about images, and the rest, which are options of ``generate``.

    Raises:
        ValueError: If something is missing, or cannot be dealt with.
    """
    for name, remedy in REFUSED.items():
        if inputs.get(name) is not None:
            raise ValueError(f"cannot prune with {name} given: {remedy}")
    for name in ("input_ids", "pixel_values"):
        if inputs.get(name) is None:
            raise ValueError(f"{name} is missing: give all that the processor returned for images and text")
    text = {name: inputs[name] for name in TEXT if inputs.get(name) is not None}
    images = {name: inputs[name] for name in IMAGES if inputs.get(name) is not None}
    return text, images, {name: value for name, value in inputs.items() if name not in (*TEXT, *IMAGES)}


@torch.no_grad()
def encode_inputs(
    vlm: HuggingFaceVLM,
    text: Mapping[str, torch.Tensor],
    images: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Encoded:
    """Run the vision encoder on what a processor made.

    Args:
        vlm: The model.
        text: "input_ids", long (B, L), with one image in each row, and "attention_mask" (B, L) if rows are padded.
        images: The processor's other tensors.
        sizes: Height and width of each image, where the tensors do not tell them: InternVL's tiles cannot be placed
            without, and for models that see a square of each image, places are in that square.

    Returns:
        B examples without answers. Their images are not known; the question is what stands behind the image, without
        the end that the chat template gives every prompt.

    Raises:
        ValueError: If rows do not have one image each, or do not fit the images.
    """
    family, device = vlm.family, vlm.device
    ids = text["input_ids"].to(device)
    mask = text.get("attention_mask")
    if mask is None and bool((ids == family.tokenizer.pad_token_id).any()):
        raise ValueError("the prompts are padded: give attention_mask, too, as the processor returned it")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(device).bool()
    rows = [row[keep] for row, keep in zip(ids, real, strict=True)]
    shown = [family.count_images(row) for row in rows]
    if any(count != 1 for count in shown):
        raise ValueError(f"the prompts have {shown} images: give exactly one image for each prompt")
    if sizes is not None and len(sizes) != len(rows):
        raise ValueError(f"{len(sizes)} sizes for {len(rows)} prompts: give height and width of each image")
    here = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in images.items()}
    pictures = family.see(family.complete(here, rows), sizes)
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


def _question(vlm: HuggingFaceVLM, ids: torch.Tensor, picture: Picture) -> torch.Tensor:
    """Return the ids of what is asked: what stands behind the image, without the end that every prompt has.

    A prompt with nothing behind the image has its question before it.
    """
    family = vlm.family
    tokenizer, hidden = family.tokenizer, set(family.tokenizer.all_special_ids)

    def parts(prompt: list[int]) -> tuple[list[int], list[int]]:
        """Return what stands before and behind the image's own text."""
        visual = [place for place, token in enumerate(prompt) if token == family.image_token_id]
        return prompt[: visual[0]], prompt[visual[-1] + 1 :]

    frame = family.prompt("").replace(family.marker, picture.text)
    empty = tokenizer(frame, add_special_tokens=family.adds_special_tokens(frame))["input_ids"]
    asked: list[int] = []
    # behind the image first: before it there may be instructions that are the same whatever is asked
    for words, known in reversed(list(zip(parts(ids.tolist()), parts(empty), strict=True))):
        start = _shared(words, known)
        stop = len(words) - _shared(words[start:][::-1], known[start:][::-1])
        asked = [token for token in words[start:stop] if token not in hidden]
        # line ends before a word and those before nothing are not the same tokens
        while asked and not tokenizer.decode(asked[:1]).strip():
            asked = asked[1:]
        if asked:
            break
    return torch.tensor(asked, dtype=torch.long, device=ids.device)


def _shared(left: list[int], right: list[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count

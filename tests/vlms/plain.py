"""What a model itself says of every layer over a prompt: its own forward, with nothing of the staged pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grip_env.tasks.base import Example
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.vlms.families.test_known import process


@dataclass
class Prompt:
    """All of the L tokens of one prompt."""

    visual: list[int]
    """Columns of the visual tokens, in order."""
    words: list[int]
    """Columns after the last of them."""
    hidden: list[torch.Tensor]
    """What enters each layer, (L, D), and at the end what leaves the final norm."""
    attention: list[torch.Tensor]
    """Of each layer, (heads, L, L): row sees column."""
    keys: list[torch.Tensor]
    """Of each layer, rotated, (heads, L, head width)."""


def run_prompt(vlm: HuggingFaceVLM, example: Example) -> Prompt:
    inputs = process(vlm, example)
    before = vlm.model.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation("eager")  # the only kind that returns attention
    try:
        with torch.no_grad():
            output = vlm.model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=True)
    finally:
        vlm.model.set_attn_implementation(before)
    ids = inputs["input_ids"][0].tolist()
    visual = [column for column, token in enumerate(ids) if token == vlm.model.config.image_token_id]
    return Prompt(
        visual,
        list(range(visual[-1] + 1, len(ids))),
        [one[0] for one in output.hidden_states],
        [one[0] for one in output.attentions],
        [layer.keys[0] for layer in output.past_key_values.layers],
    )

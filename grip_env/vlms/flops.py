"""FLOPs and cache bytes of a LLaVA with a CLIP tower and a Llama language model, by counting.

What is of the language model alone holds for any made of Llama's layers, grouped keys and values included.

A matrix product (m, k) x (k, n) is 2 m k n FLOPs; attention counts every pair of tokens, masked or not, as
``torch.utils.flop_counter`` does. What is not a matrix product (norms, activations, softmax) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["cache_bytes", "encoder_flops", "flops_saved", "layer_flops", "prefill_flops", "staged_flops"]


def encoder_flops(config: Any) -> int:
    """FLOPs to turn one picture into visual tokens: CLIP tower (all of its layers run) and projector."""
    vision, width = config.vision_config, config.vision_config.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    embed = 2 * patches * 3 * vision.patch_size**2 * width
    layer = layer_flops(patches + 1, width, 2 * vision.intermediate_size)
    projector = 2 * patches * config.text_config.hidden_size * (width + config.text_config.hidden_size)
    return int(embed + vision.num_hidden_layers * layer + projector)


def prefill_flops(config: Any, length: int) -> int:
    """FLOPs of the language model over a prompt of ``length`` tokens, and of its head at the last one."""
    return staged_flops(config, [(config.text_config.num_hidden_layers, length)])


def staged_flops(config: Any, schedule: Sequence[tuple[int, int]]) -> int:
    """FLOPs of the language model over a prompt that gets shorter between layers, and of its head at the last token.

    Args:
        config: Of the model.
        schedule: How many layers run on how many tokens, words included, in turn: ``[(2, 200), (30, 80)]``.

    Raises:
        ValueError: If these are not all of the model's layers.
    """
    text = config.text_config
    if sum(layers for layers, _ in schedule) != text.num_hidden_layers:
        raise ValueError(
            f"the schedule {list(schedule)} has {sum(layers for layers, _ in schedule)} layers, the model "
            f"{text.num_hidden_layers}: give pairs (layers, tokens) whose layers sum to that"
        )
    width, head = text.hidden_size, _head_width(text)
    heads, groups = text.num_attention_heads * head, text.num_key_value_heads * head
    weights = 2 * width * (heads + groups) + 3 * width * text.intermediate_size
    layers = sum(count * (2 * length * weights + 4 * length**2 * heads) for count, length in schedule)
    return int(layers + 2 * width * text.vocab_size)


def flops_saved(config: Any, length: int, schedule: Sequence[tuple[int, int]]) -> float:
    """Return which share of the FLOPs of the language model over ``length`` tokens a schedule saves, in [0, 1).

    Args:
        config: Of the model.
        length: Tokens of the prompt before anything is dropped.
        schedule: See :func:`staged_flops`.
    """
    return 1.0 - staged_flops(config, schedule) / prefill_flops(config, length)


def layer_flops(length: int, width: int, mlp: int) -> int:
    """FLOPs of one transformer layer: four projections, MLP weights of ``mlp`` x width, scores and weighted sum."""
    return 2 * length * width * (4 * width + mlp) + 4 * length**2 * width


def cache_bytes(config: Any, length: int, size: int = 4) -> int:
    """Bytes of keys and values of ``length`` tokens, ``size`` bytes a number."""
    text = config.text_config
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * _head_width(text) * length * size)


def _head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

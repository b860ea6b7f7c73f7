"""FLOPs and cache bytes of a LLaVA with a CLIP tower and a Llama language model.

The functions for the language model alone hold for any with Llama's layers, including grouped keys and values.

A matrix product (m, k) x (k, n) counts as 2 m k n FLOPs; attention counts every pair of tokens, masked or not, as
``torch.utils.flop_counter`` does. Operations other than matrix products (norms, activations, softmax) are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["cache_bytes", "encoder_flops", "flops_saved", "layer_flops", "prefill_flops", "staged_flops"]


def encoder_flops(config: Any) -> int:
    """Return the FLOPs to encode one image with the CLIP tower (all its layers) and projector."""
    vision, width = config.vision_config, config.vision_config.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    embed = 2 * patches * 3 * vision.patch_size**2 * width
    layer = layer_flops(patches + 1, width, 2 * vision.intermediate_size)
    projector = 2 * patches * config.text_config.hidden_size * (width + config.text_config.hidden_size)
    return int(embed + vision.num_hidden_layers * layer + projector)


def prefill_flops(config: Any, length: int) -> int:
    """Return the FLOPs of the language model on a prompt of ``length`` tokens.

    This includes its head at the last token.
    """
    return staged_flops(config, [(config.text_config.num_hidden_layers, length)])


def staged_flops(config: Any, schedule: Sequence[tuple[int, int]]) -> int:
    """Return the FLOPs of the language model on a prompt that gets shorter between layers.

    This includes its head at the last token.

    Args:
        config: Config of the model.
        schedule: Pairs of a number of layers and the number of tokens they run on, text tokens included, in order:
            ``[(2, 200), (30, 80)]``.

    Raises:
        ValueError: If the layers do not add up to those of the model.
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
    """Return the share of the language model's FLOPs that a schedule saves, in [0, 1).

    Args:
        config: Config of the model.
        length: Tokens of the prompt before anything is dropped.
        schedule: See :func:`staged_flops`.
    """
    return 1.0 - staged_flops(config, schedule) / prefill_flops(config, length)


def layer_flops(length: int, width: int, mlp: int) -> int:
    """Return the FLOPs of one transformer layer.

    These are four projections, MLP weights of ``mlp`` x width, attention scores and weighted sum.
    """
    return 2 * length * width * (4 * width + mlp) + 4 * length**2 * width


def cache_bytes(config: Any, length: int, size: int = 4) -> int:
    """Return the bytes of keys and values of ``length`` tokens, with ``size`` bytes per number."""
    text = config.text_config
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * _head_width(text) * length * size)


def _head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

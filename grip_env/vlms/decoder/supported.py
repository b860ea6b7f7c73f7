"""Models whose language model can be run layer by layer, and the place of its decoder."""

from __future__ import annotations

from typing import Any

__all__ = ["STAGED_DECODERS", "STAGED_FAMILIES", "decoder_in", "decoder_name"]


STAGED_FAMILIES = ("idefics3", "internvl", "llava", "llava_next", "llava_onevision", "smolvlm")
"""Families (``config.model_type``) that pass visual tokens to a causal decoder, with positions of one axis."""

STAGED_DECODERS = ("llama", "mistral", "qwen2")
"""Language models (``config.text_config.model_type``) with the same kind of layers."""


def decoder_in(model: Any) -> Any:
    """Return a model's decoder, or ``None`` if its layers cannot be run one by one.

    The decoder has ``embed_tokens``, ``layers``, ``rotary_emb`` and ``norm``.
    """
    text = model.config.get_text_config()
    if model.config.model_type not in STAGED_FAMILIES or text.model_type not in STAGED_DECODERS:
        return None
    if text._attn_implementation not in ("eager", "sdpa"):
        return None
    return getattr(model.model, decoder_name(model.model))


def decoder_name(inner: Any) -> str:
    """Return the attribute name of the decoder in a base model."""
    return "text_model" if hasattr(inner, "text_model") else "language_model"

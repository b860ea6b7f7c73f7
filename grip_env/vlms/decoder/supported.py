"""Which models have a language model whose layers can be run one by one here, and where its parts are."""

from __future__ import annotations

from typing import Any

__all__ = ["STAGED_DECODERS", "STAGED_FAMILIES", "decoder_in", "decoder_name"]


STAGED_FAMILIES = ("idefics3", "internvl", "llava", "llava_next", "llava_onevision", "smolvlm")
"""Families (``config.model_type``) that hand visual tokens to a causal decoder at positions of one axis."""

STAGED_DECODERS = ("llama", "mistral", "qwen2")
"""Language models (``config.text_config.model_type``) made of the same layers."""


def decoder_in(model: Any) -> Any:
    """Return the decoder of a model of transformers, or ``None`` if its layers are others than can be run one by one.

    It has ``embed_tokens``, ``layers``, ``rotary_emb`` and ``norm``.
    """
    text = model.config.get_text_config()
    if model.config.model_type not in STAGED_FAMILIES or text.model_type not in STAGED_DECODERS:
        return None
    if text._attn_implementation not in ("eager", "sdpa"):
        return None
    return getattr(model.model, decoder_name(model.model))


def decoder_name(inner: Any) -> str:
    """Return under which name the decoder is in a model's inside."""
    return "text_model" if hasattr(inner, "text_model") else "language_model"

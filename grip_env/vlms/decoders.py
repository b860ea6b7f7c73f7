"""Which models have a language model whose layers can be run one by one here, and where its parts are."""

from __future__ import annotations

from typing import Any

from grip_env.vlms.huggingface import HuggingFaceVLM
from grip_env.vlms.last_layer import STAGED_DECODERS, STAGED_FAMILIES, decoder_in

__all__ = ["decoder_of"]


def decoder_of(vlm: Any) -> Any:
    """Return the decoder of a model, for layer after layer: ``embed_tokens``, ``layers``, ``rotary_emb`` and ``norm``.

    Raises:
        NotImplementedError: If its layers cannot be run one by one here: it is no :class:`HuggingFaceVLM`, or its
            family, its language model or its attention is another.
    """
    if not isinstance(vlm, HuggingFaceVLM):
        given = f"{getattr(vlm, 'name', vlm)!r} is a {type(vlm).__name__}, whose layers are out of reach"
    else:
        decoder = decoder_in(vlm.model)
        if decoder is not None:
            return decoder
        config = vlm.model.config
        text = config.get_text_config()
        if config.model_type in STAGED_FAMILIES and text.model_type in STAGED_DECODERS:
            raise NotImplementedError(
                f"running single layers needs attention of 'eager' or 'sdpa', not {text._attn_implementation!r}: "
                "load the model with one of them"
            )
        given = f"{vlm.name!r} is of family {config.model_type!r} with a language model {text.model_type!r}"
    raise NotImplementedError(
        f"running the layers of the language model one by one is there for HuggingFaceVLM models of the families "
        f"{', '.join(STAGED_FAMILIES)} with a language model of type {', '.join(STAGED_DECODERS)}; {given}"
    )

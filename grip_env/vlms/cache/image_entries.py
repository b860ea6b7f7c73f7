"""Entries of the cache of encoded images: their names and the contents of their files.

A name is a digest of everything that the content depends on, so entries never become invalid: another model,
processor, precision or image has another entry. A file holds a digest of its content, so damage is detected.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import PIL
import torch
import transformers

from grip_env.common.sealed_files import picture_key, raw_bytes, seal, unseal
from grip_env.vlms.families.base import Family, Picture

__all__ = ["encoder_digest", "pack", "picture_key", "picture_scope", "unpack"]

FORMAT = 2
"""Part of every name. Increase it when the file format changes, or when families encode images differently."""
LANGUAGE = ("model.language_model.", "model.text_model.", "lm_head.")
"""Prefixes of the weights that encoded images do not depend on."""
ELSEWHERE = ("_name_or_path", "_commit_hash", "architectures", "dtype", "transformers_version")
"""Config entries that only describe its origin, and the precision, which is read from the model itself."""


# -- what an entry depends on ----------------------------------------------------------------------------------


def encoder_digest(model: Any) -> str:
    """Return a digest of all weights and buffers outside the language model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(LANGUAGE):
            digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            digest.update(raw_bytes(value.detach().cpu()))
    return digest.hexdigest()


def picture_scope(family: Family, weights: str) -> str:
    """Return a digest of everything but the image that encoded images depend on.

    It covers the weights, the model's config, its precision and attention kernels, the image processor with all its
    settings, the family with its image placeholders, and the versions of the libraries involved. The device is not
    part of it.

    Args:
        family: The family, with its model and processor.
        weights: The model's :func:`encoder_digest`.
    """
    model, processor = family.model, family.processor.image_processor
    parts = [getattr(model.config, name, None) for name in ("vision_config", "text_config")]
    known = {
        "format": FORMAT,
        "weights": weights,
        "config": _without_names(json.loads(model.config.to_json_string(use_diff=False))),
        "dtype": str(model.dtype),
        "attention": [getattr(config, "_attn_implementation", None) for config in (model.config, *parts)],
        # the class too: the Pillow and the torchvision version have the same settings
        "processor": [_kind(processor), json.loads(processor.to_json_string())],
        "square": getattr(processor, "default_to_square", None),  # the only setting that is not saved
        "family": [vars(type(family)).get("key", _kind(family)), family.image_token, family.marker, family.text()],
        "versions": [version.split("+")[0] for version in (transformers.__version__, torch.__version__)],
        "pillow": PIL.__version__,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _without_names(config: Any) -> Any:
    """Return a config without the entries that only describe its origin."""
    if isinstance(config, dict):
        return {key: _without_names(value) for key, value in config.items() if key not in ELSEWHERE}
    return [_without_names(value) for value in config] if isinstance(config, list) else config


# -- content of an entry ---------------------------------------------------------------------------------------


def pack(key: str, picture: Picture) -> bytes:
    """Return the file content for an encoded image."""
    tensors = {name: value for name, value in vars(picture).items() if isinstance(value, torch.Tensor)}
    return seal(key, tensors, {"text": picture.text, "runs": json.dumps(picture.runs)})


def unpack(key: str, data: bytes) -> Picture:
    """Return the encoded image in the file content of an entry.

    Raises:
        ValueError: If the content is not what was written under this key.
    """
    tensors, texts = unseal(key, data)
    try:
        return Picture(text=texts["text"], runs=json.loads(texts["runs"]), **tensors)
    except (LookupError, TypeError) as error:
        raise ValueError("the entry cannot be read") from error

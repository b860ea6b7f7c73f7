"""Files of tensors with a digest that detects damage, for agents and shared caches.

A file is in the safetensors format, with a digest of its name, its texts and every bit of its tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

__all__ = ["picture_key", "raw_bytes", "seal", "unseal"]

DIGEST = "sha256"


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def picture_key(scope: str, image: np.ndarray) -> str:
    """Return the name of the entry of an image, 64 hexadecimal digits.

    Args:
        scope: A digest of everything else that the entry depends on.
        image: The image, of any shape and dtype.
    """
    digest = hashlib.sha256(json.dumps([scope, list(image.shape), image.dtype.str]).encode())
    digest.update(np.ascontiguousarray(image).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest(key: str, texts: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    named = sorted(tensors.items())
    about = [key, sorted(texts.items()), [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in named]]
    digest = hashlib.sha256(json.dumps(about).encode())
    for _, tensor in named:
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def seal(key: str, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a file with a digest.

    Args:
        key: The name for reading it back; part of the digest, so that files cannot be confused.
        tensors: Tensors by name, of any shape, dtype and device.
        texts: Texts by name, stored as metadata.
    """
    # copied, since safetensors refuses tensors that share memory
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    texts = texts or {}
    return _ordered(save(copies, {**texts, DIGEST: _digest(key, texts, copies)}))


def _ordered(data: bytes) -> bytes:
    """Return the content of a file with its texts sorted by name.

    safetensors writes them in random order.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[start:]


def unseal(key: str, data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors, on the CPU, and the texts from the content of a file.

    Raises:
        ValueError: If the content is not what :func:`seal` returned for this key.
    """
    try:
        texts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        digest, tensors = texts.pop(DIGEST, None), load(data)
        if _digest(key, texts, tensors) == digest:
            return tensors, texts
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError("the file cannot be read") from error
    raise ValueError("it has no digest" if digest is None else "its content is not what was written")

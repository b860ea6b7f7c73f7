"""Checks of the folder of a saved model before the model is loaded.

They ensure that nothing outside the folder is read, that kernels named in it are not fetched, and that a config.json
that does not match the saved weights is detected before memory is allocated for the model it describes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

__all__ = ["check_adapter", "check_folder", "check_size"]

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
"""Names that configs use for the number of layers in a part of a model."""
ROOM = 10_000_000
"""Weights allowed beyond twice the number saved: shared weights are saved once, and some are not saved at all."""


def check_adapter(path: str | Path, folder: Path) -> None:
    """Raise ValueError if a folder holds an adapter.

    transformers would load the base model from any place that the adapter names.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} cannot be read (it holds an adapter of PEFT, such as LoRA): load it with its model, call "
            "merge_and_unload() and save what that returns"
        )


def check_folder(folder: Path, config: dict[str, Any], kinds: Collection[str]) -> None:
    """Raise ValueError if config.json or the index of the weight files rules out a valid model.

    Args:
        folder: The folder.
        config: Contents of its config.json.
        kinds: The values of "model_type" that are supported.
    """
    kind = config.get("model_type")
    if kind not in kinds and "auto_map" not in config:  # models that need custom code are refused for that reason later
        raise ValueError(f"model type {kind!r} is not supported; supported: {', '.join(sorted(kinds))}")
    shapes = list(_shapes(folder))
    for name, value in _settings(config):
        if name in LAYERS and isinstance(value, int | float) and shapes and value > len(shapes):
            raise ValueError(f"config.json describes a model of {value} layers, and {len(shapes)} tensors are saved")
        if "attn_implementation" in name and (kernel := next((text for text in _texts(value) if "/" in text), None)):
            raise ValueError(f"config.json names the kernel {kernel!r}, which is code: remove {name!r}")
        if name == "attribute_map":  # a kernel could stand under any other name
            raise ValueError(f"config.json gives settings other names, which is for code alone: remove {name!r}")
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(folder, index)


def check_size(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if config.json describes a far larger model than the saved weights."""
    if config.get("quantization_config") is not None:  # several weights are packed in one number
        return
    with torch.device("meta"):
        read = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        empty = AutoModelForImageTextToText.from_config(read, trust_remote_code=False)
    described = sum(weight.numel() for weight in empty.parameters())
    saved = sum(math.prod(shape) for shape in _shapes(folder))
    if saved and described > 2 * saved + ROOM:
        raise ValueError(f"config.json describes a model of {described:,} weights, and {saved:,} are saved")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every name in nested settings with its value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name), inner
            yield from _settings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner)


def _texts(value: Any) -> Iterator[str]:
    """Yield a text, or all texts in nested settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _shapes(folder: Path) -> Iterator[list[int]]:
    """Yield the shape of every tensor saved in a folder; damaged files are skipped."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length)) if length < file.stat().st_size else {}
            yield from (entry["shape"] for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # loading the weights gives a better error


def _check_index(folder: Path, index: Path) -> None:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index.name} is no list of the files that hold the weights") from None
    for name in sorted(map(str, names)):
        if name != Path(name).name or "\\" in name:
            raise ValueError(f"{index.name} names {name!r}, which is not a file beside it")
        if not (folder / name).is_file():
            raise ValueError(f"{name}, which {index.name} names, is missing")

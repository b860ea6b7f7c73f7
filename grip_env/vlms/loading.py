"""Reading a saved model and its processor: whole, or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

from grip_env.vlms.hub import fetch
from grip_env.vlms.sealed import write_atomically

__all__ = ["DIGESTS", "Processor", "check_digests", "read_pretrained", "write_digests"]

DIGESTS = "SHA256SUMS"
"""The file in the folder of a model that has digests of the others."""
WEIGHTS = ".safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
ONLY_DATA: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Left unset, transformers asks on the terminal whether to run code that comes with a model."""


@dataclass(frozen=True)
class Processor:
    """What of a saved processor images and questions need.

    The processors of families that also read videos cannot be loaded as a whole without torchvision, their parts can.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str | None


def read_pretrained(path: str | Path, dtype: torch.dtype, attn_implementation: str = "sdpa") -> tuple[Any, Processor]:
    """Return the model and the processor saved in a folder (or, where one is reachable, on a model hub).

    Code that comes with a model is never run, and pickles are never opened.

    Raises:
        FileNotFoundError: If ``path`` looks like a folder and has no config.json.
        ValueError: If a part of it is missing, damaged or does not fit the rest, or it needs code of its own.
    """
    folder = Path(path)
    # what cannot be a model's id on a hub ("owner/name") is not asked for there
    local = folder.exists() or str(path).startswith((".", "/")) or str(path).count("/") != 1
    if local and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}: give a folder that save_pretrained wrote")
    if not local:
        folder = fetch(str(path))
    check_digests(folder)
    config = _config(path, folder)
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what is wrong with the weights is in the error below
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **ONLY_DATA)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **ONLY_DATA)
        processor = Processor(tokenizer, image_processor, tokenizer.chat_template or _older_template(folder))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            **ONLY_DATA,
        )
        model, found = loaded
    except Exception as error:  # transformers raises all sorts of things on damaged files
        raise ValueError(f"{path} cannot be read ({_reason(error)}): {_remedy(folder, config, error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    # transformers fills in random numbers for these and goes on, which would make every reward meaningless
    unfit = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if unfit:
        raise ValueError(
            f"{path} cannot be read ({len(unfit)} of its weights, {unfit[0]} for one, are missing or have another "
            "shape than config.json says): save it again"
        )
    return model, processor


def check_digests(folder: Path) -> None:
    """Raise ValueError if a file in a folder is not what its SHA256SUMS says; without one there is nothing to check."""
    listed = folder / DIGESTS
    if not listed.is_file():
        return
    try:
        for line in listed.read_text(encoding="ascii").splitlines():
            digest, name = line.split("  ", 1)
            if hashlib.sha256((folder / Path(name).name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} is damaged, its digest is not that in {DIGESTS}")
    except (OSError, ValueError) as error:
        reason = f"{error.filename} is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise ValueError(
            f"{folder} cannot be read ({reason}): copy it anew, or remove {DIGESTS} if you changed the model yourself"
        ) from None


def write_digests(folder: Path) -> None:
    """Write SHA256SUMS of all files in a folder but notes for readers, in the form of the command sha256sum."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".jinja", WEIGHTS))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    write_atomically(folder / DIGESTS, "".join(lines).encode())


def _config(path: str | Path, folder: Path) -> dict[str, Any]:
    """Return config.json, or raise ValueError where that alone shows that the model cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{folder / 'config.json'}' is not a valid JSON file: {_reason(error)}"
        raise ValueError(f"{path} cannot be read ({reason}): save it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read (config.json holds no object): save it again")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} cannot be read (it holds an adapter of PEFT, such as LoRA): load it with its model, call "
            "merge_and_unload() and save what that returns"
        )
    return config


def _reason(error: Exception) -> str:
    """Return the first sentence of an error."""
    lines = str(error).strip().splitlines() or [""]
    reason = lines[0].split(". ")[0].rstrip(" .:") or type(error).__name__
    return (
        reason
        if isinstance(error, OSError | ValueError | ImportError | SafetensorError)
        else (f"{type(error).__name__}: {reason}")
    )


def _remedy(folder: Path, config: dict[str, Any], error: Exception) -> str:
    """Return what to do about a model that cannot be read."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never run: give a model whose class is in transformers"
    if not any(folder.glob(f"*{WEIGHTS}")) and any(next(folder.glob(kind), None) for kind in PICKLES):
        return "its weights are pickles, which are never opened: save it as safetensors, as save_pretrained does"
    if config.get("quantization_config") is not None:
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        return f"it is quantised ({method}): install what that needs, or give the model as it was before"
    return "save it again"


def _older_template(folder: Path) -> str | None:
    """Return the chat template of a processor that was saved before tokenizers read it too."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    found: Any = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    if not isinstance(found, str):
        raise ValueError("chat_template.json holds no template")
    return found

"""Reading a saved model and its processor: whole, or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file, logging

__all__ = ["Processor", "read_pretrained"]


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

    Raises:
        FileNotFoundError: If ``path`` looks like a folder and has no config.json.
        ValueError: If a part of it is missing, damaged or does not fit the rest.
    """
    folder = Path(path)
    # what cannot be a model's id on a hub ("owner/name") is not asked for there
    local = folder.exists() or str(path).startswith((".", "/")) or str(path).count("/") != 1
    if local and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}: give a folder that save_pretrained wrote")
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what is wrong with the weights is in the error below
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        processor = Processor(tokenizer, image_processor, tokenizer.chat_template or _older_template(path))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, found = loaded
    except (ImportError, OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(" .:")
        remedy = "save it again" if folder.exists() else "give a folder that save_pretrained wrote"
        raise ValueError(f"{path} cannot be read ({reason}): {remedy}") from error
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


def _older_template(path: str | Path) -> str | None:
    """Return the chat template of a processor that was saved before tokenizers read it too."""
    file = cached_file(str(path), "chat_template.json", _raise_exceptions_for_missing_entries=False)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]

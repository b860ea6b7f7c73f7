"""Reading a saved model and its processor: whole, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

__all__ = ["read_pretrained"]


def read_pretrained(path: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
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
        processor = AutoProcessor.from_pretrained(path, backend="pil")
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, found = loaded
    except (OSError, ValueError, KeyError, SafetensorError) as error:
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

"""Loading of a saved model and its processor, with checks that both are complete."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

from grip_env.common.atomic_files import write_atomically
from grip_env.vlms.families.known import FAMILIES
from grip_env.vlms.hub import fetch
from grip_env.vlms.model_folder import check_adapter, check_folder, check_size

__all__ = ["DIGESTS", "Processor", "check_digests", "read_pretrained", "refusal", "write_digests"]

DIGESTS = "SHA256SUMS"
"""Name of the file in a model folder that holds the digests of the others."""
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
"""Pattern of a line of that file, in the format of the command sha256sum."""
WEIGHTS = ".safetensors"
SEALED = (".json", ".jinja", WEIGHTS)
"""Suffixes of the files that have digests."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
ONLY_DATA: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Options to load data only. Without them, transformers asks on the terminal whether to run code of a model."""


@dataclass(frozen=True)
class Processor:
    """The parts of a saved processor that images and questions need.

    Processors of families that also read videos cannot be loaded as a whole without torchvision, but their parts can.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str | None


def read_pretrained(path: str | Path, dtype: torch.dtype, attn_implementation: str = "sdpa") -> tuple[Any, Processor]:
    """Return the model and processor saved in a folder or, if reachable, on a model hub.

    Code that comes with a model is never run, and pickles are never opened.

    Raises:
        FileNotFoundError: If ``path`` looks like a folder and has no config.json.
        ValueError: If a part is missing, damaged or does not fit the rest, or the model needs custom code.
    """
    folder = Path(path)
    # only what can be a model's id on a hub ("owner/name") is looked up there
    local = folder.exists() or str(path).startswith((".", "/")) or str(path).count("/") != 1
    check_adapter(path, folder)  # most adapters have no config.json
    if local and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}: give a folder that save_pretrained wrote")
    if not local:
        folder = fetch(str(path))
        check_adapter(path, folder)
    check_digests(folder)
    config = _config(path, folder)
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # problems with the weights are in the error below
    try:
        check_folder(folder, config, FAMILIES)
        tokenizer = AutoTokenizer.from_pretrained(folder, **ONLY_DATA)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **ONLY_DATA)
        processor = Processor(tokenizer, image_processor, _template(tokenizer, folder))
        check_size(folder, config)
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
    except Exception as error:  # transformers raises errors of many types on damaged files
        raise refusal(path, "read", error, _remedy(folder, config, error)) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    # transformers only fills these with random numbers, which would make every reward meaningless
    unfit = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if unfit:
        raise ValueError(
            f"{path} cannot be read ({len(unfit)} of its weights, {unfit[0]} for one, are missing or have another "
            "shape than config.json says): save it again"
        )
    return model, processor


def check_digests(folder: Path) -> None:
    """Check the files in a folder against its SHA256SUMS, if there is one.

    Raises:
        FileNotFoundError: If a listed file is missing.
        ValueError: If SHA256SUMS or a listed file is damaged.
    """
    listed = folder / DIGESTS
    if not listed.is_file():
        return
    remedy = f"copy it anew, or remove {DIGESTS} if you changed the model yourself"
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
        found = [LINE.fullmatch(line).groups() for line in lines]  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        found = []
    if not found:
        raise ValueError(f"{folder} cannot be read ({DIGESTS} is damaged, it is no list of digests): {remedy}")
    for digest, name in found:
        if name != Path(name).name or Path(name).suffix not in SEALED:
            continue  # lists of other tools may include notes and other forms of the weights
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} cannot be read ({name} is missing): {remedy}")
        if _sha256(folder / name) != digest.lower():
            raise ValueError(
                f"{folder} cannot be read ({name} is damaged, its digest is not that in {DIGESTS}): {remedy}"
            )


def write_digests(folder: Path) -> None:
    """Write SHA256SUMS of a model's files in a folder, in the format of sha256sum."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in SEALED)
    write_atomically(folder / DIGESTS, "".join(f"{_sha256(path)}  {path.name}\n" for path in files).encode())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(2**20):  # weights may be larger than memory
            digest.update(part)
    return digest.hexdigest()


def _config(path: str | Path, folder: Path) -> dict[str, Any]:
    """Return the contents of config.json, or raise ValueError if they are not a JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"'{folder / 'config.json'}' is not a valid JSON file: {_reason(error)}"
        raise ValueError(f"{path} cannot be read ({reason}): save it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read (config.json holds no object): save it again")
    return config


def refusal(path: str | Path, verb: str, error: Exception, remedy: str) -> ValueError:
    """Return an error that says why a model cannot be read or used, and what to do about it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        remedy = "give it a device with more memory, or a dtype of fewer bits"
    return ValueError(f"{path} cannot be {verb} ({_reason(error)}): {remedy}")


def _reason(error: Exception) -> str:
    """Return the first sentence of an error."""
    lines = str(error).strip().splitlines() or [""]
    reason = lines[0].split(". ")[0].rstrip(" .:") or type(error).__name__
    clear = isinstance(error, OSError | ValueError | ImportError | SafetensorError)
    return reason if clear else f"{type(error).__name__}: {reason}"


def _remedy(folder: Path, config: Mapping[str, Any], error: Exception) -> str:
    """Return advice on a model that cannot be read."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never run: give a model whose class is in transformers"
    if str(error).startswith("model type"):
        return "give a model of one of these types"
    if not any(folder.glob(f"*{WEIGHTS}")) and any(next(folder.glob(kind), None) for kind in PICKLES):
        return "its weights are pickles, which are never opened: save it as safetensors, as save_pretrained does"
    if config.get("quantization_config") is not None:
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        return f"it is quantised ({method}): install what that needs, or give the model as it was before"
    if isinstance(error, ImportError):
        return "install what it needs"
    return "save it again"


def _template(tokenizer: Any, folder: Path) -> str | None:
    """Return the chat template of the tokenizer, else of the processor.

    Older processors have a file for it that tokenizers do not read.
    """
    found: Any = tokenizer.chat_template
    file = folder / "chat_template.json"
    if not found and file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    if isinstance(found, dict):  # several by name
        found = found.get("default")
    if found and not isinstance(found, str):
        raise ValueError(f"the chat template is text; got {type(found).__name__}")
    return found or None

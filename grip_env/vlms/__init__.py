"""Frozen vision-language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["TINY", "load_vlm"]

TINY = Path(__file__).parent / "tiny"
"""Folder of the embedded model."""


def load_vlm(name_or_path: str | Path = "tiny", **options: Any) -> HuggingFaceVLM:
    """Load a frozen vision-language model.

    Args:
        name_or_path: "tiny" for the embedded model, else a folder that ``save_pretrained`` wrote.
        options: Passed on to :meth:`~grip_env.vlms.huggingface.HuggingFaceVLM.from_pretrained`.

    Raises:
        FileNotFoundError: If there is no model, or files of the embedded one are missing from the package.
        ValueError: If the model is damaged, needs custom code, or belongs to an unsupported family. Code that comes
            with a model is never run, and pickles are never opened.
    """
    from grip_env.vlms.huggingface import HuggingFaceVLM

    if str(name_or_path) != "tiny":
        return HuggingFaceVLM.from_pretrained(name_or_path, **options)
    from grip_env.vlms.loading import DIGESTS, check_digests

    try:
        if not (TINY / DIGESTS).is_file():
            raise FileNotFoundError(f"{TINY / DIGESTS} is missing: copy it anew")
        check_digests(TINY)
    except (OSError, ValueError) as error:
        reason = str(error).rpartition(": ")[0]
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"the embedded model is missing or damaged, {reason}: reinstall grip-env") from error
    return HuggingFaceVLM.from_pretrained(TINY, **options)

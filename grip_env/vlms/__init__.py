"""Frozen vision-language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["TINY", "load_vlm"]

TINY = Path(__file__).parent / "tiny"
"""Where the embedded model is."""


def load_vlm(name_or_path: str | Path = "tiny", **options: Any) -> HuggingFaceVLM:
    """Load a frozen vision-language model.

    Args:
        name_or_path: "tiny" for the embedded model, else a folder that ``save_pretrained`` wrote.
        options: Passed on to :meth:`~grip_env.vlms.huggingface.HuggingFaceVLM.from_pretrained`.
    """
    from grip_env.vlms.huggingface import HuggingFaceVLM

    path = TINY if str(name_or_path) == "tiny" else name_or_path
    return HuggingFaceVLM.from_pretrained(path, **options)

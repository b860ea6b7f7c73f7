"""Rendering of chat templates, which come with a model and may be written to never end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["MAX_LINES", "render_chat"]

MAX_LINES = 1_000_000
"""The most lines that a template may run; those of published models run fewer than a thousand for a message."""


def render_chat(tokenizer: Any, template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a chat up to the start of the next answer.

    Args:
        tokenizer: The model's tokenizer, whose special tokens the template may name.
        template: The template, in Jinja.
        messages: One entry for each turn, with its role and content.

    Raises:
        ValueError: If the template runs more than :data:`MAX_LINES` lines. What else it raises is passed on.
    """
    with _bounded(MAX_LINES):
        return str(
            tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
        )


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Count the lines that templates run in this thread, and stop them after ``most``."""
    left = most

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":  # what Jinja compiles templates as
            return None
        left -= 1
        if left < 0:
            raise ValueError(
                f"the model's chat template runs more than {most:,} lines for one chat: it seems never to end; "
                "use the template that the model was published with"
            )
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)

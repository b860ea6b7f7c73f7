"""Single generated answers with text, log-likelihood and timings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from grip_env.vlms.base import Encoded

__all__ = ["Reply", "timed_reply"]


class Reply(NamedTuple):
    """A generated answer."""

    text: str
    log_likelihood: float
    """Mean log-likelihood of its tokens, without the end token; NaN if there are none."""
    prefill: float
    """Time to the first token, in seconds."""
    decode: float
    """Time for the other tokens, in seconds."""


class Replying(Protocol):
    """A model that answers token by token.

    :class:`~grip_env.vlms.huggingface.HuggingFaceVLM` is one.
    """

    @property
    def family(self) -> Any:
        """Model family with the ``tokenizer``."""
        ...

    def continue_greedily(
        self,
        encoded: Encoded,
        selection: torch.Tensor,
        max_new_tokens: int,
        watch: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the greedy continuation of one prompt, long (1, T), and its log-probabilities.

        The log-probabilities are float (1, T).
        """
        ...


@torch.no_grad()
def timed_reply(vlm: Replying, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int) -> Reply:
    """Answer one question greedily under one selection, and time it.

    Args:
        vlm: The model.
        encoded: One example.
        selection: bool (1, 1, N).
        max_new_tokens: Maximum number of tokens, the end token included.

    Raises:
        ValueError: If there is more than one example or selection.
    """
    if selection.shape[:2] != (1, 1):
        raise ValueError(f"expected one selection of one example, got {selection.shape[1]} of {len(encoded)}")
    times = [time.perf_counter()]
    tokens, chances = vlm.continue_greedily(
        encoded, selection, max_new_tokens, lambda step: times.append(time.perf_counter())
    )
    new, chosen = tokens[0], chances[0]
    special = torch.tensor([int(token) in vlm.family.tokenizer.all_special_ids for token in new])
    words = chosen[~special.to(chosen.device)]
    return Reply(
        text=vlm.family.tokenizer.decode(new, skip_special_tokens=True).strip(),
        log_likelihood=float(words.mean()) if len(words) else float("nan"),
        prefill=times[1] - times[0],
        decode=times[-1] - times[1],
    )

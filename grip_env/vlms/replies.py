"""One answer at a time, in full: its text, how sure the model was of it, and how long it took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from grip_env.vlms.base import Encoded

if TYPE_CHECKING:
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["GREEDY", "Reply", "timed_reply"]

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
"""Whatever a model's own ``generation_config`` says."""


class Reply(NamedTuple):
    """A generated answer."""

    text: str
    log_likelihood: float
    """Mean over its tokens, without the one that ends it; NaN if there are none."""
    prefill: float
    """Seconds to the first token."""
    decode: float
    """Seconds for the other tokens."""


class _Clock(BaseStreamer):
    """Notes when generation begins and when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def timed_reply(vlm: HuggingFaceVLM, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int) -> Reply:
    """Answer one question greedily under one selection, and watch the clock.

    Args:
        vlm: The model.
        encoded: One example.
        selection: bool (1, 1, N).
        max_new_tokens: Most tokens of the answer, its end included.

    Raises:
        ValueError: If there is more than one example or selection.
    """
    if selection.shape[:2] != (1, 1):
        raise ValueError(f"expected one selection of one example, got {selection.shape[1]} of {len(encoded)}")
    clock = _Clock()
    output = vlm.generate_ids(
        encoded,
        selection[0],
        max_new_tokens=max_new_tokens,
        **GREEDY,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = output.sequences[0]
    logits = torch.stack(output.logits)[:, 0].float()  # (T, V)
    chosen = logits.log_softmax(-1).gather(1, new[:, None])[:, 0]
    special = torch.tensor([int(token) in vlm.family.tokenizer.all_special_ids for token in new])
    words = chosen[~special.to(chosen.device)]
    return Reply(
        text=vlm.family.tokenizer.decode(new, skip_special_tokens=True).strip(),
        log_likelihood=float(words.mean()) if len(words) else float("nan"),
        prefill=clock.times[1] - clock.times[0],
        decode=clock.times[-1] - clock.times[1],
    )

"""Published scores from inside the language model, used to choose tokens *before* it.

FastV, SparseVLM and DART drop tokens between the layers of the language model. Here only their scores are used: the
first layers run over all tokens, their scores choose tokens, and the model then answers from the start with the chosen
tokens only. These are therefore ordinary selectors ("index-only"): comparable at equal k, and approximations of the
published methods. :mod:`agents.heuristics.inside_llm` has FastV and PyramidDrop as published.

They are not free: besides the run that answers, the first layers run once over all tokens, on a sequence without the
answer. Among equal scores the lower index is kept; the published code does not specify this.

B examples, N visual tokens, D width; W words: the tokens of the prompt after its last visual token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from agents.base import top_k
from grip_env.vlms.base import Encoded, FrozenVLM

if TYPE_CHECKING:
    from grip_env.vlms.decoder.staged_forward import StagedForward

__all__ = ["DARTScore", "FastVScore", "SparseVLMScore", "text_raters"]


@dataclass(frozen=True)
class FastVScore:
    """Selector that keeps the tokens the prompt's last token attends to most in layer K - 1.

    The attention is averaged over heads; layers count from 0.

    Source: Chen et al., "An image is worth 1/2 tokens after layer 2: plug-and-play inference acceleration for large
    vision-language models" (FastV), ECCV 2024, arXiv 2403.06764, where the tokens leave before layer K.

    Raises:
        NotImplementedError: When called with a model whose layers cannot be run one by one.
        ValueError: When called with a model of fewer than K layers.
    """

    layer: int = 2
    """K, at least 1: the layer before which FastV drops; K - 1 layers and the attention of one more are run."""

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`."""
        run = _look("FastV score", vlm, encoded, self.layer - 1)
        return top_k(run.attention(), counts, encoded.token_mask)


@dataclass(frozen=True)
class SparseVLMScore:
    """Selector that keeps the tokens attended to most by the words that fit the image.

    :func:`text_raters` chooses these words, as in version 1 of the published code. The attention is averaged over them
    and over heads. The published method drops rank-adaptive shares at several layers and merges some of the dropped
    tokens; neither is done here.

    Source: Zhang et al., "SparseVLM: visual token sparsification for efficient vision-language model inference", ICML
    2025, arXiv 2410.04417.

    Raises:
        NotImplementedError: When called with a model whose layers cannot be run one by one.
        ValueError: When called with examples without a question, or a model without the layer.
    """

    layer: int = 2
    """Layer whose attention is used, counted from 0."""

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`."""
        _check_questions("SparseVLM score", encoded)
        run = _look("SparseVLM score", vlm, encoded, 0)
        raters = text_raters(run.hidden(), run.hidden("words"), encoded.token_mask, run.words)
        _advance("SparseVLM score", run, self.layer)
        return top_k(run.attention(raters), counts, encoded.token_mask)


def text_raters(
    tokens: torch.Tensor, words: torch.Tensor, token_mask: torch.Tensor, word_mask: torch.Tensor
) -> torch.Tensor:
    """Return a mask of the words that rate visual tokens: words of above-average relevance.

    Each visual token spreads a weight of 1 over the words: the softmax of its dot products with them. The relevance of
    a word is the mean of its weights over the tokens, and raters are the words whose relevance is above the mean over
    the words. If no word is above the mean, for example if all are equal, all words are raters.

    Args:
        tokens: Embeddings of the visual tokens, float (B, N, D).
        words: Embeddings of the words, float (B, W, D).
        token_mask: Which tokens are real, bool (B, N).
        word_mask: Which words are real, bool (B, W).

    Returns:
        bool (B, W).

    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> text_raters(torch.ones(1, 1, 1), torch.tensor([[[2.0], [-1.0], [0.5]]]), one, one.expand(1, 3))
    tensor([[ True, False, False]])
    """
    products = tokens.float() @ words.float().transpose(1, 2)  # (B, N, W)
    share = products.masked_fill(~word_mask[:, None], -torch.inf).softmax(-1)
    relevance = (share * token_mask[..., None]).sum(1) / token_mask.sum(1, keepdim=True)  # (B, W)
    raters = (relevance > relevance.sum(1, keepdim=True) / word_mask.sum(1, keepdim=True)) & word_mask
    return torch.where(raters.any(1, keepdim=True), raters, word_mask)


@dataclass(frozen=True)
class DARTScore:
    """Selector that keeps a few pivots and, for each pivot, the tokens least similar to it.

    Pivots are the visual tokens and the words whose keys in layer K - 1 have the largest L1 norm, largest first. Visual
    pivots are kept. Then each pivot, visual ones first, takes its share of the other tokens: the ones of lowest cosine
    similarity to it. Similarity is measured on the input of layer K after the model's final norm. Shares are equal, and
    the remainder goes to the first pivots, so that exactly k tokens are kept (the published code rounds down, does not
    fix the order, and keeps up to 4 tokens more than k).

    Source: Wen et al., "Stop looking for important tokens in multimodal language models: duplication matters more"
    (DART), EMNLP 2025, arXiv 2502.11494, where the tokens leave before layer K.

    Raises:
        NotImplementedError: When called with a model whose layers cannot be run one by one.
        ValueError: When called with examples without a question, or a model of fewer than K layers.
    """

    layer: int = 2
    """K, at least 1: the layer before which DART drops; K layers are run."""
    token_pivots: int = 4
    """Maximum number of visual pivots; never more than k."""
    word_pivots: int = 4
    """Maximum number of words that are pivots."""

    def __call__(
        self, vlm: FrozenVLM, encoded: Encoded, counts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Choose tokens; see :class:`agents.base.Selector`."""
        _check_questions("DART score", encoded)
        run = _look("DART score", vlm, encoded, self.layer - 1)
        sizes = [run.keys(part).float().abs().sum(-1) for part in ("tokens", "words")]  # (B, N), (B, W)
        run.advance(self.layer)
        tokens, words = (F.normalize(run.hidden(part, normed=True).float(), dim=-1) for part in ("tokens", "words"))
        mask = encoded.token_mask
        chosen = top_k(sizes[0], counts.clamp_max(self.token_pivots), mask)
        chosen_words = top_k(sizes[1], torch.full_like(counts, self.word_pivots), run.words)
        pivots = torch.cat(
            [
                _first(tokens, sizes[0], chosen, self.token_pivots),
                _first(words, sizes[1], chosen_words, self.word_pivots),
            ],
            1,
        )  # (B, P, D)
        there = torch.cat(
            [
                torch.arange(self.token_pivots, device=mask.device) < chosen.sum(1, keepdim=True),
                torch.arange(self.word_pivots, device=mask.device) < chosen_words.sum(1, keepdim=True),
            ],
            1,
        )  # (B, P)
        similarity = pivots @ tokens.transpose(1, 2)  # (B, P, N)
        rest, count = counts - chosen.sum(1), there.sum(1).clamp_min(1)
        turn = there.cumsum(1) - 1  # index of each pivot in its row
        share = (rest // count)[:, None] + (turn < (rest % count)[:, None])
        for pivot in range(there.shape[1]):
            quota = torch.where(there[:, pivot], share[:, pivot], 0)
            chosen = chosen | top_k(-similarity[:, pivot], quota, mask & ~chosen)
        return chosen


def _first(values: torch.Tensor, sizes: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Return the chosen rows of ``values`` (B, N, D), largest first, as (B, count, D).

    Rows beyond the chosen ones have arbitrary values.
    """
    order = sizes.masked_fill(~chosen, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
    found = values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
    return F.pad(found, (0, 0, 0, count - found.shape[1]))


def _look(name: str, vlm: FrozenVLM, encoded: Encoded, layer: int) -> StagedForward:
    """Begin a pass over the prompts and run it up to ``layer``; errors name the method."""
    from grip_env.vlms.decoder.staged_forward import StagedForward  # loads transformers

    try:
        run = StagedForward(vlm, encoded, with_answers=False)  # type: ignore[arg-type] # others are refused there
    except NotImplementedError as error:
        raise NotImplementedError(f"{name}: {error}") from None
    _advance(name, run, layer)
    return run


def _advance(name: str, run: StagedForward, layer: int) -> None:
    if not 0 <= layer < run.layers:
        raise ValueError(
            f"{name} would look into layer {layer}, and the language model has the layers 0 to {run.layers - 1}: give "
            "another 'layer'"
        )
    run.advance(layer)


def _check_questions(name: str, encoded: Encoded) -> None:
    silent = (~encoded.question_mask.any(1)).nonzero().flatten().tolist()
    if silent:
        raise ValueError(f"{name} needs a question about each image, and the examples {silent} have none")

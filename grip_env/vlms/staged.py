"""The language model layer by layer, with visual tokens dropped between the layers.

Nothing of transformers is copied or patched: the model's own embedding, decoder layers, rotary embedding, final norm
and head are called in order, on a sequence that gets shorter. FastV (Chen et al., ECCV 2024, arXiv 2403.06764) and
PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247) drop visual tokens at such points.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from grip_env.vlms.answers import answer_columns, greedy_finds, mean_log_likelihood
from grip_env.vlms.base import Encoded, Scores, negative_divergence
from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["STAGED_DECODERS", "STAGED_FAMILIES", "StagedForward", "decoder_of"]

STAGED_FAMILIES = ("idefics3", "internvl", "llava", "llava_next", "llava_onevision", "smolvlm")
"""Families (``config.model_type``) that hand visual tokens to a causal decoder at positions of one axis."""
STAGED_DECODERS = ("llama", "mistral", "qwen2")
"""Language models (``config.text_config.model_type``) made of the same layers."""


def decoder_of(vlm: Any) -> Any:
    """Return the decoder of a model: ``embed_tokens``, ``layers``, ``rotary_emb`` and ``norm``.

    Raises:
        NotImplementedError: If its layers cannot be run one by one here: it is no :class:`HuggingFaceVLM`, or its
            family, its language model or its attention is another.
    """
    if not isinstance(vlm, HuggingFaceVLM):
        given = f"{getattr(vlm, 'name', vlm)!r} is a {type(vlm).__name__}, whose layers are out of reach"
    else:
        config = vlm.model.config
        text = config.get_text_config()
        if config.model_type in STAGED_FAMILIES and text.model_type in STAGED_DECODERS:
            if text._attn_implementation not in ("eager", "sdpa"):
                raise NotImplementedError(
                    f"pruning between layers needs attention of 'eager' or 'sdpa', not {text._attn_implementation!r}: "
                    "load the model with one of them"
                )
            inner = vlm.model.model
            return inner.text_model if hasattr(inner, "text_model") else inner.language_model
        given = f"{vlm.name!r} is of family {config.model_type!r} with a language model {text.model_type!r}"
    raise NotImplementedError(
        f"pruning between the layers of the language model is there for HuggingFaceVLM models of the families "
        f"{', '.join(STAGED_FAMILIES)} with a language model of type {', '.join(STAGED_DECODERS)}; {given}"
    )


class StagedForward:
    """One pass through the language model, which stops between layers so that visual tokens can be dropped.

    Args:
        vlm: The frozen model.
        encoded: B examples; the sequence of each is its prompt and its answer.
        selection: Which visual tokens enter at all, bool (B, N); every one by default.

    Raises:
        NotImplementedError: If the model is of a kind that :func:`decoder_of` refuses.
        ValueError: If ``selection`` is not bool (B, N).

    Dropped tokens leave the sequence, so later layers have less to do. What is left keeps its positions, or is
    renumbered at each drop where the model's ``position_policy`` is "reindex". Dropping at layer 0 alone is what
    ``vlm.score`` does; dropping at layer l equals hiding the tokens from attention in layer l and all after it.
    Attention is causal: what visual tokens hold depends on nothing that comes after them, so not on the answer, nor on
    the question where that follows the image.

    >>> from grip_env import SceneTask, load_vlm
    >>> vlm = load_vlm("tiny")
    >>> encoded = vlm.encode([SceneTask().example("test", index) for index in range(2)])
    >>> run = StagedForward(vlm, encoded)
    >>> run.advance(2)
    >>> seen = run.attention()  # (B, N)
    >>> run.drop(seen >= seen.quantile(0.5, dim=1, keepdim=True))  # half of them go, after two layers
    >>> run.alive.sum(1).tolist(), run.finish().log_likelihood.shape
    ([72, 72], torch.Size([2, 1]))
    """

    def __init__(self, vlm: HuggingFaceVLM, encoded: Encoded, selection: torch.Tensor | None = None) -> None:
        self.vlm = vlm
        self.layer = 0
        """How many layers have run: the boundary at which the pass stands."""
        decoder = decoder_of(vlm)
        self.layers = len(decoder.layers)
        """How many layers there are."""
        assert encoded.places is not None
        self._ids = encoded.input_ids  # (B, L)
        self._places = encoded.places  # (B, L)
        self._answers = encoded.answer_lengths  # (B,)
        self._present = torch.arange(self._ids.shape[1], device=vlm.device) < encoded.lengths[:, None]  # (B, L)
        visual = (self._ids == vlm.family.image_token_id) & self._present
        self._token = torch.where(visual, visual.cumsum(1) - 1, -1)  # (B, L), which visual token; -1: none
        self._tokens = encoded.token_mask.shape[1]
        self._count = encoded.token_mask.sum(1)  # (B,)
        self._passed = torch.zeros_like(self._count)  # (B,), visual tokens let through, of all layers
        with torch.no_grad():
            words = decoder.embed_tokens(self._ids.masked_fill(~self._present | visual, 0))
            width = encoded.tokens.shape[-1]
            index = self._token.clamp_min(0)[..., None].expand(-1, -1, width)
            self._hidden = torch.where(visual[..., None], encoded.tokens.to(words.dtype).gather(1, index), words)
        if selection is not None:
            self.drop(selection)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, rows: slice | Sequence[int] | torch.Tensor) -> StagedForward:
        """Return a pass of its own over the chosen rows, at the same layer.

        A row may come several times: the layers that ran serve every continuation, such as a group of selections.
        """
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.long)
        index = index.to(self.vlm.device)
        other = copy.copy(self)  # no tensor is ever written to: those of both may be shared
        for name in ("_ids", "_places", "_answers", "_present", "_token", "_count", "_passed", "_hidden"):
            setattr(other, name, getattr(self, name)[index])
        return other

    @property
    def alive(self) -> torch.Tensor:
        """Which visual tokens are in the sequence, bool (B, N)."""
        return self._per_token(torch.ones_like(self._present))

    def hidden(self) -> torch.Tensor:
        """Return what comes out of the layers that ran at each visual token, in the model's precision, (B, N, D).

        At layer 0 these are the visual tokens themselves. Dropped tokens and padding are zero.
        """
        return self._per_token(self._hidden)

    def lengths(self) -> torch.Tensor:
        """Return how many tokens are in each sequence, words and answer included, long (B,)."""
        return self._present.sum(1)

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Run the layers from where the pass stands up to, but not including, ``layer``.

        Raises:
            ValueError: If that is behind, or there are fewer layers.
        """
        if not self.layer <= layer <= self.layers:
            raise ValueError(
                f"the pass stands at layer {self.layer} of {self.layers} and cannot go to {layer}: give a layer from "
                f"{self.layer} to {self.layers}"
            )
        if layer == self.layer:
            return
        decoder = decoder_of(self.vlm)
        # what pads a row is at its end, where no token of the row looks, so that being causal is all a mask has to say;
        # fused attention is causal by itself where it gets none
        fused = decoder.config._attn_implementation == "sdpa"
        parts = []
        for rows in self._chunks():
            hidden, places = self._hidden[rows], self._places[rows]
            mask = None if fused else _causal(hidden)
            rotary = decoder.rotary_emb(hidden, position_ids=places)
            for block in decoder.layers[self.layer : layer]:
                hidden = block(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
            parts.append(hidden)
        self._hidden = torch.cat(parts)
        self._passed = self._passed + (self._token >= 0).sum(1) * (layer - self.layer)
        self.layer = layer

    def drop(self, keep: torch.Tensor) -> None:
        """Drop visual tokens for good: later layers do not see them.

        Args:
            keep: bool (B, N), True for those that stay; what was dropped before stays so.

        Raises:
            ValueError: If ``keep`` has another shape or dtype.
        """
        expected = (len(self), self._tokens)
        if keep.dtype != torch.bool or keep.shape != expected:
            raise ValueError(
                f"keep must be bool of shape {expected}, one entry for each visual token of each example; got "
                f"{keep.dtype} of shape {tuple(keep.shape)}"
            )
        keep = keep.to(self.vlm.device)
        stays = self._present & ((self._token < 0) | keep.gather(1, self._token.clamp_min(0)))
        count = stays.sum(1)
        longest = int(count.max())
        order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]  # what stays moves to the left
        self._present = torch.arange(longest, device=order.device) < count[:, None]
        self._ids = self._ids.gather(1, order)
        self._token = self._token.gather(1, order).masked_fill(~self._present, -1)
        self._places = self._places.gather(1, order)
        if self.vlm.position_policy == "reindex":
            self._places = torch.arange(longest, device=order.device).expand_as(order) + self.vlm.family.first_place
        self._hidden = self._hidden.gather(1, order[..., None].expand(-1, -1, self._hidden.shape[-1]))

    @torch.no_grad()
    def attention(self) -> torch.Tensor:
        """Return what the next layer lets the last token of the prompt see of each visual token, float32 (B, N).

        That is the softmax of its query with the keys of all tokens up to itself, averaged over heads; dropped tokens
        have 0. The layer is not run.

        Raises:
            ValueError: If no layer is left.
        """
        if self.layer == self.layers:
            raise ValueError(f"all {self.layers} layers have run, none is left that could attend: ask before the last")
        decoder = decoder_of(self.vlm)
        block = decoder.layers[self.layer]
        inner = block.self_attn
        last = self._present.sum(1) - self._answers - 1  # (B,)
        parts = []
        for rows in self._chunks():
            normed = block.input_layernorm(self._hidden[rows])
            shape = (*normed.shape[:2], -1, inner.head_dim)
            query = inner.q_proj(normed).view(shape).transpose(1, 2)  # (B, heads, L, head_dim)
            key = inner.k_proj(normed).view(shape).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(normed, position_ids=self._places[rows]))
            query = query[torch.arange(len(query), device=last.device), :, last[rows]]  # (B, heads, head_dim)
            key = key.repeat_interleave(inner.num_key_value_groups, 1)
            logits = torch.einsum("bhd,bhld->bhl", query, key) * inner.scaling
            later = torch.arange(normed.shape[1], device=last.device) > last[rows, None]
            parts.append(logits.float().masked_fill(later[:, None], -torch.inf).softmax(-1).mean(1))
        return self._per_token(torch.cat(parts))

    @torch.no_grad()
    def finish(self, reference: torch.Tensor | None = None) -> Scores:
        """Run the layers that are left and score the answer; the fields have shape (B, 1).

        ``kept`` is the mean over the layers of the share of the visual tokens that went through.

        Args:
            reference: See :meth:`~grip_env.vlms.base.FrozenVLM.score`.

        Raises:
            ValueError: If the examples were encoded without answers.
        """
        if not bool(self._answers.all()):
            raise ValueError("there are no answers to score: encode the examples with their answers")
        self.advance(self.layers)
        logits, targets = self._answer()
        agreement = None
        if reference is not None:
            agreement = negative_divergence(reference.to(logits.device)[:, 0], logits[:, 0].log_softmax(-1))[:, None]
        return Scores(
            log_likelihood=mean_log_likelihood(logits, targets)[:, None],
            correct=greedy_finds(logits, targets)[:, None],
            kept=(self._passed / (self.layers * self._count.clamp_min(1)))[:, None],
            agreement=agreement,
        )

    def _answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the last layer predicts for the answers (B, T, V), and their ids (B, T), -100 where one ends."""
        at, real = answer_columns(self._present.sum(1) - self._answers, self._answers)  # (B, T)
        before = (at - 1)[..., None].expand(-1, -1, self._hidden.shape[-1])  # an id is predicted one column earlier
        final = decoder_of(self.vlm).norm(self._hidden.gather(1, before))
        logits: torch.Tensor = self.vlm.model.get_output_embeddings()(final).float()
        return logits, self._ids.gather(1, at).masked_fill(~real, -100)

    def _chunks(self) -> Iterator[slice]:
        """Split the rows so that no call of a layer gets more tokens than the model's ``token_budget``."""
        most = max(1, self.vlm.token_budget // self._ids.shape[1])
        for start in range(0, len(self), most):
            yield slice(start, start + most)

    def _per_token(self, values: torch.Tensor) -> torch.Tensor:
        """Spread values of the columns (B, L, ...) over the visual tokens (B, N, ...), zero where one is dropped."""
        row, column = (self._token >= 0).nonzero(as_tuple=True)
        spread = values.new_zeros(len(self), self._tokens, *values.shape[2:])
        spread[row, self._token[row, column]] = values[row, column]
        return spread


def _causal(hidden: torch.Tensor) -> torch.Tensor:
    """Return what eager attention adds to its logits (1, 1, L, L): each token sees itself and what comes before it."""
    length = hidden.shape[1]
    blank = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    return blank.triu(1)[None, None]

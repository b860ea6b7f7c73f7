"""Layer-by-layer forward pass of the language model that can drop visual tokens.

No code of transformers is copied or patched: the model's own embedding, decoder layers, rotary embedding, final norm
and head are called in order, on a sequence that gets shorter. FastV (Chen et al., ECCV 2024, arXiv 2403.06764) and
PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247) drop visual tokens at such points.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from grip_env.vlms.base import Encoded, Scores
from grip_env.vlms.decoder.supported import STAGED_DECODERS, STAGED_FAMILIES, decoder_in
from grip_env.vlms.huggingface import HuggingFaceVLM
from grip_env.vlms.likelihood import answer_columns, greedy_finds, mean_log_likelihood, negative_divergence

__all__ = ["Part", "StagedForward", "decoder_of"]


def decoder_of(vlm: Any) -> Any:
    """Return the decoder of a model that can be run layer by layer.

    It has ``embed_tokens``, ``layers``, ``rotary_emb`` and ``norm``.

    Raises:
        NotImplementedError: If the layers cannot be run one by one: the model is not a :class:`HuggingFaceVLM`, or its
            family, language model or attention implementation is not supported.
    """
    if not isinstance(vlm, HuggingFaceVLM):
        given = f"{getattr(vlm, 'name', vlm)!r} is a {type(vlm).__name__}, whose layers are out of reach"
    else:
        decoder = decoder_in(vlm.model)
        if decoder is not None:
            return decoder
        config = vlm.model.config
        text = config.get_text_config()
        if config.model_type in STAGED_FAMILIES and text.model_type in STAGED_DECODERS:
            raise NotImplementedError(
                f"running single layers needs attention of 'eager' or 'sdpa', not {text._attn_implementation!r}: "
                "load the model with one of them"
            )
        given = f"{vlm.name!r} is of family {config.model_type!r} with a language model {text.model_type!r}"
    raise NotImplementedError(
        f"running the layers of the language model one by one is there for HuggingFaceVLM models of the families "
        f"{', '.join(STAGED_FAMILIES)} with a language model of type {', '.join(STAGED_DECODERS)}; {given}"
    )


Part: TypeAlias = Literal["tokens", "words"]
"""Part of the sequence: the visual tokens (B, N), or the prompt's text tokens after them, the words (B, W)."""


class StagedForward:
    """One pass through the language model that can drop visual tokens between layers.

    Args:
        vlm: The frozen model.
        encoded: B examples; the sequence of each is its prompt and its answer.
        selection: Visual tokens that enter the first layer, bool (B, N); all by default.
        with_answers: If False, the answers are left out of the sequences. Then nothing can be scored, and all values
            are independent of the answers, to the last bit.
        position_policy: "original" keeps the positions of the remaining tokens, "reindex" renumbers them at each drop;
            by default the model's own.

    Raises:
        NotImplementedError: If :func:`decoder_of` does not support the model.
        ValueError: If ``selection`` is not bool (B, N).

    Dropped tokens leave the sequence, so later layers have less to compute. Dropping only at layer 0 is what
    ``vlm.score`` does; dropping at layer l is the same as hiding the tokens from attention in layer l and all after
    it. Attention is causal: the states of visual tokens depend only on what comes before them, so not on the answer,
    nor on a question that follows the image.

    All values refer to the boundary that the pass has reached: hidden states are the output of the layers that ran,
    keys and attention are those of the next layer. To prune by the attention of a layer after it has run, as FastV
    does, read the attention before the layer runs and drop after it, as below. B examples, N visual tokens, D width; W
    words: the tokens of the prompt after its last visual token, which are the question and the text that a chat
    template adds after it.

    >>> from grip_env import SceneTask, load_vlm
    >>> vlm = load_vlm("tiny")
    >>> encoded = vlm.encode([SceneTask().example("test", index) for index in range(2)])
    >>> run = StagedForward(vlm, encoded)
    >>> run.advance(1)
    >>> seen = run.attention()  # (B, N), of the second layer, from what goes into it
    >>> run.advance(2)
    >>> run.drop(seen >= seen.quantile(0.5, dim=1, keepdim=True))  # half of them go, after two layers
    >>> run.alive.sum(1).tolist(), run.finish().log_likelihood.shape
    ([72, 72], torch.Size([2, 1]))
    """

    def __init__(
        self,
        vlm: HuggingFaceVLM,
        encoded: Encoded,
        selection: torch.Tensor | None = None,
        with_answers: bool = True,
        position_policy: Literal["original", "reindex"] | None = None,
    ) -> None:
        self.vlm = vlm
        self.layer = 0
        """Number of layers that have run, which is the boundary that the pass has reached."""
        decoder = decoder_of(vlm)
        self.position_policy = vlm.position_policy if position_policy is None else position_policy
        vlm.family.check_position_policy(self.position_policy)
        self.layers = len(decoder.layers)
        """Number of layers."""
        assert encoded.position_ids is not None
        self._answers = encoded.answer_lengths if with_answers else torch.zeros_like(encoded.answer_lengths)  # (B,)
        lengths = encoded.lengths - encoded.answer_lengths + self._answers
        longest = int(lengths.max())
        self._ids = encoded.input_ids[:, :longest]  # (B, L)
        self._position_ids = encoded.position_ids[:, :longest]  # (B, L)
        column = torch.arange(longest, device=vlm.device)
        self._present = column < lengths[:, None]  # (B, L)
        visual = (self._ids == vlm.family.image_token_id) & self._present
        self._words = lengths - self._answers - torch.where(visual, column + 1, 0).amax(1)  # (B,)
        self._most_words = int(self._words.max())  # W
        self._token = torch.where(visual, visual.cumsum(1) - 1, -1)  # (B, L), index of the visual token, or -1
        self._tokens = encoded.token_mask.shape[1]
        self._count = encoded.token_mask.sum(1)  # (B,)
        self._passed = torch.zeros_like(self._count)  # (B,), visual tokens summed over the layers that ran
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
        """Return an independent pass over the chosen rows, at the same layer.

        A row may be chosen several times: the layers that ran serve every continuation, such as a group of selections.
        """
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.long)
        index = index.to(self.vlm.device)
        other = copy.copy(self)  # tensors are never written to, so they may be shared
        names = "_ids _position_ids _answers _words _present _token _count _passed _hidden"
        for name in names.split():
            setattr(other, name, getattr(self, name)[index])
        return other

    @property
    def alive(self) -> torch.Tensor:
        """Mask of the visual tokens in the sequence, bool (B, N)."""
        return self._of("tokens", torch.ones_like(self._present))

    @property
    def words(self) -> torch.Tensor:
        """Mask of the real words, which are never dropped, bool (B, W)."""
        return torch.arange(self._most_words, device=self._words.device) < self._words[:, None]

    def hidden(self, part: Part = "tokens", normed: bool = False) -> torch.Tensor:
        """Return the output of the layers that ran, (B, N, D) or (B, W, D).

        It has the model's precision. At layer 0 it consists of the visual tokens themselves, or the embeddings of the
        words. Dropped tokens and padding are zero.

        Args:
            part: The part of the sequence to return: visual tokens or words.
            normed: Whether to apply the norm that follows the last layer.
        """
        states = self._of(part, self._hidden)
        if not normed:
            return states
        with torch.no_grad():
            real = (self.alive if part == "tokens" else self.words)[..., None]
            # a norm may shift as well as scale, but missing tokens must stay zero
            return decoder_of(self.vlm).norm(states).masked_fill(~real, 0)

    def lengths(self) -> torch.Tensor:
        """Return the number of tokens in each sequence, words and answer included, long (B,)."""
        return self._present.sum(1)

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Run the layers from the current one up to, but not including, ``layer``.

        Raises:
            ValueError: If ``layer`` has already run, or there are fewer layers.
        """
        if not self.layer <= layer <= self.layers:
            raise ValueError(
                f"the pass stands at layer {self.layer} of {self.layers} and cannot go to {layer}: give a layer from "
                f"{self.layer} to {self.layers}"
            )
        if layer == self.layer:
            return
        decoder = decoder_of(self.vlm)
        # padding is at the end of a row, where no token of the row attends to it, so a causal mask is enough;
        # without a mask, fused attention is causal by itself
        fused = decoder.config._attn_implementation == "sdpa"
        parts = []
        for rows in self._chunks():
            hidden, position_ids = self._hidden[rows], self._position_ids[rows]
            mask = None if fused else _causal(hidden)
            rotary = decoder.rotary_emb(hidden, position_ids=position_ids)
            for block in decoder.layers[self.layer : layer]:
                hidden = block(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
            parts.append(hidden)
        self._hidden = torch.cat(parts)
        self._passed = self._passed + (self._token >= 0).sum(1) * (layer - self.layer)
        self.layer = layer

    def drop(self, keep: torch.Tensor) -> None:
        """Drop visual tokens permanently: later layers do not see them.

        Args:
            keep: bool (B, N), True for tokens to keep; tokens that were dropped before stay dropped.

        Raises:
            ValueError: If ``keep`` has the wrong shape or dtype.
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
        order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]  # kept columns move to the left
        self._present = torch.arange(longest, device=order.device) < count[:, None]
        self._ids = self._ids.gather(1, order)
        self._token = self._token.gather(1, order).masked_fill(~self._present, -1)
        self._position_ids = self._position_ids.gather(1, order)
        if self.position_policy == "reindex":
            self._position_ids = (
                torch.arange(longest, device=order.device).expand_as(order) + self.vlm.family.first_position
            )
        self._hidden = self._hidden.gather(1, order[..., None].expand(-1, -1, self._hidden.shape[-1]))

    @torch.no_grad()
    def keys(self, part: Part = "tokens") -> torch.Tensor:
        """Return the keys of the next layer, with all heads concatenated, (B, N, K) or (B, W, K).

        They have the model's precision and include the rotary embedding. With grouped heads, each key occurs once.
        Dropped tokens and padding are zero. The layer is not run.

        Raises:
            ValueError: If no layer is left.
        """
        found = [self._queries_and_keys(rows)[1].transpose(1, 2).flatten(2) for rows in self._chunks()]
        return self._of(part, torch.cat(found))

    @torch.no_grad()
    def attention(self, raters: torch.Tensor | None = None) -> torch.Tensor:
        """Return the prompt's attention to each visual token in the next layer, float32 (B, N).

        This is the softmax of a query with the keys of all tokens up to itself, averaged over heads; it is 0 for
        dropped tokens. The layer is not run.

        Args:
            raters: Words whose queries are used, bool (B, W); their attention is averaged. By default the query is that
                of the prompt's last token.

        Raises:
            ValueError: If no layer is left, or ``raters`` has the wrong shape or dtype or a row without real words.
        """
        if raters is None:
            ask = self._present.sum(1)[:, None] - self._answers[:, None] - 1  # (B, R), columns of the queries
            weight = torch.ones_like(ask, dtype=torch.float32)  # (B, R)
        else:
            ask, weight = self._word_columns(), self._check_raters(raters).float()
            weight = weight / weight.sum(1, keepdim=True)
        parts = []
        for rows in self._chunks():
            query, key = self._queries_and_keys(rows)
            inner = decoder_of(self.vlm).layers[self.layer].self_attn
            index = ask[rows, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            query = query.gather(2, index)  # (b, heads, R, head_dim)
            key = key.repeat_interleave(inner.num_key_value_groups, 1)
            logits = torch.einsum("bhrd,bhld->bhrl", query, key) * inner.scaling
            later = torch.arange(key.shape[2], device=ask.device) > ask[rows, :, None]  # (b, R, L)
            seen = logits.float().masked_fill(later[:, None], -torch.inf).softmax(-1).mean(1)
            parts.append((seen * weight[rows, :, None]).sum(1))
        return self._of("tokens", torch.cat(parts))

    def _check_raters(self, raters: torch.Tensor) -> torch.Tensor:
        real = self.words
        if raters.dtype != torch.bool or raters.shape != real.shape:
            raise ValueError(
                f"raters must be bool of shape {tuple(real.shape)}, one entry for each word of each example; got "
                f"{raters.dtype} of shape {tuple(raters.shape)}"
            )
        raters = raters.to(real.device) & real
        silent = (~raters.any(1)).nonzero().flatten().tolist()
        if silent:
            raise ValueError(f"the examples {silent} have no raters: choose at least one real word of each")
        return raters

    def _queries_and_keys(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotated queries and keys of the next layer, (b, heads, L, head_dim).

        With grouped heads, the keys have fewer heads.
        """
        if self.layer == self.layers:
            raise ValueError(f"all {self.layers} layers have run, none is left that could attend: ask before the last")
        decoder = decoder_of(self.vlm)
        block = decoder.layers[self.layer]
        normed = block.input_layernorm(self._hidden[rows])
        shape = (*normed.shape[:2], -1, block.self_attn.head_dim)
        query = block.self_attn.q_proj(normed).view(shape).transpose(1, 2)
        key = block.self_attn.k_proj(normed).view(shape).transpose(1, 2)
        rotary = decoder.rotary_emb(normed, position_ids=self._position_ids[rows])
        rotated: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb(query, key, *rotary)
        return rotated

    @torch.no_grad()
    def finish(self, reference: torch.Tensor | None = None) -> Scores:
        """Run the remaining layers and score the answer; the fields have shape (B, 1).

        ``kept`` is the share of visual tokens that went through a layer, averaged over the layers.

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
        """Return logits (B, T, V) and ids (B, T) of the answers; ids are -100 after the end."""
        read, targets = self._read()
        final = decoder_of(self.vlm).norm(
            self._hidden.gather(1, read[..., None].expand(-1, -1, self._hidden.shape[-1]))
        )
        logits: torch.Tensor = self.vlm.model.get_output_embeddings()(final).float()
        return logits, targets

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns that predict the answers (B, T), and the answers' ids (B, T).

        After the end of an answer, ids are -100.
        """
        at, real = answer_columns(self._present.sum(1) - self._answers, self._answers)
        return at - 1, self._ids.gather(1, at).masked_fill(~real, -100)  # an id is predicted one column earlier

    def _chunks(self) -> Iterator[slice]:
        """Split the rows so that each call of a layer stays within the ``token_budget``."""
        most = max(1, self.vlm.token_budget // self._ids.shape[1])
        for start in range(0, len(self), most):
            yield slice(start, start + most)

    def _word_columns(self) -> torch.Tensor:
        """Return the columns of the words, long (B, W), with any valid column as padding."""
        begin = self._present.sum(1) - self._answers - self._words
        columns = begin[:, None] + torch.arange(self._most_words, device=begin.device)
        return columns.clamp_max(self._ids.shape[1] - 1)

    def _of(self, part: Part, values: torch.Tensor) -> torch.Tensor:
        """Return values of columns (B, L, ...) by visual token or word, zero where missing."""
        if part == "words":
            inner = (1,) * (values.dim() - 2)
            index = self._word_columns().view(*self.words.shape, *inner).expand(-1, -1, *values.shape[2:])
            return values.gather(1, index).masked_fill(~self.words.view(*self.words.shape, *inner), 0)
        if part != "tokens":
            raise ValueError(f"a part of the sequence is 'tokens' or 'words', not {part!r}")
        row, column = (self._token >= 0).nonzero(as_tuple=True)
        spread = values.new_zeros(len(self), self._tokens, *values.shape[2:])
        spread[row, self._token[row, column]] = values[row, column]
        return spread


def _causal(hidden: torch.Tensor) -> torch.Tensor:
    """Return the causal mask that eager attention adds to its logits, (1, 1, L, L)."""
    length = hidden.shape[1]
    blank = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    return blank.triu(1)[None, None]

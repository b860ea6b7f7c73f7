"""Scoring of answers by a frozen model of transformers under several selections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from grip_env.vlms.base import Encoded, Scores
from grip_env.vlms.decoder.last_layer import logits_at, trunk_of
from grip_env.vlms.encoding import EncodingVLM
from grip_env.vlms.likelihood import answer_columns, greedy_finds, mean_log_likelihood, negative_divergence

__all__ = ["ScoringVLM"]


class ScoringVLM(EncodingVLM):
    """Base class of :class:`~grip_env.vlms.huggingface.HuggingFaceVLM` with its scoring."""

    def score(
        self,
        encoded: Encoded,
        selection: torch.Tensor,
        first_token: bool = False,
        reference: torch.Tensor | None = None,
    ) -> Scores:
        """Score every selection; see :class:`~grip_env.vlms.base.FrozenVLM`."""
        shape = selection.shape[:2]
        likelihood = torch.empty(
            shape.numel(), device=encoded.lengths.device
        )  # float32, whatever the model's precision
        correct = torch.empty_like(likelihood, dtype=torch.bool)
        first: torch.Tensor | None = None
        agreement: torch.Tensor | None = None
        if reference is not None:
            if reference.dim() != 3 or reference.shape[:2] != (len(encoded), 1):
                raise ValueError(
                    f"reference must have shape ({len(encoded)}, 1, vocabulary); got {tuple(reference.shape)}: give "
                    "first_token of the scores of these examples with every token kept"
                )
            reference = reference.to(self.device)
            agreement = torch.empty_like(likelihood)
        with torch.no_grad():
            for rows, logits, targets in self._answers(encoded, selection, encoded.tokens):
                likelihood[rows] = mean_log_likelihood(logits, targets)
                correct[rows] = greedy_finds(logits, targets)
                if not first_token and reference is None:
                    continue
                start = logits[:, 0].log_softmax(-1)  # predicted at the end of the prompt, (R, V)
                if first_token:
                    first = likelihood.new_empty(*likelihood.shape, start.shape[1]) if first is None else first
                    first[rows] = start
                if reference is not None and agreement is not None:
                    agreement[rows] = negative_divergence(reference[rows // shape[1], 0], start)
        return Scores(
            log_likelihood=likelihood.reshape(shape),
            correct=correct.reshape(shape),
            kept=encoded.kept_fraction(selection),
            first_token=None if first is None else first.reshape(*shape, -1),
            agreement=None if agreement is None else agreement.reshape(shape),
        )

    def log_likelihood(
        self, encoded: Encoded, selection: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean answer log-likelihood (B, G); see :class:`~grip_env.vlms.base.FrozenVLM`."""
        features = encoded.tokens if tokens is None else tokens
        rows, values = [], []
        with torch.set_grad_enabled(torch.is_grad_enabled() and features.requires_grad):
            for part, logits, targets in self._answers(encoded, selection, features):
                rows.append(part)
                values.append(mean_log_likelihood(logits, targets))
            order = torch.cat(rows).argsort()
            return torch.cat(values)[order].reshape(selection.shape[:2])

    def _check(self, encoded: Encoded, selection: torch.Tensor) -> None:
        batch, tokens = encoded.token_mask.shape
        if selection.dtype != torch.bool or selection.dim() != 3 or selection.shape[::2] != (batch, tokens):
            raise ValueError(
                f"selection must be bool of shape ({batch}, G, {tokens}); got {selection.dtype} of shape "
                f"{tuple(selection.shape)}: give one bool mask over the visual tokens for each of the G selections"
            )

    def _sequences(
        self, encoded: Encoded, selection: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a mask of the ids that each (example, selection) pair keeps, bool (B * G, L).

        Also return the example of each pair and the number of ids it keeps, both long (B * G,).
        """
        batch, group, _ = selection.shape
        inside = torch.arange(encoded.input_ids.shape[1], device=self.device) < lengths[:, None]  # (B, L)
        visual = (encoded.input_ids == self.family.image_token_id) & inside
        index = (visual.cumsum(1) - 1).clamp_min(0)  # index of the visual token at a placeholder
        chosen = (selection & encoded.token_mask[:, None]).gather(2, index[:, None].expand(-1, group, -1))
        stays = torch.where(visual[:, None], chosen, inside[:, None]).flatten(0, 1)
        rows = torch.arange(batch, device=self.device).repeat_interleave(group)
        return stays, rows, stays.sum(1)

    def _answers(
        self, encoded: Encoded, selection: torch.Tensor, features: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Run the language model on the pruned sequences, in micro-batches of similar length.

        Yields:
            Indices into the flattened pairs (R,), logits at the answer's positions (R, T, V) and the answer's ids
            (R, T), -100 where an answer is shorter than T.
        """
        self._check(encoded, selection)
        if not bool(encoded.answer_lengths.all()):
            raise ValueError("there are no answers to score: encode the examples with their answers")
        # an id is predicted one column earlier, so nothing is read at the last one: it is left out
        stays, example, lengths = self._sequences(encoded, selection, encoded.lengths - 1)
        begin = encoded.lengths - encoded.answer_lengths
        at, real = answer_columns(begin, encoded.answer_lengths, elsewhere=0)  # (B, T)
        answers = encoded.input_ids.gather(1, at).masked_fill(~real, -100)
        flat = selection.flatten(0, 1)
        trunk = trunk_of(self.model)
        for rows in _by_length(lengths, self.token_budget):
            ids, mask, position_ids = self._compact(encoded, stays[rows], example[rows])
            answer = encoded.answer_lengths[example[rows]]  # (R,)
            before = mask.sum(1) - answer  # (R,), where the prompt ends
            column = torch.arange(ids.shape[1], device=self.device)
            inputs = {
                "input_ids": ids,
                # always given: without it, positions with gaps are read as packed sequences. Causal attention never
                # reaches the padding at the end, and with a mask of ones fused attention needs no mask
                "attention_mask": (mask if trunk is None else torch.ones_like(mask)).long(),
                "position_ids": position_ids,
                "use_cache": False,
                **self.family.token_types(ids, column > before[:, None]),
                **self._images(encoded, features, flat[rows], example[rows]),
            }
            first = int(before.min())  # logits before this column predict no answer
            read = answer_columns(before, answer, elsewhere=first)[0]
            if trunk is not None:
                logits = logits_at(self.model, trunk(**inputs).last_hidden_state, position_ids, read)
            else:
                logits = self.model(**inputs, logits_to_keep=ids.shape[1] - first).logits.float()
                logits = logits.gather(1, (read - first)[..., None].expand(-1, -1, logits.shape[-1]))
            yield rows, logits, answers[example[rows], : read.shape[1]]

    def _compact(
        self, encoded: Encoded, stays: torch.Tensor, example: torch.Tensor, left: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return kept ids and attention mask (R, L), position ids (R, L) or (axes, R, L).

        Padding comes last, or first if ``left`` is True.
        """
        parts = self._moved(encoded, stays, example, left)
        if len(example) > 1 or "flash" not in str(self.model.config.get_text_config()._attn_implementation):
            return parts
        # flash attention drops a mask of ones, and then reads gaps in the positions of a single row as packed sequences
        ids, mask, position_ids = (torch.nn.functional.pad(part, (1, 0) if left else (0, 1)) for part in parts)
        return ids, mask, position_ids

    def _moved(
        self, encoded: Encoded, stays: torch.Tensor, example: torch.Tensor, left: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = stays.sum(1)
        longest = int(count.max())
        column = torch.arange(longest, device=self.device).expand(len(count), -1)
        if left:
            order = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, -longest:]
            column = column - (longest - count)[:, None]
            mask = column >= 0
        else:
            order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
            mask = column < count[:, None]
        ids = encoded.input_ids[example].gather(1, order)
        ids = ids.masked_fill(~mask, 0)
        assert encoded.position_ids is not None
        if self.position_policy == "reindex":
            position_ids = column + self.family.first_position
        elif self.family.axes == 1:
            position_ids = encoded.position_ids[example].gather(1, order)
        else:
            index = order[..., None].expand(-1, -1, self.family.axes)
            return (
                ids,
                mask,
                encoded.position_ids[example].gather(1, index).masked_fill(~mask[..., None], 0).permute(2, 0, 1),
            )
        return ids, mask, position_ids.masked_fill(~mask, 0)

    def _images(
        self, encoded: Encoded, features: torch.Tensor, selection: torch.Tensor, example: torch.Tensor
    ) -> dict[str, Any]:
        """Return the model's image arguments: the tokens of ``features`` that each pair (R,) keeps."""
        pair, token = (selection & encoded.token_mask[example]).nonzero(as_tuple=True)
        if not len(pair):
            return {}
        row = example[pair]
        layers = None if encoded.deepstack is None else encoded.deepstack[row, token]
        return {"mm_encoder_outputs": {"image": self.family.outputs(features[row, token], layers)}}


def _by_length(lengths: torch.Tensor, budget: int) -> Iterator[torch.Tensor]:
    """Split rows, shortest first, so that rows times longest length is at most ``budget``."""
    order = lengths.argsort(stable=True)
    ordered = lengths[order].tolist()
    start = 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or ordered[stop] * (stop + 1 - start) > budget:
            yield order[start:stop]
            start = stop

"""Any supported image-text model of transformers as a frozen vision-language model.

Pruning needs neither a fork nor a patch: the encoder's output is indexed, the placeholders of dropped tokens leave
``input_ids``, and attention mask and positions are indexed alike. The language model then runs on the short sequence.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from grip_env.tasks.base import Example
from grip_env.tasks.pictures import MAX_SIDE, PictureError, as_pixels
from grip_env.vlms.answers import answer_columns, greedy_finds, mean_log_likelihood
from grip_env.vlms.base import Encoded, Scores, negative_divergence
from grip_env.vlms.cache import PictureCache
from grip_env.vlms.cache_entries import encoder_digest, picture_scope
from grip_env.vlms.decoding import CACHE, Prompts, WholePrompts, decode, greedy
from grip_env.vlms.families import family_of
from grip_env.vlms.family import Picture
from grip_env.vlms.last_layer import CAPTURING, logits_at, trunk_of
from grip_env.vlms.loading import read_pretrained, refusal
from grip_env.vlms.options import SILENT, check_options, new_tokens, option, stopping_at_strings
from grip_env.vlms.prompts import prompt_ids, prompt_texts
from grip_env.vlms.replies import Reply, timed_reply
from grip_env.vlms.tower import known_images

__all__ = ["HuggingFaceVLM"]

QUESTION = "what is there?"
GREY = np.full((64, 64, 3), 128, np.uint8)
"""What a model that was just loaded is tried with."""


class HuggingFaceVLM:
    """A frozen image-text model of transformers.

    Args:
        model: The model, its weights all on one device; it is put in eval mode and its parameters stop requiring
            gradients.
        processor: Its tokenizer, image processor and chat template, as attributes of these names.
        name: Name for logs.
        position_policy: "original" keeps each token's position in the full sequence; "reindex" renumbers what is kept.
        token_budget: Most tokens, padding included, in one call of the language model; ``None`` takes 16,384, but on
            a CPU 4,096: more of them overflow its caches (the embedded model took 1.4 times as long with 16,384).
        cache: Where encoded images are kept on disk; the weights are read once for it, at the first image.
        max_side: Images with a longer side, in pixels, are shrunk before the image processor gets them; ``None`` leaves
            them as they are.

    Raises:
        ValueError: If the model's family is not supported, cannot do this, or the processor has no chat template.

    Scores do not depend on what else is in the batch, up to float rounding (1e-4 in log-likelihood in float32). When
    scoring, Llama-type language models run their last layer only where the answer is read
    (:mod:`grip_env.vlms.last_layer`), unless somebody changed how they run. Rotary embeddings of types "dynamic" and
    "longrope" look at the longest sequence of a batch, and so do scores where a model has them.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str = "vlm",
        position_policy: Literal["original", "reindex"] = "original",
        token_budget: int | None = None,
        cache: PictureCache | None = None,
        max_side: int | None = MAX_SIDE,
    ) -> None:
        self.family = family_of(model, processor)
        if position_policy not in ("original", "reindex"):
            raise ValueError(f"position_policy must be 'original' or 'reindex', not {position_policy!r}")
        if position_policy == "reindex" and self.family.axes > 1:
            raise ValueError(
                f"position_policy 'reindex' has no meaning for {model.config.model_type}, whose visual tokens have "
                "rows and columns as positions: use 'original'"
            )
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.position_policy = position_policy
        if token_budget is None:
            token_budget = 4096 if self.device.type == "cpu" else 16384
        self.token_budget = token_budget
        self.cache = cache
        self.max_side = max_side
        self._attended: dict[str, tuple[weakref.ref[Encoded], torch.Tensor]] = {}  # the last batch asked about

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        position_policy: Literal["original", "reindex"] = "original",
        token_budget: int | None = None,
        attn_implementation: str = "sdpa",
        cache: PictureCache | None = None,
        max_side: int | None = MAX_SIDE,
    ) -> HuggingFaceVLM:
        """Load a model and its processor from a folder (or, where one is reachable, a model hub).

        Raises:
            FileNotFoundError: If ``path`` looks like a folder and has no config.json.
            ValueError: If a part of it is missing or damaged, or its family is not supported.
        """
        model, processor = read_pretrained(path, dtype, attn_implementation)
        try:
            model = model.to(device)
        except Exception as error:  # of the device; quantised models refuse to move
            raise refusal(path, "put on a device", error, f"choose another device than {str(device)!r}") from error
        try:
            vlm = cls(model, processor, Path(path).name, position_policy, token_budget, cache, max_side)
        except ValueError:  # of an option, or of the model as a whole
            raise
        except Exception as error:
            raise refusal(path, "used", error, "save it again") from error
        try:
            vlm._try_processor()
            vlm._try_model()
        except Exception as error:  # files that can be read, with settings that are impossible or fit nothing else
            raise refusal(path, "used", error, "save it again") from error
        return vlm

    def _try_processor(self) -> None:
        """Raise an error if the processor cannot make a prompt and an image of what it is given."""
        family = self.family
        prompt = family.prompt(QUESTION)
        if prompt.count(family.marker) != 1 or QUESTION not in prompt:
            raise ValueError(
                f"the chat template of {self.name} makes {prompt[:200]!r} of an image and the question {QUESTION!r}, "
                f"where there should be the question and one {family.marker!r}"
            )
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = family.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids or max(*ids, family.image_token_id) >= vocabulary:
            raise ValueError(
                f"the tokenizer of {self.name} makes ids up to {max([0, *ids, family.image_token_id])}, and its model "
                f"knows {vocabulary} tokens"
            )
        family.check_sizes()
        values = family.pixels([GREY])["pixel_values"]
        if not bool(values.isfinite().all()):
            raise ValueError(f"the image processor of {self.name} makes NaN or infinities")

    def _try_model(self) -> None:
        """Raise an error if the model cannot see an image and answer, or gives NaN; few tokens make that quick."""
        cache, self.cache = self.cache, None  # no picture of the user's
        try:
            try:
                encoded = self.encode([Example(GREY, QUESTION, "nothing")])
            except ValueError:  # too long for the model's window, say: that depends on the picture, and is told there
                return
            selection = encoded.token_mask & (torch.arange(encoded.token_mask.shape[1], device=self.device) < 4)
            scores = self.score(encoded, selection[:, None])
        finally:
            self.cache = cache
        if not bool(scores.log_likelihood.isfinite().all()):
            raise ValueError(f"{self.name} gives NaN or infinities for a grey image in {self.model.dtype}")

    def __deepcopy__(self, memo: dict[int, Any]) -> HuggingFaceVLM:
        """Return the model itself: it never changes, and Gymnasium copies the arguments of environments."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all of it but hooks that transformers put on modules and that do not pickle.

        transformers installs them when attention or hidden states are first asked for, and does so again in the copy.
        """
        weights = [*self.model.parameters(), *self.model.buffers()]
        # a twin of the tree of modules alone: what is in the memo is shared, and the model itself goes on as it is
        memo: dict[int, Any] = {id(kept): kept for kept in (self.processor, self.processor.tokenizer, *weights)}
        model, family = copy.deepcopy((self.model, self.family), memo)
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", "") == CAPTURING:
                    del module._forward_hooks[key]
            module.__dict__.pop("_output_capturing_hooks_installed", None)
        return self.__dict__ | {"model": model, "family": family, "_attended": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickle, possibly in a process that never built such a model."""
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

        self.__dict__.update(state)
        # classes enter the list of what can be captured when they are built, and without it nothing is, silently
        for module in self.model.modules():
            if hasattr(module, "_can_record_outputs"):
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)

    @property
    def width(self) -> int:
        """Width D of visual tokens and question embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def checksum(self) -> str:
        """Return a digest of every weight and buffer: equal before and after training, or the model was not frozen."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return a digest of all that scores depend on, to the last bit, but examples and their ids: for caches.

        That is weights, configs, precision, attention kernels, image processor, position policy, ``token_budget``, the
        kind of device and the versions of the libraries that compute. The weights are read once.
        """
        scope = picture_scope(self.family, self._weights)
        parts = [scope, self.position_policy, self.token_budget, self.device.type, self.max_side]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _weights(self) -> str:
        return self.checksum()

    # -- encoding --------------------------------------------------------------------------------------------

    def prompt(self, question: str) -> str:
        """Return the text that asks ``question`` about an image, up to where the answer starts."""
        return self.family.prompt(question)

    @cached_property
    def _encoder_digest(self) -> str:
        return encoder_digest(self.model)

    def _pictures(self, images: list[np.ndarray]) -> list[Picture]:
        """Run the vision encoder on images, or only on those that are not in the cache."""
        if self.cache is None:
            return self.family.pictures(images)
        scope = picture_scope(self.family, self._encoder_digest)
        return self.cache.pictures(scope, images, self.family.pictures, self.device)

    def _check_window(self, longest: int, key: str = "") -> None:
        """Raise ValueError if sequences are longer than the model can tell positions, or than dropping allows.

        What counts is the whole sequence, whatever is dropped and however positions are numbered: the same model also
        scores it whole. Some layers of some models look back through a window, which dropped tokens would move.
        """
        text, where = self.model.config.get_text_config(), f"{key}: " if key else ""
        limit = _longest(text)
        if limit is not None and longest > limit:
            raise ValueError(
                f"{where}a prompt and its answer have {longest} tokens, more than the {limit} positions of this "
                "model's language model (max_position_embeddings): use smaller images or shorter texts"
            )
        window = getattr(text, "sliding_window", None)
        layers = getattr(text, "layer_types", None) or ["sliding_attention"]
        if window and longest > window and "sliding_attention" in layers:
            raise ValueError(
                f"{where}a prompt and its answer have {longest} tokens, more than the sliding window of {window} of "
                "this model's language model, which dropped tokens would shift: use smaller images or shorter questions"
            )

    def _check_room(self, prompts: torch.Tensor, most: int) -> None:
        """Raise ValueError if prompts (B,) and answers of up to ``most`` tokens do not fit the model."""
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(f"max_new_tokens must be a whole number of at least 1, not {most!r}")
        longest = int(prompts.max())
        limit = _longest(self.model.config.get_text_config())
        if limit is not None and longest + most > limit >= longest:
            raise ValueError(
                f"a prompt of {longest} tokens and {most} new ones are more than the {limit} positions of this model's "
                f"language model (max_position_embeddings): pass max_new_tokens={limit - longest} or less"
                if limit > longest
                else f"a prompt has {longest} tokens, as many as the language model has positions "
                "(max_position_embeddings), which leaves none for an answer: use smaller images or shorter questions"
            )
        self._check_window(longest + most)

    def _with_pixels(self, example: Example, number: int) -> Example:
        """Return an example with its image as the model gets it; see :func:`~grip_env.tasks.pictures.as_pixels`."""
        try:
            pixels = as_pixels(example.image, self.max_side)
        except PictureError as error:
            raise ValueError(f"the image of {example.key or f'example {number}'} {error}") from None
        return example if pixels is example.image else dataclasses.replace(example, image=pixels)

    @torch.no_grad()
    def encode(self, examples: Sequence[Example], with_answers: bool = True) -> Encoded:
        """Run the vision encoder once per example, or per image that is not in the cache.

        Args:
            examples: Images, questions and answers.
            with_answers: False leaves the answers out: what comes back can be answered, but not scored.

        Raises:
            ValueError: If there are no examples, an image is no picture, an answer is empty, or a sequence does not fit
                the model.
        """
        if not examples:
            raise ValueError("encode needs at least one example")
        examples = [self._with_pixels(example, number) for number, example in enumerate(examples, 1)]
        pictures = self._pictures([example.image for example in examples])
        expected = [example.answer for example in examples] if with_answers else None
        rows, answers = prompt_ids(self.family, prompt_texts(self.family, examples, pictures), expected, pictures)
        questions = self.family.tokenizer([example.question for example in examples], add_special_tokens=False)
        embed = self.model.get_input_embeddings()
        return self.assemble(
            examples,
            pictures,
            [torch.tensor(row, device=self.device) for row in rows],
            answers,
            [embed(torch.tensor(row, dtype=torch.long, device=self.device)) for row in questions["input_ids"]],
        )

    def assemble(
        self,
        examples: Sequence[Example],
        pictures: Sequence[Picture],
        ids: Sequence[torch.Tensor],
        answers: Sequence[int],
        questions: Sequence[torch.Tensor],
    ) -> Encoded:
        """Put encoded pictures and tokenized prompts together to a padded batch.

        Args:
            examples: What they came from.
            pictures: One for each example.
            ids: Prompt and answer of each, long (L,), with an image token for each visual token.
            answers: How many of these are the answer.
            questions: Embeddings of each question, float (Q, D).

        Raises:
            ValueError: If a sequence does not fit the model.
        """
        longest = max(range(len(ids)), key=lambda row: len(ids[row]))
        self._check_window(len(ids[longest]), examples[longest].key)

        def pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

        def pad_all(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            known = [row for row in rows if row is not None]
            return pad(known) if known else None

        def real(rows: Sequence[torch.Tensor]) -> torch.Tensor:
            return pad([torch.ones(len(row), dtype=torch.bool, device=self.device) for row in rows])

        return Encoded(
            examples=list(examples),
            tokens=pad([picture.tokens for picture in pictures]),
            token_mask=real([picture.tokens for picture in pictures]),
            positions=pad([picture.positions for picture in pictures]),
            question=pad(questions),
            question_mask=real(questions),
            input_ids=pad(ids),
            lengths=torch.tensor([len(row) for row in ids], device=self.device),
            answer_lengths=torch.tensor(answers, device=self.device),
            places=pad([self.family.places(row, picture) for row, picture in zip(ids, pictures, strict=True)]),
            deepstack=pad_all([picture.deepstack for picture in pictures]),
            cells=pad_all([picture.cells for picture in pictures]),
        )

    # -- scoring ---------------------------------------------------------------------------------------------

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
                start = logits[:, 0].log_softmax(-1)  # what the end of the prompt predicts, (R, V)
                if first_token:
                    first = likelihood.new_empty(*likelihood.shape, start.shape[1]) if first is None else first
                    first[rows] = start
                if reference is not None and agreement is not None:
                    agreement[rows] = negative_divergence(reference[rows // shape[1], 0], start)
        return Scores(
            log_likelihood=likelihood.reshape(shape),
            correct=correct.reshape(shape),
            kept=encoded.kept_share(selection),
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
        """Mark which ids of each (example, selection) pair stay: bool (B * G, L); also the pair's row and length."""
        batch, group, _ = selection.shape
        inside = torch.arange(encoded.input_ids.shape[1], device=self.device) < lengths[:, None]  # (B, L)
        visual = (encoded.input_ids == self.family.image_token_id) & inside
        index = (visual.cumsum(1) - 1).clamp_min(0)  # which visual token a placeholder stands for
        chosen = (selection & encoded.token_mask[:, None]).gather(2, index[:, None].expand(-1, group, -1))
        stays = torch.where(visual[:, None], chosen, inside[:, None]).flatten(0, 1)
        rows = torch.arange(batch, device=self.device).repeat_interleave(group)
        return stays, rows, stays.sum(1)

    def _answers(
        self, encoded: Encoded, selection: torch.Tensor, features: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Run the language model on what is kept, in micro-batches of similar length.

        Yields:
            Indices into the flattened pairs (R,), logits at the answer's positions (R, T, V) and the answer's ids
            (R, T), -100 where an answer is shorter than T.
        """
        self._check(encoded, selection)
        if not bool(encoded.answer_lengths.all()):
            raise ValueError("there are no answers to score: encode the examples with their answers")
        # an id is predicted one column earlier, so that nothing is read where the last one is: it stays out
        stays, example, lengths = self._sequences(encoded, selection, encoded.lengths - 1)
        begin = encoded.lengths - encoded.answer_lengths
        at, real = answer_columns(begin, encoded.answer_lengths, elsewhere=0)  # (B, T)
        answers = encoded.input_ids.gather(1, at).masked_fill(~real, -100)
        flat = selection.flatten(0, 1)
        trunk = trunk_of(self.model)
        for rows in _by_length(lengths, self.token_budget):
            ids, mask, places = self._compact(encoded, stays[rows], example[rows])
            answer = encoded.answer_lengths[example[rows]]  # (R,)
            before = mask.sum(1) - answer  # (R,), where the prompt ends
            column = torch.arange(ids.shape[1], device=self.device)
            inputs = {
                "input_ids": ids,
                # always given: without it, gapped positions are read as packed sequences. Where attention is causal
                # nothing looks at the padding at the end, and a mask of ones lets fused attention do without any
                "attention_mask": (mask if trunk is None else torch.ones_like(mask)).long(),
                "position_ids": places,
                "use_cache": False,
                **self.family.token_types(ids, column > before[:, None]),
                **self._images(encoded, features, flat[rows], example[rows]),
            }
            first = int(before.min())  # logits before this column predict no answer
            read = answer_columns(before, answer, elsewhere=first)[0]
            if trunk is not None:
                logits = logits_at(self.model, trunk(**inputs).last_hidden_state, places, read)
            else:
                logits = self.model(**inputs, logits_to_keep=ids.shape[1] - first).logits.float()
                logits = logits.gather(1, (read - first)[..., None].expand(-1, -1, logits.shape[-1]))
            yield rows, logits, answers[example[rows], : read.shape[1]]

    def _compact(
        self, encoded: Encoded, stays: torch.Tensor, example: torch.Tensor, left: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Move what stays together: ids and attention mask (R, L), position ids (R, L) or (axes, R, L).

        Padding comes last, or first if it is to be on the ``left``.
        """
        parts = self._moved(encoded, stays, example, left)
        if len(example) > 1 or "flash" not in str(self.model.config.get_text_config()._attn_implementation):
            return parts
        # flash attention drops a mask of ones, and then reads gaps in a single row's positions as packed sequences
        ids, mask, places = (torch.nn.functional.pad(part, (1, 0) if left else (0, 1)) for part in parts)
        return ids, mask, places

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
        assert encoded.places is not None
        if self.position_policy == "reindex":
            places = column + self.family.first_place
        elif self.family.axes == 1:
            places = encoded.places[example].gather(1, order)
        else:
            index = order[..., None].expand(-1, -1, self.family.axes)
            return ids, mask, encoded.places[example].gather(1, index).masked_fill(~mask[..., None], 0).permute(2, 0, 1)
        return ids, mask, places.masked_fill(~mask, 0)

    def _images(
        self, encoded: Encoded, features: torch.Tensor, selection: torch.Tensor, example: torch.Tensor
    ) -> dict[str, Any]:
        """Return what the model is told of the images: the tokens of ``features`` that each pair (R,) keeps."""
        pair, token = (selection & encoded.token_mask[example]).nonzero(as_tuple=True)
        if not len(pair):
            return {}
        row = example[pair]
        layers = None if encoded.deepstack is None else encoded.deepstack[row, token]
        return {"mm_encoder_outputs": {"image": self.family.outputs(features[row, token], layers)}}

    # -- answering -------------------------------------------------------------------------------------------

    def _kept(self, encoded: Encoded, stays: torch.Tensor, selection: torch.Tensor, example: torch.Tensor) -> Prompts:
        """Return what is kept of prompts, padded on the left; see ``_sequences``."""
        ids, mask, places = self._compact(encoded, stays, example, left=True)
        return Prompts(ids, mask, places, self._images(encoded, encoded.tokens, selection, example))

    @torch.no_grad()
    def generate(self, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int = 16) -> list[list[str]]:
        """Answer greedily under each selection, whatever ``generation_config`` says of anything but token ids.

        See :class:`~grip_env.vlms.base.FrozenVLM`.

        Raises:
            ValueError: If a prompt and its answer do not fit the model.
        """
        self._check(encoded, selection)
        prompts = encoded.lengths - encoded.answer_lengths
        self._check_room(prompts, max_new_tokens)
        stays, example, lengths = self._sequences(encoded, selection, prompts)
        flat = selection.flatten(0, 1)
        texts = [""] * len(flat)
        for length in lengths.unique().tolist():  # equal lengths need no padding
            same = (lengths == length).nonzero().flatten()
            for rows in same.split(max(1, self.token_budget // (length + max_new_tokens))):
                kept = self._kept(encoded, stays[rows], flat[rows], example[rows])
                new, _ = greedy(self.model, self.family, kept, max_new_tokens)
                answers = self.family.tokenizer.batch_decode(new, skip_special_tokens=True)
                for row, text in zip(rows.tolist(), answers, strict=True):
                    texts[row] = text.strip()
        group = selection.shape[1]
        return [texts[start : start + group] for start in range(0, len(texts), group)]

    @torch.no_grad()
    def generate_ids(self, encoded: Encoded, selection: torch.Tensor, **options: Any) -> Any:
        """Do what the model's own ``generate`` does, with what is kept of each prompt.

        ``generate`` itself prepares all that the options ask for, from the whole prompts, and processors of logits,
        stopping criteria and streamers look at these; only the language model sees the kept tokens alone. It always
        has a cache: ``use_cache=False`` changes no answer, and none comes back. Nothing is compiled.

        Args:
            encoded: B examples.
            selection: bool (B, N).
            options: Of ``generate``, all but those that are about the prompt; "input_ids" and "attention_mask", both
                long (B, L), where the prompts as they were given have padding of their own.

        Returns:
            What ``generate`` returns: the whole prompts and the new tokens after them, long (B, L + T), or an output
            object whose ``sequences`` they are.

        Raises:
            ValueError: If an option is not supported, or prompts and answers do not fit the model.
        """
        self._check(encoded, selection[:, None])
        saved, vocabulary = self.model.generation_config, self.model.get_input_embeddings().weight.shape[0]
        given, mask = options.pop("input_ids", None), options.pop("attention_mask", None)
        check_options(saved, options, vocabulary)
        prompts = encoded.lengths - encoded.answer_lengths
        inside = torch.arange(encoded.input_ids.shape[1], device=self.device) < prompts[:, None]
        if given is None:
            given, mask = encoded.input_ids[:, : int(prompts.max())], inside[:, : int(prompts.max())]
        given, real = given.to(self.device), torch.ones_like(given) if mask is None else mask
        real = real.to(self.device).bool()
        self._check_room(prompts, new_tokens(saved, options, given.shape[1]))

        # all padding on the left, and each row's own first token as padding
        order = real.to(torch.uint8).argsort(dim=1, stable=True)
        real = real.gather(1, order)
        filled = given.gather(1, order)
        filled = torch.where(real, filled, filled.gather(1, real.int().argmax(1, keepdim=True)))
        processors = list(options.pop("logits_processor", None) or ())
        criteria = list(options.pop("stopping_criteria", None) or ())
        whole = WholePrompts(given, filled, (~real).sum(1).tolist(), [*processors, *criteria])
        criteria += stopping_at_strings(saved, options, self.family.tokenizer)
        stays, example, _ = self._sequences(encoded, selection[:, None], prompts)
        kept = self._kept(encoded, stays, selection, example)
        streamer = options.pop("streamer", None)
        begun = False

        def loop(
            model: Any,
            input_ids: Any,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **state: Any,
        ) -> Any:
            nonlocal begun
            begun = True
            return decode(
                self.model,
                self.family,
                kept,
                whole,
                logits_processor,
                stopping_criteria,
                generation_config,
                state.get(CACHE),
                streamer,
            )

        if option("stop_strings", saved, options) is not None:
            options["stop_strings"] = None  # a loop of one's own is not given the tokenizer they need
        options = {
            name: value
            for name, value in options.items()
            if value is not None or name not in ("num_beams", "num_return_sequences")
        }
        for name in SILENT:
            options.pop(name, None)
        try:
            return self.model.generate(
                input_ids=filled,
                attention_mask=real.long(),
                position_ids=torch.zeros_like(filled),  # not used: or some models would work them out
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList(criteria),
                custom_generate=loop,
                **options,
            )
        except (TypeError, AttributeError, LookupError, RuntimeError, ImportError, AssertionError) as error:
            if begun:
                raise
            raise ValueError(f"generate cannot be prepared with these options: {error}") from error

    @torch.no_grad()
    def continue_greedily(
        self,
        encoded: Encoded,
        selection: torch.Tensor,
        max_new_tokens: int,
        watch: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest tokens after one prompt under one selection, (1, 1, N), and their log-probabilities.

        Args:
            encoded: One example.
            selection: bool (1, 1, N).
            max_new_tokens: Most tokens, the end included.
            watch: Called with each token, long (1,), when it is there.

        Returns:
            Long (1, T) and float (1, T).

        Raises:
            ValueError: If the prompt and its answer do not fit the model.
        """
        self._check(encoded, selection)
        prompts = encoded.lengths - encoded.answer_lengths
        self._check_room(prompts, max_new_tokens)
        stays, example, _ = self._sequences(encoded, selection, prompts)
        kept = self._kept(encoded, stays, selection[0], example)
        return greedy(self.model, self.family, kept, max_new_tokens, watch)

    @torch.no_grad()
    def answer(self, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int = 16) -> Reply:
        """Answer one question greedily under one selection, and watch the clock.

        Args:
            encoded: One example.
            selection: bool (1, 1, N).
            max_new_tokens: Most tokens of the answer, its end included.

        Raises:
            ValueError: If there is more than one example or selection.
        """
        self._check(encoded, selection)
        return timed_reply(self, encoded, selection, max_new_tokens)

    @torch.no_grad()
    def attention(self, encoded: Encoded, kind: str = "cls") -> torch.Tensor:
        """Return the attention each visual token gets in the vision tower, averaged over heads, float32 (B, N).

        Args:
            encoded: The examples; the vision tower runs on them once more, unless they are those of the last call.
            kind: "cls": from the tower's CLS token, at the layer the features come from. "received": from all its
                patches on average, at that layer (the last of Gemma 3's, PaliGemma's and Qwen-VL's towers); where
                several patches make a token, the mean over them.

        Raises:
            NotImplementedError: If the model has none of this kind for its visual tokens, or there is no such kind.
            ValueError: If the images are not known.
        """
        if kind in self._attended and self._attended[kind][0]() is encoded:
            return self._attended[kind][1].clone()
        if kind == "cls":
            self._view(encoded)
        elif kind == "received":
            self._remember(kind, encoded, self.family.received_attention(known_images(encoded.examples)))
        else:
            raise NotImplementedError(f"attention {kind!r} is not available for {self.name}: use 'cls' or 'received'")
        return self._attended[kind][1].clone()

    @torch.no_grad()
    def tower_features(self, encoded: Encoded) -> torch.Tensor:
        """Return what the vision tower made of each visual token, before the projector, float32 (B, N, W).

        Args:
            encoded: The examples; the vision tower runs on them once more, unless they are those of the last call.

        Raises:
            NotImplementedError: If the tower has no CLS token, or its patches are not the visual tokens.
            ValueError: If the images are not known.
        """
        if "features" not in self._attended or self._attended["features"][0]() is not encoded:
            self._view(encoded)
        return self._attended["features"][1].clone()

    def _view(self, encoded: Encoded) -> None:
        """Remember CLS attention and features of a batch, which one look at the tower gives."""
        views = self.family.views(known_images(encoded.examples))
        self._remember("cls", encoded, [view.attention for view in views])
        self._remember("features", encoded, [view.features[1:] for view in views])  # without the CLS token

    def _remember(self, kind: str, encoded: Encoded, rows: Sequence[torch.Tensor]) -> None:
        """Remember what is known of each token, (n, ...) in each row, as float32 (B, N, ...)."""
        padded = torch.nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True)
        result = padded.new_zeros(*encoded.token_mask.shape, *padded.shape[2:])
        result[:, : padded.shape[1]] = padded
        self._attended[kind] = weakref.ref(encoded), result


def _longest(text: Any) -> int | None:
    """Return how many positions a language model knows, by its config; ``None`` if that does not say."""
    limit = getattr(text, "max_position_embeddings", None)
    if not limit:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor")
    # these stretch what the model was trained on; of the other types max_position_embeddings is the stretched length
    if rope.get("rope_type") in ("linear", "dynamic", "yarn") and isinstance(factor, int | float):
        trained = rope.get("original_max_position_embeddings") if rope["rope_type"] == "yarn" else None
        return max(int(limit), int((trained or limit) * factor))
    return int(limit)


def _by_length(lengths: torch.Tensor, budget: int) -> Iterator[torch.Tensor]:
    """Split rows, shortest first, so that rows times the longest stays within ``budget``."""
    order = lengths.argsort(stable=True)
    ordered = lengths[order].tolist()
    start = 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or ordered[stop] * (stop + 1 - start) > budget:
            yield order[start:stop]
            start = stop

"""Encoding of examples with a frozen model of transformers, and the model's identity."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from grip_env.tasks.base import Example
from grip_env.tasks.pictures import MAX_SIDE, PictureError, as_pixels
from grip_env.vlms.base import Encoded
from grip_env.vlms.cache.image_entries import encoder_digest, picture_scope
from grip_env.vlms.cache.images import PictureCache
from grip_env.vlms.decoder.last_layer import CAPTURING
from grip_env.vlms.families.base import Picture
from grip_env.vlms.families.known import family_of
from grip_env.vlms.prompts import prompt_ids, prompt_texts

if TYPE_CHECKING:
    from typing import Self

__all__ = ["EncodingVLM"]


class EncodingVLM:
    """Base class of :class:`~grip_env.vlms.huggingface.HuggingFaceVLM` with its encoding."""

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
        self.family.check_position_policy(position_policy)
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.position_policy = position_policy
        if token_budget is None:
            token_budget = 4096 if self.device.type == "cpu" else 16384
        self.token_budget = token_budget
        self.cache = cache
        self.max_side = max_side
        self._attended: dict[
            str, tuple[weakref.ref[Encoded], torch.Tensor]
        ] = {}  # values of the last batch asked about

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the model itself, uncopied.

        It never changes, and Gymnasium copies the arguments of environments.
        """
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without transformers' hooks on modules, which do not pickle.

        transformers installs them when attention or hidden states are first asked for, and does so again in the copy.
        """
        weights = [*self.model.parameters(), *self.model.buffers()]
        # copies only the tree of modules: everything in the memo is shared, and the model itself stays unchanged
        memo: dict[int, Any] = {id(kept): kept for kept in (self.processor, self.processor.tokenizer, *weights)}
        model, family = copy.deepcopy((self.model, self.family), memo)
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", "") == CAPTURING:
                    del module._forward_hooks[key]
            module.__dict__.pop("_output_capturing_hooks_installed", None)
        return self.__dict__ | {"model": model, "family": family, "_attended": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled state, possibly in a process that never built such a model."""
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

        self.__dict__.update(state)
        # classes enter the registry of what can be captured when a model is built; without it, nothing is, silently
        for module in self.model.modules():
            if hasattr(module, "_can_record_outputs"):
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)

    @property
    def width(self) -> int:
        """Width D of visual tokens and question embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def checksum(self) -> str:
        """Return a digest of all weights and buffers.

        If it is the same before and after training, the model stayed frozen.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return a digest of everything but examples and their ids that scores depend on.

        It serves as a key of caches and covers everything that can change a single bit: weights, configs, precision,
        attention kernels, image processor, position policy, ``token_budget``, ``max_side``, the kind of device and the
        versions of the libraries involved. The weights are read once.
        """
        scope = picture_scope(self.family, self._weights)
        parts = [scope, self.position_policy, self.token_budget, self.device.type, self.max_side]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _weights(self) -> str:
        return self.checksum()

    def prompt(self, question: str) -> str:
        """Return the prompt that asks ``question`` about an image, up to the start of the answer."""
        return self.family.prompt(question)

    @cached_property
    def _encoder_digest(self) -> str:
        return encoder_digest(self.model)

    def _pictures(self, images: list[np.ndarray]) -> list[Picture]:
        """Run the vision encoder on images that are not in the cache."""
        if self.cache is None:
            return self.family.pictures(images)
        scope = picture_scope(self.family, self._encoder_digest)
        return self.cache.pictures(scope, images, self.family.pictures, self.device)

    def _check_window(self, longest: int, key: str = "") -> None:
        """Raise ValueError if sequences exceed the model's positions or its sliding window.

        The length of the full sequence counts, whatever is dropped and however positions are numbered, since the model
        also scores the full sequence. Some layers of some models attend within a window, which dropped tokens would
        shift.
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
        """Raise ValueError if prompts and answers do not fit the model.

        Args:
            prompts: Lengths of the prompts, long (B,).
            most: Maximum number of tokens of an answer.
        """
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
        """Return an example with its image as the model gets it.

        See :func:`~grip_env.tasks.pictures.as_pixels`.
        """
        try:
            pixels = as_pixels(example.image, self.max_side)
        except PictureError as error:
            raise ValueError(f"the image of {example.key or f'example {number}'} {error}") from None
        return example if pixels is example.image else dataclasses.replace(example, image=pixels)

    @torch.no_grad()
    def encode(self, examples: Sequence[Example], with_answers: bool = True) -> Encoded:
        """Run the vision encoder once per example, or once per image that is not in the cache.

        Args:
            examples: Images, questions and answers.
            with_answers: If False, the answers are left out: the result can be answered, but not scored.

        Raises:
            ValueError: If there are no examples, an image is invalid, an answer is empty, or a sequence does not fit
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
        """Combine encoded images and tokenized prompts into a padded batch.

        Args:
            examples: The examples.
            pictures: The encoded image of each example.
            ids: Prompt and answer of each example, long (L,), with an image token for each visual token.
            answers: Number of ids of each answer.
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
            position_ids=pad(
                [self.family.position_ids(row, picture) for row, picture in zip(ids, pictures, strict=True)]
            ),
            deepstack=pad_all([picture.deepstack for picture in pictures]),
            cells=pad_all([picture.cells for picture in pictures]),
        )


def _longest(text: Any) -> int | None:
    """Return the number of positions in a language model's config, or ``None`` if it has none."""
    limit = getattr(text, "max_position_embeddings", None)
    if not limit:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor")
    # these types extend the trained length; for other types, max_position_embeddings is already the extended length
    if rope.get("rope_type") in ("linear", "dynamic", "yarn") and isinstance(factor, int | float):
        trained = rope.get("original_max_position_embeddings") if rope["rope_type"] == "yarn" else None
        return max(int(limit), int((trained or limit) * factor))
    return int(limit)

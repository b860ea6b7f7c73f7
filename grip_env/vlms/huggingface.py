"""Any supported image-text model of transformers as a frozen vision-language model.

Pruning needs neither a fork nor a patch: the encoder's output is indexed, the placeholders of dropped tokens leave
``input_ids``, and attention mask and positions are indexed alike. The language model then runs on the short sequence.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from grip_env.tasks.base import Example
from grip_env.tasks.pictures import MAX_SIDE
from grip_env.vlms.base import Encoded
from grip_env.vlms.cache.images import PictureCache
from grip_env.vlms.families.tower import known_images
from grip_env.vlms.generation.decoding import CACHE, Prompts, WholePrompts, decode, greedy
from grip_env.vlms.generation.options import SILENT, check_options, new_tokens, option, stopping_at_strings
from grip_env.vlms.generation.timed import Reply, timed_reply
from grip_env.vlms.loading import read_pretrained, refusal
from grip_env.vlms.scoring import ScoringVLM

__all__ = ["HuggingFaceVLM"]

QUESTION = "what is there?"
GREY = np.full((64, 64, 3), 128, np.uint8)
"""What a model that was just loaded is tried with."""


class HuggingFaceVLM(ScoringVLM):
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
    (:mod:`grip_env.vlms.decoder.last_layer`), unless somebody changed how they run. Rotary embeddings of types
    "dynamic" and "longrope" look at the longest sequence of a batch, and so do scores where a model has them.
    """

    # -- loading ---------------------------------------------------------------------------------------------

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

    # -- answering -------------------------------------------------------------------------------------------

    def _kept(self, encoded: Encoded, stays: torch.Tensor, selection: torch.Tensor, example: torch.Tensor) -> Prompts:
        """Return what is kept of prompts, padded on the left; see ``_sequences``."""
        ids, mask, position_ids = self._compact(encoded, stays, example, left=True)
        return Prompts(ids, mask, position_ids, self._images(encoded, encoded.tokens, selection, example))

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

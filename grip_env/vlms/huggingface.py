"""Supported image-text models of transformers as frozen vision-language models.

Pruning needs neither a fork nor a patch: the encoder's output is indexed, the placeholders of dropped tokens are
removed from ``input_ids``, and attention mask and positions are indexed in the same way. The language model then runs
on the shorter sequence.
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
"""Image for a trial run of a newly loaded model."""


class HuggingFaceVLM(ScoringVLM):
    """A frozen image-text model of transformers.

    Args:
        model: The model, with all weights on one device. It is put in eval mode, and its parameters stop requiring
            gradients.
        processor: Object with the model's ``tokenizer``, ``image_processor`` and ``chat_template``.
        name: Name for logs.
        position_policy: "original" keeps each token's position in the full sequence; "reindex" renumbers the kept
            tokens.
        token_budget: Maximum number of tokens, padding included, in one call of the language model. ``None`` means
            16,384, or 4,096 on a CPU: more would overflow its caches (the embedded model took 1.4 times as long with
            16,384).
        cache: Disk cache of encoded images. It reads the weights once, at the first image.
        max_side: Maximum length of an image's longer side, in pixels. Larger images are shrunk before the image
            processor gets them; ``None`` leaves all as they are.

    Raises:
        ValueError: If the model or its family is not supported, or the processor has no chat template.

    Scores do not depend on the rest of the batch, up to float rounding (1e-4 in log-likelihood in float32). When
    scoring, Llama-type language models run their last layer only where the answer is read
    (:mod:`grip_env.vlms.decoder.last_layer`), unless their forward pass was modified. Rotary embeddings of types
    "dynamic" and "longrope" depend on the longest sequence of a batch, and so do the scores of models that use them.
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
        """Load a model and its processor from a folder or, if reachable, a model hub.

        Raises:
            FileNotFoundError: If ``path`` looks like a folder and has no config.json.
            ValueError: If a part of it is missing or damaged, or its family is not supported.
        """
        model, processor = read_pretrained(path, dtype, attn_implementation)
        try:
            model = model.to(device)
        except Exception as error:  # from the device; quantised models cannot be moved
            raise refusal(path, "put on a device", error, f"choose another device than {str(device)!r}") from error
        try:
            vlm = cls(model, processor, Path(path).name, position_policy, token_budget, cache, max_side)
        except ValueError:  # about an option, or about the model as a whole
            raise
        except Exception as error:
            raise refusal(path, "used", error, "save it again") from error
        try:
            vlm._try_processor()
            vlm._try_model()
        except Exception as error:  # readable files with settings that are impossible or inconsistent
            raise refusal(path, "used", error, "save it again") from error
        return vlm

    def _try_processor(self) -> None:
        """Raise an error if the processor fails on a question or an image."""
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
        """Raise an error if the model fails on an image and an answer, or gives NaN.

        Only a few visual tokens are kept, which makes this quick.
        """
        cache, self.cache = self.cache, None  # keep the trial image out of it
        try:
            try:
                encoded = self.encode([Example(GREY, QUESTION, "nothing")])
            except ValueError:  # such as too long a sequence: this depends on the image, and is reported there
                return
            selection = encoded.token_mask & (torch.arange(encoded.token_mask.shape[1], device=self.device) < 4)
            scores = self.score(encoded, selection[:, None])
        finally:
            self.cache = cache
        if not bool(scores.log_likelihood.isfinite().all()):
            raise ValueError(f"{self.name} gives NaN or infinities for a grey image in {self.model.dtype}")

    # -- answering -------------------------------------------------------------------------------------------

    def _kept(self, encoded: Encoded, stays: torch.Tensor, selection: torch.Tensor, example: torch.Tensor) -> Prompts:
        """Return pruned prompts, padded on the left; see ``_sequences``."""
        ids, mask, position_ids = self._compact(encoded, stays, example, left=True)
        return Prompts(ids, mask, position_ids, self._images(encoded, encoded.tokens, selection, example))

    @torch.no_grad()
    def generate(self, encoded: Encoded, selection: torch.Tensor, max_new_tokens: int = 16) -> list[list[str]]:
        """Answer greedily under each selection; see :class:`~grip_env.vlms.base.FrozenVLM`.

        Of the model's ``generation_config``, only the token ids have an effect.

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
        """Generate from the pruned prompts as the model's own ``generate`` does.

        ``generate`` itself prepares everything that the options ask for from the complete prompts. Logits processors,
        stopping criteria and streamers see these, too; only the language model sees just the kept tokens. A cache is
        always used: ``use_cache=False`` changes no answer, but the cache is not returned. Nothing is compiled.

        Args:
            encoded: B examples.
            selection: bool (B, N).
            options: Options of ``generate``, except those about the prompt; also "input_ids" and "attention_mask", both
                long (B, L), if the prompts were given with padding.

        Returns:
            The same as ``generate``: the complete prompts followed by the new tokens, long (B, L + T), or an output
            object with these as its ``sequences``.

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

        # all padding on the left, each row padded with its own first token
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
            options["stop_strings"] = None  # a custom loop does not get the tokenizer they need
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
                position_ids=torch.zeros_like(filled),  # not used; without them some models would compute them
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
        """Return the greedy continuation of one prompt under one selection.

        Args:
            encoded: One example.
            selection: bool (1, 1, N).
            max_new_tokens: Maximum number of tokens, the end token included.
            watch: Called with each token, long (1,), as soon as it is generated.

        Returns:
            The tokens, long (1, T), and their log-probabilities, float (1, T).

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
        """Answer one question greedily under one selection, and time it.

        Args:
            encoded: One example.
            selection: bool (1, 1, N).
            max_new_tokens: Maximum number of tokens, the end token included.

        Raises:
            ValueError: If there is more than one example or selection.
        """
        self._check(encoded, selection)
        return timed_reply(self, encoded, selection, max_new_tokens)

    @torch.no_grad()
    def attention(self, encoded: Encoded, kind: str = "cls") -> torch.Tensor:
        """Return the attention on each visual token in the vision tower, float32 (B, N).

        It is averaged over heads.

        Args:
            encoded: The examples; the vision tower runs on them again, unless they are the examples of the last call.
            kind: "cls" is attention from the tower's CLS token, at the layer the features come from. "received" is the
                average attention from all its patches, at that layer (the last of Gemma 3's, PaliGemma's and Qwen-VL's
                towers); if several patches form a token, it is the mean over them.

        Raises:
            NotImplementedError: If the model has no such attention for its visual tokens, or ``kind`` is unknown.
            ValueError: If the images are not available.
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
        """Return the vision tower's features of each visual token, float32 (B, N, W).

        These are the features before the projector.

        Args:
            encoded: The examples; the vision tower runs on them again, unless they are the examples of the last call.

        Raises:
            NotImplementedError: If the tower has no CLS token, or its patches are not the visual tokens.
            ValueError: If the images are not available.
        """
        if "features" not in self._attended or self._attended["features"][0]() is not encoded:
            self._view(encoded)
        return self._attended["features"][1].clone()

    def _view(self, encoded: Encoded) -> None:
        """Store CLS attention and features of a batch, from one pass of the tower."""
        views = self.family.views(known_images(encoded.examples))
        self._remember("cls", encoded, [view.attention for view in views])
        self._remember("features", encoded, [view.features[1:] for view in views])  # without the CLS token

    def _remember(self, kind: str, encoded: Encoded, rows: Sequence[torch.Tensor]) -> None:
        """Store values of each token, (n, ...) for each example, as float32 (B, N, ...)."""
        padded = torch.nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True)
        result = padded.new_zeros(*encoded.token_mask.shape, *padded.shape[2:])
        result[:, : padded.shape[1]] = padded
        self._attended[kind] = weakref.ref(encoded), result

"""Answering with fewer visual tokens, using a frozen model and a trained agent."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agents.base import Selector, budget_to_count
from agents.saved import load_saved
from agents.scorer import Scorer
from agents.selectors import ScorerSelector
from agents.training.options import options_of
from grip_env.common.atomic_files import folder_on_disk
from grip_env.run_folder.config import read_run_config
from grip_env.run_folder.status import unfinished
from grip_env.tasks.base import Example
from grip_env.vlms.base import Encoded
from grip_env.vlms.generation.options import check_options, new_tokens
from grip_env.vlms.huggingface import HuggingFaceVLM
from grip_env.vlms.processor_inputs import encode_inputs, split_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PRETRAINED", "Answer", "Pruner"]

PRETRAINED = Path(__file__).parent / "pretrained"
"""Folder of the trained agents that come with the package, with one subfolder per embedded model."""


@dataclass(frozen=True)
class Answer:
    """An answer, with its likelihood, selection and timings."""

    text: str
    log_likelihood: float
    """Mean log-probability of the answer's tokens, in nats; NaN if there are none."""
    kept: np.ndarray
    """Visual tokens that the language model saw, bool (N,)."""
    positions: np.ndarray
    """Row and column of each visual token in the image, in [0, 1], (N, 2)."""
    cells: np.ndarray | None
    """Height and width of each token's area, as shares of the image, (N, 2); ``None`` if all areas are equal."""
    seconds: dict[str, float]
    """Seconds per stage: "encode" (vision), "select", "prefill" (up to the first token), "decode" (the others)."""


class Pruner:
    """A vision-language model that sees a share of the visual tokens of each image.

    Args:
        vlm: The model.
        selector: The agent that chooses the tokens.

    >>> pruner = Pruner.load("tiny")
    >>> from grip_env import SceneTask
    >>> example = SceneTask().example("test", 3)
    >>> example.question, pruner(example.image, example.question, budget=0.05).text
    ('what digit is on the purple card?', '3')
    """

    def __init__(self, vlm: HuggingFaceVLM, selector: Selector) -> None:
        self.vlm, self.selector = vlm, selector

    @classmethod
    def load(
        cls,
        vlm: str | Path = "tiny",
        agent: str | Path | None = None,
        algorithm: str | type | None = None,
        **options: Any,
    ) -> Pruner:
        """Load a model and an agent.

        Args:
            vlm: The model, as for :func:`grip_env.load_vlm`.
            agent: Folder of a run or of its agent; by default the agent that comes with the package.
            algorithm: The user-defined class that trained the agent, or its name "package.module:Class", which is
                then imported. Code named in a run's files is imported only if it is named here.
            options: Passed on to :func:`grip_env.load_vlm`.

        Raises:
            FileNotFoundError: If there is no such model or agent.
            ValueError: If the model or agent is damaged, or they do not match.
        """
        from grip_env.vlms import load_vlm

        model = load_vlm(vlm, **options)
        _warn(agent)
        return cls(model, load_agent(model, str(vlm), agent, algorithm))

    @classmethod
    def wrap(
        cls, model: Any, processor: Any, agent: str | Path, algorithm: str | type | None = None, **options: Any
    ) -> Pruner:
        """Combine an agent with a model that is already loaded.

        Args:
            model: An image-text model of transformers, of a supported family, with adapters merged. It is frozen: set
                to eval mode, with no parameter requiring gradients.
            processor: Its processor.
            agent: Folder of a run or of its agent.
            algorithm: The user-defined class that trained the agent, as for :meth:`load`.
            options: Passed on to :class:`~grip_env.vlms.huggingface.HuggingFaceVLM`.

        Raises:
            FileNotFoundError: If there is no such agent.
            ValueError: If the agent is damaged or does not fit the model.
        """
        name = getattr(getattr(model, "config", None), "model_type", "vlm")
        vlm = HuggingFaceVLM(model, processor, name=name, **options)
        _warn(agent)
        return cls(vlm, load_agent(vlm, vlm.name, agent, algorithm))

    def encode(self, images: Sequence[np.ndarray | Image], questions: Sequence[str]) -> Encoded:
        """Run the vision encoder on images, one question each.

        Args:
            images: Pillow images or arrays, as accepted by :func:`~grip_env.tasks.pictures.as_pixels`.
            questions: One question for each image.

        Raises:
            ValueError: If the numbers of images and questions differ, or an image is invalid.
        """
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions: give one question for each image")
        pairs: Any = zip(images, questions, strict=True)
        examples = [Example(image, question, "") for image, question in pairs]
        return self.vlm.encode(examples, with_answers=False)

    def select(self, encoded: Encoded, budget: float | Sequence[float]) -> torch.Tensor:
        """Choose the tokens of encoded images, bool (B, N); a budget of 1 keeps all.

        Args:
            encoded: B examples.
            budget: Share of the visual tokens, one for all examples or one for each.

        Raises:
            ValueError: If a budget is outside (0, 1], or the number of budgets does not match the examples.
        """
        counts = budget_to_count(encoded, budget)
        if bool((counts == encoded.token_mask.sum(1)).all()):
            return encoded.token_mask.clone()
        return self.selector(self.vlm, encoded, counts, torch.Generator().manual_seed(0))

    def answers(
        self,
        images: Sequence[np.ndarray | Image],
        questions: Sequence[str],
        budget: float | Sequence[float] = 0.1,
        max_new_tokens: int = 16,
    ) -> list[str]:
        """Answer questions about images by greedy decoding, with a share of the visual tokens."""
        encoded = self.encode(images, questions)
        selection = self.select(encoded, budget)
        return [texts[0] for texts in self.vlm.generate(encoded, selection[:, None], max_new_tokens)]

    def generate(
        self,
        budget: float | Sequence[float] = 0.1,
        sizes: Sequence[tuple[int, int]] | None = None,
        **inputs: Any,
    ) -> Any:
        """Run ``model.generate(**inputs)`` with a share of the visual tokens.

        Args:
            budget: Share of the visual tokens, one for all or one for each prompt; 1 keeps all.
            sizes: (height, width) of each image, if the processor's tensors do not contain them; see
                :func:`~grip_env.vlms.processor_inputs.encode_inputs`.
            inputs: Outputs of the model's processor, one image per prompt (padding on either side), and options of
                ``generate``: ``max_new_tokens``, ``do_sample``, ``generation_config``, ... Length options refer to the
                full prompts, which streamers, stopping criteria and logits processors see as well; see
                :meth:`~grip_env.vlms.huggingface.HuggingFaceVLM.generate_ids`. The result is that of the full prompts
                with the dropped tokens masked; options that would break this are refused.

        Returns:
            The output of ``model.generate``: the prompts as given, including all image placeholders, followed by the
            new tokens, long (B, L + T), so that code that slices or decodes it works unchanged. With
            ``return_dict_in_generate=True`` these are its ``sequences``.

        Raises:
            ValueError: If an input is missing or unsupported (several images in a prompt, video), an option is not
                supported (beams), or prompt and answer exceed the positions of the model.
        """
        text, images, options = split_inputs(inputs)
        saved, embeddings = self.vlm.model.generation_config, self.vlm.model.get_input_embeddings()
        check_options(saved, options, len(embeddings.weight))
        encoded = encode_inputs(self.vlm, text, images, sizes)
        new_tokens(saved, options, text["input_ids"].shape[1])
        selection = self.select(encoded, budget)
        prompts = {name: text[name] for name in ("input_ids", "attention_mask") if name in text}
        return self.vlm.generate_ids(encoded, selection, **prompts, **options)

    def __call__(
        self, image: np.ndarray | Image, question: str, budget: float = 0.1, max_new_tokens: int = 16
    ) -> Answer:
        """Answer one question; also return its likelihood, the selection and the timings."""
        began = self._now()
        encoded = self.encode([image], [question])
        seen = self._now()
        selection = self.select(encoded, budget)
        chosen = self._now()
        reply = self.vlm.answer(encoded, selection[:, None], max_new_tokens)
        return Answer(
            text=reply.text,
            log_likelihood=reply.log_likelihood,
            kept=selection[0].cpu().numpy(),
            positions=encoded.positions[0].float().cpu().numpy(),
            cells=None if encoded.cells is None else encoded.cells[0].float().cpu().numpy(),
            seconds={
                "encode": seen - began,
                "select": chosen - seen,
                "prefill": reply.prefill,
                "decode": reply.decode,
            },
        )

    def _now(self) -> float:
        if self.vlm.device.type == "cuda":
            torch.cuda.synchronize(self.vlm.device)
        return time.perf_counter()


def load_agent(
    vlm: HuggingFaceVLM, name: str, agent: str | Path | None = None, algorithm: str | type | None = None
) -> Selector:
    """Load a trained agent for a model.

    Args:
        vlm: The model.
        name: The model's name, to find an agent that comes with the package.
        agent: Folder of a run or of its agent; by default the agent that comes with the package.
        algorithm: The user-defined class that trained the agent, or its name; see :func:`agents.saved.load_saved`.

    Raises:
        FileNotFoundError: If there is no such agent.
        ValueError: If the agent is damaged, was made for visual tokens of another width, or is of a class other than
            ``algorithm``.
    """
    folder = PRETRAINED / name if agent is None else Path(agent)
    if agent is None and (name != Path(name).name or not folder.is_dir()):
        raise FileNotFoundError(
            f"no trained agent for {name!r} comes with the package: train one with "
            f"`python -m grip_env.train --vlm {name}` and give its run"
        )
    if (folder / "config.json").is_file():
        return load_saved(folder, read_run_config(folder, options_of), vlm, algorithm)
    if algorithm is not None:
        raise ValueError(f"{folder} holds no run with config.json, but a scorer: leave out the algorithm {algorithm!r}")
    inside = folder_on_disk(folder / "agent")
    scorer = Scorer.load(inside if inside.is_dir() else folder)
    scorer.check_width(vlm.width, folder, name)
    return ScorerSelector(scorer.to(vlm.device))


def _warn(agent: str | Path | None) -> None:
    """Warn if the training of an agent has not finished."""
    described = None if agent is None else unfinished(Path(agent))
    if described is not None:
        warnings.warn(described, UserWarning, stacklevel=3)

"""Second stage of pre-training: projector and language model learn to answer, the vision tower stays frozen.

Several questions about one picture share one sequence: each sees the picture and itself, at the positions it would
have alone, which is exactly the same as separate sequences and several times cheaper. In some batches only a subset
of the visual tokens is shown, so that the model knows pruned pictures and admits what it cannot see.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from grip_env.tasks.scenes import CHOICES, FAMILIES, GRID, Question, Scene
from grip_env.vlms.dense import draw_scenes, normalise, vision_tokens

__all__ = ["FAMILY_WEIGHTS", "EncodedScenes", "QuestionPacker", "forward_packed", "random_subset"]

TOKENS = GRID * GRID
FAMILY_WEIGHTS = {"existence": 1.5, "color": 1.0, "counting": 2.0, "reading": 1.0, "shape": 1.0, "relation": 2.5}
"""How often training asks each family: the ones that compare or count are slowest to learn."""


@dataclass
class EncodedScenes:
    """Scenes with the tower's features (S, N, width), and which thing each patch shows (S, N), -1 for none."""

    scenes: list[Scene]
    features: torch.Tensor
    owners: torch.Tensor

    @classmethod
    @torch.no_grad()
    def draw(cls, model: LlavaForConditionalGeneration, count: int, seed: int) -> EncodedScenes:
        """Draw scenes of the training split and run the frozen tower over them."""
        scenes = draw_scenes(count, seed)
        features, owners = [], np.full((count, TOKENS), -1)
        for start in range(0, count, 128):
            pixels = normalise(np.stack([scene.draw() for scene in scenes[start : start + 128]]))
            features.append(vision_tokens(model, pixels)[0])
        for row, scene in enumerate(scenes):
            cover = np.stack([scene.coverage(index).reshape(-1) for index in range(len(scene.things))])
            owners[row] = np.where(cover.max(0) >= 0.15, cover.argmax(0), -1)
        return cls(scenes, torch.cat(features), torch.from_numpy(owners))


def random_subset(owners: torch.Tensor, kept: int, by_object: bool, generator: torch.Generator) -> torch.Tensor:
    """Choose ``kept`` tokens of each row: uniformly, or whole objects first. Returns sorted indices (B, kept)."""
    noise = torch.rand(owners.shape, generator=generator)
    if by_object:
        luck = torch.rand((owners.shape[0], int(owners.max()) + 2), generator=generator)
        luck[:, 0] = 0  # patches that show nothing
        noise = noise * 0.3 + luck.gather(1, owners + 1)
    return noise.topk(kept, 1).indices.sort(1).values


class QuestionPacker:
    """Turns lists of questions into one packed text block per picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._cache: dict[tuple[str, str], tuple[list[int], int]] = {}

    def encode(self, question: Question) -> tuple[list[int], int]:
        """Return the ids of prompt, answer and end, and where the answer starts."""
        key = (question.text, question.answer)
        if key not in self._cache:
            prompt = self.tokenizer.encode(f"\n{question.text} answer:")
            answer = self.tokenizer.encode(f" {question.answer}")
            self._cache[key] = ([*prompt, *answer, self.eos], len(prompt))
        return self._cache[key]

    def pack(self, questions: list[list[Question]]) -> dict[str, torch.Tensor]:
        """Return ids, positions (from 0), segment (-1 is padding) and targets (-100 where none), each (B, T)."""
        rows = []
        for asked in questions:
            ids, positions, segments, targets = [], [], [], []
            for number, question in enumerate(asked):
                tokens, start = self.encode(question)
                ids += tokens[:-1]
                positions += range(len(tokens) - 1)
                segments += [number] * (len(tokens) - 1)
                targets += [-100] * (start - 1) + tokens[start:]
            rows.append((ids, positions, segments, targets))
        longest = max(len(row[0]) for row in rows)
        fills = (self.tokenizer.pad_token_id, 0, -1, -100)
        names = ("ids", "positions", "segments", "targets")
        return {
            name: torch.tensor([row[part] + [fills[part]] * (longest - len(row[part])) for row in rows])
            for part, name in enumerate(names)
        }

    @staticmethod
    def sample(scene: Scene, count: int, rng: random.Random) -> list[Question]:
        """Draw ``count`` questions about a scene, answers balanced as far as the scene allows."""
        asked: list[Question] = []
        weights = [FAMILY_WEIGHTS[family] for family in FAMILIES]
        while len(asked) < count:
            family = rng.choices(FAMILIES, weights)[0]
            possible = scene.questions(family, rng.choice(CHOICES[family]) if len(CHOICES[family]) < 4 else None)
            if possible:
                asked.append(rng.choice(possible))
        return asked


def forward_packed(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    text: dict[str, torch.Tensor],
    bos: int,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer packed questions.

    Args:
        model: The model; its tower is not run.
        features: The tower's patch features (B, N, width).
        text: What :meth:`QuestionPacker.pack` returned.
        bos: Id of the token before the picture.
        kept: Indices of the visual tokens to show (B, k); all when ``None``. They keep their positions.

    Returns:
        Logits at the positions that have a target, (targets, vocabulary), and those targets.
    """
    batch = features.shape[0]
    places = torch.arange(TOKENS).expand(batch, TOKENS) if kept is None else kept
    if kept is not None:
        features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
    visual = model.model.multi_modal_projector(features)  # (B, k, D)
    embed = model.get_input_embeddings()
    start = embed(torch.full((batch, 1), bos))
    inputs = torch.cat([start, visual, embed(text["ids"])], 1)  # (B, L, D)
    positions = torch.cat([torch.zeros(batch, 1, dtype=torch.long), places + 1, text["positions"] + TOKENS + 1], 1)
    head = 1 + visual.shape[1]
    length = inputs.shape[1]
    segments = torch.cat([torch.full((batch, head), -2), text["segments"]], 1)
    same = segments[:, :, None] == segments[:, None, :]
    seen = (same | (segments == -2)[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(batch, 1, length, length).masked_fill_(~seen[:, None], torch.finfo(torch.float32).min)
    hidden = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state[:, head:]
    wanted = text["targets"] != -100
    return model.lm_head(hidden[wanted]), text["targets"][wanted]


class LanguageStage:
    """Batches and losses of the second stage; everything random follows from the step.

    Args:
        model: The model, its tower already trained.
        tokenizer: Its tokenizer.
        batch: Pictures per step.
        questions: Questions per picture.
        chunk: Pictures drawn and encoded at a time.
        reuse: How often each picture of a chunk is shown, each time with new questions.
        drop: Share of the steps that show only a subset of the visual tokens.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        batch: int = 32,
        questions: int = 10,
        chunk: int = 2048,
        reuse: int = 4,
        drop: float = 0.35,
    ) -> None:
        self.model, self.packer = model, QuestionPacker(tokenizer)
        self.batch, self.questions, self.chunk, self.reuse, self.drop = batch, questions, chunk, reuse, drop
        self._steps_per_chunk = chunk * reuse // batch
        self._current: tuple[int, EncodedScenes] | None = None

    def loss(self, step: int) -> dict[str, torch.Tensor]:
        """Return the loss of one step, and the accuracy on its answers."""
        number, inside = divmod(step, self._steps_per_chunk)
        if self._current is None or self._current[0] != number:
            self._current = (number, EncodedScenes.draw(self.model, self.chunk, 1_000_000 + number))
        pool = self._current[1]
        rng = random.Random(f"grip_env language {step}")
        generator = torch.Generator().manual_seed(step)
        epoch, place = divmod(inside * self.batch, self.chunk)
        order = torch.randperm(self.chunk, generator=torch.Generator().manual_seed(epoch))
        rows = order[place : place + self.batch]
        asked = [self.packer.sample(pool.scenes[row], self.questions, rng) for row in rows.tolist()]
        kept = None
        if rng.random() < self.drop:
            count = round(math.exp(rng.uniform(math.log(5), math.log(120))))
            kept = random_subset(pool.owners[rows], count, rng.random() < 0.5, generator)
        logits, targets = forward_packed(
            self.model, pool.features[rows], self.packer.pack(asked), self.packer.bos, kept
        )
        answers = targets != self.packer.eos
        loss = F.cross_entropy(logits, targets)
        right = (logits.argmax(-1) == targets)[answers].float().mean()
        return {"loss": loss, "accuracy" if kept is None else "pruned": right}

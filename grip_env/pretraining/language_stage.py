"""Second stage of pre-training, in which projector and language model learn to answer.

The vision tower stays frozen. Several questions about one picture share one sequence: each attends to the picture and
itself, at the positions it would have alone. This is exactly the same as separate sequences and several times cheaper.
In some batches only a subset of the visual tokens is shown, so that the model learns to handle pruned pictures and
to be uncertain about what it cannot see.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from grip_env.pretraining.vision_stage import draw_scenes, normalise, vision_tokens
from grip_env.tasks.scene_levels import STANDARD, Level
from grip_env.tasks.scene_questions import Question, plural
from grip_env.tasks.scenes import Scene

__all__ = [
    "FAMILY_WEIGHTS",
    "PLACE_WEIGHT",
    "EncodedScenes",
    "LanguageStage",
    "QuestionPacker",
    "captions",
    "forward_packed",
    "place_loss",
    "random_subset",
]

FAMILY_WEIGHTS = {
    "existence": 1.5,
    "color": 0.8,
    "counting": 3.0,
    "reading": 0.8,
    "shape": 0.9,
    "relation": 4.0,
    "larger": 3.0,
    "more": 3.0,
    "same": 4.0,
    "near": 4.0,
    "number": 1.5,
    "odd": 4.0,
}
"""How often training asks each family: the ones that compare or count are slowest to learn."""

PLACE_WEIGHT = 0.03
"""Weight of :func:`place_loss` in both stages."""


@dataclass
class EncodedScenes:
    """Scenes with the features of the vision tower.

    ``features`` (S, N, width) are the tower's; ``owners`` (S, N) is the index of the thing each patch shows, or -1;
    ``grades`` (S, N) is the relevance of each patch if a question were about all objects.
    """

    scenes: list[Scene]
    features: torch.Tensor
    owners: torch.Tensor
    grades: torch.Tensor

    @classmethod
    @torch.no_grad()
    def draw(
        cls, model: LlavaForConditionalGeneration, count: int, seed: int, level: Level = STANDARD
    ) -> EncodedScenes:
        """Draw scenes of the training split and run the frozen tower over them."""
        scenes = draw_scenes(count, seed, level=level)
        features, owners = [], np.full((count, level.grid**2), -1)
        grades = np.zeros((count, level.grid**2), dtype=np.float32)
        for start in range(0, count, 128):
            pixels = normalise(np.stack([scene.draw() for scene in scenes[start : start + 128]]))
            features.append(vision_tokens(model, pixels.to(model.device))[0])
        for row, scene in enumerate(scenes):
            cover = np.stack([scene.coverage(index).reshape(-1) for index in range(len(scene.things))])
            owners[row] = np.where(cover.max(0) >= 0.15, cover.argmax(0), -1)
            objects = [index for index, thing in enumerate(scene.things) if thing.is_shape or thing.number is not None]
            grades[row] = scene.relevance(tuple(objects)).reshape(-1)
        return cls(scenes, torch.cat(features), torch.from_numpy(owners), torch.from_numpy(grades))


def random_subset(
    pool: EncodedScenes,
    rows: torch.Tensor,
    kept: int,
    kind: str,
    generator: torch.Generator,
    grades: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose ``kept`` tokens of each scene in ``rows`` (B,).

    Args:
        pool: The scenes.
        rows: Indices of the scenes, (B,).
        kept: Number of tokens to choose.
        kind: "uniform" (random tokens), "objects" (a few random things in full, the rest at random), "anchors" (the
            best patches of all objects first: little is shown, but every question can be answered), or "asked" (the
            tokens with the highest ``grades`` first).
        generator: Source of randomness.
        grades: Relevance of each token to the question, (B, N), for "asked".

    Returns:
        Sorted indices, (B, kept).
    """
    owners = pool.owners[rows]
    score = torch.rand(owners.shape, generator=generator)
    if kind == "objects":
        luck = torch.rand((owners.shape[0], int(owners.max()) + 2), generator=generator)
        luck[:, 0] = 0  # patches that show nothing
        score = score * 0.3 + luck.gather(1, owners + 1)
    elif kind == "anchors":
        score = score * 0.5 + pool.grades[rows]
    elif kind == "asked" and grades is not None:
        score = torch.where(grades > 0, 1 + grades, score)
    return score.topk(kept, 1).indices.sort(1).values


class QuestionPacker:
    """Converter of lists of questions to one packed text block per picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._cache: dict[tuple[str, str], tuple[list[int], int]] = {}

    def encode(self, question: Question) -> tuple[list[int], int]:
        """Return the ids of prompt, answer and end, and the index at which the answer starts."""
        key = (question.text, question.answer)
        if key not in self._cache:
            prompt = self.tokenizer.encode(f"\n{question.text}" + ("" if question.family == "caption" else " answer:"))
            answer = self.tokenizer.encode(f" {question.answer}")
            self._cache[key] = ([*prompt, *answer, self.eos], len(prompt))
        return self._cache[key]

    def pack(self, questions: list[list[Question]]) -> dict[str, torch.Tensor]:
        """Return packed ids, positions, segments and targets, each (B, T).

        Positions start at 0 for each question; segments are -1 for padding; targets are -100 where there are none.
        """
        rows = []
        for asked in questions:
            ids: list[int] = []
            positions: list[int] = []
            segments: list[int] = []
            targets: list[int] = []
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
        """Draw ``count`` questions about a scene, with answers as balanced as the scene allows."""
        asked: list[Question] = []
        families, choices = scene.level.families, scene.level.choices
        weights = [FAMILY_WEIGHTS[family] for family in families]
        while len(asked) < count:
            family = rng.choices(families, weights)[0]
            possible = scene.questions(family, rng.choice(choices[family]) if len(choices[family]) < 4 else None)
            if family == "same" and not scene.questions("same", "yes"):
                continue  # most scenes have none that are the same: "no" would be the answer far too often
            if possible:
                asked.append(rng.choice(possible))
        return asked


def captions(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Draw short captions to complete, such as " star" with the answer "red".

    The answer follows the word that names the object. Every third caption is about the half of the picture an object
    is in, if the scene has such an object. From captions, the model learns to find the patches of a word in one step;
    questions, which need several steps, build on this.
    """
    found = []
    for kind in scene.questions("color"):
        found.append(Question("caption", " " + scene.things[kind.about[0]].kind, kind.answer, kind.about))
    for shape in scene.questions("shape"):
        found.append(Question("caption", " " + scene.things[shape.about[0]].colour, shape.answer, shape.about))
    for card in scene.questions("reading"):
        found.append(Question("caption", f" {scene.things[card.about[0]].colour} card", card.answer, card.about))
    for plate in scene.questions("number"):
        found.append(Question("caption", f" {scene.things[plate.about[0]].colour} plate", plate.answer, plate.about))
    for group in scene.questions("counting"):
        found.append(Question("caption", " " + plural(scene.things[group.about[0]].kind), group.answer, group.about))
    sided = []
    for kind in scene.questions("color"):
        thing = scene.things[kind.about[0]]
        if abs(thing.centre[1] - scene.level.side / 2) >= 6:
            half = "left" if thing.centre[1] < scene.level.side / 2 else "right"
            sided.append(Question("caption", f" left or right {thing.kind}", half, kind.about))
    return [rng.choice(sided if sided and turn % 3 == 0 else found) for turn in range(count)]


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
        text: Return value of :meth:`QuestionPacker.pack`.
        bos: Id of the token before the picture.
        kept: Indices of the visual tokens to show, (B, k); ``None`` shows all. They keep their positions.

    Returns:
        Logits at the positions that have a target, (targets, vocabulary), and the targets.
    """
    batch, tokens, _ = features.shape
    device = features.device
    shown = torch.arange(tokens, device=device).expand(batch, tokens) if kept is None else kept
    if kept is not None:
        features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
    visual = model.model.multi_modal_projector(features)  # (B, k, D)
    embed = model.get_input_embeddings()
    start = embed(torch.full((batch, 1), bos, device=device))
    inputs = torch.cat([start, visual, embed(text["ids"])], 1)  # (B, L, D)
    positions = torch.cat([torch.zeros_like(shown[:, :1]), shown + 1, text["positions"] + tokens + 1], 1)
    head = 1 + visual.shape[1]
    length = inputs.shape[1]
    segments = torch.cat([torch.full((batch, head), -2, device=device), text["segments"]], 1)
    same = segments[:, :, None] == segments[:, None, :]
    seen = (same | (segments == -2)[:, None, :]) & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(batch, 1, length, length, device=device).masked_fill_(
        ~seen[:, None], torch.finfo(torch.float32).min
    )
    hidden = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state[:, head:]
    wanted = text["targets"] != -100
    return model.lm_head(hidden[wanted]), text["targets"][wanted]


def place_loss(model: LlavaForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of row and column along two directions of projected tokens.

    The two directions are fixed. Without this loss the projector discards the positions that the tower encodes, and
    left and right cannot be learnt.

    Args:
        model: The model; its tower is not run.
        features: The tower's patch features (B, N, width).
    """
    directions = torch.randn(features.shape[-1], 2, generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(directions).Q.to(features.device)  # (D, 2), orthonormal
    axis = torch.linspace(-1, 1, round(features.shape[1] ** 0.5), device=features.device) * 6
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return (model.model.multi_modal_projector(features) @ directions - grid).square().mean()


class LanguageStage:
    """Batches and losses of the second stage, with all randomness seeded by the step.

    Args:
        model: The model, its tower already trained.
        tokenizer: Its tokenizer.
        batch: Pictures per step.
        questions: Questions per picture.
        captions: Captions to complete per picture.
        chunk: Pictures drawn and encoded at a time.
        reuse: Number of times each picture of a chunk is shown, each time with new questions.
        drop: Share of the steps that show only a subset of the visual tokens.
        level: Which scenes.
        easy_steps: The first steps show mostly the best patches of all objects, more of them as time goes on.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        batch: int = 32,
        questions: int = 10,
        captions: int = 9,
        chunk: int = 2048,
        reuse: int = 4,
        drop: float = 0.45,
        easy_steps: int = 600,
        level: Level = STANDARD,
    ) -> None:
        self.level = level
        self.model, self.packer = model, QuestionPacker(tokenizer)
        self.easy_steps, self.captions = easy_steps, captions
        self.batch, self.questions, self.chunk, self.reuse, self.drop = batch, questions, chunk, reuse, drop
        self._steps_per_chunk = chunk * reuse // batch
        self._current: tuple[int, EncodedScenes] | None = None

    def loss(self, step: int) -> dict[str, torch.Tensor]:
        """Return the loss of one step and the accuracy of its answers."""
        number, inside = divmod(step, self._steps_per_chunk)
        if self._current is None or self._current[0] != number:
            self._current = (number, EncodedScenes.draw(self.model, self.chunk, 1_000_000 + number, self.level))
        pool = self._current[1]
        rng = random.Random(f"grip_env language {step}")
        generator = torch.Generator().manual_seed(step)
        epoch, place = divmod(inside * self.batch, self.chunk)
        order = torch.randperm(self.chunk, generator=torch.Generator().manual_seed(epoch))
        rows = order[place : place + self.batch]
        asked = [
            self.packer.sample(pool.scenes[row], self.questions, rng) + captions(pool.scenes[row], self.captions, rng)
            for row in rows.tolist()
        ]
        kept, tokens = None, self.level.grid**2
        if step < self.easy_steps and rng.random() < 0.8:
            most = tokens // 6 + round(tokens * 5 / 6 * step / self.easy_steps)
            kept = random_subset(pool, rows, rng.randint(tokens // 9, most), "anchors", generator)
        elif rng.random() < self.drop:
            count = round(math.exp(rng.uniform(math.log(5), math.log(tokens * 5 // 6))))
            kind = rng.choice(("uniform", "objects", "anchors", "asked", "asked", "asked"))
            if kind == "asked":
                asked = [questions[:1] for questions in asked]  # the subset is chosen for this question
                pairs = zip(rows.tolist(), asked, strict=True)
                grades = np.stack(
                    [pool.scenes[row].relevance(questions[0].about).reshape(-1) for row, questions in pairs]
                )
                kept = random_subset(pool, rows, count, kind, generator, torch.from_numpy(grades))
            else:
                kept = random_subset(pool, rows, count, kind, generator)
        device, features = self.model.device, pool.features[rows]
        text = {name: part.to(device) for name, part in self.packer.pack(asked).items()}
        kept = None if kept is None else kept.to(device)
        logits, targets = forward_packed(self.model, features, text, self.packer.bos, kept)
        answers = targets != self.packer.eos
        loss = F.cross_entropy(logits.float(), targets) + PLACE_WEIGHT * place_loss(self.model, features)
        right = (logits.argmax(-1) == targets)[answers].float().mean()
        return {"loss": loss, "accuracy" if kept is None else "pruned": right}

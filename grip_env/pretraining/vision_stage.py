"""First stage of pre-training, in which each visual token learns to describe its patch.

Each projected token is trained to be similar to the embeddings of the words for the thing that covers its patch (a
dense form of contrastive image-text training), and to give its row and column. The tower is frozen afterwards, so
tokens stay local.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from grip_env.pretraining.embedded_models import WIDTH, task_words
from grip_env.tasks.scene_layout import Thing
from grip_env.tasks.scene_levels import COLOURS, STANDARD, Level
from grip_env.tasks.scenes import Scene, SceneTask, coverage
from grip_env.tasks.sprites import SHAPES

__all__ = ["DenseBatch", "DenseHead", "dense_labels", "draw_scenes", "normalise", "vision_tokens"]

_NO_KIND, _DECORATION = len(SHAPES) + 10, len(SHAPES) + 11
_NO_COLOUR = len(COLOURS)


_STEERED = ("counting", "same", "same", "near", "odd", "odd", "odd")
"""Families with answers that scenes drawn without them in mind seldom have: of the hard level, half the scenes do."""


def draw_scenes(count: int, seed: int, split: str = "train", level: Level = STANDARD) -> list[Scene]:
    """Draw ``count`` scenes of ``split``; the same seed gives the same scenes."""
    rng = random.Random(f"grip_env pretraining {split} {seed}")
    scenes: list[Scene] = []
    while len(scenes) < count:
        family = rng.choice(_STEERED) if level is not STANDARD and rng.random() < 0.5 else None
        answer = rng.choice(level.choices[family]) if family else None
        scene = SceneTask.sample_scene(split, rng, family, answer, level)
        if scene is not None:
            scenes.append(scene)
    return scenes


def normalise(images: np.ndarray) -> torch.Tensor:
    """Convert uint8 pictures (B, H, W, 3) to pixel values as the processor does.

    The result is float32 (B, 3, H, W).
    """
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)


def _parts(thing: Thing) -> list[tuple[Thing, int | None]]:
    """Return a thing and its digit; for a plate, two overlapping cards, one for each digit."""
    if thing.kind != "plate":
        return [(thing, thing.number)]
    digits = divmod(thing.number or 0, 10)
    lefts = thing.left, thing.left + thing.width - thing.size
    return [
        (Thing("card", thing.colour, thing.size, 0, digit, thing.top, left), digit)
        for digit, left in zip(digits, lefts, strict=True)
    ]


def dense_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return kind, colour and "is the best patch of an object" of every patch, each (N,)."""
    parts = [part for thing in scene.things for part in _parts(thing)]
    cover = np.stack([coverage(part, scene.level).reshape(-1) for part, _ in parts])  # (parts, N)
    winner, share = cover.argmax(0), cover.max(0)
    best = cover.argmax(1)
    kinds = np.full(cover.shape[1], _NO_KIND)
    colours = np.full(cover.shape[1], _NO_COLOUR)
    anchors = np.zeros(cover.shape[1], dtype=np.float32)
    for index, (thing, digit) in enumerate(parts):
        patches = np.flatnonzero((winner == index) & (share >= 0.25))
        patches = np.union1d(patches, best[index : index + 1])
        if digit is not None:
            kind = len(SHAPES) + digit
        else:
            kind = SHAPES.index(thing.kind) if thing.is_shape else _DECORATION
        kinds[patches] = kind
        colours[patches] = COLOURS.index(thing.colour)
        anchors[best[index]] = float(kind != _DECORATION)
    return kinds, colours, anchors


@dataclass
class DenseBatch:
    """Pictures with a label for every patch: pixels (B, 3, H, W), the rest (B, N)."""

    pixels: torch.Tensor
    kinds: torch.Tensor
    colours: torch.Tensor
    anchors: torch.Tensor

    @classmethod
    def draw(cls, count: int, seed: int, split: str = "train", level: Level = STANDARD) -> DenseBatch:
        """Draw a batch of scenes."""
        scenes = draw_scenes(count, seed, split, level)
        kinds, colours, anchors = (np.stack(part) for part in zip(*map(dense_labels, scenes), strict=True))
        pixels = normalise(np.stack([scene.draw() for scene in scenes]))
        return cls(pixels, torch.from_numpy(kinds), torch.from_numpy(colours), torch.from_numpy(anchors))

    def to(self, device: torch.device) -> DenseBatch:
        """Return the batch on a device."""
        return DenseBatch(*(part.to(device) for part in vars(self).values()))


def vision_tokens(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tower's patch features (B, N, width) and its pooled CLS token.

    The features are those that the projector gets.
    """
    outputs = model.model.vision_tower(pixels, output_hidden_states=True)
    return outputs.hidden_states[model.config.vision_feature_layer][:, 1:], outputs.pooler_output


class DenseHead(nn.Module):
    """Head that predicts kind, colour, position and anchors from projected tokens.

    It is used only in pre-training.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, grid: int = STANDARD.grid) -> None:
        super().__init__()
        self.grid = grid
        ids = {key: [tokenizer.encode(word)[0] for word in words] for key, words in task_words().items()}
        self.kind_ids, self.colour_ids = ids["kind"], ids["colour"]
        self.no_kind = nn.Parameter(torch.randn(2, WIDTH) * WIDTH**-0.5)
        self.no_colour = nn.Parameter(torch.randn(1, WIDTH) * WIDTH**-0.5)
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.place = nn.Linear(WIDTH, 2 * grid + 1)
        self.presence = nn.Linear(WIDTH, len(SHAPES) + 10 + len(COLOURS))

    def losses(
        self, tokens: torch.Tensor, pooled: torch.Tensor, embeddings: torch.Tensor, batch: DenseBatch
    ) -> dict[str, torch.Tensor]:
        """Return losses and accuracies by name.

        Args:
            tokens: Projected visual tokens (B, N, WIDTH).
            pooled: The pooled CLS token (B, WIDTH), which learns the words that apply to the picture.
            embeddings: The language model's word embeddings (V, WIDTH).
            batch: The labels.
        """
        kind = self.scale * tokens @ torch.cat([embeddings[self.kind_ids], self.no_kind]).T
        colour = self.scale * tokens @ torch.cat([embeddings[self.colour_ids], self.no_colour]).T
        place = self.place(tokens)
        grid = self.grid
        axis = torch.arange(grid, device=tokens.device)
        rows, columns = axis.repeat_interleave(grid).expand_as(batch.kinds), axis.repeat(grid).expand_as(batch.kinds)
        words = torch.cat(
            [
                F.one_hot(batch.kinds, len(SHAPES) + 12).amax(1)[:, : len(SHAPES) + 10],
                F.one_hot(batch.colours, len(COLOURS) + 1).amax(1)[:, : len(COLOURS)],
            ],
            1,
        ).float()
        things = batch.kinds < _NO_KIND
        weights = torch.where(things, 1.0, 0.3)  # two patches in three show neither shape nor digit
        weights = weights / weights.sum()
        kind_loss = (F.cross_entropy(kind.transpose(1, 2), batch.kinds, reduction="none") * weights).sum()
        colour_loss = (F.cross_entropy(colour.transpose(1, 2), batch.colours, reduction="none") * weights).sum()
        row_loss = F.cross_entropy(place[..., :grid].flatten(0, 1), rows.flatten())
        column_loss = F.cross_entropy(place[..., grid : 2 * grid].flatten(0, 1), columns.flatten())
        anchor_loss = F.binary_cross_entropy_with_logits(place[..., -1], batch.anchors)
        presence_loss = F.binary_cross_entropy_with_logits(self.presence(pooled), words)
        digits = things & (batch.kinds >= len(SHAPES))
        right = kind.argmax(-1) == batch.kinds
        return {
            "loss": kind_loss + 0.5 * colour_loss + 0.1 * (row_loss + column_loss) + anchor_loss + 0.1 * presence_loss,
            "shape": right[things & ~digits].float().mean(),
            "digit": right[digits].float().mean(),
            "colour": (colour.argmax(-1) == batch.colours)[things].float().mean(),
            "column": (place[..., grid : 2 * grid].argmax(-1) == columns).float().mean(),
            "anchor": anchor_loss,
        }

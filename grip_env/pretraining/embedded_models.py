"""Embedded models before training: miniature LLaVAs built from transformers' own classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from grip_env.tasks.scene_levels import CELL, COLOURS, HARD, STANDARD, Level
from grip_env.tasks.scene_questions import plural
from grip_env.tasks.sprites import SHAPES

__all__ = [
    "PATCH",
    "SIZES",
    "TINY",
    "WIDTH",
    "Schedule",
    "Size",
    "build_model",
    "build_processor",
    "build_tokenizer",
    "start_from",
    "task_words",
]

PATCH = CELL
WIDTH = 128


@dataclass(frozen=True)
class Schedule:
    """Steps and peak learning rates of the two stages of pre-training."""

    vision_steps: int
    vision_learning_rate: float
    language_steps: int
    language_learning_rate: float
    easy_steps: int
    """First steps of the language stage, which show mostly the best patches of all objects."""


@dataclass(frozen=True)
class Size:
    """An embedded model: the scenes it is made for, its depth, and its default training."""

    name: str
    level: Level
    """The scenes it is trained on; their side is that of its pictures."""
    layers: int
    """Of the language model; the vision tower has four."""
    vocabulary: int
    """The most tokens of its tokenizer."""
    start: str
    """The embedded model whose weights it starts from; none if empty."""
    schedule: Schedule


TINY = Size("tiny", STANDARD, 4, 512, "", Schedule(2200, 1.5e-3, 3000, 1e-3, 600))
SMALL = Size("small", HARD, 8, 640, "tiny", Schedule(400, 5e-4, 1400, 8e-4, 300))
SIZES = {"tiny": TINY, "small": SMALL}
"""The embedded models by name."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>\n{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'user' %} answer:"
    "{% elif message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def task_words() -> dict[str, list[str]]:
    """Return the words that the vision stage aligns patches with: kinds and colours.

    Kinds are shapes and digits.
    """
    return {
        "kind": [f" {shape}" for shape in SHAPES] + [f" {digit}" for digit in range(10)],
        "colour": [f" {colour}" for colour in COLOURS],
    }


def _corpus(level: Level) -> Iterable[str]:
    for kind in SHAPES:
        for other in SHAPES:
            yield f"is the {kind} left or right of the {other}? answer: left"
            yield f"is the {kind} left or right of the {other}? answer: right"
        yield f"how many {plural(kind)} are there? answer: {kind}"
        for colour in COLOURS:
            yield f"is there a {colour} {kind}? answer: yes"
            yield f"is there an {colour} {kind}? answer: no"
            yield f"what color is the {kind}? answer: {colour}"
            yield f"what shape is the {colour} object? answer: {kind}"
            for digit in range(10):
                yield f"what digit is on the {colour} card? answer: {digit}"
    if level is STANDARD:
        return
    for one, other in permutations(COLOURS, 2):
        yield f"which card has the larger digit, the {one} or the {other}? answer: {one}"
        yield f"do the {one} and the {other} card show the same digit? answer: yes"
    for one, other in permutations(SHAPES, 2):
        yield f"are there more {plural(one)} than {plural(other)}? answer: no"
        yield f"are the {one} and the {other} the same color? answer: yes"
    for kind in SHAPES:
        yield f"what color is the odd one of the {plural(kind)}? answer: red"
        for colour in COLOURS:
            yield f"what color is the {kind} near the {colour} card? answer: {colour}"
            yield f"what number is on the {colour} plate? answer: 1"


def build_tokenizer(size: Size = TINY) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the questions of a model's scenes.

    Each of their words is a token, and any other text can still be encoded.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(size.level), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def build_processor(size: Size = TINY, pixels: int | None = None) -> LlavaProcessor:
    """Return the processor of an embedded model.

    Args:
        size: Which model.
        pixels: Height and width of its images; those of its scenes if not given.
    """
    pixels = pixels or size.level.side
    side = {"height": pixels, "width": pixels}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(size),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _sincos(side: int, width: int) -> torch.Tensor:
    """Return two-dimensional sine-cosine position embeddings, (side * side, width).

    With them, neighbours start out similar.
    """
    quarter = width // 4
    frequency = torch.from_numpy(np.geomspace(1.0, 1 / 12.0, quarter)).float()
    axis = torch.arange(side)[:, None] * frequency * (torch.pi / 2)
    waves = torch.cat([axis.sin(), axis.cos()], 1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, size: Size = TINY, pixels: int | None = None
) -> LlavaForConditionalGeneration:
    """Return an untrained model in float32.

    Args:
        tokenizer: Its tokenizer.
        seed: Seed of the weights.
        size: Which model.
        pixels: Height and width of its images; those of its scenes if not given.
    """
    torch.manual_seed(seed)
    pixels = pixels or size.level.side
    grid = pixels // PATCH
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=pixels,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max(512, 2 * grid * grid),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(  # type: ignore[call-arg]  # renamed in the base class
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=grid * grid,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=WIDTH**-0.5)
        table = model.model.vision_tower.embeddings.position_embedding.weight
        table[1:] = 0.3 * _sincos(grid, WIDTH)
        for layer in model.model.language_model.layers:
            # At the start, queries match keys of similar content, and attention passes on the values it finds: words
            # find their patches within a few hundred steps, not thousands. After Trockman & Kolter, "Mimetic
            # initialization of self-attention layers", 2023 (who pass on the negative; here tokens share words).
            match, content = (torch.nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)) for _ in range(2))
            layer.self_attn.q_proj.weight.copy_(match)
            layer.self_attn.k_proj.weight.copy_(match)
            layer.self_attn.v_proj.weight.copy_(0.7 * content)
            layer.self_attn.o_proj.weight.copy_(0.7 * content.T)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def start_from(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    trained: LlavaForConditionalGeneration,
    trained_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Copy what a trained model knows into a larger one, which then answers alike.

    Words are matched by their text, position embeddings of the tower are stretched over its larger grid, and language
    model layers beyond those of the trained model pass on what they are given, until they learn something to add.
    """
    own, given = model.state_dict(), trained.state_dict()
    table = "vision_tower.embeddings.position_embedding.weight"
    for name, value in own.items():
        if name.endswith("embed_tokens.weight") or name.endswith("lm_head.weight"):
            known = trained_tokenizer.get_vocab()
            for word, index in tokenizer.get_vocab().items():
                if word in known:
                    value[index] = given[name][known[word]]
        elif name.endswith(table):
            rows, before = (int((len(part) - 1) ** 0.5) for part in (value, given[name]))
            grid = given[name][1:].T.reshape(1, -1, before, before)
            wide = torch.nn.functional.interpolate(grid, size=(rows, rows), mode="bicubic", align_corners=False)
            value.copy_(torch.cat([given[name][:1], wide[0].flatten(1).T]))
        elif name in given and given[name].shape == value.shape:
            value.copy_(given[name])
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value.zero_()

"""The untrained embedded model, a miniature LLaVA built from transformers' own classes."""

from __future__ import annotations

from collections.abc import Iterable

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

from grip_env.tasks import scenes
from grip_env.tasks.sprites import SHAPES

__all__ = ["PATCH", "WIDTH", "build_model", "build_processor", "build_tokenizer", "task_words"]

PATCH = 8
WIDTH = 128

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
        "colour": [f" {colour}" for colour in scenes.COLOURS],
    }


def _corpus() -> Iterable[str]:
    for kind in SHAPES:
        for other in SHAPES:
            yield f"is the {kind} left or right of the {other}? answer: left"
            yield f"is the {kind} left or right of the {other}? answer: right"
        yield f"how many {scenes.plural(kind)} are there? answer: {kind}"
        for colour in scenes.COLOURS:
            yield f"is there a {colour} {kind}? answer: yes"
            yield f"is there an {colour} {kind}? answer: no"
            yield f"what color is the {kind}? answer: {colour}"
            yield f"what shape is the {colour} object? answer: {kind}"
            for digit in range(10):
                yield f"what digit is on the {colour} card? answer: {digit}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the task's questions.

    Each word of the task is one token; any other text can still be encoded.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def build_processor(pixels: int = scenes.SIDE) -> LlavaProcessor:
    """Return the processor of the embedded model for ``pixels`` x ``pixels`` images.

    By default these are 96 x 96; patches are 8 x 8.
    """
    side = {"height": pixels, "width": pixels}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
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
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, pixels: int = scenes.SIDE
) -> LlavaForConditionalGeneration:
    """Return an untrained model in float32, for images of ``pixels`` x ``pixels``."""
    torch.manual_seed(seed)
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
        num_hidden_layers=4,
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

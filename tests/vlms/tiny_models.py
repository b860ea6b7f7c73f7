"""Tiny random models of the image-text families of transformers, each with the processor of its family.

Everything is built from configs: nothing is downloaded. What makes a family hard is really there, only small: tiles of
several shapes, newline features, multimodal positions, window attention, deepstack, masks that are not causal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, processing_utils
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

__all__ = ["FAMILIES", "build", "build_tokenizer", "prompt", "save", "stand_ins"]

WIDTH = 32
PATCH = 8
CORPUS = (
    "User: what is it? is there a red circle left of the blue square?\n\nAssistant: yes, there is a red circle\n",
    "how many circles are there? what color is the square? red green blue left right no three\n\n",
)
TURNS = (  # the shape of ChatML, which several families share
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class NoVideos(VideoProcessorMixin):
    """Stands where a processor must have a video processor."""

    num_frames = 1  # SmolVLM's chat template asks for these two
    fps = 1

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> NoVideos:
        return cls()

    def __reduce__(self) -> tuple[Any, ...]:
        return _video_processor, (type(self).__name__,)  # the class that it makes has no name in any module


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """In this context the processors of families that also read videos can be made and loaded.

    Those processors insist on a video processor, and every one of them needs torchvision; SmolVLM's also needs
    num2words. Neither matters to images. Where both are installed, nothing is replaced.
    """
    with contextlib.ExitStack() as stack:
        if not is_torchvision_available():
            package = processing_utils.transformers_module
            stack.enter_context(mock.patch.object(package, "VideoProcessorMixin", VideoProcessorMixin, create=True))
            loaders = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING._MAPPING_NAMES
            stack.enter_context(mock.patch.dict(loaders, video_processor=(__name__, NoVideos.__name__)))
        if processing_smolvlm.num2words is None:
            stack.enter_context(mock.patch.object(processing_smolvlm, "num2words", str))
        yield


def _video_processor(name: str) -> Any:
    """Return the named video processor, or a stand-in that is saved under its name."""
    return getattr(transformers, name)() if is_torchvision_available() else type(name, (NoVideos,), {})()


def build_tokenizer(
    *special: str, eos: str, pad: str, bos: str | None = None, add_bos: bool = False, **named: str
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of a few hundred tokens.

    Args:
        special: Special tokens besides the ones below.
        eos, pad, bos: The ends and the padding of sequences.
        add_bos: Whether every text starts with ``bos``.
        named: Special tokens that are attributes of the tokenizer, such as ``image_token``.
    """
    ends = [pad, eos] if bos is None else [pad, bos, eos]
    tokens = list(dict.fromkeys([*ends, *named.values(), *special]))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(tokens) + 256 + 64,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=named
    )


def _language(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """Return what the configs of all language models here share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _vision(side: int, **more: Any) -> dict[str, Any]:
    """Return what the configs of all vision transformers for square images here share."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": PATCH,
        **more,
    }


def _model(config: Any, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str] = ()) -> Any:
    """Return a model with weights large enough that what it sees changes what it says."""
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.25)
            else:  # norms stay near their usual value; biases, newlines and the like stop being zero
                weight.add_(0.1 * torch.randn_like(weight))
    ends = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(token) for token in stops)]
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = ends if stops else ends[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


# -- LLaVA and what came of it ---------------------------------------------------------------------------------


def _llava() -> tuple[Any, Any]:
    """LLaVA 1.5: the middle square of the image, 6 x 6 tokens of the last but one layer."""
    tokenizer = build_tokenizer("<unk>", bos="<s>", eos="</s>", pad="<pad>", add_bos=True, image_token="<image>")
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 6 * PATCH}, crop_size={"height": 6 * PATCH, "width": 6 * PATCH}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision(6 * PATCH, projection_dim=WIDTH)),
        text_config=transformers.LlamaConfig(**_language(tokenizer)),
        image_token_id=_id(tokenizer, "<image>"),
        image_seq_length=36,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return _model(config, tokenizer), processor


def _llava_next() -> tuple[Any, Any]:
    """LLaVA-NeXT 1.6: the whole image, then tiles of 4 x 4 tokens without their padding, each row with a newline."""
    side = 4 * PATCH
    shapes = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, 2 * side], [side, 3 * side]]
    tokenizer = build_tokenizer("<unk>", bos="<s>", eos="</s>", pad="<pad>", add_bos=True, image_token="<image>")
    processor = transformers.LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=shapes
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% endif %}"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
            "{% if message['role'] == 'user' %} [/INST]{% else %}</s>{% endif %}{% endfor %}"
        ),
    )
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision(side, projection_dim=WIDTH)),
        text_config=transformers.MistralConfig(**_language(tokenizer, sliding_window=None)),
        image_token_index=_id(tokenizer, "<image>"),
        image_seq_length=16,
        image_grid_pinpoints=shapes,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return _model(config, tokenizer), processor


def _llava_onevision() -> tuple[Any, Any]:
    """LLaVA-OneVision: as LLaVA-NeXT, but what exceeds three tiles' worth of tokens is interpolated down to it."""
    side = 4 * PATCH
    shapes = [[side * rows, side * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    tokenizer = build_tokenizer(
        "<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", image_token="<image>", video_token="<video>"
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side}, image_grid_pinpoints=shapes
        ),
        tokenizer=tokenizer,
        video_processor=_video_processor("LlavaOnevisionVideoProcessor"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
        chat_template=TURNS.replace("IMAGE", "<image>\n"),
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_vision(side, vision_use_head=False)),
        text_config=transformers.Qwen2Config(**_language(tokenizer)),
        image_token_index=_id(tokenizer, "<image>"),
        video_token_index=_id(tokenizer, "<video>"),
        image_grid_pinpoints=shapes,
        vision_aspect_ratio="anyres_max_3",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _model(config, tokenizer), processor


# -- Qwen-VL ---------------------------------------------------------------------------------------------------


def _qwen(processor_class: str, video_class: str, system: str = "") -> Any:
    """Return a processor of the Qwen-VL families: 16 to 32 tokens of 16 x 16 pixels, whatever the image's shape."""
    tokenizer = build_tokenizer(
        "<|im_start|>",
        "<|vision_start|>",
        "<|vision_end|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    return getattr(transformers, processor_class)(
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 16 * 16**2, "longest_edge": 32 * 16**2},
            patch_size=PATCH,
            temporal_patch_size=2,
            merge_size=2,
        ),
        tokenizer=tokenizer,
        video_processor=_video_processor(video_class),
        chat_template=system + TURNS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _qwen_config(name: str, processor: Any, vision: dict[str, Any], **text: Any) -> Any:
    """Return the config of a Qwen-VL family; the tokens have the same names in all."""
    tokenizer = processor.tokenizer
    vision = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, **vision}
    return getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config=_language(tokenizer, **text),
        image_token_id=_id(tokenizer, "<|image_pad|>"),
        video_token_id=_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_id(tokenizer, "<|vision_end|>"),
    )


# a low base, or the axes that turn slowest would not tell apart positions a few tokens away
MROPE = {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [2, 3, 3]}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def _qwen2_vl() -> tuple[Any, Any]:
    """Qwen2-VL: dynamic resolution, 2 x 2 patches a token, positions of three axes."""
    processor = _qwen("Qwen2VLProcessor", "Qwen2VLVideoProcessor", SYSTEM)
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    config = _qwen_config("Qwen2VL", processor, vision, rope_parameters=dict(MROPE))
    return _model(config, processor.tokenizer), processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL: as Qwen2-VL; the vision model's first layer attends within windows of 2 x 2 tokens."""
    processor = _qwen("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", SYSTEM)
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "out_hidden_size": WIDTH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
    }
    config = _qwen_config("Qwen2_5_VL", processor, vision, rope_parameters=dict(MROPE))
    return _model(config, processor.tokenizer), processor


def _qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL: both vision layers also add to the first two of three language layers; the axes interleave."""
    processor = _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {**MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    # the third layer is there because what is added to an image's tokens after the last one changes no answer
    config = _qwen_config("Qwen3VL", processor, vision, num_hidden_layers=3, head_dim=WIDTH // 2, rope_parameters=rope)
    return _model(config, processor.tokenizer), processor


# -- Idefics3 and SmolVLM --------------------------------------------------------------------------------------

PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
DIALOGUE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPLIT = {"size": {"longest_edge": 18 * PATCH}, "max_image_size": {"longest_edge": 6 * PATCH}}


def _idefics3() -> tuple[Any, Any]:
    """Idefics3: tiles of 3 x 3 tokens, each after the name of its place, then the whole image."""
    tokenizer = build_tokenizer(
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        "<end_of_utterance>",
        *PLACES,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|reserved_special_token_0|>",
        add_bos=True,
    )
    processor = transformers.Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(**SPLIT),
        tokenizer=tokenizer,
        image_seq_len=9,
        chat_template="<|begin_of_text|>" + DIALOGUE,
    )
    config = transformers.Idefics3Config(
        vision_config=_vision(6 * PATCH),
        text_config=transformers.LlamaConfig(**_language(tokenizer)),
        image_token_id=_id(tokenizer, "<image>"),
        scale_factor=2,
    )
    return _model(config, tokenizer, stops=["<end_of_utterance>"]), processor


def _smolvlm() -> tuple[Any, Any]:
    """SmolVLM: as Idefics3, with a processor that also reads videos."""
    tokenizer = build_tokenizer(
        *PLACES,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
        video_token="<video>",
    )
    processor = transformers.SmolVLMProcessor(
        image_processor=SmolVLMImageProcessorPil(**SPLIT),
        tokenizer=tokenizer,
        video_processor=_video_processor("SmolVLMVideoProcessor"),
        image_seq_len=9,
        chat_template="<|im_start|>" + DIALOGUE,
    )
    config = transformers.SmolVLMConfig(
        vision_config=_vision(6 * PATCH),
        text_config=transformers.LlamaConfig(**_language(tokenizer)),
        image_token_id=_id(tokenizer, "<image>"),
        scale_factor=2,
    )
    return _model(config, tokenizer), processor


# -- InternVL --------------------------------------------------------------------------------------------------


def _internvl() -> tuple[Any, Any]:
    """InternVL3: up to six tiles of 3 x 3 tokens (2 x 2 patches each), then a thumbnail."""
    tokenizer = build_tokenizer(
        "<|im_start|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = transformers.InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(  # it crops to tiles only because the processor tells it to
            size={"height": 6 * PATCH, "width": 6 * PATCH}, min_patches=1, max_patches=6
        ),
        tokenizer=tokenizer,
        video_processor=_video_processor("InternVLVideoProcessor"),
        image_seq_length=9,
        chat_template=TURNS.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    config = transformers.InternVLConfig(
        vision_config=_vision(6 * PATCH),
        text_config=transformers.Qwen2Config(**_language(tokenizer, tie_word_embeddings=True)),
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=9,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return _model(config, tokenizer), processor


# -- Gemma -----------------------------------------------------------------------------------------------------


def _paligemma() -> tuple[Any, Any]:
    """PaliGemma: 6 x 6 tokens; image and question attend to each other both ways, as in T5's prefix mode.

    The processor adds names of places and segments to the vocabulary, over a thousand of them.
    """
    side = 6 * PATCH
    tokenizer = build_tokenizer("<unk>", "<image>", bos="<bos>", eos="<eos>", pad="<pad>", add_bos=True)
    processor = transformers.PaliGemmaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": side, "width": side}, image_seq_length=36),
        tokenizer=tokenizer,
    )
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_vision(side, vision_use_head=False)),
        text_config=transformers.GemmaConfig(**_language(tokenizer, head_dim=WIDTH // 2)),
        image_token_index=_id(tokenizer, "<image>"),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return _model(config, tokenizer), processor


def _gemma3() -> tuple[Any, Any]:
    """Gemma 3: 5 x 5 tokens pooled from 10 x 10 patches that see each other; one layer sees only 16 tokens back."""
    side = 10 * PATCH
    tokenizer = build_tokenizer(
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        add_bos=True,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    processor = transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": side, "width": side}, do_pan_and_scan=False),
        tokenizer=tokenizer,
        image_seq_length=25,
        chat_template=(
            "{{ bos_token }}{% for message in messages %}<start_of_turn>"
            "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
            "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
    )
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_vision(side, vision_use_head=False)),
        text_config=transformers.Gemma3TextConfig(
            **_language(
                tokenizer,
                head_dim=WIDTH // 2,
                query_pre_attn_scalar=WIDTH // 2,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        mm_tokens_per_image=25,
        boi_token_index=_id(tokenizer, "<start_of_image>"),
        eoi_token_index=_id(tokenizer, "<end_of_image>"),
        image_token_index=_id(tokenizer, "<image_soft_token>"),
    )
    model = _model(config, tokenizer, stops=["<end_of_turn>"])
    with torch.no_grad():  # embeddings are scaled up and are the head's weights too: it would repeat the last token
        model.get_input_embeddings().weight.mul_(0.4)
    return model, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}


def build(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a model of the given model type, in float32 and eval mode, and its processor.

    Equal seeds give equal weights; torch's own random state stays what it was.
    """
    with torch.random.fork_rng(devices=[]), stand_ins():
        torch.manual_seed(seed)
        return FAMILIES[kind]()


def save(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write model and processor as ``save_pretrained`` does and return the folder."""
    model, processor = build(kind, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def prompt(processor: Any, question: str) -> str:
    """Return the text around the image that asks ``question``, up to where the answer starts."""
    if processor.chat_template is None:  # PaliGemma
        return f"<image>{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # tests ask no model hub; read when transformers is imported

import pytest
import torch

from grip_env.pretraining.embedded_models import build_model, build_processor
from grip_env.tasks.base import Example
from grip_env.tasks.scenes import CHOICES, SceneTask
from grip_env.vlms.huggingface import HuggingFaceVLM


@pytest.fixture(scope="session")
def random_vlm() -> HuggingFaceVLM:
    """The embedded model before training; what it answers is wrong but depends on what it sees."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    model = build_model(tokenizer, seed=1)
    words = sorted({word for answers in CHOICES.values() for word in answers})
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(8)  # so that pictures differ
        embeddings = model.get_input_embeddings().weight
        embeddings[tokenizer.encode(":")] *= 0.1  # else it repeats the end of the prompt
        embeddings[[tokenizer.encode(f" {word}")[0] for word in words]] *= 2.5  # so that it says answers
    return HuggingFaceVLM(model, processor, "random")


@pytest.fixture(scope="session")
def vlm_folder(random_vlm: HuggingFaceVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``random_vlm`` as ``save_pretrained`` writes it, for what loads a model by its path."""
    folder = tmp_path_factory.mktemp("vlm") / "random"
    random_vlm.model.save_pretrained(folder)
    random_vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scene_examples() -> list[Example]:
    """One example of each question family."""
    task = SceneTask()
    return [task.example("validation", index) for index in range(6)]

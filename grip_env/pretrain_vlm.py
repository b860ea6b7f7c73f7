"""Train the embedded vision-language model: ``python -m grip_env.pretrain_vlm``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

__all__ = ["Config", "main"]


@dataclass
class Config:
    """Train the embedded vision-language model from scratch. Interrupt it at will: the same command resumes."""

    folder: Path = Path("checkpoints/pretrain")
    """Where checkpoints and logs are kept."""
    vision_steps: int = 3200
    """Optimizer steps of the vision stage."""
    vision_batch: int = 32
    """Pictures per step of the vision stage."""
    vision_learning_rate: float = 1.5e-3
    """Peak learning rate of the vision stage."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""


def main(config: Config) -> None:
    """Run every stage that is not finished yet, write the model, and print the table of its card."""
    from grip_env.vlms.building import build_model, build_processor
    from grip_env.vlms.dense import DenseBatch, DenseHead, vision_tokens
    from grip_env.vlms.stage import run_stage

    if config.threads:
        torch.set_num_threads(config.threads)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    head = DenseHead(processor.tokenizer)
    projector, words = model.model.multi_modal_projector, model.get_input_embeddings()

    def dense_loss(step: int) -> dict[str, torch.Tensor]:
        batch = DenseBatch.draw(config.vision_batch, step)
        tokens, pooled = vision_tokens(model, batch.pixels)
        return head.losses(projector(tokens), pooled, words.weight, batch)

    held_out = DenseBatch.draw(200, 0, "validation")

    @torch.no_grad()
    def dense_probe(step: int) -> str:
        tokens, pooled = vision_tokens(model, held_out.pixels)
        values = head.losses(projector(tokens), pooled, words.weight, held_out)
        return "  ".join(f"{key} {float(value):.3f}" for key, value in values.items())

    run_stage(
        "vision",
        config.vision_steps,
        dense_loss,
        {"tower": model.model.vision_tower, "projector": projector, "words": words, "head": head},
        config.folder,
        config.vision_learning_rate,
        probe=dense_probe,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))

"""Train the embedded vision-language model: ``python -m grip_env.pretrain_vlm``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grip_env.cli import check_agents_package, check_at_least, interruptible, parsed
from grip_env.common import stopping
from grip_env.common.atomic_files import replace_folder, write_atomically
from grip_env.common.devices import set_threads
from grip_env.run_folder.folder import make_folder

if TYPE_CHECKING:
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Config", "landscape", "main"]

CARD = """# The embedded model

A LLaVA in miniature for `grip_env`: CLIP vision tower (4 layers), projector and Llama (4 layers), width 128, 144 visual
tokens for a 96 x 96 image, byte-level BPE tokenizer. Trained from scratch, in float32 on two CPU cores, on the
procedural scenes of `grip_env.tasks.scenes` and on nothing else, by

    python -m grip_env.pretrain_vlm

1. *Vision*, {config.vision_steps} steps of {config.vision_batch} scenes: every projected token points at the words for
   what its patch shows, and tells its row and column. The tower is frozen from here on, so that tokens stay local.
2. *Language*, {config.language_steps} steps of {config.language_batch} scenes with ten questions each: projector and
   language model learn to answer; about {config.drop:.0%} of the steps show only a subset of the visual tokens.

## What it can do

{table}

The test examples of this table were drawn after the last choice behind the model; what earlier tables of other examples
showed (counting is the weakest) did play a part in some of these choices.

"Random", "max-min diversity" and "oracle" (the ground-truth relevant tokens, filled up at random) keep 14 of the 144
tokens. `python -m grip_env.pretrain_vlm --card-only` prints this table again.

## What it cannot do

Anything but these scenes and these questions. Photographs, other wordings and other languages give nonsense.
"""

LANDSCAPE = ("all tokens", "random", "max-min diversity", "oracle")


@dataclass
class Config:
    """Train the embedded vision-language model from scratch.

    An interrupted training resumes from its last checkpoint when the same command runs again.
    """

    folder: Path = Path("checkpoints/pretrain")
    """Folder for checkpoints, logs and the finished model."""
    vision_steps: int = 2200
    """Number of optimizer steps in the vision stage."""
    vision_batch: int = 32
    """Number of pictures per step of the vision stage."""
    vision_learning_rate: float = 1.5e-3
    """Peak learning rate of the vision stage."""
    language_steps: int = 3000
    """Number of optimizer steps in the language stage."""
    language_batch: int = 32
    """Number of pictures per step of the language stage, with ten questions each."""
    language_learning_rate: float = 1e-3
    """Peak learning rate of the language stage."""
    easy_steps: int = 600
    """Number of first steps of the language stage that show mostly the best patches of all objects."""
    drop: float = 0.45
    """Share of the language stage's steps that show only a subset of the visual tokens."""
    test_examples: int = 3000
    """Number of examples of the untouched test split that the model card is measured on."""
    card_only: bool = False
    """Only measure the embedded model and print the table of its card, without training."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""


def landscape(vlm: HuggingFaceVLM, split: str, count: int, budget: float = 0.1) -> dict[str, dict[str, float]]:
    """Measure accuracy per family with all tokens and with a share ``budget`` of them.

    Three methods choose the share: random, max-min diversity and oracle.

    Returns:
        {family: {"majority": .., "all tokens": .., "random": .., "max-min diversity": .., "oracle": ..}}; the family
        "all" is the mean over all examples. "majority" is the share of the most frequent answer.
    """
    from agents.base import budget_to_count
    from agents.heuristics import BASELINES, all_tokens
    from grip_env.tasks.scenes import FAMILIES, SceneTask

    task = SceneTask()
    generator = torch.Generator().manual_seed(0)
    answers: list[str] = []
    families: list[str] = []
    right: dict[str, list[bool]] = {name: [] for name in LANDSCAPE}
    for start in range(0, count, 100):
        encoded = vlm.encode([task.example(split, index) for index in range(start, min(start + 100, count))])
        answers += [example.answer for example in encoded.examples]
        families += [example.family for example in encoded.examples]
        counts = budget_to_count(encoded, budget)
        for name in LANDSCAPE:
            selector = all_tokens if name == "all tokens" else BASELINES[name]
            selection = selector(vlm, encoded, counts, generator)
            right[name] += vlm.score(encoded, selection[:, None]).correct[:, 0].tolist()
    table: dict[str, dict[str, float]] = {}
    for family in (*FAMILIES, "all"):
        rows = [row for row, other in enumerate(families) if family in (other, "all")]
        given = [answers[row] for row in rows]
        majority = max(given.count(answer) for answer in set(given)) / len(rows)
        table[family] = {"majority": majority} | {
            name: sum(right[name][row] for row in rows) / len(rows) for name in LANDSCAPE
        }
    return table


def format_landscape(table: dict[str, dict[str, float]], count: int, split: str) -> str:
    """Return the table as Markdown."""
    columns = list(table["all"])
    lines = [
        f"Accuracy on {count} examples of the {split} split: with all 144 visual tokens, and with 10% of them (14).",
        "",
        "| family | majority answer | " + " | ".join([columns[1], *(f"{name} 10%" for name in columns[2:])]) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for family, row in table.items():
        lines.append(f"| {family} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Run the unfinished stages, write the model, and print the table of its card."""
    check_agents_package()
    set_threads(config.threads)
    check_at_least(1, vision_steps=config.vision_steps, vision_batch=config.vision_batch)
    check_at_least(1, language_steps=config.language_steps, language_batch=config.language_batch)
    check_at_least(1, test_examples=config.test_examples)
    from grip_env.pretraining.language_stage import PLACE_WEIGHT, LanguageStage, place_loss
    from grip_env.pretraining.tiny_model import build_model, build_processor
    from grip_env.pretraining.training_loop import run_stage
    from grip_env.pretraining.vision_stage import DenseBatch, DenseHead, vision_tokens
    from grip_env.vlms import load_vlm
    from grip_env.vlms.huggingface import HuggingFaceVLM
    from grip_env.vlms.loading import write_digests

    if not config.card_only:
        make_folder(config.folder)
    else:
        print(format_landscape(landscape(load_vlm("tiny"), "test", config.test_examples), config.test_examples, "test"))
        return

    processor = build_processor()
    tokenizer = processor.tokenizer
    model = build_model(tokenizer)
    head = DenseHead(tokenizer)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words: Any = model.get_input_embeddings()

    def dense_loss(step: int) -> dict[str, torch.Tensor]:
        batch = DenseBatch.draw(config.vision_batch, step)
        tokens, pooled = vision_tokens(model, batch.pixels)
        losses = head.losses(projector(tokens), pooled, words.weight, batch)
        losses["place"] = place_loss(model, tokens)
        return losses | {"loss": losses["loss"] + PLACE_WEIGHT * losses["place"]}

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
        {"tower": tower, "projector": projector, "words": words, "head": head},
        config.folder,
        config.vision_learning_rate,
        probe=dense_probe,
    )

    tower.requires_grad_(False)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():  # initialise plurals with their singulars, which the vision stage has trained
        from grip_env.tasks.scenes import plural
        from grip_env.tasks.sprites import SHAPES

        for shape in SHAPES:
            source, target = (tokenizer.encode(f" {word}")[0] for word in (shape, plural(shape)))
            words.weight[target] = words.weight[source]
    stage = LanguageStage(model, tokenizer, batch=config.language_batch, drop=config.drop, easy_steps=config.easy_steps)

    def export(folder: Path) -> None:
        """Write the model in half precision; it can be loaded in any precision."""
        part = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(part, ignore_errors=True)
        half = build_model(tokenizer).half()
        half.load_state_dict({key: value.half() for key, value in model.state_dict().items()})
        half.set_attn_implementation("sdpa")
        half.save_pretrained(part)
        processor.save_pretrained(part)
        write_digests(part)
        with stopping.held():
            replace_folder(part, folder)

    def language_probe(step: int) -> str:
        grad = {key: value.requires_grad for key, value in model.named_parameters()}
        table = landscape(HuggingFaceVLM(model, processor), "validation", 600)
        for key, value in model.named_parameters():
            value.requires_grad_(grad[key])
        model.train()
        dense = "  ".join(f"{family} {row['all tokens']:.2f}" for family, row in table.items())
        return dense + "  |  " + " / ".join(f"{table['all'][name]:.3f}" for name in LANDSCAPE)

    run_stage(
        "language",
        config.language_steps,
        stage.loss,
        {"model": model},
        config.folder,
        config.language_learning_rate,
        probe=language_probe,
        probe_every=200,
    )
    export(config.folder / "model")
    measured = landscape(load_vlm(config.folder / "model"), "test", config.test_examples)
    table = format_landscape(measured, config.test_examples, "test")
    write_atomically(config.folder / "model" / "MODEL_CARD.md", CARD.format(table=table, config=config))
    print(table)
    print(f"\nThe model is in {config.folder / 'model'}; copy it to grip_env/vlms/tiny to embed it.")


if __name__ == "__main__":
    with interruptible("interrupted; run the same command again to continue from the last checkpoint, if any."):
        main(parsed(Config, "python -m grip_env.pretrain_vlm"))

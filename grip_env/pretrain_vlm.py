"""Train an embedded vision-language model: ``python -m grip_env.pretrain_vlm``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from grip_env.cli import check_agents_package, check_at_least, interruptible, parsed
from grip_env.common import stopping
from grip_env.common.atomic_files import replace_folder, write_atomically
from grip_env.common.devices import find_device, set_threads
from grip_env.run_folder.folder import make_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from grip_env.tasks.scenes import SceneTask
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Config", "landscape", "main"]

CARD = """# The embedded model

A LLaVA in miniature for `grip_env`: CLIP vision tower (4 layers), projector and Llama ({size.layers} layers), width
128, {tokens} visual tokens for a {size.level.side} x {size.level.side} image, byte-level BPE tokenizer. Trained {start}
on the procedural scenes of the task `{size.level.name}` and on nothing else, by

    python -m grip_env.pretrain_vlm --size {size.name}

1. *Vision*, {schedule.vision_steps} steps of {config.vision_batch} scenes: every projected token points at the words
   for what its patch shows, and tells its row and column. The tower is frozen from here on, so that tokens stay local.
2. *Language*, {schedule.language_steps} steps of {config.language_batch} scenes with ten questions each: projector and
   language model learn to answer; about {config.drop:.0%} of the steps show only a subset of the visual tokens.

## What it can do

{table}

The test examples of this table were drawn after the last choice behind the model; what earlier tables of other examples
showed (counting is the weakest) did play a part in some of these choices.

"Random", "max-min diversity" and "oracle" (the ground-truth relevant tokens, filled up at random) keep a tenth of the
tokens. `python -m grip_env.pretrain_vlm --size {size.name} --card-only` prints this table again.

## What it cannot do

Anything but these scenes and these questions. Photographs, other wordings and other languages give nonsense.
"""

LANDSCAPE = ("all tokens", "random", "max-min diversity", "oracle")


@dataclass
class Config:
    """Train an embedded vision-language model. Interrupt it at will: the same command resumes."""

    size: Literal["tiny", "small"] = "tiny"
    """Which model: "tiny", for the standard scenes, or "small", twice as deep, for the hard ones, which starts from
    the weights of tiny."""
    folder: Path = Path("checkpoints/pretrain")
    """Where checkpoints, logs and the finished model are kept, in a folder for each size."""
    vision_steps: int | None = None
    """Optimizer steps of the vision stage; what the size says (see its model card), if not given."""
    vision_batch: int = 32
    """Pictures per step of the vision stage."""
    vision_learning_rate: float | None = None
    """Peak learning rate of the vision stage."""
    language_steps: int | None = None
    """Optimizer steps of the language stage."""
    language_batch: int = 32
    """Pictures per step of the language stage, ten questions each."""
    language_learning_rate: float | None = None
    """Peak learning rate of the language stage."""
    easy_steps: int | None = None
    """First steps of the language stage, which show mostly the best patches of all objects."""
    drop: float = 0.45
    """Share of the language stage's steps that show only a subset of the visual tokens."""
    test_examples: int = 3000
    """Number of examples of the untouched test split that the model card is measured on."""
    card_only: bool = False
    """Only measure the embedded model and print the table of its card, without training."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "cuda:1", "mps", ...; auto takes a CUDA device if there is one."""
    bfloat16: bool = False
    """Compute in bfloat16 where that is safe (automatic mixed precision); the weights stay in float32."""


def landscape(
    vlm: HuggingFaceVLM, task: SceneTask, split: str, count: int, budget: float = 0.1
) -> dict[str, dict[str, float]]:
    """Return the accuracy per family with all tokens and with a share chosen in three ways.

    Returns:
        {family: {"majority": .., "all tokens": .., "random": .., "max-min diversity": .., "oracle": ..}}; the family
        "all" is the mean over all examples. "majority" is the share of the most frequent answer.
    """
    from agents.base import budget_to_count
    from agents.heuristics import BASELINES, all_tokens

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
    for family in (*task.families, "all"):
        rows = [row for row, other in enumerate(families) if family in (other, "all")]
        given = [answers[row] for row in rows]
        majority = max(given.count(answer) for answer in set(given)) / len(rows)
        table[family] = {"majority": majority} | {
            name: sum(right[name][row] for row in rows) / len(rows) for name in LANDSCAPE
        }
    return table


def format_landscape(table: dict[str, dict[str, float]], count: int, split: str, tokens: int) -> str:
    """Return the table as Markdown; the model has ``tokens`` visual tokens for an image."""
    columns = list(table["all"])
    lines = [
        f"Accuracy on {count} examples of the {split} split: with all {tokens} visual tokens, and with 10% of them.",
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
    from grip_env.pretraining.embedded_models import SIZES, build_model, build_processor, start_from
    from grip_env.pretraining.language_stage import PLACE_WEIGHT, LanguageStage, place_loss
    from grip_env.pretraining.training_loop import run_stage
    from grip_env.pretraining.vision_stage import DenseBatch, DenseHead, vision_tokens
    from grip_env.tasks.scenes import SceneTask
    from grip_env.vlms import load_vlm
    from grip_env.vlms.huggingface import HuggingFaceVLM
    from grip_env.vlms.loading import write_digests

    size = SIZES[config.size]
    given = {name: getattr(config, name) for name in vars(size.schedule)}
    schedule = replace(size.schedule, **{name: value for name, value in given.items() if value is not None})
    set_threads(config.threads)
    check_at_least(1, vision_steps=schedule.vision_steps, vision_batch=config.vision_batch)
    check_at_least(1, language_steps=schedule.language_steps, language_batch=config.language_batch)
    check_at_least(1, test_examples=config.test_examples)
    device = find_device(config.device)
    folder, level, task = config.folder / size.name, size.level, SceneTask(level=size.level)
    if config.card_only:
        table = landscape(load_vlm(size.name), task, "test", config.test_examples)
        print(format_landscape(table, config.test_examples, "test", level.grid**2))
        return
    make_folder(folder)

    processor = build_processor(size)
    tokenizer = processor.tokenizer
    model = build_model(tokenizer, size=size)
    if size.start:
        trained = load_vlm(size.start, device="cpu")
        start_from(model, tokenizer, trained.model, trained.processor.tokenizer)
    model.to(device)  # type: ignore[arg-type]  # a wrapper hides its signature
    head = DenseHead(tokenizer, level.grid).to(device)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words: Any = model.get_input_embeddings()

    def dense_loss(step: int) -> dict[str, torch.Tensor]:
        batch = DenseBatch.draw(config.vision_batch, step, level=level).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            tokens, pooled = vision_tokens(model, batch.pixels)
            losses = head.losses(projector(tokens), pooled, words.weight, batch)
            losses["place"] = place_loss(model, tokens)
        return losses | {"loss": losses["loss"] + PLACE_WEIGHT * losses["place"]}

    held_out = DenseBatch.draw(200, 0, "validation", level).to(device)

    @torch.no_grad()
    def dense_probe(step: int) -> str:
        tokens, pooled = vision_tokens(model, held_out.pixels)
        values = head.losses(projector(tokens), pooled, words.weight, held_out)
        return "  ".join(f"{key} {float(value):.3f}" for key, value in values.items())

    run_stage(
        "vision",
        schedule.vision_steps,
        dense_loss,
        {"tower": tower, "projector": projector, "words": words, "head": head},
        folder,
        schedule.vision_learning_rate,
        probe=dense_probe,
    )

    tower.requires_grad_(False)
    model.set_attn_implementation("sdpa")
    _copy_words(words.weight, tokenizer, bool(size.start))
    stage = LanguageStage(
        model, tokenizer, config.language_batch, drop=config.drop, easy_steps=schedule.easy_steps, level=level
    )

    def language_loss(step: int) -> dict[str, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            return stage.loss(step)

    def export(target: Path) -> None:
        """Write the model in half precision; readers get it back in the precision they ask for."""
        part = target.with_name(f"{target.name}.new")
        shutil.rmtree(part, ignore_errors=True)
        half = build_model(tokenizer, size=size).half()
        half.load_state_dict({key: value.half().cpu() for key, value in model.state_dict().items()})
        half.set_attn_implementation("sdpa")
        half.save_pretrained(part)
        processor.save_pretrained(part)
        write_digests(part)
        with stopping.held():
            replace_folder(part, target)

    def language_probe(step: int) -> str:
        grad = {key: value.requires_grad for key, value in model.named_parameters()}
        table = landscape(HuggingFaceVLM(model, processor), task, "validation", 100 * len(task.families))
        for key, value in model.named_parameters():
            value.requires_grad_(grad[key])
        model.train()
        dense = "  ".join(f"{family} {row['all tokens']:.2f}" for family, row in table.items())
        return dense + "  |  " + " / ".join(f"{table['all'][name]:.3f}" for name in LANDSCAPE)

    run_stage(
        "language",
        schedule.language_steps,
        language_loss,
        {"model": model},
        folder,
        schedule.language_learning_rate,
        probe=language_probe,
        probe_every=200,
    )
    export(folder / "model")
    measured = landscape(load_vlm(folder / "model"), task, "test", config.test_examples)
    text = format_landscape(measured, config.test_examples, "test", level.grid**2)
    start = f"from the weights of {size.start}" if size.start else "from scratch"
    card = CARD.format(table=text, config=config, schedule=schedule, size=size, tokens=level.grid**2, start=start)
    write_atomically(folder / "model" / "MODEL_CARD.md", card)
    print(text)
    print(f"\nThe model is in {folder / 'model'}; copy it to grip_env/vlms/{size.name} to embed it.")


@torch.no_grad()
def _copy_words(embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerFast, started: bool) -> None:
    """Copy embeddings that the vision stage has trained to those of related words, in place.

    These are the plurals of shapes, or, of a model that ``started`` as another, the second digits of numbers.
    """
    from grip_env.tasks.scene_questions import plural
    from grip_env.tasks.sprites import SHAPES

    pairs = [] if started else [(f" {shape}", f" {plural(shape)}") for shape in SHAPES]
    if started:
        pairs += [(f" {digit}", str(digit)) for digit in range(10)]
    for source, target in pairs:
        embeddings[tokenizer.encode(target)[0]] = embeddings[tokenizer.encode(source)[0]]


if __name__ == "__main__":
    with interruptible("interrupted; run the same command again to continue from the last checkpoint, if any."):
        main(parsed(Config, "python -m grip_env.pretrain_vlm"))

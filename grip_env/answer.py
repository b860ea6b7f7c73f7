"""Answer a question about an image: ``python -m grip_env.answer --image P --question Q``."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from grip_env.cli import (
    check_agents_package,
    check_at_least,
    check_out,
    interruptible,
    load_model,
    parsed,
    print_result,
    say_unfinished,
    writing,
)
from grip_env.common.atomic_files import content_of, write_atomically
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.run_folder.config import ModelConfig
from grip_env.run_folder.folder import make_folder

if TYPE_CHECKING:
    from agents.pruner import Answer, Pruner

__all__ = ["Config", "answer", "main"]

STAGES = ("encode", "select", "prefill", "decode")


@dataclass
class _Asked:
    """Options of this command alone."""

    image: Path = tyro.MISSING
    """Image file."""
    question: str = tyro.MISSING
    """Question about the image."""
    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run, as printed by train; by default, the agent that comes with the package is used."""
    algo: str = ""
    """Your own class that the agent was trained with, as package.module:Class; it is only imported if named here."""
    budget: float = 0.1
    """Share of the visual tokens to keep, in (0, 1]."""
    max_new_tokens: int = 16
    """Maximum number of tokens in an answer."""
    out: Path = Path()
    """Folder for answer.png, a picture of the kept tokens."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""


@dataclass
class Config(ModelConfig, _Asked):  # fields of the last base come first
    """Answer a question from a share of an image's visual tokens and, to compare, from all."""


def table(pruned: Answer, dense: Answer) -> str:
    """Return a text table of both answers with their likelihoods and times."""

    def likelihood(one: Answer) -> str:
        return "-" if math.isnan(one.log_likelihood) else f"{math.exp(one.log_likelihood):.3f}"

    columns = [["", "answer", "likelihood per token", *(f"{stage}, ms" for stage in STAGES), "in all, ms"]]
    for one in (pruned, dense):
        name = "all tokens" if one is dense else f"{int(one.kept.sum())} of {len(one.kept)} tokens"
        times = [one.seconds[stage] * 1e3 for stage in STAGES]
        text = textwrap.shorten(" ".join(one.text.split()), 60, placeholder=" ...")
        columns.append([name, text or "(nothing)", likelihood(one), *(f"{ms:.1f}" for ms in [*times, sum(times)])])
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plain(one: Answer) -> dict[str, Any]:
    """Return an answer as a dictionary that JSON can store."""
    likelihood = None if math.isnan(one.log_likelihood) else one.log_likelihood
    kept = np.flatnonzero(one.kept).tolist()
    return {"text": one.text, "log_likelihood": likelihood, "kept": kept, "of": len(one.kept), "seconds": one.seconds}


def answer(config: Config) -> tuple[Answer, Answer]:
    """Answer from the kept tokens and from all, print both answers, and draw the kept tokens.

    Raises:
        CommandError: If an option is wrong, or the image, the model or the agent cannot be read.
    """
    set_threads(config.threads)
    check_at_least(1, max_new_tokens=config.max_new_tokens)
    if not 0 < config.budget <= 1:
        raise CommandError(f"--budget is a share of the visual tokens in (0, 1]; got {config.budget:g}")
    check_out(config.out)
    from grip_env.tasks.pictures import MAX_PIXELS, PictureError, read_picture

    if not config.image.exists():
        raise CommandError(f"--image {config.image} does not exist")
    try:
        image = read_picture(config.image, MAX_PIXELS)
    except PictureError as error:
        raise CommandError(f"--image {config.image} {error}") from None
    from PIL import Image

    from agents.pruner import Pruner, load_agent

    vlm = load_model(config)
    say_unfinished(config.run)
    try:
        pruner: Pruner = Pruner(vlm, load_agent(vlm, config.vlm, config.run, config.algo or None))
        for budget in (config.budget, 1.0):  # warm up: the first call is slower than later ones
            pruner(image, config.question, budget, 1)
        pruned, dense = (
            pruner(image, config.question, budget, config.max_new_tokens) for budget in (config.budget, 1.0)
        )
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    print(table(pruned, dense))
    if vlm.cache is not None:
        print(f"{vlm.cache.describe()}; so encode is the time to read from it")
    from grip_env.envs.core.rendering import draw_selection

    lines = [config.question, f'"{pruned.text}" from {int(pruned.kept.sum())} tokens', f'"{dense.text}" from all']
    picture = draw_selection(image, pruned.positions, pruned.kept, lines, cells=pruned.cells)
    written = make_folder(config.out) / "answer.png"
    with writing(written):
        write_atomically(written, content_of(lambda file: Image.fromarray(picture).save(file, "png")))
    print(f"wrote {written}")
    print_result({"question": config.question, "picture": str(written), "pruned": plain(pruned), "dense": plain(dense)})
    return pruned, dense


def main() -> None:
    """Run the command."""
    with interruptible("interrupted; nothing was written."):
        config = parsed(Config, "python -m grip_env.answer")
        check_agents_package()
        answer(config)


if __name__ == "__main__":
    main()

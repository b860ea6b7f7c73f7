"""Compare a trained agent with the baselines: ``python -m grip_env.evaluate runs/NAME``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from grip_env.commands import (
    CommandError,
    ModelConfig,
    check_agents_package,
    check_at_least,
    interruptible,
    load_model_and_task,
    make_folder,
)

if TYPE_CHECKING:
    from agents.scorer import Scorer
    from grip_env.report import Comparison
    from grip_env.tasks.base import Task
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Config", "evaluate", "main", "report"]


@dataclass
class Config:
    """Print the comparison tables of a trained agent and draw its curve and gallery."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, as train printed it."""
    split: Literal["test", "validation", "train"] = "test"
    """Examples to compare on; use validation while you tune."""
    examples: int = 480
    """How many examples."""
    data: Path | None = None
    """Your own images and questions to compare on; those the run was trained on, if any, when not given."""
    skip_bad: bool = False
    """Leave out rows of the data with faults, and list them; runs trained with --skip-bad do so anyway."""
    out: Path | None = None
    """Where tables (report.*), pareto.png and kept_tokens.png go; RUN/SPLIT-EXAMPLES if not given."""
    device: str = "auto"
    """Where the model runs: "cpu", "cuda", "cuda:1", "mps", ...; auto takes a CUDA device if there is one."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""


def report(
    run: Path,
    vlm: HuggingFaceVLM,
    task: Task,
    scorer: Scorer,
    split: str,
    examples: int,
    out: Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare, print the tables, and write tables and pictures into ``out`` (the run's folder by default)."""
    from PIL import Image

    from agents.base import Selector
    from agents.heuristics import BASELINES
    from agents.scorer import Scorer
    from agents.selectors import ScorerSelector
    from grip_env.report import AGENT, WARMUP, compare, draw_curve, draw_gallery

    selectors: dict[str, Selector] = dict(BASELINES)
    first = vlm.encode([task.example(split, 0)])
    if first.relevance() is None:
        del selectors["oracle"]  # nobody knows the truth
    try:
        vlm.attention(first)
    except NotImplementedError as error:
        print(f"left out of the comparison: {error}")
        del selectors["CLS attention"]
    if (run / "warmup").is_dir():
        try:
            selectors[WARMUP] = ScorerSelector(Scorer.load(run / "warmup").to(vlm.device))
        except (OSError, ValueError) as error:
            raise CommandError(str(error)) from None
    out = make_folder(out or run)
    selectors[AGENT] = ScorerSelector(scorer.to(vlm.device).eval())
    comparison = compare(vlm, task, selectors, split, examples, progress=progress)
    print("\n" + comparison.markdown() + "\n")
    comparison.save(out)
    draw_curve(comparison, out / "pareto.png")
    encoded = vlm.encode([task.example(split, index) for index in range(min(6, task.size(split)))])
    Image.fromarray(draw_gallery(vlm, encoded, selectors[AGENT])).save(out / "kept_tokens.png")
    for name in ("report.md", "pareto.png", "kept_tokens.png"):
        print(f"wrote {out / name}")
    return comparison


def _load(run: Path) -> tuple[dict[str, Any], Scorer]:
    from agents.scorer import Scorer

    if not (run / "config.json").is_file():
        raise CommandError(f"{run} is not a run: expected a folder with config.json, as grip_env.train writes it")
    try:
        saved = json.loads((run / "config.json").read_text())
        saved["config"]["vlm"], saved["config"]["task"], saved["vlm"]["checksum"]
        if saved["config"].get("data"):
            saved["config"]["skip_bad"], saved["data"]["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise CommandError(f"{run / 'config.json'} is not as grip_env.train wrote it: train again") from None
    try:
        return saved, Scorer.load(run / "agent")
    except FileNotFoundError as error:
        raise CommandError(f"{run} has no trained agent yet: {error}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None


def _model_and_task(config: Config, saved: dict[str, Any]) -> tuple[HuggingFaceVLM, Task]:
    """Return the run's model, and its task unless the command names other data."""
    from grip_env.tasks.files import FileTask

    trained = saved["config"]
    data, skip_bad = config.data, config.skip_bad
    if data is None and trained.get("data"):
        data, skip_bad = Path(trained["data"]), skip_bad or trained["skip_bad"]
    if data is None and skip_bad:
        raise CommandError("--skip-bad is about the rows of --data, and this run was trained without: leave it out")
    names = {field.name for field in fields(ModelConfig)} & set(trained)
    cache = trained.get("cache") and Path(trained["cache"])
    model = ModelConfig(**{name: trained[name] for name in names} | {"device": config.device, "cache": cache})
    vlm, task = load_model_and_task(model, trained["task"], data, skip_bad, (config.split,))
    if isinstance(task, FileTask) and config.data is None and task.fingerprint != saved["data"]["fingerprint"]:
        print(f"note: {task.path} has changed since this agent was trained on it: {task.describe()}", file=sys.stderr)
    return vlm, task


def evaluate(config: Config) -> Comparison:
    """Compare the agent of a run with the baselines, print the tables and draw the pictures.

    Raises:
        CommandError: If an option is wrong, or the run, its agent, its model or its data cannot be read.
    """
    check_at_least(1, examples=config.examples)
    check_at_least(0, threads=config.threads)
    saved, scorer = _load(config.run)
    import torch

    from grip_env.tasks.files import DataError

    if config.threads:
        torch.set_num_threads(config.threads)
    vlm, task = _model_and_task(config, saved)
    try:
        scorer.check_width(vlm.width, config.run, saved["config"]["vlm"])
    except ValueError as error:
        raise CommandError(str(error)) from None
    if vlm.checksum() != saved["vlm"]["checksum"]:
        raise CommandError(
            f"the agent in {config.run} was trained on a vision-language model with other weights than "
            f"{saved['config']['vlm']!r} has now: train an agent for this one"
        )
    # a folder of its own, so that a look at validation does not replace the report that training wrote
    parts = [task.name] if config.data is not None else []
    out = config.out or config.run / "-".join([*parts, config.split, str(config.examples)])
    try:
        comparison = report(config.run, vlm, task, scorer, config.split, config.examples, out)
    except DataError as error:
        raise CommandError(str(error)) from None
    if vlm.cache is not None:
        print(vlm.cache.describe())
    return comparison


def main() -> None:
    """Run the command."""
    config = tyro.cli(Config, description=Config.__doc__, prog="python -m grip_env.evaluate")
    check_agents_package()
    with interruptible("interrupted; nothing was written."):
        evaluate(config)


if __name__ == "__main__":
    main()

"""Tests of whether a trained agent relies on evidence: ``python -m grip_env.probe``.

An agent that sees the question could steer the frozen model instead of showing it evidence, because some tokens make
some answers more likely whatever the image shows. Each probe breaks one link between what the agent sees and what it is
rewarded for. This lowers the reward of an agent that finds evidence, but not of one that steers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from grip_env.cli import (
    check_agents_package,
    check_at_least,
    check_out,
    give_numbers,
    interruptible,
    load_model_and_task,
    parsed,
    print_verdicts,
    say_unfinished,
)
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.run_folder.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from agents.base import Selector
    from grip_env.tasks.base import Task
    from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["HONEST", "PROBES", "Config", "loss", "main", "partners", "probe", "selections", "table", "verdicts"]

HONEST = "as trained"
PROBES = {
    "shuffled question": "chose for another example's question",
    "swapped image": "chose on another example's image",
    "without the evidence": "what shows the answer is removed from its choice",
}
"""Description of each probe, by its name in the table."""
RANDOM = "random tokens"


@dataclass
class _Asked:
    """Options of this command alone."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run, as printed by train; by default, the agent that comes with the package is used."""
    algo: str = ""
    """Your own class that the agent was trained with, as package.module:Class; it is only imported if named here."""
    task: Literal["scenes", "scenes-hard"] = "scenes"
    """The task that provides images and questions."""
    data: Path | None = None
    """Your own images and questions instead of a task."""
    split: Literal["test", "validation", "train"] = "test"
    """Examples to probe on."""
    examples: int = 480
    """Number of examples."""
    budgets: tuple[float, ...] = (0.05, 0.1)
    """Shares of the visual tokens to keep."""
    out: Path | None = None
    """Folder for probe.json, with all numbers."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show a progress bar."""


@dataclass
class Config(ModelConfig, _Asked):  # fields of the last base come first
    """Mislead a trained agent to test whether it looks for evidence.

    An agent that looks for evidence loses reward under each of the probes.
    """


def partners(keys: Sequence[object]) -> list[int]:
    """Return for each example the index of the next one with another key, wrapping around.

    Raises:
        ValueError: If all keys are the same.

    >>> partners(["a", "a", "b"])
    [2, 2, 0]
    """
    if len(set(keys)) < 2:
        raise ValueError("the probes need at least two different examples: give more of them")
    count = len(keys)
    return [next(j % count for j in range(i + 1, i + count) if keys[j % count] != keys[i]) for i in range(count)]


def selections(
    vlm: FrozenVLM, encoded: Encoded, selector: Selector, kept: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the selections of an agent as trained, and of the same agent misled.

    Args:
        vlm: The frozen model.
        encoded: B examples.
        selector: The agent.
        kept: Number of tokens to keep, long (B,).
        generator: Generator of the random numbers.

    Returns:
        bool (B, N) for each name in ``PROBES``, HONEST and RANDOM. The probe "without the evidence" is only there if
        the task knows the relevant tokens.

    Raises:
        ValueError: If images differ in their number of tokens, or all have the same question or the same picture.
    """
    from agents.heuristics import random_tokens

    if not bool(encoded.token_mask.all()):
        raise ValueError("selections are probed on other images, so all images need the same number of visual tokens")
    asked = partners([example.question for example in encoded.examples])
    seen = partners([example.image.tobytes() for example in encoded.examples])
    question = replace(encoded, question=encoded.question[asked], question_mask=encoded.question_mask[asked])
    image = replace(encoded, tokens=encoded.tokens[seen], positions=encoded.positions[seen])
    honest = selector(vlm, encoded, kept, generator)
    chosen = {
        HONEST: honest,
        "shuffled question": selector(vlm, question, kept, generator),
        "swapped image": selector(vlm, image, kept, generator),
        RANDOM: random_tokens(vlm, encoded, kept, generator),
    }
    relevance = encoded.relevance()
    if relevance is not None:
        chosen["without the evidence"] = honest & (relevance <= 0)
    return chosen


def probe(
    vlm: FrozenVLM,
    task: Task,
    selector: Selector,
    split: str,
    examples: int,
    budgets: Sequence[float],
    seed: int = 0,
    progress: bool = False,
) -> dict[str, dict[float, np.ndarray]]:
    """Return the answer log-likelihood of each example under each probe.

    Returns:
        {name: {budget: float32 (examples,)}}, with the names of :func:`selections`.
    """
    import torch
    from tqdm import tqdm

    from agents.base import budget_to_count

    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[float, list[np.ndarray]]] = {}
    count = min(examples, task.size(split))
    size = min(48, count)
    starts = range(0, count - count % size, size)  # whole batches, so that each example has partners
    for start in tqdm(starts, desc=f"probing on {split}", unit="batch", disable=not progress, dynamic_ncols=True):
        encoded = vlm.encode([task.example(split, index) for index in range(start, start + size)])
        for budget in budgets:
            chosen = selections(vlm, encoded, selector, budget_to_count(encoded, budget), generator)
            values = vlm.score(encoded, torch.stack(list(chosen.values()), 1)).log_likelihood.cpu().numpy()
            for column, name in enumerate(chosen):
                found.setdefault(name, {}).setdefault(budget, []).append(values[:, column])
    return {name: {budget: np.concatenate(parts) for budget, parts in row.items()} for name, row in found.items()}


def loss(values: dict[str, dict[float, np.ndarray]], name: str, budget: float) -> tuple[float, float]:
    """Return the mean loss under a probe in nats, and the half width of its 95% interval.

    The interval is over examples.
    """
    lost = values[HONEST][budget] - values[name][budget]
    return float(lost.mean()), 1.96 * float(lost.std(ddof=1)) / math.sqrt(len(lost))


def table(values: dict[str, dict[float, np.ndarray]]) -> str:
    """Return mean log-likelihoods as a Markdown table."""
    budgets = list(values[HONEST])
    lines = ["| answer log-likelihood | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |"]
    lines.append("|---|" + "--:|" * len(budgets))
    for name in (HONEST, *(name for name in PROBES if name in values), RANDOM):
        lines.append(f"| {name} | " + " | ".join(f"{values[name][b].mean():.3f}" for b in budgets) + " |")
    return "\n".join(lines)


def verdicts(values: dict[str, dict[float, np.ndarray]]) -> list[tuple[str, bool]]:
    """Return for each probe (statement with numbers, whether the loss exceeds its interval)."""
    found = []
    for name, meaning in PROBES.items():
        for budget in values.get(name, {}):
            cost, interval = loss(values, name, budget)
            text = f"{budget:.0%}, {name} ({meaning}): it loses {cost:.3f} +- {interval:.3f} nats"
            found.append((text, cost > interval))
    return found


def main() -> None:
    """Run the command."""
    with interruptible("interrupted; nothing was written."):
        _run(parsed(Config, "python -m grip_env.probe"))


def _run(config: Config) -> None:
    check_agents_package()
    set_threads(config.threads)
    check_at_least(2, examples=config.examples)
    if not config.budgets or not all(0 < budget <= 1 for budget in config.budgets):
        given = " ".join(f"{budget:g}" for budget in config.budgets) or "nothing"
        raise CommandError(f"--budgets are shares of the visual tokens in (0, 1]; got {given}")
    check_out(config.out)

    from agents.pruner import load_agent

    vlm, task = load_model_and_task(config, config.task, config.data, splits=(config.split,), progress=config.progress)
    say_unfinished(config.run)
    try:
        agent = load_agent(vlm, config.vlm, config.run, config.algo or None)
        values = probe(vlm, task, agent, config.split, config.examples, config.budgets, progress=config.progress)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    count = len(values[HONEST][config.budgets[0]])
    print(f"{count} examples of the {config.split} split\n\n{table(values)}\n")
    checked = print_verdicts(verdicts(values))
    numbers = {
        "values": {
            name: {str(budget): column.tolist() for budget, column in row.items()} for name, row in values.items()
        },
        "verdicts": checked,
    }
    give_numbers(config, numbers, "probe.json")


if __name__ == "__main__":
    main()

"""Exact reward landscape of small instances: local optima, interactions and gaps.

``python -m grip_env.landscape`` scores every selection of up to k blocks of some images (see
:class:`grip_env.BlockVLM`) and reports how rugged the reward is and how far methods are from the optimum.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from grip_env.cli import (
    check_agents_package,
    check_at_least,
    interruptible,
    load_model_and_task,
    parsed,
    print_result,
    writing,
)
from grip_env.common.atomic_files import content_of, write_atomically
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.run_folder.config import ModelConfig
from grip_env.run_folder.folder import make_folder, versions

if TYPE_CHECKING:
    from agents.base import Selector
    from grip_env.exact.ruggedness import Terrain
    from grip_env.rewards.terms import Reward
    from grip_env.tasks.base import Task
    from grip_env.vlms.base import Encoded
    from grip_env.vlms.blocks import BlockVLM
    from grip_env.vlms.cache.tables import TableCache

__all__ = ["Config", "draw", "landscape", "main", "markdown", "survey"]

ORACLE_DRAWS = 64  # the oracle fills up its selections at random


@dataclass
class _Asked:
    """Options of this command alone."""

    k: tuple[int, ...] = (4,)
    """Numbers of blocks kept; all selections of 0 blocks up to the largest number are scored."""
    rows: int = 4
    """Number of rows of blocks that an image is divided into."""
    columns: int = 4
    """Number of columns of blocks."""
    examples: int = 24
    """Number of instances. With the embedded model, each takes about six seconds of one CPU core for k = 4, and three
    minutes for k = 8."""
    split: Literal["validation", "test", "train"] = "validation"
    """Split of the examples."""
    task: Literal["scenes", "scenes-hard"] = "scenes"
    """Name of the task."""
    data: Path | None = None
    """Your own images and questions instead of the task."""
    skip_bad: bool = False
    """Leave out faulty rows of the data, and list them."""
    reward: str = "log_likelihood"
    """Name of the reward."""
    table_cache: str = "auto"
    """Folder for scores kept between runs; "auto" is grip_env/tables in the user's cache folder, "none" keeps none."""
    seed: int = 0
    """Seed of the tokens that the oracle fills up its selections with."""
    out: Path = Path("runs/landscape")
    """Folder for landscape.md, landscape.json and landscape.png; files of an earlier run are replaced."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show a progress bar."""


@dataclass
class Config(ModelConfig, _Asked):  # fields of the last base come first
    """Score every selection of up to k image blocks and describe the reward landscape."""


# -- measured ------------------------------------------------------------------------------------------------------


def _selectors(vlm: BlockVLM, first: Encoded) -> dict[str, Selector]:
    """Return the baselines that work with the model and the task, except random."""
    from agents.heuristics import BASELINES

    chosen = {name: selector for name, selector in BASELINES.items() if name != "random"}  # computed from the table
    if first.relevance() is None:
        del chosen["oracle"]  # no ground truth
    try:
        vlm.attention(first)
    except NotImplementedError as error:
        print(f"left out of the comparison: {error}")
        del chosen["CLS attention"]
    return chosen


def survey(
    vlm: BlockVLM, task: Task, config: Config, reward: Reward, cache: TableCache | None, done: Callable[[int], object]
) -> list[Terrain]:
    """Explore every instance at every k.

    ``done`` is called with the number of selections scored since its last call.
    """
    import torch

    from grip_env.exact.reward_table import RewardTable
    from grip_env.exact.ruggedness import explore

    terrains: list[Terrain] = []
    selectors: dict[str, Selector] | None = None
    for index in range(min(config.examples, task.size(config.split))):
        encoded = vlm.encode([task.example(config.split, index)])
        selectors = _selectors(vlm, encoded) if selectors is None else selectors
        if int(encoded.token_mask.sum()) <= max(config.k):
            continue  # an image with too few blocks that hold tokens
        full = vlm.score(encoded, encoded.full_selection())
        tables = []
        for size in range(max(config.k) + 1):
            tables.append(RewardTable.enumerate(vlm, encoded, size, reward, full, cache))
            done(len(tables[-1]))
        for k in dict.fromkeys(config.k):
            selections = {}
            for name, selector in selectors.items():
                generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {index} {name} {k}".encode()))
                rows = encoded[[0] * (ORACLE_DRAWS if name == "oracle" else 1)]
                counts = torch.full((len(rows),), k, device=rows.tokens.device)
                selections[name] = selector(vlm, rows, counts, generator).cpu().numpy()
            terrains.append(explore(tables[: k + 1], index, encoded.examples[0].family, selections))
    return terrains


# -- shown ---------------------------------------------------------------------------------------------------------


def markdown(terrains: Sequence[Terrain], blocks: int) -> str:
    """Return two tables for each k: the landscape, and the methods' gaps to the optimum.

    Both are also split by question family if there are several.
    """
    return "\n\n".join(
        _tables([terrain for terrain in terrains if terrain.k == k], k, blocks)
        for k in dict.fromkeys(terrain.k for terrain in terrains)
    )


def _tables(terrains: Sequence[Terrain], k: int, blocks: int) -> str:
    families = dict.fromkeys(terrain.family for terrain in terrains)
    groups = {"all": list(terrains)}
    if len(families) > 1:
        groups |= {name: [terrain for terrain in terrains if terrain.family == name] for name in families}

    def mean(value: Callable[[Terrain], float], digits: int = 3) -> list[str]:
        means = (np.mean([value(terrain) for terrain in group]) for group in groups.values())
        return [f"{round(float(one), digits) + 0.0:.{digits}f}" for one in means]  # no "-0.000"

    rows = {
        "instances": [str(len(group)) for group in groups.values()],
        "local optima": mean(lambda t: t.local_optima, 2),
        "most of an instance": [str(max(t.local_optima for t in group)) for group in groups.values()],
        "share with more than one": mean(lambda t: t.local_optima > 1, 2),
        "gap of the worst of them": mean(lambda t: t.worst_optimum),
        "swap ascent ends in the optimum": mean(lambda t: t.methods["swap ascent"].optimal, 2),
        "submodularity violated": mean(lambda t: t.curvature.violations, 2),
        "by, where it is": mean(lambda t: t.curvature.violation_size),
        "interaction strength": mean(lambda t: t.curvature.interaction, 2),
        "blocks that lower the reward": mean(lambda t: t.curvature.decreasing, 2),
        "reward of the optimum": mean(lambda t: t.optimal_reward),
        "standard deviation of the reward": mean(lambda t: t.spread),
    }
    lines = [
        f"**Keeping {k} of {blocks} blocks** ({math.comb(blocks, k):,} selections each)",
        "",
        f"| landscape | {' | '.join(groups)} |",
        "|---|" + "--:|" * len(groups),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
        "",
        f"| method | percentile | finds optimum | gap, {' | gap, '.join(groups)} |",
        "|---|--:|--:|" + "--:|" * len(groups),
    ]
    for name in terrains[0].methods:
        place = np.mean([terrain.methods[name].percentile for terrain in terrains])
        optimal = np.mean([terrain.methods[name].optimal for terrain in terrains])
        gaps = mean(lambda terrain, name=name: terrain.methods[name].gap)  # type: ignore[misc]
        lines.append(f"| {name} | {place:.4f} | {optimal:.2f} | {' | '.join(gaps)} |")
    return "\n".join(lines)


def draw(terrains: Sequence[Terrain], blocks: int, path: Path) -> None:
    """Draw sorted rewards, numbers of local optima and methods' gaps for each k to ``path``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sizes = list(dict.fromkeys(terrain.k for terrain in terrains))
    families = list(dict.fromkeys(terrain.family for terrain in terrains))
    palette = ("#5c80bc", "#c79a3b", "#d1495b", "#2e7d5b", "#8e6c8a", "#4f9d9d", "#8d99ae", "#555555")
    colours = {family: palette[place % len(palette)] for place, family in enumerate(families)}
    figure = Figure(figsize=(14, 4.4 * len(sizes)), layout="constrained")
    for k, (curves, counts, gaps) in zip(sizes, figure.subplots(len(sizes), 3, squeeze=False), strict=True):
        here = [terrain for terrain in terrains if terrain.k == k]
        for terrain in here:
            below = terrain.rewards[-1] - terrain.rewards[::-1]
            share = np.arange(1, len(below) + 1) / len(below)
            curves.plot(share, below, color=colours[terrain.family], linewidth=1.3, alpha=0.8)
        curves.set_xscale("log")
        curves.invert_yaxis()
        curves.xaxis.set_major_formatter(lambda value, _: f"{value:.6%}".rstrip("%").rstrip("0").rstrip(".") + "%")
        curves.yaxis.set_major_formatter(lambda value, _: f"{-value:g}" if value else "0")
        curves.set_xlabel("selections, best first")
        curves.set_ylabel("reward minus that of the optimum")
        curves.set_title(f"{k} of {blocks} blocks: {len(here[0].rewards):,} selections of each instance", fontsize=11)

        most = max(terrain.local_optima for terrain in here)
        width = max(1, math.ceil(most / 24))
        counts.hist(
            [[terrain.local_optima for terrain in here if terrain.family == family] for family in families],
            bins=(np.arange(0, most + 2 * width, width) + 0.5).tolist(),
            stacked=True,
            color=[colours[family] for family in families],
            label=families,
            rwidth=0.8,
        )
        counts.set_title("Local optima: no swap of two blocks is better", fontsize=11)
        counts.set_xlabel("local optima of an instance")
        counts.set_ylabel("instances")
        counts.set_xlim(0.5, max(most, 4) + width - 0.5)
        for axis in (counts.xaxis, counts.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        counts.legend(frameon=False, fontsize=9, loc="upper right")

        names = list(here[0].methods)
        for row, name in enumerate(names):
            values = [terrain.methods[name].gap for terrain in here]
            shift = np.linspace(-0.25, 0.25, len(here)) if len(here) > 1 else [0.0]
            gaps.scatter(values, row + np.array(shift), s=16, c=[colours[t.family] for t in here], alpha=0.75)
            gaps.plot([np.mean(values)] * 2, [row - 0.38, row + 0.38], color="#222222", linewidth=2.2)
        gaps.set_xscale("symlog", linthresh=0.01)
        gaps.set_xlim(left=-0.001)
        gaps.set_yticks(range(len(names)), names)
        gaps.invert_yaxis()
        gaps.set_title("Gap to the optimum", fontsize=11)
        gaps.set_xlabel("a dot for each instance, a bar for the mean")
        for axes in (curves, counts, gaps):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, axis="x" if axes is gaps else "y")
            axes.set_axisbelow(True)
    write_atomically(path, content_of(lambda file: figure.savefig(file, dpi=130, format="png")))


# -- the command ---------------------------------------------------------------------------------------------------


def _check(config: Config) -> tuple[Reward, int]:
    """Return the reward and the number of selections per instance, or stop with an error."""
    from grip_env.exact.reward_table import count_subsets
    from grip_env.rewards.parsing import resolve_reward

    set_threads(config.threads)
    check_at_least(0, seed=config.seed)
    check_at_least(1, rows=config.rows, columns=config.columns, examples=config.examples)
    blocks = config.rows * config.columns
    if not config.k or min(config.k) < 2 or max(config.k) >= blocks:
        given = " ".join(map(str, config.k)) or "nothing"
        raise CommandError(f"--k must be numbers from 2 to {blocks - 1}, of {blocks} blocks; got {given}")
    try:
        return resolve_reward(config.reward), sum(count_subsets(blocks, size) for size in range(max(config.k) + 1))
    except ValueError as error:
        raise CommandError(str(error)) from None


def landscape(config: Config) -> list[Terrain]:
    """Explore the instances, print the tables, and write the tables and the picture.

    Raises:
        CommandError: If an option is wrong, or the model or the data cannot be read.
    """
    reward, subsets = _check(config)
    import torch
    from tqdm import tqdm

    from grip_env.tasks.files import DataError
    from grip_env.vlms.blocks import BlockVLM
    from grip_env.vlms.cache.tables import resolve_table_cache

    inside, task = load_model_and_task(
        config, config.task, config.data, config.skip_bad, (config.split,), config.progress
    )
    vlm = BlockVLM(inside, config.rows, config.columns)
    try:
        cache = resolve_table_cache(None if config.table_cache == "none" else config.table_cache, vlm)
    except ValueError as error:
        raise CommandError(str(error)) from None
    out = make_folder(config.out)
    examples = min(config.examples, task.size(config.split))
    started = time.perf_counter()
    try:
        with tqdm(total=examples * subsets, unit=" selections", disable=not config.progress, dynamic_ncols=True) as bar:
            terrains = survey(vlm, task, config, reward, cache, bar.update)
    except DataError as error:
        raise CommandError(str(error)) from None
    seconds = time.perf_counter() - started
    explored = len({terrain.index for terrain in terrains})
    if not explored:
        raise CommandError(f"no image has more than {max(config.k)} blocks that hold tokens: choose a smaller --k")
    blocks = config.rows * config.columns
    text = markdown(terrains, blocks)
    print(f"\n{explored} instances of the {config.split} split in {seconds:.0f} s, {vlm.name}\n\n{text}\n")
    if explored < examples:
        print(f"left out: {examples - explored} images with at most {max(config.k)} blocks that hold tokens")
    content = {
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "vlm": {"name": inside.name, "checksum": inside.checksum()},
        "instances": [terrain.plain() for terrain in terrains],
    }
    written = [out / f"landscape.{ending}" for ending in ("md", "json", "png")]
    with writing(*written):
        write_atomically(written[0], text + "\n")
        write_atomically(written[1], json.dumps(content, indent=2, default=str) + "\n")
        draw(terrains, blocks, written[2])
    for path in written:
        print(f"wrote {path}")
    print_result(content)
    return terrains


def main() -> None:
    """Run the command."""
    config = parsed(Config, "python -m grip_env.landscape")
    check_agents_package()
    said = "interrupted; the next run continues from the scores on disk."
    with interruptible("interrupted before there were any results." if config.table_cache == "none" else said):
        landscape(config)


if __name__ == "__main__":
    main()

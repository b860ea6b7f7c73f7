"""Pictures of a comparison: the budget curve, and the gallery of selections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grip_env.common.atomic_files import content_of, write_atomically
from grip_env.reports.comparison import AGENT, ALL_TOKENS, WARMUP, Comparison

if TYPE_CHECKING:
    from agents.base import Selector
    from grip_env.vlms.base import Encoded, FrozenVLM

__all__ = ["draw_curve", "draw_gallery"]


def draw_curve(comparison: Comparison, path: Path, main: str = AGENT) -> None:
    """Plot log-likelihood and accuracy over the budget, one line per method, into a file.

    Args:
        comparison: The results to plot.
        path: The PNG file.
        main: The method to highlight.
    """
    from matplotlib.figure import Figure

    many = len(comparison.cells) > 9  # too many for a legend among the curves
    figure = Figure(figsize=(13.5 if many else 11, 4.6), layout="constrained")
    colours = {main: "#d1495b", WARMUP: "#e8a0a9", "oracle": "#2e7d5b", ALL_TOKENS: "#555555"}
    palette = ("#b8bec7", "#8d99ae", "#5c80bc", "#c79a3b", "#8e6c8a", "#4f9d9d", "#7a9e5f", "#b0785a", "#3f5d7d")
    others = cycle(product("os^", palette))  # colours repeat with other markers
    markers: dict[str, str] = {}
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("log_likelihood", "accuracy"),
        ("answer log-likelihood (nats per token)", "accuracy"),
        strict=True,
    ):
        for method, row in comparison.cells.items():
            if method not in colours:
                markers[method], colours[method] = next(others)
            colour = colours[method]
            budgets = list(row)
            values = [row[budget][key] for budget in budgets]
            if method == ALL_TOKENS:
                axes.axhline(values[0], color=colour, linestyle=":", linewidth=1.3, label=method)
                continue
            first = method == main
            axes.plot(
                budgets,
                values,
                color=colour,
                marker=markers.get(method, "o"),
                markersize=5 if first else 3.5,
                linewidth=2.6 if first else 1.5,
                linestyle="--" if method in ("oracle", WARMUP) else "-",
                label="oracle (ground truth)" if method == "oracle" else method,
                zorder=3 if first else 2,
            )
        axes.set_xscale("log")
        axes.set_xticks(comparison.budgets, [f"{budget:.0%}" for budget in comparison.budgets])
        axes.minorticks_off()
        axes.set_xlabel("visual tokens kept")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if many:
        figure.legend(*figure.axes[1].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right upper")
    else:
        figure.axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle(f"{comparison.examples} held-out examples ({comparison.split} split)", fontsize=11)
    write_atomically(path, content_of(lambda file: figure.savefig(file, dpi=130, format="png")))


def draw_gallery(
    vlm: FrozenVLM,
    encoded: Encoded,
    selector: Selector,
    budgets: Sequence[float] = (0.03, 0.05, 0.1, 0.2),
    title: str = "What the agent keeps",
    seed: int = 0,
) -> np.ndarray:
    """Draw the tokens that ``selector`` keeps of each example (rows) at each budget (columns).

    Returns:
        The picture, uint8 (height, width, 3).
    """
    import torch

    from agents.base import budget_to_count
    from grip_env.envs.core.rendering import Panel, draw_selection, gallery

    generator = torch.Generator().manual_seed(seed)
    masks = [selector(vlm, encoded, budget_to_count(encoded, budget), generator) for budget in budgets]
    selection = torch.stack([encoded.token_mask, *masks], 1)
    answers = vlm.generate(encoded, selection, max_new_tokens=6)
    likelihood = vlm.score(encoded, selection).log_likelihood.exp()
    panels: list[list[Panel | np.ndarray | None]] = []
    for row, example in enumerate(encoded.examples):
        real = encoded.token_mask[row].cpu().numpy()
        centres = encoded.positions[row].cpu().numpy()[real]
        cells = None if encoded.cells is None else encoded.cells[row].cpu().numpy()[real]
        line: list[Panel | np.ndarray | None] = []
        for column in range(selection.shape[1]):
            kept = None if column == 0 else selection[row, column].cpu().numpy()[real]
            picture = draw_selection(example.image, centres, kept, size=288, cells=cells)
            given = answers[row][column]
            verdict = "right" if given == example.answer else f"wrong: {example.answer}"
            caption = f"{given or '(nothing)'} ({verdict}), p = {float(likelihood[row, column]):.2f}"
            line.append(Panel(picture, example.question if column == 0 else caption))
        panels.append(line)
    columns = ["the question", *(f"{budget:.0%} kept" for budget in budgets)]
    return gallery(panels, [example.family for example in encoded.examples], columns, title=title, size=288)

"""The tables of a comparison, in Markdown."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["AGENT", "ALL_TOKENS", "comparison_tables", "margin_table"]

AGENT = "this agent"
ALL_TOKENS = "all tokens"


class Measured(Protocol):
    """The part of a :class:`~grip_env.reports.comparison.Comparison` that the tables need."""

    split: str
    examples: int
    tokens: float
    cells: dict[str, dict[float, dict[str, Any]]]
    notes: list[str]
    training: dict[str, dict[str, float]]
    positions: dict[str, str]

    @property
    def budgets(self) -> list[float]:
        """All budgets of all methods."""
        ...

    def gap_closed(self, method: str, budget: float) -> float | None:
        """Return the share of the gap between random and oracle that ``method`` closes."""
        ...

    def margin(self, method: str, rival: str, budget: float) -> Any:
        """Return the gain of ``method`` over ``rival``."""
        ...


def comparison_tables(comparison: Measured) -> str:
    """Return all tables of a comparison except that of margins."""
    lines = [
        f"{comparison.examples} examples of the {comparison.split} split, {comparison.tokens:.0f} visual tokens each."
    ]
    for key, title in (
        ("log_likelihood", "Answer log-likelihood (nats per answer token)"),
        ("accuracy", "Accuracy (exact match)"),
    ):
        lines += ["", f"**{title}** by budget (tokens kept)", "", *_head(comparison)]
        lines += [_row(comparison, method, key) for method in comparison.cells]
    # the name of an unfinished agent has an addition
    agent = next((name for name in comparison.cells if name == AGENT or name.startswith(f"{AGENT} (")), None)
    if agent is not None and comparison.gap_closed(agent, comparison.budgets[0]) is not None:
        gaps = [comparison.gap_closed(agent, budget) for budget in comparison.budgets]
        shown = " | ".join("-" if gap is None else f"{gap:.0%}" for gap in gaps)
        lines += ["", f"Gap between random and oracle log-likelihood closed by {AGENT}:", "", *_head(comparison)]
        lines.append(f"| {agent} | {shown} |")
    lines += _positions(comparison) + _costs(comparison) + _training(comparison)
    return "\n".join(lines + [""] * bool(comparison.notes) + [f"Left out: {note}." for note in comparison.notes])


def margin_table(comparison: Measured, method: str) -> str:
    """Return a table of the gains of ``method`` over all others, with 95% intervals."""
    lines = [f"**What {method} gains** in answer log-likelihood, with 95% intervals over examples", ""]
    lines += _head(comparison, "gain on")
    for rival in comparison.cells:
        if rival in (method, ALL_TOKENS):
            continue
        shown = []
        for budget in comparison.budgets:
            if budget not in comparison.cells[rival]:
                shown.append("-")
                continue
            margin = comparison.margin(method, rival, budget)
            text = f"{margin.mean:+.3f} ± {margin.interval:.3f}"
            shown.append(f"**{text}**" if margin.clear else text)
        lines.append(f"| {rival} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", "Bold: clearly above 0."])


def _head(comparison: Measured, first: str = "method") -> list[str]:
    budgets = comparison.budgets
    shown = " | ".join(f"{100 * budget:.3g}% ({max(1, round(budget * comparison.tokens))})" for budget in budgets)
    return [f"| {first} | {shown} |", "|---|" + "--:|" * len(budgets)]


def _row(comparison: Measured, method: str, key: str) -> str:
    shown = []
    for budget in comparison.budgets:
        cell = comparison.cells[method].get(budget)
        spread = "" if cell is None or f"{key}_sd" not in cell else f" ({cell[f'{key}_sd']:.3f})"
        shown.append("-" if cell is None else f"{cell[key]:.3f}{spread}")
    return f"| {method} | {' | '.join(shown)} |"


def _positions(comparison: Measured) -> list[str]:
    """Return the line about the position ids of kept tokens under each method."""
    meanings = {"original": "as in the full sequence", "reindex": "renumbered without gaps"}
    rows = {name: policy for name, policy in comparison.positions.items() if name in comparison.cells}
    shown = []
    for policy in dict.fromkeys(rows.values()):
        names = [name for name, own in rows.items() if own == policy]
        who = "every method" if len(names) == len(comparison.cells) else ", ".join(names)
        shown.append(f"`{policy}` ({meanings.get(policy, policy)}): {who}")
    return ["", f"**Position ids** of the tokens that stay. {'; '.join(shown)}."] if shown else []


def _costs(comparison: Measured) -> list[str]:
    """Return the table of methods whose token numbers differ from the budget."""
    lines = []
    for method, row in comparison.cells.items():
        shown = []
        for budget in comparison.budgets:
            cell = row.get(budget, {})
            if "flops" in cell:
                shown.append(f"{cell['layer_average']:.1f}, {cell['tokens']:.1f}, {cell['flops']:.0%}")
            elif cell and method != ALL_TOKENS and abs(cell["tokens"] - budget * comparison.tokens) > 0.5:
                shown.append(f"{cell['tokens']:.1f}")
            else:
                shown.append("-")
        if any(text != "-" for text in shown):
            lines.append(f"| {method} | {' | '.join(shown)} |")
    title = "**Visual tokens** where they are not what the budget says: on average over the layers, at the end, and "
    title += "FLOPs of the language model as a share of those without pruning; or at the end alone"
    return ["", title, "", *_head(comparison), *lines] if lines else []


def _training(comparison: Measured) -> list[str]:
    """Return the table of training costs."""
    title = "**What training took**: seconds, on the machine it ran on, and forward passes of the language model"
    lines = ["", title, "", "| method | seconds | forwards |", "|---|--:|--:|"]
    for name, row in comparison.training.items():
        shown = (f"{row[key]:,.0f}" if key in row else "-" for key in ("seconds", "forwards"))
        lines.append(f"| {name} | {' | '.join(shown)} |")
    if not all(comparison.training.values()):
        lines += ["", "-: not known, as the training has not finished, or its log has no seconds and forwards."]
    return lines if comparison.training else []

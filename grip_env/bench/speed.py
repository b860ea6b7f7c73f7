"""Cost of the environments relative to the model: ``python -m grip_env.benchmark speed``.

All results are ratios of two kinds of work that alternate in one run, as absolute times depend on the machine. Each
round has its own order, because the work before a call makes it some percent slower or faster.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grip_env.bench.memory import peak_bytes
from grip_env.cli import (
    check_agents_package,
    check_at_least,
    check_out,
    give_numbers,
    interruptible,
    parsed,
    print_verdicts,
    writing,
)
from grip_env.common.atomic_files import content_of, write_atomically
from grip_env.common.devices import set_threads
from grip_env.common.errors import CommandError
from grip_env.common.output import progress_bar
from grip_env.tasks.subset import TaskSubset

if TYPE_CHECKING:
    import torch

    from grip_env.tasks.base import Task
    from grip_env.vlms.base import Encoded
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = ["Config", "Measured", "main", "masked_log_likelihood", "measure", "scaling"]

BUDGETS = (0.03, 0.1, 0.25, 0.5, 1.0)
SIDES = (48, 96, 144, 192)
"""Image sides in pixels of the untrained models of growing N: 36, 144, 324 and 576 visual tokens."""
SUBSETS = (144, 576, 2304)
REPEATS = 3
"""Repetitions per round of the two quick works with the tightest bar: a step of the vector environment and a call of
the bare model. Their time is the mean."""
IMAGES = 8
"""Default number of distinct images; environments encode all of them before the timing starts."""


@dataclass
class Config:
    """Time the vector environment against the bare model and single environments.

    Scoring by dropping tokens is also compared with masking them, and sampling subsets with a GRPO step.
    """

    num_envs: int = 64
    """Number of instances stepped together (B)."""
    budget: float = 0.1
    """Share of the visual tokens kept."""
    rounds: int = 24
    """Number of rounds, each with all kinds of work in its own order; the first is not counted. Ratios are medians."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""
    scaling: bool = True
    """Also measure how a step's time grows with N, k and B."""
    out: Path | None = None
    """Folder for speed.json, with all numbers, and, with --scaling, the plot speed.png."""


def masked_log_likelihood(vlm: HuggingFaceVLM, encoded: Encoded, selection: torch.Tensor) -> torch.Tensor:
    """Score selections on the whole sequence, with dropped tokens masked from attention.

    :meth:`~grip_env.vlms.base.FrozenVLM.log_likelihood`, which drops the tokens, is compared with this baseline.

    Args:
        vlm: A model whose tokens have one position each, such as the embedded one.
        encoded: B examples of equally long answers.
        selection: bool (B, N).

    Returns:
        float (B,).
    """
    import torch

    ids, lengths = encoded.input_ids, encoded.lengths
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    visual = (ids == vlm.family.image_token_id) & inside
    mask = inside.clone()
    mask[visual] = selection.flatten()
    column = torch.arange(1, ids.shape[1], device=ids.device)
    answer = (column >= (lengths - encoded.answer_lengths)[:, None]) & (column < lengths[:, None])
    first = int(answer.int().argmax(1).min())  # earlier positions predict no answer token
    values = []
    # as many tokens per call as in the model's own scoring, and logits only where they are read
    for rows in torch.arange(len(ids)).split(max(1, vlm.token_budget // ids.shape[1])):
        assert encoded.position_ids is not None
        with torch.no_grad():
            output = vlm.model(
                input_ids=ids[rows],
                attention_mask=mask[rows].long(),
                position_ids=encoded.position_ids[rows],
                use_cache=False,
                logits_to_keep=ids.shape[1] - first,
                mm_encoder_outputs={"image": vlm.family.outputs(encoded.tokens[rows].flatten(0, 1), None)},
            )
        targets = ids[rows, first + 1 :, None]
        chosen = output.logits[:, :-1].float().log_softmax(-1).gather(2, targets)[..., 0]
        wanted = answer[rows, first:]
        values.append((chosen * wanted).sum(1) / wanted.sum(1))
    return torch.cat(values)


@dataclass
class Measured:
    """Results of the measurement, and the bars that they must clear."""

    times: dict[str, list[float]]
    """Milliseconds of each kind of work, by name, one number per round."""
    counts: dict[str, float]
    """Numbers other than times: megabytes, largest differences."""

    def ratio(self, slow: str, fast: str) -> float:
        """Return the ratio of ``slow``'s time to that of ``fast``, the median over rounds."""
        return statistics.median(a / b for a, b in zip(self.times[slow], self.times[fast], strict=True))

    def bars(self) -> list[tuple[str, bool]]:
        """Return for each bar (statement with numbers, whether it holds)."""
        native, single = self.ratio("raw", "vector"), self.ratio("SyncVectorEnv", "vector")
        bare = self.ratio("raw, one by one", "raw")
        masked, subset = self.ratio("masked", "kept only"), self.ratio(f"k-subset N={SUBSETS[0]}", "GRPO step")
        return [
            (f"the vector environment has {native:.2f} of the bare model's throughput (>= 0.85)", native >= 0.85),
            (f"it is {single:.1f}x as fast as SyncVectorEnv (>= 8; the bare model gains {bare:.1f}x)", single >= 8),
            (f"scoring what is kept is {masked:.1f}x as fast as masking the rest (>= 4)", masked >= 4),
            (f"k-subset law at N={SUBSETS[0]}: {subset:.1%} of a GRPO step (< 15%)", subset < 0.15),
        ]

    def table(self) -> str:
        """Return medians as a Markdown table."""
        lines = ["| work | ms | spread |", "|---|--:|--:|"]
        for name, times in self.times.items():
            lines.append(f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} to {max(times):.1f} |")
        return "\n".join(lines)


def clock(work: Callable[[], object]) -> float:
    """Return the milliseconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def measure(config: Config) -> Measured:
    """Time every kind of work in each round, in an order determined by the round's number."""
    import gymnasium
    import torch
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    from agents.grpo import GRPO, GRPOConfig
    from agents.pool import ExamplePool
    from agents.scorer import Scorer, ScorerConfig
    from grip_env.envs.selection import TokenSelectionEnv
    from grip_env.tasks.scenes import SceneTask
    from grip_env.vlms import load_vlm

    vlm, scenes = load_vlm("tiny"), SceneTask()
    task = TaskSubset(scenes, "train", range(IMAGES))
    options: dict[str, Any] = {"vlm": vlm, "budget": config.budget}
    envs: Any = gymnasium.make_vec("GRIP/TokenSelection-v0", config.num_envs, task=task, **options)
    fresh: Any = gymnasium.make_vec("GRIP/TokenSelection-v0", config.num_envs, task=scenes, **options)
    sync = SyncVectorEnv(
        [lambda: TokenSelectionEnv(task=task, **options)] * config.num_envs, autoreset_mode=AutoresetMode.SAME_STEP
    )
    encoded = vlm.encode([task.example("train", index) for index in range(IMAGES)])
    generator = torch.Generator().manual_seed(0)
    for each in (envs, sync):
        for index in range(IMAGES):
            each.reset(seed=0, options={"index": index})
        each.reset(seed=0)
    fresh.reset(seed=0)
    pool = ExamplePool(vlm, scenes, size=96)
    grpo = GRPO(vlm, pool, Scorer(ScorerConfig(vlm.width)), GRPOConfig(steps=config.rounds, warmup_steps=0, pool=96))
    updates = grpo.train()
    times: dict[str, list[float]] = {}
    counts: dict[str, float] = {}
    infos = envs.reset(seed=0)[1]
    k = int(infos["k"][0])
    for turn in progress_bar(range(config.rounds), "rounds"):
        selection = _subsets(config.num_envs, encoded.tokens.shape[1], k, generator)
        action = selection.numpy().astype(np.int8)
        batch = encoded[torch.as_tensor(infos["index"])]
        rows = [(batch[[row]], selection[[row], None]) for row in range(len(batch))]
        stepped: list[Any] = []
        works: dict[str, Callable[[], object]] = {
            "raw": lambda: vlm.log_likelihood(batch, selection[:, None]),  # noqa: B023 (called in this round)
            "raw, one by one": lambda: [vlm.log_likelihood(*row) for row in rows],  # noqa: B023
            "vector": lambda: stepped.append(envs.step(action)),  # noqa: B023
            "vector, images all new": lambda: fresh.step(action),  # noqa: B023
            "SyncVectorEnv": lambda: sync.step(action),  # noqa: B023
            "kept only": lambda: vlm.log_likelihood(batch, selection[:, None]),  # noqa: B023
            "masked": lambda: masked_log_likelihood(vlm, batch, selection),  # noqa: B023
            "observations": lambda: [envs.rules.observe(episode) for episode in envs._episodes],
            **{f"k-subset N={count}": _subset_work(count, generator) for count in SUBSETS},
            "GRPO step": lambda: next(updates),
        }
        turns = [*works, *("raw", "vector") * (REPEATS - 1)]
        spent = dict.fromkeys(works, 0.0)
        for name in random.Random(turn).sample(turns, len(turns)):
            spent[name] += clock(works[name]) / turns.count(name)
        rewards, infos = stepped[0][1], stepped[-1][4]
        if turn:
            for name, value in spent.items():
                times.setdefault(name, []).append(value)
        exact = vlm.log_likelihood(batch, selection[:, None])[:, 0]
        full = vlm.log_likelihood(batch, batch.full_selection())[:, 0]
        for name, gap in (
            ("reward against raw", np.abs(rewards - (exact - full).numpy()).max()),
            ("masked against kept only", float((exact - masked_log_likelihood(vlm, batch, selection)).abs().max())),
        ):
            counts[name] = max(counts.get(name, 0.0), float(gap))
    counts["peak MB of a step"] = peak_bytes(lambda: envs.step(action)) / 1e6
    counts |= _held(vlm, task)
    return Measured(times, counts)


def _subsets(rows: int, count: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Return random subsets of ``k`` of ``count`` tokens, bool (rows, count)."""
    import torch

    return torch.rand(rows, count, generator=generator).argsort(1).argsort(1) < k


def _subset_work(count: int, generator: torch.Generator) -> Callable[[], None]:
    """Return the k-subset law's work in a GRPO step of 32 x 16 subsets.

    The work is drawing, log-probability and gradient.
    """
    import torch

    from agents.subset import KSubset

    theta = torch.randn(32, count, generator=generator).requires_grad_()
    low, high = np.log([0.03, 0.5])
    budgets = (low + (high - low) * (torch.arange(32) + 0.5) / 32).exp()
    counts = (budgets * count).round().long()

    def work() -> None:
        law = KSubset(theta, counts, validate_args=False)
        law.log_prob(law.sample((16,), generator=generator)).mean().backward()

    return work


def _held(vlm: HuggingFaceVLM, task: Task) -> dict[str, float]:
    """Return the MB of encoded instances that an environment holds as episodes go on.

    It is measured after 16 and after 400 episodes of 8 images.
    """
    from grip_env.envs.selection import TokenSelectionVectorEnv

    envs = TokenSelectionVectorEnv(8, vlm=vlm, task=TaskSubset(task, "train", range(8)))
    envs.reset(seed=0)
    held = {}
    for episodes in (16, 400):
        for _ in range(episodes // 8):
            envs.step(envs.action_space.sample())
        tensors = [vars(instance.encoded).values() for instance in envs.rules.store.instances()]
        size = sum(value.nbytes for row in tensors for value in row if hasattr(value, "nbytes"))
        held[f"MB held after {episodes} episodes of 8 images"] = size / 1e6
    return held


def scaling(config: Config) -> dict[str, dict[float, float]]:
    """Return median milliseconds of a vector environment's step as N, k or B grows."""
    import gymnasium
    import torch

    from grip_env.pretraining.embedded_models import PATCH, build_model, build_processor
    from grip_env.tasks.scenes import SceneTask
    from grip_env.vlms import load_vlm
    from grip_env.vlms.huggingface import HuggingFaceVLM

    def step(vlm: Any, count: int, budget: float) -> float:
        task = TaskSubset(SceneTask(), "train", range(IMAGES))
        envs: Any = gymnasium.make_vec("GRIP/TokenSelection-v0", count, vlm=vlm, task=task, budget=budget)
        for index in range(IMAGES):
            infos = envs.reset(seed=0, options={"index": index})[1]
        k = int(infos["k"][0])
        action = _subsets(count, envs.rules.max_tokens, k, torch.Generator().manual_seed(0)).numpy().astype(np.int8)
        times = [clock(lambda: envs.step(action)) for _ in range(1 + max(3, config.rounds // 2))]
        return statistics.median(times[1:])

    found: dict[str, dict[float, float]] = {"N": {}, "k": {}, "B": {}}
    for pixels in SIDES:
        processor = build_processor(pixels=pixels)
        model = HuggingFaceVLM(build_model(processor.tokenizer, pixels=pixels), processor)
        found["N"][(pixels // PATCH) ** 2] = step(model, config.num_envs, config.budget)
    vlm = load_vlm("tiny")
    for budget in BUDGETS:
        found["k"][round(budget * 144)] = step(vlm, config.num_envs, budget)
    for count in (1, 4, 16, 64):
        found["B"][count] = step(vlm, count, config.budget)
    return found


def draw_scaling(found: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Plot a step's time over N, k and B to ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    names = {"N": "visual tokens (N)", "k": "visual tokens kept (k of 144)", "B": "instances (B)"}
    for axes, (key, row) in zip(figure.subplots(1, 3), found.items(), strict=True):
        axes.plot(list(row), list(row.values()), color="#d1495b", marker="o", linewidth=2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(row), [f"{value:g}" for value in row])
        axes.minorticks_off()
        axes.set_xlabel(names[key])
        axes.set_ylim(0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("a step of the vector environment, ms")
    write_atomically(path, content_of(lambda file: figure.savefig(file, dpi=130, format="png")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    with interruptible("interrupted; nothing was written."):
        _run(parsed(Config, "python -m grip_env.benchmark speed", arguments))


def _run(config: Config) -> None:
    check_agents_package()
    set_threads(config.threads)
    check_at_least(1, num_envs=config.num_envs)
    check_at_least(2, rounds=config.rounds)
    if not 0 < config.budget <= 1:
        raise CommandError(f"--budget is a share of the visual tokens in (0, 1]; got {config.budget:g}")
    check_out(config.out)
    import torch

    found = measure(config)
    counted = config.rounds - 1
    print(f"{config.num_envs} instances, {torch.get_num_threads()} threads, medians over {counted} rounds\n")
    print(found.table() + "\n")
    for name, value in found.counts.items():
        print(f"{name}: {value:.2g}")
    shares = statistics.median(
        own / whole for own, whole in zip(found.times["observations"], found.times["vector"], strict=True)
    )
    print(f"assembling observations once: {shares:.1%} of a step\n")
    grown = scaling(config) if config.scaling else {}
    for key, row in grown.items():
        print(f"ms per step over {key}: " + ", ".join(f"{value:g}: {ms:.1f}" for value, ms in row.items()))
    checked = print_verdicts(found.bars())
    numbers = {
        "threads": torch.get_num_threads(),
        **asdict(found),
        "scaling": grown,
        "bars": checked,
    }
    give_numbers(config, numbers, "speed.json")
    if config.out is not None and grown:
        picture = config.out / "speed.png"
        with writing(picture):
            draw_scaling(grown, picture)
        print(f"wrote {picture}")

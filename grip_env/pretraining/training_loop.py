"""A training loop that can be interrupted at any time and resumes from its last checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

__all__ = ["run_stage"]


def _save(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write modules and optimizer state at ``step`` atomically.

    A crash while writing leaves the previous file intact.
    """
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in state.items()})
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}  # tied weights: one copy each
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"step": json.dumps(step)})
    os.replace(part, path)


def _load(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Load a file written by :func:`_save` and return its step."""
    from safetensors import safe_open

    tensors = load_file(path)
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict({key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)})
    saved = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, field = key.split("/")
            saved["state"].setdefault(int(index), {})[field] = value
    optimizer.load_state_dict(saved)
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["step"]))


def run_stage(
    name: str,
    steps: int,
    loss_of_step: Callable[[int], dict[str, torch.Tensor]],
    modules: dict[str, nn.Module],
    folder: Path,
    learning_rate: float,
    save_every: int = 100,
    probe: Callable[[int], str] | None = None,
    probe_every: int = 200,
) -> None:
    """Train every parameter of ``modules`` that requires a gradient, with a progress bar.

    Args:
        name: Name of the checkpoint and the progress bar.
        steps: Number of optimizer steps; a finished stage is loaded, not run again.
        loss_of_step: Function that returns a dict with "loss", and numbers to show, for a step. All its randomness must
            be seeded by the step, so that a resumed run sees the same batches.
        modules: Modules to train and to save.
        folder: Folder of ``{name}.safetensors``.
        learning_rate: Peak learning rate of AdamW, with 50 steps of warm-up and cosine decay to 2%.
        save_every: Number of steps between checkpoints.
        probe: Function called every ``probe_every`` steps; its text is printed above the bar and added to
            ``{name}.log``.
        probe_every: Number of steps between probes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    weights = list({id(p): p for module in modules.values() for p in module.parameters() if p.requires_grad}.values())
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    done = _load(path, modules, optimizer) if path.exists() else 0
    with tqdm(range(done, steps), desc=name, initial=done, total=steps, unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            decay = 0.51 + 0.49 * math.cos(math.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * decay
            values = loss_of_step(step)
            optimizer.zero_grad()
            values["loss"].backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix({key: f"{value.item():.3f}" for key, value in values.items()})
            if (step + 1) % save_every == 0 or step + 1 == steps:
                _save(path, modules, optimizer, step + 1)
            if probe is not None and ((step + 1) % probe_every == 0 or step + 1 == steps):
                line = f"step {step + 1}: {probe(step)}"
                bar.write(line)
                with (folder / f"{name}.log").open("a") as log:
                    log.write(line + "\n")

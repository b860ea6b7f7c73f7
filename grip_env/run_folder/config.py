"""The configuration of a run: its options, and the checked reading of ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from grip_env.common.json_types import check_keys, check_types

__all__ = ["Config", "ModelConfig", "TrainOptions", "consent_needed", "read_run_config"]


@dataclass
class ModelConfig:
    """Options of the frozen vision-language model."""

    vlm: str = "tiny"
    """The frozen vision-language model: "tiny" (embedded), or the folder of a saved model."""
    device: str = "auto"
    """Device of the model: "cpu", "cuda", "cuda:1", "mps", ...; "auto" takes a CUDA device if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's weights."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of the model's attention."""
    position_policy: Literal["original", "reindex"] = "original"
    """Position ids of the kept tokens: as in the full sequence ("original"), or renumbered without gaps ("reindex")."""
    cache: Path | None = None
    """Folder that keeps encoded images between runs; several runs may share it."""
    cache_gib: float = 4.0
    """Largest size of the cache folder, in GiB; beyond it, the least recently used images are deleted."""


@dataclass
class TrainOptions:
    """Options of the command ``train`` alone."""

    algo: str = "grpo"
    """The algorithm: grpo, rloo, reinforce, imitation, gumbel-top-k, sigmoid-gates, soft-top-k, ppo, a2c,
    maskable-ppo, or a user-defined class as "package.module:Class"."""
    task: Literal["scenes", "scenes-hard"] = "scenes"
    """The task that provides images and questions; for scenes-hard, train a model with pretrain_vlm --size small."""
    data: Path | None = None
    """Your own images and questions instead of a task: a .jsonl or .json file, or the folder of a saved dataset."""
    skip_bad: bool = False
    """Leave out and list rows of --data with faults, instead of stopping."""
    reward: str = "log_likelihood"
    """The reward of a selection: log_likelihood, probability, exact_match, agreement (with all tokens kept; needs no
    labels), a sum such as "agreement + 0.5 * exact_match", or a user-defined one as "package.module:object"."""
    seed: int = 0
    """Random seed of weights, examples, budgets and subsets."""
    name: str = ""
    """Name of the run; if empty, it is made from algorithm, task or data, seed and time."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    examples: int = 480
    """Number of test examples in the final report; 0 skips the report."""
    picture_every: int = 100
    """Number of steps between checkpoints, and between galleries in TensorBoard."""
    checkpoint_minutes: float = 2.0
    """Largest time between checkpoints, in minutes."""
    resume: Path | None = None
    """Folder of a run to continue where it was stopped; it needs no other option. More steps may be given, with which
    the learning rate follows the longer schedule from there on."""
    threads: int = 0
    """Number of CPU threads; 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show progress bars."""
    options: Annotated[Any, tyro.conf.Suppress] = None
    """Hyperparameters of the algorithm, an instance of its class ``Options``; its defaults if ``None``. On the command
    line they are prefixed with the algorithm's name, as in --grpo.steps."""


@dataclass
class Config(ModelConfig, TrainOptions):  # fields of the last base come first
    """Train an agent to select visual tokens, and compare it with baselines on held-out data."""


def options_name(algo: str) -> str:
    """Return the name of an algorithm's hyperparameters in files and on the command line."""
    return "agent" if ":" in algo else algo.replace("-", "_")


def read_run_config(folder: Path, options_of: Callable[[str], Any]) -> dict[str, Any]:
    """Read ``config.json`` from the folder of a run, and check the types of its values.

    So that runs of other versions can be read, keys that are not needed to load the agent may be missing, and there may
    be additional ones. No code named in the file is imported.

    Args:
        folder: The folder of the run.
        options_of: Returns the dataclass of an algorithm's options by its name, or ``None`` to skip their check;
            :func:`agents.training.options.options_of` covers the algorithms of the package.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not as train writes it; the message names the file and the key.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a run: expected a folder with config.json, as grip_env.train writes it"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        check_keys(saved, {"config": dict, "vlm": dict}, "")
        config = saved["config"]
        check_keys(config, {"vlm": str, "task": str, "algo": str}, "config.")
        check_types(config, Config, "config.")
        check_keys(saved["vlm"], {"checksum": str}, "vlm.")
        if config.get("data") is not None:
            check_keys(config, {"skip_bad": bool}, "config.")
            check_keys(saved, {"data": dict}, "")
            check_keys(saved["data"], {"fingerprint": str}, "data.")
        if "algorithm" in saved:  # the folder of a user-defined class
            check_keys(saved, {"algorithm": dict}, "")
            check_keys(saved["algorithm"], {"folder": str}, "algorithm.")
        key = options_name(config["algo"])
        if key in config:
            check_keys(config, {key: dict}, "config.")
        check_types(config.get(key, {}), options_of(config["algo"]), f"config.{key}.")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        reason = "its brackets nest too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ValueError(f"{path} is not as grip_env.train wrote it ({reason}): train again, or copy it anew") from None
    return saved


def consent_needed(folder: Path, saved: Mapping[str, Any]) -> str:
    """Return the beginning of the refusal to load an agent that needs user-defined code."""
    place = saved.get("algorithm", {}).get("folder")
    lay = "" if place is None else f" (in {place} when it was trained)"
    return f"the agent in {folder} needs the code of {saved['config']['algo']}{lay}, which would be run"

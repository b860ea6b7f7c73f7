"""The configuration of a run: its options, and ``config.json`` read as a file that anybody may have written."""

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
    """Which frozen vision-language model is used, and how."""

    vlm: str = "tiny"
    """The frozen vision-language model: "tiny" is embedded, anything else is a folder with a saved model."""
    device: str = "auto"
    """Where it runs: "cpu", "cuda", "cuda:1", "mps", ...; auto takes a CUDA device if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of its weights."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Its implementation of attention."""
    position_policy: Literal["original", "reindex"] = "original"
    """Whether kept tokens keep their places in the full sequence, or are counted anew."""
    cache: Path | None = None
    """Folder where encoded images are kept between runs; several runs may share it."""
    cache_gib: float = 4.0
    """Size of that folder, in GiB, above which the least recently used images are deleted."""


@dataclass
class TrainOptions:
    """What this command alone asks."""

    algo: str = "grpo"
    """The algorithm: grpo, rloo, reinforce, imitation, gumbel-top-k, sigmoid-gates, soft-top-k, ppo, a2c,
    maskable-ppo, or your own class, as "package.module:Class"."""
    task: Literal["scenes"] = "scenes"
    """Where images and questions come from."""
    data: Path | None = None
    """Your own images and questions instead of the task: a .jsonl or .json file, or a saved dataset's folder."""
    skip_bad: bool = False
    """Leave out rows of --data with faults, and list them, instead of stopping."""
    reward: str = "log_likelihood"
    """What a selection is worth: log_likelihood, probability, exact_match, agreement (with all tokens kept; needs no
    labels), a sum such as "agreement + 0.5 * exact_match", or your own as "package.module:object"."""
    seed: int = 0
    """Decides weights, examples, budgets and subsets."""
    name: str = ""
    """Name of the run; made from algorithm, task or data, seed and time when empty."""
    runs: Path = Path("runs")
    """Where runs are kept."""
    examples: int = 480
    """Test examples the final report is measured on; 0 skips the report."""
    picture_every: int = 100
    """Steps between galleries in TensorBoard and checkpoints."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show progress bars."""
    options: Annotated[Any, tyro.conf.Suppress] = None
    """Hyperparameters of the algorithm, of its class ``Options``; its defaults if ``None``. On the command line they
    have the algorithm's name, as in --grpo.steps."""


@dataclass
class Config(ModelConfig, TrainOptions):  # fields of the last base come first
    """Train an agent to choose visual tokens, and compare it with the baselines on held-out examples."""


def options_name(algo: str) -> str:
    """Return under what name an algorithm's hyperparameters are saved, and given on the command line."""
    return "agent" if ":" in algo else algo.replace("-", "_")


def read_run_config(folder: Path, options_of: Callable[[str], Any]) -> dict[str, Any]:
    """Return what ``config.json`` in the folder of a run says, all of which has the types that train writes.

    Keys may be missing where they are not needed to load the agent, and there may be others, so that runs of other
    versions can be read. No code that the file names is imported.

    Args:
        folder: Of the run.
        options_of: Returns the dataclass of an algorithm's options, by its name, or ``None`` where they are not to be
            looked at; :func:`agents.training.options.options_of` knows those that come with the package.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not as train writes it; the message names file and key.
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
        if "algorithm" in saved:  # where the file of a class of the user's own lay
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
    """Return the beginning of a refusal to load the agent of a run whose class is in no package that is known."""
    place = saved.get("algorithm", {}).get("folder")
    lay = "" if place is None else f" (in {place} when it was trained)"
    return f"the agent in {folder} needs the code of {saved['config']['algo']}{lay}, which would be run"

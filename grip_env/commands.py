"""What the commands share: checks before the work starts, and the folder a run writes to."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from grip_env.tasks.base import Task
    from grip_env.tasks.files import FileTask
    from grip_env.vlms.huggingface import HuggingFaceVLM

__all__ = [
    "CommandError",
    "ModelConfig",
    "RunFolder",
    "check_agents_package",
    "check_at_least",
    "check_out",
    "importable_from_here",
    "interruptible",
    "load_model",
    "load_model_and_task",
    "make_folder",
    "print_verdicts",
    "versions",
]


class CommandError(SystemExit):
    """Ends a command with a message on standard error and exit code 2, the shell's code for wrong usage."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2
        print(f"error: {message}", file=sys.stderr)


def check_agents_package() -> None:
    """Stop with advice when the importable package ``agents`` is not the one that came with grip_env.

    Other distributions (openai-agents is one) install a package of that name over ours.
    """
    ours = Path(__file__).parent.parent / "agents"
    spec = importlib.util.find_spec("agents")
    found = Path(spec.origin) if spec is not None and spec.origin else None
    if found is not None and found.is_file() and 'DISTRIBUTION = "grip-env"' in found.read_text(encoding="utf-8"):
        return
    if found is None:
        raise CommandError(
            f"the package 'agents' that belongs to grip_env is missing (expected in {ours}): reinstall grip-env"
        )
    owners = sorted(set(metadata.packages_distributions().get("agents", [])) - {"grip-env"})
    owner = f" of the distribution {' and '.join(owners)}" if owners else ""
    remedy = f"pip uninstall {' '.join(owners)}" if owners else f"move {found.parent} away"
    raise CommandError(
        f"the package 'agents' at {found.parent}{owner} shadows the one of grip_env. "
        f"Use an environment of its own for grip-env, or `{remedy}` and reinstall grip-env."
    )


def check_at_least(least: int, **options: int) -> None:
    """Stop with one line unless each option, given by its field's name, is at least ``least``."""
    for name, value in options.items():
        if value < least:
            raise CommandError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")


def check_out(path: Path | None) -> None:
    """Stop with one line unless a file can be written to ``--out``, if that was given."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise CommandError(f"cannot write --out {path}: give a file in a folder that exists")


def print_verdicts(checked: Sequence[tuple[str, bool]]) -> None:
    """Print a line for each statement, and whether it holds."""
    for text, holds in checked:
        print(("holds   " if holds else "MISSED  ") + text)


@contextlib.contextmanager
def importable_from_here() -> Iterator[None]:
    """Let modules in the current folder be imported, last of all: where a user's own class is likely to lie."""
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


@contextlib.contextmanager
def interruptible(said: str) -> Iterator[None]:
    """End a command that Ctrl-C interrupts with the shell's code for it, after saying where that leaves the user.

    One whose output nobody reads any more, as before ``| head``, ends as quietly as other programs do.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print(f"\n{said}")
        raise SystemExit(130) from None


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


def load_model(config: ModelConfig) -> HuggingFaceVLM:
    """Return the frozen model, or stop and say what is wrong."""
    import torch

    from grip_env.vlms import load_vlm
    from grip_env.vlms.cache import PictureCache

    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(automatic if config.device == "auto" else config.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        reason = "there is no such device" if reason.startswith("Expected one of") else reason
        raise CommandError(f"cannot use --device {config.device!r} ({reason}): choose cpu, or leave it out") from None
    if config.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise CommandError(
            "--attn-implementation flash_attention_2 needs the package flash-attn: install it, or use sdpa"
        )
    if not 0 < config.cache_gib <= 2**20:
        raise CommandError(
            f"--cache-gib must be above 0 and at most 1,048,576; got {config.cache_gib:g}: leave out --cache for none"
        )
    try:
        cache = None if config.cache is None else PictureCache(config.cache, int(config.cache_gib * 2**30))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot use --cache {config.cache}: {error}") from None
    try:
        return load_vlm(
            config.vlm,
            dtype=getattr(torch, config.dtype),
            device=device,
            attn_implementation=config.attn_implementation,
            position_policy=config.position_policy,
            cache=cache,
        )
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot load the vision-language model {config.vlm!r}: {error}") from None


def load_model_and_task(
    model: ModelConfig,
    task: str,
    data: Path | None = None,
    skip_bad: bool = False,
    splits: Sequence[str] = (),
    progress: bool = True,
) -> tuple[HuggingFaceVLM, Task]:
    """Return the frozen model and the task of these names, or stop and say what is wrong.

    Args:
        model: Which model.
        task: Name of the task, of no meaning with ``data``.
        data: The user's own data. They are checked before the model is loaded.
        skip_bad: Leave out rows with faults, and say so on standard error.
        splits: Splits that must have examples.
        progress: Show progress bars.
    """
    from grip_env.tasks import load_task
    from grip_env.tasks.files import FileTask

    try:
        source = load_task(task) if data is None else FileTask(data, skip_bad, progress=progress)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if isinstance(source, FileTask):
        _say_skipped(source)
        _check_splits(source, splits)
    vlm = load_model(model)
    if isinstance(source, FileTask):
        said = len(source.skipped)
        try:
            source.check_texts(vlm.family.check_text, skip_bad)
        except ValueError as error:
            raise CommandError(str(error)) from None
        _say_skipped(source, said)
        _check_splits(source, splits)
    return vlm, source


def _say_skipped(task: FileTask, said: int = 0) -> None:
    from grip_env.tasks.files import summary

    faults = task.skipped[said:]
    rows = len({fault.place for fault in faults})
    if rows:
        print(f"skipped {rows} row{'s' * (rows > 1)} of {task.path}:\n{summary(faults)}", file=sys.stderr)


def _check_splits(task: FileTask, splits: Sequence[str]) -> None:
    for split in splits:
        if not task.size(split):
            raise CommandError(
                f"the {split} split has no examples: {task.describe()}. The contents of an image decide its split: "
                f'add images, or choose for each row, with the key "split"'
                + (", or pass --report-examples 0" if split == "test" and "train" in splits else "")
            )


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    names = ("grip-env", "torch", "transformers", "gymnasium", "numpy", "pillow", "tokenizers", "safetensors")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def make_folder(path: Path) -> Path:
    """Create a folder if it is not there, or stop with one line; returns it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write to {path}: {error.strerror or error}; choose another folder") from None
    return path


class RunFolder:
    """Where one run keeps its configuration, metrics, checkpoints and report.

    Args:
        path: The folder; it must not hold another run.

    Raises:
        CommandError: If it does.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CommandError(f"{path} already exists: choose another --name, or remove it")
        self.path = make_folder(path)

    def write_config(self, config: Mapping[str, Any], **more: Any) -> None:
        """Write ``config.json``: the full configuration, the command line, versions, and anything else given."""
        import torch

        content = {
            "config": config,
            "command": [Path(sys.executable).name, *sys.argv],
            "versions": versions(),
            "threads": torch.get_num_threads(),
            **more,
        }
        (self.path / "config.json").write_text(json.dumps(content, indent=2, default=str) + "\n")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Append a row to ``{phase}.csv``; a phase always logs the same values."""
        path = self.path / f"{phase}.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.6g}" for value in values.values())])

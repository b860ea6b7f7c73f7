"""Shared parts of the commands: option parsing, early checks, loading, and exit behaviour."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import tyro

from grip_env.common import stopping
from grip_env.common.arguments import check_paths, plain_arguments, shortened
from grip_env.common.atomic_files import write_atomically
from grip_env.common.devices import find_device
from grip_env.common.errors import CommandError
from grip_env.common.output import choose_output, end_output, print_result, quieten, say
from grip_env.common.plugins import importable_from_here
from grip_env.run_folder.config import ModelConfig
from grip_env.run_folder.folder import make_folder, versions
from grip_env.run_folder.status import unfinished

if TYPE_CHECKING:
    from agents.agent import Agent
    from grip_env.tasks.base import Task
    from grip_env.tasks.files import FileTask
    from grip_env.vlms.huggingface import HuggingFaceVLM


__all__ = [
    "check_agents_package",
    "check_at_least",
    "check_name",
    "check_out",
    "give_numbers",
    "interruptible",
    "load_model",
    "load_model_and_task",
    "note_written",
    "parsed",
    "print_result",
    "print_verdicts",
    "quieten",
    "say",
    "say_unfinished",
    "writing",
]


def check_agents_package() -> None:
    """Stop with advice if another package or module ``agents`` hides that of grip_env.

    A user's file ``agents.py`` or folder ``agents`` may come first on Python's search path, and other distributions
    (such as openai-agents) install a package of the same name over ours.
    """
    ours = Path(__file__).parent.parent / "agents"
    spec = importlib.util.find_spec("agents")
    found = Path(spec.origin) if spec is not None and spec.origin else None
    if found is None or not found.is_file():
        raise CommandError(
            f"the package 'agents' that belongs to grip_env is missing (expected in {ours}): reinstall grip-env"
        )
    if b'DISTRIBUTION = "grip-env"' in found.read_bytes():
        return
    theirs = found.parent if found.stem == "__init__" else found
    owners = sorted(set(metadata.packages_distributions().get("agents", [])) - {"grip-env"})
    installed = [owner for owner in owners if _belongs(theirs, owner)]
    what = "package" if theirs.is_dir() else "module"
    said = f"the {what} 'agents' at {theirs}"
    if installed:
        raise CommandError(
            f"{said} of the distribution {' and '.join(installed)} shadows the package of grip_env. Use a separate "
            f"environment for grip-env, or `pip uninstall {' '.join(installed)}` and reinstall grip-env."
        )
    remedy = f"rename {theirs}"
    if theirs.parent.resolve() == Path.cwd():
        remedy = f"start the command in another folder, or {remedy}"
    elif theirs.parent.resolve() in [
        Path(part).resolve() for part in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    ]:
        remedy = f"take {theirs.parent} out of PYTHONPATH, or {remedy}"
    raise CommandError(f"{said} shadows the package of grip_env: {remedy}")


def _belongs(path: Path, distribution: str) -> bool:
    """Return whether a distribution installed ``path``, a module or a package."""
    try:
        files = metadata.files(distribution)
    except metadata.PackageNotFoundError:
        return False
    listed = {Path(str(file.locate())).resolve() for file in files or ()}
    if not listed:  # no list of files: decide by its location
        return path.parent.resolve() == Path(str(metadata.distribution(distribution).locate_file(""))).resolve()
    return any(path.resolve() in (file, *file.parents) for file in listed)


_T = TypeVar("_T")

EVERYWHERE = (
    "Every command also takes --quiet (print only errors), --json (print the result as one JSON object, and everything "
    "else on standard error) and --version."
)


def parsed(
    config: type[_T],
    prog: str,
    arguments: Sequence[str] | None = None,
    lists: Sequence[str] = (),
    description: str | None = None,
    default: _T | None = None,
) -> _T:
    """Parse the command-line arguments of a command.

    ``--version`` prints the versions that results depend on. ``--quiet`` and ``--json`` decide what is printed, see
    :func:`~grip_env.common.output.choose_output`. A boolean option may be followed by its value, as in
    ``--progress false``. The values of an option that takes several are separated by spaces or commas.

    Args:
        config: A dataclass with a docstring, whose fields become options.
        prog: Name of the command.
        arguments: Arguments to parse; by default, the command line's.
        lists: Names of text options whose comma-separated values may be separated by spaces as well.
        description: Beginning of the help; by default, the dataclass's docstring.
        default: Values of the options that are not given; by default, the dataclass's own.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if "--version" in given:
        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise SystemExit(0)
    quiet, as_json = "--quiet" in given, "--json" in given
    given = [argument for argument in given if argument not in ("--quiet", "--json")]
    said = f"{inspect.cleandoc(description or config.__doc__ or '')}\n\n{EVERYWHERE}"
    plain = plain_arguments(given, config, lists)
    found: Any = tyro.cli(config, description=said, prog=prog, args=plain, default=default)
    if quiet and hasattr(found, "progress"):
        found.progress = False
    check_paths(found)
    choose_output(quiet, as_json)
    return cast(_T, found)


def check_at_least(least: int, **options: int) -> None:
    """Stop with an error if an option, given by its field's name, is below ``least``."""
    for name, value in options.items():
        if value < least:
            raise CommandError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")


def check_out(path: Path | None) -> None:
    """Stop with an error if the folder of ``--out``, which may not exist yet, is not writable."""
    if path is None:
        return
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "cannot be written to" if there.is_dir() else "is not a folder"
        raise CommandError(f"--out {path}: {there} {reason}; choose another folder")


def give_numbers(config: Any, numbers: dict[str, Any], name: str) -> None:
    """Output all numbers of a command: as JSON with ``--json``, and as a file in ``--out``.

    Args:
        config: The command's options, a dataclass with ``out``; they and the versions come first.
        numbers: The measurements.
        name: Name of the file.
    """
    content, out = {"config": asdict(config), "versions": versions(), **numbers}, config.out
    print_result(content)
    if out is not None:
        make_folder(out)
        with writing(out / name):
            write_atomically(out / name, json.dumps(content, indent=2, default=str) + "\n")
        print(f"wrote {out / name}")


def print_verdicts(checked: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Print each statement with its verdict, and return both for JSON.

    If a statement does not hold, the command ends with exit code 1.
    """
    for text, holds in checked:
        print(("holds   " if holds else "MISSED  ") + text)
        if not holds:
            _missed.append(text)
    return [{"text": text, "holds": holds} for text, holds in checked]


_missed: list[str] = []
"""Statements of the running command that do not hold."""

_written: list[Path] = []
"""Files that the running command has written so far, outside a run's folder."""


@contextlib.contextmanager
def writing(*paths: Path) -> Iterator[None]:
    """Defer signals while a command writes its files, and stop with an error if it cannot.

    Args:
        paths: The files; the message of a later interrupt lists them.
    """
    with stopping.held():
        try:
            yield
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            where = f"{paths[0]}{' and what is beside it' * (len(paths) > 1)}"
            raise CommandError(f"cannot write {where}: {error.strerror or error}") from None
        note_written(*paths)


def note_written(*paths: Path) -> None:
    """Remember files that the command has written, for the message of an interrupt."""
    _written.extend(paths)


@contextlib.contextmanager
def interruptible(said: str) -> Iterator[None]:
    """Handle Ctrl-C, SIGTERM and SIGHUP: print a message and exit with the shell's code.

    If the output is no longer read, as with ``| head``, the command ends quietly, as other programs do.

    Args:
        said: The message if nothing has been written.
    """
    stopping.begin()
    _written.clear()
    _missed.clear()
    code = 0
    try:
        with stopping.handled():
            try:
                yield
                sys.stdout.flush()
                if _missed:
                    raise SystemExit(1)
            except BrokenPipeError:
                code = 141
                raise SystemExit(code) from None
            except KeyboardInterrupt as stop:
                stopping.acknowledge()
                code = getattr(stop, "code", 130)
                say(f"\n{said if not _written else f'interrupted; {_listed(_written)} had been written.'}")
                raise SystemExit(code) from None
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
                raise
            finally:
                end_output()
                quieten()
    finally:
        stopping.end_soon(code)


def _listed(paths: Sequence[Path]) -> str:
    return " and ".join([", ".join(map(str, paths[:-1])), str(paths[-1])] if len(paths) > 1 else map(str, paths))


def say_unfinished(agent: Path | None) -> None:
    """Print a note on standard error if the training of the agent in this folder is unfinished."""
    described = None if agent is None else unfinished(Path(agent))
    if described is not None:
        say(f"note: {described}", error=True)


def load_model(config: ModelConfig) -> HuggingFaceVLM:
    """Load the frozen model, or stop with an error."""
    import torch

    from grip_env.vlms import load_vlm
    from grip_env.vlms.cache.images import PictureCache

    device = find_device(config.device)
    if config.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise CommandError("--attn-implementation flash_attention_2 needs flash-attn: install it, or use sdpa")
    if not 1 <= config.cache_gib * 2**30 <= 2**50:
        raise CommandError(
            f"--cache-gib must be above 0 and at most 1,048,576; got {config.cache_gib:g} (a byte is 9.3e-10): leave "
            "out --cache for none"
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
    """Load the frozen model and the task, or stop with an error.

    Args:
        model: Options of the model.
        task: Name of the task, ignored if there is ``data``.
        data: The user's own data, which are checked before the model is loaded.
        skip_bad: Leave out faulty rows, and list them on standard error.
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
                f'add images, or set the split of each row with the key "split"'
                + (", or pass --examples 0" if split == "test" and "train" in splits else "")
            )


def check_name(name: str) -> None:
    """Stop with an error if ``--name`` cannot name a folder or be passed to other commands."""
    if Path(name).name != name or name in (".", ".."):
        raise CommandError(f"--name is the name of a folder in --runs, without '/'; got {shortened(name)}")
    if not name.isprintable() or name.startswith("-"):
        raise CommandError(f"--name must have printable characters only and not begin with '-'; got {shortened(name)}")
    if len(os.fsencode(name)) > 255:
        raise CommandError(f"--name must have at most 255 bytes; got {len(os.fsencode(name))}: {shortened(name)}")


def find_algorithm(name: str) -> type[Agent]:
    """Return the algorithm of this name, or stop with an error."""
    check_agents_package()
    from agents.agent import find_algorithm

    try:
        with importable_from_here():
            return find_algorithm(name)
    except ValueError as error:
        raise CommandError(f"--algo: {error}") from None

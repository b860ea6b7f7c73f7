"""Command lines as people write them reach the options they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from grip_env.common.arguments import plain_arguments


@dataclass(frozen=True)
class Options:
    policies: str = ""
    budgets: tuple[float, ...] = (0.1,)
    images: tuple[Path, ...] = ()
    progress: bool = True


def plain(*given: str) -> list[str]:
    return plain_arguments(given, Options, ("policies",))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--policies", "a", "b"), ["--policies", "a,b"]),
        (("--policies", "a,", "b"), ["--policies", "a,b"]),
        (("--budgets", "0.1,0.2", "0.3"), ["--budgets", "0.1", "0.2", "0.3"]),
        (("--progress", "false"), ["--no-progress"]),
        (("--progress", "TRUE", "--policies", "a"), ["--progress", "--policies", "a"]),
    ],
)
def test_lists_and_booleans(given: tuple[str, ...], expected: list[str]) -> None:
    assert plain(*given) == expected


@pytest.mark.parametrize("option", [("--policies", "a", "b"), ("--budgets", "0.1", "0.2")])
def test_a_run_may_follow_a_list(option: tuple[str, ...], tmp_path: Path) -> None:
    """The folder of a run is neither a policy nor a budget."""
    run = tmp_path / "run"
    run.mkdir()
    without = plain(*option, str(run))  # nothing tells it from a policy yet
    (run / "config.json").write_text("{}")
    assert plain(*option, str(run)) == [str(run), *plain(*option)] != without


def test_a_folder_that_an_option_takes_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert plain("--images", "a", str(tmp_path)) == ["--images", "a", str(tmp_path)]
    assert plain("--policies", str(tmp_path)) == ["--policies", str(tmp_path)]


@pytest.mark.parametrize("text", ["n" * 300, "is it red? " * 44, "a\0b"])
def test_a_text_that_cannot_be_a_path_is_no_run(text: str) -> None:
    assert plain("--policies", "a", text) == ["--policies", f"a,{text}"]
    assert plain("--budgets", "0.1", text) == ["--budgets", "0.1", text]

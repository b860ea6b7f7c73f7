"""What the project says of itself in more than one place is the same in all of them."""

from __future__ import annotations

import re
from pathlib import Path

import grip_env

ROOT = Path(__file__).parent.parent


def test_lowest_versions_are_those_the_floor_installs() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    claimed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    extra = re.search(r"^contrib = \[(.*)\]$", project, re.MULTILINE)
    assert claimed
    assert extra
    lowest = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', claimed[1] + extra[1]))
    installed = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "floor.txt").read_text(), re.MULTILINE))
    assert lowest.keys() == installed.keys()
    for name, version in lowest.items():
        padded = version + ".0" * (2 - version.count("."))
        assert installed[name] == padded, name


def test_version_is_the_same_everywhere() -> None:
    assert f'version = "{grip_env.__version__}"' in (ROOT / "pyproject.toml").read_text()

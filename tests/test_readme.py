"""Every Python block of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
SKIP = "# not run by the tests"
"""Marks a block that takes too long; it must still compile."""


def blocks() -> list[Any]:
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [pytest.param(block[1], id=f"line{text.count(chr(10), 0, block.start()) + 2}") for block in found]


@pytest.mark.parametrize("code", blocks())
def test_readme_block_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    compiled = compile(code, str(README), "exec")
    if SKIP not in code:
        exec(compiled, {"__name__": "__main__"})
        assert capsys.readouterr().out.strip(), "an example shows something"


def test_readme_shows_code_and_its_links_lead_somewhere() -> None:
    assert blocks()
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), f"README links to {target}, which does not exist"

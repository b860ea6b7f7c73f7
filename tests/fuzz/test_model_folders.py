"""Folders of models with damaged files: they work, or there is one clear error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grip_env.tasks.base import Example
from grip_env.vlms import load_vlm
from tests.fuzz import fuzzed
from tests.vlms.tiny_models import save

GONE = object()
VALUES = (None, -1, 0, 0.5, 1e9, 10**9, 10**30, float("nan"), "x", "", True, [], {}, [[]], {"x": 1}, GONE)
JUNK = (b"\x00", b"\xff\xfe", b"{", b'"', b"{% for", b"9" * 400)
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
FAMILIES = ("llava", "llava_next", "qwen2_vl", "smolvlm", "internvl", "paligemma", "gemma3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {kind: save(kind, home / kind) for kind in FAMILIES}


def places(value: Any, before: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to every value in nested settings."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for name, part in inner:
        yield (*before, name)
        yield from places(part, (*before, name))


def use(folder: Path) -> None:
    """Do with a model what every command does, or fail as the documentation says."""
    said = "fine"
    try:
        vlm = load_vlm(folder)
        encoded = vlm.encode([Example(IMAGE, "what is it?", "yes")])
        selection = encoded.token_mask.clone()
        selection[:, 5:] = False
        vlm.score(encoded, selection[:, None])
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said


def damaged(folder: Path, home: Path, name: str, content: bytes) -> Path:
    """Return a copy of a folder in which one file holds something else."""
    copy = home / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != name:
            os.link(file, copy / file.name)
    (copy / name).write_bytes(content)
    return copy


@fuzzed
@given(data=st.data())
def test_settings_of_other_kinds(folders: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    folder = folders[data.draw(st.sampled_from(FAMILIES), label="family")]
    names = sorted(file.name for file in folder.glob("*.json") if file.name != "tokenizer.json")
    name = data.draw(st.sampled_from(names), label="file")
    whole = json.loads((folder / name).read_text())
    way = data.draw(st.sampled_from(list(places(whole))), label="place")
    value = data.draw(st.sampled_from(VALUES), label="value")
    inner = whole
    for key in way[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    use(damaged(folder, tmp_path, name, json.dumps(whole).encode()))


@fuzzed
@given(data=st.data())
def test_bytes_that_are_lost_or_others(folders: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    folder = folders[data.draw(st.sampled_from(FAMILIES), label="family")]
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".safetensors"))
    name = data.draw(st.sampled_from(names), label="file")
    whole = (folder / name).read_bytes()
    place = data.draw(st.integers(0, min(len(whole), 20_000) - 1), label="place")
    rest = data.draw(st.sampled_from((b"", *JUNK, whole[place + 1 :])), label="what follows")
    use(damaged(folder, tmp_path, name, whole[:place] + rest))

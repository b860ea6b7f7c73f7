"""Data files of invented rows, in all layouts: rows are read or have faults, and nothing else happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grip_env.tasks.files import DataError, FileTask
from grip_env.tasks.rows import SPLITS
from tests.fuzz import fuzzed

PATHS = ["0.png", "", ".", "../0.png", "none.png", "data:image/png;base64,AAAA", "iVBORw0KGgo" * 30, "a\0b", "\ud800"]
MARKED = [
    "<image>",
    "<image>\nwhat?",
    "<image><image>",
    "<image 2>?",
    "<video>",
    "<image_soft_token>",
    "yes",
    "x" * 300,
]
WORDS = st.sampled_from(
    [*PATHS, *MARKED, "human", "gpt", "user", "system", "train", "test", "\x1b[31m", "=1+1", "é", "🐈"]
)
VALUES = st.recursive(
    WORDS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["image", "images", "question", "answer", "conversations", "messages", "family", "split", "text", "data"]
TURN = st.fixed_dictionaries({}, optional={"from": WORDS, "value": WORDS | VALUES, "role": WORDS, "content": VALUES})
CHAT = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3).map(
    lambda pairs: [
        {"from": speaker, "value": text} for pair in pairs for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]
)
ROW = st.fixed_dictionaries({"image": st.just("0.png") | VALUES}, optional=dict.fromkeys(KEYS[1:], VALUES)) | (
    st.fixed_dictionaries({"image": st.just("0.png"), "conversations": CHAT | st.lists(TURN | WORDS, max_size=4)})
    | st.fixed_dictionaries({"image": st.sampled_from(["0.png", ["0.png"]]), "question": WORDS, "answer": WORDS})
)
FILE = st.tuples(
    st.lists(ROW | VALUES, max_size=4),
    st.sampled_from(["lines.jsonl", "lines.json", "list.json", "list.jsonl", "inside.json", "indented.json"]),
    st.booleans(),
    st.integers(-1, 400),
)


def text_of(rows: list[Any], layout: str) -> str:
    kind = layout.partition(".")[0]
    if kind == "lines":
        return "\n".join(map(json.dumps, rows))
    return json.dumps({"data": rows} if kind == "inside" else rows, indent=2 if kind == "indented" else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "0.png")
    return tmp_path


@fuzzed
@given(file=FILE)
def test_rows_are_read_or_named(folder: Path, file: tuple[list[Any], str, bool, int]) -> None:
    rows, layout, skip_bad, cut = file
    text = text_of(rows, layout)
    path = folder / layout
    path.write_text(text if cut < 0 else text[:cut])
    said = None
    try:
        task = FileTask(path, skip_bad=skip_bad)
    except DataError as error:
        said = str(error)
    if said is not None:
        assert all(line.isprintable() for line in said.split("\n"))
        return
    for split in SPLITS:
        for index in range(task.size(split)):
            example = task.example(split, index)
            assert example.question
            assert example.answer
            assert "<image>" not in example.question + example.answer
            assert example.image.shape == (9, 9, 3)

"""Every fault is made for real, in small files; splits are checked against the pixels themselves."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import grip_env
from grip_env.tasks import load_task
from grip_env.tasks.base import Task
from grip_env.tasks.files import DataError, FileTask
from grip_env.tasks.json_rows import read_lines, read_list
from grip_env.tasks.pictures import PictureError, read_picture
from grip_env.tasks.rows import SPLITS, to_row
from tests.fakes import FakeVLM

fresh_folders = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def pixels(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path, **options)
    return path


def row(image: str = "0.png", question: str = "what is it?", answer: str = "a cat", **more: Any) -> dict[str, Any]:
    return {"image": image, "question": question, "answer": answer, **more}


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows, given as objects or as lines, the way the suffix says."""
    texts = [given if isinstance(given, str) else json.dumps(given) for given in rows]
    path.write_text("\n".join(texts) if path.suffix == ".jsonl" else "[" + ",\n".join(texts) + "]", encoding="utf-8")
    return path


def everything(task: FileTask) -> list[tuple[str, grip_env.Example]]:
    return [(split, task.example(split, index)) for split in task.splits for index in range(task.size(split))]


def contents(task: FileTask) -> dict[str, list[tuple[str, str, str, bytes]]]:
    """What each split holds, without where it was read."""
    found: dict[str, list[tuple[str, str, str, bytes]]] = {split: [] for split in SPLITS}
    for split, one in everything(task):
        found[split].append((one.question, one.answer, one.family, one.image.tobytes()))
    return found


def refused(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        FileTask(path, **options)
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one image, ``0.png``."""
    save(tmp_path / "0.png")
    return tmp_path


# -- formats ---------------------------------------------------------------------------------------------


def test_lines_become_examples(tmp_path: Path) -> None:
    for index in range(6):
        save(tmp_path / "images" / f"{index}.png", index)
    rows = [row(f"images/{index}.png", f" what is {index}?\n", f" {index} ", id=index) for index in range(6)]
    rows[2]["family"] = "counting"
    task = FileTask(write(tmp_path / "pets.jsonl", rows))
    assert isinstance(task, Task)
    assert (task.name, task.splits) == ("pets", ("train", "validation", "test"))
    assert sum(task.size(split) for split in task.splits) == 6
    found = everything(task)
    assert {one.answer for _, one in found} == set("012345")
    for split, one in found:
        index = int(one.answer)
        assert one.question == f"what is {index}?"
        assert one.family == ("counting" if index == 2 else "question")
        assert one.key == f"pets.jsonl:{index + 1}"
        assert one.relevance is None
        assert one.image.dtype == np.uint8
        assert np.array_equal(one.image, pixels(index))
        again = task.example(split, [other.key for name, other in found if name == split].index(one.key))
        assert np.array_equal(again.image, one.image)


CHAT = [
    {"from": "human", "value": "<image>\nwhat is it?"},
    {"from": "gpt", "value": "a cat"},
    {"from": "human", "value": "and  its color?"},
    {"from": "gpt", "value": " black"},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_conversations_become_a_question_for_each_pair(folder: Path, suffix: str) -> None:
    rows = [{"id": "a", "image": "0.png", "conversations": CHAT}, row(question="flat?", answer="yes")]
    task = FileTask(write(folder / f"chat{suffix}", rows))
    found = everything(task)
    assert sorted((one.question, one.answer) for _, one in found) == [
        ("and  its color?", "black"),
        ("flat?", "yes"),
        ("what is it?", "a cat"),
    ]
    assert len({split for split, _ in found}) == 1  # one image
    assert len({one.key for _, one in found}) == 3
    first = "chat.jsonl:1" if suffix == ".jsonl" else "chat.json:1 (item 1)"
    assert {one.key for _, one in found} >= {f"{first}, question 1", f"{first}, question 2"}


def test_a_json_file_may_have_a_row_on_each_line(folder: Path) -> None:
    """POPE's files are such."""
    lines = [row(answer="one"), row(answer="two")]
    (folder / "a.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert sorted(one.key for _, one in everything(FileTask(folder / "a.json"))) == ["a.json:1", "a.json:2"]
    (folder / "one.json").write_text(json.dumps(lines[0]))
    assert [one.answer for _, one in everything(FileTask(folder / "one.json"))] == ["one"]


def test_a_list_of_one_image_is_an_image(folder: Path) -> None:
    for key in ("image", "images"):
        one = {key: ["0.png"], "question": "q", "answer": "a"}
        (found,) = everything(FileTask(write(folder / "a.jsonl", [one])))
        assert np.array_equal(found[1].image, read_picture(folder / "0.png", 10**6))


def test_texts_are_checked_against_a_model(folder: Path) -> None:
    rows = [row(answer="one"), row(question="is <pad> there?"), row(answer="<pad>"), row(answer="two")]

    def check(text: str) -> None:
        if "<pad>" in text:
            raise ValueError("holds '<pad>'")

    path = write(folder / "a.jsonl", rows)
    task = FileTask(path)
    with pytest.raises(DataError) as caught:
        task.check_texts(check)
    assert {str(fault) for fault in caught.value.faults} == {
        "a.jsonl:2: \"question\" holds '<pad>'",
        "a.jsonl:3: \"answer\" holds '<pad>'",
    }
    assert "has 2 faults" in str(caught.value)
    task.check_texts(check, skip_bad=True)
    assert set(task.skipped) == set(caught.value.faults)
    assert sorted(one.answer for _, one in everything(task)) == ["one", "two"]
    assert task.fingerprint == FileTask(write(folder / "b.jsonl", [rows[0], rows[3]])).fingerprint
    with pytest.raises(DataError, match="has 2 faults"):
        FileTask(write(folder / "c.jsonl", rows[1:3])).check_texts(check, skip_bad=True)


@pytest.mark.parametrize("marker", ["<image_2>", "<image-2>", "<image2>", "<image 2>", "<ImageHere> <ImageHere>"])
def test_numbered_markers_of_a_second_image_are_faults(folder: Path, marker: str) -> None:
    path = write(folder / "a.jsonl", [row(question=f"<image_1> {marker} which is red?")])
    assert "appears, but the row has one image and nothing else: remove it" in str(refused(path))


@pytest.mark.parametrize("more", [["0.png", "0.png"], ["1.png"], "1.png", []])
def test_two_keys_for_images_are_a_fault_unless_they_agree(folder: Path, more: Any) -> None:
    fault = '"image" and "images" are both given: a question is about one image'
    assert fault in str(refused(write(folder / "a.jsonl", [row(images=more)])))
    for same in ("0.png", ["0.png"], None):
        assert len(everything(FileTask(write(folder / "b.jsonl", [row(images=same)])))) == 1


@pytest.mark.parametrize(
    ("questions", "count"),
    [(["<image> and <image>: which?"], 2), (["<image>a?", "<image>b?"], 2), (["a?", "<image><image><image>b?"], 3)],
)
def test_markers_that_do_not_fit_the_one_image_are_faults(folder: Path, questions: list[str], count: int) -> None:
    chat = [
        {"from": speaker, "value": text}
        for question in questions
        for speaker, text in (("human", question), ("gpt", "yes"))
    ]
    rows: list[Any] = [row(answer="kept"), {"image": "0.png", "conversations": chat}]
    if len(questions) == 1:
        rows.append(row(question=questions[0]))
    faults = refused(write(folder / "a.jsonl", rows)).faults
    assert [fault.place for fault in faults] == [f"a.jsonl:{line}" for line in range(2, len(rows) + 1)]
    assert all(f"the marker <image> appears {count} times, but the row has one image" in str(one) for one in faults)


def test_byte_order_mark_line_ends_and_blank_lines_are_no_faults(folder: Path) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(row(answer="one")).encode(), b"", b"  \t", json.dumps(row()).encode()]
    (folder / "a.jsonl").write_bytes(b"\r\n".join(lines) + b"\r\n\r\n")
    keys = sorted(one.key for _, one in everything(FileTask(folder / "a.jsonl")))
    assert keys == ["a.jsonl:1", "a.jsonl:4"]
    (folder / "a.json").write_bytes(b"\xef\xbb\xbf\r\n [\r\n" + json.dumps(row()).encode() + b"\r\n]\r\n")
    assert [one.key for _, one in everything(FileTask(folder / "a.json"))] == ["a.json:3 (item 1)"]


def test_text_in_any_script_is_kept(folder: Path) -> None:
    asked = row(question="¿qué es esto? 这是什么", answer="مرحبا 🐈", family="多")
    task = FileTask(write(folder / "a.jsonl", [json.dumps(asked, ensure_ascii=False), asked]))
    assert {(one.question, one.answer, one.family) for _, one in everything(task)} == {
        (asked["question"], asked["answer"], asked["family"])
    }


# -- faults of rows --------------------------------------------------------------------------------------

NO_CHAT = {"image": "0.png"}

BAD_ROWS: list[tuple[Any, list[str]]] = [
    (row(answer=""), ['"answer" is empty: give a text']),
    (row(answer=" \n\t"), ['"answer" is empty']),
    (row(answer="\u200b"), ['"answer" is empty']),
    (row(question="<image>\n"), ['"question" is empty']),
    (row(answer=3), ['"answer" is a number, expected a string', "quotes"]),
    (row(answer=True), ['"answer" is true or false, expected a string']),
    (row(answer=float("nan")), ['"answer" is NaN, expected a string']),
    (row(answer=float("inf")), ['"answer" is a number, expected a string']),
    (row(answer=None), ['"answer" is null, expected a string']),
    (row(answer=["a"]), ['"answer" is a list']),
    (row(answer="the <image> shows a cat"), ['"answer" holds the marker <image>']),
    (row(question={"text": "q"}), ['"question" is an object']),
    (row(question="x" * 10_001), ['"question" has 10,001 characters', "limit of 10,000"]),
    (row(family=""), ['"family" is empty']),
    (row(family=1), ['"family" is a number']),
    (row(split="dev"), ["\"split\" is 'dev': choose one of train, validation, test"]),
    (row(split=1), ['"split" is a number: choose one of']),
    ({"question": "q", "answer": "a"}, ['"image" is missing', "the row has 'question', 'answer'"]),
    ({"image": "0.png", "answer": "a"}, ['"question" is missing', "the row has 'image', 'answer'"]),
    ({}, ['"image" is missing', '"question" is missing', '"answer" is missing', "no keys"]),
    (row(image=""), ['"image" is empty: give the path']),
    (row(image=["0.png", "1.png"]), ['"image" is a list of 2: a question is about one image, give the path of one']),
    (row(image=None), ['"image" is null']),
    (row(image=[]), ['"image" is a list of 0']),
    (row(image=[3]), ['"image" is a number: give the path']),
    ({"images": ["0.png", "1.png"], "question": "q", "answer": "a"}, ['"images" is a list of 2']),
    (row(question="<image> and <image 2>?"), ["the marker <image 2> appears, but the row has one image"]),
    (row(question="<video>\nwhat is it?"), ["the marker <video> appears"]),
    ({**NO_CHAT, "conversations": [*CHAT[2:], *CHAT[:2]]}, ["the marker <image> is in a later question"]),
    (["0.png", "q", "a"], ["expected an object such as", "got a list"]),
    ("null", ["expected an object such as", "got null"]),
    ('{"image": "0.png", "question": "q", "answer": "a", "answer": "b"}', ["the key 'answer' appears twice"]),
    ('{"image": "0.png", "question": "q", "answer": "\\ud800"}', ["half of a surrogate pair, '\\ud800'"]),
    ('{"image": "0.png", "question": "q", "answer": "a\x01b"}', ["is not JSON: invalid control character"]),
    ('{"image": "0.png" "question": "q"}', ["is not JSON: expecting ',' delimiter"]),
    ("[" * 100_000 + "]" * 100_000, ["is nested too deeply"]),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, ["is nested too deeply"]),
    ({**NO_CHAT, "conversations": []}, ['"conversations" is empty']),
    ({**NO_CHAT, "conversations": "hello"}, ['"conversations" is a string']),
    ({**NO_CHAT, "conversations": CHAT[:1]}, ['the last turn of "conversations" is from "human"']),
    ({**NO_CHAT, "conversations": CHAT[1:]}, ["turn 1 of \"conversations\" is from 'gpt'"]),
    ({**NO_CHAT, "conversations": ["hello", "yes"]}, ["turn 1 of \"conversations\" is from 'hello'"]),
    ({**NO_CHAT, "conversations": ["human", "gpt"]}, ["turn 1 of \"conversations\" is from 'human'"]),
    ({**NO_CHAT, "conversations": [{"from": "human"}, CHAT[1]]}, ['"value" of turn 1 (human) is missing']),
    ({**NO_CHAT, "conversations": [CHAT[0], {"from": "gpt", "value": ""}]}, ['"value" of turn 2 (gpt) is empty']),
    ({"conversations": CHAT}, ['"image" is missing']),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(("bad", "parts"), BAD_ROWS, ids=[parts[0][:40] for _, parts in BAD_ROWS])
def test_faults_of_a_row_are_named_with_its_line(folder: Path, bad: Any, parts: list[str], suffix: str) -> None:
    path = write(folder / f"pets{suffix}", [row(), row(answer="two"), bad, row(answer="four")])
    error = refused(path)
    place = "pets.jsonl:3" if suffix == ".jsonl" else "pets.json:3 (item 3)"
    assert {fault.place for fault in error.faults} == {place}
    assert all(any(part in str(fault) for fault in error.faults) for part in parts), str(error)
    assert f"{place}: " in str(error)
    assert "--skip-bad" in str(error)
    task = FileTask(path, skip_bad=True)
    assert task.skipped == error.faults
    assert sorted(one.answer for _, one in everything(task)) == ["a cat", "four", "two"]


def test_a_row_with_one_bad_turn_is_left_out_as_a_whole(folder: Path) -> None:
    chat = [*CHAT[:3], {"from": "gpt", "value": ""}]
    path = write(folder / "a.jsonl", [{"image": "0.png", "conversations": chat}, row(answer="kept")])
    assert [one.answer for _, one in everything(FileTask(path, skip_bad=True))] == ["kept"]


def test_a_place_in_a_list_is_the_line_its_item_begins_on(folder: Path) -> None:
    text = json.dumps([row(), row(answer=1), row()], indent=2)
    (folder / "a.json").write_text(text)
    (fault,) = refused(folder / "a.json").faults
    line = text.splitlines().index('    "answer": 1') - 3
    assert fault.place == f"a.json:{line + 1} (item 2)"
    assert text.splitlines()[line] == "  {"


def test_all_faults_come_at_once(folder: Path) -> None:
    rows: list[Any] = [row(answer=""), row("none.png"), "{", row(), *[row(answer=7) for _ in range(30)]]
    error = refused(write(folder / "a.jsonl", rows))
    lines = [1, 2, 3, *range(5, 35)]
    assert [fault.place for fault in error.faults] == [f"a.jsonl:{line}" for line in lines]
    assert "has 33 faults" in str(error)
    assert sum("  a.jsonl:" in line for line in str(error).splitlines()) == 33


def test_a_row_tells_all_its_faults_also_that_of_its_image(folder: Path) -> None:
    (one, two, three) = refused(write(folder / "a.jsonl", [row("none.png", question="", answer="")])).faults
    assert '"question" is empty' in str(one)
    assert '"answer" is empty' in str(two)
    assert "'none.png' does not exist" in str(three)


def test_messages_hold_no_control_characters_and_stay_short(folder: Path) -> None:
    error = refused(write(folder / "a.jsonl", [row("\x1b[31m\nred.png" + "x" * 9000), row(split="\x07" * 500)]))
    assert len(error.faults) == 2
    for fault in error.faults:
        assert str(fault).isprintable()
        assert len(str(fault)) < 400


def test_skipping_leaves_exactly_the_good_rows(folder: Path) -> None:
    good = [row(answer=f"answer {index}") for index in range(5)]
    mixed = [good[0], "{", *good[1:3], row("none.png"), row(answer=""), *good[3:]]
    task = FileTask(write(folder / "mixed.jsonl", mixed), skip_bad=True)
    clean = FileTask(write(folder / "clean.jsonl", good))
    assert len(task.skipped) == 3
    assert clean.skipped == ()
    assert contents(task) == contents(clean)
    assert task.fingerprint == clean.fingerprint


def test_nothing_left_is_an_error_also_when_skipping(folder: Path) -> None:
    error = refused(write(folder / "a.jsonl", [row(answer=""), "{"]), skip_bad=True)
    assert "has no row without a fault" in str(error)
    assert len(error.faults) == 2


# -- faults of files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.jsonl", b"", ["has no rows: it is empty"]),
        ("a.json", b"", ["has no rows: it is empty"]),
        ("a.jsonl", b"\n \r\n", ["has no rows: it is empty"]),
        ("a.json", b" [ ] ", ["has no rows: it is empty"]),
        ("a.csv", b"image,question,answer", ["has the suffix '.csv'", "expected a .jsonl file"]),
        ("a", b"{}", ["has the suffix ''", "expected a .jsonl file"]),
        ("a.jsonl", "{}".encode("utf-16"), ["is UTF-16, not UTF-8", "iconv -f UTF-16"]),
        ("a.json", "[]".encode("utf-16"), ["is UTF-16, not UTF-8"]),
        ("a.jsonl", b"\n[\n{}\n]", ["a.jsonl:2: begins with '[', as a list does: call the file .json"]),
        ("a.json", b'\n{"image": 1}', ['a.json:2: "image" is a number']),
        (
            "a.json",
            b'{"data": [{"image": "a.png"}]}',
            ["a.json:1: is one object with the keys 'data': a .json file is one list of rows"],
        ),
        ("a.json", b'{\n "questions": [],\n "info": {}\n}', ["is one object with the keys 'questions', 'info'"]),
        ("a.json", b'"cats"', ["begins with '\"': a .json file is one list of rows"]),
        ("a.json", b"[1", ["expected ',' or ']' after item 1, and the file ends", "fix the file"]),
        ("a.json", b"[1 2]", ["expected ',' or ']' after item 1, and got '2'"]),
        ("a.json", b"[1,]", ["expected one more item: is the file complete"]),
        ("a.json", b"[1,", ["expected one more item: is the file complete"]),
        ("a.json", b"[", ["expected one more item"]),
        ("a.json", b"[1]\n]", ["a.json:2: there is more after the end of the list"]),
        ("a.json", b"[cat]", ["a.json:1 (item 1): is not JSON: expecting value"]),
        ("a.json", b'[{"a": "b]', ["is not JSON: unterminated string", "the file ends"]),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_faults_of_a_file_are_named(tmp_path: Path, name: str, data: bytes, parts: list[str], skip_bad: bool) -> None:
    (tmp_path / name).write_bytes(data)
    error = refused(tmp_path / name, skip_bad=skip_bad)
    assert all(part in str(error) for part in parts), str(error)


def test_paths_that_are_no_data_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "file").touch()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name, part in (
        ("none.jsonl", "does not exist: expected a .jsonl file"),
        ("folder.jsonl", "is a folder without a dataset in it"),
        ("pipe.jsonl", "is not a regular file"),
        ("file/a.jsonl", "cannot be read (Not a directory)"),
        ("loop.jsonl", "cannot be read ("),
        ("a\0.jsonl", "null byte"),
    ):
        assert part in str(refused(tmp_path / name)), name


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(folder: Path) -> None:
    save(folder / "1.png").chmod(0)
    path = write(folder / "a.jsonl", [row("1.png")])
    assert "the image '1.png' cannot be read (Permission denied)" in str(refused(path))
    path.chmod(0)
    assert f"{path} cannot be read (Permission denied)" in str(refused(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_bytes_that_are_not_utf8_spoil_their_row_only(folder: Path, suffix: str) -> None:
    path = write(folder / f"a{suffix}", [row(), row(answer="caf#"), row(answer="ok")])
    path.write_bytes(path.read_bytes().replace(b"#", b"\xe9"))
    (fault,) = refused(path).faults
    assert "is not UTF-8 (byte 0xe9" in fault.message
    assert "iconv" in fault.message
    assert fault.place.startswith(f"a{suffix}:2")
    assert len(everything(FileTask(path, skip_bad=True))) == 2


@pytest.mark.parametrize(("suffix", "size"), [(".jsonl", 100_000_000), (".json", 20_000_000)])
def test_long_rows_are_named_and_never_held_in_memory(folder: Path, suffix: str, size: int) -> None:
    path = folder / f"a{suffix}"
    head, end = json.dumps(row(answer="one")), json.dumps(row(answer="three"))
    first, between, last = ("[", ",\n", "]") if suffix == ".json" else ("", "\n", "\n")
    with path.open("wb") as file:
        file.write(f'{first}{head}{between}{{"image": "'.encode())
        file.write(b"x" * size)
        file.write(f'"}}{between}{end}{last}'.encode())
    tracemalloc.start()
    error = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000
    what = "line" if suffix == ".jsonl" else "item"
    (fault,) = error.faults
    assert f"the {what} is longer than the limit of 1,048,576 bytes" in fault.message
    assert fault.place.startswith(f"a{suffix}:2")
    assert sorted(one.answer for _, one in everything(FileTask(path, skip_bad=True))) == ["one", "three"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_limit_of_a_row_is_exact(folder: Path, suffix: str, end: str) -> None:
    path = write(folder / f"a{suffix}", [row(), row()])
    path.write_bytes(path.read_bytes().replace(b"\n", end.encode()) + end.encode())
    length = len(json.dumps(row()))
    assert len(everything(FileTask(path, max_row_bytes=length))) == 2
    assert f"longer than the limit of {length - 1} bytes" in str(refused(path, max_row_bytes=length - 1))


def test_two_rows_on_a_line_are_a_fault(folder: Path) -> None:
    (fault,) = refused(write(folder / "a.jsonl", [json.dumps(row()) + " " + json.dumps(row())])).faults
    assert fault.message == f"is not JSON: more after the end of the row in column {len(json.dumps(row())) + 1}"


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize(
    "long", ['{"a": "%s}"}' % ('\\"' * 999), '"%s"' % ("\\\\" * 999), "7" * 999, "[" * 400 + "]" * 400, "-" * 999]
)
def test_what_is_not_parsed_is_skipped_to_its_end_wherever_the_window_cuts(
    tmp_path: Path, long: str, shift: int
) -> None:
    (tmp_path / "a.json").write_text(f'["{"x" * shift}", {long}, null]')
    found = list(read_list(tmp_path / "a.json", 8))
    assert [one.place for one in found] == [f"a.json:1 (item {number})" for number in range(1, 4)]
    assert ["got null" in one.faults[0] for one in found] == [False, False, True]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_long_number_takes_no_long_time(folder: Path, suffix: str) -> None:
    path = write(folder / f"a{suffix}", [row(), '{"image": "0.png", "question": "q", "answer": ' + "7" * 900_000 + "}"])
    assert '"answer" is a number' in str(refused(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


words = st.sampled_from(["human", "gpt", "train", "0.png", "", "<image>"])
turns = st.lists(st.dictionaries(st.sampled_from(["from", "value"]), words | json_values) | words, max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    value=st.dictionaries(
        st.sampled_from(["image", "question", "answer", "family", "split", "conversations"]),
        words | turns | json_values,
    )
)
def test_any_object_is_a_row_of_texts_or_has_faults(value: dict[str, Any]) -> None:
    found = to_row(value, "here")
    if not found.faults:
        assert found.split in (None, *SPLITS)
        assert all(isinstance(text, str) and text for pair in found.turns for text in (*pair, found.family))


@fresh_folders
@given(values=st.lists(json_values, max_size=6), indent=st.sampled_from([None, 0, 3]), limit=st.integers(1, 60))
def test_a_list_is_read_as_python_reads_it_whatever_the_window(
    tmp_path: Path, values: list[Any], indent: int | None, limit: int
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = list(read_list(tmp_path / "a.json", limit))
    assert len(found) == len(values)
    spans = [json.dumps(values[:end], indent=indent, ensure_ascii=False) for end in range(len(values) + 1)]
    for before, whole, value, one in zip(spans, spans[1:], values, found, strict=False):
        item = whole[: -1 if indent is None else -2]
        item = item[len(before) - (1 if indent is None or before == "[]" else 2) :].lstrip(",\n ")
        too_long = len(item) > limit
        assert ("longer than the limit" in one.faults[0]) == too_long, (item, one)
        if not too_long:
            assert one.faults == to_row(value, one.place).faults


@fresh_folders
@given(data=st.binary(max_size=60) | st.text('{}[]":,\\ \nau0', max_size=40).map(str.encode))
@example(b'[{"\\')
def test_any_bytes_give_rows_or_faults_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    for name, read in (("a.jsonl", read_lines), ("a.json", read_list)):
        for begin in (b"", b"["):
            (tmp_path / name).write_bytes(begin + data)
            assert all(isinstance(one.faults, list) for one in read(tmp_path / name, 8))
            assert refused(tmp_path / name)  # nothing so short is a good row


# -- images ----------------------------------------------------------------------------------------------


def bytes_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flip_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 4]) + data[middle + 4 :]


NOISE = Image.fromarray(pixels(0))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"

BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"not an image", "is not an image: expected the contents of PNG, JPEG"),
    "a program for Ghostscript": (EPS, "is not an image"),
    "truncated PNG": (bytes_of(NOISE)[:-200], "is damaged ("),
    "truncated JPEG": (bytes_of(NOISE, "JPEG")[:-100], "is damaged (image file is truncated"),
    "header of a PNG": (bytes_of(NOISE)[:24], "is damaged (Truncated File Read)"),
    "spoilt PNG": (flip_middle(bytes_of(NOISE)), "is damaged ("),
    "32-bit TIFF": (bytes_of(Image.new("F", (9, 9)), "TIFF"), "has 32-bit pixels"),
    "many pixels": (bytes_of(Image.new("1", (401, 100))), "has 401 x 100 pixels, more than the limit of 40,000"),
    "slim": (bytes_of(Image.new("1", (909, 9))), "has 909 x 9 pixels: one side may be at most 100 times the other"),
}


@pytest.mark.parametrize(("data", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_named_with_row_and_path(folder: Path, data: bytes, message: str) -> None:
    (folder / "bad.png").write_bytes(data)
    path = write(folder / "a.jsonl", [row(), row("bad.png"), row("bad.png", answer="again")])
    error = refused(path, max_pixels=40_000)
    assert [fault.place for fault in error.faults] == ["a.jsonl:2", "a.jsonl:3"]
    assert all(fault.message.startswith(f"the image 'bad.png' {message}") for fault in error.faults), str(error)
    assert len(everything(FileTask(path, skip_bad=True, max_pixels=40_000))) == 1


@pytest.mark.parametrize(
    "limit", [150, 50]
)  # Pillow warns of 12 x 16 pixels with the first, and raises with the second
def test_pillows_own_limit_is_an_error_too(folder: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    error = refused(write(folder / "a.jsonl", [row()]))
    assert "the image '0.png' is too large (Image size (192 pixels) exceeds limit of" in str(error)


def test_limits_that_just_hold(tmp_path: Path) -> None:
    Image.new("RGB", (800, 8)).save(tmp_path / "0.png")
    assert everything(FileTask(write(tmp_path / "a.jsonl", [row()]), max_pixels=6400))[0][1].image.shape == (8, 800, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/hostname", "is an absolute path: keep images in {folder} and write paths relative to it"),
        ("{folder}/0.png", "is an absolute path"),
        ("C:\\images\\0.png", "is an absolute path"),
        ("../outside.png", "leads out of {folder}: move or copy the image into that folder"),
        ("sub/../../outside.png", "leads out of {folder}"),
        ("../none.png", "leads out of {folder}"),
        ("link.png", "leads out of {folder}"),
        ("away/outside.png", "leads out of {folder}"),
        ("loop.png", "cannot be read ("),
        ("https://example.org/cat.png", "is an address, not a file"),
        ("data:image/png;base64,AAAA", "is the image itself as text (base64): save it beside the data file"),
        ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk", "is the image itself as text (base64)"),
        ("/9j/4AAQSkZJRgABAQEASABIAAD/2wBDAP", "is the image itself as text (base64)"),
        ("iVBORw0KGgo" * 40, "is the image itself as text (base64): save it beside the data file"),
        ("sub", "is a folder: give the path of an image"),
        (".", "is a folder"),
        ("pipe.png", "is not a regular file"),
        ("none.png", "does not exist in {folder}"),
        ("sub\\0.png", "does not exist in {folder} (folders are separated by '/')"),
        ("0.png/1.png", "cannot be read (Not a directory)"),
        ("a\0b.png", "is not a path (embedded null byte)"),
        ("\ud800.png", "is not a path ("),
        ("x" * 300 + ".png", "cannot be read (File name too long)"),
    ],
)
def test_paths_that_are_no_image_inside_the_folder(tmp_path: Path, name: str, message: str) -> None:
    folder = tmp_path / "data"
    save(folder / "0.png")
    save(folder / "sub" / "0.png")
    save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "away").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    name, message = (text.replace("{folder}", str(folder)) for text in (name, message))
    (fault,) = refused(write(folder / "a.jsonl", [row(), row(name)])).faults
    assert fault.place == "a.jsonl:2"
    assert message in fault.message, fault


def test_paths_and_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save(folder / "sub" / "0.png")
    (folder / "link.png").symlink_to(folder / "sub" / "0.png")
    (tmp_path / "alias").symlink_to(folder)
    write(folder / "a.jsonl", [row(name) for name in ("sub/0.png", "link.png", "sub/../sub/0.png")])
    for place in (folder, tmp_path / "alias"):
        assert len(everything(FileTask(place / "a.jsonl"))) == 3


def test_images_lie_beside_a_link_to_a_data_file(tmp_path: Path) -> None:
    save(tmp_path / "images" / "0.png")
    write(tmp_path / "a.jsonl", [row()])
    (tmp_path / "images" / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert len(everything(FileTask(tmp_path / "images" / "b.jsonl"))) == 1


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def test_every_mode_becomes_rgb() -> None:
    rgb = pixels(1)
    image = Image.fromarray(rgb)
    alpha = pixels(2)[..., 0]
    grey = np.asarray(image.convert("L"))
    deep = np.random.default_rng(3).integers(0, 65536, grey.shape, dtype=np.uint16)
    few = image.quantize(16)
    cases: list[tuple[str, Image.Image, np.ndarray]] = [
        ("PNG", image, rgb),
        ("PNG", image.convert("L"), np.stack([grey] * 3, 2)),
        ("PNG", image.convert("1"), np.stack([np.asarray(image.convert("1")) * 255] * 3, 2)),
        ("PNG", few, np.asarray(few.convert("RGB"))),
        ("GIF", few, np.asarray(few.convert("RGB"))),
        ("TIFF", image.convert("CMYK"), rgb),
        ("PNG", Image.fromarray(np.dstack([rgb, alpha])), over_white(rgb, alpha)),
        ("PNG", Image.fromarray(np.dstack([grey, alpha])), over_white(np.stack([grey] * 3, 2), alpha)),
        ("PNG", Image.fromarray(deep), np.stack([deep // 256] * 3, 2)),
        ("TIFF", Image.fromarray(deep), np.stack([deep // 256] * 3, 2)),
        ("BMP", image, rgb),
    ]
    for kind, given_image, expected in cases:
        found = read_picture(bytes_of(given_image, kind), 10**6)
        assert (found.dtype, found.shape) == (np.uint8, (12, 16, 3))
        assert np.abs(found.astype(float) - expected).max() <= 1.0, (kind, given_image.mode)
    lossless = read_picture(bytes_of(image, "WEBP", lossless=True), 10**6)
    assert np.array_equal(lossless, rgb)


def test_transparent_palettes_are_put_on_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((0, 0), 1)
    for kind in ("PNG", "GIF"):
        found = read_picture(bytes_of(image, kind, transparency=0), 100)
        assert found[0, 0].tolist() == [0, 0, 200]
        assert found[1:].min() == 255


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = bytes_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert (read_picture(data, 100) == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (2, lambda image: image[:, ::-1]),
        (3, lambda image: image[::-1, ::-1]),
        (6, lambda image: np.rot90(image, -1)),
        (8, lambda image: np.rot90(image)),
    ],
)
def test_exif_turns_pictures_upright(orientation: int, upright: Callable[[np.ndarray], np.ndarray]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = bytes_of(Image.fromarray(pixels(4)), exif=exif)
    assert np.array_equal(read_picture(data, 10**6), upright(pixels(4)))


def test_damaged_exif_does_not_damage_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    for notes in (whole[:9], b"Exif\0\0" + b"\xff" * 20, b"Exif\0\0MM\0*\0\0\xff\xff"):
        data = bytes_of(Image.fromarray(pixels(4)), exif=notes)
        assert np.array_equal(read_picture(data, 10**6), pixels(4))


def test_contents_count_and_not_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(bytes_of(NOISE))
    ((_, one),) = everything(FileTask(write(tmp_path / "a.jsonl", [row("0.jpg")])))
    assert np.array_equal(one.image, pixels(0))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]),
    where=st.floats(0, 1),
    what=st.binary(min_size=1, max_size=6),
    cut=st.booleans(),
)
def test_damage_of_any_kind_is_a_picture_or_an_error_with_a_name(
    kind: str, where: float, what: bytes, cut: bool
) -> None:
    data = bytes_of(NOISE, kind)
    at = int(where * len(data))
    data = data[:at] + what + (b"" if cut else data[at + len(what) :])
    try:
        found: np.ndarray | str = read_picture(data, 10**5)
    except PictureError as error:
        found = str(error)
    if isinstance(found, str):
        assert found.startswith(("is ", "has "))
    else:
        assert (found.dtype, found.ndim, found.shape[2]) == (np.uint8, 3, 3)


def test_large_pictures_are_shrunk_and_tiny_ones_magnified(tmp_path: Path) -> None:
    Image.new("RGB", (90, 30), "red").save(tmp_path / "large.png")
    tiny = pixels(5, 3, 2)
    Image.fromarray(tiny).save(tmp_path / "tiny.png")
    path = write(tmp_path / "a.jsonl", [row("large.png", answer="large"), row("tiny.png", answer="tiny")])
    shrunk = {one.answer: one.image for _, one in everything(FileTask(path, max_side=60))}
    assert shrunk["large"].shape == (20, 60, 3)
    assert (shrunk["large"] == [255, 0, 0]).all()
    # sides of one or three pixels would be taken for colour channels
    assert shrunk["tiny"].shape == (12, 8, 3)
    assert np.array_equal(shrunk["tiny"][::4, ::4], tiny)
    whole = {one.answer: one.image for _, one in everything(FileTask(path, max_side=None))}
    assert whole["large"].shape == (30, 90, 3)


# -- splits ----------------------------------------------------------------------------------------------


def test_splits_have_about_their_shares(tmp_path: Path) -> None:
    for index in range(300):
        save(tmp_path / f"{index}.bmp", index)
    task = FileTask(write(tmp_path / "a.jsonl", [row(f"{index}.bmp") for index in range(300)]))
    train, validation, test = (task.size(split) for split in task.splits)
    assert train + validation + test == 300
    assert abs(train - 240) < 25  # over three standard deviations
    assert abs(validation - 30) < 18
    assert abs(test - 30) < 18


@fresh_folders
@given(
    asked=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=25),
    seed=st.integers(0, 1000),
)
def test_splits_are_disjoint_by_contents_and_independent_of_order(
    tmp_path: Path, asked: list[tuple[int, int, int]], seed: int
) -> None:
    for name, kind in ((name, kind) for name, kind, _ in asked):  # the same pixels in three formats
        suffix = ("png", "bmp", "tiff")[kind]
        if not (tmp_path / f"{name}.{suffix}").exists():
            save(tmp_path / f"{name}.{suffix}", name)
    rows = [row(f"{name}.{('png', 'bmp', 'tiff')[kind]}", f"number {text}?") for name, kind, text in asked]
    task = FileTask(write(tmp_path / "a.jsonl", rows))
    found = contents(task)
    assert sum(map(len, found.values())) == len(rows)
    images = {split: {one[-1] for one in ones} for split, ones in found.items()}
    assert sum(map(len, images.values())) == len({name for name, _, _ in asked})
    assert len(set().union(*images.values())) == sum(map(len, images.values()))

    random.Random(seed).shuffle(rows)
    shuffled = FileTask(write(tmp_path / "a.jsonl", rows))
    assert contents(shuffled) == found
    assert shuffled.fingerprint == task.fingerprint

    alone = FileTask(write(tmp_path / "a.jsonl", rows[:1]))  # other rows have no say
    ((split, only),) = everything(alone)
    assert only.image.tobytes() in images[split]


def test_pictures_of_the_same_bytes_and_another_shape_differ(tmp_path: Path) -> None:
    for name, size in (("wide", (16, 9)), ("tall", (9, 16))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    task = FileTask(write(tmp_path / "a.jsonl", [row("wide.png"), row("tall.png"), row("tall.png")]))
    assert "3 questions about 2 different images" in task.describe()


def test_an_image_is_checked_once_whatever_is_asked_about_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def counting(source: Any, limit: int) -> np.ndarray:
        read.append(source)
        return read_picture(source, limit)

    monkeypatch.setattr("grip_env.tasks.files.read_picture", counting)
    task = FileTask(write(folder / "a.jsonl", [row(), row(answer="b"), row(answer="c")]))
    assert read == [folder / "0.png"]
    everything(task)
    assert len(read) == 4


def test_the_order_within_a_split_is_not_that_of_the_file(tmp_path: Path) -> None:
    for index in range(60):
        save(tmp_path / f"{index}.bmp", index)
    task = FileTask(write(tmp_path / "a.jsonl", [row(f"{index}.bmp", answer=str(index)) for index in range(60)]))
    answers = [int(task.example("train", index).answer) for index in range(task.size("train"))]
    assert answers != sorted(answers)
    assert min(answers[: len(answers) // 2]) < 20
    assert max(answers[: len(answers) // 2]) > 40


def test_the_fingerprint_changes_with_anything_in_an_example(folder: Path) -> None:
    save(folder / "1.png", 1)
    variants = [row(), row("1.png"), row(question="q"), row(answer="b"), row(family="f"), row(split="test")]
    variants += [row(split="validation"), row(split="train")]
    prints = [FileTask(write(folder / "a.jsonl", [one])).fingerprint for one in variants]
    own = FileTask(write(folder / "a.jsonl", [row()]))
    mine = [split for split in own.splits if own.size(split)]
    assert len(set(prints)) == len(prints) - 1  # asking for the split it has anyway is no change
    assert prints[0] == FileTask(write(folder / "b.jsonl", [row(split=mine[0])])).fingerprint


def test_a_row_may_choose_its_split_for_its_image(tmp_path: Path) -> None:
    for index in range(6):
        save(tmp_path / f"{index}.png", index)
    rows = [row(f"{index}.png", split=SPLITS[index % 3], answer=str(index)) for index in range(6)]
    rows += [row(f"{index}.png", answer=f"{index} again") for index in range(6)]  # these follow
    task = FileTask(write(tmp_path / "a.jsonl", rows[::-1]))
    for split, one in everything(task):
        assert split == SPLITS[int(one.answer[0]) % 3]
    assert [task.size(split) for split in task.splits] == [4, 4, 4]


def test_an_image_in_two_splits_is_a_fault_also_under_another_name(folder: Path) -> None:
    Image.fromarray(pixels(0)).save(folder / "copy.bmp")
    path = write(folder / "a.jsonl", [row(split="train"), row("copy.bmp", split="test"), row(split="train")])
    (fault,) = refused(path).faults
    assert fault.place == "a.jsonl:2"
    assert "its image is in \"split\" 'test' here and in 'train' at a.jsonl:1" in fault.message
    task = FileTask(path, skip_bad=True)
    assert [task.size(split) for split in task.splits] == [2, 0, 0]


def test_empty_and_unknown_splits_are_named(folder: Path) -> None:
    task = FileTask(write(folder / "pets.jsonl", [row(split="train")]))
    assert task.describe() == "pets: 1 questions about 1 different images (train 1, validation 0, test 0)"
    with pytest.raises(ValueError, match="split 'test' of task 'pets' has no examples"):
        task.example("test", 0)
    with pytest.raises(IndexError, match="example 1 of split 'train' does not exist: choose 0 to 0"):
        task.example("train", 1)
    for call in (task.size, lambda split: task.example(split, 0)):
        with pytest.raises(ValueError, match="unknown split 'dev' of task 'pets': choose one of train, validation"):
            call("dev")


@pytest.mark.parametrize("option", ["max_row_bytes", "max_pixels", "max_side"])
def test_limits_below_one_are_refused(folder: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1; got 0"):
        FileTask(write(folder / "a.jsonl", [row()]), **{option: 0})


# -- after the check -------------------------------------------------------------------------------------


def test_an_image_that_changes_later_is_an_error_and_never_wrong_data(folder: Path) -> None:
    task = FileTask(write(folder / "a.jsonl", [row(split="test")]))
    save(folder / "0.png", 0, compress_level=1)  # other bytes, same picture
    assert np.array_equal(task.example("test", 0).image, pixels(0))
    save(folder / "0.png", 1)
    with pytest.raises(DataError, match=r"a.jsonl:1: the image has changed since the data were checked"):
        task.example("test", 0)
    (folder / "0.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a.jsonl:1: since the data were checked, the image is not an image"):
        task.example("test", 0)
    (folder / "0.png").unlink()
    with pytest.raises(DataError, match=r"a.jsonl:1: since the data were checked, the image does not exist"):
        task.example("test", 0)


def test_copies_are_small_and_give_the_same_examples(tmp_path: Path) -> None:
    Image.fromarray(pixels(0, 300, 300)).save(tmp_path / "0.bmp")
    task = FileTask(write(tmp_path / "a.jsonl", [row("0.bmp", answer=str(index)) for index in range(20)]))
    stored = pickle.dumps(task)
    assert len(stored) < 20_000  # one picture has 270,000 bytes
    assert copy.deepcopy(task) is task
    assert contents(pickle.loads(stored)) == contents(task)


def test_paths_hold_from_wherever_the_task_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "a.jsonl", [row()])
    monkeypatch.chdir(folder)
    task = FileTask("a.jsonl")
    monkeypatch.chdir("/")
    assert len(everything(task)) == 1


# -- in an environment -----------------------------------------------------------------------------------


def test_environments_take_the_task_and_its_path(folder: Path) -> None:
    path = write(folder / "a.jsonl", [row(split="train", answer=str(index)) for index in range(4)])
    for task in (FileTask(path), str(path), path):
        env = gymnasium.make("GRIP/TokenSelection-v0", vlm=FakeVLM(), task=task, budget=0.25, action_mode="scores")
        _, info = env.reset(seed=0)
        assert env.unwrapped.example.question == "what is it?"
        assert not info["relevance_known"]
        _, reward, terminated, _, _ = env.step(np.arange(16, dtype=np.float32))
        assert terminated
        assert np.isfinite(reward)
    with pytest.raises(ValueError, match="split 'test' of task 'a' has no examples"):
        gymnasium.make("GRIP/TokenSelection-v0", vlm=FakeVLM(), task=path, split="test")


def test_task_names_are_told_from_paths(folder: Path) -> None:
    assert load_task("scenes").name == "scenes"
    assert load_task(write(folder / "a.jsonl", [row()])).name == "a"
    with pytest.raises(ValueError, match="unknown task 'photos': use 'scenes' or 'scenes-hard', the path of your data"):
        load_task("photos")
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        load_task("none.jsonl")


# -- saved datasets --------------------------------------------------------------------------------------


def test_without_the_library_a_saved_dataset_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = refused(tmp_path)
    assert f"reading the dataset in {tmp_path} needs the package 'datasets'" in str(error)
    assert "pip install 'grip-env[datasets]'" in str(error)


def hugging_face(rows: list[dict[str, Any]]) -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    return datasets.Dataset.from_list(rows, features=features)


def numbered(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"image": Image.fromarray(pixels(index)), "question": f"what is {index}?", "answer": str(index)}
        for index in range(first, first + count)
    ]


def test_saved_dataset_gives_the_examples_and_splits_of_a_file(tmp_path: Path) -> None:
    hugging_face(numbered(20)).save_to_disk(tmp_path / "pets")
    for index in range(20):
        save(tmp_path / f"{index}.png", index)
    rows = [row(f"{index}.png", f"what is {index}?", str(index)) for index in range(20)]
    task, files = FileTask(tmp_path / "pets"), FileTask(write(tmp_path / "a.jsonl", rows))
    assert task.name == "pets"
    assert contents(task) == contents(files)
    assert task.fingerprint == files.fingerprint
    assert {one.key for _, one in everything(task)} == {f"pets[{index}]" for index in range(20)}
    again = pickle.loads(pickle.dumps(task))
    assert contents(again) == contents(task)
    assert len(pickle.dumps(again)) < 10_000


def test_several_saved_datasets_bring_their_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": hugging_face(numbered(3)), "test": hugging_face(numbered(2, 3))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    task = FileTask(tmp_path / "two")
    assert [task.size(split) for split in task.splits] == [3, 0, 2]
    assert {one.key for _, one in everything(task)} == {
        *(f"two[train][{index}]" for index in range(3)),
        *(f"two[test][{index}]" for index in range(2)),
    }
    datasets.DatasetDict(parts | {"test": hugging_face(numbered(2, 2))}).save_to_disk(tmp_path / "leak")
    assert "leak[test][0]: its image is in \"split\" 'test' here and in 'train' at leak[train][2]" in str(
        refused(tmp_path / "leak")
    )
    datasets.DatasetDict({"train": parts["train"], "val": parts["test"]}).save_to_disk(tmp_path / "val")
    assert "val[val][0]: \"split\" is 'val': choose one of" in str(refused(tmp_path / "val"))
    datasets.DatasetDict({"train": hugging_face(numbered(20))}).save_to_disk(tmp_path / "one")  # nobody chose a split
    task = FileTask(tmp_path / "one")
    assert min(task.size("train"), task.size("validation") + task.size("test")) > 0


def test_faults_of_a_saved_dataset_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = {"bytes": bytes_of(NOISE), "path": None}
    rows: list[dict[str, Any]] = [
        {"image": image, "question": "q", "answer": "good"},
        {"image": image, "question": "q", "answer": ""},
        {"image": image, "question": None, "answer": "a"},
        {"image": {"bytes": b"junk", "path": None}, "question": "q", "answer": "a"},
        {"image": None, "question": "q", "answer": "a"},
    ]
    hugging_face(rows).save_to_disk(tmp_path / "bad")
    assert [str(fault) for fault in refused(tmp_path / "bad").faults] == [
        'bad[1]: "answer" is empty: give a text',
        'bad[2]: "question" is null, expected a string: give a text',
        "bad[3]: the image is not an image: expected the contents of PNG, JPEG, WEBP, GIF, BMP, TIFF",
        "bad[4]: the image is missing",
    ]
    assert [one.answer for _, one in everything(FileTask(tmp_path / "bad", skip_bad=True))] == ["good"]

    texts = {"image": ["0.png", "../0.png", "none.png"], "question": ["q"] * 3, "answer": ["a"] * 3}
    datasets.Dataset.from_dict(texts).save_to_disk(tmp_path / "paths")
    save(tmp_path / "paths" / "0.png")
    one, two = refused(tmp_path / "paths").faults
    assert one.message.startswith(f"the image '../0.png' leads out of {tmp_path / 'paths'}")
    assert two.message.startswith("the image 'none.png' does not exist")
    assert len(everything(FileTask(tmp_path / "paths", skip_bad=True))) == 1


def test_saved_datasets_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    hugging_face(numbered(3)).rename_column("image", "picture").save_to_disk(tmp_path / "columns")
    assert "columns has the columns picture, question, answer, and none called image" in str(
        refused(tmp_path / "columns")
    )
    datasets.Dataset.from_dict({"image": [1], "question": ["q"], "answer": ["a"]}).save_to_disk(tmp_path / "number")
    assert "the column image of number is" in str(refused(tmp_path / "number"))
    hugging_face(numbered(3)).save_to_disk(tmp_path / "cut")
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    assert f"{tmp_path / 'cut'} cannot be read as a dataset (" in str(refused(tmp_path / "cut"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "dataset_info.json").write_text("{")
    assert f"{tmp_path / 'empty'} cannot be read as a dataset (" in str(refused(tmp_path / "empty"))


def test_conversations_in_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"image": "0.png", "conversations": CHAT}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "chat")
    save(tmp_path / "chat" / "0.png")
    found = everything(FileTask(tmp_path / "chat"))
    assert sorted(one.answer for _, one in found) == ["a cat", "black"]

"""Reading the rows of JSON files one by one, in little memory, even from malformed files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from grip_env.tasks.pictures import shown
from grip_env.tasks.rows import Row, to_row

__all__ = ["read_lines", "read_list"]

_SPACE = re.compile(r"[ \t\r\n]*")
_MARKS = re.compile(r'["{}\[\]]|\\.?', re.DOTALL)  # a backslash is matched with the character it escapes
_DEPTH = {"{": 1, "[": 1, "}": -1, "]": -1}
_SEPARATOR = re.compile(r"[ \t\r\n,\]}]")


class _Parser:
    """A JSON parser that records duplicate keys.

    Python's own parser silently takes the last value of such a key.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        # rows need no integers, and int takes quadratic time on long ones
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=float)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                self.notes.append(f"the key {shown(key, 40)} appears twice: keep one of them")
            found[key] = value
        return found

    def parse(self, text: str, start: int) -> tuple[Any, int]:
        """Return the value that begins at ``start``, and the index of its end.

        Raises:
            ValueError: If the text is not JSON; a JSONDecodeError where the position is known.
        """
        self.notes = []
        try:
            return self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("is nested too deeply: a row holds texts, or one list of turns") from None


def _too_long(what: str, limit: int) -> str:
    return f"the {what} is longer than the limit of {limit:,} bytes: is it one row, and is the image given as a path?"


def read_lines(path: Path, limit: int) -> Iterator[Row]:
    """Read a file with one JSON object per line, skipping blank lines.

    Args:
        path: The file, in UTF-8.
        limit: Largest number of bytes of a line; longer lines are faults and never held in memory.
    """
    parser = _Parser()
    with path.open("rb") as file:
        number, begun = 0, False
        while line := file.readline(limit + 2):  # with room for the two bytes of a line end
            number += 1
            place, body = f"{path.name}:{number}", line.rstrip(b"\r\n")
            if len(body) > limit:
                while line and not line.endswith(b"\n"):
                    line = file.readline(limit + 2)
                yield Row(place, faults=[_too_long("line", limit)])
                continue
            if number == 1:
                body = body.removeprefix(b"\xef\xbb\xbf")
            try:
                text = body.decode("utf-8").strip(" \t\r")
            except UnicodeDecodeError as error:
                yield Row(place, faults=[_not_utf8(f"byte 0x{body[error.start]:02x} in column {error.start + 1}")])
                continue
            if text.startswith("[") and not begun:
                fault = "begins with '[', as a list does: call the file .json; a .jsonl file has one object per line"
                yield Row(place, faults=[fault], fatal=True)
                return
            if text:
                begun = True
                yield _parse_line(parser, text, place)


def _not_utf8(where: str) -> str:
    return f"is not UTF-8 ({where}): convert the file, as in `iconv -f LATIN1 -t UTF-8`"


def _parse_line(parser: _Parser, text: str, place: str) -> Row:
    try:
        value, end = parser.parse(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("more after the end of the row", text, end)
    except json.JSONDecodeError as error:
        return Row(place, faults=[f"is not JSON: {_said(error)} in column {error.pos + 1}"])
    except ValueError as error:
        return Row(place, faults=[str(error)])
    return to_row(value, place, parser.notes)


def _said(error: json.JSONDecodeError) -> str:
    return error.msg[:1].lower() + error.msg[1:].removesuffix(" at")


class _Window:
    """A text file of which only a window is in memory.

    The window holds the next ``size`` characters, or a few times as many.
    """

    def __init__(self, file: TextIO, size: int) -> None:
        self._file, self._size = file, size
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.move(0)

    def move(self, end: int) -> None:
        """Advance to ``end``, an index into ``text``; afterwards, ``at`` is the index of the rest."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        if not self.ended and len(self.text) - self.at < self._size:
            more = self._file.read(4 * self._size)
            self.ended = not more
            self.text, self.at = self.text[self.at :] + more, 0

    def peek(self) -> str:
        """Skip white space and return the next character, or "" at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.move(found.end() if found else self.at)
            if self.at < len(self.text) and self.text[self.at] not in " \t\r\n":
                return self.text[self.at]
            if self.ended and self.at >= len(self.text):
                return ""

    def skip_value(self) -> None:
        """Skip a value without parsing it, by its brackets and quotes."""
        if self.text[self.at : self.at + 1] not in ("{", "[", '"'):
            self._skip_to_separator()
            return
        depth, quoted = 0, False
        while True:
            mark = None
            for mark in _MARKS.finditer(self.text, self.at):
                if mark[0] == '"':
                    quoted = not quoted
                elif not quoted:
                    depth += _DEPTH.get(mark[0], 0)
                if depth <= 0 and not quoted:
                    self.move(mark.end())
                    return
            if self.ended:
                self.move(len(self.text))
                return
            half = mark is not None and mark[0] == "\\"  # the escaped character is not in memory yet
            self.move(len(self.text) - half)

    def _skip_to_separator(self) -> None:
        while not (found := _SEPARATOR.search(self.text, self.at)) and not self.ended:
            self.move(len(self.text))
        self.move(found.start() if found else len(self.text))


def read_list(path: Path, limit: int) -> Iterator[Row]:
    """Read a file with one JSON list of objects, item by item.

    The place of a row names the line on which its item begins. A file with one object per line is read as by
    :func:`read_lines`.

    Args:
        path: The file, in UTF-8.
        limit: Largest number of characters of an item.
    """
    parser = _Parser()
    # surrogateescape, so that one bad byte spoils one item and not the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        window = _Window(file, 2 * limit + 64)  # 64, so that no number or null within the limit is cut

        def broken(fault: str) -> Row:
            return Row(f"{path.name}:{window.line}", faults=[fault], fatal=True)

        first = window.peek()
        if first == "{" and (keys := _keys_of_line(parser, window.text[window.at :])) is None:
            yield from read_lines(path, limit)  # one object per line, despite the suffix of the file
            return
        if first and first != "[":
            told = f"is one object with the keys {keys}" if first == "{" and keys else f"begins with {shown(first)}"
            yield broken(f"{told}: a .json file is one list of rows, [{{...}}, {{...}}], or has one row per line")
        if first != "[":
            return
        window.move(window.at + 1)
        number, separator = 0, window.peek()
        if separator == "]":
            window.move(window.at + 1)
        while separator != "]":
            if window.peek() in ("]", ""):
                yield broken("expected one more item: is the file complete, and is there a ',' after the last item?")
                return
            number += 1
            yield _parse_item(parser, window, f"{path.name}:{window.line} (item {number})", limit)
            separator = window.peek()
            if separator not in (",", "]"):
                got = f"got {shown(separator)}" if separator else "the file ends"
                yield broken(f"expected ',' or ']' after item {number}, and {got}: is the file complete?")
                return
            window.move(window.at + 1)
        if window.peek():
            yield broken("there is more after the end of the list: the file must be one list")


def _keys_of_line(parser: _Parser, text: str) -> str | None:
    """Return the keys of the object that a text begins with, or ``None`` for JSON lines.

    The text counts as JSON lines if its first line is a complete object that is a row or is followed by more text.
    """
    line = text.partition("\n")[0].strip()
    try:
        value, end = parser.parse(line, 0)
    except ValueError:  # the object continues on the next line
        return ", ".join(shown(key, 20) for key in re.findall(r'^\s*"(\w+)"\s*:', text, re.MULTILINE)[:8])
    rest = text[text.find(line) + len(line) :].strip() or line[end:].strip()
    if rest or "image" in value or "question" in value:
        return None
    return ", ".join(shown(key, 20) for key in list(value)[:8])


def _parse_item(parser: _Parser, window: _Window, place: str, limit: int) -> Row:
    start = window.at
    try:
        value, end = parser.parse(window.text, start)
    except ValueError as error:
        fault = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = window.line + window.text.count("\n", start, error.pos)
            fault = f"is not JSON: {_said(error)} in line {line}"
            # an error at the end of the window need not be an error in the file
            if not window.ended and (error.pos - start > limit or error.msg.startswith("Unterminated")):
                fault = _too_long("item", limit)
        window.skip_value()
        return Row(place, faults=[fault])
    if end - start > limit:
        window.skip_value()  # not by ``end``, which may be the end of the window
        return Row(place, faults=[_too_long("item", limit)])
    raw = window.text[start:end]
    window.move(end)
    bad = None if raw.isascii() else next((letter for letter in raw if "\udc80" <= letter <= "\udcff"), None)
    if bad is not None:
        return Row(place, faults=[_not_utf8(f"byte 0x{ord(bad) - 0xDC00:02x}")])
    return to_row(value, place, parser.notes)

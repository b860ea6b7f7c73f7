"""Extraction of the user's last turn from a chat of several turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from grip_env.vlms.chat_templates import render_chat

if TYPE_CHECKING:
    from grip_env.vlms.families.base import Family

__all__ = ["last_turn"]

_ASKED, _ANSWERED, _LAST = "qzone", "qztwo", "qzthree"  # words that occur in no template


def last_turn(family: Family, ids: Sequence[int], known: Sequence[int]) -> str | None:
    """Return the user's last turn in a part of a chat that contains marks between turns.

    A turn is found if other turns come before it, or if its answer has begun. The marks are read from chats that
    the family's template writes. If it marks turns with plain words, such as "USER:", a text that contains such a mark
    counts as two turns.

    Args:
        family: The family with its tokenizer and chat template.
        ids: The part of the chat after its image, or before it.
        known: The same part of a prompt without a question; it holds the text that the template adds next to an image.

    Returns:
        The text of the turn, or ``None`` if nothing marks a turn.
    """
    starts, answers, end = _marks(family)
    if not starts:
        return None
    text = str(family.tokenizer.decode(list(ids), skip_special_tokens=False))
    body = _without_end(text, end)
    found = max((body.rfind(mark) + len(mark) for mark in starts if mark in body), default=None)
    special = any(token in answers for token in family.tokenizer.all_special_tokens)
    if found is None:
        # a mark in plain words may be part of a single question, unless its prompt goes on behind it
        begun = bool(answers.strip()) and answers.strip() in body and (special or body == text)
        if not begun:
            return None
        found = 0  # a single turn whose answer has begun
    said = body[found:]
    mark = answers if answers in said else answers.strip()
    said = said.split(mark)[0] if mark and mark in said else said
    frame = _without_end(str(family.tokenizer.decode(list(known), skip_special_tokens=False)), end)
    said = said.removeprefix(frame)
    return said[: len(said) - len(_common_end(said, frame))].strip()


def _without_end(text: str, end: str) -> str:
    """Strip from a text the longest prefix of ``end`` that it ends with.

    Prompts may be written without the beginning of the answer.
    """
    for length in range(len(end), 0, -1):
        if text.endswith(end[:length]):
            return text[: len(text) - length]
    return text


def _marks(family: Family) -> tuple[list[str], str, str]:
    """Return the marks before later user turns, before answers, and at the end of every prompt."""
    known = _MARKS.get(family)
    if known is None or known[0] != getattr(family.processor, "chat_template", None):
        known = _MARKS[family] = getattr(family.processor, "chat_template", None), _read_marks(family)
    return known[1]


_MARKS: WeakKeyDictionary[Family, tuple[object, tuple[list[str], str, str]]] = WeakKeyDictionary()


def _read_marks(family: Family) -> tuple[list[str], str, str]:
    chat = _chat(family, [("user", _ASKED), ("assistant", _ANSWERED), ("user", _LAST)])
    if chat is None:
        return [], "", ""
    answers, start, end = chat[_ASKED], chat[_ANSWERED], chat[_LAST]
    twice = _chat(family, [("user", _ASKED), ("user", _LAST)]) or {}
    starts = [start]
    # two user turns in a row, if their mark differs from that of an answer
    if _common_end(start, twice.get(_ASKED, "")).strip():
        starts.append(twice[_ASKED])
    return [mark for mark in starts if mark.strip()], answers, end


def _chat(family: Family, turns: Sequence[tuple[str, str]]) -> dict[str, str] | None:
    """Return the template's text after each turn of a chat about an image.

    It is ``None`` if the template does not support such chats.
    """
    template = getattr(family.processor, "chat_template", None)
    if template is None:
        return None
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": turns[0][1]}]
    try:
        text = render_chat(family.tokenizer, template, messages)
    except Exception:  # a template may raise anything
        return None
    # as decoded from tokens, which may change white space
    text = family.tokenizer.decode(family.tokenizer(text, add_special_tokens=False)["input_ids"])
    behind: dict[str, str] = {}
    for (_, said), (_, following) in zip(turns, [*turns[1:], ("", "")], strict=True):
        if text.count(said) != 1:
            return None
        rest = text.split(said)[1]
        behind[said] = rest.split(following)[0] if following else rest
    return behind


def _common_end(left: str, right: str) -> str:
    """Return the longest common suffix."""
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return left[len(left) - length :]

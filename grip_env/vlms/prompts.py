"""Tokenization of questions and answers, with a placeholder for each visual token."""

from __future__ import annotations

from collections.abc import Sequence

from grip_env.tasks.base import Example
from grip_env.vlms.families.base import Family, Picture

__all__ = ["prompt_ids", "prompt_texts"]


def prompt_texts(family: Family, examples: Sequence[Example], pictures: Sequence[Picture]) -> list[str]:
    """Return the text of each prompt with its image placeholders.

    Raises:
        ValueError: If a question contains an image placeholder.
    """
    texts = []
    for example, picture in zip(examples, pictures, strict=True):
        prompt = family.prompt(example.question)
        if prompt.count(family.marker) != 1:
            raise ValueError(
                f"a prompt must hold exactly one image placeholder {family.marker!r}, and the one of the "
                f"question {example.question!r} holds {prompt.count(family.marker)}: ask about one image, "
                "without placeholders in the question"
            )
        texts.append(prompt.replace(family.marker, picture.text))
    return texts


def prompt_ids(
    family: Family, prompts: list[str], answers: list[str] | None, pictures: Sequence[Picture]
) -> tuple[list[list[int]], list[int]]:
    """Return the ids of each prompt with its answer, and the number of ids of the answer.

    There is one image token for each visual token.

    Args:
        family: The family with its tokenizer and image token.
        prompts: Texts from :func:`prompt_texts`.
        answers: One answer for each prompt; ``None`` leaves answers out.
        pictures: One encoded image for each prompt.

    Raises:
        ValueError: If an answer has no tokens or contains an image placeholder.
    """
    tokenizer, image = family.tokenizer, family.image_token_id
    special = family.adds_special_tokens(prompts[0])
    starts = tokenizer(prompts, add_special_tokens=special)["input_ids"]
    if answers is None:
        return [_expand(row, image, picture.runs) for row, picture in zip(starts, pictures, strict=True)], [
            0 for _ in starts
        ]
    texts = [
        prompt + ("" if prompt[-1:].isspace() else " ") + answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    wholes = tokenizer(texts, add_special_tokens=special)["input_ids"]
    rows, lengths = [], []
    for start, whole, answer, picture in zip(starts, wholes, answers, pictures, strict=True):
        shared = 0
        while shared < min(len(start), len(whole)) and start[shared] == whole[shared]:
            shared += 1
        if shared == len(whole) or not answer.strip():
            raise ValueError(f"the answer {answer!r} has no tokens: give a non-empty answer")
        if whole.count(image) != len(picture.runs):
            raise ValueError(f"the answer {answer!r} holds an image placeholder: give an answer in words")
        rows.append(_expand(whole, image, picture.runs))
        lengths.append(len(whole) - shared)
    return rows, lengths


def _expand(ids: list[int], image: int, runs: Sequence[int]) -> list[int]:
    """Repeat the i-th image token of a sequence ``runs[i]`` times."""
    counts = iter(runs)
    return [token for token in ids for _ in range(next(counts) if token == image else 1)]

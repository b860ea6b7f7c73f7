"""Chat templates are rendered as transformers does, and stopped where they never end."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from grip_env.tasks.base import Example
from grip_env.vlms.chat_templates import render_chat
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.vlms import tiny_models

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = j %}{% endfor %}{% endfor %}",
    "{% macro again(n) %}{% for i in range(50) %}{{ again(n + 1) if n < 50 }}{% endfor %}{% endmacro %}{{ again(0) }}",
)


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_text_is_that_of_transformers(kind: str) -> None:
    _, processor = tiny_models.build(kind)
    found = render_chat(processor.tokenizer, processor.chat_template, MESSAGES)
    assert found == processor.apply_chat_template(MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize("template", ENDLESS)
def test_templates_that_never_end_are_refused(template: str) -> None:
    model, processor = tiny_models.build("llava")
    before = sys.gettrace()
    with pytest.raises(ValueError, match=r"chat template runs more than 1,000,000 lines .* never to end"):
        render_chat(processor.tokenizer, template, MESSAGES)
    assert sys.gettrace() is before
    processor.chat_template = template + processor.chat_template
    vlm = HuggingFaceVLM(model, processor)
    with pytest.raises(ValueError, match="seems never to end"):
        vlm.encode([Example(tiny_image(), "what is it?", "red", "color")])


def test_what_a_template_raises_itself_is_passed_on() -> None:
    _, processor = tiny_models.build("llava")
    with pytest.raises(Exception, match="only one turn"):
        render_chat(processor.tokenizer, "{{ raise_exception('only one turn') }}", MESSAGES)


def tiny_image() -> Any:
    import numpy as np

    return np.zeros((32, 32, 3), dtype=np.uint8)

"""Invented pictures: arrays of any shape and kind, pictures of Pillow of any mode, files with any fault."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grip_env.tasks.base import Example
from grip_env.tasks.pictures import PictureError, as_pixels, read_picture
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fuzz import fuzzed

SIDES = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 30, 101, 450])
ARRAYS = st.tuples(
    st.lists(SIDES, max_size=4),
    st.sampled_from(["u1", "u2", "i1", "i4", "i8", "?", "f2", "f4", "f8", "c8", "O", "U3", "M8[s]", ">u2"]),
    st.sampled_from([0, 1, 3, 127]),
).filter(lambda given: np.prod(given[0], dtype=float) < 1e6)
MODES = [
    "1",
    "L",
    "P",
    "PA",
    "LA",
    "La",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
]
PICTURES = st.tuples(
    st.sampled_from(MODES),
    st.tuples(SIDES, SIDES),
    st.sampled_from([None, 0, 3, b"", b"\x00\xff", (1, 2, 3), "red"]),
    st.sampled_from([None, 0, 3, 6, 9, "6"]),
)
HEADS = [
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"\xff\xd8\xff\xe1",
    b"GIF89a",
    b"RIFF....WEBP",
    b"BM",
    b"II*\0",
    b"MM\0*",
]
KINDS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]


def check(pixels: np.ndarray) -> None:
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.size


@fuzzed
@given(given_array=ARRAYS)
def test_arrays(given_array: tuple[list[int], str, int]) -> None:
    shape, kind, value = given_array
    try:
        found = as_pixels(np.full(shape, value, kind) if kind != "M8[s]" else np.zeros(shape, kind))
    except PictureError:
        return
    check(found)


@fuzzed
@given(picture=PICTURES)
def test_pictures_of_pillow(picture: tuple[str, tuple[int, int], Any, Any]) -> None:
    mode, size, transparency, orientation = picture
    image = Image.new(mode, size)
    if transparency is not None:
        image.info["transparency"] = transparency
    if orientation is not None:
        image.getexif()[0x0112] = orientation
    try:
        found = as_pixels(image)
    except PictureError:
        return
    check(found)


@fuzzed
@given(
    kind=st.sampled_from(KINDS),
    cut=st.integers(0, 400),
    place=st.integers(0, 400),
    spoilt=st.binary(max_size=6),
    head=st.sampled_from([b"", *HEADS]),
)
def test_files(kind: str, cut: int, place: int, spoilt: bytes, head: bytes) -> None:
    file = io.BytesIO()
    Image.effect_noise((20, 10), 50).save(file, kind)
    data = file.getvalue()
    data = head + data[:place] + spoilt + data[place + len(spoilt) :]
    for given_bytes in (data, data[:-cut] if cut else head + spoilt):
        with contextlib.suppress(PictureError):
            check(read_picture(given_bytes, 10_000))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(given_bytes))
        except Exception:  # Pillow's own door
            continue
        with contextlib.suppress(PictureError):
            check(as_pixels(image, max_pixels=10_000))


@fuzzed
@given(
    image=st.none() | st.text(max_size=3) | st.integers() | st.lists(st.integers(), max_size=3) | st.binary(max_size=9)
)
def test_what_is_no_picture_is_named_by_the_model(image: Any, random_vlm: HuggingFaceVLM) -> None:
    with pytest.raises(ValueError, match=r"^the image of pets:1 "):
        random_vlm.encode([Example(image, "q?", "a", key="pets:1")])

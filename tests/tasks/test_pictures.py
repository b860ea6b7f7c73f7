"""One picture, one set of pixels, whatever door it comes through."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import grip_env
from agents.pruner import Pruner
from grip_env.tasks.base import Example
from grip_env.tasks.files import FileTask
from grip_env.tasks.pictures import PictureError, as_pixels, read_picture
from grip_env.vlms.huggingface import HuggingFaceVLM
from tests.fakes import FakeTask
from tests.vlms.tiny_models import FAMILIES, build

RED, BLUE = (200, 10, 20), (10, 30, 220)


def halves(height: int, width: int, top: bool = False) -> np.ndarray:
    """Return a picture whose left (or top) half is red and whose other half is blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:] = BLUE
    if top:
        pixels[: height // 2] = RED
    else:
        pixels[:, : width // 2] = RED
    return pixels


def upright(name: str) -> Image.Image:
    return Image.fromarray(halves(24, 36))


def turned(name: str) -> Image.Image:
    """Lies on its side in the file, with a note that says so."""
    image = Image.fromarray(halves(24, 36)).transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    return image


def see_through(name: str) -> Image.Image:
    pixels = np.dstack([halves(24, 36), np.full((24, 36), 255, np.uint8)])
    pixels[:, 18:] = (0, 0, 0, 0)  # black below what is not seen
    return Image.fromarray(pixels, "RGBA")


def palette(name: str) -> Image.Image:
    image = Image.fromarray(halves(24, 36)).quantize(8)
    image.info["transparency"] = image.getpixel((30, 10))
    return image


def deep(name: str) -> Image.Image:
    return Image.fromarray((np.arange(24 * 36, dtype=np.uint16) * 75).reshape(24, 36))


def cmyk(name: str) -> Image.Image:
    return Image.fromarray(halves(24, 36)).convert("CMYK")


def one_bit(name: str) -> Image.Image:
    return Image.fromarray(halves(24, 36)).convert("1")


def grey_alpha(name: str) -> Image.Image:
    return see_through(name).convert("LA")


def large(name: str) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 1700, 3), np.uint8))


def slim(name: str) -> Image.Image:
    return Image.fromarray(halves(2, 50))


def narrow(name: str) -> Image.Image:
    return Image.fromarray(halves(7, 700))


def banner(name: str) -> Image.Image:
    return Image.fromarray(halves(25, 2500))


def deep_and_clear(name: str) -> Image.Image:
    image = deep(name)
    image.info["transparency"] = 0
    return image


KINDS: dict[str, tuple[Callable[[str], Image.Image], str]] = {
    "upright": (upright, "png"),
    "turned": (turned, "jpg"),
    "turned png": (turned, "png"),
    "see-through": (see_through, "png"),
    "see-through webp": (see_through, "webp"),
    "palette": (palette, "png"),
    "16 bits": (deep, "png"),
    "16 bits tiff": (deep, "tiff"),
    "cmyk": (cmyk, "jpg"),
    "one bit": (one_bit, "png"),
    "grey and alpha": (grey_alpha, "png"),
    "large": (large, "png"),
    "slim": (slim, "png"),
    "narrow": (narrow, "png"),
    "banner": (banner, "png"),
    "16 bits, one of them clear": (deep_and_clear, "png"),
}


@pytest.fixture(scope="module")
def seeing(random_vlm: HuggingFaceVLM) -> tuple[Pruner, list[np.ndarray]]:
    """A pruner, and a list of the pictures that its image processor was given."""
    given: list[np.ndarray] = []
    vlm = HuggingFaceVLM(random_vlm.model, random_vlm.processor, "seeing")
    whole = vlm.family.pixels

    def spy(images: Any) -> Any:
        given.extend(images)
        return whole(images)

    vlm.family.pixels = spy  # type: ignore[method-assign]
    return Pruner(vlm, lambda vlm, encoded, kept, generator: encoded.token_mask), given


class One(FakeTask):
    """A task of one picture."""

    def __init__(self, image: Any) -> None:
        super().__init__()
        self.image = image

    def example(self, split: str, index: int) -> Example:
        return Example(self.image, "what is it?", "a circle", key="the one")


@pytest.mark.parametrize("kind", KINDS)
def test_every_door_gives_the_model_the_same_pixels(
    kind: str, tmp_path: Path, seeing: tuple[Pruner, list[np.ndarray]]
) -> None:
    pruner, given = seeing
    make, suffix = KINDS[kind]
    path = tmp_path / f"a.{suffix}"
    image = make(kind)
    image.save(path, **({"exif": image.getexif()} if kind.startswith("turned") else {}))
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"image": path.name, "question": "q?", "answer": "a", "split": "test"})
    )
    example = FileTask(tmp_path / "a.jsonl").example("test", 0)
    given.clear()
    pruner.vlm.encode([example])
    pruner.encode([Image.open(path)], ["q?"])
    pruner.encode([read_picture(path, 10**7)], ["q?"])  # as the answer command does
    pruner.answers([Image.open(path)], ["q?"], budget=1.0, max_new_tokens=1)
    pruner(Image.open(path), "q?", 1.0, 1)
    pruner.vlm.encode([Example(Image.open(path), "q?", "a")])  # type: ignore[arg-type]
    env: Any = grip_env.TokenSelectionEnv(vlm=pruner.vlm, task=One(Image.open(path)), max_tokens=144)
    env.reset(seed=0)
    assert len(given) >= 7
    for pixels in given:
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, example.image)
    # what there is to see, known without reading any file
    expected = {"turned": halves(24, 36), "turned png": halves(24, 36), "upright": halves(24, 36)}.get(kind)
    if expected is not None:
        assert abs(example.image.astype(int) - expected).max() < (70 if suffix == "jpg" else 1)
    if kind.startswith("see-through"):
        assert (example.image[:, 20:] == 255).all()
    if kind == "16 bits, one of them clear":
        assert (example.image[0, 0] == 255).all()
    elif kind.startswith("16 bits"):
        assert np.array_equal(example.image[..., 0], ((np.arange(24 * 36) * 75) // 256).reshape(24, 36))
    if kind == "large":
        assert example.image.shape == (361, 1024, 3)
    if kind == "slim":
        assert np.array_equal(example.image, halves(2, 50).repeat(4, 0).repeat(4, 1))


def test_a_picture_that_lies_on_its_side_is_answered_as_if_it_stood() -> None:
    pruner = Pruner.load("tiny")
    task = grip_env.SceneTask()
    answers = []
    for index in range(3):
        example = task.example("test", index)
        image = Image.fromarray(example.image).transpose(Image.Transpose.ROTATE_90)
        image.getexif()[0x0112] = 6
        file = io.BytesIO()
        image.save(file, "PNG", exif=image.getexif())
        file.seek(0)
        lying = pruner(Image.open(file), example.question, 1.0)
        assert lying.text == pruner(example.image, example.question, 1.0).text
        answers.append(lying.text == example.answer)
    assert sum(answers) >= 2


def test_arrays_are_taken_where_there_is_no_doubt() -> None:
    picture = halves(20, 30)
    grey = np.arange(600, dtype=np.uint8).reshape(20, 30)
    three = np.repeat(grey[:, :, None], 3, 2)
    clear = np.dstack([picture, np.full((20, 30), 255, np.uint8)])
    assert as_pixels(picture) is picture
    for given, expected in (
        (grey, three),
        (grey[:, :, None], three),
        (grey[None], three),
        (clear, picture),
        (picture.transpose(2, 0, 1), picture),
        (clear.transpose(2, 0, 1), picture),
        (torch.tensor(picture), picture),
        (torch.tensor(picture).permute(2, 0, 1), picture),
        (grey.astype(np.uint16) * 256 + 255, three),
        (grey > 100, np.where(three > 100, 255, 0)),
        (picture[::-1], picture[::-1]),
        (halves(3, 50), halves(3, 50).repeat(3, 0).repeat(3, 1)),  # rows, columns, colours, as documented
        (halves(4, 50), halves(4, 50).repeat(2, 0).repeat(2, 1)),
        (halves(1, 1), np.full((8, 8, 3), BLUE)),
    ):
        found = as_pixels(given)
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected)
    hidden = clear.copy()
    hidden[..., 3] = 0
    assert (as_pixels(hidden) == 255).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 50, 4), np.uint8), "of which the first or the last may be colours"),
        (np.zeros((4, 50, 1), np.uint8), "of which the first or the last may be colours"),
        (np.zeros((20, 30, 2), np.uint8), r"has the shape \(20, 30, 2\): give uint8 RGB"),
        (np.zeros((2, 20, 30, 3), np.uint8), "has the shape"),
        (np.zeros(5, np.uint8), "has the shape"),
        (np.zeros((0, 30, 3), np.uint8), "has 30 x 0 pixels|no pixel"),
        (np.zeros((20, 30, 3)), "has values of float64, whose range is not known"),
        (np.zeros((20, 30, 3), np.int64), "has values of int64"),
        (np.zeros((20, 30), "complex64"), "has values of complex64"),
        (np.full((20, 30, 3), None), "has values of object"),
        (np.zeros((8, 900, 3), np.uint8), "one side may be at most 100 times the other"),
        (Image.new("RGB", (900, 8)), "one side may be at most 100 times the other"),
        (Image.new("F", (9, 9)), "has 32-bit pixels"),
        ("cat.png", "is a path"),
        (Path("cat.png"), "is a path"),
        (None, "is of type NoneType"),
        ([[1, 2]], "is of type list"),
    ],
)
def test_what_is_no_picture_is_refused(given: Any, message: str, random_vlm: HuggingFaceVLM) -> None:
    with pytest.raises(PictureError, match=message):
        as_pixels(given)
    with pytest.raises(ValueError, match=f"the image of cats:3 .*({message})"):
        random_vlm.encode([Example(given, "q?", "a", key="cats:3")])


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (7, 700), (8, 800), (25, 2500), (50, 5000), (5, 5), (1000, 1500)])
def test_what_is_resized_stays_as_it_is_and_passes_the_check_of_its_sides(size: tuple[int, int]) -> None:
    """A data file's pictures are resized when an example is made, and come to the model as arrays."""
    once = as_pixels(np.zeros((*size, 3), np.uint8))
    assert max(once.shape) <= 1024
    assert as_pixels(once) is once


SIZES = [(1, 1), (4, 50), (8, 400), (400, 8), (8, 800), (16, 1000), (1000, 16), (31, 57)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_pictures_of_any_size_are_seen_by_every_family(kind: str) -> None:
    """Half red and half blue stays so: what each half gives is what a picture of that colour alone gives there."""
    model, processor = build(kind)
    if kind == "gemma3":
        model.config.text_config.sliding_window = 4096
    vlm = HuggingFaceVLM(model, processor, kind)
    for size in SIZES:
        encoded = vlm.encode([Example(halves(*size, top=size[0] > size[1]), "what is it?", "yes")])
        count = encoded.tokens.shape[1]
        assert encoded.positions.shape == (1, count, 2)
        assert bool(((encoded.positions >= 0) & (encoded.positions <= 1)).all())
        if encoded.cells is not None:
            assert encoded.cells.shape == (1, count, 2)
        assert bool(vlm.score(encoded, encoded.token_mask[:, None]).log_likelihood.isfinite().all()), size


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("size", [(4, 50), (50, 3), (1, 8)])
def test_no_side_of_a_picture_is_taken_for_its_colours(kind: str, size: tuple[int, int]) -> None:
    """A processor that took a side for the colours would see another picture than the same one magnified by hand."""
    model, processor = build(kind)
    if kind == "gemma3":
        model.config.text_config.sliding_window = 4096
    vlm = HuggingFaceVLM(model, processor, kind)
    small = halves(*size, top=size[0] > size[1])
    times = -(-8 // min(size))
    by_hand = np.asarray(Image.fromarray(small).resize((size[1] * times, size[0] * times), Image.Resampling.NEAREST))
    one, other = (vlm.encode([Example(image, "q?", "a")]).tokens for image in (small, by_hand))
    torch.testing.assert_close(one, other)
    red = vlm.encode([Example(np.full_like(by_hand, 255) * 0 + np.uint8(RED), "q?", "a")]).tokens
    assert not torch.allclose(one, red)


def scans(count: int, side: int) -> bytes:
    """Return a progressive JPEG whose one scan of details is there ``count`` times."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    Image.fromarray(noise).save(file, "JPEG", progressive=True, quality=50)
    data = file.getvalue()
    places = [place for place in range(len(data) - 1) if data[place : place + 2] == b"\xff\xda"]
    last = data[places[-1] : -2]
    return data[:-2] + last * count + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path: Path) -> None:
    bomb = scans(3000, 200)
    for open_it in (lambda: read_picture(bomb, 10**7), lambda: as_pixels(Image.open(io.BytesIO(bomb)))):
        with pytest.raises(PictureError, match=r"is a JPEG of 3,0\d\d scans, more than the limit of 100"):
            open_it()
    assert read_picture(scans(20, 64), 10**7).shape == (64, 64, 3)
    header = struct.pack(">HH", 6000, 6000)
    wide = scans(60, 64)
    place = wide.index(b"\xff\xc2") + 5  # height and width of the frame
    with pytest.raises(PictureError, match="more than the limit of 27"):
        read_picture(wide[:place] + header + wide[place + 4 :], 10**8)


def test_scans_of_every_file_that_holds_a_jpeg_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    pictures = [Image.effect_noise((64, 64), 50) for _ in range(2)]
    pictures[0].save(file, "MPO", save_all=True, append_images=pictures[1:])
    data = file.getvalue()
    first = data.index(b"\xff\xd9")
    scan = data[data.index(b"\xff\xda") : first]
    with pytest.raises(PictureError, match=r"is a JPEG of 1\d\d scans"):
        read_picture(data[:first] + scan * 110 + data[first:], 10**7)
    assert read_picture(data, 10**7).shape == (64, 64, 3)
    pictures[0].save(tmp_path / "0.tiff", compression="jpeg")
    assert read_picture(tmp_path / "0.tiff", 10**7).shape == (64, 64, 3)
    monkeypatch.setattr("grip_env.tasks.pictures._MOST_SCANS", 0)
    with pytest.raises(PictureError, match="is a JPEG of 1 scans"):
        read_picture(tmp_path / "0.tiff", 10**7)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_turned_upright_once_whatever_opens_it(
    orientation: int, mode: str, compression: str | None, tmp_path: Path
) -> None:
    values = np.zeros((40, 60), dtype=np.uint16 if mode == "I;16" else np.uint8)
    values[:10, :20] = 60_000 if mode == "I;16" else 200
    image = Image.fromarray(values)
    image = image if mode in ("I;16", "L") else image.convert(mode)
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(tmp_path / "t.tif", exif=exif, compression=compression)
    expected = read_picture(tmp_path / "t.tif", 10**8)
    turned = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.T, 6: values[::-1].T,
        7: values[::-1, ::-1].T, 8: values[:, ::-1].T,
    }  # fmt: skip
    np.testing.assert_array_equal(expected[:, :, 0] > 100, turned[orientation] > 0)
    data = io.BytesIO((tmp_path / "t.tif").read_bytes())
    loaded = Image.open(data)
    loaded.load()
    for opened in (Image.open(tmp_path / "t.tif"), Image.open(data), loaded):
        np.testing.assert_array_equal(as_pixels(opened), expected)


def test_data_after_a_jpeg_are_not_taken_for_scans() -> None:
    """As in motion photos: a film follows the picture. The picture itself is checked as before."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    comment = b"\xff\xd9" + b"\xff\xda" * 200
    Image.fromarray(pixels).save(file, "JPEG", comment=comment, restart_marker_blocks=1)
    data = file.getvalue()
    tail = np.random.default_rng(0).integers(0, 256, 20_000_000, np.uint8).tobytes() + b"\xff\xda" * 1000
    assert (read_picture(data + tail, 10**7) == read_picture(data, 10**7)).all()
    assert as_pixels(Image.open(io.BytesIO(data + tail))).shape == (64, 64, 3)
    for bomb in (scans(5000, 200), scans(5000, 200)[:-2], hidden(scans(5000, 200))):
        with pytest.raises(PictureError, match=r"is a JPEG of 5,0\d\d scans, more than the limit of 100"):
            read_picture(bomb + tail, 10**7)


def hidden(bomb: bytes) -> bytes:
    """Return a JPEG with odd bytes between its scans, which decoders skip: reserved markers, lengths of 0, fillers."""
    place = bomb.index(b"\xff\xda", bomb.index(b"\xff\xda") + 2)
    return bomb[:place] + b"\xff\xfe\x00\x00" + b"\xff\x02\xff\xff\x00" + b"\xff\xff\xff" + bomb[place:]

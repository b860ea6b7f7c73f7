"""Reading untrusted pictures.

Every fault of a file is raised as a :class:`PictureError`, never issued as a warning.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "PictureError",
    "as_pixels",
    "digest",
    "locate",
    "read_picture",
    "resize",
    "shown",
]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""File formats that are read, recognised by content and not by suffix.

Pillow supports more formats, but some of them start other programs.
"""

MAX_PIXELS = 50_000_000
"""Default limit on the number of pixels of a picture."""

MAX_SIDE = 1024
"""Default limit on the longer side, in pixels, of the pictures that models receive."""

_SLIMMEST = 100
"""Largest aspect ratio: processors that resize the short side to a fixed length would blow up the long one."""
_SMALLEST = 8
"""Shortest side, in pixels, that a processor receives: sides of 1, 3 or 4 are taken for colour channels."""
_MOST_SCANS = 100
"""Largest number of scans in a JPEG file; encoders write about ten."""
_MOST_SCANNED = 1_000_000_000
"""Largest number of pixels over all scans of a JPEG file; a decoder takes about 10 seconds for this many."""
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
"""Marker in a JPEG that begins a segment or ends the picture; in the data of a scan are only others."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+=*\s*")
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
"""Beginnings of PNG, JPEG, GIF, WebP and TIFF files in base64."""
_CHANNELS = (1, 3, 4)
"""Possible numbers of colour channels: grey, RGB, RGBA."""


class PictureError(ValueError):
    """Error for a picture that cannot be used.

    The message completes a sentence that begins with the name of the picture.
    """


def shown(text: str, most: int = 80) -> str:
    """Quote ``text`` for a message.

    Returns:
        The text on one line, without control characters, cut to about ``most`` characters.
    """
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def locate(folder: Path, name: str) -> Path:
    """Return the path of the file that a data file in ``folder`` calls ``name``.

    Raises:
        PictureError: If there is no such file, or it is not inside ``folder`` (links followed).
    """
    encoded = len(name) > 255 or (len(name) > 31 and name.startswith(_BASE64_STARTS))
    if name.startswith("data:") or (encoded and _BASE64.fullmatch(name)):
        raise PictureError("is the image itself as text (base64): save it beside the data file and give its path")
    if "://" in name:
        raise PictureError("is an address, not a file: save the image beside the data file and give its path")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        raise PictureError(f"is an absolute path: keep images in {folder} and write paths relative to it")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise PictureError(f"leads out of {folder}: move or copy the image into that folder")
        path.stat()
    except FileNotFoundError:
        hint = " (folders are separated by '/')" if "\\" in name else ""
        raise PictureError(f"does not exist in {folder}{hint}") from None
    except OSError as error:
        raise PictureError(f"cannot be read ({error.strerror or error})") from None
    except RuntimeError:  # how Python before 3.13 reports a link that leads to itself
        raise PictureError("cannot be read (a symbolic link that leads to itself)") from None
    except PictureError:
        raise
    except ValueError as error:
        raise PictureError(f"is not a path ({error})") from None
    return path


def read_picture(source: Path | bytes, max_pixels: int) -> np.ndarray:
    """Decode the first frame of a picture, upright, over white where it is transparent.

    Args:
        source: A file, or the contents of one.
        max_pixels: Largest number of pixels (height x width) allowed; Pillow's own limit applies as well.

    Returns:
        RGB, uint8 (height, width, 3). Grey values of 16 bits keep their upper eight.

    Raises:
        PictureError: If anything is wrong with the picture.
    """
    if isinstance(source, bytes):
        if not source:
            raise PictureError("is empty (0 bytes)")
        return _decode(io.BytesIO(source), max_pixels)
    try:
        status = source.stat()
        if stat.S_ISDIR(status.st_mode):
            raise PictureError("is a folder: give the path of an image")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
            raise PictureError("is not a regular file")
        if not status.st_size:
            raise PictureError("is empty (0 bytes)")
        with source.open("rb") as file:
            return _decode(file, max_pixels)
    except FileNotFoundError:
        raise PictureError("does not exist any more") from None
    except OSError as error:
        raise PictureError(f"cannot be read ({error.strerror or error})") from None


def _decode(file: BinaryIO, max_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as damaged EXIF, which does not affect the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                _check_size(*image.size, max_pixels)
                _check_scans(image, file)
                image.load()
                return _rgb(image)
    except PictureError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise PictureError(f"is too large ({error}): save it smaller") from None
    except UnidentifiedImageError:
        raise PictureError(f"is not an image: expected the contents of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise all sorts of errors on damaged files, even SyntaxError
        raise PictureError(f"is damaged ({_reason(error)}): save it again") from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise PictureError(f"has {width} x {height} pixels, more than the limit of {max_pixels:,}: save it smaller")
    if min(width, height) < 1 or max(width, height) > _SLIMMEST * min(width, height):
        raise PictureError(f"has {width} x {height} pixels: one side may be at most {_SLIMMEST} times the other")


def _check_scans(image: Image.Image, file: BinaryIO) -> None:
    """Reject a progressive JPEG with too many scans.

    The decoder goes over all pixels once per scan, and a file may hold thousands of scans.
    """
    parts = 1
    if image.format == "TIFF" and "jpeg" in str(image.info.get("compression")):
        tags: Any = getattr(image, "tag_v2", {})
        offsets = [tags.get(number, ()) for number in (273, 324)]  # offsets of strips and tiles, each a JPEG
        parts = max([1, *(len(found) for found in offsets if isinstance(found, tuple))])
    elif image.format not in ("JPEG", "MPO"):  # MPO: several JPEGs in one file
        return
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    most = min(_MOST_SCANS, _MOST_SCANNED // (image.width * image.height)) * parts
    scans = data.count(b"\xff\xda")  # at least the scans: in the data of a scan, a zero follows each 0xff
    if scans > most and image.format == "JPEG":
        scans = _scans_of_first(data)  # without what follows the picture, such as the film of a motion photo
    if scans > most:
        raise PictureError(
            f"is a JPEG of {scans:,} scans, more than the limit of {most}: save it again, not progressive"
        )


def _scans_of_first(data: bytes) -> int:
    """Return the number of scans of a JPEG up to its end; other data may follow."""
    scans, place = 0, 2
    while found := _MARKER.search(data, place):
        place, marker = found.end(), data[found.end() - 1]
        if marker == 0xD9:  # end of image
            break
        if marker == 0xD8:  # a segment without a length
            continue
        scans += marker == 0xDA
        place += max(2, int.from_bytes(data[place : place + 2], "big"))  # to the data of the scan, or the next segment
    return scans


def as_pixels(image: Any, max_side: int | None = MAX_SIDE, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Convert a picture of any kind to the pixels that models receive.

    The same picture gives the same pixels, whether it comes from a file, from Pillow or as an array.

    Args:
        image: A Pillow image, or an array of any library on the CPU: uint8 RGB (height, width, 3); grey (height, width)
            or (height, width, 1); RGBA (height, width, 4); or channels first, such as (3, height, width), where the
            last axis cannot be the channels. uint16 arrays keep their upper eight bits; in bool arrays, True is white.
        max_side: Larger pictures are shrunk until their longer side has this many pixels; ``None`` keeps their size.
        max_pixels: Largest number of pixels allowed.

    Returns:
        RGB, uint8 (height, width, 3), upright as EXIF says, over white where transparent. A tiny
        picture is magnified; see :func:`resize`.

    Raises:
        PictureError: If ``image`` is not a picture, is too large or too slim, or its layout is ambiguous.
    """
    if isinstance(image, Image.Image):
        _check_size(*image.size, max_pixels)
        try:
            if getattr(image, "fp", None) is not None:
                _check_scans(image, image.fp)  # type: ignore[attr-defined] # of files that are open but not read
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as for files
                _load(image)
                pixels = _rgb(image)
        except PictureError:
            raise
        except Exception as error:  # a file that Pillow has opened but not decoded
            raise PictureError(f"is damaged ({_reason(error)}): save it again") from None
    else:
        pixels = _rgb_of_array(image)
        _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    return resize(pixels, max_side)


def _load(image: Image.Image) -> None:
    """Decode a picture that Pillow has opened, where a TIFF is turned upright as well."""
    name = getattr(image, "filename", None)
    if image.format == "TIFF" and name:
        # Pillow maps an uncompressed file into memory, in rows as long as those of the upright picture: pixels of a
        # picture on its side then lie anywhere. Without a name it reads the file.
        image.filename = ""  # type: ignore[attr-defined]
    try:
        image.load()
    finally:
        if name:
            image.filename = name  # type: ignore[attr-defined]


def _rgb_of_array(image: Any) -> np.ndarray:
    """Convert an array to uint8 RGB of the same height and width."""
    wanted = "give uint8 RGB of shape (height, width, 3), or a picture of Pillow"
    if isinstance(image, str | bytes | Path) or not hasattr(image, "__array__"):
        given = "a path" if isinstance(image, str | bytes | Path) else f"of type {type(image).__name__}"
        raise PictureError(f"is {given}: {wanted}")
    try:
        pixels = np.asarray(image.detach() if hasattr(image, "detach") else image)
    except (TypeError, ValueError, RuntimeError) as error:  # such as tensors on a GPU
        raise PictureError(f"cannot be read ({_reason(error)}): {wanted}") from None
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    elif pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise PictureError(f"has values of {pixels.dtype}, whose range is not known: {wanted}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3:
        raise PictureError(f"has the shape {pixels.shape}: {wanted}")
    first, last = pixels.shape[0] in _CHANNELS, pixels.shape[2] in _CHANNELS
    if first and last and pixels.shape[2] != 3 and image.ndim == 3:
        raise PictureError(f"has the shape {pixels.shape}, of which the first or the last may be colours: {wanted}")
    if not last:
        if not first:
            raise PictureError(f"has the shape {pixels.shape}: {wanted}")
        pixels = np.moveaxis(pixels, 0, 2)
    if 0 in pixels.shape:
        raise PictureError(f"has the shape {pixels.shape}, no pixel: {wanted}")
    if pixels.shape[2] == 4:
        return _rgb(Image.fromarray(np.ascontiguousarray(pixels), "RGBA"))
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, 2)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _rgb(image: Image.Image) -> np.ndarray:
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not deep:
        raise PictureError("has 32-bit pixels, whose range is not known: save it with 8 bits per channel")
    picture = _upright(image)
    if deep:
        values = np.asarray(picture).astype(np.uint32)
        grey = (values >> 8).astype(np.uint8)
        clear = image.info.get("transparency")  # the value that marks transparent pixels
        if isinstance(clear, int):
            grey[values == clear] = 255
        return np.repeat(grey[:, :, None], 3, 2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")  # RGB alone would show the colours hidden under transparent pixels
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as viewers do: damaged metadata does not make the picture damaged
        return image


def digest(pixels: np.ndarray) -> bytes:
    """Return a 16-byte digest of the pixels of a picture, uint8 (height, width, 3)."""
    hasher = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    hasher.update(np.ascontiguousarray(pixels).data)
    return hasher.digest()


def resize(pixels: np.ndarray, longest: int | None) -> np.ndarray:
    """Shrink a picture with a side above ``longest`` pixels, and magnify a tiny one.

    Resizing the result again leaves it unchanged: pictures of a data file pass through this function twice.
    """
    height, width = pixels.shape[:2]
    most = max(height, width)
    if longest is not None and most > longest:
        least = -(-longest // _SLIMMEST)  # so that rounding does not exceed the largest aspect ratio
        height, width = (max(1, least, round(side * longest / most)) for side in (height, width))
        pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    times = -(-_SMALLEST // min(height, width))
    if longest is not None:
        times = max(1, min(times, longest // max(height, width)))
    return pixels if times == 1 else pixels.repeat(times, 0).repeat(times, 1)

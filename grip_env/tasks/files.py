"""A task on user-provided data: questions about images, read from a file or folder.

All data are checked before the first example is drawn.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from grip_env.tasks.base import Example, check_index
from grip_env.tasks.json_rows import read_lines, read_list
from grip_env.tasks.pictures import MAX_PIXELS, MAX_SIDE, PictureError, digest, locate, read_picture, resize, shown
from grip_env.tasks.rows import SPLITS, Row

__all__ = ["DataError", "Fault", "FileTask", "summary"]


@dataclass(frozen=True)
class Fault:
    """Something wrong with a row."""

    place: str
    """Location of the row, such as "pets.jsonl:3"."""
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class DataError(ValueError):
    """Error for data that cannot be used.

    ``faults`` holds every fault of every row; the message lists them.
    """

    def __init__(self, message: str, faults: tuple[Fault, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


def summary(faults: tuple[Fault, ...]) -> str:
    """Return one line of text per fault."""
    return "\n".join(f"  {fault}" for fault in faults)


@dataclass(frozen=True)
class _Record:
    key: str
    question: str
    answer: str
    family: str
    split: str
    image: Any
    contents: bytes
    """Digest of the image."""

    def order(self) -> bytes:
        """Return the sort key within the split: a digest of all but the record's location."""
        texts = (self.question, self.answer, self.family, self.split)
        return hashlib.blake2b(self.contents + repr(texts).encode(), digest_size=16).digest()


class _Source(Protocol):
    """A source of rows and their images."""

    def rows(self) -> Iterator[Row]: ...

    def picture(self, image: Any) -> Path | bytes: ...


class _JsonFile:
    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit

    def rows(self) -> Iterator[Row]:
        return (read_list if self.path.suffix.lower() == ".json" else read_lines)(self.path, self.limit)

    def picture(self, image: str) -> Path:
        return locate(self.path.parent, image)


class FileTask:
    """Your own images, questions and answers.

    The data are read, checked and decoded once when the task is created. ``example`` decodes its image again, so that
    only the texts stay in memory.

    **Formats.** A ``.jsonl`` file holds one JSON object per line; a ``.json`` file does too, or holds one list of
    objects; a folder is the output of ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` of Hugging Face's
    ``datasets``. A row has "image", "question" and "answer", or "image" and "conversations" as in LLaVA's files: each
    pair of turns ("human", "gpt") becomes a question and its answer, asked without the other turns. One ``<image>`` in
    the first question is removed; any other marker is a fault, since a row has one image. "image" may be a list with
    one item. "family" (results are reported per family) and "split" are optional; other keys are ignored. Texts must be
    strings: a number would lose its notation. Paths are relative to the folder of the data file and must stay inside
    it.

    **Images.** PNG, JPEG, WebP, GIF, BMP and TIFF, recognised by content. Images are rotated as EXIF says, put on white
    where transparent, and reduced to eight bits per channel; only the first of several frames is used.

    **Splits.** The decoded pixels of an image decide whether it is in train (80%), validation (10%) or test (10%). All
    questions about an image, even under another file name, are thus in one split, regardless of the other rows and of
    their order. A "split" in one row applies to all rows with the same image. A ``DatasetDict`` with several datasets
    defines its own splits. With few images a split may be empty. The order within a split depends on the contents alone
    and is as good as shuffled, so that the first examples are a fair sample. JPEG decoders may differ in the last bit
    between versions of Pillow, which moves a JPEG image to a random split; "split" pins it.

    Args:
        path: The file or folder.
        skip_bad: Leave out rows with faults instead of rejecting the data; ``skipped`` lists their faults. A row is
            left out as a whole, with all its turns.
        max_row_bytes: Longest line, or item of a list, that is parsed.
        max_pixels: Largest number of pixels of an image. Pillow's own limit applies as well.
        max_side: Images with a longer side are shrunk when an example is drawn; ``None`` keeps their size. A model
            shrinks its input to its own ``max_side``, which has the same default.
        progress: Show a progress bar when checking takes more than two seconds.

    Attributes:
        name: Name of the file or folder, without its suffix.
        skipped: Faults of the rows that were left out.
        fingerprint: Digest of the contents of all examples; it does not depend on the order of the rows.

    Raises:
        DataError: If the data cannot be read, or rows have faults; the message and ``faults`` list all of them.
            ``example`` raises it if an image has changed since it was checked.
    """

    splits = SPLITS

    def __init__(
        self,
        path: str | PathLike[str],
        skip_bad: bool = False,
        *,
        max_row_bytes: int = 2**20,
        max_pixels: int = MAX_PIXELS,
        max_side: int | None = MAX_SIDE,
        progress: bool = False,
    ) -> None:
        for name, value in (("max_row_bytes", max_row_bytes), ("max_pixels", max_pixels), ("max_side", max_side)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.path = _place(Path(path))
        self.name = self.path.stem or "data"
        self.max_pixels, self.max_side = max_pixels, max_side
        self._source = _source(self.path, max_row_bytes)
        rows, contents = self._check(skip_bad, progress)
        records = sorted(_records(rows, contents), key=_Record.order)
        self._arrange(records)

    def __deepcopy__(self, memo: dict[int, Any]) -> FileTask:
        return self  # it is immutable, and gymnasium.make copies its arguments

    # -- checking --------------------------------------------------------------------------------------------

    def _check(self, skip_bad: bool, progress: bool) -> tuple[list[Row], list[bytes]]:
        """Return the good rows and the digests of their images."""
        from tqdm import tqdm

        found: dict[Any, bytes | PictureError] = {}
        good: list[Row] = []
        faults: list[Fault] = []
        splits: dict[bytes, Row] = {}  # the first row that asks for a split, by image
        stop, count = False, 0
        for row in tqdm(self._rows(), desc="checking data", unit="row", delay=2, disable=not progress):
            count += not row.fatal
            stop |= row.fatal
            if row.image is not None and row.image not in found:
                found[row.image] = self._contents(row.image)
            contents = found.get(row.image)
            if isinstance(contents, PictureError):
                told = f"{shown(row.image)} " if isinstance(row.image, str) else ""
                row.faults.append(f"the image {told}{contents}")
            elif contents is not None and row.split is not None and not row.faults:
                first = splits.setdefault(contents, row)
                if first.split != row.split:
                    row.faults.append(
                        f'its image is in "split" {row.split!r} here and in {first.split!r} at {first.place}: '
                        "an image belongs to one split"
                    )
            faults += [Fault(row.place, fault) for fault in row.faults]
            if not row.faults:
                good.append(row)
        self.skipped = tuple(faults)
        bad = f"{len(faults)} fault{'s' * (len(faults) != 1)}"
        if faults and (stop or not skip_bad):
            way = "fix these rows, or leave them out with --skip-bad (in Python: skip_bad=True)"
            way = "fix the file: nothing after the last of these can be read" if stop else way
            raise DataError(f"{self.path} has {bad}:\n{summary(self.skipped)}\n{way}", self.skipped)
        if not good:
            told = f"no row without a fault:\n{summary(self.skipped)}" if count else "no rows: it is empty"
            raise DataError(f"{self.path} has {told}", self.skipped)
        return good, [contents for contents in (found[row.image] for row in good) if isinstance(contents, bytes)]

    def _arrange(self, records: list[_Record]) -> None:
        self._splits = {split: [record for record in records if record.split == split] for split in SPLITS}
        self.fingerprint = hashlib.blake2b(b"".join(map(_Record.order, records)), digest_size=16).hexdigest()

    def check_texts(self, check: Callable[[str], None], skip_bad: bool = False) -> None:
        """Check all questions and answers against a model.

        Args:
            check: Raises a ValueError for a text that the model cannot process; the message continues a sentence that
                begins with the name of the text.
            skip_bad: Leave out questions with faults, and add the faults to ``skipped``.

        Raises:
            DataError: If there are faults that are not skipped, or no question is left.
        """
        good: list[_Record] = []
        faults: list[Fault] = []
        for record in (record for records in self._splits.values() for record in records):
            found = len(faults)
            for name, text in (("question", record.question), ("answer", record.answer)):
                try:
                    check(text)
                except ValueError as error:
                    faults.append(Fault(record.key, f'"{name}" {error}'))
            if found == len(faults):
                good.append(record)
        if faults and not (skip_bad and good):
            many = f"{len(faults)} fault{'s' * (len(faults) != 1)}"
            way = "fix these rows, or leave them out with --skip-bad (in Python: skip_bad=True)"
            raise DataError(f"{self.path} has {many}:\n{summary(tuple(faults))}\n{way}", tuple(faults))
        if faults:
            self.skipped += tuple(faults)
            self._arrange(sorted(good, key=_Record.order))

    def _rows(self) -> Iterator[Row]:
        try:
            yield from self._source.rows()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise DataError(str(error)) from None

    def _contents(self, image: Any) -> bytes | PictureError:
        try:
            return digest(read_picture(self._source.picture(image), self.max_pixels))
        except PictureError as error:
            return error

    # -- the task --------------------------------------------------------------------------------------------

    def size(self, split: str) -> int:
        """Return the number of examples in ``split``."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of task {self.name!r}: choose one of {', '.join(SPLITS)}")
        return len(self._splits[split])

    def example(self, split: str, index: int) -> Example:
        """Return example ``index`` of ``split``.

        Raises:
            DataError: If the image has changed since it was checked.
        """
        check_index(self, split, index)
        record = self._splits[split][index]
        try:
            pixels = read_picture(self._source.picture(record.image), self.max_pixels)
        except PictureError as error:
            raise DataError(f"{record.key}: since the data were checked, the image {error}") from None
        if digest(pixels) != record.contents:
            raise DataError(f"{record.key}: the image has changed since the data were checked: start again")
        return Example(
            image=resize(pixels, self.max_side),
            question=record.question,
            answer=record.answer,
            family=record.family,
            key=record.key,
        )

    def describe(self) -> str:
        """Return a line with the numbers of questions and images, and the size of each split."""
        images = len({record.contents for records in self._splits.values() for record in records})
        sizes = ", ".join(f"{split} {len(records)}" for split, records in self._splits.items())
        total = sum(map(len, self._splits.values()))
        return f"{self.name}: {total} questions about {images} different images ({sizes})"


def _place(path: Path) -> Path:
    """Resolve the links of a path, except in the last part of the path of a file.

    Images are looked up beside the data file as the user names it, even if that name is a link.
    """
    try:
        path = path.expanduser().absolute()
        return path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None


def _source(path: Path, limit: int) -> _Source:
    """Return the reader of ``path``, after checking that it exists in a supported format."""
    formats = "expected a .jsonl file, a .json file, or a folder that save_to_disk of Hugging Face's datasets wrote"
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
                raise DataError(f"{path} is a folder without a dataset in it: {formats}")
            from grip_env.tasks.hf_datasets import SavedDataset

            return SavedDataset(path)
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is not a regular file: {formats}")
        if path.suffix.lower() not in (".jsonl", ".json"):
            raise DataError(f"{path} has the suffix {path.suffix!r}: {formats}")
        with path.open("rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path} is UTF-16, not UTF-8: convert it, as in `iconv -f UTF-16 -t UTF-8`")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {formats}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    except ImportError as error:
        raise DataError(str(error)) from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from None
    return _JsonFile(path, limit)


def _records(rows: list[Row], contents: list[bytes]) -> Iterator[_Record]:
    asked = {image: row.split for row, image in zip(rows, contents, strict=True) if row.split is not None}
    for row, image in zip(rows, contents, strict=True):
        split = asked.get(image) or _split(image)
        for number, (question, answer) in enumerate(row.turns, 1):
            key = row.place if len(row.turns) == 1 else f"{row.place}, question {number}"
            yield _Record(key, question, answer, row.family, split, row.image, image)


def _split(contents: bytes) -> str:
    """Return the split of an image: 80% train, 10% validation, 10% test."""
    share = int.from_bytes(contents[:8], "big") % 10
    return "train" if share < 8 else "validation" if share == 8 else "test"

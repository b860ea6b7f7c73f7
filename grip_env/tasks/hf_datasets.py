"""Reading the rows of Hugging Face datasets written by ``save_to_disk``.

This needs the package ``datasets``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grip_env.tasks.pictures import PictureError, locate
from grip_env.tasks.rows import Row, to_row

__all__ = ["SavedDataset"]

_TEXTS = ("question", "answer", "conversations", "family", "split")


class SavedDataset:
    """A saved dataset, or several named by their splits, in one folder.

    Args:
        folder: The folder that ``save_to_disk`` wrote.

    Raises:
        ValueError: If the folder cannot be read, or columns are missing.
        ImportError: If ``datasets`` is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[str, Any] | None = None
        for name, part in self._open().items():
            _check_columns(f"{folder.name}[{name}]" if name else folder.name, part.features)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_parts": None}  # copies reopen the files

    def _open(self) -> dict[str, Any]:
        if self._parts is None:
            try:
                import datasets
            except ImportError as error:
                raise ImportError(
                    f"reading the dataset in {self.folder} needs the package 'datasets' ({error}): "
                    "pip install 'grip-env[datasets]'"
                ) from None
            try:
                found = datasets.load_from_disk(str(self.folder))
            except Exception as error:  # damaged files raise all sorts of errors
                raise ValueError(_unreadable(self.folder, error)) from None
            parts = dict(found) if isinstance(found, dict) else {"": found}
            for name, part in parts.items():
                part = part.with_format(None)
                if isinstance(part.features.get("image"), datasets.Image):
                    # grip_env decodes images itself, with its own checks
                    part = part.cast_column("image", datasets.Image(decode=False))
                parts[name] = part
            self._parts = parts
        return self._parts

    def rows(self) -> Iterator[Row]:
        """Read and check every row, without its image.

        If there are several datasets, their names are the splits of their rows.
        """
        parts = self._open()
        for name, part in parts.items():
            images = _keeps_images(part.features)
            texts = part.select_columns(
                [key for key in (*_TEXTS, *(() if images else ("image",))) if key in part.features]
            )
            prefix = f"{self.folder.name}[{name}]" if name else self.folder.name
            try:
                for index, value in enumerate(texts):
                    if len(parts) > 1:
                        value = {"split": name} | {key: text for key, text in value.items() if key != "split"}
                    yield to_row(value, f"{prefix}[{index}]", image=(name, index) if images else None)
            except (OSError, ValueError, RuntimeError) as error:
                raise ValueError(_unreadable(self.folder, error)) from None

    def picture(self, image: str | tuple[str, int]) -> Path | bytes:
        """Return the path of the image of a row, or the contents of its file.

        Raises:
            PictureError: If the image is missing, or its path leads out of the folder.
        """
        if isinstance(image, str):
            return locate(self.folder, image)
        part, index = image
        try:
            cell = self._open()[part][index]["image"]
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            raise PictureError(_unreadable(self.folder, error)) from None
        if cell is None:
            raise PictureError("is missing")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        if cell["path"]:
            return locate(self.folder, cell["path"])
        raise PictureError("is missing")


def _unreadable(folder: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{folder} cannot be read as a dataset ({reason}): write it again with save_to_disk"


def _keeps_images(features: Any) -> bool:
    return type(features["image"]).__name__ == "Image"


def _check_columns(place: str, features: Any) -> None:
    """Raise ValueError unless the dataset has the columns of a row, and images or paths."""
    wanted = ("image", "conversations") if "conversations" in features else ("image", "question", "answer")
    missing = [key for key in wanted if key not in features]
    if missing:
        raise ValueError(
            f"{place} has the columns {', '.join(features)}, and none called {' or '.join(missing)}: "
            f"rename_column gives the names {', '.join(wanted)}"
        )
    image = features["image"]
    if not _keeps_images(features) and getattr(image, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"the column image of {place} is {image}: expected datasets.Image() or paths in a string column"
        )

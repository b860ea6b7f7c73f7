"""Disk cache of the scores of all selections of an instance.

With it, each instance is enumerated once instead of once per run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from pathlib import Path

from grip_env.common.atomic_files import write_atomically
from grip_env.common.sealed_files import picture_key, seal, unseal
from grip_env.vlms.base import Encoded, FrozenVLM, Scores

__all__ = ["TableCache", "resolve_table_cache"]

FORMAT = 1
"""Part of every name. Increase it when the file format or the order of the subsets changes."""


class TableCache:
    """Scores of every selection of k tokens, in a folder.

    Several processes may use the folder at the same time.

    Args:
        folder: Folder of the cache, created at the first write. Files with other names in it are left alone.

    Raises:
        ValueError: If ``folder`` is a file.

    The name of an entry is a digest of everything its scores depend on: the model with its blocks, settings and library
    versions, the image, question, answer, their ids, and k. Scores are read back bit for bit; a damaged entry is scored
    again and replaced. Problems with the folder never stop the caller: the first failure to read or write gives a
    RuntimeWarning. A selection takes 5 bytes (1,820 of them 9 kB), and one CPU core scores some hundreds per second, so
    nothing is ever deleted.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the table cache {folder} is a file: give a folder")
        self._warned = False

    def key(self, vlm: FrozenVLM, encoded: Encoded, k: int) -> str:
        """Return the name of the entry of one example, 64 hexadecimal digits.

        Raises:
            NotImplementedError: If the model has no ``fingerprint()``.
        """
        from grip_env import __version__

        example = encoded.examples[0]
        known = {
            "format": FORMAT,
            "version": __version__,
            "fields": [field.name for field in dataclasses.fields(Scores)],
            "vlm": fingerprint(vlm),
            "question": example.question,
            "answer": example.answer,
            "ids": encoded.input_ids[0, : int(encoded.lengths[0])].tolist(),
            "answer_ids": int(encoded.answer_lengths[0]),
            "tokens": encoded.token_mask[0].nonzero().flatten().tolist(),
            "k": k,
        }
        return picture_key(hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest(), example.image)

    def path(self, key: str) -> Path:
        """Return the path of an entry, whether it exists or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str, count: int) -> Scores | None:
        """Return an entry, or ``None`` if it is missing or damaged.

        Args:
            key: Name of the entry.
            count: Number of selections it must have.
        """
        try:
            tensors, _ = unseal(key, self.path(key).read_bytes())
            scores = Scores(**tensors)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._fail("read", error)
            return None
        except (TypeError, ValueError):
            return None
        return scores if scores.log_likelihood.shape == (1, count) else None

    def put(self, key: str, scores: Scores) -> None:
        """Write an entry; if that is impossible, nothing is raised."""
        known = {name: value for name, value in vars(scores).items() if value is not None}
        try:
            write_atomically(self.path(key), seal(key, known))
        except OSError as error:
            self._fail("written", error)

    def _fail(self, what: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the table cache {self.folder} cannot be {what} ({error}); selections are scored anew where it fails",
                RuntimeWarning,
                stacklevel=2,
            )


def fingerprint(vlm: FrozenVLM) -> str:
    """Return a digest that distinguishes the scores of a model from those of other models.

    Raises:
        NotImplementedError: If the model has no ``fingerprint()``.
    """
    own = getattr(vlm, "fingerprint", None)
    if own is None:
        raise NotImplementedError(f"the model {vlm.name!r} has no fingerprint() that tells its scores from others'")
    return own()


def resolve_table_cache(where: str | Path | None, vlm: FrozenVLM) -> TableCache | None:
    """Return the cache that ``where`` stands for.

    Args:
        where: A folder; "auto" for ``grip_env/tables`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; ``None`` for no cache.
        vlm: The model whose scores are kept. A model without a fingerprint has no automatic cache.

    Raises:
        ValueError: If a folder is given for a model without a fingerprint, or is a file.
    """
    if where is None:
        return None
    try:
        fingerprint(vlm)
    except NotImplementedError as error:
        if where == "auto":
            return None
        raise ValueError(f"tables cannot be kept in {where}: {error}; give it one, or pass table_cache=None") from None
    if where != "auto":
        return TableCache(where)
    given = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG standard says to ignore relative paths
    return TableCache((Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "grip_env" / "tables")

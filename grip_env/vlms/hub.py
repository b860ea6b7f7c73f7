"""Models named "owner/name", from the model hub or its local cache."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

from huggingface_hub import constants, get_session, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

__all__ = ["fetch"]

PATIENCE = 10.0
"""Timeout for the hub, in seconds; its own client tries six times in a row, half a minute for each file."""

FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
"""Patterns of files to fetch: neither code nor pickles."""
LEFT = ["*/*", "consolidated*"]
"""Patterns of files to leave out: other forms of the same weights."""


def _answers() -> bool:
    """Return whether the hub answers at all, with any response."""
    if constants.HF_HUB_OFFLINE:
        return False
    found: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception:  # of whichever HTTP library huggingface_hub uses
            found.put(False)
        else:
            found.put(True)

    # in a thread, since the lookup of the host name may hang for longer than the timeout of a request
    threading.Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=PATIENCE)
    except queue.Empty:
        return False


def fetch(name: str) -> Path:
    """Return the folder of a model of the hub, from the cache if the hub does not answer.

    Raises:
        ValueError: If the model is not available; the message says why.
    """
    hub, remedy = constants.ENDPOINT, "give a folder that save_pretrained wrote"
    try:
        if _answers():
            return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=LEFT))
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
        silent = "HF_HUB_OFFLINE forbids asking" if constants.HF_HUB_OFFLINE else "no answer comes from"
        reason = f"there is no such folder, it is not in the model hub's cache, and {silent} {hub}"
    except GatedRepoError:
        reason, remedy = f"the model hub {hub} asks who you are", f"log in with `hf auth login`, or {remedy}"
    except RepositoryNotFoundError:
        reason = f"there is no such folder, and no such model on {hub}"
    except Exception as error:  # from the HTTP library, the file system or an invalid name
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason, remedy = f"{hub} does not give it, {lines[0].rstrip(' .:')}", f"try again, or {remedy}"
    raise ValueError(f"{name} cannot be read ({reason}): {remedy}")

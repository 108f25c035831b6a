"""Converted models on disk, each made once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

VARIABLE = "LANGCHAIN_RERANK_CACHE"
"""The environment variable that names the folder."""

FORMAT = 1
"""Part of every key: counts up when conversions are written in another way, so that older ones are left alone."""

_Opened = TypeVar("_Opened")


def cache_folder() -> Path:
    """Where converted models are kept: `$LANGCHAIN_RERANK_CACHE`, else a folder in the user's cache."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "langchain-rerank"


def open_converted(key: Mapping[str, Any], write: Callable[[Path], None], read: Callable[[Path], _Opened]) -> _Opened:
    """Open a conversion, and make it first if it is not there or cannot be read.

    Several processes may do this at the same time: each writes a folder of its own and renames it, and the first wins.

    Args:
        key: Everything that the conversion depends on, JSON-safe; kept beside it as `about.json`.
        write: Makes it in an empty folder.
        read: Opens it.
    """
    key = {"format": FORMAT, **key}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    place = cache_folder() / "engines" / name
    if place.is_dir():
        try:
            return read(place)
        except Exception as error:  # noqa: BLE001 - engines raise what they like, and a conversion can be made again
            logger.warning("%s cannot be read and is converted again: %s", place, " ".join(str(error).split()))
            shutil.rmtree(place, ignore_errors=True)
    parent = _writable(place.parent)
    # What is open when the folder goes stays readable on POSIX; Windows leaves it to the system.
    with tempfile.TemporaryDirectory(prefix=".", dir=parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary, name)
        folder.mkdir()
        (folder / "about.json").write_text(json.dumps(key, indent=2, sort_keys=True), encoding="utf-8")
        write(folder)
        return read(folder if parent is None else _publish(folder, place))


def _writable(folder: Path) -> Path | None:
    """The folder, made if it is not there; `None`, which is the system's temporary one, if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s), so that the model is converted at each start; name another folder in %s",
            folder,
            error.strerror,
            VARIABLE,
        )
        return None


def _publish(folder: Path, place: Path) -> Path:
    """Move a folder to its place, unless another process was faster."""
    try:
        return folder.rename(place)
    except OSError:
        if place.is_dir():
            return place
        raise

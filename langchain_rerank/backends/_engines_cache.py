"""Converted models on disk, each made once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

VARIABLE = "LANGCHAIN_RERANK_CACHE"
"""The environment variable that names the folder."""

FORMAT = 2
"""Part of every key: counts up when conversions are written in another way, so that older ones are left alone."""

LEFT_ALONE = 24 * 60 * 60
"""Seconds after which a hidden folder is no conversion in progress, but what a killed one left."""

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
    place = _place(hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32])
    if place is not None and place.is_dir():
        try:
            return read(place)
        except Exception as error:  # noqa: BLE001 - engines raise what they like, and a conversion can be made again
            logger.warning("%s cannot be read and is converted again: %s", place, " ".join(str(error).split()))
            place = place if _discard(place) else None
    if place is None:
        # What is open when the folder goes stays readable on POSIX; Windows leaves it to the system.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            return read(_make(key, Path(temporary, "model"), write))
    _sweep(place.parent)
    with tempfile.TemporaryDirectory(prefix=".", dir=place.parent, ignore_cleanup_errors=True) as temporary:
        _publish(_make(key, Path(temporary, place.name), write), place)
    try:
        return read(place)
    except Exception:
        if place.is_dir():
            raise
    # Another process took it for the broken one that it had seen in this place.
    return open_converted(key, write, read)


def _place(name: str) -> Path | None:
    """Where a conversion is, or can be put; `None` where there is no such folder, or it cannot be written."""
    try:
        place = cache_folder() / "engines" / name
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place.parent):
                pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _warn(error)
        return None
    return place


def _warn(error: Exception) -> None:
    logger.warning(
        "The folder of converted models cannot be written (%s), so that the model is converted at each start; "
        "name another folder in %s",
        " ".join(str(error).split()),
        VARIABLE,
    )


def _discard(place: Path) -> bool:
    """Take a broken conversion away, in one step, so that nobody opens a half of it; whether it is gone."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=place.parent, ignore_cleanup_errors=True) as aside:
            place.rename(Path(aside, place.name))
    except FileNotFoundError:  # another process was faster
        return True
    except OSError as error:
        _warn(error)
        return False
    return True


def _sweep(parent: Path) -> None:
    """Delete what conversions that were killed have left."""
    for left in parent.glob(".*"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > LEFT_ALONE:
                shutil.rmtree(left, ignore_errors=True)


def _make(key: Mapping[str, Any], folder: Path, write: Callable[[Path], None]) -> Path:
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps(key, indent=2, sort_keys=True), encoding="utf-8")
    write(folder)
    return folder


def _publish(folder: Path, place: Path) -> None:
    """Move a folder to its place, unless another process was faster."""
    try:
        folder.rename(place)
    except OSError:
        if not place.is_dir():
            raise

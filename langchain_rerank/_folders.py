"""Folders that are written to, and what may not be lost in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from langchain_rerank.errors import ConfigurationError


def refuse_loss(folder: Path, names: Iterable[str], work: str) -> None:
    """Refuse to write into a folder where something is that this work did not leave there.

    Args:
        folder: Where to write; need not be there yet.
        names: What would be lost.
        work: What is done: "training" or "export".

    Raises:
        ConfigurationError: The folder is a file, or one of the names is in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file; the {work} goes into a folder")
    for name in names:
        if (folder / name).exists():
            raise ConfigurationError(
                f"{folder} holds {name}, which is of no {work} and would be overwritten; choose another folder"
            )

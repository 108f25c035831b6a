"""One file of a model, from its folder, the cache or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a model come from."""

    model: str
    """A folder, or a name on the Hugging Face hub."""

    revision: str = "main"
    """Branch, tag or commit on the hub."""

    local_files_only: bool = False
    """Never ask the hub: take what is in its cache on this machine."""

    def find(self, name: str) -> Path | None:
        """The path of one file; `None` if the model has none of that name.

        Raises:
            OSError: There is no such model, or the hub cannot be reached.
        """
        if Path(self.model).is_dir():
            path = Path(self.model, name)
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(self.model, name, revision=self.revision, local_files_only=self.local_files_only)
            )
        except LocalEntryNotFoundError:
            # The hub was not asked, or not reached. Where the cache has the model, what it lacks is no file of it.
            if name == "config.json" or self.find("config.json") is None:
                raise
            return None
        except EntryNotFoundError:
            return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """One JSON file; `None` if the model has none of that name."""
        path = self.find(name)
        if path is None:
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def version(self) -> str:
        """What these files are: the commit of a model of the hub, the digest of a folder's files.

        Raises:
            OSError: There is no such model, or the hub cannot be reached.
        """
        if Path(self.model).is_dir():
            return folder_digest(Path(self.model))
        path = self.find("config.json")
        # The hub's cache keeps each commit's files below snapshots/<commit>/.
        return path.parent.name if path else self.revision


def folder_digest(folder: Path) -> str:
    """The SHA-256 of all files of a folder and their names, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = _sha256(file)
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest is of Python 3.11
    for block in blocks(file):
        digest.update(block)
    return digest.hexdigest()


def blocks(file: BinaryIO) -> Iterator[bytes]:
    """A file, a mebibyte at a time."""
    while block := file.read(1 << 20):
        yield block

"""Texts in and ranked texts out, for the command `rank`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from langchain_core.documents import Document
from rich.console import Console
from rich.table import Table
from rich.text import Text

from langchain_rerank._cli.terminal import one_line, standard_error
from langchain_rerank._pipeline import parse_document
from langchain_rerank.errors import ConfigurationError
from langchain_rerank.reranker import RerankResult

STANDARD_INPUT = Path("-")


def read_documents(file: Path) -> list[Document]:
    """The documents of a text file with one text a line, or of a file of JSON lines.

    Args:
        file: `-` is standard input.

    Raises:
        ConfigurationError: The file cannot be read, or a line is not what the first one promised.
    """
    name = "standard input" if file == STANDARD_INPUT else str(file)
    lines = [(number, line) for number, line in enumerate(_read(file, name).splitlines(), 1) if line.strip()]
    if not lines or not _is_json(lines[0][1]):
        return [Document(page_content=line) for _, line in lines]
    return [parse_document(line, f"{name}, line {number}") for number, line in lines]


def record(place: int, result: RerankResult) -> dict[str, Any]:
    """A ranked document for JSON; `read_documents` can read it again."""
    document: Any = result.document
    return {
        "rank": place,
        "score": result.score,
        "index": result.index,
        "id": document.id,
        "text": document.page_content,
        "metadata": document.metadata,
    }


def print_ranked(out: Console, results: Sequence[RerankResult]) -> None:
    """A table on a terminal; elsewhere one line for each text, with tabs between rank, score and text."""
    lines = [(str(place), f"{result.score:.4f}", one_line(result.text)) for place, result in enumerate(results, 1)]
    if not out.is_terminal:
        for line in lines:
            typer.echo("\t".join(line))
        return
    table = Table("", "score", "text", box=None)
    for place, score, text in lines:
        table.add_row(place, score, Text(text))
    out.print(table)


def _read(file: Path, name: str) -> str:
    try:
        if file != STANDARD_INPUT:
            return file.read_text(encoding="utf-8-sig")
        if sys.stdin.isatty():
            standard_error().print("One text a line; Ctrl-D ends it.")
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"Cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{name} is not UTF-8 text: {error}") from error


def _is_json(line: str) -> bool:
    """Whether a file that begins like this holds JSON lines, and not text."""
    try:
        content = json.loads(line)
    except ValueError:
        return False
    return isinstance(content, dict) and bool({"text", "page_content"} & content.keys())

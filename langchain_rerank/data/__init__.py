"""Test collections in BEIR layout, and where the package keeps its own data."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_rerank.backends.base import clean
from langchain_rerank.errors import ConfigurationError

if TYPE_CHECKING:
    from langchain_core.documents import Document

EMBEDDED_MODEL = Path(__file__).parent / "embedded"
"""The small cross-encoder of the package; its `MODEL_CARD.md` says what it is and what it can do."""

STACKFAQ = Path(__file__).parent / "stackfaq"
"""The demo collection of the package; its `DATA_CARD.md` says where it comes from."""


@dataclass(frozen=True)
class Collection:
    """A test collection: texts, queries, and which text answers which query."""

    corpus: Mapping[str, str]
    """Document id to text; a title stands before its text."""

    queries: Mapping[str, str]
    """Query id to text; some may have no judgements."""

    qrels: Mapping[str, Mapping[str, int]]
    """Query id to document id to grade; a grade above 0 is relevant."""

    @property
    def documents(self) -> list[Document]:
        """The corpus as LangChain documents, each with its id."""
        from langchain_core.documents import Document

        return [Document(id=key, page_content=text) for key, text in self.corpus.items()]


def load_stackfaq() -> Collection:
    """The demo collection: 719 answers of a help site, and one paraphrase of each of 125 frequent questions."""
    return read_beir(STACKFAQ)


def read_beir(folder: Path, split: str | None = None) -> Collection:
    """Read a collection in BEIR layout.

    Args:
        folder: Holds `corpus.jsonl`, `queries.jsonl` (each may end in .gz) and the judgements.
        split: Whose judgements to read, such as `"dev"` for `qrels/dev.tsv`. `None` takes what a collection is judged
            by: `qrels.tsv`, else `qrels/test.tsv`.

    Raises:
        ConfigurationError: A file is not there, or a line of it is not what it should be.
    """
    corpus, queries, judgements = beir_files(folder, split)
    qrels: dict[str, dict[str, int]] = {}
    texts = _texts(corpus), _texts(queries)
    for query, document, grade in _judgements(judgements):
        qrels.setdefault(query, {})[document] = grade
    return Collection(*texts, qrels)


def beir_files(folder: Path, split: str | None = None) -> tuple[Path, Path, Path]:
    """Corpus, queries and judgements of a folder, as `read_beir` reads them.

    Raises:
        ConfigurationError: One of them is not there.
    """
    judgements = ("qrels.tsv", "qrels/test.tsv") if split is None else (f"qrels/{split}.tsv",)
    return (
        _find(folder, "corpus.jsonl", "corpus.jsonl.gz"),
        _find(folder, "queries.jsonl", "queries.jsonl.gz"),
        _find(folder, *judgements),
    )


def _find(folder: Path, *names: str) -> Path:
    """The first of the files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ConfigurationError(f"{folder} has no {' or '.join(names)}; a collection in BEIR layout has")


def _texts(path: Path) -> dict[str, str]:
    """Id to text, title first; a lone surrogate, which JSON can hold and no UTF-8 file, becomes U+FFFD."""
    texts: dict[str, str] = {}
    for number, line in _lines(path):
        key, text = _text(path, number, line)
        if key in texts:
            raise ConfigurationError(f"{path}, line {number}: the id {key!r} was there before; give each text its own")
        texts[key] = text
    return texts


def _text(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        return clean(str(row["_id"])), clean(f"{row.get('title') or ''} {row['text']}".strip())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, number, '{"_id": ..., "text": ...}', line) from error


def _judgements(path: Path) -> Iterator[tuple[str, str, int]]:
    for number, line in _lines(path):
        if number > 1 or not line.startswith("query-id"):
            yield _judgement(path, number, line)


def _judgement(path: Path, number: int, line: str) -> tuple[str, str, int]:
    try:
        query, document, grade = line.split("\t")
        return query, document, int(grade)
    except ValueError as error:
        raise _unreadable(path, number, "query id, document id and a whole number between tabs", line) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines without their ends."""
    for number, line in text_lines(path):
        yield number, line.rstrip("\r\n")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file in UTF-8, gzipped or not, with their number from 1 on; empty ones left out.

    A byte order mark is no part of them.
    """
    utf8 = "utf-8-sig"
    with gzip.open(path, "rt", encoding=utf8) if path.suffix == ".gz" else path.open(encoding=utf8) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _unreadable(path: Path, number: int, wanted: str, line: str) -> ConfigurationError:
    return ConfigurationError(f"{path}, line {number}: expected {wanted}, found {line[:80]!r}")

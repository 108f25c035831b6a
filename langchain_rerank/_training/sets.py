"""Collections to learn from: read, sampled, and with queries made up where there are none."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from langchain_rerank._training.recipe import SetOptions, Synthetic
from langchain_rerank.backends._files import blocks
from langchain_rerank.backends.base import clean
from langchain_rerank.data import Collection, beir_files, read_beir, text_lines
from langchain_rerank.errors import ConfigurationError

_SENTENCE = re.compile(r"(.{20,400}?[.!?。！？])(?:\s+|(?<=[。！？]))(?=\S)", re.DOTALL)  # noqa: RUF001 - as in Chinese
_FEWEST_LEFT = 100
"""Characters of a document that must remain when its first sentence is taken out."""

_NEEDED = {
    "title": f'a "title" and {_FEWEST_LEFT} characters of text beside it',
    "first_sentence": f"a first sentence of 20 to 400 characters and {_FEWEST_LEFT} more behind it",
    "llm": f"{_FEWEST_LEFT} characters to ask the llm about, and got a question from it",
}
"""What a document must have to be asked for, by the kind of query."""

Ask: TypeAlias = Callable[[Sequence[str]], list[str]]
"""Passages to a question that each of them answers; empty where there is none."""

_LICENCE = re.compile(r"^- licen[cs]e:\s*(.+)$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class TrainingSet:
    """One collection as it is learned from."""

    name: str
    collection: Collection
    """Only the documents and queries taken."""

    synthetic: Synthetic | None
    """How the queries were made up; `None` where they are the set's own."""

    licence: str
    """As its source says; `not stated` where nobody did."""

    digest: str = ""
    """SHA-256 of the files that it was read from."""


def read_set(options: SetOptions, seed: int, ask: Ask | None = None) -> TrainingSet:
    """Read a collection, and take as much of it as the options say.

    Args:
        options: Where it is, and how much of it to take.
        seed: Of the draws.
        ask: Makes up the queries of a set with `synthetic: llm`.

    Raises:
        ConfigurationError: A file is not there or not readable, or nothing in it can be learned from.
    """
    digest = digest_of(options)
    whole = _merged(_whole(options, seed, ask))
    taken = _sampled(whole, options, random.Random(f"{seed} {options.name}"))  # noqa: S311
    if not taken.qrels:
        _refuse_unanswered(options, whole)
    return TrainingSet(options.name, taken, options.synthetic, options.licence or _licence(options.path), digest)


def digest_of(options: SetOptions) -> str:
    """SHA-256 of the files that a set is read from.

    Raises:
        ConfigurationError: One of them is not there or not readable.
    """
    digest = hashlib.sha256()
    for path in _files(options):
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    if path.exists() and not path.is_file():
        return  # a pipe can be read but once
    try:
        with path.open("rb") as file:
            yield from blocks(file)
    except OSError as error:
        _refuse_unreadable(path, error)


def plain(text: str) -> str:
    """A text as it counts for being the same: case and space do not matter."""
    return " ".join(text.casefold().split())


def _refuse_unanswered(options: SetOptions, whole: Collection) -> NoReturn:
    if options.synthetic is None:
        raise ConfigurationError(
            f"{options.path} has no query with a right answer to learn from. Give pairs or qrels, "
            "or synthetic: title, first_sentence or llm"
        )
    raise ConfigurationError(
        f"{options.path}: none of the {len(whole.corpus)} documents has {_NEEDED[options.synthetic]}, which "
        f"synthetic: {options.synthetic} needs. Choose another kind, or give pairs or qrels"
    )


def _refuse_unasked(place: str) -> NoReturn:
    raise ConfigurationError(
        f"{place}: documents without queries. Give queries, or have them made up with synthetic: title, first_sentence "
        "or llm (on the command line --synthetic title)"
    )


def _files(options: SetOptions) -> list[Path]:
    """What a set is read from."""
    path = options.path
    if options.synthetic is not None:
        return [_documents(path)]
    if not _is_beir(options):
        return [path]
    if _documents(path) != path and not any((path / f"queries.jsonl{end}").is_file() for end in ("", ".gz")):
        _refuse_unasked(str(path))
    return list(beir_files(path, _split(options)))


def _is_beir(options: SetOptions) -> bool:
    return options.path.is_dir() or options.split is not None


def _documents(path: Path) -> Path:
    """The corpus of a BEIR folder, else the file itself."""
    return next((path / name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path / name).is_file()), path)


def _split(options: SetOptions) -> str | None:
    """Whose judgements to learn from; `None` where they are in `qrels.tsv`."""
    there = sorted(file.stem for file in (options.path / "qrels").glob("*.tsv"))
    wanted = options.split or "train"
    if options.split is None and wanted not in there and (options.path / "qrels.tsv").is_file():
        return None
    if there and wanted not in there:
        names = ", ".join(f"qrels/{name}.tsv" for name in there)
        raise ConfigurationError(
            f"{options.path} has no qrels/{wanted}.tsv to learn from; there is {names}. To learn from one of these, "
            f"name it, as split: {there[0]}"
        )
    return wanted


def _whole(options: SetOptions, seed: int, ask: Ask | None) -> Collection:
    """All that is there; but of an LLM no more questions are asked than are taken."""
    if options.synthetic is None:
        return read_beir(options.path, _split(options)) if _is_beir(options) else _pairs(options.path)
    if options.synthetic != "llm":
        return _synthetic(_rows(options.path), options.synthetic)
    if ask is None:
        raise ConfigurationError(f"{options.path} is to be asked about with synthetic: llm, and there is no llm")
    return _asked_of(ask, _rows(options.path), options, random.Random(f"{seed} {options.name} llm"))  # noqa: S311


def _pairs(path: Path) -> Collection:
    """Lines of query, positive, negatives and grade. Equal texts are one document, equal queries one query."""
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for number, row in _json_lines(path):
        query, positive, negatives, grade = _pair(path, number, row)
        grades = qrels.setdefault(_number(queries, query), {})
        answer = _number(documents, positive)
        grades[answer] = max(grade, grades.get(answer, grade))
        for negative in negatives:
            grades.setdefault(_number(documents, negative), 0)
    return Collection(_turned(documents), _turned(queries), qrels)


def _pair(path: Path, number: int, row: Any) -> tuple[str, str, list[str], int]:
    row = row if isinstance(row, dict) else {"": row}
    query, positive = row.get("query"), row.get("positive")
    negatives, grade = row.get("negatives") or [], row.get("grade")
    grade = 1 if grade is None else grade
    if _is_text(row.get("text")) and query is None:
        _refuse_unasked(f"{path}, line {number}")
    if not (_is_text(query) and _is_text(positive) and _are_texts(negatives) and type(grade) is int):
        raise ConfigurationError(
            f'{path}, line {number}: expected {{"query": ..., "positive": ...}} with texts that are not empty, perhaps '
            f'with "negatives": [...] and a whole number as "grade", found {str(row)[:80]}'
        )
    return clean(query), clean(positive), [*map(clean, negatives)], grade


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_text, values))


def _number(numbers: dict[str, str], text: str) -> str:
    """The number of a text; a new one gets the next."""
    return numbers.setdefault(text, str(len(numbers)))


def _turned(numbers: Mapping[str, str]) -> dict[str, str]:
    return {number: text for text, number in numbers.items()}


def _synthetic(rows: Sequence[Mapping[str, str]], kind: Synthetic) -> Collection:
    """Each document's title, or first sentence, as a query for the rest of it."""
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    for row in rows:
        key = row["_id"]
        query, corpus[key] = _asked(row["title"], row["text"], kind)
        if query and len(corpus[key]) >= _FEWEST_LEFT:
            queries[key] = query
    return Collection(corpus, queries, {key: {key: 1} for key in queries})


def _asked(title: str, text: str, kind: Synthetic) -> tuple[str, str]:
    """What is asked (empty, where the document has no such thing), and the text without it."""
    text = text.removeprefix(title).strip()
    if kind == "title":
        return title.replace("_", " ").strip(), text
    found = _SENTENCE.match(text)
    return (found.group(1), text[found.end() :].strip()) if found else ("", text)


def _asked_of(ask: Ask, rows: Sequence[Mapping[str, str]], options: SetOptions, random_: random.Random) -> Collection:
    """A question of an LLM's for each of some documents, drawn from those that say enough."""
    corpus = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in rows}
    keys = [key for key, text in corpus.items() if len(text) >= _FEWEST_LEFT]
    taken = drawn(keys, len(keys) if options.queries is None else options.queries, random_)
    questions = ask([corpus[key] for key in taken])
    queries = {key: question for key, question in zip(taken, questions, strict=True) if question}
    return Collection(corpus, queries, {key: {key: 1} for key in queries})


def _rows(path: Path) -> list[dict[str, str]]:
    """The documents of a BEIR folder or of a file of JSON lines, each with `text` and an `_id` of its own."""
    source = _documents(path)
    rows = {number: _row(source, number, row) for number, row in _json_lines(source)}
    known: set[str] = set()
    for number, row in rows.items():
        key = row.get("_id")
        if key in known:
            raise ConfigurationError(
                f"{source}, line {number}: the id {key!r} was there before; give each text its own"
            )
        if key is not None:
            known.add(key)
    return [{"_id": _free(number, known), **row} for number, row in rows.items()]


def _row(source: Path, number: int, row: Any) -> dict[str, str]:
    """A document's `text`, its `title` (empty, where it has none) and, where it has one, its `_id`."""
    if not (isinstance(row, dict) and isinstance(row.get("text"), str)):
        raise ConfigurationError(f'{source}, line {number}: expected {{"text": ...}}, found {str(row)[:80]}')
    document = {"text": clean(row["text"]), "title": clean(str(row.get("title") or ""))}
    return document if row.get("_id") is None else {"_id": clean(str(row["_id"])), **document}


def _free(number: int, known: Container[str]) -> str:
    """An id for the document in this line: its number, or what no document has."""
    key = str(number)
    while key in known:
        key = f"line {key}"
    return key


def _merged(whole: Collection) -> Collection:
    """Queries of the same text as one, the first: what answers one of them is no negative of another.

    So passages of one article, which share its title, all answer it.
    """
    first: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for key, query in whole.queries.items():
        grades = qrels.setdefault(first.setdefault(plain(query), key), {})
        for document, grade in whole.qrels.get(key, {}).items():
            grades[document] = max(grade, grades.get(document, grade))
    return Collection(whole.corpus, {key: whole.queries[key] for key in first.values()}, qrels)


def _sampled(whole: Collection, options: SetOptions, random_: random.Random) -> Collection:
    """At most so many answered queries, and so many documents: those that answer or were judged, then others."""
    answered = [key for key, query in whole.queries.items() if query.strip() and _is_answered(whole, key)]
    queries = answered if options.queries is None else drawn(answered, options.queries, random_)
    qrels = {key: _grades(whole, key) for key in queries}
    judged = dict.fromkeys(document for grades in qrels.values() for document in grades)
    others = [key for key, text in whole.corpus.items() if key not in judged and text.strip()]
    room = len(others) if options.documents is None else max(0, options.documents - len(judged))
    kept = {*judged, *drawn(others, room, random_)}
    corpus = {key: text for key, text in whole.corpus.items() if key in kept}
    return Collection(corpus, {key: whole.queries[key] for key in queries}, qrels)


def _grades(whole: Collection, query: str) -> dict[str, int]:
    """The judgements of a query whose documents are there, and not empty."""
    return {key: grade for key, grade in whole.qrels.get(query, {}).items() if whole.corpus.get(key, "").strip()}


def _is_answered(whole: Collection, query: str) -> bool:
    return any(grade > 0 for grade in _grades(whole, query).values())


def drawn(keys: list[str], count: int, random_: random.Random) -> list[str]:
    """So many of the keys, in their own order."""
    return keys if count >= len(keys) else [keys[i] for i in sorted(random_.sample(range(len(keys)), count))]


def _licence(path: Path) -> str:
    source = path / "SOURCE.md"
    found = _LICENCE.search(source.read_text(encoding="utf-8")) if source.is_file() else None
    return found.group(1).strip() if found else "not stated"


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """What each line holds, with its number from 1 on; empty lines left out."""
    try:
        for number, line in text_lines(path):
            yield number, _json(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        _refuse_unreadable(path, error)


def _refuse_unreadable(path: Path, error: Exception) -> NoReturn:
    raise ConfigurationError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{path}, line {number}: expected JSON, found {line[:80]!r}") from error

"""From collections to groups to train on and queries that are held out."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from langchain_rerank._training.asking import Asker, make_llm
from langchain_rerank._training.mining import (
    FIRST_STAGES,
    Candidates,
    Group,
    GroupMaker,
    find,
    read_lines,
    write_lines,
)
from langchain_rerank._training.recipe import Recipe
from langchain_rerank._training.sets import TrainingSet, read_set
from langchain_rerank.data import Collection
from langchain_rerank.errors import ConfigurationError
from langchain_rerank.factory import init_reranker, installed_backends, nearest

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from langchain_rerank._training.embedding import Encoder
    from langchain_rerank.backends.base import Backend

logger = logging.getLogger(__name__)

_GROUPS, _HELD_OUT, _QUESTIONS, _RECIPE = "groups.jsonl", "held_out.jsonl", "questions.jsonl", "recipe.json"


@dataclass(frozen=True)
class Question:
    """A held-out query with what the first stage found for it."""

    query_id: str
    query: str
    documents: Mapping[str, str]
    """Document id to text, in the first stage's order."""

    grades: Mapping[str, int]
    name: str
    """The set it comes from."""


@dataclass(frozen=True)
class Prepared:
    """What a training learns from, and what it is judged by."""

    groups: Sequence[Group]
    """In the order in which they are learned."""

    questions: Sequence[Question]
    """Held out."""

    sets: Sequence[TrainingSet]


def prepare(recipe: Recipe, folder: Path, *, llm: BaseChatModel | None = None, progress: bool) -> Prepared:
    """Read the sets and find hard negatives, or take what an earlier run with the same recipe left in the folder.

    Args:
        recipe: What to read, and how.
        folder: Where groups and held-out queries are kept, and the recipe beside them.
        llm: A chat model that makes up queries, in place of the recipe's.
        progress: Show bars on standard error.

    Raises:
        ConfigurationError: A set or a teacher cannot be used, or nothing is left to learn.
        BackendError: The chat model failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make = _llm(recipe, llm)
    ask = Asker(make, folder / _QUESTIONS, recipe.llm or "") if make else None
    sets = [read_set(options, recipe.seed, ask) for options in recipe.sets]
    if not (folder / _HELD_OUT).is_file():
        groups, questions = _found(recipe, sets, progress=progress)
        if not groups:
            names = ", ".join(each.name for each in sets)
            raise ConfigurationError(
                f"No query of {names} has a negative beside its answers. Give more documents, or pairs with negatives"
            )
        (folder / _RECIPE).write_text(recipe.model_dump_json(indent=2), encoding="utf-8")
        write_lines(folder / _GROUPS, groups)
        write_lines(folder / _HELD_OUT, questions)  # last: it says that both are there
    return Prepared(read_lines(folder / _GROUPS, Group), read_lines(folder / _HELD_OUT, Question), sets)


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder in which another recipe has begun.

    Raises:
        ConfigurationError: It has.
    """
    file = folder / _RECIPE
    if file.is_file() and not _says(file, recipe):
        raise ConfigurationError(f"{folder} holds a training by another recipe; choose another folder or remove it")


def _says(file: Path, recipe: Recipe) -> bool:
    """Whether a file holds this recipe; options that came into being after it was written are as by default."""
    try:
        return Recipe.model_validate_json(file.read_text(encoding="utf-8")) == recipe
    except ValidationError:
        return False


def _llm(recipe: Recipe, llm: BaseChatModel | None) -> Callable[[], BaseChatModel] | None:
    """What gives the chat model, if there is one."""
    if llm is not None:
        return lambda: llm
    name = recipe.llm
    return None if name is None else lambda: make_llm(name)


def _found(recipe: Recipe, sets: Sequence[TrainingSet], *, progress: bool) -> tuple[list[Group], list[Question]]:
    embedding, make = _encoder(recipe), GroupMaker(recipe, _teachers(recipe))
    held_out = _held_out(recipe, sets)
    groups: list[Group] = []
    questions: list[Question] = []
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        for each in sets:
            task = bar.add_task(f"Hard negatives: {each.name}", total=len(each.collection.queries))
            if embedding is not None:
                embedding.foresee(each.collection.queries.values())
            for query_id, candidates in _kept(find(each, embedding, recipe.fetch_k)):
                bar.advance(task)
                if query_id in held_out[each.name]:
                    questions.append(_question(each, query_id, candidates))
                elif group := make(each, query_id, candidates):
                    groups.append(group)
            logger.info("%s: %s queries asked", each.name, len(each.collection.queries))
    groups = _without(groups, {_plain(question.query) for question in questions})
    random.Random(f"{recipe.seed} order").shuffle(groups)  # noqa: S311 - no secret
    return groups, questions


def _without(groups: Sequence[Group], held_out: Container[str]) -> list[Group]:
    """The groups but for those of a query that is held out elsewhere, such as in another set."""
    return [group for group in groups if _plain(group.query) not in held_out]


def _plain(query: str) -> str:
    """A query as it counts for being the same: case and space do not matter."""
    return " ".join(query.casefold().split())


def _kept(found: Iterator[tuple[str, Candidates]]) -> Iterator[tuple[str, Candidates]]:
    """Those queries for which anything was found."""
    return ((query_id, candidates) for query_id, candidates in found if candidates.documents)


def _encoder(recipe: Recipe) -> Encoder | None:
    if recipe.embedding is None:
        return None
    from langchain_rerank._training.embedding import Encoder

    return Encoder(recipe.embedding, recipe.device)


def _teachers(recipe: Recipe) -> dict[str, Backend]:
    """The teachers that are rerankers, by name."""
    known = [*FIRST_STAGES, *installed_backends()]
    for name in recipe.teacher:
        if name.partition(":")[0] not in known:
            raise ConfigurationError(
                f"Unknown teacher {name!r}.{nearest(name, known)} There are {', '.join(known)}; "
                "a reranker is written as backend:model"
            )
    if "dense" in recipe.teacher and recipe.embedding is None:
        raise ConfigurationError("The teacher 'dense' is the embedding's ranking, and the recipe has no embedding")
    return {name: init_reranker(name).backend for name in recipe.teacher if name not in FIRST_STAGES}


def _held_out(recipe: Recipe, sets: Sequence[TrainingSet]) -> dict[str, set[str]]:
    """Queries of each labelled set that are not trained on: in equal numbers, at most a fifth of a set."""
    labelled = [each for each in sets if not each.synthetic]
    held_out: dict[str, set[str]] = {each.name: set() for each in sets}
    for each in labelled:
        queries = list(each.collection.queries)
        count = min(-(-recipe.held_out // len(labelled)), len(queries) // 5)
        draw = random.Random(f"{recipe.seed} held out {each.name}")  # noqa: S311 - no secret
        held_out[each.name] = set(draw.sample(queries, count))
    return held_out


def _question(each: TrainingSet, query_id: str, candidates: Candidates) -> Question:
    collection: Collection = each.collection
    documents = {key: collection.corpus[key] for key in candidates.stages["bm25"]}
    return Question(f"{each.name} {query_id}", candidates.query, documents, collection.qrels[query_id], each.name)

"""From collections to groups to train on and queries that are held out."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from langchain_rerank._folders import refuse_loss
from langchain_rerank._training.asking import Asker, make_llm
from langchain_rerank._training.mining import (
    FIRST_STAGES,
    Candidates,
    Group,
    GroupMaker,
    find,
    read_lines,
    write_lines,
    written_whole,
)
from langchain_rerank._training.recipe import Recipe, with_models
from langchain_rerank._training.sets import Ask, TrainingSet, digest_of, plain, read_set
from langchain_rerank.data import Collection
from langchain_rerank.errors import ConfigurationError
from langchain_rerank.factory import init_reranker, installed_backends, nearest

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from langchain_rerank._training.embedding import Encoder
    from langchain_rerank.backends.base import Backend

logger = logging.getLogger(__name__)

_GROUPS, _HELD_OUT, _QUESTIONS, _RECIPE = "groups.jsonl", "held_out.jsonl", "questions.jsonl", "recipe.json"
_DATA = "data.json"
"""The name of each set to the digest of its files; a folder of an earlier version has none."""

_WRITTEN = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "training.json"),
    *(_GROUPS, _HELD_OUT, _RECIPE, _DATA, "checkpoints"),
)
"""What a training writes into its folder, beside what an LLM said."""


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


def prepare(
    recipe: Recipe,
    folder: Path,
    first: Callable[[], object] = lambda: None,
    *,
    llm: BaseChatModel | None = None,
    progress: bool,
) -> Prepared:
    """Read the sets and find hard negatives, or take what an earlier run with the same recipe left in the folder.

    Args:
        recipe: What to read, and how.
        folder: Where groups and held-out queries are kept, and the recipe beside them.
        first: What to do once the data are read, before an LLM is asked and paid and the long search begins.
        llm: A chat model that makes up queries, in place of the recipe's.
        progress: Show bars on standard error.

    Raises:
        ConfigurationError: A set or a teacher cannot be used, or nothing is left to learn.
        BackendError: The chat model failed.
    """
    found = (folder / _HELD_OUT).is_file()
    tools = cache(lambda: _tools(recipe, first))
    make = _llm(recipe, llm, (lambda: None) if found else tools)
    sets = _read(recipe, Asker(make, folder / _QUESTIONS, recipe.llm or "") if make else None)
    if not found:
        groups, questions = _found(recipe, sets, *tools(), progress=progress)
        digests = {each.name: each.digest for each in sets}
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / _RECIPE) as recipe_file, written_whole(folder / _DATA) as data_file:
            recipe_file.write(_settled(recipe).model_dump_json(indent=2))
            data_file.write(json.dumps(digests, indent=2))
        write_lines(folder / _GROUPS, groups)
        write_lines(folder / _HELD_OUT, questions)  # last: it says that both are there
    return Prepared(read_lines(folder / _GROUPS, Group), read_lines(folder / _HELD_OUT, Question), sets)


def _read(recipe: Recipe, ask: Ask | None) -> list[TrainingSet]:
    """The sets, in their order; those that an LLM is asked about are read last, and looked at before any is asked."""
    sets = {each.name: each for each in recipe.sets}
    asked = [name for name, each in sets.items() if each.synthetic == "llm"]
    read = {name: read_set(each, recipe.seed) for name, each in sets.items() if name not in asked}
    for name in asked:
        digest_of(sets[name])
    read.update({name: read_set(sets[name], recipe.seed, ask) for name in asked})
    return [read[name] for name in sets]


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder in which another recipe has begun, or this one on other data, or that holds somebody's files.

    Raises:
        ConfigurationError: It does, or a file of a set cannot be read.
    """
    begun = (folder / _RECIPE).is_file() and any((folder / name).is_file() for name in (_DATA, _HELD_OUT))
    refuse_loss(folder, () if begun else _WRITTEN, "training")
    if not begun:
        return
    before, now = _options(_begun(folder / _RECIPE)), _options(recipe)
    if differing := [name for name in now if now[name] != before.get(name)]:
        name = differing[0]
        raise ConfigurationError(
            f"{folder} holds a training by another recipe ({name} was {before.get(name)!r}, and is {now[name]!r}); "
            "choose another folder or remove it"
        )
    _check_data(recipe, folder)


def _check_data(recipe: Recipe, folder: Path) -> None:
    file = folder / _DATA
    digests = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for each in recipe.sets:
        if each.name in digests and digests[each.name] != digest_of(each):
            raise ConfigurationError(
                f"{folder} holds a training on other data: the files of the set {each.name!r} in {each.path} changed "
                "since; choose another folder or remove it"
            )


def _begun(file: Path) -> Recipe:
    """The recipe in a file; options that came into being after it was written are as by default."""
    try:
        return Recipe.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ConfigurationError(f"{file} is no recipe of this version; choose another folder or remove it") from error


def _options(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says, by name; first of all its sets."""
    options = _settled(recipe).model_dump(mode="json")
    sets = options.pop("sets")
    named = {f"{key} of the set {each['name']!r}": value for each in sets for key, value in each.items()}
    return {"sets": [each["name"] for each in sets], **options, **named}


def _settled(recipe: Recipe) -> Recipe:
    """The recipe with whole paths: it is the same from wherever it is called."""
    sets = tuple(each.model_copy(update={"path": Path(os.path.realpath(each.path))}) for each in recipe.sets)
    return with_models(recipe, _placed).model_copy(update={"sets": sets})


def _placed(model: str) -> str:
    """A model's folder as a whole path; else the name as it stands."""
    return os.path.realpath(model) if Path(model).is_dir() else model


def _llm(recipe: Recipe, llm: BaseChatModel | None, first: Callable[[], object]) -> Callable[[], BaseChatModel] | None:
    """What gives the chat model, if there is one, once something else is done first."""
    chosen = recipe.llm if llm is None else llm
    if chosen is None:
        return None

    def make() -> BaseChatModel:
        first()
        return make_llm(chosen) if isinstance(chosen, str) else chosen

    return make


def _tools(recipe: Recipe, first: Callable[[], object]) -> tuple[Encoder | None, GroupMaker]:
    """What finds negatives beside BM25, and what makes groups of them; every model is loaded."""
    first()
    teachers = _teachers(recipe)
    embedding = _encoder(recipe)
    for teacher in teachers.values():
        teacher.warmup()
    return embedding, GroupMaker(recipe, teachers)


def _found(
    recipe: Recipe, sets: Sequence[TrainingSet], embedding: Encoder | None, make: GroupMaker, *, progress: bool
) -> tuple[list[Group], list[Question]]:
    held_out = _held_out(recipe, sets)
    groups: list[Group] = []
    questions: list[Question] = []
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        for each in sets:
            task = bar.add_task(f"Hard negatives: {each.name}", total=len(each.collection.queries))
            if embedding is not None:
                embedding.foresee(each.collection.queries.values())
            for query_id, candidates in find(each, embedding, recipe.fetch_k):
                bar.advance(task)
                if query_id not in held_out[each.name]:
                    groups += filter(None, [make(each, query_id, candidates)])
                elif candidates.documents:
                    questions.append(_question(each, query_id, candidates))
            logger.info("%s: %s queries asked", each.name, len(each.collection.queries))
    taken = {text for each in sets for key in held_out[each.name] for text in _texts(each.collection, key)}
    groups = _without(groups, taken, ", ".join(each.name for each in sets))
    random.Random(f"{recipe.seed} order").shuffle(groups)  # noqa: S311 - no secret
    return groups, questions


def _texts(collection: Collection, query_id: str) -> list[str]:
    """A query and what answers it, in plain form."""
    answers = [collection.corpus[key] for key, grade in collection.qrels[query_id].items() if grade > 0]
    return [plain(text) for text in (collection.queries[query_id], *answers)]


def _without(groups: Sequence[Group], held_out: Container[str], names: str) -> list[Group]:
    """The groups but for those that ask or answer what a held-out query does, in their own set or in another."""
    if not groups:
        raise ConfigurationError(
            f"No query of {names} has a negative beside its answers. Give more documents, pairs with negatives, or a "
            "smaller relative_margin, if there is one"
        )
    kept = [group for group in groups if not any(plain(text) in held_out for text in _best(group))]
    if not kept:
        raise ConfigurationError(
            f"Every query of {names} asks or answers what a held-out one does, so that nothing is left to learn. Give "
            "more data, or measure elsewhere with held_out=0"
        )
    if len(kept) < len(groups):
        logger.info("Left out %s queries that ask or answer what a held-out one does", len(groups) - len(kept))
    return kept


def _best(group: Group) -> list[str]:
    """A group's query and its best answers."""
    return [group.query, *(text for text, grade in zip(group.docs, group.relevance, strict=True) if grade == 1)]


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
    if recipe.relative_margin is not None and recipe.embedding is None:
        raise ConfigurationError("relative_margin compares the embedding's scores, and the recipe has no embedding")
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

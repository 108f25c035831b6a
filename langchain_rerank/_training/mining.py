"""What both first stages find for a query, and how it becomes a group of passages to rank."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from langchain_rerank._duplicates import first_of_each
from langchain_rerank._training.recipe import Recipe
from langchain_rerank._training.sets import TrainingSet, drawn
from langchain_rerank.backends.base import Backend
from langchain_rerank.retrievers import create_qdrant_retriever

T = TypeVar("T")

Scores = Mapping[str, float]
"""Document id to score."""

FIRST_STAGES = ("bm25", "dense")
"""The teachers that are first stages."""

_HARDEST = 10
"""Half of the negatives come from so many best candidates, the others from those behind them."""

_LEAST = 1e-7
"""Probabilities are kept so far from 0 and 1 when they become logits."""


@dataclass(frozen=True)
class Candidates:
    """What was found for a query: for each first stage the scores of its best documents."""

    query: str
    stages: Mapping[str, Scores]

    @property
    def documents(self) -> list[str]:
        """The ids, those of the first stage first, best first."""
        return list(dict.fromkeys(key for scores in self.stages.values() for key in scores))


@dataclass(frozen=True)
class Group:
    """One query with the passages that are ranked against each other for it."""

    query: str
    docs: Sequence[str]
    """g texts."""

    targets: Sequence[float]
    """g numbers to learn, as logits: higher is more relevant."""

    relevance: Sequence[float]
    """g grades in [0, 1]; -1 where nobody knows."""

    name: str
    """The set it comes from."""

    synthetic: bool
    """Whether its query was made up."""


def find(training_set: TrainingSet, embedding: Embeddings | None, fetch_k: int) -> Iterator[tuple[str, Candidates]]:
    """Ask both first stages for each query, in embedded Qdrant.

    Yields:
        Query id and candidates, in the order of the set's queries.
    """
    collection = training_set.collection
    documents = collection.documents
    embeddings = {"bm25": None} if embedding is None else {"bm25": None, "dense": embedding}
    with ExitStack() as opened:
        stages = {
            name: opened.enter_context(create_qdrant_retriever(documents, embedding=each, k=fetch_k, progress=False))
            for name, each in embeddings.items()
        }
        for query_id, query in collection.queries.items():
            found = {name: _scores(retriever.invoke(query)) for name, retriever in stages.items()}
            yield query_id, Candidates(query, found)


def _scores(documents: Iterable[Any]) -> dict[str, float]:
    return {str(document.id): float(document.metadata["retrieval_score"]) for document in documents}


class GroupMaker:
    """Makes a group of right answers and of negatives, with what the teachers say of them.

    The first is one of the best answers. At most a quarter of the group are other answers, of whatever grade, and half
    of what is left are judged negatives, more where too few candidates were found. All are drawn.

    Args:
        recipe: Its sizes, teachers and weights.
        backends: The teachers that are rerankers, by the name that the recipe gives them.
    """

    def __init__(self, recipe: Recipe, backends: Mapping[str, Backend]) -> None:
        self._recipe = recipe
        self._backends = backends
        self._random = random.Random(f"{recipe.seed} groups")  # noqa: S311 - no secret

    def __call__(self, training_set: TrainingSet, query_id: str, candidates: Candidates) -> Group | None:
        """The group of a query; `None` where nothing was found or given beside the right answers."""
        grades = training_set.collection.qrels[query_id]
        if not candidates.documents and all(grade > 0 for grade in grades.values()):
            return None  # and nothing is drawn
        answers = self._answers(grades)
        negatives = self._negatives(training_set, grades, candidates, self._recipe.group_size - len(answers))
        return self._group(training_set, grades, candidates, [*answers, *negatives]) if negatives else None

    def _group(
        self, training_set: TrainingSet, grades: Mapping[str, int], candidates: Candidates, chosen: Sequence[str]
    ) -> Group:
        texts = [training_set.collection.corpus[key] for key in chosen]
        taught = self._taught(candidates, chosen, texts)
        highest = max(grades.values())
        known = [max(0, grades[key]) / highest if key in grades else math.nan for key in chosen]
        targets = taught + self._bonus() * np.nan_to_num(np.array(known))
        relevance = self._relevance(known, taught)
        return Group(
            candidates.query,
            texts,
            [round(float(each), 4) for each in targets],
            relevance,
            training_set.name,
            training_set.synthetic is not None,
        )

    def _answers(self, grades: Mapping[str, int]) -> list[str]:
        """One of the best answers, and some of the others."""
        highest = max(grades.values())
        best = self._random.choice([key for key, grade in grades.items() if grade == highest])
        others = [key for key, grade in grades.items() if grade > 0 and key != best]
        return [best, *drawn(others, self._recipe.group_size // 4, self._random)]

    def _negatives(
        self, training_set: TrainingSet, grades: Mapping[str, int], candidates: Candidates, wanted: int
    ) -> list[str]:
        """Judged negatives, one at least if there are any, and candidates: half hard ones, half from further down."""
        order = self._unjudged(training_set.collection.corpus, grades, candidates)
        judged = [key for key, grade in grades.items() if grade <= 0]
        taken = drawn(judged, max(1, wanted // 2, wanted - len(order)), self._random)
        wanted -= len(taken)
        hard, easier = order[:_HARDEST], order[_HARDEST:]
        few = min(len(hard), max((wanted + 1) // 2, wanted - len(easier)))
        taken = [*taken, *self._random.sample(hard, few)]
        return taken + self._random.sample(easier, min(len(easier), wanted - few))

    def _unjudged(self, corpus: Mapping[str, str], grades: Mapping[str, int], candidates: Candidates) -> list[str]:
        """The candidates that nobody judged, that repeat no right answer and that are likely to be none, best first."""
        right = [key for key, grade in grades.items() if grade > 0]
        left_out = {*grades, *self._too_near(right, candidates)}
        order = [key for key in self._fused_order(candidates) if key not in left_out]
        return [key for key in order if not any(self._repeats(corpus[answer], corpus[key]) for answer in right)]

    def _too_near(self, right: Sequence[str], candidates: Candidates) -> list[str]:
        """What the embedding finds as near to the query as a right answer, less the margin.

        A right answer that the dense stage did not find counts as its last find, which is nearer than it.
        """
        if self._recipe.relative_margin is None:
            return []
        scores = candidates.stages["dense"]
        nearest = max(_filled(scores, right))
        most = nearest - abs(nearest) * self._recipe.relative_margin
        return [key for key, score in scores.items() if score > most]

    def _fused_order(self, candidates: Candidates) -> list[str]:
        """All candidates, best first by the sum of the standardised scores of the first stages."""
        keys = candidates.documents
        if not keys:
            return []
        total = sum(_standardised(_filled(scores, keys)) for scores in candidates.stages.values())
        return [keys[i] for i in np.argsort(-np.asarray(total), kind="stable")]

    def _repeats(self, answer: str, text: str) -> bool:
        return first_of_each([answer, text], self._recipe.near_duplicate)[1] == 0

    def _taught(self, candidates: Candidates, keys: Sequence[str], texts: Sequence[str]) -> NDArray[np.float64]:
        """What the teachers say together, shape (g,); zeros without teachers."""
        total = np.zeros(len(keys))
        for teacher, weight in self._recipe.teacher.items():
            if teacher in FIRST_STAGES:
                scores = _filled(candidates.stages[teacher], keys)
            else:
                scores = _logits(self._backends[teacher].score(candidates.query, texts))
            total += weight * _standardised(scores)
        return total

    def _bonus(self) -> float:
        return self._recipe.label_bonus if self._recipe.teacher else _LABELS_ALONE

    def _relevance(self, known: Sequence[float], taught: NDArray[np.float64]) -> list[float]:
        """The grades; an unjudged passage that the teachers like better than the positive is unknown, not wrong."""
        doubtful = taught > taught[0] if self._recipe.teacher else np.zeros(len(known), dtype=bool)
        return [
            (-1.0 if unsure else 0.0) if math.isnan(grade) else grade
            for grade, unsure in zip(known, doubtful, strict=True)
        ]


_LABELS_ALONE = 5.0
"""The target of a best answer where no teacher speaks: the softmax gives 95 % to one among 7 negatives."""


def _filled(scores: Scores, keys: Sequence[str]) -> NDArray[np.float64]:
    """A stage's scores of some documents; one that it did not find gets its lowest."""
    lowest = min(scores.values(), default=0.0)
    return np.array([scores.get(key, lowest) for key in keys], dtype=np.float64)


def _standardised(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean 0, standard deviation 1; zeros where all are the same."""
    deviation = scores.std()
    return (scores - scores.mean()) / deviation if deviation > 0 else np.zeros_like(scores)


def _logits(probabilities: Sequence[float]) -> NDArray[np.float64]:
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), _LEAST, 1 - _LEAST)
    logits: NDArray[np.float64] = np.log(clipped / (1 - clipped))
    return logits


def write_lines(path: Path, items: Iterable[Any]) -> None:
    """Keep dataclass objects as JSON lines, to resume from and to look at."""
    with written_whole(path) as file:
        file.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write, which is there when it is whole."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.replace(path)


def read_lines(path: Path, kind: Callable[..., T]) -> list[T]:
    """The objects that `write_lines` kept."""
    with path.open(encoding="utf-8") as file:
        return [kind(**json.loads(line)) for line in file]

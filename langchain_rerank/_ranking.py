"""One query's way from documents to results; the backend is asked outside, sync or async."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from langchain_core.documents import Document

from langchain_rerank._duplicates import first_of_each
from langchain_rerank.backends.base import Backend, Score

logger = logging.getLogger(__name__)

_SCALARS = (str, int, float, bool, type(None))

_PREVIOUS_PASS = (
    "blended_score",
    "layer_scores",
    "near_duplicates",
    "passage_span",
    "relevance_logit",
    "relevant_spans",
    "truncated",
)
"""Metadata of ours that would lie about this pass if an earlier one left them."""

_SMALLEST = 1e-12
"""A probability of 0 or 1 has no logit; this is as near as the blend lets one come."""

QUERIES_AT_ONCE = 32
"""How many queries of many are handed to the backend together."""

_STAGES = "_rerank_stages"


@dataclass(frozen=True)
class RerankResult:
    """One ranked document or text."""

    index: int
    """Where it stood in the input, from 0."""

    score: float
    """How relevant it is, in [0, 1]."""

    document: Document | str
    """A copy of the document with the new metadata; or the text, where texts were given."""

    @property
    def text(self) -> str:
        """The document's text."""
        return self.document.page_content if isinstance(self.document, Document) else self.document


@dataclass(frozen=True)
class Settings:
    """What one call ranks by."""

    backend: Backend
    top_n: int | None
    score_threshold: float | None
    retrieval_weight: float
    metadata_fields: tuple[str, ...]
    duplicate_similarity: float | None


class Ranking:
    """One query and its documents, on the way to results.

    Args:
        settings: What to rank by.
        query: What the user asked.
        documents: n documents or texts; `None` is an empty text.
    """

    def __init__(self, settings: Settings, query: str, documents: Sequence[Document | str | None]) -> None:
        if not isinstance(query, str) or isinstance(documents, (str, Document)):
            raise TypeError(
                "expected a query and a sequence of documents, as in rerank(query, documents) or "
                f"compress_documents(documents, query); but query is {type(query).__name__} "
                f"and documents is {type(documents).__name__}"
            )
        self.settings, self.query, self.documents = settings, query, list(documents)
        for place, document in enumerate(self.documents):
            if not isinstance(document, (Document, str, type(None))):
                raise TypeError(f"documents[{place}] is {type(document).__name__}, neither a Document nor a text")
        self.results: list[RerankResult] = []
        self._started = time.perf_counter()
        self._places: dict[str, list[int]] = {}
        for index, document in enumerate(self.documents if settings.top_n != 0 else []):
            self._places.setdefault(self._read(document), []).append(index)

    @property
    def texts(self) -> list[str]:
        """The distinct texts to score: the same one twice is scored once."""
        return list(self._places)

    def unknown(self, known: Mapping[str, float]) -> tuple[str, list[str]]:
        """What to ask the backend: the query, and those of `texts` that are not known yet."""
        return self.query, [text for text in self.texts if text not in known]

    def rank(self, scores: Mapping[str, float]) -> None:
        """Turn the score of each of `texts` into the results."""
        places = sorted((index, scores[text]) for text, indices in self._places.items() for index in indices)
        by_index = dict(places)
        keys = self._blended(by_index) if self.settings.retrieval_weight else by_index
        threshold = self.settings.score_threshold
        order = sorted(by_index, key=lambda index: -keys[index])
        kept = [index for index in order if threshold is None or by_index[index] >= threshold]
        kept, repeats = self._without_repeats(kept)
        blended = keys if keys is not by_index else {}
        self.results = [
            self._result(index, by_index[index], blended.get(index), repeats.get(index, []))
            for index in kept[: self.settings.top_n]
        ]

    def _read(self, document: Document | str | None) -> str:
        """What the model reads of a document: the chosen metadata, a line each, then the text."""
        if not isinstance(document, Document):
            return document or ""
        return self._heading(document) + document.page_content

    def _heading(self, document: Document) -> str:
        values = (document.metadata.get(field) for field in self.settings.metadata_fields)
        return "".join(f"{_shown(value)}\n" for value in values if value is not None and _shown(value))

    def _blended(self, scores: Mapping[int, float]) -> Mapping[int, float]:
        """The mix of model and first stage for each index; the scores themselves where no document has been scored."""
        retrieved = {index: _retrieval_score(self.documents[index]) for index in scores}
        known = {index: value for index, value in retrieved.items() if value is not None}
        if not scores:
            return scores
        if not known:
            logger.warning("retrieval_weight has no effect: no document has a retrieval_score in its metadata")
            return scores
        weight = self.settings.retrieval_weight
        logits, first = _z_scores(_logits(scores)), _z_scores(known)
        return {index: (1 - weight) * logits[index] + weight * first.get(index, 0.0) for index in scores}

    def _without_repeats(self, order: Sequence[int]) -> tuple[list[int], dict[int, list[int]]]:
        """The order without near-duplicates of better ones, and by index which ones each stands for."""
        similarity = self.settings.duplicate_similarity
        if similarity is None:
            return list(order), {}
        repeats: dict[int, list[int]] = {}
        texts = [_text(self.documents[index]) for index in order]
        for place, first in enumerate(first_of_each(texts, similarity, most=self.settings.top_n)):
            repeats.setdefault(order[first], []).extend([order[place]] if place != first else [])
        return list(repeats), repeats

    def _result(self, index: int, score: float, blended: float | None, repeats: Sequence[int]) -> RerankResult:
        document = self.documents[index]
        if not isinstance(document, Document):
            return RerankResult(index, float(score), document or "")
        metadata = {key: _copied(value) for key, value in document.metadata.items()}
        if _STAGES in document.__dict__ or "stage_scores" in metadata:
            metadata = {key: value for key, value in metadata.items() if key not in _PREVIOUS_PASS}
        metadata.setdefault("retrieval_rank", index + 1)
        metadata["relevance_score"] = float(score)
        metadata.update(self._details(document, score))
        if blended is not None:
            metadata["blended_score"] = blended
        if repeats:
            metadata["near_duplicates"] = [self._about(repeat) for repeat in repeats]
        return RerankResult(index, float(score), self._with_stages(document, metadata))

    def _details(self, document: Document, score: float) -> dict[str, Any]:
        """What the backend says of a score; a span counts in the document's own text, without the heading."""
        details = dict(score.details) if isinstance(score, Score) else {}
        details.pop("relevance_score", None)  # is the score itself
        if "passage_span" in details:
            heading = len(self._heading(document))
            details["passage_span"] = [max(0, place - heading) for place in details["passage_span"]]
        return details

    def _about(self, index: int) -> dict[str, Any]:
        """What a document says of one that it stands for."""
        document = self.documents[index]
        return {"id": document.id if isinstance(document, Document) else None, "retrieval_rank": _rank(document, index)}

    def _with_stages(self, document: Document, metadata: dict[str, Any]) -> Document:
        """The copy; from the second pass on with every stage's score in `stage_scores`.

        The stages travel outside the metadata, as an instance attribute that is no field: one pass alone should not
        say its score twice.
        """
        backend = self.settings.backend
        stages = [*_stages(document)]
        stages.append({"backend": backend.name, "model": backend.model, "score": metadata["relevance_score"]})
        if len(stages) > 1:
            metadata["stage_scores"] = copy.deepcopy(stages)
        ranked = document.model_copy(update={"metadata": metadata})
        ranked.__dict__[_STAGES] = stages
        return ranked

    def inputs(self) -> dict[str, Any]:
        """What the trace sees first: no passage texts."""
        backend = self.settings.backend
        return {
            "query": self.query,
            "documents": len(self.documents),
            "backend": backend.name,
            "model": backend.model,
            "top_n": self.settings.top_n,
        }

    def outputs(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """What the trace sees at the end."""
        latency = (time.perf_counter() - self._started) * 1000
        return {**self.ranked(), "latency_ms": latency, "usage": dict(usage)}

    def ranked(self) -> dict[str, Any]:
        """The results as the trace shows them."""
        documents = [result.document for result in self.results]
        return {
            "ids": [document.id if isinstance(document, Document) else None for document in documents],
            "indices": [result.index for result in self.results],
            "scores": [result.score for result in self.results],
        }


class RankingMany:
    """Several queries, each with its documents.

    Args:
        settings: What to rank by.
        queries: m queries.
        documents: For each of them its documents.
        earlier: What an earlier stage made of these, if there was one.
    """

    def __init__(
        self,
        settings: Settings,
        queries: Sequence[str],
        documents: Sequence[Sequence[Document | str | None]],
        earlier: Sequence[Sequence[RerankResult]] | None,
    ) -> None:
        self.settings, self._earlier = settings, earlier
        if earlier is not None:
            documents = [[result.document for result in several] for several in earlier]
        self.rankings = [Ranking(settings, query, several) for query, several in zip(queries, documents, strict=True)]
        self._started = time.perf_counter()

    def results(self) -> list[list[RerankResult]]:
        """Each query's results."""
        earlier: Sequence[Sequence[RerankResult] | None] = self._earlier or [None] * len(self.rankings)
        return [traced_back(ranking.results, before) for ranking, before in zip(self.rankings, earlier, strict=True)]

    def parts(self) -> list[Sequence[Ranking]]:
        """The rankings in runs that are scored together, so that memory stays bounded."""
        return [
            self.rankings[start : start + QUERIES_AT_ONCE] for start in range(0, len(self.rankings), QUERIES_AT_ONCE)
        ]

    def inputs(self) -> dict[str, Any]:
        """What the trace sees first: no passage texts."""
        return {
            "queries": [ranking.query for ranking in self.rankings],
            "documents": [len(ranking.documents) for ranking in self.rankings],
            "backend": self.settings.backend.name,
            "model": self.settings.backend.model,
            "top_n": self.settings.top_n,
        }

    def outputs(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """What the trace sees at the end."""
        latency = (time.perf_counter() - self._started) * 1000
        return {"queries": [r.ranked() for r in self.rankings], "latency_ms": latency, "usage": dict(usage)}


def traced_back(results: list[RerankResult], earlier: Sequence[RerankResult] | None) -> list[RerankResult]:
    """The results with `index` pointing into what the earlier stage, if any, was given."""
    if earlier is None:
        return results
    return [replace(result, index=earlier[result.index].index) for result in results]


def _stages(document: Document) -> list[dict[str, Any]]:
    """What earlier passes scored, where one did; a score of unknown origin says so."""
    if "relevance_score" not in document.metadata:
        return []
    score = document.metadata["relevance_score"]
    stages = document.metadata.get("stage_scores") or document.__dict__.get(_STAGES)
    if stages and stages[-1]["score"] == score:
        return list(stages)
    return [{"backend": None, "model": None, "score": score}]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _text(document: Document | str | None) -> str:
    return document.page_content if isinstance(document, Document) else document or ""


def _rank(document: Document | str | None, index: int) -> Any:
    return document.metadata.get("retrieval_rank", index + 1) if isinstance(document, Document) else index + 1


def _retrieval_score(document: Document | str | None) -> float | None:
    value = document.metadata.get("retrieval_score") if isinstance(document, Document) else None
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def _copied(value: Any) -> Any:
    """A deep copy; what cannot be copied, such as an open file, is shared rather than lost."""
    if isinstance(value, _SCALARS):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - any error may come out of a stranger's __deepcopy__
        return value


def _logits(scores: Mapping[int, float]) -> dict[int, float]:
    """The logit of each score; an empty text's 0.0, which no model gave, counts as the lowest of the others."""
    known = {index: _logit(score) for index, score in scores.items() if score > 0}
    lowest = min(known.values(), default=0.0)
    return {index: known.get(index, lowest) for index in scores}


def _logit(score: float) -> float:
    bounded = min(max(score, _SMALLEST), 1 - _SMALLEST)
    return math.log(bounded) - math.log1p(-bounded)


def _z_scores(values: Mapping[int, float]) -> dict[int, float]:
    """Each value less the mean, in standard deviations; zeros where all are equal."""
    mean = math.fsum(values.values()) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values.values()) / len(values))
    return {index: (value - mean) / deviation if deviation else 0.0 for index, value in values.items()}

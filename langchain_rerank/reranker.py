"""The `BaseDocumentCompressor` that ranks documents by a backend's scores."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal, TypeAlias

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)
from pydantic import ConfigDict, Field

from langchain_rerank.backends.base import Backend, Score, collect_usage
from langchain_rerank.errors import ConfigurationError


class _Keep(Enum):
    """Tells "not given" from None, 0 and 0.0, which all mean something."""

    KEEP = "the reranker's own"


KEEP: Final = _Keep.KEEP
"""For a per-call option: the reranker's own setting holds."""

Keep: TypeAlias = Literal[_Keep.KEEP]

_SCALARS = (str, int, float, bool, type(None))

_PREVIOUS_PASS = ("truncated", "passage_span", "relevance_logit", "blended_score")
"""Metadata of ours that would lie about this pass if an earlier one left them."""

_SMALLEST = 1e-12
"""A probability of 0 or 1 has no logit; this is as near as the blend lets one come."""


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


class Reranker(BaseDocumentCompressor):
    """Puts the documents that answer the query first.

    Takes the place of any `BaseDocumentCompressor`. The documents that come back are copies with everything that
    they had, and in their metadata `relevance_score`, a float in [0, 1], and `retrieval_rank`, where they stood
    before, from 1. The documents given are not written to. Equal scores keep the incoming order.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)

    backend: Backend
    """What scores; `init_reranker` builds it from a name."""

    top_n: int | None = Field(default=None, ge=0)
    """How many documents to keep, best first. `None` keeps all."""

    score_threshold: float | None = Field(default=None, ge=0, le=1)
    """Least `relevance_score` of a document that is kept; looked at before `top_n`. Scores of different models are
    not calibrated against each other: choose it for the model."""

    retrieval_weight: float = Field(default=0.0, ge=0, le=1)
    """How much the first stage counts in the order: documents are ordered by `(1 - w) z(logit) + w z(retrieval_score)`,
    z-scores within the candidates. A document without `retrieval_score` in its metadata counts as average there.
    `relevance_score` and the threshold stay the model's own; the mix is added as `blended_score`."""

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        top_n: int | Keep | None = KEEP,
        score_threshold: float | Keep | None = KEEP,
    ) -> list[Document]:
        """Rank documents by relevance to the query.

        Args:
            documents: n candidates.
            query: What the user asked.
            callbacks: As LangChain passes them: the run `rerank` is traced below them.
            top_n: How many to keep in this call; `None` keeps all.
            score_threshold: Least score to keep in this call; `None` keeps all.

        Returns:
            Copies, best first, with `relevance_score` in their metadata.

        Raises:
            BackendError: Scoring failed.
            ConfigurationError: `top_n` or `score_threshold` is out of range.
        """
        results = self.rerank(query, documents, top_n=top_n, score_threshold=score_threshold, callbacks=callbacks)
        return [result.document for result in results if isinstance(result.document, Document)]

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        top_n: int | Keep | None = KEEP,
        score_threshold: float | Keep | None = KEEP,
    ) -> list[Document]:
        """As `compress_documents`, without blocking the event loop."""
        results = await self.arerank(
            query, documents, top_n=top_n, score_threshold=score_threshold, callbacks=callbacks
        )
        return [result.document for result in results if isinstance(result.document, Document)]

    def rerank(
        self,
        query: str,
        documents: Sequence[Document | str | None],
        *,
        top_n: int | Keep | None = KEEP,
        score_threshold: float | Keep | None = KEEP,
        callbacks: Callbacks | None = None,
    ) -> list[RerankResult]:
        """Rank documents or plain texts by relevance to the query.

        Args:
            query: What the user asked.
            documents: n documents or texts; `None` is an empty text.
            top_n: How many to keep in this call; `None` keeps all.
            score_threshold: Least score to keep in this call; `None` keeps all.
            callbacks: As LangChain passes them.

        Returns:
            Results, best first; `index` points into `documents`.

        Raises:
            BackendError: Scoring failed.
            ConfigurationError: `top_n` or `score_threshold` is out of range.
        """
        job = self._job(query, documents, top_n, score_threshold)
        with self._traced(job, callbacks):
            job.rank(self.backend.score(query, job.texts) if job.texts else [])
        return job.results

    async def arerank(
        self,
        query: str,
        documents: Sequence[Document | str | None],
        *,
        top_n: int | Keep | None = KEEP,
        score_threshold: float | Keep | None = KEEP,
        callbacks: Callbacks | None = None,
    ) -> list[RerankResult]:
        """As `rerank`, without blocking the event loop."""
        job = self._job(query, documents, top_n, score_threshold)
        async with self._atraced(job, callbacks):
            job.rank(await self.backend.ascore(query, job.texts) if job.texts else [])
        return job.results

    def _job(
        self,
        query: str,
        documents: Sequence[Document | str | None],
        top_n: int | Keep | None,
        score_threshold: float | Keep | None,
    ) -> _Job:
        top_n = self.top_n if top_n is KEEP else top_n
        threshold = self.score_threshold if score_threshold is KEEP else score_threshold
        if top_n is not None and top_n < 0:
            raise ConfigurationError(f"top_n is {top_n}; it must be 0 or more, or None to keep all")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigurationError(f"score_threshold is {threshold}; scores lie in [0, 1]")
        return _Job(self, query, list(documents), top_n, threshold)

    @contextmanager
    def _traced(self, job: _Job, callbacks: Callbacks | None) -> Iterator[None]:
        """A chain run named `rerank` below whatever run is active, failed if what is within fails."""
        manager = get_callback_manager_for_config(ensure_config({"callbacks": callbacks}))
        run = manager.on_chain_start(None, job.inputs(), name="rerank")
        with collect_usage() as usage:
            try:
                yield
            except BaseException as error:
                run.on_chain_error(error)
                raise
        run.on_chain_end(job.outputs(usage))

    @asynccontextmanager
    async def _atraced(self, job: _Job, callbacks: Callbacks | None) -> AsyncIterator[None]:
        manager = get_async_callback_manager_for_config(ensure_config({"callbacks": callbacks}))
        run = await manager.on_chain_start(None, job.inputs(), name="rerank")
        with collect_usage() as usage:
            try:
                yield
            except BaseException as error:
                await run.on_chain_error(error)
                raise
        await run.on_chain_end(job.outputs(usage))


class _Job:
    """One query's way from documents to results; the backend is asked outside, sync or async."""

    def __init__(
        self,
        reranker: Reranker,
        query: str,
        documents: Sequence[Document | str | None],
        top_n: int | None,
        threshold: float | None,
    ) -> None:
        self.reranker, self.query, self.documents = reranker, query, documents
        self.top_n, self.threshold = top_n, threshold
        self.started = time.perf_counter()
        self.results: list[RerankResult] = []
        self.places: dict[str, list[int]] = {}
        for index, document in enumerate(documents if top_n != 0 else []):
            self.places.setdefault(_text(document), []).append(index)

    @property
    def texts(self) -> list[str]:
        """The distinct texts: the same one twice is scored once."""
        return list(self.places)

    def rank(self, scores: Sequence[float]) -> None:
        """Turn one score for each of `texts` into the results."""
        by_index = dict(sorted(self._by_index(scores).items()))
        keys = self._blended(by_index) if self.reranker.retrieval_weight else by_index
        order = sorted(by_index, key=lambda index: -keys[index])
        kept = [index for index in order if self.threshold is None or by_index[index] >= self.threshold]
        blended = keys if keys is not by_index else {}
        self.results = [self._result(index, by_index[index], blended.get(index)) for index in kept[: self.top_n]]

    def _by_index(self, scores: Sequence[float]) -> dict[int, float]:
        pairs = zip(self.places.values(), scores, strict=True)
        return {index: score for indices, score in pairs for index in indices}

    def _blended(self, scores: Mapping[int, float]) -> Mapping[int, float]:
        """The mix of model and first stage for each index; the scores themselves where no document has been scored."""
        retrieved = {index: _retrieval_score(self.documents[index]) for index in scores}
        known = {index: value for index, value in retrieved.items() if value is not None}
        if not known:
            return scores
        weight = self.reranker.retrieval_weight
        logits, first = _z_scores(_logits(scores)), _z_scores(known)
        return {index: (1 - weight) * logits[index] + weight * first.get(index, 0.0) for index in scores}

    def _result(self, index: int, score: float, blended: float | None) -> RerankResult:
        document = self.documents[index]
        if not isinstance(document, Document):
            return RerankResult(index, float(score), document or "")
        metadata = {key: _copied(value) for key, value in document.metadata.items()}
        if "relevance_score" in metadata:
            metadata = {key: value for key, value in metadata.items() if key not in _PREVIOUS_PASS}
        metadata.setdefault("retrieval_rank", index + 1)
        metadata["relevance_score"] = float(score)
        if isinstance(score, Score):
            metadata.update(score.details)
        if blended is not None:
            metadata["blended_score"] = blended
        return RerankResult(index, float(score), self._with_stages(document, metadata))

    def _with_stages(self, document: Document, metadata: dict[str, Any]) -> Document:
        """The copy; from the second pass on with every stage's score in `stage_scores`.

        The stages travel outside the metadata, as an instance attribute that is no field: one pass alone should not
        say its score twice.
        """
        backend = self.reranker.backend
        stages = [*_stages(document)]
        stages.append({"backend": backend.name, "model": backend.model, "score": metadata["relevance_score"]})
        if len(stages) > 1:
            metadata["stage_scores"] = copy.deepcopy(stages)
        ranked = document.model_copy(update={"metadata": metadata})
        ranked.__dict__[_STAGES] = stages
        return ranked

    def inputs(self) -> dict[str, Any]:
        """What the trace sees first: no passage texts."""
        backend = self.reranker.backend
        return {
            "query": self.query,
            "documents": len(self.documents),
            "backend": backend.name,
            "model": backend.model,
            "top_n": self.top_n,
        }

    def outputs(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """What the trace sees at the end."""
        ranked = [result.document for result in self.results]
        return {
            "ids": [document.id if isinstance(document, Document) else None for document in ranked],
            "indices": [result.index for result in self.results],
            "scores": [result.score for result in self.results],
            "latency_ms": (time.perf_counter() - self.started) * 1000,
            "usage": dict(usage),
        }


_STAGES = "_rerank_stages"


def _stages(document: Document) -> list[dict[str, Any]]:
    """What earlier passes scored, where one did; a score of unknown origin says so."""
    if "relevance_score" not in document.metadata:
        return []
    unknown = {"backend": None, "model": None, "score": document.metadata["relevance_score"]}
    stages = document.metadata.get("stage_scores") or document.__dict__.get(_STAGES) or [unknown]
    return list(stages)


def _text(document: Document | str | None) -> str:
    return document.page_content if isinstance(document, Document) else document or ""


def _retrieval_score(document: Document | str | None) -> float | None:
    value = document.metadata.get("retrieval_score") if isinstance(document, Document) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


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

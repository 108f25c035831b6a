"""The `BaseDocumentCompressor` that ranks documents by a backend's scores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)
from langchain_core.stores import ByteStore
from pydantic import ConfigDict, Field

from langchain_rerank._cache import ScoreCache
from langchain_rerank._ranking import Ranking, RankingMany, RerankResult, Settings, traced_back
from langchain_rerank.backends.base import Backend, collect_usage
from langchain_rerank.errors import ConfigurationError

if TYPE_CHECKING:
    from langchain_core.cross_encoders import BaseCrossEncoder

__all__ = ["KEEP", "RerankResult", "Reranker"]


class _Keep(Enum):
    """Tells "not given" from None, 0 and 0.0, which all mean something."""

    KEEP = "the reranker's own"


KEEP: Final = _Keep.KEEP
"""For a per-call option: the reranker's own setting holds."""

Keep: TypeAlias = Literal[_Keep.KEEP]


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
    """How much the first stage counts in the order: documents are ordered by
    `(1 - w) z(logit) + w z(retrieval_score)`, z-scores within the candidates. A document without `retrieval_score` in
    its metadata counts as average there. `relevance_score` and the threshold stay the model's own; the mix is added as
    `blended_score`."""

    metadata_fields: tuple[str, ...] = ()
    """Metadata that the model reads before the text, a line each, such as `("title",)`. The text that comes back
    stays as it is."""

    duplicate_similarity: float | None = Field(default=None, gt=0, le=1)
    """Passages at least this similar to a better one (Jaccard, runs of three words) give up their place; 1 means the
    same text but for case, punctuation and space. The one that stays lists them in `near_duplicates`. `None` keeps
    all."""

    cache: ByteStore | None = Field(default=None, exclude=True, repr=False)
    """Where scores are kept, such as `langchain_core.stores.InMemoryByteStore()`. Keys are digests of query, text,
    model, its files and every option that can change a score."""

    after: Reranker | None = None
    """A reranker that goes first: this one ranks only what that keeps. `init_reranker` makes it of a list."""

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
        _only_documents(documents)
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
        _only_documents(documents)
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
        settings = self._settings(top_n, score_threshold)
        earlier = self.after.rerank(query, documents, callbacks=callbacks) if self.after else None
        ranking = Ranking(settings, query, documents if earlier is None else [result.document for result in earlier])
        with self._traced(ranking, callbacks):
            self._rank([ranking])
        return traced_back(ranking.results, earlier)

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
        settings = self._settings(top_n, score_threshold)
        earlier = await self.after.arerank(query, documents, callbacks=callbacks) if self.after else None
        ranking = Ranking(settings, query, documents if earlier is None else [result.document for result in earlier])
        async with self._atraced(ranking, callbacks):
            await self._arank([ranking])
        return traced_back(ranking.results, earlier)

    def rerank_many(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[Document | str | None]],
        *,
        top_n: int | Keep | None = KEEP,
        score_threshold: float | Keep | None = KEEP,
        callbacks: Callbacks | None = None,
        progress: bool = False,
    ) -> list[list[RerankResult]]:
        """Rank the documents of several queries, in fewer and fuller batches than one by one.

        Args:
            queries: m queries.
            documents: For each of them its documents or texts.
            top_n: How many to keep for each query; `None` keeps all.
            score_threshold: Least score to keep; `None` keeps all.
            callbacks: As LangChain passes them: one run `rerank_many` is traced below them.
            progress: Show a bar on standard error.

        Returns:
            m lists of results, each as `rerank` returns it.

        Raises:
            BackendError: Scoring failed.
            ConfigurationError: There are not as many lists of documents as queries, or an option is out of range.
        """
        settings = self._many_settings(queries, documents, top_n, score_threshold)
        earlier = self.after.rerank_many(queries, documents, callbacks=callbacks) if self.after else None
        many = RankingMany(settings, queries, documents, earlier)
        with self._traced(many, callbacks, name="rerank_many"):
            for part in _shown(many.parts(), progress=progress):
                self._rank(part)
        return many.results()

    async def arerank_many(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[Document | str | None]],
        *,
        top_n: int | Keep | None = KEEP,
        score_threshold: float | Keep | None = KEEP,
        callbacks: Callbacks | None = None,
        progress: bool = False,
    ) -> list[list[RerankResult]]:
        """As `rerank_many`, without blocking the event loop; a service is asked for several queries at a time."""
        settings = self._many_settings(queries, documents, top_n, score_threshold)
        earlier = await self.after.arerank_many(queries, documents, callbacks=callbacks) if self.after else None
        many = RankingMany(settings, queries, documents, earlier)
        async with self._atraced(many, callbacks, name="rerank_many"):
            for part in _shown(many.parts(), progress=progress):
                await self._arank(part)
        return many.results()

    def warmup(self) -> None:
        """Load ahead of time what the first call would load."""
        if self.after:
            self.after.warmup()
        self.backend.warmup()

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """A step of an LCEL chain: `{"query": ..., "documents": [...]}` in, ranked documents out.

        `top_n` and `score_threshold` may stand beside these two for one call.
        """
        return RunnableLambda(self._invoke, afunc=self._ainvoke, name="Reranker")

    def as_cross_encoder(self) -> BaseCrossEncoder:
        """The backend as LangChain's `BaseCrossEncoder`, for what takes one, such as `CrossEncoderReranker`."""
        from langchain_rerank._cross_encoder import CrossEncoderAdapter

        return CrossEncoderAdapter(self)

    def _invoke(self, asked: dict[str, Any]) -> list[Document]:
        return self.compress_documents(**_step(asked))

    async def _ainvoke(self, asked: dict[str, Any]) -> list[Document]:
        return await self.acompress_documents(**_step(asked))

    def _settings(self, top_n: int | Keep | None, score_threshold: float | Keep | None) -> Settings:
        top_n = self.top_n if top_n is KEEP else top_n
        threshold = self.score_threshold if score_threshold is KEEP else score_threshold
        if top_n is not None and (not isinstance(top_n, int) or top_n < 0):
            raise ConfigurationError(f"top_n is {top_n!r}; it must be a whole number, 0 or more, or None to keep all")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigurationError(f"score_threshold is {threshold}; scores lie in [0, 1]")
        return Settings(
            self.backend, top_n, threshold, self.retrieval_weight, self.metadata_fields, self.duplicate_similarity
        )

    def _many_settings(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[Document | str | None]],
        top_n: int | Keep | None,
        score_threshold: float | Keep | None,
    ) -> Settings:
        if len(queries) != len(documents):
            raise ConfigurationError(f"{len(queries)} queries, but {len(documents)} lists of documents")
        return self._settings(top_n, score_threshold)

    def _rank(self, rankings: Sequence[Ranking]) -> None:
        """Score what no cache knows, in one call of the backend, and rank."""
        cache = self._cache()
        known = [cache.get(ranking.query, ranking.texts) if cache else {} for ranking in rankings]
        asked = [ranking.unknown(scores) for ranking, scores in zip(rankings, known, strict=True)]
        answers = self.backend.score_many(asked)
        for ranking, scores, (query, texts), answer in zip(rankings, known, asked, answers, strict=True):
            fresh = dict(zip(texts, answer, strict=True))
            if cache:
                cache.put(query, fresh)
            ranking.rank({**scores, **fresh})

    async def _arank(self, rankings: Sequence[Ranking]) -> None:
        cache = self._cache()
        known = [await cache.aget(ranking.query, ranking.texts) if cache else {} for ranking in rankings]
        asked = [ranking.unknown(scores) for ranking, scores in zip(rankings, known, strict=True)]
        answers = await self.backend.ascore_many(asked)
        for ranking, scores, (query, texts), answer in zip(rankings, known, asked, answers, strict=True):
            fresh = dict(zip(texts, answer, strict=True))
            if cache:
                await cache.aput(query, fresh)
            if self.duplicate_similarity is None:
                ranking.rank({**scores, **fresh})
            else:  # comparing texts takes its time
                await asyncio.to_thread(ranking.rank, {**scores, **fresh})

    def _cache(self) -> ScoreCache | None:
        return None if self.cache is None else ScoreCache(self.cache, self.backend)

    @contextmanager
    def _traced(self, work: _Work, callbacks: Callbacks | None, name: str = "rerank") -> Iterator[None]:
        """A chain run below whatever run is active, failed if what is within fails."""
        manager = get_callback_manager_for_config(ensure_config({"callbacks": callbacks}))
        run = manager.on_chain_start(None, work.inputs(), name=name)
        with collect_usage() as usage:
            try:
                yield
            except BaseException as error:
                run.on_chain_error(error)
                raise
        run.on_chain_end(work.outputs(usage))

    @asynccontextmanager
    async def _atraced(self, work: _Work, callbacks: Callbacks | None, name: str = "rerank") -> AsyncIterator[None]:
        manager = get_async_callback_manager_for_config(ensure_config({"callbacks": callbacks}))
        run = await manager.on_chain_start(None, work.inputs(), name=name)
        with collect_usage() as usage:
            try:
                yield
            except BaseException as error:
                await run.on_chain_error(error)
                raise
        await run.on_chain_end(work.outputs(usage))


def _only_documents(documents: Sequence[Any]) -> None:
    if isinstance(documents, Sequence) and not isinstance(documents, str):
        for place, document in enumerate(documents):
            if not isinstance(document, Document):
                kind = type(document).__name__
                raise TypeError(f"documents[{place}] is {kind}, not a Document; for texts use rerank(query, texts)")


class _Work(Protocol):
    """What can be traced."""

    def inputs(self) -> dict[str, Any]:
        """What the trace sees first."""

    def outputs(self, usage: dict[str, Any]) -> dict[str, Any]:
        """What the trace sees at the end."""


def _step(asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `compress_documents` out of a chain's mapping."""
    known = {"query", "documents", "top_n", "score_threshold"}
    if not {"query", "documents"} <= asked.keys() <= known:
        raise ConfigurationError(
            f"A reranking step takes query and documents, and top_n or score_threshold; not {', '.join(sorted(asked))}"
        )
    return asked


def _shown(parts: Sequence[Sequence[Ranking]], *, progress: bool) -> Iterator[Sequence[Ranking]]:
    """The parts, with a bar on standard error if it is asked for."""
    if not progress:
        yield from parts
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("Reranking", total=sum(map(len, parts)))
        for part in parts:
            yield part
            bar.advance(task, len(part))

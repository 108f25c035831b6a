"""The two-stage pipeline: retrievers that recall many documents and keep the best few."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from langchain_classic.retrievers.contextual_compression import ContextualCompressionRetriever
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever, LangSmithRetrieverParams, RetrieverLike
from langchain_core.runnables import Runnable, run_in_executor
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever
from pydantic import ConfigDict, Field, ValidationError

from langchain_rerank._optional import require
from langchain_rerank._pipeline import make_retriever, read_json_lines, read_pipeline
from langchain_rerank._qdrant.points import to_document, to_points
from langchain_rerank.errors import ConfigurationError, RetrieverError, UnexpectedKeywordError
from langchain_rerank.factory import Spec, init_reranker, refuse_unknown
from langchain_rerank.reranker import KEEP, Keep, Reranker

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from pydantic import SecretStr
    from qdrant_client import QdrantClient
    from typing_extensions import Self

    from langchain_rerank._qdrant.points import Point
    from langchain_rerank.sparse import BM25SparseEmbeddings

_SHOWN = 40
"""How many characters of a document an error shows."""

_NAMED = 3
"""How many of the documents that are not there an error names."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

logger = logging.getLogger(__name__)

DEFAULT_K = 50
"""How many documents the first stage fetches."""

DEFAULT_TOP_N = 5
"""How many documents a pipeline keeps."""


class ScoredRetriever(BaseRetriever):
    """The best k documents of a vector store, with what the store said of them.

    In the metadata of each document stand `retrieval_score`, the store's own number (of some stores a distance, which
    is the lower the better), and `retrieval_rank`, from 1. A store without scores gives the rank alone.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    vectorstore: VectorStore
    """What is searched."""

    k: int = Field(default=DEFAULT_K, ge=1)
    """How many documents to fetch."""

    filter: Any = None
    """Which documents to look at, as the store's own `filter` takes it; `None` looks at all."""

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002  # LangChain's name
        k: int | None = None,
        filter: Any = None,  # noqa: A002  # LangChain's name
        **unknown: Any,
    ) -> list[Document]:
        return self._marked(self._found(query, self._options(k, filter, unknown)))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002
        k: int | None = None,
        filter: Any = None,  # noqa: A002
        **unknown: Any,
    ) -> list[Document]:
        return self._marked(await self._afound(query, self._options(k, filter, unknown)))

    def _found(self, query: str, options: dict[str, Any]) -> Sequence[tuple[Document, float | None]]:
        """What the store finds, best first, with its scores if it has any."""
        try:
            return self.vectorstore.similarity_search_with_score(query, **options)
        except NotImplementedError:
            return [(document, None) for document in self.vectorstore.similarity_search(query, **options)]

    async def _afound(self, query: str, options: dict[str, Any]) -> Sequence[tuple[Document, float | None]]:
        try:
            return await self.vectorstore.asimilarity_search_with_score(query, **options)
        except NotImplementedError:
            return [(document, None) for document in await self.vectorstore.asimilarity_search(query, **options)]

    def _options(self, k: int | None, chosen: Any, unknown: Mapping[str, Any]) -> dict[str, Any]:
        _refuse(unknown, "k", "filter")
        chosen = self.filter if chosen is None else chosen
        return {"k": _at_least(1, "k", self.k if k is None else k), **({} if chosen is None else {"filter": chosen})}

    def _marked(self, found: Sequence[tuple[Document, float | None]]) -> list[Document]:
        documents = []
        for rank, (document, score) in enumerate(found, start=1):
            original = to_document(document) if self._is_qdrant() else document
            scored = {} if score is None else {"retrieval_score": float(score)}
            metadata = {**original.metadata, **scored, "retrieval_rank": rank}
            documents.append(original.model_copy(update={"metadata": metadata}))
        return documents

    def _is_qdrant(self) -> bool:
        """Whether the store is langchain-qdrant's, found out without importing that."""
        return any(kind.__module__.partition(".")[0] == "langchain_qdrant" for kind in type(self.vectorstore).__mro__)

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        params = super()._get_ls_params(**kwargs)
        params["ls_vector_store_provider"] = type(self.vectorstore).__name__
        return params


class QdrantRetriever(ScoredRetriever):
    """The best k documents of a Qdrant collection; `create_qdrant_retriever` makes it.

    Serves any thread. `ainvoke` searches in a worker thread and never blocks the event loop. An embedded database is
    searched by one caller at a time.

    The documents come back as they went in, with their own id (a document that had none: that of its point).
    `close()` or `with` closes the client, unless the client was given.
    """

    collection: Any = Field(repr=False, exclude=True)
    """The collection behind `vectorstore`, checked."""

    owns_client: bool = Field(default=True, repr=False, exclude=True)
    """Whether `close` closes the client."""

    fusion: Literal["rrf", "dbsf"] = "rrf"
    """How a hybrid search puts its two lists together."""

    prefetch_scores: bool = False
    """Whether a hybrid search says what each half thinks of a document."""

    def add_documents(
        self, documents: Iterable[Document | str | None], *, batch_size: int = 64, progress: bool = True
    ) -> list[str]:
        """Write documents, over those with the same ids, text and metadata alike.

        Only a new or changed text is embedded. A document whose metadata alone changed keeps its vectors; one that is
        there as it stands is left alone. The id may be the caller's own or, of a document that had none, the one it
        came back with.

        Args:
            documents: As `create_qdrant_retriever` takes them.
            batch_size: How many are embedded and sent at once.
            progress: Show a bar, if there are several batches and standard error is a terminal.

        Returns:
            The id of each distinct point, which is Qdrant's and not the document's own; `delete_documents` takes both.

        Raises:
            CollectionMismatchError: The collection also has vectors that this retriever does not make. Nothing was
                written.
            ConfigurationError: Something is no document, or its metadata is no JSON. Nothing was written.
            RetrieverError: Qdrant could not be reached or refused. What was written stays; doing it again is safe.
        """
        return self._write(to_points(documents), batch_size=batch_size, progress=progress)

    def update_documents(
        self, documents: Iterable[Document], *, batch_size: int = 64, progress: bool = True
    ) -> list[str]:
        """Write documents that are there already, as `add_documents` does.

        Args:
            documents: Documents with ids.
            batch_size: How many are embedded and sent at once.
            progress: Show a bar, if there are several batches and standard error is a terminal.

        Returns:
            The id of each distinct point, which is Qdrant's and not the document's own; `delete_documents` takes both.

        Raises:
            ConfigurationError: A document has no id. Nothing was written.
            RetrieverError: An id is not there; nothing was written. Or what `add_documents` raises.
        """
        _at_least(1, "batch_size", batch_size)
        points = to_points(documents)
        for point in points:
            if point.document_id is None:
                raise ConfigurationError(
                    f"The document {point.text[:_SHOWN]!r} has no id; update_documents finds documents by their ids"
                )
        absent = self.collection.missing(points, batch_size=batch_size)
        if absent:
            names = [repr(point.document_id) for point in absent[:_NAMED]] + ["..."] * (len(absent) > _NAMED)
            raise RetrieverError(
                f"Collection {self.collection.name!r} has no documents with these ids: {', '.join(names)}. "
                "Nothing was written. add_documents writes new ones too."
            )
        return self._write(points, batch_size=batch_size, progress=progress)

    def _write(self, points: list[Point], *, batch_size: int, progress: bool) -> list[str]:
        _at_least(1, "batch_size", batch_size)
        self.collection, ids = self.collection.add(points, batch_size=batch_size, progress=progress)
        self.vectorstore = self.collection.store()
        return list(ids)

    def delete_documents(self, ids: Iterable[str], *, batch_size: int = 1000) -> int:
        """Delete documents.

        Args:
            ids: The documents' ids: the caller's own, or those of `add_documents` or of found documents.
            batch_size: How many are sent at once.

        Returns:
            How many were there and are deleted. An id that is not there is no error.

        Raises:
            ConfigurationError: Something is no id. Nothing was deleted.
            RetrieverError: Qdrant could not be reached or refused. Doing it again is safe.
        """
        _at_least(1, "batch_size", batch_size)
        return int(self.collection.delete(_only_ids(ids), batch_size=batch_size))

    async def aupdate_documents(
        self, documents: Iterable[Document], *, batch_size: int = 64, progress: bool = True
    ) -> list[str]:
        """As `update_documents`, in a worker thread."""
        return await run_in_executor(None, self.update_documents, documents, batch_size=batch_size, progress=progress)

    async def adelete_documents(self, ids: Iterable[str], *, batch_size: int = 1000) -> int:
        """As `delete_documents`, in a worker thread."""
        return await run_in_executor(None, self.delete_documents, ids, batch_size=batch_size)

    async def aadd_documents(
        self, documents: Iterable[Document | str | None], *, batch_size: int = 64, progress: bool = True
    ) -> list[str]:
        """As `add_documents`, in a worker thread."""
        return await run_in_executor(None, self.add_documents, documents, batch_size=batch_size, progress=progress)

    def close(self) -> None:
        """Close the client, if it is our own. An embedded database on disk is then free for others."""
        if self.owns_client:
            self.collection.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _options(self, k: int | None, chosen: Any, unknown: Mapping[str, Any]) -> dict[str, Any]:
        from langchain_rerank._qdrant.collection import fused_by

        options = super()._options(k, _qdrant_filter(chosen), unknown)
        return {**options, "hybrid_fusion": fused_by(self.fusion)} if self._is_hybrid() else options

    def _found(self, query: str, options: dict[str, Any]) -> Sequence[tuple[Document, float | None]]:
        if not (self.prefetch_scores and self._is_hybrid()):
            return super()._found(query, options)
        found: Sequence[tuple[Document, float | None]] = self.collection.search_both(query, **options)
        return found

    async def _afound(self, query: str, options: dict[str, Any]) -> Sequence[tuple[Document, float | None]]:
        return await run_in_executor(None, self._found, query, options)

    def _is_hybrid(self) -> bool:
        return len(self.collection.vectors.names) > 1


def _names_typos(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, with an error of ours for a keyword that it does not have."""
    known = list(signature(function).parameters)

    @wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        refuse_unknown(function.__name__, kwargs, known, UnexpectedKeywordError)
        return function(*args, **kwargs)

    return checked


@_names_typos
def create_qdrant_retriever(
    documents: Iterable[Document | str | None] = (),
    *,
    embedding: Embeddings | str | None = None,
    mode: Literal["dense", "sparse", "hybrid"] | None = None,
    location: str | None = None,
    path: str | os.PathLike[str] | None = None,
    url: str | None = None,
    client: QdrantClient | None = None,
    api_key: SecretStr | str | None = None,
    prefer_grpc: bool = False,
    timeout: float = 30.0,
    collection_name: str = "documents",
    k: int = DEFAULT_K,
    filter: Any = None,  # noqa: A002  # LangChain's name
    distance: Literal["cosine", "dot", "euclid", "manhattan"] = "cosine",
    vector_name: str = "",
    sparse_vector_name: str = "langchain-sparse",
    bm25: BM25SparseEmbeddings | Mapping[str, float] | None = None,
    fusion: Literal["rrf", "dbsf"] = "rrf",
    prefetch_scores: bool = False,
    payload_indexes: Iterable[str] | Mapping[str, str | None] = (),
    batch_size: int = 64,
    progress: bool = True,
) -> QdrantRetriever:
    """Open a Qdrant collection, or make it, and write documents to it.

    Writing the same documents again changes nothing: a point's id is made from the document's id, or from its text
    and metadata where it has none. After an interruption, do it again. What is stored unchanged is not embedded again,
    so another embedding of the same size wants another `collection_name`.

    Args:
        documents: Documents or plain texts to write; none to search what is there. Their metadata must be JSON.
        embedding: A LangChain embedding, or its name as `init_embeddings` takes it, such as
            `"huggingface:sentence-transformers/all-MiniLM-L6-v2"`. Without one BM25 searches, which needs no model.
        mode: `"dense"` searches by the embedding, `"sparse"` by BM25, `"hybrid"` by both, fused by Qdrant.
            Not given: dense where there is an embedding, else sparse.
        location: `":memory:"`, which is also what you get when no place is given, or a URL.
        path: A folder on disk, for one process at a time.
        url: A server, such as `"http://localhost:6333"`.
        client: A client that you have; it is never closed here.
        api_key: The server's key. Not given: the environment variable QDRANT_API_KEY, if there is one.
        prefer_grpc: Talk gRPC to the server.
        timeout: Seconds to wait for one answer of the server; counted up to whole ones.
        collection_name: The collection.
        k: How many documents a search returns.
        filter: Which documents to search: a `qdrant_client.models.Filter` or its JSON as a mapping. The documents'
            metadata stands below the key `metadata`.
        distance: How dense vectors are compared.
        vector_name: The name of the dense vector; "" is Qdrant's default vector.
        sparse_vector_name: The name of the BM25 vector.
        bm25: Other settings of BM25 than the usual: a `BM25SparseEmbeddings`, or a mapping of its settings.
        fusion: How a hybrid search puts its two lists of k together: `"rrf"` by their ranks, `"dbsf"` by their scores,
            each list's scaled by its mean and spread.
        prefetch_scores: Keep what each half of a hybrid search says, as `prefetch_scores` in the metadata:
            `{"dense": 0.8, "sparse": 3.1}`, or one of them where only that half found it. It costs two more searches
            within the same request.
        payload_indexes: Fields for which a server keeps an index, so that filters are fast, named as filters name
            them: `["metadata.year"]`, or with their kinds `{"metadata.year": "integer"}` (keyword, integer, float,
            geo, text, bool, datetime, uuid). Without a kind it is that of the documents' values. An embedded database
            has no indexes and filters all the same.
        batch_size: How many documents are embedded and sent at once.
        progress: Show a bar while writing, if there are several batches and standard error is a terminal.

    Returns:
        The retriever. Its `invoke` takes `k` and `filter` for one call.

    Raises:
        CollectionMismatchError: The collection was made with another vector size, distance or name, without the IDF
            modifier, with other BM25 settings or another kind of index; or documents are to be written, and it also
            has vectors that this mode does not make. Nothing was written.
        ConfigurationError: The options contradict each other, or a document cannot be stored. Nothing was written.
        MissingDependencyError: langchain-qdrant or PyStemmer is not installed.
        RetrieverUnavailableError: The server does not answer, or another process has the path open.
        RetrieverError: The server refuses, for example for want of a key.

    Example:
        >>> from langchain_rerank import create_qdrant_retriever
        >>> retriever = create_qdrant_retriever(["Mars is the red planet.", "Jupiter is the largest planet."], k=1)
        >>> [document] = retriever.invoke("Which planet is red?")
        >>> document.page_content
        'Mars is the red planet.'
    """
    require("langchain_qdrant", "qdrant_client", "Stemmer", extra="qdrant")
    from langchain_rerank._qdrant.collection import Collection, choose_vectors, fused_by
    from langchain_rerank._qdrant.connection import connect
    from langchain_rerank._qdrant.indexes import choose_indexes

    _at_least(1, "k", k)
    _at_least(1, "batch_size", batch_size)
    names = {"collection_name": collection_name, "vector_name": vector_name, "sparse_vector_name": sparse_vector_name}
    _only_texts(location=location, url=url, **names)
    if not isinstance(timeout, int | float):
        raise ConfigurationError(f"timeout is {timeout!r}; it must be a number of seconds")
    fused_by(fusion)
    indexes = choose_indexes(payload_indexes)
    chosen, points = _qdrant_filter(filter), to_points(documents)
    vectors = choose_vectors(
        mode, embedding, bm25, distance=distance, dense_name=vector_name, sparse_name=sparse_vector_name
    )
    connection = connect(
        location=location,
        path=path,
        url=url,
        client=client,
        api_key=api_key,
        prefer_grpc=prefer_grpc,
        timeout=timeout,
    )
    try:
        collection = Collection.open(connection, collection_name, vectors)
        collection.index(indexes, points)
        collection, _ = collection.add(points, batch_size=batch_size, progress=progress)
    except BaseException:
        if client is None:
            connection.close()
        raise
    return QdrantRetriever(
        vectorstore=collection.store(),
        k=k,
        filter=chosen,
        collection=collection,
        owns_client=client is None,
        fusion=fusion,
        prefetch_scores=prefetch_scores,
    )


@_names_typos
def create_bm25_retriever(
    documents: str | os.PathLike[str], *, k: int = DEFAULT_K, k1: float = 0.9, b: float = 0.4
) -> QdrantRetriever:
    """Read documents into memory and search them by BM25; a pipeline's `type: bm25`.

    Args:
        documents: A file with one JSON object a line: `text`, and `id` and `metadata` if there are any.
        k: How many documents a search returns.
        k1: How slowly repeated tokens stop to count, 0 or more.
        b: How much long documents are held back, from 0 (not at all) to 1 (in full).

    Returns:
        The retriever, over an embedded Qdrant.

    Raises:
        ConfigurationError: The file cannot be read, or a value is out of bounds.
        MissingDependencyError: langchain-qdrant or PyStemmer is not installed.
    """
    return create_qdrant_retriever(read_json_lines(Path(documents)), k=k, bm25={"k1": k1, "b": b})


class RerankRetriever(ContextualCompressionRetriever):
    """Retrieves many documents, keeps the best few; `create_rerank_retriever` makes it.

    Takes the place of any LangChain retriever. `invoke`, `ainvoke` and `batch` take `top_n`, `k` and `filter` for one
    call. `top_n=None` keeps all; of the other two `None` is the same as not given.

    `close()` or `with` closes the first stage, if that can be closed.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    top_n: int | None = Field(default=None, ge=0)
    """How many documents to keep. `None` leaves it to the compressor's own `top_n`, and keeps 5 where that says
    nothing."""

    k: int | None = Field(default=None, ge=1)
    """How many documents to rank. `None` leaves it to the base retriever."""

    filter: Any = None
    """Which documents to look at, as the vector store takes it; `None` leaves it to the base retriever."""

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        top_n: int | Keep | None = KEEP,
        filter: Any = None,  # noqa: A002  # LangChain's name
        **unknown: Any,
    ) -> list[Document]:
        options, keep = self._search_options(k, filter, unknown), self._keep(top_n)
        found = self.base_retriever.invoke(query, {"callbacks": run_manager.get_child()}, **options)
        if not found:
            return []
        ranked = self.base_compressor.compress_documents(
            found, query, run_manager.get_child(), **self._compress_options(keep)
        )
        return list(ranked)[:keep]

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        top_n: int | Keep | None = KEEP,
        filter: Any = None,  # noqa: A002
        **unknown: Any,
    ) -> list[Document]:
        options, keep = self._search_options(k, filter, unknown), self._keep(top_n)
        found = await self.base_retriever.ainvoke(query, {"callbacks": run_manager.get_child()}, **options)
        if not found:
            return []
        ranked = await self.base_compressor.acompress_documents(
            found, query, run_manager.get_child(), **self._compress_options(keep)
        )
        return list(ranked)[:keep]

    def _search_options(self, k: int | None, chosen: Any, unknown: Mapping[str, Any]) -> dict[str, Any]:
        _refuse(unknown, "k", "top_n", "filter")
        given = {"k": self.k if k is None else k, "filter": self.filter if chosen is None else chosen}
        return _for_search(self.base_retriever, {name: value for name, value in given.items() if value is not None})

    def _keep(self, top_n: int | Keep | None) -> int | None:
        if top_n is None:
            return None
        own = getattr(self.base_compressor, "top_n", None)
        given = None if top_n is KEEP else top_n
        chosen = next(n for n in (given, self.top_n, own, DEFAULT_TOP_N) if n is not None)
        return _at_least(0, "top_n", chosen)

    def close(self) -> None:
        """Close the first stage, if that can be closed: an embedded database on disk is then free for others."""
        _close(self.base_retriever)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compress_options(self, keep: int | None) -> dict[str, Any]:
        """A `Reranker` is told how many to keep; of any other compressor's documents the first are kept."""
        return {"top_n": keep} if isinstance(self.base_compressor, Reranker) else {}


@_names_typos
def create_rerank_retriever(
    retriever: RetrieverLike | VectorStore | str | Path | Mapping[str, Any] | None = None,
    reranker: BaseDocumentCompressor | Spec | None = None,
    *,
    k: int | None = None,
    top_n: int | None = None,
    filter: Any = None,  # noqa: A002  # LangChain's name
) -> RerankRetriever:
    """Put a reranker behind a retriever.

    Args:
        retriever: What recalls the candidates: a vector store (its scores are kept as `retrieval_score`), or any
            LangChain retriever. Or the whole pipeline: a mapping with `retriever` and `reranker` (and `k` and `top_n`
            if you like), or a YAML file with the same, as a `Path` or a string that ends in .yaml or .yml. Or nothing:
            then the YAML file that the environment variable LANGCHAIN_RERANK_PIPELINE names. There `retriever` is a
            mapping of options, with its name as `type`: `qdrant` (if there is none) takes those of
            `create_qdrant_retriever`, `bm25` reads a file, others come from the entry points of the group
            `langchain_rerank.retrievers`.
        reranker: A `Reranker`, any other LangChain document compressor, or what `init_reranker` takes; nothing is the
            pipeline's, else what LANGCHAIN_RERANK says, else the embedded model.
        k: How many candidates to fetch, 50 if not given. Only for vector stores and the retrievers of this package;
            others decide it themselves.
        top_n: How many documents to keep. Not given: the pipeline's `top_n`, else the reranker's own, else 5.
        filter: Which documents to look at, as the vector store takes it; a call may bring another. For the same
            retrievers as `k`.

    Returns:
        The retriever. Its `invoke` takes `top_n` for one call, and `k` and `filter` where the first stage does.

    Raises:
        ConfigurationError: `k` for a retriever that does not take it, something that is no retriever or reranker, or
            a pipeline that cannot be right.

    Example:
        >>> from langchain_rerank import create_qdrant_retriever, create_rerank_retriever
        >>> recall = create_qdrant_retriever(["Jupiter is the largest planet.", "Mars is called the red planet."])
        >>> retriever = create_rerank_retriever(recall, "embedded", top_n=1)
        >>> [best] = retriever.invoke("Which one is called the red planet?")
        >>> best.page_content
        'Mars is called the red planet.'
    """
    _check_numbers(k, top_n)
    if retriever is None or isinstance(retriever, str | Path | Mapping):
        return _from_pipeline(read_pipeline(retriever), reranker, k=k, top_n=top_n, chosen=filter)
    return _joined(retriever, _compressor(reranker), k=k, top_n=top_n, chosen=filter)


def _compressor(reranker: Any) -> BaseDocumentCompressor:
    return reranker if isinstance(reranker, BaseDocumentCompressor) else init_reranker(reranker)


def _joined(
    retriever: Any, compressor: BaseDocumentCompressor, *, k: int | None, top_n: int | None, chosen: Any
) -> RerankRetriever:
    if isinstance(retriever, VectorStore):
        recall: RetrieverLike = ScoredRetriever(vectorstore=retriever, k=DEFAULT_K if k is None else k, filter=chosen)
        return RerankRetriever(base_retriever=recall, base_compressor=compressor, top_n=top_n)
    if not isinstance(retriever, Runnable):
        raise ConfigurationError(
            f"retriever is a {type(retriever).__name__}, not a LangChain retriever or vector store"
        )
    given = {"k": k, "filter": chosen}
    _for_search(retriever, {name: value for name, value in given.items() if value is not None})
    if isinstance(retriever, VectorStoreRetriever) and "k" not in retriever.search_kwargs:
        logger.warning(
            "The vector store's retriever says no k, and LangChain's default is 4: there is little to rank. Give "
            "create_rerank_retriever the vector store itself, or search_kwargs={'k': %s}",
            DEFAULT_K,
        )
    return RerankRetriever(base_retriever=retriever, base_compressor=compressor, top_n=top_n, k=k, filter=chosen)


def _from_pipeline(
    pipeline: Mapping[str, Any], reranker: Any, *, k: int | None, top_n: int | None, chosen: Any
) -> RerankRetriever:
    """What a pipeline describes; the arguments come before it."""
    k = pipeline.get("k") if k is None else k
    top_n = pipeline.get("top_n") if top_n is None else top_n
    _check_numbers(k, top_n)
    compressor = _compressor(pipeline.get("reranker") if reranker is None else reranker)
    recall = make_retriever(pipeline["retriever"])  # last, as it may open a database
    try:
        return _joined(recall, compressor, k=k, top_n=top_n, chosen=chosen)
    except BaseException:
        if recall is not pipeline["retriever"]:
            _close(recall)
        raise


def _close(retriever: Any) -> None:
    if callable(close := getattr(retriever, "close", None)):
        close()


def _only_ids(ids: Iterable[str]) -> list[str]:
    if isinstance(ids, str):
        raise ConfigurationError(f"ids is one text; put {ids!r} into a list")
    ids = list(ids)
    for index, name in enumerate(ids):
        if not isinstance(name, str):
            raise ConfigurationError(f"ids[{index}] is {name!r}; a document's id is a text")
    return ids


def _only_texts(**options: Any) -> None:
    for name, value in options.items():
        if value is not None and not isinstance(value, str):
            raise ConfigurationError(f"{name} is {value!r}; it must be a text, in YAML with quotes")


def _qdrant_filter(content: Any) -> Any:
    """Qdrant's `Filter`, or a mapping that is one in JSON."""
    from qdrant_client.models import Filter

    if content is None or isinstance(content, Filter):
        return content
    try:
        return Filter(**content)
    except (TypeError, ValidationError) as error:
        key, value = next(iter(content.items())) if isinstance(content, Mapping) and content else ("year", 2020)
        field, value = ("year", 2020) if key in Filter.model_fields else (key, value)
        right = {"must": [{"key": f"metadata.{field}", "match": {"value": value}}]}
        raise ConfigurationError(f"{content} is not a Qdrant filter. Write one like {right}") from error


def _for_search(retriever: RetrieverLike, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if the retriever takes them."""
    if options and not isinstance(retriever, ScoredRetriever):
        raise UnexpectedKeywordError(
            f"{type(retriever).__name__} does not take {' and '.join(options)} for one call. Vector stores and the "
            "retrievers of this package do: give create_rerank_retriever the vector store itself."
        )
    return options


def _refuse(unknown: Mapping[str, Any], *known: str) -> None:
    if unknown:
        raise UnexpectedKeywordError(
            f"Unknown keyword {', '.join(map(repr, unknown))}. A call takes {', '.join(known)}."
        )


def _check_numbers(k: int | None, top_n: int | None) -> None:
    for name, value, least in (("k", k, 1), ("top_n", top_n, 0)):
        if value is not None:
            _at_least(least, name, value)


def _at_least(least: int, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    return value

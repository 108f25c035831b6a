"""One Qdrant collection: how it is made, checked and written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from langchain_core.embeddings import Embeddings
from langchain_qdrant import QdrantVectorStore, RetrievalMode
from qdrant_client import QdrantClient, models

from langchain_rerank._optional import missing
from langchain_rerank.errors import (
    CollectionMismatchError,
    ConfigurationError,
    MissingDependencyError,
    RetrieverError,
)
from langchain_rerank.sparse import BM25SparseEmbeddings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from enum import Enum

    from langchain_rerank._qdrant.connection import Connection
    from langchain_rerank._qdrant.points import Point

_METADATA = "langchain_rerank"
"""The key of a collection's own metadata under which the BM25 settings stand."""


@dataclass(frozen=True)
class Vectors:
    """What a collection holds for each document: a dense vector, a BM25 one, or both."""

    embedding: Embeddings | None = None
    """Makes the dense vectors; `None` where there are none."""

    bm25: BM25SparseEmbeddings | None = None
    """Makes the sparse vectors; `None` where there are none."""

    distance: models.Distance = models.Distance.COSINE
    dense_name: str = QdrantVectorStore.VECTOR_NAME
    sparse_name: str = QdrantVectorStore.SPARSE_VECTOR_NAME

    @property
    def mode(self) -> RetrievalMode:
        """As langchain-qdrant calls it."""
        if self.embedding is None:
            return RetrievalMode.SPARSE
        return RetrievalMode.DENSE if self.bm25 is None else RetrievalMode.HYBRID

    @property
    def complete(self) -> bool:
        """Whether documents can be weighed: BM25, where it is used, knows their average length."""
        return self.bm25 is None or self.bm25.average_length is not None

    def dense(self) -> dict[str, models.VectorParams]:
        """The dense vectors by name; the embedding is asked once for its size."""
        if self.embedding is None:
            return {}
        size = len(self.embedding.embed_query("size"))
        return {self.dense_name: models.VectorParams(size=size, distance=self.distance)}

    def sparse(self) -> dict[str, models.SparseVectorParams]:
        """The sparse vectors by name; Qdrant multiplies with the IDF."""
        return {} if self.bm25 is None else {self.sparse_name: models.SparseVectorParams(modifier=models.Modifier.IDF)}


def choose_vectors(
    mode: str | None,
    embedding: Embeddings | str | None,
    bm25: BM25SparseEmbeddings | None,
    *,
    distance: str,
    dense_name: str,
    sparse_name: str,
) -> Vectors:
    """What a mode needs of what is given.

    Raises:
        ConfigurationError: The mode or the distance is unknown, or the mode wants an embedding and there is none.
    """
    mode = mode or ("sparse" if embedding is None else "dense")
    _one_of(RetrievalMode, "mode", mode)
    if mode != "sparse" and embedding is None:
        raise ConfigurationError(f"mode={mode!r} needs an embedding")
    return Vectors(
        embedding=None if mode == "sparse" else _embeddings(embedding),
        bm25=None if mode == "dense" else bm25 or BM25SparseEmbeddings(),
        distance=models.Distance(_one_of(models.Distance, "distance", distance.capitalize())),
        dense_name=dense_name,
        sparse_name=sparse_name,
    )


def _one_of(kinds: type[Enum], name: str, value: str) -> str:
    known = [str(kind.value) for kind in kinds]
    if value not in known:
        raise ConfigurationError(f"Unknown {name} {value.lower()!r}; there are {', '.join(known).lower()}")
    return value


def _embeddings(embedding: Any) -> Embeddings:
    if isinstance(embedding, Embeddings):
        return embedding
    if not isinstance(embedding, str):
        raise ConfigurationError(f"embedding is a {type(embedding).__name__}, not a LangChain Embeddings or its name")
    home = "langchain_classic.embeddings" if missing("langchain") else "langchain.embeddings"
    try:
        made: Embeddings = import_module(home).init_embeddings(embedding)
    except ImportError as error:
        raise MissingDependencyError(f"embedding={embedding!r}: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"embedding={embedding!r}: {error}") from error
    return made


@dataclass(frozen=True)
class Collection:
    """A collection that fits its vectors."""

    connection: Connection
    name: str
    vectors: Vectors

    @classmethod
    def open(cls, connection: Connection, name: str, vectors: Vectors) -> Collection:
        """Make the collection, or check the one that is there. No document is written.

        Raises:
            CollectionMismatchError: One is there that was made otherwise.
        """
        collection = cls(connection, name, vectors)
        if not connection.collection_exists(name):
            try:
                collection._make()
            except RetrieverError:
                if not connection.collection_exists(name):
                    raise
            else:
                return collection
        return collection._checked()

    def store(self) -> QdrantVectorStore:
        """The collection as LangChain knows it."""
        return QdrantVectorStore(
            client=cast("QdrantClient", self.connection),
            collection_name=self.name,
            embedding=self.vectors.embedding,
            retrieval_mode=self.vectors.mode,
            vector_name=self.vectors.dense_name,
            distance=self.vectors.distance,
            sparse_embedding=self.vectors.bm25,
            sparse_vector_name=self.vectors.sparse_name,
            validate_embeddings=False,  # `open` has seen to both
            validate_collection_config=False,
        )

    def add(self, points: Sequence[Point], *, batch_size: int, progress: bool) -> Collection:
        """Write points, over those with the same ids; what is there unchanged is not embedded again.

        Returns:
            This collection, from now on with the average length that BM25 takes here.
        """
        if not points:
            return self
        collection = self._settled([point.text for point in points])
        store = collection.store()
        batches = [points[start : start + batch_size] for start in range(0, len(points), batch_size)]
        for batch in _shown(batches, f"Writing {len(points)} documents to {self.name}", progress=progress):
            if new := self._changed(batch, store):
                texts, metadatas = [point.text for point in new], [point.metadata for point in new]
                store.add_texts(texts, metadatas, [point.id for point in new], batch_size=batch_size)
        return collection

    def _changed(self, batch: Sequence[Point], store: QdrantVectorStore) -> list[Point]:
        found = self.connection.retrieve(self.name, [point.id for point in batch])
        stored = {record.id: record.payload for record in found}
        keys = store.content_payload_key, store.metadata_payload_key
        return [
            point
            for point in batch
            if stored.get(point.id) != dict(zip(keys, (point.text, point.metadata), strict=True))
        ]

    def _make(self) -> None:
        bm25 = self.vectors.bm25
        self.connection.create_collection(
            self.name,
            vectors_config=self.vectors.dense(),
            sparse_vectors_config=self.vectors.sparse(),
            metadata=_kept(bm25) if bm25 and bm25.average_length else None,
        )

    def _checked(self) -> Collection:
        config = self.connection.get_collection(self.name).config
        dense = config.params.vectors or {}
        self._check_dense(dense if isinstance(dense, Mapping) else {"": dense})
        self._check_sparse(config.params.sparse_vectors or {})
        return self._with_kept(config.metadata)

    def _check_dense(self, found: Mapping[str, models.VectorParams]) -> None:
        for name, wanted in self.vectors.dense().items():
            if name not in found:
                raise self._mismatch(f"dense vectors named {_names(found)}, not {name!r}", "vector_name")
            if found[name].size != wanted.size:
                raise self._mismatch(f"vectors of size {found[name].size}, the embedding's have {wanted.size}")
            if found[name].distance != wanted.distance:
                raise self._mismatch(
                    f"the distance {found[name].distance.value!r}, not {wanted.distance.value!r}", "distance"
                )

    def _check_sparse(self, found: Mapping[str, models.SparseVectorParams]) -> None:
        for name in self.vectors.sparse():
            if name not in found:
                raise self._mismatch(f"sparse vectors named {_names(found)}, not {name!r}", "sparse_vector_name")
            if found[name].modifier != models.Modifier.IDF:
                raise self._mismatch(f"sparse vectors {name!r} without the IDF modifier, which BM25 needs")

    def _with_kept(self, metadata: Mapping[str, Any] | None) -> Collection:
        """This collection with the average length from its metadata, if it stands there."""
        kept = (metadata or {}).get(_METADATA, {}).get("bm25")
        wanted = self.vectors.bm25
        if wanted is None or kept is None:
            return self
        if wanted.average_length is None:
            wanted = replace(wanted, average_length=kept["average_length"])
        if wanted.settings() != kept:
            raise self._mismatch(f"BM25 vectors made with {kept}, not {wanted.settings()}", "bm25")
        return replace(self, vectors=replace(self.vectors, bm25=wanted))

    def _mismatch(self, has: str, option: str | None = None) -> CollectionMismatchError:
        remedy = f"Give another {option} or another" if option else "Give another"
        return CollectionMismatchError(
            f"Collection {self.name!r} at {self.connection.place} has {has}. Nothing was written. "
            f"{remedy} collection_name."
        )

    def _settled(self, texts: Sequence[str]) -> Collection:
        """This collection with an average length: the one known or kept already, else that of `texts`, kept now."""
        if self.vectors.complete:
            return self
        collection = self._reread()
        if collection.vectors.complete:
            return collection
        if self.connection.count(self.name).count:
            raise RetrieverError(
                f"Collection {self.name!r} at {self.connection.place} has documents, but does not say which average "
                "length their BM25 vectors were made with. Nothing was written. "
                "Give bm25=BM25SparseEmbeddings(average_length=...) with that number."
            )
        self.connection.update_collection(self.name, metadata=_kept(cast("Any", self.vectors.bm25).fit(texts)))
        collection = self._reread()
        if collection.vectors.complete:
            return collection
        raise RetrieverError(
            f"Qdrant at {self.connection.place} does not keep the metadata of collections, so BM25's average length "
            "would be lost. Nothing was written. Upgrade it, or give bm25=BM25SparseEmbeddings(average_length=...)."
        )

    def _reread(self) -> Collection:
        return self._with_kept(self.connection.get_collection(self.name).config.metadata)


def _kept(bm25: BM25SparseEmbeddings) -> dict[str, Any]:
    """The metadata of a collection from which `_with_kept` reads."""
    return {_METADATA: {"bm25": bm25.settings()}}


def _names(found: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, found)) or "nothing"


def _shown(batches: Sequence[Any], what: str, *, progress: bool) -> Iterator[Any]:
    """The batches, with a bar on a terminal where there are several."""
    if not progress or len(batches) == 1 or not sys.stderr.isatty():
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(batches, what, console=Console(stderr=True), transient=True)

"""One Qdrant collection: how it is made, checked and written."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast

from langchain_core.embeddings import Embeddings
from langchain_qdrant import QdrantVectorStore, RetrievalMode
from qdrant_client import QdrantClient, models

from langchain_rerank._optional import missing
from langchain_rerank._qdrant.indexes import KINDS, kind_of
from langchain_rerank._qdrant.points import METADATA_KEY, TEXT_KEY, point_ids, to_found
from langchain_rerank.errors import (
    CollectionMismatchError,
    ConfigurationError,
    MissingDependencyError,
    RetrieverError,
)
from langchain_rerank.factory import refuse_unknown
from langchain_rerank.sparse import BM25SparseEmbeddings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from enum import Enum

    from langchain_core.documents import Document

    from langchain_rerank._qdrant.connection import Connection
    from langchain_rerank._qdrant.points import Point

_T = TypeVar("_T")

_SAMPLE = 100
"""How many stored documents are looked at for the kind of a field."""

logger = logging.getLogger(__name__)

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
    def names(self) -> tuple[str, ...]:
        """The names of the vectors that are made."""
        dense = () if self.embedding is None else (self.dense_name,)
        return dense if self.bm25 is None else (*dense, self.sparse_name)

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

    def of_query(self, query: str) -> dict[str, Any]:
        """The vectors of a query by name, the dense one first."""
        found: dict[str, Any] = {}
        if self.embedding is not None:
            found[self.dense_name] = self.embedding.embed_query(query)
        if self.bm25 is not None:
            found[self.sparse_name] = models.SparseVector(**self.bm25.embed_query(query).model_dump())
        return found

    def sparse(self) -> dict[str, models.SparseVectorParams]:
        """The sparse vectors by name; Qdrant multiplies with the IDF."""
        return {} if self.bm25 is None else {self.sparse_name: models.SparseVectorParams(modifier=models.Modifier.IDF)}


def choose_vectors(
    mode: str | None,
    embedding: Embeddings | str | None,
    bm25: BM25SparseEmbeddings | Mapping[str, float] | None,
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
    one_of(RetrievalMode, "mode", mode)
    if mode != "sparse" and embedding is None:
        raise ConfigurationError(f"mode={mode!r} needs an embedding")
    return Vectors(
        embedding=None if mode == "sparse" else _embeddings(embedding),
        bm25=None if mode == "dense" else _bm25(bm25),
        distance=models.Distance(one_of(models.Distance, "distance", str(distance).capitalize())),
        dense_name=dense_name,
        sparse_name=sparse_name,
    )


def one_of(kinds: type[Enum], name: str, value: str) -> str:
    """The value, if it is one of the kinds'.

    Raises:
        ConfigurationError: It is none of them.
    """
    known = [str(kind.value) for kind in kinds]
    if value not in known:
        raise ConfigurationError(f"Unknown {name} {str(value).lower()!r}; there are {', '.join(known).lower()}")
    return value


def fused_by(name: str) -> models.FusionQuery:
    """How Qdrant puts two lists together.

    Raises:
        ConfigurationError: There is no such fusion.
    """
    return models.FusionQuery(fusion=models.Fusion(one_of(models.Fusion, "fusion", name)))


def _bm25(given: BM25SparseEmbeddings | Mapping[str, float] | None) -> BM25SparseEmbeddings:
    if isinstance(given, BM25SparseEmbeddings):
        return given
    settings = dict(given or {})
    refuse_unknown("bm25", settings, [field.name for field in fields(BM25SparseEmbeddings)])
    return BM25SparseEmbeddings(**settings)


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

    others: tuple[str, ...] = ()
    """Names of further vectors that stand there, which nothing here makes."""

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

    def add(self, points: Sequence[Point], *, batch_size: int, progress: bool) -> tuple[Collection, list[str]]:
        """Write points, over those with the same ids. A text that stands there already is not embedded again.

        Returns:
            This collection, from now on with the average length that BM25 takes here; and the ids of the points.

        Raises:
            CollectionMismatchError: The collection has vectors that would be left out.
        """
        if not points:
            return self, []
        self._refuse_half_points()
        collection = self._settled([point.text for point in points])
        store = collection.store()
        written: list[str] = []
        title = f"Writing {len(points)} documents to {self.name}"
        for batch in _shown(_batches(points, batch_size), title, progress=progress):
            placed = self._placed(batch)
            self._write(placed, store)
            written += [str(point.id) for point, _ in placed]
        return collection, written

    def missing(self, points: Sequence[Point], *, batch_size: int) -> list[Point]:
        """Those of the points that are not there."""
        placed = [pair for batch in _batches(points, batch_size) for pair in self._placed(batch)]
        return [point for point, stored in placed if stored is None]

    def delete(self, ids: Sequence[str], *, batch_size: int) -> int:
        """Delete the documents with these ids, the callers' or their points'.

        Returns:
            How many of them were there.
        """
        deleted = 0
        for batch in _batches([point_ids(name) for name in ids], batch_size):
            asked = list({each: None for pair in batch for each in pair if each is not None})
            there = {record.id for record in self.connection.retrieve(self.name, asked, with_payload=False)}
            if found := list({own if own in there else direct: None for own, direct in batch if {own, direct} & there}):
                self.connection.delete(self.name, models.PointIdsList(points=found))
                deleted += len(found)
        return deleted

    def search_both(
        self,
        query: str,
        *,
        k: int,
        hybrid_fusion: models.FusionQuery,
        filter: models.Filter | None = None,  # noqa: A002  # LangChain's names
    ) -> list[tuple[Document, float]]:
        """A hybrid search that keeps what each half says, in one request of three searches.

        Args:
            query: What the user asked.
            k: How many points to find, fused and by each half.
            hybrid_fusion: How the two are fused.
            filter: Which points to look at.

        Returns:
            The best k as langchain-qdrant returns them, with the fused score. In the metadata, under `prefetch_scores`,
            those of the halves that found it: `dense`, `sparse` or both.
        """
        halves = [
            models.QueryRequest(query=vector, using=name, filter=filter, limit=k, with_payload=False)
            for name, vector in self.vectors.of_query(query).items()
        ]
        prefetch = [models.Prefetch(query=half.query, using=half.using, filter=filter, limit=k) for half in halves]
        fused = models.QueryRequest(prefetch=prefetch, query=hybrid_fusion, limit=k, with_payload=True)
        both, *answers = self.connection.query_batch_points(self.name, [fused, *halves])
        scores = {
            half: {point.id: float(point.score) for point in answer.points}
            for half, answer in zip(("dense", "sparse"), answers, strict=True)
        }
        return [
            (to_found(point, {half: of[point.id] for half, of in scores.items() if point.id in of}), point.score)
            for point in both.points
        ]

    def _placed(self, batch: Sequence[Point]) -> list[tuple[Point, dict[str, Any] | None]]:
        """Each point where it belongs, and the payload that stands there, if any does."""
        asked = {each: None for point in batch for each in (point.id, point.direct_id) if each is not None}
        found = {record.id: record.payload or {} for record in self.connection.retrieve(self.name, list(asked))}
        points = [
            point.in_place_of(found[point.direct_id].get(METADATA_KEY) or {})
            if point.id not in found and point.direct_id in found
            else point
            for point in batch
        ]
        return [(point, found.get(point.id)) for point in points]

    def _write(self, placed: Sequence[tuple[Point, dict[str, Any] | None]], store: QdrantVectorStore) -> None:
        """Embed and write what is new or has another text; of what has only other metadata write those."""
        new = [point for point, stored in placed if stored is None or stored.get(TEXT_KEY) != point.text]
        old = [(point, stored) for point, stored in placed if stored and stored.get(TEXT_KEY) == point.text]
        if new:
            texts, metadatas = [point.text for point in new], [point.metadata for point in new]
            store.add_texts(texts, metadatas, [point.id for point in new], batch_size=len(new))
        changes = [
            models.SetPayloadOperation(
                set_payload=models.SetPayload(payload={METADATA_KEY: point.metadata}, points=[point.id])
            )
            for point, stored in old
            if stored.get(METADATA_KEY) != point.metadata
        ]
        if changes:
            self.connection.batch_update_points(self.name, changes)

    def _refuse_half_points(self) -> None:
        if self.others:
            raise CollectionMismatchError(
                f"Collection {self.name!r} at {self.connection.place} also has vectors named {_names(self.others)}, "
                f"which mode={self.vectors.mode.value!r} does not make: documents would lack them. Nothing was "
                "written. Write with mode='hybrid', or with the program that makes them."
            )

    def index(self, wanted: Mapping[str, str | None], points: Sequence[Point]) -> None:
        """Make the payload indexes that are not there; an embedded database has none, and is left alone.

        Args:
            wanted: The kind of index by field, as a filter names it; `None` is the kind of the values in `points`,
                or else of those in the collection.
            points: What will be written next.

        Raises:
            CollectionMismatchError: An index of another kind is there.
            ConfigurationError: A kind cannot be told.
        """
        if not wanted:
            return
        there = self.connection.get_collection(self.name).payload_schema
        for field, kind in wanted.items():
            if kind and field in there and there[field].data_type != kind:
                raise self._mismatch(
                    f"an index of the kind {there[field].data_type.value!r} on {field!r}, not {kind!r}",
                    "payload_indexes",
                )
        new = {field: kind or self._kind(field, points) for field, kind in wanted.items() if field not in there}
        for field, kind in new.items():
            if not self.connection.embedded:
                self.connection.create_payload_index(self.name, field, models.PayloadSchemaType(kind))

    def _kind(self, field: str, points: Sequence[Point]) -> str:
        """The kind of index that the values of a field want."""
        payloads: list[Any] = [{TEXT_KEY: point.text, METADATA_KEY: point.metadata} for point in points]
        found = kind_of(field, payloads)
        if found is None:
            holds = models.Filter(must_not=[models.IsEmptyCondition(is_empty=models.PayloadField(key=field))])
            records, _ = self.connection.scroll(self.name, scroll_filter=holds, limit=_SAMPLE)
            found = kind_of(field, [record.payload for record in records])
        if found is None:
            raise ConfigurationError(
                f"The kind of index for {field!r} cannot be told from the documents. Give it: "
                f"payload_indexes={{{field!r}: ...}}, one of {', '.join(KINDS)}"
            )
        return found

    def _make(self) -> None:
        bm25 = self.vectors.bm25
        self.connection.create_collection(
            self.name,
            vectors_config=self.vectors.dense(),
            sparse_vectors_config=self.vectors.sparse(),
            metadata=_kept(bm25) if bm25 and bm25.average_length else None,
        )
        logger.info("Made the collection %r at %s", self.name, self.connection.place)

    def _checked(self) -> Collection:
        config = self.connection.get_collection(self.name).config
        vectors = config.params.vectors or {}
        dense = vectors if isinstance(vectors, Mapping) else {"": vectors}
        sparse = config.params.sparse_vectors or {}
        self._check_dense(dense)
        self._check_sparse(sparse)
        others = tuple(name for name in (*dense, *sparse) if name not in self.vectors.names)
        return replace(self._with_kept(config.metadata), others=others)

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


def _batches(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _names(found: Iterable[str]) -> str:
    return ", ".join(map(repr, found)) or "nothing"


def _shown(batches: Sequence[_T], what: str, *, progress: bool) -> Iterator[_T]:
    """The batches, with a bar on a terminal where there are several."""
    if not progress or len(batches) == 1 or not sys.stderr.isatty():
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(batches, what, console=Console(stderr=True), transient=True)

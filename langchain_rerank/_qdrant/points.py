"""How a document becomes a Qdrant point, and how it comes back."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document

from langchain_rerank.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAMESPACE = uuid.UUID("58b61a3b-fa20-43d9-b6ce-b179d2e9d009")
"""Of the points' ids. It must never change: documents that are stored already would be stored twice."""

TEXT_KEY, METADATA_KEY = "page_content", "metadata"
"""The keys of a point's payload, as langchain-qdrant has them."""

_OWN = "_langchain_rerank"
"""The metadata key under which a point keeps what langchain-qdrant has no place for."""

_POINT_ID, _COLLECTION = "_id", "_collection_name"
"""The metadata keys that langchain-qdrant writes into whatever it returns."""

_PREFETCH_SCORES = "prefetch_scores"
"""The metadata key of what each half of a hybrid search says."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Point:
    """One document as it is stored."""

    id: str | int
    """A UUID, the same for the same document; or what another program has given."""

    text: str

    metadata: dict[str, Any]
    """JSON. The document's own, and under one key of ours the caller's id."""

    document_id: str | None = None
    """The document's own id, if it has one."""

    direct_id: str | int | None = None
    """The document's id, if it could be that of a point: so come back documents that had none."""

    def in_place_of(self, stored: Mapping[str, Any]) -> Point:
        """This document as the point that has its id directly.

        Args:
            stored: The metadata of that point; a caller's id that stands there stays.
        """
        kept = {key: value for key, value in self.metadata.get(_OWN, {}).items() if key != "id"}
        if "id" in (own := stored.get(_OWN) or {}):
            kept["id"] = own["id"]
        metadata = {key: value for key, value in self.metadata.items() if key != _OWN}
        point_id = self.id if self.direct_id is None else self.direct_id
        return replace(self, id=point_id, metadata={**metadata, **({_OWN: kept} if kept else {})})


def to_points(documents: Iterable[Document | str | None]) -> list[Point]:
    """Turn documents into points.

    The id is the uuid5 of the document's id, or of its text and metadata where it has none. A lone surrogate, which
    no server can store, becomes U+FFFD.

    Args:
        documents: Documents or texts; `None` is an empty text.

    Returns:
        One point for each distinct id, in the order of `documents`; of several with one id, the last.

    Raises:
        ConfigurationError: Something is no document, or its metadata is no JSON.
    """
    if isinstance(documents, (str, Document)):
        raise ConfigurationError(f"documents is one {type(documents).__name__}; put it into a list")
    points = [_to_point(document, index) for index, document in enumerate(documents)]
    return list({point.id: point for point in points}.values())


def to_found(point: Any, prefetch_scores: Mapping[str, float]) -> Document:
    """A point as `QdrantVectorStore` returns it, with the scores of each half of a hybrid search."""
    payload = point.payload or {}
    extra = {_POINT_ID: point.id, _PREFETCH_SCORES: dict(prefetch_scores)}
    metadata = {**(payload.get(METADATA_KEY) or {}), **extra}
    return Document(page_content=payload.get(TEXT_KEY) or "", metadata=metadata)


def to_document(found: Document) -> Document:
    """Undo what `to_points` and langchain-qdrant did.

    Args:
        found: As `QdrantVectorStore` returns it, from a collection of ours or anybody's.

    Returns:
        A new document with its own metadata, and as its id the one it came with, else the point's.
    """
    metadata = dict(found.metadata)
    point_id = metadata.pop(_POINT_ID, None)
    metadata.pop(_COLLECTION, None)
    own = metadata.pop(_OWN, {})
    metadata.update(own.get("metadata", {}))
    return Document(id=own.get("id", point_id), page_content=found.page_content, metadata=metadata)


def point_ids(document_id: str) -> tuple[str, str | int | None]:
    """The ids under which a document may be stored.

    Args:
        document_id: The caller's, or that of a point.

    Returns:
        The id that `to_points` makes of it, and the id itself if it could be that of a point: a UUID or a number.
    """
    return str(uuid.uuid5(NAMESPACE, _as_json(document_id))), _direct(document_id)


def _direct(document_id: str) -> str | int | None:
    if re.fullmatch("[0-9]{1,19}", document_id):
        return int(document_id)
    try:
        return str(uuid.UUID(document_id))
    except ValueError:
        return None


def _to_point(document: Document | str | None, index: int) -> Point:
    if document is None or isinstance(document, str):
        document = Document(page_content=document or "")
    if not isinstance(document, Document):
        raise ConfigurationError(f"documents[{index}] is a {type(document).__name__}, not a Document or a text")
    text, document_id = _as_json(document.page_content), _as_json(document.id)
    metadata = _metadata(document, index)
    name = json.dumps([text, metadata], sort_keys=True) if document_id is None else document_id
    own = {key: metadata[key] for key in (_POINT_ID, _COLLECTION, _OWN) if key in metadata}  # will be overwritten
    kept = {**({"id": document_id} if document_id is not None else {}), **({"metadata": own} if own else {})}
    direct = None if document_id is None else _direct(document_id)
    return Point(
        str(uuid.uuid5(NAMESPACE, name)), text, {**metadata, **({_OWN: kept} if kept else {})}, document_id, direct
    )


def _metadata(document: Document, index: int) -> dict[str, Any]:
    bad = {key: value for key, value in document.metadata.items() if not _is_json(key, value)}
    for key, value in bad.items():
        raise ConfigurationError(
            f"metadata[{key!r}] of documents[{index}] (id {document.id!r}) is {value!r}, which is no JSON. "
            "Make it a finite number, a text, a bool, None, or a list or dict of these."
        )
    metadata: dict[str, Any] = _as_json(document.metadata)
    return metadata


def _is_json(key: Any, value: Any) -> bool:
    try:
        json.dumps({key: value}, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _as_json(value: Any) -> Any:
    """The value as it comes back from JSON, with no lone surrogates."""
    return json.loads(_SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False)))

"""How a document becomes a Qdrant point, and how it comes back."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document

from langchain_rerank.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

NAMESPACE = uuid.UUID("58b61a3b-fa20-43d9-b6ce-b179d2e9d009")
"""Of the points' ids. It must never change: documents that are stored already would be stored twice."""

_OWN = "_langchain_rerank"
"""The metadata key under which a point keeps what langchain-qdrant has no place for."""

_POINT_ID, _COLLECTION = "_id", "_collection_name"
"""The metadata keys that langchain-qdrant writes into whatever it returns."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Point:
    """One document as it is stored."""

    id: str
    """A UUID, the same for the same document."""

    text: str

    metadata: dict[str, Any]
    """JSON. The document's own, and under one key of ours the caller's id."""


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
    return Point(str(uuid.uuid5(NAMESPACE, name)), text, {**metadata, **({_OWN: kept} if kept else {})})


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

"""Which payload indexes a collection should have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from langchain_rerank._qdrant.points import METADATA_KEY, TEXT_KEY
from langchain_rerank.errors import ConfigurationError

KINDS = ("keyword", "integer", "float", "geo", "text", "bool", "datetime", "uuid")
"""As Qdrant's `PayloadSchemaType` calls them."""

_KIND_OF: dict[type, str] = {bool: "bool", int: "integer", float: "float", str: "keyword"}


def choose_indexes(given: Iterable[str] | Mapping[str, str | None]) -> dict[str, str | None]:
    """The kind of index by field, `None` where it is to be told from the documents.

    Raises:
        ConfigurationError: A field cannot be one, or a kind is unknown.
    """
    if isinstance(given, str):
        raise ConfigurationError(f"payload_indexes is one text; put {given!r} into a list")
    wanted = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given)
    for field, kind in wanted.items():
        if field != TEXT_KEY and not str(field).startswith(f"{METADATA_KEY}."):
            raise ConfigurationError(
                f"payload_indexes names {field!r}; a field is named as in a filter, such as 'metadata.{field}'"
            )
        if kind is not None and kind not in KINDS:
            raise ConfigurationError(f"Unknown kind of index {kind!r}; there are {', '.join(KINDS)}")
    return wanted


def kind_of(field: str, payloads: Iterable[Any]) -> str | None:
    """The kind of index that a field's values want; `None` where there are none, or of several kinds."""
    kinds = {_KIND_OF.get(type(value)) for payload in payloads for value in _values(payload, field.split("."))}
    if kinds == {"integer", "float"}:
        return "float"
    return kinds.pop() if len(kinds) == 1 else None


def _values(content: Any, path: list[str]) -> Iterator[Any]:
    """What stands at the end of the path; of a list each item, as Qdrant sees it."""
    if isinstance(content, list):
        for item in content:
            yield from _values(item, path)
    elif not path:
        if content is not None:
            yield content
    elif isinstance(content, dict):
        yield from _values(content.get(path[0].removesuffix("[]")), path[1:])

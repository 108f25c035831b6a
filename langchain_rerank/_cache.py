"""Scores that were computed before, in any LangChain byte store."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from langchain_core.stores import ByteStore

from langchain_rerank.backends.base import Backend, Score, report_usage

logger = logging.getLogger(__name__)

_FLOAT = struct.Struct("<d")


class ScoreCache:
    """Looks scores up by query, text and everything about the backend that can change a score.

    Keys are hexadecimal digests, values 8-byte floats, and behind them the details of a score that has any, such as
    that of a truncated text, as JSON. A value that is no score is a miss. A score whose details JSON would change is
    not kept. A store that fails costs a warning and its hits, never the ranking.

    Args:
        store: Where they are kept.
        backend: Whose scores they are.
    """

    def __init__(self, store: ByteStore, backend: Backend) -> None:
        self._store, self._backend = store, backend

    def get(self, query: str, texts: Sequence[str]) -> dict[str, float]:
        """The scores that are known, by text; may block, and may read the model's files once."""
        if not texts:
            return {}
        keys, values = self._keys(query, texts), None
        with self._forgiving("read"):
            values = self._store.mget(keys)
        return self._known(texts, values)

    def put(self, query: str, scores: Mapping[str, float]) -> None:
        """Keep new scores, by text."""
        values = _values(scores)
        if values:
            keys = self._keys(query, list(values))
            with self._forgiving("write"):
                self._store.mset(list(zip(keys, values.values(), strict=True)))

    async def aget(self, query: str, texts: Sequence[str]) -> dict[str, float]:
        """As `get`, through the store's own asynchronous methods."""
        if not texts:
            return {}
        keys, values = await self._akeys(query, texts), None
        with self._forgiving("read"):
            values = await self._store.amget(keys)
        return self._known(texts, values)

    async def aput(self, query: str, scores: Mapping[str, float]) -> None:
        """As `put`, through the store's own asynchronous methods."""
        values = _values(scores)
        if values:
            keys = await self._akeys(query, list(values))
            with self._forgiving("write"):
                await self._store.amset(list(zip(keys, values.values(), strict=True)))

    @contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        """Make a warning of whatever the store raises: a Redis that is away must not take the search along."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each store has errors of its own
            logger.warning(
                "%s cannot %s scores, and the ranking goes on without it: %s: %s",
                type(self._store).__name__,
                what,
                type(error).__name__,
                " ".join(str(error).split()),
            )

    def _known(self, texts: Sequence[str], values: Sequence[bytes | None] | None) -> dict[str, float]:
        found = [None] * len(texts) if values is None else values
        read = ((text, _score(value)) for text, value in zip(texts, found, strict=True))
        known = {text: score for text, score in read if score is not None}
        report_usage(cache_hits=len(known), cache_misses=len(texts) - len(known))
        return known

    def _keys(self, query: str, texts: Sequence[str]) -> list[str]:
        return _digests(self._backend.fingerprint(), query, texts)

    async def _akeys(self, query: str, texts: Sequence[str]) -> list[str]:
        return _digests(await self._backend.afingerprint(), query, texts)


def _digests(fingerprint: Mapping[str, Any], query: str, texts: Sequence[str]) -> list[str]:
    """One key for each text; each part with its length before it, so that no two lists of parts run together."""
    start = hashlib.sha256()
    for part in (json.dumps(fingerprint, sort_keys=True, default=repr), query):
        _feed(start, part)
    digests = []
    for text in texts:
        digest = start.copy()
        _feed(digest, text)
        digests.append(digest.hexdigest())
    return digests


def _feed(digest: Any, part: str) -> None:
    content = part.encode("utf-8", "surrogatepass")
    digest.update(len(content).to_bytes(8, "little") + content)


def _values(scores: Mapping[str, float]) -> dict[str, bytes]:
    values = {}
    for text, score in scores.items():
        details = dict(score.details) if isinstance(score, Score) else {}
        with suppress(TypeError, ValueError, RecursionError):  # JSON does not know such details
            content = json.dumps(details).encode() if details else b""
            if not content or json.loads(content) == details:
                values[text] = _FLOAT.pack(score) + content
    return values


def _score(value: bytes | None) -> float | None:
    if value is None or len(value) < _FLOAT.size:
        return None
    score: float = _FLOAT.unpack_from(value)[0]
    if not (math.isfinite(score) and 0.0 <= score <= 1.0):
        return None
    return _with_details(score, value[_FLOAT.size :])


def _with_details(score: float, content: bytes) -> float | None:
    if not content:
        return score
    try:
        details = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return Score(score, details) if isinstance(details, dict) else None

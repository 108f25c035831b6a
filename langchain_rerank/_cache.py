"""Scores that were computed before, in any LangChain byte store."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.stores import ByteStore

from langchain_rerank.backends.base import Backend, Score, report_usage

_FLOAT = struct.Struct("<d")


class ScoreCache:
    """Looks scores up by query, text and everything about the backend that can change a score.

    Keys are hexadecimal digests, values 8-byte floats. A value that is no score is a miss. A score with details, such
    as that of a truncated text, is not kept: the details would be lost.

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
        return self._known(texts, self._store.mget(self._keys(query, texts)))

    def put(self, query: str, scores: Mapping[str, float]) -> None:
        """Keep new scores, by text."""
        values = _values(scores)
        if values:
            self._store.mset(list(zip(self._keys(query, list(values)), values.values(), strict=True)))

    async def aget(self, query: str, texts: Sequence[str]) -> dict[str, float]:
        """As `get`, through the store's own asynchronous methods."""
        if not texts:
            return {}
        return self._known(texts, await self._store.amget(await self._akeys(query, texts)))

    async def aput(self, query: str, scores: Mapping[str, float]) -> None:
        """As `put`, through the store's own asynchronous methods."""
        values = _values(scores)
        if values:
            keys = await self._akeys(query, list(values))
            await self._store.amset(list(zip(keys, values.values(), strict=True)))

    def _known(self, texts: Sequence[str], values: Sequence[bytes | None]) -> dict[str, float]:
        read = ((text, _score(value)) for text, value in zip(texts, values, strict=True))
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
    plain = {text: score for text, score in scores.items() if not (isinstance(score, Score) and score.details)}
    return {text: _FLOAT.pack(score) for text, score in plain.items()}


def _score(value: bytes | None) -> float | None:
    if value is None or len(value) != _FLOAT.size:
        return None
    score: float = _FLOAT.unpack(value)[0]
    return score if math.isfinite(score) and 0.0 <= score <= 1.0 else None
